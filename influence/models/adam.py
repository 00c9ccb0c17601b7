"""Adam on seeded minibatches: what `fit` of a network does, in a file of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import joblib
import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.common.checkpoint import check_folder, load, store
from influence.common.convergence import DivergenceError
from influence.common.progress import progress
from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet

_SAVE_EVERY = 500  # steps
_BETA_1, _BETA_2, _EPSILON = 0.9, 0.999, 1e-7


@dataclass(frozen=True, eq=False)
class Moments:
    """Adam's state after a training: what continuing it needs besides theta.

    Attributes:
      steps: taken.
      first: (d,) running mean of the gradients, not yet corrected for its start at zero.
      second: (d,) that of their squares.
    """

    steps: int
    first: NDArray
    second: NDArray

    @classmethod
    def none(cls, net: GenericNeuralNet) -> Moments:
        """Before the first step."""
        zero = np.zeros(net.num_parameters, net.dtype)
        return cls(0, zero, zero)

    def step(self, thetas: NDArray, gradients: NDArray, rate: float) -> tuple[NDArray, Moments]:
        """The next parameters and moments of k trainings at once, (d, k) each, as Keras has them.

        theta - rate sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + epsilon), Kingma & Ba (2015, end of
        section 2), where epsilon is not the one of their algorithm 1.
        """
        t = self.steps + 1
        m, v = (a[:, None] if a.ndim == 1 else a for a in (self.first, self.second))
        m = m + (gradients - m) * (1 - _BETA_1)
        v = v + (gradients**2 - v) * (1 - _BETA_2)
        length = rate * np.sqrt(1 - _BETA_2**t) / (1 - _BETA_1**t)
        moved = thetas - (length * m / (np.sqrt(v) + _EPSILON)).astype(thetas.dtype)
        return moved, Moments(t, m, v)


def minimise(
    net: GenericNeuralNet,
    examples: Examples,
    *,
    schedule: Sequence[tuple[int, float]],
    batch_size: int,
    seed: int,
    checkpoints: str | os.PathLike | None = None,
    key: Any = (),
) -> Moments:
    """Lower the risk from the net's theta by Adam (Kingma & Ba 2015), as Keras has it.

    Each step takes the next rows of shuffled passes over the examples laid end to end, so that
    step k's rows follow from the seed and k alone.

    Args:
      net: left at the last step's theta.
      examples: the training set.
      schedule: (steps, learning rate) of each stage; Adam's averages go on from one to the next.
      batch_size: rows a step, all of them if there are fewer.
      seed: of the order of the rows.
      checkpoints: a folder for the state of this training, kept every few hundred steps under a
        name made of all that it depends on.
      key: what else it depends on: the net's architecture, as values.

    Returns: Adam's state at the end.
    Raises: ValueError for a bad schedule or batch size; DivergenceError for a risk that is not
      finite, all variables being put back.
    """
    rates = _rates(schedule)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer):
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be a positive integer, got {batch_size}.")
    weights = list(net.flat.weights)
    optimizer = keras.optimizers.Adam(beta_1=_BETA_1, beta_2=_BETA_2, epsilon=_EPSILON)
    optimizer.build(weights)
    # With what training moves besides theta, such as batch statistics and dropout's generators.
    variables = [*net.model.variables, *optimizer.variables]
    start = [variable.numpy() for variable in variables]
    path, folder = None, check_folder(checkpoints)
    if folder is not None:
        identity = joblib.hash(
            (type(net).__name__, key, start, rates, batch_size, seed, examples.fingerprint)
        )
        path = folder / f"adam-{identity[:16]}.npz"
    done = 0
    if path is not None and path.exists():
        kept = load(path)
        done = int(kept.pop("step"))
        _assign(variables, [kept[f"variable {i}"] for i in range(len(variables))])
    step = tf.function(_step(net, optimizer, weights), autograph=False)
    batches = batch_rows(len(examples), batch_size, seed, done)
    rate = None
    for number in progress(range(done, len(rates)), "training", len(rates) - done):
        if rates[number] != rate:
            rate = rates[number]
            optimizer.learning_rate = rate
        batch = examples.take(next(batches))
        risk = float(step(net.flat.inputs(batch.x), net.flat.tensor(batch.y)))
        if not np.isfinite(risk):
            _assign(variables, start)
            raise DivergenceError(
                f"the risk must stay finite, got {risk} at step {number + 1} with learning rate "
                f"{rate:g}; use a smaller one in schedule, or scale the inputs."
            )
        last = number + 1 == len(rates)
        if path is not None and (last or (number + 1) % _SAVE_EVERY == 0):
            arrays = {f"variable {i}": v.numpy() for i, v in enumerate(variables)}
            store(path, {"step": np.array(number + 1), **arrays})
    return Moments(len(rates), _flat(optimizer, "momentum"), _flat(optimizer, "velocity"))


def _flat(optimizer: Any, kind: str) -> NDArray:
    """(d,) one of Adam's two averages, in the order of theta."""
    parts = [variable for variable in optimizer.variables if variable.path.endswith(kind)]
    return np.concatenate([np.ravel(part.numpy()) for part in parts])


def _step(net: GenericNeuralNet, optimizer: Any, weights: list) -> Any:
    """(x, y) -> the minibatch's risk before the step, which it takes."""

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            losses = net.loss.function(y, net.model(x, training=True))
            risk = tf.reduce_mean(losses) + sum(net.model.losses)
        optimizer.apply(tape.gradient(risk, [w.value for w in weights]), weights)
        return risk

    return step


def batch_rows(num_examples: int, batch_size: int, seed: int, first: int) -> Iterator[NDArray]:
    """The rows of step `first` and of all that follow: pass p is shuffled by (seed, p)."""
    batch_size = min(batch_size, num_examples)
    number, offset = divmod(first * batch_size, num_examples)

    def shuffled(number: int) -> NDArray:
        return np.random.default_rng((seed, number)).permutation(num_examples)

    waiting = shuffled(number)[offset:]
    while True:
        while len(waiting) < batch_size:
            number += 1
            waiting = np.concatenate([waiting, shuffled(number)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def _rates(schedule: Sequence[tuple[int, float]]) -> list[float]:
    """The learning rate of each step."""
    rates: list[float] = []
    for stage in schedule:
        steps, rate = stage
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
            raise ValueError(
                f"schedule must be (steps, learning rate) pairs with positive integer steps, got "
                f"{stage!r}."
            )
        if not (np.isfinite(rate) and rate > 0):
            raise ValueError(f"schedule must have positive learning rates, got {stage!r}.")
        rates += [float(rate)] * int(steps)
    if not rates:
        raise ValueError("schedule must have at least one (steps, learning rate) pair, got none.")
    return rates


def _assign(variables: list, values: Sequence[Any]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
