"""Retraining without rows: the truth that influence predicts, with a certificate on every refit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import joblib
import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.checkpoint import kept
from influence.convergence import warn_unconverged
from influence.estimand import Estimand
from influence.examples import Examples, check_rows
from influence.net import GenericNeuralNet
from influence.operators import Hessian, check_batch_size
from influence.progress import progress
from influence.solvers import Direct, Prepared, Solver, prepare

_NEWTON_TOLERANCE = 1e-8
_INNER_STEPS = 10  # of the fixed point that takes the row's own curvature out of the step
_INNER_RTOL = 1e-3  # Newton's own error is larger than this


@dataclass(frozen=True, eq=False)
class Refits(Estimand):
    """Actual changes, (m, k), of each test loss after retraining without each row.

    Attributes:
      change_if_removed: (m, k) test loss after retraining without the row, minus before.
      rows: (k,) the rows.
      gradient_norm: (k,) Euclidean norm of each refit's own risk gradient: the certificate.
      passes: (k,) data passes (newton) or calls of `fit` that each refit took.
      converged: (k,) gradient_norm within the tolerance.
    """

    gradient_norm: NDArray
    passes: NDArray
    converged: NDArray


@dataclass(frozen=True)
class _Task:
    """What every block of refits shares."""

    net: GenericNeuralNet
    train: Examples
    test: Examples
    tolerance: float | None
    batch_size: int | None
    max_passes: int
    start: NDArray | None
    fit: Callable | None


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

    R_-i(theta) = mean over the other n - 1 rows + the same penalty is minimised for every row i.

    "newton" (convex models): from theta, steps with the full-data Hessian, factored once, and row
    i's own curvature taken out of it; one data pass serves `block` refits. "fit": the net's own
    `fit` on the n - 1 rows, from theta (warm) or from `start` (cold). The net is left as it was.

    Args:
      net: at the minimum of its risk on `train` for "newton", anywhere for "fit".
      train: the training set, n rows.
      test: m examples whose losses are measured; the penalty is not part of them.
      rows: (k,) rows to remove, each alone.
      method: None takes "newton" for a convex net and "fit" for any other.
      tolerance: Euclidean norm of each refit's own gradient to reach. None: 1e-8 for "newton"; for
        "fit" the norms are reported and not judged, so that nothing counts as converged.
      solver: for "newton": how the full-data Hessian is inverted; what `prepare` returned for
        `Hessian(net, train)` is not prepared again.
      start: (d,) parameters that each "fit" begins with; None for the net's present ones.
      fit: replaces `net.fit` as the thing called on (net, remaining rows). All of the model's
        weights are put back after each call; an optimiser that it needs it must make itself.
      max_passes: data passes at most for each refit by "newton".
      block: refits that share a data pass. Part of the checkpoints' identity.
      batch_size: rows of the training set at a time; None: chosen.
      num_processes: joblib workers; -1 for one a core. Set a joblib backend to leave the machine.
      checkpoints: a folder where finished blocks are kept. A call that was interrupted, by kill -9
        too, continues from there and ends bit for bit as if it had not been.
      key: part of the checkpoints' identity: what they cannot see, such as the hyperparameters of
        `fit`. Required with `checkpoints` where `fit` is given.

    Returns: Refits; positive: the test loss rose without the row, so the row helped.
    Raises: ValueError, TypeError or IndexError for bad input before any long work. Refits that miss
      the tolerance are marked in `converged`, with a ConvergenceWarning.
    """
    if not isinstance(net, GenericNeuralNet):
        raise TypeError(f"net must be a GenericNeuralNet, got {type(net).__name__}.")
    net.validate(train, "train")
    net.validate(test, "test")
    rows = check_rows(rows, len(train))
    method = method or ("newton" if net.convex else "fit")
    _check(net, train, method, tolerance, start, block, max_passes)
    check_batch_size(batch_size)
    if num_processes == 0:
        raise ValueError("num_processes must not be 0; 1 is this process, -1 is one a core.")
    if fit is not None and checkpoints is not None and not key:
        raise ValueError(
            "key must say what `fit` does when both fit and checkpoints are given, got ''; name "
            "its hyperparameters, so that another fit's results are not taken for this one's."
        )
    if method == "newton":
        tolerance = _NEWTON_TOLERANCE if tolerance is None else tolerance
        norm = float(np.linalg.norm(net.risk_gradient(train, batch_size=batch_size)))
        if norm > tolerance:
            raise ValueError(
                f"net must be at the minimum of its risk, got a gradient norm of {norm:.1e}, above "
                f"the tolerance {tolerance:.1e}; call net.fit(train) first or use method='fit'."
            )
        prepared = prepare(Hessian(net, train, batch_size=batch_size), solver)
        size, refit, argument = block, _newton_block, prepared
        label = repr(prepared.solver)
    else:
        size, refit, argument, label = 1, _fit_block, None, ""
    task = _Task(net, train, test, tolerance, batch_size, max_passes, start, fit)
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    paths: list[Path | None] = [None] * len(parts)
    if checkpoints is not None:
        identity = _identity(task, method, label, key)
        names = [joblib.hash(part) for part in parts]
        paths = [Path(checkpoints) / f"refits-{identity}-{name}.npz" for name in names]
    work = joblib.Parallel(n_jobs=num_processes, return_as="generator")(
        joblib.delayed(_kept_block)(path, refit, task, part, argument)
        for path, part in zip(paths, parts, strict=True)
    )
    done = list(progress(work, "leave-one-out refits", len(parts)))
    joined = {name: np.concatenate([d[name] for d in done], axis=-1) for name in done[0]}
    judged = tolerance is not None
    converged = joined["gradient_norm"] <= tolerance if judged else np.zeros(len(rows), bool)
    if judged and not converged.all():
        warn_unconverged(
            f"{np.count_nonzero(~converged)} of {len(rows)} refits ended above a gradient norm of "
            f"{tolerance:.1e} (worst {joined['gradient_norm'].max():.1e}): allow more max_passes, "
            "fit with a tighter tolerance, or use float64."
        )
    return Refits(
        joined["change_if_removed"], rows, joined["gradient_norm"], joined["passes"], converged
    )


def _kept_block(
    path: Path | None, refit: Callable, task: _Task, rows: NDArray, argument: Any
) -> Any:
    return kept(path, lambda: refit(task, rows, argument))


def _newton_block(task: _Task, rows: NDArray, inverse: Prepared) -> dict[str, NDArray]:
    """Newton's iteration on R_-i for a block of rows, a column each."""
    net, train = task.net, task.train
    n, k = len(train), len(rows)
    removed = train.take(rows)
    thetas = np.repeat(net.theta[:, None], k, axis=1)
    gradients = _gradients_without(task, removed, thetas, at_theta=True)
    norms = np.linalg.norm(gradients, axis=0)
    passes = np.zeros(k, int)
    tolerance = task.tolerance or _NEWTON_TOLERANCE
    todo = np.flatnonzero(norms > tolerance)
    steps = np.zeros_like(thetas)
    steps[:, todo] = (
        _steps(net, n, removed.take(todo), gradients[:, todo], inverse) if len(todo) else 0
    )
    length = np.ones(k)
    while len(todo) and passes.max() < task.max_passes:
        tried = thetas[:, todo] - length[todo] * steps[:, todo]
        left = removed.take(todo)
        gradients = _gradients_without(task, left, tried)
        new_norms = np.linalg.norm(gradients, axis=0)
        passes[todo] += 1
        better = new_norms < norms[todo]
        length[todo] = np.where(better, 1.0, length[todo] / 2)
        good = todo[better]
        thetas[:, good], norms[good] = tried[:, better], new_norms[better]
        again = better & (new_norms > tolerance)
        if again.any():
            chosen = left.take(np.flatnonzero(again))
            steps[:, todo[again]] = _steps(net, n, chosen, gradients[:, again], inverse)
        todo = todo[norms[todo] > tolerance]
    return {
        "change_if_removed": _test_losses(task, thetas) - _test_losses(task),
        "gradient_norm": norms,
        "passes": passes,
    }


def _gradients_without(
    task: _Task, removed: Examples, thetas: NDArray, at_theta: bool = False
) -> NDArray:
    """(d, k): gradient of R_-i at column i, (n R' - (loss_i + penalty)') / (n - 1)."""
    net, train = task.net, task.train
    n = len(train)
    if at_theta:  # all columns are the net's own theta: one pass for one vector
        whole = net.risk_gradient(train, batch_size=task.batch_size)[:, None]
    else:
        whole = net.risk_gradient(train, thetas, task.batch_size)
    own = net.gradients(removed.x, removed.y, thetas).T + net.penalty_gradient(thetas)
    return (n * whole - own) / (n - 1)


def _steps(
    net: GenericNeuralNet, n: int, removed: Examples, gradients: NDArray, inverse: Prepared
) -> NDArray:
    """Newton steps H_-i^-1 g_i, (d, k), from the inverse of the full-data H.

    H_-i = (n H - H_i) / (n - 1) with H_i that of loss_i + penalty at theta, so the step is the
    fixed point s = H^-1 ((n - 1) g + H_i s) / n, contracting at the row's leverage.
    """
    x = (
        {k: v[:, None] for k, v in removed.x.items()}
        if isinstance(removed.x, dict)
        else _dense(removed.x)[:, None]
    )
    y = removed.y[:, None]
    pull = (n - 1) / n * gradients
    steps = inverse.apply(pull).x
    for _ in range(_INNER_STEPS):
        own = net.hvp_each(x, y, steps.T[:, :, None])[:, :, 0].T + net.penalty_hvp(steps)
        before, steps = steps, inverse.apply(pull + own / n).x
        if np.linalg.norm(steps - before) <= _INNER_RTOL * np.linalg.norm(steps):
            break
    return steps


def _fit_block(task: _Task, rows: NDArray, _: Any) -> dict[str, NDArray]:
    """The net's own fit without the rows, from where it is or from `start`; then put back."""
    net, remaining = task.net, task.train.without(rows)
    before = net.model.get_weights()  # with the statistics that training moves, not theta alone
    losses = _test_losses(task)
    try:
        if task.start is not None:
            net.theta = task.start
        (task.fit or type(net).fit)(net, remaining)
        change = _test_losses(task) - losses
        norm = net.gradient_norm(remaining, task.batch_size)
    finally:
        net.model.set_weights(before)
    return {
        "change_if_removed": change,
        "gradient_norm": np.array([norm]),
        "passes": np.ones(1, int),
    }


def _test_losses(task: _Task, thetas: NDArray | None = None) -> NDArray:
    """(m, k) at each of thetas, or (m, 1) at the net's own."""
    net, num_vectors = task.net, 1 if thetas is None else thetas.shape[1]
    size = task.batch_size or net.rows_per_batch(task.test, num_vectors)
    parts = [net.losses(x, y, thetas) for x, y in task.test.batches(size)]
    return np.concatenate(parts).reshape(len(task.test), num_vectors)


def _identity(task: _Task, method: str, label: str, key: str) -> str:
    """One short name for everything the refits depend on, the model by what it answers."""
    net, few = task.net, task.train.take(slice(0, 8))
    parts = (
        type(net).__name__, net.model.get_weights(), net.theta, net.losses(few.x, few.y),
        net.penalty(), method, label, key, task.tolerance, task.max_passes, task.batch_size,
        task.start, task.train.x, task.train.y, task.test.x, task.test.y,
    )  # fmt: skip
    return joblib.hash(parts)[:16]


def _dense(x: Any) -> NDArray:
    return x.toarray() if hasattr(x, "toarray") else x


def _check(
    net: GenericNeuralNet,
    train: Examples,
    method: str,
    tolerance: float | None,
    start: NDArray | None,
    block: int,
    max_passes: int,
) -> None:
    if len(train) < 2:
        raise ValueError("train must have at least 2 rows to leave one out, got 1.")
    if method not in ("newton", "fit"):
        raise ValueError(f"method must be 'newton' or 'fit', got {method!r}.")
    if method == "newton" and not net.convex:
        raise ValueError(
            f"method must be 'fit' for {type(net).__name__}, which is not known to be convex, got "
            "'newton'; set net.convex = True if its risk is strictly convex."
        )
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}.")
    if start is not None and np.shape(start) != (net.num_parameters,):
        raise ValueError(f"start must have shape ({net.num_parameters},), got {np.shape(start)}.")
    if start is not None and not np.isfinite(start).all():
        raise ValueError("start must be finite, got a NaN or infinity.")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}.")
    if max_passes < 1:
        raise ValueError(f"max_passes must be at least 1, got {max_passes}.")
