"""Test quantities whose changes are predicted: one per test row, or one for the whole set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.common.convergence import warn_user
from influence.examples.examples import Examples
from influence.net.measurements import product
from influence.net.net import GenericNeuralNet
from influence.net.questions import PerRow, Total
from influence.scores.inverse import Inverse
from influence.solvers import Solution
from influence.solvers.plan import Plan

# These Keras losses are never negative.
_NONNEGATIVE = (
    keras.losses.binary_crossentropy,
    keras.losses.binary_focal_crossentropy,
    keras.losses.categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.categorical_hinge,
    keras.losses.hinge,
    keras.losses.huber,
    keras.losses.log_cosh,
    keras.losses.mean_absolute_error,
    keras.losses.mean_absolute_percentage_error,
    keras.losses.mean_squared_error,
    keras.losses.mean_squared_logarithmic_error,
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.squared_hinge,
)
# No warning is given if a predicted loss is negative by at most this fraction of the present loss.
_SLACK = 1e-3
# A warning names at most this many rows.
_NAMED = 3

Reduction = Literal["mean", "sum"] | Callable[[Any, Any], Any] | None


@dataclass(frozen=True, eq=False)
class Asked:
    """Question about a test set: how do m numbers f_1, ..., f_m change?

    If `reduce` is None, there is one number for each of the m test rows, such as its loss.
    Otherwise there is one number for the whole test set, and m = 1.

    Args:
      inverse: the `Inverse` of the net's curvature matrix.
      test: the test set, in any form that `Influence.scores` accepts.
      measurement: as in `Influence.scores`.
      reduce: as in `Influence.scores`.

    Attributes:
      view: a net whose losses are the measured quantities.
      name: the name of the measurement.
      test: the test set as Examples.
    Raises: TypeError or ValueError for a test set, measurement or reduction that does not fit.
    """

    inverse: Inverse
    view: GenericNeuralNet
    name: str
    test: Examples
    reduce: Reduction

    @classmethod
    def of(cls, inverse: Inverse, test: Any, measurement: Any, reduce: Reduction) -> Asked:
        """Check the arguments and make an `Asked` from them."""
        if reduce not in (None, "mean", "sum") and not callable(reduce):
            raise ValueError(
                "reduce must be 'mean', 'sum', a function (y, outputs) -> one number, or None, got "
                f"{reduce!r}."
            )
        if callable(reduce) and measurement is not None:
            raise ValueError(
                "measurement must be None if reduce is a function, got both; the function itself "
                "measures all outputs."
            )
        view, name, test = inverse.measured(test, measurement)
        if callable(reduce):
            if not test.in_memory:
                raise TypeError(
                    f"test must be held in memory if reduce is a function, got {test!r}; use "
                    "test.take(slice(None))."
                )
            name = getattr(reduce, "__name__", type(reduce).__name__)
        elif reduce is not None:
            name = f"{reduce} {name}"
        return cls(inverse, view, name, test, reduce)

    @property
    def plan(self) -> Plan:
        """The plan for this question.

        With `reduce`, first order solves one linear system. One step solves one system for each
        output of each test row. So one step is used with `reduce` only if the caller chose it for
        the `Inverse`.

        Raises: ValueError if the caller chose one step and `reduce` is a function.
        """
        if self.reduce is not None and self.inverse.approximation is None:
            return self.inverse.first_order_plan
        plan = self.inverse.plan
        if plan.approximation == "one_step" and callable(self.reduce):
            raise ValueError(
                "approximation must be 'first_order' if reduce is a function, got 'one_step'; use "
                "reduce='mean' or 'sum', or another Influence for this question."
            )
        return plan

    def joined(self, changes: NDArray) -> NDArray:
        """Return the changes (m, k) of f_1, ..., f_m, given those of each test row's number."""
        if self.reduce is None:
            return changes
        total = changes.sum(axis=0, keepdims=True)
        return total / len(changes) if self.reduce == "mean" else total

    def s_test(self) -> Solution:
        """Solve for H^-1 grad f_j for j = 1, ..., m. The solution's `x` is (d, m)."""
        if self.reduce is None:
            return self.inverse.s_test(self.test, self.view)
        gradient = self._gradient()[:, None]
        return self.inverse.solve(gradient, "the gradient of the whole test set")

    def _gradient(self) -> NDArray:
        size = self.inverse.batch_size
        if not callable(self.reduce):
            total = self.test.sum_over(Total("gradient"), self.view, batch_size=size)
            return total / len(self.test) if self.reduce == "mean" else total
        outputs = self.test.each_row(_outputs, self.view, batch_size=size)
        slopes = _slopes(self.reduce, self.view, self.test.y, outputs)
        pulled = self.view.measuring(product)
        rows = Examples._trusted(self.test.x, slopes)
        return rows.sum_over(Total("gradient"), pulled, batch_size=size)

    def present(self) -> NDArray | None:
        """Return f_1, ..., f_m at the current theta, (m,), if they are nonnegative losses.

        The result is None if `reduce` is a function, or if the loss may be negative.
        """
        if callable(self.reduce) or not never_negative(self.view.loss):
            return None
        losses = self.test.each_row(
            PerRow("losses"), self.view, batch_size=self.inverse.batch_size
        ).astype(np.float64)
        if self.reduce is None:
            return losses
        return np.array([losses.mean() if self.reduce == "mean" else losses.sum()])

    def warn_of_impossible(self, changes: NDArray, rows: Any) -> None:
        """Warn if a predicted loss is negative although the loss cannot be negative.

        Args:
          changes: (m, k) predicted changes.
          rows: (k,) names of the removed rows or groups, for the message.
        """
        present = self.present()
        if present is None:
            return
        after = present[:, None] + changes
        wrong = impossible(present, changes)
        if not wrong.any():
            return
        i, j = np.unravel_index(int(np.argmin(after)), after.shape)
        some = [str(rows[k]) for k in np.flatnonzero(wrong.any(axis=0))[:_NAMED]]
        more = int(wrong.any(axis=0).sum()) - len(some)
        warn_user(
            f"{int(wrong.sum())} of {wrong.size} predicted changes cannot be: test loss {i} is "
            f"{present[i]:.3g}, it cannot fall below 0, and it is predicted to change by "
            f"{changes[i, j]:.3g} without {rows[j]}. Do not use the sizes of these scores. They "
            f"belong to {', '.join(some)}{f' and {more} more' if more > 0 else ''}; leave_one_out "
            "and leave_group_out compute the actual changes."
        )


def never_negative(loss: Any) -> bool:
    """Return True if a loss is known to be never negative."""
    return loss.role == "loss" and getattr(loss, "keras_function", None) in _NONNEGATIVE


def impossible(present: NDArray, changes: NDArray) -> NDArray[np.bool_]:
    """Return (m, k) booleans that are True where a change (m, k) makes a loss (m,) negative."""
    return present[:, None] + changes < -_SLACK * np.maximum(present[:, None], 1e-12)


def _outputs(net: Any, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
    """Return the model's outputs for a batch. This is a question (influence.net.questions)."""
    return net.at(theta).outputs(x)


def _slopes(function: Callable, view: GenericNeuralNet, y: NDArray, outputs: NDArray) -> NDArray:
    """Return the derivative of function(y, outputs) with respect to the outputs, in their shape.

    Raises: ValueError if the function's value is not one number or not differentiable.
    """
    z = tf.constant(outputs)
    with tf.GradientTape() as tape:
        tape.watch(z)
        value = tf.convert_to_tensor(function(view.flat.tensor(y), z))
    if value.shape.rank != 0:
        raise ValueError(
            f"reduce must return one number of all outputs, got shape {tuple(value.shape)}."
        )
    slopes: Any = tape.gradient(value, z)
    if slopes is None:
        raise ValueError(
            "reduce must be differentiable by the outputs, got no gradient; argmax, rounding and "
            "comparisons have none."
        )
    return slopes.numpy()
