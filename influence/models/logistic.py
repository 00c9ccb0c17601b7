"""Logistic regression with many classes and with two: the paper's convex models.

With p = softmax(z) or sigmoid(z): loss = -log p_y, dl/dz = p - onehot(y), d2l/dz2 = diag(p) - p p'.
"""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
import scipy.special
from numpy.typing import NDArray

from influence.examples.examples import Examples
from influence.models.design import Link
from influence.models.linear import LinearModel


@dataclass(frozen=True)
class Softmax(Link):
    """-log softmax(z)_y of class numbers y and c outputs."""

    def loss(self, Z: NDArray, y: NDArray) -> NDArray:
        """See Link.loss."""
        return scipy.special.logsumexp(Z, axis=1) - Z[np.arange(len(Z)), y.astype(int).ravel()]

    def slope(self, Z: NDArray, y: NDArray) -> NDArray:
        """See Link.slope."""
        E = _softmax(Z)
        E[np.arange(len(E)), y.astype(int).ravel()] -= 1
        return E

    def curved(self, Z: NDArray, y: NDArray, U: NDArray) -> NDArray:
        """See Link.curved."""
        P = _softmax(Z)
        U = U - np.einsum("nc,ncm->nm", P[:, :, 0], U)[:, None, :]
        U *= P
        return U

    def weights(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return p_a p_b of each pair of classes, (n, c (c - 1) / 2)."""
        P = _softmax(Z)[:, :, 0]
        a, b = np.tril_indices(P.shape[1], -1)
        return P[:, a] * P[:, b]


@dataclass(frozen=True)
class Sigmoid(Link):
    """-log sigmoid(z) of label 1 and -log sigmoid(-z) of label 0, for one output."""

    def loss(self, Z: NDArray, y: NDArray) -> NDArray:
        """See Link.loss."""
        z = Z[:, 0]
        return np.logaddexp(0, z) - y.reshape(-1, 1).astype(z.dtype) * z

    def slope(self, Z: NDArray, y: NDArray) -> NDArray:
        """See Link.slope."""
        return scipy.special.expit(Z) - y.reshape(-1, 1, 1).astype(Z.dtype)

    def curved(self, Z: NDArray, y: NDArray, U: NDArray) -> NDArray:
        """See Link.curved."""
        P = scipy.special.expit(Z)
        return P * (1 - P) * U


class MulticlassLogisticRegression(LinearModel):
    """Softmax regression on class numbers 0 to num_classes - 1 (the paper's Figure 2, left).

    Args:
      num_features: f.
      num_classes: c.
      weight_decay: lambda of lambda/2 |W|^2, which includes the intercept.
      intercept: whether the model has one; the paper's has none.
      dtype: "float64", because leave-one-out changes are 1e-3 to 1e-5 of a loss; or "float32".

    Raises: ValueError for fewer than two classes, one feature or a negative weight decay.
    """

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
            Softmax(),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none"),
            weight_decay=weight_decay,
            intercept=intercept,
            dtype=dtype,
        )

    def hessian(self, examples: Examples, batch_size: int | None = None) -> NDArray:
        """Form the risk's Hessian (d, d) from a block -X' diag(p_a p_b) X / n for each class pair.

        Probabilities add up to one. So the diagonal block of a class is minus the sum of its other
        blocks.
        """
        blocks = self._weighted_grams(examples)
        c, f = self.num_outputs, blocks.shape[1]
        a, b = np.tril_indices(c, -1)
        pair = np.zeros((c, c), int)
        pair[a, b] = pair[b, a] = np.arange(len(a))
        own = np.arange(c)
        H = np.empty((f, c, f, c), self.dtype)
        # One feature's rows at a time: source and target of this copy then fit into the cache.
        for row, of_row in zip(H, blocks.swapaxes(0, 1), strict=True):
            parts = -of_row[pair]  # (c, c, f)
            parts[own, own] = 0
            parts[own, own] = -parts.sum(axis=1)
            row[:] = parts.swapaxes(1, 2)
        H = H.reshape(f * c, f * c)
        H[np.diag_indices_from(H)] += self.weight_decay
        return H


class BinaryLogisticRegression(LinearModel):
    """Logistic regression on labels 0 and 1 with one vector of weights.

    Args:
      num_features: f.
      weight_decay: lambda of lambda/2 |w|^2, which includes the intercept.
      intercept: whether the model has one; the paper's has none.
      dtype: "float64" or "float32".

    Raises: ValueError for fewer than one feature or a negative weight decay.
    """

    def __init__(
        self,
        num_features: int,
        *,
        weight_decay: float = 0.01,
        intercept: bool = False,
        dtype: str = "float64",
    ):
        link, loss = Sigmoid(), keras.losses.BinaryCrossentropy(from_logits=True, reduction="none")
        super().__init__(
            num_features, 1, link, loss, weight_decay=weight_decay, intercept=intercept, dtype=dtype
        )


def _softmax(Z: NDArray) -> NDArray:
    """Return the softmax over axis 1, a new array; scipy.special's would make four copies."""
    P = Z - Z.max(axis=1, keepdims=True)
    np.exp(P, out=P)
    P /= P.sum(axis=1, keepdims=True)
    return P
