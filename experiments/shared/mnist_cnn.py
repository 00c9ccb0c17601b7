"""The network of Figure 2, right: its settings, its training, and plots for two experiments."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.harness import options
from experiments.harness.claims import RELEASED, Claim, Published
from experiments.harness.record import Record
from experiments.shared.compare import (
    agreement,
    largest,
    predicted_against_actual,
    rounded,
)
from influence import AllCNN, Examples

# Claims of both experiments about the trained network.
_ISSUE = "a report of one who ran the authors' code (its issue 10)"
CLAIMS = (
    Claim(
        "train_accuracy",
        "Share of the training images that the network classifies correctly",
        Published(_ISSUE, 0.9996, kind=RELEASED),
        0.99,
        1.0,
    ),
    Claim(
        "test_accuracy",
        "Share of the test images that the network classifies correctly",
        Published(_ISSUE, 0.9746, kind=RELEASED),
        0.96,
        1.0,
    ),
)
# CG in float64 stops at this relative residual.
CG_FLOAT64 = 1e-7
# The stages of the shorter training by Adam: (steps, learning rate).
SHORT = ((10_000, 1e-3), (5_000, 1e-4), (5_000, 1e-5))


@dataclass(frozen=True)
class Protocol:
    """The network, training and removals of the authors' 2017 code (scripts/train_mnist.py).

    Below, (authors' code) marks a value from that code.
    """

    num_train: int = 5500
    """number of training rows, the first of the training set shuffled with seed 0 (authors' code: a
    tenth of 55,000)"""
    filters: int = 8
    """number of channels of each 3 x 3 convolution (authors' code)"""
    strides: tuple[int, ...] = (1, 2, 1, 2, 1)
    """strides of the 3 x 3 convolutions (authors' code)"""
    weight_decay: float = 0.001
    """lambda of the penalty lambda/2 |kernel|^2, without biases (authors' code)"""
    schedule: tuple[tuple[int, float], ...] = ((110_000, 1e-4), (110_000, 1e-5), (280_000, 1e-6))
    """(steps, learning rate) of each stage of Adam (authors' code: 500,000 steps)"""
    batch_size: int = 500
    """number of rows in a minibatch (authors' code)"""
    damping: float = 0.01
    """absolute damping, added to the Hessian's diagonal (authors' code)"""
    test_points: tuple[int, ...] = (6558, 9009, 1156, 9729, 9642)
    """rows of the test points: the one of the authors' code first, then four more"""
    num_removals: int = 100
    """number of rows of largest |influence| that are removed for the first test point (section
    4.2)"""
    further_removals: int = 40
    """number of rows of largest |influence| that are removed for each further test point"""
    lissa_depth: int = 1000
    """number of steps of LiSSA; the authors' code has no LiSSA for this network"""
    lissa_batch_size: int = 50
    """number of rows in each step of LiSSA"""
    num_processes: int = 2
    """number of joblib workers for proximal minima and refits; each uses about one core"""
    dtype: str = "float32"
    """precision of the network (authors' code)"""
    seed: int = 0
    """seed of the network's initial weights and of all minibatches"""

    def __post_init__(self):
        if not self.further_removals <= self.num_removals <= self.num_train:
            raise ValueError(
                "num_removals must be at least further_removals and at most num_train, got "
                f"{self.num_removals}, {self.further_removals} and {self.num_train}."
            )
        options.positive(self, "damping", "lissa_depth", "lissa_batch_size")
        options.at_least(self, 2, "further_removals")  # fitting a line needs two points
        options.at_least(self, 1, "filters", "strides", "batch_size", "num_processes")
        options.at_least(self, 0, "weight_decay", "test_points")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', got {self.dtype!r}.")


def images(data: Any, config: Any) -> tuple[Examples, Examples]:
    """Return `num_train` random training images and all test images, with one channel."""
    (x, y), (x_test, y_test) = data.train, data.test
    rows = np.random.RandomState(0).permutation(len(y))[: config.num_train]
    side = int(np.sqrt(x.shape[1]))

    def shaped(x: NDArray) -> NDArray:
        return x.reshape(-1, side, side, 1).astype(config.dtype, copy=False)

    return Examples(shaped(x[rows]), y[rows]), Examples(shaped(x_test), y_test)


def network(config: Any, train: Examples, dtype: str | None = None) -> AllCNN:
    """Build the network with its initial weights."""
    return AllCNN(
        train.x.shape[1:],
        int(train.y.max()) + 1,
        filters=config.filters,
        strides=config.strides,
        weight_decay=config.weight_decay,
        dtype=dtype or config.dtype,
        seed=config.seed,
    )


def trained(
    config: Any, data: Any, checkpoints: Path | None
) -> tuple[AllCNN, Examples, Examples, Examples]:
    """Train the network. Return it, the training set, the test set and the test points.

    Raises: Misuse if an option does not fit the size of the data.
    """
    options.at_most(config, len(data.train[1]), "training rows", "num_train")
    options.rows_of(config, data.test[1], "test rows", "test_points")
    train, test = images(data, config)
    net = network(config, train)
    net.fit(
        train,
        schedule=config.schedule,
        batch_size=config.batch_size,
        seed=config.seed,
        checkpoints=checkpoints,
    )
    return net, train, test, test.take(config.test_points)


def facts(net: AllCNN, train: Examples, test: Examples) -> dict[str, Any]:
    """Return the size and the accuracies of the network at its theta."""
    return {
        "num_parameters": net.num_parameters,
        "train_accuracy": np.mean(net.outputs(train.x).argmax(axis=1) == train.y),
        "test_accuracy": np.mean(net.outputs(test.x).argmax(axis=1) == test.y),
    }


def in_double(config: Any, net: AllCNN, *sets: Examples) -> tuple[Any, ...]:
    """Return the network and the sets in float64. If they are in float64, nothing is copied."""
    if config.dtype == "float64":
        return net, *sets
    double = network(config, sets[0], "float64")
    double.theta = net.theta.astype(np.float64)
    return double, *(Examples(part.x.astype(np.float64), part.y) for part in sets)


def removals(config: Any, predicted: Any) -> list[NDArray]:
    """Return the rows of largest |influence| for each test point, the largest first."""
    return [
        largest(scores, config.further_removals if j else config.num_removals)
        for j, scores in enumerate(np.asarray(predicted))
    ]


def both_sides(arrays: Any, one: str, other: str) -> tuple[NDArray, NDArray]:
    """Return two arrays of predicted or actual changes for the first test point's removals.

    `one` and `other` are the names of the arrays, as in STEPS. A removal is left out if one of its
    two changes is not finite.
    """
    names = {name.partition("_")[2]: name for name in arrays if name.startswith("actual_")}
    names |= {name.partition("_")[2]: name for name in arrays if name.startswith("predicted_")}
    names["refit"] = "actual_minimum"
    left, right = (arrays[names[side]][0, arrays["removals_0"]] for side in (one, other))
    known = np.isfinite(left) & np.isfinite(right)
    return left[known], right[known]


def agreement_of_steps(steps: Any, arrays: Any) -> dict[str, Any]:
    """Compute r and slope of each entry of STEPS over the first test point's removals."""
    found = [agreement(*both_sides(arrays, one, other)) for one, other, _ in steps]
    return {
        f"step_{name}": np.array([step[name] for step in found]) for name in ("pearson", "slope")
    }


def agreements(truth: str, predicted: Any, actual: Any, at: Any) -> dict[str, float]:
    """Return `agreement` for the first test point, and summaries of Pearson's r over all points.

    The summaries are the median and the lowest r. All names end in `truth`. `at[j]` holds the
    columns of test point j's removals.
    """
    found = [finite_agreement(predicted[j, some], actual[j, some]) for j, some in enumerate(at)]
    pearson = [one["pearson"] for one in found]
    named = {f"{name}_{truth}": value for name, value in found[0].items()}
    return named | {
        f"median_pearson_{truth}": float(np.median(pearson)),
        f"worst_pearson_{truth}": min(pearson),
    }


def finite_agreement(predicted: NDArray, actual: NDArray) -> dict[str, float]:
    """Compute `agreement` over the pairs in which both entries are finite."""
    known = np.isfinite(predicted) & np.isfinite(actual)
    return agreement(predicted[known], actual[known])


def draw_truth(
    axis: Any,
    record: Record,
    truth: str,
    title: str,
    *,
    by: str,
    lost: float | None = None,
    more: str = "",
) -> None:
    """Plot predicted against actual changes for the first test point's removals.

    Args:
      axis: the matplotlib Axes to draw on.
      record: the record, with arrays `removals_0`, `predicted_...` and `actual_...`.
      truth: the name of the array of actual changes, without `actual_`.
      title: title of the panel.
      by: the name of the array of predicted changes, without `predicted_`.
      lost: number of removals that the panel reports as left out. None means the number of removals
        whose actual change is not finite.
      more: text to append to the panel's text.
    """
    arrays, metrics = record.arrays, record.metrics
    first = arrays["removals_0"]
    predicted, actual = arrays[f"predicted_{by}"][0, first], arrays[f"actual_{truth}"][0, first]
    known = np.isfinite(actual)
    predicted_against_actual(axis, actual[known], predicted[known])
    axis.locator_params(nbins=4)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("Actual change (nats)", fontsize=9)
    axis.set_ylabel("Predicted change (nats)", fontsize=9)
    axis.tick_params(labelsize=8)
    slope = metrics[f"slope_{truth}"]
    text = f"r = {rounded(metrics[f'pearson_{truth}'])}\nslope {slope:.2f}"
    text += f"\n{np.count_nonzero(known)} rows"
    lost = np.count_nonzero(~known) if lost is None else lost
    if lost:
        text += f"\n{lost:.0f} left out"
    axis.text(0.05, 0.95, text + more, transform=axis.transAxes, va="top", fontsize=8)


def draw_steps(axis: Any, record: Record, steps: tuple[tuple[str, str, str], ...]) -> None:
    """Draw a table of each approximation's correlation and slope."""
    arrays = record.arrays
    axis.axis("off")
    rows = []
    for one, other, label in steps:
        if f"predicted_{one}" not in arrays and f"actual_{one}" not in arrays:
            continue  # the record is older than this approximation
        found = agreement(*both_sides(arrays, one, other))
        r, slope = found["pearson"], found["slope"]
        if one == "lissa" and "lissa_residual" in record.metrics:
            label += f" (residual {record.metrics['lissa_residual']:.1f})"
        num = len(both_sides(arrays, one, other)[0])
        rows.append((label, rounded(r), f"{1 - r:.1e}", f"{slope:.2f}", f"{num}"))
    head = ("Approximation", "r", "lost, 1 - r", "slope", "rows")
    table = axis.table(rows, colLabels=head, colWidths=[0.56, 0.12, 0.13, 0.11, 0.08],
                       loc="center", cellLoc="left", colLoc="left", edges="horizontal")  # fmt: skip
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    for (row, _), cell in table.get_celld().items():
        cell.set_edgecolor("0.8")
        if row == 0:
            cell.get_text().set_fontweight("bold")
