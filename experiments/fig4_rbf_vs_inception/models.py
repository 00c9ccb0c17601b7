"""The models of Figure 4: an SVM with a Gaussian kernel, and logistic regression on features."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from influence import BinaryLogisticRegression, Direct, Examples, Influence, SmoothHinge

# The label of a fish. The label of a dog is 0.
FISH = 1
# Fits stop at this gradient norm.
_TOLERANCE = 1e-10
# The fit of the SVM lowers the temperature in stages. Each stage divides it by this factor.
_COOLING = 10**0.5
# `squared_distances` processes this many pixel values of every image at a time.
_PIXELS = 1 << 13


@dataclass(frozen=True, eq=False)
class Fitted:
    """A model at the minimum of its risk, with the features and labels of its data sets."""

    net: Any
    train: Examples
    test: Examples

    def scores(self, points: NDArray) -> NDArray:
        """Predict how k test losses change if each of the n training images is removed.

        Returns: (k, n) changes. A positive change means that the training image helped.
        """
        influence = Influence(self.net, self.train, solver=Direct(), approximation="first_order")
        return influence.scores(self.test.take(points)).change_if_removed

    @property
    def outputs(self) -> NDArray:
        """Outputs (m,) for the test images. A positive output predicts a fish."""
        return self.net.outputs(self.test.x)[:, 0]

    @property
    def gradient_norm(self) -> float:
        """Gradient norm of the risk at the net's theta."""
        return self.net.gradient_norm(self.train)

    @property
    def accuracies(self) -> tuple[float, float]:
        """The accuracies on the training images and on the test images."""
        return tuple(
            float(np.mean((self.net.outputs(part.x)[:, 0] > 0) == (part.y.ravel() == FISH)))
            for part in (self.train, self.test)
        )  # pyright: ignore[reportReturnType]


def squared_distances(x: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray:
    """Compute squared Euclidean distances between images, after scaling their pixels to [-1, 1].

    Args:
      x: (n, ...) uint8 images.
      others: (m, ...) uint8 images.

    Returns: (m, n) float64 squared distances from `others` to `x`. Equal images have the distance
      0, because the sums of integers are exact.
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
    """Fit an SVM with a Gaussian kernel and a smooth hinge to its exact minimum.

    Args:
      distance: (n + m, n) squared distances to the training images. The first n rows are for the
        training images, the other m rows for the test images.
      y: (n,) labels 0 and 1 of the training images.
      y_test: (m,) labels of the test images.
      gamma: coefficient of the kernel exp(-gamma distance).
      t: temperature of the smooth hinge.
      weight_decay: lambda of lambda/2 |w|^2.

    Returns: Fitted. Its net has n weights.
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
    # We lower the temperature in stages. Minima of similar temperatures are close, so each stage
    # needs few Newton steps. Newton's method from zero at temperature t would need many.
    while True:
        net = SmoothHinge(n, warmth, weight_decay=weight_decay)
        net.theta = theta
        net.fit(train, gradient_tolerance=_TOLERANCE)
        if warmth <= t:
            return Fitted(net, train, test)
        theta, warmth = net.theta, max(warmth / _COOLING, t)


def deep_head(features: NDArray, y: NDArray, y_test: NDArray, *, weight_decay: float) -> Fitted:
    """Fit logistic regression on features to its minimum.

    Args:
      features: (n + m, f) features. The first n rows are for the training images, the other m rows
        for the test images.
      y: (n,) labels 0 and 1 of the training images.
      y_test: (m,) labels of the test images.
      weight_decay: lambda of lambda/2 |w|^2.

    Returns: Fitted. Its net has f weights.
    """
    train, test = Examples(features[: len(y)], y), Examples(features[len(y) :], y_test)
    net = BinaryLogisticRegression(features.shape[1], weight_decay=weight_decay)
    net.fit(train, gradient_tolerance=_TOLERANCE)
    return Fitted(net, train, test)
