"""The ends of a matrix's spectrum, and the damping that makes the matrix definite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from tqdm import tqdm

from influence.common.convergence import warn_unconverged
from influence.common.memory import VECTORS
from influence.common.numbers import is_integer
from influence.common.progress import counter
from influence.solvers.base import as_symmetric, finite_products
from influence.solvers.direct import dense
from influence.solvers.lanczos import krylov

# Up to this order all eigenvalues take fewer passes than two by iteration, and no more time.
_FEW = 1024
# Vectors that ARPACK stores: at most these, and at least 32 even if they exceed their budget.
# A larger basis takes far fewer products.
_LARGEST_BASIS = 256
# Any fixed number: the same matrix gives the same answer.
_SEED = 0


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Extreme eigenvalues of a symmetric matrix, each with its true residual.

    Within its residual of each of these values lies an eigenvalue of the matrix. The values are
    Rayleigh quotients: none is below the matrix's smallest eigenvalue or above its largest.

    Attributes:
      smallest: (k,) ascending.
      smallest_residuals: (k,) |A v - value v| for unit v, recomputed from A.
      largest: (k,) descending.
      largest_residuals: (k,) the same for the largest.
      products: number of vectors that A was multiplied with.
      converged: True if every residual is within the tolerance.
      complete: True if all eigenvalues were computed, so that none was missed.
    """

    smallest: NDArray
    smallest_residuals: NDArray
    largest: NDArray
    largest_residuals: NDArray
    products: int
    converged: bool
    complete: bool = False


def spectrum(A: Any, k: int = 1, *, rtol: float = 1e-6, max_products: int = 2000) -> Spectrum:
    """Compute the k smallest and the k largest eigenvalues.

    Up to d = 1024 all eigenvalues of the dense matrix are computed, from d products in blocks.
    Beyond, ARPACK's restarted Lanczos iteration is used (`scipy.sparse.linalg.eigsh`) with a fixed
    start vector; each product is a pass over the data. The largest eigenvalues take one product
    per basis vector, mostly 256. The smallest, which lie close together relative to the
    largest, take up to thousands. Both ends are computed as largest eigenvalues, of A and of
    largest I - A, so that tolerances are relative to the matrix and not to an eigenvalue near zero.

    Args:
      A: a symmetric (d, d) array or LinearOperator.
      k: number of eigenvalues at each end. Beyond d = 1024 equal ones may be missed.
      rtol: residual to reach, relative to the largest |eigenvalue|; not below the rounding of A's
        dtype.
      max_products: approximate limit on the products for each end.

    Returns: Spectrum. It reports eigenvalues that did not converge; they raise no error.
    Raises: ValueError for a matrix as `solve`, or a k, rtol or max_products out of range;
      DivergenceError for a product that is not finite.
    """
    operator = as_symmetric(A)
    d = operator.shape[0]
    for name, value, most in (("k", k, d), ("max_products", max_products, np.inf)):
        if not (is_integer(value, 1) and value <= most):
            limits = f"in [1, {d}]" if name == "k" else "of at least 1"
            raise ValueError(f"{name} must be an integer {limits}, got {value!r}.")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must lie between 0 and 1, got {rtol}.")
    with counter("eigenvalues, products") as bar:
        return _ends(operator, k, rtol, max_products, bar)


def _ends(A: LinearOperator, k: int, rtol: float, max_products: int, bar: tqdm) -> Spectrum:
    """Compute the Spectrum of A; show each product in `bar`."""
    d, counted = A.shape[0], 0
    dtype = np.result_type(A.dtype, np.float32)

    def product(V: NDArray) -> NDArray:
        nonlocal counted
        counted += V.size // d
        bar.update(V.size // d)
        V = V.reshape(d, -1).astype(dtype)
        return finite_products(A, V, "spectrum").astype(np.float64)

    complete = d <= _FEW or 2 * k >= d
    if complete:
        V = np.linalg.eigh(dense(A))[1]
        counted += d
        low, high = V[:, :k], V[:, ::-1][:, :k]
    else:
        high = _top(product, d, k, rtol, max_products)
        shift = float(_quotients(product, high)[0].max())
        low = _top(lambda V: shift * V.reshape(d, -1) - product(V), d, k, rtol, max_products)
    (smallest, below), (largest, above) = _quotients(product, low), _quotients(product, high)
    up, down = np.argsort(smallest), np.argsort(-largest)
    size = max(np.abs(smallest).max(), np.abs(largest).max())
    rounding = np.sqrt(d) * np.finfo(dtype).eps
    within = max(below.max(), above.max()) <= (rtol + rounding) * size
    ends = smallest[up], below[up], largest[down], above[down]
    return Spectrum(*ends, counted, bool(within), complete)


def suggest_damping(A: Any, *, margin: float = 1e-5) -> float:
    """Compute the smallest damping that makes a matrix positive definite, with a margin.

    It is the least t >= 0 with bound + t >= margin (size + t). Size is the largest |eigenvalue|.
    Bound is a lower bound on all eigenvalues: the model's own, or the smallest eigenvalue found
    minus its residual. The condition number is then at most 1 / margin.

    Args:
      A: a symmetric (d, d) array or LinearOperator, such as `Hessian(net, train)`.
      margin: margin relative to the largest |eigenvalue|.

    Returns: the damping to add to A's own, in A's unit; 0.0 if none is needed. Warns with
      ConvergenceWarning if the eigenvalues did not converge, so that it may be too small.
    Raises: ValueError for a margin outside (0, 1), and for A = 0, which has no scale for a damping;
      as `spectrum`.
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin must lie between 0 and 1, got {margin}.")
    found = spectrum(A)
    if not found.converged:
        warn_unconverged(
            f"the spectrum's ends still have residuals of {found.smallest_residuals[0]:.1e} and "
            f"{found.largest_residuals[0]:.1e} after {found.products} products: the damping "
            "suggested may be too small; call spectrum with more max_products."
        )
    bounds = [found.smallest[0] - found.smallest_residuals[0]]
    known = getattr(A, "smallest_eigenvalue_bound", np.nan)
    bound = max(bounds + ([known] if not np.isnan(known) else []))
    # If all curvature is negative, the largest is not the size of A: -I + 1.0 I would be 0.
    size = max(
        abs(found.smallest[0]) + found.smallest_residuals[0],
        abs(found.largest[0]) + found.largest_residuals[0],
    )
    if size == 0:
        raise ValueError(
            "A must not be zero, got no eigenvalue but 0: any damping would be all of it; look for "
            "a loss that does not depend on theta."
        )
    return max(0.0, float((margin * size - bound) / (1 - margin)))


def _top(product: Callable, d: int, k: int, rtol: float, max_products: int) -> NDArray:
    """Compute unit vectors (d, k) near the eigenvectors of the largest eigenvalues."""
    basis = min(d, max(2 * k + 1, int(np.clip(2 * VECTORS // (8 * d), 32, _LARGEST_BASIS))))
    operator = LinearOperator((d, d), matvec=product, matmat=product, dtype=np.float64)  # pyright: ignore
    start = np.random.default_rng(_SEED).standard_normal(d)
    restarts = -(-max_products // basis)
    try:
        return eigsh(operator, k, which="LA", v0=start, ncv=basis, tol=rtol, maxiter=restarts)[1]
    except ArpackError:  # out of restarts, or no Krylov space, as for a multiple of I
        Q, T = krylov(operator, basis, block=1, seed=_SEED)
        return Q @ np.linalg.eigh(T)[1][:, -k:]


def _quotients(product: Callable, V: NDArray) -> tuple[NDArray, NDArray]:
    """Compute the Rayleigh quotients (k,) of unit columns, and their residuals."""
    V = V / np.linalg.norm(V, axis=0)
    AV = product(V)
    values = np.einsum("dk,dk->k", V, AV)
    return values, np.linalg.norm(AV - values * V, axis=0)
