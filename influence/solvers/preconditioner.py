"""Preconditioners of CG: approximate inverses that are fixed, linear and positive definite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from influence.common.numbers import numbers
from influence.solvers.base import Prepared, prepare, unusual_exponent


def check_preconditioner(preconditioner: Any) -> None:
    """Raise TypeError if an object cannot be a preconditioner, before any work.

    Args:
      preconditioner: None, a solver, the result of `prepare`, a (d, d) array or a LinearOperator.

    Raises: TypeError, with the reason, for a solver that is not a fixed symmetric linear map;
      TypeError for any other kind of object.
    """
    if preconditioner is None:
        return
    solver = getattr(preconditioner, "solver", preconditioner)  # unwrap a prepared solver
    if hasattr(solver, "prepare") and not isinstance(solver, type):
        reason = getattr(solver, "unfit_as_preconditioner", "")
        if reason:
            raise TypeError(
                f"preconditioner must be fixed, linear and positive definite, got {solver!r}: "
                f"{reason}; use Nystrom, Lanczos, EKFAC or Direct."
            )
        return
    sparse = scipy.sparse.issparse(solver)
    if sparse or isinstance(solver, np.ndarray):
        numbers(solver.data if sparse else solver, "preconditioner")
    elif not isinstance(solver, LinearOperator):
        solver = None
    if getattr(solver, "ndim", 0) != 2:
        raise TypeError(
            "preconditioner must be a solver such as Nystrom(100), what prepare returned, or a "
            f"(d, d) array or LinearOperator that approximates the inverse, got "
            f"{preconditioner!r}."
        )


def inverse_of(preconditioner: Any, A: LinearOperator) -> Callable[[NDArray], NDArray]:
    """Return a function that multiplies (d, m) by the approximate inverse. Test it once.

    Args:
      preconditioner: as in `check_preconditioner`. A solver that was prepared for another matrix of
        A's shape is accepted. It is often a good preconditioner for A.
      A: symmetric (d, d).

    Raises: ValueError if the preconditioner has another shape than A, or if the test shows that it
      is not positive definite.
    """
    if preconditioner is None:
        return lambda R: R
    probe = np.random.default_rng(0).standard_normal((A.shape[0], 1))
    probe = probe.astype(np.result_type(A.dtype, np.float32))
    if isinstance(preconditioner, Prepared) or hasattr(preconditioner, "prepare"):
        given = isinstance(preconditioner, Prepared)
        prepared = preconditioner if given else prepare(A, preconditioner)
        _check_shape(prepared.A.shape, A.shape)
        raw = prepared.apply(probe)
        met = np.asarray(raw.min_curvature, float)
        curvature = float(np.min(met, initial=np.inf, where=~np.isnan(met)))
        tried, name = raw.x, repr(prepared.solver)
        inverse = lambda R: prepared.apply(R).x  # noqa: E731
    else:
        operator = aslinearoperator(preconditioner)
        _check_shape(operator.shape, A.shape)
        inverse = lambda R: operator @ R  # noqa: E731
        tried, curvature, name = inverse(probe), np.inf, type(preconditioner).__name__
    along = float(np.sum(probe * tried))
    if not (curvature > 0 and along > 0):
        seen = f"a curvature of {curvature:.3g}" if curvature <= 0 else f"v'Mv = {along:.3g}"
        raise ValueError(
            f"preconditioner must be positive definite, got {seen} from {name}; damp the matrix "
            "that it is prepared for, or prepare it for GaussNewton."
        )
    # CG does not change if its preconditioner is multiplied by a number. So the inverse of a matrix
    # with very small or very large entries is rescaled. Squares of its products then neither
    # overflow nor underflow.
    exponent = unusual_exponent(tried)
    return (lambda R: np.ldexp(inverse(R), -exponent)) if exponent else inverse


def _check_shape(shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise ValueError(f"preconditioner must have the shape of A, {wanted}, got {shape}.")
