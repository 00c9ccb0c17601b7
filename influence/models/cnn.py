"""The paper's convolutional network (Figure 2, right): what it is and how it is trained."""

from __future__ import annotations

import os
from collections.abc import Sequence

import keras
import numpy as np

from influence.examples.examples import Examples
from influence.models import adam
from influence.net.net import GenericNeuralNet

L = keras.layers

# 20,000 steps in place of the release's 500,000, and rates from ten times its first to its last.
_SCHEDULE = ((10_000, 1e-3), (5_000, 1e-4), (5_000, 1e-5))


class AllCNN(GenericNeuralNet):
    """A network of convolutions only, with tanh, for images (Koh & Liang 2017, section 4.2).

    3 x 3 convolutions as the strides say, one of 1 x 1 to as many channels as classes, their mean
    over the image, and a linear layer to the logits. R = mean cross-entropy + weight_decay/2 times
    the sum of |kernel|^2; biases are not penalised. With the defaults d = 2,616.

    Activations are layers of their own, so that EK-FAC finds what went into them. Weights start
    from a normal distribution truncated at two of its standard deviations, 2/sqrt(fan-in) for
    convolutions and 1/sqrt(fan-in) for the last layer; biases from zero.

    Args:
      image_shape: (height, width, channels), channels last.
      num_classes: labels are class numbers 0 to num_classes - 1.
      filters: channels of each 3 x 3 convolution.
      strides: of the 3 x 3 convolutions, one after the other; without padding each takes 2 pixels
        off both sides' sum before it strides.
      weight_decay: lambda of lambda/2 |kernel|^2.
      dtype: "float32", or "float64".
      seed: of the start.

    Attributes:
      moments: Adam's state after `fit`, for `continued_training`; None before.

    Raises: ValueError for an image that the convolutions leave nothing of, a size below 1 or a
      negative weight decay.
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
        self.moments: adam.Moments | None = None
        self.settings = (tuple(image_shape), num_classes, filters, tuple(strides), weight_decay)
        seeds = iter(np.random.default_rng(seed).integers(2**31, size=len(strides) + 2).tolist())

        def weighted(layer, gain, fan_in, *args, name, **options):
            return layer(
                *args,
                name=name,
                dtype=dtype,
                # Keras' L2 has no 1/2.
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
        examples: Examples,
        *,
        schedule: Sequence[tuple[int, float]] = _SCHEDULE,
        batch_size: int = 500,
        seed: int = 0,
        checkpoints: str | os.PathLike | None = None,
    ) -> AllCNN:
        """Train from the present theta by Adam (Kingma & Ba 2015) on minibatches.

        Where it ends is no minimum: `gradient_norm(examples)` tells how far from one it is. The
        same examples, schedule and seed give the same theta, on the same machine bit for bit.

        Args:
          examples: the training set.
          schedule: (steps, learning rate) of each stage; Adam's averages carry over to the next.
          batch_size: rows a step, all of them if there are fewer.
          seed: of the order of the rows, shuffled anew each time all have been seen.
          checkpoints: a folder where theta and Adam's state are kept every few hundred steps, so
            that a training that was killed goes on where it was and ends with the same numbers.

        Returns: self, with Adam's state in `moments`.
        Raises: ValueError for a bad schedule or batch size; DivergenceError for a risk that is not
          finite, theta being put back.
        """
        self.validate(examples, "examples")
        self.moments = adam.minimise(
            self, examples, schedule=schedule, batch_size=batch_size, seed=seed,
            checkpoints=checkpoints, key=self.settings,
        )  # fmt: skip
        return self


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
