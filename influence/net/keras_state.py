"""State of a running training in Keras: optimiser, learning rate, counts, seed and layers."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import keras
import numpy as np

# `mean_rate` averages a learning rate schedule over at most this many steps of an epoch.
_STEPS = 64


def optimizer_of(model: keras.Model) -> Any:
    """Return the model's optimiser, or None.

    In mixed precision, Keras wraps the optimiser. The optimiser inside the wrapper is returned.
    """
    optimizer: Any = getattr(model, "optimizer", None)
    return getattr(optimizer, "inner_optimizer", optimizer)


def optimizer_config(model: keras.Model) -> dict[str, Any]:
    """Return the configuration of the optimiser. Values that JSON cannot store become strings."""
    optimizer = optimizer_of(model)
    config = {} if optimizer is None else optimizer.get_config()
    return json.loads(json.dumps(config, default=str))


def iterations(model: keras.Model) -> int:
    """Return the number of steps that the optimiser has taken."""
    optimizer: Any = getattr(model, "optimizer", None)
    return 0 if optimizer is None else int(optimizer.iterations.numpy())


def learning_rate(model: keras.Model) -> float:
    """Return the current learning rate, or NaN if the model has no optimiser."""
    optimizer = optimizer_of(model)
    return np.nan if optimizer is None else _number(optimizer.learning_rate)


def mean_rate(model: keras.Model, first: int, steps: int) -> float | None:
    """Return the mean of the learning rate schedule over `steps` steps from step `first` on.

    The result is None if the optimiser has no schedule or `steps` is 0.
    """
    rate: Any = getattr(optimizer_of(model), "_learning_rate", None)
    if not isinstance(rate, keras.optimizers.schedules.LearningRateSchedule) or steps < 1:
        return None
    some = np.unique(np.linspace(first, first + steps - 1, _STEPS).astype(int))
    return float(np.mean([_number(rate(int(step))) for step in some]))


def rows_seen(model: keras.Model) -> int:
    """Return the number of rows that Keras has counted since it last reset its metrics.

    The metric of the mean loss counts the rows. Without this metric, the result is -1.
    """
    for metric in model.metrics:
        if metric.name == "loss" and hasattr(metric, "count"):
            return int(round(_number(metric.count)))
    return -1


def _number(value: Any) -> float:
    return float(keras.ops.convert_to_numpy(value))


def layers_digest(model: keras.Model) -> str:
    """Return a hash of a model's layers and weights, without their names and values.

    It depends on the layers' classes and activations, the weights' shapes, and which weights are
    trainable. Names are left out, because Keras may give other names in another process.
    """
    kinds = [
        (type(layer).__name__, getattr(getattr(layer, "activation", None), "__name__", ""))
        for layer in model._flatten_layers()
    ]
    trained = {id(weight) for weight in model.trainable_weights}
    shapes = [(tuple(weight.shape), id(weight) in trained) for weight in model.weights]
    return hashlib.sha256(repr((kinds, shapes)).encode()).hexdigest()


def seed() -> int | None:
    """Return the seed that keras.utils.set_random_seed got, or None if it was not called."""
    try:
        from keras.src.utils.rng_utils import get_random_seed
    except ImportError:
        return None
    return get_random_seed()
