"""Direct: one factorisation of the dense matrix for all right-hand sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from influence.common.convergence import DivergenceError
from influence.common.memory import check_fits
from influence.curvature.operators import symmetrised
from influence.solvers.base import (
    Raw,
    check_rtol,
    in_units,
    relative_size,
    said_in_units,
    unusual_exponent,
)

# Below this order, computing all eigenvalues costs no more than computing one by iteration.
_FEW = 64
# Above this order, no eigenvalue is computed if a lower bound on all eigenvalues is known.
_MANY = 4096
# For this many columns of a block, Direct computes the residual with products of A itself.
_WATCHED = 4


@dataclass(frozen=True)
class Direct:
    """Cholesky factorisation of the dense matrix, or Bunch-Kaufman (L D L') if it is indefinite.

    Direct stores 2 d^2 numbers, and 3 d^2 while it prepares. Preparing takes d^3 / 3 operations.
    Each right-hand side takes 4 d^2 operations, half of them for its residual. An indefinite system
    is also solved exactly, but its meaning for influence is doubtful. `min_curvature` is then the
    smallest eigenvalue, which is negative.

    The residual is computed with A itself for four columns of each block. For the other columns a
    product with A would cost more than the solve. Their residual is estimated as the sum of two
    terms. The first is the residual with the dense matrix M. The second is |x| times the largest
    |M x - A x| / |x| of the four columns.

    Args:
      rtol: largest true relative residual at which a column counts as converged. A column with a
        larger residual shows that the matrix is too ill conditioned for its dtype.

    Raises: ValueError for a negative rtol. `prepare` raises DivergenceError for a singular matrix.
      The message names a damping that would work.
    """

    exact: ClassVar[bool] = True
    answers_indefinite: ClassVar[bool] = True

    rtol: float = 1e-6

    def __post_init__(self):
        check_rtol(self.rtol)

    def prepare(self, A: LinearOperator) -> Callable[[NDArray], Raw]:
        """Form, check and factor the dense matrix of A. Return a function that solves with it.

        The check requires that the matrix and A give the same products with random vectors.
        """
        _check_memory(A)
        matrix = dense(A)
        exponent = unusual_exponent(matrix)
        if not exponent:
            return self._factored(A, matrix)
        with said_in_units(exponent):
            apply = self._factored(in_units(A, exponent), np.ldexp(matrix, -exponent))
        return lambda B: apply(B).from_units(exponent)

    def _factored(self, A: LinearOperator, matrix: NDArray) -> Callable[[NDArray], Raw]:
        """Factor the dense matrix of A. Squares of its entries must not overflow or underflow."""
        away = _check_products(A, matrix)
        remedy = (
            "the matrix is too ill conditioned for its dtype: use float64, a larger damping, or a "
            "larger Direct(rtol=...)."
        )
        # A definite matrix has its largest entry on the diagonal. An indefinite matrix may not, so
        # its norm is used too.
        spread = float(np.linalg.norm(matrix)) / np.sqrt(len(matrix))
        scale = max(float(np.abs(np.diag(matrix)).max()), spread) or 1.0
        eps = float(np.finfo(matrix.dtype).eps)
        tiny = eps * np.sqrt(len(matrix)) * scale
        try:
            factor: Any = scipy.linalg.cho_factor(matrix, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            factor = None
        known = float(getattr(A, "smallest_eigenvalue_bound", np.nan))
        if factor is not None:
            inverse = lambda B: scipy.linalg.cho_solve(factor, B, check_finite=False)  # noqa: E731
            if len(matrix) > _MANY and known > tiny:  # the search would take as long as factoring
                nearest, bound, smallest = known, known, np.nan
            else:
                nearest, bound = _nearest_zero(matrix, inverse)
                smallest = nearest
        else:
            sytrf, sytrs = scipy.linalg.get_lapack_funcs(("sytrf", "sytrs"), (matrix,))
            ldl, pivots, info = sytrf(matrix, lower=1)
            inverse = lambda B: sytrs(ldl, pivots, B, lower=1)[0]  # noqa: E731
            # The eigenvalue nearest zero decides whether the system can be solved.
            nearest, bound = (0.0, 0.0) if info > 0 else _nearest_zero(matrix, inverse)
            smallest = _smallest(matrix)
        if abs(nearest) <= tiny:
            # With a damping, the relative residual is about tiny / damping. For the damping
            # `enough`, this is the larger of rtol and 1000 eps.
            enough = tiny * min(1 / max(self.rtol, eps), 1e-3 / eps)
            raise DivergenceError(
                f"A must not be singular, got an eigenvalue of {nearest:.1e}; add damping of at "
                f"least {enough:.1e}, or a penalty, or drop the redundant parameters."
            )

        def apply(B: NDArray) -> Raw:
            X = inverse(B)
            residual = lambda: _residual(A, matrix, X, B)  # noqa: E731
            return Raw(X, 1, smallest, remedy, residual, bound - tiny - away)

        return Factored(matrix, apply)


@dataclass(frozen=True, eq=False)
class Factored:
    """Function that solves for right-hand sides (d, m) with a stored factorisation.

    Attributes:
      matrix: the dense matrix (d, d).
      solve: a function of right-hand sides that returns a `Raw`.
    """

    matrix: NDArray
    solve: Callable[[NDArray], Raw]

    def __call__(self, B: NDArray) -> Raw:
        """Solve for right-hand sides B (d, m)."""
        return self.solve(B)


def _check_memory(A: LinearOperator) -> None:
    """Raise ValueError if this machine's memory cannot hold three matrices of the size of A.

    These are the dense matrix, its factor, and the workspace for computing all eigenvalues. The
    workspace is needed if ARPACK fails. Forming a GaussNewton matrix takes no more memory. Forming
    the Hessian of a chain of layers briefly takes up to five matrices.
    """
    d = A.shape[0]
    check_fits(
        3 * d**2 * np.dtype(A.dtype).itemsize,
        f"A must be small enough to be factored, with d = {d:,}",
        "use CG or EKFAC, or fewer weights by GenericNeuralNet(model, layers=[...])",
    )


def _check_products(A: LinearOperator, matrix: NDArray) -> float:
    """Estimate the Frobenius norm |A - matrix| with random vectors.

    Raises: DivergenceError if the products of A and of the matrix differ too much.
    """
    V = np.random.default_rng(0).standard_normal((len(matrix), 2)).astype(matrix.dtype)
    products = A @ V
    gaps = matrix @ V - products
    gap = np.abs(gaps).max()
    if not gap <= np.sqrt(np.finfo(matrix.dtype).eps) * np.abs(products).max():
        raise DivergenceError(
            f"A must have products that agree with its dense form, they differ by {gap:.1e} in "
            f"{type(A).__name__}; look for infinite losses at theta, or use float64."
        )
    ratios = np.linalg.norm(gaps, axis=0) / np.linalg.norm(V, axis=0)
    return float(np.sqrt(len(matrix)) * ratios.max())


def _residual(A: LinearOperator, matrix: NDArray, X: NDArray, B: NDArray) -> NDArray:
    """Compute or estimate |b - A x| / |b| for each column, (m,), as `Direct` describes."""
    R, size = B - matrix @ X, np.linalg.norm(X, axis=0)
    some = np.unique(np.linspace(0, len(size) - 1, _WATCHED).astype(int))
    gaps = matrix @ X[:, some] - A @ X[:, some]
    rates = np.linalg.norm(gaps, axis=0) / np.where(size[some] > 0, size[some], 1)
    norms = np.linalg.norm(R, axis=0) + rates.max() * size
    norms[some] = np.linalg.norm(R[:, some] + gaps, axis=0)
    return relative_size(norms, B)


def dense(A: LinearOperator) -> NDArray:
    """Form the dense matrix of an operator. The caller may overwrite the array."""
    if hasattr(A, "dense"):
        return A.dense()  # pyright: ignore[reportAttributeAccessIssue]
    held = getattr(A, "A", None)  # aslinearoperator stores an array as A.
    dtype = np.result_type(A.dtype, np.float32)
    matrix = (
        held.astype(dtype) if isinstance(held, np.ndarray) else A @ np.eye(A.shape[0], dtype=dtype)
    )
    return symmetrised(matrix)


def _smallest(matrix: NDArray) -> float:
    value = np.nan if len(matrix) < _FEW else _eigsh(matrix, which="SA")[0]
    if np.isnan(value):
        return float(scipy.linalg.eigvalsh(matrix, subset_by_index=[0, 0])[0])
    return value


def _nearest_zero(matrix: NDArray, inverse: Callable) -> tuple[float, float]:
    """Find the eigenvalue of a matrix A nearest zero, and a lower bound on all |eigenvalue|.

    Inverse iteration finds a unit vector v. Let mu be v . A^-1 v. Some eigenvalue of A^-1 lies
    within |A^-1 v - mu v| of mu. The iteration converges to the eigenvalue of A^-1 that is largest
    in magnitude. Therefore every |eigenvalue| of A is at least 1 / (|mu| + |A^-1 v - mu v|). The
    residual |A v - v / mu| would give no useful bound, because its rounding error is relative to
    the largest eigenvalue of A.
    """
    if len(matrix) >= _FEW:
        operator = LinearOperator(matrix.shape, matvec=inverse, dtype=matrix.dtype)  # pyright: ignore
        nearest, v = _eigsh(matrix, which="LM", sigma=0.0, OPinv=operator)
        if not np.isnan(nearest):
            w = np.ravel(inverse(v))
            mu = float(v @ w)
            return nearest, 1 / (abs(mu) + float(np.linalg.norm(w - mu * v)))
    values = scipy.linalg.eigvalsh(matrix)
    nearest = float(values[np.abs(values).argmin()])
    return nearest, abs(nearest)


def _eigsh(matrix: NDArray, **how: Any) -> tuple[float, NDArray]:
    """Compute one eigenpair with ARPACK. The eigenvalue is NaN if ARPACK does not converge."""
    # The start vector is fixed, so equal matrices give equal results.
    start = np.random.default_rng(0).standard_normal(len(matrix)).astype(matrix.dtype)
    try:
        values, vectors = eigsh(matrix, k=1, v0=start, tol=1e-3, **how)
    except ArpackError:
        return float("nan"), start
    return float(values[0]), vectors[:, 0]
