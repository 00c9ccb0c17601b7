"""Towards a local minimum of a network's risk, by quasi-Newton steps in the Hessian's coordinates.

First-order training stops long before a minimum, and plain L-BFGS does hardly better: a network's
curvatures span many orders of magnitude. In the coordinates u of

    theta = theta_0 + Q |L|^(-1/2) u,        H(theta_0) = Q L Q',

with small eigenvalues lifted to a floor, the Hessian at theta_0 is the identity (and minus it along
negative curvature, which is then gone down). L-BFGS in u takes about as many steps as the curvature
changes on its way; when they are spent the coordinates are made anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import scipy.linalg
import scipy.optimize
from numpy.typing import NDArray

from influence.common.checkpoint import check_folder, load, store
from influence.common.progress import progress
from influence.curvature.operators import Hessian
from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet

_FLOOR = 1e-6  # of the largest eigenvalue: what smaller ones are lifted to
_MEMORY = 50  # pairs that L-BFGS remembers
_POLISH = 30  # Newton's steps at the end of a round
_ROUNDING = 4  # times eps and the largest eigenvalue: what a zero eigenvalue may come out as
_STALLED = 16  # times eps and the risk: what rounding may take off it
_LENGTHS = 10.0 ** np.arange(-3, 1)  # that are tried along negative curvature


@dataclass(frozen=True, eq=False)
class Descent:
    """How a descent went, a number for the start of every round and one for the end.

    Attributes:
      risk: R(theta).
      gradient_norm: Euclidean norm of the risk's gradient.
      smallest_eigenvalue: of the risk's Hessian.
      num_negative: eigenvalues below zero by more than rounding. One that is zero is no fault: the
        same number added to the biases of all of a softmax' logits changes nothing.
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
    """Lower the net's risk towards a local minimum, where theta is left, or on the way there.

    Args:
      net: where to start; float64, unless the tolerance is far above rounding.
      examples: the training set.
      tolerance: Euclidean norm of the gradient to stop at, if no curvature is negative there.
      rounds: Hessians formed at most.
      evaluations: risks with gradients in each round at most.
      hessian: theta -> (d, d) the risk's Hessian, or an approximation; None: `Hessian.dense`.
      checkpoints: a folder where theta is kept after every round, so that a descent that was
        killed goes on from there and ends with the same numbers; one that had ended is read.

    Returns: Descent. Whether the tolerance was met is for the caller to look at.
    """
    path, history, ended = None, [], False
    folder = check_folder(checkpoints)
    if folder is not None:
        few = examples.take(slice(0, 8))
        identity = joblib.hash((
            type(net).__name__, net.model.get_weights(), net.losses(few.x, few.y), net.penalty(),
            tolerance, rounds, evaluations, hessian is None, examples.fingerprint,
        ))  # fmt: skip
        path = folder / f"descent-{identity[:16]}.npz"
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
    """How many eigenvalues of a matrix formed in `dtype` are below zero by more than rounding.

    That of the matrix, and of its float64 factorisation, which grows with its size.
    """
    rounding = _ROUNDING * np.finfo(dtype).eps + len(values) * np.finfo(np.float64).eps
    return np.count_nonzero(values < -rounding * np.abs(values).max())


def _stalled(history: list[tuple[float, ...]], dtype: Any) -> bool:
    """Whether the last round has neither lowered the risk nor halved the gradient."""
    if len(history) < 2:
        return False
    (before, norm_before, *_), (risk, norm, *_) = history[-2:]
    noise = _STALLED * float(np.finfo(dtype).eps) * abs(risk)
    return bool(before - risk <= noise and norm > norm_before / 2)


def _leave_saddle(net: GenericNeuralNet, examples: Examples, direction: NDArray) -> None:
    """Go to the lowest risk of some points along negative curvature: the gradient shows no way."""
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
    """L-BFGS from the net's theta in the coordinates of one Hessian."""
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
            # The largest entry in u below this: the norm in theta is at most |L|^(1/2) times it.
            "gtol": tolerance / np.sqrt(scale[-1] ** 2 * len(start)),
        },
    )
    net.theta = best[1]
    _polish(net, examples, vectors, scale, tolerance)


def _polish(
    net: GenericNeuralNet, examples: Examples, vectors: NDArray, scale: NDArray, tolerance: float
) -> None:
    """Newton's steps for as long as each halves the gradient and raises no risk.

    L-BFGS looks at values of the risk, which near a minimum differ by rounding alone while the
    gradient is still far above its own.
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
