"""Whether a net is where influence is defined: at the minimum of its risk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from influence.common.convergence import warn_unconverged
from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet

TOLERANCE = 1e-8
_DRIFT = 0.1  # of what a removal adds to the gradient: what may be there before
_MOST_GROUPS = 20


def check_at_minimum(
    net: GenericNeuralNet,
    train: Examples,
    tolerance: float,
    otherwise: str,
    batch_size: int | None = None,
) -> None:
    """Refuse a net elsewhere: what retraining does to it would be ordinary training for the most.

    Args:
      net: at any theta.
      train: its training set.
      tolerance: what the Euclidean norm of the risk's gradient may be.
      otherwise: what would work besides a fit, in words.
      batch_size: rows at a time, or None.

    Raises: ValueError.
    """
    norm = net.gradient_norm(train, batch_size)
    if not norm <= tolerance:
        precision = "" if net.dtype == "float64" else " in float64"
        raise ValueError(
            f"net must be at the minimum of its risk, got a gradient norm of {norm:.1e}, above the "
            f"tolerance {tolerance:.1e}; call net.fit(train, gradient_tolerance={tolerance:.0e})"
            f"{precision} first, give a larger tolerance, or {otherwise}."
        )


def warn_of_drift(
    net: GenericNeuralNet, train: Examples, groups: Sequence, batch_size: int | None = None
) -> None:
    """Warn where retraining would move the net as much by training on as by what is removed.

    The gradient at theta is compared with what removing a group adds to it, about |sum over the
    group of (loss_i + penalty)'| / n, in the median of some groups.

    Args:
      net: at any theta.
      train: its training set.
      groups: arrays of the rows that are to be removed.
      batch_size: rows at a time, or None.
    """
    norm = net.gradient_norm(train, batch_size)
    some = groups[:: -(-len(groups) // _MOST_GROUPS)]
    own = [net.risk_gradient(train.take(g), batch_size=batch_size) * len(g) for g in some]
    added = np.median(np.linalg.norm(own, axis=1)) / len(train)
    if norm > _DRIFT * added:
        warn_unconverged(
            f"net is at a gradient norm of {norm:.1e}, where a removal adds {added:.1e}: fits from "
            "there go on with the training, and the changes are as much of that as of what was "
            "removed; call net.fit(train) first, or subtract the change that a fit on all rows "
            "makes."
        )
