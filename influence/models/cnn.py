"""The paper's convolutional network (Figure 2, right), and its training by Adam."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.common.checkpoint import check_folder, identity, load, store
from influence.common.convergence import DivergenceError
from influence.common.numbers import is_integer
from influence.common.progress import progress
from influence.examples.examples import Examples
from influence.examples.given import Data
from influence.minimisers.adam import BETA_1, BETA_2, EPSILON, Moments, batch_rows
from influence.net.net import GenericNeuralNet

L = keras.layers

# Pairs (steps, learning rate). This schedule has 20,000 steps, whereas the authors' code takes
# 500,000 steps. Its first learning rate is ten times the first rate of that code. The last rates
# are equal.
_SCHEDULE = ((10_000, 1e-3), (5_000, 1e-4), (5_000, 1e-5))
# Number of training steps between two checkpoints.
_SAVE_EVERY = 500


class AllCNN(GenericNeuralNet):
    """An all-convolutional network with tanh, for images (Koh & Liang 2017, section 4.2).

    Its layers are a 3 x 3 convolution for each stride, a 1 x 1 convolution with one channel for
    each class, the mean over the image, and a linear layer to the logits. The risk is the mean
    cross-entropy plus weight_decay/2 times the sum of all squared kernel weights. Biases are not
    penalised. By default the net has d = 2,616 parameters.

    Activations are separate layers. Initial weights are drawn from a truncated normal distribution
    with the standard deviation 2/sqrt(fan-in) for convolutions and 1/sqrt(fan-in) for the last
    layer. The distribution is cut at two standard deviations. Initial biases are zero.

    Args:
      image_shape: (height, width, channels), channels last.
      num_classes: number of classes. Labels are class numbers 0 to num_classes - 1.
      filters: number of channels of each 3 x 3 convolution.
      strides: strides of the 3 x 3 convolutions, in order. There is no padding: a convolution first
        reduces height and width by 2, and its stride then divides them.
      weight_decay: factor of the penalty, >= 0.
      dtype: "float32" or "float64".
      seed: seed of the initial weights.

    Attributes:
      moments: Adam's state after `fit`, for use in `continued_training`; None before `fit`.

    Raises: ValueError for an image that is too small for the convolutions, for fewer than two
      classes, for filters or strides below 1, or for a negative weight decay.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        *,
        filters: int = 8,
        strides: Sequence[int] = (1, 2, 1, 2, 1),
        weight_decay: float = 0.001,
        dtype: str = "float32",
        seed: int = 0,
    ):
        _check(image_shape, num_classes, filters, strides, weight_decay)
        self.moments: Moments | None = None
        self.settings = (tuple(image_shape), num_classes, filters, tuple(strides), weight_decay)
        seeds = iter(np.random.default_rng(seed).integers(2**31, size=len(strides) + 2).tolist())

        def weighted(layer, gain, fan_in, *args, name, **options):
            return layer(
                *args,
                name=name,
                dtype=dtype,
                # Keras' L2 has no factor 1/2.
                kernel_regularizer=keras.regularizers.L2(weight_decay / 2),
                kernel_initializer=keras.initializers.TruncatedNormal(
                    stddev=gain / np.sqrt(fan_in), seed=next(seeds)
                ),
                **options,
            )

        layers: list = [keras.Input(image_shape, dtype=dtype)]
        channels = image_shape[2]
        shapes = [*((filters, 3, stride) for stride in strides), (num_classes, 1, 1)]
        for i, (width, size, stride) in enumerate(shapes, start=1):
            layers.append(
                weighted(
                    L.Conv2D, 2.0, size**2 * channels, width, size, strides=stride, name=f"conv{i}"
                )
            )
            layers.append(L.Activation("tanh", name=f"tanh{i}", dtype=dtype))
            channels = width
        layers.append(L.GlobalAveragePooling2D(name="mean", dtype=dtype))
        layers.append(weighted(L.Dense, 1.0, channels, num_classes, name="logits"))
        super().__init__(
            keras.Sequential(layers, name="all_cnn"),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none"),
        )

    def fit(
        self,
        examples: Data,
        *,
        schedule: Sequence[tuple[int, float]] = _SCHEDULE,
        batch_size: int = 500,
        seed: int = 0,
        checkpoints: str | os.PathLike | None = None,
    ) -> AllCNN:
        """Train from the present theta by Adam (Kingma & Ba 2015) on minibatches.

        The final theta is not a minimum, so `gradient_norm(examples)` is not zero there. Equal
        examples, arguments and initial theta give equal results, bit for bit on one machine.

        Args:
          examples: the training set.
          schedule: (steps, learning rate) of each stage. Stages share Adam's running averages.
          batch_size: number of rows in each step; all rows if there are fewer.
          seed: seed of the row order. The rows are shuffled again after each pass.
          checkpoints: a folder, or None. Training stores its state there every 500 steps. If the
            process is killed, the next call continues from the stored state and gives the same
            result.

        Returns: self, with Adam's state in `moments`.
        Raises: ValueError for a bad schedule or batch size; DivergenceError for a risk that is not
          finite, after theta is reset to its initial value.
        """
        examples = self.given(examples, "examples")
        self.validate(examples, "examples")
        self.moments = train_by_adam(
            self,
            examples,
            schedule=schedule,
            batch_size=batch_size,
            seed=seed,
            checkpoints=checkpoints,
            key=self.settings,
        )
        return self


def train_by_adam(
    net: GenericNeuralNet,
    examples: Examples,
    *,
    schedule: Sequence[tuple[int, float]],
    batch_size: int,
    seed: int,
    checkpoints: str | os.PathLike | None = None,
    key: Any = (),
) -> Moments:
    """Train a net by Keras' Adam (Kingma & Ba 2015), from its theta, on minibatches.

    Each pass shuffles the examples, and the minibatches follow this order. For given examples and
    batch size, the rows of step k depend only on the seed and k.

    `net` may be any net. Training leaves it at the theta of the last step. `key` holds values that
    distinguish the net from others of its class, such as its architecture. The file name in
    `checkpoints` depends on `key` and on all other inputs of the training.

    Args: all other arguments are those of `AllCNN.fit`.
    Returns: Adam's final state.
    Raises: ValueError for a bad schedule or batch size; DivergenceError for a risk that is not
      finite, after all variables are reset to their initial values.
    """
    rates = _rates(schedule)
    if not is_integer(batch_size, 1):
        raise ValueError(f"batch_size must be a positive integer, got {batch_size!r}.")
    weights = list(net.flat.weights)
    optimizer = keras.optimizers.Adam(beta_1=BETA_1, beta_2=BETA_2, epsilon=EPSILON)
    optimizer.build(weights)
    # Training also changes variables outside theta, such as batch statistics and dropout's states.
    variables = [*net.model.variables, *optimizer.variables]
    start = [variable.numpy() for variable in variables]
    path, folder = None, check_folder(checkpoints)
    if folder is not None:
        name = identity(net, examples, key, rates, batch_size, seed)
        path = folder / f"adam-{name}.npz"
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
    """Return the running average `kind` of Adam's state as a vector (d,) in theta's order."""
    parts = [variable for variable in optimizer.variables if variable.path.endswith(kind)]
    return np.concatenate([np.ravel(part.numpy()) for part in parts])


def _step(net: GenericNeuralNet, optimizer: Any, weights: list) -> Any:
    """Return a function of (x, y) that takes a step and returns the risk before the step."""

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            losses = net.loss.function(y, net.model(x, training=True))
            risk = tf.reduce_mean(losses) + sum(net.model.losses)
        optimizer.apply(tape.gradient(risk, [w.value for w in weights]), weights)
        return risk

    return step


def _rates(schedule: Sequence[tuple[int, float]]) -> list[float]:
    """Check a schedule and return the learning rate of each step."""
    rates: list[float] = []
    for stage in schedule:
        steps, rate = stage
        if not is_integer(steps, 1):
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


def _check(
    image_shape: tuple[int, int, int],
    num_classes: int,
    filters: int,
    strides: Sequence[int],
    weight_decay: float,
) -> None:
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be (height, width, channels), got {image_shape}.")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
    if filters < 1:
        raise ValueError(f"filters must be at least 1, got {filters}.")
    if not len(strides) or min(strides) < 1:
        raise ValueError(f"strides must be one or more positive integers, got {strides}.")
    if not (np.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be non-negative, got {weight_decay}.")
    left = min(image_shape[:2])
    for stride in strides:
        left = (left - 3) // stride + 1
        if left < 1:
            raise ValueError(
                f"image_shape must be larger for strides {tuple(strides)}, got {image_shape}: the "
                "convolutions leave no pixel; use fewer strides."
            )
