"""Functions that read a functional model's graph, or apply its layers to other tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import keras


def is_functional(model: Any) -> bool:
    """Return True for a functional model, whose layers form a known graph."""
    return hasattr(model, "_nodes_by_depth")


def is_input(node: Any) -> bool:
    """Return True if the node belongs to an InputLayer."""
    return isinstance(node.operation, keras.layers.InputLayer)


def nodes_of(model: Any) -> list[Any]:
    """Return the nodes of a functional model. A node is one call of a layer.

    In the list, each node comes after the nodes whose results it uses.
    """
    depths = sorted(model._nodes_by_depth, reverse=True)  # the inputs have the largest depth
    return [node for depth in depths for node in model._nodes_by_depth[depth]]


def replayed(
    nodes: Iterable[Any], made: dict[int, Any], operation_of: Callable[[Any], Any]
) -> dict[int, Any]:
    """Repeat the layer calls of a graph on new tensors.

    Args:
      nodes: the calls to repeat, in the order of `nodes_of`. Nodes of InputLayers are skipped.
      made: a dict from the id of an old tensor to the new tensor in its place. A call may use the
        results of earlier calls. All other tensors that the calls use must be in `made`.
      operation_of: a function. It takes the layer of an old call, and returns the layer to call.

    Returns: a copy of `made`. It also maps the ids of the old results of all calls to the new
      results.
    """
    made = dict(made)
    for node in nodes:
        if not is_input(node):
            arguments, options = node.arguments.fill_in(made)
            results = keras.tree.flatten(operation_of(node.operation)(*arguments, **options))
            made.update(zip(map(id, node.outputs), results, strict=True))
    return made
