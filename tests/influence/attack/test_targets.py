"""Tests of the derivatives of the test loss with respect to inputs of training rows.

They are compared with refits and with closed forms.
"""

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from influence import CG, Examples
from influence.attack.poison import mean_s_test
from influence.attack.targets import PAPER_RULE, Rule, check_targets, mean_size
from tests import oracles
from tests.influence.attack import attacked
from tests.influence.attack.attacked import RADIUS, refitted_loss


def derivative(net, train, test, rows, along, inputs=None):
    """Return the derivative of the mean test loss after a refit, as the inputs of `rows` move.

    They move in the direction `along`.
    """
    targets = check_targets(net, train, rows, RADIUS, inputs, None)
    s = mean_s_test(net, train, test, CG(1e-12))
    g = targets.gradients(net, slice(None), targets.x, s)
    return -np.sum(g * along) / len(train)


@pytest.mark.parametrize("make", [attacked.logistic, attacked.network])
def test_gradient_is_that_of_the_test_loss_after_a_refit(make):
    net, train, test, *_ = make()
    rows = np.array([4, 17])
    along = np.random.default_rng(0).standard_normal(train.x[rows].shape)
    actual = oracles.central_difference(
        lambda x: refitted_loss(net, train, test, rows, x), train.x[rows], along
    )
    assert derivative(net, train, test, rows, along) == pytest.approx(actual, rel=1e-4)
    assert abs(actual) > 1e-4


def test_gradient_reaches_through_a_trunk():
    net, train, test, inputs = attacked.on_trunk()
    rows = np.array([4, 17])
    along = np.random.default_rng(0).standard_normal(inputs[rows].shape)
    actual = oracles.central_difference(
        lambda x: refitted_loss(net, train, test, rows, net.features(x)), inputs[rows], along
    )
    found = derivative(net, train, test, rows, along, inputs[rows])
    assert found == pytest.approx(actual, rel=1e-4)
    assert abs(actual) > 1e-4


def test_gradients_do_not_depend_on_how_many_are_asked_for():
    net, train, test, _ = attacked.logistic()
    targets = check_targets(net, train, np.arange(40), RADIUS, None, None)
    s = mean_s_test(net, train, test, CG(1e-12))
    whole = targets.gradients(net, slice(None), targets.x, s)
    for at in (np.array([39, 2]), np.arange(5, 30)):
        part = targets.gradients(net, at, targets.x[at], s)
        np.testing.assert_allclose(part, whole[at], rtol=1e-12)


def test_boxes():
    net, train, *_ = attacked.logistic()
    low, high = float(train.x.min()), float(train.x.max())
    targets = check_targets(net, train, np.arange(40), RADIUS, None, (low, high))
    far = targets.moved(slice(None), targets.x, np.full_like(targets.x, 9.0))
    np.testing.assert_array_equal(far, np.minimum(train.x + RADIUS, high))
    far = targets.moved(slice(None), targets.x, np.full_like(targets.x, -9.0))
    np.testing.assert_array_equal(far, np.maximum(train.x - RADIUS, low))
    at = np.array([3, 1])
    near = targets.moved(at, train.x[at], np.full((2, 4), -0.25))
    expected = np.maximum(train.x[at] - 0.25 * RADIUS, low)
    np.testing.assert_allclose(near, expected, rtol=1e-15)


def test_moves():
    v = np.array([[4.0, -2.0, 0.0, 0.1], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(PAPER_RULE.move(v, 99), [[-0.04, 0.04, 0, -0.04], [0, 0, 0, 0]])
    rule = Rule(step=0.5, decay=0.5, softness=1.0)
    mean = 6.1 / 4
    expected = -0.125 * np.array([[1, -1, 0, 0.1 / mean], [0, 0, 0, 0]])
    np.testing.assert_allclose(rule.move(v, 2), expected, rtol=1e-15)
    np.testing.assert_allclose(mean_size(v), [[mean], [1]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"step": 0.0}, r"step must lie in \(0, 2\], got 0.0"),
        ({"step": 2.5}, r"step must lie in \(0, 2\], got 2.5"),
        ({"decay": 0.0}, r"decay must lie in \(0, 1\], got 0.0"),
        ({"decay": 1.5}, r"decay must lie in \(0, 1\], got 1.5"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"momentum must lie in \[0, 1\), got -0.1"),
        ({"softness": -1.0}, "softness must be non-negative, got -1.0"),
        ({"softness": np.nan}, "softness must be non-negative, got nan"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"tries": -1}, "tries must be at least 0, got -1"),
    ],
)
def test_wrong_rules_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Rule(**changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rows": [40]}, IndexError, r"rows must lie in \[0, 40\), got 40"),
        ({"radius": 0.0}, ValueError, "radius must be positive and finite, got 0.0"),
        ({"radius": "wide"}, ValueError, "radius must be positive and finite, got 'wide'"),
        ({"radius": np.nan}, ValueError, "radius must be positive and finite, got nan"),
        ({"inputs": np.zeros((3, 6))}, ValueError, "inputs must have a row for each of 2 rows"),
        ({"inputs": 3.0}, ValueError, r"inputs must have a row for each of 2 rows, got shape \(\)"),
        ({"inputs": np.zeros((2, 6), np.uint8)}, TypeError, "inputs must be floating .* got uint8"),
        ({"inputs": np.ones((2, 6))}, ValueError, "inputs must be those of the rows, in their ord"),
        ({"inputs": np.full((2, 6), np.nan)}, ValueError, "inputs must be those of the rows"),
        ({"bounds": 3}, ValueError, "bounds must be the least and the largest value, got 3"),
        ({"bounds": (1.0, -1.0)}, ValueError, "bounds must be the least and the largest value"),
        ({"bounds": (-0.1, 0.1)}, ValueError, r"bounds must hold the inputs, got \(-0.1, 0.1\)"),
    ],
)
def test_wrong_targets_are_refused(changed, error, message):
    net, train, _, inputs = attacked.on_trunk()
    arguments = {"rows": [1, 2], "radius": RADIUS, "inputs": inputs[[1, 2]], "bounds": None}
    with pytest.raises(error, match=message):
        check_targets(net, train, **(arguments | changed))


def test_every_input_must_be_its_rows():
    net, train, _, inputs = attacked.on_trunk()
    rows = np.arange(1, 40)  # so many rows that the check reads them in more than two batches
    check_targets(net, train, rows, RADIUS, inputs[rows], None)
    check_targets(net, train, rows, RADIUS, inputs[rows].astype(np.float32), None)
    for one, other in ((1, 2), (17, 30), (37, 36)):
        wrong = rows.copy()
        wrong[[one, other]] = rows[[other, one]]
        first = rows[min(one, other)]
        with pytest.raises(ValueError, match=f"in their order, got for row {first} one that"):
            check_targets(net, train, rows, RADIUS, inputs[wrong], None)


def test_without_a_trunk_inputs_are_the_rows_themselves():
    net, train, *_ = attacked.logistic()
    # So far from 0, rows differ only little, relative to their size. The check must still see it.
    far = Examples(train.x + 1e4, train.y)
    rows = [5, 2, 9]
    targets = check_targets(net, far, rows, RADIUS, far.x[rows].astype(np.float32), None)
    assert targets.x.dtype == np.float32
    with pytest.raises(ValueError, match="in their order, got for row 5 one"):
        check_targets(net, far, rows, RADIUS, far.x[[2, 5, 9]], None)
    with pytest.raises(ValueError, match=r"inputs must be .*, got shape \(3, 2\), .* \(3, 4\)"):
        check_targets(net, far, rows, RADIUS, far.x[rows, :2], None)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (lambda x: x.astype(int), r"train\.x must be floating to be moved, got int64"),
        (csr_matrix, r"train\.x must be one dense array .* got sparse rows"),
        (lambda x: {"a": x}, r"train\.x must be one dense array .* got a dict"),
    ],
)
def test_inputs_that_cannot_move_are_refused(kind, message):
    net, train, *_ = attacked.logistic()
    with pytest.raises(TypeError, match=message):
        check_targets(net, Examples(kind(train.x), train.y), [1], RADIUS, None, None)
