"""Extreme eigenvalues of a matrix, and the damping that makes the matrix positive definite."""

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
from influence.common.numbers import is_integer, norms
from influence.common.progress import counter
from influence.net.history import History
from influence.solvers.base import as_symmetric, finite_products
from influence.solvers.direct import dense
from influence.solvers.lanczos import krylov

# Up to this order, computing all eigenvalues of a matrix takes fewer passes over the data than
# computing two eigenvalues by iteration, and no more time.
_FEW = 1024
# If k is small, ARPACK stores at most this many vectors. It stores at least 32 vectors, even if
# these exceed the memory budget. With more vectors it needs far fewer products.
_LARGEST_BASIS = 256
# This many steps of Lanczos' iteration give the largest eigenvalue to a few per cent.
_LARGEST_STEPS = 12
# The seed is fixed, so the same matrix always gives the same answer.
_SEED = 0


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Extreme eigenvalues of a symmetric matrix, each with its true residual.

    The matrix has an eigenvalue within the residual of each value. The values are Rayleigh
    quotients, so no value is below the smallest eigenvalue of the matrix or above the largest one.

    Attributes:
      smallest: (k,) the smallest eigenvalues, ascending.
      smallest_residuals: (k,) |A v - value v| for unit vectors v, recomputed from A.
      largest: (k,) the largest eigenvalues, descending.
      largest_residuals: (k,) residuals of the largest eigenvalues.
      products: number of vectors by which A was multiplied.
      converged: True if every residual is within `rtol` plus rounding.
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

    Up to d = 1024 all eigenvalues of the dense matrix are computed. For larger d, ARPACK's
    restarted Lanczos iteration (`scipy.sparse.linalg.eigsh`) runs from a fixed start vector. Each
    product is then a pass over the data. The largest eigenvalues take one product per basis vector,
    usually 256. The smallest eigenvalues lie close together relative to the largest one. Therefore
    they take up to thousands of products. The iteration finds the smallest eigenvalues of A as the
    largest eigenvalues of s I - A, with s the largest eigenvalue of A. So tolerances are relative
    to the size of A.

    Args:
      A: a symmetric (d, d) array or LinearOperator.
      k: number of eigenvalues at each end. For d above 1024 repeated eigenvalues may be missed.
      rtol: residual to reach, relative to the largest |eigenvalue|. The rounding of A's dtype is
        added to it.
      max_products: approximate limit on the products for each end.

    Returns: Spectrum. Eigenvalues that did not converge raise no error; `converged` is then False.
    Raises: ValueError for a matrix that `solve` refuses, or a k, rtol or max_products out of range;
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
    """Compute the Spectrum of A. Count the products on `bar`."""
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


def suggest_damping(A: Any, *, margin: float = 1e-5, history: History | None = None) -> float:
    """Compute the smallest damping that makes a matrix positive definite, with a margin.

    The damping is the smallest t >= 0 with bound + t >= margin (size + t). Here `size` is the
    largest |eigenvalue| found, plus its residual. `bound` is a lower bound on all eigenvalues. It
    is the larger of two bounds: the model's bound, and the smallest eigenvalue found minus its
    residual. With this damping the condition number is at most 1 / margin.

    Args:
      A: a symmetric (d, d) array or LinearOperator, such as `Hessian(net, train)`.
      margin: margin relative to the largest |eigenvalue|.
      history: the History of a training by SGD, or None. The result plus A's damping is then at
        least `History.damping`, which is (1 - momentum) / (learning rate x steps). In directions
        with less curvature than this, the training did not converge (Bae et al. 2022).

    Returns: the damping to add to A's damping, in A's unit. 0.0 if none is needed. Warns with
      ConvergenceWarning if the eigenvalues did not converge. The damping may then be too small.
    Raises: ValueError for a margin outside (0, 1), and for A = 0, which has no scale for a damping.
      It also raises the errors of `spectrum`.
    """
    if not 0 < margin < 1:
        raise ValueError(f"margin must lie between 0 and 1, got {margin}.")
    least = 0.0
    if history is not None:
        least = max(history.damping() - float(getattr(A, "damping", 0.0)), 0.0)
    known = float(getattr(A, "smallest_eigenvalue_bound", np.nan))
    if known >= 0 and A.shape[0] > _FEW:  # then the largest eigenvalue is enough
        size = sum(largest_eigenvalue(A, _LARGEST_STEPS))
        if size > 0:
            return max(least, float((margin * size - known) / (1 - margin)))
    found = spectrum(A)
    if not found.converged:
        warn_unconverged(
            f"the spectrum's ends still have residuals of {found.smallest_residuals[0]:.1e} and "
            f"{found.largest_residuals[0]:.1e} after {found.products} products: the damping "
            "suggested may be too small; call spectrum with more max_products."
        )
    bounds = [found.smallest[0] - found.smallest_residuals[0]]
    bound = max(bounds + ([known] if not np.isnan(known) else []))
    # Size is the largest |eigenvalue|, because the largest eigenvalue may be negative. For A = -I
    # the largest eigenvalue would give the damping 1, and A + I is 0.
    size = max(
        abs(found.smallest[0]) + found.smallest_residuals[0],
        abs(found.largest[0]) + found.largest_residuals[0],
    )
    if size == 0:
        raise ValueError(
            "A must not be zero, got no eigenvalue but 0: any damping would be all of it; look for "
            "a loss that does not depend on theta."
        )
    return max(least, float((margin * size - bound) / (1 - margin)))


def largest_eigenvalue(A: LinearOperator, steps: int) -> tuple[float, float]:
    """Estimate the largest eigenvalue by Lanczos' iteration. Return it with its residual.

    The estimate takes steps + 1 products. It is a Rayleigh quotient, so it does not exceed the
    largest eigenvalue.
    """
    Q, T = krylov(A, min(steps, A.shape[0]), block=1, seed=_SEED)
    values, vectors = np.linalg.eigh(T)
    v = Q @ vectors[:, -1:]
    residual = A @ v.astype(A.dtype) - values[-1] * v
    return float(values[-1]), float(np.linalg.norm(residual))


def _top(product: Callable, d: int, k: int, rtol: float, max_products: int) -> NDArray:
    """Compute unit vectors (d, k) near the eigenvectors of the k largest eigenvalues."""
    basis = min(d, max(2 * k + 1, int(np.clip(2 * VECTORS // (8 * d), 32, _LARGEST_BASIS))))
    operator = LinearOperator((d, d), matvec=product, matmat=product, dtype=np.float64)  # pyright: ignore
    start = np.random.default_rng(_SEED).standard_normal(d)
    restarts = -(-max_products // basis)
    try:
        return eigsh(operator, k, which="LA", v0=start, ncv=basis, tol=rtol, maxiter=restarts)[1]
    except ArpackError:  # ARPACK has no restarts left, or no Krylov space exists, as for A = I.
        Q, T = krylov(operator, basis, block=1, seed=_SEED)
        return Q @ np.linalg.eigh(T)[1][:, -k:]


def _quotients(product: Callable, V: NDArray) -> tuple[NDArray, NDArray]:
    """Compute the Rayleigh quotients (k,) of the columns of V, and their residuals (k,)."""
    V = V / np.linalg.norm(V, axis=0)
    AV = product(V)
    values = np.einsum("dk,dk->k", V, AV)
    return values, norms(AV - values * V)
