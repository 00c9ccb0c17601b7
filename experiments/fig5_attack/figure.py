"""Figure 5: invisible changes of training images that flip the prediction of a test image.

Koh & Liang 2017, section 5.2 and figure 5: logistic regression on a deep network's features
distinguishes dogs from fish. One, two or ten training images are changed. Every pixel still rounds
to its 8-bit value, and no label changes. The refitted model then misclassifies a test image that it
classified correctly before. A second attack targets thirty test images at once. Finally we test
whether a defender would find the changed images.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl
from numpy.typing import NDArray

from experiments.fig5_attack import claims
from experiments.fig5_attack.attacks import RULES, SIGNS, group, of_group, over_all, single
from experiments.fig5_attack.heads import LEVEL, Head, alike, chosen, fitted, heads_of, right
from experiments.harness import options
from experiments.harness.claims import Sample
from experiments.harness.record import Record
from experiments.shared import trunks
from experiments.shared.compare import letter
from influence.attack.poison import Rule
from influence.common.checkpoint import kept
from influence.common.progress import progress
from influence.models.top_layer import scaled

DATA = "dogfish"
STAND_IN = "fishlike"


@dataclass(frozen=True)
class Config:
    """The settings of the authors' 2017 code (run_data_poisoning_indiv.py).

    Below, (authors' code) marks a value from that code. Other values are ours or the paper's.
    """

    heads: tuple[str, ...] = ("inception-keras/mixed10",)
    """the heads, each a logistic regression on the features of a network at a layer, written
    network/layer; each network once (section 5.2: Inception v3's features)"""
    weight_decays: tuple[float, ...] = (0.001,)
    """for each head, lambda of the penalty lambda/2 |w|^2 (authors' code)"""
    standardised: tuple[bool, ...] = (False,)
    """for each head, whether its features are scaled to mean 0 and deviation 1 (authors' code:
    no)"""
    num_test: int = 0
    """number of test images to attack, drawn at random among those that the head classifies
    correctly; 0: all (paper)"""
    counts: tuple[int, ...] = (1, 2, 3, 5, 10)
    """numbers of training images that are poisoned together (authors' code; the paper gives 1, 2
    and 10)"""
    radius: float = 0.49
    """largest change of each pixel in both directions, in 8-bit levels (authors' code: .5 exactly,
    where a rounding error can change the 8-bit value)"""
    step: float = 0.02
    """step of the paper's rule, in 8-bit levels (authors' code)"""
    moves: int = 100
    """largest number of steps of the paper's rule (authors' code)"""
    best_moves: int = 12
    """largest number of steps of the best rule, for each set of poisons"""
    best_tries: int = 6
    """number of training images that the best rule first tries one at a time"""
    best_restarts: int = 1
    """number of restarts of the best rule, for each set of several poisons that does not flip the
    image"""
    candidates: int = 64
    """number of training images whose derivative with respect to the pixels is computed; for a
    group at least the largest of `group_counts`"""
    group_size: int = 30
    """number of test images that are attacked together (authors' code: 30 photographs of one
    dog)"""
    group_moves: int = 100
    """largest number of steps of the single poison against the group (authors' code: 2,000 steps of
    .005 levels)"""
    group_counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """numbers of poisons against the group, tried in turn until half of the group is flipped"""
    seed: int = 0
    """seed of the random draw of the test images"""

    def __post_init__(self):
        networks = [trunks.split(head)[0] for head in self.heads]
        if not networks or len(set(networks)) < len(networks):
            raise ValueError(f"heads must be of different networks, got {self.heads}.")
        for name in ("weight_decays", "standardised"):
            if len(getattr(self, name)) != len(self.heads):
                raise ValueError(
                    f"{name} must have an entry for each of {len(self.heads)} heads, got "
                    f"{getattr(self, name)}."
                )
        for name in ("counts", "group_counts"):
            counts = getattr(self, name)
            if not counts or counts[0] != 1 or list(counts) != sorted(set(counts)):
                raise ValueError(f"{name} must increase from 1, got {counts}.")
        most = max(*self.counts, 2)
        if self.candidates < most:
            raise ValueError(
                f"candidates must be no fewer than poisons, got {self.candidates} for {most}."
            )
        if not 0 < self.radius < 0.5:
            raise ValueError(f"radius must lie in (0, 0.5), got {self.radius}.")
        if not 0 < self.step <= 2 * self.radius:
            raise ValueError(f"step must lie in (0, {2 * self.radius}], got {self.step}.")
        options.positive(self, "weight_decays")
        options.at_least(self, 1, "moves", "best_moves", "group_moves", "group_size")
        options.at_least(self, 0, "num_test", "best_tries", "best_restarts")


PRESETS = {
    "smoke": Config(
        heads=("small/relu2",), num_test=4, counts=(1, 2, 10), step=0.1, moves=4, best_moves=3,
        best_tries=2, candidates=16, group_size=6, group_moves=4, group_counts=(1, 4, 16),
    ),
    "standard": Config(
        heads=("mobilenet/conv_pw_10_relu", "inception/mixed4"),
        weight_decays=(1e-5, 1e-5), standardised=(False, False),
        num_test=60, counts=(1, 2, 10), step=0.1, moves=20, group_moves=20,
    ),
    "paper": Config(),
}  # fmt: skip
CLAIMS, CHECKS = claims.CLAIMS, claims.CHECKS
FINDING, DEVIATIONS, CAPTION = claims.FINDING, claims.DEVIATIONS, claims.CAPTION
CONDITIONS = claims.CONDITIONS


def run(config: Config, data: Any, *, checkpoints: Path | None = None) -> Record:
    """Attack single test images and a group of test images, under every head.

    Args:
      config: the settings of the experiment.
      data: Splits of dogfish or of its stand-in.
      checkpoints: folder that stores finished attacks, or None. An interrupted run continues from
        its files.

    Returns: Record with the metrics of CLAIMS and the numbers that `draw` needs, but no pixels.
    Raises: Misuse if a network's weights are missing, or an option does not fit the size of the
      data.
    """
    trunks.check(config.heads, data.folder)
    options.at_most(config, len(data.train[1]), "training images", "candidates", "group_counts")
    options.at_most(config, len(data.test[1]), "test images", "num_test", "group_size")
    metrics: dict[str, Any] = {}
    arrays: dict[str, Any] = {"heads": np.array(config.heads, "S"), "signs": np.array(SIGNS, "S")}
    every: list[dict[str, NDArray]] = []
    groups: list[dict[str, NDArray]] = []
    as_chosen: list[bool] = []
    networks = [trunks.split(name)[0] for name in config.heads]
    # BLAS gets one thread. On a busy machine, several threads would wait for each other, and the
    # work would take ten times as long. The limit does not affect the threads of TensorFlow.
    with threadpoolctl.threadpool_limits(1, "blas"):
        for i, (name, network) in enumerate(zip(config.heads, networks, strict=True)):
            head, about = fitted(config, i, data, checkpoints)
            points = right(config, head)
            tasks = {
                f"{network}-{point}": partial(_single, config, head, point) for point in points
            } | {f"{network}-group": partial(_group, config, head)}
            done = [
                kept(checkpoints and checkpoints / f"{key}.npz", task)
                for key, task in progress(tasks.items(), f"attacks at {name}", len(tasks))
            ]
            *singles, together = done
            del together["one_input"]
            heads = heads_of(
                network,
                data,
                seed=config.seed,
                checkpoints=checkpoints,
                folder=trunks.kept_in(data.stand_in, checkpoints),
            )
            arrays |= {f"choice_{key}_{network}": value for key, value in heads.items()}
            layer, weight_decay = chosen(heads, len(data.train[1]))
            as_chosen.append(
                (name, config.weight_decays[i], config.standardised[i])
                == (f"{network}/{layer}", weight_decay, False)
            )
            joined = {key: np.stack([one[key] for one in singles]) for key in singles[0]}
            every.append(joined)
            groups.append(together)
            found = {f"{rule}_flipped": joined[f"{rule}_flipped"].mean(axis=0) for rule in RULES}
            metrics |= {f"{key}_{network}": value for key, value in about.items()}
            metrics |= {
                f"{key}_{count}_{network}": share
                for key, shares in found.items()
                for count, share in zip(config.counts, shares, strict=True)
            }
            metrics |= of_group(together, network)
            metrics[f"num_attacked_{network}"] = len(points)
            arrays |= {f"points_{network}": points}
            arrays |= {
                f"{key}_{network}": value
                for key, value in (joined | together).items()
                if np.ndim(value)
            }
    metrics |= over_all(config.counts, networks, every, groups) | {
        "heads_as_chosen": min(as_chosen)
    }
    arrays["counts"] = np.array(config.counts)
    return Record.of(metrics=metrics, arrays=arrays)


def photographs(record: Record, data: Any, *, checkpoints: Path | None = None) -> Any:
    """Draw the single poison of each head's group attack beside the original image.

    Args:
      record: the record of a run on `data`.
      data: Splits of dogfish or of its stand-in.
      checkpoints: folder where `run` stored the poison. If None, the poison is computed again.

    Returns: a figure with four images per head: the first test image, the training image, the
      poison, and the change of each pixel. A change of half a level is black or white. The figure
      must never be committed.
    """
    import matplotlib.pyplot as plt

    config = Config(**record.config)
    size = (6.75, 1.9 * len(config.heads))
    with plt.rc_context({"font.size": 7}), threadpoolctl.threadpool_limits(1, "blas"):
        figure, axes = plt.subplots(
            len(config.heads), 4, figsize=size, squeeze=False, layout="constrained"
        )
        for i, line in enumerate(axes):
            head, _ = fitted(config, i, data, checkpoints)
            path = checkpoints and checkpoints / f"{trunks.split(config.heads[i])[0]}-group.npz"
            found = kept(path, partial(_group, config, head))
            poison, original = found["one_input"], head.images[int(found["one_row"])]
            moved = (poison - scaled(original)) / LEVEL
            test = data.test[0][alike(config, head)[0]]
            shown = (test, original, (poison + 1) / 2, np.clip(moved + 0.5, 0, 1))
            titles = (f"{config.heads[i]}: test image", "training image", "poison", "difference")
            for axis, image, title in zip(line, shown, titles, strict=True):
                axis.imshow(image)
                axis.set_title(title)
                axis.axis("off")
    return figure


def _single(config: Config, head: Head, point: int) -> dict[str, Any]:
    radii = 1 / config.radius
    return single(
        head,
        point,
        counts=config.counts,
        candidates=config.candidates,
        paper=_signs(config.step * radii, config.moves),
        best=_best(config),
    )


def _group(config: Config, head: Head) -> dict[str, Any]:
    return group(
        head,
        alike(config, head),
        counts=config.group_counts,
        candidates=max(config.candidates, config.group_counts[-1]),
        one=Rule(max_steps=config.group_moves, decay=0.9, tries=0, restarts=0),
        # We allow no restart. It would take as long as an attack with twice as many poisons, which
        # flips more images.
        many=replace(_best(config), restarts=0),
    )


def _signs(step: float, moves: int) -> Rule:
    """Return the paper's rule: constant steps along the sign of the derivative, ranking once."""
    return Rule(
        step=step, decay=1.0, momentum=0.0, softness=0.0, max_steps=moves, tries=0, restarts=0
    )


def _best(config: Config) -> Rule:
    return Rule(max_steps=config.best_moves, tries=config.best_tries, restarts=config.best_restarts)


def draw(record: Record) -> Any:
    """Draw the success of both rules, the share of poisons found, and the group attack."""
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
            for rule, (label, colour, marker), shift in zip(
                RULES, _LOOKS, (-0.04, 0.04), strict=True
            ):
                flipped = arrays[f"{rule}_flipped_{network}"]
                shares = 100 * flipped.mean(axis=0)
                axis.plot(at, shares, marker=marker, color=colour, label=label, clip_on=False)
                lows, highs = _intervals(flipped)
                axis.vlines(at + shift, lows, highs, color=colour, linewidth=1, clip_on=False)
            known = [(i, _PAPER[c]) for i, c in enumerate(counts.tolist()) if c in _PAPER]
            axis.plot(*zip(*known, strict=True), "x", color="0.4", label="published")
            axis.set_xticks(at, counts)
            axis.set(ylim=(0, 103), xlabel="Training images poisoned", title=_title(name))
        above.axes[0].set_ylabel("Test images flipped (%)")
        above.axes[0].legend(frameon=False, fontsize=7)
        defence, together = below.subplots(1, 2)
        _draw_defence(defence, [arrays[f"standing_{network}"] for network in networks])
        colours = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
        for i, (network, colour) in enumerate(zip(networks, colours, strict=False)):
            poisons, flipped = (arrays[f"many_{key}_{network}"] for key in ("poisons", "flipped"))
            last = np.append(np.diff(poisons) > 0, True)  # the last refit with each number
            last &= poisons > 0  # a logarithmic axis has no 0
            together.plot(
                poisons[last], flipped[last], "o-", color=colour, label=_NAMES.get(network, network)
            )
            together.plot(1, metrics[f"group_one_flipped_{network}"], "D", color=colour,
                          markerfacecolor="none", markersize=9 - 3 * i)  # fmt: skip
        together.plot([], [], "D", color="0.3", markerfacecolor="none", label="the least sure one")
        group = record.config["group_size"]
        if group == _PAPER_GROUP[1]:
            together.plot(1, _PAPER_GROUP[0], "x", color="0.4", label="published")
        together.axhline(group / 2, color="0.7", linewidth=0.8, zorder=0)
        together.annotate("half of them", (1, group / 2), xycoords=("axes fraction", "data"),
                          ha="right", va="bottom", fontsize=6.5, color="0.4")  # fmt: skip
        together.set_xscale("log")
        most = max(arrays[f"many_poisons_{network}"].max() for network in networks)
        ticks = 2 ** np.arange(int(np.log2(most)) + 1)
        together.set_xticks(ticks, ticks)
        together.minorticks_off()
        together.set(
            xlim=(0.8, 1.4 * most),
            xlabel="Training images poisoned",
            ylabel=f"Test images flipped (of {group})",
            ylim=(-0.5, group),
            title="Many test images at once",
        )
        together.legend(frameon=False, fontsize=7, loc="upper right")
        for axis, mark in zip([*above.axes, defence, together], "abcde", strict=False):
            letter(axis, mark)
        if not record.data.get("stand_in", True):  # the harness labels stand-in data
            figure.supxlabel(_OF, fontsize=7, color="0.35")
    return figure


_OF = (
    "Photographs of Imagenette, English springer against tench, under heads of MobileNet .75 and "
    "Inception v3 up to mixed8:\nthe paper's photographs and its network's last layers are not "
    "available."
)


_NAMES = {"mobilenet": "MobileNet", "inception": "Inception v3", "inception-keras": "Inception v3"}
# In the paper, one poison flips 16 of a group of 30 test images (section 5.2).
_PAPER_GROUP = (16, 30)


def _title(head: str) -> str:
    """Return the title of a head's panel, which names the network and the layer."""
    network, layer = trunks.split(head)
    return f"{_NAMES.get(network, network)}, to {layer}"


def _intervals(flipped: NDArray) -> tuple[NDArray, NDArray]:
    """Return the lower and the upper ends of the flipped shares' 95 % intervals, in percent.

    A column of `flipped` gives one share.
    """
    sample = Sample("share", len(flipped))
    ends = [sample.interval(share, {}) for share in flipped.mean(axis=0).tolist()]
    return tuple(100 * np.array(ends, float).T)  # type: ignore[return-value]


# The percentage of 591 test images that the paper flips with each number of poisons (section 5.2).
_PAPER = {1: 57.0, 2: 77.0, 10: 99.8}
# Each rule of RULES has a label, a colour and a marker.
_LOOKS = (("the paper's rule", "#56B4E9", "s"), ("best rule", "#D55E00", "o"))


def _draw_defence(axis: Any, standings: list[NDArray]) -> None:
    """Draw the share of poisons found against the share of training images checked."""
    ranks = np.concatenate([one.reshape(-1, len(SIGNS), 2) for one in standings])
    ranks = ranks[~np.isnan(ranks[:, 0, 0])]
    looks = (("self-influence", "#0072B2"), ("loss", "#D55E00"), ("distance", "#009E73"))
    for i, (label, colour) in enumerate(looks):
        for j, line in enumerate((":", "-")):
            checked = np.append(np.sort(ranks[:, i, j]), 1)
            found = np.append(np.arange(1, len(ranks) + 1), len(ranks)) / len(ranks)
            axis.step(
                100 * checked,
                100 * found,
                line,
                where="post",
                color=colour,
                label=label if j else None,
            )
    axis.plot([0, 100], [0, 100], color="0.8", linewidth=0.8, zorder=0)
    axis.set(
        xlabel="Training images checked (%)",
        ylabel="Poisons found (%)",
        title="By what poisons are found (dotted: before)",
    )
    axis.legend(frameon=False, fontsize=7, loc="lower right")
