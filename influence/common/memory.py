"""Budgets in bytes that limit the memory of the library's working arrays.

A budget decides how many rows or vectors are processed together. A budget never changes a result
beyond rounding.
"""

from __future__ import annotations

import os

import numpy as np

# The activations of one batch, and the derivatives of its losses, may take this many bytes.
ACTIVATIONS = 1 << 30
# One block of vectors of theta's length, such as the right-hand sides of linear systems, may take
# this many bytes.
VECTORS = 1 << 28
# A set of examples caches results of one net at one theta and batch size. The cache stops growing
# beyond this many bytes.
CACHE = 1 << 28
# The features that a frozen trunk computes from one set of rows may take this many bytes in memory.
# Larger features are stored in a temporary file on disk.
FEATURES = 1 << 30


def of_machine() -> int | None:
    """Return this machine's memory in bytes, or None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def check_fits(needed: float, what: str, remedy: str) -> None:
    """Raise ValueError before work that needs more memory than this machine has.

    Args:
      needed: the largest number of bytes that the work holds at one time.
      what: the start of the error message. It names the argument and its condition, such as "rank
        must be small enough".
      remedy: the end of the error message. It says what the user can do instead.

    Raises: ValueError if `needed` exceeds the machine's memory. The message gives both sizes.
    """
    there = of_machine()
    if there is not None and needed > there:
        raise ValueError(
            f"{what}, got one that takes {needed / 1e9:,.0f} GB of this machine's "
            f"{there / 1e9:,.0f}; {remedy}."
        )


def fitting(budget: float, bytes_each: float, at_most: int) -> int:
    """Return how many items of `bytes_each` bytes fit into `budget`, from 1 to `at_most`."""
    return int(np.clip(budget // max(bytes_each, 1), 1, at_most))
