"""Comparisons of predicted with actual changes, by summary statistics and in plots."""

from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray

from influence.common.numbers import numbers


def agreement(predicted: NDArray, actual: NDArray) -> dict[str, float]:
    """Measure how well predicted changes agree with actual changes in order, scale and sign.

    Args:
      predicted: (k,) predicted changes.
      actual: (k,) actual changes.

    Returns: a dict with the keys pearson, spearman, slope, intercept, sign_agreement and
      largest_difference. Slope and intercept are those of the least-squares line of predicted on
      actual changes. sign_agreement is the fraction of equal signs. largest_difference is the
      largest absolute difference.
    """
    predicted, actual = numbers(predicted, "predicted"), numbers(actual, "actual")
    line = scipy.stats.linregress(actual, predicted)
    return {
        "pearson": float(line.rvalue),
        "spearman": float(scipy.stats.spearmanr(actual, predicted)[0]),
        "slope": float(line.slope),
        "intercept": float(line.intercept),
        "sign_agreement": float(np.mean(np.sign(actual) == np.sign(predicted))),
        "largest_difference": float(np.abs(predicted - actual).max()),
    }


def largest(scores: NDArray, count: int) -> NDArray[np.int64]:
    """Return the positions of the largest absolute scores along the last axis, the largest first.

    Args:
      scores: array of shape (..., n).
      count: number of positions to return.

    Returns: (..., count) positions. Among equal scores, the earlier position comes first.
    """
    return np.argsort(-np.abs(numbers(scores, "scores")), axis=-1, kind="stable")[..., :count]


def with_others(first: int, among: NDArray, count: int, seed: int) -> NDArray[np.int64]:
    """Return the paper's test point, and others drawn at random, because one point proves little.

    Args:
      first: row of the paper's test point.
      among: rows from which the others are drawn. `first` is never drawn, and no row is drawn
        twice.
      count: number of rows to draw.
      seed: seed of the draw.

    Returns: (1 + count,) rows; `first` comes first.
    Raises: ValueError if `among` has fewer than `count` other rows.
    """
    among = numbers(among, "among")
    others = among[among != first]
    if count > len(others):
        raise ValueError(f"count must be at most {len(others)}, the other points, got {count}.")
    return np.append(first, np.random.default_rng(seed).choice(others, count, replace=False))


def predicted_against_actual(axis: Any, actual: NDArray, predicted: NDArray) -> None:
    """Plot predicted against actual changes, with equal axes and the line y = x.

    Args:
      axis: the matplotlib Axes to draw on.
      actual: (k,) actual changes of the test loss in nats.
      predicted: (k,) predicted changes in nats.
    """
    predicted, actual = numbers(predicted, "predicted"), numbers(actual, "actual")
    reach = 1.08 * max(np.abs(actual).max(), np.abs(predicted).max(), np.finfo(float).tiny)
    axis.plot([-reach, reach], [-reach, reach], color="0.6", linewidth=0.8, zorder=1)
    axis.scatter(actual, predicted, s=10, alpha=0.6, color="#0072B2", linewidths=0, zorder=2)
    axis.set(
        xlim=(-reach, reach),
        ylim=(-reach, reach),
        aspect="equal",
        xlabel="Actual change in loss (nats)",
        ylabel="Predicted change in loss (nats)",
    )
    axis.locator_params(nbins=5)


def largest_bars(
    axis: Any, names: NDArray, values: NDArray, *, marked: str = "", count: int = 20
) -> NDArray:
    """Draw horizontal bars of the values of largest magnitude, the largest on top.

    Args:
      axis: the matplotlib Axes to draw on.
      names: (k,) names of the values.
      values: (k,) values of either sign.
      marked: the bar of this name is highlighted.
      count: the largest number of bars.

    Returns: the positions in `values` of the bars, from the top. Bar i has the y coordinate i.
    """
    values = numbers(values, "values")
    order = np.argsort(-np.abs(values), kind="stable")[:count]
    colours = ["#D55E00" if name == marked else "#0072B2" for name in names[order]]
    axis.barh(np.arange(len(order)), values[order], color=colours, height=0.7)
    axis.axvline(0, color="0.6", linewidth=0.6)
    axis.set_ylim(len(order) - 0.4, -0.6)
    axis.set_yticks(np.arange(len(order)), names[order])
    for label in axis.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == marked else "normal")
    axis.locator_params(axis="x", nbins=5)
    return order


def letter(axis: Any, name: str) -> None:
    """Write the bold letter of a panel above its upper left corner."""
    axis.annotate(
        name, (0, 1), xycoords="axes fraction", xytext=(-4, 4), textcoords="offset points",
        ha="right", va="bottom", fontweight="bold", fontsize=9, annotation_clip=False,
    )  # fmt: skip


def rounded(correlation: float) -> str:
    """Format a correlation with two decimals, or with up to six if it would be rounded to 1.

    A correlation below 1 is never shown as 1. From 0.9999995 on, it is shown as 0.999999.
    """
    digits = 2
    while digits < 6 and float(f"{correlation:.{digits}f}") >= 1:
        digits += 1
    shown = f"{correlation:.{digits}f}"
    return "0.999999" if correlation < 1 <= float(shown) else shown
