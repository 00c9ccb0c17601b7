"""Figure 4: which images helped an RBF SVM, and which a deep network, to recognise the same fish.

Koh & Liang 2017, section 5.1 and figure 4. Two models distinguish dogs from fish: an SVM with a
Gaussian kernel on raw pixels, and logistic regression on a network's features. For the SVM, images
near the test image in pixels are influential: fish help and dogs harm. For the deep net, distance
in pixels does not predict influence, and dogs may help it to recognise a fish.

The kernel of images x_i and x_j is K_ij = exp(-gamma |x_i - x_j|^2). Let L be the Cholesky factor
of K. The kernel SVM equals the linear SVM whose inputs are the rows of L. The input for a new image
is the solution phi of L phi = k. Entry i of k is the kernel of x_i and the new image. Influence is
computed for the smooth hinge, at the minimum of its own risk.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
import scipy.stats
from numpy.typing import NDArray

from data.dogfish import IMAGENETTES_SIDE
from data.images import resized
from experiments.fig4_rbf_vs_inception import claims
from experiments.fig4_rbf_vs_inception.models import (
    FISH,
    deep_head,
    kernel_svm,
    squared_distances,
)
from experiments.harness import options
from experiments.harness.record import Record
from experiments.harness.running import Misuse
from experiments.shared import compare, trunks

DATA = "dogfish"
STAND_IN = "fishlike"

# The name of the SVM among the models. The name of a deep head has the form network/layer.
SVM = "svm"
# `photographs` shows this many of the most helpful images, and as many of the most helpful dogs.
NUM_PHOTOGRAPHS = 5
# The scatter plots show the SVM and this many deep heads.
_SHOWN = 2
# We test the paper's words on this many largest influences of the SVM.
_LARGEST = 100
# The influence axis of a scatter plot ends at this quantile of |influence| times this factor. All
# points beyond the end are drawn on the edge.
_QUANTILE, _ROOM = 0.995, 1.25
# Names, for readers, of the networks that replace the paper's network.
_CUT = {"mobilenet": "MobileNet .75", "inception": "Inception v3"}
# Fish are green and dogs orange, which colour-blind readers can distinguish.
_GREEN, _ORANGE = "#009E73", "#E69F00"
# The paper's test fish has this margin under the SVM (authors' 2017 code, notebook of figure 4).
_PAPERS_MARGIN = 0.990029


@dataclass(frozen=True)
class Config:
    """Settings. (authors' code) marks a value of the authors' 2017 run_rbf_comparison.py."""

    weight_decay: float = 0.001
    """lambda of the penalty lambda/2 |w|^2, for the SVM and for the deep heads (authors' code)"""
    gamma: float = 0.05
    """the kernel is exp(-gamma / n |x - x'|^2), n images, pixels in [-1, 1] (authors' code)"""
    side: int = 299
    """side in pixels of the images that the kernel compares; gamma must fit it (authors' code)"""
    temperature: float = 0.001
    """temperature of the smooth hinge (authors' code)"""
    heads: tuple[str, ...] = ("inception-keras/mixed10",)
    """each deep head, a logistic regression on the features of network/layer (section 5.1)"""
    test_point: int | None = None
    """row of the test fish in the scatter plots (authors' code: 462, a clownfish); None: the fish
    whose margin under the SVM is nearest to the paper's, .990"""
    num_fish: int = 60
    """number of test fish: the one above, and others drawn at random among those with a margin
    below 1 under the SVM; above 1 the hinge loss has no gradient, and so no influence"""
    top_svm: int = 20
    """number of the SVM's most helpful images whose class is counted"""
    top_deep: int = 100
    """number of a deep head's most helpful images whose class is counted"""
    seed: int = 0
    """seed of the random draw of the test fish"""

    def __post_init__(self):
        options.at_least(self, 1, "side", "num_fish", "top_svm", "top_deep")
        options.positive(self, "weight_decay", "gamma", "temperature")
        if not self.heads:
            raise Misuse("heads must name at least one network/layer, got none.")
        for head in self.heads:
            trunks.split(head)


PRESETS = {
    "smoke": Config(side=32, heads=("learnt/relu2", "small/relu2"), num_fish=10, top_deep=50),
    "standard": Config(
        heads=(
            "inception/mixed8",
            "mobilenet/conv_pw_13_relu",
            "inception/mixed5",
            "mobilenet/conv_pw_11_relu",
        )
    ),
    "paper": Config(test_point=462),
}
CLAIMS, CHECKS = claims.CLAIMS, claims.CHECKS
FINDING, DEVIATIONS, CAPTION = claims.FINDING, claims.DEVIATIONS, claims.CAPTION
CONDITIONS = claims.CONDITIONS


def run(config: Config, data: Any, *, checkpoints: Path | None = None) -> Record:
    """Fit the SVM and the deep heads, and compute which training images helped the test fish.

    Args:
      config: the settings of the experiment.
      data: Splits of dogfish or of its stand-in.
      checkpoints: folder that stores the features of the stand-in's images. The features of
        photographs are stored in the user cache (see `trunks.kept_in`).

    Returns: Record with the metrics of CLAIMS and the numbers that `draw` needs, but no pixels.
    Raises: Misuse if a network's weights are missing, or an option does not fit the size of the
      data.
    """
    (x, y), (x_test, y_test) = data.train, data.test
    trunks.check(config.heads, data.folder)
    if config.test_point is not None:
        fish = np.flatnonzero(y_test == FISH)
        options.one_of(config, fish, "a fish of the test set", "test_point")
    options.at_most(config, len(y), "training images", "top_svm", "top_deep")

    images = np.concatenate([x, x_test])
    seen = resized(images, config.side)
    distance = squared_distances(seen[: len(x)], seen)
    gamma, decay = config.gamma / len(x), config.weight_decay
    svm = kernel_svm(distance, y, y_test, gamma=gamma, t=config.temperature, weight_decay=decay)
    models = {SVM: svm}
    margins = svm.outputs  # a fish has label 1, so its margin is its output
    points = _fish(config, margins, y_test)
    folder = trunks.kept_in(data.stand_in, checkpoints)
    features, seconds = trunks.timed_features(config.heads, images, root=data.folder, folder=folder)
    for head, phi in features.items():
        models[head] = deep_head(phi, y, y_test, weight_decay=decay)

    scores = np.stack([model.scores(points) for model in models.values()])  # (models, k, n)
    apart = np.sqrt(distance[len(x) + points])  # (k, n)
    pairs = [zip(np.abs(of_model), apart, strict=True) for of_model in scores]
    spearman = np.array([[scipy.stats.spearmanr(*one)[0] for one in some] for some in pairs])
    order = np.argsort(-scores, axis=2, kind="stable")  # the most helpful first
    is_dog = y[order] != FISH
    tops = [config.top_svm] + [config.top_deep] * len(config.heads)
    dogs = np.stack([some[:, :top].sum(axis=1) for some, top in zip(is_dog, tops, strict=True)])
    first_dog = is_dog.argmax(axis=2)
    largest = np.abs(scores).max(axis=2)
    ratio = largest[0] / largest[1:]
    accuracies = {name: model.accuracies for name, model in models.items()}
    # True where an influence of the SVM has the expected sign: a fish helps, or a dog harms.
    helps = np.where(y == FISH, scores[0] > 0, scores[0] < 0)  # (k, n)
    by_size = np.argsort(-np.abs(scores[0]), axis=1, kind="stable")[:, :_LARGEST]
    of_class = np.take_along_axis(helps, by_size, axis=1).mean(axis=1)
    same_class = 1 - is_dog[0][:, :_LARGEST].mean(axis=1)
    sure = scipy.special.expit([model.outputs[points[0]] for model in list(models.values())[1:]])

    metrics: dict[str, Any] = {
        "num_train": len(y),
        "num_test": len(y_test),
        "photographs_side": x.shape[1],
        "features_seconds": seconds,
        "same_class_in_top_svm": 1 - np.mean(dogs[0]) / config.top_svm,
        "median_same_class_in_top_svm": 1 - np.median(dogs[0]) / config.top_svm,
        "fewest_dogs_in_top_deep": dogs[1:].min(),
        "sign_of_class_in_largest_svm_of_test_point": of_class[0],
        "median_sign_of_class_in_largest_svm": np.median(of_class),
        "same_class_in_top_100_svm_of_test_point": same_class[0],
        "median_same_class_in_top_100_svm": np.median(same_class),
        "earliest_first_dog_of_test_point": 1 + first_dog[1:, 0].min(),
        "latest_first_dog_of_test_point": 1 + first_dog[1:, 0].max(),
        "lowest_probability_of_test_point": sure.min(),
        "published_rows_in_top_svm": _published_rows(order[0, 0], "svm"),
        "published_rows_in_top_deep": _published_rows(order[1, 0], "deep"),
        "least_median_ratio_of_largest_influence": np.median(ratio, axis=1).min(),
        "least_ratio_of_largest_influence_of_test_point": ratio[:, 0].min(),
        "largest_ratio_of_largest_influence_of_test_point": ratio[:, 0].max(),
        "lowest_median_spearman_deep": np.median(spearman[1:], axis=1).min(),
        "largest_median_spearman_deep": np.median(spearman[1:], axis=1).max(),
        "lowest_test_accuracy_deep": min(accuracies[head][1] for head in config.heads),
        "fish_of_margin_below_1_svm": np.sum((margins < 1) & (y_test == FISH)),
        "test_point": points[0],
        "margin_of_test_point_svm": margins[points[0]],
        "worst_gradient_norm": max(model.gradient_norm for model in models.values()),
    }
    for i, name in enumerate(models):
        metrics |= {
            f"median_spearman_{name}": np.median(spearman[i]),
            f"train_accuracy_{name}": accuracies[name][0],
            f"test_accuracy_{name}": accuracies[name][1],
            f"median_largest_influence_{name}": np.median(largest[i]),
            f"largest_influence_of_test_point_{name}": largest[i, 0],
            f"median_rank_of_first_dog_{name}": np.median(first_dog[i]),
            f"rank_of_first_dog_of_test_point_{name}": first_dog[i, 0],
        }
        if i:
            metrics |= {
                f"median_dogs_in_top_{name}": np.median(dogs[i]),
                f"fewest_dogs_in_top_{name}": dogs[i].min(),
                f"median_ratio_of_largest_influence_{name}": np.median(ratio[i - 1]),
                f"ratio_of_largest_influence_of_test_point_{name}": ratio[i - 1, 0],
                f"probability_of_test_point_{name}": sure[i - 1],
            }
    helpful_dogs = np.argsort(np.where(y == FISH, np.inf, -scores[:, 0]), axis=1, kind="stable")
    arrays = {
        "models": np.array(list(models), "S"),
        "labels": y,
        "test_fish": points,
        "distance": apart[0],
        "score": scores[:, 0],
        "spearman": spearman,
        "dogs_in_top": dogs,
        "largest_influence": largest,
        "rank_of_first_dog": first_dog,
        "sign_of_class": of_class,
        "same_class": same_class,
        "outputs": np.stack([model.outputs[points] for model in models.values()]),
        "most_helpful": order[:, 0, :NUM_PHOTOGRAPHS],
        "most_helpful_dogs": helpful_dogs[:, :NUM_PHOTOGRAPHS],
    }
    return Record.of(metrics=metrics, arrays=arrays)


def draw(record: Record) -> Any:
    """Draw influence over distance for one test fish, and three summaries of all test fish."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, MultipleLocator

    arrays = record.arrays
    names = [name.decode() for name in arrays["models"]]
    with plt.rc_context({"font.size": 8, "axes.titlesize": 8.5}):
        figure = plt.figure(figsize=(6.75, 4.9), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[1.15, 1])
        shown = range(min(1 + _SHOWN, len(names)))
        for i, axis in zip(shown, np.atleast_1d(above.subplots(1, len(shown))), strict=True):
            _draw_scatter(axis, arrays, i)
            axis.set_title(_named(names[i]))
            compare.letter(axis, "abc"[i])
        marks = [
            Line2D([], [], linestyle="", marker="o", markersize=4, color=colour, label=label)
            for colour, label in ((_GREEN, "fish"), (_ORANGE, "dogs"))
        ]
        above.legend(handles=marks, loc="outside upper center", ncols=2, frameon=False)
        strips = below.subplots(1, 3)
        top = record.config["top_deep"]
        for axis, values, title in (
            (strips[0], arrays["spearman"], "Spearman of |influence|\nand distance"),
            (strips[1], arrays["dogs_in_top"][1:], f"Dogs among the {top}\nmost helpful"),
            (strips[2], arrays["largest_influence"], "Largest |influence|"),
        ):
            _draw_strip(axis, values, names[len(names) - len(values) :])
            axis.set_title(title)
        for name, axis in zip("def", strips, strict=True):
            compare.letter(axis, name)
        strips[0].axvline(0, color="0.6", linewidth=0.8, zorder=0)
        strips[1].set_xlim(left=0)
        strips[2].set_xscale("log")
        locators = (MultipleLocator(0.2), MultipleLocator(20), LogLocator(1000))
        for axis, ticks in zip(strips, locators, strict=True):
            axis.xaxis.set_major_locator(ticks)
        if not record.data.get("stand_in", True):  # the harness labels stand-in data
            figure.supxlabel(_said(record, names[1:]), fontsize=7, color="0.35")
    return figure


def _said(record: Record, heads: list[str]) -> str:
    """Return a note on the photographs and the networks that replace those of the paper."""
    networks = dict.fromkeys(trunks.split(head)[0] for head in heads)
    said = []
    if record.metrics.get("photographs_side", IMAGENETTES_SIDE) == IMAGENETTES_SIDE:
        said.append("Photographs of Imagenette, English springer against tench")
    cut = [_CUT[network] for network in networks if network in _CUT]
    if cut:
        said.append(f"{' and '.join(cut)} cut at the layer named")
    if not said:
        return ""
    return f"{'; '.join(said)}:\nthe paper's own are not available."


def photographs(record: Record, data: Any, *, checkpoints: Path | None = None) -> Any:
    """Draw the photographs of the test fish and of the images that helped each model most.

    Args:
      record: the record of a run on `data`.
      data: Splits of dogfish or of its stand-in.
      checkpoints: not used.

    Returns: a figure with photographs. The figure must never be committed.
    """
    import matplotlib.pyplot as plt

    arrays, (x, y) = record.arrays, data.train
    names = [name.decode() for name in arrays["models"]]
    rows = [
        (i, what, arrays[key][i])
        for i in range(len(names))
        for what, key in (("helpful", "most_helpful"), ("helpful dogs", "most_helpful_dogs"))
    ]
    with plt.rc_context({"font.size": 7, "axes.titlesize": 6}):
        figure, axes = plt.subplots(
            len(rows), 1 + NUM_PHOTOGRAPHS, figsize=(7.5, 1.25 * len(rows)), layout="constrained"
        )
        for axis in axes.ravel():
            axis.axis("off")
        axes[0, 0].imshow(data.test[0][arrays["test_fish"][0]])
        axes[0, 0].set_title("test fish")
        for (i, what, chosen), line in zip(rows, axes, strict=True):
            label = f"{_named(names[i])}\nmost {what}"
            line[1].text(-0.08, 0.5, label, ha="right", va="center", transform=line[1].transAxes)
            for axis, row in zip(line[1:], chosen, strict=True):
                axis.imshow(x[row])
                axis.set_title(f"{('dog', 'fish')[y[row]]} {row}: {arrays['score'][i, row]:+.1e}")
    return figure


def _draw_scatter(axis: Any, arrays: Any, i: int) -> None:
    """Draw influence over distance. The influence axis is symmetric about zero.

    The points are drawn in random order, so that neither class hides the other.
    """
    fish, score = arrays["labels"] == FISH, arrays["score"][i]
    reach = max(_ROOM * np.quantile(np.abs(score), _QUANTILE), np.finfo(float).tiny)
    power = int(np.floor(np.log10(reach)))
    shown, scale = np.clip(score, -reach, reach), 10.0**-power
    beyond = np.abs(score) > reach
    order = np.random.default_rng(0).permutation(len(score))
    for which, size in ((~beyond, 7), (beyond, 16)):  # points on the edge are larger
        rows = order[which[order]]
        colours = np.where(fish[rows], _GREEN, _ORANGE)
        axis.scatter(arrays["distance"][rows], scale * shown[rows], s=size, c=colours, alpha=0.7,
                     linewidths=0, clip_on=False)  # fmt: skip
    axis.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    axis.set(ylim=(-scale * reach, scale * reach), xlabel="Distance in pixels, $|x - x_{test}|$")
    axis.set_ylabel(f"Change if removed\n($10^{{{power}}}$)")
    axis.locator_params(nbins=5)
    if beyond.any():
        said = f"{beyond.sum()} beyond, on the edge (to {scale * np.abs(score).max():.2g})"
        axis.text(0.98, 0.03, said, transform=axis.transAxes, ha="right", fontsize=6.5, color="0.3")


def _draw_strip(axis: Any, values: NDArray, names: list[str]) -> None:
    """Draw one row for each model, with a dot for each test fish and a bar at the median."""
    for i, of_model in enumerate(values):
        spread = ((np.arange(len(of_model)) * 0.618) % 1 - 0.5) * 0.5  # so that few dots overlap
        axis.scatter(of_model, i + spread, s=4, color="#0072B2", alpha=0.5, linewidths=0)
        axis.plot([np.median(of_model)] * 2, [i - 0.35, i + 0.35], color="black", linewidth=1.2)
    axis.set_yticks(range(len(names)), [_named(name, short=True) for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)


def _named(model: str, *, short: bool = False) -> str:
    if model == SVM:
        return "RBF SVM" if short else "RBF SVM on pixels"
    network, layer = trunks.split(model)
    network = {"mobilenet": "MobileNet", "inception-keras": "Inception"}.get(
        network, network.capitalize()
    )
    layer = layer.replace("conv_pw_", "pw").replace("_relu", "")
    return f"{network} {layer}" if short else f"{network}, {layer}"


def _published_rows(order: NDArray, model: str) -> int:
    """Count the published rows among our most helpful rows. Both lists have the same length."""
    rows = claims.TOP_ROWS[model]
    return int(np.isin(order[: len(rows)], rows).sum())


def _fish(config: Config, margins: NDArray, y_test: NDArray) -> NDArray[np.int64]:
    """Return the rows of the test fish. The scatter plots show the first of them."""
    fish = np.flatnonzero((y_test == FISH) & (margins < 1))
    first = config.test_point
    if first is None:
        first = int(fish[np.abs(margins[fish] - _PAPERS_MARGIN).argmin()])
    elif first not in fish:
        raise Misuse(
            "test_point must have a margin below 1, where the hinge has a slope, got "
            f"{margins[first]:.3g} for test point {first}."
        )
    options.at_most(config, len(fish), "test fish of margins below 1", "num_fish")
    return compare.with_others(first, fish, config.num_fish - 1, config.seed)
