"""Figure 2, right, at a true minimum: predicted against actual leave-one-out changes of refits.

This goes beyond the paper. The network of Figure 2, right, is trained further, to a local minimum
of its risk. Leave-one-out refits are well defined at a minimum. The predictions of influence
functions are compared with refits without a row. They are also compared with refits that remove
only a tenth of a row's weight. For such a small change, a first-order prediction is nearly exact.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from experiments.harness import options
from experiments.harness.claims import Check, Claim
from experiments.harness.record import Record
from experiments.shared import mnist_cnn
from experiments.shared.compare import agreement
from experiments.shared.descent import Descent, descend, num_negative
from experiments.shared.mnist_cnn import CG_FLOAT64, in_double, removals
from influence import (
    CG,
    AllCNN,
    Direct,
    Examples,
    GaussNewton,
    Hessian,
    Influence,
    LiSSA,
    Prepared,
    ProximalOptions,
    Scores,
    prepare,
    proximal_response,
    solve,
)
from influence.net.questions import PerRow

DATA = "mnist"
STAND_IN = "digits"
DTYPE = "float32"

# Each entry: the name of an approximation, the name of what it approximates, and a label.
STEPS = (
    ("cg", "minimum", "CG for the exact inverse"),
    ("lissa", "minimum", "LiSSA for the exact inverse"),
    ("gauss_newton", "minimum", "Gauss-Newton for the Hessian"),
    ("damped", "minimum", "Damping as where training stopped"),
    ("minimum", "part", "First order for a refit without a tenth of the row"),
    ("part", "refit", "That refit, tenfold, for the refit without the row"),
    ("minimum", "refit", "First order for the refit without the row"),
    ("damped", "refit", "Damping and first order for that refit"),
)
# The descent in float32 stops at this gradient norm. Smaller norms would be only rounding errors.
_FLOAT32_GRADIENT = 1e-4
# The float32 steps of a refit stop at this gradient norm. It can be smaller than the norm for the
# descent, because the refit's objective subtracts the gradient at the minimum.
_FLOAT32_REFIT = 1e-5
# The damping of a refit's steps is this factor times the largest eigenvalue of the Hessian.
_STEP_DAMPING = 1e-6
# Partial refits remove this fraction of a row's weight.
_PART = 0.1
# A refit makes at most this many passes over the data. Refits that need more passes still have
# gradient norms of about 100 times the tolerance at this point.
_MOST_REFITTING = 400
# This many refits are computed together. A larger number would not be faster, and an interruption
# would lose more refits.
_TOGETHER = 4


@dataclass(frozen=True)
class Config(mnist_cnn.Protocol):
    """The network of Figure 2 after the shorter training, and its descent to a minimum."""

    schedule: tuple[tuple[int, float], ...] = mnist_cnn.SHORT
    """(steps, learning rate) of each stage of Adam, before the descent to the minimum (authors'
    code: 500,000 steps)"""
    further_removals: int = 40
    """number of removals for each further test point; as many of the first test point's rows are
    also refitted with only a tenth of the row's weight removed"""
    rounds: int = 12
    """largest number of Hessians formed during the descent in float32"""
    final_rounds: int = 8
    """largest number of Hessians formed during the descent in float64, which follows the descent in
    float32"""
    evaluations: int = 200
    """largest number of evaluations of the risk and its gradient in each round, before the round's
    Newton steps"""
    minimum_tolerance: float = 1e-6
    """gradient norm to reach at the minimum, and for the objective of each refit"""
    minimum_damping: float = 1e-6
    """damping added to the Hessian at the minimum, because softmax makes this Hessian singular in
    one direction"""

    def __post_init__(self):
        super().__post_init__()
        options.positive(self, "minimum_damping", "minimum_tolerance", "evaluations")
        options.at_least(self, 0, "rounds", "final_rounds")


PRESETS = {
    "smoke": Config(
        num_train=120,
        filters=2,
        strides=(2,),
        schedule=((150, 1e-2),),
        batch_size=100,
        test_points=(11, 57),
        num_removals=8,
        further_removals=4,
        damping=0.05,
        lissa_depth=50,
        rounds=8,
        evaluations=150,
        minimum_damping=1e-3,
        num_processes=1,
    ),
    "standard": Config(),  # the descent in float32 ends at a gradient norm near 1e-3
}

_HEADLINE = (
    "Network at a true minimum: correlation with refits without a tenth of a row, and without the "
    "whole row"
)
CLAIMS = (
    *mnist_cnn.CLAIMS,
    Claim(
        "pearson_part",
        "Correlation with refits that remove a tenth of a row's weight, at a minimum",
        None,
        0.99,
        1.0,
        headline=_HEADLINE,
    ),
    Claim(
        "pearson_minimum",
        "Correlation with refits without the row, at a minimum",
        None,
        0.95,
        1.0,
        headline=_HEADLINE,
    ),
    Claim("refits_unconverged", "Refits that reach no minimum and are left out", None, 0, 5),
    Claim("parts_unconverged", "Partial refits that reach no minimum", None, 0, 2),
)
CHECKS = (
    Check("gradient_norm", 0.0, 1e-6, presets=("standard",)),
    Check("num_negative_eigenvalues", 0, 0, presets=("standard",)),
    Check("pearson_part", 0.9, 1.0),
)
FINDING = "r = {pearson_part} for a tenth of a row and {pearson_minimum} for a whole row"

DEVIATIONS = (
    "Training: we take 20,000 steps of Adam at the rates 1e-3, 1e-4 and 1e-5. The authors' code "
    "takes 500,000 steps at 1e-4, 1e-5 and 1e-6. Beyond the paper, quasi-Newton steps in the "
    "Hessian's coordinates then lead to a local minimum, first in float32, then in float64.",
    "Refits: our refits start at this minimum and use the same kind of steps. The authors' code "
    "continues the training from where it stopped. Refits and predictions are damped by 1e-6. If "
    "a negative eigenvalue remains, the damping is twice its absolute value. Rows whose refits do "
    "not reach the required gradient norm are left out and counted.",
    "Partial removals: the 40 rows with the largest predicted changes are also refitted with only "
    "a tenth of the row's weight removed. The required gradient norm is then a tenth too, and the "
    "resulting changes are multiplied by ten. As the removed part goes to 0, the first-order "
    "prediction becomes exact. Removing a whole row also removes its curvature, which first order "
    "ignores. The difference between `pearson_part` and `pearson_minimum` measures this error and "
    "the errors of higher order.",
)
CAPTION = (
    "A plot of the descent to a minimum, two scatter plots of predicted against actual changes, "
    "and a table of approximations. Left: gradient norm and risk over the Hessians that the "
    "descent formed. Middle: a tenth of a row's weight is removed, and the change is multiplied "
    "by ten. Here first order is nearly exact. Right: the whole row is removed. The changes are "
    "then larger than predicted. Each line of the table names an approximation and the quantity "
    "that it replaces, with their correlation r and slope, and the number of rows."
)


def run(config: Config, data: Any, *, checkpoints: Path | None = None) -> Record:
    """Train the network, descend to a minimum, predict changes, and refit without single rows.

    Args:
      config: the settings of the experiment.
      data: Splits of MNIST or of its stand-in.
      checkpoints: folder that stores the training, finished rounds and finished refits, or None.
        An interrupted run continues from its files.

    Returns: Record with the metrics of CLAIMS and the arrays that `draw` needs.
    Raises: Misuse if an option does not fit the size of the data.
    """
    net, train, test, measured = mnist_cnn.trained(config, data, checkpoints)
    arrays, metrics = at_minimum(config, net, train, measured, checkpoints)
    metrics |= mnist_cnn.facts(net, train, test)
    at = [arrays[f"removals_{j}"] for j in range(len(config.test_points))]
    predicted = arrays["predicted_minimum"]
    metrics |= mnist_cnn.agreements("minimum", predicted, arrays["actual_minimum"], at)
    part = mnist_cnn.finite_agreement(predicted[0, at[0]], arrays["actual_part"][0, at[0]])
    metrics |= {f"{name}_part": value for name, value in part.items()}
    arrays |= mnist_cnn.agreement_of_steps(STEPS, arrays)
    arrays["test_points"] = np.array(config.test_points)
    return Record.of(metrics=metrics, arrays=arrays)


def remarks(record: Record) -> list[str]:
    """Return remarks on rows that r does not count, and on the error of the predictions.

    r does not count a removed row whose refit reaches no minimum. The predictions are those for the
    removal of a whole row.

    Let p be the first-order prediction for a whole row. The number h measures the effect of the
    row's own curvature. A refit that removes the fraction e of the row's weight changes the loss by
    e p / (1 - e h). The partial refits, with e = `_PART`, give h. The corrected prediction for the
    whole row is p / (1 - h).
    """
    arrays = record.arrays
    rows = arrays["removals_0"]
    predicted = arrays["predicted_minimum"][0, rows]
    actual, part = (arrays[f"actual_{kind}"][0, rows] for kind in ("minimum", "part"))
    lost, size, said = np.isnan(actual), np.abs(predicted), []
    if lost.any():
        places = 1 + np.flatnonzero(lost[np.argsort(-size)])
        said.append(
            f"Who is left out: {lost.sum()} of the {len(rows)} rows of test point "
            f"{arrays['test_points'][0]} are left out of r, because their refits reach no minimum. "
            "By |predicted change| they have the "
            f"{'places' if len(places) > 1 else 'place'} {', '.join(map(str, places))}. Their mean "
            f"|predicted change| is {size[lost].mean():.3f} nats, that of the others "
            f"{size[~lost].mean():.3f} nats."
        )
    both = np.isfinite(actual) & np.isfinite(part)
    if both.sum() > 2:
        own = (1 - predicted / part) / _PART
        first = agreement(predicted[both], actual[both])
        second = agreement((predicted / (1 - own))[both], actual[both])
        said.append(
            "Why a whole row is predicted worse: the change without a tenth of a row gives the "
            "effect of the row's own curvature. With it, the correlation over the same "
            f"{both.sum()} rows goes from {first['pearson']:.3f} to {second['pearson']:.3f}, and "
            f"the slope from {first['slope']:.2f} to {second['slope']:.2f}. So the row's own "
            "curvature is one part of the error. The other part is of higher order."
        )
    return said


def at_minimum(
    config: Any, net: AllCNN, train: Examples, measured: Examples, checkpoints: Path | None
) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """Descend to a local minimum, or near it if the rounds do not suffice. Predict and refit there.

    At a minimum, the proximal leave-one-out without damping is a refit. We still add small damping,
    because a softmax has no curvature in one direction, and negative curvature may remain.

    Args:
      config: the settings of the experiment.
      net: the network at the weights where training stopped. The descent changes its theta.
      train: the training set.
      measured: m test examples.
      checkpoints: folder that stores finished rounds and refits, or None.

    Returns: arrays and metrics. The arrays `risk`, `gradient_norm` and `smallest_eigenvalue` have
      an entry per Hessian that the descent formed. `removed` (r,) holds the removed rows, and
      `removals_j` the positions in `removed` of the rows for test point j. `predicted_...` and
      `actual_minimum` (m, r) are changes of the test losses. `actual_part` (m, r) is the change
      from a partial refit, divided by `_PART`; it is NaN for rows without a partial refit.
      `refit_distance` and `refit_passes` (r,) describe the refits.
    """
    descents, double, train64 = _descended(config, net, train, checkpoints)
    *_, measured64 = in_double(config, net, train, measured)
    undamped = Hessian(double, train64, checkpoints=checkpoints).dense()
    smallest = scipy.linalg.eigvalsh(undamped, subset_by_index=[0, 0])[0]
    damping = max(config.minimum_damping, -2 * smallest)
    A = Hessian(double, train64, damping, checkpoints=checkpoints)
    direct = prepare(A, Direct())
    found, solved = _predicted(config, double, train64, measured64, A, direct, checkpoints)
    rows = removals(config, found["minimum"])
    removed = np.unique(np.concatenate(rows))
    largest = scipy.linalg.eigvalsh(undamped, subset_by_index=[len(undamped) - 1] * 2)[0]
    given = (net, train, measured), (double, train64, measured64)
    dampings = damping, _STEP_DAMPING * largest
    refits = _refits(config, *given, removed, 1.0, *dampings, checkpoints)
    some = rows[0][: config.further_removals]
    parts = _refits(config, *given, some, _PART, *dampings, checkpoints)
    first = np.searchsorted(removed, some)
    actual_part = np.full((len(measured), len(removed)), np.nan)
    actual_part[:, first] = parts["actual"] / _PART
    values = scipy.linalg.eigvalsh(A.dense()) - damping
    arrays = {
        name: np.concatenate([getattr(one, name) for one in descents])
        for name in ("risk", "gradient_norm", "smallest_eigenvalue")
    }
    arrays |= {f"predicted_{how}": scores[:, removed] for how, scores in found.items()}
    arrays |= {"removed": removed, "actual_minimum": refits.pop("actual")}
    arrays["actual_part"] = actual_part
    arrays |= {name: refits.pop(name) for name in ("refit_distance", "refit_passes")}
    arrays |= {f"removals_{j}": np.searchsorted(removed, one) for j, one in enumerate(rows)}
    metrics = solved | {
        "risk": double.risk(train64),
        "gradient_norm": double.gradient_norm(train64),
        "smallest_eigenvalue": values[0],
        "largest_eigenvalue": values[-1],
        "num_negative_eigenvalues": num_negative(values, np.float64),
        "hessians_formed": len(arrays["risk"]),
        "damping": damping,
        "parts_unconverged": parts["refits_unconverged"],
    }
    return arrays, metrics | refits


_Given = tuple[AllCNN, Examples, Examples]


def _refits(
    config: Any,
    single: _Given,
    double: _Given,
    removed: NDArray,
    fraction: float,
    damping: float,
    step_damping: float,
    checkpoints: Path | None,
) -> dict[str, Any]:
    """Refit the net without each row, starting at the minimum of the risk of all rows.

    In a float32 experiment, the first steps of a refit use float32. The last steps, and the
    gradient norm that shows convergence, always use float64.

    Args:
      config: the settings of the experiment.
      single: (net, train, measured) in the experiment's dtype.
      double: (net, train, measured) in float64.
      removed: (k,) the rows to remove, one in each refit.
      fraction: the fraction of the row's weight to remove. It also multiplies the tolerance.
      damping: the damping in the objective of a refit.
      step_damping: additional damping of the steps. It does not change the objective.
      checkpoints: folder that stores finished refits, or None.

    Returns: a dict of metrics and three arrays: `actual` (m, k), the changes of the test losses;
      `refit_distance` (k,), the distance from the start; `refit_passes` (k,), passes over the data.
      `actual` and `refit_distance` are NaN for refits that missed the tolerance.
    """
    net, train, measured = double
    own = net.gradients(train.x[removed], train.y[removed]) + net.penalty_gradient()
    # The gradient norm of each refit's objective at its start.
    first = fraction * np.linalg.norm(own, axis=1) / len(train)
    final = fraction * config.minimum_tolerance
    H = Hessian(net, train, damping + step_damping, checkpoints=checkpoints)
    options = ProximalOptions(
        step_damping=step_damping,
        solver=prepare(H, Direct()),
        # The relative tolerance is at most 0.5. Without this limit, a row with a tiny gradient
        # would start below the tolerance, and its refit would take no step.
        tolerance=np.minimum(final / first, 0.5),
        rough=None if config.dtype == "float64" else single[:2],
        rough_tolerance=max(_FLOAT32_REFIT, final) / first,
        max_iterations=_MOST_REFITTING,
        block=_TOGETHER,
        num_processes=config.num_processes,
        checkpoints=checkpoints,
    )
    found = proximal_response(
        net,
        train,
        measured,
        removed,
        options,
        damping=damping,
        objective="leave_one_out",
        fraction=fraction,
    )
    reached = found.converged
    return {
        "actual": np.where(reached, found.change_if_removed, np.nan),
        "refit_distance": np.where(reached, found.distance, np.nan),
        "refit_passes": found.iterations,
        "refit_gradient_norm": (found.gradient_norm * first)[reached].max(initial=0.0),
        "refits_unconverged": np.count_nonzero(~reached),
    }


def _descended(
    config: Any, net: AllCNN, train: Examples, checkpoints: Path | None
) -> tuple[list[Descent], AllCNN, Examples]:
    """Descend to a minimum, first in the net's dtype, then in float64.

    Returns: the history of each descent, and the net and the training set in float64.
    """
    descents = []
    if config.dtype != "float64":
        # A gradient in float32 takes a fifth of the time of one in float64. Its rounding error does
        # not matter far from the minimum.
        descents.append(
            descend(
                net,
                train,
                tolerance=max(config.minimum_tolerance, _FLOAT32_GRADIENT),
                rounds=config.rounds,
                evaluations=config.evaluations,
                checkpoints=checkpoints,
            )
        )
    double, train64 = in_double(config, net, train)

    def formed(theta: NDArray) -> NDArray:
        """Form the Hessian in float64 if the tolerance is met, otherwise in the net's dtype.

        In float64, rounding is less likely to give a zero eigenvalue a negative sign.
        """
        if double.gradient_norm(train64) <= config.minimum_tolerance:
            return Hessian(double, train64, checkpoints=checkpoints).dense()
        net.theta = theta
        return Hessian(net, train, checkpoints=checkpoints).dense()

    descents.append(descend(
        double, train64, tolerance=config.minimum_tolerance, rounds=config.final_rounds,
        evaluations=config.evaluations, hessian=formed, checkpoints=checkpoints,
    ))  # fmt: skip
    net.theta = double.theta
    return descents, double, train64


def _predicted(
    config: Any,
    net: AllCNN,
    train: Examples,
    measured: Examples,
    A: Hessian,
    direct: Prepared,
    checkpoints: Path | None,
) -> tuple[dict[str, NDArray], dict[str, float]]:
    """Return a dict from method to the predicted changes (m, n), and metrics of the solutions.

    The method "minimum" uses the solver `direct`.
    """

    def scores(solver: Any, damping: float, curvature: Any = Hessian) -> Scores:
        how: dict[str, Any] = {"curvature": curvature, "approximation": "first_order"}
        return Influence(net, train, solver=solver, damping=damping, **how).scores(measured)

    G = GaussNewton(net, train, A.damping, checkpoints=checkpoints)
    gauss_newton = prepare(G, Direct())
    more = Hessian(net, train, config.damping, checkpoints=checkpoints)
    lissa = LiSSA(None, config.lissa_depth, 1, config.lissa_batch_size, config.seed, rtol=None)
    # CG multiplies by the dense matrix. Its products equal those of A.
    cg = solve(
        A.dense(),
        net.gradients(measured.x, measured.y).T,
        CG(CG_FLOAT64, preconditioner=gauss_newton),
    )
    along = train.each_row(PerRow("directional", cg.x), net)
    found = {
        "minimum": scores(direct, A.damping),
        "gauss_newton": scores(gauss_newton, A.damping, GaussNewton),
        "damped": scores(prepare(more, Direct()), config.damping),
        "lissa": scores(lissa, A.damping),
    }
    exact = found["minimum"].solution.x
    changes = {how: one.change_if_removed for how, one in found.items()}
    changes["cg"] = (along + net.penalty_gradient() @ cg.x).T / len(train)
    error = np.linalg.norm(cg.x - exact, axis=0) / np.linalg.norm(exact, axis=0)
    return changes, {
        "direct_residual": found["minimum"].solution.residual.max(),
        "cg_residual": cg.residual.max(),
        "cg_iterations": cg.iterations.max(),
        "cg_against_direct": error.max(),
        "lissa_residual": found["lissa"].solution.residual.max(),
    }


def draw(record: Record) -> Any:
    """Draw the descent, predicted against actual changes, and a table of approximations."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(6.75, 4.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[2.3, 2])
    left, middle, right = above.subplots(1, 3)
    _draw_descent(left, record.arrays)
    lost = record.metrics["parts_unconverged"]
    title = "A tenth of the row removed,\nchange times ten"
    mnist_cnn.draw_truth(middle, record, "part", title, by="minimum", lost=lost)
    title = "The row removed,\nrefitted at the minimum"
    mnist_cnn.draw_truth(right, record, "minimum", title, by="minimum")
    right.set_ylabel("")
    mnist_cnn.draw_steps(below.subplots(), record, STEPS)
    return figure


def _draw_descent(axis: Any, arrays: Any) -> None:
    """Draw the gradient norm and the risk by round. An axis has the colour of its line."""
    rounds = np.arange(len(arrays["risk"]))
    axis.semilogy(rounds, arrays["gradient_norm"], "o-", color="#0072B2", markersize=3)
    axis.set_xlabel("Hessians formed on the way", fontsize=9)
    axis.set_ylabel("Gradient norm", color="#0072B2", fontsize=9)
    beside = axis.twinx()
    beside.plot(rounds, arrays["risk"], "s--", color="#D55E00", markersize=3)
    beside.set_ylabel("Risk (nats)", color="#D55E00", fontsize=9)
    for one in (axis, beside):
        one.tick_params(labelsize=8)
    axis.set_title("The way to a local minimum", fontsize=9)
