"""Continued training without a row, compared with the same training with this row.

This is the ground truth of the CNN figure. If a net was trained by Adam and is not at a minimum,
further training changes its test losses even if no row is removed. This change is the drift. The
effect of a removal is therefore measured against a control. The control keeps the row, and trains
for k more steps on the same minibatches:

    change_i = loss(theta after k more steps without row i) - loss(theta after k more steps).

The authors' 2017 code of this experiment (Koh & Liang 2017, figure 2, right) has no control. That
code draws other minibatches for every removal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common.checkpoint import check_folder, load, store
from influence.common.convergence import DivergenceError
from influence.common.named_array import Estimand
from influence.common.numbers import is_integer
from influence.common.progress import progress
from influence.examples.examples import Examples, check_rows
from influence.examples.given import Data
from influence.minimisers.adam import Moments, batch_rows
from influence.net.checked import Net
from influence.net.net import GenericNeuralNet
from influence.net.refused import check_no_masses
from influence.truth import runs
from influence.truth.runs import Groups, RunOptions, Task

# Number of steps between two checkpoints of a block's state.
_SAVE_EVERY = 500


@dataclass(frozen=True, eq=False)
class ContinuedTraining(Estimand):
    """Table (m, k) of the changes in test losses by continued training without each row.

    Attributes:
      change_if_removed: (m, k) test loss after continued training without the row, minus the test
        loss after continued training with all rows.
      rows: (k,) the training rows.
      drift: (m,) the change of each test loss in the control, which trains on all rows.
      steps: the number of further steps.
      rate: the learning rate.
      at: (p,) numbers of steps, below `steps`, after which the changes were also measured.
      changes_at: (p, m, k) `change_if_removed` after each of these numbers of steps.
    """

    drift: NDArray
    steps: int
    rate: float
    at: tuple[int, ...]
    changes_at: NDArray


@dataclass(frozen=True, kw_only=True)
class ContinuedOptions(RunOptions):
    """Options of continued training, in addition to those of `RunOptions`.

    With `checkpoints`, the state of each unfinished block is also cached, every 500 steps.

    Attributes:
      batch_size: number of rows in each minibatch, at least 3. The size changes the result of the
        training, not only the memory that the training needs.
      seed: seed of the order of the rows.
    """

    block: int = 10
    batch_size: int | None = 500
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size is None or self.batch_size < 3:
            raise ValueError(
                f"batch_size must be at least 3: two of its rows may be the removed one, got "
                f"{self.batch_size}."
            )


@dataclass(frozen=True, eq=False)
class _Plan:
    """The inputs that all blocks share. The states of unfinished blocks are cached in `folder`."""

    moments: Moments
    steps: int
    at: tuple[int, ...]
    rate: float
    batch_size: int
    seed: int
    folder: Path | None

    @property
    def identity(self) -> tuple:
        """The inputs on which the training depends, except its task and its groups."""
        start = self.moments.steps, self.moments.first, self.moments.second
        return "continued", start, self.steps, self.at, self.rate, self.batch_size, self.seed


def continued_training(
    net: Net,
    train: Data,
    test: Data,
    rows: ArrayLike,
    options: ContinuedOptions = ContinuedOptions(),
    *,
    steps: int,
    rate: float,
    moments: Moments | None = None,
    at: Sequence[int] = (),
) -> ContinuedTraining:
    """Compute the change of each test loss by continued training without each row.

    The change of a control that trains on all rows is subtracted. All trainings use the same
    minibatches. A minibatch with the removed row is averaged over its other rows. The trainings of
    a block advance together. The net does not change.

    Args:
      net: a net that Adam trained up to its present theta.
      train: the training set, n rows.
      test: m examples whose losses are measured, without the penalty.
      rows: (k,) training rows; each training leaves out one of them.
      options: options of the trainings.
      steps: number of further steps of Adam (Kingma & Ba 2015).
      rate: the learning rate.
      moments: Adam's present state, such as `AllCNN.moments` after `AllCNN.fit`, or
        `influence.minimisers.adam.Moments(steps, first, second)`. None: Adam starts anew.
      at: increasing numbers of steps, below `steps`, after which the changes are also measured.

    Returns: ContinuedTraining. A positive change means that the test loss is higher without the
      row, so the row helped.
    Raises: ValueError, TypeError or IndexError for bad input before any long work; DivergenceError
      for parameters that are not finite.
    """
    net, train, test = runs.check(net, train, test)
    check_no_masses(net, "continued_training")
    rows = check_rows(rows, len(train))
    if not is_integer(steps, 1):
        raise ValueError(f"steps must be a positive integer, got {steps!r}.")
    if not (np.isfinite(rate) and rate > 0):
        raise ValueError(f"rate must be positive, got {rate}.")
    at = tuple(at)
    if not all(is_integer(one, 1) and one < steps for one in at) or list(at) != sorted({*at}):
        raise ValueError(
            f"at must be increasing positive integers below steps, {steps}, got {list(at)}."
        )
    moments = Moments.none(net.num_parameters, net.dtype) if moments is None else moments
    if np.shape(moments.first) != (net.num_parameters,):
        raise ValueError(
            f"moments must be of {net.num_parameters} parameters, got {np.shape(moments.first)}."
        )
    folder, batch_size = check_folder(options.checkpoints), int(options.batch_size or 0)
    runs.check_processes(options.num_processes, net)
    plan = _Plan(moments, int(steps), at, float(rate), batch_size, options.seed, folder)
    found = runs.run(
        Task(net, train, test),
        _continued_block,
        [np.zeros(0, np.int64), *rows[:, None]],  # The control comes before the removals.
        plan,
        options,
        identity=plan.identity,
        what="continued training",
    )
    changes = found["change"][..., 1:] - found["change"][..., :1]  # column 0 is the control
    drift = found["change"][-1, :, 0]
    return ContinuedTraining(changes[-1], rows, drift, plan.steps, plan.rate, at, changes[:-1])


def _continued_block(task: Task, groups: Groups, plan: _Plan) -> dict[str, NDArray]:
    """Continue the training with Adam, and return the changes of the test losses.

    Each group has a column of theta. The group of the control is empty.
    """
    net, train = task.net, task.train
    removed = np.array([group[0] if len(group) else -1 for group in groups])
    thetas = np.repeat(net.theta[:, None], len(groups), axis=1)
    moments, done, path = plan.moments, 0, None
    changes = np.full((len(plan.at) + 1, len(task.test), len(groups)), np.nan)
    if plan.folder is not None:
        path = plan.folder / f"continued-{task.identity(groups, plan.identity)}.npz"
        if path.exists():
            state = load(path)
            thetas, done, changes = state["thetas"], int(state["done"]), state["changes"]
            moments = Moments(plan.moments.steps + done, state["first"], state["second"])
    batches = batch_rows(len(train), plan.batch_size, plan.seed, done)
    for step in progress(range(done, plan.steps), "training on", plan.steps - done):
        gradients = _gradients(net, train, next(batches), removed, thetas)
        if not np.isfinite(gradients).all():
            raise DivergenceError(
                f"training on must stay finite, got a gradient that is not at step {step + 1} "
                f"with rate {plan.rate:g}; use a smaller rate."
            )
        thetas, moments = moments.step(thetas, gradients, plan.rate)
        if step + 1 in plan.at:
            changes[plan.at.index(step + 1)] = task.changes(thetas)
        if path is not None and (step + 1) % _SAVE_EVERY == 0 and step + 1 < plan.steps:
            state = {"first": moments.first, "second": moments.second, "changes": changes}
            store(path, {"thetas": thetas, "done": np.array(step + 1), **state})
    changes[-1] = task.changes(thetas)
    return {"change": changes}


def _gradients(
    net: GenericNeuralNet, train: Examples, rows: NDArray, removed: NDArray, thetas: NDArray
) -> NDArray:
    """Compute the risk gradients (d, k) of a minibatch. Each column excludes its removed row."""
    batch = train.take(rows)
    G = net.gradient(batch.x, batch.y, thetas)
    for row in np.intersect1d(rows, removed):
        columns = np.flatnonzero(removed == row)
        # The row occurs twice if two passes over the data meet in this minibatch. Let G be the mean
        # gradient of all b rows, and t = times. The mean of the rows other than this row is then
        # G + (G - own) t / (b - t).
        times = np.count_nonzero(rows == row)
        one = train.take([row])
        own = net.gradient(one.x, one.y, thetas[:, columns])
        G[:, columns] += (G[:, columns] - own) * (times / (len(rows) - times))
    return G + net.penalty_gradient(thetas)
