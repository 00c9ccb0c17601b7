"""Checks of Keras models and inputs. Each error says why a model or an input is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import keras
import numpy as np
import tensorflow as tf
from keras.layers import InputLayer

from influence.examples.arrays import CHECK_ROWS
from influence.net import ops
from influence.net.inputs import aliases, declared, fits, for_call, named

# A message names at most this many layers.
_SHOWN = 5


def check_model(model: keras.Model, weights: Sequence[Any]) -> None:
    """Refuse a model whose risk would differ from what its user expects.

    Args:
      model: the model, without its frozen trunk.
      weights: the weights that form theta.

    Raises: TypeError for weights of several dtypes, or of a dtype other than float32 and float64.
      ValueError for a model that has one of Keras' activity regularisers, or computes in a dtype
      other than that of its weights. ValueError for float64 weights and an input of lower
      precision.
    """
    dtypes = sorted({str(weight.dtype) for weight in weights})
    if len(dtypes) > 1:
        raise TypeError(f"model must have trainable weights of one dtype, got {', '.join(dtypes)}.")
    if dtypes[0] not in ("float32", "float64"):
        raise TypeError(f"model must have float32 or float64 weights, got {dtypes[0]}.")
    for layer in model._flatten_layers():
        regulariser = getattr(layer, "activity_regularizer", None)
        if type(regulariser).__module__.split(".")[0] == "keras":
            raise ValueError(
                f"model must have no activity regulariser, got one on layer {layer.name!r}: Keras "
                "adds its sum over the batch, so the risk would depend on the batch's size; add a "
                "mean over rows by self.add_loss instead, or put it into the loss."
            )
        computes = str(layer.compute_dtype)
        # Sequential and functional models only pass tensors on to their layers, so their own dtype
        # has no effect.
        containers = InputLayer | keras.Sequential
        passes_on = isinstance(layer, containers) or not layer._convert_input_args
        if not passes_on and "float" in computes and computes != dtypes[0]:
            raise ValueError(
                f"model must compute in the dtype of its weights, {dtypes[0]}, got {computes} in "
                f"layer {layer.name!r}, whose rounding the derivatives would inherit; "
                f"GenericNeuralNet(model, dtype={dtypes[0]!r}) makes a copy without it."
            )
    for tensor in getattr(model, "inputs", None) or []:
        if dtypes == ["float64"] and str(tensor.dtype) in ("float32", "float16", "bfloat16"):
            raise ValueError(
                f"model must not round its input, got float64 weights behind the {tensor.dtype} "
                f"input {tensor.name!r}; use keras.Input(..., dtype='float64')."
            )


def check_built(model: Any, trainable: bool = True) -> None:
    """Refuse anything except a built Keras model.

    If `trainable` is True, a model without a trainable weight is refused too.

    Raises: TypeError or ValueError naming the model.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {type(model).__name__}.")
    if not model.built:
        raise ValueError(
            f"model must be built, got the unbuilt {model.name!r}; call it on a batch first."
        )
    if trainable and not model.trainable_weights:
        raise ValueError(
            f"model must have a trainable weight, got none in {model.name!r}; "
            "set trainable = True on the layers that theta should hold."
        )


def check_weights(model: keras.Model) -> None:
    """Refuse a model with weights that are NaN or infinite.

    Raises: ValueError naming the layers.
    """
    bad = {w.path.split("/")[-2:][0]: None for w in model.weights if not _finite(w.numpy())}
    if bad:
        layers = ", ".join(map(repr, list(bad)[:_SHOWN]))
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise ValueError(
            f"model must have finite weights, got NaN or infinity in layer {layers}{more}; train "
            "again, with a smaller learning rate if training diverged."
        )


def _finite(weight: Any) -> bool:
    return weight.dtype.kind != "f" or bool(np.isfinite(weight).all())


def check_inputs(model: keras.Model, x: Any, name: str) -> None:
    """Refuse inputs whose names or shapes a functional or sequential model does not declare.

    Raises: ValueError naming `name`, the expected shape and the given shape.
    """
    wanted = declared(model)
    if not wanted:
        return
    x = named(model, x)
    if isinstance(x, dict):
        if set(x) != set(wanted):
            raise ValueError(
                f"{name}.x must have the model's inputs {sorted(wanted)}, got {sorted(x, key=str)}."
            )
        pairs = [(f"{name}.x[{key!r}]", x[key], wanted[key]) for key in wanted]
    elif len(wanted) == 1:
        pairs = [(f"{name}.x", x, *wanted.values())]
    else:
        raise ValueError(
            f"{name}.x must be a dict with the model's inputs {sorted(wanted)}, got one array."
        )
    for label, part, tensor in pairs:
        want, got = tuple(tensor.shape[1:]), tuple(part.shape[1:])
        if not fits(got, want):
            raise ValueError(
                f"{label} must have rows of shape {want} for model {model.name!r}, got {got}."
            )


def check_output(model: keras.Model, x: Any, name: str) -> Any:
    """Return the model's output for a few rows x, in inference mode and without side effects.

    Raises: ValueError naming `name` if the model cannot take x. ValueError if the model does not
      return a tensor or a flat list or dict of tensors.
    """
    try:
        with keras.StatelessScope(collect_losses=True), ops.exact():
            output = model(for_call(model, x), training=False)
    except (TypeError, ValueError, tf.errors.OpError) as error:
        parts = x if isinstance(x, dict) else {"x": x}
        got = ", ".join(f"{key}: {part.dtype.name} {part.shape}" for key, part in parts.items())
        raise ValueError(f"{name}.x does not fit the model {model.name!r}, got {got}.") from error
    several = list(output.values()) if isinstance(output, dict) else output
    tensors = list(several) if isinstance(several, list | tuple) else [several]
    if not tensors or not all(tf.is_tensor(tensor) for tensor in tensors):
        kinds = ", ".join(sorted({type(tensor).__name__ for tensor in tensors}))
        raise ValueError(
            f"model must return a tensor, or a list or dict of tensors, got a "
            f"{type(output).__name__} of {kinds or 'nothing'} from {model.name!r}."
        )
    return output


def check_no_mask(model: keras.Model, outputs: list[Any]) -> None:
    """Refuse outputs with a mask that was not known before the model ran.

    Raises: ValueError naming the model.
    """
    if any(getattr(tensor, "_keras_mask", None) is not None for tensor in outputs):
        raise ValueError(
            f"model must not mask its output, got a mask from {model.name!r} that was found only "
            "when it ran; give its inputs known shapes, or end in a layer that consumes the mask, "
            "such as pooling."
        )


def check_no_masses(net: Any, what: str) -> None:
    """Refuse a loss that masks positions, for a method that does not use the masses of rows.

    Raises: ValueError naming the method `what`.
    """
    if net.loss.has_masses:
        raise ValueError(
            f"net must not mask positions or ignore a class for {what}, got {net.loss.name!r}; "
            "leave_one_out and Influence.scores take such a net."
        )


# For each set of examples, the pairs (input, input_dim) whose embedding ids have been checked. No
# check is repeated.
_PASSED: WeakKeyDictionary[Any, set] = WeakKeyDictionary()


@contextmanager
def watched_ids(model: keras.Model, x: Any, examples: Any, name: str) -> Iterator[Any]:
    """Check the ids of all rows for every Embedding layer that runs inside the `with` block.

    Inside the block, the caller runs the model on the yielded x, a few rows. The ids in an input
    are checked for all rows if an Embedding layer receives this input unchanged. Ids that the model
    computes are not checked.

    `examples` contains all rows. It is read once for each layer. Messages call it `name`.

    Yields: the few rows x, a tensor or a dict of tensors, in the dtypes that the model declares.
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
        finally:  # if a bad id among the few rows made the model fail, the check names this id
            for layer, inputs in uses:
                for key, tensor in x.items() if isinstance(x, dict) else [(None, x)]:
                    if inputs is tensor:
                        _check(layer, examples, key, name, aliases(model))


def _as_declared(model: keras.Model, x: Any) -> Any:
    """Cast inputs x to the dtypes that the model declares.

    Without this, the model would cast x. Its Embedding layers would then receive other tensors than
    those in x, and `watched_ids` would not recognise them.
    """
    wanted = declared(model)
    if isinstance(x, dict):
        return {k: tf.cast(v, wanted[k].dtype) if k in wanted else v for k, v in x.items()}
    if len(wanted) != 1:
        return x
    (tensor,) = wanted.values()
    return tf.cast(x, tensor.dtype)


def _check(layer: keras.layers.Embedding, examples: Any, key: Any, name: str, other: dict) -> None:
    passed = _PASSED.setdefault(examples, set())
    if (key, layer.input_dim) in passed:
        return
    label = f"{name}.x" if key is None else f"{name}.x[{key!r}]"
    first = 0
    for found, count in examples.map_over(
        partial(_outside, key, other, layer.input_dim), None, batch_size=CHECK_ROWS
    ):
        if found is not None:
            row, value = found
            raise ValueError(
                f"{label} must hold ids 0 to {layer.input_dim - 1} for layer {layer.name!r} "
                f"(input_dim={layer.input_dim}), got {value} in row {first + row}."
            )
        first += count
    passed.add((key, layer.input_dim))


def _outside(
    key: Any, other: dict, input_dim: int, net: Any, theta: Any, x: Any, y: Any
) -> tuple[Any, int]:
    """Return (first, n). n is the number of rows of a batch.

    `first` is (row, id) for the first id that is not from 0 to input_dim - 1. It is None if all ids
    of the batch are valid.
    """
    if key is None:
        ids = x
    else:  # x may use other names for the inputs
        ids = next(part for given, part in x.items() if other.get(given, given) == key)
    outside = (ids <= -1) | (ids >= input_dim)  # Keras truncates -0.5 to 0
    where = tuple(np.argwhere(outside)[0]) if outside.any() else None
    return None if where is None else (where[0], ids[where]), len(y)
