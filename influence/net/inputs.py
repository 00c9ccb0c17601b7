"""Names of a model's inputs. A caller may also use the input's position or its layer's name."""

from __future__ import annotations

from typing import Any

import keras


def declared(model: keras.Model) -> dict[Any, Any]:
    """Return a dict of symbolic inputs by name, which is empty for a subclassed model."""
    found = getattr(model, "inputs", None) or []
    # `model.input` is a dict if the model was built from a dict of inputs. Keras then finds each
    # input by its key.
    try:
        structure = model.input
    except (AttributeError, ValueError):
        structure = None
    return structure if isinstance(structure, dict) else {t.name: t for t in found}


def aliases(model: keras.Model) -> dict[Any, Any]:
    """Return a dict from each other name of an input to the name that the model expects.

    The other names are the input's position in `model.inputs` and the name of its InputLayer. An
    input that was created without a name has a layer `input_layer_1` and a tensor `keras_tensor_7`.
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
    """Return inputs x with the names that the model expects. Unknown names are left as they are."""
    if not isinstance(x, dict):
        return x
    other = aliases(model)
    return {other.get(key, key): part for key, part in x.items()}


def for_call(model: keras.Model, x: Any) -> Any:
    """Convert a dict of inputs to the structure that a call of the model takes.

    The result is a dict if the model was built from a dict of inputs, and a list in the order of
    `model.inputs` if it was built from a list. If the model declares no inputs and all keys are
    positions, the result is a list in the order of the positions.
    """
    if not isinstance(x, dict):
        return x
    wanted = declared(model)
    if not wanted and all(isinstance(key, int) for key in x):
        return [x[key] for key in sorted(x)]
    try:
        structure = model.input
    except (AttributeError, ValueError):  # a sequential model has one input
        structure = None
    if isinstance(structure, dict) or not wanted or set(x) != set(wanted):
        return x
    parts = [x[name] for name in wanted]
    return parts if isinstance(structure, list | tuple) else parts[0]


def fits(shape: tuple, wanted: tuple) -> bool:
    """Return True if Keras takes rows of this shape for an input that declares `wanted`.

    None in `wanted` accepts any size. If the number of axes differs by one, Keras adds or removes a
    last axis of length 1.
    """
    for trial in (shape, (*shape, 1), shape[:-1] if shape[-1:] == (1,) else shape):
        pairs = zip(wanted, trial, strict=False)
        if len(trial) == len(wanted) and all(w in (None, got) for w, got in pairs):
            return True
    return False
