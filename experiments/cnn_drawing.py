"""The CNN's figure: predicted against each meaning of actual, and how far each step agrees."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.harness.record import Record
from experiments.shared.compare import predicted_against_actual, rounded_down

TRUTHS = {
    "continued": "Training on, less the control",
    "proximal": "Proximal leave-one-out",
    "bregman": "Proximal Bregman response",
}
# How each approximation agrees with what it stands for: (one side, the other, what it is).
STEPS = (
    ("cg", "direct", "CG for the exact inverse"),
    ("lissa", "direct", "LiSSA for the exact inverse"),
    ("gauss_newton", "direct", "Gauss-Newton for the Hessian"),
    ("doubled", "direct", "Twice the damping"),
    ("direct", "proximal", "First order for the proximal minimum"),
    ("proximal", "continued", "Proximal minimum for training on"),
    ("again", "continued", "Other minibatches for training on"),
    ("direct", "continued", "Prediction for training on, in all"),
)
STEPS_AT_MINIMUM = (
    ("cg", "minimum", "CG for the exact inverse"),
    ("lissa", "minimum", "LiSSA for the exact inverse"),
    ("gauss_newton", "minimum", "Gauss-Newton for the Hessian"),
    ("damped", "minimum", "Damping as where training stopped"),
    ("minimum", "part", "First order for a refit without a tenth of the row"),
    ("part", "refit", "That refit, tenfold, for the refit without the row"),
    ("minimum", "refit", "First order for the refit without the row"),
    ("damped", "refit", "Damping and first order for that refit"),
)


def both_sides(arrays: Any, one: str, other: str) -> tuple[NDArray, NDArray]:
    """Two sides of a step, (k,) each: the first test point's removals, where both are known."""
    names = {name.partition("_")[2]: name for name in arrays if name.startswith("actual_")}
    names |= {name.partition("_")[2]: name for name in arrays if name.startswith("predicted_")}
    names["refit"] = "actual_minimum"
    left, right = (arrays[names[side]][0, arrays["removals_0"]] for side in (one, other))
    known = np.isfinite(left) & np.isfinite(right)
    return left[known], right[known]


def draw(record: Record) -> Any:
    """Predicted against actual for each truth, equal axes and y = x, and what explains them."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(6.75, 4.6), layout="constrained")
    if "actual_minimum" in record.arrays:
        above, below = figure.subfigures(2, 1, height_ratios=[2.3, 2])
        left, middle, right = above.subplots(1, 3)
        _draw_descent(left, record.arrays)
        _draw_truth(middle, record, "part", "A tenth of the row removed,\nchange times ten")
        _draw_truth(right, record, "minimum", "The row removed,\nrefitted at the minimum")
        right.set_ylabel("")
        _draw_steps(below.subplots(), record, STEPS_AT_MINIMUM)
        return figure
    above, below = figure.subfigures(2, 1, height_ratios=[2.3, 2])
    axes = above.subplots(1, 3)
    steps = record.config["continued_steps"], record.config["continued_rate"]
    titles = TRUTHS | {"continued": f"{TRUTHS['continued']}\n({steps[0]:,} steps at {steps[1]:g})"}
    for axis, (truth, title) in zip(axes, titles.items(), strict=True):
        _draw_truth(axis, record, truth, title)
    reach = max(axis.get_xlim()[1] for axis in axes)
    for axis in axes:
        axis.lines[0].set_data([-reach, reach], [-reach, reach])
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach))  # one scale: slopes are the message
    for axis in axes[1:]:
        axis.set_ylabel("")
    _draw_steps(below.subplots(), record, STEPS)
    return figure


def _draw_truth(axis: Any, record: Record, truth: str, title: str) -> None:
    """The first test point's removals, predicted against one meaning of actual."""
    arrays, metrics = record.arrays, record.metrics
    first = arrays["removals_0"]
    by = "minimum" if truth in ("minimum", "part") else "cg"
    predicted, actual = arrays[f"predicted_{by}"][0, first], arrays[f"actual_{truth}"][0, first]
    known = np.isfinite(actual)
    predicted_against_actual(axis, actual[known], predicted[known])
    axis.locator_params(nbins=4)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("Actual change (nats)", fontsize=9)
    axis.set_ylabel("Predicted change (nats)", fontsize=9)
    axis.tick_params(labelsize=8)
    slope = metrics[f"slope_{truth}"]
    text = f"r = {rounded_down(metrics[f'pearson_{truth}'])}\nslope {slope:.2f}"
    text += f"\n{np.count_nonzero(known)} rows"
    lost = metrics["parts_unconverged"] if truth == "part" else np.count_nonzero(~known)
    if lost:
        text += f"\n{lost:.0f} left out"
    if truth == "continued":
        text += f"\ncontrol's drift\n{arrays['drift'][0]:+.2g}"
    axis.text(0.05, 0.95, text, transform=axis.transAxes, va="top", fontsize=8)


def _draw_descent(axis: Any, arrays: Any) -> None:
    """Gradient norm and risk by round, on axes of their own colours."""
    rounds = np.arange(len(arrays["risk"]))
    axis.semilogy(rounds, arrays["gradient_norm"], "o-", color="#0072B2", markersize=3)
    axis.set_xlabel("Hessians formed on the way", fontsize=9)
    axis.set_ylabel("Gradient norm", color="#0072B2", fontsize=9)
    beside = axis.twinx()
    beside.plot(rounds, arrays["risk"], "s--", color="#D55E00", markersize=3)
    beside.set_ylabel("Risk (nats)", color="#D55E00", fontsize=9)
    for one in (axis, beside):
        one.tick_params(labelsize=8)
    axis.set_title("The way to a local minimum", fontsize=9)


def _draw_steps(axis: Any, record: Record, steps: tuple[tuple[str, str, str], ...]) -> None:
    """A table: correlation and slope of each approximation on what it stands for."""
    arrays = record.arrays
    axis.axis("off")
    rows = []
    for (one, other, label), r, slope in zip(
        steps, arrays["step_pearson"], arrays["step_slope"], strict=True
    ):
        if one == "lissa" and "lissa_residual" in record.metrics:
            label += f" (residual {record.metrics['lissa_residual']:.1f})"
        num = len(both_sides(arrays, one, other)[0])
        rows.append((label, rounded_down(r), f"{1 - r:.1e}", f"{slope:.2f}", f"{num}"))
    head = ("What stands for what", "r", "lost, 1 - r", "slope", "rows")
    table = axis.table(rows, colLabels=head, colWidths=[0.56, 0.12, 0.13, 0.11, 0.08],
                       loc="center", cellLoc="left", colLoc="left", edges="horizontal")  # fmt: skip
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    for (row, _), cell in table.get_celld().items():
        cell.set_edgecolor("0.8")
        if row == 0:
            cell.get_text().set_fontweight("bold")
