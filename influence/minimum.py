"""Whether a net is where influence is defined: at the minimum of its risk."""

from __future__ import annotations

from influence.examples import Examples
from influence.net import GenericNeuralNet

TOLERANCE = 1e-8


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
        raise ValueError(
            f"net must be at the minimum of its risk, got a gradient norm of {norm:.1e}, above the "
            f"tolerance {tolerance:.1e}; call net.fit(train) first or {otherwise}."
        )
