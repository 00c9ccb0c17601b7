"""CG: conjugate gradients, with one search space for all right-hand sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from tqdm import tqdm

from influence.common.numbers import dots
from influence.common.progress import counter
from influence.solvers.base import Raw, check_integer, check_rtol, if_indefinite, relative_norm
from influence.solvers.preconditioner import check_preconditioner, inverse_of

_MOST_ITERATIONS = 10_000
# The remedy suggests no larger rtol than this.
_OF_USE = 1e-2
# CG gives up the common search space if the largest residual is not halved in this many iterations,
# or in half of the allowed iterations if these are fewer. Each column then has its own recurrence.
_PATIENCE = 100


@dataclass(frozen=True)
class CG:
    """Conjugate gradients (Hestenes & Stiefel 1952) for a block of right-hand sides.

    CG differs from `scipy.sparse.linalg.cg` in three points:
    1. All right-hand sides share each pass over the data. For each column, CG minimises over the
       search directions of all columns (O'Leary 1980). Linearly dependent directions are removed
       (Ji & Li 2017). Separate searches would take more iterations.
    2. A direction of non-positive curvature stops only the column that meets this direction. The
       smallest curvature is reported. A positive curvature within rounding is reported as 0.
    3. The true residual decides convergence. CG recomputes it when the recurrence reports
       convergence. A column whose true residual is above the tolerance restarts from its current x.

    Args:
      rtol: relative residual |b - A x| / |b| that each column must reach.
      max_iterations: the largest number of iterations. None means min(10 d, 10,000).
      preconditioner: an approximate inverse that is fixed, linear and positive definite. It is
        given as a solver such as Nystrom(100), the result of `prepare`, a (d, d) array or a
        LinearOperator. A solver that is not yet prepared is prepared for the same matrix.

    Raises: ValueError for a negative rtol or fewer than one iteration; TypeError for a
      preconditioner that is not linear. `prepare` raises ValueError for a preconditioner that is
      not positive definite.
    """

    unfit_as_preconditioner: ClassVar[str] = (
        "where it stops, and so what it answers, depends on the right-hand side"
    )

    rtol: float = 1e-6
    max_iterations: int | None = None
    preconditioner: Any = None

    def __post_init__(self):
        check_rtol(self.rtol)
        if self.max_iterations is not None:
            check_integer("max_iterations", self.max_iterations, 1)
        check_preconditioner(self.preconditioner)

    def prepare(self, A: LinearOperator) -> Callable[[NDArray], Raw]:
        """Prepare the preconditioner, if there is one. Return a function that runs CG."""
        inverse = inverse_of(self.preconditioner, A)
        limit = self.max_iterations or min(10 * A.shape[0], _MOST_ITERATIONS)

        def apply(B: NDArray) -> Raw:
            with counter("conjugate gradients") as bar:
                return _Run(A, B, self.rtol, limit, inverse, bar).solve()

        return apply


class _Run:
    """State of one run of CG on A X = B. The methods `together` and `lockstep` update it."""

    def __init__(
        self, A: LinearOperator, B: NDArray, rtol: float, limit: int, inverse: Callable, bar: tqdm
    ):
        self.A, self.B, self.limit, self.inverse, self.bar = A, B, limit, inverse, bar
        m = B.shape[1]
        self.lengths = np.linalg.norm(B, axis=0)
        self.target = rtol * self.lengths  # the residual norm that each column must reach
        self.X = np.zeros_like(B)
        self.iterations = np.zeros(m, int)
        self.curvature = np.full(m, np.inf)  # the smallest curvature that each column met
        self.negative = np.zeros(m, bool)  # True for columns that met a curvature <= 0
        self.stalled = np.zeros(m, bool)  # True for columns that rounding has stopped
        self.largest = 0.0  # the largest curvature met; eps times this is rounding

    def solve(self) -> Raw:
        """Run recurrences and recompute the residuals until no column needs another run."""
        A, B = self.A, self.B
        R = B.copy()
        size = np.linalg.norm(R, axis=0)
        todo = np.flatnonzero(size > self.target)
        together = True
        while todo.size and self.iterations.max() < self.limit:
            # A column leaves this run when the recurrence reports convergence. The column enters
            # the next run if its true residual is above the target.
            before = size[todo]
            together = together and todo.size > 1
            recurrence = self.together if together else self.lockstep
            finished = recurrence(todo, R[:, todo])
            R[:, todo] = B[:, todo] - A @ self.X[:, todo]
            size = np.linalg.norm(R, axis=0)
            if finished and self.iterations.max() < self.limit:
                # If a run does not halve the residual of a column, rounding has stopped the column.
                self.stalled[todo] = size[todo] > 0.5 * before
            together = together and finished
            todo = np.flatnonzero((size > self.target) & ~self.negative & ~self.stalled)
        curvature = np.where(np.isinf(self.curvature), np.nan, self.curvature)
        residual = relative_norm(R, B)  # R is B - A X and not the recurrence's residual.
        return Raw(self.X, self.iterations, curvature, self.remedy(residual), lambda: residual)

    @property
    def eps(self) -> float:
        return float(np.finfo(self.X.dtype).eps)

    def told(self, columns: NDArray, norms: NDArray) -> None:
        """Count one iteration on the progress bar and show the largest residual of `columns`."""
        worst = np.max(norms / self.lengths[columns], initial=0.0)
        self.bar.set_postfix_str(f"relative residual {worst:.1e}", refresh=False)
        self.bar.update()

    def target_of(self, columns: NDArray, r: NDArray) -> NDArray:
        """Return the residual norms (j,) at which a recurrence ends.

        The recurrence starts with the residuals r (d, j). Below eps times the norm of r,
        the residual of the recurrence is no longer the true residual.
        """
        return np.maximum(self.target[columns], self.eps * np.linalg.norm(r, axis=0))

    def together(self, columns: NDArray, r: NDArray) -> bool:
        """Minimise over the directions of all columns. Return False if the recurrence must stop.

        P holds the directions, and Q = A P. Each iteration adds P a to X and subtracts Q a from the
        residuals R, with a = (P'Q)^-1 P'R. Z holds the preconditioned new residuals. The columns of
        Z - P (P'Q)^-1 Q'Z span the next P.
        """
        smallest, since, patience = np.inf, 0, min(_PATIENCE, self.limit // 2)
        target = self.target_of(columns, r)
        P = _independent(self.inverse(r))
        while columns.size and P.size and self.iterations.max() < self.limit:
            Q = self.A @ P
            T = P.T @ Q
            T = (T + T.T) / 2
            if not np.isfinite(T).all():
                return False
            self.iterations[columns] += 1
            found = scipy.linalg.eigvalsh(T, check_finite=False)
            if found[0] <= self.eps * max(self.largest, found[-1]):
                return False  # `lockstep` then finds the column that meets this curvature.
            try:
                factor = scipy.linalg.cho_factor(T, check_finite=False)
            except np.linalg.LinAlgError:  # within rounding, T is not positive definite
                return False
            self.largest = max(self.largest, float(found[-1]))
            self.curvature[columns] = np.minimum(self.curvature[columns], found[0])
            a = scipy.linalg.cho_solve(factor, P.T @ r, check_finite=False)
            self.X[:, columns] += P @ a
            r = r - Q @ a
            norms = np.linalg.norm(r, axis=0)
            self.told(columns, norms)
            keep = norms > target
            columns, r, target = columns[keep], r[:, keep], target[keep]
            since = 0 if norms.max() < smallest / 2 else since + 1
            smallest = min(smallest, norms.max())
            if since > patience:
                return False
            if columns.size:
                Z = self.inverse(r)
                P = _independent(
                    Z - P @ scipy.linalg.cho_solve(factor, Q.T @ Z, check_finite=False)
                )
        return True

    def lockstep(self, columns: NDArray, r: NDArray) -> bool:
        """Run a separate recurrence for each column. All columns share the products with A."""
        x = self.X[:, columns]
        target = self.target_of(columns, r)
        z = self.inverse(r)
        p = z.copy()
        rz = dots(r, z)
        while columns.size and self.iterations.max() < self.limit:
            Ap = self.A @ p
            pAp, pp = dots(p, Ap), dots(p, p)
            self.iterations[columns] += 1
            # p'p underflows to zero only if r underflows. Then the column is done.
            ratio = np.divide(pAp, pp, out=np.full(len(pp), np.inf), where=pp > 0)
            finite = ratio[np.isfinite(ratio)]
            self.largest = max(self.largest, float(finite.max(initial=0.0)))
            ratio[(0 < ratio) & (ratio <= self.eps * self.largest)] = 0.0
            self.curvature[columns] = np.minimum(self.curvature[columns], ratio)
            bad = ratio <= 0
            self.negative[columns[bad]] = True
            step = np.divide(rz, pAp, out=np.zeros_like(rz), where=~bad & (pAp > 0))
            x += step * p
            r = r - step * Ap
            self.X[:, columns] = x
            norms = np.linalg.norm(r, axis=0)
            self.told(columns, norms)
            keep = (norms > target) & ~bad & (step > 0)
            if not keep.all():
                columns, x, r, p, rz = columns[keep], x[:, keep], r[:, keep], p[:, keep], rz[keep]
                target = target[keep]
                if not columns.size:
                    break
            z = self.inverse(r)
            rz_next = dots(r, z)
            p = z + (rz_next / rz) * p
            rz = rz_next
        return True

    def remedy(self, residual: NDArray) -> str:
        """Format advice to the user about columns that did not converge.

        `residual` (m,) holds the relative residuals that were reached.
        """
        # The suggested rtol is above the residuals of the stopped columns. In float32
        # these residuals are 1e-7 to 1e-5, depending on the condition number.
        reached = float(residual[self.negative | self.stalled].max(initial=0.0))
        rtol = 10 ** np.ceil(np.log10(2 * reached)) if 0 < reached < _OF_USE / 2 else None
        if self.negative.any():
            worst = float(self.curvature[self.negative].min())
            if worst >= -4 * np.sqrt(len(self.B)) * self.eps * self.largest:
                before = f", or stop before that, with CG(rtol={rtol:.0e})" if rtol else ""
                return (
                    f"A is singular: curvature {abs(worst):.1g} was met, zero but for rounding; "
                    f"add damping or a penalty, or drop the redundant parameters{before}."
                )
            return (
                f"A is not positive definite: negative curvature {worst:.3g} was met, "
                f"{if_indefinite(self.A, worst)}"
            )
        if self.stalled.any():
            asked = f"CG(rtol={rtol:.0e})" if rtol else "a larger rtol"
            return f"rounding stopped CG above rtol: use float64 or {asked}."
        return (
            f"CG stopped at max_iterations = {self.limit}: allow more, precondition, or damp more."
        )


def _independent(Z: NDArray) -> NDArray:
    """Return an orthonormal basis of the space that Z's columns (d, m) span, up to rounding.

    Z'Z is fast to compute. But its rounding hides singular values of Z below sqrt(eps) times the
    largest. So if Z'Z has small eigenvalues, an SVD of Z is used. The SVD separates directions with
    small singular values from rounding. Without these directions CG stalls, because its residuals
    are then not orthogonal to all earlier directions.
    """
    size = np.linalg.norm(Z, axis=0)
    Z = Z[:, size > 0] / size[size > 0]
    if not Z.size or not np.isfinite(Z).all():
        return Z[:, :0]
    eps = np.finfo(Z.dtype).eps
    few = len(Z) < Z.shape[1]  # then Z Z' is smaller than Z'Z
    gram = (Z @ Z.T if few else Z.T @ Z).astype(np.float64)
    values, vectors = scipy.linalg.eigh(gram, check_finite=False)
    if values[0] > np.sqrt(eps) * values[-1]:
        return vectors.astype(Z.dtype) if few else Z @ (vectors / np.sqrt(values)).astype(Z.dtype)
    U, sizes, _ = scipy.linalg.svd(Z, full_matrices=False, check_finite=False)
    return U[:, sizes > eps**0.75 * sizes[0]]
