"""Predictions held against the truth: numbers and the panel that every such figure shares."""

import math
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray


def agreement(predicted: NDArray, actual: NDArray) -> dict[str, float]:
    """How well predictions agree with the truth, in scale and sign as well as in order.

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
        xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal",
        xlabel="Actual change in loss (nats)", ylabel="Predicted change in loss (nats)",
    )  # fmt: skip
    axis.locator_params(nbins=5)


def rounded_down(correlation: float) -> str:
    """A correlation with as many nines as it has, never rounded up to one: 0.99999, 0.86."""
    digits = 2
    while digits < 6 and correlation > 1 - 10.0**-digits:
        digits += 1
    return f"{math.floor(correlation * 10**digits) / 10**digits:.{digits}f}"
