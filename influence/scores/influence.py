"""Influence: the changes that the risk's curvature predicts if training rows are removed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike, NDArray

from influence.common.named_array import Estimand, NamedArray
from influence.curvature.operators import Curvature, Hessian
from influence.examples.examples import Examples, check_differentiable, check_increasing
from influence.net.net import GenericNeuralNet
from influence.scores import file, groups, relative
from influence.scores.groups import GroupScores
from influence.scores.inverse import Inverse
from influence.scores.relative import RelativeScores
from influence.solvers import CG, Prepared, Solution, Solver

# From this many rows on, one factorisation for all rows is faster than a solve for each row.
_MANY_ROWS = 64


@dataclass(frozen=True, eq=False)
class Scores(Estimand):
    """Predicted changes, (m, k), of each test loss if each training row is removed.

    Attributes:
      change_if_removed: (m, k) change of each test loss (nats for log losses) if each training row
        is left out. Positive: the loss rises without the row, so the row helped.
      rows: (k,) the training rows.
      solution: the solver's report on each test example's system; `solution.x` is s_test (d, m).
      measurement: "loss", or the name of the measurement used instead.
    """

    solution: Solution


@dataclass(frozen=True, eq=False)
class AdditionScores(NamedArray):
    """Predicted changes, (m, k), of each test loss if each new row is added to the training set.

    Attributes:
      change_if_added: (m, k). Positive: the loss rises with the row, so the row would hurt; the
        opposite of `change_if_removed`.
      solution: the solver's report on each test example's system; `solution.x` is s_test (d, m).
      measurement: "loss", or the name of the measurement used instead.
    """

    change_if_added: NDArray
    solution: Solution
    measurement: str = "loss"


class Influence:
    """Influence functions of a net at a minimum of its training risk (Koh & Liang 2017).

    Leaving row i out changes theta by + H^-1 grad L(z_i) / n and a measurement f by
    + grad f' H^-1 grad L(z_i) / n, to first order, where L(z_i) = loss_i + penalty and H is the
    Hessian of the risk plus damping I. That is -1/n times the paper's I_up,loss (eq. 2): positive
    means that the test loss rises without the row, so the row helped.

    Args:
      net: the model, at its theta.
      train: the training set.
      solver: how H^-1 is applied; the default CG() stops at a relative residual of 1e-6. A solver
        that `prepare` returned is used as it is.
      damping: absolute, part of the operator, the same for every solver.
      curvature: `Hessian` or `GaussNewton`.
      batch_size: rows at a time; bounds memory and never changes a result. None: chosen.

    Attributes:
      inverse: the `Inverse` that solves with H; net, train, batch_size and operator are its own.

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
        self.inverse = Inverse(
            net, train, solver=solver, damping=damping, curvature=curvature, batch_size=batch_size
        )
        self.net, self.train, self.batch_size = net, train, batch_size
        self.operator = self.inverse.operator

    @property
    def prepared(self) -> Prepared:
        """The solver prepared for this operator; factored once, on first use."""
        return self.inverse.prepared

    def s_test(self, test: Examples, *, measurement: Any = None) -> Solution:
        """Compute H^-1 grad loss for every test example: `x` is (d, m).

        The test loss excludes the penalty. Warns with ConvergenceWarning if a column missed the
        solver's tolerance.

        Args:
          test: m examples.
          measurement: a function of (y, output) in place of the loss, as in `scores`.

        Raises: DivergenceError if the solver met a direction of negative or zero curvature, where
          its answer is no inverse.
        """
        view, _ = self.inverse.measured(test, measurement)
        return self.inverse.s_test(test, view)

    def scores(
        self, test: Examples, rows: ArrayLike | None = None, *, measurement: Any = None
    ) -> Scores:
        """Predict the change of each test loss if each training row is left out.

        s_test . grad L(z_i) / n, first order, -1/n times I_up,loss (Koh & Liang 2017, eq. 2).
        Positive: the test loss rises without the row, so the row helped.

        Args:
          test: m examples, each a measurement of its own; `.mean(axis=0)` averages them.
          rows: (k,) training rows; all n if omitted.
          measurement: a function of (y, output) -> (n,), whose change is predicted instead of the
            loss's. It consists of TensorFlow operations, as those of `influence.measurements` do.
            Positive: the measurement rises without the row.

        Returns: Scores (m, k), in the unit of the test loss (nats for log losses).
        Raises: ValueError, TypeError or IndexError for bad input; DivergenceError as `s_test`.
        """
        rows = self.inverse.rows(rows)
        view, name = self.inverse.measured(test, measurement)
        solution = self.inverse.s_test(test, view)
        changes = self.inverse.along(solution.x, self.train, rows).T
        return Scores(changes, rows, solution, measurement=name)

    def adding(self, test: Examples, new: Examples, *, measurement: Any = None) -> AdditionScores:
        """Predict the change of each test loss if each new row is added, one at a time.

        The mean over n + 1 rows plus the same penalty has its minimum, to first order, at
        theta - H^-1 grad L(z) / n, so the change is - s_test . grad L(z) / n: I_up,loss (Koh &
        Liang 2017, eq. 2) at a weight of + 1/n. Positive: the test loss rises with the row, so the
        row would hurt; removal has the opposite sign.

        Args:
          test: m examples, each a measurement of its own.
          new: k examples outside the training set.
          measurement: as in `scores`.

        Returns: AdditionScores (m, k), in the unit of the test loss.
        Raises: as `scores`.
        """
        view, name = self.inverse.measured(test, measurement)
        self.net.validate(new, "new")
        solution = self.inverse.s_test(test, view)
        return AdditionScores(-self.inverse.along(solution.x, new).T, solution, name)

    def group(
        self, test: Examples, rows: ArrayLike, order: int = 1, *, measurement: Any = None
    ) -> GroupScores:
        """Predict the change of each test loss if all the rows are removed together.

        Order 1: the sum of their scores, grad f . H^-1 g / n with g = sum_U grad L(z_i) over the k
        rows U (Koh et al. 2019). It usually underestimates the actual change. Order 2: the whole
        expansion to second order in the group's weight,

            D1 = H^-1 g / (n - k)
            D2 = D1 + k / (n - k) H^-1 (H_U - H) D1 - H^-1 T[D1, D1] / 2
            change = grad f . D2 + D1' (d2 f) D1 / 2

        H_U is the mean Hessian of L(z_i) over U, and T the risk's third derivative. Basu, You &
        Feizi (2020) leave out T and d2 f. Order 2 takes one more solve and one more pass over the
        training set. Positive: the test loss rises without the rows, so together they helped.

        Args:
          test: m examples, each a measurement of its own.
          rows: (k,) training rows; for order 2, fewer than half of all n.
          order: 1 or 2; 2 needs `Hessian` as curvature.
          measurement: as in `scores`.

        Returns: GroupScores (m,), in the unit of the test loss.
        Raises: as `scores`; ValueError for another order, or for too many rows.
        """
        return groups.group(self.inverse, test, rows, order, measurement)

    def relative(
        self,
        test: Examples,
        rows: ArrayLike | None = None,
        kind: Literal["theta", "loss"] = "theta",
        *,
        measurement: Any = None,
    ) -> RelativeScores:
        """Predict the change of each test loss per unit by which removing the row moves theta.

        score / size, RelatIF (Barshan, Brunet & Dziugaite 2020), with D = H^-1 grad L(z_i) / n the
        predicted change of theta and size = |D| for "theta", sqrt(D' H D) for "loss". A row that
        changes all losses, such as an outlier, gets no larger value than others; 1/n cancels.
        Positive: the test loss rises without the row, so the row helped.

        Args:
          test: m examples, each a measurement of its own.
          rows: (k,) training rows, a solve for each; all n if omitted.
          kind: "theta" or "loss". If H is the Fisher information, the size of "loss" is the root
            mean square, over the data, of the change of a row's loss.
          measurement: as in `scores`.

        Returns: RelativeScores (m, k): the unit of the test loss per unit of theta ("theta") or
          per square root of the loss's unit ("loss"); NaN for a row that changes nothing.
        Raises: as `scores`; ValueError for another kind; DivergenceError for a negative D' H D.
        """
        return relative.relative(self.inverse, test, rows, kind, measurement)

    def write_scores(
        self,
        path: str | Path,
        test: Examples,
        rows: ArrayLike | None = None,
        *,
        measurement: Any = None,
        dtype: Literal["float32", "float64"] = "float32",
    ) -> Path:
        """Write `scores` that are too many for memory to an HDF5 file, block by block.

        The data set `change_if_removed` (m, k) holds s_test . grad L(z_i) / n with the sign of
        `scores`: positive, the test loss rises without the row, so the row helped. Other data sets
        are `rows` (k,), `s_test` (m, d) in the net's dtype, the solver's `residual`, `iterations`,
        `converged` and `min_curvature` (m,), and `rounding_error`: the largest error in a sample of
        scores relative to the largest of them, about 1e-6 at most in float32. Everything else is in
        attributes. SHA-256 checksums are kept beside the numbers; a file that is there already is
        read once and returned or continued only if it is as it was written.

        After an interruption, kill -9 included, the next call continues from `path` with
        ".partial" appended and ends with the same file; it solves no finished system again. It
        takes at most 0.3 GB of memory, or five vectors of theta's length if those are more, besides
        the net's batches and the solver (`Direct`: three d x d matrices; up to five while
        TensorFlow forms the Hessian of a chain of layers).

        Args:
          path: the file. It is complete as soon as it has this name.
          test: m examples, each a measurement of its own.
          rows: (k,) increasing training rows; all n if omitted.
          measurement: as in `scores`.
          dtype: of the scores and of their multiplication; solves are in the net's dtype.

        Returns: the path.
        Raises: as `scores`; ValueError for another dtype, rows that do not increase, too small a
          disk, or a path where something else is: scores of other inputs (named), of another
          format, or altered, or a file that another process holds.
        """
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}.")
        n = len(self.train)
        rows = np.arange(n) if rows is None else check_increasing(rows, n)
        view, name = self.inverse.measured(test, measurement)
        job = file.Job(self.inverse, view, name, test, rows, dtype)
        return file.write(job, Path(path))

    def perturbation(self, test: Examples, rows: ArrayLike, *, measurement: Any = None) -> Any:
        """Predict the derivative of each test loss with respect to each training row's input.

        As x_i moves, the minimum of the risk moves along -H^-1 (d/dx_i grad loss_i) / n, so the
        derivative is -(d/dx_i grad loss_i . s_test) / n. It is exactly that of the test loss after
        retraining if theta is the minimum and the damping is zero. Positive: the test loss rises
        as that entry of the row's input rises. This is 1/n times I_pert,loss (Koh & Liang 2017,
        section 2.2); the 2017 release's own numbers are -n times these.

        Args:
          test: m examples, each a measurement of its own.
          rows: (k,) training rows, with floating inputs.
          measurement: as in `scores`.

        Returns: (m, k, *shape of one row's x), or a dict of such arrays for several inputs, in the
          unit of the test loss per unit of x.
        Raises: TypeError for integer inputs, which have no derivative; otherwise as `scores`.
        """
        chosen = self.train.take(self.inverse.rows(rows))
        check_differentiable(chosen.x)
        S = self.s_test(test, measurement=measurement).x
        question = partial(_input_gradients, S=S)
        how: dict[str, Any] = {"batch_size": self.batch_size, "what": "input gradients"}
        found = list(chosen.map_over(question, self.net, **how))

        def joined(*parts):
            return np.concatenate(parts, axis=1) / -len(self.train)

        return tf.nest.map_structure(joined, *found)

    def self_influence(self, rows: ArrayLike | None = None) -> NDArray:
        """Predict the change of each training row's own loss if that row is left out.

        grad loss_i' H^-1 grad L(z_i) / n. Positive for almost every row. The largest values belong
        to rows that the other rows do not explain, such as wrong labels. For many rows the net's
        closed form is used, if it has one that is faster than CG or Direct.

        Args:
          rows: (k,) training rows; all n if omitted.

        Returns: (k,), in the unit of the loss.
        """
        rows = self.inverse.rows(rows)
        if len(rows) >= _MANY_ROWS and self.inverse.prefers_closed_form:
            closed_form = self.net.self_influence(self.train, rows)
            if closed_form is not None:
                return closed_form
        changes = np.empty(len(rows), self.net.dtype)
        for at, G_loss, G in self.inverse.row_gradients(rows):
            X = self.inverse.solve(G, "the rows' gradients").x
            changes[at] = np.einsum("di,di->i", G_loss, X)
        return changes / len(self.train)

    def parameters(self, rows: ArrayLike) -> NDArray:
        """Predict the change of theta if each training row is left out, + H^-1 grad L(z_i) / n.

        Args:
          rows: (k,) training rows.

        Returns: (k, d).
        """
        rows = self.inverse.rows(rows)
        moves = np.empty((len(rows), self.net.num_parameters), self.net.dtype)
        for at, _, G in self.inverse.row_gradients(rows):
            moves[at] = self.inverse.solve(G, "the rows' gradients").x.T
        moves /= len(self.train)
        return moves

    def error_bound(self, scores: Any) -> NDArray:
        """Bound each score's distance from that of an exact solve: a certificate of the solver.

        |grad L(z_i)| |grad f - H s_test| / (n min_j |eigenvalue_j of H|), from the residual that
        the solver left, see `Solution.score_error_bound`. It excludes the error of the first-order
        approximation. After Direct it is an estimate in the columns whose residual is an estimate.
        It costs a pass over the rows with each row's gradient, a vector of length d, but no solve.

        Args:
          scores: Scores (m, k) that `scores` returned.

        Returns: (m, k) in the scores' unit. NaN if no bound on H's eigenvalues is known. One is
          known for the convex models, for GaussNewton with damping or a penalty on all weights,
          and after Direct.
        Raises: RuntimeError if theta has changed since this was made.
        """
        self.operator.check_theta()
        bounds = np.empty(scores.shape)
        for at, _, G in self.inverse.row_gradients(scores.rows):
            bounds[:, at] = scores.solution.score_error_bound(G.T).T
        return bounds / len(self.train)


def _input_gradients(net: Any, theta: NDArray | None, x: Any, y: NDArray, S: NDArray) -> Any:
    """Compute d/dx (grad loss . s) of a batch for every column s of S: (m, b, ...)."""
    found = [net.at(theta).input_gradient(x, y, s) for s in S.T]
    return tf.nest.map_structure(lambda *parts: np.stack(parts), *found)
