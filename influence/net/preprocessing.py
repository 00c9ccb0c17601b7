"""Lookup layers in front of a model's weights, such as TextVectorization. They run only once.

TensorFlow cannot differentiate strings and table lookups, and they give the same result in every
pass. `split` cuts a model behind them. The front part is a Preparation. The rest holds all
trainable weights.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
import scipy.sparse
import tensorflow as tf
from numpy.typing import NDArray

from influence.examples.arrays import CHECK_ROWS
from influence.examples.examples import Examples
from influence.net.inputs import aliases, declared, fits, is_functional, named

# The first rows are prepared again, each by itself.
_PROBE_ROWS = 8
# These layers take numbers too, but only look them up. The layers of strings are found by dtype.
_LOOKUPS = (
    keras.layers.CategoryEncoding,
    keras.layers.Discretization,
    keras.layers.HashedCrossing,
    keras.layers.Hashing,
    keras.layers.IntegerLookup,
    keras.layers.StringLookup,
    keras.layers.TextVectorization,
)


class Preparation:
    """Front part of a model: the lookup layers, and all layers before them.

    Args:
      model: a functional model from the given inputs to the inputs of the rest.
      names: the names of the inputs of the rest, in the order of the outputs of `model`.

    A call with given inputs returns a dict of arrays by these names. No name of an input of the
    rest that `model` computes is the name of a given input. So `gave` can tell both kinds apart.
    """

    def __init__(self, model: keras.Model, names: tuple[str, ...]):
        self.model, self.names = model, names
        self._known: WeakKeyDictionary[Examples, Examples] = WeakKeyDictionary()

    def __repr__(self) -> str:
        """Show the names of the layers."""
        layers = (
            layer for layer in self.model.layers if not isinstance(layer, keras.layers.InputLayer)
        )
        return ", ".join(layer.name for layer in layers)

    def __getstate__(self) -> dict:
        """Pickle the model without the prepared sets."""
        return {"model": self.model, "names": self.names, "_known": None}

    def __setstate__(self, state: dict) -> None:
        """Restore the model. No set is prepared yet."""
        self.__dict__.update(state, _known=WeakKeyDictionary())

    def gave(self, x: Any) -> bool:
        """Return True if x holds the inputs of the rest, and not given inputs."""
        return isinstance(x, dict) and set(x) == set(self.names)

    def __call__(self, x: Any) -> dict[str, Any]:
        """Return the inputs of the rest, for given inputs of n rows.

        Raises: TypeError or ValueError if the layers cannot take x.
        """
        wanted = declared(self.model)
        x = named(self.model, x)
        if not isinstance(x, dict):
            x = dict.fromkeys(wanted, x) if len(wanted) == 1 else {"x": x}
        if set(x) != set(wanted):
            raise ValueError(
                f"x must have the model's inputs {sorted(wanted)}, got {sorted(map(str, x))}."
            )
        tensors = [_tensor(x[name], tensor) for name, tensor in wanted.items()]
        try:
            found = tf.nest.flatten(self.model(tensors, training=False), expand_composites=False)
        except (TypeError, ValueError, tf.errors.OpError) as error:
            got = ", ".join(f"{name}: {np.asarray(part).dtype}" for name, part in x.items())
            raise ValueError(f"x does not fit the layers {self!r}, got {got}.") from error
        return {name: _array(part, name) for name, part in zip(self.names, found, strict=True)}

    def applied(self, examples: Examples) -> Examples:
        """Return examples with prepared inputs. Examples that are prepared already are returned.

        A set is prepared once, and then found again.

        Raises: TypeError or ValueError if the layers cannot take x, or give row 0 other inputs
          alone than among other rows.
        """
        if self.gave(examples.take([0]).x):
            return examples
        if examples not in self._known:
            batches = [self(x) for x, _ in examples.batches(CHECK_ROWS)]
            x = {name: _joined([batch[name] for batch in batches]) for name in self.names}
            self._known[examples] = Examples._trusted(x, examples.y)
        return self._known[examples]

    def padding(self, given: Examples, prepared: Examples) -> Any:
        """Return x of the shortest of some rows, prepared by itself, or None if no row is padded.

        TextVectorization without `output_sequence_length` pads each batch to its longest row.

        Returns: (row, x) with the row number and its inputs (1, ...), without padding.
        Raises: ValueError if a row has other inputs by itself, apart from zeros at the end.
        """
        found, fewest = None, np.inf
        for row in range(min(len(given), _PROBE_ROWS)):
            x, among = self(given.take([row]).x), prepared.take([row]).x
            for name, part in x.items():
                one, all_ = _dense(part), _dense(among[name])
                sizes = zip(one.shape, all_.shape, strict=True)
                extra = [(0, most - size) for size, most in sizes]
                if not np.array_equal(np.pad(one, extra), all_):
                    raise ValueError(
                        f"model must prepare each row by itself, got another {name!r} for row "
                        f"{row} alone than among {len(given)} rows, by the layers {self!r}."
                    )
                if any(more for _, more in extra) and one.size < fewest:
                    found, fewest = (row, x), one.size
        return found


def split(model: keras.Model) -> tuple[Preparation | None, keras.Model]:
    """Cut a model behind its last lookup layers.

    Everything that a lookup layer depends on goes into the Preparation. All other layers stay in
    the rest, such as Normalization or Rescaling of floating inputs.

    Returns: (Preparation, rest). The rest shares the layers and weights of the model, its compiled
      loss and the names of its outputs. (None, model) for a model without such layers.
    Raises: ValueError naming the layer if the model cannot be cut. This is so for a subclassed
      model, and for a layer that has trainable weights and contains lookup layers.
    """
    looking = [layer for layer in model._flatten_layers() if isinstance(layer, _LOOKUPS)]
    graph = getattr(model, "_functional", None) or model
    strings = is_functional(graph) and any(t.dtype == "string" for t in graph.inputs)
    if not looking and not strings:
        return None, model
    what = f"layer {looking[0].name!r}" if looking else f"the strings of {graph.inputs[0].name!r}"
    if not is_functional(graph) or type(model).__module__.split(".")[0] != "keras":
        raise ValueError(
            f"model must be Sequential or functional to be cut behind {what}, got the class "
            f"{type(model).__name__}; apply the layer to the rows first, and give a model without "
            "it."
        )
    nodes = [node for depth in graph._nodes_by_depth.values() for node in depth]
    front = _front(nodes)
    if not front:
        return None, model  # a lookup behind trainable weights
    for node in nodes:
        if id(node) in front and node.operation.trainable_variables:
            raise ValueError(
                f"model must keep its lookup layers apart from its weights, got both in layer "
                f"{node.operation.name!r} of {model.name!r}; call its layers one by one."
            )
    cut = _cut(nodes, front)
    given = {str(name) for name in (*declared(graph), *aliases(graph))}
    names: list[str] = []
    inputs = []
    for tensor in cut:
        operation = tensor._keras_history[0]
        is_input = _is_input(operation)
        name = tensor.name if is_input else f"{operation.name}_output"
        while name in names or (name in given and not is_input):
            name += "_"
        names.append(name)
        shape = (None, *tensor.shape[1:])
        inputs.append(keras.Input(batch_shape=shape, dtype=tensor.dtype, name=name))
    outputs = keras.Function(cut, graph._outputs_struct)._run_through_graph(
        inputs, operation_fn=lambda operation: operation
    )
    rest = keras.Model(inputs, outputs, name=model.name)
    compile_like(rest, model)
    front_model = keras.Model(graph._inputs_struct, cut, name=f"{model.name}_lookups")
    return Preparation(front_model, tuple(names)), rest


def compile_like(copy: keras.Model, model: keras.Model) -> None:
    """Give a copy of a model the compiled loss and loss weights of the model."""
    compiled = getattr(model, "_compile_loss", None)
    if model.compiled and compiled is not None:
        copy.compile(loss=model.loss, loss_weights=compiled._user_loss_weights)


def _front(nodes: list[Any]) -> set[int]:
    """Return the ids of the nodes of lookup layers, and of all nodes that these depend on.

    A lookup of something that depends on trainable weights is left out.
    """
    made_by = {id(t): node for node in nodes for t in node.outputs}
    behind: dict[int, bool] = {}

    def is_behind_weights(node: Any) -> bool:
        if id(node) not in behind:
            before = [is_behind_weights(made_by[id(t)]) for t in node.input_tensors]
            behind[id(node)] = any(before) or any(
                made_by[id(t)].operation.trainable_variables for t in node.input_tensors
            )
        return behind[id(node)]

    front: set[int] = set()

    def add(node: Any) -> None:
        if id(node) not in front:
            front.add(id(node))
            for tensor in node.input_tensors:
                add(made_by[id(tensor)])

    for node in nodes:
        tensors = [*node.input_tensors, *node.outputs]
        looks = any(t.dtype == "string" for t in tensors) or _looks_up(node.operation)
        if looks and not is_behind_weights(node):
            add(node)
    return front


def _looks_up(operation: Any) -> bool:
    inner = operation._flatten_layers() if isinstance(operation, keras.Layer) else ()
    return any(isinstance(layer, _LOOKUPS) for layer in inner)


def _cut(nodes: list[Any], front: set[int]) -> list[Any]:
    """Return the tensors that lead from the front, or from an input, into the rest."""
    of_front = {id(t) for node in nodes if id(node) in front for t in node.outputs}
    found: dict[int, Any] = {}
    for node in nodes:
        if id(node) in front:
            continue
        if _is_input(node.operation):
            found.update({id(t): t for t in node.outputs})
        found.update({id(t): t for t in node.input_tensors if id(t) in of_front})
    return sorted(found.values(), key=lambda t: t.name)


def _is_input(operation: Any) -> bool:
    return isinstance(operation, keras.layers.InputLayer)


def _tensor(value: Any, tensor: Any) -> Any:
    """Convert the given array of an input to a tensor of its declared dtype and rank."""
    array = value.toarray() if scipy.sparse.issparse(value) else np.asarray(value)
    shape, wanted = array.shape[1:], tuple(tensor.shape[1:])
    if not fits(shape, wanted):
        raise ValueError(f"x[{tensor.name!r}] must have rows of shape {wanted}, got {shape}.")
    if len(shape) < len(wanted):
        array = array[..., None]
    elif len(shape) > len(wanted):
        array = array[..., 0]
    if tensor.dtype == "string":
        return tf.convert_to_tensor(array)
    return tf.cast(tf.convert_to_tensor(array), tensor.dtype)


def _array(tensor: Any, name: str) -> Any:
    """Convert an output of the front part to an array, or a sparse one to CSR format."""
    if isinstance(tensor, tf.SparseTensor):
        rows, columns = tensor.indices.numpy().T
        return scipy.sparse.csr_matrix((tensor.values.numpy(), (rows, columns)), tensor.shape)
    if isinstance(tensor, tf.RaggedTensor):
        raise ValueError(
            f"model must prepare rows of one length, got a ragged {name!r}; give its layer "
            "ragged=False and an output_sequence_length."
        )
    return tensor.numpy()


def _dense(part: Any) -> NDArray:
    return part.toarray() if scipy.sparse.issparse(part) else part


def _joined(parts: list[Any]) -> Any:
    """Join the rows of batches. Shorter rows get zeros at the end, as the layer would add them."""
    if scipy.sparse.issparse(parts[0]):
        return scipy.sparse.vstack(parts, "csr")
    longest = np.max([part.shape[1:] for part in parts], axis=0).astype(int)

    def padded(part: NDArray) -> NDArray:
        missing = zip(part.shape[1:], longest, strict=True)
        return np.pad(part, [(0, 0), *((0, most - size) for size, most in missing)])

    return np.concatenate([padded(part) for part in parts])
