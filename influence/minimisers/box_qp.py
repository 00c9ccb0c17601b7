"""A convex quadratic's minimum over the unit box, to the last digits.

    min a'Ga / 2 - b'a        over 0 <= a_i <= 1

At the minimum the slope Ga - b is zero where a_i is inside, not negative where a_i = 0, and not
positive where a_i = 1.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.optimize
from numpy.typing import NDArray

# Added to the diagonal, relative to its largest entry: a singular G then has a Cholesky factor.
_RIDGE = 1e-8
# Steps of iterative refinement, each of which takes the ridge's effect down by several digits.
_REFINEMENTS = 4


def boxed_minimum(G: NDArray, b: NDArray, start: NDArray) -> NDArray:
    """Return the a in [0, 1]^k that minimises a'Ga / 2 - b'a.

    With G + ridge I = L L', the problem is bounded least squares, min |L'a - L^-1 (b + ridge
    start)|^2, in which the ridge pulls towards `start` and not towards zero. It is solved by
    bounded-variable least squares (Stark & Parker 1995, as SciPy has it). Iterative refinement with
    G itself on the entries inside the box then removes the ridge's effect wherever G determines
    them. Where it does not, G being singular, calls that begin with the last answer as `start`
    converge to a minimum.

    Args:
      G: (k, k) symmetric positive semi-definite, with a positive diagonal entry; float64.
      b: (k,).
      start: (k,) in the box.

    Returns: (k,).
    Raises: ValueError for other shapes, a `start` outside the box, or a G whose diagonal has no
      positive entry; numpy.linalg.LinAlgError for a G with a negative eigenvalue.
    """
    k = len(b)
    if G.shape != (k, k) or start.shape != (k,):
        raise ValueError(
            f"G and start must have shapes ({k}, {k}) and ({k},) for b of shape {b.shape}, got "
            f"{G.shape} and {start.shape}."
        )
    if not ((start >= 0) & (start <= 1)).all():
        raise ValueError(f"start must lie in [0, 1], got {start.min():.4g} to {start.max():.4g}.")
    ridge = _RIDGE * G.diagonal().max()
    if not ridge > 0:
        raise ValueError(
            f"G must have a positive diagonal entry, got {ridge / _RIDGE:.4g} at most."
        )
    definite = G + ridge * np.eye(k)
    L = np.linalg.cholesky(definite)
    target = scipy.linalg.solve_triangular(L, b + ridge * start, lower=True)
    found = scipy.optimize.lsq_linear(
        L.T, target, (0, 1), method="bvls", tol=1e-15, max_iter=10 * k
    )
    # An entry at a bound, as the mask says, may differ from it in its last digit.
    a = np.select([found.active_mask < 0, found.active_mask > 0], [0.0, 1.0], found.x)
    inside = np.flatnonzero(found.active_mask == 0)
    if len(inside):
        factor = scipy.linalg.cho_factor(definite[np.ix_(inside, inside)])
        for _ in range(_REFINEMENTS):
            a[inside] += scipy.linalg.cho_solve(factor, (b - G @ a)[inside])
    return np.clip(a, 0, 1)
