"""What Figure 5 looks like."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.attacking import RULES, SIGNS
from experiments.harness.record import Record
from experiments.shared import trunks


def draw(record: Record) -> Any:
    """Success over the number of poisons, head by head; the group; where poisons are found."""
    import matplotlib.pyplot as plt

    arrays, metrics = record.arrays, record.metrics
    names = [name.decode() for name in arrays["heads"]]
    networks = [trunks.split(name)[0] for name in names]
    counts, at = arrays["counts"], np.arange(len(arrays["counts"]))
    with plt.rc_context({"font.size": 8, "axes.titlesize": 9}):
        figure = plt.figure(figsize=(6.75, 5.0), layout="constrained")
        above, below = figure.subfigures(2, 1)
        for axis, name, network in zip(
            np.atleast_1d(above.subplots(1, len(names), sharey=True)), names, networks, strict=True
        ):
            for rule, (label, colour, marker) in zip(RULES, _LOOKS, strict=True):
                shares = 100 * arrays[f"{rule}_flipped_{network}"].mean(axis=0)
                axis.plot(at, shares, marker=marker, color=colour, label=label, clip_on=False)
            known = [(i, _PAPER[c]) for i, c in enumerate(counts.tolist()) if c in _PAPER]
            axis.plot(*zip(*known, strict=True), "x", color="0.5", label="the paper's network")
            axis.set_xticks(at, counts)
            axis.set(ylim=(0, 103), xlabel="Training images poisoned", title=name)
        above.axes[0].set_ylabel("Test images flipped (%)")
        above.axes[0].legend(frameon=False, fontsize=7)
        defence, together = below.subplots(1, 2)
        _draw_defence(defence, [arrays[f"standing_{network}"] for network in networks])
        colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
        for i, (network, colour) in enumerate(zip(networks, colours, strict=False)):
            poisons, flipped = (arrays[f"many_{key}_{network}"] for key in ("poisons", "flipped"))
            last = np.append(np.diff(poisons) > 0, True)  # of the refits with as many poisons
            together.plot(poisons[last], flipped[last], "o-", color=colour, label=network)
            together.axhline(metrics[f"group_one_flipped_{network}"], color=colour, linewidth=0.8,
                             linestyle=(3 * i, (3, 3)),  # both seen where they lie on each other
                             label=f"{network}, the least sure one")  # fmt: skip
        group = record.config["group_size"]
        together.axhline(group / 2, color="0.7", linewidth=0.8, zorder=0)
        together.set_xscale("symlog", linthresh=1)
        together.xaxis.set_major_formatter("{x:g}")
        most = max(arrays[f"many_poisons_{network}"].max() for network in networks)
        together.set_xlim(0, 1.4 * most)
        together.set(
            xlabel="Training images poisoned", ylabel=f"Test images flipped (of {group})",
            ylim=(-0.5, group), title="Many test images at once",
        )  # fmt: skip
        together.legend(frameon=False, fontsize=7)
        if not record.data.get("stand_in", True):  # which says what it is by itself
            figure.supxlabel(_OF, fontsize=7, color="0.35")
    return figure


_OF = (
    "Photographs of Imagenette, English springer against tench, under heads of MobileNet .75 and "
    "Inception v3 up to mixed8:\nthe paper's photographs and its network's last layers are not to "
    "be had."
)


_PAPER = {1: 57.0, 2: 77.0, 10: 99.8}  # section 5.2: of 591 test images, per cent
_LOOKS = (("the paper's rule", "#56B4E9", "s"), ("best rule", "#D55E00", "o"))  # of RULES


def _draw_defence(axis: Any, standings: list[NDArray]) -> None:
    """The share of poisons found over the share of training images checked."""
    ranks = np.concatenate([one.reshape(-1, len(SIGNS), 2) for one in standings])
    ranks = ranks[~np.isnan(ranks[:, 0, 0])]
    looks = (("self-influence", "#0072B2"), ("loss", "#D55E00"), ("distance", "#009E73"))
    for i, (label, colour) in enumerate(looks):
        for j, line in enumerate((":", "-")):
            checked = np.append(np.sort(ranks[:, i, j]), 1)
            found = np.append(np.arange(1, len(ranks) + 1), len(ranks)) / len(ranks)
            axis.step(100 * checked, 100 * found, line, where="post", color=colour,
                      label=label if j else None)  # fmt: skip
    axis.plot([0, 100], [0, 100], color="0.8", linewidth=0.8, zorder=0)
    axis.set(xlabel="Training images checked (%)", ylabel="Poisons found (%)",
             title="By what poisons are found (dotted: before)")  # fmt: skip
    axis.legend(frameon=False, fontsize=7, loc="lower right")
