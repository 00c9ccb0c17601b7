"""Nets and data in the forms that callers may give them."""

from __future__ import annotations

import os
from typing import Any

import keras

from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet
from influence.net.saved import is_saved

# These are the types that `checked` takes for a net.
Net = GenericNeuralNet | keras.Model | str | os.PathLike
_NOT_GIVEN: Any = object()


def checked(
    net: Any, train: Any = _NOT_GIVEN, test: Any = _NOT_GIVEN
) -> tuple[GenericNeuralNet, Examples, Examples]:
    """Return a net and sets of examples for what a caller gave, and refuse what does not fit.

    Args:
      net: a GenericNeuralNet, a compiled Keras model, or the path of a saved one.
      train: data in any form that `GenericNeuralNet.given` takes. The caller may omit it.
      test: the same.

    Returns: (net, train, test). An omitted set is returned as it came.
    Raises: TypeError for a net of another type. The errors of `GenericNeuralNet`, of its method
      `given`, and of `GenericNeuralNet.validate`.
    """
    if isinstance(net, keras.Model):
        net = GenericNeuralNet(net)
    elif is_saved(net):
        net = GenericNeuralNet.load(net)
    if not isinstance(net, GenericNeuralNet):
        raise TypeError(
            f"net must be a GenericNeuralNet, got {type(net).__name__}; a compiled Keras model and "
            "the path of a saved one will do too."
        )
    sets = {"train": train, "test": test}
    for name, examples in sets.items():
        if examples is not _NOT_GIVEN:
            sets[name] = net.given(examples, name)
            net.validate(sets[name], name)
            if name == "train" and not net.mass(sets[name]):
                raise ValueError(
                    f"train must have a valid position, got {len(sets[name])} rows that are masked "
                    "or ignored throughout."
                )
    return net, sets["train"], sets["test"]
