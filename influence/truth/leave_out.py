"""Retraining without rows: the truth that influence predicts, with a certificate on every refit."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common.checkpoint import check_folder
from influence.common.convergence import ConvergenceWarning, warn_unconverged
from influence.curvature.operators import Hessian
from influence.examples.examples import Examples, check_rows
from influence.minimisers import block_lbfgs
from influence.net.minimum import TOLERANCE, check_at_minimum, warn_of_drift
from influence.net.net import GenericNeuralNet
from influence.solvers import Direct, Prepared, Solver, prepare
from influence.truth import runs
from influence.truth.removal import Removal
from influence.truth.runs import Groups, Refits, Task


def leave_one_out(
    net: GenericNeuralNet,
    train: Examples,
    test: Examples,
    rows: ArrayLike,
    *,
    method: Literal["newton", "fit"] | None = None,
    tolerance: float | None = None,
    solver: Solver | Prepared = Direct(),
    start: NDArray | None = None,
    fit: Callable[[GenericNeuralNet, Examples], Any] | None = None,
    max_passes: int = 30,
    block: int = 50,
    batch_size: int | None = None,
    num_processes: int = 1,
    checkpoints: str | Path | None = None,
    key: str = "",
) -> Refits:
    """Actual change of each test loss after retraining without each row, one row at a time.

    R_-i(theta) = mean over the other n - 1 rows + the same penalty is minimised for every row i, as
    `leave_group_out` does for groups of one row. The net is left as it was.

    Args:
      net: at the minimum of its risk on `train`; from elsewhere "fit" warns of drift.
      train: the training set, n rows.
      test: m examples whose losses are measured; the penalty is not part of them.
      rows: (k,) rows to remove, each alone.
      method: "newton" or "fit"; None takes "newton" for a convex net and "fit" for any other.
      tolerance: Euclidean norm of each refit's own gradient to reach; None as in `leave_group_out`.
      solver: for "newton": how the full-data Hessian is inverted.
      start: (d,) parameters that each "fit" begins with; None for the net's present ones.
      fit: replaces `net.fit` as the thing called on (net, remaining rows).
      max_passes: data passes at most for each refit by "newton".
      block: refits that share a data pass. Part of the checkpoints' identity.
      batch_size: rows of the training set at a time; None: chosen.
      num_processes: joblib workers, which share the cores; -1 for one a core. The last bits may
        depend on it.
      checkpoints: a folder where finished blocks are kept.
      key: part of the checkpoints' identity; required with them where `fit` is given.

    Returns: Refits; positive: the test loss rose without the row, so the row helped.
    Raises: ValueError, TypeError or IndexError for bad input before any long work. Refits that miss
      the tolerance are marked in `converged`, with a ConvergenceWarning.
    """
    task = _task(net, train, test, method, tolerance, max_passes, block, batch_size, start, fit)
    rows = check_rows(rows, len(train))
    return _retrained(
        task, list(rows[:, None]), rows, (), method, solver, block, num_processes, checkpoints, key
    )


def leave_group_out(
    net: GenericNeuralNet,
    train: Examples,
    test: Examples,
    groups: Sequence[ArrayLike] | Mapping[str, ArrayLike],
    *,
    method: Literal["newton", "fit"] | None = None,
    tolerance: float | None = None,
    solver: Solver | Prepared = Direct(),
    start: NDArray | None = None,
    fit: Callable[[GenericNeuralNet, Examples], Any] | None = None,
    max_passes: int = 100,
    block: int = 50,
    batch_size: int | None = None,
    num_processes: int = 1,
    checkpoints: str | Path | None = None,
    key: str = "",
) -> Refits:
    """Actual change of each test loss after retraining without each group of rows.

    R_-g(theta) = mean over the rows outside the group + the same penalty is minimised for every
    group g; groups may overlap and differ in size.

    "newton" (convex models): from theta, Newton's step with the full-data Hessian, factored once,
    and the group's own curvature taken out of it; then secant updates, which learn how the
    curvature changes on the way. One data pass serves `block` refits. "fit": the net's own `fit` on
    the remaining rows, from theta (warm) or from `start` (cold). The net is left as it was.

    Args:
      net: at the minimum of its risk on `train`; from elsewhere "fit" warns of drift.
      train: the training set, n rows.
      test: m examples whose losses are measured; the penalty is not part of them.
      groups: k arrays of row numbers, each removed together, or a dict from names to such arrays.
      method: None takes "newton" for a convex net and "fit" for any other.
      tolerance: Euclidean norm of each refit's own gradient to reach, which the net's own fit is
        given too. None: 1e-8 for "newton"; for "fit" the norms are reported and not judged, so that
        nothing counts as converged.
      solver: for "newton": how the full-data Hessian is inverted; what `prepare` returned for
        `Hessian(net, train)` is not prepared again.
      start: (d,) parameters that each "fit" begins with; None for the net's present ones.
      fit: replaces `net.fit` as the thing called on (net, remaining rows). All of the model's
        variables, dropout's generators among them, are put back after each call; an optimiser that
        it needs it must make itself.
      max_passes: data passes at most for each refit by "newton".
      block: refits that share a data pass. Part of the checkpoints' identity.
      batch_size: rows of the training set at a time; None: chosen.
      num_processes: joblib workers, which share the cores; -1 for one a core. The last bits may
        depend on it. Set a joblib backend to leave the machine.
      checkpoints: a folder where finished blocks are kept. A call that was interrupted, by kill -9
        too, continues from there and ends bit for bit as if it had not been; with dropout, if its
        layers were given seeds.
      key: part of the checkpoints' identity: what they cannot see, such as the hyperparameters of
        `fit`. Required with `checkpoints` where `fit` is given.

    Returns: Refits (m, k), columns in the order of the groups; positive: the test loss rose without
      the group, so the group helped.
    Raises: ValueError, TypeError or IndexError for bad input before any long work. Refits that miss
      the tolerance are marked in `converged`, with a ConvergenceWarning.
    """
    task = _task(net, train, test, method, tolerance, max_passes, block, batch_size, start, fit)
    names, rows = runs.check_groups(groups, len(train))
    return _retrained(
        task, rows, tuple(rows), names, method, solver, block, num_processes, checkpoints, key
    )


def _task(
    net: GenericNeuralNet,
    train: Examples,
    test: Examples,
    method: str | None,
    tolerance: float | None,
    max_passes: int,
    block: int,
    batch_size: int | None,
    start: NDArray | None,
    fit: Callable | None,
) -> Task:
    """What the caller gave, once it is known to be right."""
    runs.check(net, train, test, tolerance=tolerance, block=block, batch_size=batch_size)
    if method not in (None, "newton", "fit"):
        raise ValueError(f"method must be 'newton' or 'fit', got {method!r}.")
    if method == "newton" and not net.convex:
        raise ValueError(
            f"method must be 'fit' for {type(net).__name__}, which is not known to be convex, got "
            "'newton'; set net.convex = True if its risk is strictly convex."
        )
    if start is not None and np.shape(start) != (net.num_parameters,):
        raise ValueError(f"start must have shape ({net.num_parameters},), got {np.shape(start)}.")
    if start is not None and not np.isfinite(start).all():
        raise ValueError("start must be finite, got a NaN or infinity.")
    if max_passes < 1:
        raise ValueError(f"max_passes must be at least 1, got {max_passes}.")
    return Task(net, train, test, tolerance, max_passes, batch_size, start, fit)


def _retrained(
    task: Task,
    groups: Groups,
    rows: Any,
    names: tuple,
    method: str | None,
    solver: Solver | Prepared,
    block: int,
    num_processes: int,
    checkpoints: str | Path | None,
    key: str,
) -> Refits:
    net, train = task.net, task.train
    method = method or ("newton" if net.convex else "fit")
    if task.fit is not None and checkpoints is not None and not key:
        raise ValueError(
            "key must say what `fit` does when both fit and checkpoints are given, got ''; name "
            "its hyperparameters, so that another fit's results are not taken for this one's."
        )
    check_folder(checkpoints)
    runs.check_processes(num_processes, net, task.fit)
    label, inverse, refit = "", None, _fit_block
    if method == "newton":
        tolerance = TOLERANCE if task.tolerance is None else task.tolerance
        task = Task(net, train, task.test, tolerance, task.max_passes, task.batch_size)
        check_at_minimum(net, train, tolerance, "use method='fit'", task.batch_size)
        inverse = prepare(Hessian(net, train, batch_size=task.batch_size), solver)
        label, refit = repr(inverse.solver), _newton_block
    else:
        warn_of_drift(net, train, groups, task.batch_size)
    found = runs.run(
        task,
        refit,
        groups,
        inverse,
        block=block if method == "newton" else 1,
        checkpoints=checkpoints,
        identity=(method, label, key),
        num_processes=num_processes,
        what="refits without rows",
    )
    norms, tolerance = found["gradient_norm"], task.tolerance
    converged = norms <= tolerance if tolerance is not None else np.zeros(len(norms), bool)
    asked = _asked_of_fit(task) if method == "fit" and tolerance is None else tolerance
    if asked is not None and norms.max() > asked:
        more = "allow more max_passes, " if method == "newton" else ""
        warn_unconverged(
            f"{np.count_nonzero(norms > asked)} of {len(norms)} refits ended above a gradient norm "
            f"of {asked:.1e} (worst {norms.max():.1e}): {more}use float64, or a larger tolerance."
        )
    return Refits(found["change_if_removed"], rows, norms, found["passes"], converged, names=names)


def _newton_block(task: Task, groups: Groups, inverse: Prepared) -> dict[str, NDArray]:
    """The minima of R_-g for some groups, a column each.

    R_-g' = (n R' - sum over g of (loss_i + penalty)') / (n - r) for a group of r rows, and its
    Hessian at theta is n / (n - r) times what `Removal.solve` inverts.
    """
    net, train, n = task.net, task.train, len(task.train)
    removed = Removal(net, train, groups, task.batch_size)
    share = ((n - removed.sizes) / n).astype(net.dtype)

    def gradients(thetas: NDArray, columns: NDArray) -> NDArray:
        whole = net.risk_gradient(train, thetas, task.batch_size)
        return (whole - removed.gradients(thetas, columns) / n) / share[columns]

    def steps(G: NDArray, columns: NDArray) -> NDArray:
        return removed.solve(inverse, G * share[columns], columns)

    every = np.arange(len(groups))
    thetas = np.repeat(net.theta[:, None], len(groups), axis=1)
    whole = net.risk_gradient(train, batch_size=task.batch_size)  # at theta it is one for all
    first = (whole[:, None] - removed.gradients(thetas, every) / n) / share
    tolerance = np.full(len(groups), task.tolerance)
    found = block_lbfgs.minimise(gradients, steps, thetas, first, tolerance, task.max_passes)
    return {
        "change_if_removed": task.changes(found.thetas),
        "gradient_norm": found.norms,
        "passes": found.passes,
    }


def _asked_of_fit(task: Task) -> float | None:
    """The gradient norm that the net's own fit is to reach; None if it has no such tolerance."""
    own = inspect.signature(type(task.net).fit).parameters.get("gradient_tolerance")
    if task.fit is not None or own is None:
        return None
    return own.default if task.tolerance is None else task.tolerance


def _fit_block(task: Task, groups: Groups, _: Any) -> dict[str, NDArray]:
    """The net's own fit without one group, from where it is or from `start`; then put back."""
    net, remaining = task.net, task.train.without(groups[0])
    # With the statistics that training moves and dropout's generators, not theta alone.
    variables = net.model.variables
    before = [variable.numpy() for variable in variables]
    losses, asked = task.losses(), _asked_of_fit(task)
    options: Any = {} if task.tolerance is None or asked is None else {"gradient_tolerance": asked}
    try:
        if task.start is not None:
            net.theta = task.start
        with warnings.catch_warnings():
            if asked is not None:  # one warning for all, at the end
                warnings.simplefilter("ignore", ConvergenceWarning)
            (task.fit or type(net).fit)(net, remaining, **options)
        change = task.losses() - losses
        norm = net.gradient_norm(remaining, task.batch_size)
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
    return {
        "change_if_removed": change[:, None],
        "gradient_norm": np.array([norm]),
        "passes": np.ones(1, int),
    }
