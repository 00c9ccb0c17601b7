"""The actual effect of editing a training set: relabelling some rows and removing others.

Let theta_s be the net's parameters, n the number of training rows and L(z) = loss + penalty. An
edit replaces some rows z_i by z_i', and removes others. The edit moves theta to the minimum of

    F(theta) = D(theta, theta_s) + (1/n) sum_i [L(z_i', theta) - L(z_i, theta)]
               + damping/2 |theta - theta_s|^2,

where the sum is over the edited rows. For a removed row, the term L(z_i') is absent. The module
`influence.truth.proximal` defines D, one of two functions. If a single row is removed, F is the F_i
of that module.

Suppose that theta_s is a minimum of the risk, that D is "leave_one_out", and that there is no
damping. Then the minimum of F is the minimum of the risk on the edited training set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from influence.common.convergence import warn_unconverged
from influence.curvature.operators import GaussNewton
from influence.examples.examples import Examples
from influence.minimisers import block_lbfgs
from influence.net.net import GenericNeuralNet
from influence.net.questions import PerRow, Total
from influence.solvers import Prepared
from influence.truth.removal import apply

# The gradient norm of F must fall to this fraction of its value at theta_s.
TOLERANCE = 1e-6
_MAX_PASSES = 200


@dataclass(frozen=True, eq=False)
class Edits:
    """Edits of a training set.

    Attributes:
      rows: (k,) the numbers of the training rows that are relabelled or removed.
      new: the relabelled rows with their new labels, or None if no row is relabelled.
      removed: (k,) True for each of `rows` that is removed, False if it is relabelled.
    """

    rows: NDArray[np.int64]
    new: Examples | None
    removed: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class EditResponse:
    """The net after an edit of its training set.

    Attributes:
      theta: (d,) the parameters at the minimum of F.
      losses_before: (m,) the test losses at theta_s.
      losses: (m,) the test losses at `theta`.
      gradient_norm: norm of the gradient of F at `theta`, relative to the norm at theta_s.
      passes: number of computed gradients of F. Each needs a pass over the training set.
      converged: True if `gradient_norm` is within the tolerance.
    """

    theta: NDArray
    losses_before: NDArray
    losses: NDArray
    gradient_norm: float
    passes: int
    converged: bool


def edit_response(
    net: GenericNeuralNet,
    train: Examples,
    test: Examples,
    edits: Edits,
    inverse: Prepared,
    *,
    batch_size: int | None = None,
    tolerance: float = TOLERANCE,
) -> EditResponse:
    """Compute the minimum of F, and the test losses there. The net does not change.

    The objective is "bregman" if the matrix of `inverse` is GaussNewton, else "leave_one_out".

    Args:
      net: a net at any theta.
      train: the training set, n rows.
      test: m examples whose losses are measured.
      edits: the edits of the training set.
      inverse: a solver that was prepared for the damped matrix of `net` and `train`. The damping of
        this matrix is also the damping in F.
      batch_size: number of training rows in memory at a time; None: chosen by the library.
      tolerance: gradient norm of F to reach, relative to the norm at theta_s.

    Raises: ValueError if no row changes. DivergenceError if the matrix is not positive definite. A
      ConvergenceWarning is given if the tolerance is missed.
    """
    if not len(edits.rows):
        raise ValueError("edits must change at least one row, got none.")
    n, size = len(train), batch_size
    start = net.theta[:, None]
    damping = float(getattr(inverse.A, "damping", 0.0))
    old = train.take(edits.rows)
    # The two terms of a relabelled row in F contain the same penalty, which cancels. A removed row
    # has only one term, whose penalty remains.
    lost = int(edits.removed.sum())

    def own(thetas: NDArray) -> NDArray:
        total = old.sum_over(Total("gradient", thetas), net, batch_size=size)
        if edits.new is not None:
            total = total - edits.new.sum_over(Total("gradient", thetas), net, batch_size=size)
        return (total + lost * net.penalty_gradient(thetas)) / n

    if isinstance(inverse.A, GaussNewton):
        pull = net.penalty_gradient()[:, None]

        def divergence(thetas: NDArray) -> NDArray:
            total = train.sum_over(Total("bregman_gradient", thetas), net, batch_size=size)
            return total / n + net.penalty_gradient(thetas) - pull
    else:
        before = net.risk_gradient(train, start, size)

        def divergence(thetas: NDArray) -> NDArray:
            return net.risk_gradient(train, thetas, size) - before

    def gradients(thetas: NDArray, _: NDArray) -> NDArray:
        there = thetas.astype(net.dtype)
        return divergence(there) - own(there) + damping * (thetas - start)

    first = -own(start)
    scale = float(np.linalg.norm(first))
    found = block_lbfgs.minimise(
        gradients,
        lambda G, _: apply(inverse, G),
        start.copy(),
        first,
        np.array([tolerance * scale]),
        _MAX_PASSES,
        longest=np.linalg.norm(apply(inverse, first), axis=0),
    )
    # One call computes both losses, so that both have the same rounding.
    both = test.each_row(
        PerRow("losses", np.column_stack([net.theta, found.thetas])), net, batch_size=size
    )
    norm = float(found.norms[0]) / scale if scale else 0.0
    if norm > tolerance:
        warn_unconverged(
            f"the response to the edits ended at a gradient norm of {norm:.1e} of that at theta, "
            f"above {tolerance:.1e}: use float64 or a larger damping."
        )
    return EditResponse(
        found.thetas[:, 0], both[:, 0], both[:, 1], norm, int(found.passes[0]), norm <= tolerance
    )
