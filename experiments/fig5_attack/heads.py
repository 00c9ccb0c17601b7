"""The heads under attack (logistic regression on a network's features), and the choice of a head.

The paper's head has a test accuracy of .985, a training accuracy of 1 and a training loss of .0040
(Koh & Liang 2017, section 5.2, and the authors' code). The function `chosen` considers heads whose
accuracy on held-out training images is about .985. Among these heads it takes the one whose
training loss is nearest to .0040. This choice uses no test image and no attack.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data import images
from experiments.shared import trunks
from influence import BinaryLogisticRegression, Examples, TopLayer
from influence.attack.poison import Poisoning, PoisonOptions, poison
from influence.attack.targets import BEST_RULE, Rule
from influence.common.checkpoint import kept
from influence.common.progress import progress
from influence.models.top_layer import scaled

# Pixel values lie in this range.
BOUNDS = (-1.0, 1.0)
# An 8-bit pixel changes in steps of this size.
LEVEL = 2 / 255
# An image is misclassified if its loss is above this value: then P(label) < 1/2.
FLIPPED = float(np.log(2))
# Fits on clean images stop at this gradient norm.
_TOLERANCE = 1e-9
WEIGHT_DECAYS = (1e-2, 1e-3, 1e-4, 1e-5)
# The paper's head has this test accuracy and this training loss.
_ACCURACY, _LOSS = 0.985, 0.0040
# The number of folds of the cross-validation on the training images.
_FOLDS = 4


@dataclass(frozen=True)
class Head:
    """A net at the minimum of its risk, with its training and test sets.

    Attributes:
      net: the head, together with the frozen network that computes its features (the trunk).
      train: features and labels of the n training images.
      test: features and labels of the test images.
      images: (n, h, w, 3) uint8 training images in the trunk's input size.
      radius: the largest change of a pixel, in 8-bit levels.
    """

    net: TopLayer
    train: Examples
    test: Examples
    images: NDArray[np.uint8]
    radius: float

    def attacked(
        self,
        test: Examples,
        rows: NDArray,
        *,
        rule: Rule = BEST_RULE,
        counts: Sequence[int] | None = None,
        **options: Any,
    ) -> Poisoning:
        """Change training images so that test images are misclassified.

        No pixel changes by more than `radius`.

        Args:
          test: features and labels of the test images under attack.
          rows: the training images that may be changed.
          rule: see `poison`.
          counts: see `poison`.
          **options: fields of `PoisonOptions` other than `inputs`.
        Returns: the result of `poison`.
        """
        net, train, box = self.net, self.train, self.radius * LEVEL
        chosen = PoisonOptions(inputs=scaled(self.images[rows]), **options)
        return poison(
            net, train, test, rows, box, counts=counts, bounds=BOUNDS, rule=rule, options=chosen
        )

    def poisoned(self, found: Poisoning) -> Examples:
        """Return the training set after the attack, with the features of the poisoned images."""
        x = np.array(self.train.x)
        x[found.rows] = found.features
        return Examples(x, self.train.y)

    def accuracy(self, examples: Examples, theta: NDArray | None = None) -> float:
        """Compute the share of correctly classified examples. If theta is None, use the net's."""
        theta = self.net.theta if theta is None else theta
        return float(np.mean((examples.x @ theta > 0) == examples.y))


def fitted(config: Any, i: int, data: Any, checkpoints: Path | None) -> tuple[Head, dict]:
    """Fit the i-th head of a Config to the minimum of its risk. Return the head and metrics."""
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
    """Return the rows of the test images to attack, in random order.

    The head classifies these images correctly. If `num_test` is 0, all such images are returned,
    otherwise this many.
    """
    order = np.random.default_rng(config.seed).permutation(len(head.test))
    losses = head.net.losses(head.test.x, head.test.y)
    order = order[losses[order] < FLIPPED]  # the order is the same for all heads
    return order[: config.num_test or None]


def alike(config: Any, head: Head) -> NDArray[np.int64]:
    """Return a test image and the images of its class that have the nearest features.

    These images replace the photographs of one dog in the authors' 2017 code. As in that code, the
    head classifies all of them correctly. Their number is `group_size`, or smaller if the class has
    fewer such images.
    """
    x, y, first = head.test.x, head.test.y, right(config, head)[0]
    own = np.flatnonzero((y == y[first]) & (head.net.losses(x, y) < FLIPPED))
    far = np.linalg.norm(x[own] - x[first], axis=1)
    return own[np.argsort(far, kind="stable")[: config.group_size]]


def held_out_accuracy(net: Any, train: Examples, seed: int) -> float:
    """Compute the accuracy on held-out training images by fourfold cross-validation.

    Args:
      net: a head on features, at its minimum. The function restores its theta at the end.
      train: features and labels 0 and 1.
      seed: seed of the division into folds.
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
    """Fit a head on every layer of a network with every weight decay.

    Args:
      network: name of the network.
      data: the photographs, as a `data.Splits` (training and test set).
      seed: seed of the cross-validation's folds.
      folder: folder that stores features, or None.
      checkpoints: folder that stores the result, or None.

    Returns: a dict of arrays: `layers` (l,), `weight_decays` (w,), and for each pair (l, w)
      `held_out_accuracy`, `training_accuracy` and `training_loss` (in nats, without the penalty).
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
    """Choose the head whose accuracy and training loss are nearest to those of the paper's head.

    A head is a candidate if its held-out accuracy is within one standard error of the paper's .985.
    If there is no such head, the heads with the nearest accuracy are candidates. We choose the
    candidate whose training loss is nearest to the paper's on a logarithmic scale.

    Args:
      found: the result of `heads_of`.
      n: number of training images.
    Returns: the layer and the weight decay of the head.
    """
    gap = np.abs(found["held_out_accuracy"] - _ACCURACY)
    enough = max(np.sqrt(_ACCURACY * (1 - _ACCURACY) / n), gap.min())
    far = np.abs(np.log(found["training_loss"] / _LOSS))
    i, j = np.unravel_index(np.argmin(np.where(gap <= enough, far, np.inf)), far.shape)
    return found["layers"][i].decode(), float(found["weight_decays"][j])
