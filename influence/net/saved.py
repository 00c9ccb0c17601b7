"""Functions that load a model, or weights for a given model, from a file that Keras saved."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import h5py
import keras

# A message shows at most this many characters of Keras' own message.
_SHOWN = 160
_ENDINGS = (".keras", ".h5", ".hdf5")


def is_saved(value: object) -> bool:
    """Return True for a path that exists or ends in .keras, .h5 or .hdf5."""
    if not isinstance(value, str | os.PathLike):
        return False
    path = Path(value)
    return path.suffix in _ENDINGS or path.exists()


def load_model(
    path: str | os.PathLike, model: keras.Model | None = None, *, compiled: bool = True
) -> keras.Model:
    """Load a model that Keras saved, or load saved weights into a given model.

    Python code in a file, such as the code of a Lambda layer, is never run.

    Args:
      path: a `.keras` or `.h5` file of a whole model. If `model` is given, the file may also be a
        `.weights.h5` file.
      model: a built model of the same architecture. It gets the weights in the file. None means to
        load a whole model.
      compiled: True to load the compiled loss too.

    Raises: FileNotFoundError for a missing file. TypeError or ValueError for another kind of file,
      or for a model that Keras cannot rebuild.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be the path of a saved model, got {type(path).__name__}.")
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(
            f"path must be a file of a saved model, got {file}, which is not there."
        )
    if file.is_dir():
        raise ValueError(
            f"path must be a file .keras, .h5 or .weights.h5, got the folder {file}; an exported "
            "SavedModel has no layers, so save the model by model.save('model.keras')."
        )
    only_weights = file.name.endswith(".weights.h5")
    if file.suffix not in _ENDINGS:
        raise ValueError(f"path must end in .keras, .h5 or .weights.h5, got {file.name!r}.")
    if model is None and only_weights:
        raise ValueError(
            f"model must be given for a file of weights, got None for {file.name!r}; build the "
            "model and pass model=."
        )
    try:
        if model is None:
            model = _loaded(file, compiled)
            _check_loss(model)
            return model
        model.load_weights(file)
    except Exception as error:  # Keras raises errors of many types
        reason = " ".join(str(error).split())
        if reason.startswith("Keras saves"):
            remedy = "pass its loss"
        elif "ambda" in reason and "unsafe" in reason:
            remedy = "it contains a Lambda, whose Python code is not run; load it by keras.saving."
            remedy += "load_model(path, safe_mode=False) if you trust it, and give the model"
        elif model is None:
            remedy = "register own classes by keras.saving.register_keras_serializable, or load the"
            remedy += " model by keras.saving.load_model and give it"
        else:
            remedy = "the model must have the layers of the file"
        raise ValueError(
            f"path must hold a model that Keras can load, got {file.name!r}; {remedy} "
            f"({type(error).__name__}: {reason[:_SHOWN]})."
        ) from error
    return model


def _loaded(file: Path, compiled: bool) -> keras.Model:
    with warnings.catch_warnings():
        # Keras warns if it cannot load the optimiser's state. The net does not need this state.
        warnings.filterwarnings("ignore", "Skipping variable loading for optimizer")
        if file.suffix == ".keras":
            return keras.saving.load_model(file, compile=compiled, safe_mode=True)
        # When Keras 3 loads this old format, it cannot compile some losses, such as "mse". The
        # model is therefore compiled below, from the configuration in the file.
        model = keras.saving.load_model(file, compile=False, safe_mode=True)
    if compiled:
        with h5py.File(file) as opened:
            config = json.loads(opened.attrs.get("training_config", "{}"))
        if config.get("loss") is not None:
            model.compile(loss=_loss(config["loss"]), loss_weights=config.get("loss_weights"))
    return model


def _check_loss(model: keras.Model) -> None:
    """Refuse Huber as a compiled loss, because Keras saves it without its delta."""
    if any(type(part) is keras.losses.Huber for part in keras.tree.flatten(model.loss)):
        raise ValueError("Keras saves Huber without its delta; pass loss=keras.losses.Huber(delta)")


def _loss(config: Any) -> Any:
    """Return the losses that a configuration describes by names or dicts."""
    if isinstance(config, list):
        return [_loss(part) for part in config]
    if isinstance(config, dict) and "class_name" not in config:
        return {name: _loss(part) for name, part in config.items()}
    return config if config is None else keras.losses.get(config)
