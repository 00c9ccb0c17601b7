"""Nystroem: a low-rank approximation from one product with a random block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from influence.common.convergence import DivergenceError
from influence.solvers.base import LowRank, Raw, finite_products, if_indefinite
from influence.solvers.lanczos import singular


@dataclass(frozen=True)
class Nystrom(LowRank):
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
                f"{if_indefinite(A, smallest)}"
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
        return self._inverse(U, values, values[-1], smallest)


def _core(Omega: NDArray, Y: NDArray) -> NDArray:
    core = Omega.T @ Y
    return (core + core.T) / 2


def _known(A: LinearOperator) -> float:
    """Return the multiple of I known to be in A: the damping, or the model's larger bound."""
    bounds = (getattr(A, "damping", 0.0), getattr(A, "smallest_eigenvalue_bound", np.nan))
    return float(max(bound for bound in bounds if not np.isnan(bound)))
