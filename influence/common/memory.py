"""Byte budgets: limits on the memory of the library's working arrays.

A budget decides how many rows or vectors are processed together. It never changes a result beyond
rounding.
"""

from __future__ import annotations

import numpy as np

# This budget holds the activations of one batch and what a pass stores for its derivatives.
ACTIVATIONS = 1 << 30
# This budget holds one block of vectors of theta's length, such as right-hand sides.
VECTORS = 1 << 28
# This budget holds the cache of one net at one theta, over all batches of a set of examples.
CACHE = 1 << 28


def fitting(budget: float, bytes_each: float, at_most: int) -> int:
    """Return how many items of `bytes_each` fit into `budget`: at least 1, at most `at_most`."""
    return int(np.clip(budget // max(bytes_each, 1), 1, at_most))
