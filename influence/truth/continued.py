"""Continued training without a row, minus the same training with it: the truth of the CNN figure.

A net that was trained by Adam and is at no minimum goes on being trained whether a row is removed
or not, and its test losses drift. What is due to the removal is the difference from a control that
keeps the row and takes the same minibatches:

    change_i = loss(theta after k more steps without row i) - loss(theta after k more steps).

The release's CNN experiment (Koh & Liang 2017, figure 2, right) leaves the control out and draws
other minibatches for every removal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import joblib
import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common.checkpoint import check_folder, load, store
from influence.common.convergence import DivergenceError
from influence.common.named_array import Estimand
from influence.common.progress import progress
from influence.curvature.operators import check_batch_size
from influence.examples.examples import Examples, check_rows
from influence.minimisers.adam import Moments, batch_rows
from influence.net.net import GenericNeuralNet
from influence.truth import runs
from influence.truth.runs import Groups, Task

_SAVE_EVERY = 500  # steps


@dataclass(frozen=True, eq=False)
class ContinuedTraining(Estimand):
    """Changes, (m, k), of each test loss by training on without each row, less the control's.

    Attributes:
      change_if_removed: (m, k) test loss after training on without the row, minus that after
        training on with it.
      rows: (k,) the training rows.
      drift: (m,) what training on with all rows changed by itself.
      steps: that training went on for.
      rate: the learning rate.
    """

    drift: NDArray
    steps: int
    rate: float


@dataclass(frozen=True, eq=False)
class _Plan:
    moments: Moments
    steps: int
    rate: float
    batch_size: int
    seed: int
    folder: Path | None


def continued_training(
    net: GenericNeuralNet,
    train: Examples,
    test: Examples,
    rows: ArrayLike,
    *,
    steps: int,
    rate: float,
    moments: Moments | None = None,
    batch_size: int = 500,
    seed: int = 0,
    block: int = 10,
    num_processes: int = 1,
    checkpoints: str | Path | None = None,
) -> ContinuedTraining:
    """Actual change of each test loss when training goes on without each row, less the control.

    Every training takes the same minibatches; where the row is in one, the mean is over the others.
    Several go on side by side. The net is left as it was.

    Args:
      net: trained by Adam up to here.
      train: the training set, n rows.
      test: m examples whose losses are measured; the penalty is not part of them.
      rows: (k,) training rows, each removed alone.
      steps: of Adam (Kingma & Ba 2015) from here.
      rate: its learning rate.
      moments: Adam's state here: `AllCNN.moments` after its fit, or
        `influence.minimisers.adam.Moments(steps, first, second)`, the steps taken and the (d,)
        running means of the gradients and of their squares; None starts it from zero.
      batch_size: rows a step, at least 3.
      seed: of the order of the rows.
      block: trainings side by side. Part of the checkpoints' identity.
      num_processes: joblib workers, which share the cores; -1 for one a core. The last bits may
        depend on it.
      checkpoints: a folder for finished blocks and, every few hundred steps, the one at work. A
        call that was interrupted, by kill -9 too, goes on from there to the same numbers.

    Returns: ContinuedTraining; positive: the test loss rises without the row, so the row helped.
    Raises: ValueError, TypeError or IndexError for bad input before any long work; DivergenceError
      for parameters that are not finite.
    """
    check_batch_size(batch_size)
    runs.check(net, train, test, tolerance=None, block=block, batch_size=None)
    rows = check_rows(rows, len(train))
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}.")
    if not (np.isfinite(rate) and rate > 0):
        raise ValueError(f"rate must be positive, got {rate}.")
    if batch_size is None or batch_size < 3:
        raise ValueError(
            f"batch_size must be at least 3: two of its rows may be the removed one, got "
            f"{batch_size}."
        )
    moments = Moments.none(net.num_parameters, net.dtype) if moments is None else moments
    if np.shape(moments.first) != (net.num_parameters,):
        raise ValueError(
            f"moments must be of {net.num_parameters} parameters, got {np.shape(moments.first)}."
        )
    folder = check_folder(checkpoints)
    runs.check_processes(num_processes, net)
    plan = _Plan(moments, int(steps), float(rate), int(batch_size), seed, folder)
    started = joblib.hash((moments.steps, moments.first, moments.second))
    found = runs.run(
        Task(net, train, test, None, int(steps), None),
        _continued_block,
        [np.zeros(0, np.int64), *rows[:, None]],  # the control, then the removals
        plan,
        block=block,
        checkpoints=checkpoints,
        identity=("continued", started, plan.rate, plan.batch_size, seed),
        num_processes=num_processes,
        what="continued training",
    )
    drift, changes = found["change"][:, 0], found["change"][:, 1:]
    return ContinuedTraining(changes - drift[:, None], rows, drift, plan.steps, plan.rate)


def _continued_block(task: Task, groups: Groups, plan: _Plan) -> dict[str, NDArray]:
    """A training a column, without the one row of its group or with all."""
    net, train = task.net, task.train
    removed = np.array([group[0] if len(group) else -1 for group in groups])
    thetas = np.repeat(net.theta[:, None], len(groups), axis=1)
    moments, done, path = plan.moments, 0, None
    if plan.folder is not None:
        start = plan.moments
        name = task.identity(start.steps, start.first, start.second, groups, plan.rate,
                             plan.batch_size, plan.seed)  # fmt: skip
        path = plan.folder / f"continued-{name}.npz"
        if path.exists():
            kept = load(path)
            thetas, done = kept["thetas"], int(kept["done"])
            moments = Moments(plan.moments.steps + done, kept["first"], kept["second"])
    batches = batch_rows(len(train), plan.batch_size, plan.seed, done)
    for step in progress(range(done, plan.steps), "training on", plan.steps - done):
        gradients = _gradients(net, train, next(batches), removed, thetas)
        if not np.isfinite(gradients).all():
            raise DivergenceError(
                f"training on must stay finite, got a gradient that is not at step {step + 1} "
                f"with rate {plan.rate:g}; use a smaller rate."
            )
        thetas, moments = moments.step(thetas, gradients, plan.rate)
        if path is not None and (step + 1) % _SAVE_EVERY == 0 and step + 1 < plan.steps:
            store(path, {"thetas": thetas, "done": np.array(step + 1),
                         "first": moments.first, "second": moments.second})  # fmt: skip
    return {"change": task.changes(thetas)}


def _gradients(
    net: GenericNeuralNet, train: Examples, rows: NDArray, removed: NDArray, thetas: NDArray
) -> NDArray:
    """(d, k): the minibatch's risk gradients, in each column without the row it has removed."""
    batch = train.take(rows)
    G = net.gradient(batch.x, batch.y, thetas)
    for row in np.intersect1d(rows, removed):
        columns = np.flatnonzero(removed == row)
        times = np.count_nonzero(rows == row)  # twice, where one pass ends and the next begins
        one = train.take([row])
        own = net.gradient(one.x, one.y, thetas[:, columns])
        G[:, columns] += (G[:, columns] - own) * (times / (len(rows) - times))
    return G + net.penalty_gradient(thetas)
