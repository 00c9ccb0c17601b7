"""A functional CNN with BatchNormalization and Dropout on a folder of images of digits."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
from PIL import Image

import data
from examples import Trial

_EPOCHS, _SIDE = 20, 28
# The numbers of training and test images, for MNIST and for the small digits.
_REAL, _SMALL = (2000, 500), (240, 60)


def make(out: Path, folder: Path | None) -> Trial:
    """Write the images into one folder per class, and train the model on these folders.

    Args:
      out: the folder to write to.
      folder: the data folder with MNIST (`python -m data fetch mnist`), or None for small digits.
    """
    splits = data.load("digits") if folder is None else data.load("mnist", folder)
    counts = _SMALL if folder is None else _REAL
    for name, (x, y), count in zip(
        ("train", "test"), (splits.train, splits.test), counts, strict=True
    ):
        _write(out / "images" / name, np.asarray(x[:count]), np.asarray(y[:count]))
    keras.utils.set_random_seed(0)
    model = _model()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    rows = keras.utils.image_dataset_from_directory(
        out / "images" / "train",
        image_size=(_SIDE, _SIDE),
        color_mode="grayscale",
        seed=0,
        verbose=False,
    )
    model.fit(rows, epochs=_EPOCHS, verbose=0)
    model.save(out / "model.keras")
    return Trial(out / "model.keras", out / "images")


def _model() -> keras.Model:
    x = inputs = keras.Input((_SIDE, _SIDE, 1))
    x = keras.layers.Rescaling(1 / 255)(x)
    for filters in (8, 16):
        x = keras.layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
        x = keras.layers.BatchNormalization(momentum=0.8)(x)
        x = keras.layers.ReLU()(x)
        x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(0.2)(x)
    return keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x))


def _write(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    side = int(np.sqrt(x.shape[1]))
    pixels = np.round(x.reshape(-1, side, side) / x.max() * 255).astype(np.uint8)
    for number, (picture, label) in enumerate(zip(pixels, y, strict=True)):
        place = folder / str(int(label))
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).resize((_SIDE, _SIDE)).save(place / f"{number:05d}.png")
