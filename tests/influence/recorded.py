"""A softmax regression whose training is recorded, and the same training in NumPy."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from influence import Recorder

N, FEATURES, CLASSES = 40, 4, 3
RATE, MOMENTUM, PENALTY = 0.2, 0.5, 0.02


def rows(n=N, seed=0):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % CLASSES
    x = 1.2 * np.eye(FEATURES)[y] + 0.7 * rng.standard_normal((n, FEATURES))
    return x.astype(np.float32), y


@contextmanager
def double():
    """Give a context in which Keras adds the penalties to the loss in float64."""
    before = keras.config.floatx()
    keras.config.set_floatx("float64")
    try:
        yield
    finally:
        keras.config.set_floatx(before)


def model(optimizer=None, dtype="float64"):
    """Return the compiled model. Every call returns the same initial weights."""
    keras.utils.set_random_seed(5)
    l2 = keras.regularizers.L2(PENALTY)
    with double():
        dense = keras.layers.Dense(CLASSES, kernel_regularizer=l2, dtype=dtype)
        found = keras.Sequential([keras.Input((FEATURES,), dtype=dtype), dense])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype=dtype)
        found.compile(optimizer or keras.optimizers.SGD(RATE, momentum=MOMENTUM), loss)
    return found


def train(folder, epochs=4, batch_size=N, found=None, **options):
    """Train the model with a Recorder. Return the model."""
    found = model() if found is None else found
    x, y = rows()
    asked: dict[str, Any] = {"every": 1} | options
    recorder = Recorder(folder, (x, y), **asked)
    with double():
        found.fit(x, y, epochs=epochs, batch_size=batch_size, verbose=0, callbacks=[recorder])
    return found


def parts(theta):
    end = FEATURES * CLASSES
    return theta[:end].reshape(FEATURES, CLASSES), theta[end:]


def losses(theta, x, y):
    """Return the losses (n,) without the penalty."""
    kernel, bias = parts(theta)
    z = x @ kernel + bias
    return np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(y)), y]


def gradients(theta, x, y):
    """Return the gradients (n, d) without the penalty."""
    kernel, bias = parts(theta)
    z = np.exp(x @ kernel + bias)
    slope = z / z.sum(axis=1, keepdims=True) - np.eye(CLASSES)[y]
    return np.concatenate([(x[:, :, None] * slope[:, None]).reshape(len(x), -1), slope], axis=1)


def descend(theta, x, y, batches):
    """Return theta after Keras' SGD with momentum, one step for each entry of `batches`."""
    velocity = np.zeros_like(theta)
    l2 = np.append(np.full(FEATURES * CLASSES, 2 * PENALTY), np.zeros(CLASSES))
    for batch in batches:
        slope = gradients(theta, x[batch], y[batch]).mean(axis=0) + l2 * theta
        velocity = MOMENTUM * velocity - RATE * slope
        theta = theta + velocity
    return theta
