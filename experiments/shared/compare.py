"""Comparison of predictions with the truth: numbers, and the panels that figures share."""

import math
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray


def agreement(predicted: NDArray, actual: NDArray) -> dict[str, float]:
    """Measure how well predictions agree with the truth, in scale and sign as well as in order.

    Args:
      predicted: (k,) predicted changes.
      actual: (k,) actual changes.

    Returns: pearson, spearman, slope and intercept of the least-squares line of predicted on
      actual, sign_agreement (the fraction), largest_difference.
    """
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
      scores: (..., n).
      count: number of positions.

    Returns: (..., count); of equal scores, the earlier position comes first.
    """
    return np.argsort(-np.abs(scores), axis=-1, kind="stable")[..., :count]


def with_others(first: int, among: NDArray, count: int, seed: int) -> NDArray[np.int64]:
    """Return the paper's test point, then others, because one test point proves little.

    Args:
      first: the paper's test point.
      among: points from which the others are drawn without repetition; `first` is excluded.
      count: number of the others.
      seed: seed of the draw.

    Returns: (1 + count,).
    Raises: ValueError if there are not as many others.
    """
    others = among[among != first]
    if count > len(others):
        raise ValueError(f"count must be at most {len(others)}, the other points, got {count}.")
    return np.append(first, np.random.default_rng(seed).choice(others, count, replace=False))


def predicted_against_actual(axis: Any, actual: NDArray, predicted: NDArray) -> None:
    """Scatter predicted on actual changes with y = x, both axes alike.

    Args:
      axis: matplotlib Axes.
      actual: (k,) actual changes in test loss, nats.
      predicted: (k,) predicted changes, nats.
    """
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
      axis: matplotlib Axes.
      names: (k,) name of each value.
      values: (k,) values of either sign.
      marked: name whose bar is highlighted, if it is drawn.
      count: most bars.

    Returns: the positions in `values` of the bars, from the top; bar i is drawn at height i.
    """
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


def rounded_down(correlation: float) -> str:
    """Format a correlation with all its nines, never rounded up to one: 0.99999, 0.86."""
    digits = 2
    while digits < 6 and correlation > 1 - 10.0**-digits:
        digits += 1
    return f"{math.floor(correlation * 10**digits) / 10**digits:.{digits}f}"
