"""Newton's method for LinearModel: what `fit` does, in a file of its own.

From the outputs Z = X theta come the gradient X' dl/dz / n + weight_decay theta and every product
with the Hessian at no other cost than two products with X. The line search needs one, since
X (theta - t p) = Z - t X p.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from influence.common.convergence import DivergenceError
from influence.examples.examples import Examples
from influence.solvers import CG

if TYPE_CHECKING:
    from influence.models.linear import LinearModel

_FACTOR_COST = 2000  # products with X that forming and factoring the Hessian may cost
_LOOSEST = 0.5  # relative residual of the first steps, far from the minimum
_SUFFICIENT = 1e-4  # share of the decrease promised by the slope (Armijo)
_HALVINGS = 50


def minimise(
    model: LinearModel, examples: Examples, tolerance: float, max_iterations: int
) -> tuple[float, str]:
    """Minimise the risk from the model's theta, which is left at the best point found.

    Every step is shortened until the risk falls, so that no start is too far away. H p = g is
    solved by Cholesky where that is cheap (up to about 2,000 parameters for dense inputs); else by
    conjugate gradients, to a residual that tightens with the gradient (Dembo, Eisenstat & Steihaug
    1982).

    Args:
      model: with the closed forms of LinearModel.
      examples: the training set.
      tolerance: Euclidean norm of the risk's gradient to stop at.
      max_iterations: steps at most.

    Returns: the gradient norm reached, and why it is above the tolerance or "".
    Raises: DivergenceError for a risk or gradient that is not finite.
    """
    theta, n = model.theta, len(examples)
    first, before = 0.0, np.inf
    for iteration in range(max_iterations + 1):
        Z = _outputs(model, examples, theta)
        slopes = model._slope(Z, examples.y)
        gradient = _pullback(model, examples, slopes)[:, 0] / n + model.weight_decay * theta
        value = _value(model, examples, theta, Z)
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
        step = _step(model, examples, Z, gradient, rtol)
        slope = float(gradient @ step)
        rounding = 10 * float(np.finfo(model.dtype).eps) * abs(value)
        if slope <= rounding and norm > before / 2:
            return norm, "it has met the rounding of this dtype; use float64 or a larger tolerance"
        length = _length(model, examples, theta, Z, step, value, slope, rounding)
        if not length:
            return norm, "no step lowers the risk; use float64 or a larger tolerance"
        theta = theta - length * step
        model.theta = theta
        before = norm
    raise AssertionError("unreachable")


def _step(
    model: LinearModel, examples: Examples, Z: NDArray, gradient: NDArray, rtol: float
) -> NDArray:
    """H^-1 gradient, (d,)."""
    n, d = len(examples), model.num_parameters
    if d**2 * (n + d / 3) <= _FACTOR_COST * examples.num_entries * model.num_outputs:
        try:
            factor = scipy.linalg.cho_factor(model.hessian(examples), overwrite_a=True)
            step = scipy.linalg.cho_solve(factor, gradient)
            if gradient @ step > 0:
                return step
        except np.linalg.LinAlgError:
            pass  # singular without a penalty: CG finds the shortest step that solves it

    def product(V: NDArray) -> NDArray:
        U = _outputs(model, examples, V)
        pulled = _pullback(model, examples, model._curved(Z, examples.y, U))
        return pulled.reshape(V.shape) / n + model.weight_decay * V

    H: Any = LinearOperator((d, d), matvec=product, matmat=product, dtype=model.dtype)  # pyright: ignore
    return CG(rtol).prepare(H)(gradient[:, None]).x[:, 0]


def _length(
    model: LinearModel,
    examples: Examples,
    theta: NDArray,
    Z: NDArray,
    step: NDArray,
    value: float,
    slope: float,
    rounding: float,
) -> float:
    """The first of 1, 1/2, 1/4 ... that lowers the risk as its slope promises; 0 if none does."""
    U = _outputs(model, examples, step)
    for halvings in range(_HALVINGS):
        t = 0.5**halvings
        there = _value(model, examples, theta - t * step, Z - t * U)
        if there <= value - _SUFFICIENT * t * slope + rounding:
            return t
    return 0.0


def _value(model: LinearModel, examples: Examples, theta: NDArray, Z: NDArray) -> float:
    """The risk at theta with outputs Z."""
    mean = model._loss(Z, examples.y).mean(dtype=np.float64)
    return float(mean) + model.weight_decay / 2 * float(theta @ theta)


def _outputs(model: LinearModel, examples: Examples, V: NDArray) -> NDArray:
    """X V for one parameter vector: (n, c, 1)."""
    parts = [model._times(x, V) for _, x in _blocks(model, examples)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _pullback(model: LinearModel, examples: Examples, E: NDArray) -> NDArray:
    """X' E: (d, 1)."""
    return sum(model._transposed_times(x, E[rows]) for rows, x in _blocks(model, examples))  # pyright: ignore


def _blocks(model: LinearModel, examples: Examples) -> Iterator[tuple[slice, Any]]:
    """(rows, x) in blocks whose outputs are small beside x."""
    start = 0
    for x, y in examples.batches(model.rows_per_batch(examples)):
        yield slice(start, start + len(y)), x
        start += len(y)
