"""The training rows that an attack may move, each within its box, and the rule for the moves."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from influence.common.numbers import numbers
from influence.examples.examples import Examples, check_rows
from influence.net.net import GenericNeuralNet

# One call of `input_gradient` gets at most this many inputs, because a deep trunk needs much memory
# for each input.
_TOGETHER = 16
# `check_targets` compares the given inputs with the same rows of `train`. If the net has a trunk,
# their features may differ by this relative amount, because of rounding.
_SAME = 1e-3
# If the net has no trunk, the inputs may differ by this relative amount, the rounding of float32.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Rule:
    """A rule for the steps and the choice of the poisons. The defaults are the best that we found.

    g is the derivative that `poison` moves against. The velocity of move t = 0, 1, ... is
    v_t = momentum v_(t-1) + g / mean |g|. Every entry moves by

        -radius step decay^t clip(v_t / (softness mean |v_t|), -1, 1)

    With softness 0, the sign of v_t replaces the clipped ratio.

    Args:
      step: largest move of an entry at t = 0, in units of the radius.
      decay: factor by which the step shrinks from each move to the next.
      momentum: factor of the last velocity in the next velocity, in [0, 1).
      softness: an entry moves in proportion to v if |v| is below softness times the mean of |v|.
      max_steps: largest number of moves of each set of poisons.
      tries: number of rows that are first moved one at a time. These rows have the largest |g|_1 at
        the clean weights. The rows that raise the loss most become the poisons. They then move
        together from the inputs that they have reached, and t starts at max_steps // 2. For the
        next count, the other rows are ranked again at the present weights. With tries = 0, the rows
        with the largest |g|_1 are the poisons, and they start from their own inputs.
      restarts: number of times that a set of several poisons starts again at random places in
        the boxes, if too few test examples are flipped.

    Raises: ValueError for an argument out of its range.
    """

    step: float = 1.0
    decay: float = 0.85
    momentum: float = 0.5
    softness: float = 0.5
    max_steps: int = 12
    tries: int = 6
    restarts: int = 1

    def __post_init__(self):
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
        """Return how far each entry moves at move t, in units of the radius."""
        direction = np.sign(velocity)
        if self.softness:
            direction = np.clip(velocity / (self.softness * mean_size(velocity)), -1, 1)
        return -self.step * self.decay**t * direction


BEST_RULE = Rule()
# The rule of the authors' 2017 code. It makes at most 100 moves. With that code's radius of .5 of
# an 8-bit level, each move is .02 of a level.
PAPER_RULE = Rule(
    step=0.04, decay=1.0, momentum=0.0, softness=0.0, max_steps=100, tries=0, restarts=0
)


@dataclass(frozen=True, eq=False)
class Targets:
    """Training rows that may be moved, each within its own box.

    Attributes:
      rows: (c,) row numbers.
      x: (c, ...) the rows' original inputs, floating.
      y: (c, ...) the rows' labels.
      radius: half the width of a box, in the unit of x.
      low: (c, ...) the lower corner of each box.
      high: (c, ...) the upper corner of each box.
    """

    rows: NDArray[np.int64]
    x: NDArray
    y: NDArray
    radius: float
    low: NDArray
    high: NDArray

    def moved(self, at: Any, x: NDArray, by: NDArray) -> NDArray:
        """Return inputs x of the targets `at`, moved by `by` radii and clipped to their boxes."""
        to = x + (self.radius * by).astype(x.dtype)
        return np.clip(to, self.low[at], self.high[at])

    def anywhere(self, at: Any, seed: int) -> NDArray:
        """Draw inputs of the targets `at` from their boxes, and return the inputs of all targets.

        Each entry moves by a uniform draw in [-radius, radius] and is clipped to its box. The draws
        depend only on the seed and the row number. All other targets keep their original inputs.
        """
        x = self.x.copy()
        for i in at:
            by = np.random.default_rng([seed, int(self.rows[i])]).uniform(-1, 1, x[i].shape)
            x[i] = self.moved(i, x[i], by)
        return x

    def gradients(self, net: GenericNeuralNet, at: Any, x: NDArray, s: NDArray) -> NDArray:
        """Compute d/dx (grad loss . s) of the targets `at` with inputs x, in x's shape."""
        y = self.y[at]
        parts = range(0, len(x), _TOGETHER)
        return np.concatenate(
            [net.input_gradient(x[i : i + _TOGETHER], y[i : i + _TOGETHER], s) for i in parts]
        )


def mean_size(v: NDArray) -> NDArray:
    """Compute the mean of |v| for each input. The result is 1 if all of v is zero."""
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
    """Check the rows, their inputs and bounds, and return them with their boxes.

    Args:
      net: the net that is attacked.
      train: examples of inputs or of features.
      rows: (c,) row numbers.
      radius: half the width of a box.
      inputs: (c, ...) inputs of the rows; None: those in `train`.
      bounds: least and largest value of an entry, or None.

    Raises: TypeError, ValueError or IndexError naming the argument.
    """
    rows = check_rows(rows, len(train))
    if not (isinstance(radius, Real) and np.isfinite(radius) and radius > 0):
        raise ValueError(f"radius must be positive and finite, got {radius!r}.")
    if isinstance(train.x, dict) or scipy.sparse.issparse(train.x):
        raise TypeError(
            "train.x must be one dense array to be moved, got "
            f"{'a dict' if isinstance(train.x, dict) else 'sparse rows'}."
        )
    own = train.x[rows]
    x = own if inputs is None else numbers(inputs, "inputs")
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
    """Refuse inputs x whose features differ from those of the same rows of train.x."""
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
