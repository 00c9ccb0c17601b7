"""Warnings and errors about results that missed the requested accuracy."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

_LIBRARY = str(Path(__file__).parents[1])


class ConvergenceWarning(UserWarning):
    """Warning that an iteration missed its tolerance; it gives the value reached and the remedy."""


class DivergenceError(ArithmeticError):
    """Error if no number can be returned: a singular or indefinite system, or a divergence."""


def warn_unconverged(message: str) -> None:
    """Issue a ConvergenceWarning at the user's line that called the library."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARY):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, ConvergenceWarning, stacklevel=level)
