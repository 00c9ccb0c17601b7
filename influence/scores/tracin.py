"""TracIn: the effect of each row on each test loss during training (Pruthi et al. 2020)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common.memory import VECTORS, fitting
from influence.common.named_array import NamedArray
from influence.common.numbers import numbers
from influence.common.progress import progress
from influence.curvature.operators import check_batch_size
from influence.examples.examples import Examples, check_rows
from influence.examples.given import Data
from influence.net.checked import Net, checked
from influence.net.history import History
from influence.net.net import GenericNeuralNet
from influence.net.questions import PerRow


@dataclass(frozen=True, eq=False)
class TracInScores(NamedArray):
    """Estimated reductions (m, k) of test losses by training on single rows.

    Attributes:
      reduction_by_training: (m, k) reduction of test loss i by training on row j, summed over the
        checkpoints. Positive: the row helped. It is not the change of the loss if the row is
        removed.
      rows: (k,) the training rows.
    """

    reduction_by_training: NDArray
    rows: NDArray[np.int64]


def tracin(
    net: Net,
    train: Data,
    test: Data,
    rows: ArrayLike | None = None,
    *,
    thetas: ArrayLike | None = None,
    learning_rates: ArrayLike | None = None,
    history: History | str | os.PathLike | None = None,
    checkpoints: ArrayLike | None = None,
    batch_size: int | None = None,
) -> TracInScores:
    """Estimate how much training on each row lowered each test loss, summed over checkpoints.

    This is TracInCP (Pruthi et al. 2020, section 3.3). The score of row i is the sum over
    checkpoints t of learning_rate_t grad loss(z_test; theta_t) . grad loss(z_i; theta_t). A
    gradient step on row i changes theta by - learning_rate grad loss_i. To first order, the step
    lowers the test loss by one term of the sum. Positive: the row helped.

    The score has the unit of the test loss. It assumes one gradient step on row i per checkpoint.
    In training with batches of b rows, row i may occur s times between two checkpoints. The actual
    contribution of the row is then s / b times the term. With `history`, the score assumes one
    gradient step on row i per epoch. Divide this score by the history's `batch_size` to get the
    reduction by the whole training. The losses exclude the penalty, because it would add the same
    number for every row.

    The formula describes gradient descent. Momentum, Adam and other optimisers take different
    steps. For these, the score is a sum of similarities of gradients, without a unit.

    The net's theta does not change. The net's present state apart from theta, such as the
    statistics of batch normalisation, is used for every checkpoint.

    Args:
      net: the model. The net's own theta is not used.
      train: the training set, n rows.
      test: m examples. Each has its own scores.
      rows: (k,) training rows; all n if omitted.
      thetas: (t, d) the parameters at each checkpoint.
      learning_rates: (t,) the learning rate after each checkpoint.
      history: the History of the training, or its folder. It replaces `thetas` and
        `learning_rates`. Its first checkpoint is the start of the training. The rate of a
        checkpoint is the sum of the learning rates of the epochs up to the next checkpoint.
      checkpoints: epochs of the history to use, such as [0, 5, 10]. Epoch 0 is the start of the
        training. None means all epochs whose weights are in the history.
      batch_size: number of rows in a batch. It limits memory and does not change the result.

    Returns: TracInScores (m, k).
    Raises: TypeError, ValueError or IndexError for bad input, before any long work.
    """
    net, train, test = checked(net, train, test)
    asked = None if rows is None else check_rows(rows, len(train))
    rows = np.arange(len(train)) if asked is None else asked
    check_batch_size(batch_size)
    points, rates = _checkpoints(net, train, thetas, learning_rates, history, checkpoints)
    width = fitting(VECTORS, net.num_parameters * net.dtype.itemsize, len(test))
    size = batch_size or net.rows_per_batch(train, width)
    table = np.zeros((len(test), len(rows)), net.dtype)
    for point, rate in progress(zip(points, rates, strict=True), "checkpoints", len(rates)):
        theta = point()
        for start in range(0, len(test), width):
            part = slice(start, start + width)
            some = test.take(part)
            V = rate * net.at(theta).gradients(some.x, some.y).T
            question = PerRow("directional", V)
            table[part] += train.each_row(question, net, theta, asked, batch_size=size).T
    return TracInScores(table, rows)


def _checkpoints(
    net: GenericNeuralNet,
    train: Examples,
    thetas: ArrayLike | None,
    learning_rates: ArrayLike | None,
    history: History | str | os.PathLike | None,
    checkpoints: ArrayLike | None,
) -> tuple[list[Callable[[], NDArray]], NDArray]:
    """Return functions that return the weights at each checkpoint, and the learning rates."""
    if history is None:
        if thetas is None or learning_rates is None:
            raise ValueError(
                "thetas and learning_rates must be given, or the history of the training, got "
                "neither; record it with model.fit(..., callbacks=[influence.Recorder(folder, "
                "train)])."
            )
        if checkpoints is not None:
            raise ValueError("checkpoints must be left out beside thetas: it chooses of a history.")
        points, rates = _given(net, thetas, learning_rates)
        return [partial(_same, theta) for theta in points], rates
    if thetas is not None or learning_rates is not None:
        raise ValueError("thetas and learning_rates must be left out beside history, got both.")
    found = history if isinstance(history, History) else History.load(history)
    found.check_net(net)
    found.check_rows(train)
    epochs, rates = found.path(checkpoints)
    return [partial(found.theta, int(epoch)) for epoch in epochs], rates.astype(net.dtype)


def _same(theta: NDArray) -> NDArray:
    return theta


def _given(
    net: GenericNeuralNet, thetas: ArrayLike, learning_rates: ArrayLike
) -> tuple[NDArray, NDArray]:
    points = numbers(thetas, "thetas")
    if points.ndim != 2 or points.shape[1] != net.num_parameters or not len(points):
        raise ValueError(
            f"thetas must have shape (t, {net.num_parameters}), one row a checkpoint, got "
            f"{points.shape}."
        )
    if not np.isfinite(points).all():
        wrong = np.flatnonzero(~np.isfinite(points).all(axis=1))[0]
        raise ValueError(f"thetas must be finite, got NaN or infinity in checkpoint {wrong}.")
    rates = numbers(learning_rates, "learning_rates").astype(net.dtype)
    if rates.shape != (len(points),):
        raise ValueError(
            f"learning_rates must have one for each of {len(points)} checkpoints, got shape "
            f"{rates.shape}."
        )
    if not (np.isfinite(rates).all() and (rates >= 0).all()):
        raise ValueError(f"learning_rates must be finite and not negative, got {rates.tolist()}.")
    return points, rates
