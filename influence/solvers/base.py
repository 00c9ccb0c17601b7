"""Interface and results of the solvers of A x = b, such as A = H + damping I for a Hessian H."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import scipy.sparse
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from influence.common.convergence import DivergenceError
from influence.common.memory import check_fits
from influence.common.numbers import is_integer, norms, numbers, scaled


@dataclass(frozen=True, eq=False)
class Solution:
    """Solution x of A x = b for m right-hand sides b, with its residuals.

    Attributes:
      x: (d,) or (d, m), the shape of the right-hand sides.
      residual: (m,) true relative residuals |b - A x| / |b|, recomputed from A at the end. `Direct`
        recomputes them for a few columns of a block and estimates the others.
      iterations: (m,) number of iterations of each column.
      converged: (m,) True if the column's residual is within the solver's tolerance.
      min_curvature: (m,) smallest curvature v'Av / v'v that the solver found. NaN if the solver
        computes no curvature. A negative value proves that A is not positive definite.
      residual_norm: (m,) absolute residuals |b - A x|.
      eigenvalue_bound: lower bound on |eigenvalue| over all eigenvalues of A. The model or the
        solver supplies it. It is NaN if unknown.
      remedy: advice to the user if a column did not converge, else an empty string.
    """

    x: NDArray
    residual: NDArray
    iterations: NDArray
    converged: NDArray
    min_curvature: NDArray
    residual_norm: NDArray
    eigenvalue_bound: float = np.nan
    remedy: str = ""

    def score_error_bound(self, gradients: ArrayLike) -> NDArray:
        """Bound the error of each score g . x that the solver's residual causes.

        |g . (A^-1 b - x)| = |(A^-1 g) . (b - A x)| <= |g| |b - A x| / min_j |eigenvalue_j of A|.
        The bound holds in exact arithmetic. It includes neither the rounding of the products nor
        the error of influence functions themselves. If `Direct` estimated the residual of a
        column, the bound of that column is an estimate too.

        Args:
          gradients: (k, d) vectors g.

        Returns: (k, m) bounds, in the unit of g . x; NaN if `eigenvalue_bound` is NaN.
        Raises: ValueError if `gradients` has another shape.
        """
        G = numbers(gradients, "gradients")
        if G.ndim != 2 or G.shape[1] != len(self.x):
            raise ValueError(f"gradients must have shape (k, {len(self.x)}), got {G.shape}.")
        return np.outer(np.linalg.norm(G, axis=1), self.residual_norm) / self.eigenvalue_bound


@dataclass(frozen=True)
class Raw:
    """An algorithm's result for m right-hand sides. `Prepared` turns it into a `Solution`.

    Attributes:
      x: (d, m) solutions.
      iterations: the numbers of iterations (m,) of the columns, or one number for all columns.
      min_curvature: as in `Solution`, or one number for all columns.
      remedy: as in `Solution`.
      residual: function that returns the (m,) relative residuals. If it is None, `Prepared`
        computes them.
      eigenvalue_bound: as in `Solution`; NaN if the solver found none.
    """

    x: NDArray
    iterations: Any = 0
    min_curvature: Any = np.nan
    remedy: str = ""
    residual: Callable[[], NDArray] | None = None
    eigenvalue_bound: float = np.nan

    def from_units(self, exponent: int) -> Raw:
        """Convert the result for A / 2 ** exponent to the result for A."""
        return replace(
            self,
            x=np.ldexp(self.x, -exponent),
            min_curvature=np.ldexp(self.min_curvature, exponent),
            remedy=self.remedy + _units(exponent),
            eigenvalue_bound=float(np.ldexp(self.eigenvalue_bound, exponent)),
        )


class Solver(Protocol):
    """A frozen dataclass of hyperparameters with the method `prepare`.

    A solver's class may have these attributes:

      exact: ClassVar[bool]: True if the answer is exact up to rounding at any rtol.
      answers_indefinite: ClassVar[bool]: True if the solver also solves indefinite systems.
      unfit_as_preconditioner: ClassVar[str]: the reason why CG cannot use the solver as its
        preconditioner.
    """

    @property
    def rtol(self) -> float | None:
        """The largest true relative residual at which a column counts as converged.

        None means no tolerance. The residual is then reported, `converged` is False, and no
        warning is given.
        """
        ...

    def prepare(self, A: LinearOperator) -> Callable[[NDArray], Raw]:
        """Do the work that all right-hand sides share.

        Returns: a function that solves for right-hand sides (d, m) and returns a `Raw`.
        """
        ...


@dataclass(frozen=True)
class LowRank:
    """Base class of solvers that approximate A by U diag(values) U' + floor (I - U U').

    U (d, rank) has orthonormal columns.
    """

    rank: int
    seed: int = 0
    rtol: float | None = None

    def __post_init__(self):
        check_integer("rank", self.rank, 1)
        check_integer("seed", self.seed, 0)
        check_rtol(self.rtol, optional=True)

    def _check_memory(self, d: int, vectors: int, dtype: np.dtype) -> None:
        """Raise ValueError if this machine's memory cannot hold `vectors` vectors (d,)."""
        name = type(self).__name__
        check_fits(
            float(vectors) * d * dtype.itemsize,
            f"rank must be small enough for {name} of a matrix with d = {d:,}",
            f"use a rank below {self.rank}, or EKFAC, or fewer weights in theta",
        )

    def _inverse(
        self, U: NDArray, values: NDArray, floor: NDArray, curvature: float, bound: float = np.nan
    ) -> Callable[[NDArray], Raw]:
        """Return a function that multiplies (d, m) by the inverse of the approximation.

        `values` is (rank, 1). `curvature` and `bound` are reported with each result.
        """
        (d, rank), name = U.shape, type(self).__name__
        remedy = (
            f"{name} of rank {rank} leaves out too much of A: use a larger rank, more damping, or "
            f"let CG do the rest, CG(preconditioner={name}({rank}))."
        )

        def apply(B: NDArray) -> Raw:
            C = U.T @ B
            X = U @ (C / values)
            if rank < d:
                X += (B - U @ C) / floor
            return Raw(X, 1, curvature, remedy, eigenvalue_bound=bound)

        return apply


def is_exact(solver: Any) -> bool:
    """Return the attribute `exact` of a solver or prepared solver, or False if it is missing."""
    return bool(getattr(getattr(solver, "solver", solver), "exact", False))


def answers_indefinite(solver: Any) -> bool:
    """Return `answers_indefinite` of a solver or prepared solver, or False if it is missing."""
    return bool(getattr(getattr(solver, "solver", solver), "answers_indefinite", False))


@dataclass(frozen=True, eq=False)
class Prepared:
    """A solver prepared for one matrix. It solves for any number of right-hand sides.

    Attributes:
      A: the matrix.
      solver: the solver's hyperparameters.
      apply: a function that solves systems with A / 2 ** exponent. It takes right-hand sides (d, m)
        and returns a `Raw`.
      exponent: 0, unless the entries of A are very large or very small.
    """

    A: LinearOperator
    solver: Solver
    apply: Callable[[NDArray], Raw]
    exponent: int = 0

    def __repr__(self) -> str:
        """Name the matrix and the solver. The text is the same in every process."""
        return f"prepare({self.A!r}, {self.solver!r})"

    def __call__(self, B: ArrayLike, *, measure: bool = True) -> Solution:
        """Solve for a vector B (d,) or a block B (d, m).

        If B has very large or very small columns, each column is first divided by a power of two.
        This avoids overflow and underflow.

        Args:
          B: the right-hand sides.
          measure: if False and the solver's rtol is None, the residuals are NaN. This saves
            products with A.

        Raises: TypeError if B is not an array of real numbers; ValueError if B has a wrong shape or
          a NaN, or if A's dtype cannot hold the solution; DivergenceError if A's products are not
          finite; RuntimeError if the net's theta has changed since A was made.
        """
        if hasattr(self.A, "check_theta"):  # A stored factor would still be that of the old theta.
            self.A.check_theta()  # pyright: ignore[reportAttributeAccessIssue]
        b = numbers(B, "B")
        if b.ndim not in (1, 2) or b.shape[0] != self.A.shape[0] or 0 in b.shape:
            raise ValueError(
                f"B must have shape ({self.A.shape[0]},) or ({self.A.shape[0]}, m), got {b.shape}."
            )
        if not np.isfinite(b).all():
            raise ValueError("B must be finite, got a NaN or infinity.")
        dtype = np.result_type(self.A.dtype, np.float32)
        columns = b.reshape(b.shape[0], -1)
        wide = np.result_type(columns.dtype, dtype)
        block, exponents = scaled(columns.astype(wide, copy=False), _usual(dtype))
        block = block.astype(dtype, copy=False)
        A = in_units(self.A, self.exponent)
        with said_in_units(self.exponent):
            raw = self.apply(block)
        m = block.shape[1]
        measured = measure or self.solver.rtol is not None
        if not measured:
            residual = np.full(m, np.nan)
        else:
            residual = raw.residual() if raw.residual else relative_residual(A, raw.x, block)
        known = getattr(self.A, "smallest_eigenvalue_bound", np.nan)
        found = np.ldexp(raw.eigenvalue_bound, self.exponent)
        bounds = [bound for bound in (known, found) if bound > 0]
        if not np.isfinite(raw.x).all() or (measured and np.isnan(residual).any()):
            raise not_finite(self.A, type(self.solver).__name__)
        with np.errstate(over="ignore"):
            back = exponents - self.exponent
            x = np.ldexp(raw.x, back) if back.any() else raw.x
        if not np.isfinite(x).all():
            raise ValueError(
                f"B must have a solution within {dtype}, got entries up to "
                f"{np.abs(columns).max():.1e}{_units(self.exponent)}; use float64, or smaller "
                "numbers."
            )
        curvature = np.ldexp(np.asarray(raw.min_curvature, float), self.exponent)
        curvature = np.broadcast_to(curvature, m).copy()
        iterations = np.broadcast_to(np.asarray(raw.iterations), m).copy()
        rtol = self.solver.rtol
        good = residual <= rtol if rtol is not None else np.zeros(m, bool)
        return Solution(
            x=x.reshape(b.shape),
            residual=residual,
            iterations=iterations,
            converged=good,
            min_curvature=curvature,
            residual_norm=np.ldexp(residual * norms(block), exponents),
            eigenvalue_bound=float(max(bounds, default=np.nan)),
            remedy="" if good.all() else raw.remedy + _units(self.exponent),
        )


def prepare(A: Any, solver: Solver | Prepared) -> Prepared:
    """Prepare a solver for a matrix. A prepared solver is returned unchanged.

    Args:
      A: a symmetric (d, d) array or LinearOperator.
      solver: a solver, for example `CG(rtol=1e-8)`, or the result of an earlier call.

    Raises: ValueError if A is not square, or if it is an array that has a NaN or is not symmetric;
      ValueError if the solver was prepared for another matrix; TypeError if `solver` is no solver.
    """
    if isinstance(solver, Prepared):
        if not _same_matrix(solver.A, A):
            raise ValueError(
                f"solver must be prepared for this matrix, got one prepared for {solver.A!r}, not "
                f"{A!r}: the net, training set, theta and damping must be the same."
            )
        return solver
    check_solver(solver)
    operator = as_symmetric(A)
    exponent = _exponent(operator)
    with said_in_units(exponent):
        return Prepared(operator, solver, solver.prepare(in_units(operator, exponent)), exponent)


def solve(A: Any, B: ArrayLike, solver: Solver | Prepared) -> Solution:
    """Solve A X = B for all right-hand sides together.

    Args:
      A: a symmetric (d, d) array or LinearOperator, such as `Hessian(net, train, damping)`.
      B: one right-hand side (d,), or m right-hand sides (d, m).
      solver: `Direct()`, `CG()`, `LiSSA()`, `Lanczos(rank)`, `Nystrom(rank)`, `EKFAC()`, or the
        result of `prepare`.

    Returns: Solution. A column that did not converge raises no error; its `converged` is False.
    Raises: ValueError for wrong shapes or values; DivergenceError if no solution can be computed.
    """
    return prepare(A, solver)(B)


def _exponent(A: LinearOperator) -> int:
    """Return the exponent of the power of two by which A is divided.

    It is 0 for an operator that stores no array, because the size of its entries is unknown. A
    solver that needs an exponent then takes it from its first product.
    """
    held = getattr(A, "A", None)
    return 0 if held is None or hasattr(A, "same_as") else unusual_exponent(held)


def unusual_exponent(values: Any) -> int:
    """Return the binary exponent of an array's largest |entry|, or 0 if no rescaling is needed."""
    largest = float(abs(values).max())
    exponent = int(np.frexp(largest)[1]) if 0 < largest < np.inf else 0
    return exponent if abs(exponent) > _usual(values.dtype) else 0


def _usual(dtype: Any) -> int:
    """Return the largest |binary exponent| of numbers of a dtype that need no rescaling."""
    return 30 if np.result_type(dtype, np.float32) == np.float32 else 250


def in_units(A: LinearOperator, exponent: int) -> LinearOperator:
    """Return A / 2 ** exponent. Division by a power of two causes no rounding error."""
    return A if exponent == 0 else _Scaled(A, exponent)


class _Scaled(LinearOperator):
    """An operator divided by 2 ** exponent.

    To avoid overflow, half of the exponent is applied before the product and half after it.
    """

    def __init__(self, A: LinearOperator, exponent: int):
        self._whole, self.exponent = A, exponent
        super().__init__(np.result_type(A.dtype, np.float32), A.shape)

    def _matmat(self, V: NDArray) -> NDArray:
        half = self.exponent // 2
        products = self._whole @ np.ldexp(np.asarray(V, self.dtype), -half)
        return np.ldexp(products, half - self.exponent)

    def _adjoint(self) -> LinearOperator:
        return self


@contextmanager
def said_in_units(exponent: int) -> Iterator[None]:
    """Context manager that adds the unit 2 ** exponent to the message of a DivergenceError."""
    try:
        yield
    except DivergenceError as error:
        raise DivergenceError(f"{error}{_units(exponent)}") from error.__cause__


def _units(exponent: int) -> str:
    return f" (A's numbers are in units of 2**{exponent}.)" if exponent else ""


def enough_damping(A: Any, smallest: float) -> str:
    """Format the total damping of A at which the eigenvalue `smallest` becomes 0."""
    present = getattr(A, "damping", 0.0)
    more = f" ({-smallest:.3g} more than now)" if present else ""
    return f"{present - smallest:.3g}{more}"


def if_indefinite(A: Any, smallest: float) -> str:
    """Format the remedy for a matrix in which a solver met the negative curvature `smallest`."""
    return (
        f"and there may be worse; use a damping well above {enough_damping(A, smallest)}, or "
        "GaussNewton, or Direct, which answers for indefinite matrices."
    )


def _same_matrix(A: Any, B: Any) -> bool:
    """Return True if A and B are known to be the same matrix."""
    if A is B:
        return True
    if hasattr(A, "same_as"):  # A is a Curvature.
        return A.same_as(B)
    held = getattr(A, "A", None)  # aslinearoperator stores an array as A.
    return held is not None and (
        held is B or (isinstance(B, np.ndarray) and np.array_equal(held, B))
    )


def as_symmetric(A: Any) -> LinearOperator:
    """Convert A to a LinearOperator. An array is checked first. The operator stores it as `A`."""
    if isinstance(A, LinearOperator):
        if A.shape[0] != A.shape[1]:
            raise ValueError(f"A must be square, got shape {A.shape}.")
        return A
    sparse = scipy.sparse.issparse(A)
    values = numbers(A.data if sparse else A, "A")
    matrix: Any = A if sparse else values
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"A must be square, got shape {matrix.shape}.")
    if not np.isfinite(values).all():
        raise ValueError("A must be finite, got a NaN or infinity.")
    if sparse:
        matrix = A.tocsr().astype(np.result_type(A.dtype, np.float32))
    elif matrix.dtype.kind == "b":
        matrix = matrix.astype(float)
    gap = abs(matrix - matrix.T).max()
    if gap > 1e-5 * abs(matrix).max():
        raise ValueError(
            f"A must be symmetric, got entries that differ from their mirror image by {gap:.1e}."
        )
    return aslinearoperator(matrix)


def relative_residual(A: LinearOperator, X: NDArray, B: NDArray) -> NDArray:
    """Compute |b - A x| / |b| for each column, or 0 if both norms are zero."""
    return relative_norm(B - A @ X, B)


def relative_norm(R: NDArray, B: NDArray) -> NDArray:
    """Compute |r| / |b| for each column, or 0 if both norms are zero."""
    return relative_size(np.linalg.norm(R, axis=0), B)


def relative_size(norms: NDArray, B: NDArray) -> NDArray:
    """Compute |r| / |b| for each column b of B, from the norms |r| (m,)."""
    size, zero = np.linalg.norm(B, axis=0), np.where(norms > 0, np.inf, 0.0)
    return np.divide(norms, size, out=zero, where=size > 0)


def finite_products(A: LinearOperator, V: NDArray, name: str) -> NDArray:
    """Return A V. Raise DivergenceError with the solver's `name` if A V is not finite."""
    products = A @ V
    if not np.isfinite(products).all():
        raise not_finite(A, name)
    return products


def not_finite(A: LinearOperator, name: str) -> DivergenceError:
    """Make the error for an operator whose products are not finite."""
    return DivergenceError(
        f"A must have finite products, got NaN or infinity from {type(A).__name__} in {name}; "
        "look for infinite losses at theta, or use float64."
    )


def check_solver(solver: Any) -> None:
    """Raise TypeError if an object is not a solver."""
    if not hasattr(solver, "prepare") or isinstance(solver, type):
        raise TypeError(f"solver must be a solver such as CG() or Direct(), got {solver!r}.")


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise ValueError if a hyperparameter is not an integer of at least `least`."""
    if not is_integer(value, least):
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")


def check_rtol(rtol: Any, *, optional: bool = False) -> None:
    """Raise ValueError if a tolerance is not a finite number of at least 0."""
    if optional and rtol is None:
        return
    number = isinstance(rtol, int | float | np.number) and not isinstance(rtol, bool)
    if not (number and rtol >= 0):
        none = " or None" if optional else ""
        raise ValueError(f"rtol must be non-negative{none}, got {rtol!r}.")
    if rtol == np.inf:
        raise ValueError("rtol must be finite, got inf: x = 0 has a relative residual of 1.")
