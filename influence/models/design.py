"""`Design` multiplies inputs by a linear model's parameters. `Link` is the loss of the outputs.

Inputs X (n, f) and weights W (f, c) give the outputs Z = X W. theta is W flattened row by row. The
intercept is a last feature that is always one. Neither class stores theta or data.
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

from influence.common.numbers import numbers
from influence.examples import labels as packing

# `weighted_gram` multiplies this many rows by their weights at a time. They fit into the
# processor's cache.
_HESSIAN_ROWS = 1024
# Rows of this many bytes fit into the cache of one processor core.
_CACHED_BYTES = 1 << 19
# If X V has more columns than this, `there_and_back` uses larger blocks of rows of X, because the
# products with a block then take longer than reading its rows.
_FEW_COLUMNS = 16
# `_threads` starts threads only for work of at least this many operations. Starting takes time.
_WORTH_THREADS = 1e9
# `_threads` starts threads only for at least this many tasks. Fewer tasks cannot be shared evenly.
_MANY_TASKS = 10


class Link(ABC):
    """A loss l(z, y) that is convex in the outputs z, and its derivatives with respect to z.

    The array Z (n, c, k) holds c outputs for each of n rows and k parameter vectors. Labels y have
    shape (n,) or (n, 1).
    """

    @abstractmethod
    def loss(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return the losses l, (n, k)."""

    @abstractmethod
    def slope(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return the derivatives dl/dz, (n, c, k)."""

    @abstractmethod
    def curvature(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return numbers (n, c, 1) that determine each row's matrix d2l/dz2 at Z.

        `multiplied` takes these numbers. For one output they are d2l/dz2 itself.
        """

    def multiplied(self, K: NDArray, U: NDArray) -> NDArray:
        """Multiply each row's matrix d2l/dz2 by the row's matrix (c, m) in U (n, c, m).

        K holds the numbers that `curvature` returns.
        """
        return K * U

    def curved(self, Z: NDArray, y: NDArray, U: NDArray) -> NDArray:
        """Multiply each row's matrix d2l/dz2 at Z (n, c, 1) by the row's matrix (c, m) in U."""
        return self.multiplied(self.curvature(Z, y), U)

    def weights(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return weights (n, w) >= 0, whose columns determine the Hessian.

        For each column v, `Design.weighted_gram` computes the matrix X' diag(v) X. The model's
        method `hessian` combines these matrices. For one output, w = 1, and the column is d2l/dz2.
        """
        return self.curvature(Z, y)[:, :, 0]


@dataclass(frozen=True)
class Weighted(Link):
    """The loss of another link, multiplied by the sample weight of each row.

    The labels may be packed with weights, as in `influence.examples.labels`. Plain labels have no
    weights, and their losses are those of the link.

    Args:
      link: the link.
    """

    link: Link

    def loss(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return the losses, (n, k); see Link.loss."""
        y, w = _unpacked(y, Z)
        found = self.link.loss(Z, y)
        return found if w is None else found * w[:, None]

    def slope(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return dl/dz, (n, c, k); see Link.slope."""
        y, w = _unpacked(y, Z)
        found = self.link.slope(Z, y)
        return found if w is None else found * w[:, None, None]

    def curvature(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return the link's numbers with the row's weight appended, (n, c + 1, 1)."""
        y, w = _unpacked(y, Z)
        K = self.link.curvature(Z, y)
        return K if w is None else np.concatenate([K, w[:, None, None]], axis=1)

    def multiplied(self, K: NDArray, U: NDArray) -> NDArray:
        """Return the products (n, c, m) of d2l/dz2 and U; see Link.multiplied."""
        c = U.shape[1]
        found = self.link.multiplied(K[:, :c], U)
        return found if K.shape[1] == c else found * K[:, c:]

    def weights(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return weights (n, w) >= 0; see Link.weights."""
        y, w = _unpacked(y, Z)
        found = self.link.weights(Z, y)
        return found if w is None else found * w[:, None]


def _unpacked(y: NDArray, Z: NDArray) -> tuple[NDArray, NDArray | None]:
    """Return (labels, weights). The weights (n,) have the dtype of Z; without weights, None."""
    if not packing.is_packed(y):
        return y, None
    parts = packing.fields(y)
    weights = [part for name, part in parts.items() if packing.is_weight(name)]
    (labels,) = (part for name, part in parts.items() if not packing.is_weight(name))
    return labels, weights[0].astype(Z.dtype) if weights else None


class Product(Link):
    """The loss y . z with labels y (n, c). Its gradient in theta is J' y, with J = dz/dtheta."""

    def loss(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return the losses, (n, k); see Link.loss."""
        return np.einsum("nc,nck->nk", y, Z)

    def slope(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return dl/dz, (n, c, k); see Link.slope."""
        return np.broadcast_to(y[:, :, None], Z.shape)

    def curvature(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return zeros in the shape of Z, because the loss is linear; see Link.curvature."""
        return np.zeros_like(Z)


@dataclass(frozen=True)
class Design:
    """Products of dense or sparse inputs X (n, f) with parameters.

    Args:
      num_features: number f of features, without the intercept.
      num_outputs: number c of outputs.
      intercept: True if the model has an intercept.
      dtype: the dtype of theta and of every product.
    """

    num_features: int
    num_outputs: int
    intercept: bool
    dtype: np.dtype

    @property
    def num_parameters(self) -> int:
        """The length d of theta."""
        return (self.num_features + self.intercept) * self.num_outputs

    def times(self, x: Any, thetas: NDArray) -> NDArray:
        """Return the outputs (n, c, k) of inputs x (n, f) at parameters (d,) or (d, k)."""
        # NumPy does not use BLAS for a strided W, such as one column of a block.
        thetas = np.ascontiguousarray(numbers(thetas, "thetas"))
        W = thetas.reshape(-1, self.num_outputs * thetas[0].size)
        Z = self.as_dtype(x) @ W[: self.num_features]
        if self.intercept:
            Z += W[self.num_features]
        return Z.reshape(Z.shape[0], self.num_outputs, -1)

    def transposed_times(self, x: Any, E: NDArray) -> NDArray:
        """Return X' E, (d, k), for E (n, c, k)."""
        flat = numbers(E, "E").reshape(len(E), -1)
        G = self.as_dtype(x).T @ flat
        if self.intercept:
            G = np.vstack([G, flat.sum(axis=0)])
        return G.reshape(self.num_parameters, -1)

    def there_and_back(
        self, x: Any, V: NDArray, between: Callable[[NDArray, slice], NDArray]
    ) -> NDArray:
        """Return X' C, (d, m). `between` computes C (n, c, m) from X V, with V (d, m).

        The rows are processed in blocks. For each block, `between` gets the outputs X V and the
        slice of rows. A block of dense rows stays in the processor's cache between the two
        products. With few columns, reading X takes most of the time, and the cache halves this
        time.
        """
        n, columns = x.shape[0], self.num_outputs * V.shape[1]
        in_cache = _CACHED_BYTES // (self.num_features * np.dtype(self.dtype).itemsize)
        size = n if scipy.sparse.issparse(x) else max(in_cache, 1) * max(1, columns // _FEW_COLUMNS)
        total: Any = 0.0
        for start in range(0, n, size):
            rows = slice(start, start + size)
            block = x[rows] if size < n else x
            total = total + self.transposed_times(block, between(self.times(block, V), rows))
        return total

    def along(self, x: Any, E: NDArray, V: NDArray) -> NDArray:
        """Return the products of each row's gradient with V (d, m): (n, m), in V's dtype.

        The gradient of row i is the outer product of x_i and E_i = dl_i/dz. For dense inputs, all
        gradients (n, d) are formed. If V has many columns, this takes a negligible part of the
        time.
        """
        E, x = numbers(E, "E").astype(numbers(V, "V").dtype), x.astype(V.dtype)
        if scipy.sparse.issparse(x):
            W = V.reshape(-1, self.num_outputs * V.shape[1])
            U = x @ W[: self.num_features]
            U += W[self.num_features :].sum(axis=0)  # no row without an intercept
            return np.einsum("nc,ncm->nm", E, U.reshape(*E.shape, -1))
        G = np.einsum("nf,nc->nfc", self.with_one(x), E)  # faster than broadcasting
        return (V.T @ G.reshape(len(E), -1).T).T

    def weighted_gram(self, x: Any, weights: NDArray) -> NDArray:
        """Return X' diag(w) X for each column w of the weights (n, k) >= 0: (k, f, f).

        A symmetric update by sqrt(w) X needs half the operations of a general product. If there are
        many matrices, several threads run at once, and one thread sums each matrix. The sum
        therefore does not depend on the number of threads. BLAS' own threads would be idle for a
        third of the time.
        """
        f, (n, k) = self.num_features + self.intercept, numbers(weights, "weights").shape
        syrk = scipy.linalg.get_blas_funcs("syrk", dtype=self.dtype)
        grams = np.zeros((k, f, f), self.dtype)
        roots = np.sqrt(weights)

        def update(rows: NDArray, w: NDArray, some: slice, buffer: NDArray) -> None:
            for gram, column in zip(grams[some], w.T[some], strict=True):
                weighted = np.multiply(rows, column[:, None], out=buffer[: len(rows)]).T
                # syrk works in place, because gram.T is in Fortran order. The lower half of gram.T
                # is the upper half of gram.
                syrk(1, weighted, beta=1.0, c=gram.T, overwrite_c=True, lower=True)

        with _threads(n * f**2, k) as (apply, count):
            # Buffers are reused: new memory costs more time than the product.
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
        """Return X X', (n, n). X includes the intercept's feature if the model has one."""
        x = self.as_dtype(x)
        K = x @ x.T
        K = K.toarray() if scipy.sparse.issparse(K) else K
        return K + 1 if self.intercept else K

    def as_dtype(self, x: Any) -> Any:
        """Convert inputs to the dtype of theta.

        Raises: the errors of `check_features`.
        """
        self.check_features(x, "x")
        numbers(x.data if scipy.sparse.issparse(x) else x, "x")
        return x if x.dtype == self.dtype else x.astype(self.dtype)

    def check_features(self, x: Any, name: str) -> None:
        """Refuse inputs that are not one vector for each row, such as images.

        Raises: ValueError naming `name`.
        """
        if getattr(x, "ndim", 2) != 2:
            raise ValueError(
                f"{name} must be features of shape (n, {self.num_features}), got {x.shape}; on a "
                "trunk, net.featured(examples) makes features of images."
            )

    def dense(self, x: Any) -> NDArray:
        """Convert inputs to a dense array in the dtype of theta."""
        return self.as_dtype(x.toarray() if scipy.sparse.issparse(x) else x)

    def with_one(self, x: NDArray) -> NDArray:
        """Append a column of ones to dense inputs if the model has an intercept."""
        if not self.intercept:
            return x
        return np.concatenate([x, np.ones((len(x), 1), x.dtype)], axis=1)


@contextmanager
def _threads(work: float, tasks: int) -> Iterator[tuple[Callable, int]]:
    """Yield a function like `map` that runs tasks in threads, and the number of threads.

    Inside the context, BLAS uses one thread. If there is little work or there are few tasks, the
    function is Python's own `map`, and BLAS keeps its threads.
    """
    if tasks < _MANY_TASKS or work < _WORTH_THREADS:
        yield map, 1
        return
    blas = threadpoolctl.ThreadpoolController().select(user_api="blas")
    count = max((library.num_threads for library in blas.lib_controllers), default=1)
    with blas.limit(limits=1), ThreadPoolExecutor(count) as pool:
        yield pool.map, min(count, tasks)
