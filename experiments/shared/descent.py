"""Descent to a local minimum of a network, by quasi-Newton steps in the Hessian's coordinates.

First-order training stops long before a minimum. Plain L-BFGS is hardly better, because a network's
curvatures span many orders of magnitude. This module uses the coordinates u of

    theta = theta_0 + Q |L|^(-1/2) u,        H(theta_0) = Q L Q',

in which small eigenvalues are raised to a floor. In u, the Hessian at theta_0 is the identity.
Along negative curvature it is minus the identity, and L-BFGS descends there. The more the curvature
changes on the way, the more steps L-BFGS needs in u. Therefore the coordinates are computed anew
after a given number of evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
from numpy.typing import NDArray

from influence.common.checkpoint import check_folder, identity, load, store
from influence.common.progress import progress
from influence.curvature.operators import Hessian
from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet

# Floor of the eigenvalues, relative to the largest.
_FLOOR = 1e-6
# Pairs that L-BFGS stores.
_MEMORY = 50
# Most Newton steps at the end of a round.
_POLISH = 30
# A zero eigenvalue may be computed as this times eps and the largest eigenvalue.
_ROUNDING = 4
# Rounding may lower the risk by this times eps and the risk.
_STALLED = 16
# Step lengths tried along negative curvature.
_LENGTHS = 10.0 ** np.arange(-3, 1)


@dataclass(frozen=True, eq=False)
class Descent:
    """The history of a descent: one number for the start of every round and one for the end.

    Attributes:
      risk: R(theta).
      gradient_norm: Euclidean norm of the risk's gradient.
      smallest_eigenvalue: smallest eigenvalue of the risk's Hessian.
      num_negative: number of eigenvalues below zero by more than rounding. A zero eigenvalue is
        expected: a softmax does not change if a constant is added to all its biases.
    """

    risk: NDArray
    gradient_norm: NDArray
    smallest_eigenvalue: NDArray
    num_negative: NDArray


def descend(
    net: GenericNeuralNet,
    examples: Examples,
    *,
    tolerance: float = 1e-6,
    rounds: int = 20,
    evaluations: int = 200,
    hessian: Callable[[NDArray], NDArray] | None = None,
    checkpoints: Path | None = None,
) -> Descent:
    """Lower the net's risk towards a local minimum; theta is left at the end of the descent.

    Args:
      net: the net, at the start; float64, unless the tolerance is far above rounding.
      examples: the training set.
      tolerance: Euclidean norm of the gradient at which to stop if no curvature is negative.
      rounds: most Hessians formed.
      evaluations: most risks with gradients in each round.
      hessian: theta -> (d, d) the risk's Hessian, or an approximation; None: `Hessian.dense`.
      checkpoints: folder that stores theta after every round, so that an interrupted descent
        continues and ends with the same numbers. A finished descent is read.

    Returns: Descent. The caller checks whether the tolerance was met.
    """
    path, history, ended = None, [], False
    folder = check_folder(checkpoints)
    if folder is not None:
        settings = tolerance, rounds, evaluations, hessian is None
        path = folder / f"descent-{identity(net, examples, *settings)}.npz"
        if path.exists():
            found = load(path)
            net.theta, history, ended = found["theta"], list(found["history"]), found.get("ended")

    def keep(ended: bool) -> None:
        if path is not None:
            store(
                path, {"theta": net.theta, "history": np.array(history), "ended": np.array(ended)}
            )

    if ended:
        return Descent(*np.array(history).T)
    formed = hessian or (lambda theta: Hessian(net, examples).dense())
    for _ in progress(range(len(history), rounds), "descending", rounds - len(history)):
        matrix = formed(net.theta)
        values, vectors = scipy.linalg.eigh(matrix.astype(np.float64))
        history.append(_state(net, examples, values, matrix.dtype))
        if (history[-1][1] <= tolerance and not history[-1][3]) or _stalled(history, net.dtype):
            break
        if history[-1][1] <= tolerance:
            _leave_saddle(net, examples, vectors[:, 0])
        _round(net, examples, values, vectors, tolerance, evaluations)
        keep(False)
    else:
        matrix = formed(net.theta)
        values = scipy.linalg.eigvalsh(matrix.astype(np.float64))
        history.append(_state(net, examples, values, matrix.dtype))
    keep(True)
    return Descent(*np.array(history).T)


def _state(
    net: GenericNeuralNet, examples: Examples, values: NDArray, dtype: Any
) -> tuple[float, ...]:
    risk, gradient = net.risk_and_gradient(examples)
    return risk, float(np.linalg.norm(gradient)), values[0], num_negative(values, dtype)


def num_negative(values: NDArray, dtype: Any) -> int:
    """Count the eigenvalues below zero by more than rounding, of a matrix formed in `dtype`.

    This is the rounding of the matrix and of its float64 factorisation, which grows with its size.
    """
    rounding = _ROUNDING * np.finfo(dtype).eps + len(values) * np.finfo(np.float64).eps
    return np.count_nonzero(values < -rounding * np.abs(values).max())


def _stalled(history: list[tuple[float, ...]], dtype: Any) -> bool:
    """Return True if the last round neither lowered the risk nor halved the gradient."""
    if len(history) < 2:
        return False
    (before, norm_before, *_), (risk, norm, *_) = history[-2:]
    noise = _STALLED * float(np.finfo(dtype).eps) * abs(risk)
    return bool(before - risk <= noise and norm > norm_before / 2)


def _leave_saddle(net: GenericNeuralNet, examples: Examples, direction: NDArray) -> None:
    """Move to the point of lowest risk along negative curvature, where the gradient vanishes."""
    start = net.theta
    risks = [(net.risk(examples), 0.0)]
    for length in (*_LENGTHS, *-_LENGTHS):
        net.theta = start + length * direction
        risks.append((net.risk(examples), length))
    net.theta = start + min(risks)[1] * direction


def _round(
    net: GenericNeuralNet,
    examples: Examples,
    values: NDArray,
    vectors: NDArray,
    tolerance: float,
    evaluations: int,
) -> None:
    """Run L-BFGS from the net's theta in the coordinates of one Hessian."""
    start = net.theta
    scale = np.sqrt(np.maximum(np.abs(values), _FLOOR * values[-1]))
    best: list[Any] = [np.inf, start]

    def at(u: NDArray) -> tuple[float, NDArray]:
        net.theta = theta = start + vectors @ (u / scale)
        risk, gradient = net.risk_and_gradient(examples)
        if risk < best[0]:
            best[:] = risk, theta
        return risk, (vectors.T @ gradient) / scale

    scipy.optimize.minimize(
        at,
        np.zeros(len(start)),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxfun": evaluations,
            "maxiter": evaluations,
            "maxcor": _MEMORY,
            "ftol": 0.0,
            # If the largest entry in u is below this, the norm in theta is below the tolerance.
            "gtol": tolerance / np.sqrt(scale[-1] ** 2 * len(start)),
        },
    )
    net.theta = best[1]
    _polish(net, examples, vectors, scale, tolerance)


def _polish(
    net: GenericNeuralNet, examples: Examples, vectors: NDArray, scale: NDArray, tolerance: float
) -> None:
    """Take Newton steps as long as each halves the gradient and does not raise the risk.

    L-BFGS compares values of the risk. Near a minimum they differ only by rounding, while the
    gradient is still far above its rounding.
    """
    risk, gradient = net.risk_and_gradient(examples)
    for _ in range(_POLISH):
        theta, norm = net.theta, np.linalg.norm(gradient)
        if norm <= tolerance:
            return
        net.theta = theta - vectors @ (vectors.T @ gradient / scale**2)
        highest = risk + _STALLED * np.finfo(net.dtype).eps * abs(risk)
        risk, gradient = net.risk_and_gradient(examples)
        if not (np.linalg.norm(gradient) <= norm / 2 and risk <= highest):
            net.theta = theta
            return
