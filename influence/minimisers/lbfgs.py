"""Full-batch minimisation by SciPy's L-BFGS (Liu & Nocedal 1989)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from influence.common.convergence import warn_unconverged
from influence.common.progress import counter

# Pairs of (step, change of gradient) that are stored.
_MEMORY = 20


def minimise(
    risk_and_gradient: Callable[[NDArray], tuple[float, NDArray]],
    theta: NDArray,
    gradient_tolerance: float,
    max_iterations: int,
) -> NDArray:
    """Minimise a risk from a start, deterministically.

    Args:
      risk_and_gradient: theta (d,) -> (risk, its gradient (d,)).
      theta: (d,) the start.
      gradient_tolerance: Euclidean norm of the gradient to stop at.
      max_iterations: the largest number of L-BFGS iterations.

    Returns: (d,) the last theta. Warns with ConvergenceWarning if its gradient is above tolerance.
    """

    def at(theta: NDArray) -> tuple[float, NDArray]:
        risk, gradient = risk_and_gradient(theta)
        bar.set_postfix_str(f"gradient norm {np.linalg.norm(gradient):.1e}", refresh=False)
        bar.update()
        return risk, gradient.astype(np.float64)

    with counter("fitting, data passes") as bar:
        found = scipy.optimize.minimize(
            at,
            theta.astype(np.float64),
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": max_iterations,
                "maxfun": 2 * max_iterations,
                "maxcor": _MEMORY,
                "ftol": 0.0,
                # SciPy's tolerance applies to the largest entry.
                "gtol": gradient_tolerance / np.sqrt(len(theta)),
            },
        )
    norm = float(np.linalg.norm(found.jac))
    if norm > gradient_tolerance:
        # If iterations are left, no step lowered the risk by more than its rounding.
        needed = "more iterations" if found.nit >= max_iterations else "float64"
        warn_unconverged(
            f"L-BFGS stopped at a gradient norm of {norm:.1e}, above {gradient_tolerance:.1e}, "
            f"after {found.nit} iterations; use {needed} or a larger gradient_tolerance."
        )
    return found.x
