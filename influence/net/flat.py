"""A Keras model as functions of a flat theta, traced once by TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import scipy.sparse
import tensorflow as tf
from numpy.typing import NDArray

from influence.net import tape
from influence.net.losses import PerExampleLoss


class FlatModel:
    """A model's losses and penalty as functions of theta, and the tensors to call them with.

    The weights are those that are trainable when this is made: freezing a layer later changes
    nothing here.

    Args:
      model: a checked Keras model.
      loss: its per-example loss.
      weights: what theta is; None: the model's trainable weights.
    """

    def __init__(self, model: keras.Model, loss: PerExampleLoss, weights: Any = None):
        self.model, self.loss = model, loss
        self.weights = tuple(model.trainable_weights if weights is None else weights)
        self.sizes = [int(np.prod(w.shape)) for w in self.weights]
        self.dtype = np.dtype(self.weights[0].dtype)
        self._functions: dict[str, Any] = {}
        self._seen: tuple[bool, int] | None = None

    def __getstate__(self) -> dict:
        """The model and the loss travel; traced functions are made again."""
        drawn = [state.numpy() for state in _generators(self.model)]
        return {**self.__dict__, "weights": (), "_functions": {}, "_drawn": drawn}

    def __setstate__(self, state: dict) -> None:
        """Find the weights again in the model that came along."""
        drawn = state.pop("_drawn")
        self.__dict__.update(state)
        self.weights = tuple(self.model.trainable_weights)
        for generator, value in zip(_generators(self.model), drawn, strict=True):
            generator.assign(value)

    # --- functions of theta, for tape ---------------------------------------------------------

    def output(self, theta: Any, x: Any) -> Any:
        """The model's output in inference mode, without touching its variables."""
        parts = zip(self.weights, tf.split(theta, self.sizes), strict=True)
        mapping = [(w, tf.reshape(part, w.shape)) for w, part in parts]
        with keras.StatelessScope(state_mapping=mapping), tape.twice_differentiable():
            output = self.model(x, training=False)
        if getattr(output, "_keras_mask", None) is not None:
            raise ValueError(
                f"model must not mask its output, got a mask from {self.model.name!r}: Keras "
                "divides such a loss by the number of unmasked steps in the whole batch, so it is "
                "no mean over examples; end in a layer that consumes the mask, such as pooling."
            )
        return output

    def losses(self, theta: Any, x: Any, y: Any) -> Any:
        """(n,) the data terms."""
        return tf.cast(self.loss.function(y, self.output(theta, x)), theta.dtype)

    def penalty(self, theta: Any) -> Any:
        """() the sum of the weights' own regularisers."""
        total = tf.zeros((), theta.dtype)
        for weight, part in zip(self.weights, tf.split(theta, self.sizes), strict=True):
            if weight.regularizer is not None:
                total += tf.cast(weight.regularizer(tf.reshape(part, weight.shape)), theta.dtype)
        return total

    # --- running them -----------------------------------------------------------------------------

    def run(self, name: str, function: Callable, *tensors: Any, leading: int = 1) -> Any:
        """Trace `function` under `name` on first use; call it; NumPy arrays.

        The sizes of the leading axes are left open from the first trace on. Were they found to vary
        later, numbers would depend, in their last bits, on what had been asked before: a run that
        was interrupted would not end as one that was not.
        """

        def signature(t):
            is_theta = t.shape[-1:] == [sum(self.sizes)]
            open_axes = min(leading, t.shape.rank - is_theta)
            return tf.TensorSpec([None] * open_axes + t.shape[open_axes:].as_list(), t.dtype)

        signatures = tf.nest.map_structure(signature, tensors)
        key = f"{name} {signatures}"
        if key not in self._functions:
            # Without autograph, as Keras traces its own steps: with it, a sixth more time to trace.
            # Concrete: TensorFlow warns of retracing where many nets' functions share a name.
            self._functions[key] = tf.function(
                function, input_signature=signatures, autograph=False
            ).get_concrete_function()
        return tf.nest.map_structure(lambda t: t.numpy(), self._functions[key](*tensors))

    def each(self, x: Any, y: Any) -> tape.Each:
        """How to map over vectors: vectorised where TensorFlow does that right, else looped."""
        if self.facts(x, y)[0]:
            return partial(tape.looped, dtype=self.dtype)
        return tf.vectorized_map

    def facts(self, x: Any, y: Any) -> tuple[bool, int]:
        """(whether to loop, numbers that one row's activations take), from tracing a row or two."""
        if self._seen is None:
            row = tf.nest.map_structure(lambda t: t[:1], (x, y))
            rows = tf.nest.map_structure(lambda t: tf.concat([t, t], 0), row)
            # A name of its own: TensorFlow warns of tracing one function often, as is meant here.
            losses = tf.function(lambda *tensors: self.losses(*tensors), autograph=False)
            graphs = [
                losses.get_concrete_function(self.theta(), *batch).graph for batch in (row, rows)
            ]
            one, two = (_numbers(graph) for graph in graphs)
            self._seen = tape.needs_loop(graphs[0]), max(two - one, 1)
        return self._seen

    # --- tensors ------------------------------------------------------------------------------

    def theta(self) -> Any:
        """(d,) the weights as they are now."""
        return tf.concat([tf.reshape(w.value, [-1]) for w in self.weights], 0)

    def tensor(self, array: Any) -> Any:
        """Floats in the dtype of theta, integers as they are, sparse rows dense."""
        if scipy.sparse.issparse(array):
            array = array.toarray()
        array = np.asarray(array)
        return tf.convert_to_tensor(
            array.astype(self.dtype, copy=False) if array.dtype.kind == "f" else array
        )

    def inputs(self, x: Any) -> Any:
        """One tensor, or a dict of them."""
        return {k: self.tensor(v) for k, v in x.items()} if isinstance(x, dict) else self.tensor(x)

    def rows(self, V: Any, name: str) -> Any:
        """(m, d) rows from (d,) or (d, m) columns: maps run over the first axis.

        Raises: ValueError for another shape.
        """
        V, d = np.asarray(V), sum(self.sizes)
        if V.ndim not in (1, 2) or V.shape[0] != d:
            raise ValueError(f"{name} must have shape ({d},) or ({d}, m), got {V.shape}.")
        return self.tensor(np.ascontiguousarray(np.atleast_2d(V.T)).astype(self.dtype, copy=False))


def like(rows: NDArray, V: Any) -> NDArray:
    """Rows (m, ...) as the columns of a block, or the one row of a vector."""
    return rows.T if np.ndim(V) == 2 else rows[0]


def _generators(model: keras.Model) -> list[Any]:
    """The states of what random layers draw from: variables that Keras leaves out of weights."""
    weights = {id(weight) for weight in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights]


def _numbers(graph: Any) -> int:
    """How many numbers a traced function's tensors hold, its loops' bodies counted once."""
    tensors = (t for op in tape.operations(graph) for t in op.outputs)
    return sum(t.shape.num_elements() or 0 for t in tensors)
