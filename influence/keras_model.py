"""Which Keras models and inputs are refused, and why."""

from __future__ import annotations

from typing import Any

import keras


def check_model(model: Any) -> None:
    """Refuse a model whose risk would not be what its owner believes.

    Raises: TypeError for something else than a Keras model or for trainable weights of several
      dtypes; ValueError for a model that is unbuilt, has no trainable weight, has an activity
      regulariser, or has float64 weights behind an input that rounds to float32.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {type(model).__name__}.")
    if not model.built:
        raise ValueError(
            f"model must be built, got the unbuilt {model.name!r}; call it on a batch first."
        )
    if not model.trainable_weights:
        raise ValueError(
            f"model must have a trainable weight, got none in {model.name!r}; "
            "set trainable = True on the layers that theta should hold."
        )
    dtypes = sorted({str(w.dtype) for w in model.trainable_weights})
    if len(dtypes) > 1:
        raise TypeError(f"model must have trainable weights of one dtype, got {', '.join(dtypes)}.")
    for layer in model._flatten_layers():
        if getattr(layer, "activity_regularizer", None) is not None:
            raise ValueError(
                f"model must have no activity regulariser, got one on layer {layer.name!r}: it "
                "depends on x, so it belongs in the loss."
            )
    for tensor in getattr(model, "inputs", None) or []:
        if dtypes == ["float64"] and str(tensor.dtype) in ("float32", "float16", "bfloat16"):
            raise ValueError(
                f"model must not round its input, got float64 weights behind the {tensor.dtype} "
                f"input {tensor.name!r}; use keras.Input(..., dtype='float64')."
            )


def check_inputs(model: keras.Model, x: Any, name: str) -> None:
    """Compare inputs with what a functional or sequential model declares.

    Raises: ValueError naming `name`, the shape wanted and the shape that came.
    """
    declared = getattr(model, "inputs", None)
    if not declared:
        return
    wanted = {tensor.name: tensor for tensor in declared}
    if isinstance(x, dict):
        if set(x) != set(wanted):
            raise ValueError(
                f"{name}.x must have the model's inputs {sorted(wanted)}, got {sorted(x)}."
            )
        pairs = [(f"{name}.x[{key!r}]", x[key], wanted[key]) for key in wanted]
    elif len(declared) == 1:
        pairs = [(f"{name}.x", x, declared[0])]
    else:
        raise ValueError(
            f"{name}.x must be a dict with the model's inputs {sorted(wanted)}, got one array."
        )
    for label, part, tensor in pairs:
        want, got = tuple(tensor.shape[1:]), tuple(part.shape[1:])
        fits = len(want) == len(got) and all(w in (None, g) for w, g in zip(want, got, strict=True))
        if not fits:
            raise ValueError(
                f"{label} must have rows of shape {want} for model {model.name!r}, got {got}."
            )
