"""Copies of Keras models in another floating dtype, with the same weights."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from influence.net.graph import is_functional, nodes_of, replayed
from influence.net.inputs import declared, for_call
from influence.net.preprocessing import compile_like

_FLOATS = ("float16", "bfloat16", "float32", "float64")
_HALF = ("float16", "bfloat16")
# The outputs of a copy may differ from the model's outputs by a relative amount. It depends on the
# dtypes in which layers of the model or the copy compute. The largest amount of these applies.
_AGREEMENT = {"float16": 0.05, "bfloat16": 0.2, "float32": 1e-3, "float64": 1e-3}
_PROBE_ROWS = 3


def computes_in_half(model: keras.Model, weights: Sequence[Any]) -> str | None:
    """Return the name of a mixed-precision model's dtype policy, or None for other models.

    A mixed-precision model stores the `weights` that form theta in float32. At least one of its
    layers computes in float16 or bfloat16.
    """
    if {str(weight.dtype) for weight in weights} != {"float32"}:
        return None
    for layer in model._flatten_layers():
        if str(layer.compute_dtype) in _HALF:
            return layer.dtype_policy.name
    return None


def recast(model: keras.Model, dtype: str) -> keras.Model:
    """Return a copy of a model that stores and computes all floating numbers in `dtype`.

    The copy has its own weights, with the values of the model's weights. It is compiled with the
    model's loss. Inputs and layers of integers or strings keep their dtypes.

    Args:
      model: a built model. A subclassed model needs a `get_config`.
      dtype: "float32" or "float64".

    Raises: ValueError if Keras cannot rebuild the model, or if the copy has other outputs.
    """
    made: dict[int, Any] = {}
    try:
        with _policy(dtype):
            copy = _rebuilt(model, dtype, made)
        _copy_state(model, copy)
    except (NotImplementedError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"model must be one that Keras can rebuild from its configuration for a copy in "
            f"{dtype}, got {model.name!r} ({type(error).__name__}: {reason}); give its own classes "
            "a get_config, or build the model in that dtype."
        ) from error
    compile_like(copy, model)
    _check_outputs(model, copy, dtype)
    return copy


def _rebuilt(model: Any, dtype: str, made: dict[int, Any]) -> Any:
    """Rebuild a model, layer or operation with the dtype.

    `made` maps the ids of the original objects to the objects that are already rebuilt.
    """
    if id(model) not in made:
        if not isinstance(model, keras.Layer):
            config = _retyped(_config(model), dtype)
            changed = config != _config(model)
            made[id(model)] = type(model).from_config(config) if changed else model
        elif _is_own(model) and isinstance(model, keras.Sequential):
            layers = [_rebuilt(layer, dtype, made) for layer in model.layers]
            first = [_input(tensor, dtype) for tensor in model.inputs]
            made[id(model)] = keras.Sequential(first + layers, name=model.name)
        elif _is_own(model) and is_functional(model):
            inputs = keras.tree.map_structure(lambda t: _input(t, dtype), model.input)
            new = map(id, keras.tree.flatten(model.input)), keras.tree.flatten(inputs)
            tensors = replayed(
                nodes_of(model), dict(zip(*new, strict=True)), lambda op: _rebuilt(op, dtype, made)
            )
            outputs = keras.tree.map_structure(lambda t: tensors[id(t)], model.output)
            made[id(model)] = keras.Model(inputs, outputs, name=model.name)
        elif isinstance(model, keras.layers.Lambda):
            options = _retyped(keras.Layer.get_config(model), dtype)
            shape = model._output_shape
            made[id(model)] = keras.layers.Lambda(
                model.function, shape, arguments=model.arguments, **options
            )
        else:
            copy = type(model).from_config(_retyped(_config(model), dtype))
            if isinstance(model, keras.Model) and not copy.built:
                copy(_zeros((model.get_build_config() or {}).get("input_shape"), dtype))
            made[id(model)] = copy
    return made[id(model)]


def _is_own(model: Any) -> bool:
    """Return True for a model of one of Keras' own classes."""
    return type(model).__module__.split(".")[0] == "keras"


def _input(tensor: Any, dtype: str) -> Any:
    kept = tensor.dtype if tensor.dtype not in _FLOATS else dtype
    shape = (None, *tensor.shape[1:])
    return keras.Input(batch_shape=shape, dtype=kept, sparse=tensor.sparse, name=tensor.name)


def _zeros(shape: Any, dtype: str) -> Any:
    """Return one row of zeros as inputs of a subclassed model.

    `shape` is the shape with which the model was built, or a list or dict of shapes.
    """
    if isinstance(shape, dict):
        return {name: _zeros(part, dtype) for name, part in shape.items()}
    if shape and isinstance(shape[0], tuple | list):
        return [_zeros(part, dtype) for part in shape]
    if not shape or None in shape[1:]:
        raise ValueError(f"it was built with the input shape {shape}; call it on a batch")
    return np.zeros((1, *shape[1:]), dtype)


def _config(layer: Any) -> dict:
    """Return a layer's configuration, with function objects in place of serialised functions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
        config = layer.get_config()
    own = {key: getattr(layer, key, None) for key in config}
    return config | {k: v for k, v in own.items() if isinstance(v, types.FunctionType)}


def _retyped(config: Any, dtype: str) -> Any:
    """Return a configuration with `dtype` in place of every floating dtype or dtype policy."""
    if isinstance(config, dict):
        return {
            key: dtype if "dtype" in str(key) and _is_float(part) else _retyped(part, dtype)
            for key, part in config.items()
        }
    if isinstance(config, list | tuple):
        return type(config)(_retyped(part, dtype) for part in config)
    return config


def _is_float(value: Any) -> bool:
    if isinstance(value, keras.DTypePolicy):
        value = value.name
    if isinstance(value, dict):
        value = value.get("config", {}).get("name") if "class_name" in value else None
    return isinstance(value, str) and value.removeprefix("mixed_") in _FLOATS


def _copy_state(model: keras.Model, copy: keras.Model) -> None:
    """Copy the weights, the states of random layers, and the flags that freeze weights."""
    layers = list(model._flatten_layers()), list(copy._flatten_layers())
    if len(layers[0]) != len(layers[1]) or not copy.built:
        raise ValueError("the copy has other layers, or cannot be built")
    for old, new in zip(*layers, strict=True):
        new.trainable = old.trainable
    if len(copy.variables) != len(model.variables):
        raise ValueError(
            f"the copy has {len(copy.variables)} variables instead of {len(model.variables)}"
        )
    for old, new in zip(model.variables, copy.variables, strict=True):
        if old.shape != new.shape:
            raise ValueError(f"weight {old.path!r} has shape {new.shape} instead of {old.shape}")
        new.assign(old.numpy())
        new.trainable = old.trainable
    for new in layers[1]:
        # Normalization stores values that it computed from its variables before the assignments
        # above. This computes them again.
        if hasattr(new, "finalize_state"):
            new.finalize_state()


def _check_outputs(model: keras.Model, copy: keras.Model, dtype: str) -> None:
    """Refuse a copy with other outputs than the model, for a few rows of random inputs.

    The copy is made from configurations. A layer's configuration does not contain changes that a
    user made to the layer after its construction. This check finds such changes. It is skipped for
    a model without declared inputs, or with an input of strings or of unknown size.
    """
    tensors = list(declared(model).values())
    if not tensors or any(None in t.shape[1:] or t.dtype == "string" for t in tensors):
        return
    rng = np.random.default_rng(0)
    rows = [rng.uniform(0, 1, (_PROBE_ROWS, *t.shape[1:])).astype(t.dtype) for t in tensors]
    x = for_call(model, dict(zip(declared(model), rows, strict=True)))
    with keras.StatelessScope():
        pairs = zip(
            *(keras.tree.flatten(one(x, training=False)) for one in (model, copy)), strict=True
        )
    used = {str(layer.compute_dtype) for layer in model._flatten_layers()} & set(_AGREEMENT)
    tolerance = max(_AGREEMENT[name] for name in used | {dtype})
    for one, two in pairs:
        one, two = (np.asarray(keras.ops.cast(part, "float64")) for part in (one, two))
        gap = np.abs(one - two).max() / max(np.abs(one).max(), 1e-6)
        if np.isfinite(one).all() and not gap <= tolerance:
            raise ValueError(
                f"model must be what its configuration says for a copy in {dtype}, got outputs of "
                f"{model.name!r} that differ by {gap:.1e} from those of the copy; build the model "
                "in that dtype."
            )


@contextmanager
def _policy(dtype: str) -> Iterator[None]:
    """Use `dtype` for all layers that the `with` block creates without a dtype of their own."""
    before = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_dtype_policy(dtype)
    keras.config.set_floatx(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(before[1])
        keras.config.set_dtype_policy(before[0])
