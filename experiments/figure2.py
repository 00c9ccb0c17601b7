"""Figure 2 in the paper's layout: a linear model by CG and by LiSSA, and a convolutional network.

Two records give the three panels. If the network has several records, the one with the longest
training is drawn.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.harness.record import Record
from experiments.shared.compare import agreement, letter, predicted_against_actual, rounded

LINEAR = "fig2-paper"
# The records of the network, the longest training first.
NETWORKS = ("fig2-cnn-paper", "fig2-cnn-tenfold", "fig2-cnn-standard")
# The axes of the network's panel end at this change in nats, like those of the published panel.
_REACH = 0.05


def records(results: Path) -> tuple[Record, Record] | None:
    """Load the records of the linear model and of the network. Return None if one is missing."""
    there = [name for name in NETWORKS if (results / name / "record.json").is_file()]
    if not there or not (results / LINEAR / "record.json").is_file():
        return None
    return Record.load(results / LINEAR), Record.load(results / there[0])


def draw(linear: Record, network: Record) -> Any:
    """Draw predicted against actual changes in three panels, each with r and slope.

    LiSSA's panel shows the seed with the median correlation. The network's panel states how many
    points lie beyond its axes.
    """
    import matplotlib.pyplot as plt

    actual, runs = linear.arrays["actual"], linear.arrays["predicted_lissa"]
    order = np.argsort([np.corrcoef(run, actual)[0, 1] for run in runs])
    median = runs[order[len(order) // 2]]
    config, first = network.config, network.arrays["removals_0"]
    steps = f"{config['continued_steps']:,} steps at {config['continued_rate']:.0e}".replace(
        "e-0", "e-"
    )
    panels = (
        ("Linear,\nconjugate gradients", actual, linear.arrays["predicted_cg"]),
        (f"Linear, LiSSA,\nthe median of {len(runs)} seeds", actual, median),
        (
            f"Convolutional network,\n{steps}",
            network.arrays["actual_continued"][0, first],
            network.arrays["predicted_cg"][0, first],
        ),
    )
    with plt.rc_context({"font.size": 8, "axes.titlesize": 8}):
        figure, axes = plt.subplots(1, 3, figsize=(6.75, 2.6), layout="constrained")
        for axis, name, (title, true, predicted) in zip(axes, "abc", panels, strict=True):
            predicted_against_actual(axis, true, predicted)
            axis.set_title(title)
            letter(axis, name)
            _tell(axis, true, predicted)
            axis.locator_params(nbins=4)
        for axis in axes[1:]:
            axis.set_ylabel("")
        if max(np.abs(panels[2][1]).max(), np.abs(panels[2][2]).max()) > _REACH:
            _zoom(axes[2], *panels[2][1:])
    return figure


def _tell(axis: Any, true: NDArray, predicted: NDArray) -> None:
    found = agreement(predicted, true)
    text = f"r = {rounded(found['pearson'])}\nslope {found['slope']:.2f}\n{len(true)} removals"
    axis.text(0.05, 0.95, text, transform=axis.transAxes, va="top")


def _zoom(axis: Any, true: NDArray, predicted: NDArray) -> None:
    beyond = np.count_nonzero((np.abs(true) > _REACH) | (np.abs(predicted) > _REACH))
    axis.lines[0].set_data([-_REACH, _REACH], [-_REACH, _REACH])
    axis.set(xlim=(-_REACH, _REACH), ylim=(-_REACH, _REACH))
    ticks = (-0.8 * _REACH, 0.0, 0.8 * _REACH)
    axis.set(xticks=ticks, yticks=ticks)
    axis.text(
        0.97, 0.03, f"{beyond} beyond the axes", transform=axis.transAxes, ha="right", fontsize=7
    )
