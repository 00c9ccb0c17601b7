"""A convex quadratic's minimum over the unit box, to the last digits."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.optimize
from numpy.typing import NDArray

_RIDGE = 1e-8  # of the largest diagonal entry: enough for a good Cholesky factor of a singular G
_REFINEMENTS = 4


def boxed_minimum(G: NDArray, b: NDArray, start: NDArray) -> NDArray:
    """The a in [0, 1]^k that minimises a'Ga / 2 - b'a.

    Bounded least squares in the Cholesky factor of G + ridge I, with the ridge pulling towards
    `start`, not towards zero; then iterative refinement on the entries inside the box takes the
    ridge's effect out again wherever G determines them. Where it does not, G being singular, to
    call again with the last answer as `start` converges to a minimum.

    Args:
      G: (k, k) symmetric positive semi-definite, not zero.
      b: (k,).
      start: (k,) in the box.

    Returns: (k,).
    """
    ridge = _RIDGE * G.diagonal().max()
    definite = G + ridge * np.eye(len(G))
    L = np.linalg.cholesky(definite)
    target = scipy.linalg.solve_triangular(L, b + ridge * start, lower=True)
    found = scipy.optimize.lsq_linear(
        L.T, target, (0, 1), method="bvls", tol=1e-15, max_iter=10 * len(b)
    )
    # What is at a bound by its mask need not be there to the last digit.
    a = np.select([found.active_mask < 0, found.active_mask > 0], [0.0, 1.0], found.x)
    inside = np.flatnonzero(found.active_mask == 0)
    if len(inside):
        factor = scipy.linalg.cho_factor(definite[np.ix_(inside, inside)])
        for _ in range(_REFINEMENTS):
            a[inside] += scipy.linalg.cho_solve(factor, (b - G @ a)[inside])
    return np.clip(a, 0, 1)
