"""H^-1 for one net and one training set, where H is the Hessian of the risk plus damping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

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
from influence.net.checked import Net, checked
from influence.net.history import History
from influence.net.net import GenericNeuralNet
from influence.net.questions import PerRow
from influence.solvers import CG, EKFAC, Prepared, Solution, Solver, prepare
from influence.solvers.base import answers_indefinite, check_solver, enough_damping, is_exact
from influence.solvers.plan import Plan, Planner, fits_in_memory, is_convex

# At most this many right-hand sides are solved together. The memory budget may allow fewer.
_MOST_TOGETHER = 512
# The plan is one step if the mean leverage of the training rows is above this.
WORTH_A_STEP = 0.05
# The plan is first order if the net has more outputs than this. One step solves one system for each
# output of each test row.
MOST_OUTPUTS = 64
# The effective dimension is estimated from this many random vectors.
_PROBES = 8
# The Gram matrix of the Jacobians of all rows' outputs has at most this order.
_LARGEST_GRAM = 10_000
# Memory holds this many vectors for each right-hand side b: the gradient, b, the solution x, H x
# and the residual.
_COPIES = 5


Approximation = Literal["first_order", "one_step"]
Blocks = Literal["dense", "gram", "factors", "solves"]


class Inverse:
    """The inverse H^-1 for one net and one training set. The arguments are those of `Influence`.

    With L = loss + penalty, removing row i moves theta by + H^-1 grad L(z_i) / n to first order
    (Koh & Liang 2017, section 2.1). If the loss masks positions, the risk weights row i by its mass
    v_i, the number of its valid positions. Then v_i / sum_j v_j replaces 1 / n. This class solves
    all systems that scores need.
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
        history: History | None = None,
        approximation: Approximation | None = None,
    ):
        check_batch_size(batch_size)
        if approximation not in (None, "first_order", "one_step"):
            raise ValueError(
                f"approximation must be 'first_order', 'one_step' or None, got {approximation!r}."
            )
        if curvature is not None and not (
            isinstance(curvature, type) and issubclass(curvature, Curvature)
        ):
            raise TypeError(f"curvature must be Hessian or GaussNewton, got {curvature!r}.")
        if not isinstance(solver, Prepared | None):
            check_solver(solver)
        net, train, _ = checked(net, train)
        how: dict[str, Any] = {"damping": damping, "curvature": curvature, "history": history}
        if history is not None:
            history.check_net(net)
            history.check_rows(train)
        self._planner = Planner(net, train, solver=solver, batch_size=batch_size, **how)
        self.net, self.train, self.batch_size = self._planner.net, train, batch_size
        self._solver = self._planner.solver
        self.approximation = approximation
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

    @cached_property
    def plan(self) -> Plan:
        """The curvature, damping, solver, precision and approximation, chosen on first use."""
        known = self.approximation
        how, why = (known, "given") if known is not None else self._planned()
        plan = self._planner.plan
        return replace(plan, approximation=how, reasons=(*plan.reasons[:4], why))

    @property
    def first_order_plan(self) -> Plan:
        """The plan of a score that is always first order. It needs no estimate of the leverage."""
        plan, why = self._planner.plan, "this question is answered to first order only"
        return replace(plan, approximation="first_order", reasons=(*plan.reasons[:4], why))

    def _planned(self) -> tuple[Approximation, str]:
        """Return "first_order" or "one_step", and the reason. Computes no score.

        The relative error of first order is about the row's leverage (influence.scores.one_step).
        The mean leverage is the effective dimension divided by n. It is at most d / n.
        """
        net, n, d = self.net, len(self.train), self.net.num_parameters
        if not self.train.in_memory:
            return "first_order", "the training rows are not in memory"
        if net.loss.has_masses:
            return "first_order", "the loss masks positions"
        if not (net.loss.convex and net.loss.from_logits):
            return "first_order", "the loss is not known to be convex in logits"
        if self.curvature is Hessian and not self._is_convex:
            return "first_order", "the Hessian of this net may be indefinite"
        if self._planner.solver_given and not (
            is_exact(self.solver) or isinstance(self.solver, CG)
        ):
            return "first_order", "the given solver approximates the matrix"
        if d <= WORTH_A_STEP * n:
            return "first_order", f"the mean leverage is at most {d / n:.2g}"
        c = net.output_size(self.train.take([0]).x)
        if c > MOST_OUTPUTS:
            return "first_order", f"one step takes a system for each of {c} outputs"
        if isinstance(self.solver, EKFAC):
            return "first_order", "EK-FAC approximates the matrix"
        if self.blocks_by == "solves":
            return "first_order", "one step takes a solve for each output of each training row"
        mean = self._effective_dimension() / n
        if mean <= WORTH_A_STEP:
            return "first_order", f"the mean leverage is at most {mean:.2g}"
        return "one_step", f"the mean leverage, and so the error of first order, is {mean:.2g}"

    def _effective_dimension(self) -> float:
        """Estimate tr(A^-1 G), the sum of all leverages. G is A without penalty and damping.

        The mean of v' G v over random vectors v estimates tr(G) (Hutchinson 1990). Let a be the
        damping plus a lower bound on the curvature of the penalty. x / (x + a) is concave, so tr(G
        (G + a I)^-1) <= tr(G) / (tr(G) / d + a). This bound takes no solve. A small bound is
        returned. Otherwise the mean of v' A^-1 G v is returned.
        """
        A, net = self.operator, self.net
        d, weakest = A.shape[0], np.nan_to_num(net.penalty_convexity) + A.damping
        count = min(_PROBES, self.block_size)
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (d, count)).astype(A.dtype)
        curved = A @ signs - net.penalty_hvp(signs) - A.damping * signs
        trace = float(np.einsum("dk,dk->k", signs, curved, dtype=np.float64).mean())
        bound = trace / (trace / d + weakest) if trace > 0 else 0.0
        if bound <= WORTH_A_STEP * len(self.train):
            return bound
        X = self.prepared(signs, measure=False).x
        return float(np.einsum("dk,dk->k", X, curved, dtype=np.float64).mean())

    @property
    def _is_convex(self) -> bool:
        return is_convex(self.net) or self._planner.affine

    @cached_property
    def blocks_by(self) -> Blocks:
        """The way to compute the output blocks K_i of rows (influence.curvature.blocks).

        "factors" is for EKFAC. "dense" inverts the dense matrix, if this fits into memory. "gram"
        factors the Gram matrix of the rows' outputs, if that fits. "solves" solves a system for
        each output of each row.
        """
        if isinstance(self.solver, EKFAC):
            return "factors"
        net, rows = self.net, len(self.train)
        order = rows * net.output_size(self.train.take([0]).x)
        if is_convex(net) or self._planner.fits or is_exact(self.solver):
            if fits_in_memory(net.num_parameters, net.dtype):
                return "dense"
            size = order * net.num_parameters * net.dtype.itemsize
            if order <= _LARGEST_GRAM and fits_in_memory(int(np.sqrt(size / 8)), net.dtype):
                return "gram"
        return "solves"

    @property
    def prepared(self) -> Prepared:
        """The solver, prepared for this operator on first use and then cached."""
        if not isinstance(self._solver, Prepared):
            self._solver = prepare(self.operator, self._solver)
        return self._solver

    @property
    def solver(self) -> Solver:
        """The solver's hyperparameters. They are also known before the solver is prepared."""
        return self._solver.solver if isinstance(self._solver, Prepared) else self._solver

    @property
    def mass(self) -> float:
        """The divisor of the risk: n, or the sum of the rows' masses if the loss has masks."""
        return self.net.mass(self.train)

    @property
    def block_size(self) -> int:
        """The number of right-hand sides that are solved together."""
        per_vector = _COPIES * self.net.num_parameters * self.net.dtype.itemsize
        return fitting(VECTORS, per_vector, _MOST_TOGETHER)

    def rows(self, rows: ArrayLike | None) -> NDArray[np.int64]:
        """Check the training row numbers (k,) and return them. None stands for all n rows."""
        self._planner.check_theta()
        return np.arange(len(self.train)) if rows is None else check_rows(rows, len(self.train))

    def measured(
        self, test: Data, measurement: Any = None
    ) -> tuple[GenericNeuralNet, str, Examples]:
        """Return a net whose losses are the measurement, the measurement's name, and the test set.

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
        """Solve for right-hand sides B (d, m), and warn of a doubtful solution.

        Args:
          B: the right-hand sides.
          what: name of the right-hand sides in warnings and errors.
          measure: as in `Prepared`.

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
        smallest = np.fmin.reduce(solution.min_curvature)  # NaN if the solver computes no curvature
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

        `view` is the net that `measured` returned for `test`. Its losses are the measured
        quantities. If `view` is None, the loss itself is measured and `test` is checked.

        Raises: as `solve` and `measured`.
        """
        if view is None:
            view, _, test = self.measured(test)
        gradients = test.map_over(PerRow("gradients"), view, batch_size=self.block_size)
        blocks = [self.solve(G.T, "the test gradients") for G in gradients]
        return blocks[0] if len(blocks) == 1 else _joined(blocks)

    def along(self, S: NDArray, examples: Examples, rows: NDArray | None = None) -> NDArray:
        """Compute s . grad L(z_i) / n, (k, m), for the columns s of S (d, m) and k rows.

        `rows` (k,) are rows of `examples`, in any order. None means all rows of `examples`.
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
        """Yield the gradients of k training rows in blocks. `rows` (k,) may be in any order.

        Yields: (at, grad loss, v grad L) for each block. The block holds the rows rows[at]. Both
          gradients are (d, b), with one column for each row. L = loss + penalty, and v is the mass
          of the row.
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
        """Compute v_i grad loss_i . H^-1 grad L(z_i) of training rows, (k,), if that is cheap.

        Returns: the products, or None if the solver needs a solve for each row. EKFAC needs at most
          one solve for all rows.
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
        """True if the net's closed form should replace the solver. The net may have none.

        The matrix must be the undamped Hessian at the net's current theta. The solver must be CG,
        or an exact solver such as Direct with d > n.
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
