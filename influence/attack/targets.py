"""Training rows that an attack may move, each within its box, and the rule of the moves."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from influence.examples.examples import Examples, check_rows
from influence.net.net import GenericNeuralNet

_TOGETHER = 16  # inputs that are differentiated in one call: images through a deep trunk
_SAME = 1e-3  # relative gap between a row's features and those of its input: a trunk's rounding
_ROUNDING = 1e-6  # of the input itself, where the net sees that: float32's


@dataclass(frozen=True)
class Rule:
    """How poisons are moved and chosen; the defaults are the strongest that was found.

    At move t the velocity is v_t = momentum v_(t-1) + g / mean |g|, and every entry moves by
    - radius step decay^t clip(v_t / (softness mean |v_t|), -1, 1): by its sign alone at softness 0.

    Args:
      step: of the first move, in radii.
      decay: each further step, times the one before.
      momentum: share of the last velocity in the next, in [0, 1).
      softness: of the sign: entries of |v| below this share of the mean move in proportion.
      max_steps: moves at most of each set of poisons.
      tries: how many rows, those of largest |g|_1 at the clean weights, are moved alone first; the
        poisons are those that then did most, and go on from there together, t beginning at half of
        max_steps, and where more are wanted the rest are ranked again at the weights reached. 0:
        the rows of largest |g|_1 are the poisons, from their own inputs on.
      restarts: how often several poisons that did not do enough begin again, each time somewhere
        else in their boxes.

    Raises: ValueError.
    """

    step: float = 1.0
    decay: float = 0.85
    momentum: float = 0.5
    softness: float = 0.5
    max_steps: int = 12
    tries: int = 6
    restarts: int = 1

    def __post_init__(self):
        """Check the hyperparameters."""
        for name, low, high in (("step", 0, 2), ("decay", 0, 1)):
            if not low < getattr(self, name) <= high:
                raise ValueError(f"{name} must lie in ({low}, {high}], got {getattr(self, name)}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}.")
        if not self.softness >= 0:
            raise ValueError(f"softness must be non-negative, got {self.softness}.")
        for name, least in (("max_steps", 1), ("tries", 0), ("restarts", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")

    def move(self, velocity: NDArray, t: int) -> NDArray:
        """Of each entry at move t, in radii."""
        direction = np.sign(velocity)
        if self.softness:
            direction = np.clip(velocity / (self.softness * mean_size(velocity)), -1, 1)
        return -self.step * self.decay**t * direction


BEST_RULE = Rule()
PAPER_RULE = Rule(
    step=0.04, decay=1.0, momentum=0.0, softness=0.0, max_steps=100, tries=0, restarts=0
)
"""The release's: at most 100 moves of .02 of an 8-bit level, in a box of .5 to each side."""


@dataclass(frozen=True, eq=False)
class Targets:
    """Training rows that may be moved, each within its own box.

    Attributes:
      rows: (c,) row numbers.
      x: (c, ...) their inputs as they are, floating.
      y: (c, ...) their labels.
      radius: half the box's width, in the unit of x.
      low: (c, ...) the box's lower corner.
      high: (c, ...) its upper one.
    """

    rows: NDArray[np.int64]
    x: NDArray
    y: NDArray
    radius: float
    low: NDArray
    high: NDArray

    def moved(self, at: Any, x: NDArray, by: NDArray) -> NDArray:
        """Inputs x of the targets `at`, moved by so many radii, back into their boxes."""
        to = x + (self.radius * by).astype(x.dtype)
        return np.clip(to, self.low[at], self.high[at])

    def anywhere(self, at: Any, seed: int) -> NDArray:
        """Inputs of all targets, those `at` evenly spread over their boxes; the others unmoved.

        A target's are drawn by its row number, whatever the others are.
        """
        x = self.x.copy()
        for i in at:
            by = np.random.default_rng([seed, int(self.rows[i])]).uniform(-1, 1, x[i].shape)
            x[i] = self.moved(i, x[i], by)
        return x

    def gradients(self, net: GenericNeuralNet, at: Any, x: NDArray, s: NDArray) -> NDArray:
        """g of the targets `at`, their inputs at x: x's shape."""
        y = self.y[at]
        parts = range(0, len(x), _TOGETHER)
        return np.concatenate(
            [net.input_gradient(x[i : i + _TOGETHER], y[i : i + _TOGETHER], s) for i in parts]
        )


def mean_size(v: NDArray) -> NDArray:
    """Mean |v| of each input, 1 where all of it is zero."""
    mean = np.abs(v).mean(axis=tuple(range(1, v.ndim)), keepdims=True)
    return np.where(mean > 0, mean, 1).astype(v.dtype)


def check_targets(
    net: GenericNeuralNet,
    train: Examples,
    rows: ArrayLike,
    radius: float,
    inputs: NDArray | None,
    bounds: tuple[float, float] | None,
) -> Targets:
    """The rows with their boxes, once they are known to be right.

    Args:
      net: with the trunk that inputs go through, if it has one.
      train: of inputs, or of features.
      rows: (c,) row numbers.
      radius: half the box's width.
      inputs: (c, ...) of the rows, or None for what `train` holds.
      bounds: least and largest value of an entry, or None.

    Raises: TypeError, ValueError or IndexError naming the argument.
    """
    rows = check_rows(rows, len(train))
    if not (isinstance(radius, numbers.Real) and np.isfinite(radius) and radius > 0):
        raise ValueError(f"radius must be positive and finite, got {radius!r}.")
    if isinstance(train.x, dict) or scipy.sparse.issparse(train.x):
        raise TypeError(
            "train.x must be one dense array to be moved, got "
            f"{'a dict' if isinstance(train.x, dict) else 'sparse rows'}."
        )
    own = train.x[rows]
    x = own if inputs is None else np.asarray(inputs)
    if x.shape[:1] != (len(rows),):
        raise ValueError(
            f"inputs must have a row for each of {len(rows)} rows, got shape {x.shape}."
        )
    if x.dtype.kind != "f":
        raise TypeError(
            f"{'train.x' if inputs is None else 'inputs'} must be floating to be moved, got "
            f"{x.dtype}; pass images as floats, such as x / 127.5 - 1."
        )
    low, high = (x - radius).astype(x.dtype), (x + radius).astype(x.dtype)
    if bounds is not None:
        if np.shape(bounds) != (2,) or not bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be the least and the largest value, got {bounds}.")
        if not (x.min() >= bounds[0] and x.max() <= bounds[1]):
            raise ValueError(
                f"bounds must hold the inputs, got {bounds} for entries from {x.min():.4g} to "
                f"{x.max():.4g}."
            )
        low, high = np.maximum(low, bounds[0]), np.minimum(high, bounds[1])
    if inputs is not None:
        for first in range(0, len(x), _TOGETHER):
            part = slice(first, first + _TOGETHER)
            _check_same(net, x[part], own[part], rows[part])
    y = train.y[rows]
    return Targets(rows, x, y, float(radius), low.astype(x.dtype), high.astype(x.dtype))


def _check_same(net: GenericNeuralNet, x: NDArray, own: NDArray, rows: NDArray) -> None:
    """See that inputs x are those of some rows of train.x: the net sees the same of both."""
    seen, known = net.features(x), net.features(own)
    if np.shape(seen) != np.shape(known):
        raise ValueError(
            f"inputs must be those of the rows, got shape {x.shape}, of which the net sees "
            f"{np.shape(seen)}, where train.x has {own.shape}; give train.x[rows] before the trunk."
        )
    sizes = [np.linalg.norm(part.reshape(len(part), -1), axis=1) for part in (seen - known, known)]
    share = _ROUNDING if seen is x else _SAME
    other = np.flatnonzero(~(sizes[0] <= share * sizes[1]))
    if len(other):
        raise ValueError(
            "inputs must be those of the rows, in their order, got for row "
            f"{rows[other[0]]} one that the net sees {sizes[0][other[0]]:.2g} away from train.x; "
            "give train.x[rows] before the trunk, scaled as for the features."
        )
