"""Margins of rows: numbers that are positive if the model predicts the row's given label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.examples import labels as packing
from influence.examples.examples import Examples

# For these losses, the sign of an output predicts one of two labels.
_SIGNED = (
    keras.losses.binary_crossentropy,
    keras.losses.binary_focal_crossentropy,
    keras.losses.hinge,
    keras.losses.squared_hinge,
)
_RESIDUAL = (
    keras.losses.mean_squared_error,
    keras.losses.mean_absolute_error,
    keras.losses.huber,
    keras.losses.log_cosh,
)
_SHARES = (
    keras.losses.categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.categorical_hinge,
    keras.losses.kl_divergence,
)
# These losses of `_SIGNED` take labels 0 and 1, or numbers between them. The hinge losses take
# labels -1 and 1, or 0 and 1.
_BITS = _SIGNED[:2]
# Probabilities are clipped to [_CLIP, 1 - _CLIP] before the logarithm, as in Keras.
_CLIP = 1e-7
CLASSES, BINARY, RESIDUAL, LOSS = "classes", "binary", "residual", "loss"
MEANING = {
    CLASSES: "the logit of the given class minus the largest other logit",
    BINARY: "the logit, with the sign of the given label; of several labels, the smallest",
    RESIDUAL: "minus the Euclidean norm of prediction - label",
    LOSS: "minus the loss: the labels are not classes, and the loss is not a distance of numbers",
}


@dataclass(frozen=True)
class Margins:
    """Rule that computes the margins for one model, one loss and one set of labels.

    A margin is positive if the model predicts the given label. Sample weights do not multiply it.
    There are four kinds of margins:

    - `classes`: z_y - max over k != y of z_k, with the logits z and the given class y. If the model
      returns probabilities whose logits are not known, their logarithms replace the logits.
    - `binary`: the logit z for the larger of two labels, and -z for the smaller label. If a row has
      several labels, the margin is the smallest of these numbers. It is positive only if the model
      predicts all labels of the row.
    - `residual`: -|prediction - label|, the Euclidean norm over the outputs. It is never positive.
    - `loss`: minus the row's loss. This kind is used if no other kind applies.

    For sequences and images, `classes` and `binary` average over the valid positions of a row. For
    a model with several outputs, each output has a kind. If all kinds are `classes` or `binary`,
    the margin of a row is the smallest of its outputs' margins. Otherwise, and if the model adds
    losses by `add_loss`, it is minus the row's loss.

    Attributes:
      kind: classes, binary, residual or loss.
      outputs: the kind of each output that has a loss.
    """

    kind: str
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, net: Any, examples: Examples) -> Margins:
        """Choose the rule for a net and the labels of all rows."""
        parts: Any = getattr(net.loss, "parts", ()) or (net.loss,)
        y = packing.labels(examples.y)
        shapes = seen_shapes(net, examples)
        found: tuple[str, ...] = tuple(
            _kind(part, _own(y, part), shape) for part, shape in zip(parts, shapes, strict=True)
        )
        if getattr(net.loss, "adds", False):
            return cls(LOSS, found)
        kinds = set(found)
        if len(found) > 1 and not kinds <= {CLASSES, BINARY}:
            return cls(LOSS, found)
        return cls(kinds.pop() if len(kinds) == 1 else CLASSES, found)

    @property
    def meaning(self) -> str:
        """Phrase that says what the margins are."""
        return MEANING[self.kind] + (
            "; of several outputs, the smallest"
            if len(self.outputs) > 1 and self.kind != LOSS
            else ""
        )

    def __call__(
        self, loss: Any, y: NDArray, z: NDArray, losses: NDArray, positions: NDArray | None
    ) -> NDArray:
        """Return the margins (n,) of a batch.

        Args:
          loss: the net's loss.
          y: the labels, plain or packed.
          z: the model's outputs in the form that the loss takes.
          losses: (n,) the losses.
          positions: (n, ...) weights of each row's positions, such as time steps, with sum 1 in a
            row. None means equal weights.
        """
        if self.kind == LOSS:
            return -losses
        if not hasattr(loss, "parts"):
            return _of_one(self.outputs[0], loss, packing.labels(y), z, positions)
        of_outputs = [np.asarray(part) for part in loss.split(_tensor(z))]
        found = [
            _of_one(kind, part, _own(packing.labels(y), part), own, None)
            for kind, part, own in zip(self.outputs, loss.parts, of_outputs, strict=False)
        ]
        return np.min(found, axis=0)


def _tensor(z: NDArray) -> Any:
    return keras.ops.convert_to_tensor(z)


def seen_shapes(net: Any, examples: Examples) -> list[tuple[int, ...]]:
    """Return the shape of one row of z, for each output that has a loss.

    z is the output in the form that the loss takes, such as logits.
    """
    few = examples.take([0])
    shape = net.seen_shape(few.x)
    if not hasattr(net.loss, "parts"):
        return [tuple(shape)]
    return [tuple(own) for own in net.loss._shapes[shape[-1]]]


def _own(y: Any, part: Any) -> NDArray:
    """Return the labels of the output that the loss `part` takes, as a dense array."""
    if isinstance(y, Mapping):
        y = y[part.output] if part.output in y else next(iter(y.values()))
    return np.asarray(y.toarray() if hasattr(y, "toarray") else y)


def _kind(loss: Any, y: NDArray, shape: tuple[int, ...]) -> str:
    function, rows = loss.keras_function, y.shape[1:]
    if function in _SIGNED:
        return BINARY
    several = bool(shape) and shape[-1] > 1
    whole = y.dtype.kind in "iub" or (y.dtype.kind == "f" and bool((y == np.round(y)).all()))
    if function is keras.losses.sparse_categorical_crossentropy:
        return CLASSES
    if several and rows == shape:
        one_hot = bool(((y == 0) | (y == 1)).all() and (y.sum(axis=-1) == 1).all())
        if function in _SHARES or one_hot:
            return CLASSES
    elif several and whole and function is None and rows in (shape[:-1], (*shape[:-1], 1)):
        return CLASSES
    if function in _RESIDUAL:
        return RESIDUAL
    single = int(np.prod(shape)) == 1 and y.size == len(y)
    if single and loss.labels is not None and len(loss.labels) == 2:
        return BINARY
    return LOSS


def _of_one(kind: str, loss: Any, y: Any, z: NDArray, positions: NDArray | None) -> NDArray:
    y, n = _own(y, loss), len(z)
    if kind == RESIDUAL:
        gap = z.reshape(n, -1).astype(np.float64) - y.reshape(n, -1)
        return -np.linalg.norm(gap, axis=1)
    if not loss.from_logits:
        z = _logs(z, kind)
    if kind == BINARY:
        found = _signed(loss, y, z)
    else:
        given = y.argmax(axis=-1) if y.shape == z.shape else y.reshape(z.shape[:-1])
        given = given.astype(np.int64)
        void = (given < 0) | (given >= z.shape[-1])  # an ignored class, with weight 0
        at = np.where(void, 0, given)
        found = class_margins(z, at)
    found = found.reshape(n, -1)
    if positions is None:
        return found.mean(axis=1)
    return (positions.reshape(n, -1) * found).sum(axis=1)


def class_margins(z: NDArray, given: NDArray) -> NDArray:
    """Return the given class's logit minus the largest other logit, (...,), for z (..., c)."""
    at = given[..., None]
    others = z.copy()
    np.put_along_axis(others, at, -np.inf, -1)
    return np.take_along_axis(z, at, -1)[..., 0] - others.max(axis=-1)


def _signed(loss: Any, y: NDArray, z: NDArray) -> NDArray:
    """Return z for the larger label and -z for the smaller, or the minimum for several labels."""
    if loss.labels is not None and len(loss.labels) == 2:
        middle = sum(map(float, loss.labels)) / 2
    else:
        middle = 0.5 if loss.keras_function in _BITS else 0.0
    signed = np.where(y.reshape(z.shape) > middle, z, -z)
    return signed.min(axis=-1) if signed.ndim > 1 else signed


def _logs(z: NDArray, kind: str) -> NDArray:
    z = np.clip(z, _CLIP, 1 - _CLIP)
    return np.log(z) - np.log1p(-z) if kind == BINARY else np.log(z)


class Recorded:
    """Question that returns the margins and losses of a batch, for `Examples.map_over`."""

    def __init__(self, margins: Margins):
        self.margins = margins

    def __call__(
        self, net: Any, theta: NDArray | None, x: Any, y: NDArray
    ) -> tuple[NDArray, NDArray]:
        """Return the margins (b,) and the losses (b,)."""
        z, losses, positions = self._asked(net.at(theta), x, y)
        return self.margins(net.loss, y, z, losses, positions), losses

    def losses(self, net: Any, x: Any, y: NDArray) -> NDArray:
        """Return the losses of a batch."""
        return self._asked(net, x, y)[1]

    def _asked(self, net: Any, x: Any, y: NDArray) -> tuple[NDArray, NDArray, NDArray | None]:
        flat, loss = net.flat, net.loss

        def both(theta: Any, x: Any, y: Any) -> tuple[Any, Any]:
            z = flat.output(theta, x)
            return z, tf.cast(loss.function(y, z), theta.dtype)

        x, tensors = flat.batch(x, y)
        z, losses = flat.run("recorded", both, net.theta_tensor(), x, tensors)
        weights = packing.positions(tensors)
        return z, losses, None if weights is None else weights.numpy()
