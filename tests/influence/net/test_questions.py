"""Tests of `PerRow`, `Total` and `loss_sum`: what these questions answer, and their pickling."""

import pickle

import numpy as np
import pytest

from influence import Examples
from influence.net.questions import PerRow, Total, loss_sum
from tests.influence.problems import relative_error, tanh_net


@pytest.fixture(scope="module")
def net_and_rows():
    return tanh_net()


def test_totals_are_rows_times_means(net_and_rows):
    net, examples = net_and_rows
    V = np.random.default_rng(0).standard_normal((net.num_parameters, 3))
    n = len(examples)
    whole = n * net.hvp(examples.x, examples.y, V)
    assert relative_error(examples.sum_over(Total("hvp", V), net, batch_size=7), whole) < 1e-12
    loss, gradient = examples.sum_over(Total("loss_and_gradient"), net, batch_size=6)
    assert loss == pytest.approx(net.losses(examples.x, examples.y).sum(), rel=1e-12)
    assert relative_error(gradient, n * net.gradient(examples.x, examples.y)) < 1e-12
    assert examples.sum_over(loss_sum, net) == pytest.approx(loss, rel=1e-12)


def test_each_row_s_answer_is_its_own(net_and_rows):
    net, examples = net_and_rows
    V = np.random.default_rng(1).standard_normal((net.num_parameters, 2))
    there, rows = net.theta + V[:, 0], [13, 2, 5]
    expected = net.directional(examples.x[rows], examples.y[rows], V)
    got = examples.each_row(PerRow("directional", V), net, rows=rows, batch_size=2)
    assert relative_error(got, expected) < 1e-12
    view = net.at(there)
    got = examples.each_row(PerRow("losses"), net, there, batch_size=9)
    assert relative_error(got, view.losses(examples.x, examples.y)) < 1e-12


def test_a_question_travels_and_says_how_wide_it_is(net_and_rows):
    net, examples = net_and_rows
    V = np.ones((net.num_parameters, 4))
    assert (Total("hvp", V).num_vectors, PerRow("losses").num_vectors) == (4, 1)
    assert PerRow("curvatures", V[:, 0]).num_vectors == 1
    assert Total("hvp", V).keeps and not Total("gradient").keeps
    assert repr(PerRow("directional", V)) == f"PerRow('directional', {V.shape})"
    question = pickle.loads(pickle.dumps(Total("hvp", V)))
    theta = net.theta
    again = pickle.loads(pickle.dumps(net)).at(theta)
    expected = Total("hvp", V)(net, None, examples.x, examples.y)
    np.testing.assert_array_equal(question(again, theta, examples.x, examples.y), expected)
    held = pickle.loads(pickle.dumps(Examples(examples.x, examples.y)))
    np.testing.assert_array_equal(held.sum_over(question, again), expected)
