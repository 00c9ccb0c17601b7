"""The two values that make a linear model: products with its inputs, and a loss of its outputs.

With W (f, c) the weights, outputs are Z = X W, and theta is W flattened row by row, the intercept
last: an intercept is a feature that is always one. Neither value knows theta or the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse
import threadpoolctl
from numpy.typing import NDArray

# Rows that are weighted at a time: they stay in the processor's cache.
_HESSIAN_ROWS = 1024
# Threads of our own pay for their start from this many operations a task ...
_WORTH_THREADS = 1e9
# ... and share the work evenly from this many tasks.
_MANY_TASKS = 10


class Link(ABC):
    """A loss l(z, y), convex in z, and its derivatives by z: functions of outputs and labels.

    Outputs Z are (n, c, k): c outputs of n rows at k parameter vectors. Labels y are (n,) or
    (n, 1).
    """

    @abstractmethod
    def loss(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return l, (n, k)."""

    @abstractmethod
    def slope(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return dl/dz, (n, c, k)."""

    @abstractmethod
    def curved(self, Z: NDArray, y: NDArray, U: NDArray) -> NDArray:
        """Return d2l/dz2 at Z (n, c, 1) times U (n, c, m)."""

    def weights(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return the weights (n, w) >= 0 of `Design.weighted_gram` that make the loss's Hessian.

        Here, for one output: d2l/dz2.
        """
        return self.curved(Z, y, np.ones_like(Z))[:, :, 0]


@dataclass(frozen=True)
class Design:
    """Products of inputs X (n, f) with parameters: dense or sparse, at the machine's full speed.

    Args:
      num_features: f, without the intercept.
      num_outputs: c.
      intercept: whether there is one.
      dtype: of theta and of every product.
    """

    num_features: int
    num_outputs: int
    intercept: bool
    dtype: np.dtype

    @property
    def num_parameters(self) -> int:
        """The length of theta, d."""
        return (self.num_features + self.intercept) * self.num_outputs

    def times(self, x: Any, thetas: NDArray) -> NDArray:
        """Return the outputs (n, c, k) of inputs x (n, f) at parameters (d,) or (d, k)."""
        # A strided W, of one column of a block, would go without BLAS.
        W = np.ascontiguousarray(thetas).reshape(-1, self.num_outputs * thetas[0].size)
        Z = self.as_dtype(x) @ W[: self.num_features]
        if self.intercept:
            Z += W[self.num_features]
        return Z.reshape(Z.shape[0], self.num_outputs, -1)

    def transposed_times(self, x: Any, E: NDArray) -> NDArray:
        """Return X' E, (d, k), for E (n, c, k)."""
        flat = E.reshape(len(E), -1)
        G = self.as_dtype(x).T @ flat
        if self.intercept:
            G = np.vstack([G, flat.sum(axis=0)])
        return G.reshape(self.num_parameters, -1)

    def along(self, x: Any, E: NDArray, V: NDArray) -> NDArray:
        """Return the gradients x_i (x) E_i times V (d, m), (n, m): one product in V's dtype.

        The gradients are formed, (n, d). For many vectors that costs nothing beside the product.
        """
        E, x = E.astype(V.dtype), x.astype(V.dtype)
        if scipy.sparse.issparse(x):
            W = V.reshape(-1, self.num_outputs * V.shape[1])
            U = x @ W[: self.num_features]
            U += W[self.num_features :].sum(axis=0)  # the intercept's, if there is one
            return np.einsum("nc,ncm->nm", E, U.reshape(*E.shape, -1))
        G = np.einsum("nf,nc->nfc", self.with_one(x), E)  # twice as fast as a broadcast product
        return (V.T @ G.reshape(len(E), -1).T).T

    def weighted_gram(self, x: Any, weights: NDArray) -> NDArray:
        """Return X' diag(w_k) X, (k, f, f), for weights w (n, k) >= 0.

        A symmetric rank-n update of sqrt(w) X does half the work of a product. Each matrix is
        summed by one thread, so that the sum does not depend on their number: updates of this size
        leave BLAS' own threads idle a third of the time.
        """
        f, (n, k) = self.num_features + self.intercept, weights.shape
        syrk = scipy.linalg.get_blas_funcs("syrk", dtype=self.dtype)
        grams = np.zeros((k, f, f), self.dtype)
        roots = np.sqrt(weights)

        def update(rows: NDArray, w: NDArray, some: slice, buffer: NDArray) -> None:
            for gram, column in zip(grams[some], w.T[some], strict=True):
                weighted = np.multiply(rows, column[:, None], out=buffer[: len(rows)]).T
                # In place: gram.T is in Fortran's order, and its lower half is gram's upper one.
                syrk(1, weighted, beta=1.0, c=gram.T, overwrite_c=True, lower=True)

        with _threads(n * f**2, k) as (apply, count):
            # Fresh pages cost more than the product.
            buffers = [np.empty((_HESSIAN_ROWS, f), self.dtype) for _ in range(count)]
            shares = [slice(start, None, count) for start in range(count)]
            for start in range(0, n, _HESSIAN_ROWS):
                block = slice(start, start + _HESSIAN_ROWS)
                rows = self.with_one(self.dense(x[block]))
                list(apply(partial(update, rows, roots[block]), shares, buffers))
        for gram in grams:
            gram += np.triu(gram, 1).T
        return grams

    def gram(self, x: Any) -> NDArray:
        """Return X X', (n, n), with the intercept's feature if there is one."""
        x = self.as_dtype(x)
        K = x @ x.T
        K = K.toarray() if scipy.sparse.issparse(K) else K
        return K + 1 if self.intercept else K

    def as_dtype(self, x: Any) -> Any:
        """Return inputs in the dtype of theta; see `check_features`."""
        self.check_features(x, "x")
        return x if x.dtype == self.dtype else x.astype(self.dtype)

    def check_features(self, x: Any, name: str) -> None:
        """Refuse inputs that are not one vector a row, such as images.

        Raises: ValueError naming `name`.
        """
        if getattr(x, "ndim", 2) != 2:
            raise ValueError(
                f"{name} must be features of shape (n, {self.num_features}), got {x.shape}; on a "
                "trunk, net.featured(examples) makes features of images."
            )

    def dense(self, x: Any) -> NDArray:
        """Return inputs as a dense array in the dtype of theta."""
        return self.as_dtype(x.toarray() if scipy.sparse.issparse(x) else x)

    def with_one(self, x: NDArray) -> NDArray:
        """Return dense inputs with the intercept's feature if there is one."""
        if not self.intercept:
            return x
        return np.concatenate([x, np.ones((len(x), 1), x.dtype)], axis=1)


@contextmanager
def _threads(work: float, tasks: int) -> Iterator[tuple[Callable, int]]:
    """Yield a `map` over as many threads as BLAS had, which meanwhile has one, and their number.

    For few tasks, or too little work in each, BLAS keeps its threads.
    """
    if tasks < _MANY_TASKS or work < _WORTH_THREADS:
        yield map, 1
        return
    blas = threadpoolctl.ThreadpoolController().select(user_api="blas")
    count = max((library.num_threads for library in blas.lib_controllers), default=1)
    with blas.limit(limits=1), ThreadPoolExecutor(count) as pool:
        yield pool.map, min(count, tasks)
