"""Retraining without rows: the truth that influence predicts, with a certificate on every refit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from influence.operators import Hessian
from influence.progress import progress
from influence.solvers import Direct, Prepared, Solver, prepare

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
    tolerance: float
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
    tolerance: float = 1e-8,
    solver: Solver | Prepared = Direct(),
    start: NDArray | None = None,
    fit: Callable[[GenericNeuralNet, Examples], Any] | None = None,
    max_passes: int = 30,
    block: int = 50,
    batch_size: int | None = None,
    num_processes: int = 1,
    checkpoints: str | Path | None = None,
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
      tolerance: Euclidean norm of each refit's own gradient to reach.
      solver: for "newton": how the full-data Hessian is inverted; what `prepare` returned for
        `Hessian(net, train)` is not prepared again.
      start: (d,) parameters that each "fit" begins with; None for the net's present ones.
      fit: replaces `net.fit` as the thing called on (net, remaining rows).
      max_passes: data passes at most for each refit by "newton".
      block: refits that share a data pass. Part of the checkpoints' identity.
      batch_size: rows of the training set at a time; None: chosen.
      num_processes: joblib workers; -1 for one a core. Set a joblib backend to leave the machine.
      checkpoints: a folder where finished blocks are kept. A call that was interrupted, by kill -9
        too, continues from there and ends bit for bit as if it had not been.

    Returns: Refits; positive: the test loss rose without the row, so the row helped.
    Raises: ValueError, TypeError or IndexError for bad input before any long work. Refits that miss
      the tolerance are marked in `converged`, with a ConvergenceWarning.
    """
    rows = check_rows(rows, len(train))
    method = method or ("newton" if net.convex else "fit")
    _check(net, train, test, method, tolerance, start, block, max_passes)
    task = _Task(net, train, test, tolerance, batch_size, max_passes, start, fit)
    if method == "newton":
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
        size, refit, argument, label = 1, _fit_block, None, repr(fit)
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    paths: list[Path | None] = [None] * len(parts)
    if checkpoints is not None:
        key = _identity(replace(task, fit=None), method, label)
        names = [joblib.hash(part) for part in parts]
        paths = [Path(checkpoints) / f"refits-{key}-{name}.npz" for name in names]
    work = joblib.Parallel(n_jobs=num_processes, return_as="generator")(
        joblib.delayed(_kept_block)(path, refit, task, part, argument)
        for path, part in zip(paths, parts, strict=True)
    )
    done = list(progress(work, "leave-one-out refits", len(parts)))
    joined = {name: np.concatenate([d[name] for d in done], axis=-1) for name in done[0]}
    converged = joined["gradient_norm"] <= tolerance
    if not converged.all():
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
    todo = np.flatnonzero(norms > task.tolerance)
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
        again = better & (new_norms > task.tolerance)
        if again.any():
            chosen = left.take(np.flatnonzero(again))
            steps[:, todo[again]] = _steps(net, n, chosen, gradients[:, again], inverse)
        todo = todo[norms[todo] > task.tolerance]
    return _measured(task, thetas, norms, passes)


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
    net, before = task.net, task.net.theta
    remaining = task.train.without(rows)
    try:
        if task.start is not None:
            net.theta = task.start
        (task.fit or type(net).fit)(net, remaining)
        theta = net.theta
        norm = net.gradient_norm(remaining, task.batch_size)
    finally:
        net.theta = before
    return _measured(task, theta[:, None], np.array([norm]), np.ones(1, int))


def _measured(task: _Task, thetas: NDArray, norms: NDArray, passes: NDArray) -> dict[str, NDArray]:
    net = task.net
    size = task.batch_size or net.rows_per_batch(task.test, thetas.shape[1])
    parts = [
        net.losses(x, y, thetas) - net.losses(x, y)[:, None] for x, y in task.test.batches(size)
    ]
    return {"change_if_removed": np.concatenate(parts), "gradient_norm": norms, "passes": passes}


def _identity(task: _Task, method: str, label: str) -> str:
    """One short name for everything the refits depend on."""
    net = task.net
    model = (net.model.to_json() if hasattr(net.model, "to_json") else "", net.loss.name)
    parts = (
        type(net).__name__,
        model,
        net.theta,
        method,
        label,
        task.tolerance,
        task.max_passes,
        task.batch_size,
        task.start,
        task.train.x,
        task.train.y,
        task.test.x,
        task.test.y,
    )
    return joblib.hash(parts)[:16]


def _dense(x: Any) -> NDArray:
    return x.toarray() if hasattr(x, "toarray") else x


def _check(
    net: Any,
    train: Any,
    test: Any,
    method: str,
    tolerance: float,
    start: NDArray | None,
    block: int,
    max_passes: int,
) -> None:
    if not isinstance(net, GenericNeuralNet):
        raise TypeError(f"net must be a GenericNeuralNet, got {type(net).__name__}.")
    net.validate(train, "train")
    net.validate(test, "test")
    if len(train) < 2:
        raise ValueError("train must have at least 2 rows to leave one out, got 1.")
    if method not in ("newton", "fit"):
        raise ValueError(f"method must be 'newton' or 'fit', got {method!r}.")
    if method == "newton" and not net.convex:
        raise ValueError(
            f"method must be 'fit' for {type(net).__name__}, which is not known to be convex, got "
            "'newton'; set net.convex = True if its risk is strictly convex."
        )
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}.")
    if start is not None and np.shape(start) != (net.num_parameters,):
        raise ValueError(f"start must have shape ({net.num_parameters},), got {np.shape(start)}.")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}.")
    if max_passes < 1:
        raise ValueError(f"max_passes must be at least 1, got {max_passes}.")
