"""A convex quadratic's minimum over the unit box, to the last digits."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.optimize
from numpy.typing import NDArray

_RIDGE = 1e-13  # of the largest diagonal entry: enough for a Cholesky factor of a singular G


def boxed_minimum(G: NDArray, b: NDArray, start: NDArray) -> NDArray:
    """The a in [0, 1]^k that minimises a'Ga / 2 - b'a.

    Bounded least squares in the Cholesky factor of G, then a Newton step on the entries inside the
    box. A ridge that makes a singular G definite pulls towards `start`, not towards zero, and the
    Newton step takes its effect out again wherever G determines a.

    Args:
      G: (k, k) symmetric positive semi-definite.
      b: (k,).
      start: (k,) in the box.

    Returns: (k,), no worse than `start`.
    """
    ridge = _RIDGE * G.diagonal().max() + np.finfo(float).tiny
    definite = G + ridge * np.eye(len(G))
    L = np.linalg.cholesky(definite)
    target = scipy.linalg.solve_triangular(L, b + ridge * start, lower=True)
    a = scipy.optimize.lsq_linear(L.T, target, (0, 1), method="bvls", tol=1e-15).x
    inside = np.flatnonzero((a > 0) & (a < 1))
    if len(inside):
        block = definite[np.ix_(inside, inside)]
        a[inside] += scipy.linalg.solve(block, (b - G @ a)[inside], assume_a="pos")
    return np.clip(a, 0, 1)
