"""CG: conjugate gradients, many right-hand sides in lockstep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from influence.solvers.base import Prepared, Raw, prepare

_MOST_ITERATIONS = 10_000


@dataclass(frozen=True)
class CG:
    """Conjugate gradients (Hestenes & Stiefel 1952) on a block, one product per iteration.

    Differs from `scipy.sparse.linalg.cg` in:
    1. m right-hand sides share each pass over the data; a column that is done leaves the block.
    2. A direction of non-positive curvature stops its column and is reported with its size, 0 for
       what rounding cannot tell from it.
    3. Convergence is that of the true residual: when the recurrence says done, it is recomputed
       and, if it drifted, the column starts again from where it is.

    Args:
      rtol: relative residual |b - A x| / |b| to reach, per column.
      max_iterations: at most this many; None: 10 d, and 10,000 at most.
      preconditioner: a solver that is fixed, linear and positive definite (prepared on the same
        matrix), or a (d, d) array or LinearOperator that approximates the inverse.

    Raises: ValueError for a negative rtol or fewer than one iteration.
    """

    rtol: float = 1e-6
    max_iterations: int | None = None
    preconditioner: Any = None

    def __post_init__(self):
        """Check the hyperparameters."""
        if not self.rtol >= 0:
            raise ValueError(f"rtol must be non-negative, got {self.rtol}.")
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {self.max_iterations}.")

    def prepare(self, A: LinearOperator) -> Callable[[NDArray], Raw]:
        """Prepare the preconditioner, if there is one."""
        inverse = _inverse(self.preconditioner, A)
        limit = self.max_iterations or min(10 * A.shape[0], _MOST_ITERATIONS)
        return lambda B: _conjugate_gradients(A, B, self.rtol, limit, inverse)


def _inverse(preconditioner: Any, A: LinearOperator) -> Callable[[NDArray], NDArray]:
    if preconditioner is None:
        return lambda R: R
    if isinstance(preconditioner, Prepared) or hasattr(preconditioner, "prepare"):
        # One prepared for another matrix is a good preconditioner for this one.
        given = isinstance(preconditioner, Prepared)
        prepared = preconditioner if given else prepare(A, preconditioner)
        return lambda R: prepared.apply(R).x
    operator = aslinearoperator(preconditioner)
    if operator.shape != A.shape:
        raise ValueError(
            f"preconditioner must have the shape of A, {A.shape}, got {operator.shape}."
        )
    return lambda R: operator @ R


def _conjugate_gradients(
    A: LinearOperator, B: NDArray, rtol: float, limit: int, inverse: Callable
) -> Raw:
    m = B.shape[1]
    X = np.zeros_like(B)
    target = rtol * np.linalg.norm(B, axis=0)
    iterations = np.zeros(m, int)
    curvature = np.full(m, np.inf)
    largest = 0.0  # curvature met in any column: rounding is eps times that
    eps = float(np.finfo(B.dtype).eps)
    negative = np.zeros(m, bool)
    stalled = np.zeros(m, bool)
    R = B.copy()
    size = np.linalg.norm(R, axis=0)
    open_columns = np.flatnonzero(size > target)
    while open_columns.size and iterations.max() < limit:
        # One run of the recurrence; columns leave when done, and re-enter if the truth disagrees.
        columns, before = open_columns, size[open_columns]
        r, x = R[:, columns], X[:, columns]
        z = inverse(r)
        p = z.copy()
        rz = _dot(r, z)
        while columns.size and iterations.max() < limit:
            Ap = A @ p
            pAp, pp = _dot(p, Ap), _dot(p, p)
            iterations[columns] += 1
            # p'p underflows to zero only where r has: then there is nothing left to do.
            ratio = np.divide(pAp, pp, out=np.full(len(pp), np.inf), where=pp > 0)
            largest = max(largest, float(ratio[np.isfinite(ratio)].max(initial=0.0)))
            ratio[(0 < ratio) & (ratio <= eps * largest)] = 0.0
            curvature[columns] = np.minimum(curvature[columns], ratio)
            bad = ratio <= 0
            negative[columns[bad]] = True
            step = np.divide(rz, pAp, out=np.zeros_like(rz), where=~bad & (pAp > 0))
            x += step * p
            r -= step * Ap
            X[:, columns] = x
            keep = (np.linalg.norm(r, axis=0) > target[columns]) & ~bad & (step > 0)
            if not keep.all():
                columns, x, r, p, rz = columns[keep], x[:, keep], r[:, keep], p[:, keep], rz[keep]
                if not columns.size:
                    break
            z = inverse(r)
            rz_next = _dot(r, z)
            p = z + (rz_next / rz) * p
            rz = rz_next
        R[:, open_columns] = B[:, open_columns] - A @ X[:, open_columns]
        size = np.linalg.norm(R, axis=0)
        # A restart that gains nothing has met the rounding of this dtype.
        stalled[open_columns] = (size[open_columns] > 0.5 * before) & (iterations.max() < limit)
        open_columns = np.flatnonzero((size > target) & ~negative & ~stalled)
    return Raw(
        X,
        iterations,
        np.where(np.isinf(curvature), np.nan, curvature),
        _remedy(negative, stalled, curvature, 4 * np.sqrt(len(B)) * eps * largest, limit),
    )


def _remedy(
    negative: NDArray, stalled: NDArray, curvature: NDArray, rounding: float, limit: int
) -> str:
    if negative.any():
        worst = float(curvature[negative].min())
        if worst >= -rounding:
            return (
                f"A is singular: curvature {abs(worst):.1g} was met, zero but for rounding; add "
                "damping or a penalty, or drop the redundant parameters."
            )
        return (
            f"A is not positive definite: negative curvature {worst:.3g} was met, and there may be "
            f"worse; use a damping well above {-worst:.3g}, or GaussNewton, or Direct, which "
            "answers for indefinite matrices."
        )
    if stalled.any():
        return "rounding stopped CG above rtol: use float64 or a larger rtol."
    return f"CG stopped at max_iterations = {limit}: allow more, precondition, or damp more."


def _dot(U: NDArray, V: NDArray) -> NDArray:
    return np.einsum("ij,ij->j", U, V)
