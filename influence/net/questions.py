"""Questions: functions of a batch that can be pickled and sent to another machine.

`Examples.sum_over` and `Examples.map_over` call `question(net, theta, x, y)` for each batch. If
theta is None, the question uses the net's own theta. A question contains no rows and no net.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Callers use these methods of a net many times at the same theta, each time with other vectors.
_ASKED_AGAIN = ("hvp", "gauss_newton_product", "directional", "bregman_gradient")


class PerRow:
    """Question that calls a net's method. The method's result has one entry per row.

    Args:
      method: the name of a method of GenericNeuralNet that takes (x, y, *arguments), such as
        "losses" or "directional".
      arguments: further arrays that are passed to the method, such as directions (d, m).

    Attributes:
      num_vectors: the largest m of the arguments (d, m), or 1 without such an argument. The number
        of rows per batch depends on it.
      keeps: True if the net may cache intermediate results that depend only on theta and the batch.
    """

    def __init__(self, method: str, *arguments: NDArray):
        self.method, self.arguments = method, arguments
        self.num_vectors = max((a.shape[1] for a in arguments if np.ndim(a) == 2), default=1)
        self.keeps = method in _ASKED_AGAIN

    def __repr__(self) -> str:
        """Show the method's name and the shapes of its arguments."""
        shapes = "".join(f", {np.shape(argument)}" for argument in self.arguments)
        return f"{type(self).__name__}({self.method!r}{shapes})"

    def __call__(self, net: Any, theta: NDArray | None, x: Any, y: NDArray) -> Any:
        """Return the result of the method for one batch."""
        return getattr(net.at(theta), self.method)(x, y, *self.arguments)


class Total(PerRow):
    """Question that turns a method's mean over the batch into the sum over the batch.

    Args:
      method: the name of the method, such as "gradient" or "hvp". It may return a tuple.
      arguments: further arrays that are passed to the method.
    """

    def __call__(self, net: Any, theta: NDArray | None, x: Any, y: NDArray) -> Any:
        """Return the number of rows times the method's mean."""
        mean = super().__call__(net, theta, x, y)
        return tuple(len(y) * part for part in mean) if isinstance(mean, tuple) else len(y) * mean


def loss_sum(net: Any, theta: NDArray | None, x: Any, y: NDArray) -> float:
    """Return the sum of mass times loss over the rows of a batch, without the penalty."""
    losses = net.at(theta).losses(x, y)
    if net.loss.has_masses:
        return float(net.masses(x, y) @ losses)
    return losses.sum(dtype=np.float64)
