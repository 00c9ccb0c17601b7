"""Retraining without rows, the ground truth of influence. A gradient norm certifies each refit."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common.checkpoint import check_folder
from influence.common.convergence import ConvergenceWarning, warn_unconverged
from influence.common.numbers import numbers
from influence.curvature.operators import Hessian
from influence.examples.examples import Examples, check_rows
from influence.examples.featured import inputs_of
from influence.examples.given import Data
from influence.minimisers import block_lbfgs
from influence.net.checked import Net
from influence.net.minimum import TOLERANCE, check_at_minimum, warn_of_drift
from influence.net.net import GenericNeuralNet
from influence.solvers import Direct, Prepared, Solver, prepare
from influence.truth import runs
from influence.truth.removal import Removal
from influence.truth.runs import Groups, Refits, RunOptions, Task

# At the net's theta, the risk without the removed rows has a gradient. If no tolerance is given, a
# fit stops when the gradient norm has fallen to this fraction of that gradient's norm.
_OF_REMOVAL = 1e-9
# The relative rounding error of a mean gradient is this times the dtype's machine epsilon.
_ROUNDING = 4


@dataclass(frozen=True, kw_only=True)
class RefitOptions(RunOptions):
    """Options of refits, in addition to those of `RunOptions`.

    Attributes:
      method: "newton" or "fit". None means "newton" for a convex net and "fit" for any other.
      tolerance: Euclidean norm that the gradient of each refit's risk must reach. The net's own fit
        method also gets this tolerance. None means 1e-8 for "newton". For the net's own fit method,
        None means 1e-9 of the norm that the gradient of the refit's risk has at theta, or the
        rounding error of a mean gradient if it is larger. For a `fit` callable, None means no
        tolerance: norms are reported, but no refit is `converged`.
      solver: the solver that inverts the full-data Hessian for "newton", or the result of `prepare`
        for `Hessian(net, train)`.
      start: (d,) parameters at which each "fit" begins; None: the net's present parameters.
      fit: a function of (net, remaining rows) that replaces `net.fit`. After each call all of the
        model's variables are restored, including the states of dropout's generators. If it needs an
        optimiser, it must create a new one in each call.
      max_passes: the largest number of data passes for each refit by "newton". None: 30 in
        `leave_one_out`, 100 in `leave_group_out`.
      key: a text that names everything that the results of `fit` depend on, such as
        hyperparameters. The key is required if both `fit` and `checkpoints` are given. With
        dropout, a continued call returns the same bits only if the dropout layers have seeds.
    """

    method: Literal["newton", "fit"] | None = None
    tolerance: float | None = None
    solver: Solver | Prepared = Direct()
    start: NDArray | None = None
    fit: Callable[[GenericNeuralNet, Examples], Any] | None = None
    max_passes: int | None = None

    def __post_init__(self):
        """Check the options."""
        super().__post_init__()
        if self.method not in (None, "newton", "fit"):
            raise ValueError(f"method must be 'newton' or 'fit', got {self.method!r}.")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance}.")
        if self.start is not None and not np.isfinite(numbers(self.start, "start")).all():
            raise ValueError("start must be finite, got a NaN or infinity.")
        if self.max_passes is not None and self.max_passes < 1:
            raise ValueError(f"max_passes must be at least 1, got {self.max_passes}.")
        if self.fit is not None and self.checkpoints is not None and not self.key:
            raise ValueError(
                "key must say what `fit` does when both fit and checkpoints are given, got ''; "
                "name its hyperparameters, so that another fit's results are not taken for this "
                "one's."
            )


def leave_one_out(
    net: Net,
    train: Data,
    test: Data,
    rows: ArrayLike,
    options: RefitOptions = RefitOptions(),
) -> Refits:
    """Compute the actual change of each test loss after retraining without each row.

    The method is that of `leave_group_out`, with groups of one row.

    Args:
      net: a net at the minimum of its risk on `train`. Elsewhere "newton" raises ValueError and
        "fit" warns of drift.
      train: the training set, n rows.
      test: m examples whose losses are measured, without the penalty.
      rows: (k,) training rows; each refit leaves out one of them.
      options: options of the refits.

    Returns: Refits (m, k); positive: the test loss rose without the row, so the row helped.
    Raises: ValueError, TypeError or IndexError for bad input before any long work. A refit that
      misses the tolerance is not `converged`, and a ConvergenceWarning is given.
    """
    net, train, test = runs.check(net, train, test)
    rows = check_rows(rows, len(train))
    task = Task(net, train, test, options.batch_size)
    return replace(_retrained(task, list(rows[:, None]), options, max_passes=30), rows=rows)


def leave_group_out(
    net: Net,
    train: Data,
    test: Data,
    groups: Sequence[ArrayLike] | Mapping[str, ArrayLike],
    options: RefitOptions = RefitOptions(),
) -> Refits:
    """Compute the actual change of each test loss after retraining without each group of rows.

    For each group g, a refit minimises the risk R_-g: the mean loss over the rows outside g, plus
    the same penalty. If positions are masked, the mean is over the valid positions of these rows.
    Groups may overlap and differ in size. The net does not change.

    "newton" (convex models) starts at theta with Newton's step. The full-data Hessian is factored
    once, and the group's own curvature is subtracted from it. Secant updates (L-BFGS) then account
    for changes of the curvature along the path. Up to `block` refits share each data pass. "fit"
    calls the net's `fit`, or the callable `fit`, on the remaining rows. The fit begins at theta or
    at `start`.

    Args:
      net: a net at the minimum of its risk on `train`. Elsewhere "newton" raises ValueError and
        "fit" warns of drift.
      train: the training set, n rows.
      test: m examples whose losses are measured, without the penalty.
      groups: k arrays of row numbers, each removed together, or a dict from names to such arrays.
      options: options of the refits.

    Returns: Refits (m, k), columns in the order of the groups; positive: the test loss rose without
      the group, so the group helped.
    Raises: ValueError, TypeError or IndexError for bad input before any long work. A refit that
      misses the tolerance is not `converged`, and a ConvergenceWarning is given.
    """
    net, train, test = runs.check(net, train, test)
    names, groups = runs.check_groups(groups, len(train))
    task = Task(net, train, test, options.batch_size)
    return replace(_retrained(task, groups, options, max_passes=100), names=names)


@dataclass(frozen=True)
class _Newton:
    """The inputs of refits by Newton's steps: the inverse Hessian and the stopping conditions."""

    inverse: Prepared
    tolerance: float
    max_passes: int


def _retrained(task: Task, groups: Groups, options: RefitOptions, max_passes: int) -> Refits:
    net, train, start, tolerance = task.net, task.train, options.start, options.tolerance
    if options.method == "newton" and not net.convex:
        raise ValueError(
            f"method must be 'fit' for {type(net).__name__}, which is not known to be convex, got "
            "'newton'; set net.convex = True if its risk is strictly convex."
        )
    if start is not None and np.shape(start) != (net.num_parameters,):
        raise ValueError(f"start must have shape ({net.num_parameters},), got {np.shape(start)}.")
    if net.loss.has_masses:
        runs.check_masses(groups, net.row_masses(train))
    check_folder(options.checkpoints)
    runs.check_processes(options.num_processes, net, options.fit)
    method = options.method or ("newton" if net.convex else "fit")
    if method == "newton":
        tolerance = TOLERANCE if tolerance is None else tolerance
        check_at_minimum(net, train, tolerance, "use method='fit'", task.batch_size)
        inverse = prepare(Hessian(net, train, batch_size=task.batch_size), options.solver)
        plan = _Newton(inverse, tolerance, options.max_passes or max_passes)
        refit, identity = _newton_block, (repr(inverse.solver), tolerance, plan.max_passes)
    else:
        warn_of_drift(net, train, groups, task.batch_size)
        options = replace(options, block=1)
        # A fit with dropout depends on the states of the model's random generators.
        states = [variable.numpy() for variable in net.model.variables]
        refit, plan, identity = _fit_block, options, (tolerance, start, states)
    found = runs.run(
        task, refit, groups, plan, options, identity=(method, *identity), what="refits without rows"
    )
    norms = found["gradient_norm"]
    asked = found["asked"] if tolerance is None else np.full(len(norms), tolerance)
    # Without a tolerance, `asked` is NaN. Then both comparisons are False.
    converged = norms <= asked
    missed = norms > asked
    if missed.any():
        more = "allow more max_passes, " if method == "newton" else ""
        warn_unconverged(
            f"{np.count_nonzero(missed)} of {len(norms)} refits ended above a gradient norm of "
            f"{asked[missed].max():.1e} (worst {norms.max():.1e}): {more}use float64, or a larger "
            "tolerance."
        )
    return Refits(found["change_if_removed"], tuple(groups), norms, found["passes"], converged)


def _newton_block(task: Task, groups: Groups, plan: _Newton) -> dict[str, NDArray]:
    """Minimise R_-g for several groups. Each group g has a column of theta.

    The gradient of R_-g is (n grad R - sum_i grad (loss_i + penalty)) / (n - r). The sum is over
    the r rows of g, and R is the risk on all n rows. If positions are masked, n and r are sums of
    masses, not numbers of rows. The Hessian of R_-g at theta is n / (n - r) times the matrix that
    `Removal.solve` inverts.
    """
    net, train = task.net, task.train
    removed = Removal(net, train, groups, task.batch_size)
    n = removed.whole
    share = ((n - removed.masses) / n).astype(net.dtype)

    def gradients(thetas: NDArray, columns: NDArray) -> NDArray:
        whole = net.risk_gradient(train, thetas, task.batch_size)
        return (whole - removed.gradients(thetas, columns) / n) / share[columns]

    def steps(G: NDArray, columns: NDArray) -> NDArray:
        return removed.solve(plan.inverse, G * share[columns], columns)

    every = np.arange(len(groups))
    thetas = np.repeat(net.theta[:, None], len(groups), axis=1)
    whole = net.risk_gradient(train, batch_size=task.batch_size)  # at theta, for all groups
    first = (whole[:, None] - removed.gradients(thetas, every) / n) / share
    tolerance = np.full(len(groups), plan.tolerance)
    found = block_lbfgs.minimise(gradients, steps, thetas, first, tolerance, plan.max_passes)
    return {
        "change_if_removed": task.changes(found.thetas),
        "gradient_norm": found.norms,
        "passes": found.passes,
    }


def _asked_of_fit(task: Task, group: NDArray, options: RefitOptions) -> float:
    """Return the gradient norm that the net's own fit must reach, or NaN if it has no tolerance."""
    net, train = task.net, task.train
    own = "gradient_tolerance" in inspect.signature(type(net).fit).parameters
    if options.fit is not None or not own:
        return np.nan
    if options.tolerance is not None:
        return options.tolerance
    chosen = train.take(group)
    mass = net.mass(chosen)
    removed = net.risk_gradient(chosen, batch_size=task.batch_size) * mass
    left = net.mass(train) - mass
    # The mean gradient of the remaining rows has a rounding error of about eps times the size of
    # one row's gradient. The removed rows give an estimate of this size.
    share = max(_OF_REMOVAL / left, _ROUNDING * float(np.finfo(net.dtype).eps))
    return float(np.linalg.norm(removed)) * share or TOLERANCE


def _fit_block(task: Task, groups: Groups, options: RefitOptions) -> dict[str, NDArray]:
    """Refit the net without the rows of the only group, return the results, and restore the net."""
    net, remaining = task.net, task.train.without(groups[0])
    fit, trunk = options.fit or type(net).fit, task.net.flat.trunk
    # A fit from outside the library may call the Keras model, which takes the original inputs and
    # not the features of a frozen trunk.
    foreign = fit is not GenericNeuralNet.fit
    rows = inputs_of(task.train).without(groups[0]) if foreign else remaining
    # All variables are restored, because training also changes batch statistics and generators.
    variables = net.model.variables
    before = [variable.numpy() for variable in variables]
    losses, asked = task.losses(), _asked_of_fit(task, groups[0], options)
    own = not np.isnan(asked)
    arguments: dict[str, Any] = {"gradient_tolerance": asked} if own else {}
    try:
        if options.start is not None:
            net.theta = options.start
        with warnings.catch_warnings():
            if own:  # `_retrained` gives one warning for all refits
                warnings.simplefilter("ignore", ConvergenceWarning)
            fit(net, rows, **arguments)
        if foreign and trunk is not None:
            trunk.check_weights()
        change = task.losses() - losses
        norm = net.gradient_norm(remaining, task.batch_size)
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
    return {
        "change_if_removed": change[:, None],
        "gradient_norm": np.array([norm]),
        "asked": np.array([asked]),
        "passes": np.ones(1, int),
    }
