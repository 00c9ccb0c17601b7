"""Dogs against fish: an RBF SVM on pixels and a logistic regression on a network's features.

With K_ij = exp(-gamma |x_i - x_j|^2) = (L L')_ij the kernel SVM on x is the linear one on the rows
of L; a new image's row is phi with L phi = K(x, new), so that phi . phi_i is the kernel again.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from influence import BinaryLogisticRegression, Direct, Examples, Influence, SmoothHinge

DOG, FISH = 0, 1
_TOLERANCE = 1e-10  # of the gradient's norm at a minimum
_COOLING = 10**0.5  # of the temperature, from one minimum to the next
_PIXELS = 1 << 13  # of all images multiplied at a time


@dataclass(frozen=True, eq=False)
class Fitted:
    """A model at its minimum, what it was trained on and what it is tested on.

    Attributes:
      net: the model.
      train: its features and labels.
      test: likewise.
    """

    net: Any
    train: Examples
    test: Examples

    def scores(self, points: NDArray) -> NDArray:
        """Predicted changes of some test losses without each training image: (k, n).

        Positive: the test loss rises without the image, so the image helped.
        """
        influence = Influence(self.net, self.train, solver=Direct())
        return influence.scores(self.test.take(points)).change_if_removed

    @property
    def outputs(self) -> NDArray:
        """(m,) of the test images; positive for fish."""
        return self.net.outputs(self.test.x)[:, 0]

    @property
    def gradient_norm(self) -> float:
        """Of the risk: how well it is minimised."""
        return self.net.gradient_norm(self.train)

    @property
    def accuracies(self) -> tuple[float, float]:
        """On the training and on the test images."""
        return tuple(
            float(np.mean((self.net.outputs(part.x)[:, 0] > 0) == (part.y.ravel() == FISH)))
            for part in (self.train, self.test)
        )  # pyright: ignore[reportReturnType]


def squared_distances(x: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray:
    """Squared Euclidean distances of images with pixels in [-1, 1].

    Args:
      x: (n, ...) bytes.
      others: (m, ...) bytes.

    Returns: (m, n), of equal images exactly 0: sums of integers, which float64 holds.
    """
    flat, rows = (part.reshape(len(part), -1) for part in (x, others))
    inner = np.zeros((len(rows), len(flat)))
    own, other = np.zeros(len(flat)), np.zeros(len(rows))
    for start in range(0, flat.shape[1], _PIXELS):
        b, a = (part[:, start : start + _PIXELS].astype(np.float64) for part in (flat, rows))
        inner += a @ b.T
        own += np.einsum("ij,ij->i", b, b)
        other += np.einsum("ij,ij->i", a, a)
    return (other[:, None] + own - 2 * inner) / 127.5**2


def kernel_svm(
    distance: NDArray, y: NDArray, y_test: NDArray, *, gamma: float, t: float, weight_decay: float
) -> Fitted:
    """An SVM with a Gaussian kernel and the hinge smoothed by t, at its exact minimum.

    Args:
      distance: (n + m, n) squared distances of the training and then the test images from the
        training images, no two of which are equal.
      y: (n,) labels 0 and 1.
      y_test: (m,).
      gamma: of the kernel exp(-gamma distance).
      t: temperature.
      weight_decay: lambda of lambda/2 |w|^2.

    Returns: Fitted, d = n.
    Raises: ValueError if two training images are equal.
    """
    n = len(y)
    K = np.exp(-gamma * distance)
    try:
        L = scipy.linalg.cholesky(K[:n], lower=True)
    except np.linalg.LinAlgError as error:
        twins = np.argwhere(np.tril(distance[:n] <= 0, -1))
        raise ValueError(
            "distance must be of images no two of which are equal, got equal training images "
            f"{twins[:5].tolist()}; without twins, use a larger gamma than {gamma:g}."
        ) from error
    phi = scipy.linalg.solve_triangular(L, K[n:].T, lower=True).T
    train, test = Examples(L, 2 * y - 1), Examples(phi, 2 * y_test - 1)
    theta, warmth = np.zeros(n), max(1.0, t)
    while True:  # a colder hinge's minimum is near a warmer one's; from zero it is far for Newton
        net = SmoothHinge(n, warmth, weight_decay=weight_decay)
        net.theta = theta
        net.fit(train, gradient_tolerance=_TOLERANCE)
        if warmth <= t:
            return Fitted(net, train, test)
        theta, warmth = net.theta, max(warmth / _COOLING, t)


def deep_head(features: NDArray, y: NDArray, y_test: NDArray, *, weight_decay: float) -> Fitted:
    """Logistic regression on features, at its minimum.

    Args:
      features: (n + m, f) of the training and then the test images.
      y: (n,) labels.
      y_test: (m,).
      weight_decay: lambda of lambda/2 |w|^2.

    Returns: Fitted, d = f.
    """
    train, test = Examples(features[: len(y)], y), Examples(features[len(y) :], y_test)
    net = BinaryLogisticRegression(features.shape[1], weight_decay=weight_decay)
    net.fit(train, gradient_tolerance=_TOLERANCE)
    return Fitted(net, train, test)
