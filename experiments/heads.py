"""Logistic regression on a network's features, fitted and ready to be attacked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import images
from experiments.choice import held_out_accuracy
from experiments.shared import trunks
from influence import Examples, TopLayer
from influence.attack.poison import Poisoning, poison
from influence.models.top_layer import scaled

BOUNDS = (-1.0, 1.0)  # of a pixel
LEVEL = 2 / 255  # one step of its 8-bit value
FLIPPED = float(np.log(2))  # test loss above which P(label) < 1/2
_TOLERANCE = 1e-9  # of the clean fits; refits have a smaller one


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
            self.net, self.train, test, rows, self.radius * LEVEL,
            inputs=scaled(self.images[rows]), bounds=BOUNDS, **options,
        )  # fmt: skip

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
        weight_decay=config.weight_decays[i], mean=mean, scale=scale,
    )  # fmt: skip
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
