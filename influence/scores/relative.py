"""RelatIF: scores divided by the size of the change of theta (Barshan et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common.convergence import DivergenceError
from influence.common.named_array import NamedArray
from influence.examples.given import Data
from influence.net.questions import PerRow
from influence.scores.inverse import Inverse
from influence.solvers.plan import Plan


@dataclass(frozen=True, eq=False)
class RelativeScores(NamedArray):
    """Predicted changes (m, k) of test losses, divided by the size of the change of theta.

    Attributes:
      relative_change_if_removed: (m, k) predicted change of test loss i if training row j is
        removed, divided by size[j]. NaN if the size is zero. Positive: the loss rises without the
        row, so the row helped.
      rows: (k,) the training rows.
      size: (k,) size of the predicted change D of theta if the row is removed. D is H^-1 grad
        L(z_i) / n, with the risk's damped Hessian H and L = loss + penalty. For kind "theta" the
        size is |D|. For kind "loss" it is sqrt(D' H D).
      kind: "theta" or "loss".
      measurement: "loss", or the name of the measurement used instead.
      plan: the curvature, damping, solver and precision that were used.
    """

    relative_change_if_removed: NDArray
    rows: NDArray[np.int64]
    size: NDArray
    kind: str
    measurement: str = "loss"
    plan: Plan | None = None


def relative(
    inverse: Inverse, test: Data, rows: ArrayLike | None, kind: str, measurement: Any
) -> RelativeScores:
    """Compute the RelativeScores of `Influence.relative`. Each row takes one solve."""
    rows = inverse.rows(rows)
    if kind not in ("theta", "loss"):
        raise ValueError(f"kind must be 'theta' or 'loss', got {kind!r}.")
    view, name, test = inverse.measured(test, measurement)
    V = test.each_row(PerRow("gradients"), view, batch_size=inverse.block_size)  # (m, d)
    table, squared = np.empty((len(V), len(rows)), V.dtype), np.empty(len(rows), V.dtype)
    for at, _, G in inverse.row_gradients(rows):
        X = inverse.solve(G, "the rows' gradients", measure=False).x  # inverse.mass times D
        table[:, at] = V @ X
        squared[at] = np.einsum("di,di->i", X, X if kind == "theta" else G)
    if (squared < 0).any():
        worst = int(np.argmin(squared))
        raise DivergenceError(
            f"kind must be 'theta' where the matrix is not positive definite, got 'loss' with "
            f"grad L' H^-1 grad L = {squared[worst]:.1e} for row {rows[worst]}; or use more "
            "damping, or GaussNewton."
        )
    length = np.sqrt(squared)
    ratios = np.divide(table, length, out=np.full_like(table, np.nan), where=length > 0)
    lengths, plan = length / inverse.mass, inverse.first_order_plan
    return RelativeScores(ratios, rows, lengths, kind, name, plan)
