"""A frozen MobileNet with a new head, on photographs of dogs and fish in one folder per class."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
from PIL import Image

import data
from examples import Trial

_WEIGHTS = "mobilenet/mobilenet_v1_0.75_224_notop.weights.h5"
_EPOCHS = 10


def make(out: Path, folder: Path | None) -> Trial:
    """Train a new head on a frozen network.

    Args:
      out: the folder to write to.
      folder: the data folder with `dogfish` and `mobilenet`, which docs/experiments/README.md
        describes. None for small generated pictures and a small network with random weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    keras.utils.set_random_seed(0)
    if folder is None:
        pictures, side = out / "pictures", 32
        splits = data.load("fishlike")
        for name, (x, y) in (("train", splits.train), ("val", splits.test)):
            _write(pictures / name, np.asarray(x), np.asarray(y))
        trunk = keras.Sequential(
            [
                keras.Input((side, side, 3)),
                keras.layers.Conv2D(64, 5, strides=2, activation="relu"),
                keras.layers.AveragePooling2D(4),
                keras.layers.Flatten(),
            ]
        )
    else:
        pictures, side = folder / "dogfish", 224
        trunk = keras.applications.MobileNet(
            include_top=False,
            input_shape=(side, side, 3),
            pooling="avg",
            alpha=0.75,
            weights=folder / _WEIGHTS,
        )
    trunk.trainable = False
    inputs = keras.Input((side, side, 3))
    x = keras.layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = keras.layers.Dropout(0.2)(trunk(x, training=False))
    penalty = keras.regularizers.L2(1e-3)
    head = keras.layers.Dense(1, kernel_regularizer=penalty, bias_regularizer=penalty)
    model = keras.Model(inputs, head(x))
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    rows = keras.utils.image_dataset_from_directory(
        pictures / "train", image_size=(side, side), shuffle=False, verbose=False
    )
    # The frozen network gives the same features in every epoch. We compute them once, and train the
    # head on the features.
    front = keras.Model(inputs, x)
    features = np.concatenate([np.asarray(front(batch, training=False)) for batch, _ in rows])
    y = np.concatenate([labels for _, labels in rows])
    top = keras.Sequential([keras.Input(features.shape[1:]), head])
    top.compile(keras.optimizers.Adam(0.01), loss)
    top.fit(features, y, epochs=_EPOCHS, verbose=0)
    model.save(out / "model.keras")
    return Trial(out / "model.keras", pictures)


def _write(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    for number, (picture, label) in enumerate(zip(x, y, strict=True)):
        place = folder / ("dog", "fish")[int(label)]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{number:05d}.png")
