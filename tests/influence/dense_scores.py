"""A function that computes scores by dense matrices, without the library."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from tests.oracles import dense_derivatives, dense_hessian


def dense_scores(
    model: keras.Model, loss: Any, train: tuple, test: tuple, l2: float = 0.0, damping: float = 0.0
) -> NDArray:
    """Return grad f' H^-1 grad L(z_i) / n, (m, n), from `tf.GradientTape` and `np.linalg.solve`.

    Args:
      model: a float64 model without lookup layers and regularisers.
      loss: (y, output) -> (n,), in plain TensorFlow.
      train: (x, y) of n rows.
      test: (x, y) of m rows.
      l2: the penalty is l2 |theta|^2, as `keras.regularizers.L2(l2)` on every weight gives it.
      damping: the number that is added to the diagonal of H.
    """
    theta = np.concatenate([np.ravel(w.numpy()) for w in model.trainable_weights])
    H = dense_hessian(model, loss, *train) + (2 * l2 + damping) * np.eye(len(theta))
    G = dense_derivatives(model, loss, *train).gradients + 2 * l2 * theta
    g = dense_derivatives(model, loss, *test).gradients
    return np.linalg.solve(H, g.T).T @ G.T / len(G)
