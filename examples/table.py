"""A table of numbers and categories: Keras' preprocessing layers, and class weights."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pandas as pd

from examples import Trial

_NUMBERS = (
    "time_in_hospital", "num_lab_procedures", "num_medications", "number_inpatient",
    "number_diagnoses",
)  # fmt: skip
_CATEGORIES = ("race", "gender", "age", "A1Cresult", "insulin", "change", "diabetesMed")
_WEIGHTS = {"no": 1.0, "yes": 3.0}
_EPOCHS = 8
# The numbers of training and test rows, for the real table and for the made-up table.
_REAL, _SMALL = (5000, 1000), (300, 100)


def make(out: Path, folder: Path | None) -> Trial:
    """Write the training and test rows as two CSV files, and train the model.

    Args:
      out: the folder to write to.
      folder: the folder with `diabetes/diabetic_data.csv`, or None for a small made-up table.
    """
    out.mkdir(parents=True, exist_ok=True)
    if folder is None:
        frame, counts = _made_up(sum(_SMALL)), _SMALL
    else:
        path = folder / "diabetes" / "diabetic_data.csv"
        whole = pd.read_csv(path, low_memory=False, keep_default_na=False)
        frame, counts = whole.sample(sum(_REAL), random_state=0), _REAL
        frame["readmitted"] = np.where(frame["readmitted"] == "<30", "yes", "no")
    frame = frame[[*_NUMBERS, *_CATEGORIES, "readmitted"]]
    train, test = frame[: counts[0]], frame[counts[0] :]
    train.to_csv(out / "train.csv", index=False)
    test.to_csv(out / "test.csv", index=False)
    keras.utils.set_random_seed(0)
    model = _model(train)
    model.compile("adam", "binary_crossentropy")
    x = {name: train[name].to_numpy()[:, None] for name in (*_NUMBERS, *_CATEGORIES)}
    x = {name: part.astype(object if part.dtype == object else float) for name, part in x.items()}
    y = (train["readmitted"] == "yes").to_numpy().astype(int)
    tensors = {name: keras.ops.convert_to_tensor(part) for name, part in x.items()}
    by_number = {0: _WEIGHTS["no"], 1: _WEIGHTS["yes"]}
    model.fit(tensors, y, epochs=_EPOCHS, class_weight=by_number, verbose=0)
    model.save(out / "model.keras")
    weights = [f"{name}={weight:g}" for name, weight in _WEIGHTS.items()]
    options = ("--target", "readmitted", "--class-weight", *weights)
    return Trial(out / "model.keras", out / "train.csv", options, out / "test.csv")


def _model(train: pd.DataFrame) -> keras.Model:
    inputs, parts = {}, []
    for name in _NUMBERS:
        inputs[name] = keras.Input((1,), name=name)
        scaled = keras.layers.Normalization()
        scaled.adapt(train[name].to_numpy(float)[:, None])
        parts.append(scaled(inputs[name]))
    for name in _CATEGORIES:
        inputs[name] = keras.Input((1,), name=name, dtype="string")
        looked_up = keras.layers.StringLookup(output_mode="one_hot")
        looked_up.adapt(train[name].to_numpy(str))
        parts.append(looked_up(inputs[name]))
    x = keras.layers.Concatenate()(parts)
    x = keras.layers.Dense(16, activation="relu", kernel_regularizer="l2")(x)
    return keras.Model(inputs, keras.layers.Dense(1, activation="sigmoid")(x))


def _made_up(n: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    numbers = rng.poisson((4, 40, 15, 1, 7), (n, len(_NUMBERS)))
    frame = pd.DataFrame(numbers, columns=list(_NUMBERS))
    for k, name in enumerate(_CATEGORIES):
        frame[name] = rng.choice([f"{name} {letter}" for letter in "abcd"[: 2 + k % 3]], n)
    logit = 0.8 * frame["number_inpatient"] - 1.5 + (frame["insulin"] == "insulin b")
    frame["readmitted"] = np.where(logit + rng.logistic(size=n) > 0, "yes", "no")
    return frame
