"""Tests of class labels: is their coding the same as in the model's training?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from influence.examples import labels as packing
from influence.examples.examples import Examples
from influence.net.losses import PerExampleLoss
from influence.net.net import GenericNeuralNet
from influence.preflight.report import Finding, Line
from influence.preflight.rows import Answers

_TITLE = "labels"
_ONE_BIT = (keras.losses.binary_crossentropy, keras.losses.binary_focal_crossentropy)
_LOG_LOSSES = (
    keras.losses.sparse_categorical_crossentropy,
    keras.losses.categorical_crossentropy,
    keras.losses.binary_crossentropy,
)
_ONE_NUMBER = (keras.losses.mean_squared_error, keras.losses.mean_absolute_error)
# A message lists at most this many classes.
_SHOWN = 10


@dataclass(frozen=True)
class Classes:
    """Labels `y` (n,) and predictions `predicted` (n,), as class numbers from 0."""

    y: NDArray
    predicted: NDArray
    num_classes: int


def in_range(net: GenericNeuralNet, examples: Examples) -> Line | None:
    """Return a failed line if a class number has no output in the model; else None."""
    some = examples.take([0])
    y, outputs = packing.labels(examples.y), net.outputs(some.x)
    if not isinstance(outputs, np.ndarray) or isinstance(y, Mapping):
        return None
    y, shape = np.asarray(y), outputs.shape[1:]
    if not _are_numbers(y, shape):
        return None
    y = y[y != net.loss.ignored] if net.loss.has_masses and net.loss.ignored is not None else y
    low, high, c = int(y.min()), int(y.max()), shape[-1]
    if 0 <= low and high < c:
        return None
    off_by_one = (low, high) == (1, c)
    return Finding(_TITLE, np.count_nonzero((y < 0) | (y >= c))).fail(
        f"Labels run from {low} to {high} against {c} outputs, which are classes 0 to {c - 1}"
        + (": they are off by one." if off_by_one else "."),
        "Subtract 1 from the labels." if off_by_one else "Number the classes from 0.",
    )


def plausible(net: GenericNeuralNet, train: Answers, test: Answers | None) -> Line:
    """Check the coding of labels that are in range, by comparing them with predicted classes."""
    classes = classes_of(net.loss, train)
    if classes is None:
        return Finding(_TITLE).ok("The labels are not classes; there is nothing to compare.")
    c = classes.num_classes
    # agreement[s] is the share of rows whose label plus s, modulo c, is the predicted class.
    agreement = {s: float(np.mean(classes.predicted == (classes.y + s) % c)) for s in (0, 1, -1)}
    shift = max(agreement, key=lambda s: agreement[s])
    accuracy, shifted = agreement[0], agreement[shift]
    predicted = f"{accuracy:.0%} of the rows' labels are the predicted class"
    if shifted > 0.5 and shifted > 2 * accuracy:
        how = "swapped" if c == 2 else f"off by one: with {shift:+d} added it is {shifted:.0%}"
        return Finding(_TITLE, accuracy).fail(
            f"Only {predicted}, and the labels look {how}.",
            "Compare the labels' coding with that of the training: a first class of 1 instead of "
            "0, or a 0 and 1 that mean the opposite.",
        )
    unseen = np.setdiff1d(np.arange(c), classes.y)
    if len(unseen):
        from_one = len(unseen) == 1 and unseen[0] == 0
        return Finding(_TITLE, len(unseen)).warn(
            f"No training row has class {', '.join(map(str, unseen[:_SHOWN]))} of the model's {c}"
            + (": labels that begin at 1 look off by one." if from_one else "."),
            "If the classes were counted from 1, subtract 1 and train a model with an output less; "
            "else nothing trains those outputs but the penalty: leave them out.",
        )
    like = packing.labels(train.examples.y)
    other = classes_of(net.loss, test, like) if test is not None else None
    if other is not None and len(new := np.setdiff1d(other.y, classes.y)):
        return Finding(_TITLE, len(new)).warn(
            f"Test rows have class {', '.join(map(str, new[:_SHOWN]))}, which no training row has.",
            "Compare the two sets' coding of the labels.",
        )
    guess, mean = float(np.log(c)), _mean_without_weights(train)
    if net.loss.keras_function in _LOG_LOSSES and mean > guess:
        return Finding(_TITLE, mean).warn(
            f"The mean training loss, {mean:.3g} nats, is above the {guess:.3g} of "
            f"guessing among {c} classes; {predicted}.",
            "Check that these are the weights that were trained, and that the inputs are scaled "
            "and the labels coded as they were then.",
        )
    return Finding(_TITLE, accuracy).ok(f"{predicted[0].upper()}{predicted[1:]}.")


def _mean_without_weights(answers: Answers) -> float:
    """Return the mean loss. With sample weights, it is the weighted mean of unweighted losses."""
    weights = packing.sample_weights(answers.examples.y)
    if not isinstance(weights, np.ndarray):
        return float(answers.losses.mean())
    return float(answers.losses.sum() / weights.sum())


def _are_numbers(y: NDArray, shape: tuple[int, ...]) -> bool:
    """Return True if y holds class numbers. `shape` is the shape of one row's outputs.

    Class numbers are integers in the shape of the outputs without their last axis, or with a last
    axis of length 1.
    """
    if not shape or shape[-1] < 2 or (y != np.round(y)).any():
        return False
    return y.shape[1:] == shape[:-1] or y.shape[1:] == (*shape[:-1], 1)


def classes_of(loss: PerExampleLoss, answers: Answers, like: Any = None) -> Classes | None:
    """Return labels and predictions as class numbers, or None if they are not classes.

    `like` are plain labels that show how two classes are coded. None means the labels of `answers`.
    These do not suffice if all of them have the same class.
    """
    y, shape = packing.labels(answers.examples.y), answers.output_shape
    if isinstance(y, Mapping):
        return None
    y = np.asarray(y)
    numbers = _are_numbers(y, shape)
    one_hot = y.shape[1:] == shape and shape[-1:] > (1,) and _are_one_hot(y)
    if numbers or one_hot:
        labels = np.ravel(y if numbers else y.argmax(axis=-1)).astype(int)
        valid = labels != loss.ignored if loss.ignored is not None else np.ones(len(labels), bool)
        return Classes(labels[valid], np.ravel(answers.outputs)[valid], shape[-1])
    one_bit = y.size == len(y) and int(np.prod(shape)) == 1
    coded = y if like is None else np.asarray(like)
    threshold = threshold_of(loss, coded) if one_bit else None
    if threshold is None:
        return None
    larger = np.ravel(y > (coded.min() + coded.max()) / 2)
    return Classes(larger, np.ravel(answers.outputs) > threshold, 2)


def _are_one_hot(y: NDArray) -> bool:
    return bool(((y == 0) | (y == 1)).all() and (y.sum(axis=-1) == 1).all())


def threshold_of(loss: PerExampleLoss, y: NDArray) -> float | None:
    """Return the output above which a model predicts the larger of two labels; None if unknown."""
    values = set(np.unique(y[: 1 << 16]).tolist())
    if len(values) != 2:
        return None
    if values == {-1, 1}:
        return 0.0
    if values != {0, 1}:
        return None
    if loss.keras_function in _ONE_BIT:
        return 0.0 if loss.from_logits and loss.head is None else 0.5
    return 0.5 if loss.keras_function in _ONE_NUMBER else None
