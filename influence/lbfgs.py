"""Full-batch fitting of any net by L-BFGS: Liu & Nocedal 1989, as SciPy has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.optimize
from numpy.typing import NDArray

from influence.convergence import warn_unconverged
from influence.examples import Examples
from influence.progress import counter

if TYPE_CHECKING:
    from influence.net import GenericNeuralNet

_MEMORY = 20  # pairs that are remembered


def fit(
    net: GenericNeuralNet, examples: Examples, gradient_tolerance: float, max_iterations: int
) -> None:
    """Minimise the net's risk from the present theta, where theta is left; deterministic.

    Args:
      net: of any loss and penalty.
      examples: the training set.
      gradient_tolerance: Euclidean norm of the risk's gradient to stop at.
      max_iterations: L-BFGS iterations at most.

    Warns with ConvergenceWarning when the norm reached is larger.
    """

    def at(theta: NDArray) -> tuple[float, NDArray]:
        net.theta = theta
        risk, gradient = net.risk_and_gradient(examples)
        bar.set_postfix_str(f"gradient norm {np.linalg.norm(gradient):.1e}", refresh=False)
        bar.update()
        return risk, gradient.astype(np.float64)

    with counter("fitting, data passes") as bar:
        found = scipy.optimize.minimize(
            at,
            net.theta.astype(np.float64),
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": max_iterations,
                "maxfun": 2 * max_iterations,
                "maxcor": _MEMORY,
                "ftol": 0.0,
                # scipy's tolerance is on the largest entry.
                "gtol": gradient_tolerance / np.sqrt(net.num_parameters),
            },
        )
    net.theta = found.x
    norm = float(np.linalg.norm(net.risk_gradient(examples)))
    if norm > gradient_tolerance:
        # Where iterations are left, no step lowered the risk by more than its rounding.
        needed = "more iterations" if found.nit >= max_iterations else "float64"
        warn_unconverged(
            f"L-BFGS stopped at a gradient norm of {norm:.1e}, above {gradient_tolerance:.1e}, "
            f"after {found.nit} iterations; use {needed} or a larger gradient_tolerance."
        )
