"""What `poison` is given, looked at before any of it goes through a network."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence.attack.targets import Rule, Targets, check_targets
from influence.examples.examples import Examples, check_rows
from influence.net.net import GenericNeuralNet


def check_arguments(
    net: GenericNeuralNet,
    train: Examples,
    test: Examples,
    rows: Any,
    radius: Any,
    *,
    counts: Any,
    rule: Any,
    inputs: Any,
    bounds: Any,
    flip_at: Any,
    flips: Any,
    gradient_norms: Any,
    solver: Any,
    fit: Any,
    start: Any,
    tolerance: Any,
) -> tuple[Targets, list[int], int, NDArray]:
    """(targets, counts, flips, start) of `poison`, its defaults filled in.

    Only what is right in itself is held against the training set, and only candidates that are
    right in all else go through the trunk.

    Raises: TypeError, ValueError or IndexError naming the argument.
    """
    if not isinstance(net, GenericNeuralNet):
        raise TypeError(f"net must be a GenericNeuralNet, got {type(net).__name__}.")
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a Rule such as BEST_RULE or PAPER_RULE, got {rule!r}.")
    if solver is not None and (not hasattr(solver, "prepare") or isinstance(solver, type)):
        raise TypeError(f"solver must be a solver such as CG() or Direct(), got {solver!r}.")
    if fit is not None and not callable(fit):
        raise TypeError(f"fit must be a function of a net and a training set, got {fit!r}.")
    for name, value in (("flip_at", flip_at), ("tolerance", tolerance)):
        if not (isinstance(value, int | float | np.number) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value!r}.")
    for name, examples in (("train", train), ("test", test)):
        if not isinstance(examples, Examples):
            raise TypeError(f"{name} must be Examples(x, y), got {type(examples).__name__}.")
        _ = examples.x  # of a stream there is none, as it says itself
    c = len(check_rows(rows, len(train)))
    counts = _counts(counts, c)
    flips = len(test) if flips is None else flips
    if not (_is_whole(flips) and 1 <= flips <= len(test)):
        raise ValueError(f"flips must be a whole number in [1, {len(test)}], got {flips!r}.")
    if gradient_norms is not None and np.shape(gradient_norms) != (c,):
        raise ValueError(f"gradient_norms must have shape ({c},), got {np.shape(gradient_norms)}.")
    start = _start(net, start)
    net.validate(train, "train")
    net.validate(test, "test")
    return check_targets(net, train, rows, radius, inputs, bounds), counts, int(flips), start


def _counts(counts: Any, c: int) -> list[int]:
    if counts is None:
        return [c]
    try:
        found = list(counts)
    except TypeError:
        found = []
    whole = bool(found) and all(map(_is_whole, found))
    if not (whole and 1 <= found[0] and found[-1] <= c and all(np.diff(list(map(int, found))) > 0)):
        raise ValueError(f"counts must be increasing whole numbers in [1, {c}], got {counts!r}.")
    return [int(count) for count in found]


def _start(net: GenericNeuralNet, start: Any) -> NDArray:
    if start is None:
        return np.zeros_like(net.theta) if net.convex else net.theta
    if np.shape(start) != (net.num_parameters,):
        raise ValueError(f"start must have shape ({net.num_parameters},), got {np.shape(start)}.")
    if not np.isfinite(start).all():
        raise ValueError("start must be finite, got a NaN or infinity.")
    return np.asarray(start)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
