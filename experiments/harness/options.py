"""Checks of a Config before any long work: by itself, then against the data.

Every check raises a Misuse that begins with the option's name.
"""

from collections.abc import Sized
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.harness.running import Misuse


def at_least(config: Any, least: float, *names: str) -> None:
    """Refuse an option, or an entry of a tuple, below `least`.

    Args:
      config: an experiment's Config.
      least: the smallest allowed value.
      names: names of its fields.

    Raises: Misuse; for an empty tuple too.
    """
    for name in names:
        if not all(entry >= least for entry in _entries(config, name)):
            raise Misuse(f"{name} must be at least {least:.3g}, got {getattr(config, name)}.")


def positive(config: Any, *names: str) -> None:
    """Refuse an option, or an entry of a tuple, that is infinite or not above zero.

    Args:
      config: an experiment's Config.
      names: names of its fields.

    Raises: Misuse; for an empty tuple too.
    """
    for name in names:
        if not all(0 < entry < np.inf for entry in _entries(config, name)):
            raise Misuse(f"{name} must be positive, got {getattr(config, name)}.")


def increasing(config: Any, *names: str) -> None:
    """Refuse a tuple that does not increase from 1 or above.

    Args:
      config: an experiment's Config.
      names: names of its fields.

    Raises: Misuse.
    """
    for name in names:
        values = getattr(config, name)
        if not values or min(values) < 1 or list(values) != sorted(set(values)):
            raise Misuse(f"{name} must be increasing numbers from 1, got {values}.")


def at_most(config: Any, most: int, what: str, *names: str) -> None:
    """Refuse an option, or an entry of a tuple, that exceeds a number of things.

    Args:
      config: an experiment's Config.
      most: the number of things.
      what: their name in the message.
      names: names of its fields.

    Raises: Misuse.
    """
    for name in names:
        value = getattr(config, name)
        if np.max(value) > most:
            raise Misuse(f"{name} must be at most {most}, the {what}, got {value}.")


def rows_of(config: Any, rows: Sized, what: str, *names: str) -> None:
    """Refuse an option, or an entry of a tuple, that is not a row number.

    Args:
      config: an experiment's Config.
      rows: the numbered rows.
      what: their name in the message.
      names: names of its fields.

    Raises: Misuse.
    """
    for name in names:
        value = getattr(config, name)
        if np.min(value) < 0 or np.max(value) >= len(rows):
            raise Misuse(f"{name} must lie in [0, {len(rows)}), the {what}, got {value}.")


def one_of(config: Any, rows: NDArray[np.int64], what: str, name: str) -> None:
    """Refuse an option that is not among some rows.

    Args:
      config: an experiment's Config.
      rows: the allowed rows.
      what: the name of such a row in the message.
      name: name of its field.

    Raises: Misuse.
    """
    value = getattr(config, name)
    if value not in rows:
        raise Misuse(f"{name} must be {what}, such as {rows[0]}, got {value}.")


def _entries(config: Any, name: str) -> tuple:
    value = getattr(config, name)
    if value == ():
        raise Misuse(f"{name} must hold at least one number, got none.")
    return value if isinstance(value, tuple) else (value,)
