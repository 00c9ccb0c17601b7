"""Which layer and which weight decay a head is to have, by the training images alone.

The paper's head has a test accuracy of .985, a training accuracy of 1 and a training loss of .0040
(Koh & Liang 2017, section 5.2, and its release). The accuracy on held-out training images says how
like it a head is on new images; where several are as like it as such a sample can tell, the
training loss decides. No test image has a part in it, and no attack.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.shared import trunks
from influence import BinaryLogisticRegression, Examples
from influence.common.checkpoint import kept
from influence.common.progress import progress

WEIGHT_DECAYS = (1e-2, 1e-3, 1e-4, 1e-5)
_ACCURACY, _LOSS = 0.985, 0.0040  # of the paper's head
_FOLDS = 4  # of the training images, each held out once
_TOLERANCE = 1e-9  # gradient norm of the fits


def held_out_accuracy(net: Any, train: Examples, seed: int) -> float:
    """The share of training images on the right side when a quarter at a time is held out.

    Args:
      net: a head on features, at its minimum, as it is left.
      train: features and labels 0 and 1.
      seed: of the division into quarters.
    """
    folds = np.random.default_rng(seed).permutation(len(train)) % _FOLDS
    theta, right = net.theta, 0
    try:
        for fold in range(_FOLDS):
            own, held = (train.take(np.flatnonzero(w)) for w in (folds != fold, folds == fold))
            net.theta = theta
            net.fit(own, gradient_tolerance=_TOLERANCE)
            right += np.count_nonzero((held.x @ net.theta > 0) == held.y)
    finally:
        net.theta = theta
    return right / len(train)


def heads_of(
    network: str, data: Any, *, seed: int, folder: Path | None, checkpoints: Path | None
) -> dict[str, NDArray]:
    """What every layer of a network gives with every weight decay, features as they are.

    Args:
      network: its name.
      data: Splits of photographs.
      seed: of the division of the training images.
      folder: where features are kept, or None.
      checkpoints: where the result is, or None.

    Returns: `layers` (l,) and `weight_decays` (w,); (l, w) each: `held_out_accuracy`,
      `training_accuracy` and `training_loss`, in nats, without the penalty.
    """
    layers = trunks.NETWORKS[network].layers
    x, y = data.train
    heads = [f"{network}/{layer}" for layer in layers]

    def compute() -> dict[str, NDArray]:
        phi = trunks.features(heads, np.concatenate([x, data.test[0]]), root=data.folder,
                              folder=folder)  # fmt: skip
        found = np.empty((3, len(heads), len(WEIGHT_DECAYS)))
        for i, head in enumerate(progress(heads, f"heads on {network}", len(heads))):
            train = Examples(phi[head][: len(y)], y)
            for j, weight_decay in enumerate(WEIGHT_DECAYS):
                net = BinaryLogisticRegression(train.x.shape[1], weight_decay=weight_decay)
                net.fit(train, gradient_tolerance=_TOLERANCE)
                losses = net.losses(train.x, train.y)
                found[:, i, j] = (
                    held_out_accuracy(net, train, seed),
                    np.mean((train.x @ net.theta > 0) == y),
                    losses.mean(),
                )
        return dict(
            zip(("held_out_accuracy", "training_accuracy", "training_loss"), found, strict=True)
        )

    about = {"layers": np.array(layers, "S"), "weight_decays": np.array(WEIGHT_DECAYS)}
    return about | kept(checkpoints and checkpoints / f"{network}-choice.npz", compute)


def chosen(found: dict[str, NDArray], n: int) -> tuple[str, float]:
    """The layer and the weight decay that are to be taken.

    Of the heads whose held-out accuracy is within one standard error of the paper's .985, the one
    of the training loss nearest to the paper's by its logarithm; where no accuracy is, of those
    nearest to it.

    Args:
      found: what `heads_of` returned.
      n: training images.
    """
    gap = np.abs(found["held_out_accuracy"] - _ACCURACY)
    enough = max(np.sqrt(_ACCURACY * (1 - _ACCURACY) / n), gap.min())
    far = np.abs(np.log(found["training_loss"] / _LOSS))
    i, j = np.unravel_index(np.argmin(np.where(gap <= enough, far, np.inf)), far.shape)
    return found["layers"][i].decode(), float(found["weight_decays"][j])
