"""Products with X that LinearModel takes most of its time for, at the machine's full speed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg
import scipy.sparse
from numpy.typing import NDArray

from influence.examples import Examples

if TYPE_CHECKING:
    from influence.models.linear import LinearModel

_HESSIAN_ROWS = 1024  # rows weighted at a time when the Hessian is formed


def weighted_gram(model: LinearModel, examples: Examples, weights: Any) -> NDArray:
    """X' diag(w_k) X / n, (k, f, f), for non-negative weights w (n, k) = weights(Z, y).

    A symmetric rank-n update of sqrt(w) X does half the work of a product.
    """
    f = model.num_features + model.intercept
    syrk = scipy.linalg.get_blas_funcs("syrk", dtype=model.dtype)
    grams: list[NDArray] = []
    buffer = np.empty((_HESSIAN_ROWS, f), model.dtype)  # fresh pages cost more than the product
    for x, y in examples.batches(_HESSIAN_ROWS):
        w = np.sqrt(weights(model._times(x, model.theta), y))
        rows = model._with_one(model._dense(x))
        grams = grams or [np.zeros((f, f), model.dtype, order="F") for _ in range(w.shape[1])]
        for gram, column in zip(grams, w.T, strict=True):
            weighted = np.multiply(rows, column[:, None], out=buffer[: len(rows)]).T
            syrk(1 / len(examples), weighted, beta=1.0, c=gram, overwrite_c=True, lower=True)
    return np.stack([np.tril(gram) + np.tril(gram, -1).T for gram in grams])


def directional(model: LinearModel, dtype: Any, x: Any, y: Any, V: NDArray) -> NDArray:
    """Gradients x_i (x) dl_i/dz, rounded to dtype, times V: one product, in that dtype.

    The gradients are formed, (n, d): for many vectors that costs nothing beside the product.
    """
    E = model._slope(model._times(x, model.theta), np.asarray(y))[:, :, 0].astype(dtype)
    V, x = np.asarray(V, dtype), x.astype(dtype)
    if scipy.sparse.issparse(x):
        W = V.reshape(-1, model.num_outputs * (V.size // model.num_parameters))
        U = x @ W[: model.num_features]
        U += W[model.num_features :].sum(axis=0)  # the intercept's, if there is one
        along = np.einsum("nc,ncm->nm", E, U.reshape(*E.shape, -1))
        return along if V.ndim == 2 else along[:, 0]
    G = model._with_one(x)[:, :, None] * E[:, None, :]
    return (V.T @ G.reshape(len(E), -1).T).T
