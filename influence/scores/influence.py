"""Influence functions: predicted changes of test losses if training rows are removed or added."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike, NDArray

from influence.common.memory import check_fits
from influence.common.named_array import Estimand, NamedArray
from influence.curvature.operators import Curvature
from influence.examples.examples import check_differentiable, check_increasing
from influence.examples.featured import inputs_of
from influence.examples.given import Data
from influence.net.checked import Net
from influence.net.history import History
from influence.scores import file, groups, relative
from influence.scores.asked import Asked, Reduction
from influence.scores.groups import GroupScores
from influence.scores.inverse import Approximation, Inverse
from influence.scores.one_step import OneStep, leverage_of_largest, warn_without_step
from influence.scores.relative import RelativeScores
from influence.solvers import Prepared, Solution, Solver
from influence.solvers.plan import Plan

# For at least this many rows, a closed form is faster than a solve for each row.
_MANY_ROWS = 64


@dataclass(frozen=True, eq=False)
class Scores(Estimand):
    """Predicted changes (m, k) of test losses if single training rows are removed.

    Attributes:
      change_if_removed: (m, k) change of test loss i if training row j is left out, in nats for log
        losses. Positive: the loss rises without the row, so the row helped.
      rows: (k,) the training rows.
      solution: the solver's report for each test example. `solution.x` is s_test (d, m).
      measurement: "loss", or the name of the measurement used instead.
      plan: the curvature, damping, solver and precision that were used.
      approximation: "first_order" or "one_step", the method that predicted the changes.
      leverage: (k,) leverage of each row, which measures the row's share of the risk's curvature
        (influence.scores.one_step). It is about the relative error of first order. With
        "first_order", only rows with the largest scores have a value, and all other rows have NaN.
        None if no leverage is computed.
    """

    solution: Solution
    plan: Plan | None = None
    approximation: str = "first_order"
    leverage: NDArray | None = None


@dataclass(frozen=True, eq=False)
class AdditionScores(NamedArray):
    """Predicted changes (m, k) of test losses if single new rows are added to the training set.

    Attributes:
      change_if_added: (m, k) change of test loss i if new row j is added. Positive: the loss rises
        with the row, so the row would hurt. `change_if_removed` has the opposite sign.
      solution: the solver's report for each test example. `solution.x` is s_test (d, m).
      measurement: "loss", or the name of the measurement used instead.
      plan: the curvature, damping, solver and precision that were used.
    """

    change_if_added: NDArray
    solution: Solution
    measurement: str = "loss"
    plan: Plan | None = None


class Influence:
    """Influence functions of a net at a minimum of its training risk (Koh & Liang 2017).

    Let L(z_i) = loss_i + penalty for row i of n. Let H be the Hessian of the risk plus damping I.
    To first order, leaving out row i changes theta by + H^-1 grad L(z_i) / n. A measurement f then
    changes by + grad f' H^-1 grad L(z_i) / n. This is -1/n times the paper's I_up,loss (eq. 2).
    Positive: the test loss rises without the row, so the row helped. s_test is H^-1 grad f. If the
    loss masks positions, let v_i be the number of valid positions of row i. Then v_i / sum_j v_j
    replaces 1 / n here and in all methods.

    The class chooses every option that the caller leaves out, before any score is computed. `plan`
    states each choice and its reason. A risk that is known to be convex gets its Hessian without
    damping. Most other risks get the Gauss-Newton matrix. The damping of this matrix is (1 -
    momentum) / (learning rate x steps) if Keras' SGD trained the model (Bae et al. 2022). Otherwise
    the damping is a tenth of the mean eigenvalue (Grosse et al. 2023). `Direct` solves if the
    matrix is quick to form and factor. If not, EKFAC solves for more than 100,000 weights, and CG
    for fewer. For nets with at most 100,000 weights, a float64 copy of the model is used.

    Args:
      net: a net, a compiled Keras model, or the path of a saved one. Its current theta is treated
        as the minimum of the training risk.
      train: the training set, as Examples or in any form that `fit` accepts.
      solver: the solver of systems with H, or None. A solver that `prepare` returned is accepted
        too. Its curvature and damping are then used. If a solver is given, the systems have the
        net's dtype.
      damping: the number >= 0 that multiplies I in H, or None. Its meaning is the same for every
        solver. None means 0 if `curvature` is `Hessian`.
      curvature: the matrix, `Hessian` or `GaussNewton`, or None. `GaussNewton` replaces the Hessian
        of the risk in H.
      batch_size: number of rows in a batch, or None to let the net choose. It limits memory and
        does not change the result.
      history: the History of the training, or the folder that `Recorder` wrote. It supplies the
        learning rates and steps for the damping. Without a history, the state of the model's
        optimiser supplies them.
      approximation: "one_step", "first_order" or None. One step removes the row's curvature
        together with its gradient. First order keeps the row's curvature, as Koh & Liang do. None
        means one step if the mean leverage of the rows is above .05 and the leverages are quick to
        compute. None means first order for a training set on disk, and for a given solver that
        approximates H. Only `scores` and `group` use this argument. All other methods, and score
        files, are first order.

    Attributes:
      inverse: the `Inverse` that solves systems with H.
      net, train, batch_size: the same objects as in `inverse`.

    Raises: TypeError or ValueError naming the argument that is wrong, before any long work.
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
        history: History | str | os.PathLike | None = None,
        approximation: Approximation | None = None,
    ):
        self.inverse = Inverse(
            net,
            train,
            solver=solver,
            damping=damping,
            curvature=curvature,
            batch_size=batch_size,
            history=History.of(history),
            approximation=approximation,
        )
        self.net, self.train, self.batch_size = self.inverse.net, self.inverse.train, batch_size

    @property
    def operator(self) -> Curvature:
        """The damped curvature matrix H. The first access may take passes over the data."""
        return self.inverse.operator

    @property
    def plan(self) -> Plan:
        """The curvature, damping, solver and precision that are used, and the reasons."""
        return self.inverse.plan

    @property
    def prepared(self) -> Prepared:
        """The solver, prepared for this operator on first use and then cached."""
        return self.inverse.prepared

    def s_test(self, test: Data, *, measurement: Any = None, reduce: Reduction = None) -> Solution:
        """Solve for H^-1 grad loss of every test example. The solution's `x` is (d, m).

        The test loss excludes the penalty. Issues a ConvergenceWarning if a column missed the
        solver's tolerance.

        Args:
          test: m examples, in any form that `fit` accepts.
          measurement: as in `scores`.
          reduce: as in `scores`.

        Raises: DivergenceError if a direction of negative or zero curvature stopped the solver.
        """
        return Asked.of(self.inverse, test, measurement, reduce).s_test()

    def scores(
        self,
        test: Data,
        rows: ArrayLike | None = None,
        *,
        measurement: Any = None,
        reduce: Reduction = None,
    ) -> Scores:
        """Predict how each test loss changes if a training row is left out.

        With first order, the score is s_test . grad L(z_i) / n. This is -1/n times I_up,loss (Koh &
        Liang 2017, eq. 2). One step also removes the curvature of the row. The score is then the
        test loss at the changed outputs minus the present test loss (influence.scores.one_step).
        Scores with `reduce` are first order unless this Influence has approximation="one_step".
        Positive: the test loss rises without the row, so the row helped.

        Issues a warning if the predicted value of a nonnegative loss is negative. Also warns if a
        row that is scored with first order has a leverage above .1.

        Args:
          test: m examples, in any form that `fit` accepts. Each has its own scores.
          rows: (k,) training rows; all n if omitted.
          measurement: a function of (y, output) that returns one number for each example. The
            change of this number is predicted instead of the change of the loss. The function must
            consist of TensorFlow operations, like those in `influence.measurements`. Positive: the
            number rises without the row.
          reduce: "mean", "sum", a function, or None. If given, the change of one number of the
            whole test set is predicted. Then m is 1, and first order solves one system. "mean" and
            "sum" count each row once, even if positions are masked. A function (y, outputs) maps
            all labels and outputs to the number, such as a difference between two groups.

        Returns: Scores (m, k), in the unit of the test loss (nats for log losses).
        Raises: ValueError, TypeError or IndexError for bad input; DivergenceError as `s_test`.
        """
        rows = self.inverse.rows(rows)
        asked = Asked.of(self.inverse, test, measurement, reduce)
        plan = asked.plan
        m, size = len(asked.test) if reduce is None else 1, self.net.dtype.itemsize
        check_fits(
            # Memory holds two (m, k) tables of scores, and three (d, m) arrays: right-hand sides,
            # s_test and a copy.
            (2.0 * m * len(rows) + 3.0 * m * self.net.num_parameters) * size,
            f"test must have scores that fit into memory, for {m:,} x {len(rows):,} pairs",
            "use write_scores, which writes them to a file block by block, or fewer test examples",
        )
        solution = asked.s_test()
        if plan.approximation == "one_step":
            removed = self._one_step.rows(rows)
            changes = asked.joined(self._one_step.changes(asked.view, asked.test, removed))
            changes = changes.astype(self.net.dtype, copy=False)
            leverage = removed.leverage
            warn_without_step(rows[removed.without_step])
        else:
            changes = self.inverse.along(solution.x, self.train, rows).T
            leverage = leverage_of_largest(self.inverse, rows, changes)
        asked.warn_of_impossible(changes, [f"training row {row}" for row in rows])
        return Scores(
            changes,
            rows,
            solution,
            plan,
            approximation=plan.approximation,
            leverage=leverage,
            measurement=asked.name,
        )

    @cached_property
    def _one_step(self) -> OneStep:
        return OneStep(self.inverse)

    def adding(
        self, test: Data, new: Data, *, measurement: Any = None, reduce: Reduction = None
    ) -> AdditionScores:
        """Predict how each test loss changes if a new row is added to the training set.

        With a new row z, the risk is the mean loss over n + 1 rows plus the same penalty. To first
        order, its minimum is theta - H^-1 grad L(z) / n. So the test loss changes by - s_test .
        grad L(z) / n. This is 1/n times I_up,loss (Koh & Liang 2017, eq. 2). Positive: the test
        loss rises with the row, so the row would hurt. First-order scores for removal have the
        opposite sign.

        Args:
          test: m examples. Each has its own scores.
          new: k examples outside the training set.
          measurement: as in `scores`.
          reduce: as in `scores`.

        Returns: AdditionScores (m, k), in the unit of the test loss.
        Raises: as `scores`.
        """
        asked = Asked.of(self.inverse, test, measurement, reduce)
        new = self.net.given(new, "new")
        self.net.validate(new, "new")
        solution = asked.s_test()
        changes = -self.inverse.along(solution.x, new).T
        return AdditionScores(changes, solution, asked.name, self.inverse.first_order_plan)

    def group(
        self,
        test: Data,
        rows: ArrayLike,
        order: Literal[1, 2, "one_step"] | None = None,
        *,
        measurement: Any = None,
    ) -> GroupScores:
        """Predict how each test loss changes if all rows of a group are removed together.

        Let g be the sum of grad L(z_i) over the group U of k rows. Order 1 is grad f . H^-1 g / n,
        the sum of the first-order scores of the rows (Koh et al. 2019). It usually underestimates
        the actual change. Order 2 is the complete expansion to second order in 1 / (n - k):

            D1 = H^-1 g / (n - k)
            D2 = D1 + k / (n - k) H^-1 (H_U - H) D1 - H^-1 T[D1, D1] / 2
            change = grad f . D2 + D1' (d2 f) D1 / 2

        H_U is the mean Hessian of L(z_i) over U, and T is the risk's third derivative. Basu, You &
        Feizi (2020) leave out the terms with T and d2 f. Order 2 takes one more solve than order 1,
        and one more pass over the training set. "one_step" is one Newton step on the risk without
        the group (influence.scores.one_step). It solves a system for each output of each row of the
        group. Positive: the test loss rises without the rows, so together they helped.

        Args:
          test: m examples. Each has its own score.
          rows: (k,) training rows. Order 2 needs fewer than half of all n.
          order: 1, 2, "one_step" or None. Order 2 needs `Hessian` as curvature. None means
            "one_step" if `plan` says so and the group's rows have at most 2,000 outputs together.
            Otherwise None means order 1.
          measurement: as in `scores`.

        Returns: GroupScores (m,), in the unit of the test loss.
        Raises: as `scores`; ValueError for another order, or for too many rows.
        """
        return groups.group(self.inverse, test, rows, order, measurement)

    def relative(
        self,
        test: Data,
        rows: ArrayLike | None = None,
        kind: Literal["theta", "loss"] = "theta",
        *,
        measurement: Any = None,
    ) -> RelativeScores:
        """Predict the change of each test loss, divided by the size of the change of theta.

        This is RelatIF (Barshan, Brunet & Dziugaite 2020). D = H^-1 grad L(z_i) / n is the
        predicted change of theta without row i. The size is |D| for "theta" and sqrt(D' H D) for
        "loss". Rows that change all losses, such as outliers, have a large size. Because of the
        division, they do not rank first for every test loss. Positive: the test loss rises without
        the row, so the row helped.

        Args:
          test: m examples. Each has its own scores.
          rows: (k,) training rows; all n if omitted. Each row needs a solve.
          kind: the size, "theta" or "loss". If H is the Fisher information, the size for "loss" is
            the root mean square of the changes of the losses of all rows.
          measurement: as in `scores`.

        Returns: RelativeScores (m, k), in the unit of the test loss divided by that of the size.
          The size has the unit of theta, or for "loss" the square root of the loss's unit. A score
          is NaN if the size is zero.
        Raises: as `scores`; ValueError for another kind; DivergenceError for a negative D' H D.
        """
        return relative.relative(self.inverse, test, rows, kind, measurement)

    def write_scores(
        self,
        path: str | Path,
        test: Data,
        rows: ArrayLike | None = None,
        *,
        measurement: Any = None,
        dtype: Literal["float32", "float64"] = "float32",
    ) -> Path:
        """Write first-order scores to an HDF5 file, block by block, if they do not fit into memory.

        The data set `change_if_removed` (m, k) holds s_test . grad L(z_i) / n. It is first order,
        even if `plan` names one step. Positive: the test loss rises without the row, so the row
        helped. Other data sets are `rows` (k,), `s_test` (m, d) in the net's dtype, and the
        solver's `residual`, `iterations`, `converged` and `min_curvature` (m,). `rounding_error` is
        the largest error in a sample of scores, relative to the largest score in the sample. In
        float32 it is at most about 1e-6. The file also has SHA-256 checksums of its numbers. An
        existing file is read and checked once. It is returned or continued only if it has not been
        altered.

        After an interruption, even by kill -9, the next call continues the unfinished file, whose
        name is `path` with ".partial" appended. The final file is the same as without an
        interruption. A system is not solved again if the file already has its solution. The call
        takes at most 0.3 GB of memory, or five vectors of theta's length if these take more. The
        net's batches and the solver need additional memory. `Direct` needs three d x d matrices. It
        needs up to five while TensorFlow forms the Hessian of a chain of layers.

        Args:
          path: path of the final file. A file with this name is complete.
          test: m examples. Each has its own scores.
          rows: (k,) increasing training rows; all n if omitted.
          measurement: as in `scores`.
          dtype: the dtype of the scores and of their computation from s_test. The systems for
            s_test are solved in the net's dtype.

        Returns: the path.
        Raises: as `scores`; ValueError for another dtype, rows that do not increase, too small a
          disk, or a `path` that is in use. A path is in use if it holds scores of other inputs or
          another format, altered scores, or a file that another process holds.
        """
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}.")
        n = len(self.train)
        rows = np.arange(n) if rows is None else check_increasing(rows, n)
        view, name, test = self.inverse.measured(test, measurement)
        job = file.Job(self.inverse, view, name, test, rows, dtype)
        return file.write(job, Path(path))

    def perturbation(self, test: Data, rows: ArrayLike, *, measurement: Any = None) -> Any:
        """Predict the derivatives of the test losses with respect to the inputs of training rows.

        The derivative of the risk's minimum with respect to the input x_i is -H^-1 (d/dx_i grad
        loss_i) / n. So the derivative of a test loss is -(d/dx_i grad loss_i . s_test) / n. At a
        minimum and without damping, it is the exact derivative of the test loss after retraining.
        Positive: the test loss rises if this entry of x_i rises. The result is 1/n times
        I_pert,loss (Koh & Liang 2017, section 2.2). The numbers of the authors' 2017 code are -n
        times ours.

        Args:
          test: m examples. Each has its own derivatives.
          rows: (k,) training rows. Their inputs must be floating-point numbers.
          measurement: as in `scores`.

        Returns: (m, k, *shape of one row's x), in the unit of the test loss per unit of x. For
          several inputs, a dict of such arrays.
        Raises: TypeError for integer inputs, which have no derivative; otherwise as `scores`.
        """
        chosen = inputs_of(self.train).take(self.inverse.rows(rows))
        check_differentiable(chosen.x)
        S = self.s_test(test, measurement=measurement).x
        question = partial(_input_gradients, S=S)
        how: dict[str, Any] = {"batch_size": self.batch_size, "what": "input gradients"}
        found = list(chosen.map_over(question, self.net, **how))

        def joined(*parts):
            slopes = np.concatenate(parts, axis=1) / -self.inverse.mass
            if self.net.loss.has_masses:
                masses = self.net.row_masses(chosen)
                slopes *= masses.reshape(1, -1, *[1] * (slopes.ndim - 2))
            return slopes

        return tf.nest.map_structure(joined, *found)

    def self_influence(self, rows: ArrayLike | None = None) -> NDArray:
        """Predict the change of each training row's own loss if that row is left out.

        To first order, the change is grad loss_i' H^-1 grad L(z_i) / n. `leave_one_out_outputs`
        gives the losses after one Newton step. The change is positive for almost every row. It is
        largest for rows that disagree with the other rows, such as rows with wrong labels. For 64
        rows or more, a closed form replaces CG if the net has one. If d > n, the closed form also
        replaces Direct.

        Args:
          rows: (k,) training rows; all n if omitted.

        Returns: (k,), in the unit of the loss.
        """
        rows = self.inverse.rows(rows)
        if len(rows) >= _MANY_ROWS and self.inverse.prefers_closed_form:
            closed_form = self.net.self_influence(self.train, rows)
            if closed_form is not None:
                return closed_form
        by_factors = self.inverse.row_lengths(rows)
        if by_factors is not None:
            return by_factors / self.inverse.mass
        changes = np.empty(len(rows), self.net.dtype)
        for at, G_loss, G in self.inverse.row_gradients(rows):
            X = self.inverse.solve(G, "the rows' gradients", measure=False).x
            changes[at] = np.einsum("di,di->i", G_loss, X)
        return changes / self.inverse.mass

    def parameters(self, rows: ArrayLike) -> NDArray:
        """Predict the change of theta, + H^-1 grad L(z_i) / n, if training row i is left out.

        Args:
          rows: (k,) training rows.

        Returns: (k, d).
        """
        rows = self.inverse.rows(rows)
        moves = np.empty((len(rows), self.net.num_parameters), self.net.dtype)
        for at, _, G in self.inverse.row_gradients(rows):
            moves[at] = self.inverse.solve(G, "the rows' gradients", measure=False).x.T
        moves /= self.inverse.mass
        return moves

    def error_bound(self, scores: Any) -> NDArray:
        """Bound the part of each score's error that the solver's residual causes.

        The bound is |grad L(z_i)| |grad f - H s_test| / (n min_j |eigenvalue_j of H|); see
        `Solution.score_error_bound`. The bound does not include the error of the first-order
        approximation. `Direct` estimates the residuals of some columns, and the bound of these
        columns is then also an estimate. The method computes the gradient of each row in one pass,
        without a solve.

        Args:
          scores: the Scores (m, k) that `scores` returned.

        Returns: (m, k) in the unit of the scores. NaN for one-step scores, and if no lower bound on
          the |eigenvalues| of H is known. Such a bound is known for the convex models, after
          Direct, and for GaussNewton with damping or a penalty on all weights.
        Raises: RuntimeError if theta has changed since this Influence was made.
        """
        self.operator.check_theta()
        bounds = np.full(scores.shape, np.nan)
        if getattr(scores, "approximation", "") == "one_step":
            return bounds
        for at, _, G in self.inverse.row_gradients(scores.rows):
            bounds[:, at] = scores.solution.score_error_bound(G.T).T
        return bounds / self.inverse.mass


def _input_gradients(net: Any, theta: NDArray | None, x: Any, y: NDArray, S: NDArray) -> Any:
    """Compute d/dx (grad loss . s) of b rows x for each of the m columns s of S: (m, b, ...)."""
    found = [net.at(theta).input_gradient(x, y, s) for s in S.T]
    return tf.nest.map_structure(lambda *parts: np.stack(parts), *found)
