"""The graph of a functional or sequential model, and its layers applied to other inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import keras


def is_functional(model: Any) -> bool:
    """Return True for a functional model, whose layers form a known graph."""
    return hasattr(model, "_nodes_by_depth")


def is_input(node: Any) -> bool:
    """Return True for the node of an InputLayer."""
    return isinstance(node.operation, keras.layers.InputLayer)


def nodes_of(model: Any) -> list[Any]:
    """Return the calls of layers in a functional model.

    Each call comes after the calls whose results it uses.
    """
    depths = sorted(model._nodes_by_depth, reverse=True)  # the inputs have the largest depth
    return [node for depth in depths for node in model._nodes_by_depth[depth]]


def replayed(
    nodes: Iterable[Any], made: dict[int, Any], operation_of: Callable[[Any], Any]
) -> dict[int, Any]:
    """Repeat calls of layers on other tensors.

    Args:
      nodes: the calls, in the order of `nodes_of`. InputLayers are left out.
      made: a dict from the ids of old tensors to new tensors. It has an entry for each tensor that
        the calls take as input and do not make themselves.
      operation_of: function from a layer of the model to the layer that is called instead.

    Returns: a copy of `made` with further entries for all results of the calls.
    """
    made = dict(made)
    for node in nodes:
        if not is_input(node):
            arguments, options = node.arguments.fill_in(made)
            results = keras.tree.flatten(operation_of(node.operation)(*arguments, **options))
            made.update(zip(map(id, node.outputs), results, strict=True))
    return made
