"""Frozen trunks: the layers of a model that depend on no weight of theta. They run once per row.

`Parts.of` cuts a model at the last tensors that depend on no weight of theta. The trunk computes
these tensors, called the features, from the inputs. The rest computes the model's outputs from the
features. Derivatives with respect to theta need only the rest.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.common.memory import fitting
from influence.examples.examples import Examples
from influence.examples.featured import Featured, featured
from influence.net import ops
from influence.net.graph import is_functional, is_input, nodes_of, replayed
from influence.net.inputs import aliases, declared
from influence.net.precision import recast
from influence.net.preprocessing import Given, compile_like, declared_tensor

# One call of a trunk gets at most _ROWS rows, and inputs with at most _ENTRIES numbers in total.
_ROWS, _ENTRIES = 256, 1 << 21
# A trace with this many input rows checks that a trunk returns the same number of rows.
_TRACED = 3
# The features of a row, computed alone and among other rows, may differ by this relative amount.
_RTOL = 1e-3


class Trunk:
    """Function from inputs to features, made of the layers of a model that come before theta.

    Args:
      whole: the model that was cut.
      tensors: the symbolic tensors where the model was cut. Some may be inputs of the model.

    Attributes:
      names: the names of the features, in the order of `tensors`. Inputs of the model keep their
        names. Other names contain the digest. Features of a trunk with other weights therefore have
        other names.
      digest: checksum of the trunk's layers and weights.
    """

    def __init__(self, whole: keras.Model, tensors: list[Any]):
        graph = getattr(whole, "_functional", None) or whole
        self.parts: Parts | None = None  # `Parts` sets this. It is pickled in place of the trunk
        name_of = {id(tensor): name for name, tensor in declared(graph).items()}
        shapes = {name: (tuple(t.shape[1:]), t.dtype) for name, t in declared(graph).items()}
        self._given = Given(shapes, aliases(graph))
        self._graph, self._tensors = graph, tensors
        made = [tensor for tensor in tensors if id(tensor) not in name_of]
        self.model = keras.Model(list(declared(graph).values()), made, name=f"{whole.name}_trunk")
        self._inputs = list(shapes)
        self.digest = self._checksum()
        self.names = [
            name_of.get(id(tensor), f"features_{number}_{self.digest}")
            for number, tensor in enumerate(tensors)
        ]
        self._made = [name for name in self.names if name not in shapes]
        self._traced: Any = None

    def __repr__(self) -> str:
        """Return a text with the number of layers and the last layer's name."""
        layers = [x for x in self.model.layers if not isinstance(x, keras.layers.InputLayer)]
        what = "layer" if len(layers) == 1 else f"{len(layers)} layers up to"
        return f"{what} {layers[-1].name!r}"

    def __call__(self, x: Any) -> dict[str, NDArray]:
        """Return the features of n rows, a dict of arrays (n, ...).

        Raises: TypeError or ValueError for inputs that the model does not take.
        """
        x = self._given.named(x)
        parts = {
            name: declared_tensor(x[name], name, *self._given.declared[name])
            for name in self._inputs
        }
        n = len(parts[self._inputs[0]])
        entries = sum(int(np.prod(part.shape[1:])) for part in parts.values())
        size = fitting(_ENTRIES, entries, min(n, _ROWS))
        found = [
            self._run([part[i : i + size] for part in parts.values()]) for i in range(0, n, size)
        ]
        features = [np.concatenate(pieces) for pieces in zip(*found, strict=True)]
        made = dict(zip(self._made, features, strict=True))
        return {name: made[name] if name in made else parts[name].numpy() for name in self.names}

    def gave(self, x: Any) -> bool:
        """Return True if x contains features of this trunk, and not inputs of the model."""
        return isinstance(x, dict) and set(x) == set(self.names)

    def same_as(self, other: Trunk) -> bool:
        """Return True if `other` computes the same features."""
        return self.names == other.names and self.digest == other.digest

    def applied(self, examples: Examples) -> Examples:
        """Return examples with features as inputs. If they already have these, return them as is.

        Raises: RuntimeError if the trunk's weights have changed.
        """
        self.check_weights()
        if isinstance(examples, Featured):
            return examples if self.same_as(examples.trunk) else featured(examples.given, self)
        return examples if self.gave(examples.take([0]).x) else featured(examples, self)

    def check_weights(self) -> None:
        """Refuse a trunk whose weights have changed since it was made.

        Raises: RuntimeError.
        """
        if self._checksum() != self.digest:
            raise RuntimeError(
                f"weights outside theta have changed since the net was made, in {self!r}; make a "
                "new net for the new weights."
            )

    def check_rows(self, examples: Featured, name: str) -> None:
        """Refuse a trunk if a row's features depend on the other rows.

        The trunk computes the features of one row alone. They are compared with the cached features
        of this row. Each set is checked once.

        Raises: ValueError naming the set `name`.
        """
        if examples.checked:
            return
        row = len(examples) // 2
        among, alone = examples.take([row]).x, self(examples.given.take([row]).x)
        for key in self._made:
            gap = np.abs(alone[key] - among[key]).max()
            if gap > _RTOL * np.abs(among[key]).max():
                raise ValueError(
                    f"model must compute each row by itself, got features of row {row} of {name} "
                    f"alone that differ by {gap:.1e} from those among {len(examples)} rows, in "
                    f"{self!r}; a layer that mixes rows, or a random layer, would do that."
                )
        examples.checked = True

    def composed(self, rest: keras.Model) -> keras.Model:
        """Return the model that applies this trunk and then `rest`.

        If `rest` has another dtype than the trunk, the features are cast.
        """
        given = [
            keras.ops.cast(tensor, new.dtype) if tensor.dtype != new.dtype else tensor
            for tensor, new in zip(self._tensors, rest.inputs, strict=True)
        ]
        results = rest(given[0] if len(given) == 1 else given)
        return keras.Model(self._graph._inputs_struct, results, name=rest.name)

    def __reduce__(self) -> tuple:
        """Pickle `parts` in place of the trunk. Unpickling cuts the model again."""
        return _trunk_of, (self.parts,)

    def _run(self, tensors: list[Any]) -> list[NDArray]:
        if self._traced is None:
            specs = [tf.TensorSpec([None, *shape], d) for shape, d in self._given.declared.values()]

            def call(*tensors: Any) -> list[Any]:
                with keras.StatelessScope():
                    found = self.model(list(tensors), training=False)
                return found if isinstance(found, list) else [found]

            traced = tf.function(call, input_signature=specs, autograph=False)
            with ops.exact():
                self._traced = traced.get_concrete_function()
        return [part.numpy() for part in self._traced(*tensors)]

    def _checksum(self) -> str:
        kinds = [
            f"{type(layer).__name__} {getattr(getattr(layer, 'activation', None), '__name__', '')}"
            for layer in self.model._flatten_layers(include_self=False)
        ]
        shapes = [tuple(tensor.shape) for tensor in self._tensors]
        seen = zlib.crc32(repr((sorted(kinds), shapes)).encode())
        for weight in self.model.weights:
            seen = zlib.crc32(np.ascontiguousarray(weight.numpy()).data, seen)
        return f"{seen:08x}"


def _trunk_of(parts: Parts) -> Trunk | None:
    return parts.trunk


@dataclass(eq=False)
class Parts:
    """Model, the weights that form theta, and the model's two parts: the trunk and the rest.

    Attributes:
      whole: the model.
      weights: the weights that form theta, in the order of `whole.weights`.
      rest: the model behind the trunk. It shares layers with `whole`. Without a trunk it is
        `whole`.
      trunk: the trunk, or None.
      chosen: True if the caller chose the layers of theta, whatever their `trainable` flags.
    """

    whole: keras.Model
    weights: tuple[Any, ...]
    rest: keras.Model
    trunk: Trunk | None = None
    chosen: bool = False

    def __post_init__(self):
        """Set `trunk.parts` to these parts, unless `astype` took the trunk from other parts."""
        if self.trunk is not None and self.trunk.parts is None:
            self.trunk.parts = self

    @classmethod
    def of(cls, model: keras.Model, layers: Any = None) -> Parts:
        """Cut a model behind its last layers that do not depend on theta.

        Args:
          model: a built model.
          layers: the names of the layers whose weights form theta, or None for all trainable
            weights.

        Raises: TypeError or ValueError naming `layers`.
        """
        chosen = layers is not None
        weights = weights_of(model, layers) if chosen else tuple(model.trainable_weights)
        trunk, rest = _cut(model, weights)
        return cls(model, weights, rest, trunk, chosen)

    def uncut(self) -> Parts:
        """Return the same model and weights without a trunk."""
        return Parts(self.whole, self.weights, self.whole, None, self.chosen)

    def astype(self, dtype: str) -> Parts:
        """Return parts with a copy of the rest in `dtype`, and with the same trunk.

        Raises: the errors of `recast`.
        """
        rest = recast(self.rest, dtype)
        place = {id(weight): number for number, weight in enumerate(self.rest.weights)}
        weights = tuple(rest.weights[place[id(weight)]] for weight in self.weights)
        if self.trunk is None:
            return Parts(rest, weights, rest, None, self.chosen)
        whole = self.trunk.composed(rest)
        compile_like(whole, self.whole)
        return Parts(whole, weights, rest, self.trunk, self.chosen)

    def __getstate__(self) -> dict:
        """Pickle the whole model, and the indices of theta's weights in `whole.weights`."""
        place = {id(weight): number for number, weight in enumerate(self.whole.weights)}
        places = [place[id(weight)] for weight in self.weights]
        cut = self.trunk is not None
        return {"whole": self.whole, "places": places, "cut": cut, "chosen": self.chosen}

    def __setstate__(self, state: dict) -> None:
        """Cut the restored model again."""
        self.whole, self.chosen = state["whole"], state["chosen"]
        self.weights = tuple(self.whole.weights[place] for place in state["places"])
        self.trunk, self.rest = None, self.whole
        if state["cut"]:
            self.trunk, self.rest = _cut(self.whole, self.weights)
        self.__post_init__()


def weights_of(model: keras.Model, layers: Any) -> tuple[Any, ...]:
    """Return the weights of some layers, in the order of `model.weights`.

    Weights that training never changes, such as moving statistics, are left out. The `trainable`
    flags do not matter.

    Args:
      model: a built model.
      layers: names of layers, also of layers inside other layers. A string is one name.

    Raises: TypeError for anything except names. ValueError for an unknown name or no weights.
    """
    names = [layers] if isinstance(layers, str) else layers
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"layers must be a list of names of layers, got {layers!r}.")
    known = {layer.name: layer for layer in model._flatten_layers(include_self=False)}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        last = ", ".join(map(repr, list(known)[-8:]))
        what = repr(unknown[0]) if unknown else "none"
        raise ValueError(
            f"layers must name layers of {model.name!r}, whose last are {last}, got {what}."
        )
    wanted: set[int] = set()
    for name in names:
        found = {id(w) for part in known[name]._flatten_layers() for w in part._trainable_variables}
        if not found:
            raise ValueError(f"layers must name layers with weights, got {name!r}, which has none.")
        wanted |= found
    return tuple(weight for weight in model.weights if id(weight) in wanted)


# --- the cut ------------------------------------------------------------------------------------


def _cut(model: keras.Model, weights: Iterable[Any]) -> tuple[Trunk | None, keras.Model]:
    """Return (trunk, rest) for theta formed by `weights`, or (None, model) if there is no trunk.

    A model is cut only if it is Sequential or functional, and if a layer of the trunk multiplies by
    a matrix or a kernel. Other layers, such as Rescaling or Embedding, take little time, and their
    outputs may be larger than their inputs. All outputs of the model must depend on theta.
    `_is_plain` and `_keeps_rows` must be True for the features.
    """
    graph, theta = getattr(model, "_functional", None) or model, {id(w) for w in weights}
    if not is_functional(graph) or not _is_own(model):
        return None, model
    if not any(_multiplies(layer, theta) for layer in graph._flatten_layers(include_self=False)):
        return None, model
    graph = _opened(graph, theta)
    nodes = nodes_of(graph)
    fixed = _fixed(nodes, theta)
    made_by = {id(tensor): node for node in nodes for tensor in node.outputs}
    behind = [node for node in nodes if id(node) not in fixed]
    found = {id(t): t for node in behind for t in node.input_tensors if id(made_by[id(t)]) in fixed}
    tensors = list(found.values())
    front = _needed(tensors, made_by)
    operations = [node.operation for node in front if not is_input(node)]
    outputs = keras.tree.flatten(graph._outputs_struct)
    useful = any(_multiplies(part, theta) for op in operations for part in _layers_of(op))
    if not useful or any(id(made_by[id(t)]) in fixed for t in outputs):
        return None, model
    if not all(map(_is_plain, tensors)) or not _keeps_rows(graph, operations, tensors):
        return None, model
    trunk = Trunk(graph, tensors)
    shown = declared(graph)
    dtype = next(iter(weights)).dtype
    inputs = []
    for name, tensor in zip(trunk.names, tensors, strict=True):
        rounds = "float" in tensor.dtype and name not in shown
        shape = (None, *tensor.shape[1:])
        kind = dtype if rounds else tensor.dtype  # the next layer casts to theta's dtype anyway
        inputs.append(keras.Input(batch_shape=shape, dtype=kind, name=name))
    made = replayed(behind, dict(zip(found, inputs, strict=True)), lambda operation: operation)
    results = keras.tree.map_structure(lambda tensor: made[id(tensor)], graph._outputs_struct)
    return trunk, keras.Model(inputs, results, name=model.name)


def _is_own(model: Any) -> bool:
    """Return True for an object of one of Keras' own classes."""
    return type(model).__module__.split(".")[0] == "keras"


def _layers_of(operation: Any) -> list[Any]:
    """Return a layer and all layers inside it. Other operations contain no layers."""
    return list(operation._flatten_layers()) if isinstance(operation, keras.Layer) else []


def _own_weights(layer: Any) -> list[Any]:
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def _depends(operation: Any, theta: set[int]) -> bool:
    return any(id(w) in theta for part in _layers_of(operation) for w in _own_weights(part))


def _multiplies(layer: Any, theta: set[int]) -> bool:
    """Return True for a layer outside theta that multiplies its input by a matrix or a kernel."""
    own = _own_weights(layer)
    return (
        not isinstance(layer, keras.layers.Embedding)
        and any(len(weight.shape) > 1 for weight in own)
        and not any(id(weight) in theta for weight in own)
    )


def _fixed(nodes: list[Any], theta: set[int]) -> set[int]:
    """Return the ids of the nodes whose results depend on no weight of theta."""
    fixed: set[int] = set()
    made: set[int] = set()
    for node in nodes:
        if all(id(t) in made for t in node.input_tensors) and not _depends(node.operation, theta):
            fixed.add(id(node))
            made.update(map(id, node.outputs))
    return fixed


def _needed(tensors: list[Any], made_by: dict[int, Any]) -> list[Any]:
    """Return all nodes that are needed to compute the tensors."""
    found: dict[int, Any] = {}
    todo = [made_by[id(tensor)] for tensor in tensors]
    while todo:
        node = todo.pop()
        if id(node) not in found:
            found[id(node)] = node
            todo += [made_by[id(tensor)] for tensor in node.input_tensors]
    return list(found.values())


def _is_plain(tensor: Any) -> bool:
    """Return True for a dense tensor of numbers without a mask, if its rows have a known shape."""
    return (
        tensor.shape[0] is None
        and None not in tensor.shape[1:]
        and tensor.dtype != "string"
        and not getattr(tensor, "sparse", False)
        and not getattr(tensor, "ragged", False)
        and getattr(tensor, "_keras_mask", None) is None
    )


def _keeps_rows(graph: Any, operations: list[Any], tensors: list[Any]) -> bool:
    """Return True if the trunk returns one row per example, and adds no losses.

    This holds for most of Keras' own layers. A trunk with other operations is traced to check it.
    """
    todo, known = list(operations), True
    while todo:
        operation = todo.pop()
        inner = getattr(operation, "_functional", None) or operation
        if is_functional(inner) and _is_own(operation):
            todo += [node.operation for node in nodes_of(inner) if not is_input(node)]
        else:
            parts = _layers_of(operation)
            known = known and bool(parts) and all(map(_is_known, parts))
    if known:
        return True
    model = keras.Model(list(declared(graph).values()), tensors)
    added: list[int] = []

    def call(*x: Any) -> list[Any]:
        with keras.StatelessScope(collect_losses=True) as scope:
            found = model(list(x), training=False)
        added.append(len(scope.losses))
        return found if isinstance(found, list) else [found]

    specs = [tf.TensorSpec([_TRACED, *t.shape[1:]], t.dtype) for t in declared(graph).values()]
    try:
        found = tf.function(call, autograph=False).get_concrete_function(*specs).structured_outputs
    except (TypeError, ValueError, tf.errors.OpError):
        return False  # the check failed, so the model is not cut
    return not any(added) and all(part.shape[:1] == [_TRACED] for part in found)


def _is_known(layer: Any) -> bool:
    """Return True for one of Keras' own layers that adds no loss and is not a Lambda."""
    adds = getattr(layer, "activity_regularizer", None) is not None
    return _is_own(layer) and not isinstance(layer, keras.layers.Lambda) and not adds


def _opened(graph: Any, theta: set[int]) -> Any:
    """Return a graph in which some inner models are replaced by their layers, so they can be cut.

    These are the inner models that contain weights of theta, and also a layer outside theta that
    `_multiplies` accepts. They must have one input and no mask.
    """

    def inner(node: Any) -> Any:
        model = getattr(node.operation, "_functional", None) or node.operation
        opens = is_functional(model) and _is_own(node.operation) and len(model.inputs) == 1
        if not opens or not _depends(model, theta) or len(node.input_tensors) != 1:
            return None
        return model if any(_multiplies(part, theta) for part in _layers_of(model)) else None

    def replay(nodes: list[Any], made: dict[int, Any]) -> dict[int, Any]:
        for node in nodes:
            model = inner(node)
            if model is None:
                made = replayed([node], made, lambda operation: operation)
            else:
                given = {id(model.inputs[0]): made[id(node.input_tensors[0])]}
                found = replay(nodes_of(model), given)
                results = [found[id(t)] for t in keras.tree.flatten(model._outputs_struct)]
                made.update(zip(map(id, node.outputs), results, strict=True))
        return made

    nodes = nodes_of(graph)
    if all(inner(node) is None for node in nodes):
        return graph
    made = replay(nodes, {id(tensor): tensor for tensor in graph.inputs})
    results = keras.tree.map_structure(lambda t: made[id(t)], graph._outputs_struct)
    return keras.Model(graph._inputs_struct, results, name=graph.name)
