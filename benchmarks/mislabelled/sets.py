"""The data sets with planted wrong labels, and the networks that are trained on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import keras
import numpy as np
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.model_selection import cross_val_predict

import data

layers = keras.layers
_WORDS, _LENGTH = 5000, 60
# The seed of the wrong labels, and of the order of the mails and of the rows of the diabetes table.
_SEED = 0


@dataclass(frozen=True)
class Set:
    """A data set and a network.

    Attributes:
      read: function (data folder) -> (x, y, x_test, y_test).
      build: function (shape of a row, number of classes) -> a compiled model that returns logits.
      epochs: number of epochs of the training, with batches of 32 rows.
      about: a description of the network.
    """

    read: Callable[[Path | None], tuple[NDArray, ...]]
    build: Callable[[tuple[int, ...], int], keras.Model]
    epochs: int
    about: str


def planted(y: NDArray, x: NDArray, share: float, kind: str) -> tuple[NDArray, NDArray]:
    """Make some labels wrong.

    Args:
      y: (n,) the right labels.
      x: (n, ...) the inputs.
      share: the share of labels that become wrong.
      kind: "uniform" or "confusable". A uniform wrong label is any other class. A confusable wrong
        label is the likeliest other class of the row, by linear discriminant analysis of the inputs
        that was fitted without the row.
    Returns: the labels (n,) int, and a mask of the wrong ones (n,) bool.
    """
    rng = np.random.default_rng(_SEED)
    n, c = len(y), int(y.max()) + 1
    rows = rng.permutation(n)[: round(share * n)]
    noisy = y.copy()
    if kind == "uniform":
        noisy[rows] = (y[rows] + rng.integers(1, c, len(rows))) % c
    else:
        p = _likely(x.reshape(n, -1).tobytes(), x.reshape(n, -1).shape, y.tobytes())
        other = p.copy()
        other[np.arange(n), y] = -np.inf
        noisy[rows] = other[rows].argmax(axis=1)
    return noisy, noisy != y


@cache
def _likely(x: bytes, shape: tuple[int, int], y: bytes) -> NDArray:
    flat = np.frombuffer(x, np.float32).reshape(shape)
    rule = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1)
    return cross_val_predict(
        rule, flat, np.frombuffer(y, np.int64), cv=5, method="decision_function"
    )


# --- data ---------------------------------------------------------------------------------------


def _digits(root: Path | None) -> tuple[NDArray, ...]:
    splits = data.load("digits", dtype="float32")
    (x, y), (x_test, y_test) = splits.train, splits.test
    return _images(x, 8), _labels(y), _images(x_test, 8), _labels(y_test)


def _mnist(root: Path | None) -> tuple[NDArray, ...]:
    splits = data.load("mnist", root, dtype="float32")
    (x, y), (x_test, y_test) = splits.train, splits.test
    return (
        _images(x[:2000], 28),
        _labels(y[:2000]),
        _images(x_test[:1000], 28),
        _labels(y_test[:1000]),
    )


def _diabetes(root: Path | None) -> tuple[NDArray, ...]:
    splits = data.load("diabetes", root, dtype="float32")
    (x, y), (x_test, y_test) = splits.train, splits.test
    rng = np.random.default_rng(_SEED)
    some, other = rng.permutation(len(y))[:4000], rng.permutation(len(y_test))[:1000]
    x, x_test = np.asarray(x)[some], np.asarray(x_test)[other]
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    found = (x - mean) / scale, _labels(y[some]), (x_test - mean) / scale, _labels(y_test[other])
    return tuple(np.clip(part, -5, 5) if part.ndim > 1 else part for part in found)


@cache
def _mails(root: Path | None) -> tuple[NDArray, ...]:
    """Return the mails as numbers of their first words, and labels: 1 for spam.

    The number 0 means no word, and 1 a rare word.
    """
    from data.archive import read_tar
    from data.enron1 import _FILE

    folder = data.find("enron1", root)
    if folder is None:
        raise FileNotFoundError(
            "enron1 must be in the data folder, got none; see docs/experiments/README.md."
        )
    files = read_tar(folder / _FILE.path, _FILE.size)
    names = [name for name in sorted(files) if name.startswith(("ham/", "spam/"))]
    names = [names[k] for k in np.random.RandomState(_SEED).permutation(len(names))[:3000]]
    texts = [files[name].decode("latin-1").lower().split() for name in names]
    counts: dict[str, int] = {}
    for text in texts[:2000]:
        for word in text:
            counts[word] = counts.get(word, 0) + 1
    usual = sorted(counts, key=lambda word: (-counts[word], word))[: _WORDS - 2]
    number = {word: k + 2 for k, word in enumerate(usual)}
    x = np.zeros((len(names), _LENGTH), np.int32)
    for row, text in zip(x, texts, strict=True):
        some = [number.get(word, 1) for word in text[:_LENGTH]]
        row[: len(some)] = some
    y = np.array([name.startswith("spam/") for name in names], np.int64)
    return x[:2000], y[:2000], x[2000:], y[2000:]


@cache
def _dogfish(root: Path | None) -> tuple[NDArray, ...]:
    """Return the features of a frozen MobileNet, which was not trained on these labels."""
    splits = data.load("dogfish", root)
    path = data.weights("mobilenet", root)
    trunk = keras.applications.MobileNet(
        include_top=False, input_shape=(224, 224, 3), pooling="avg", alpha=0.75, weights=path
    )
    found = []
    for x, y in (splits.train, splits.test):
        features = [
            trunk(_resized(x[k : k + 64]), training=False).numpy() for k in range(0, len(y), 64)
        ]
        found += [np.concatenate(features), _labels(y)]
    return tuple(found)


def _resized(x: NDArray) -> NDArray:
    x = np.asarray(x, np.float32) / 127.5 - 1
    return x if x.shape[1] == 224 else np.asarray(keras.ops.image.resize(x, (224, 224)))


def _images(x: NDArray, side: int) -> NDArray:
    x = np.asarray(x, np.float32).reshape(-1, side, side, 1)
    return x / x.max()


def _labels(y: NDArray) -> NDArray:
    return np.asarray(y).astype(np.int64)


# --- networks -----------------------------------------------------------------------------------


def _compiled(stack: list, classes: int, rate: float) -> keras.Model:
    """Return a compiled model whose output is one logit per class, or one for two classes."""
    loss: keras.losses.Loss = keras.losses.BinaryCrossentropy(from_logits=True)
    if classes > 2:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = keras.Sequential([*stack, layers.Dense(1 if classes == 2 else classes)])
    model.compile(keras.optimizers.Adam(rate), loss)
    return model


def _cnn(shape: tuple[int, ...], classes: int) -> keras.Model:
    stack = [keras.Input(shape)]
    for filters, stride in ((16, 1 if shape[0] < 20 else 2), (32, 2)):
        stack += [layers.Conv2D(filters, 3, strides=stride), layers.BatchNormalization()]
        stack += [layers.ReLU()]
    stack += [layers.Flatten(), layers.Dropout(0.3), layers.Dense(64, activation="relu")]
    return _compiled([*stack, layers.Dropout(0.3)], classes, 2e-3)


def _pooling(shape: tuple[int, ...], classes: int) -> keras.Model:
    stack = [keras.Input(shape, dtype="int32"), layers.Embedding(_WORDS, 32)]
    stack += [layers.GlobalAveragePooling1D(), layers.Dense(16, activation="relu")]
    return _compiled(stack, classes, 5e-3)


def _lstm(shape: tuple[int, ...], classes: int) -> keras.Model:
    stack = [keras.Input(shape, dtype="int32"), layers.Embedding(_WORDS, 32), layers.LSTM(32)]
    return _compiled(stack, classes, 5e-3)


def _dense(shape: tuple[int, ...], classes: int) -> keras.Model:
    stack = [keras.Input(shape), layers.Dense(32, activation="relu"), layers.Dropout(0.3)]
    return _compiled(stack, classes, 2e-3)


SETS = {
    "digits": Set(_digits, _cnn, 12, "CNN with BatchNorm and Dropout"),
    "mnist": Set(_mnist, _cnn, 8, "CNN with BatchNorm and Dropout"),
    "enron-pooling": Set(_mails, _pooling, 6, "Embedding, pooling, Dense"),
    "diabetes": Set(_diabetes, _dense, 6, "Dense, Dropout, Dense"),
    "dogfish": Set(_dogfish, _dense, 8, "Dense, Dropout, Dense on MobileNet's features"),
    "enron-lstm": Set(_mails, _lstm, 6, "Embedding, LSTM"),
}
