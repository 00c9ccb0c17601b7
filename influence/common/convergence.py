"""How the library says that a number is not what was asked for."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

_LIBRARY = str(Path(__file__).parents[1])


class ConvergenceWarning(UserWarning):
    """An iteration missed its tolerance; the message gives the value reached and the remedy."""


class DivergenceError(ArithmeticError):
    """No number can be returned: the system is singular or indefinite, or the iteration blew up."""


def warn_unconverged(message: str) -> None:
    """Give a ConvergenceWarning at the line that called into the library, not inside it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARY):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, ConvergenceWarning, stacklevel=level)
