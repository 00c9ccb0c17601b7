"""Proximal responses: effects of removing a row from a net that is not at a minimum.

Let theta_s be the net's parameters, n the number of training rows and L(z_i) = loss_i + penalty.
Each removal moves theta to the minimum of

    F_i(theta) = D(theta, theta_s) - L(z_i, theta) / n + damping/2 |theta - theta_s|^2.

The argument `fraction` removes only this fraction of L(z_i) / n. D is one of two functions. Both
are stationary at theta_s, so that theta_s minimises F_i without the term L(z_i):

    "bregman"        D = P + mean_j [loss(y_j, f_j) - loss(y_j, s_j)
                                     - loss'(y_j, s_j) . (f_j - s_j)]
    "leave_one_out"  D = R(theta) - R(theta_s) - R'(theta_s) . (theta - theta_s)

Here R is the risk, and f_j and s_j are row j's outputs at theta and theta_s. The mean over j is the
Bregman divergence of the loss in the outputs. P is the Bregman divergence of the penalty in theta.
For an L2 penalty, P is the penalty at theta - theta_s. The "leave_one_out" D is the Bregman
divergence of the risk in theta. If positions are masked, row i has the weight v_i / sum_j v_j in
place of 1/n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common.checkpoint import check_folder
from influence.common.convergence import warn_unconverged
from influence.common.named_array import Estimand
from influence.common.numbers import numbers
from influence.curvature.operators import Curvature, GaussNewton, Hessian
from influence.examples.examples import Examples, check_rows
from influence.examples.given import Data
from influence.minimisers import block_lbfgs
from influence.net.checked import Net
from influence.net.net import GenericNeuralNet
from influence.net.questions import Total
from influence.solvers import Direct, Prepared, Solver, prepare
from influence.truth import runs
from influence.truth.removal import Removal, apply
from influence.truth.runs import Groups, RunOptions, Task

_CURVATURE: dict[str, type[Curvature]] = {"bregman": GaussNewton, "leave_one_out": Hessian}


@dataclass(frozen=True, eq=False)
class ProximalResponse(Estimand):
    """Table (m, k) of the changes of test losses if theta moves to the minimum of each F_i.

    Attributes:
      change_if_removed: (m, k) test loss at the minimum of F_i, minus the test loss at theta_s.
      rows: (k,) the training rows.
      objective: "bregman" or "leave_one_out", the name of D.
      damping: the damping in F_i.
      fraction: the fraction of the row's weight that F_i removes.
      gradient_norm: (k,) Euclidean norm of the gradient of F_i at the final theta, relative to the
        norm at theta_s. A small norm certifies the minimum. The norm stays large if rounding
        dominates.
      iterations: (k,) number of computed gradients of F_i, including low-precision ones. Each
        gradient needs a data pass.
      converged: (k,) True if gradient_norm is within the tolerance.
      distance: (k,) Euclidean norm of theta - theta_s.
    """

    objective: str
    damping: float
    fraction: float
    gradient_norm: NDArray
    iterations: NDArray
    converged: NDArray
    distance: NDArray


@dataclass(frozen=True, kw_only=True)
class ProximalOptions(RunOptions):
    """Options of the search for the minima of F_i, in addition to those of `RunOptions`.

    A is the curvature matrix that `proximal_response` describes.

    Attributes:
      step_damping: damping that is added to A to compute the steps. This damping does not change
        F_i. If some eigenvalues of A are nearly zero, a millionth of the largest eigenvalue reduces
        the number of steps.
      solver: the solver that inverts A for the steps, or the result of `prepare` for A.
      tolerance: gradient norm of F_i to reach, relative to the norm at theta_s. Give one number,
        or (k,) numbers for the rows.
      rough: a pair (net, train) in a lower precision. Its theta and rows must equal those of the
        arguments `net` and `train` of `proximal_response`, in the same order. The search first uses
        the gradients of this pair. It ends with the gradients of the arguments, which certify the
        result.
      rough_tolerance: like `tolerance`, for the gradients of `rough`. This tolerance must be above
        their rounding error.
      max_iterations: the largest number of computed gradients of each F_i.
    """

    block: int = 10
    step_damping: float = 0.0
    solver: Solver | Prepared = Direct()
    tolerance: ArrayLike = 1e-4
    rough: tuple[GenericNeuralNet, Examples] | None = None
    rough_tolerance: ArrayLike = 1e-2
    max_iterations: int = 50

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.step_damping < np.inf:
            raise ValueError(
                f"step_damping must be finite and at least 0, got {self.step_damping}."
            )
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {self.max_iterations}.")


@dataclass(frozen=True)
class _Search:
    """The inputs that all blocks share.

    They are the inverse of A, the damping and the fraction in F_i, the tolerances by row, and the
    limits of the search.
    """

    inverse: Prepared
    damping: float
    fraction: float
    tolerance: dict[int, float]
    rough_tolerance: dict[int, float]
    rough: tuple[GenericNeuralNet, Examples] | None
    max_iterations: int


def proximal_response(
    net: Net,
    train: Data,
    test: Data,
    rows: ArrayLike,
    options: ProximalOptions = ProximalOptions(),
    *,
    damping: float,
    objective: Literal["bregman", "leave_one_out"] = "bregman",
    fraction: float = 1.0,
) -> ProximalResponse:
    """Compute the actual change of each test loss if theta moves to the minimum of each F_i.

    The module's docstring defines F_i. With "bregman", F_i is the proximal Bregman response
    function of Bae et al. (2022). With "leave_one_out", F_i is the risk without the row, minus the
    linear part of the whole risk at theta_s. A is the `GaussNewton` ("bregman") or `Hessian`
    ("leave_one_out") matrix, with the damping. To first order theta moves by A^-1 grad L(z_i) / n,
    which is `Influence.parameters`. So damped influence predicts these changes even if theta_s is
    not a minimum of the risk. If theta_s is a minimum and there is no damping, "leave_one_out"
    gives the result of retraining without the row. If the model is also linear in theta, "bregman"
    gives this result too.

    The first steps are Newton's, with A minus the row's own curvature. A is factored once. Secant
    updates (L-BFGS) follow. The first step is at most as long as A^-1 times the first gradient.
    `block_lbfgs.minimise` limits the length of later steps. The net does not change.

    Args:
      net: a net at any theta. Use float64 unless its gradients are well above float32
        rounding.
      train: the training set, n rows.
      test: m examples whose losses are measured, without the penalty.
      rows: (k,) training rows; each response leaves out one of them.
      options: options of the search.
      damping: the damping in F_i, an absolute number. The damped A must be positive definite.
      objective: "bregman" or "leave_one_out".
      fraction: the fraction of the row's weight 1/n that is removed, in (0, 1]. As the fraction
        goes to 0, the changes divided by the fraction tend to damped influence.

    Returns: ProximalResponse. A positive change means that the test loss rises without the row, so
      the row helped.
    Raises: ValueError, TypeError or IndexError for bad input before any long work; DivergenceError
      if A is not positive definite. A row that misses the tolerance is not `converged`, and a
      ConvergenceWarning is given.
    """
    net, train, test = runs.check(net, train, test)
    rows = check_rows(rows, len(train))
    tolerances = _tolerances("tolerance", options.tolerance, len(rows))
    until = _tolerances("rough_tolerance", options.rough_tolerance, len(rows))
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}.")
    if options.rough is not None:
        options = replace(options, rough=_checked_rough(options.rough, net, train))
    if objective not in _CURVATURE:
        raise ValueError(f"objective must be 'bregman' or 'leave_one_out', got {objective!r}.")
    check_folder(options.checkpoints)  # The folder is checked before the long factorisation.
    A = _CURVATURE[objective](net, train, damping, batch_size=options.batch_size)
    if options.step_damping:
        more = damping + options.step_damping
        A = type(A)(net, train, more, batch_size=options.batch_size)
    runs.check_processes(options.num_processes, net)
    inverse = prepare(A, options.solver)
    by_row = dict(zip(rows, tolerances, strict=True)), dict(zip(rows, until, strict=True))
    search = _Search(inverse, damping, fraction, *by_row, options.rough, options.max_iterations)
    function = objective, float(damping), float(fraction)  # the parameters of F_i
    steps = float(options.step_damping), repr(inverse.solver)
    rough = None if options.rough is None else (options.rough[0].dtype.str, until)
    found = runs.run(
        Task(net, train, test, options.batch_size),
        _proximal_block,
        list(rows[:, None]),
        search,
        options,
        identity=("proximal", *function, *steps, tolerances, rough, options.max_iterations),
        what="proximal responses",
    )
    norms = found["gradient_norm"]
    converged = norms <= tolerances
    if not converged.all():
        warn_unconverged(
            f"{np.count_nonzero(~converged)} of {len(rows)} proximal responses missed their "
            f"tolerance (the worst by {np.max(norms / tolerances):.1e} times): allow more "
            "max_iterations, use float64 or a larger damping."
        )
    return ProximalResponse(
        found["change_if_removed"],
        rows,
        *function,
        gradient_norm=norms,
        iterations=found["passes"],
        converged=converged,
        distance=found["distance"],
    )


def _tolerances(name: str, given: ArrayLike, num_rows: int) -> NDArray:
    """Check the tolerances and return one for each row."""
    found = numbers(given, name).astype(float)
    if found.shape not in ((), (num_rows,)) or not (found > 0).all():
        raise ValueError(
            f"{name} must be positive, of shape () or ({num_rows},), got shape {found.shape}"
            f"{f' and {found.min()}' if found.size else ''}."
        )
    return np.broadcast_to(found, (num_rows,))


def _checked_rough(
    rough: Any, net: GenericNeuralNet, train: Examples
) -> tuple[GenericNeuralNet, Examples]:
    """Return `rough`. Refuse it unless its theta, labels and sizes are those of net and train."""
    match rough:
        case (GenericNeuralNet() as other, Examples() as examples):
            examples = other.given(examples, "rough")
        case _:
            raise TypeError(f"rough must be (GenericNeuralNet, Examples) or None, got {rough!r}.")
    other.validate(examples, "rough")
    if len(examples) != len(train) or other.num_parameters != net.num_parameters:
        raise ValueError(
            f"rough must have {len(train)} rows and {net.num_parameters} parameters, got "
            f"{len(examples)} and {other.num_parameters}."
        )
    if not np.array_equal(examples.y, train.y.astype(examples.y.dtype)):
        raise ValueError("rough must have the training set's rows in its order, got other targets.")
    if not np.array_equal(other.theta, net.theta.astype(other.dtype)):
        raise ValueError("rough must be at the theta of net, got another; set its theta.")
    return other, examples


def _proximal_block(task: Task, groups: Groups, search: _Search) -> dict[str, NDArray]:
    """Minimise F_i for several rows, and return the results. Each row has a column of theta."""
    net, train = task.net, task.train
    removed = Removal(net, train, groups, task.batch_size, search.fraction)
    thetas = np.repeat(net.theta[:, None], len(groups), axis=1)

    def inverse(G: NDArray, _: NDArray | None = None) -> NDArray:
        return apply(search.inverse, G)

    # At theta_s, the gradient of D is 0.
    first = -removed.gradients(thetas, np.arange(len(groups))) / removed.whole
    scale = np.linalg.norm(first, axis=0)
    tolerance, until = (
        np.array([by_row[row] for (row,) in groups]) * scale
        for by_row in (search.tolerance, search.rough_tolerance)
    )
    found = block_lbfgs.minimise(
        _gradients(task, net, train, groups, search),
        inverse,
        thetas,
        first,
        tolerance,
        search.max_iterations,
        pairs=removed.pairs(search.inverse, first),
        # Without this limit the first step may be too long: A minus the row's own curvature may
        # have almost no curvature along the step.
        longest=np.linalg.norm(inverse(first), axis=0),
        rough=search.rough and (_gradients(task, *search.rough, groups, search), until),
    )
    return {
        "distance": np.linalg.norm(found.thetas - thetas, axis=0),
        "change_if_removed": task.changes(found.thetas),
        "gradient_norm": np.divide(found.norms, scale, out=np.zeros_like(scale), where=scale != 0),
        "passes": found.passes,
    }


def _gradients(
    task: Task, net: GenericNeuralNet, train: Examples, groups: Groups, search: _Search
) -> Callable[[NDArray, NDArray], NDArray]:
    """Return a function (thetas, columns) -> gradients of F_i.

    Column c of `thetas` (d, j) is a theta for the removed row i that has the number `columns[c]`.
    Column c of the result (d, j) is the gradient of F_i at this theta. Data passes use the dtype of
    `net`.
    """
    removed = Removal(net, train, groups, task.batch_size, search.fraction)
    theta_s, size = task.net.theta[:, None], task.batch_size

    if isinstance(search.inverse.A, GaussNewton):
        before = net.penalty_gradient()[:, None]

        def divergence(thetas: NDArray) -> NDArray:
            total = train.sum_over(Total("bregman_gradient", thetas), net, batch_size=size)
            return total / net.mass(train) + net.penalty_gradient(thetas) - before
    else:
        before = net.risk_gradient(train, net.theta[:, None], size)

        def divergence(thetas: NDArray) -> NDArray:
            return net.risk_gradient(train, thetas, size) - before

    def gradients(thetas: NDArray, columns: NDArray) -> NDArray:
        there = thetas.astype(net.dtype)
        own = removed.gradients(there, columns) / removed.whole
        return divergence(there) - own + search.damping * (thetas - theta_s)

    return gradients
