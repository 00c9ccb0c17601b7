"""Checks of the loss on a few rows of a set.

The loss of a row must not depend on other rows. The mean loss must be the loss that Keras reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.common.memory import fitting
from influence.examples.arrays import parts_of
from influence.examples.examples import Examples
from influence.examples.labels import labels, sample_weights
from influence.net.rowwise import in_dtype

# The checks read at most _ROWS rows, and at most _ALONE of them one by one.
_ROWS, _ALONE = 32, 3
# If _ROWS rows take more than _BYTES bytes, fewer rows are read, but at least _FEWEST.
_BYTES, _FEWEST = 1 << 20, 4
# Losses count as equal up to this relative difference. Float32 rounding is far smaller.
_RTOL = 1e-3

_PROBES: WeakKeyDictionary[Examples, tuple[NDArray, Examples | None]] = WeakKeyDictionary()


def probe_of(examples: Examples) -> tuple[NDArray[np.int64], Examples]:
    """Return the row numbers of a few rows in ascending order, and a set of these rows.

    The rows are drawn at random from the whole set. Every call returns the same rows.
    """
    if examples not in _PROBES:
        n = len(examples)
        rows = np.arange(n)
        parts = parts_of(examples.take([0]).x).values()
        # A sparse row counts as 8 bytes for each stored entry.
        row_bytes = sum(getattr(part, "nbytes", 8 * part.size) for part in parts)
        some = max(_FEWEST, fitting(_BYTES, row_bytes, _ROWS))
        if n > some:
            rows = np.sort(np.random.default_rng(0).choice(n, some, replace=False))
        # Rows of a set in memory are not cached, because they may be large.
        _PROBES[examples] = rows, None if examples.in_memory else examples.take(rows)
    rows, probe = _PROBES[examples]
    return rows, examples.take(rows) if probe is None else probe


def check_apart(
    net: Any, rows: NDArray, probe: Examples, losses: NDArray, shapes: str, name: str
) -> None:
    """Refuse a loss if a row's value depends on the other rows of the batch or on their order.

    Args:
      net: the net.
      rows: (k,) row numbers.
      probe: the set of the rows with these numbers.
      losses: (k,) the losses of these rows, computed in one batch.
      shapes: the shape of the model's outputs for these rows, for the message.
      name: the name of the set in the message.

    Raises: ValueError naming a row.
    """
    shuffled = np.random.default_rng(1).permutation(len(rows))
    batches = [np.array([0]), *shuffled[: _ALONE - 1, None], shuffled]
    batches.append(shuffled[: (len(rows) + 1) // 2])
    finite = np.isfinite(losses)
    size = np.abs(losses[finite]).max(initial=0.0)
    for batch in batches:
        some = probe.take(batch)
        again = net.losses(some.x, some.y)
        known = finite[batch] & np.isfinite(again)  # influence.preflight reports the other losses
        gaps = np.abs(np.where(known, again, 0) - np.where(known, losses[batch], 0))
        if not gaps.max() > _RTOL * size:
            continue
        worst = int(gaps.argmax())
        before, row = losses[batch[worst]], rows[batch[worst]]
        where = "it by itself" if len(batch) == 1 else f"it among {len(batch)} shuffled ones"
        y = ", ".join(str(np.shape(part)) for part in leaves(labels(probe.y)))
        raise ValueError(
            f"{net.loss.role} must depend on its own row alone, got {before:.4g} from "
            f"{net.loss.name!r} for row {row} of {name} among {len(rows)} rows and "
            f"{again[worst]:.4g} for {where}; labels of shape {y} broadcast against outputs of "
            f"shape {shapes}, or a layer that mixes rows, would do that."
        )


def check_added(net: Any, probe: Examples, name: str) -> None:
    """Refuse losses added by `add_loss` that are not a mean over the rows of the batch.

    The loss that the model adds for a batch must equal the mean of those that it adds for the rows.

    Raises: ValueError with both numbers.
    """
    flat, theta = net.flat, net.theta_tensor()
    if not flat.adds:
        return
    for count in {len(probe), (len(probe) + 1) // 2}:
        x = flat.inputs(probe.take(np.arange(count)).x)
        together = float(tf.add_n(flat.called(theta, x)[1]))
        apart = float(np.mean(flat.run("added", flat.added, theta, x), dtype=np.float64))
        if abs(together - apart) > _RTOL * max(abs(together), abs(apart)):
            raise ValueError(
                "model must add losses that are a mean over the rows of its batch, got by add_loss "
                f"{together:.4g} in {net.model.name!r} for {count} rows of {name} together and "
                f"{apart:.4g} as the mean over each of them alone: the risk that Keras reports "
                "would depend on the batch; use a mean over the first axis."
            )


def check_reported(net: Any, probe: Examples, losses: NDArray, name: str) -> None:
    """Refuse a loss whose mean over rows differs from the loss that Keras reports for these rows.

    Only a compiled loss, and a Keras loss that overrides `__call__`, are checked.

    Raises: ValueError with both values.
    """
    compiled = getattr(net.model, "_compile_loss", None) if net.loss.compiled else None
    if compiled is None and net.loss.whole is None:
        return
    apart = []
    for count in sorted({len(probe), (len(probe) + 1) // 2}):
        reported = _reported(net, compiled, probe.take(np.arange(count)))
        if reported is None or not np.isfinite(reported) or not np.isfinite(losses[:count]).all():
            continue
        own = _mean(net, probe, losses, count)
        if abs(own - reported) <= _RTOL * max(abs(reported), np.abs(losses[:count]).mean()):
            # For each of two batch sizes, the loop compares our mean loss with the one that Keras
            # reports. If a batch has as many rows as time steps, Keras applies the sample weights
            # to the time steps, and the two losses differ. This can happen for only one of the two
            # sizes. So with sample weights, it is enough if the losses agree for one size.
            if sample_weights(probe.y) is not None:
                return
        else:
            apart.append((count, reported, own))
    if apart:
        count, reported, own = apart[-1]
        raise ValueError(
            f"{net.loss.role} must be a mean over rows, got {net.loss.name!r}, for which Keras "
            f"reports {reported:.4g} for {count} rows of {name} together, and the mean over each "
            f"of them alone is {own:.4g}; a loss that is normalised by the batch would do that."
        )


def _mean(net: Any, probe: Examples, losses: NDArray, count: int) -> float:
    """Return the mean of the first `count` losses, weighted by the masses of the rows."""
    if not net.loss.has_masses:
        return float(np.mean(losses[:count], dtype=np.float64))
    some = probe.take(np.arange(count))
    masses = net.masses(some.x, some.y)
    return float(masses @ losses[:count]) / max(masses.sum(), 1)


def _reported(net: Any, compiled: Any, some: Examples) -> float | None:
    """Return the loss that Keras reports for a batch, without the regularisers of the weights.

    Returns: the loss, or None if Keras raises an error for this batch.
    """
    flat = net.flat
    raw, added = flat.called(net.theta_tensor(), flat.inputs(some.x))
    y, weight = (
        {k: flat.tensor(v) for k, v in part.items()}
        if isinstance(part, Mapping)
        else part
        if part is None
        else flat.tensor(part)
        for part in (labels(some.y), sample_weights(some.y))
    )
    names = net.ending.names
    if net.loss.masked and weight is not None and not isinstance(weight, Mapping):
        # The weights get the rank of the mask. Otherwise Keras would apply them to time steps, or
        # fail.
        weight = tf.reshape(weight, [-1] + [1] * (len(raw._keras_mask.shape) - 1))
    if isinstance(weight, Mapping):
        weight = {name: weight.get(name) for name in names}
        weight = weight if isinstance(raw, dict) else list(weight.values())
    if isinstance(y, Mapping) and tf.is_tensor(raw):
        (y,) = y.values()
    elif isinstance(y, Mapping) and isinstance(raw, list | tuple):
        y = [y.get(name) for name in names]
    try:
        if compiled is None:
            return float(in_dtype(net.loss.whole, net.dtype.name)(y, raw, weight))
        fresh = type(compiled)(
            compiled._user_loss, compiled._user_loss_weights, output_names=compiled.output_names
        )
        fresh.build(y, raw)
        # The losses compute in the net's dtype. Otherwise Keras would round float64 to float32.
        fresh._flat_losses = [
            entry._replace(loss=in_dtype(entry.loss, net.dtype.name))
            for entry in fresh._flat_losses
        ]
        total = fresh(y, raw, weight)
    except (KeyError, TypeError, ValueError, tf.errors.OpError):
        return None
    return float(tf.add_n([tf.cast(part, "float64") for part in (total, *added)]))


def leaves(y: Any) -> list[Any]:
    """Return a list of the arrays in a dict, list or tuple. A single array becomes a list too."""
    y = y.values() if isinstance(y, Mapping) else y
    return list(y) if isinstance(y, list | tuple) or not hasattr(y, "shape") else [y]
