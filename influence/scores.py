"""Influence: what the risk's curvature predicts for the removal of training rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.convergence import DivergenceError, warn_unconverged
from influence.estimand import Estimand
from influence.examples import Examples, check_differentiable, check_rows
from influence.net import GenericNeuralNet
from influence.operators import Curvature, Hessian, check_batch_size
from influence.progress import progress
from influence.solvers import CG, Direct, Prepared, Solution, Solver, prepare

_MANY_ROWS = 64  # from here one factorisation for all rows beats a solve for each
_MOST_TOGETHER = 512  # right-hand sides solved together, fewer where theta is long:
_BYTES_TOGETHER = 1 << 28  # what such a block may take; solvers keep a handful of its size


@dataclass(frozen=True, eq=False)
class Scores(Estimand):
    """Predicted changes, (m, k), of each test loss were each training row removed.

    Attributes:
      change_if_removed: (m, k), see `Estimand`.
      rows: (k,) the training rows.
      solution: how well each test example's system was solved; `solution.x` is s_test (d, m).
    """

    solution: Solution


class Influence:
    """Influence functions of a net at a minimum of its training risk (Koh & Liang 2017).

    Leaving row i out changes theta by + H^-1 grad L(z_i) / n and a measurement f by
    + grad f' H^-1 grad L(z_i) / n, to first order, where L(z_i) = loss_i + penalty and H is the
    Hessian of the risk plus damping I. That is -1/n times the paper's I_up,loss (eq. 2): positive
    means that the test loss rises without the row, so the row helped.

    Args:
      net: the model, at its theta.
      train: the training set.
      solver: how H^-1 is applied; the default CG() stops at a relative residual of 1e-6. What
        `prepare` returned serves as well, and is then not prepared again.
      damping: absolute, part of the operator, the same for every solver.
      curvature: `Hessian` or `GaussNewton`.
      batch_size: rows at a time; bounds memory and never changes a result. None: chosen.

    Raises: TypeError or ValueError naming the argument that is wrong, before any long work.
    """

    def __init__(
        self,
        net: GenericNeuralNet,
        train: Examples,
        *,
        solver: Solver | Prepared = CG(),
        damping: float = 0.0,
        curvature: type[Curvature] = Hessian,
        batch_size: int | None = None,
    ):
        check_batch_size(batch_size)
        if not (isinstance(curvature, type) and issubclass(curvature, Curvature)):
            raise TypeError(f"curvature must be Hessian or GaussNewton, got {curvature!r}.")
        if not isinstance(net, GenericNeuralNet):
            raise TypeError(f"net must be a GenericNeuralNet, got {type(net).__name__}.")
        net.validate(train, "train")
        self.net, self.train, self.batch_size = net, train, batch_size
        self.operator = curvature(net, train, damping, batch_size=batch_size)
        if isinstance(solver, Prepared):
            prepare(self.operator, solver)  # is it for this matrix?
        elif not hasattr(solver, "prepare") or isinstance(solver, type):
            raise TypeError(f"solver must be a solver such as CG() or Direct(), got {solver!r}.")
        self._solver = solver

    def s_test(self, test: Examples) -> Solution:
        """H^-1 grad loss for every test example: `x` is (d, m).

        The test loss excludes the penalty. Warns with ConvergenceWarning if a column missed the
        solver's tolerance.

        Raises: DivergenceError if a direction of negative or no curvature was met, so that no
          inverse stands behind the numbers.
        """
        self.net.validate(test, "test")
        blocks = [
            self._solve(self.net.gradients(*batch).T, "the test gradients")
            for batch in test.batches(self._together)
        ]
        return blocks[0] if len(blocks) == 1 else _joined(blocks)

    def scores(self, test: Examples, rows: ArrayLike | None = None) -> Scores:
        """Predicted change of each test loss were each training row left out.

        s_test . grad L(z_i) / n, first order, -1/n times I_up,loss (Koh & Liang 2017, eq. 2).
        Positive: the test loss rises without the row, so the row helped.

        Args:
          test: m examples, each a measurement of its own; `.mean(axis=0)` averages them.
          rows: (k,) training rows; all n if omitted.

        Returns: Scores (m, k), in the unit of the test loss (nats for log losses).
        Raises: ValueError, TypeError or IndexError for bad input; DivergenceError as `s_test`.
        """
        rows = self._rows(rows)
        solution = self.s_test(test)
        return Scores(self._changes(solution.x, rows).T, rows, solution)

    def perturbation(self, test: Examples, rows: ArrayLike) -> Any:
        """Predicted derivative of each test loss by the input of each training row.

        As x_i moves, the minimum of the risk moves along -H^-1 (d/dx_i grad loss_i) / n, so the
        derivative is -(d/dx_i grad loss_i . s_test) / n: that of the test loss after retraining,
        not an approximation to it, where theta is the minimum and nothing is damped. Positive: the
        test loss rises as that entry of the row's input rises. This is 1/n times I_pert,loss
        (Koh & Liang 2017, section 2.2); the 2017 release's own numbers are -n times these.

        Args:
          test: m examples, each a measurement of its own.
          rows: (k,) training rows, with floating inputs.

        Returns: (m, k, *shape of one row's x), or a dict of such arrays for several inputs, in the
          unit of the test loss for each unit of x.
        Raises: TypeError for integer inputs, which have no derivative; else as `scores`.
        """
        chosen = self.train.take(self._rows(rows))
        check_differentiable(chosen.x)
        S = self.s_test(test).x
        size = self.batch_size or self.net.rows_per_batch(chosen)
        batches = progress(chosen.batches(size), "input gradients", -(-len(chosen) // size))
        found = [[self.net.input_gradient(x, y, s) for s in S.T] for x, y in batches]

        def joined(part):
            parts = [np.stack([part(gradient) for gradient in batch]) for batch in found]
            return np.concatenate(parts, axis=1) / -len(self.train)

        if isinstance(chosen.x, dict):
            return {name: joined(itemgetter(name)) for name in chosen.x}
        return joined(lambda gradient: gradient)

    def parameters(self, rows: ArrayLike) -> NDArray:
        """Predicted change of theta were each training row left out, + H^-1 grad L(z_i) / n.

        Args:
          rows: (k,) training rows.

        Returns: (k, d).
        """
        rows = self._rows(rows)
        blocks = [self._solve(G, "the rows' gradients").x.T for _, G in self._row_gradients(rows)]
        return np.concatenate(blocks) / len(self.train)

    def self_influence(self, rows: ArrayLike | None = None) -> NDArray:
        """Predicted change of each training row's own loss were that row left out.

        grad loss_i' H^-1 grad L(z_i) / n. Positive for almost every row; the largest belong to rows
        that only their own presence explains, such as wrong labels. Where the net knows a closed
        form that is faster than CG or Direct, many rows are answered by it.

        Args:
          rows: (k,) training rows; all n if omitted.

        Returns: (k,), in the unit of the loss.
        """
        rows = self._rows(rows)
        if len(rows) >= _MANY_ROWS and self._prefers_closed_form:
            closed_form = self.net.self_influence(self.train, rows)
            if closed_form is not None:
                return closed_form
        blocks = [
            np.einsum("di,di->i", G_loss, self._solve(G, "the rows' gradients").x)
            for G_loss, G in self._row_gradients(rows)
        ]
        return np.concatenate(blocks) / len(self.train)

    # --- inside ----------------------------------------------------------------------------------

    def _rows(self, rows: ArrayLike | None) -> NDArray[np.int64]:
        return np.arange(len(self.train)) if rows is None else check_rows(rows, len(self.train))

    def _changes(self, S: NDArray, rows: NDArray[np.int64]) -> NDArray:
        """(k, m): S . grad L(z_i) / n for every row and column of S, in passes over the rows."""
        chosen = (
            self.train
            if len(rows) == len(self.train) and (rows == np.arange(len(rows))).all()
            else self.train.take(rows)
        )
        size = self.batch_size or self.net.rows_per_batch(chosen, S.shape[1])
        parts = [self.net.directional(x, y, S) for x, y in chosen.batches(size)]
        return (np.concatenate(parts) + self.net.penalty_gradient() @ S) / len(self.train)

    def _row_gradients(self, rows: NDArray) -> Iterator[tuple[NDArray, NDArray]]:
        """(grad loss, grad L) block by block of rows, gradients as columns (d, b)."""
        penalty = self.net.penalty_gradient()[:, None]
        starts = range(0, len(rows), self._together)
        for start in progress(starts, "solving for training rows"):
            part = rows[start : start + self._together]
            chosen = self.train.take(part)
            G = self.net.gradients(chosen.x, chosen.y).T
            yield G, G + penalty

    @property
    def _prefers_closed_form(self) -> bool:
        """Whether the solver stands for the exact inverse of the risk's own Hessian, but slower."""
        solver, operator = self._solver, self.operator
        if isinstance(solver, Prepared):
            solver, operator = solver.solver, solver.A
        # Up to d = n Direct does much the same work.
        slower = isinstance(solver, CG) or self.net.num_parameters > len(self.train)
        return (
            slower
            and isinstance(solver, CG | Direct)
            and type(operator) is Hessian
            and not operator.damping
            and operator.is_current
        )

    @property
    def _together(self) -> int:
        per_vector = self.net.num_parameters * self.net.dtype.itemsize
        return int(np.clip(_BYTES_TOGETHER // per_vector, 1, _MOST_TOGETHER))

    @property
    def prepared(self) -> Prepared:
        """The solver made ready for this operator; factored once, on first use."""
        if not isinstance(self._solver, Prepared):
            self._solver = prepare(self.operator, self._solver)
        return self._solver

    def _solve(self, B: NDArray, what: str) -> Solution:
        solution = self.prepared(B)
        name, rtol = type(self.prepared.solver).__name__, self.prepared.solver.rtol
        smallest = float(np.min(solution.min_curvature, initial=np.inf, where=~np.isnan(
            solution.min_curvature)))  # fmt: skip
        if rtol is None:
            return solution
        if not solution.converged.all():
            worst = int(np.argmax(np.where(solution.converged, -np.inf, solution.residual)))
            message = (
                f"{name} left a relative residual of {solution.residual[worst]:.1e} "
                f"(rtol {rtol:.1e}) in {np.count_nonzero(~solution.converged)} of "
                f"{len(solution.converged)} systems for {what}: {solution.remedy}"
            )
            if (solution.min_curvature[~solution.converged] <= 0).any():
                raise DivergenceError(message)
            warn_unconverged(message)
        elif smallest < 0:
            warn_unconverged(
                f"{name} solved for {what}, but the matrix is indefinite (smallest curvature seen "
                f"{smallest:.3g}): theta is no minimum, and the scores are those of a saddle; use "
                f"a damping above {-smallest:.3g}, GaussNewton, or train on."
            )
        return solution


def _joined(parts: list[Solution]) -> Solution:
    per_column = ("residual", "iterations", "converged", "min_curvature")
    fields: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in per_column
    }
    return Solution(
        x=np.concatenate([part.x for part in parts], axis=1),
        remedy=next((part.remedy for part in parts if part.remedy), ""),
        **fields,
    )
