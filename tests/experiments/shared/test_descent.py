"""Tests of descents to local minima: of a network, from a saddle, and after an interruption."""

import numpy as np
import pytest

from experiments.shared import descent
from experiments.shared.descent import descend
from influence import Hessian
from tests.influence.problems import relative_error, ridge, tanh_net

_ROUND = descent._round


def network():
    net, examples = tanh_net(l2=0.05)
    return net, examples


def test_ends_at_a_minimum_that_it_reports():
    net, examples = network()
    before = net.risk(examples)
    found = descend(net, examples, tolerance=1e-9, rounds=30)
    assert found.num_negative[-1] == 0 and found.gradient_norm[-1] <= 1e-9
    assert found.risk[-1] == pytest.approx(net.risk(examples), rel=1e-12)
    assert found.risk[-1] < found.risk[0] == pytest.approx(before, rel=1e-12)
    assert (np.diff(found.risk) <= 1e-12).all()
    assert found.gradient_norm[-1] == pytest.approx(net.gradient_norm(examples))
    values = np.linalg.eigvalsh(Hessian(net, examples).dense())
    assert found.smallest_eigenvalue[-1] == pytest.approx(values[0], abs=1e-9)
    assert found.num_negative[0] > 0  # the Hessian at the start has negative eigenvalues


def test_a_quadratic_takes_one_round():
    p = ridge()
    minimum = p.theta
    p.net.theta = minimum + 1
    found = descend(p.net, p.train, tolerance=1e-10)
    assert len(found.risk) == 2
    assert relative_error(p.net.theta, minimum) < 1e-8


def test_an_approximate_hessian_serves_as_well():
    net, examples = network()

    def rounded(theta):
        return Hessian(net, examples).dense().astype(np.float32)

    found = descend(net, examples, tolerance=1e-8, rounds=30, hessian=rounded)
    assert found.gradient_norm[-1] <= 1e-8 and found.num_negative[-1] == 0


def test_rounds_bound_the_work_and_the_lowest_point_is_kept():
    net, examples = network()
    found = descend(net, examples, tolerance=1e-12, rounds=2, evaluations=3)
    assert len(found.risk) == 3 and not found.gradient_norm[-1] <= 1e-12
    assert found.risk[-1] < found.risk[0]


def test_what_was_interrupted_ends_with_the_same_bits(tmp_path, monkeypatch):
    rounds = 2
    settings = {"tolerance": 1e-9, "rounds": 4, "evaluations": 8}
    whole, examples = network()
    expected = descend(whole, examples, **settings)

    def until(items, what, total):
        for i, item in enumerate(items):
            if i == rounds:
                raise KeyboardInterrupt
            yield item

    net, _ = network()
    start = net.theta
    with monkeypatch.context() as patch:
        patch.setattr(descent, "progress", until)
        with pytest.raises(KeyboardInterrupt):
            descend(net, examples, checkpoints=tmp_path, **settings)
    net.theta = start
    formed = []
    with monkeypatch.context() as patch:
        patch.setattr(descent, "_round", lambda *a: (formed.append(0), _ROUND(*a)))
        found = descend(net, examples, checkpoints=tmp_path, **settings)
    # The interrupted run has stored `rounds` rounds. They are not computed again.
    assert len(formed) == len(found.risk) - 1 - rounds
    np.testing.assert_array_equal(net.theta, whole.theta)
    np.testing.assert_array_equal(found.risk, expected.risk)
    net.theta = start
    # A finished descent is only read. Without this class, forming a Hessian would raise an error.
    monkeypatch.setattr(descent, "Hessian", None)
    again = descend(net, examples, checkpoints=tmp_path, **settings)
    np.testing.assert_array_equal(net.theta, whole.theta)
    np.testing.assert_array_equal(again.risk, expected.risk)


class Saddle:
    """A fake net whose risk is u^2/2 - w^2/2 + w^4/4, with a saddle at theta = (u, w) = 0."""

    dtype = np.dtype(float)

    def __init__(self):
        self.theta = np.zeros(2)

    def risk_and_gradient(self, examples):
        u, w = self.theta
        return u**2 / 2 - w**2 / 2 + w**4 / 4, np.array([u, w**3 - w])

    def risk(self, examples):
        return self.risk_and_gradient(examples)[0]


def saddle_hessian(theta):
    return np.diag([1.0, 3 * theta[1] ** 2 - 1])


def test_a_saddle_is_left():
    net = Saddle()
    found = descend(net, None, tolerance=1e-9, hessian=saddle_hessian)
    assert found.gradient_norm[0] == 0 and found.num_negative[0] == 1
    assert found.risk[-1] == pytest.approx(-0.25) and found.num_negative[-1] == 0
    assert found.gradient_norm[-1] <= 1e-9


def test_it_stops_where_a_round_does_nothing(monkeypatch):
    net, rounds = Saddle(), []
    net.theta = np.array([1.0, 0.5])
    monkeypatch.setattr(descent, "_round", lambda *arguments: rounds.append(0))
    found = descend(net, None, tolerance=1e-9, rounds=20, hessian=saddle_hessian)
    assert len(rounds) == 1 and len(found.risk) == 2


def test_the_last_steps_do_not_climb():
    """Check that the last Newton steps stay at (0, 1.2) if a step would raise the risk.

    The given curvature along w is too small. The step would lead past the minimum at w = 1, to the
    saddle at 0.
    """
    net = Saddle()
    net.theta = np.array([0.0, 1.2])
    descent._polish(net, None, np.eye(2), np.sqrt([1.0, 0.528 / 1.18]), 1e-12)
    np.testing.assert_array_equal(net.theta, [0.0, 1.2])
