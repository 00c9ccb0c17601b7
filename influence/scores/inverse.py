"""How the minimum of a risk answers to its training rows: what `Influence` solves for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common.convergence import DivergenceError, warn_unconverged
from influence.common.progress import progress
from influence.curvature.operators import Curvature, Hessian, check_batch_size
from influence.examples.examples import Examples, check_rows
from influence.net.net import GenericNeuralNet
from influence.solvers import CG, Direct, Lanczos, Prepared, Solution, Solver, prepare
from influence.solvers.base import enough_damping

_MOST_TOGETHER = 512  # right-hand sides solved together, fewer where theta is long:
_BYTES_TOGETHER = 1 << 28  # what such a block may take, with
_COPIES = 5  # gradients, right-hand sides, solutions, their product with H and the residuals


class Response:
    """H^-1 for one net and one training set: base of `Influence`, whose arguments it takes.

    Removing row i moves theta by + H^-1 grad L(z_i) / n to first order (Koh & Liang 2017, section
    2.1); everything that Influence says follows from solves with H, all of them made here.
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

    def s_test(self, test: Examples, *, measurement: Any = None) -> Solution:
        """H^-1 grad loss for every test example: `x` is (d, m).

        The test loss excludes the penalty. Warns with ConvergenceWarning if a column missed the
        solver's tolerance.

        Args:
          test: m examples.
          measurement: another function of (y, output) than the loss, as in `Influence.scores`.

        Raises: DivergenceError if a direction of negative or no curvature was met, so that no
          inverse stands behind the numbers.
        """
        return self._s_test(self._measured(test, measurement)[0], test)

    def parameters(self, rows: ArrayLike) -> NDArray:
        """Predicted change of theta were each training row left out, + H^-1 grad L(z_i) / n.

        Args:
          rows: (k,) training rows.

        Returns: (k, d).
        """
        rows = self._rows(rows)
        blocks = [self._solve(G, "the rows' gradients").x.T for _, G in self._row_gradients(rows)]
        return np.concatenate(blocks) / len(self.train)

    def error_bound(self, scores: Any) -> NDArray:
        """How far each score can be from that of an exact solve: a certificate of the solver.

        |grad L(z_i)| |grad f - H s_test| / (n min_j |eigenvalue_j of H|): the residual that the
        solver left, see `Solution.score_error_bound`. What the first order neglects is not in it.
        After Direct it is an estimate for the columns whose residual is one.
        Costs a pass over the rows with each one's gradient, a vector of length d, but no solve.

        Args:
          scores: what `Influence.scores` of this net returned, (m, k).

        Returns: (m, k) in the scores' unit. NaN where no bound on H's eigenvalues is known: they
          are known for the convex models, for GaussNewton under damping or a penalty on all
          weights, and after Direct.
        Raises: RuntimeError if theta has changed since this was made.
        """
        self.operator.check_theta()
        blocks = [
            scores.solution.score_error_bound(G.T).T for _, G in self._row_gradients(scores.rows)
        ]
        return np.concatenate(blocks, axis=1) / len(self.train)

    @property
    def prepared(self) -> Prepared:
        """The solver made ready for this operator; factored once, on first use."""
        if not isinstance(self._solver, Prepared):
            self._solver = prepare(self.operator, self._solver)
        return self._solver

    # --- shared with Influence --------------------------------------------------------------------

    def _measured(self, test: Examples, measurement: Any) -> tuple[GenericNeuralNet, str]:
        """The net whose losses are what is measured, and what that is called."""
        self.net.validate(test, "test")
        if measurement is None:
            return self.net, "loss"
        view = self.net.measuring(measurement)
        view.validate(test, "test")
        return view, view.loss.name

    def _s_test(self, view: GenericNeuralNet, test: Examples) -> Solution:
        blocks = [
            self._solve(view.gradients(*batch).T, "the test gradients")
            for batch in test.batches(self._together)
        ]
        return blocks[0] if len(blocks) == 1 else _joined(blocks)

    def _rows(self, rows: ArrayLike | None) -> NDArray[np.int64]:
        return np.arange(len(self.train)) if rows is None else check_rows(rows, len(self.train))

    def _changes(self, S: NDArray, rows: NDArray[np.int64]) -> NDArray:
        """(k, m): S . grad L(z_i) / n for every row and column of S, in passes over the rows."""
        if len(rows) == len(self.train) and (rows == np.arange(len(rows))).all():
            return self._along(S, self.train)
        order = np.argsort(rows)
        changes = np.empty((len(rows), S.shape[1]), self.net.dtype)
        changes[order] = self._along(S, self.train, rows[order])
        return changes

    def _along(self, S: NDArray, examples: Examples, rows: NDArray | None = None) -> NDArray:
        """(k, m): the same for any examples, or increasing rows of theirs."""
        size = self.batch_size or self.net.rows_per_batch(examples, S.shape[1])
        parts = [self.net.directional(x, y, S) for x, y in examples.batches(size, rows)]
        return (np.concatenate(parts) + self.net.penalty_gradient() @ S) / len(self.train)

    def _row_gradients(self, rows: NDArray) -> Iterator[tuple[NDArray, NDArray]]:
        """(grad loss, grad L) block by block of rows, gradients as columns (d, b)."""
        penalty = self.net.penalty_gradient()[:, None]
        size = self._together
        if (np.diff(rows) > 0).all():  # one pass, which a stream may need
            batches = self.train.batches(size, rows)
        else:
            parts = (rows[start : start + size] for start in range(0, len(rows), size))
            batches = ((part.x, part.y) for part in map(self.train.take, parts))
        for x, y in progress(batches, "solving for training rows", -(-len(rows) // size)):
            G = self.net.gradients(x, y).T
            yield G, G + penalty

    @property
    def _together(self) -> int:
        per_vector = _COPIES * self.net.num_parameters * self.net.dtype.itemsize
        return int(np.clip(_BYTES_TOGETHER // per_vector, 1, _MOST_TOGETHER))

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

    def _solve(self, B: NDArray, what: str) -> Solution:
        solution = self.prepared(B)
        name, rtol = type(self.prepared.solver).__name__, self.prepared.solver.rtol
        smallest = float(np.min(solution.min_curvature, initial=np.inf, where=~np.isnan(
            solution.min_curvature)))  # fmt: skip
        if rtol is not None and not solution.converged.all():
            worst = int(np.argmax(np.where(solution.converged, -np.inf, solution.residual)))
            message = (
                f"{name} left a relative residual of {solution.residual[worst]:.1e} "
                f"(rtol {rtol:.1e}) in {np.count_nonzero(~solution.converged)} of "
                f"{len(solution.converged)} systems for {what}: {solution.remedy}"
            )
            stopped = (solution.min_curvature[~solution.converged] <= 0).any()
            if stopped and not isinstance(self.prepared.solver, Direct | Lanczos):
                raise DivergenceError(message)
            warn_unconverged(message)
        if smallest < 0:
            warn_unconverged(
                f"{name} solved for {what}, but the matrix is indefinite (smallest curvature seen "
                f"{smallest:.3g}): theta is no minimum, and the scores are those of a saddle; use "
                f"a damping above {enough_damping(self.prepared.A, smallest)}, GaussNewton, or "
                "train on."
            )
        return solution


def _joined(parts: list[Solution]) -> Solution:
    per_column = ("residual", "iterations", "converged", "min_curvature", "residual_norm")
    fields: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in per_column
    }
    return Solution(
        x=np.concatenate([part.x for part in parts], axis=1),
        eigenvalue_bound=parts[0].eigenvalue_bound,  # of the matrix that all share
        remedy=next((part.remedy for part in parts if part.remedy), ""),
        **fields,
    )
