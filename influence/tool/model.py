"""A MODEL that a person names: a file, or a function of a Python module.

A model whose first layers are frozen is cut behind them. The frozen layers are run once for each
set, and the rest is the net.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from influence.net.graph import is_functional, is_input, nodes_of, replayed
from influence.net.preprocessing import compile_like
from influence.net.saved import is_saved, load_model

_ENDINGS = (".keras", ".h5", ".hdf5")


def read_model(text: str, *, compiled: bool = True) -> Any:
    """Return the model that a text names.

    Args:
      text: the path of a file `.keras` or `.h5`, or `module:function`. The function is called
        without arguments and returns a Keras model or a net.
      compiled: False if a loss will be given, so that the file needs none.

    Raises: ValueError or TypeError that names MODEL. The errors of `load_model`.
    """
    if is_function(text):
        return function_of(text, "MODEL")()
    path = Path(text).expanduser()
    if not is_saved(path) or path.suffix not in _ENDINGS:
        found = "there is no such file" if not path.exists() else f"it ends in {path.suffix!r}"
        raise ValueError(
            f"MODEL must be a file .keras or .h5, or module:function, got {text!r}: {found}."
        )
    return load_model(path, compiled=compiled)


def is_function(text: str) -> bool:
    """Return True for `module:function` or `file.py:function`, and False for an existing path."""
    module, _, name = text.rpartition(":")
    return bool(module) and name.isidentifier() and not Path(text).exists()


def function_of(text: str, argument: str) -> Callable[..., Any]:
    """Import the function that `module:function` or `file.py:function` names.

    Modules are searched for in the current folder first.

    Raises: ValueError that names the argument, if the module or the function cannot be found.
    """
    module, _, name = text.rpartition(":")
    try:
        found = getattr(_module(module), name, None)
    except (ImportError, OSError, SyntaxError) as error:
        raise ValueError(
            f"{argument} must be module:function, got {text!r}, whose module cannot be imported "
            f"({type(error).__name__}: {error})."
        ) from error
    if not callable(found):
        raise ValueError(
            f"{argument} must be module:function, got {text!r}, but {module!r} has no function "
            f"{name!r}."
        )
    return found


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")
        return importlib.import_module(name)
    path = Path(name).expanduser().resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is no Python file")
    # Functions of one file must share one module, so that classes in it are the same objects.
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def cut_frozen(model: keras.Model) -> tuple[keras.Model | None, keras.Model]:
    """Cut a model behind its frozen first layers.

    Everything that does not depend on a trainable weight goes into the first part. In inference
    mode this part gives the same features in every pass, so that they are computed only once.

    Returns: (frozen part, rest). The rest shares layers, weights and compiled loss with the model.
      (None, model) if no layer with weights is frozen, or if the graph has no single cut.
    """
    graph = getattr(model, "_functional", None) or model
    if not is_functional(graph) or type(model).__module__.split(".")[0] != "keras":
        return None, model
    if len(graph.inputs) != 1 or graph.inputs[0].dtype == "string":
        return None, model
    nodes = nodes_of(graph)
    moving: set[int] = set()  # the ids of tensors that depend on theta
    behind = []
    for node in nodes:
        depends = any(id(tensor) in moving for tensor in node.input_tensors)
        if depends or getattr(node.operation, "trainable_variables", ()):
            moving.update(map(id, node.outputs))
            behind.append(node)
    front = [node for node in nodes if node not in behind and not is_input(node)]
    if not any(_is_costly(node.operation) for node in front):
        return None, model
    cut = {id(t): t for node in behind for t in node.input_tensors if id(t) not in moving}
    ends = keras.tree.flatten(graph._outputs_struct)
    if len(cut) != 1 or any(id(tensor) not in moving for tensor in ends):
        return None, model
    (tensor,) = cut.values()
    if tensor is graph.inputs[0]:
        return None, model
    trunk = keras.Model(graph.inputs[0], tensor, name=f"{model.name}_frozen")
    start = keras.Input(batch_shape=(None, *tensor.shape[1:]), dtype=tensor.dtype, name="features")
    made = replayed(behind, {id(tensor): start}, lambda operation: operation)
    outputs = keras.tree.map_structure(lambda end: made[id(end)], graph._outputs_struct)
    rest = keras.Model(start, outputs, name=model.name)
    compile_like(rest, model)
    return trunk, rest


def _is_costly(operation: Any) -> bool:
    """Return True for a layer with weights, apart from Normalization, which takes no time."""
    return bool(getattr(operation, "weights", ())) and not isinstance(
        operation, keras.layers.Normalization
    )
