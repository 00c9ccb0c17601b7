"""Small models and data like those of users, with closed-form answers."""

from __future__ import annotations

from types import SimpleNamespace

import keras
import numpy as np
import pytest

from tests import oracles

PENALTY = 0.05


def softmax_model(theta=None, dtype="float32", penalty=PENALTY):
    """Return a compiled softmax regression of 4 inputs and 3 classes, with an L2 penalty."""
    l2 = keras.regularizers.L2(penalty / 2)
    dense = keras.layers.Dense(3, kernel_regularizer=l2, bias_regularizer=l2, dtype=dtype)
    model = keras.Sequential([keras.Input((4,), dtype=dtype), dense])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    if theta is not None:
        theta = np.asarray(theta)
        model.set_weights([theta[:12].reshape(4, 3), theta[12:]])
    return model


@pytest.fixture(scope="session")
def problem():
    """Return three classes of points with one wrong label, and a softmax model at its minimum."""
    rng = np.random.default_rng(0)
    y = np.arange(57) % 3
    x = np.concatenate([np.eye(3)[y], np.zeros((57, 1))], axis=1) * 1.5
    x = (x + 0.8 * rng.standard_normal((57, 4))).astype(np.float32)
    labels = y.copy()
    labels[7] = (y[7] + 1) % 3
    train, test = slice(0, 45), slice(45, None)
    risk = oracles.softmax_regression(
        oracles.with_ones(x[train].astype(float)), labels[train], 3, PENALTY
    )
    theta = risk.minimum(np.zeros(15))
    return SimpleNamespace(
        train=(x[train], labels[train]),
        test=(x[test], y[test]),
        true=y[train],
        risk=risk,
        measured=risk.on(oracles.with_ones(x[test].astype(float)), y[test]),
        theta=theta,
        model=softmax_model(theta),
    )
