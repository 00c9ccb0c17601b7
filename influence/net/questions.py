"""Questions about a batch of rows, as values that can be sent to where the rows are.

`Examples.sum_over` and `Examples.map_over` ask them: `question(net, theta, x, y)`, theta being
None for the net's own. A question holds no rows and no net.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Methods of a net that are asked again and again at one theta, with other vectors.
_ASKED_AGAIN = ("hvp", "gauss_newton_product", "directional", "bregman_gradient")


class PerRow:
    """A net's method as a question: its answer for a batch has one entry for each row.

    Args:
      method: name of a method of GenericNeuralNet that takes (x, y, *arguments), such as "losses"
        or "directional".
      arguments: arrays that it takes besides, such as directions (d, m).

    Attributes:
      num_vectors: m of the widest argument (d, m), else 1; it bounds the rows of a batch.
      keeps: whether the net may cache what belongs to its theta and the batch.
    """

    def __init__(self, method: str, *arguments: NDArray):
        self.method, self.arguments = method, arguments
        self.num_vectors = max((a.shape[1] for a in arguments if np.ndim(a) == 2), default=1)
        self.keeps = method in _ASKED_AGAIN

    def __repr__(self) -> str:
        """The method and the shapes of its arguments."""
        shapes = "".join(f", {np.shape(argument)}" for argument in self.arguments)
        return f"{type(self).__name__}({self.method!r}{shapes})"

    def __call__(self, net: Any, theta: NDArray | None, x: Any, y: NDArray) -> Any:
        """Answer for one batch."""
        return getattr(net.at(theta), self.method)(x, y, *self.arguments)


class Total(PerRow):
    """A net's method that answers with a batch's mean, as a question that answers with the sum.

    Args:
      method: as for `PerRow`, such as "gradient" or "hvp"; it may answer with a tuple.
      arguments: as for `PerRow`.
    """

    def __call__(self, net: Any, theta: NDArray | None, x: Any, y: NDArray) -> Any:
        """Answer for one batch: its number of rows times the method's mean."""
        mean = super().__call__(net, theta, x, y)
        return tuple(len(y) * part for part in mean) if isinstance(mean, tuple) else len(y) * mean


def loss_sum(net: Any, theta: NDArray | None, x: Any, y: NDArray) -> float:
    """Sum of the losses of a batch, in float64, without the penalty."""
    return net.at(theta).losses(x, y).sum(dtype=np.float64)


def outputs(net: Any, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
    """The model's outputs for a batch, (n, ...)."""
    return net.at(theta).outputs(x)
