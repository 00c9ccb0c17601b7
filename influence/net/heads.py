"""Softmax or sigmoid at a model's end, and the logits before it.

Keras' cross-entropies recognise an output tensor that a softmax or sigmoid made. They then use the
logits before this activation, whatever `from_logits` says. This file recognises the same tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

_ACTIVATIONS = {
    "Softmax": ("softmax", keras.activations.softmax),
    "Sigmoid": ("sigmoid", keras.activations.sigmoid),
}
_FUNCTIONS = dict(_ACTIVATIONS.values())
_WITH_ACTIVATION = (
    keras.layers.Dense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Activation,
)


@dataclass(frozen=True)
class Ending:
    """Facts about the outputs of a model in inference mode.

    Attributes:
      names: the names of the outputs if the model returns a list or a dict of them, else None.
      paths: for each output, its key in the list or dict. Empty if the model returns one tensor.
      heads: for each output, "softmax" or "sigmoid" if it ends in this activation, else None.
      adds_losses: True if the model calls `add_loss` or has an activity regulariser.
      masks: True if an output has a Keras mask.
    """

    names: tuple[str, ...] | None = None
    paths: tuple[Any, ...] = ()
    heads: tuple[str | None, ...] = (None,)
    adds_losses: bool = False
    masks: bool = False


def ending(model: Any) -> Ending:
    """Return facts about a model's outputs, from its layers or from a trace in inference mode.

    A model whose inputs have unknown shapes cannot be traced. The function then assumes one output
    without a final activation.
    """
    if model is None:
        return Ending()
    known = _by_layers(model)
    if known is not None:
        return known
    specs = _input_specs(model)
    found = []

    def call(x: Any) -> Any:
        with keras.StatelessScope(collect_losses=True) as scope:
            raw = model(x, training=False)
        names, paths = _names(model, raw)
        tensors = [raw] if names is None else [raw[path] for path in paths]
        masks = any(getattr(tensor, "_keras_mask", None) is not None for tensor in tensors)
        found.append(Ending(names, paths, tuple(map(head, tensors)), bool(scope.losses), masks))
        return tf.constant(0)

    if specs is not None:
        try:
            tf.function(call, autograph=False).get_concrete_function(specs)
        # The default Ending is returned. `GenericNeuralNet.validate` calls the model on real inputs
        # later, and reports the error.
        except (TypeError, ValueError, tf.errors.OpError):
            pass
    return found[0] if found else Ending()


def head(output: Any) -> str | None:
    """Return "softmax" or "sigmoid" if this activation made the tensor, else None."""
    if tf.is_symbolic_tensor(output):
        kind = output.op.type
        if kind in _ACTIVATIONS:
            return _ACTIVATIONS[kind][0]
    return None


def peeled(output: Any) -> Any:
    """Return the logits of an output that ends in a softmax or sigmoid.

    Raises: ValueError if the logits are not known.
    """
    logits = getattr(output, "_keras_logits", None)
    if logits is None and head(output) is not None:
        logits = output.op.inputs[0]
    if logits is None:
        raise ValueError(
            "model must end in its softmax or sigmoid, got an output whose logits are not known; "
            "use keras.layers.Activation as the last layer."
        )
    return logits


def activated(name: str | None, z: Any) -> Any:
    """Apply the activation `name` to logits z. Keras' cross-entropies recognise the result."""
    return z if name is None else _FUNCTIONS[name](z)


def _names(model: Any, raw: Any) -> tuple[tuple[str, ...] | None, tuple[Any, ...]]:
    """Return the names and the keys of a model's outputs, in Keras' order.

    If the model returns one tensor, the result is (None, ()).
    """
    if isinstance(raw, dict):
        keys = tuple(sorted(raw))
        return keys, keys
    if isinstance(raw, list | tuple):
        names = getattr(model, "output_names", None) or ()
        if len(names) != len(raw) or len(set(names)) != len(raw):
            names = [f"output_{number}" for number in range(len(raw))]
        return tuple(names), tuple(range(len(raw)))
    return None, ()


def _by_layers(model: Any) -> Ending | None:
    """Return facts about a model's output without a trace, or None if the layers do not show them.

    The function recognises common models with one output. This saves a trace of the model, which
    can take a second.
    """
    own = all(
        type(layer).__module__.split(".")[0] == "keras"
        and getattr(layer, "activity_regularizer", None) is None
        and not isinstance(layer, keras.layers.ActivityRegularization | keras.layers.Masking)
        and not getattr(layer, "mask_zero", False)
        for layer in model._flatten_layers()
    )
    outputs = getattr(model, "outputs", None) or []
    if not own or len(outputs) != 1 or isinstance(_struct(model, "output"), list | tuple | dict):
        return None
    last: Any = getattr(getattr(outputs[0], "_keras_history", None), "operation", None)
    if type(last) is keras.layers.Softmax and last.axis == -1:
        return Ending(heads=("softmax",))
    if type(last) not in _WITH_ACTIVATION:
        return None
    if last.activation in (None, keras.activations.linear):
        return Ending()
    for name, function in _FUNCTIONS.items():
        if last.activation is function:
            return Ending(heads=(name,))
    return None


def _struct(model: Any, which: str) -> Any:
    """Return a model's attribute "input" or "output": a symbolic tensor, or a list or dict of them.

    `which` is the attribute's name.
    """
    try:
        return getattr(model, which)
    except (AttributeError, ValueError):
        # Sequential models do not have the attribute. They have one input and one output.
        return next(iter(getattr(model, f"{which}s")))


def _input_specs(model: Any) -> Any:
    """Return the TensorSpec of a model's input, or a list or dict of them for several inputs.

    The result is None if the model does not know the shapes of its inputs.
    """
    try:
        if getattr(model, "inputs", None):
            inputs = _struct(model, "input")
            return keras.tree.map_structure(lambda t: tf.TensorSpec(t.shape, t.dtype), inputs)
        shapes = dict(model._build_shapes_dict)
        (shape,) = shapes.values()
    except (AttributeError, TypeError, ValueError):
        return None
    spec = lambda s: tf.TensorSpec([None, *s[1:]], model.compute_dtype)  # noqa: E731
    if isinstance(shape, dict):
        return {name: spec(part) for name, part in shape.items()}
    if shape and isinstance(shape[0], tuple | list):
        return [spec(part) for part in shape]
    return spec(shape)
