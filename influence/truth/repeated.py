"""Repetition of a recorded training from its start, with all rows and without single rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike, NDArray

from influence.common import checkpoint
from influence.common.named_array import Estimand
from influence.common.progress import progress
from influence.examples.examples import Examples, check_rows
from influence.examples.given import Data
from influence.examples.labels import sample_weights
from influence.net.checked import Net, checked
from influence.net.history import History
from influence.net.inputs import for_call
from influence.net.net import GenericNeuralNet
from influence.net.questions import PerRow

# The default seeds. Each seed draws its own orders of the rows and its own dropout masks.
SEEDS = (0, 1)


@dataclass(frozen=True, eq=False)
class Retrained(Estimand):
    """Table (m, k) of the changes of test losses by retraining without each row.

    Attributes:
      change_if_removed: (m, k) test loss after training without the row, minus the test loss after
        training on all rows with the same seed. Each entry is a mean over the seeds. Positive: the
        row helped.
      rows: (k,) the training rows.
      by_seed: (s, m, k) the changes for each seed.
    """

    by_seed: NDArray

    @property
    def reliability(self) -> float:
        """Mean Pearson correlation between the changes of two seeds, over all pairs of seeds.

        It is NaN for a single seed. It limits every prediction that does not use the seed: the
        correlation of such a prediction with the changes of one seed is at most the square root of
        the reliability.
        """
        flat = self.by_seed.reshape(len(self.by_seed), -1)
        if len(flat) < 2 or not (np.ptp(flat, axis=1) > 0).all():
            return float("nan")
        pairs = np.corrcoef(flat)[np.triu_indices(len(flat), 1)]
        return float(pairs.mean())


def why_not(net: GenericNeuralNet, train: Examples, history: History) -> str | None:
    """Return the reason why a training cannot be repeated from its history; None if it can."""
    about = history.about
    model = net.flat.model
    if not history.is_whole:
        return "the record does not begin at the start of the training"
    if history.batch_size < 1 or (history.rows_seen != len(history)).any():
        return "the training did not go over the recorded rows once in each epoch"
    if not isinstance(getattr(keras.optimizers, about["optimizer"], None), type):
        return f"the optimiser {about['optimizer']} is not one of Keras' own"
    if not np.isfinite(history.rates).all():
        return "the learning rate of an epoch is not known"
    if type(model).train_step is not keras.Model.train_step:
        return "the model has a train_step of its own"
    if not history.start_file.exists():
        return "the weights at its start are missing"
    if not _same_weights(history.sample_weight, sample_weights(train.y)):
        return "the rows have other sample weights than those of the record"
    if net.loss.has_masses or net.flat.adds:
        return "the loss masks positions, or the model adds losses that depend on the inputs"
    if history.epoch_of(net.theta) is None:
        return "the model's weights are not those after any epoch of the record"
    return None


def _same_weights(one: Any, other: Any) -> bool:
    """Return True if two sample weights are equal: arrays (n,), dicts by output name, or None."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same_weights(one[k], other[k]) for k in one)
    if one is None or other is None or isinstance(one, dict) or isinstance(other, dict):
        return one is other
    return np.array_equal(one, other)


def retrained(
    net: Net,
    train: Data,
    test: Data,
    rows: ArrayLike,
    history: History | str | os.PathLike,
    *,
    seeds: Sequence[int] = SEEDS,
    batch_size: int | None = None,
    checkpoints: str | os.PathLike | None = None,
) -> Retrained:
    """Compute the actual change of each test loss if the training is repeated without a row.

    Each training begins at the recorded initial weights. It uses the recorded optimiser, batch size
    and learning rate of each epoch. It ends with the epoch after which the recorded weights were
    those of the net. Keras does not report the order of the rows. Therefore each seed draws its own
    orders, and all trainings with this seed use the same orders. A batch with the removed row is
    averaged over its other rows.

    For each seed, the training without the row is compared with the training on all rows. A change
    of the order is therefore not part of the result. The net does not change.

    Args:
      net: the net at the weights after an epoch of the history.
      train: the rows of the history.
      test: m examples whose losses are measured, without the penalty.
      rows: (k,) training rows; each training leaves out one of them.
      history: the recorded History, or its folder.
      seeds: one or more seeds. Each seed needs k + 1 trainings.
      batch_size: number of test rows in memory at a time; None: chosen by the library.
      checkpoints: a folder that caches finished trainings. If a call is interrupted, the next call
        continues after the last finished training.

    Returns: Retrained (m, k).
    Raises: ValueError, TypeError or IndexError for bad input before any long work. ValueError if
      the training cannot be repeated from its history.
    """
    net, train, test = checked(net, train, test)
    rows = check_rows(rows, len(train))
    if not len(seeds):
        raise ValueError("seeds must have at least one, got none.")
    found = history if isinstance(history, History) else History.load(history)
    found.check_net(net)
    found.check_rows(train)
    reason = why_not(net, train, found)
    if reason is not None:
        raise ValueError(f"history must be that of a training that can be repeated, but {reason}.")
    if len(train) < 2:
        raise ValueError(f"train must have two rows to leave one out, got {len(train)}.")
    folder = checkpoint.check_folder(checkpoints)
    key = checkpoint.identity(net, train, test.fingerprint, batch_size, found.digest)
    ends: dict[tuple[int, int], NDArray] = {}
    jobs = [(seed, row) for seed in seeds for row in (-1, *map(int, rows))]
    with _Training(net, train, found).running() as training:

        def losses(seed: int, row: int) -> dict[str, NDArray]:
            training.run(seed, row)
            question = PerRow("losses")
            return {"losses": test.each_row(question, net, batch_size=batch_size)}

        for seed, row in progress(jobs, "trainings", len(jobs)):
            path = folder and folder / f"repeated-{key}-{seed}-{row}.npz"
            got = checkpoint.kept(path, lambda seed=seed, row=row: losses(seed, row))
            ends[seed, row] = got["losses"]
    by_seed = np.array(
        [[ends[s, row] - ends[s, -1] for row in map(int, rows)] for s in seeds]
    ).swapaxes(1, 2)
    return Retrained(by_seed.mean(axis=0), rows, by_seed)


class _Training:
    """Repetitions of one recorded training. They change the variables of the net itself."""

    def __init__(self, net: GenericNeuralNet, train: Examples, history: History):
        self.net, self.train, self.history = net, train, history
        self.epochs = history.epoch_of(net.theta) or 0
        about = history.about
        # A number replaces a recorded schedule, so that `run` can set the learning rate per epoch.
        config = about["optimizer_config"] | {"learning_rate": float(history.rates[0])}
        self.optimizer = getattr(keras.optimizers, about["optimizer"]).from_config(config)
        flat = net.flat
        self.optimizer.build(list(flat.weights))
        self._fresh = [variable.numpy() for variable in self.optimizer.variables]
        self._model = flat.model
        own = {id(weight) for weight in flat.weights}
        self._others = [weight for weight in self._model.weights if id(weight) not in own]
        known = {id(weight) for weight in self._model.weights}
        self._drawn = [v for v in self._model.variables if id(v) not in known]
        self._start = checkpoint.load(history.start_file)
        self._step: Any = None

    @contextmanager
    def running(self) -> Iterator[_Training]:
        """Yield self. At the end of the context, restore all variables of the model."""
        variables = list({id(v): v for v in self.net.flat.parts.whole.variables}.values())
        before = [variable.numpy() for variable in variables]
        try:
            yield self
        finally:
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)

    def run(self, seed: int, without: int) -> None:
        """Train from the recorded start on all rows, or without one row."""
        self._begin(seed)
        rng, n = np.random.default_rng(seed), len(self.train)
        size = self.history.batch_size
        for epoch in range(self.epochs):
            self.optimizer.learning_rate.assign(self.history.rates[epoch])
            order = rng.permutation(n)
            for start in range(0, n, size):
                rows = order[start : start + size]
                rows = rows[rows != without]
                if len(rows):
                    self._take_step(rows)
        self.optimizer.finalize_variable_values(list(self.net.flat.weights))

    def _begin(self, seed: int) -> None:
        self.net.theta = self._start["theta"]
        values = [self._start[f"other-{k}"] for k in range(len(self._start) - 1)]
        # The first recorded values are the weights of layers before the net's own model, if any.
        # Training does not change these weights, so they are skipped.
        values = values[len(values) - len(self._others) :]
        for weight, value in zip(self._others, values, strict=True):
            weight.assign(value)
        for number, state in enumerate(self._drawn):
            if state.shape == (2,):
                state.assign(np.array([1000 * seed + number, 0]))
        for variable, value in zip(self.optimizer.variables, self._fresh, strict=True):
            variable.assign(value)

    def _take_step(self, rows: NDArray) -> None:
        flat = self.net.flat
        some = self.train.take(rows)
        batch = flat.batch(some.x, some.y)
        if self._step is None:
            spec = lambda t: tf.TensorSpec([None, *t.shape[1:]], t.dtype)  # noqa: E731
            signature = tf.nest.map_structure(spec, batch)
            self._step = tf.function(self._stepped, input_signature=signature, autograph=False)
        self._step(*batch)

    def _stepped(self, x: Any, y: Any) -> None:
        flat, loss = self.net.flat, self.net.loss
        with tf.GradientTape() as tape:
            raw = self._model(for_call(self._model, x), training=True)
            risk = tf.reduce_mean(loss.function(y, loss.seen(raw)))
            penalties = [tf.cast(part, risk.dtype) for part in self._model.losses]
            risk = tf.add_n([risk, *penalties])
        weights: Any = list(flat.weights)
        zero = tf.UnconnectedGradients.ZERO
        self.optimizer.apply(tape.gradient(risk, weights, unconnected_gradients=zero), weights)
