"""Tests of arguments that are refused before any refit begins."""

import numpy as np
import pytest

from influence import Direct, Examples, RefitOptions, leave_group_out, leave_one_out
from influence.truth import runs

N = 60


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(Direct, "prepare", lambda *_: pytest.fail("the work had begun"))
    monkeypatch.setattr(runs, "run", lambda *_: pytest.fail("the work had begun"))


Y = np.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"net": "net"}, TypeError, "^net must be a GenericNeuralNet, got str"),
        ({"train": (1, 2)}, TypeError, r"^train must be Examples\(x, y\), got tuple"),
        ({"test": (1, 2)}, TypeError, r"^test must be Examples\(x, y\), got tuple"),
        ({"train": Examples(np.ones((4, 2)), Y)}, ValueError, r"^train\.x must have rows of shape"),
        ({"test": Examples(np.ones((4, 5)), Y + 3)}, ValueError, r"^test\.y must hold class numb"),
        ({"train": Examples(np.ones((1, 5)), Y[:1])}, ValueError, "^train must have at least 2 ro"),
        ({"rows": [60]}, IndexError, r"^rows must lie in \[0, 60\), got 60"),
        ({"rows": [2, 2]}, ValueError, "^rows must name each row once, got 2 twice"),
        ({"rows": []}, ValueError, "^rows must be a one-dimensional, non-empty list"),
        ({"rows": np.ones(60, bool)}, TypeError, "^rows must be integers, got dtype bool"),
    ],
)
def test_bad_inputs_are_refused_before_any_work(arguments, error, message, softmax, no_work):
    given = {"net": softmax.net, "train": softmax.train, "test": softmax.test, "rows": [0]}
    with pytest.raises(error, match=message):
        leave_one_out(**{**given, **arguments})
    if "rows" not in arguments:
        with pytest.raises(error, match=message):
            leave_group_out(*{**given, **arguments, "rows": [[0]]}.values())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "sgd"}, ValueError, "^method must be 'newton' or 'fit', got 'sgd'"),
        ({"tolerance": 0.0}, ValueError, r"^tolerance must be positive, got 0\.0"),
        ({"tolerance": np.nan}, ValueError, "^tolerance must be positive, got nan"),
        ({"start": np.zeros(3)}, ValueError, r"^start must have shape \(18,\), got \(3,\)"),
        ({"start": np.full(18, np.nan)}, ValueError, "^start must be finite"),
        ({"max_passes": 0}, ValueError, "^max_passes must be at least 1, got 0"),
        ({"solver": "cg"}, TypeError, r"^solver must be a solver such as CG\(\)"),
        ({"fit": print, "checkpoints": "folder"}, ValueError, "^key must say what `fit` does when"),
    ],
)
def test_bad_options_are_refused_before_any_work(options, error, message, softmax, no_work):
    with pytest.raises(error, match=message):
        leave_one_out(softmax.net, softmax.train, softmax.test, [0], RefitOptions(**options))


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([], ValueError, "^groups must hold at least one group of rows, got none"),
        ({}, ValueError, "^groups must hold at least one group of rows, got none"),
        (3, TypeError, "^groups must be a list of arrays of row numbers or a dict .* got int"),
        ("ab", TypeError, "^groups must be a list of arrays of row numbers .* got str"),
        (iter([[1]]), TypeError, "^groups must be a list of arrays of row numbers"),
        ([1, 2], ValueError, r"^groups\[0\] must be a one-dimensional, .* got 1; use \[1\]"),
        ([[1], []], ValueError, r"^groups\[1\] must be a one-dimensional, non-empty list"),
        ({"a": [1], "b": []}, ValueError, r"^groups\['b'\] must be a one-dimensional, non-empty"),
        ([[0, N]], IndexError, rf"^groups\[0\] must lie in \[0, {N}\), got {N} at position 1"),
        ([[-1]], IndexError, r"^groups\[0\] must lie in \[0, 60\), got -1"),
        ([[1, 2, 1]], ValueError, r"^groups\[0\] must name each row once, got 1 twice"),
        ([[0.0]], TypeError, r"^groups\[0\] must be integers, got dtype float64"),
        ([np.ones(N, bool)], TypeError, r"^groups\[0\] must be integers, got dtype bool"),
        ({"all": range(N)}, ValueError, r"^groups\['all'\] must leave a row to train on, got all"),
    ],
)
def test_bad_groups_are_refused_before_any_work(groups, error, message, softmax, no_work):
    with pytest.raises(error, match=message):
        leave_group_out(softmax.net, softmax.train, softmax.test, groups)
