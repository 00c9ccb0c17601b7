"""Newton's method for the smooth convex risk of a LinearModel: what its `fit` does.

The outputs Z = X theta give the gradient X' dl/dz / n + lambda theta, and a product with the
Hessian costs two more products with X.
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

# Forming and factoring the Hessian may cost as much as this many products with X.
_FACTOR_COST = 2000
# Relative residual of the first steps, far from the minimum.
_LOOSEST = 0.5
# Share of the decrease that the slope promises which a step must bring (Armijo).
_SUFFICIENT = 1e-4
# Lengths of a step that are tried: 1, then seven at a time 1/2, 1/4 ...
_LENGTHS = np.split(0.5 ** np.arange(50), range(1, 50, 7))


def minimise(
    net: GenericNeuralNet,
    design: Design,
    examples: Examples,
    tolerance: float,
    max_iterations: int,
) -> tuple[float, str]:
    """Minimise the risk from the net's theta, which is left at the best point found.

    Every step is shortened until the risk falls, so that no start is too far away. H p = g is
    solved by Cholesky where that is cheap (up to about 2,000 parameters for dense inputs); else by
    conjugate gradients, to a residual that tightens with the gradient (Dembo, Eisenstat & Steihaug
    1982).

    Args:
      net: with the closed forms of LinearModel.
      design: its products with inputs.
      examples: the training set.
      tolerance: Euclidean norm of the risk's gradient to stop at.
      max_iterations: steps at most.

    Returns: the gradient norm reached, and why it is above the tolerance or "".
    Raises: DivergenceError for a risk or gradient that is not finite.
    """
    first, before = 0.0, np.inf
    question = Total("loss_and_gradient")
    question.keeps = True  # products at the same theta follow
    theta = net.theta
    for iteration in range(max_iterations + 1):
        view = net.at(theta)  # whose theta is read faster than a Keras variable
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
    """Return H^-1 gradient, (d,)."""
    n, d = len(examples), net.num_parameters
    if d**2 * (n + d / 3) <= _FACTOR_COST * examples.num_entries * design.num_outputs:
        try:
            factor = scipy.linalg.cho_factor(net.hessian(examples), overwrite_a=True)
            step = scipy.linalg.cho_solve(factor, gradient)
            if gradient @ step > 0:
                return step
        except np.linalg.LinAlgError:
            pass  # singular without a penalty: CG finds the shortest step that solves it

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
    """Return the first of 1, 1/2, 1/4 ... that lowers the risk as its slope promises, or 0."""
    theta = net.theta
    for lengths in _LENGTHS:
        thetas = theta[:, None] - lengths.astype(theta.dtype) * step[:, None]
        losses = examples.each_row(PerRow("losses", thetas), net).mean(axis=0, dtype=np.float64)
        risks = losses + [net.at(column).penalty() for column in thetas.T]
        low = risks <= value - _SUFFICIENT * lengths * slope + rounding
        if low.any():
            return float(lengths[np.argmax(low)])
    return 0.0
