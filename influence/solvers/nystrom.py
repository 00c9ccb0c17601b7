"""Nystroem: a low-rank approximation of A from one product with a random block."""

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

    Omega (d, rank) is random and has orthonormal columns. A is split into M + known I:

        M ~ (M Omega) (Omega' M Omega)^-1 (M Omega)' = U diag(values) U'
        A ~ U diag(values + known) U' + (smallest value + known) (I - U U')

    The inverse is the preconditioner of that paper (section 5), scaled to approximate A^-1. `known`
    is the damping, or the model's lower bound on A's eigenvalues if that is larger. `known I` has
    full rank, so a low-rank sketch cannot represent it. This part is therefore subtracted before
    the sketch, and added back exactly afterwards. `known` is 0 if M is seen to be indefinite. The
    approximation is fixed, linear and positive definite. The approximation is exact if the rank is
    d, or larger than the rank of M.

    Args:
      rank: number of columns of U. A rank above d counts as d. Preparing multiplies A by `rank`
        vectors in one pass over the data.
      seed: seed of Omega.
      rtol: largest true relative residual at which a column counts as converged. None: the residual
        is reported, no column counts as converged, and no warning is given.

    Raises: ValueError for hyperparameters out of range. `prepare` raises DivergenceError for a
      matrix that is singular, or that it finds to be indefinite.
    """

    def prepare(self, A: LinearOperator) -> Callable[[NDArray], Raw]:
        """Compute the sketch A Omega and the approximation."""
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
        if smallest - known < -rounding:  # A is definite only because of its damping.
            known = 0.0
        # The shift keeps the Cholesky factor above rounding. The shift is subtracted below.
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
    """Return the multiple of I to subtract from A before the sketch.

    This is the damping, or the model's lower bound on A's eigenvalues if that is larger.
    """
    bounds = (getattr(A, "damping", 0.0), getattr(A, "smallest_eigenvalue_bound", np.nan))
    return float(max(bound for bound in bounds if not np.isnan(bound)))
