"""A model's predictions for rows: losses, labels, predicted labels and probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from influence.examples import labels as packing
from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet
from influence.preflight.labels import classes_of
from influence.preflight.rows import Answers, one_array

_CROSS_ENTROPIES = (
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.binary_crossentropy,
    keras.losses.binary_focal_crossentropy,
)


@dataclass(frozen=True, eq=False)
class Predictions:
    """A net's predictions for n rows.

    Attributes:
      losses: (n,) the loss of each row, without the penalty.
      given: (n,) labels: class numbers, or the numbers of a regression. None for other labels.
      predicted: (n,) predicted class numbers, or predicted numbers. None if `given` is None.
      num_classes: the number of classes; 0 if the labels are not classes.
      probabilities: (n, num_classes) class probabilities, or None if they are unknown.
    """

    losses: NDArray
    given: NDArray | None
    predicted: NDArray | None
    num_classes: int = 0
    probabilities: NDArray | None = None

    @classmethod
    def of(
        cls,
        net: GenericNeuralNet,
        examples: Examples,
        batch_size: int | None = None,
        like: Examples | None = None,
    ) -> Predictions:
        """Compute a net's predictions for all rows, in one pass over the data.

        Args:
          net: the net.
          examples: the rows.
          batch_size: number of rows in memory at a time. If None, the library chooses it.
          like: rows whose labels show the coding of two classes: 0 and 1, or -1 and 1. They are
            needed if `examples` may lack one of the classes. If None, `examples` is used.
        """
        parts = list(
            examples.map_over(_losses_and_outputs, net, batch_size=batch_size, what="predictions")
        )
        losses = np.concatenate([part[0] for part in parts])
        raw = parts[0][1]
        outputs = np.concatenate([one_array(part[1]) for part in parts])
        if not isinstance(raw, np.ndarray):
            return cls(losses, None, None)
        return cls._read(net, examples, losses, outputs, examples if like is None else like)

    @classmethod
    def _read(
        cls,
        net: GenericNeuralNet,
        examples: Examples,
        losses: NDArray,
        outputs: NDArray,
        like: Examples,
    ) -> Predictions:
        shape = outputs.shape[1:]
        several = bool(shape) and shape[-1] > 1
        chosen = outputs.argmax(axis=-1) if several else outputs
        answers = Answers(examples, None, losses, chosen, shape)
        classes = classes_of(net.loss, answers, packing.labels(like.y))  # type: ignore[arg-type]
        y = packing.labels(examples.y)
        n = len(losses)
        if classes is None or len(classes.y) != n:
            if isinstance(y, np.ndarray) and y.size == n and outputs.size == n:
                return cls(losses, np.ravel(y).astype(float), np.ravel(outputs).astype(float))
            return cls(losses, None, None)
        given, predicted = (np.asarray(part).astype(int) for part in (classes.y, classes.predicted))
        found = _probabilities(net, outputs.reshape(n, -1))
        if found is not None and found.shape[1] == 1:
            found = np.concatenate([1 - found, found], axis=1)
        return cls(losses, given, predicted, classes.num_classes, found)

    @property
    def of_classes(self) -> bool:
        """True if the labels are classes."""
        return self.num_classes > 0

    @property
    def confidence(self) -> NDArray | None:
        """(n,) probability of the predicted class of each row; None without probabilities."""
        if self.probabilities is None or self.predicted is None:
            return None
        return self.probabilities[np.arange(len(self.losses)), self.predicted]

    @property
    def accuracy(self) -> float | None:
        """Share of rows whose predicted class equals the label; None if labels are not classes."""
        if not self.of_classes:
            return None
        return float(np.mean(self.given == self.predicted))

    def most_wrong(self, count: int) -> tuple[NDArray[np.int64], int]:
        """Return the `count` most confident mistakes, and the number of all mistakes.

        If the labels are classes, a mistake is a row whose predicted class differs from its label.
        The mistake with the most probable prediction is first. If there are fewer than `count`
        mistakes, the other rows with the largest losses follow. If the labels are not classes, the
        rows with the largest losses are returned, and the number 0.
        """
        by_loss = np.argsort(-self.losses, kind="stable")
        if not self.of_classes:
            return by_loss[:count], 0
        wrong = np.flatnonzero(self.given != self.predicted)
        sure = self.confidence if self.confidence is not None else self.losses
        first = wrong[np.argsort(-sure[wrong], kind="stable")]
        rest = by_loss[~np.isin(by_loss, first)]
        return np.concatenate([first, rest])[:count], len(wrong)


def _losses_and_outputs(net: Any, theta: NDArray | None, x: Any, y: NDArray) -> tuple[NDArray, Any]:
    """Return losses and outputs of a batch, as a question of `Examples.map_over`."""
    at = net.at(theta)
    return at.losses(x, y), at.outputs(x)


def _probabilities(net: GenericNeuralNet, outputs: NDArray) -> NDArray | None:
    """Return probabilities (n, c), or None if outputs are neither probabilities nor logits."""
    loss = net.loss
    if net.ending.heads[0] is not None:
        return outputs
    if getattr(loss, "keras_function", None) not in _CROSS_ENTROPIES:
        return None
    if not loss.from_logits:
        return outputs
    z = outputs.astype(np.float64)
    if z.shape[1] == 1:
        return 1 / (1 + np.exp(-z))
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return z / z.sum(axis=1, keepdims=True)
