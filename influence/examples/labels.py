"""Pack labels of several outputs and sample weights into one array, with an entry per example.

Plain labels, without output names and sample weights, are not packed. All other labels are packed
into one NumPy structured array (n,). Its fields are

- `y`, or the names of the outputs: the labels,
- `sample_weight`, or `sample_weight/NAME` for the output NAME: the weights (n,).

A slice, a fancy index or a concatenation of rows therefore applies to all labels and weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence.common.numbers import numbers

# The field name of labels without an output name.
PLAIN = "y"
# The field name of sample weights. For the weights of one output, a slash and the output's name
# follow.
WEIGHT = "sample_weight"
# If the loss masks positions, such as padding in a text, the labels of a batch have a field of this
# name. It holds the weight of each position, (n, ...). The labels of a set do not have this field.
POSITIONS = "sample_weight of positions"


def packed(y: Any, sample_weight: Any = None) -> Any:
    """Return plain labels unchanged, and other labels as one structured array (n,).

    Args:
      y: (n, ...) labels, a dict of such arrays by output name, or an array that this function
        returned before.
      sample_weight: (n,) weights >= 0, or a dict of them by output name. None means no weights.

    Raises: TypeError if an array is not numeric. ValueError for an empty dict, for lengths that
      differ, for names that are not text, or for weights with names that are not in y. The values
      of weights are not checked here, but by `check_weights`.
    """
    if is_packed(y):
        if sample_weight is not None:
            raise ValueError(
                "sample_weight must be given once, got it beside labels that are packed already; "
                "pass labels(y) instead of y."
            )
        return y
    if not isinstance(y, Mapping) and sample_weight is None:
        return y
    arrays = _labels(y) | _weights(sample_weight, y)
    n = len(next(iter(arrays.values())))
    for name, array in arrays.items():
        if len(array) != n:
            first = called(next(iter(arrays)))
            raise ValueError(
                f"{called(name)} must have as many rows as {first}, got {len(array)} and {n}."
            )
    rows = np.empty(n, [(name, a.dtype, a.shape[1:]) for name, a in arrays.items()])
    for name, array in arrays.items():
        rows[name] = array
    return rows


def is_packed(y: Any) -> bool:
    """Return True for a structured array, which is the form that `packed` returns."""
    return isinstance(y, np.ndarray) and y.dtype.names is not None


def fields(y: NDArray) -> dict[str, NDArray]:
    """Return views of the arrays that y holds, by field name. Plain labels have the name `y`."""
    return {PLAIN: y} if y.dtype.names is None else {name: y[name] for name in y.dtype.names}


def labels(y: Any) -> Any:
    """Return the labels without weights, as an array or as a dict by output name.

    Args:
      y: plain or packed labels, or a dict of tensors with the fields of packed labels.
    """
    if is_packed(y):
        y = fields(y)
    if not isinstance(y, Mapping):
        return y
    found = {name: p for name, p in y.items() if not is_weight(name) and name != POSITIONS}
    return found[PLAIN] if list(found) == [PLAIN] else found


def sample_weights(y: Any) -> Any:
    """Return the weights as an array (n,), as a dict by output name, or None without weights.

    Args: the argument `y` of `labels`.
    """
    if is_packed(y):
        y = fields(y)
    if not isinstance(y, Mapping):
        return None
    found = {name: part for name, part in y.items() if is_weight(name)}
    if not found or list(found) == [WEIGHT]:
        return found.get(WEIGHT)
    return {name.removeprefix(f"{WEIGHT}/"): part for name, part in found.items()}


def positions(y: Any) -> Any:
    """Return the weights of positions in the labels of a batch, or None if there are none."""
    return y.get(POSITIONS) if isinstance(y, Mapping) else None


def is_weight(name: str) -> bool:
    """Return True if a field of this name holds weights."""
    return name == WEIGHT or name.startswith(f"{WEIGHT}/")


def called(name: str) -> str:
    """Return the name that error messages use for a field."""
    if is_weight(name):
        return WEIGHT if name == WEIGHT else f"{WEIGHT}[{name.removeprefix(f'{WEIGHT}/')!r}]"
    return PLAIN if name == PLAIN else f"{PLAIN}[{name!r}]"


def check_weights(y: NDArray) -> None:
    """Refuse sample weights if one is negative or not finite, or if all are zero.

    Raises: ValueError naming the weights and a row.
    """
    weights = {name: part for name, part in fields(y).items() if is_weight(name)}
    for name, weight in weights.items():
        bad = np.flatnonzero(~(np.isfinite(weight) & (weight >= 0)))
        if bad.size:
            raise ValueError(
                f"{called(name)} must be finite and >= 0, got {weight[bad[0]]} in row {bad[0]}."
            )
    if weights and len(y) and not any(weight.any() for weight in weights.values()):
        raise ValueError(
            f"{WEIGHT} must have a weight above 0, got {len(y)} zeros: no row would count."
        )


def _labels(y: Any) -> dict[str, NDArray]:
    if not isinstance(y, Mapping):
        return {PLAIN: _rows(y, PLAIN)}
    if not y:
        raise ValueError("y must hold at least one array, got an empty dict.")
    for name in y:
        if not isinstance(name, str) or not name or is_weight(name) or name == POSITIONS:
            raise ValueError(
                f"y must have the names of the model's outputs, got the key {name!r}; a name is "
                f"text and does not begin with {WEIGHT!r}."
            )
    return {name: _rows(part, called(name)) for name, part in y.items()}


def _weights(sample_weight: Any, y: Any) -> dict[str, NDArray]:
    if sample_weight is None:
        return {}
    if not isinstance(sample_weight, Mapping):
        return {WEIGHT: _weight(sample_weight, WEIGHT)}
    known = list(y) if isinstance(y, Mapping) else []
    wrong = [name for name in sample_weight if name not in known]
    if wrong or not sample_weight:
        raise ValueError(
            f"{WEIGHT} must be an array or a dict by the names of y, {sorted(known)}, got "
            f"{[*sample_weight]}."
        )
    names = {f"{WEIGHT}/{name}": part for name, part in sample_weight.items() if part is not None}
    return {name: _weight(part, called(name)) for name, part in names.items()}


def _rows(value: Any, name: str) -> NDArray:
    array = numbers(value, name)
    if array.ndim == 0:
        raise ValueError(f"{name} must have one row per example, got a scalar.")
    return array


def _weight(value: Any, name: str) -> NDArray:
    array = numbers(value, name)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(
            f"{name} must have one weight per row, (n,), got shape {array.shape}; put weights of "
            "time steps or pixels into the loss."
        )
    return array if array.dtype.kind == "f" else array.astype(np.float64)
