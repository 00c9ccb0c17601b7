"""Training by the user's own function `fit`, which trains a Keras model on given rows."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras

from influence.examples import labels as packing
from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet
from influence.net.preprocessing import compile_like

Fit = Callable[..., Any]


def fitting(fit: Fit) -> Callable[[GenericNeuralNet, Examples], Any]:
    """Return a function (net, rows) that trains the net's model on the rows by `fit`."""
    return lambda net, rows: train(fit, net.model, rows)


def train(fit: Fit, model: keras.Model, rows: Examples) -> None:
    """Call fit(model, x, y), or fit(model, x, y, sample_weight) if the rows have weights."""
    weights = packing.sample_weights(rows.y)
    arguments = [rows.x, packing.labels(rows.y)]
    fit(model, *arguments, *(() if weights is None else (weights,)))


def source(fit: Fit) -> str:
    """Return a hash of the source of a function's module, for the names of stored results."""
    try:
        text = inspect.getsource(inspect.getmodule(fit) or fit)
    except (OSError, TypeError):
        text = repr(fit)
    return hashlib.sha256(text.encode()).hexdigest()


def fresh(model: keras.Model) -> keras.Model:
    """Return an untrained copy of a model, with new random initial weights.

    Frozen layers keep their weights. Layers that `adapt` sets up, such as Normalization, also keep
    their weights. The copy has the loss of the model, and a new optimiser of the same
    configuration.

    Raises: ValueError if Keras cannot clone the model.
    """
    try:
        copy = keras.models.clone_model(model)
        pairs = list(zip(_leaves(model), _leaves(copy), strict=True))
    except (NotImplementedError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"model must be one that Keras can clone, got {model.name!r} "
            f"({type(error).__name__}: {reason}); give its own classes a get_config."
        ) from error
    for old, new in pairs:
        trained = old.trainable and (
            old._trainable_variables or isinstance(old, keras.layers.BatchNormalization)
        )
        if not trained:
            own = [*old._trainable_variables, *old._non_trainable_variables]
            made = [*new._trainable_variables, *new._non_trainable_variables]
            for variable, value in zip(made, own, strict=True):
                variable.assign(value)
            if isinstance(new, keras.layers.Normalization):
                new.finalize_state()  # the layer computes with copies of its weights
    compile_like(copy, model)
    return copy


@contextmanager
def trained_anew(
    net: GenericNeuralNet, rows: Examples, fit: Fit, seed: int | None = None
) -> Iterator[GenericNeuralNet]:
    """Train a fresh copy of the net's model. In a `with` block, the net has the trained weights.

    The block gets a view of the net that runs all layers on the inputs of the whole model. The view
    does not use features of frozen layers that were computed earlier. After the block, the net has
    its original weights again.

    Args:
      net: the net whose model is copied and trained.
      rows: the training rows, with the inputs of the whole model.
      fit: a function as in `train`.
      seed: the seed for `keras.utils.set_random_seed` before the new weights are drawn, or None.
    """
    if seed is not None:
        keras.utils.set_random_seed(seed)
    model = fresh(net.model)
    train(fit, model, rows)
    variables = net.model.variables
    before = [variable.numpy() for variable in variables]
    try:
        for variable, value in zip(variables, model.variables, strict=True):
            variable.assign(value)
        yield net.uncut()
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def _leaves(model: Any) -> list[Any]:
    return list(model._flatten_layers(include_self=False))
