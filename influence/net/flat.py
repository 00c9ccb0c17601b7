"""Keras models as functions of a flat vector theta, traced once by TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
import scipy.sparse
import tensorflow as tf
from numpy.typing import NDArray

from influence.common.numbers import numbers
from influence.examples.labels import PLAIN, POSITIONS, fields, is_packed, labels
from influence.net import ops, tape
from influence.net.inputs import for_call, named
from influence.net.losses import PerExampleLoss
from influence.net.preprocessing import Preparation
from influence.net.refused import check_no_mask
from influence.net.trunk import Parts, Trunk


class FlatModel:
    """Model whose outputs and losses are functions of theta. It also converts arrays to tensors.

    `parts` fixes the weights that form theta. Freezing a layer later has no effect.

    Args:
      parts: the model, the weights that form theta, and a frozen trunk in front of them.
      loss: the model's per-example loss.
      preparation: the lookup layers in front of the model, or None.

    Attributes:
      model: the model behind the trunk, which takes features. Without a trunk, the whole model.
      trunk: the trunk, or None.
    """

    def __init__(self, parts: Parts, loss: PerExampleLoss, preparation: Preparation | None = None):
        self.parts, self.loss, self.preparation = parts, loss, preparation
        self.sizes = [int(np.prod(w.shape)) for w in self.weights]
        self.dtype = np.dtype(self.weights[0].dtype)
        self._functions: dict[str, Any] = {}
        self._seen: tuple[bool, int] | None = None
        # `adds` is True if z has a column of losses that the model adds by `add_loss`. `_loops` is
        # True if the method `added` must use a loop over rows. It is None until the first call of
        # `added`.
        self.adds = bool(getattr(loss, "adds", False))
        self._loops: bool | None = None
        self._uncut: FlatModel | None = None
        # `GenericNeuralNet.row_masses` caches the masses of each set of examples here.
        self.row_masses: WeakKeyDictionary[Any, NDArray] = WeakKeyDictionary()

    @property
    def model(self) -> keras.Model:
        """The model behind the trunk. It takes features if there is a trunk."""
        return self.parts.rest

    @property
    def trunk(self) -> Trunk | None:
        """The trunk in front of the model, or None."""
        return self.parts.trunk

    @property
    def weights(self) -> tuple[Any, ...]:
        """The variables that form theta."""
        return self.parts.weights

    @property
    def uncut(self) -> FlatModel:
        """FlatModel of the whole model, without a trunk. It takes the model's own inputs."""
        if self.trunk is None:
            return self
        if self._uncut is None:
            self._uncut = FlatModel(self.parts.uncut(), self.loss, self.preparation)
        return self._uncut

    def __getstate__(self) -> dict:
        """Pickle the model and the loss without the traced functions."""
        drawn = [state.numpy() for state in _generators(self.parts.whole)]
        empty = {"_functions": {}, "_uncut": None, "row_masses": None}
        return {**self.__dict__, **empty, "_drawn": drawn}

    def __setstate__(self, state: dict) -> None:
        """Restore the attributes and the states of the model's random layers."""
        drawn = state.pop("_drawn")
        self.__dict__.update(state)
        self.row_masses = WeakKeyDictionary()
        for generator, value in zip(_generators(self.parts.whole), drawn, strict=True):
            generator.assign(value)

    # --- functions of theta, used by tape -----------------------------------------------------

    def model_output(self, theta: Any, x: Any) -> Any:
        """Return the model's output in inference mode. The model's variables do not change."""
        return self.called(theta, x)[0]

    def output(self, theta: Any, x: Any) -> Any:
        """Return z, the model's output in the form that the loss takes, (n, ...).

        z is the output itself, the logits before its softmax or sigmoid, or a matrix of several
        outputs. `loss.function` and `loss.curved` take z as an argument.
        """
        raw, added = self.called(theta, x)
        if not self.adds:
            if added and self.loss.role == "loss":
                raise ValueError(
                    f"model must not add losses that depend on x, got add_loss in "
                    f"{self.model.name!r}, which was found only when it ran; call the model on a "
                    "batch before making the net, or put these losses into the loss."
                )
            return self.loss.seen(raw)
        return self.loss.seen(raw, self.added(theta, x))

    def called(self, theta: Any, x: Any) -> tuple[Any, list[Any]]:
        """Return the model's output, and the list of losses that it adds by `add_loss`."""
        parts = zip(self.weights, tf.split(theta, self.sizes), strict=True)
        mapping = [(w, tf.reshape(part, w.shape)) for w, part in parts]
        scope = keras.StatelessScope(state_mapping=mapping, collect_losses=True)
        with scope, ops.exact():
            raw = self.model(for_call(self.model, x), training=False)
        if not self.loss.masked:
            check_no_mask(self.model, keras.tree.flatten(raw))
        return raw, scope.losses

    def added(self, theta: Any, x: Any) -> Any:
        """Return the sum of the losses that `add_loss` adds for each row, (n,).

        The model is called for each row alone, because it adds one number for a whole batch.
        """

        def of_row(row: Any) -> Any:
            row = tf.nest.map_structure(lambda t: tf.expand_dims(t, 0), row)
            return tf.cast(tf.add_n(self.called(theta, row)[1]), theta.dtype)

        if self._loops is None:
            row = tf.nest.map_structure(lambda t: tf.TensorSpec([1, *t.shape[1:]], t.dtype), x)
            alone = tf.function(lambda t: self.called(self.theta(), t)[0], autograph=False)
            self._loops = tape.needs_loop(alone.get_concrete_function(row).graph)
        return tape.looped(of_row, x, theta.dtype) if self._loops else tf.vectorized_map(of_row, x)

    def losses(self, theta: Any, x: Any, y: Any) -> Any:
        """Return the loss of each example, (n,)."""
        return tf.cast(self.loss.function(y, self.output(theta, x)), theta.dtype)

    def penalty(self, theta: Any) -> Any:
        """Return the penalty, a scalar: the sum of the regularisers of all trainable weights."""
        total = tf.zeros((), theta.dtype)
        for weight, part in zip(self.weights, tf.split(theta, self.sizes), strict=True):
            if weight.regularizer is not None:
                total += tf.cast(weight.regularizer(tf.reshape(part, weight.shape)), theta.dtype)
        own = set(map(id, self.weights))
        for weight in self.parts.whole.trainable_weights:  # weights outside theta add a constant
            if id(weight) not in own and weight.regularizer is not None:
                total += tf.cast(weight.regularizer(weight.value), theta.dtype)
        return total

    # --- execution --------------------------------------------------------------------------------

    def run(self, name: str, function: Callable, *tensors: Any, leading: int = 1) -> Any:
        """Call `function` on tensors and return its results as NumPy arrays.

        The first call traces the function and caches the trace under `name`. The first `leading`
        dimensions of each tensor are dynamic from the first trace. Otherwise TensorFlow would trace
        again when sizes vary. The last bits of a result would then depend on earlier calls, and a
        resumed run would differ from an uninterrupted run.
        """

        def signature(t):
            is_theta = t.shape[-1:] == [sum(self.sizes)]
            open_axes = min(leading, t.shape.rank - is_theta)
            return tf.TensorSpec([None] * open_axes + t.shape[open_axes:].as_list(), t.dtype)

        signatures = tf.nest.map_structure(signature, tensors)
        key = f"{name} {signatures}"
        if key not in self._functions:
            # With autograph, tracing would take a sixth more time. The cache holds concrete
            # functions. If it held `traced`, TensorFlow would warn of retracing when several nets
            # use functions with the same name.
            traced = tf.function(function, input_signature=signatures, autograph=False)
            try:
                with ops.exact():
                    concrete = traced.get_concrete_function()
            except LookupError as error:
                raise ops.no_derivative(error) from error
            if name == "losses":
                self._check(concrete.graph)
            if name == "mask" and ops.depends(concrete.graph, concrete.graph.inputs[0]):
                raise ValueError(
                    "model must mask positions by its inputs alone, got a mask of "
                    f"{self.model.name!r} that depends on trainable weights: the number of valid "
                    "positions would change with theta; put the Masking layer before them."
                )
            if name == "input_gradient":
                self._check(concrete.graph, by_inputs=True)
            self._functions[key] = concrete
        return tf.nest.map_structure(lambda t: t.numpy(), self._functions[key](*tensors))

    def each(self, x: Any, y: Any) -> tape.Each:
        """Return the function that applies another function to many vectors.

        It is `tape.looped` if `tape.needs_loop` finds that the losses need a loop. Otherwise it is
        `tf.vectorized_map`.
        """
        if self.facts(x, y)[0]:
            return partial(tape.looped, dtype=self.dtype)
        return tf.vectorized_map

    def facts(self, x: Any, y: Any) -> tuple[bool, int]:
        """Return (must_loop, activations_per_row) of the losses.

        `must_loop` is the result of `tape.needs_loop`. `activations_per_row` is the number of
        tensor entries that a second row adds to the traced function.
        """
        if self._seen is None:
            row = tf.nest.map_structure(lambda t: t[:1], (x, y))
            rows = tf.nest.map_structure(lambda t: tf.concat([t, t], 0), row)
            # TensorFlow warns of repeated traces of one function, so this lambda is a new function.
            losses = tf.function(lambda *tensors: self.losses(*tensors), autograph=False)
            theta = self.theta()
            with ops.exact():
                graphs = [losses.get_concrete_function(theta, *b).graph for b in (row, rows)]
            self._check(graphs[0])
            one, two = (_numbers(graph) for graph in graphs)
            self._seen = tape.needs_loop(graphs[0]), max(two - one, 1)
        return self._seen

    def _check(self, graph: Any, by_inputs: bool = False) -> None:
        """Refuse losses that TensorFlow differentiates wrongly.

        Without `by_inputs`, `graph` computes the losses. Their first and second derivatives with
        respect to theta, the graph's first argument, are checked. With `by_inputs`, `graph`
        computes `input_gradient`. The first derivatives of its operations are checked.
        """
        names = [layer.name for layer in self.model._flatten_layers()]
        sources = graph.inputs if by_inputs else graph.inputs[:1]
        ops.check_operations(graph, sources, names, twice=not by_inputs)

    # --- tensors ------------------------------------------------------------------------------

    def theta(self) -> Any:
        """Return the current weights as one vector (d,)."""
        return tf.concat([tf.reshape(w.value, [-1]) for w in self.weights], 0)

    def tensor(self, array: Any, name: str = "y") -> Any:
        """Convert an array to a dense tensor. Floats get theta's dtype. Integers keep their dtype.

        Labels that are packed with weights or by output name become a dict of tensors.

        Raises: TypeError naming `name` if the array does not contain numbers.
        """
        if is_packed(array):
            parts = fields(array).items()
            return {key: self.tensor(np.ascontiguousarray(part), name) for key, part in parts}
        array = numbers(array.toarray() if scipy.sparse.issparse(array) else array, name)
        return tf.convert_to_tensor(
            array.astype(self.dtype, copy=False) if array.dtype.kind == "f" else array
        )

    def inputs(self, x: Any) -> Any:
        """Convert inputs to one tensor, or to a dict of tensors by the model's own names.

        If x contains features of the trunk, they are only converted. Otherwise the lookup layers
        and the trunk, if any, are applied to x first.
        """
        is_feature = self.trunk is not None and self.trunk.gave(x)
        if self.preparation is not None and not is_feature and not self.preparation.gave(x):
            x = self.preparation(x)
        if self.trunk is not None:
            x = x if is_feature else self.trunk(x)
            if len(x) == 1:
                (x,) = x.values()
        x = named(self.model, x)
        if isinstance(x, dict):
            return {key: self.tensor(value, f"x[{key!r}]") for key, value in x.items()}
        return self.tensor(x, "x")

    def batch(self, x: Any, y: Any, *, weighed: bool = False) -> tuple[Any, Any]:
        """Convert the inputs and labels of a batch to tensors.

        If the loss masks positions, the labels become a dict that also has a weight for each
        position. A valid position of row i has the weight 1 / v_i, where v_i is the row's number of
        valid positions. The row's loss is then the mean over its valid positions. With `weighed`, a
        valid position has the weight 1. This multiplies row i's loss by v_i. All other positions
        have the weight 0.
        """
        x, y = self.inputs(x), self.tensor(y)
        if not self.loss.has_masses:
            return x, y
        valid = self.valid(x, y)
        if not weighed:
            counts = tf.reduce_sum(valid, axis=list(range(1, len(valid.shape))), keepdims=True)
            valid = tf.math.divide_no_nan(valid, counts)
        return x, {**(y if isinstance(y, dict) else {PLAIN: y}), POSITIONS: valid}

    def batches(self, x: Any, y: Any, *, weighed: bool = False) -> tuple[Any, Any]:
        """Convert arrays (r, b, ...) of r batches with b rows each to tensors, as `batch` does."""
        r, b = y.shape[:2]
        x, y = tf.nest.map_structure(lambda part: part.reshape(r * b, *part.shape[2:]), (x, y))
        found = self.batch(x, y, weighed=weighed)
        return tf.nest.map_structure(lambda t: tf.reshape(t, [r, b, *t.shape[1:]]), found)

    def valid(self, x: Any, y: Any) -> Any:
        """Return 1 for each valid position of a batch of tensors and 0 for the others, (n, ...)."""
        found = []
        if self.loss.masked:
            found.append(tf.constant(self.run("mask", self._mask, self.theta(), x)))
        if self.loss.ignored is not None:
            own = labels(y)
            own = next(iter(own.values())) if isinstance(own, dict) else own
            own = tf.cast(own, tf.float64) != float(self.loss.ignored)
            if found and len(own.shape) == len(found[0].shape) + 1:  # labels (n, T, 1)
                own = tf.squeeze(own, -1)
            found.append(tf.cast(own, self.dtype))
        return found[0] if len(found) == 1 else found[0] * found[1]

    def _mask(self, theta: Any, x: Any) -> Any:
        return tf.cast(self.called(theta, x)[0]._keras_mask, self.dtype)

    def rows(self, V: Any, name: str) -> Any:
        """Convert the columns of V (d, m) to the rows of a tensor (m, d), for maps over vectors.

        A vector V (d,) becomes a tensor (1, d).

        Raises: ValueError if V has another shape.
        """
        V, d = numbers(V, name), sum(self.sizes)
        if V.ndim not in (1, 2) or V.shape[0] != d:
            raise ValueError(f"{name} must have shape ({d},) or ({d}, m), got {V.shape}.")
        return self.tensor(np.ascontiguousarray(np.atleast_2d(V.T)).astype(self.dtype, copy=False))


def like(rows: NDArray, V: Any) -> NDArray:
    """Return the transpose of `rows` if V is a matrix (d, m), or the only row if V is (d,)."""
    return rows.T if np.ndim(V) == 2 else rows[0]


def _generators(model: keras.Model) -> list[Any]:
    """Return the variables that hold the states of random layers.

    `model.variables` contains them, but `model.weights` does not.
    """
    weights = {id(weight) for weight in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights]


def _numbers(graph: Any) -> int:
    """Return the number of entries of all tensors in a traced function.

    The body of a loop counts once.
    """
    tensors = (t for op in tape.operations(graph) for t in op.outputs)
    return sum(t.shape.num_elements() or 0 for t in tensors)
