"""Logistic regression on a network's features, fitted and ready to be attacked; and its choice.

The paper's head has a test accuracy of .985, a training accuracy of 1 and a training loss of .0040
(Koh & Liang 2017, section 5.2, and its release). The accuracy on held-out training images says how
like it a head is on new images; where several are as like it as such a sample can tell, the
training loss decides. No test image has a part in it, and no attack.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import images
from experiments.shared import trunks
from influence import BinaryLogisticRegression, Examples, TopLayer
from influence.attack.poison import Poisoning, poison
from influence.common.checkpoint import kept
from influence.common.progress import progress
from influence.models.top_layer import scaled

BOUNDS = (-1.0, 1.0)  # of a pixel
LEVEL = 2 / 255  # one step of its 8-bit value
FLIPPED = float(np.log(2))  # test loss above which P(label) < 1/2
_TOLERANCE = 1e-9  # gradient norm of the clean fits; refits have a smaller one
WEIGHT_DECAYS = (1e-2, 1e-3, 1e-4, 1e-5)
_ACCURACY, _LOSS = 0.985, 0.0040  # of the paper's head
_FOLDS = 4  # of the training images, each held out once


@dataclass(frozen=True)
class Head:
    """A net at its minimum, and what it was trained on.

    Attributes:
      net: the head on its trunk.
      train: features and labels.
      test: likewise.
      images: (n, h, w, 3) uint8 training images, of the trunk's size.
      radius: of each pixel's box, in 8-bit levels.
    """

    net: TopLayer
    train: Examples
    test: Examples
    images: NDArray[np.uint8]
    radius: float

    def attacked(self, test: Examples, rows: NDArray, **options: Any) -> Poisoning:
        """`poison`, each pixel of these training images within its box."""
        return poison(
            self.net,
            self.train,
            test,
            rows,
            self.radius * LEVEL,
            inputs=scaled(self.images[rows]),
            bounds=BOUNDS,
            **options,
        )

    def poisoned(self, found: Poisoning) -> Examples:
        """The training set with the poisons' features."""
        x = np.array(self.train.x)
        x[found.rows] = found.features
        return Examples(x, self.train.y)

    def accuracy(self, examples: Examples, theta: NDArray | None = None) -> float:
        """Share of examples on the right side, at the net's theta or another."""
        theta = self.net.theta if theta is None else theta
        return float(np.mean((examples.x @ theta > 0) == examples.y))


def fitted(config: Any, i: int, data: Any, checkpoints: Path | None) -> tuple[Head, dict]:
    """Head i of an experiment's Config at its minimum, and its accuracies by name."""
    name, (x, y), (x_test, y_test) = config.heads[i], data.train, data.test
    folder = trunks.kept_in(data.stand_in, checkpoints)
    phi = trunks.features([name], np.concatenate([x, x_test]), root=data.folder, folder=folder)[
        name
    ]
    mean, scale = None, None
    if config.standardised[i]:
        mean, scale = _standards(phi[: len(y)])
    net = TopLayer(
        trunks.trunk(name, data.folder),
        weight_decay=config.weight_decays[i],
        mean=mean,
        scale=scale,
    )
    if mean is not None:
        phi = (phi - mean) / scale
    train, test = Examples(phi[: len(y)], y), Examples(phi[len(y) :], y_test)
    net.fit(train, gradient_tolerance=_TOLERANCE)
    head = Head(net, train, test, images.resized(x, trunks.side(name)), config.radius)
    return head, {
        "test_accuracy": head.accuracy(test),
        "train_accuracy": head.accuracy(train),
        "held_out_accuracy": held_out_accuracy(net, train, config.seed),
        "median_test_margin": np.median((2 * y_test - 1) * (test.x @ net.theta)),
    }


def _standards(phi: NDArray) -> tuple[NDArray, NDArray]:
    deviation = phi.std(axis=0)
    return phi.mean(axis=0), np.where(deviation > 0, deviation, 1)


def right(config: Any, head: Head) -> NDArray[np.int64]:
    """The test images to be attacked."""
    order = np.random.default_rng(config.seed).permutation(len(head.test))
    losses = head.net.losses(head.test.x, head.test.y)
    order = order[losses[order] < FLIPPED]  # much the same images at every head
    return order[: config.num_test or None]


def alike(config: Any, head: Head) -> NDArray[np.int64]:
    """A test image and those nearest to it of its class, in place of photographs of one dog.

    All of them are right before the attack, as the release's are: fewer than `group_size` if the
    class has no more.
    """
    x, y, first = head.test.x, head.test.y, right(config, head)[0]
    own = np.flatnonzero((y == y[first]) & (head.net.losses(x, y) < FLIPPED))
    far = np.linalg.norm(x[own] - x[first], axis=1)
    return own[np.argsort(far, kind="stable")[: config.group_size]]


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
        phi = trunks.features(
            heads, np.concatenate([x, data.test[0]]), root=data.folder, folder=folder
        )
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
