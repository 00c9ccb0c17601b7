"""Conversion of a caller's model and data to a net and to validated Examples."""

from __future__ import annotations

import os
from typing import Any

import keras

from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet
from influence.net.saved import is_saved

# The types that the argument `net` of `checked` may have.
Net = GenericNeuralNet | keras.Model | str | os.PathLike
_NOT_GIVEN: Any = object()


def checked(
    net: Any, train: Any = _NOT_GIVEN, test: Any = _NOT_GIVEN
) -> tuple[GenericNeuralNet, Examples, Examples]:
    """Convert a caller's model and data to a net and Examples, and validate the Examples.

    Args:
      net: a GenericNeuralNet, a compiled Keras model, or the path of a saved Keras model.
      train: training data in any form that `GenericNeuralNet.given` takes. It may be omitted.
      test: test data in any form that `GenericNeuralNet.given` takes. It may be omitted.

    Returns: (net, train, test). In place of an omitted set stands an object without meaning.
    Raises: TypeError for a net of another type. ValueError if the loss masks or ignores every
      position of `train`. The errors of the constructor of GenericNeuralNet, and of its methods
      `load`, `given` and `validate`.
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
