"""Figure 2, left and middle: predicted against actual leave-one-out changes, logistic regression.

Koh & Liang 2017, section 4.1 and figure 2: ten-class logistic regression on MNIST. Influence
functions predict how the loss of one test point changes when a training row is left out. H^-1 comes
from conjugate gradients (left) or from LiSSA (middle). The predictions are compared with
retraining.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.harness import options
from experiments.harness.claims import Check, Claim, Published
from experiments.harness.record import Record
from experiments.shared.compare import (
    agreement,
    largest,
    letter,
    predicted_against_actual,
    rounded,
    with_others,
)
from influence import (
    CG,
    Direct,
    Examples,
    Hessian,
    Influence,
    LiSSA,
    MulticlassLogisticRegression,
    RefitOptions,
    leave_one_out,
    prepare,
)

DATA = "mnist"
STAND_IN = "digits"


@dataclass(frozen=True)
class Config:
    """The paper's settings.

    Values that the paper does not give are those of the authors' 2017 code.
    """

    weight_decay: float = 0.01
    """lambda of the penalty lambda/2 |W|^2 (authors' code, train_mnist_logreg.py)"""
    test_point: int = 8
    """row of the test point, a 5 that the model classifies as a 6 (authors' code)"""
    num_removals: int = 500
    """number of rows that are removed one at a time: those of largest |influence| by CG (section
    4.1)"""
    cg_rtol: float = 1e-8
    """relative residual at which CG stops; the authors' code limits the length of a step instead"""
    lissa_scale: float = 25.0
    """scale of LiSSA (authors' code)"""
    lissa_depth: int = 5000
    """number of steps of LiSSA, t in section 4.1"""
    lissa_repeats: int = 10
    """number of repeats of LiSSA, r in section 4.1"""
    lissa_batch_size: int = 1
    """number of rows in each step of LiSSA (authors' code)"""
    lissa_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """seeds of LiSSA; each seed is one pass through the training set (authors' code: one seed; the
    paper names none)"""
    further_test_points: int = 10
    """number of further test points, drawn at random, because one test point proves little; 0 for
    none"""
    further_removals: int = 100
    """number of rows of largest |influence| that are removed for each further test point"""
    one_step_removals: int = 40
    """number of the first test point's most influential rows that are also predicted by one exact
    Newton step"""
    gradient_tolerance: float = 1e-8
    """each refit stops at this Euclidean norm of its gradient"""
    seed: int = 0
    """seed of the random draw of the further test points"""

    def __post_init__(self):
        options.positive(self, "weight_decay", "cg_rtol", "lissa_scale", "gradient_tolerance")
        # Fitting a line needs two points.
        options.at_least(self, 2, "num_removals", "further_removals", "one_step_removals")
        options.at_least(self, 1, "lissa_depth", "lissa_repeats", "lissa_batch_size")
        options.at_least(self, 0, "lissa_seeds", "further_test_points")


PRESETS = {
    "smoke": Config(num_removals=60, lissa_depth=1000, lissa_seeds=(0, 1), lissa_scale=2.0,
                    test_point=11, further_test_points=3, further_removals=20),
    "standard": Config(),
    "paper": Config(),
}  # fmt: skip

_CLOSE = Published("section 4.1 and figure 2, left and middle", words="close match")
_READ = "figure 2, read off the notebook's plot"
_HEADLINE = (
    "Figure 2, left: correlation and slope of predicted on actual changes, 500 removals, conjugate "
    "gradients"
)
CLAIMS = (
    Claim(
        "pearson_cg",
        "Correlation of predicted and actual changes, 500 removals, conjugate gradients",
        _CLOSE,
        0.9999,
        1.0,
        headline=_HEADLINE,
    ),
    Claim(
        "slope_cg",
        "Slope of predicted on actual changes",
        _CLOSE,
        0.985,
        1.005,
        headline=_HEADLINE,
    ),
    Claim("sign_agreement_cg", "Share of removals whose sign is predicted", None, 0.998, 1.0),
    Claim("smallest_actual", "Smallest actual change, in nats", Published(_READ, -0.025)),
    Claim("largest_actual", "Largest actual change, in nats", Published(_READ, 0.032)),
    Claim(
        "further_worst_pearson",
        "Smallest correlation over ten further test points, 100 removals each",
        None,
        0.999,
        1.0,
    ),
    Claim(
        "slope_one_step",
        "Slope of one exact Newton step without the row on actual changes",
        None,
        0.995,
        1.005,
    ),
    Claim(
        "lissa_worst_pearson",
        "Smallest correlation of LiSSA's predictions and actual changes over five seeds",
        _CLOSE,
        0.96,
        1.0,
        headline="Figure 2, middle: correlation by LiSSA, the worst and the median of five seeds",
    ),
    Claim(
        "lissa_median_pearson",
        "Median correlation of LiSSA's predictions and actual changes over five seeds",
        _CLOSE,
        0.98,
        1.0,
        headline="Figure 2, middle: correlation by LiSSA, the worst and the median of five seeds",
    ),
    Claim("test_accuracy", "Accuracy of the model on the test images", None, 0.90, 0.92),
)
CHECKS = (
    Check("cg_against_direct", 0.0, 1e-6),
    Check("worst_refit_gradient_norm", 0.0, 1e-8),
)
FINDING = "r = {pearson_cg} predicted against actual"

DEVIATIONS = (
    "Arithmetic: we use float64, because changes of 1e-3 to 1e-5 need it. The authors' code uses "
    "float32.",
    "Optimum: we stop at a gradient norm of 1e-10. The authors' code uses scikit-learn's L-BFGS "
    "with tol 1e-8.",
    "Refits: we use Newton's iteration from the full model. Each refit is certified by its own "
    "gradient norm of at most 1e-8. The authors' code uses warm-started L-BFGS, which gives no "
    "certificate.",
    "CG: we use linear conjugate gradients to a relative residual of 1e-8. The authors' code uses "
    "SciPy's fmin_ncg with at most 100 steps, each with many Hessian products. Both reach the "
    "same s_test = H^-1 grad loss.",
    "LiSSA: we use five seeds. The authors' code uses one. We compute the ten repeats of a seed "
    "together. As in the authors' code, each seed takes the rows in one shuffled pass without "
    "replacement.",
    "Beyond the paper: we add ten further test points with 100 removals each. For the first test "
    "point's 40 rows of largest |influence|, we also predict the change by one exact Newton step, "
    "in closed form, on the risk without the row.",
)
CAPTION = (
    "Three scatter plots: predicted against actual changes of a test loss by conjugate gradients "
    "and by LiSSA, and the errors of two predictions. a, b: each point is a training image that "
    "was removed before the model was refitted. On the diagonal, prediction and truth are equal. "
    "The gap around zero has a reason: only the images with the largest predicted changes were "
    "removed. c: the error of the prediction for the images with the largest influence, to first "
    "order as in the paper, and by one Newton step."
)


def run(config: Config, data: Any, *, checkpoints: Path | None = None) -> Record:
    """Fit the model, predict the effect of each row, and refit without the most influential rows.

    The rows are removed one at a time.

    Args:
      config: the settings of the experiment.
      data: Splits of MNIST or of its stand-in.
      checkpoints: folder that stores finished refits, or None. An interrupted run continues from
        its files.

    Returns: Record with the metrics of CLAIMS and the arrays that `draw` needs.
    Raises: Misuse if an option does not fit the size of the data.
    """
    train, test = Examples(*data.train), Examples(*data.test)
    options.rows_of(config, test, "test rows", "test_point")
    options.at_most(config, len(test) - 1, "other test rows", "further_test_points")
    options.at_most(config, len(train), "training rows", "num_removals", "further_removals")
    num_classes = int(train.y.max()) + 1
    net = MulticlassLogisticRegression(
        train.x.shape[1], num_classes, weight_decay=config.weight_decay
    )
    net.fit(train)
    points = with_others(
        config.test_point, np.arange(len(test)), config.further_test_points, config.seed
    )
    measured = test.take(points)

    direct = prepare(Hessian(net, train), Direct())

    def influence(solver: Any) -> Influence:
        return Influence(net, train, solver=solver, approximation="first_order")

    by_cg = influence(CG(rtol=config.cg_rtol)).scores(measured)
    by_direct = influence(direct).s_test(measured)
    error = np.linalg.norm(by_cg.solution.x - by_direct.x, axis=0) / np.linalg.norm(
        by_direct.x, axis=0
    )

    counts = [config.num_removals] + [config.further_removals] * (len(points) - 1)
    rows = [largest(by_cg[j], count) for j, count in enumerate(counts)]
    refitting = RefitOptions(
        solver=direct, tolerance=config.gradient_tolerance, checkpoints=checkpoints
    )
    refits = [
        leave_one_out(net, train, test.take([point]), removed, refitting)
        for point, removed in zip(points, rows, strict=True)
    ]
    actual = refits[0][0]
    runs = [
        influence(_lissa(config, seed)).scores(test.take(points[:1]), rows[0])
        for seed in config.lissa_seeds
    ]
    by_lissa = np.array([run[0] for run in runs])

    stepped = net.one_step_leave_one_out(train, rows[0][: config.one_step_removals])
    at_step = net.losses(measured.x[:1], measured.y[:1], stepped.T)[0]
    by_one_step = at_step - net.losses(measured.x[:1], measured.y[:1])
    one_step = agreement(by_one_step, actual[: len(by_one_step)])
    reach = np.abs(actual[: len(by_one_step)]).max()

    first = agreement(by_cg[0][rows[0]], actual)
    further = [agreement(by_cg[j][rows[j]], refits[j][0]) for j in range(1, len(points))]
    lissa = [agreement(predicted, actual) for predicted in by_lissa]
    metrics: dict[str, Any] = {f"{name}_cg": value for name, value in first.items()}
    metrics |= {
        "smallest_actual": actual.min(),
        "largest_actual": actual.max(),
        "pearson_one_step": one_step["pearson"],
        "slope_one_step": one_step["slope"],
        "largest_error_one_step": one_step["largest_difference"] / reach,
        "cg_against_direct": error.max(),
        "cg_iterations": by_cg.solution.iterations.max(),
        "lissa_largest_residual": max(run.solution.residual.max() for run in runs),
        "worst_refit_gradient_norm": max(r.gradient_norm.max() for r in refits),
        "gradient_norm": np.linalg.norm(net.risk_gradient(train)),
        "test_accuracy": np.mean(net.outputs(test.x).argmax(axis=1) == test.y),
        "label": test.y[config.test_point],
        "prediction": net.outputs(test.x[config.test_point][None]).argmax(),
    }
    for kind, agreements in (("further", further), ("lissa", lissa)):
        for name in first if agreements else ():
            values = np.array([a[name] for a in agreements])
            metrics[f"{kind}_worst_{name}"] = _worst(name, values)
            metrics[f"{kind}_median_{name}"] = np.median(values)
    arrays = {
        "rows": rows[0],
        "actual": actual,
        "predicted_cg": by_cg[0][rows[0]],
        "predicted_one_step": by_one_step,
        "predicted_lissa": by_lissa,
        "lissa_seeds": np.array(config.lissa_seeds),
        "refit_gradient_norm": refits[0].gradient_norm,
        "test_points": points,
        "further_rows": np.array(rows[1:]),
        "further_actual": np.array([r[0] for r in refits[1:]]),
        "further_predicted_cg": np.array([by_cg[j][rows[j]] for j in range(1, len(points))]),
    }
    return Record.of(metrics=metrics, arrays=arrays)


def draw(record: Record) -> Any:
    """Draw predicted against actual changes for two solvers, and the errors of two approximations.

    LiSSA's panel shows the seed with the median correlation. The third panel shows the rows for
    which one Newton step was also computed.
    """
    import matplotlib.pyplot as plt

    arrays = record.arrays
    actual, runs = arrays["actual"], arrays["predicted_lissa"]
    order = np.argsort([np.corrcoef(run, actual)[0, 1] for run in runs])
    median = order[len(order) // 2]
    panels = (
        ("Conjugate gradients", arrays["predicted_cg"]),
        (f"LiSSA (median of {len(runs)} seeds)", runs[median]),
    )
    with plt.rc_context({"font.size": 8, "axes.titlesize": 8.5}):
        figure, axes = plt.subplots(1, 3, figsize=(6.75, 2.5), layout="constrained")
        for axis, (title, predicted) in zip(axes, panels, strict=False):
            predicted_against_actual(axis, actual, predicted)
            axis.set_title(title)
            pearson = agreement(predicted, actual)["pearson"]
            axis.text(0.05, 0.95, f"r = {rounded(pearson)}", transform=axis.transAxes, va="top")
        axes[1].set_ylabel("")
        _draw_errors(axes[2], arrays)
        for axis, name in zip(axes, "abc", strict=True):
            letter(axis, name)
    return figure


def _draw_errors(axis: Any, arrays: Any) -> None:
    """Draw the errors of first-order predictions and of one Newton step over the actual changes."""
    step = arrays["predicted_one_step"]
    actual = arrays["actual"][: len(step)]
    first = arrays["predicted_cg"][: len(step)]
    for predicted, name, color, marker in (
        (first, "first order", "#D55E00", "o"),
        (step, "one step", "#0072B2", "D"),
    ):
        found = agreement(predicted, actual)
        share = 100 * found["largest_difference"] / np.abs(actual).max()
        label = f"{name}: slope {found['slope']:.4f},\nlargest error {share:.2g} %"
        axis.scatter(actual, 1e4 * (predicted - actual), s=9, color=color, marker=marker,
                     label=label, linewidths=0)  # fmt: skip
    axis.axhline(0, color="0.4", linewidth=0.8, zorder=0)
    axis.set(xlabel="Actual change (nats)", ylabel="Predicted - actual (1e-4 nats)")
    axis.set_title(f"The {len(step)} largest rows")
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.6 * (high - low))  # room for the legend
    axis.legend(loc="upper center", frameon=False, fontsize=6.5, handletextpad=0.2)


def _lissa(config: Config, seed: int) -> LiSSA:
    # After one pass over the data the residual is near 0.7, but the scores are good, as the paper
    # claims. With rtol=None, LiSSA does not warn. `run` records the residual as a metric.
    return LiSSA(
        config.lissa_scale,
        config.lissa_depth,
        config.lissa_repeats,
        config.lissa_batch_size,
        seed,
        rtol=None,
    )


def _worst(name: str, values: NDArray) -> float:
    """Return the worst value of one measure of `agreement`; `name` is its key."""
    if name == "slope":
        return float(values[np.abs(values - 1).argmax()])
    if name in ("intercept", "largest_difference"):
        return float(values[np.abs(values).argmax()])
    return float(values.min())
