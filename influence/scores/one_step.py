"""One Newton step that removes both the gradient and the curvature of a training row.

R is the risk of n rows, A its damped curvature matrix, and L_i = loss_i + penalty. J_i (c, d) is
the Jacobian of row i's outputs z_i with respect to theta. g_i and S_i are the gradient and the
Hessian of the row's loss with respect to z_i. Without row i the risk is (n R - L_i) / (n - 1), with
the same penalty and damping. Define

    M = A - (Hessian of the penalty + damping I) / n        K_ij = J_i M^-1 J_j'
    p = the penalty's gradient                              q_i = J_i M^-1 p

Let theta be a minimum of R. One Newton step on the risk without row i then changes theta by M^-1
(J_i' r_i + p / n), where

    r_i = (n I - S_i K_ii)^-1 (g_i + S_i q_i / n)

This follows from Woodbury's identity (approximate leave-one-out: Beirami et al. 2017; Rad & Maleki
2020). The outputs of row j change by K_ji r_i + q_j / n. The predicted change of a test loss is the
loss at the changed outputs minus the present loss. If the outputs are affine in theta, the result
is exactly that of the Newton step. For such outputs and squared error, it is exactly that of
retraining. Without a penalty, the residual of row i is then (y - f) / (1 - h), with the leverage h.

First order keeps the row's curvature, so r_i = g_i / n. It also replaces the test loss by its
linear approximation.

    leverage_i = tr(S_i K_ii) / n

The relative error of first order is about as large as the leverage. The sum of all leverages is the
effective dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence.common.convergence import DivergenceError, warn_user
from influence.common.memory import ACTIVATIONS, VECTORS, fitting
from influence.curvature.blocks import DenseBlocks, GramBlocks, jacobians
from influence.examples.examples import Examples
from influence.net.questions import PerRow
from influence.scores.inverse import MOST_OUTPUTS, Inverse
from influence.solvers import EKFAC
from influence.solvers.base import is_exact

# One step cannot remove a row that has at least this share of all curvature in some direction. No
# curvature would remain in that direction.
_WHOLE = 1 - 1e-8
# A warning names at most this many rows.
_NAMED = 3
# With first order, leverages are computed for this many rows with the largest scores.
_WATCHED = 16
# A warning is given if one of these leverages is above this.
_LARGE = 0.1


@dataclass(frozen=True, eq=False)
class Removed:
    """The vectors r_i of k training rows, and the terms of the formula for r_i.

    Attributes:
      rows: (k,) the training rows.
      z, slopes: (k, c) the outputs z_i, and the gradients g_i.
      curved: (k, c, c) the Hessians S_i.
      blocks: (k, c, c) the K_ii.
      pulls: (k, c) the q_i.
      r: (k, c) the r_i. A row that one step cannot remove has (g_i + S_i q_i / n) / n, as in first
        order.
      leverage: (k,) the leverages.
      without_step: (k,) True for rows that one step cannot remove. Such a row has all curvature in
        some direction.
    """

    rows: NDArray
    z: NDArray
    slopes: NDArray
    curved: NDArray
    blocks: NDArray
    pulls: NDArray
    r: NDArray
    leverage: NDArray
    without_step: NDArray


class OneStep:
    """Newton steps that remove training rows, for one `Inverse`. The terms of all rows are cached.

    Args:
      inverse: the inverse of the damped curvature matrix.

    Raises: ValueError for a training set that is not in memory, or a loss without logits.
    """

    def __init__(self, inverse: Inverse):
        if not inverse.train.in_memory:
            raise ValueError(
                "approximation must be 'first_order' for a training set on disk, got 'one_step'; "
                "use train.take(slice(None)) if its rows fit into memory."
            )
        if inverse.net.loss.has_masses:
            raise ValueError(
                "approximation must be 'first_order' for a loss that masks or ignores positions, "
                f"got 'one_step' with {inverse.net.loss.name!r}; leave_one_out computes the actual "
                "changes."
            )
        inverse.net.loss.check_logits("one step")
        self.inverse, self.n = inverse, len(inverse.train)

    @cached_property
    def _pull(self) -> NDArray:
        return self.inverse.net.penalty_gradient()

    @cached_property
    def _pulled(self) -> NDArray:
        return self.solve(self._pull[:, None])[:, 0]

    @cached_property
    def _matrix(self) -> DenseBlocks | GramBlocks | None:
        if self.inverse.blocks_by == "dense":
            return self._dense(1)
        if self.inverse.blocks_by == "gram":
            _, _, S = self._terms(np.arange(self.n))
            return GramBlocks(self.inverse.operator, 1 / self.n, _roots(S))
        return None

    def _dense(self, k: int) -> DenseBlocks:
        """Return the inverse of M for k removed rows. Reuse the dense matrix of `Direct`."""
        known = None
        if is_exact(self.inverse.solver):
            known = getattr(self.inverse.prepared.apply, "matrix", None)
        return DenseBlocks(self.inverse.operator, k / self.n, known)

    def solve(self, B: NDArray) -> NDArray:
        """Return M^-1 B, (d, m). If `_matrix` is None, solve with A in place of M."""
        if self._matrix is not None:
            return self._matrix.solve(B)
        return self.inverse.solve(B, "the Jacobians of outputs", measure=False).x

    def rows(self, rows: NDArray) -> Removed:
        """Return the `Removed` of k training rows."""
        return self._all if self._are_all(rows) else self._removed(rows)

    def _are_all(self, rows: NDArray) -> bool:
        return len(rows) == self.n and np.array_equal(rows, np.arange(self.n))

    @cached_property
    def _all(self) -> Removed:
        return self._removed(np.arange(self.n))

    def _removed(self, rows: NDArray) -> Removed:
        z, slopes, curved = self._terms(rows)
        blocks = self._blocks(rows).astype(np.float64)
        pulls = np.zeros_like(slopes)
        if self._pull.any():
            along = PerRow("output_moves", self._pulled)
            pulls = self.inverse.train.each_row(along, self.inverse.net, rows=rows)
        right, n = slopes + np.einsum("kab,kb->ka", curved, pulls) / self.n, self.n
        S = _roots(curved)
        shares = np.linalg.eigvalsh(S @ blocks @ S.transpose(0, 2, 1) / n)[:, -1]
        whole = ~(shares < _WHOLE)
        matrix = n * np.eye(z.shape[1]) - curved @ blocks
        matrix[whole] = n * np.eye(z.shape[1])
        r = np.linalg.solve(matrix, right[:, :, None])[:, :, 0]
        leverage = np.einsum("kab,kba->k", curved, blocks) / n
        return Removed(rows, z, slopes, curved, blocks, pulls, r, leverage, whole)

    def _terms(self, rows: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        """Return z (k, c), gradients (k, c) and Hessians (k, c, c) of training rows, in float64."""
        how: dict[str, Any] = {"rows": rows, "batch_size": self.inverse.batch_size}
        return split_terms(self.inverse.train.each_row(output_terms, self.inverse.net, **how))

    def _blocks(self, rows: NDArray) -> NDArray:
        inverse, matrix = self.inverse, self._matrix
        if isinstance(matrix, GramBlocks):
            return matrix.blocks[rows]
        question: Any = matrix
        if self.inverse.blocks_by == "factors":
            question = inverse.prepared.apply.output_blocks  # pyright: ignore[reportFunctionMemberAccess]
        if question is not None:
            size = inverse.batch_size or question.rows
            how: dict[str, Any] = {"rows": rows, "batch_size": size, "what": "leverage of rows"}
            return inverse.train.each_row(question, inverse.net, **how)
        order, found = np.argsort(rows), None
        c = inverse.net.output_size(inverse.train.take([0]).x)
        start, size = 0, max(inverse.block_size // c, 1)
        how = {"batch_size": size, "what": "solving for the outputs of rows"}
        for J in inverse.train.map_over(jacobians, inverse.net, None, rows[order], **how):
            X = self.solve(J.reshape(-1, J.shape[2]).T).reshape(J.shape[2], *J.shape[:2])
            found = np.empty((len(rows), *J.shape[1:2] * 2)) if found is None else found
            found[order[start : start + len(J)]] = np.einsum("nad,dnb->nab", J, X)
            start += len(J)
        assert found is not None
        return found

    def without(self, rows: NDArray) -> dict[str, NDArray]:
        """Predict the outputs and the loss of each of k training rows after removing that row.

        Returns: a dict with "logits" (k, c), "losses" (k,), "leverage" (k,) and "without_step"
          (k,). The last is True for a row that one step cannot remove. Its logits are those of
          first order.
        """
        removed, net = self.rows(rows), self.inverse.net
        moved = removed.z + np.einsum("kab,kb->ka", removed.blocks, removed.r)
        moved += removed.pulls / self.n
        chosen = self.inverse.train.take(rows)
        losses = net.losses_of(chosen.x, chosen.y, moved.astype(net.dtype))
        return {
            "logits": moved,
            "losses": losses.astype(np.float64),
            "leverage": removed.leverage,
            "without_step": removed.without_step,
        }

    def changes(self, view: Any, test: Examples, removed: Removed) -> NDArray:
        """Predict the changes (m, k) of m test losses if one of k rows is removed.

        `view` is the net whose losses are the test losses.
        """
        inverse, net = self.inverse, self.inverse.net
        d, c = net.num_parameters, view.output_size(test.take([0]).x)
        size = fitting(VECTORS, c * d * net.dtype.itemsize, max(inverse.block_size // c, 1))
        pulling, found = net.pulling(), np.empty((len(test), len(removed.rows)))
        train = inverse.train  # not copied if all rows are removed in turn
        chosen = train if self._are_all(removed.rows) else train.take(removed.rows)
        r = Examples._trusted(chosen.x, removed.r.astype(net.dtype))
        terms = test.each_row(output_terms, view, batch_size=inverse.batch_size)
        z = split_terms(terms)[0]
        for start in range(0, len(test), size):
            part = slice(start, start + size)
            tested = test.take(part)
            ask, pulls = self._moves(view, tested)
            rows = inverse.batch_size or getattr(ask, "rows", None)
            moves = r.each_row(ask, pulling, batch_size=rows)  # (k, b c)
            moves = moves.reshape(len(moves), *pulls.shape) + pulls
            found[part] = _loss_changes(view, tested, z[part], moves)
        return found

    def _moves(self, view: Any, test: Examples) -> tuple[Any, NDArray]:
        """Return a question for K_ti y_i (k, b c), and q_t / n (b, c), for b test rows t.

        y_i is the label of training row i. `changes` replaces this label by r_i.
        """
        inverse = self.inverse
        if inverse.blocks_by == "factors":
            apply: Any = inverse.prepared.apply
            ask = apply.output_moves(view, test.x, test.y)
            along = PerRow("output_moves", self._pulled)
            return ask, test.each_row(along, view) / self.n
        (J,) = test.map_over(jacobians, view, batch_size=len(test))
        X = self.solve(J.reshape(-1, J.shape[2]).T)
        pulls = (self._pull @ X / self.n).reshape(J.shape[:2])
        return PerRow("directional", X.astype(inverse.net.dtype)), pulls

    def group(self, view: Any, test: Examples, rows: NDArray) -> NDArray:
        """Predict the changes (m,) of the test losses if k rows are removed together.

        The formulas are those of this module, with the whole group in place of row i. The blocks
        K_ij of the group's rows form one matrix (k c, k c). A dense M is A minus k / n times
        (Hessian of the penalty + damping I).
        """
        inverse, net, n, k = self.inverse, self.inverse.net, self.n, len(rows)
        J = np.concatenate(list(inverse.train.map_over(jacobians, net, None, np.sort(rows))))
        J = J.reshape(-1, J.shape[2])
        _, slopes, S = self._terms(np.sort(rows))
        solve = self.solve
        if self.inverse.blocks_by == "dense":
            solve = self._dense(k).solve
        right = np.column_stack([J.T, self._pull])
        found = np.column_stack([solve(part) for part in _columns(right, inverse.block_size)])
        X, s = found[:, :-1].astype(np.float64), found[:, -1].astype(np.float64)
        c = S.shape[1]

        def curved(V):
            return (S @ V.reshape(k, c, -1)).reshape(k * c, -1)

        K = J @ X
        root = _roots(S)
        half = (root @ K.reshape(k, c, -1)).reshape(k * c, k, c)
        half = np.einsum("rkc,kcd->rkd", half, root)
        if not np.linalg.eigvalsh(half.reshape(k * c, -1))[-1] / n < _WHOLE:
            raise DivergenceError(
                f"rows must leave curvature in every direction for one step, got a group of {k} "
                "that holds all of it in some direction; use order=1, more damping, or "
                "leave_group_out."
            )
        matrix = n * np.eye(k * c) - curved(K)
        right = slopes.reshape(-1, 1) + curved((J @ s)[:, None]) * k / n
        move = X @ np.linalg.solve(matrix, right)[:, 0] + k / n * s
        ask = PerRow("output_moves", move.astype(net.dtype))
        moves = test.each_row(ask, view, batch_size=inverse.batch_size)
        terms = test.each_row(output_terms, view, batch_size=inverse.batch_size)
        return _loss_changes(view, test, split_terms(terms)[0], moves[None])[:, 0]


def leverage_of_largest(inverse: Inverse, rows: NDArray, changes: NDArray) -> NDArray | None:
    """Compute the leverages of the rows with the largest scores. Warn if one is large.

    Args:
      inverse: the inverse of the damped curvature matrix.
      rows: (k,) the training rows.
      changes: (m, k) the first-order scores of these rows.

    Returns: (k,) leverages, NaN for all other rows. None if no leverage is quick to compute, or if
      the loss has none.
    """
    net = inverse.net
    quick = is_exact(inverse.solver) or isinstance(inverse.solver, EKFAC)
    if not (quick and inverse.train.in_memory and net.loss.convex and net.loss.from_logits):
        return None
    if net.loss.has_masses:
        return None
    if net.output_size(inverse.train.take([0]).x) > MOST_OUTPUTS or not len(changes):
        return None
    largest = np.argsort(-np.abs(changes), axis=1)[:, :_WATCHED]
    at = np.unique(largest.T.ravel()[:_WATCHED])
    chosen = inverse.train.take(rows[at])
    if inverse.blocks_by == "factors":
        apply: Any = inverse.prepared.apply
        K = chosen.each_row(apply.output_blocks, net, batch_size=inverse.batch_size)
    else:
        J = np.concatenate(list(chosen.map_over(jacobians, net, batch_size=inverse.batch_size)))
        X = inverse.prepared(J.reshape(-1, J.shape[2]).T, measure=False).x
        K = np.einsum("kad,dkb->kab", J, X.reshape(J.shape[2], *J.shape[:2]))
    _, _, S = split_terms(chosen.each_row(output_terms, net, batch_size=inverse.batch_size))
    leverage = np.full(len(rows), np.nan)
    leverage[at] = np.einsum("kab,kba->k", S, K) / len(inverse.train)
    large = at[leverage[at] > _LARGE]
    if len(large):
        worst = large[np.argsort(-leverage[large])]
        some = ", ".join(f"{rows[j]} ({leverage[j]:.2g})" for j in worst[:_NAMED])
        warn_user(
            f"{len(large)} of the {len(at)} training rows with the largest scores have a leverage "
            f"above {_LARGE}, such as rows {some}: to first order their scores are wrong by about "
            "as much; use Influence(..., approximation='one_step')."
        )
    return leverage


def warn_without_step(bad: NDArray) -> None:
    """Warn that one step cannot remove training rows `bad` (b,), so that first order is used."""
    if len(bad):
        some = ", ".join(map(str, bad[:_NAMED]))
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        warn_user(
            f"training rows {some}{more} carry all curvature in some direction, so one step "
            "without them has no meaning and they were removed to first order; use more damping, "
            "or leave_one_out."
        )


def _loss_changes(view: Any, test: Examples, z: NDArray, moves: NDArray) -> NDArray:
    """Return the changes (m, k) of m losses if the outputs z (m, c) become z + moves[j].

    `moves` is (k, m, c).
    """
    m, k = len(test), len(moves)
    before = view.losses_of(test.x, test.y, z).astype(np.float64)
    found = np.empty((m, k))
    rows = fitting(ACTIVATIONS, 16 * max(z.size, 1) * z.itemsize, k)
    for start in range(0, k, rows):
        moved = (z + moves[start : start + rows]).astype(z.dtype)
        count = len(moved)
        y = test.y[np.tile(np.arange(m), count)]
        after = view.losses_of(test.x, y, moved.reshape(count * m, -1))
        found[:, start : start + count] = after.reshape(count, m).T - before[:, None]
    return found


def output_terms(net: Any, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
    """Return the z, gradients and Hessians of a batch in one array (n, 2 c + c^2).

    This is a question (influence.net.questions).
    """
    z, slopes, S = net.at(theta).output_terms(x, y)
    return np.concatenate([z, slopes, S.reshape(len(z), -1)], axis=1)


def split_terms(found: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Return z (n, c), gradients (n, c), Hessians (n, c, c) in float64 from `output_terms`."""
    c = int(np.sqrt(found.shape[1] + 1)) - 1  # there are (c + 1)^2 - 1 columns
    z, slopes, S = np.split(found.astype(np.float64), [c, 2 * c], axis=1)
    return z, slopes, S.reshape(-1, c, c)


def _roots(S: NDArray) -> NDArray:
    """Return the symmetric square roots of matrices (k, c, c). Negative eigenvalues count as 0."""
    values, vectors = np.linalg.eigh(S)
    return vectors * np.sqrt(np.maximum(values, 0))[:, None, :] @ vectors.transpose(0, 2, 1)


def _columns(B: NDArray, size: int) -> list[NDArray]:
    return [B[:, start : start + size] for start in range(0, B.shape[1], size)]
