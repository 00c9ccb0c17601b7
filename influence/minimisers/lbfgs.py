"""Full-batch minimisation by SciPy's L-BFGS (Liu & Nocedal 1989), followed by Newton steps.

L-BFGS compares values of the risk. Near a minimum, these values differ by less than their rounding
errors, but the gradient is still accurate. Therefore the last steps are Newton steps, which only
need gradients to make progress.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.optimize
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, cg

from influence.common.convergence import warn_unconverged
from influence.common.numbers import numbers
from influence.common.progress import counter

# L-BFGS stores this many pairs (step, change of gradient).
_MEMORY = 20
# The largest number of Newton steps, the largest number of conjugate gradient iterations in each
# step, and the relative residual at which these iterations stop.
_NEWTON_STEPS, _CG_ITERATIONS, _CG_RTOL = 10, 200, 1e-3
# The relative rounding error of a risk whose losses are float32.
_RISK_ROUNDING = 1e-6


def minimise(
    risk_and_gradient: Callable[[NDArray], tuple[float, NDArray]],
    theta: NDArray,
    gradient_tolerance: float,
    max_iterations: int,
    product: Callable[[NDArray, NDArray], NDArray] | None = None,
) -> NDArray:
    """Minimise a risk from a given start. The result is deterministic.

    Args:
      risk_and_gradient: a function of theta (d,) that returns the risk and its gradient (d,).
      theta: (d,) the start.
      gradient_tolerance: Euclidean norm of the gradient at which the minimisation stops.
      max_iterations: the largest number of L-BFGS iterations.
      product: a function of theta (d,) and v (d,) that returns the risk's Hessian times v. If it is
        None, no Newton steps are taken.

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
            numbers(theta, "theta").astype(np.float64),
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": max_iterations,
                "maxfun": 2 * max_iterations,
                "maxcor": _MEMORY,
                "ftol": 0.0,
                # SciPy compares `gtol` with the gradient's largest entry. If this entry is below
                # `gtol`, the Euclidean norm is below `gradient_tolerance`.
                "gtol": gradient_tolerance / np.sqrt(len(theta)),
            },
        )
        x, norm = found.x, float(np.linalg.norm(found.jac))
        if product is not None and norm > gradient_tolerance and found.nit < max_iterations:
            x, norm = _newton(at, product, x, found.fun, found.jac, gradient_tolerance)
    if norm > gradient_tolerance:
        # If iterations are left, L-BFGS stopped because no step lowered the risk by more than its
        # rounding error. Then float64 helps.
        needed = "more iterations" if found.nit >= max_iterations else "float64"
        warn_unconverged(
            f"L-BFGS stopped at a gradient norm of {norm:.1e}, above {gradient_tolerance:.1e}, "
            f"after {found.nit} iterations; use {needed} or a larger gradient_tolerance."
        )
    return x


def _newton(
    at: Callable,
    product: Callable,
    theta: NDArray,
    risk: float,
    gradient: NDArray,
    tolerance: float,
) -> tuple[NDArray, float]:
    """Take Newton steps while each halves the gradient norm. Return theta and its gradient norm.

    A step that raises the risk by more than rounding error is rejected, because it may lead to a
    saddle.
    """
    highest = risk + _RISK_ROUNDING * abs(risk)
    norm, d = float(np.linalg.norm(gradient)), len(theta)
    for _ in range(_NEWTON_STEPS):
        if norm <= tolerance:
            break
        times = LinearOperator((d, d), matvec=lambda v: product(theta, np.ravel(v)), dtype=float)  # noqa: B023
        step, _ = cg(times, gradient, rtol=_CG_RTOL, maxiter=_CG_ITERATIONS)
        there = theta - step
        value, found = at(there)
        if not (np.linalg.norm(found) <= norm / 2 and value <= highest):
            break
        theta, gradient, norm = there, found, float(np.linalg.norm(found))
    return theta, norm
