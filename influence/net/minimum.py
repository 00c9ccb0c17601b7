"""Checks that a net is at the minimum of its risk. Influence functions assume this."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from influence.common.convergence import warn_unconverged
from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet

TOLERANCE = 1e-8
# The removal of a group adds a gradient to that of the risk. `warn_of_drift` warns if the norm of
# the risk's gradient at theta is above this fraction of the median norm of the added gradients.
_DRIFT = 0.1
_MOST_GROUPS = 20


def check_at_minimum(
    net: GenericNeuralNet,
    train: Examples,
    tolerance: float,
    otherwise: str,
    batch_size: int | None = None,
) -> None:
    """Raise ValueError if the Euclidean norm of the risk's gradient is above the tolerance.

    Above the tolerance, most of the change between theta and a retrained theta would be ordinary
    training progress. The message suggests a fit, a larger tolerance, or the remedy `otherwise`.
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
    """Warn if theta is too far from the minimum to measure the effect of removals.

    Far from the minimum, retraining without a group also continues the training, so the measured
    change does not come from the removal only. The removal of a group adds to the risk's gradient a
    vector of norm |sum over the group's rows i of grad (loss_i + penalty)| / n. The function
    compares the norm of the risk's gradient at theta with the median of this norm over at most 20
    groups.
    """
    norm = net.gradient_norm(train, batch_size)
    some = groups[:: -(-len(groups) // _MOST_GROUPS)]
    sets = [train.take(group) for group in some]
    own = [net.risk_gradient(s, batch_size=batch_size) * net.mass(s) for s in sets]
    added = np.median(np.linalg.norm(own, axis=1)) / net.mass(train)
    if norm > _DRIFT * added:
        warn_unconverged(
            f"net is at a gradient norm of {norm:.1e}, where a removal adds {added:.1e}: fits from "
            "there go on with the training, and the changes are as much of that as of what was "
            "removed; call net.fit(train) first, or subtract the change that a fit on all rows "
            "makes."
        )
