"""Names of a model's inputs. Callers may also use an input's position or other names of it."""

from __future__ import annotations

from typing import Any

import keras


def declared(model: keras.Model) -> dict[Any, Any]:
    """Return a dict of the model's symbolic inputs by name. It is empty for a subclassed model."""
    found = getattr(model, "inputs", None) or []
    # `model.input` is a dict if the model was built from a dict of inputs. Keras then finds each
    # input by its key in this dict, and not by the name of its tensor. A model without
    # `model.input` was not built from a dict.
    try:
        structure = model.input
    except (AttributeError, ValueError):
        structure = None
    return structure if isinstance(structure, dict) else {t.name: t for t in found}


def aliases(model: keras.Model) -> dict[Any, Any]:
    """Return a dict from all other names of the model's inputs to the names in `declared`.

    The other names of an input are its position in `model.inputs`, the name of its InputLayer and
    the name of its tensor. If an input is created without a name, Keras may for example call the
    layer `input_layer_1` and the tensor `keras_tensor_7`.
    """
    found: dict[Any, Any] = {}
    wanted = declared(model)
    name_of = {id(tensor): name for name, tensor in wanted.items()}
    for position, tensor in enumerate(getattr(model, "inputs", None) or []):
        name = name_of[id(tensor)]
        others = (position, tensor._keras_history[0].name, tensor.name)
        found.update({other: name for other in others if other not in wanted})
    return found


def named(model: keras.Model, x: Any) -> Any:
    """Replace other names in a dict x of inputs by those in `declared`. Keep unknown names."""
    if not isinstance(x, dict):
        return x
    other = aliases(model)
    return {other.get(key, key): part for key, part in x.items()}


def for_call(model: keras.Model, x: Any) -> Any:
    """Convert a dict of inputs to the structure that a call of the model takes.

    The result is a dict if the model was built from a dict of inputs. It is a list in the order of
    `model.inputs` if the model was built from a list, and an array if it has one input. If the
    model declares no inputs and all keys are positions, the result is a list in the order of the
    positions. In all other cases, x is returned unchanged.
    """
    if not isinstance(x, dict):
        return x
    wanted = declared(model)
    if not wanted and all(isinstance(key, int) for key in x):
        return [x[key] for key in sorted(x)]
    try:
        structure = model.input
    except (AttributeError, ValueError):
        # This is a Sequential model, with one input, or a model that declares no inputs.
        structure = None
    if isinstance(structure, dict) or not wanted or set(x) != set(wanted):
        return x
    parts = [x[name] for name in wanted]
    return parts if isinstance(structure, list | tuple) else parts[0]


def fits(shape: tuple, wanted: tuple) -> bool:
    """Return True if Keras takes rows of this shape for an input that declares `wanted`.

    None in `wanted` accepts any size. If `shape` has one axis more or less than `wanted`, Keras
    removes or adds a last axis of length 1.
    """
    for trial in (shape, (*shape, 1), shape[:-1] if shape[-1:] == (1,) else shape):
        pairs = zip(wanted, trial, strict=False)
        if len(trial) == len(wanted) and all(w in (None, got) for w, got in pairs):
            return True
    return False
