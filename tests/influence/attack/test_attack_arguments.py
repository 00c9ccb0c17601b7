"""What an attack is given: images or their features; and what is refused, before any long work."""

import numpy as np
import pytest

from influence import Examples, prepare
from influence.attack.poison import Rule, poison
from influence.attack.targets import gradient_norms
from influence.solvers import Direct
from tests.influence.attack import attacked
from tests.influence.attack.attacked import RADIUS, replaced

SIGNS = {"decay": 1.0, "momentum": 0.0, "softness": 0.0, "tries": 0, "restarts": 0}
ROWS = np.array([3, 8, 20])


def test_a_trunk_is_asked_for_the_candidates_alone():
    net, train, test, inputs = attacked.on_trunk()
    net.seen_inputs = 0
    rule = Rule(step=0.2, max_steps=4, **SIGNS)
    found = poison(net, train, test, ROWS, RADIUS, inputs=inputs[ROWS], rule=rule, flip_at=np.inf)
    assert net.seen_inputs == 3 + 5 * 3  # three to see that they are the rows', three a state
    np.testing.assert_allclose(found.features, np.tanh(found.inputs @ net.A), atol=1e-15)
    net.fit(replaced(train, found.rows, found.features), gradient_tolerance=1e-12)
    np.testing.assert_allclose(found.theta, net.theta, atol=1e-9)
    assert found.change_if_poisoned.mean() > 0


def test_images_and_features_give_the_same():
    net, train, test, inputs = attacked.on_trunk()
    images = Examples(inputs, train.y)
    options = {"flip_at": np.inf, "rule": Rule(max_steps=3, **SIGNS)}
    one = poison(net, train, test, ROWS, RADIUS, inputs=inputs[ROWS], **options)
    assert np.abs(one.inputs - inputs[one.rows]).max() > RADIUS / 2
    for given in ({"inputs": inputs[ROWS]}, {}):  # it is the images that move, given or not
        other = poison(net, images, test, ROWS, RADIUS, **given, **options)
        np.testing.assert_array_equal(one.inputs, other.inputs)
        np.testing.assert_array_equal(one.change_if_poisoned, other.change_if_poisoned)
    norms = gradient_norms(net, train, test, ROWS, inputs=inputs[ROWS])
    np.testing.assert_array_equal(gradient_norms(net, images, test, ROWS), norms)


WHOLE, POSITIVE = "increasing whole numbers in", "must be a positive number"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"net": "net"}, TypeError, "net must be a GenericNeuralNet, got str"),
        ({"train": (1, 2)}, TypeError, r"train must be Examples\(x, y\), got tuple"),
        ({"test": None}, TypeError, r"test must be Examples\(x, y\), got NoneType"),
        ({"rows": [1, 1]}, ValueError, "rows must name each row once, got 1 twice"),
        ({"rows": [40]}, IndexError, r"rows must lie in \[0, 40\), got 40"),
        ({"radius": "wide"}, ValueError, "radius must be positive and finite, got 'wide'"),
        ({"counts": [0, 1]}, ValueError, rf"counts must be {WHOLE} \[1, 2\], got \[0, 1\]"),
        ({"counts": [1, 3]}, ValueError, rf"counts must be {WHOLE} \[1, 2\], got \[1, 3\]"),
        ({"counts": [2, 1]}, ValueError, rf"counts must be {WHOLE} \[1, 2\], got \[2, 1\]"),
        ({"counts": []}, ValueError, rf"counts must be {WHOLE} \[1, 2\], got \[\]"),
        ({"counts": [1.5]}, ValueError, rf"counts must be {WHOLE} \[1, 2\], got \[1.5\]"),
        ({"counts": [True]}, ValueError, rf"counts must be {WHOLE} \[1, 2\], got \[True\]"),
        ({"counts": 2}, ValueError, rf"counts must be {WHOLE} \[1, 2\], got 2"),
        ({"rule": "paper"}, TypeError, "rule must be a Rule such as .*, got 'paper'"),
        ({"flip_at": np.nan}, ValueError, f"flip_at {POSITIVE}, got nan"),
        ({"flip_at": 0.0}, ValueError, f"flip_at {POSITIVE}, got 0.0"),
        ({"flip_at": [0.5]}, ValueError, rf"flip_at {POSITIVE}, got \[0.5\]"),
        ({"tolerance": -1e-8}, ValueError, f"tolerance {POSITIVE}, got -1e-08"),
        ({"flips": 4}, ValueError, r"flips must be a whole number in \[1, 3\], got 4"),
        ({"flips": 0}, ValueError, r"flips must be a whole number in \[1, 3\], got 0"),
        ({"flips": 1.5}, ValueError, r"flips must be a whole number in \[1, 3\], got 1.5"),
        ({"gradient_norms": np.ones(3)}, ValueError, r"gradient_norms must have shape \(2,\)"),
        ({"solver": 3}, TypeError, r"solver must be a solver such as CG\(\) or Direct\(\), got 3"),
        ({"solver": prepare(np.eye(4), Direct())}, TypeError, "solver must be a solver .* prepare"),
        ({"fit": 3}, TypeError, "fit must be a function of a net and a training set, got 3"),
        ({"start": np.zeros(3)}, ValueError, r"start must have shape \(4,\), got \(3,\)"),
        ({"start": np.full(4, np.nan)}, ValueError, "start must be finite, got a NaN or infinity"),
    ],
)
def test_wrong_arguments_are_refused_before_the_trunk_is_asked(changed, error, message):
    net, train, test, inputs = attacked.on_trunk()
    train, test = Examples(inputs, train.y), Examples(inputs[:3], train.y[:3])
    arguments = {"net": net, "train": train, "test": test, "rows": [1, 2], "radius": 0.1}
    net.seen_inputs = 0
    with pytest.raises(error, match=message):
        poison(**(arguments | changed))
    assert net.seen_inputs <= 6  # the rows by which examples are known to fit the net


def test_examples_that_do_not_fit_are_refused_before_the_trunk_is_asked():
    net, train, test, inputs = attacked.on_trunk()
    images = Examples(inputs, train.y)
    for changed in (
        {"train": Examples(inputs, train.y + 1)},
        {"test": Examples(inputs, 7 * train.y)},
    ):
        net.seen_inputs = 0
        with pytest.raises(ValueError, match=r"(train|test)\.y must hold labels in \[0, 1\]"):
            poison(**({"net": net, "train": images, "test": test, "rows": [1], "radius": 0.1}
                      | changed))  # fmt: skip
        assert net.seen_inputs <= 6


def test_a_net_that_is_not_at_its_minimum_is_refused():
    net, train, test, inputs = attacked.on_trunk()
    arguments = (net, train, test, ROWS, RADIUS)
    options = {"inputs": inputs[ROWS], "rule": Rule(max_steps=1, **SIGNS)}
    theta = net.theta
    net.theta = theta + 1e-5
    norm = net.gradient_norm(train)
    assert norm > 1e-7
    message = f"net must be at the minimum of its risk, got a gradient norm of {norm:.1e}, above"
    with pytest.raises(ValueError, match=message):
        poison(*arguments, **options)
    assert poison(*arguments, tolerance=2 * norm, **options).gradient_norm < 1e-8
    net.theta = theta
    assert poison(*arguments, **options).gradient_norm < 1e-8
