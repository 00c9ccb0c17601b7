"""H^-1 for one net and one training set, where H is the Hessian of the risk plus damping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common.convergence import DivergenceError, warn_unconverged
from influence.common.memory import VECTORS, fitting
from influence.curvature.operators import (
    Curvature,
    Hessian,
    check_batch_size,
    check_damping,
)
from influence.examples.examples import Examples, check_rows
from influence.examples.given import Data
from influence.net.net import GenericNeuralNet, Net, checked
from influence.net.questions import PerRow
from influence.solvers import CG, Prepared, Solution, Solver, prepare
from influence.solvers.base import answers_indefinite, check_solver, enough_damping, is_exact
from influence.solvers.plan import Plan, Planner

# At most this many right-hand sides are solved together. A long theta allows fewer.
_MOST_TOGETHER = 512
# Each right-hand side needs this many vectors: its gradient, itself, the solution, the solution's
# product with H, and the residual.
_COPIES = 5


class Inverse:
    """The inverse H^-1 of one net and one training set. The arguments are those of `Influence`.

    With L = loss + penalty, removing row i moves theta by + H^-1 grad L(z_i) / n to first order
    (Koh & Liang 2017, section 2.1). If positions are masked, the risk weighs row i by its mass v_i,
    and v_i / sum_j v_j replaces 1 / n. This class does all solves that scores need.
    """

    def __init__(
        self,
        net: Net,
        train: Data,
        *,
        solver: Solver | Prepared | None = None,
        damping: float | None = None,
        curvature: type[Curvature] | None = None,
        batch_size: int | None = None,
    ):
        check_batch_size(batch_size)
        if curvature is not None and not (
            isinstance(curvature, type) and issubclass(curvature, Curvature)
        ):
            raise TypeError(f"curvature must be Hessian or GaussNewton, got {curvature!r}.")
        if not isinstance(solver, Prepared | None):
            check_solver(solver)
        net, train, _ = checked(net, train)
        how: dict[str, Any] = {"damping": damping, "curvature": curvature}
        self._planner = Planner(net, train, solver=solver, batch_size=batch_size, **how)
        self.net, self.train, self.batch_size = self._planner.net, train, batch_size
        self._solver = self._planner.solver
        if damping is not None:
            check_damping(damping)
        if isinstance(solver, Prepared):
            # `prepare` raises ValueError if `solver` was prepared for another matrix.
            prepare(self.operator, solver)

    @property
    def operator(self) -> Curvature:
        """The damped curvature matrix H. First use may take some passes over the data."""
        return self._planner.operator

    @property
    def curvature(self) -> type[Curvature]:
        """The class of `operator`."""
        return self._planner.curvature

    @property
    def plan(self) -> Plan:
        """The choice of curvature, damping, solver and precision. It is made on first use."""
        return self._planner.plan

    @property
    def prepared(self) -> Prepared:
        """The solver, prepared for this operator on first use and then cached."""
        if not isinstance(self._solver, Prepared):
            self._solver = prepare(self.operator, self._solver)
        return self._solver

    @property
    def solver(self) -> Solver:
        """The solver's hyperparameters, whether or not it has been prepared."""
        return self._solver.solver if isinstance(self._solver, Prepared) else self._solver

    @property
    def mass(self) -> float:
        """The number by which the risk divides: n, or the sum of the masses if there are masks."""
        return self.net.mass(self.train)

    @property
    def block_size(self) -> int:
        """The number of right-hand sides that are solved together."""
        per_vector = _COPIES * self.net.num_parameters * self.net.dtype.itemsize
        return fitting(VECTORS, per_vector, _MOST_TOGETHER)

    def rows(self, rows: ArrayLike | None) -> NDArray[np.int64]:
        """Check training row numbers, (k,); None means all n."""
        self._planner.check_theta()
        return np.arange(len(self.train)) if rows is None else check_rows(rows, len(self.train))

    def measured(
        self, test: Data, measurement: Any = None
    ) -> tuple[GenericNeuralNet, str, Examples]:
        """Return the net whose losses are the measurement's values, its name, and the test set.

        Raises: TypeError or ValueError for a test set or a measurement that does not fit the net.
        """
        self._planner.check_theta()
        test = self.net.given(test, "test")
        self.net.validate(test, "test")
        if measurement is None:
            return self.net.by_row(), "loss", test
        view = self.net.measuring(measurement)
        view.validate(test, "test")
        return view.by_row(), view.loss.name, test

    def solve(self, B: NDArray, what: str, *, measure: bool = True) -> Solution:
        """Solve for right-hand sides B (d, m), and warn of a doubtful answer.

        Messages call the right-hand sides `what`. `measure` is that of `Prepared`.

        Raises: DivergenceError if a direction of negative or zero curvature stopped the solver.
        """
        solution = self.prepared(B, measure=measure)
        name, rtol = type(self.solver).__name__, self.solver.rtol
        if rtol is not None and not solution.converged.all():
            worst = int(np.argmax(np.where(solution.converged, -np.inf, solution.residual)))
            message = (
                f"{name} left a relative residual of {solution.residual[worst]:.1e} "
                f"(rtol {rtol:.1e}) in {np.count_nonzero(~solution.converged)} of "
                f"{len(solution.converged)} systems for {what}: {solution.remedy}"
            )
            stopped = (solution.min_curvature[~solution.converged] <= 0).any()
            if stopped and not answers_indefinite(self.solver):
                raise DivergenceError(message)
            warn_unconverged(message)
        smallest = np.fmin.reduce(solution.min_curvature)  # NaN if the solver measured none
        if smallest < 0:
            warn_unconverged(
                f"{name} solved for {what}, but the matrix is indefinite (smallest curvature seen "
                f"{smallest:.3g}): theta is no minimum, and the scores are those of a saddle; use "
                f"a damping above {enough_damping(self.prepared.A, smallest)}, GaussNewton, or "
                "train on."
            )
        return solution

    def s_test(self, test: Examples, view: GenericNeuralNet | None = None) -> Solution:
        """Compute H^-1 grad loss for every test example: `x` is (d, m).

        `view` is the net whose losses are measured, as `measured` returned it for `test`. None uses
        the net itself and checks `test`.

        Raises: as `solve` and `measured`.
        """
        if view is None:
            view, _, test = self.measured(test)
        gradients = test.map_over(PerRow("gradients"), view, batch_size=self.block_size)
        blocks = [self.solve(G.T, "the test gradients") for G in gradients]
        return blocks[0] if len(blocks) == 1 else _joined(blocks)

    def along(self, S: NDArray, examples: Examples, rows: NDArray | None = None) -> NDArray:
        """Compute S . grad L(z_i) / n, (k, m), for vectors S (d, m) and k rows of `examples`.

        `rows` (k,) may be in any order. None uses all rows of `examples`.
        """
        if rows is not None and np.array_equal(rows, np.arange(len(examples))):
            rows = None  # this avoids a copy of sparse rows
        question = PerRow("directional", S)
        changes = examples.each_row(question, self.net, rows=rows, batch_size=self.batch_size)
        changes = changes + self.net.penalty_gradient() @ S
        if self.net.loss.has_masses:
            masses = self.net.row_masses(examples)
            changes *= (masses if rows is None else masses[rows])[:, None]
        return changes / self.mass

    def row_gradients(self, rows: NDArray) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
        """Yield gradients of training rows (k,), which may be in any order, in blocks.

        Yields: (at, grad loss, v grad L) for each block. The block holds rows[at]. Both gradients
          are (d, b), one column for each row. L = loss + penalty, and v is the row's mass.
        """
        penalty = self.net.penalty_gradient()[:, None]
        order, start = np.argsort(rows), 0
        how: dict[str, Any] = {"batch_size": self.block_size, "what": "solving for training rows"}
        for block in self.train.map_over(PerRow("gradients"), self.net, None, rows[order], **how):
            G, at = block.T, order[start : start + len(block)]
            pull = G + penalty
            if self.net.loss.has_masses:
                pull *= self.net.row_masses(self.train)[rows[at]]
            yield at, G, pull
            start += len(block)

    def row_lengths(self, rows: NDArray) -> NDArray | None:
        """Compute v_i grad loss_i . H^-1 grad L(z_i) of training rows, (k,), with few solves.

        Returns: None if the solver has no shorter way than a solve, as all but EKFAC.
        """
        prepared = self.prepared
        question = getattr(prepared.apply, "row_lengths", None)
        if question is None or prepared.exponent:
            return None
        how: dict[str, Any] = {"rows": rows, "batch_size": self.batch_size or question.rows}
        found = self.train.each_row(question, self.net, **how, what="self-influence")
        pull = self.net.penalty_gradient()
        if pull.any():
            s = self.solve(pull, "the penalty's gradient", measure=False).x
            found += self.train.each_row(PerRow("directional", s), self.net, **how)
        if self.net.loss.has_masses:
            found = found * self.net.row_masses(self.train)[rows]
        return found.astype(self.net.dtype)

    @property
    def prefers_closed_form(self) -> bool:
        """True if the net's closed form should replace the solver, provided that the net has one.

        The matrix must be the undamped Hessian at the net's present theta. The solver must be CG,
        or an exact one such as Direct with d > n.
        """
        operator = self._solver.A if isinstance(self._solver, Prepared) else self.operator
        # If d <= n, Direct takes about as long as a closed form.
        slow_direct = is_exact(self.solver) and self.net.num_parameters > len(self.train)
        return (
            (slow_direct or isinstance(self.solver, CG))
            and type(operator) is Hessian
            and not operator.damping
            and operator.is_current
        )


def _joined(parts: list[Solution]) -> Solution:
    per_column = ("residual", "iterations", "converged", "min_curvature", "residual_norm")
    fields: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in per_column
    }
    return Solution(
        x=np.concatenate([part.x for part in parts], axis=1),
        eigenvalue_bound=parts[0].eigenvalue_bound,  # all parts share one matrix
        remedy=next((part.remedy for part in parts if part.remedy), ""),
        **fields,
    )
