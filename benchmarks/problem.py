"""The problem of the time measurements: the paper's logistic regression, fitted to the data."""

from dataclasses import dataclass
from pathlib import Path

import keras
from numpy.typing import NDArray

import data
from influence import Examples, GenericNeuralNet, MulticlassLogisticRegression

WEIGHT_DECAY = 0.01
DTYPES = ("float32", "float64")
_GRADIENT_TOLERANCE = 1e-8


@dataclass(frozen=True, eq=False)
class Problem:
    """Ten-class logistic regression at its minimum, and its data in both precisions.

    Attributes:
      name, stand_in, sha256: the fields of the data set's `Splits`.
      train, test: the training rows and the test points, as Examples, by dtype.
      theta: (d,) float64, the parameters at the minimum.
    """

    name: str
    stand_in: bool
    sha256: str
    train: dict[str, Examples]
    test: dict[str, Examples]
    theta: NDArray

    @property
    def shape(self) -> tuple[int, int, int]:
        """The numbers of rows n, features f and classes c."""
        n, f = self.train["float64"].x.shape
        return n, f, len(self.theta) // f

    def closed_form(self, dtype: str) -> MulticlassLogisticRegression:
        """Make the net whose derivatives have closed forms, at theta."""
        _, f, c = self.shape
        net = MulticlassLogisticRegression(f, c, weight_decay=WEIGHT_DECAY, dtype=dtype)
        net.theta = self.theta
        return net

    def tape(self, dtype: str) -> GenericNeuralNet:
        """Make a net of the same Keras model that uses only automatic differentiation."""
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
        return GenericNeuralNet(self.closed_form(dtype).model, loss)


def load(name: str, data_dir: Path | None = None) -> Problem:
    """Load a data set in both precisions and fit the model in float64.

    Args:
      name: name of a data set of images and class numbers.
      data_dir: the folder to search first.
    """
    train, test = {}, {}
    for dtype in DTYPES:
        splits = data.load(name, data_dir, dtype=dtype)
        train[dtype], test[dtype] = Examples(*splits.train), Examples(*splits.test)
    num_classes = int(train["float64"].y.max()) + 1
    net = MulticlassLogisticRegression(
        train["float64"].x.shape[1], num_classes, weight_decay=WEIGHT_DECAY
    )
    net.fit(train["float64"], gradient_tolerance=_GRADIENT_TOLERANCE)
    return Problem(name, splits.stand_in, splits.sha256, train, test, net.theta)
