"""Tests of derivatives and penalties of one batch."""

import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf

from influence import GenericNeuralNet
from tests import oracles
from tests.influence.net import test_zoo as zoo
from tests.influence.problems import relative_error, sequential, tanh_net, untraced

L = keras.layers
# Both sides are computed by the tape in float64, so they differ only by the order of additions.
ROUNDING = 1e-12


# --- against finite differences of values by Keras itself -------------------------------------


# The differences are of fourth order and have an error of about 1e-10.


def test_derivatives_against_differences(tanh):
    net, examples, losses, gradients, V = tanh
    x, y = examples.x, examples.y
    loss, gradient = net.loss_and_gradient(x, y)
    assert abs(loss - losses(net.theta).mean()) < ROUNDING * loss
    assert relative_error(gradient, gradients(net.theta)[0]) < ROUNDING
    for v in V.T:
        for got, function in (
            (net.directional(x, y, v), losses),
            (net.gradient(x, y) @ v, lambda t: losses(t).mean()),
            (net.hvp(x, y, v), lambda t: gradients(t)[0]),
            (net.input_gradient(x, y, v), lambda t: gradients(t)[1]),
        ):
            expected = oracles.central_difference(function, net.theta, v)
            assert relative_error(got, expected) < 1e-8


# --- derivatives at other parameter vectors ---------------------------------------------------


def test_questions_at_other_thetas_are_those_of_a_net_that_is_there(tanh):
    net, examples, losses, gradients, V = tanh
    x, y = examples.x, examples.y
    thetas = net.theta[:, None] + V
    assert relative_error(net.losses(x, y, thetas), np.stack([losses(t) for t in thetas.T], 1)) < (
        ROUNDING
    )
    expected = np.stack([gradients(t)[0] for t in thetas.T], axis=1)
    assert relative_error(net.gradient(x, y, thetas), expected) < ROUNDING
    rows = np.array([[0, 5, 2], [7, 2, 9]])
    each = net.each_batch("gradient", x[rows], y[rows], thetas.T[:, :, None])[:, :, 0].T
    expected = [
        net.gradient(x[r], y[r], t[:, None])[:, 0] for r, t in zip(rows, thetas.T, strict=True)
    ]
    assert relative_error(each, np.stack(expected, axis=1)) < ROUNDING
    v = V[:, 0]
    slope = oracles.central_difference(lambda t: losses(t)[rows[1]].mean(), thetas[:, 1], v)
    assert abs(each[:, 1] @ v - slope) < 1e-8 * abs(slope)


@pytest.mark.parametrize("kind", ["tanh", "conv"])
def test_bregman_gradient_against_differences_of_the_divergence(kind):
    """Compare the gradient with finite differences of D = loss(f) - loss(s) - loss'(s) . (f - s).

    Here f are the outputs at the given thetas, and s the outputs at the net's own theta.
    """
    rng, f8 = np.random.default_rng(3), {"dtype": "float64"}
    if kind == "conv":
        x = rng.standard_normal((4, 5, 5, 2))
        hidden = [L.Conv2D(2, 3, **f8), L.Activation("tanh", **f8), L.Flatten(**f8)]
    else:
        x, hidden = rng.standard_normal((4, 3)), [L.Dense(3, activation="tanh", **f8)]
    model = sequential(x.shape[1:], *hidden, L.Dense(3, **f8), **f8)
    net = GenericNeuralNet(model, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    net.theta = theta = rng.standard_normal(net.num_parameters) / 2
    y, s = np.array([0, 2, 1, 2]), net.outputs(x)
    P = scipy.special.softmax(s, axis=1)

    def divergence(at):
        net.theta = at
        f = net.outputs(x)
        net.theta = theta
        rise = scipy.special.logsumexp(f, axis=1) - scipy.special.logsumexp(s, axis=1)
        # The loss is logsumexp(f) - f_y. The terms with the labels y cancel in D.
        return (rise - np.sum(P * (f - s), axis=1)).mean()

    V = rng.standard_normal((net.num_parameters, 2))
    thetas = theta[:, None] + 0.3 * V
    got = net.bregman_gradient(x, y, thetas)
    for j in range(2):
        slope = oracles.central_difference(divergence, thetas[:, j], V[:, 0])
        assert abs(got[:, j] @ V[:, 0] - slope) < 1e-7 * abs(slope)
    np.testing.assert_array_equal(net.bregman_gradient(x, y, theta[:, None]), 0)
    near = net.bregman_gradient(x, y, theta[:, None] + 1e-6 * V) / 1e-6
    assert relative_error(near, net.gauss_newton_product(x, y, V)) < 1e-4


def test_a_net_at_another_theta_answers_as_one_that_is_there(tanh):
    net, examples, *_, V = tanh
    x, y, before, there = examples.x, examples.y, net.theta, net.theta + V[:, 0]
    asked = {
        name: lambda n, name=name: getattr(n, name)(x, y, V)
        for name in ("losses", "gradient", "hvp", "gauss_newton_product", "directional")
    }
    asked["risk"] = lambda n: n.risk(examples)
    asked["gradients"] = lambda n: n.gradients(x, y)
    asked["outputs"] = lambda n: n.outputs(x)
    asked["penalty"] = lambda n: n.penalty_gradient()
    asked["measured"] = lambda n: n.measuring("mae").losses(x, y)
    at = {name: question(net.at(there)) for name, question in asked.items()}
    np.testing.assert_array_equal(net.at(there).theta, there)
    np.testing.assert_array_equal(net.theta, before)
    assert net.at(None) is net
    with pytest.raises(AttributeError, match="theta of a view that net.at.theta. made is fixed"):
        net.at(there).theta = before
    with pytest.raises(ValueError, match="theta must have shape"):
        net.at(there[1:])
    try:
        net.theta = there
        for name, question in asked.items():
            np.testing.assert_array_equal(at[name], question(net), err_msg=name)
    finally:
        net.theta = before


def test_each_question_is_traced_once_whatever_sizes_it_comes_in():
    """Check that batches and blocks of other sizes do not cause another trace of a function.

    The results of another trace may differ in their last bits.
    """
    net, examples = tanh_net()
    untraced(net)
    for num, size in ((1, 20), (3, 1), (2, 7)):
        x, y = examples.x[:size], examples.y[:size]
        V = np.ones((net.num_parameters, num))
        net.losses(x, y, V)
        net.gradient(x, y, V)
        net.bregman_gradient(x, y, V)
        net.hvp(x, y, V)
        for question in ("gradient", "hvp"):
            net.each_batch(question, *(np.stack([part] * num) for part in (x, y, V)))
    functions = net.flat._functions
    assert len(functions) == 6
    # TensorFlow never traces a concrete function again.
    for function in functions.values():
        assert isinstance(function, tf.types.experimental.ConcreteFunction)


def test_a_vector_in_a_vector_out(tanh):
    net, examples, *_, V = tanh
    x, y = examples.x, examples.y
    for question in (net.hvp, net.directional, net.gauss_newton_product):
        block = question(x, y, V)
        assert block.shape == ((len(y) if question == net.directional else len(V)), 2)
        assert relative_error(question(x, y, V[:, 0]), block[:, 0]) < ROUNDING


@pytest.mark.parametrize(
    ("question", "method"), [("hvp", "hvp"), ("gauss_newton", "gauss_newton_product")]
)
def test_each_batch_is_batch_by_batch(tanh, question, method):
    by_name = zoo.build("skip_connection")
    rows = np.array([[0, 3], [5, 5], [1, 2]])
    for net, x, y in ((tanh[0], tanh[1].x, tanh[1].y), (by_name[0], *by_name[2:])):
        V = np.random.default_rng(3).standard_normal((3, net.num_parameters, 2))
        take = lambda r, x=x: tf.nest.map_structure(lambda part: part[r], x)  # noqa: E731
        got = net.each_batch(question, take(rows), y[rows], V)
        expected = [getattr(net, method)(take(r), y[r], v) for r, v in zip(rows, V, strict=True)]
        assert relative_error(got, np.stack(expected)) < ROUNDING


# --- the penalty ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def penalised():
    """Return a net with L1L2 on one kernel, L2 on another layer's bias, and no other penalty."""
    R = keras.regularizers
    first = L.Dense(2, dtype="float64", kernel_regularizer=R.L1L2(0.3, 0.2))
    last = L.Dense(1, dtype="float64", bias_regularizer=R.L2(0.7))
    net = GenericNeuralNet(sequential((2,), first, last, dtype="float64"), "mse")
    net.theta = np.array([1.0, -2, 3, -4, 5, 6, 7, 8, -9])
    return net


def test_penalty_is_the_sum_of_the_models_regularisers(penalised):
    net, k = penalised, np.array([1.0, -2, 3, -4])
    assert net.penalty() == pytest.approx(0.3 * 10 + 0.2 * 30 + 0.7 * 81, rel=1e-14)
    assert net.penalty() == pytest.approx(float(sum(net.model.losses)), rel=1e-14)
    gradient = np.r_[0.3 * np.sign(k) + 0.4 * k, np.zeros(4), 1.4 * -9]
    np.testing.assert_allclose(net.penalty_gradient(), gradient, rtol=1e-14)
    thetas = np.stack([net.theta, 2 * net.theta], axis=1)
    twice = np.r_[0.3 * np.sign(k) + 0.8 * k, np.zeros(4), 1.4 * -18]
    np.testing.assert_allclose(net.penalty_gradient(thetas), np.stack([gradient, twice], 1))
    hessian = np.r_[np.full(4, 0.4), np.zeros(4), 1.4]
    np.testing.assert_allclose(net.penalty_hvp(np.eye(9)), np.diag(hessian), rtol=1e-14)
    np.testing.assert_allclose(net.penalty_hvp(np.ones(9)), hessian, rtol=1e-14)
    np.testing.assert_array_equal(net.penalty_curvature_gradient(np.ones(9)), np.zeros(9))


def test_penalty_of_a_frozen_layer_is_no_part_of_the_risk(penalised):
    model = keras.models.clone_model(penalised.model)
    model.layers[0].trainable = False
    net = GenericNeuralNet(model, "mse")
    net.theta = np.array([1.0, 1, 3])
    assert net.penalty() == pytest.approx(0.7 * 9)


def test_nothing_is_known_of_a_model_without_regularisers(tanh):
    net, examples, *_ = tanh
    assert net.penalty() == 0
    np.testing.assert_array_equal(net.penalty_gradient(), np.zeros(net.num_parameters))
    np.testing.assert_array_equal(net.penalty_hvp(np.ones(net.num_parameters)), 0)
    assert net.hessian(examples) is None and not net.convex
