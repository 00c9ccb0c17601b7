"""Byte budgets: how much memory the library's working arrays may take.

A budget decides how many rows or vectors are processed together. It never changes a result beyond
rounding.
"""

from __future__ import annotations

import numpy as np

# The activations of one batch, with all that a pass over it keeps for its derivatives.
ACTIVATIONS = 1 << 30
# One block of vectors of theta's length, such as right-hand sides or per-example gradients.
VECTORS = 1 << 28
# What a set of examples caches of one net at one theta, for all its batches together.
CACHE = 1 << 28


def fitting(budget: float, bytes_each: float, at_most: int) -> int:
    """Return how many items of `bytes_each` fit into `budget`: at least 1, at most `at_most`."""
    return int(np.clip(budget // max(bytes_each, 1), 1, at_most))
