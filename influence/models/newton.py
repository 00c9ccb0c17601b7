"""Newton's method for the smooth convex risk of a LinearModel.

X holds the n inputs and Z = X theta the outputs. With the loss l and the weight decay lambda, the
gradient is X' dl/dz / n + lambda theta. A product with the Hessian costs two products with X.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from influence.common.convergence import DivergenceError
from influence.examples.examples import Examples
from influence.models.design import Design
from influence.net.net import GenericNeuralNet
from influence.net.questions import PerRow, Total
from influence.solvers import CG

# `_step` forms and factors the Hessian if this needs at most as many operations as this number of
# products with X.
_FACTOR_COST = 2000
# The relative tolerance of CG is at most this. The first step uses this value.
_LOOSEST = 0.5
# A step must decrease the risk by at least this fraction of the decrease that the slope at the
# step's start predicts (Armijo's condition).
_SUFFICIENT = 1e-4
# The lengths that `_length` tries in each data pass: 1 in the first pass, then the next seven of
# 1/2, 1/4 and so on in each later pass.
_LENGTHS = np.split(0.5 ** np.arange(50), range(1, 50, 7))


def minimise(
    net: GenericNeuralNet,
    design: Design,
    examples: Examples,
    tolerance: float,
    max_iterations: int,
) -> tuple[float, str]:
    """Minimise the risk from the net's theta, and leave the net at the best point found.

    Each step is shortened until the risk decreases enough, so the search converges from any start.
    A step p solves H p = g, where H is the risk's Hessian and g its gradient. A Cholesky factor
    solves this if the factor is cheap (up to about 2,000 parameters for dense inputs). Otherwise
    conjugate gradients solve it, with a tolerance that decreases with the gradient (Dembo,
    Eisenstat & Steihaug 1982).

    Args:
      net: a LinearModel.
      design: the net's `Design`.
      examples: the training set.
      tolerance: the search stops if the gradient of the risk has at most this Euclidean norm.
      max_iterations: largest number of steps.

    Returns: the final gradient norm, and a text. The text is "" if the norm is within the
      tolerance. Otherwise it is the reason why the search stopped.
    Raises: DivergenceError for a risk or gradient that is not finite.
    """
    first, before = 0.0, np.inf
    question = Total("loss_and_gradient")
    question.keeps = True  # Hessian products at this theta reuse the outputs
    theta = net.theta
    for iteration in range(max_iterations + 1):
        view = net.at(theta)  # reading its theta is faster than reading Keras variables
        loss, gradient = examples.sum_over(question, view)
        value = loss / len(examples) + view.penalty()
        gradient = gradient / len(examples) + view.penalty_gradient()
        norm = float(np.linalg.norm(gradient))
        if not (np.isfinite(norm) and np.isfinite(value)):
            raise DivergenceError(
                f"the risk must stay finite, got {value} with a gradient norm of {norm} after "
                f"{iteration} Newton steps; scale the inputs or start from smaller weights."
            )
        if norm <= tolerance:
            return norm, ""
        if iteration == max_iterations:
            return norm, f"{max_iterations} were not enough; allow more"
        first = first or norm
        rtol = max(min(_LOOSEST, np.sqrt(norm / first)), tolerance / norm / 2)
        step = _step(view, design, examples, gradient, rtol)
        slope = float(gradient @ step)
        rounding = 10 * float(np.finfo(net.dtype).eps) * abs(value)
        if slope <= rounding and norm > before / 2:
            return norm, "it has met the rounding of this dtype; use float64 or a larger tolerance"
        length = _length(view, examples, step, value, slope, rounding)
        if not length:
            return norm, "no step lowers the risk; use float64 or a larger tolerance"
        theta = theta - length * step
        net.theta = theta
        before = norm
    raise AssertionError("unreachable")


def _step(
    net: GenericNeuralNet, design: Design, examples: Examples, gradient: NDArray, rtol: float
) -> NDArray:
    """Return the step H^-1 gradient, (d,). `rtol` is the relative tolerance of CG."""
    n, d = len(examples), net.num_parameters
    if d**2 * (n + d / 3) <= _FACTOR_COST * examples.num_entries * design.num_outputs:
        try:
            factor = scipy.linalg.cho_factor(net.hessian(examples), overwrite_a=True)
            step = scipy.linalg.cho_solve(factor, gradient)
            if gradient @ step > 0:
                return step
        except np.linalg.LinAlgError:
            pass  # without a penalty H may be singular; CG then finds the shortest solution

    def product(V: NDArray) -> NDArray:
        return examples.sum_over(Total("hvp", V), net) / n + net.penalty_hvp(V)

    H: Any = LinearOperator((d, d), matvec=product, matmat=product, dtype=net.dtype)  # pyright: ignore
    return CG(rtol).prepare(H)(gradient[:, None]).x[:, 0]


def _length(
    net: GenericNeuralNet,
    examples: Examples,
    step: NDArray,
    value: float,
    slope: float,
    rounding: float,
) -> float:
    """Return the first length of 1, 1/2, 1/4 ... that decreases the risk enough; 0 if none does."""
    theta = net.theta
    for lengths in _LENGTHS:
        thetas = theta[:, None] - lengths.astype(theta.dtype) * step[:, None]
        losses = examples.each_row(PerRow("losses", thetas), net).mean(axis=0, dtype=np.float64)
        risks = losses + [net.at(column).penalty() for column in thetas.T]
        low = risks <= value - _SUFFICIENT * lengths * slope + rounding
        if low.any():
            return float(lengths[np.argmax(low)])
    return 0.0
