"""Products with X that LinearModel takes most of its time for, at the machine's full speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg
import scipy.sparse
import threadpoolctl
from numpy.typing import NDArray

from influence.examples.examples import Examples

if TYPE_CHECKING:
    from influence.models.linear import LinearModel

_HESSIAN_ROWS = 1024  # rows weighted at a time when the Hessian is formed
_WORTH_THREADS = 1e9  # operations of a task from which threads of our own pay for their start,
_MANY_TASKS = 10  # and tasks from which they share them fairly


def weighted_gram(
    model: LinearModel, examples: Examples, num_weights: int, weights: Any
) -> NDArray:
    """X' diag(w_k) X / n, (k, f, f), for k non-negative weights w (n, k) = weights(Z, y).

    A symmetric rank-n update of sqrt(w) X does half the work of a product. Each matrix is summed by
    one thread, so that the sum does not depend on how many there are: updates of this size leave
    BLAS' own threads idle a third of the time.
    """
    f = model.num_features + model.intercept
    syrk = scipy.linalg.get_blas_funcs("syrk", dtype=model.dtype)
    grams = [np.zeros((f, f), model.dtype, order="F") for _ in range(num_weights)]

    def update(rows: NDArray, w: NDArray, some: slice, buffer: NDArray) -> None:
        for gram, column in zip(grams[some], w.T[some], strict=True):
            weighted = np.multiply(rows, column[:, None], out=buffer[: len(rows)]).T
            syrk(1 / len(examples), weighted, beta=1.0, c=gram, overwrite_c=True, lower=True)

    with _threads(len(examples) * f**2, num_weights) as (apply, count):
        # Fresh pages cost more than the product.
        buffers = [np.empty((_HESSIAN_ROWS, f), model.dtype) for _ in range(count)]
        for x, y in examples.batches(_HESSIAN_ROWS):
            w = np.sqrt(weights(model._times(x, model.theta), y))
            rows = model._with_one(model._dense(x))
            shares = [slice(start, None, count) for start in range(count)]
            list(apply(partial(update, rows, w), shares, buffers))
    return np.stack([np.tril(gram) + np.tril(gram, -1).T for gram in grams])


@contextmanager
def _threads(work: float, tasks: int) -> Iterator[tuple[Callable, int]]:
    """A `map` over as many threads as BLAS had, which meanwhile has one, and their number.

    For few tasks, or too little work in each, BLAS keeps its threads.
    """
    if tasks < _MANY_TASKS or work < _WORTH_THREADS:
        yield map, 1
        return
    blas = threadpoolctl.ThreadpoolController().select(user_api="blas")
    count = max((library.num_threads for library in blas.lib_controllers), default=1)
    with blas.limit(limits=1), ThreadPoolExecutor(count) as pool:
        yield pool.map, min(count, tasks)


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
    G = np.einsum("nf,nc->nfc", model._with_one(x), E)  # twice as fast as a broadcast product
    return (V.T @ G.reshape(len(E), -1).T).T
