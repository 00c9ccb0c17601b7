"""Figure 3: influence for a hinge loss, which has no curvature, by smoothing it.

Koh & Liang 2017, section 4.2 and figure 3: a linear SVM, ones against sevens. The SVM is fitted
once, with the hinge loss. At its weights, influence is computed with the hinge and with smooth
hinges of temperature t. Each prediction is compared with the actual change of the hinge loss when a
row is removed and the SVM is fitted again. Beyond the paper, we compute the correlation for more
temperatures, and for ten further test points.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.harness import options
from experiments.harness.claims import RELEASED, Check, Claim, Published
from experiments.harness.record import Record
from experiments.harness.running import Misuse
from experiments.shared import compare
from influence import Direct, Examples, Influence, RefitOptions, SmoothHinge, leave_one_out

DATA = "mnist"
STAND_IN = "digits"

# Like the paper's figure, ours shows the loss for these temperatures over this range of margins.
_CURVES, _MARGINS = (0.0, 0.001, 0.01, 0.1), (0.8, 1.2)
# As in the authors' 2017 code, sevens have label -1 and ones have label 1.
DIGITS = (7, 1)


@dataclass(frozen=True)
class Config:
    """The settings of the authors' 2017 code (run_hinge_experiment.py).

    Below, (authors' code) marks a value from that code.
    """

    weight_decay: float = 0.01
    """lambda of the penalty lambda/2 |w|^2 (authors' code)"""
    multiple: int = 100
    """the numbers of training and test rows are rounded down to a multiple of this (authors'
    code)"""
    test_point: int = 1597
    """row of the test point; it is wrongly classified and has one of the ten smallest margins
    (authors' code)"""
    smooth: tuple[float, ...] = (0.001, 0.1)
    """temperatures of the smooth hinges in the figure; the hinge itself has temperature 0 (section
    4.2)"""
    sweep: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0)
    """temperatures at which the correlation is computed"""
    num_removals: int = 100
    """number of rows to remove: those of largest |influence| at t = 0, the same for every t
    (authors' code)"""
    further_test_points: int = 10
    """number of further test points, drawn at random"""
    further_among: int = 50
    """the further test points are drawn among this many test rows with the smallest margins; the
    paper's test point is not drawn again; at a margin above 1 the hinge loss has no gradient"""
    seed: int = 0
    """seed of the random draw of the further test points"""

    def __post_init__(self):
        options.at_least(self, 1, "multiple", "further_test_points")
        options.at_least(self, 2, "num_removals")  # fitting a line needs two points
        options.positive(self, "weight_decay", "smooth", "sweep")
        # One more is needed, because the paper's test point is not drawn again.
        options.at_least(self, self.further_test_points + 1, "further_among")


PRESETS = {
    "smoke": Config(
        weight_decay=0.1,
        multiple=10,
        test_point=11,
        num_removals=40,
        further_test_points=3,
        further_among=7,
    ),
    "standard": Config(),
    "paper": Config(),
}

_NOTEBOOK = "fig3_hinge.ipynb; the paper prints 0.95 and 0.91 (figure 3)"
# The correlation at each temperature, as the notebook prints it.
_PUBLISHED = {0.0: 0.63248, 0.001: 0.95017, 0.1: 0.91407}
# In the published panels, the axis of actual changes ends at this value.
_AXES = 0.025
_HEADLINE = "Figure 3: correlation for an SVM, by hinges smoothed with t = 0, 0.001 and 0.1"
CLAIMS = (
    Claim(
        "pearson_t0",
        "Correlation of predicted and actual changes, 100 removals, at t = 0",
        Published(_NOTEBOOK, _PUBLISHED[0.0], kind=RELEASED),
        headline=_HEADLINE,
    ),
    Claim(
        "pearson_t0.001",
        "Correlation of predicted and actual changes, 100 removals, at t = 0.001",
        Published(_NOTEBOOK, _PUBLISHED[0.001], kind=RELEASED),
        0.93,
        1.0,
        headline=_HEADLINE,
    ),
    Claim(
        "pearson_t0.1",
        "Correlation of predicted and actual changes, 100 removals, at t = 0.1",
        Published(_NOTEBOOK, _PUBLISHED[0.1], kind=RELEASED),
        0.87,
        0.95,
        headline=_HEADLINE,
    ),
    Claim(
        "lead_of_t0.001_over_t0.1",
        "Correlation at t = 0.001 minus that at t = 0.1",
        Published("section 4.2", words="above 0"),
        0.0,
        None,
    ),
    Claim(
        "lead_of_t0.1_over_t0",
        "Correlation at t = 0.1 minus that at t = 0",
        Published("section 4.2", words="above 0"),
        0.0,
        None,
    ),
    Claim(
        "overshoot_t0",
        "Largest predicted size divided by the largest actual size at t = 0",
        Published("figure 3, read off the notebook's axes", words="8 to 20", kind=RELEASED),
        8,
        None,
    ),
    Claim(
        "actual_beyond_papers_axes",
        f"Actual changes, of 100, beyond {_AXES}, where the axes of the published panels end",
        Published("figure 3, read off the notebook's axes", words="none drawn", kind=RELEASED),
        0,
        0,
    ),
    Claim(
        "test_margin_rank",
        "Rank of the test point's margin, the smallest first",
        Published("run_hinge_experiment.py", words="among the ten smallest", kind=RELEASED),
        1,
        10,
    ),
    Claim(
        "further_lowest_pearson_t0.001",
        "Smallest correlation at t = 0.001 over ten further test points",
        None,
        0.93,
        1.0,
    ),
)
CHECKS = (
    Check("num_train", 11_800, 11_800, presets=("standard", "paper")),
    Check("num_test", 2_100, 2_100, presets=("standard", "paper")),
    Check("worst_refit_gradient_norm", 0.0, 1e-8),
    Check("worst_error_of_actual", 0.0, 1e-6),
)
FINDING = "r = {pearson_t0} at t = 0, {pearson_t0.001} at 0.001 and {pearson_t0.1} at 0.1"

DEVIATIONS = (
    "Weights: we use the SVM's exact minimum (duality gap below 1e-17). The authors' code uses "
    "LinearSVC's weights with tol 1e-6: a duality gap of 4e-10, at a distance of 8e-7 from the "
    "minimum. This difference matters at t = 0, because 63 rows lie on the kink. These rows have "
    "half the slope here. In the authors' code, rounding decides whether they have the full slope "
    "or none. The metrics pearson_at_liblinear_... give r with LinearSVC's weights.",
    "Axes: the published panels end at actual changes of +-0.025. Some of our 100 changes lie "
    "beyond, so the published plot may clip its points. The metrics pearson_inside_papers_axes_... "
    "give r of the points inside.",
    "Refits: our refits are exact too, and each is certified by its duality gap. The metric "
    "worst_error_of_actual bounds the error of an actual change. LinearSVC in the authors' code "
    "gives no certificate.",
    "Solver: we use float64 and one Cholesky factor for each t. The authors' code uses float32 "
    "and conjugate gradients.",
    "Beyond the paper: we compute r at more values of t. We also choose the rows at t = 0.001, "
    "not at 0 (metrics pearson_chosen_by_smooth_...). We add ten test points among the 50 smallest "
    "margins. Sixteen test points are wrongly classified, and the paper's is one of them.",
)
CAPTION = (
    "Three scatter plots of predicted against actual changes of a hinge loss, the smoothed "
    "losses, and the correlation over the temperature. a to c: each point is a training image "
    "that was removed before the SVM was refitted. The line has equal values. Without smoothing "
    "(a) the predictions are ten times too large, because the hinge has no curvature. Dotted "
    "lines mark where the axes of the published panels end. d: the smooth hinges near the kink. "
    "e: the correlation for the paper's test point and for ten others, by temperature."
)


def run(config: Config, data: Any, *, checkpoints: Path | None = None) -> Record:
    """Fit the SVM, predict the effect of each row at each temperature, and refit without some rows.

    Args:
      config: the settings of the experiment.
      data: Splits of MNIST or of its stand-in.
      checkpoints: folder that stores finished refits, or None. An interrupted run continues from
        its files.

    Returns: Record with the metrics of CLAIMS and the arrays that `draw` needs.
    Raises: Misuse if an option does not fit the size of the data, or if the hinge has no slope at a
      test point.
    """
    pair = data.of_classes(*DIGITS)
    options.at_most(config, min(len(pair.train[1]), len(pair.test[1])), "rows", "multiple")
    train, test = (_truncated(x, y, config.multiple) for x, y in (pair.train, pair.test))
    options.rows_of(config, test, "test rows", "test_point")
    options.at_most(config, len(test), "test rows", "further_among")
    options.at_most(config, len(train), "training rows", "num_removals")
    svm = SmoothHinge(train.x.shape[1], weight_decay=config.weight_decay).fit(train)
    margins = test.y * svm.outputs(test.x)[:, 0]
    points = _test_points(config, margins)
    measured = test.take(points)

    ts = np.unique([0.0, *config.smooth, *config.sweep])  # ascending
    predicted = _predicted(svm.theta, train, measured, config, ts)  # (t, m, n)
    smooth = int(np.searchsorted(ts, config.smooth[0]))
    liblinear = _liblinear(train, config)
    there = _predicted(liblinear.theta, train, measured.take([0]), config, ts)

    chosen = {
        "": compare.largest(predicted[0], config.num_removals),  # (m, k): by |influence| at t = 0
        "_chosen_by_smooth": compare.largest(predicted[smooth], config.num_removals),
        "_at_liblinear": compare.largest(there[0], config.num_removals),  # (1, k)
    }
    rows = np.unique(np.concatenate(list(chosen.values())))
    refits = leave_one_out(
        svm, train, measured, rows, RefitOptions(tolerance=1e-8, checkpoints=checkpoints)
    )
    after = np.full((len(points), len(train)), np.nan)
    after[:, rows] = refits.change_if_removed
    pearson = {
        name: _correlations(there if name == "_at_liblinear" else predicted, after, some)
        for name, some in chosen.items()
    }  # each (t, m)

    actual = after[0, chosen[""][0]]
    norms = [svm.gradient_norm(train), refits.gradient_norm.max()]
    # A change of w by v changes the hinge loss at x by at most |x| |v|. The distance of a fitted w
    # from the exact minimum is at most its gradient norm / lambda.
    error = np.linalg.norm(measured.x, axis=1).max() * sum(norms) / config.weight_decay
    metrics: dict[str, Any] = {
        "num_train": len(train),
        "num_test": len(test),
        "test_accuracy": np.mean(margins > 0),
        "test_margin": margins[config.test_point],
        "test_margin_rank": 1 + np.sum(margins < margins[config.test_point]),
        "smallest_actual": actual.min(),
        "largest_actual": actual.max(),
        "median_size_of_actual": np.median(np.abs(actual)),
        "num_removed": len(rows),
        "actual_beyond_papers_axes": np.sum(np.abs(actual) > _AXES),
        "gradient_norm": norms[0],
        "duality_gap": svm.duality_gap(train),
        "worst_refit_gradient_norm": norms[1],
        "worst_error_of_actual": error,
        "rows_on_kink": np.sum(np.abs(1 - train.y * svm.outputs(train.x)[:, 0]) < 1e-8),
        "liblinear_duality_gap": liblinear.duality_gap(train),
        "liblinear_distance": np.linalg.norm(liblinear.theta - svm.theta),
    }
    for t in (0.0, *config.smooth):
        k, name = int(np.searchsorted(ts, t)), f"t{t:g}"
        held = compare.agreement(predicted[k, 0, chosen[""][0]], actual)
        metrics |= {f"{key}_{name}": value for key, value in held.items()}
        metrics |= {f"pearson{how}_{name}": r[k, 0] for how, r in pearson.items()}
        inside = np.abs(actual) <= _AXES
        shown = predicted[k, 0, chosen[""][0]][inside], actual[inside]
        metrics |= {
            f"pearson_inside_papers_axes_{name}": np.corrcoef(*shown)[0, 1],
            f"overshoot_{name}": np.abs(predicted[k, 0, chosen[""][0]]).max()
            / np.abs(actual).max(),
            f"further_lowest_pearson_{name}": pearson[""][k, 1:].min(),
            f"further_median_pearson_{name}": np.median(pearson[""][k, 1:]),
            f"further_largest_pearson_{name}": pearson[""][k, 1:].max(),
        }
    order = (*sorted(config.smooth), 0.0)  # the paper's ranking of t, best first
    leads = -np.diff(pearson[""][np.searchsorted(ts, order)], axis=0)  # (number of pairs, m)
    metrics["further_in_order"] = np.mean((leads[:, 1:] > 0).all(axis=0))
    for good, bad, lead in zip(order, order[1:], leads[:, 0], strict=False):
        metrics[f"lead_of_t{good:g}_over_t{bad:g}"] = lead
    s = np.linspace(*_MARGINS, 401)
    one = np.ones((len(s), 1))  # all labels are one, and so is the weight
    curves = [SmoothHinge(1, t).losses(s[:, None], one, one[:1]) for t in _CURVES]
    arrays = {
        "t": ts,
        "rows": chosen[""][0],
        "actual": actual,
        "predicted": predicted[:, 0, chosen[""][0]],
        "pearson": pearson[""],
        "pearson_chosen_by_smooth": pearson["_chosen_by_smooth"],
        "pearson_at_liblinear": pearson["_at_liblinear"],
        "test_points": points,
        "test_margins": margins[points],
        "refit_gradient_norm": refits.gradient_norm,
        "all_rows": rows,
        "all_actual": refits.change_if_removed,
        "curve_t": np.array(_CURVES),
        "curve_margin": s,
        "curve_loss": np.concatenate(curves, axis=1).T,
    }
    return Record.of(metrics=metrics, arrays=arrays)


def draw(record: Record) -> Any:
    """Draw predicted against actual changes for each t, the losses, and the correlation over t.

    All panels have the same axis of actual changes. Dotted lines mark the ends of this axis in the
    published panels.
    """
    import matplotlib.pyplot as plt

    arrays, real = record.arrays, not record.data.get("stand_in", True)
    shown = [0.0, *record.config["smooth"]]
    with plt.rc_context({"font.size": 8, "axes.titlesize": 8.5, "legend.frameon": False}):
        figure = plt.figure(figsize=(6.75, 4.9), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[1, 1])
        axes = above.subplots(1, len(shown))
        for axis, t in zip(axes, shown, strict=True):
            _draw_changes(axis, arrays, t, published=real)
        axes[0].set_ylabel("Predicted change in loss")
        curves, over_t = below.subplots(1, 2, width_ratios=[1, 1.6])
        looks = (("0.7", "-", 3.0), ("#0072B2", "--", 1.2), ("#009E73", "-.", 1.2),
                 ("#D55E00", "-", 1.2))  # fmt: skip
        losses = zip(arrays["curve_t"], arrays["curve_loss"], looks, strict=True)
        for t, loss, (colour, line, width) in losses:
            curves.plot(
                arrays["curve_margin"], loss, line, color=colour, linewidth=width, label=_named(t)
            )
        curves.set(xlabel="Margin $s = y z$", ylabel="Loss", title="The losses")
        curves.legend(fontsize=7)
        _draw_over_t(over_t, arrays)
        for name, axis in zip("abcdefgh", (*axes, curves, over_t), strict=False):
            compare.letter(axis, name)
    return figure


def _draw_changes(axis: Any, arrays: Any, t: float, *, published: bool) -> None:
    """Draw predicted against actual changes at one temperature, with the line y = x."""
    k = int(np.searchsorted(arrays["t"], t))
    actual, predicted = arrays["actual"], arrays["predicted"][k]
    reach = 1.08 * np.abs(actual).max()
    axis.plot([-reach, reach], [-reach, reach], color="0.6", linewidth=0.8, zorder=1)
    axis.scatter(actual, predicted, s=10, alpha=0.6, color="#0072B2", linewidths=0, zorder=2)
    if published:
        for end in (-_AXES, _AXES):
            axis.axvline(end, color="0.5", linewidth=0.8, linestyle=":", zorder=0)
    # Each panel has its own vertical scale, because the predictions at t = 0 are ten times larger.
    tall = 1.08 * max(np.abs(predicted).max(), np.abs(actual).max())
    # The axis labels have no unit, because the hinge loss is not a log loss in nats.
    axis.set(xlim=(-reach, reach), ylim=(-tall, tall), title=_named(t))
    axis.set_xlabel("Actual change in loss")
    axis.locator_params(nbins=5)
    said = f"r = {compare.rounded(arrays['pearson'][k, 0])}"
    if published and t in _PUBLISHED:
        said += f"\npublished {compare.rounded(_PUBLISHED[t])}"
    axis.text(0.04, 0.96, said, transform=axis.transAxes, va="top")
    if published and t == max(_PUBLISHED):
        end = " the published axes end"
        axis.text(_AXES, -tall, end, rotation=90, ha="right", va="bottom", fontsize=6.5)


def _draw_over_t(axis: Any, arrays: Any) -> None:
    """Draw the correlation over t on a logarithmic axis, with t = 0 as a separate point."""
    ts, pearson = arrays["t"], arrays["pearson"]
    at = np.where(ts > 0, ts, ts[1] / 10)
    for j in range(pearson.shape[1] - 1, -1, -1):  # the paper's point last, on top
        style: dict[str, Any] = {"color": "#0072B2", "linewidth": 1.5, "markersize": 4}
        if j:
            style = {"color": "0.75", "linewidth": 0.8, "markersize": 2.5}
        label = {0: "the test point above", 1: "further test points"}.get(j)
        axis.plot(at[1:], pearson[1:, j], "o-", label=label, **style)
        axis.plot(at[:1], pearson[:1, j], "o", **style)
    axis.set_xscale("log")
    axis.set_xticks(at, [f"{t:g}" for t in ts])
    axis.minorticks_off()
    axis.set_ylim(min(0, 1.1 * pearson.min()), 1.05)
    axis.set(xlabel="Temperature $t$", ylabel="Correlation r", title="Predicted and actual, over t")
    axis.legend(frameon=False, loc="lower right")


def _named(t: float) -> str:
    return f"SmoothHinge, t = {t:g}" if t else "Hinge, t = 0"


def _truncated(x: NDArray, y: NDArray, multiple: int) -> Examples:
    """Return the first rows, with labels -1 and 1.

    Their number is the largest possible multiple of `multiple`.
    """
    n = len(y) // multiple * multiple
    return Examples(x[:n], 2 * y[:n] - 1)


def _test_points(config: Config, margins: NDArray) -> NDArray:
    """Return the paper's test point, and others drawn from those with the smallest margins."""
    small = np.argsort(margins, kind="stable")[: config.further_among]
    points = compare.with_others(config.test_point, small, config.further_test_points, config.seed)
    if margins[points].max() >= 1:
        raise Misuse(
            "test_point and the further_among smallest margins must lie below 1, where the hinge "
            f"has a slope, got {margins[points].max():.3g} for test point "
            f"{points[margins[points].argmax()]}."
        )
    return points


def _predicted(
    theta: NDArray, train: Examples, measured: Examples, config: Config, ts: NDArray
) -> NDArray:
    """Predict the changes (t, m, n) with each temperature's smooth hinge, at the weights theta."""
    nets = [_at(theta, t, config) for t in ts]
    of_nets = [Influence(net, train, solver=Direct(), approximation="first_order") for net in nets]
    return np.stack([influence.scores(measured).change_if_removed for influence in of_nets])


def _liblinear(train: Examples, config: Config) -> SmoothHinge:
    """Fit the SVM with scikit-learn and the settings of the authors' code."""
    from sklearn.svm import LinearSVC

    C = 1 / (len(train) * config.weight_decay)
    svm = LinearSVC(
        loss="hinge", C=C, tol=1e-6, max_iter=5000, random_state=24, fit_intercept=False
    )
    return _at(svm.fit(train.x, train.y).coef_[0], 0.0, config)


def _at(theta: NDArray, t: float, config: Config) -> SmoothHinge:
    net = SmoothHinge(len(theta), float(t), weight_decay=config.weight_decay)
    net.theta = theta
    return net


def _correlations(predicted: NDArray, actual: NDArray, rows: NDArray) -> NDArray:
    """Compute Pearson's r (t, m) between predicted and actual changes.

    For test point j, r is computed over the k training rows `rows[j]`. The shapes are: predicted
    (t, m, n), actual (at least m, n), rows (m, k).
    """
    truth = np.take_along_axis(actual[: len(rows)], rows, axis=1)
    return np.array(
        [
            [
                np.corrcoef(of_point[some], true)[0, 1]
                for of_point, some, true in zip(of_t, rows, truth, strict=True)
            ]
            for of_t in predicted
        ]
    )
