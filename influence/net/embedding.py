"""Ids that an Embedding layer has no row for, named before TensorFlow stumbles over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import keras
import numpy as np
import tensorflow as tf

from influence.examples.arrays import CHECK_ROWS

_PASSED: WeakKeyDictionary[Any, set] = WeakKeyDictionary()  # what need not be read again


@contextmanager
def watched_ids(model: keras.Model, x: Any, examples: Any, name: str) -> Iterator[Any]:
    """Within, the model is to be called on a few rows; then all ids that it embeds are checked.

    An input counts as ids where an Embedding layer gets it as it is; what the model computes its
    ids from cannot be judged without running it.

    Args:
      model: a built Keras model.
      x: the few rows, a tensor or a dict of tensors.
      examples: all rows, read once for each layer.
      name: of the examples, for the message.

    Yields: x as the model converts it.
    Raises: ValueError naming the input, the id, its row, the layer and its input_dim.
    """
    x = _as_declared(model, x)
    uses, call = [], keras.layers.Embedding.call

    def recording(layer, inputs, *args, **kwargs):
        uses.append((layer, inputs))
        return call(layer, inputs, *args, **kwargs)

    with mock.patch.object(keras.layers.Embedding, "call", recording):
        try:
            yield x
        finally:  # also where such an id among the few rows made the model fail
            for layer, inputs in uses:
                for key, tensor in x.items() if isinstance(x, dict) else [(None, x)]:
                    if inputs is tensor:
                        _check(layer, examples, key, name)


def _as_declared(model: keras.Model, x: Any) -> Any:
    """In the dtypes of the model's inputs, so that Keras hands on these tensors, not copies."""
    declared = getattr(model, "inputs", None) or []
    if not isinstance(x, dict):
        return tf.cast(x, declared[0].dtype) if len(declared) == 1 else x
    try:
        structure = model.input
    except (AttributeError, ValueError):
        structure = None
    by_key = structure if isinstance(structure, dict) else {t.name: t for t in declared}
    return {k: tf.cast(v, by_key[k].dtype) if k in by_key else v for k, v in x.items()}


def _check(layer: keras.layers.Embedding, examples: Any, key: Any, name: str) -> None:
    passed = _PASSED.setdefault(examples, set())
    if (key, layer.input_dim) in passed:
        return
    first = 0
    for x, y in examples.batches(CHECK_ROWS):
        ids = x if key is None else x[key]
        outside = (ids <= -1) | (ids >= layer.input_dim)  # floats are cut off, not rounded
        if outside.any():
            where = tuple(np.argwhere(outside)[0])
            label = f"{name}.x" if key is None else f"{name}.x[{key!r}]"
            raise ValueError(
                f"{label} must hold ids 0 to {layer.input_dim - 1} for layer {layer.name!r} "
                f"(input_dim={layer.input_dim}), got {ids[where]} in row {first + where[0]}."
            )
        first += len(y)
    passed.add((key, layer.input_dim))
