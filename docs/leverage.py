"""Compute docs/leverage.csv and docs/leverage.png: what first order and one step miss.

    INFLUENCE_DATA=... python docs/leverage.py

Needs MNIST, Enron1, and for the head the Dogfish photographs and MobileNet's weights
(`python -m data list`). It takes about ten minutes on two cores. For each model and weight decay,
40 training rows are removed by exact refits. A row's slope is that of the actual changes of 20 test
losses on the predicted changes, through the origin. A slope of 1 is right.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
from experiments.shared import trunks
from influence import (
    BinaryLogisticRegression,
    Direct,
    Examples,
    Hessian,
    Influence,
    MulticlassLogisticRegression,
    RefitOptions,
    leave_one_out,
    prepare,
)

ROWS, TESTS, SEED = 40, 20, 0
# The figure begins at this leverage.
_LEAST = 1e-4
HEAD = "mobilenet/conv_pw_13_relu"
DECAYS = {
    "Digits, 10 classes, 500 rows": (1e-1, 1e-2, 1e-3, 1e-4),
    "MNIST, 10 classes, 55,000 rows": (1e-2,),
    "Spam, 2 classes, 4,137 rows": (1e-2, 1e-3, 1e-4),
    "MobileNet head, 2 classes, 300 rows": (1e-1, 1e-2, 1e-3),
}
COLORS = ("#0072B2", "#009E73", "#E69F00", "#CC79A7")


def main() -> None:
    """Compute all slopes, write them, and draw them."""
    found = {}
    for name, (train, test, outputs) in sets().items():
        parts = [slopes(train, test, outputs, decay) for decay in DECAYS[name]]
        found[name] = np.concatenate(parts, axis=1)
        leverage, first, one = found[name]
        print(f"{name}: leverage {leverage.min():.2g} to {leverage.max():.2g}; median slope")
        for low, high in ((0, 0.01), (0.01, 0.1), (0.1, 0.3), (0.3, np.inf)):
            there = (leverage >= low) & (leverage < high)
            if there.any():
                medians = np.median(first[there]), np.median(one[there])
                print(f"  leverage {low} to {high}: {there.sum()} rows, first order "
                      f"{medians[0]:.3f}, one step {medians[1]:.3f}")  # fmt: skip
    with Path(__file__).with_name("leverage.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("model", "leverage", "slope of first order", "slope of one step"))
        for name, values in found.items():
            writer.writerows((name, *(f"{value:.6g}" for value in row)) for row in values.T)
    draw(found).savefig(Path(__file__).with_name("leverage.png"), dpi=200)


def sets() -> dict[str, tuple[Examples, Examples, int]]:
    """Return the training set, test set and number of outputs of each model."""
    digits = data.load("digits")
    x, y = (np.concatenate(parts) for parts in zip(digits.train, digits.test, strict=True))
    order = np.random.default_rng(SEED).permutation(len(y))
    names = list(DECAYS)
    found = {names[0]: (*_split(x, y, order, 500), 10)}
    for name, source, outputs in ((names[1], "mnist", 10), (names[2], "enron1", 1)):
        splits = data.load(source)
        found[name] = (Examples(*splits.train), Examples(*splits.test), outputs)
    dogfish = data.load("dogfish")
    images, labels = dogfish.train
    chosen = np.random.default_rng(SEED).permutation(len(labels))[: 300 + 4 * TESTS]
    phi = trunks.features([HEAD], images[chosen], root=None, folder=None)[HEAD].astype(float)
    phi = (phi - phi[:300].mean(axis=0)) / np.maximum(phi[:300].std(axis=0), 1e-6)
    found[names[3]] = (*_split(phi, labels[chosen], np.arange(len(chosen)), 300), 1)
    return found


def _split(x: NDArray, y: NDArray, order: NDArray, n: int) -> tuple[Examples, Examples]:
    return Examples(x[order[:n]], y[order[:n]]), Examples(x[order[n:]], y[order[n:]])


def slopes(train: Examples, test: Examples, outputs: int, decay: float) -> NDArray:
    """Return leverage, slope of first order and slope of one step of the rows, (3, ROWS).

    The rows are spread evenly over the order of their leverages, the largest included.
    """
    f = train.x.shape[1]
    net: Any = BinaryLogisticRegression(f, weight_decay=decay)
    if outputs > 1:
        net = MulticlassLogisticRegression(f, outputs, weight_decay=decay)
    net.fit(train)
    test = test.take(np.random.default_rng(SEED).permutation(len(test))[:TESTS])
    influence = Influence(net, train, approximation="one_step")
    everywhere = influence.scores(test.take([0]))
    order = np.argsort(everywhere.leverage)
    rows = order[np.linspace(0, len(order) - 1, ROWS).astype(int)]
    one = influence.scores(test, rows)
    first = Influence(net, train, approximation="first_order").scores(test, rows)
    options = RefitOptions()
    if net.num_parameters < len(train):
        options = RefitOptions(solver=prepare(Hessian(net, train), Direct()))
    actual = np.asarray(leave_one_out(net, train, test, rows, options))
    return np.stack([one.leverage, _slope(first, actual), _slope(one, actual)])


def _slope(predicted: Any, actual: NDArray) -> NDArray:
    p = np.asarray(predicted)
    return (p * actual).sum(axis=0) / (p * p).sum(axis=0)


def draw(found: dict[str, NDArray]) -> Any:
    """Draw the slopes of first order and of one step against the leverage."""
    figure, axes = plt.subplots(1, 2, figsize=(6.75, 3.3), sharey=True, layout="constrained")
    for axis, which, title in zip(axes, (1, 2), ("a  First order", "b  One step"), strict=True):
        for (name, values), color in zip(found.items(), COLORS, strict=True):
            axis.scatter(values[0], values[which], s=9, color=color, alpha=0.7, label=name, lw=0)
        axis.axhline(1, color="0.4", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlim(_LEAST, 5)  # to the left, all slopes are 1
        axis.set_yscale("log")
        axis.set_title(title, fontsize=9.5, loc="left")
        axis.set_xlabel("Leverage of the removed row", fontsize=9)
        axis.tick_params(labelsize=8)
    h = np.geomspace(1e-4, 0.97, 200)
    axes[0].plot(h, 1 / (1 - h), color="0.4", linewidth=0.8, linestyle="--")
    axes[0].annotate("1 / (1 - leverage)", (0.9, 10), fontsize=7.5, color="0.3", ha="right",
                     xytext=(-6, 0), textcoords="offset points")  # fmt: skip
    axes[0].set_ylabel("Actual / predicted change (slope)", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2,
                  fontsize=8, frameon=False)  # fmt: skip
    return figure


if __name__ == "__main__":
    main()
