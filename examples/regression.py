"""A regression: the progress of diabetes after one year, from ten numbers of a patient."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import sklearn.datasets

from examples import Trial

_TRAIN, _SMALL_TRAIN, _SMALL_TEST, _EPOCHS = 342, 120, 40, 60


def make(out: Path, folder: Path | None) -> Trial:
    """Write scikit-learn's table (Efron et al. 2004) as two CSV files, and train a small net.

    Args:
      out: the folder to write to.
      folder: None for 160 of the 442 rows, anything else for all rows. The rows come with
        scikit-learn, so nothing is read from the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    bunch = sklearn.datasets.load_diabetes(as_frame=True, scaled=False)
    frame = bunch.frame.sample(frac=1, random_state=0).rename(columns={"target": "progress"})
    train, test = frame[:_TRAIN], frame[_TRAIN:]
    if folder is None:
        train, test = frame[:_SMALL_TRAIN], frame[_TRAIN : _TRAIN + _SMALL_TEST]
    for name, part in (("train", train), ("test", test)):
        part.to_csv(out / f"{name}.csv", index=False)
    x = train.drop(columns="progress").to_numpy(np.float32)
    y = train["progress"].to_numpy(np.float32)
    keras.utils.set_random_seed(0)
    scaled = keras.layers.Normalization()
    scaled.adapt(x)
    model = keras.Sequential(
        [
            keras.Input((x.shape[1],)),
            scaled,
            keras.layers.Dense(8, activation="tanh", kernel_regularizer="l2"),
            keras.layers.Dense(1, bias_initializer=keras.initializers.Constant(float(y.mean()))),
        ]
    )
    model.compile(keras.optimizers.Adam(0.05), "mse")
    model.fit(x, y, epochs=_EPOCHS, verbose=0)
    model.save(out / "model.keras")
    options = ("--target", "progress")
    return Trial(out / "model.keras", out / "train.csv", options, out / "test.csv")
