"""Figure 4 drawn from its record; and its photographs, for whoever has them."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.dogfish import IMAGENETTES_SIDE
from experiments.dog_or_fish import FISH
from experiments.harness.record import Record
from experiments.shared import trunks

SVM = "svm"  # its name among the models; a deep head's is network/layer
NUM_PHOTOGRAPHS = 5  # most helpful ones of each kind
_SHOWN = 2  # deep heads whose scatter is drawn beside the SVM's
_CUT = {"mobilenet": "MobileNet .75", "inception": "Inception v3"}  # not the paper's network
_GREEN, _ORANGE = "#009E73", "#E69F00"  # fish, dogs: told apart by the colour-blind, too


def draw(record: Record) -> Any:
    """Influence over distance for the SVM and two deep heads; below, all test fish."""
    import matplotlib.pyplot as plt

    arrays = record.arrays
    names = [name.decode() for name in arrays["models"]]
    with plt.rc_context({"font.size": 8, "axes.titlesize": 9}):
        figure = plt.figure(figsize=(6.75, 4.9), layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=[1.15, 1])
        shown = range(min(1 + _SHOWN, len(names)))
        for i, axis in zip(shown, np.atleast_1d(above.subplots(1, len(shown))), strict=True):
            _draw_scatter(axis, arrays, i)
            axis.set_title(_named(names[i]))
            axis.set_ylabel("" if i else "Change in test loss if removed")
            if i == 0:
                axis.legend(frameon=False, loc="best", markerscale=1.6, handletextpad=0.2)
        strips = below.subplots(1, 3)
        top = record.config["top_deep"]
        for axis, values, title in (
            (strips[0], arrays["spearman"], "Spearman of |influence|\nand distance"),
            (strips[1], arrays["dogs_in_top"][1:], f"Dogs among the {top}\nmost helpful"),
            (strips[2], arrays["largest_influence"], "Largest |influence|"),
        ):
            _draw_strip(axis, values, names[len(names) - len(values) :])
            axis.set_title(title)
        strips[0].axvline(0, color="0.6", linewidth=0.8, zorder=0)
        strips[1].set_xlim(left=0)
        strips[2].set_xscale("log")
        strips[2].locator_params(axis="x", numticks=4)
        if not record.data.get("stand_in", True):  # which says what it is by itself
            figure.supxlabel(_said(record, names[1:]), fontsize=7, color="0.35")
    return figure


def _said(record: Record, heads: list[str]) -> str:
    """What the figure is of, where that is not what the paper's is of."""
    networks = dict.fromkeys(trunks.split(head)[0] for head in heads)
    said = []
    if record.metrics.get("photographs_side", IMAGENETTES_SIDE) == IMAGENETTES_SIDE:
        said.append("Photographs of Imagenette, English springer against tench")
    cut = [_CUT[network] for network in networks if network in _CUT]
    if cut:
        said.append(f"{' and '.join(cut)} cut at the layer named")
    if not said:
        return ""
    return f"{'; '.join(said)}:\nthe paper's own are not to be had."


def photographs(record: Record, data: Any, *, checkpoints: Path | None = None) -> Any:
    """The test fish, and the images that helped each model most.

    Args:
      record: of a run on `data`.
      data: the same Splits.
      checkpoints: not looked at.

    Returns: a figure with photographs, never to be committed.
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
            line[1].text(-0.08, 0.5, f"{_named(names[i])}\nmost {what}", ha="right", va="center",
                         transform=line[1].transAxes)  # fmt: skip
            for axis, row in zip(line[1:], chosen, strict=True):
                axis.imshow(x[row])
                axis.set_title(f"{('dog', 'fish')[y[row]]} {row}: {arrays['score'][i, row]:+.1e}")
    return figure


def _draw_scatter(axis: Any, arrays: Any, i: int) -> None:
    fish = arrays["labels"] == FISH
    for which, colour, marker, label in (
        (~fish, _ORANGE, "^", "dogs"),
        (fish, _GREEN, "o", "fish"),
    ):
        axis.scatter(arrays["distance"][which], arrays["score"][i, which], s=7, marker=marker,
                     color=colour, alpha=0.6, linewidths=0, label=label)  # fmt: skip
    axis.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    axis.set_xlabel("Distance in pixels, $|x - x_{test}|$")
    axis.ticklabel_format(axis="y", scilimits=(-2, 2))
    axis.locator_params(nbins=5)


def _draw_strip(axis: Any, values: NDArray, names: list[str]) -> None:
    """One test fish a dot, the median a bar; a model a row."""
    for i, of_model in enumerate(values):
        spread = ((np.arange(len(of_model)) * 0.618) % 1 - 0.5) * 0.5  # of dots that would overlap
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
