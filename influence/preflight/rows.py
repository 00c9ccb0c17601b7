"""Tests of the rows: do they fit the net, and is each loss finite, repeatable and independent?

A loss must not depend on other rows. All other results of the library are computed from the
losses and outputs that are checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from influence.examples.examples import Examples
from influence.examples.featured import inputs_of
from influence.net.inputs import for_call, named
from influence.net.net import GenericNeuralNet
from influence.net.questions import PerRow
from influence.net.refused import check_weights
from influence.preflight.report import Finding, Line

# `separate` computes the losses of at most _SAMPLE rows together, in two orders. It also computes
# the losses of at most _ALONE of these rows one by one.
_SAMPLE, _ALONE = 64, 8
# A message lists at most this many row numbers.
_SHOWN = 5


def rounding(dtype: np.dtype) -> float:
    """Return the relative difference that the order of additions may cause in a deep net."""
    return 1e3 * float(np.finfo(dtype).eps)


def sample(num_rows: int, size: int) -> NDArray[np.int64]:
    """Draw up to `size` row numbers in ascending order. Every call draws the same numbers."""
    if num_rows <= size:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(0).choice(num_rows, size, replace=False))


@dataclass(frozen=True, eq=False)
class Answers:
    """Losses and outputs of a net for all rows of a set, computed in one pass.

    Attributes:
      examples: the n rows.
      batch_size: number of rows in a batch of each pass. None lets the net choose.
      losses: (n,) the losses of the rows.
      outputs: (n, ...) the outputs. If the last axis has two or more entries, only the position of
        the largest entry is stored, to save memory.
      output_shape: shape of one row's outputs, including the last axis.
    """

    examples: Examples
    batch_size: int | None
    losses: NDArray
    outputs: NDArray
    output_shape: tuple[int, ...]

    @classmethod
    def of(cls, net: GenericNeuralNet, examples: Examples, batch_size: int | None) -> Answers:
        """Compute the losses and outputs of all rows in one pass."""
        answers = examples.map_over(_losses_and_outputs, net, batch_size=batch_size)
        losses, outputs, shapes = zip(*answers, strict=True)
        return cls(examples, batch_size, np.concatenate(losses), np.concatenate(outputs), shapes[0])


def _losses_and_outputs(
    net: GenericNeuralNet, theta: NDArray | None, x: Any, y: NDArray
) -> tuple[NDArray, NDArray, tuple[int, ...]]:
    raw = net.at(theta).outputs(x)
    outputs = one_array(raw)
    shape = outputs.shape[1:]
    if shape and shape[-1] > 1 and outputs is raw:
        outputs = outputs.argmax(axis=-1)
    return net.at(theta).losses(x, y), outputs, shape


def fits(net: GenericNeuralNet, examples: Examples, name: str) -> Line:
    """Check that the net accepts the examples."""
    title = f"{name} fits the net"
    try:
        net.validate(examples, name)
    except ValueError as error:
        return Finding(title).fail(str(error), "Do as the message says; check again.")
    return Finding(title, len(examples)).ok(
        f"{len(examples)} rows; shapes, dtypes and the range of the labels are those that the "
        "model and its loss take.",
    )


def finite_weights(net: GenericNeuralNet) -> Line | None:
    """Return a failed line if a weight is NaN or infinite, or None if all are finite."""
    try:
        check_weights(net.model)
    except ValueError as error:
        return Finding("finite weights").fail(str(error), "Train the model again.")
    return None


def separate(net: GenericNeuralNet, examples: Examples) -> Line:
    """Check that a row's loss is the same alone, among other rows and in reversed order."""
    title = "loss per example"
    rows = sample(len(examples), _SAMPLE)
    some = examples.take(rows)
    together = net.losses(some.x, some.y)
    if np.shape(together) != (len(rows),):
        return Finding(title).fail(
            f"The loss {net.loss.name!r} gives shape {np.shape(together)} for {len(rows)} rows "
            "instead of a number for each: it is summed or averaged over rows, or not over the "
            "outputs of one row, so that no row's share in the risk can be told.",
            "Leave out the sum or mean over rows; a Keras loss, or its name, is right as it is.",
        )
    reverse = some.take(np.arange(len(rows))[::-1])
    few = [some.take([row]) for row in range(min(_ALONE, len(rows)))]
    outputs = one_array(net.outputs(some.x))
    alone = np.concatenate([net.losses(one.x, one.y) for one in few])
    outputs_alone = np.concatenate([one_array(net.outputs(one.x)) for one in few])
    # Outputs are compared too, because the loss of a well-fitted row hardly depends on its outputs.
    size = _largest(outputs)
    reversed_ = one_array(net.outputs(reverse.x))[::-1], net.losses(reverse.x, reverse.y)[::-1]
    gap = max(
        _gap(outputs_alone, outputs[: len(few)], size),
        _gap(reversed_[0], outputs, size),
        _gap(alone, together[: len(few)], size + _largest(together)),
        _gap(reversed_[1], together, size + _largest(together)),
    )
    if gap > rounding(net.dtype):
        return Finding(title, gap).fail(
            f"A row's output or loss changes with the company it is in, by {gap:.1e} of its size: "
            "it has no loss of its own that removing it would take out of the risk.",
            "Look for a layer that mixes rows (BatchNormalization called with training=True, "
            "which here must run in inference mode), for a random layer, and for labels of shape "
            "(n,) that broadcast against outputs of shape (n, 1) in the loss.",
        )
    return Finding(title, gap).ok(
        "A row's loss is the same alone, among others and in another order (relative difference "
        "in value).",
    )


def same_twice(net: GenericNeuralNet, answers: Answers) -> Line:
    """Check that two passes agree, and that the model's outputs do not depend on random seeds.

    The library's passes never advance the seeds of Keras' random layers. An active dropout layer
    would therefore return the same wrong numbers in every pass.
    """
    title = "same answer twice"
    examples, first = answers.examples, answers.losses
    again = examples.each_row(PerRow("losses"), net, batch_size=answers.batch_size)
    some = inputs_of(examples).take(sample(len(examples), _SAMPLE))
    x = plain_inputs(net.model, some.x)
    # In this scope the first call advances the seeds for the second one. The model's own seeds stay
    # unchanged.
    with keras.StatelessScope():
        one, two = (one_array(net.model(x, training=False)) for _ in range(2))
    size = _largest(one)
    gap = _gap(one, two, size)
    if gap > rounding(net.dtype):
        names = ", ".join(repr(name) for name in random_layers(net.model))
        return Finding(title, gap).fail(
            f"The model answers the same rows differently each time, by {gap:.1e} of the outputs' "
            "size, in inference mode: a random layer is on, or one that keeps a state, and every "
            "number would be that of one draw.",
            "Let dropout and noise obey `training`: call them without training=True."
            + (f" Layers with a random state: {names}." if names else ""),
        )
    gap = _gap(first, again, _largest(first) + size)
    if gap > rounding(net.dtype):
        return Finding(title, gap).fail(
            f"Two passes over the same rows differ by {gap:.1e} of the losses' size.",
            "Look for tf.random, NumPy's random numbers or data that are read anew in the model's "
            "call or in the loss.",
        )
    return Finding(title, gap).ok(
        "Two passes over the rows agree"
        + (" to the last bit." if gap == 0 else " but for rounding (relative difference in value).")
        + " No random layer is on.",
    )


def finite(net: GenericNeuralNet, answers: Answers, name: str) -> Line:
    """Find rows whose loss or gradient is not finite.

    `name` ("train" or "test") appears in the title of the line.
    """
    title, examples = f"finite {name} rows", answers.examples
    v = np.random.default_rng(0).standard_normal((net.num_parameters, 1))
    along = PerRow("directional", v)
    slopes = examples.each_row(along, net, batch_size=answers.batch_size)
    bad = np.flatnonzero(~np.isfinite(answers.losses))
    what, cause = "loss", "a log of 0 (use logits), a division by 0, an overflow, a wrong label"
    if not len(bad):
        bad = np.flatnonzero(~np.isfinite(slopes))
        what, cause = "gradient", "a square root or norm at 0, whose slope is infinite there"
    if len(bad):
        return Finding(title, len(bad)).fail(
            f"The {what} of {len(bad)} of {len(examples)} rows is NaN or infinite (row "
            f"{_listed(bad)}), and so is every mean over rows.",
            f"Look at those rows for {cause}; mend the model or loss, or drop them with `without`.",
        )
    return Finding(title, 0).ok(f"The loss and gradient of all {len(examples)} rows are finite.")


def random_layers(model: keras.Model) -> list[str]:
    """Return the names of layers that hold the state of a random generator."""
    found = []
    for layer in model._flatten_layers(include_self=False):
        own = {id(w) for w in layer.weights}
        inner = any(True for _ in layer._flatten_layers(include_self=False))
        if not inner and any(id(v) not in own for v in layer.variables):
            found.append(layer.name)
    return found


def _listed(rows: NDArray) -> str:
    shown = ", ".join(map(str, rows[:_SHOWN]))
    return shown + (f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")


def _largest(values: NDArray) -> float:
    """Return the largest absolute value among the finite values."""
    sizes = np.abs(values)
    return float(sizes[np.isfinite(sizes)].max(initial=0.0))


def _gap(one: NDArray, two: NDArray, size: float) -> float:
    """Compute the largest difference of finite values, relative to `size`.

    NaN and infinity are ignored, because the test `finite` reports them.
    """
    finite = np.isfinite(one) & np.isfinite(two)
    gap = _largest(one[finite] - two[finite])
    return gap / size if gap else 0.0


def one_array(outputs: Any) -> NDArray:
    """Return a single output unchanged. Join several outputs to one array (n, entries)."""
    if isinstance(outputs, Mapping):
        outputs = [outputs[name] for name in sorted(outputs)]
    if isinstance(outputs, list | tuple):
        parts = [np.asarray(part) for part in outputs]
        return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
    return np.asarray(outputs)


def plain_inputs(model: keras.Model, x: Any) -> Any:
    """Convert inputs to dense arrays, in the structure that a call of the Keras model takes."""
    if not isinstance(x, Mapping):
        return _dense(x)
    return for_call(model, named(model, {key: _dense(part) for key, part in x.items()}))


def _dense(part: Any) -> Any:
    return part.toarray() if scipy.sparse.issparse(part) else part
