"""A small trunk and a head on it, with images and labels."""

from __future__ import annotations

import keras
import numpy as np

from influence import TopLayer

L = keras.layers
SIDE, F = 8, 5


def trunk(dtype="float64", pooled=False, seed=1):
    """Return a trunk with batch normalisation and dropout. Its output is (3, 3, 5) or (5,)."""
    init = lambda k: keras.initializers.RandomNormal(stddev=0.5, seed=seed + k)  # noqa: E731
    layers = [
        keras.Input((SIDE, SIDE, 3), dtype=dtype),
        L.Conv2D(4, 3, name="first", kernel_initializer=init(0), dtype=dtype),
        L.BatchNormalization(name="norm", dtype=dtype),
        L.Activation("tanh", dtype=dtype),
        L.Dropout(0.5, dtype=dtype),
        L.Conv2D(F, 3, strides=2, name="last", kernel_initializer=init(1), dtype=dtype),
        L.Activation("softplus", name="map", dtype=dtype),
    ]
    if pooled:
        layers += [L.Flatten(dtype=dtype), L.Dense(F, kernel_initializer=init(2), dtype=dtype)]
    model = keras.Sequential(layers, name="trunk")
    model.get_layer("norm").moving_mean.assign([0.1, -0.2, 0.3, 0.0])
    model.get_layer("norm").moving_variance.assign([0.5, 1.5, 1.0, 2.0])
    return model


MEAN, SCALE = np.linspace(0.5, 1.0, F), np.linspace(0.2, 0.6, F)


def problem(n=14, *, dtype="float64", pooled=False, standardised=True, weight_decay=0.05):
    rng = np.random.default_rng(0)
    images = rng.uniform(-0.9, 0.9, (n, SIDE, SIDE, 3)).astype(dtype)
    y = np.arange(n) % 2
    images[y == 1, :, :, 0] += 0.1
    options = {"mean": MEAN, "scale": SCALE} if standardised else {}
    net = TopLayer(trunk(dtype, pooled), weight_decay=weight_decay, **options)
    net.theta = rng.standard_normal(F)
    return net, images, y


def by_hand(net, images):
    """Return the features, computed directly by the Keras model."""
    out = net.trunk(images, training=False).numpy().astype(np.float64)
    return (out.mean(axis=(1, 2)) - MEAN) / SCALE
