"""The ends of a matrix's spectrum, and the damping that they ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from tqdm import tqdm

from influence.common.convergence import warn_unconverged
from influence.common.progress import counter
from influence.solvers.base import as_symmetric, finite_products
from influence.solvers.direct import dense
from influence.solvers.lanczos import krylov

_FEW = 1024  # order up to which all eigenvalues take fewer passes and no more time than two do
_LARGEST_BASIS = 256  # vectors that ARPACK keeps: more take far fewer products, and more memory:
_BYTES = 1 << 29  # what they may take, where more than 32 of them do
_SEED = 0  # any fixed number: the same matrix gives the same answer


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Extreme eigenvalues of a symmetric matrix, each with its true residual.

    An eigenvalue of the matrix lies within its residual of each of these values. They are Rayleigh
    quotients, so the smallest is never below the matrix's own, nor the largest above.

    Attributes:
      smallest: (k,) ascending.
      smallest_residuals: (k,) |A v - value v| for unit v, recomputed from A.
      largest: (k,) descending.
      largest_residuals: (k,) of those.
      products: vectors that A was multiplied with.
      converged: whether every residual is within the tolerance.
      complete: whether all eigenvalues were computed, so that none can have been missed.
    """

    smallest: NDArray
    smallest_residuals: NDArray
    largest: NDArray
    largest_residuals: NDArray
    products: int
    converged: bool
    complete: bool = False


def spectrum(A: Any, k: int = 1, *, rtol: float = 1e-6, max_products: int = 2000) -> Spectrum:
    """The k smallest and the k largest eigenvalues.

    By ARPACK's restarted Lanczos iteration (`scipy.sparse.linalg.eigsh`) from a fixed start vector;
    each product is a pass over the data. The largest take as many as the basis holds, mostly 256;
    the smallest, which lie close together relative to the largest, up to thousands. Both are
    iterated for as the largest, those of A and of largest I - A, so that tolerances are relative to
    the matrix and not to an eigenvalue near zero. Up to d = 1024 all eigenvalues of the dense
    matrix, from d products in blocks.

    Args:
      A: a symmetric (d, d) array or LinearOperator.
      k: eigenvalues at each end. Of equal ones beyond d = 1024 some may be missed.
      rtol: residual to reach, relative to the largest eigenvalue in size; what A's dtype cannot
        tell is not asked for.
      max_products: at each end, at most about so many.

    Returns: Spectrum. What did not converge is reported there, not raised.
    Raises: ValueError for a matrix as `solve`, or a k, rtol or max_products out of range;
      DivergenceError for a product that is not finite.
    """
    operator = as_symmetric(A)
    d = operator.shape[0]
    for name, value, most in (("k", k, d), ("max_products", max_products, np.inf)):
        integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not (integer and 1 <= value <= most):
            limits = f"in [1, {d}]" if name == "k" else "of at least 1"
            raise ValueError(f"{name} must be an integer {limits}, got {value!r}.")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must lie between 0 and 1, got {rtol}.")
    with counter("eigenvalues, products") as bar:
        return _ends(operator, k, rtol, max_products, bar)


def _ends(A: LinearOperator, k: int, rtol: float, max_products: int, bar: tqdm) -> Spectrum:
    """What `spectrum` says of A, each of whose products `bar` shows."""
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
    """The smallest damping that makes a matrix positive definite, with a margin.

    The least t >= 0 with bound + t >= margin (size + t), size the largest eigenvalue in size, bound
    a number that no eigenvalue of A is below: what the model knows by itself, or the smallest
    eigenvalue found minus its residual. The condition number is then at most 1 / margin.

    Args:
      A: a symmetric (d, d) array or LinearOperator, such as `Hessian(net, train)`.
      margin: of the largest eigenvalue in size.

    Returns: in A's unit, to be added to what damping A has already; 0.0 if it needs none. Warns
      with ConvergenceWarning if the eigenvalues did not converge, and it may be too small.
    Raises: ValueError for a margin outside (0, 1), and for A = 0, beside which no damping is large
      or small; as `spectrum`.
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
    # Where all curvature is negative the largest says nothing of A's size: -I + 1.0 I would be 0.
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
    """(d, k) unit vectors near the largest eigenvalues'."""
    basis = min(d, max(2 * k + 1, int(np.clip(_BYTES // (8 * d), 32, _LARGEST_BASIS))))
    operator = LinearOperator((d, d), matvec=product, matmat=product, dtype=np.float64)  # pyright: ignore
    start = np.random.default_rng(_SEED).standard_normal(d)
    restarts = -(-max_products // basis)
    try:
        return eigsh(operator, k, which="LA", v0=start, ncv=basis, tol=rtol, maxiter=restarts)[1]
    except ArpackError:  # out of restarts, or nothing to iterate with, as for a multiple of I
        Q, T = krylov(operator, basis, block=1, seed=_SEED)
        return Q @ np.linalg.eigh(T)[1][:, -k:]


def _quotients(product: Callable, V: NDArray) -> tuple[NDArray, NDArray]:
    """Rayleigh quotients (k,) of unit columns, and their residuals."""
    V = V / np.linalg.norm(V, axis=0)
    AV = product(V)
    values = np.einsum("dk,dk->k", V, AV)
    return values, np.linalg.norm(AV - values * V, axis=0)
