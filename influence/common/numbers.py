"""Checks of numeric arguments, and arithmetic on the columns of matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Squares of numbers from 2**-500 to 2**500 neither overflow nor underflow in float64.
_SQUARES = 500


def numbers(value: Any, name: str) -> NDArray:
    """Return the value as a dense array of numbers. A numeric array is returned unchanged.

    Raises: TypeError for a value that is not numeric. The message contains `name`, the name of the
      argument. For a data frame it also lists the non-numeric columns.
    """
    refuse_mask(value, name)
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value)
    except ValueError as error:  # NumPy's own message only mentions an inhomogeneous shape
        raise TypeError(
            f"{name} must be an array of numbers, got rows of unlike shapes."
        ) from error
    if array.dtype.kind in "biuf":
        return array
    got = f"dtype {array.dtype}"
    if array.dtype.kind == "c":
        got += "; use .real if the imaginary parts mean nothing"
    # Data frames and series are recognised by attributes, so pandas need not be installed.
    columns = list(getattr(value, "columns", ()))
    dtypes = list(getattr(value, "dtypes", ())) if columns else []
    wrong = [
        c for c, t in zip(columns, dtypes, strict=False) if getattr(t, "kind", "O") not in "biuf"
    ]
    if wrong:
        got = f"{', '.join(map(repr, wrong))} among its columns; leave them out or encode them"
    elif getattr(getattr(value, "dtype", None), "kind", "O") in "biuf" or columns:
        got += "; use .to_numpy('float32') for x, .to_numpy('int64') for class numbers"
    elif array.dtype.kind in "SUT" or (array.size and isinstance(array.flat[0], str | bytes)):
        got += (
            " of strings; use np.unique(y, return_inverse=True)[1]"
            if name == "y"
            else " of strings; apply the layer that looks them up first (TextVectorization, "
            "StringLookup) and give its ids to a model without it"
        )
    raise TypeError(f"{name} must be an array of numbers, got {got}.")


def refuse_mask(value: Any, name: str) -> None:
    """Refuse a masked array, because NumPy's functions would use the numbers under the mask.

    Raises: TypeError for a masked array. The message contains `name`, the name of the argument.
    """
    if np.ma.isMaskedArray(value):
        raise TypeError(
            f"{name} must be an array without a mask, got a masked one; fill the masked entries by "
            ".filled(value), or drop their rows."
        )


def is_integer(value: Any, least: int) -> bool:
    """Return True if the value is an integer >= `least`. Booleans do not count as integers."""
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return integer and bool(value >= least)


def dots(U: NDArray, V: NDArray) -> NDArray:
    """Return the scalar product of column j of U and column j of V, both (d, m), for all j."""
    return np.einsum("ij,ij->j", U, V)


def scaled(V: NDArray, usual: int = 0) -> tuple[NDArray, NDArray]:
    """Divide every column by a power of two, to bring its largest absolute entry into [1/2, 1).

    The division is exact. Norms and products of the scaled columns neither overflow nor underflow.

    Args:
      V: (d, m) finite numbers.
      usual: if the exponents of all columns lie in [-usual, usual], V is returned unchanged.

    Returns: the scaled columns (d, m), and the exponents of the powers of two (m,). An unscaled
      column has exponent 0.
    """
    largest = np.maximum(V.max(axis=0, initial=0), -V.min(axis=0, initial=0)).astype(np.float64)
    exponents = np.where(largest > 0, np.frexp(largest)[1], 0)
    if not V.size or np.abs(exponents).max() <= usual:
        return V, np.zeros_like(exponents)
    half = exponents // 2  # two divisions, because 2**exponent may be out of range
    return np.ldexp(np.ldexp(V, -half), half - exponents), exponents


def norms(V: NDArray) -> NDArray:
    """Return the Euclidean norm of every column of V (d, m), in float64, without overflow."""
    columns, exponents = scaled(V, _SQUARES)
    sizes = np.linalg.norm(columns.astype(np.float64, copy=False), axis=0)
    return np.ldexp(sizes, exponents)
