"""Approximate leave-one-out: a training row's outputs if the row were not in the training set."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike, NDArray

from influence.common.checkpoint import check_folder, identity, kept
from influence.curvature.operators import Curvature
from influence.examples.given import Data
from influence.net.checked import Net
from influence.net.compiled import SeveralLosses
from influence.net.heads import activated
from influence.scores.inverse import Inverse
from influence.scores.one_step import OneStep, warn_without_step
from influence.solvers import Prepared, Solver
from influence.solvers.plan import Plan

# An interrupted call continues after the last finished block of this many rows.
_STORED_ROWS = 1 << 12


@dataclass(frozen=True, eq=False)
class LeaveOneOutOutputs:
    """Predicted outputs for k training rows, each without that row in the training set.

    Attributes:
      outputs: (k, ...) predicted outputs in the form that the model returns, such as probabilities.
        For a model with several outputs, a dict of arrays with their names as keys.
      logits: (k, c) the same outputs, before a final softmax or sigmoid. Several outputs of the
        model are side by side.
      losses: (k,) the loss of each row at these outputs, in nats for log losses. Their mean
        estimates the mean loss of new rows.
      leverage: (k,) the leverage of each row (influence.scores.one_step).
      rows: (k,) the training rows.
      plan: the curvature, damping, solver and precision that were used.
    """

    outputs: Any
    logits: NDArray
    losses: NDArray
    leverage: NDArray
    rows: NDArray[np.int64]
    plan: Plan


def leave_one_out_outputs(
    net: Net,
    train: Data,
    rows: ArrayLike | None = None,
    *,
    solver: Solver | Prepared | None = None,
    damping: float | None = None,
    curvature: type[Curvature] | None = None,
    batch_size: int | None = None,
    checkpoints: str | os.PathLike | None = None,
) -> LeaveOneOutOutputs:
    """Predict, without retraining, each row's outputs if it were not in the training set.

    In the notation of `influence.scores.one_step`, the logits are z_i + K_ii r_i + q_i / n. This is
    one Newton step from a minimum of the risk (approximate leave-one-out: Rad & Maleki 2020). For
    squared error and outputs that are affine in theta, the prediction is exact. Without a penalty
    it is y - (y - f) / (1 - h), with the leverage h. For other losses, the predicted change is too
    small for a row with a leverage near or above 1.

    Args:
      net: a net, a compiled Keras model, or the path of a saved one, at a minimum of its risk.
      train: the training set, n rows in memory.
      rows: (k,) training rows; all n if omitted.
      solver: as in `Influence`.
      damping: as in `Influence`.
      curvature: as in `Influence`.
      batch_size: as in `Influence`.
      checkpoints: a folder where finished blocks of rows are stored, or None. An interrupted call
        continues from there.

    Returns: LeaveOneOutOutputs.
    Raises: TypeError or ValueError naming the argument that is wrong, such as a training set on
      disk or a loss of probabilities. DivergenceError for a matrix that is not positive definite.
    """
    inverse = Inverse(
        net,
        train,
        solver=solver,
        damping=damping,
        curvature=curvature,
        batch_size=batch_size,
        approximation="one_step",
    )
    folder = check_folder(checkpoints)
    chosen, step = inverse.rows(rows), OneStep(inverse)
    size, name = max(len(chosen), 1), ""
    if folder is not None:
        A, size = inverse.operator, _STORED_ROWS
        what = type(A).__name__, A.damping, repr(inverse.solver), chosen
        name = f"leave-one-out-{identity(inverse.net, inverse.train, what)}"
    found = [
        kept(
            None if folder is None else folder / f"{name}-{start}.npz",
            lambda start=start: step.without(chosen[start : start + size]),
        )
        for start in range(0, len(chosen), size)
    ]
    logits, losses, leverage, without_step = (
        np.concatenate([part[key] for part in found])
        for key in ("logits", "losses", "leverage", "without_step")
    )
    warn_without_step(chosen[without_step])
    outputs = _as_returned(inverse.net, inverse.train.take([0]).x, logits)
    return LeaveOneOutOutputs(outputs, logits, losses, leverage, chosen, inverse.plan)


def _as_returned(net: Any, x: Any, z: NDArray) -> Any:
    """Convert logits z (k, c) to the form in which the model returns its outputs."""
    found = tf.constant(z.reshape(len(z), *net.seen_shape(x)))
    if not isinstance(net.loss, SeveralLosses):
        return activated(net.loss.head, found).numpy()
    parts = [
        (part.output, activated(part.head, own).numpy())
        for part, own in zip(net.loss.parts, net.loss.split(found), strict=False)
    ]
    return parts[0][1] if len(parts) == 1 else dict(parts)
