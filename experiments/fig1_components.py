"""Figure 1: what the training loss and the inverse Hessian contribute to an influence.

Koh & Liang 2017, section 2.4 and figure 1: logistic regression of ones against sevens. For one test
point, the influence of every training row is compared with three ablations: without the training
loss, without H^-1 and without both. The paper stops there. We also retrain without a row, and test
which of the four values (the influence or an ablation) predicts the actual change. We repeat the
comparison for a hundred test points.

Every value is n times the change of the test loss when a row is removed. A row with a positive
value is helpful. The paper's I_up,loss has the opposite sign.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from experiments.harness import options
from experiments.harness.claims import RELEASED, Check, Claim, Published
from experiments.harness.record import Record
from experiments.harness.running import Misuse
from experiments.shared.compare import agreement, largest, letter, rounded, with_others
from influence import (
    BinaryLogisticRegression,
    Direct,
    Examples,
    Influence,
    RefitOptions,
    leave_one_out,
)

DATA = "mnist"
STAND_IN = "digits"

# As in the authors' 2017 code, sevens have label 0 and ones have label 1.
DIGITS = (7, 1)
VARIANTS = ("full", "no_train_loss", "no_hessian", "neither")
# The colours of training rows that have the test point's label, and of all other training rows.
_SAME, _OTHER = "#0072B2", "#D55E00"
_LOOKS = {
    "full": ("o", "#000000", "in full"),
    "no_train_loss": ("^", "#E69F00", "without training loss"),
    "no_hessian": ("s", "#56B4E9", "without $H^{-1}$"),
    "neither": ("v", "#CC79A7", "without either"),
}
# A claim counts the rows with the test point's label among this many most harmful rows.
NUM_MOST_HARMFUL = 50


@dataclass(frozen=True)
class Config:
    """The settings of the authors' 2017 code (run_components_experiment.py).

    Below, (authors' code) marks a value from that code.
    """

    weight_decay: float = 0.01
    """lambda of the penalty lambda/2 |w|^2 (authors' code)"""
    test_point: int = 30
    """row of the test point among the test set's ones and sevens; it is a 7, and the authors' code
    calls the choice arbitrary"""
    shown_rank: int = 5
    """the figure shows one harmful training image that has the test point's label; this is its
    rank, where 1 is the most harmful (authors' code)"""
    further_test_points: int = 100
    """number of further test points, drawn at random, for which the comparison is repeated"""
    num_removals: int = 100
    """number of training rows that are removed one at a time for each of the four variants: those
    of largest |value|"""
    gradient_tolerance: float = 1e-8
    """each refit stops at this Euclidean norm of its gradient"""
    seed: int = 0
    """seed of the random draw of the further test points"""

    def __post_init__(self):
        options.at_least(self, 1, "shown_rank", "further_test_points")
        options.at_least(self, 2, "num_removals")  # fitting a line needs two points
        options.positive(self, "weight_decay", "gradient_tolerance")


PRESETS = {
    "smoke": Config(further_test_points=20, num_removals=20),
    "standard": Config(),
    "paper": Config(),
}

_SIGNS = Published("section 2.4 and figure 1", words="all of the label help, all others harm")
_HARMFUL = Published("section 2.4 and figure 1", words="some of the label harm")
_HEADLINE = (
    "Figure 1: share of images whose value without H has the sign of their label; in full, sevens "
    f"among the {NUM_MOST_HARMFUL} images that harm a 7 most"
)


def _read(metric: str, sentence: str, value: float) -> Claim:
    # The paper prints no number. We read the values off its figure with an uncertainty of a fifth.
    published = Published("figure 1, read by eye", value, abs(value) / 5)
    return Claim(metric, f"{sentence}, n times the predicted change in nats", published)


CLAIMS = (
    Claim(
        "label_sign_no_hessian",
        "Share of the training images whose value without H has the sign of its label",
        _SIGNS,
        0.99,
        1.0,
        headline=_HEADLINE,
    ),
    Claim(
        "same_label_among_most_harmful",
        f"Images of the test image's label among the {NUM_MOST_HARMFUL} most harmful ones, in full",
        _HARMFUL,
        1,
        NUM_MOST_HARMFUL,
        headline=_HEADLINE,
    ),
    Claim(
        "shown_row",
        "Training row of the harmful 7 that the figure shows, the fifth most harmful of its label",
        Published(
            "fig1_influence_components.ipynb, its image compared by eye with row 2989",
            kind=RELEASED,
            words="a struck 7",
        ),
        2989,
        2989,
    ),
    _read("smallest_no_train_loss", "Smallest value without training loss", -150),
    _read("largest_no_train_loss", "Largest value without training loss", 200),
    _read("smallest_no_hessian", "Smallest value without H", -15),
    _read("largest_no_hessian", "Largest value without H", 20),
    _read("smallest_neither", "Smallest value without either", -20),
    _read("largest_neither", "Largest value without either", 25),
    Claim(
        "further_fewest_same_label_among_most_harmful",
        "The fewest such images over 100 further test images",
        None,
        1,
        NUM_MOST_HARMFUL,
    ),
    Claim(
        "further_lowest_label_sign_no_hessian",
        "The smallest such share without H over 100 further test images",
        None,
        0.99,
        1.0,
    ),
    Claim(
        "actual_pearson_full",
        "Correlation of influence in full with actual changes of refits",
        None,
        0.999,
        1.0,
    ),
    Claim(
        "actual_pearson_best_ablation",
        "Correlation of the best ablation with actual changes of refits",
        None,
        None,
        0.7,
    ),
    Claim(
        "actual_slope_full",
        "Slope of influence in full on actual changes of refits",
        None,
        0.95,
        1.02,
    ),
)
CHECKS = (
    Check("num_train", 11_894, 11_894, presets=("standard", "paper")),
    Check("num_test", 2_163, 2_163, presets=("standard", "paper")),
    Check("worst_refit_gradient_norm", 0.0, 1e-8),
)
FINDING = (
    "r = {actual_pearson_full} predicted against actual in full, {actual_pearson_best_ablation} by "
    "the best ablation"
)

DEVIATIONS = (
    "Arithmetic: we use float64 and stop at a gradient norm of 1e-10. The authors' code uses "
    "float32 and the stopping criterion of its L-BFGS.",
    "H^-1: we use one Cholesky factor for all test points. The authors' code uses conjugate "
    "gradients.",
    "Penalty: without H, the sign of a row's value agrees with the sign of its label in all rows "
    "(agreement 1.0). This holds only if L(z) is the loss without the penalty, as in the "
    "expression of section 2.4. The authors' code and the paper's figure add the penalty's "
    "gradient to the gradient of each row. This shifts the values of all rows by the same amount, "
    "a ten-thousandth of the largest value. The agreement is then the metric "
    "label_sign_no_hessian_with_penalty.",
    "Ranges: the paper prints no number of this figure. We read the smallest and largest values "
    "off it by eye, to a fifth.",
    "Beyond the paper: we remove the largest rows by each of the four variants and refit the "
    "model. We repeat all of this for 100 further test points.",
)
CAPTION = (
    "Three scatter plots of influence against its ablations, two handwritten sevens, and a "
    "scatter plot of predicted against actual changes. a to c: each point is a training image. "
    "Its height is n times the predicted change of the test loss if the image is removed: above "
    "zero the image helps. Its horizontal position is the same expression without the training "
    "loss, without H^-1, or without both. Without H^-1 (b) the sign is that of the label. d, e: "
    "the test image, and an image of the same label that harms it, circled above. f: images are "
    "removed and the model is refitted. Influence in full (black) lies on the line of equal "
    "values, the ablations do not."
)


def variants(influence: Influence, measured: Examples) -> NDArray:
    """Compute the influence and its three ablations for all pairs of test and training rows.

    Let g be the gradient of a test loss, and L(z) the loss of a training row plus the penalty. The
    variants are:

        full            g' H^-1 grad L(z)
        no_train_loss   g' H^-1 (-(2y - 1) x)
        no_hessian      g' grad L(z)
        neither         g' (-(2y - 1) x)

    The gradient of a row's loss is -(1 - p_y) (2y - 1) x. The variants without the training loss
    set the factor 1 - p_y to one and omit the penalty. The value `full` is n times the predicted
    change of the test loss if the row is removed.

    Args:
      influence: Influence of a BinaryLogisticRegression without intercept.
      measured: m test examples.

    Returns: the values (4, m, n) in the order of VARIANTS. A row with a positive value is helpful.
    """
    net, train = influence.net, influence.train
    scores = influence.scores(measured)
    s_test, g = scores.solution.x, net.gradients(measured.x, measured.y).T  # both (d, m)
    signed = (1 - 2 * train.y)[:, None]
    no_hessian = net.directional(train.x, train.y, g) + net.penalty_gradient() @ g
    return np.stack(
        [
            len(train) * scores.change_if_removed,
            (signed * (train.x @ s_test)).T,
            no_hessian.T,
            (signed * (train.x @ g)).T,
        ]
    )


def run(config: Config, data: Any, *, checkpoints: Path | None = None) -> Record:
    """Fit the model, compute the four variants for all test points, and refit without single rows.

    Args:
      config: the settings of the experiment.
      data: Splits of MNIST or of its stand-in.
      checkpoints: folder that stores finished refits, or None. An interrupted run continues from
        its files.

    Returns: Record with the metrics of CLAIMS and the arrays that `draw` needs.
    Raises: Misuse if an option does not fit the size of the data, or if fewer than `shown_rank`
      rows of the test point's label are harmful.
    """
    pair = data.of_classes(*DIGITS)
    train, test = Examples(*pair.train), Examples(*pair.test)
    options.rows_of(config, test, "test rows", "test_point")
    options.at_most(config, len(test) - 1, "other test rows", "further_test_points")
    options.at_most(config, len(train), "training rows", "num_removals")
    points = with_others(
        config.test_point, np.arange(len(test)), config.further_test_points, config.seed
    )
    measured = test.take(points)
    net = BinaryLogisticRegression(train.x.shape[1], weight_decay=config.weight_decay).fit(train)
    influence = Influence(net, train, solver=Direct(), approximation="first_order")
    values = variants(influence, measured)  # (4, m, n)
    same_label = train.y == measured.y[:, None]  # (m, n)
    first = values[:, 0]
    shown = _harmful_of_same_label(first[0], same_label[0], config.shown_rank)

    chosen = largest(first, config.num_removals)
    rows = np.unique(chosen)
    refits = leave_one_out(
        net,
        train,
        measured.take([0]),
        rows,
        RefitOptions(
            solver=influence.prepared,
            tolerance=config.gradient_tolerance,
            checkpoints=checkpoints,
        ),
    )
    actual = len(train) * refits[0]

    penalty = net.penalty_gradient() @ net.gradients(measured.x, measured.y).T  # (m,)
    label_sign = np.mean((values[2] - penalty[:, None] > 0) == same_label, axis=1)
    with_penalty = np.mean((values[2] > 0) == same_label, axis=1)
    most_harmful = np.argsort(values[0], axis=1, kind="stable")[:, :NUM_MOST_HARMFUL]
    same_among = np.take_along_axis(same_label, most_harmful, axis=1).sum(axis=1)
    pearson = _correlations(values, values[0])

    metrics: dict[str, Any] = {
        "num_train": len(train),
        "num_test": len(test),
        "test_digit": DIGITS[measured.y[0]],
        "label_sign_no_hessian": label_sign[0],
        "label_sign_no_hessian_with_penalty": with_penalty[0],
        "further_lowest_label_sign_no_hessian": label_sign[1:].min(),
        "same_label_among_most_harmful": same_among[0],
        "further_fewest_same_label_among_most_harmful": same_among[1:].min(),
        "further_median_same_label_among_most_harmful": np.median(same_among[1:]),
        "same_label_harmful": np.mean(first[0][same_label[0]] < 0),
        "num_removed": len(rows),
        "smallest_actual": actual.min(),
        "largest_actual": actual.max(),
        "worst_refit_gradient_norm": refits.gradient_norm.max(),
        "gradient_norm": net.gradient_norm(train),
        "shown_row": shown,
    }
    for k, name in enumerate(VARIANTS):
        held = agreement(first[k][rows], actual)
        own = np.abs(actual[np.searchsorted(rows, chosen[k])])
        metrics |= {
            f"smallest_{name}": first[k].min(),
            f"largest_{name}": first[k].max(),
            f"actual_pearson_{name}": held["pearson"],
            f"actual_slope_{name}": held["slope"],
            f"actual_sign_agreement_{name}": held["sign_agreement"],
            f"actual_mean_of_largest_{name}": own.mean(),
        }
        if k:
            metrics |= {
                f"pearson_{name}": pearson[k, 0],
                f"spearman_{name}": scipy.stats.spearmanr(first[k], first[0])[0],
                f"further_median_pearson_{name}": np.median(pearson[k, 1:]),
                f"further_largest_pearson_{name}": pearson[k, 1:].max(),
            }
    metrics["actual_pearson_best_ablation"] = max(
        metrics[f"actual_pearson_{name}"] for name in VARIANTS[1:]
    )
    arrays = {
        "values": first,
        "same_label": same_label[0],
        "rows": rows,
        "actual": actual,
        "test_points": points,
        "pearson": pearson,
        "same_label_among_most_harmful": same_among,
        "test_image": _image(measured.x[0]),
        "harmful_image": _image(train.x[shown]),
    }
    return Record.of(metrics=metrics, arrays=arrays)


def draw(record: Record) -> Any:
    """Draw the paper's three scatter plots and two digits, and compare the variants with refits."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    arrays, metrics = record.arrays, record.metrics
    digit, shown = int(metrics["test_digit"]), int(metrics["shown_row"])
    full, same = arrays["values"][0], arrays["same_label"]
    with plt.rc_context({"font.size": 8, "axes.titlesize": 8.5, "legend.frameon": False}):
        figure = plt.figure(figsize=(6.75, 5.0), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[1.1, 1])
        axes = above.subplots(1, 3, sharey=True)
        order = np.random.default_rng(0).permutation(len(full))  # neither class covers the other
        colours = np.where(same, _SAME, _OTHER)[order]
        for axis, value, name in zip(axes, arrays["values"][1:], VARIANTS[1:], strict=True):
            axis.axhline(0, color="0.8", linewidth=0.6, zorder=0)
            axis.axvline(0, color="0.8", linewidth=0.6, zorder=0)
            axis.scatter(value[order], full[order], c=colours, s=5, linewidths=0, rasterized=True)
            axis.plot(value[shown], full[shown], "ko", markersize=6, fillstyle="none")
            title = _LOOKS[name][2]
            axis.set_title(title[0].upper() + title[1:])
            axis.text(
                0.04,
                0.96,
                f"r = {rounded(metrics[f'pearson_{name}'])}",
                transform=axis.transAxes,
                va="top",
            )
            axis.locator_params(nbins=5)
        axes[0].set_ylabel("In full: $n$ × predicted change\nof the test loss (nats)")
        # An ablation does not predict a change of the loss, so its values have no unit.
        axes[1].set_xlabel("The same expression without these factors")
        others = [d for d in DIGITS if d != digit]
        looks: list[dict[str, Any]] = [
            {"color": _SAME, "label": f"a {digit}, as the test image"},
            {"color": _OTHER, "label": f"a {others[0]}"},
            {"color": "black", "fillstyle": "none", "label": "the harmful image below"},
        ]
        marks = [Line2D([], [], linestyle="", marker="o", markersize=4, **look) for look in looks]
        above.legend(handles=marks, loc="outside upper center", ncols=3)

        test, harmful, axis = below.subplots(1, 3, width_ratios=[0.75, 0.75, 1.5])
        for image, name, title in (
            (test, "test_image", f"Test image: a {digit}"),
            (harmful, "harmful_image", f"A {digit} that harms it"),
        ):
            image.imshow(arrays[name], cmap="gray_r", interpolation="nearest")
            image.set(title=title, xticks=[], yticks=[])
        _draw_refits(axis, record)
        for name, panel in zip("abcdef", (*axes, test, harmful, axis), strict=True):
            letter(panel, name)
    return figure


def _draw_refits(axis: Any, record: Record) -> None:
    """Draw the values of the four variants against the actual changes from refits."""
    arrays, metrics = record.arrays, record.metrics
    actual = arrays["actual"]
    reach = 1.08 * np.abs(actual).max()
    axis.plot([-reach, reach], [-reach, reach], color="0.6", linewidth=0.8, zorder=0)
    for k in (1, 2, 3, 0):  # draw the full influence last, on top
        marker, colour, label = _LOOKS[VARIANTS[k]]
        pearson = rounded(metrics[f"actual_pearson_{VARIANTS[k]}"])
        axis.scatter(
            actual,
            arrays["values"][k][arrays["rows"]],
            s=9,
            marker=marker,
            color=colour,
            linewidths=0,
            label=f"{label},\nr = {pearson}",
        )
    axis.set(
        title="Removed and refitted",
        xlabel="$n$ × actual change (nats)",
        ylabel="$n$ × predicted change",
    )
    axis.locator_params(nbins=5)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), handletextpad=0.1, fontsize=7)


def _harmful_of_same_label(full: NDArray, same_label: NDArray, rank: int) -> int:
    """Return a harmful row with the test point's label. Rank 1 is the most harmful of them."""
    rows = np.flatnonzero(same_label & (full < 0))
    if rank > len(rows):
        raise Misuse(
            f"shown_rank must be at most {len(rows)}, the number of harmful rows with the test "
            f"point's label, got {rank}."
        )
    return int(rows[np.argsort(full[rows], kind="stable")[rank - 1]])


def _correlations(values: NDArray, full: NDArray) -> NDArray:
    """Compute Pearson's r between each variant and the full influence, over the n training rows.

    `values` has the shape (4, m, n), `full` (m, n) and the result (4, m).
    """
    a, b = (v - v.mean(axis=-1, keepdims=True) for v in (values, full))
    sizes = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.einsum("kmn,mn->km", a, b) / sizes


def _image(x: NDArray) -> NDArray:
    side = int(np.sqrt(len(x)))
    return x.reshape(side, side)
