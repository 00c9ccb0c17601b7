"""The paper's convex models: logistic regression with several classes, and with two classes.

With p = softmax(z), the loss is l = -log p_y, dl/dz = p - onehot(y) and d2l/dz2 = diag(p) - p p'.
With p = sigmoid(z) and one output, dl/dz = p - y and d2l/dz2 = p (1 - p).
"""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
import scipy.special
from numpy.typing import NDArray

from influence.examples.examples import Examples
from influence.models.design import Link, Weighted
from influence.models.linear import LinearModel


@dataclass(frozen=True)
class Softmax(Link):
    """The loss -log softmax(z)_y of c outputs z and class numbers y."""

    def loss(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return the losses, (n, k); see Link.loss."""
        return scipy.special.logsumexp(Z, axis=1) - Z[np.arange(len(Z)), y.astype(int).ravel()]

    def slope(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return dl/dz, (n, c, k); see Link.slope."""
        E = _softmax(Z)
        E[np.arange(len(E)), y.astype(int).ravel()] -= 1
        return E

    def curvature(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return the probabilities p, (n, c, 1); see Link.curvature."""
        return _softmax(Z)

    def multiplied(self, K: NDArray, U: NDArray) -> NDArray:
        """Return diag(p) u - p p'u with the probabilities p in K; see Link.multiplied."""
        U = U - np.einsum("nc,ncm->nm", K[:, :, 0], U)[:, None, :]
        U *= K
        return U

    def weights(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return p_a p_b for each pair of classes a > b: (n, c (c - 1) / 2); see Link.weights."""
        P = _softmax(Z)[:, :, 0]
        a, b = np.tril_indices(P.shape[1], -1)
        return P[:, a] * P[:, b]


@dataclass(frozen=True)
class Sigmoid(Link):
    """The loss of one output z: -log sigmoid(z) for label 1, -log sigmoid(-z) for label 0."""

    def loss(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return the losses, (n, k); see Link.loss."""
        z = Z[:, 0]
        return np.logaddexp(0, z) - y.reshape(-1, 1).astype(z.dtype) * z

    def slope(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return dl/dz, (n, c, k); see Link.slope."""
        return scipy.special.expit(Z) - y.reshape(-1, 1, 1).astype(Z.dtype)

    def curvature(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return p (1 - p); see Link.curvature."""
        P = scipy.special.expit(Z)
        return P * (1 - P)


class MulticlassLogisticRegression(LinearModel):
    """Softmax regression on class numbers 0 to num_classes - 1 (the paper's Figure 2, left).

    Args:
      num_features: number f of features.
      num_classes: number c of classes.
      weight_decay: lambda of the penalty lambda/2 |W|^2, where W includes the intercept.
      intercept: True if the model has an intercept. The paper's model has none.
      dtype: "float64" or "float32". float64 is the default, because leave-one-out changes are only
        1e-3 to 1e-5 of a loss.

    Raises: ValueError for fewer than two classes, for no feature, or for a negative weight decay.
    """

    takes_weights = True

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        weight_decay: float = 0.01,
        intercept: bool = False,
        dtype: str = "float64",
    ):
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
        super().__init__(
            num_features,
            num_classes,
            Weighted(Softmax()),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none"),
            weight_decay=weight_decay,
            intercept=intercept,
            dtype=dtype,
        )

    def hessian(self, examples: Examples, batch_size: int | None = None) -> NDArray:
        """Return the risk's Hessian (d, d), formed from a block for each pair of classes.

        The block of two classes a and b is -X' diag(p_a p_b) X / n. The probabilities of all
        classes add up to one. Therefore the block of a class with itself is minus the sum
        of its blocks with all other classes, plus the penalty's part.
        """
        blocks = self._weighted_grams(examples)
        c, f = self.num_outputs, blocks.shape[1]
        a, b = np.tril_indices(c, -1)
        pair = np.zeros((c, c), int)
        pair[a, b] = pair[b, a] = np.arange(len(a))
        own = np.arange(c)
        H = np.empty((f, c, f, c), self.dtype)
        # The loop fills the rows of H feature by feature, because those of one feature fit into the
        # processor's cache.
        for row, of_row in zip(H, blocks.swapaxes(0, 1), strict=True):
            parts = -of_row[pair]  # (c, c, f): one row of each block
            parts[own, own] = 0
            parts[own, own] = -parts.sum(axis=1)
            row[:] = parts.swapaxes(1, 2)
        H = H.reshape(f * c, f * c)
        H[np.diag_indices_from(H)] += self.weight_decay
        return H


class BinaryLogisticRegression(LinearModel):
    """Logistic regression on labels 0 and 1 with one vector of weights.

    Args:
      num_features: number f of features.
      weight_decay: lambda of the penalty lambda/2 |w|^2, where w includes the intercept.
      intercept: True if the model has an intercept. The paper's model has none.
      dtype: "float64" or "float32".

    Raises: ValueError for fewer than one feature or a negative weight decay.
    """

    takes_weights = True

    def __init__(
        self,
        num_features: int,
        *,
        weight_decay: float = 0.01,
        intercept: bool = False,
        dtype: str = "float64",
    ):
        super().__init__(
            num_features,
            1,
            Weighted(Sigmoid()),
            keras.losses.BinaryCrossentropy(from_logits=True, reduction="none"),
            weight_decay=weight_decay,
            intercept=intercept,
            dtype=dtype,
        )


def _softmax(Z: NDArray) -> NDArray:
    """Return the softmax over axis 1 in one new array. scipy.special.softmax makes four copies."""
    P = Z - Z.max(axis=1, keepdims=True)
    np.exp(P, out=P)
    P /= P.sum(axis=1, keepdims=True)
    return P
