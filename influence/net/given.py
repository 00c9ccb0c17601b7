"""Conversion of a caller's model and data to the forms that a net uses."""

from __future__ import annotations

from typing import Any

import numpy as np

from influence.common.numbers import numbers
from influence.examples.arrays import parts_of
from influence.examples.examples import Examples
from influence.examples.featured import Featured, inputs_of
from influence.examples.given import as_examples
from influence.examples.tables import is_text
from influence.net.heads import Ending
from influence.net.inputs import declared
from influence.net.precision import computes_in_half
from influence.net.preprocessing import Preparation, split
from influence.net.refused import check_built
from influence.net.trunk import Parts

# A model's outputs for a row with and without padding may differ by this relative amount.
_PADDING_RTOL = 1e-3


def trained_part(
    model: Any, dtype: Any = None, layers: Any = None
) -> tuple[Preparation | None, Parts, tuple[str, ...]]:
    """Split a model into its lookup layers and the parts behind them, and choose theta.

    Args:
      model: a built Keras model.
      dtype: "float32" or "float64" to compute in this dtype. None means the dtype of the weights.
        A model that computes in another dtype or in mixed precision is copied with its weights.
      layers: names of the layers whose weights form theta, or None for all trainable weights.

    Returns: (preparation or None, parts, notes). Each note is a sentence about a split or a copy.
    Raises: TypeError or ValueError for a model, a dtype or layers that a net cannot have. The
      errors of `split` and `recast`.
    """
    check_built(model, layers is None)
    wanted, notes = checked_dtype(dtype), []
    preparation, model = split(model)
    if preparation is not None:
        notes.append(f"Applied once to each set, before the net: {preparation!r}.")
    parts = Parts.of(model, layers)
    if parts.trunk is not None:
        notes.append(f"Run once for each row, before theta: {parts.trunk!r}.")
    half = computes_in_half(parts.rest, parts.weights)
    wanted = wanted or ("float32" if half else None)
    if wanted and (half or wanted != str(parts.weights[0].dtype)):
        parts = parts.astype(wanted)
        notes.append(copied(wanted, half))
    return preparation, parts, tuple(notes)


def copied(dtype: str, policy: str | None = None) -> str:
    """Return the note about a copy in `dtype`. `policy` is the model's mixed-precision policy."""
    of = f" of the {policy} model" if policy else ""
    return f"A {dtype} copy{of}: fit and theta change only the copy."


def checked_dtype(dtype: Any) -> str | None:
    """Return the name of a dtype, "float32" or "float64". For None, return None.

    Raises: ValueError for any other dtype.
    """
    if dtype is None:
        return None
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in ("float32", "float64"):
        raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}.")
    return name


def given(net: Any, value: Any, name: str) -> Examples:
    """Convert data to Examples for a net, as `GenericNeuralNet.given` describes."""
    outputs = getattr(net, "ending", Ending()).names or ()
    front, trunk = net.preparation, net.flat.trunk
    if isinstance(value, Examples):
        value = inputs_of(value) if trunk is None else value
        known = isinstance(value, Featured) or (trunk and trunk.gave(value.take([0]).x))
        if trunk is not None and known:
            return trunk.applied(value)
    inputs = declared(net.model) if front is None else front.given.declared
    examples = as_examples(value, name, tuple(inputs), outputs)
    if front is None:
        for label, part in parts_of(examples.take([0]).x).items():
            if is_text(part):
                numbers(part, f"{name}.{label}")  # `numbers` raises TypeError for strings
        return examples if trunk is None else trunk.applied(examples)
    known = front.knows(examples)
    try:
        prepared = front.applied(examples)
    except (TypeError, ValueError) as error:
        if not str(error).startswith("x"):
            raise
        raise type(error)(f"{name}.{error}") from error
    if prepared is not examples and not known:
        _check_padding(net, examples, prepared, name)
    return prepared if trunk is None else trunk.applied(prepared)


def _check_padding(net: Any, examples: Examples, prepared: Examples, name: str) -> None:
    """Refuse a model if its output for a row depends on the zeros that pad the row."""
    found = net.preparation.padding(examples, prepared)
    if found is None:
        return
    row, x = found
    alone, among = net.outputs(x), net.outputs(prepared.take([row]).x)
    if np.abs(alone - among).max() > _PADDING_RTOL * np.abs(among).max():
        raise ValueError(
            f"model must give row {row} of {name} the same output alone and among longer rows, got "
            f"{np.ravel(alone)[0]:.4g} and {np.ravel(among)[0]:.4g}: {net.preparation!r} pads each "
            "batch to its longest row; give TextVectorization an output_sequence_length, or "
            "Embedding mask_zero=True."
        )
