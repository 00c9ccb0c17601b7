"""Scores relative to how far a row moves theta: RelatIF (Barshan, Brunet & Dziugaite 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common.convergence import DivergenceError
from influence.common.named_array import NamedArray
from influence.examples.examples import Examples
from influence.scores.inverse import Response


@dataclass(frozen=True, eq=False)
class RelativeScores(NamedArray):
    """Predicted changes, (m, k), of each test loss for each unit of the move of theta.

    Attributes:
      relative_change_if_removed: (m, k) predicted change of the test loss divided by `size`; NaN
        for a row that moves nothing. Positive: the loss rises without the row, so the row helped.
      rows: (k,) the training rows.
      size: (k,) how far removing the row moves theta: |D| or sqrt(D' H D), D = H^-1 grad L(z_i)/n.
      kind: "theta" or "loss".
      measurement: "loss", or the name of the measurement that takes its place.
    """

    relative_change_if_removed: NDArray
    rows: NDArray[np.int64]
    size: NDArray
    kind: str
    measurement: str = "loss"


def relative(
    response: Response, test: Examples, rows: ArrayLike | None, kind: str, measurement: Any
) -> RelativeScores:
    """See `Influence.relative`.

    A solve for each row gives its move and its scores at once, so that s_test is not needed.
    """
    rows = response._rows(rows)
    if kind not in ("theta", "loss"):
        raise ValueError(f"kind must be 'theta' or 'loss', got {kind!r}.")
    view, name = response._measured(test, measurement)
    size = response._together
    V = np.concatenate([view.gradients(*batch) for batch in test.batches(size)])  # (m, d)
    tables, squares = [], []
    for _, G in response._row_gradients(rows):
        X = response._solve(G, "the rows' gradients").x  # n D
        tables.append(V @ X)
        squares.append(np.einsum("di,di->i", X, X if kind == "theta" else G))
    squared = np.concatenate(squares)
    if (squared < 0).any():
        worst = int(np.argmin(squared))
        raise DivergenceError(
            f"kind must be 'theta' where the matrix is not positive definite, got 'loss' with "
            f"grad L' H^-1 grad L = {squared[worst]:.1e} for row {rows[worst]}; or use more "
            "damping, or GaussNewton."
        )
    length = np.sqrt(squared)
    table = np.concatenate(tables, axis=1)
    ratios = np.divide(table, length, out=np.full_like(table, np.nan), where=length > 0)
    return RelativeScores(ratios, rows, length / len(response.train), kind, name)
