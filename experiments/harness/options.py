"""Checks of a Config before any long work. Some checks compare an option with the data.

Every check raises a Misuse whose message begins with the option's name.
"""

from collections.abc import Sized
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.harness.running import Misuse


def at_least(config: Any, least: float, *names: str) -> None:
    """Raise Misuse if an option, or an entry of a tuple, is below `least`.

    Args:
      config: an experiment's Config.
      least: the smallest allowed value.
      names: names of the Config's fields to check.

    Raises: Misuse. An empty tuple also raises it.
    """
    for name in names:
        if not all(entry >= least for entry in _entries(config, name)):
            raise Misuse(f"{name} must be at least {least:.3g}, got {getattr(config, name)}.")


def positive(config: Any, *names: str) -> None:
    """Raise Misuse if an option, or an entry of a tuple, is infinite or not above zero.

    Args:
      config: an experiment's Config.
      names: names of the Config's fields to check.

    Raises: Misuse. An empty tuple also raises it.
    """
    for name in names:
        if not all(0 < entry < np.inf for entry in _entries(config, name)):
            raise Misuse(f"{name} must be positive, got {getattr(config, name)}.")


def increasing(config: Any, *names: str) -> None:
    """Raise Misuse if a tuple is empty, does not increase, or begins below 1.

    Args:
      config: an experiment's Config.
      names: names of the Config's fields to check.
    """
    for name in names:
        values = getattr(config, name)
        if not values or min(values) < 1 or list(values) != sorted(set(values)):
            raise Misuse(f"{name} must be increasing numbers from 1, got {values}.")


def at_most(config: Any, most: int, what: str, *names: str) -> None:
    """Raise Misuse if an option, or an entry of a tuple, is larger than `most`.

    Args:
      config: an experiment's Config.
      most: the largest allowed value: the number of rows or other objects in the data.
      what: the name of these objects, for the message.
      names: names of the Config's fields to check.
    """
    for name in names:
        value = getattr(config, name)
        if np.max(value) > most:
            raise Misuse(f"{name} must be at most {most}, the {what}, got {value}.")


def rows_of(config: Any, rows: Sized, what: str, *names: str) -> None:
    """Raise Misuse if an option, or an entry of a tuple, is not a row number of `rows`.

    Args:
      config: an experiment's Config.
      rows: a sized object with one entry per row.
      what: the name of the rows, for the message.
      names: names of the Config's fields to check.
    """
    for name in names:
        value = getattr(config, name)
        if np.min(value) < 0 or np.max(value) >= len(rows):
            raise Misuse(f"{name} must lie in [0, {len(rows)}), the {what}, got {value}.")


def one_of(config: Any, rows: NDArray[np.int64], what: str, name: str) -> None:
    """Raise Misuse if an option is not one of the allowed rows.

    Args:
      config: an experiment's Config.
      rows: the allowed row numbers.
      what: the name of an allowed row, for the message.
      name: name of the Config's field to check.
    """
    value = getattr(config, name)
    if value not in rows:
        raise Misuse(f"{name} must be {what}, such as {rows[0]}, got {value}.")


def _entries(config: Any, name: str) -> tuple:
    value = getattr(config, name)
    if value == ():
        raise Misuse(f"{name} must hold at least one number, got none.")
    return value if isinstance(value, tuple) else (value,)
