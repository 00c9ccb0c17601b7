"""Direct: factor the dense matrix once, solve as often as needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from influence.convergence import DivergenceError
from influence.solvers.base import Raw


@dataclass(frozen=True)
class Direct:
    """Cholesky of the dense matrix; Bunch-Kaufman (L D L') where it is indefinite, and says so.

    Costs d^2 numbers of memory and d^3 / 3 operations once, 2 d^2 per right-hand side. An
    indefinite matrix is solved exactly as well, but what it means for influence is doubtful:
    `min_curvature` is then the (negative) smallest eigenvalue.

    Args:
      rtol: true relative residual up to which a column counts as converged; a factorisation that
        misses it is too ill conditioned for its dtype.

    Raises: ValueError for a negative rtol; DivergenceError when preparing for a singular matrix,
      with the damping that would work.
    """

    rtol: float = 1e-6

    def __post_init__(self):
        """Check the hyperparameters."""
        if not self.rtol >= 0:
            raise ValueError(f"rtol must be non-negative, got {self.rtol}.")

    def prepare(self, A: LinearOperator) -> Callable[[NDArray], Raw]:
        """Form the dense matrix and factor it."""
        matrix = dense(A)
        remedy = "the matrix is too ill conditioned for its dtype: use float64 or a larger damping."
        scale = float(np.abs(np.diag(matrix)).max()) or 1.0
        tiny = float(np.finfo(matrix.dtype).eps) * len(matrix) * scale
        enough = max(self.rtol, 1e-6)  # damping of tiny / rtol leaves a residual of about rtol
        try:
            factor: Any = scipy.linalg.cho_factor(matrix, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            factor = None
        if factor is not None:
            solve_pd = lambda B: scipy.linalg.cho_solve(factor, B, check_finite=False)  # noqa: E731
            smallest = _smallest(matrix, solve_pd)
            if smallest <= tiny:
                raise _singular(smallest, tiny / enough)
            return lambda B: Raw(solve_pd(B), 1, smallest, remedy)
        sytrf, sytrs = scipy.linalg.get_lapack_funcs(("sytrf", "sytrs"), (matrix,))
        ldl, pivots, info = sytrf(matrix, lower=1)
        solve_ldl = lambda B: sytrs(ldl, pivots, B, lower=1)[0]  # noqa: E731
        # The eigenvalue nearest zero decides whether the system can be solved at all.
        nearest = 0.0 if info > 0 else _nearest_zero(matrix, solve_ldl)
        if abs(nearest) <= tiny:
            raise _singular(nearest, tiny / enough)
        smallest = _smallest(matrix, None)
        return lambda B: Raw(solve_ldl(B), 1, smallest, remedy)


def dense(A: LinearOperator) -> NDArray:
    """The matrix behind an operator, fresh to be overwritten."""
    if hasattr(A, "dense"):
        return A.dense()  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(getattr(A, "A", None), np.ndarray):  # aslinearoperator(array)
        matrix = A.A.astype(np.result_type(A.dtype, np.float32))  # pyright: ignore
    else:
        matrix = A @ np.eye(A.shape[0], dtype=np.result_type(A.dtype, np.float32))
    return (matrix + matrix.T) / 2


def _smallest(matrix: NDArray, inverse: Callable | None) -> float:
    """Smallest eigenvalue; by inverse iteration where a positive definite factor is at hand."""
    if len(matrix) < 64:
        return float(scipy.linalg.eigvalsh(matrix, subset_by_index=[0, 0])[0])
    if inverse is not None:
        return _nearest_zero(matrix, inverse)
    return _eigsh(matrix, which="SA")


def _nearest_zero(matrix: NDArray, inverse: Callable) -> float:
    if len(matrix) < 64:
        values = scipy.linalg.eigvalsh(matrix)
        return float(values[np.abs(values).argmin()])
    operator = LinearOperator(matrix.shape, matvec=inverse, dtype=matrix.dtype)  # pyright: ignore
    return _eigsh(matrix, which="LM", sigma=0.0, OPinv=operator)


def _eigsh(matrix: NDArray, **how: Any) -> float:
    # A fixed start vector: the same matrix gives the same number, and no global seed is touched.
    start = np.random.default_rng(0).standard_normal(len(matrix)).astype(matrix.dtype)
    try:
        return float(eigsh(matrix, k=1, v0=start, tol=1e-3, return_eigenvectors=False, **how)[0])
    except ArpackNoConvergence:
        return float("nan")


def _singular(value: float, damping: float) -> DivergenceError:
    return DivergenceError(
        f"A must not be singular, got an eigenvalue of {value:.1e}; add damping of at least "
        f"{damping:.1e}, or a penalty, or drop the redundant parameters."
    )
