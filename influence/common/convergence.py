"""Warnings and errors for results that miss the requested accuracy."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

_LIBRARY = str(Path(__file__).parents[1])


class ConvergenceWarning(UserWarning):
    """Warning that an iteration missed its tolerance. The message suggests a remedy."""


class DivergenceError(ArithmeticError):
    """Error for a computation without a result, for example because a matrix is singular."""


def warn_unconverged(message: str) -> None:
    """Issue a ConvergenceWarning that points to the user's line that called the library."""
    warn_user(message, ConvergenceWarning)


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that points to the user's line that called the library."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARY):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
