"""Predicted effects of removing a group of rows, to first and to second order.

R is the risk, which is the mean of L_i = loss_i + penalty over n rows. U is a group of k rows. The
risk without U is (n R - sum_U L_i) / (n - k). With the weight w = 1 / (n - k), it equals R + w (k R
- sum_U L_i). Let H and T be the second and third derivatives of R. Let H_U be the mean Hessian of
L_i over U, and g = sum_U grad L_i. Then removing U moves the minimum by

    D1 = w H^-1 g                                                          to first order in w
    D2 = D1 + w k H^-1 (H_U - H) D1 - H^-1 T[D1, D1] / 2                   to second order in w

A measurement f changes by grad f . D2 + D1' (d2 f) D1 / 2. This sum has all terms up to second
order. Basu, You & Feizi (2020) leave out the terms with T and d2 f. For logistic regression these
terms are as large as the other second-order terms. Without them, the second-order prediction can be
further from the refit than the first-order prediction. For a quadratic risk and a linear
measurement both terms are zero, and their formula equals ours.

The expansion gives no bound on the error. It is meaningless if U has half of the rows or more. If U
has no curvature, the term with H_U - H is - k / (n - k) times D1.

If the loss masks positions, v_i is the number of valid positions of row i. The means over rows and
the sum g then have the weights v_i, and n and k are sums of v_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common.named_array import NamedArray
from influence.curvature.operators import Hessian
from influence.examples.examples import Examples, check_rows
from influence.examples.given import Data
from influence.net.net import GenericNeuralNet
from influence.net.questions import PerRow, Total
from influence.scores.asked import Asked
from influence.scores.inverse import Inverse
from influence.scores.one_step import OneStep
from influence.solvers import Solution
from influence.solvers.plan import Plan

Order = Literal[1, 2, "one_step"]
# If the caller gives no order, one step is used for groups with at most this many outputs.
_MOST_OUTPUTS = 2000
# One step can remove groups of at most this many rows.
_MOST_ROWS = 1000


@dataclass(frozen=True, eq=False)
class GroupScores(NamedArray):
    """Predicted changes (m,) of the test losses if all rows of a group are removed together.

    Attributes:
      change_if_removed_together: (m,) change of each test loss. Positive: the loss rises without
        the rows, so together they helped.
      rows: (k,) the training rows of the group.
      order: 1, 2 or "one_step".
      solution: the solver's report for each test example. `solution.x` is s_test (d, m).
      measurement: "loss", or the name of the measurement used instead.
      plan: the curvature, damping, solver and precision that were used.
    """

    change_if_removed_together: NDArray
    rows: NDArray[np.int64]
    order: Order
    solution: Solution
    measurement: str = "loss"
    plan: Plan | None = None


def group(
    inverse: Inverse, test: Data, rows: ArrayLike, order: Order | None, measurement: Any
) -> GroupScores:
    """Compute the GroupScores of `Influence.group` by the formulas of this module."""
    n = len(inverse.train)
    rows = check_rows(rows, n)
    if order not in (1, 2, "one_step", None):
        raise ValueError(f"order must be 1, 2, 'one_step' or None, got {order!r}.")
    if len(rows) == n:
        raise ValueError(f"rows must leave at least one example, got all {n}.")
    if order == 2 and 2 * len(rows) >= n:
        raise ValueError(
            f"rows must be fewer than half of the training set for order 2, got {len(rows)} of "
            f"{n}: the expansion has no meaning there; use order 1, or refit without them."
        )
    if order == 2 and inverse.curvature is not Hessian:
        raise ValueError(
            "order must be 1 with GaussNewton, got 2: the second order is that of the risk itself; "
            "use Hessian, with a damping if it is indefinite."
        )
    order = _order(inverse, len(rows), order)
    asked = Asked.of(inverse, test, measurement, None)
    view, test = asked.view, asked.test
    chosen = inverse.train.take(rows)
    k = inverse.net.mass(chosen)
    if k == inverse.mass or (order == 2 and 2 * k >= inverse.mass):
        raise ValueError(
            f"rows must leave {'more than half of the' if order == 2 else 'some'} valid positions "
            f"for order {order}, got {k:.0f} of {inverse.mass:.0f} in the group."
        )
    gradient = k * inverse.net.risk_gradient(chosen, batch_size=inverse.batch_size)
    solution = inverse.s_test(test, view)
    if order == 1:
        change = solution.x.T @ gradient / inverse.mass
    elif order == "one_step":
        change = OneStep(inverse).group(view, test, rows)
    else:
        change = _second_order(inverse, view, test, chosen, gradient, solution.x)
    asked.warn_of_impossible(change[:, None], [f"the group of {len(rows)} rows"])
    plan = inverse.plan if order == "one_step" else inverse.first_order_plan
    return GroupScores(change, rows, order, solution, asked.name, plan)


def _order(inverse: Inverse, k: int, given: Order | None) -> Order:
    """Return the order for a group of k rows. If `given` is None, the plan and k decide."""
    if given in (1, 2):
        return given
    if given is None and inverse.plan.approximation == "first_order":
        return 1
    outputs = k * inverse.net.output_size(inverse.train.take([0]).x)
    if given is None:
        return "one_step" if outputs <= _MOST_OUTPUTS else 1
    if k > _MOST_ROWS or outputs > _MOST_OUTPUTS * 5:
        raise ValueError(
            f"rows must be at most {_MOST_ROWS} with at most {_MOST_OUTPUTS * 5} outputs for one "
            f"step, got {k} rows with {outputs}; use order=1, or leave_group_out."
        )
    return "one_step"


def _second_order(
    inverse: Inverse,
    view: GenericNeuralNet,
    test: Examples,
    chosen: Examples,
    gradient: NDArray,
    S: NDArray,
) -> NDArray:
    """Compute the changes (m,) to second order. S is H^-1 grad f, so only D1 takes a solve."""
    net, train, size = inverse.net, inverse.train, inverse.batch_size
    n, k = inverse.mass, net.mass(chosen)
    first = gradient / (n - k)  # this is H D1
    D1 = inverse.solve(first[:, None], "the group's gradient").x[:, 0]
    own = Hessian(net, chosen, inverse.operator.damping, batch_size=size) @ D1
    pull = first + k / (n - k) * (own - first) - _third(net, train, D1, size) / 2  # this is H D2
    per_batch = size or GenericNeuralNet.rows_per_batch(view, test)
    curved = test.each_row(PerRow("curvatures", D1), view, batch_size=per_batch)
    return S.T @ pull + curved / 2


def _third(net: GenericNeuralNet, train: Examples, v: NDArray, size: int | None) -> NDArray:
    """Compute T[v, v], (d,). The default batch size is that of nets without closed forms."""
    size = size or GenericNeuralNet.rows_per_batch(net, train)
    total = train.sum_over(Total("curvature_gradient", v), net, batch_size=size)
    return total / net.mass(train) + net.penalty_curvature_gradient(v)
