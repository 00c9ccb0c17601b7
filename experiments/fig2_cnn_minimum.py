"""Figure 2, right, at a true minimum: the same network, its exact refits and first order's part.

Beyond the paper: from where training stopped (Figure 2, right) the network is taken to a local
minimum of its risk, where leave-one-out refits are well defined; influence functions against them,
and what a tenth of a row's weight says of first order.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from experiments.harness import options
from experiments.harness.record import Claim, Record
from experiments.shared import mnist_cnn
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
    Scores,
    prepare,
    proximal_response,
    solve,
)
from influence.net.questions import PerRow

DATA = "mnist"
STAND_IN = "digits"
DTYPE = "float32"

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
_FLOAT32_GRADIENT = 1e-4  # a gradient's norm that float32 can tell from its rounding
_FLOAT32_REFIT = 1e-5  # the same for a refit, whose gradient less that at the minimum is taken
_STEP_DAMPING = 1e-6  # of the largest eigenvalue: how flat directions may be for a refit's steps
_PART = 0.1  # of a row's weight, taken out to see what first order is good for
_MOST_REFITTING = 400  # passes for a refit; what goes on at 400 is still at 100 times the norm
_TOGETHER = 4  # refits side by side: more of them are no faster, and are lost together


@dataclass(frozen=True)
class Config(mnist_cnn.Protocol):
    """The network and its shorter training of Figure 2, then the way to a minimum."""

    schedule: tuple[tuple[int, float], ...] = mnist_cnn.SHORT
    """(steps, learning rate) of Adam, before the way to the minimum (release: 500,000 steps)"""
    further_removals: int = 40
    """the same for each further test point; as many of the first's are refitted without a part of
    the row too"""
    rounds: int = 12
    """Hessians formed at most on the way to a local minimum in float32"""
    final_rounds: int = 8
    """the same from there on in float64"""
    evaluations: int = 200
    """of the risk and its gradient in each of those rounds, before the last steps, Newton's"""
    minimum_tolerance: float = 1e-6
    """gradient norm to reach there, and by each refit of its own objective"""
    minimum_damping: float = 1e-6
    """added to the Hessian there, which softmax leaves singular in one direction"""

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
    "standard": Config(),  # float32 ends near 1e-3
}

CLAIMS = (
    Claim("num_parameters", 2616, 2616, 2616),
    Claim("train_accuracy", 0.9996, 0.99, 1.0),
    Claim("test_accuracy", 0.9746, 0.96, 1.0),
    Claim("pearson_minimum", None, 0.95, 1.0),
    Claim("gradient_norm", None, 0.0, 1e-6),
    Claim("num_negative_eigenvalues", None, 0, 0),
    Claim("refits_unconverged", None, 0, 5),
    Claim("parts_unconverged", None, 0, 2),
)

DEVIATIONS = (
    "`converged`: from the same training on to a local minimum by quasi-Newton steps in the "
    "Hessian's coordinates, first in float32, then in float64; so are the refits there. They are "
    "damped by 1e-6 or, if a negative eigenvalue is left, by twice its size, as are the "
    "predictions. Rows whose refits miss the gradient norm are left out and counted. Beside them, "
    "for the 40 of largest predicted change, refits without a tenth of a row's weight, to a tenth "
    "of that norm, their changes times ten: what first order is exact for, as the part goes to 0. "
    "With the last of its weight a row takes out the curvature that it gave: what that costs is "
    "the difference between `pearson_part` and `pearson_minimum`, which therefore falls short; and "
    "some rows leave no minimum nearby.",
)


def run(config: Config, data: Any, *, checkpoints: Path | None = None) -> Record:
    """Train, go on to a minimum, predict, and refit without each row.

    Args:
      config: the protocol.
      data: Splits of MNIST, or of a stand-in.
      checkpoints: where training, finished rounds and refits are kept, so that an interrupted run
        continues.

    Returns: Record with the metrics of CLAIMS and the arrays that `draw` needs.
    Raises: Misuse for an option beyond the data.
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


def at_minimum(
    config: Any, net: AllCNN, train: Examples, measured: Examples, checkpoints: Path | None
) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """Predictions and exact refits at a local minimum, as near to one as the rounds allow.

    Without damping a proximal leave-one-out at a minimum is a refit. The damping that is left is
    there for the one direction in which a softmax has no curvature, and for negative curvature if
    some is left. All of it is at the float64 theta where the descent ended.

    Args:
      config: of `fig2_cnn`.
      net: where training stopped; left at the minimum.
      train: the training set.
      measured: m test examples.
      checkpoints: where finished rounds and refits are kept, or None.

    Returns: (arrays: risk and gradient_norm by round, predicted (m, r) in every way and actual,
      removed (r,), removals_j, refit_distance and refit_passes (r,), actual_part (m, r) by removing
      `_PART` of a row, divided by it, for the first of the first test point's removals, else NaN;
      metrics).
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
    """The net minimised without each row, from the minimum with all: arrays by row, and metrics.

    `actual` (m, k), `refit_distance` (k,) from the minimum with all, both NaN where none was found,
    and `refit_passes` (k,) over the training set, whatever the precision. By float32's gradients as
    far as they can be told from rounding, if that is what the net is in; the last steps and the
    certificate in float64.

    Args:
      config: of `fig2_cnn`.
      single: net, train, measured; in the experiment's dtype.
      double: the same in float64.
      removed: (k,) the rows.
      fraction: of each that is removed; the gradient to reach is this fraction of the whole row's.
      damping: of the refits.
      step_damping: of their steps.
      checkpoints: where finished refits are kept, or None.
    """
    net, train, measured = double
    own = net.gradients(train.x[removed], train.y[removed]) + net.penalty_gradient()
    # The gradient that a refit starts with.
    first = fraction * np.linalg.norm(own, axis=1) / len(train)
    final = fraction * config.minimum_tolerance
    H = Hessian(net, train, damping + step_damping, checkpoints=checkpoints)
    found = proximal_response(
        net, train, measured, removed, objective="leave_one_out", damping=damping,
        fraction=fraction, step_damping=step_damping, solver=prepare(H, Direct()),
        # The cap is for rows that a minimum hardly feels.
        tolerance=np.minimum(final / first, 0.5),
        rough=None if config.dtype == "float64" else single[:2],
        rough_tolerance=max(_FLOAT32_REFIT, final) / first,
        max_iterations=_MOST_REFITTING, block=_TOGETHER, num_processes=config.num_processes,
        checkpoints=checkpoints,
    )  # fmt: skip
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
    """The ways down, first in float32 if that is what the net is in; the net there in float64."""
    descents = []
    if config.dtype != "float64":
        # Float32's gradients cost a fifth, and its noise is far below where training stopped.
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
        """In float32 on the way; where it may be the last, in float64, which tells zeros' signs."""
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
    """(m, n) predicted changes by the way they were predicted, and how well systems were solved.

    `minimum` is the exact one's.
    """

    def scores(solver: Any, damping: float, curvature: Any = Hessian) -> Scores:
        influence = Influence(net, train, solver=solver, damping=damping, curvature=curvature)
        return influence.scores(measured)

    G = GaussNewton(net, train, A.damping, checkpoints=checkpoints)
    gauss_newton = prepare(G, Direct())
    more = Hessian(net, train, config.damping, checkpoints=checkpoints)
    lissa = LiSSA(None, config.lissa_depth, 1, config.lissa_batch_size, config.seed, rtol=None)
    # The formed matrix has the products of A: CG on it takes the steps that it would on A.
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
    """The way to the minimum, predicted against actual there, and what explains them."""
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
    """Gradient norm and risk by round, on axes of their own colours."""
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
