"""The minimum of a convex quadratic over the unit box, to rounding error.

    min a'Ga / 2 - b'a        over 0 <= a_i <= 1

At the minimum the slope (Ga - b)_i is zero if 0 < a_i < 1, not negative if a_i = 0, and not
positive if a_i = 1.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.optimize
from numpy.typing import NDArray

from influence.common.numbers import numbers

# The ridge, a multiple of I, is added to G. It makes a singular G positive definite. The ridge is
# the largest diagonal entry of G times this factor.
_RIDGE = 1e-8
# This many steps of iterative refinement are taken. Each step reduces the ridge's effect by several
# digits.
_REFINEMENTS = 4


def boxed_minimum(G: NDArray, b: NDArray, start: NDArray) -> NDArray:
    """Minimise a'Ga / 2 - b'a over a in [0, 1]^k.

    With G + ridge I = L L' the problem becomes min |L'a - L^-1 (b + ridge start)|^2 over the box.
    The ridge pulls the solution towards `start`, not towards zero. SciPy solves this problem by
    bounded-variable least squares (Stark & Parker 1995). Iterative refinement with G, on the
    entries inside the box, then removes the effect of the ridge.

    If G is singular, it may not determine all entries of the minimum. The entries that it does not
    determine still depend on the ridge. Repeated calls then converge to a minimum, if the `start`
    of each call is the result of the call before.

    Args:
      G: (k, k) symmetric positive semi-definite, with a positive diagonal entry; float64.
      b: (k,) coefficients of the linear term.
      start: (k,) a point in the box.

    Returns: (k,) the minimum.
    Raises: ValueError for other shapes, a `start` outside the box, or a G whose diagonal has no
      positive entry; numpy.linalg.LinAlgError for a G with a negative eigenvalue.
    """
    G, b, start = numbers(G, "G"), numbers(b, "b"), numbers(start, "start")
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
    # An entry that the mask puts at a bound may differ from the bound in its last digit.
    a = np.select([found.active_mask < 0, found.active_mask > 0], [0.0, 1.0], found.x)
    inside = np.flatnonzero(found.active_mask == 0)
    if len(inside):
        factor = scipy.linalg.cho_factor(definite[np.ix_(inside, inside)])
        for _ in range(_REFINEMENTS):
            a[inside] += scipy.linalg.cho_solve(factor, (b - G @ a)[inside])
    return np.clip(a, 0, 1)
