"""Nystroem: a low-rank approximation of A from one product with a random block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from influence.common.convergence import DivergenceError
from influence.common.memory import VECTORS, fitting
from influence.solvers.base import LowRank, Raw, finite_products, if_indefinite
from influence.solvers.lanczos import singular

# A product of A with m vectors may hold this many arrays (d, m).
_COPIES = 4
# The columns of a Gaussian array are almost orthogonal if rows / columns is at least this.
_TALL = 4


@dataclass(frozen=True)
class Nystrom(LowRank):
    """Randomised Nystroem approximation (Frangella, Tropp & Udell 2023, alg. 2.1), plus a floor.

    Omega (d, rank) is random and has orthonormal columns. A is split into M + known I:

        M ~ (M Omega) (Omega' M Omega)^-1 (M Omega)' = U diag(values) U'
        A ~ U diag(values + known) U' + (smallest value + known) (I - U U')

    The inverse is the preconditioner of this paper (section 5), scaled to approximate A^-1. `known`
    is the damping, or the model's lower bound on A's eigenvalues if that is larger. `known I` has
    full rank, so a low-rank sketch cannot represent it. This part is therefore subtracted before
    the sketch, and added back exactly afterwards. If M turns out to be indefinite, `known` is 0
    instead. The approximation is fixed, linear and positive definite. The approximation is exact if
    the rank is d, or larger than the rank of M.

    Args:
      rank: number of columns of U. A rank above d counts as d. Preparing multiplies A by `rank`
        vectors. They share a pass over the data if they fit into `memory.VECTORS`. Preparing holds
        at most two arrays (d, rank), besides the arrays of the products with A.
      seed: seed of Omega.
      rtol: largest true relative residual at which a column counts as converged. If None, the
        residual is reported, but no column counts as converged and no warning is given.

    Raises: ValueError for hyperparameters out of range. `prepare` raises DivergenceError for a
      matrix that is singular, or that it finds to be indefinite.
    """

    def prepare(self, A: LinearOperator) -> Callable[[NDArray], Raw]:
        """Compute the sketch A Omega. Return a function that applies the approximate inverse.

        Apart from products with A, memory holds at most two arrays (d, rank) at a time.
        """
        d = A.shape[0]
        rank = min(self.rank, d)
        dtype = np.result_type(A.dtype, np.float32)
        self._check_memory(d, 2 * rank, dtype)
        Omega = _orthonormal(np.random.default_rng(self.seed), d, rank, dtype)
        Y = np.empty((d, rank), dtype, order="F")
        block = fitting(VECTORS, _COPIES * d * dtype.itemsize, rank)
        for start in range(0, rank, block):
            some = slice(start, start + block)
            Y[:, some] = finite_products(A, Omega[:, some], "Nystrom")
        # Scaling by a power of two keeps squares of very large or small entries in the dtype's
        # range.
        exponent = int(np.frexp(max(Y.max(), -Y.min()))[1])
        np.ldexp(Y, -exponent, out=Y)
        size = float(np.ldexp(np.sqrt(np.linalg.eigvalsh(_gram(Y, Y))[-1]), exponent))
        np.ldexp(Y, exponent, out=Y)
        rounding = float(np.finfo(dtype).eps * np.sqrt(d) * size)
        smallest = float(np.linalg.eigvalsh(_gram(Omega, Y))[0])
        if smallest < -rounding:
            raise DivergenceError(
                f"Nystrom needs a positive definite A, met a negative curvature of {smallest:.3g}, "
                f"{if_indefinite(A, smallest)}"
            )
        known = _known(A)
        if smallest - known < -rounding:  # M is indefinite
            known = 0.0
        # The shift makes the factored matrix positive definite despite rounding. The eigenvalues
        # below do not include the shift.
        shift = rounding
        _add(Y, shift - known, Omega)
        while True:
            try:
                L = np.linalg.cholesky(_gram(Omega, Y))
                break
            except np.linalg.LinAlgError:
                more = max(10 * shift, float(np.finfo(dtype).tiny)) - shift
                shift += more
                _add(Y, more, Omega)
        del Omega
        trsm = scipy.linalg.get_blas_funcs("trsm", (Y,))
        half = trsm(1.0, L.astype(dtype), Y, side=1, lower=1, trans_a=1, overwrite_b=1)
        Q, R = scipy.linalg.qr(half, mode="economic", overwrite_a=True, check_finite=False)
        del Y, half
        W, sigma, _ = scipy.linalg.svd(R)
        values = np.maximum(sigma**2 - shift, 0) + known
        if values[-1] <= rounding:
            raise singular(float(values[-1]), rounding)
        values = values.astype(dtype)[:, None]
        return self._inverse(Q @ W, values, values[-1], smallest)


def _orthonormal(rng: np.random.Generator, d: int, rank: int, dtype: np.dtype) -> NDArray:
    """Draw a random array (d, rank) with orthonormal columns.

    The columns of a tall Gaussian array are almost orthogonal. Therefore the Cholesky factor of
    their Gram matrix is accurate. This factor orthonormalises the columns in place.
    """
    Omega = rng.standard_normal((d, rank), dtype=dtype.type)
    if d < _TALL * rank:
        return np.linalg.qr(Omega)[0]
    trsm = scipy.linalg.get_blas_funcs("trsm", (Omega,))
    for _ in range(2):  # The second pass removes the rounding error of the first pass.
        L = np.linalg.cholesky(_gram(Omega, Omega)).astype(dtype)
        Omega = trsm(1.0, L, Omega.T, lower=1, overwrite_b=1).T
    return Omega


def _gram(X: NDArray, Y: NDArray) -> NDArray:
    """Return the symmetric part of X'Y."""
    core = X.T @ Y
    return (core + core.T) / 2


def _add(Y: NDArray, factor: float, X: NDArray) -> None:
    """Add factor * X to Y in place, without a copy of X."""
    for column in range(Y.shape[1]):
        Y[:, column] += Y.dtype.type(factor) * X[:, column]


def _known(A: LinearOperator) -> float:
    """Return the multiple of I to subtract from A before the sketch.

    This is the damping, or the model's lower bound on A's eigenvalues if that is larger.
    """
    bounds = (getattr(A, "damping", 0.0), getattr(A, "smallest_eigenvalue_bound", np.nan))
    return float(max(bound for bound in bounds if not np.isnan(bound)))
