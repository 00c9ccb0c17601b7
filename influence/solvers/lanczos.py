"""Lanczos: the largest eigenpairs from a Krylov space, and one value for all other directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from influence.common.convergence import DivergenceError
from influence.solvers.base import (
    LowRank,
    Raw,
    finite_products,
    if_indefinite,
    unusual_exponent,
)

# Lanczos multiplies A at least this many times in sequence if the space is large enough, because
# the ends of the spectrum need high powers of A.
_STEPS = 16
# A pass over the data multiplies at most this many vectors. Larger blocks save no time.
_LARGEST_BLOCK = 8
# The Krylov space has this many dimensions more than the rank.
_MORE = 10


@dataclass(frozen=True)
class Lanczos(LowRank):
    """A low-rank approximation of A from Lanczos' iteration, plus a floor outside its range.

    A is approximated by U diag(values) U' + floor (I - U U'). U (d, rank) has orthonormal columns.
    U and the values are the Ritz pairs with the largest values in a Krylov space. The space starts
    from random vectors and has the dimension rank + 10. The floor is the median of all Ritz values,
    or the smallest of the values if this is larger. If the space has d dimensions, the floor is the
    smallest of the values. The floor estimates an eigenvalue of A above most of those that are left
    out. So the approximate inverse magnifies hardly any direction more than A^-1 does.

    The approximation is fixed and linear. It is positive definite if A is positive definite. At
    rank = d it equals A, so the answer is exact, even for an indefinite matrix. For a symmetric
    matrix, the Arnoldi method of Schioppa et al. (2022) drops the term with the floor.

    Lanczos differs from the textbook's three-term recurrence in three points:
    1. Every new direction is orthogonalised against all others, so no eigenvalue is found twice.
    2. Up to 8 vectors share each pass over the data. For a rank of 118 or more, preparing takes
       about rank / 8 passes.
    3. When the space is invariant, the iteration continues with a random direction outside it.

    Args:
      rank: number of columns of U. A rank above d counts as d. Preparing multiplies A by
        min(rank + 10, d) vectors. It stores these vectors, and U.
      seed: seed of the random directions.
      rtol: largest true relative residual at which a column counts as converged. If None, the
        residual is reported, but no column counts as converged and no warning is given.

    Raises: ValueError for hyperparameters out of range. `prepare` raises DivergenceError for a
      singular matrix. At rank < d it also refuses a matrix that it finds to be indefinite, because
      a single floor cannot represent the other directions of such a matrix.
    """

    answers_indefinite: ClassVar[bool] = True

    def prepare(self, A: LinearOperator) -> Callable[[NDArray], Raw]:
        """Compute the Ritz pairs. Return a function that multiplies by the approximate inverse."""
        d = A.shape[0]
        rank, space = min(self.rank, d), min(self.rank + _MORE, d)
        self._check_memory(d, rank + space, np.result_type(A.dtype, np.float32))
        block = int(np.clip(space // _STEPS, 1, _LARGEST_BLOCK))
        Q, T = krylov(A, space, block=block, seed=self.seed)
        ritz, S = np.linalg.eigh(T)
        smallest = float(ritz[0])
        rounding = float(np.finfo(Q.dtype).eps * np.sqrt(d) * np.abs(ritz).max())
        if smallest < -rounding and rank < d:
            raise DivergenceError(
                f"Lanczos needs a positive definite A at a rank below d = {d}, met a negative "
                f"curvature of {smallest:.3g}, {if_indefinite(A, smallest)}"
            )
        if abs(smallest) <= rounding:
            smallest = 0.0  # zero within rounding
        kept = ritz[-rank:]
        nearest = float(kept[np.abs(kept).argmin()])
        if abs(nearest) <= rounding:
            raise singular(nearest, rounding)
        U, values = Q @ S[:, -rank:].astype(Q.dtype), kept.astype(Q.dtype)[:, None]
        bound = abs(nearest) - rounding if rank == d else np.nan
        middle = ritz[-((space + 1) // 2)] if space < d else kept[0]
        floor = max(kept[0], middle)
        return self._inverse(U, values, Q.dtype.type(floor), smallest, bound)


def singular(eigenvalue: float, rounding: float) -> DivergenceError:
    """Make the error for an eigenvalue that rounding cannot distinguish from zero."""
    return DivergenceError(
        f"A must not be singular, got an eigenvalue of {eigenvalue:.1e}; add damping well above "
        f"{rounding:.1e}, or a penalty, or drop the redundant parameters."
    )


def krylov(A: LinearOperator, size: int, *, block: int, seed: int) -> tuple[NDArray, NDArray]:
    """Build an orthonormal basis Q of a Krylov space that starts from random vectors, and Q'AQ.

    Args:
      A: symmetric (d, d).
      size: dimension of the space, at most d.
      block: number of vectors multiplied together.
      seed: seed of the random vectors.

    Returns: Q (d, size) and T = Q'AQ (size, size), float64.
    Raises: DivergenceError for a product that is not finite.
    """
    d = A.shape[0]
    rng = np.random.default_rng(seed)
    Q = np.empty((d, size), np.result_type(A.dtype, np.float32), order="F")
    T = np.zeros((size, size))
    new, done = rng.standard_normal((d, block)), 0
    while done < size:
        new = _orthonormal(new[:, : size - done], Q[:, :done], rng)
        end = done + new.shape[1]
        Q[:, done:end] = new
        new = finite_products(A, new, "Lanczos")
        T[:end, done:end] = Q[:, :end].T @ new
        T[done:end, :done] = T[:done, done:end].T
        new = np.ldexp(new, -unusual_exponent(new))  # keeps squares finite
        done = end
    return Q, (T + T.T) / 2


def _orthonormal(W: NDArray, Q: NDArray, rng: np.random.Generator) -> NDArray:
    """Orthonormalise the columns of W against Q. Replace columns in Q's range by random columns."""
    d = len(Q)
    inside = 10 * np.sqrt(d) * np.finfo(Q.dtype).eps
    size = np.linalg.norm(W, axis=0)
    W = (W / np.where(size > 0, size, 1)).astype(Q.dtype)
    while True:
        for _ in range(2):  # The second pass removes the cancellation error of the first pass.
            W = W - Q @ (Q.T @ W)
        W, R = scipy.linalg.qr(W, mode="economic", pivoting=True)[:2]
        lost = np.abs(np.diag(R)) <= inside
        # Normalising a short remainder magnifies its component in the range of Q. The next line
        # removes this component.
        W = scipy.linalg.qr(W - Q @ (Q.T @ W), mode="economic")[0]
        if not lost.any():
            return W
        W[:, lost] = rng.standard_normal((d, int(lost.sum()))) / np.sqrt(d)


def largest_eigenvalues(
    product: Callable[[NDArray], NDArray], start: NDArray, steps: int
) -> NDArray:
    """Bound the largest eigenvalue of each of r matrices by a Ritz value plus its residual.

    Each matrix has its own three-term recurrence, which stores three vectors. All recurrences
    advance together. They do not reorthogonalise, so they find some eigenvalues repeatedly. This
    does not change the largest eigenvalue.

    Args:
      product: a function of vectors (r, d, 1). It multiplies matrix j by vector j for each j.
      start: (r, d) random vectors.
      steps: the largest number of products.

    Returns: (r,) bounds, NaN for a matrix whose products are not finite.
    """
    r, d = start.shape
    steps = min(steps, d)
    T = np.zeros((r, steps, steps))
    exponent = 0
    before, left = np.zeros_like(start), np.zeros(r)
    q = start / np.linalg.norm(start, axis=1, keepdims=True)
    for k in range(steps):
        w = product(q[:, :, None])[:, :, 0]
        if k == 0:
            exponent = unusual_exponent(w)
        w = np.ldexp(w, -exponent) if exponent else w
        size = np.linalg.norm(w, axis=1)
        T[:, k, k] = np.einsum("rd,rd->r", q, w)
        w = w - T[:, k, k, None].astype(w.dtype) * q - left[:, None].astype(w.dtype) * before
        left = np.linalg.norm(w, axis=1)
        # If the space is invariant, the remainder is only rounding, and the recurrence ends.
        left[left <= np.sqrt(np.finfo(w.dtype).eps) * size] = 0.0
        before, q = q, w / np.where(left > 0, left, 1).astype(w.dtype)[:, None]
        q[left == 0] = 0
        if k + 1 < steps:
            T[:, k, k + 1] = T[:, k + 1, k] = left
    finite = np.isfinite(T).all(axis=(1, 2)) & np.isfinite(left)
    ritz, vectors = np.linalg.eigh(np.where(finite[:, None, None], T, 0))
    found = np.where(finite, ritz[:, -1] + left * np.abs(vectors[:, -1, -1]), np.nan)
    return np.ldexp(found, exponent)
