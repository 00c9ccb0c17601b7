"""Lookup layers in front of a model, such as TextVectorization. They run once for each set.

TensorFlow cannot differentiate strings and table lookups. Their results are the same in every pass.
`split` therefore cuts a model behind the lookup layers. The front part is a Preparation. The other
part, called the rest, has all trainable weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
import scipy.sparse
import tensorflow as tf
from numpy.typing import NDArray

from influence.examples.arrays import CHECK_ROWS
from influence.examples.examples import Examples
from influence.examples.tables import is_text
from influence.net import keras_state
from influence.net.graph import is_functional, is_input, nodes_of, replayed
from influence.net.inputs import aliases, declared, fits

# `Preparation.padding` prepares at most this many rows of a set again, each row alone.
_PROBE_ROWS = 8
# These layers are lookup layers even if their inputs are numbers. A layer that takes or returns
# strings is recognised by the dtype of its tensors.
_LOOKUPS = (
    keras.layers.CategoryEncoding,
    keras.layers.Discretization,
    keras.layers.HashedCrossing,
    keras.layers.Hashing,
    keras.layers.IntegerLookup,
    keras.layers.StringLookup,
    keras.layers.TextVectorization,
)


@dataclass(frozen=True)
class Given:
    """Inputs that the whole model declares.

    Attributes:
      declared: a dict from each input's name to the shape of one row and the dtype.
      aliases: a dict from other names of an input to its name, as `inputs.aliases` returns it.
    """

    declared: dict[Any, tuple[tuple, str]]
    aliases: dict[Any, Any]

    def named(self, x: Any) -> dict[Any, Any]:
        """Return a dict of the inputs' arrays by name. Arrays with other names are left out.

        Raises: ValueError if an input is missing.
        """
        if not isinstance(x, dict):
            x = dict.fromkeys(self.declared, x) if len(self.declared) == 1 else {}
        x = {self.aliases.get(key, key): part for key, part in x.items()}
        missing = [name for name in self.declared if name not in x]
        if missing:
            raise ValueError(
                f"x must have the model's inputs {sorted(self.declared)}, got "
                f"{sorted(map(str, x)) or 'one array'}."
            )
        return {name: x[name] for name in self.declared}


class Preparation:
    """Front part of a model: the lookup layers, and all layers before them.

    The rest is the model behind the lookup layers. Given inputs are inputs of the whole model.
    Prepared inputs are inputs of the rest, as a dict of arrays by name. A call of the Preparation
    converts given inputs to prepared inputs.

    Args:
      model: a functional model from some of the given inputs to the results of the lookups.
      used: the names of the inputs of `model`, in their order.
      results: the names of the outputs of `model`, as inputs of the rest, in their order. None is
        also the name of a given input, so `gave` can recognise prepared inputs.
      passed: the names of the given inputs that the rest takes unchanged.
      given: the inputs of the whole model.
    """

    def __init__(
        self,
        model: keras.Model,
        used: tuple[Any, ...],
        results: tuple[str, ...],
        passed: tuple[str, ...],
        given: Given,
    ):
        self.model, self.used, self.results, self.passed = model, used, results, passed
        self.given = given
        self._known: WeakKeyDictionary[Examples, Examples] = WeakKeyDictionary()

    def __repr__(self) -> str:
        """Show the names of the layers."""
        kinds = keras.layers.InputLayer
        return ", ".join(layer.name for layer in self.model.layers if not isinstance(layer, kinds))

    def __getstate__(self) -> dict:
        """Pickle everything except the prepared sets."""
        return {**self.__dict__, "_known": None}

    def __setstate__(self, state: dict) -> None:
        """Restore the model. No set is prepared yet."""
        self.__dict__.update(state, _known=WeakKeyDictionary())

    def gave(self, x: Any) -> bool:
        """Return True if x contains prepared inputs, and False if it contains given inputs."""
        return isinstance(x, dict) and set(x) == {*self.results, *self.passed}

    def __call__(self, x: Any) -> dict[str, Any]:
        """Return the prepared inputs for the given inputs x of n rows.

        Raises: TypeError or ValueError if the layers cannot take x.
        """
        x = self.given.named(x)
        tensors = [declared_tensor(x[name], name, *self.given.declared[name]) for name in self.used]
        try:
            found = self.model(tensors, training=False)
        except (TypeError, ValueError, tf.errors.OpError) as error:
            got = ", ".join(f"{name}: {np.asarray(x[name]).dtype}" for name in self.used)
            raise ValueError(f"x does not fit the layers {self!r}, got {got}.") from error
        found = found if isinstance(found, list | tuple) else [found]
        results = {name: _array(part, name) for name, part in zip(self.results, found, strict=True)}
        return results | {name: x[name] for name in self.passed}

    def knows(self, examples: Examples) -> bool:
        """Return True if this set was prepared before."""
        return examples in self._known

    def applied(self, examples: Examples) -> Examples:
        """Return examples with prepared inputs. Prepared examples are returned unchanged.

        Each set is prepared only once. The prepared set is cached.

        Raises: TypeError or ValueError if the layers cannot take x.
        """
        if self.gave(examples.take([0]).x):
            return examples
        if examples not in self._known:
            batches = [self(x) for x, _ in examples.batches(CHECK_ROWS)]
            x = {name: _joined([batch[name] for batch in batches]) for name in batches[0]}
            self._known[examples] = Examples._trusted(x, examples.y)
        return self._known[examples]

    def padding(self, given: Examples, prepared: Examples) -> Any:
        """Return the shortest row that has padding in `prepared`, among the first rows of a set.

        TextVectorization without `output_sequence_length` pads each batch to its longest row. The
        method prepares the first rows of `given` one by one, and compares each with the same row of
        `prepared`.

        Returns: (row, x), the row's number and its prepared inputs (1, ...) without padding. None
          if no row is padded.
        Raises: ValueError if a row that is prepared alone differs from the same row of `prepared`
          in more than zeros at the end.
        """
        found, fewest = None, np.inf
        for row in range(min(len(given), _PROBE_ROWS)):
            x, among = self(given.take([row]).x), prepared.take([row]).x
            for name, part in x.items():
                one, all_ = _dense(part), _dense(among[name])
                sizes = zip(one.shape, all_.shape, strict=True)
                extra = [(0, most - size) for size, most in sizes]
                if not np.allclose(np.pad(one, extra), all_, rtol=1e-5):
                    raise ValueError(
                        f"model must prepare each row by itself, got another {name!r} for row "
                        f"{row} alone than among {len(given)} rows, by the layers {self!r}."
                    )
                if any(more for _, more in extra) and one.size < fewest:
                    found, fewest = (row, x), one.size
        return found


def split(model: keras.Model) -> tuple[Preparation | None, keras.Model]:
    """Cut a model behind its last lookup layers.

    The Preparation gets the lookup layers and all layers before them. All other layers stay in the
    rest, such as Normalization or Rescaling of floating inputs.

    Returns: (Preparation, rest). The rest shares its layers and weights with the model, and has the
      same compiled loss and output names. The result is (None, model) if the model has no lookup
      layers, or if the inputs of all lookup layers depend on trainable weights.
    Raises: ValueError naming the layer for a subclassed model, and for a model in which one layer
      contains both lookup layers and trainable weights.
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
    nodes = nodes_of(graph)
    front = _front(nodes)
    if not front:
        return None, model  # all lookups depend on trainable weights and must stay
    for node in nodes:
        if id(node) in front and _trains(node.operation):
            raise ValueError(
                f"model must keep its lookup layers apart from its weights, got both in layer "
                f"{node.operation.name!r} of {model.name!r}; call its layers one by one."
            )
    cut = _cut(nodes, front)
    wanted, other = declared(graph), aliases(graph)
    name_of = {id(tensor): name for name, tensor in wanted.items()}
    names: list[str] = []
    inputs = []
    for tensor in cut:
        name = name_of.get(id(tensor), f"{tensor._keras_history[0].name}_output")
        while name in names or (id(tensor) not in name_of and (name in wanted or name in other)):
            name += "_"
        names.append(name)
        shape, dtype = (None, *tensor.shape[1:]), tensor.dtype
        if "float" in dtype and id(tensor) not in name_of:
            # The rest's first layers cast floating inputs to the dtype of the weights anyway.
            dtype = (model.trainable_weights or model.weights)[0].dtype
        inputs.append(keras.Input(batch_shape=shape, dtype=dtype, name=name))
    behind = [node for node in nodes if id(node) not in front]
    made = dict(zip(map(id, cut), inputs, strict=True))
    made = replayed(behind, made, lambda operation: operation)
    outputs = keras.tree.map_structure(lambda tensor: made[id(tensor)], graph._outputs_struct)
    rest = keras.Model(inputs, outputs, name=model.name)
    compile_like(rest, model)
    pairs = list(zip(names, cut, strict=True))
    results = {name: tensor for name, tensor in pairs if id(tensor) not in name_of}
    before = {id(tensor) for node in nodes if id(node) in front for tensor in node.outputs}
    used = [tensor for tensor in graph.inputs if id(tensor) in before]
    lookups = keras.Model(used, list(results.values()), name=f"{model.name}_lookups")
    shapes = {name: (tuple(t.shape[1:]), t.dtype) for name, t in wanted.items()}
    passed = tuple(name for name in names if name not in results)
    given = Given(shapes, other)
    names_used = tuple(name_of[id(tensor)] for tensor in used)
    return Preparation(lookups, names_used, tuple(results), passed, given), rest


def compile_like(copy: keras.Model, model: keras.Model) -> None:
    """Compile a copy of a model with the model's loss, its loss weights and a new optimiser.

    The new optimiser has the configuration of the model's optimiser. A user's training function may
    call `fit` on the copy, so the copy must train as the model does.
    """
    compiled = getattr(model, "_compile_loss", None)
    if model.compiled and compiled is not None:
        optimizer: Any = keras_state.optimizer_of(model)
        try:
            optimizer = type(optimizer).from_config(optimizer.get_config())
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            optimizer = "sgd"  # the model's optimiser is missing or has no configuration
        weights = compiled._user_loss_weights
        copy.compile(optimizer=optimizer, loss=model.loss, loss_weights=weights)


def _front(nodes: list[Any]) -> set[int]:
    """Return the ids of the nodes of lookup layers, and of all nodes on which these depend.

    Lookup layers whose inputs depend on trainable weights are left out.
    """
    made_by = {id(t): node for node in nodes for t in node.outputs}
    behind: dict[int, bool] = {}

    def is_behind_weights(node: Any) -> bool:
        if id(node) not in behind:
            before = [is_behind_weights(made_by[id(t)]) for t in node.input_tensors]
            behind[id(node)] = any(before) or any(
                _trains(made_by[id(t)].operation) for t in node.input_tensors
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


def _trains(operation: Any) -> bool:
    """Return True for a layer with trainable weights. Other operations have no weights."""
    return bool(getattr(operation, "trainable_variables", ()))


def _looks_up(operation: Any) -> bool:
    inner = operation._flatten_layers() if isinstance(operation, keras.Layer) else ()
    return any(isinstance(layer, _LOOKUPS) for layer in inner)


def _cut(nodes: list[Any], front: set[int]) -> list[Any]:
    """Return the tensors that the rest takes: results of the front, and inputs of the model."""
    of_front = {id(t) for node in nodes if id(node) in front for t in node.outputs}
    found: dict[int, Any] = {}
    for node in nodes:
        if id(node) in front:
            continue
        if is_input(node):
            found.update({id(t): t for t in node.outputs})
        found.update({id(t): t for t in node.input_tensors if id(t) in of_front})
    return sorted(found.values(), key=lambda t: t.name)


def declared_tensor(value: Any, name: Any, wanted: tuple, dtype: str) -> Any:
    """Convert the given array of an input to a tensor of its declared rank and dtype."""
    array = value.toarray() if scipy.sparse.issparse(value) else np.asarray(value)
    shape = array.shape[1:]
    if not fits(shape, wanted):
        raise ValueError(f"x[{name!r}] must have rows of shape {wanted}, got {shape}.")
    if len(shape) < len(wanted):
        array = array[..., None]
    elif len(shape) > len(wanted):
        array = array[..., 0]
    if (dtype == "string") != is_text(array):
        raise TypeError(f"x[{name!r}] must hold {dtype} entries, got dtype {array.dtype}.")
    tensor = tf.convert_to_tensor(array)
    return tensor if dtype == "string" else tf.cast(tensor, dtype)


def _array(tensor: Any, name: str) -> Any:
    """Convert an output tensor of the front part to an array, or to a CSR matrix if sparse."""
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
    """Join the rows of batches. Pad shorter rows with zeros at the end, as lookup layers do."""
    if scipy.sparse.issparse(parts[0]):
        return scipy.sparse.vstack(parts, "csr")
    longest = np.max([part.shape[1:] for part in parts], axis=0).astype(int)

    def padded(part: NDArray) -> NDArray:
        missing = zip(part.shape[1:], longest, strict=True)
        return np.pad(part, [(0, 0), *((0, most - size) for size, most in missing)])

    return np.concatenate([padded(part) for part in parts])
