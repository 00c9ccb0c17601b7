"""Descent to a local minimum of a network, by quasi-Newton steps in the Hessian's coordinates.

First-order training stops long before a minimum. Plain L-BFGS is hardly better, because the
eigenvalues of a network's Hessian span many orders of magnitude. The descent consists of rounds.
Let theta_0 be the start of a round, with the Hessian H(theta_0) = Q L Q'. In the round, L-BFGS uses
coordinates u defined by

    theta = theta_0 + Q |L|^(-1/2) u.

|L| is diagonal and has the absolute values of the eigenvalues, but at least a given floor. In the
coordinates u, the Hessian at theta_0 is diagonal. Its entries are 1 or -1, or closer to 0 for
eigenvalues below the floor. L-BFGS descends along directions of negative curvature. The Hessian
changes as theta moves, so a new round begins after a given number of evaluations.
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

# The floor of the eigenvalues is this factor times the largest eigenvalue.
_FLOOR = 1e-6
# L-BFGS stores this many pairs of a step and a gradient difference.
_MEMORY = 50
# A round ends with at most this many Newton steps.
_POLISH = 30
# Rounding may change an eigenvalue by this times eps times the largest eigenvalue.
_ROUNDING = 4
# Rounding may change the risk by this times eps times the risk.
_STALLED = 16
# These step lengths are tried along negative curvature, in both directions.
_LENGTHS = 10.0 ** np.arange(-3, 1)


@dataclass(frozen=True, eq=False)
class Descent:
    """The history of a descent. Each array has one entry per Hessian that was formed.

    Attributes:
      risk: the risk.
      gradient_norm: Euclidean norm of the risk's gradient.
      smallest_eigenvalue: smallest eigenvalue of the risk's Hessian.
      num_negative: number of eigenvalues below zero by more than rounding. A zero eigenvalue is
        expected: a softmax does not change if the same constant is added to all its biases.
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
    """Lower the net's risk towards a local minimum.

    Args:
      net: the net. The descent starts at its theta, and leaves the net at the last theta. Use
        float64, unless the tolerance is far above the rounding error.
      examples: the training set.
      tolerance: the descent ends if the gradient's Euclidean norm is at most this and no eigenvalue
        is negative.
      rounds: the largest number of rounds.
      evaluations: the largest number of evaluations of risk and gradient by L-BFGS in a round.
      hessian: a function from theta to the risk's Hessian (d, d) or an approximation. If None,
        `Hessian.dense` is used.
      checkpoints: folder that stores theta after every round, or None. An interrupted descent
        continues from the stored theta.

    Returns: the history. The last gradient norm may be above the tolerance.
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
    """Count the eigenvalues that are below zero by more than rounding.

    The rounding error has two causes. The matrix was formed in `dtype`, and its eigenvalues were
    computed in float64.
    """
    rounding = _ROUNDING * np.finfo(dtype).eps + len(values) * np.finfo(np.float64).eps
    return np.count_nonzero(values < -rounding * np.abs(values).max())


def _stalled(history: list[tuple[float, ...]], dtype: Any) -> bool:
    """Return True if the last round neither lowered the risk nor halved the gradient norm."""
    if len(history) < 2:
        return False
    (before, norm_before, *_), (risk, norm, *_) = history[-2:]
    noise = _STALLED * float(np.finfo(dtype).eps) * abs(risk)
    return bool(before - risk <= noise and norm > norm_before / 2)


def _leave_saddle(net: GenericNeuralNet, examples: Examples, direction: NDArray) -> None:
    """Move theta from a saddle point along a direction of negative curvature.

    The step lengths in `_LENGTHS` are tried in both directions, and the one with the lowest risk is
    taken. If no step lowers the risk, theta does not move.
    """
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
    """Run one round of L-BFGS from the net's theta, in the coordinates u, and then `_polish`."""
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
            # If every entry of the gradient with respect to u is below this, the norm of the
            # gradient with respect to theta is below the tolerance.
            "gtol": tolerance / np.sqrt(scale[-1] ** 2 * len(start)),
        },
    )
    net.theta = best[1]
    _polish(net, examples, vectors, scale, tolerance)


def _polish(
    net: GenericNeuralNet, examples: Examples, vectors: NDArray, scale: NDArray, tolerance: float
) -> None:
    """Take Newton steps as long as each halves the gradient norm and does not raise the risk.

    L-BFGS compares values of the risk. Near a minimum, these values differ only by rounding errors,
    so L-BFGS stops too early. The gradient there is still far larger than its rounding error.
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
