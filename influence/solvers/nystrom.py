"""Nystroem: a low-rank approximation from one product with a random block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from influence.common.convergence import DivergenceError
from influence.solvers.base import Raw, check_rank, enough_damping, finite_products
from influence.solvers.lanczos import singular


@dataclass(frozen=True)
class Nystrom:
    """Randomised Nystroem approximation (Frangella, Tropp & Udell 2023, alg. 2.1), plus a floor.

    With Omega (d, rank) random and orthonormal and A = M + known I,

        M ~ (M Omega) (Omega' M Omega)^-1 (M Omega)' = U diag(values) U'
        A ~ U diag(values + known) U' + (smallest value + known) (I - U U')

    Its inverse is their preconditioner (section 5), scaled here to approximate A^-1 itself. `known`
    is the multiple of I known without any product: the damping and, for a convex net, the penalty.
    It is subtracted before the sketch, because it would use up the rank on what all directions have
    in common, and added back exactly. The approximation is fixed, linear and positive definite. It
    is exact if the rank is d or larger than the rank of M.

    Args:
      rank: rank of U; more than d counts as d. Costs one pass over the data with rank vectors.
      seed: seed of Omega.
      rtol: true relative residual up to which a column counts as converged. None: no tolerance; the
        residual is reported, nothing counts as converged, and no warning is given.

    Raises: ValueError for hyperparameters out of range; DivergenceError when preparing for a
      singular matrix, or for one that is seen to be indefinite: the method needs a definite matrix.
    """

    exact: ClassVar[bool] = False
    answers_indefinite: ClassVar[bool] = False

    rank: int
    seed: int = 0
    rtol: float | None = None

    def __post_init__(self):
        """Check the hyperparameters."""
        check_rank(self.rank, self.seed, self.rtol)

    def prepare(self, A: LinearOperator) -> Callable[[NDArray], Raw]:
        """Sketch the matrix."""
        d = A.shape[0]
        rank = min(self.rank, d)
        dtype = np.result_type(A.dtype, np.float32)
        rng = np.random.default_rng(self.seed)
        Omega = np.linalg.qr(rng.standard_normal((d, rank)))[0].astype(dtype)
        Y = finite_products(A, Omega, "Nystrom")
        size = float(np.linalg.norm(Y, 2))
        rounding = float(np.finfo(dtype).eps * np.sqrt(d) * size)
        smallest = float(np.linalg.eigvalsh(_core(Omega, Y))[0])
        if smallest < -rounding:
            raise DivergenceError(
                f"Nystrom needs a positive definite A, met a negative curvature of {smallest:.3g}, "
                f"and there may be worse; use a damping well above "
                f"{enough_damping(A, smallest)}, or GaussNewton, or Direct, which answers for "
                "indefinite matrices."
            )
        known = _known(A)
        if smallest - known < -rounding:  # A is definite only by its damping: sketch all of it
            known = 0.0
        # The shift keeps the core's Cholesky factor above rounding; it is subtracted below.
        Y, shift = Y - dtype.type(known) * Omega, rounding
        while True:
            shifted = Y + dtype.type(shift) * Omega
            try:
                L = np.linalg.cholesky(_core(Omega, shifted))
                break
            except np.linalg.LinAlgError:
                shift = max(10 * shift, float(np.finfo(dtype).tiny))
        half = scipy.linalg.solve_triangular(L, shifted.T, lower=True).T
        U, sigma, _ = scipy.linalg.svd(half, full_matrices=False)
        values = np.maximum(sigma**2 - shift, 0) + known
        if values[-1] <= rounding:
            raise singular(float(values[-1]), rounding)
        values = values.astype(dtype)[:, None]
        remedy = (
            f"Nystrom of rank {rank} leaves out too much of A: use a larger rank, more damping, or "
            f"let CG do the rest, CG(preconditioner=Nystrom({rank}))."
        )

        def apply(B: NDArray) -> Raw:
            C = U.T @ B
            X = U @ (C / values)
            if rank < d:
                X += (B - U @ C) / values[-1]
            return Raw(X, 1, smallest, remedy)

        return apply


def _core(Omega: NDArray, Y: NDArray) -> NDArray:
    core = Omega.T @ Y
    return (core + core.T) / 2


def _known(A: LinearOperator) -> float:
    """Return the multiple of I known to be in A: the damping, or the model's larger bound."""
    bounds = (getattr(A, "damping", 0.0), getattr(A, "smallest_eigenvalue_bound", np.nan))
    return float(max(bound for bound in bounds if not np.isnan(bound)))
