"""What each training row could do to test losses, were its input moved a little.

With s = H^-1 grad (mean test loss), the mean test loss after retraining changes with the input of
row i as

    d (mean test loss) / dx_i = -g_i / n      g_i = d/dx_i (grad loss_i . s)

at the minimum of the risk, not an approximation to it (Koh & Liang 2017, section 2.2, where -g_i is
I_pert,loss); the penalty, which does not depend on x, drops out. Within a box of half width radius,
the step of largest first-order effect is -radius sign(g_i), of effect radius |g_i|_1 / n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from influence.examples import Examples, check_rows
from influence.net import GenericNeuralNet
from influence.response import Response
from influence.solvers import Direct, Solver

_TOGETHER = 16  # inputs that are differentiated in one call: images through a deep trunk
_SAME = 1e-3  # relative gap between a row's features and those of its input: float32's, not more


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

    def gradients(self, net: GenericNeuralNet, at: Any, x: NDArray, s: NDArray) -> NDArray:
        """g of the targets `at`, their inputs at x: x's shape."""
        y = self.y[at]
        parts = range(0, len(x), _TOGETHER)
        return np.concatenate(
            [net.input_gradient(x[i : i + _TOGETHER], y[i : i + _TOGETHER], s) for i in parts]
        )


def gradient_norms(
    net: GenericNeuralNet,
    train: Examples,
    test: Examples,
    rows: ArrayLike,
    *,
    inputs: NDArray | None = None,
    solver: Solver = Direct(),
) -> NDArray:
    """L1 norms of g_i, by which the paper's attack ranks training rows; see the file's head.

    Times radius / n: how much the mean test loss can be made to rise by moving the row within a box
    of that radius, to first order. What bounds cut off the box is not looked at.

    Args:
      net: at the minimum of its risk on `train`.
      train: n rows; see `attack.poison`.
      test: m examples; the mean of their losses is what is to rise.
      rows: (c,) training rows.
      inputs: (c, ...) the rows' inputs, where `train` holds features of them.
      solver: how H^-1 is applied.

    Returns: (c,), in the unit of the loss for each unit of the input.
    Raises: as `attack.poison`.
    """
    train, test = seen_by(net, train), seen_by(net, test)
    targets = check_targets(net, train, rows, 1.0, inputs, None)
    return norms_of(net, train, test, targets, solver)


def norms_of(
    net: GenericNeuralNet, train: Examples, test: Examples, targets: Targets, solver: Solver
) -> NDArray:
    """`gradient_norms` of targets and examples that are known to be right."""
    s = mean_s_test(net, train, test, solver)
    g = targets.gradients(net, slice(None), targets.x, s)
    return np.abs(g).sum(axis=tuple(range(1, g.ndim)), dtype=np.float64)


# --- shared with the attack -----------------------------------------------------------------------


def mean_s_test(
    net: GenericNeuralNet, train: Examples, test: Examples, solver: Solver
) -> NDArray:
    """H^-1 grad (mean test loss) at the net's theta: (d,)."""
    return Response(net, train, solver=solver).s_test(test).x.mean(axis=1)


def seen_by(net: GenericNeuralNet, examples: Examples) -> Examples:
    """The examples as the trained part of the net sees them."""
    seen = net.features(examples.x)
    return examples if seen is examples.x else Examples(seen, examples.y)


def check_targets(
    net: GenericNeuralNet,
    train: Examples,
    rows: ArrayLike,
    radius: float,
    inputs: NDArray | None,
    bounds: tuple[float, float] | None,
) -> Targets:
    """The rows with their boxes, once they are known to be right.

    Raises: TypeError, ValueError or IndexError naming the argument.
    """
    rows = check_rows(rows, len(train))
    if not (np.isfinite(radius) and radius > 0):
        raise ValueError(f"radius must be positive and finite, got {radius}.")
    if isinstance(train.x, dict) or scipy.sparse.issparse(train.x):
        raise TypeError(
            "train.x must be one dense array to be moved, got "
            f"{'a dict' if isinstance(train.x, dict) else 'sparse rows'}."
        )
    seen = train.x[rows]
    x = seen if inputs is None else np.asarray(inputs)
    if len(x) != len(rows):
        raise ValueError(f"inputs must have a row for each of {len(rows)} rows, got {len(x)}.")
    if x.dtype.kind != "f":
        raise TypeError(
            f"{'train.x' if inputs is None else 'inputs'} must be floating to be moved, got "
            f"{x.dtype}; pass images as floats, such as x / 127.5 - 1."
        )
    if inputs is not None:
        few = np.unique([0, len(x) - 1])
        gap = np.linalg.norm(net.features(x[few]) - seen[few])
        if not gap <= _SAME * np.linalg.norm(seen[few]):
            raise ValueError(
                "inputs must be those of the rows, got features that differ from train.x by "
                f"{gap:.2g}; give train.x[rows] before the trunk, scaled as for the features."
            )
    low, high = (x - radius).astype(x.dtype), (x + radius).astype(x.dtype)
    if bounds is not None:
        if not bounds[0] < bounds[1]:
            raise ValueError(f"bounds must be the least and the largest value, got {bounds}.")
        if x.min() < bounds[0] or x.max() > bounds[1]:
            raise ValueError(
                f"bounds must hold the inputs, got {bounds} for entries from {x.min():.4g} to "
                f"{x.max():.4g}."
            )
        low, high = np.maximum(low, bounds[0]), np.minimum(high, bounds[1])
    y = train.y[rows]
    return Targets(rows, x, y, float(radius), low.astype(x.dtype), high.astype(x.dtype))
