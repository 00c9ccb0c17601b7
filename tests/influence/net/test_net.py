import warnings
from functools import cache, partial

import keras
import numpy as np
import pytest
import scipy.sparse
import scipy.special
import tensorflow as tf

from influence import ConvergenceWarning, Examples, GenericNeuralNet, Hessian
from tests import oracles
from tests.influence.problems import dense_net, relative_error, ridge, tanh_net, untraced

L = keras.layers
N = 6


def logits_loss(y, output):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y, output)


def squares(y, output):
    return tf.reduce_sum((tf.reshape(y, [-1, 1]) - output) ** 2, axis=1)


class NoTrainingArgument(keras.Model):
    """Subclassed model without a `training` argument and without a declared input."""

    def __init__(self, units):
        super().__init__(dtype="float64")
        self.hidden = L.Dense(3, activation="tanh", dtype="float64")
        self.last = L.Dense(units, activation="sigmoid", dtype="float64")

    def call(self, x):
        return self.last(self.hidden(x))


# --- models of all kinds: model, loss for the net, same loss in TensorFlow, x, y --------------


def two_inputs_to_probabilities(rng):
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    hidden = L.Concatenate()([L.Dense(2, activation="softplus")(a), b])
    model = keras.Model({"a": a, "b": b}, L.Dense(3, activation="softmax")(hidden))
    x = {"a": rng.standard_normal((N, 3)), "b": rng.standard_normal((N, 2))}

    def log_loss(y, output):
        return -tf.math.log(tf.gather(output, y, axis=1, batch_dims=1))

    return model, "sparse_categorical_crossentropy", log_loss, x, np.arange(N) % 3


def subclassed_without_training(rng):
    model = NoTrainingArgument(1)
    model(np.zeros((1, 2)))
    y = np.arange(N) % 2

    def log_loss(y, output):
        p = output[:, 0]
        return -tf.where(y == 1, tf.math.log(p), tf.math.log(1 - p))

    return model, "binary_crossentropy", log_loss, rng.standard_normal((N, 2)), y


def batch_norm_dropout_frozen(rng):
    model = keras.Sequential(
        [
            keras.Input((5, 5, 1)),
            L.Conv2D(2, 2, name="frozen"),
            L.BatchNormalization(),
            L.Activation("tanh"),
            L.Dropout(0.5),
            L.Conv2D(2, 3),
            L.Flatten(),
            L.Dense(3),
        ]
    )
    model.get_layer("frozen").trainable = False
    model.layers[1].moving_mean.assign(rng.standard_normal(2))
    model.layers[1].moving_variance.assign(rng.uniform(0.5, 2, 2))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return model, loss, logits_loss, rng.standard_normal((N, 5, 5, 1)), np.arange(N) % 3


def embedded_integers(rng):
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            L.Embedding(6, 2),
            L.Flatten(),
            L.Dense(1),
        ]
    )
    return model, squares, squares, rng.integers(0, 6, (N, 4)), rng.standard_normal(N)


def recurrent(rng):
    model = keras.Sequential([keras.Input((2, 2)), L.SimpleRNN(2), L.Dense(1)])
    return model, "mse", squares, rng.standard_normal((N, 2, 2)), rng.standard_normal(N)


KINDS = {
    kind.__name__: kind
    for kind in (
        two_inputs_to_probabilities,
        subclassed_without_training,
        batch_norm_dropout_frozen,
        embedded_integers,
        recurrent,
    )
}


@cache
def build(kind, dtype="float64"):
    """Return (net, plain loss, x, y) with random weights; all tests share one net of a kind."""
    rng = np.random.default_rng(7)
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        model, loss, plain, x, y = KINDS[kind](rng)
    finally:
        keras.config.set_floatx(before[0])
        keras.config.set_dtype_policy(before[1])
    net = GenericNeuralNet(model, loss)
    net.theta = rng.standard_normal(net.num_parameters) / 2
    return net, plain, x, y


# These layers need a loop, which is slow to trace. test_zoo.py tests their lower derivatives.
LOOPED = {"recurrent"}


@pytest.fixture(scope="module", params=[kind for kind in KINDS if kind not in LOOPED])
def case(request):
    net, plain, x, y = build(request.param)
    dense = oracles.dense_derivatives(net.model, plain, x, y)
    V = np.random.default_rng(8).standard_normal((net.num_parameters, 2))
    return net, plain, x, y, dense, V


# Both sides use the tape in float64, so only the order of additions differs.
ROUNDING = 1e-12


def test_losses_and_gradients_are_those_of_the_plain_model(case):
    net, _, x, y, dense, _ = case
    assert relative_error(net.losses(x, y), dense.losses) < ROUNDING
    assert relative_error(net.gradients(x, y), dense.gradients) < ROUNDING
    assert relative_error(net.outputs(x), net.model(x, training=False).numpy()) < ROUNDING


def test_second_derivatives_are_those_of_the_plain_model(case):
    net, plain, x, y, dense, V = case
    assert relative_error(net.directional(x, y, V), dense.gradients @ V) < ROUNDING
    if net.loss.from_logits:
        assert relative_error(net.gauss_newton_product(x, y, V), dense.gauss_newton @ V) < ROUNDING
    gradient_at = partial(oracles.plain_gradient_at, net.model, plain, x, y)
    expected = [oracles.central_difference(gradient_at, net.theta, v) for v in V.T]
    # Fourth-order differences have an error of about 1e-9 here; required is 1e-6.
    assert relative_error(net.hvp(x, y, V), np.stack(expected, axis=1)) < 1e-7


def elsewhere(net, question):
    """Return the function theta -> `question()` at theta."""
    here = net.theta

    def at(theta):
        net.theta = theta
        try:
            return question()
        finally:
            net.theta = here

    return at


def test_third_derivatives_against_differences_of_second(case):
    net, _, x, y, _, V = case
    v, theta = V[:, 0], net.theta
    along, product = (elsewhere(net, partial(q, x, y, v)) for q in (net.directional, net.hvp))
    expected = oracles.central_difference(along, theta, v)
    assert relative_error(net.curvatures(x, y, v), expected) < 1e-7
    expected = oracles.central_difference(product, theta, v)
    assert relative_error(net.curvature_gradient(x, y, v), expected) < 1e-7


@pytest.mark.slow
def test_other_derivatives_where_maps_must_loop():
    """Test what test_zoo.py omits, because each trace takes seconds."""
    net, _, x, y = build("recurrent")
    v = np.random.default_rng(8).standard_normal(net.num_parameters)
    losses = elsewhere(net, partial(net.losses, x, y))
    theta, h = net.theta, 1e-3
    near, far = (losses(theta + t * v) + losses(theta - t * v) for t in (h, 2 * h))
    expected = (16 * near - far - 30 * losses(theta)) / (12 * h**2)  # rounding error: 1e-16 / h^2
    assert relative_error(net.curvatures(x, y, v), expected) < 1e-6
    one = np.random.default_rng(9).standard_normal(x.shape)

    def mixed(x):  # derivative of the losses along v in theta
        here = elsewhere(net, lambda: net.losses(x, y))
        return (here(theta + h * v) - here(theta - h * v)) / (2 * h)

    slope = (mixed(x + h * one) - mixed(x - h * one)) / (2 * h)  # second order: error h^2
    got = np.sum(net.input_gradient(x, y, v) * one, axis=(1, 2))
    assert relative_error(got, slope) < 1e-4


def test_every_result_has_the_dtype_of_theta(case):
    net, _, x, y, _, V = case
    results = [net.theta, net.losses(x, y), net.gradients(x, y), net.hvp(x, y, V.astype("f4"))]
    assert {r.dtype for r in results} == {np.dtype("float64")}


def test_float64_data_into_a_float32_model_is_rounded_not_refused():
    net = dense_net(1, 3, "mse", dtype="float32")
    x, y = np.eye(3), np.ones(3)
    net.theta = np.arange(4.0)
    np.testing.assert_array_equal(net.losses(x, y), [(0 + 3 - 1) ** 2, 9, 16])
    assert net.losses(x, y).dtype == np.float32


# --- finite differences of values that Keras itself computes ----------------------------------


@pytest.fixture(scope="module")
def tanh():
    """Return a network, examples, plain losses and gradients as functions, and vectors V."""
    net, examples = tanh_net()
    twin, _ = tanh_net()  # its theta changes here, so that the net's never does

    def losses(theta, x=examples.x):
        twin.theta = theta
        return squares(examples.y, twin.model(x)).numpy()

    def gradients(theta, x=examples.x):
        """Return d/dtheta of the mean loss, and d/dx of each loss at its own x."""
        twin.theta = theta
        x = tf.constant(x)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            values = squares(examples.y, twin.model(x))
            mean, total = tf.reduce_mean(values), tf.reduce_sum(values)
        by_theta = [np.ravel(g) for g in tape.gradient(mean, twin.model.trainable_weights)]
        return np.concatenate(by_theta), tape.gradient(total, x).numpy()

    V = np.random.default_rng(1).standard_normal((net.num_parameters, 2))
    return net, examples, losses, gradients, V


# Fourth-order differences have an error of about 1e-10 here; required is 1e-6.


def test_directional_against_differences_of_losses(tanh):
    net, examples, losses, _, V = tanh
    for v in V.T:
        expected = oracles.central_difference(losses, net.theta, v)
        assert relative_error(net.directional(examples.x, examples.y, v), expected) < 1e-8


def test_gradient_against_differences_of_losses(tanh):
    net, examples, losses, gradients, V = tanh
    loss, gradient = net.loss_and_gradient(examples.x, examples.y)
    assert abs(loss - losses(net.theta).mean()) < ROUNDING * loss
    assert relative_error(gradient, gradients(net.theta)[0]) < ROUNDING
    for v in V.T:
        expected = oracles.central_difference(lambda t: losses(t).mean(), net.theta, v)
        assert abs(net.gradient(examples.x, examples.y) @ v - expected) < 1e-8 * abs(expected)


def test_hvp_against_differences_of_gradients(tanh):
    net, examples, _, gradients, V = tanh
    for v in V.T:
        expected = oracles.central_difference(lambda t: gradients(t)[0], net.theta, v)
        assert relative_error(net.hvp(examples.x, examples.y, v), expected) < 1e-8


def test_input_gradient_against_differences_of_gradients(tanh):
    net, examples, _, gradients, V = tanh
    for v in V.T:
        expected = oracles.central_difference(lambda t: gradients(t)[1], net.theta, v)
        assert relative_error(net.input_gradient(examples.x, examples.y, v), expected) < 1e-8


def test_input_gradient_has_the_structure_of_x():
    net, _, x, y = build("two_inputs_to_probabilities")
    v = np.random.default_rng(2).standard_normal(net.num_parameters)
    got = net.input_gradient(x, y, v)
    assert set(got) == {"a", "b"}
    for name in x:
        for i, j in [(0, 0), (4, 1)]:
            one = np.zeros_like(x[name])
            one[i, j] = 1.0
            expected = oracles.central_difference(
                lambda part, name=name: net.directional({**x, name: part}, y, v), x[name], one
            )
            assert abs(got[name][i, j] - expected[i]) < 1e-8 * abs(expected[i])


# --- other parameter vectors ------------------------------------------------------------------


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
    """Compare with D = loss at f - loss at s - slope at s . (f - s), from outputs f and s."""
    rng, f8 = np.random.default_rng(3), {"dtype": "float64"}
    if kind == "conv":
        x = rng.standard_normal((4, 5, 5, 2))
        hidden = [L.Conv2D(2, 3, **f8), L.Activation("tanh", **f8), L.Flatten(**f8)]
    else:
        x, hidden = rng.standard_normal((4, 3)), [L.Dense(3, activation="tanh", **f8)]
    model = keras.Sequential([keras.Input(x.shape[1:], **f8), *hidden, L.Dense(3, **f8)])
    net = GenericNeuralNet(model, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    net.theta = theta = rng.standard_normal(net.num_parameters) / 2
    y, s = np.array([0, 2, 1, 2]), net.outputs(x)
    P = scipy.special.softmax(s, axis=1)

    def divergence(at):
        net.theta = at
        f = net.outputs(x)
        net.theta = theta
        rise = scipy.special.logsumexp(f, axis=1) - scipy.special.logsumexp(s, axis=1)
        return (rise - np.sum(P * (f - s), axis=1)).mean()  # the label term is linear and cancels

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
    """Check that no second trace occurs; it would change the last bits of a result."""
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
    for function in functions.values():  # a concrete function is never retraced
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
    net, examples, *_ = tanh
    rows = np.array([[0, 3], [5, 5], [1, 2]])
    V = np.random.default_rng(3).standard_normal((3, net.num_parameters, 2))
    got = net.each_batch(question, examples.x[rows], examples.y[rows], V)
    expected = [
        getattr(net, method)(examples.x[r], examples.y[r], v) for r, v in zip(rows, V, strict=True)
    ]
    assert relative_error(got, np.stack(expected)) < ROUNDING


def test_each_batch_of_dicts():
    net, _, x, y = build("two_inputs_to_probabilities")
    rows = np.array([[0, 3], [5, 1]])
    V = np.random.default_rng(3).standard_normal((2, net.num_parameters, 1))
    take = lambda r: {k: v[r] for k, v in x.items()}  # noqa: E731
    got = net.each_batch("hvp", take(rows), y[rows], V)
    expected = [net.hvp(take(r), y[r], v) for r, v in zip(rows, V, strict=True)]
    assert relative_error(got, np.stack(expected)) < ROUNDING


# --- theta, penalty, risk ---------------------------------------------------------------------


def test_theta_is_the_trainable_weights_in_their_order():
    net, *_ = build.__wrapped__("batch_norm_dropout_frozen")  # not shared: theta changes
    model = net.model
    names = [w.path.split("/")[-1] for w in model.trainable_weights]
    assert names == ["gamma", "beta", "kernel", "bias", "kernel", "bias"]  # without "frozen"
    theta = np.arange(float(net.num_parameters))
    net.theta = theta
    np.testing.assert_array_equal(net.theta, theta)
    flat = np.concatenate([np.ravel(w) for w in model.get_layer(index=-1).get_weights()])
    np.testing.assert_array_equal(flat, theta[-len(flat) :])
    np.testing.assert_array_equal(model.layers[1].gamma, theta[:2])


@pytest.mark.parametrize(
    ("theta", "message"),
    [
        (np.zeros(5), r"theta must have shape \(4,\), got \(5,\)"),
        (np.zeros((4, 1)), r"theta must have shape \(4,\), got \(4, 1\)"),
        ([0, 1, np.nan, 3], "theta must be finite, got nan at position 2"),
        ([np.inf, 1, 2, 3], "theta must be finite, got inf at position 0"),
    ],
)
def test_bad_theta(theta, message):
    net = dense_net(1, 3, "mse")
    before = net.theta
    with pytest.raises(ValueError, match=message):
        net.theta = theta
    np.testing.assert_array_equal(net.theta, before)


@pytest.fixture(scope="module")
def penalised():
    """Return a net with L1L2 on one kernel, L2 on another layer's bias, and no other penalty."""
    R = keras.regularizers
    model = keras.Sequential(
        [
            keras.Input((2,), dtype="float64"),
            L.Dense(2, dtype="float64", kernel_regularizer=R.L1L2(0.3, 0.2)),
            L.Dense(1, dtype="float64", bias_regularizer=R.L2(0.7)),
        ]
    )
    net = GenericNeuralNet(model, "mse")
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


def test_a_model_without_regularisers_has_no_penalty(tanh):
    net, *_ = tanh
    assert net.penalty() == 0
    np.testing.assert_array_equal(net.penalty_gradient(), np.zeros(net.num_parameters))
    np.testing.assert_array_equal(net.penalty_hvp(np.ones(net.num_parameters)), 0)


@pytest.fixture(scope="module")
def linear():
    return ridge()


@pytest.mark.parametrize("batch_size", [None, 1, 7, 39, 40, 64])
def test_risk_is_that_of_the_closed_form_for_every_batch_size(linear, batch_size):
    net, oracle, theta = linear.net, linear.oracle, linear.theta
    thetas = theta[:, None] + np.random.default_rng(0).standard_normal((5, 2))
    expected = np.stack([oracle.gradient(t) for t in thetas.T], axis=1)
    assert net.risk(linear.train, batch_size) == pytest.approx(oracle.value(theta), rel=1e-12)
    got = net.risk_gradient(linear.train, thetas, batch_size)
    assert relative_error(got, expected) < ROUNDING
    moved = np.array([0.5, -1, 2, 0, 1])
    try:
        net.theta = theta + moved
        value, gradient = net.risk_and_gradient(linear.train, batch_size)
        alone = net.risk_gradient(linear.train, batch_size=batch_size)
    finally:
        net.theta = theta
    assert value == pytest.approx(oracle.value(theta + moved), rel=1e-12)
    assert relative_error(gradient, oracle.gradient(theta + moved)) < ROUNDING
    assert relative_error(alone, oracle.gradient(theta + moved)) < ROUNDING


def test_rows_per_batch_bounds_memory(tanh, monkeypatch):
    net, examples, *_ = tanh
    assert net.rows_per_batch(examples) == len(examples)
    monkeypatch.setattr("influence.net.net.ACTIVATIONS", 10_000)
    few = net.rows_per_batch(examples)
    assert 1 <= net.rows_per_batch(examples, 50) < few < len(examples)
    assert net.risk(examples) == pytest.approx(net.risk(examples, 20), rel=1e-13)


def test_no_closed_form_is_known(tanh):
    net, examples, *_ = tanh
    assert net.hessian(examples) is None and not net.convex


# --- fit --------------------------------------------------------------------------------------


def test_fit_reaches_the_exact_minimum():
    problem = ridge()
    theta = problem.oracle.minimum(problem.theta)
    problem.net.theta = np.zeros(5)
    for tolerance in (1e-1, 1e-2, 1e-3, 1e-4, 1e-7):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert problem.net.fit(problem.train, gradient_tolerance=tolerance) is problem.net
        assert np.linalg.norm(problem.oracle.gradient(problem.theta)) <= tolerance
    # By strong convexity, |theta - minimum| <= |gradient| / smallest eigenvalue.
    smallest = np.linalg.eigvalsh(problem.oracle.hessian(theta))[0]
    assert np.linalg.norm(problem.theta - theta) <= 1e-7 / smallest


def test_fit_says_when_it_stops_early():
    problem = ridge()
    problem.net.theta = np.zeros(5)
    with pytest.warns(ConvergenceWarning, match="L-BFGS stopped at a gradient norm of .* after 2"):
        problem.net.fit(problem.train, gradient_tolerance=1e-9, max_iterations=2)


# --- sparse rows and memmaps ------------------------------------------------------------------


def test_sparse_rows_and_memmaps_give_the_numbers_of_dense_arrays(linear, tmp_path):
    net, x, y = linear.net, linear.train.x, linear.train.y
    stored = np.memmap(tmp_path / "x", np.float64, "w+", shape=x.shape)
    stored[:] = x
    V = np.random.default_rng(0).standard_normal((5, 2))
    for other in (scipy.sparse.csr_matrix(x), stored):
        np.testing.assert_array_equal(net.losses(other, y), net.losses(x, y))
        np.testing.assert_array_equal(net.hvp(other, y, V), net.hvp(x, y, V))
        np.testing.assert_array_equal(net.directional(other, y, V), net.directional(x, y, V))


# --- the model is not changed -----------------------------------------------------------------


def state(model):
    layers = [(layer.name, layer.trainable) for layer in model._flatten_layers()]
    compiled = (model.optimizer, model.loss, model.compiled, model.train_function)
    return [v.numpy() for v in model.variables], layers, compiled


def test_no_question_changes_the_model():
    rng = np.random.default_rng(0)
    hidden = L.Dense(3, dtype="float64", trainable=False)
    norm = L.BatchNormalization(dtype="float64")
    model = keras.Sequential(
        [keras.Input((2,), dtype="float64"), hidden, norm, L.Dropout(0.5, dtype="float64"),
         L.Dense(2, dtype="float64")]
    )  # fmt: skip
    norm.moving_mean.assign(rng.standard_normal(3))
    net = GenericNeuralNet(model, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = rng.standard_normal((N, 2)), np.arange(N) % 2
    model.compile("adam", loss="mse", metrics=["mae"])
    variables, layers, compiled = state(model)
    V = np.ones((net.num_parameters, 2))
    thetas = np.zeros((net.num_parameters, 2))
    examples = Examples(x, y)
    net.validate(examples, "train")
    for answer in (
        net.outputs(x),
        net.losses(x, y),
        net.losses(x, y, thetas),
        net.gradient(x, y),
        net.gradients(x, y),
        net.loss_and_gradient(x, y)[1],
        net.hvp(x, y, V),
        net.each_batch("hvp", x[:4].reshape(2, 2, 2), y[:4].reshape(2, 2), np.stack([V, V])),
        net.gauss_newton_product(x, y, V),
        net.directional(x, y, V),
        net.input_gradient(x, y, V[:, 0]),
        net.penalty_gradient(),
        net.penalty_hvp(V),
        net.risk_gradient(examples),
    ):
        assert np.isfinite(answer).all()
    after, layers_after, compiled_after = state(model)
    for a, b in zip(after, variables, strict=True):
        np.testing.assert_array_equal(a, b)
    assert layers_after == layers and compiled_after == compiled
    assert model.variables and all(isinstance(v, keras.Variable) for v in model.variables)


# --- errors -----------------------------------------------------------------------------------


def unbuilt():
    return keras.Sequential([L.Dense(1)])


def nothing_trainable():
    model = keras.Sequential([keras.Input((2,)), L.Dense(1)], name="all_frozen")
    model.trainable = False
    return model


def activity_regularised():
    regulariser = keras.regularizers.L2(0.1)
    return keras.Sequential(
        [keras.Input((2,)), L.Dense(1, activity_regularizer=regulariser, name="active")]
    )


def mixed_dtypes():
    return keras.Sequential(
        [keras.Input((2,)), L.Dense(1, dtype="float32"), L.Dense(1, dtype="float64")]
    )


def rounded_input():
    return keras.Sequential([keras.Input((2,), name="rounding"), L.Dense(1, dtype="float64")])


def half_precision():
    return keras.Sequential([keras.Input((2,)), L.Dense(1, dtype="float16")])


def mixed_precision():
    return keras.Sequential([keras.Input((2,)), L.Dense(1, dtype="mixed_float16", name="mixed")])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: "model.keras", TypeError, r"^model must be a keras\.Model, got str\.$"),
        (unbuilt, ValueError, "^model must be built, got the unbuilt 'sequential.*call it on a"),
        (nothing_trainable, ValueError, "^model must have a trainable weight, got none in 'all_f"),
        (activity_regularised, ValueError, "^model must have no activity regulariser, got one on "
         "layer 'active'"),
        (mixed_dtypes, TypeError, "^model must have trainable weights of one dtype, got float32, "
         "float64"),
        (rounded_input, ValueError, "^model must not round its input, got float64 weights behind "
         "the float32 input 'rounding'"),
        (half_precision, TypeError, "^model must have float32 or float64 weights, got float16"),
        (mixed_precision, ValueError, "^model must compute in the dtype of its weights, float32, "
         "got float16 in layer 'mixed'"),
    ],
)  # fmt: skip
def test_models_that_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        GenericNeuralNet(make(), "mse")


def test_a_net_needs_a_loss():
    with pytest.raises(ValueError, match="loss must be given for a model that is not compiled"):
        GenericNeuralNet(keras.Sequential([keras.Input((2,)), L.Dense(1)]))
    model = keras.Sequential([keras.Input((2,)), L.Dense(1)])
    model.compile(loss="mse")
    assert GenericNeuralNet(model).loss.name == "mean_squared_error"


class TwoOutputs(keras.Model):
    def __init__(self):
        super().__init__(name="two")
        self.a, self.b = L.Dense(1), L.Dense(1)

    def call(self, x):
        return self.a(x), self.b(x)


class AddsLoss(keras.Model):
    def __init__(self):
        super().__init__(name="adds")
        self.a = L.Dense(1)

    def call(self, x):
        self.add_loss(tf.reduce_sum(x))
        return self.a(x)


class MixesRows(keras.Model):
    def __init__(self):
        super().__init__(name="mixes")
        self.a = L.Dense(1)

    def call(self, x):
        return self.a(x - tf.reduce_mean(x, axis=0))


def built(kind):
    model = kind()
    model(np.zeros((1, 2), np.float32))
    return model


FLAT = np.arange(8, dtype=np.float32).reshape(4, 2)
REAL = np.array([1.0, -2, 3, 0], np.float32)


@pytest.mark.parametrize(
    ("make", "loss", "y", "message"),
    [
        (TwoOutputs, "mse", REAL, "^model must have one output, got a tuple from 'two'"),
        (AddsLoss, "mse", REAL, "^model must not add losses of its own, got 1 by add_loss in 'add"),
        (MixesRows, "mse", REAL, "^loss must depend on its own row alone, got .* for row 0 of tra"),
        (
            lambda: built_dense(1),
            lambda y, output: tf.reduce_mean((y - output) ** 2, axis=-1),  # (n,) - (n, 1)
            REAL,
            r"^loss must depend on its own row alone, .*labels of shape \(3,\) broadcast against "
            r"outputs of shape \(3, 1\)",
        ),
        (
            lambda: built_dense(1),
            lambda y, output: tf.reduce_mean((y[:, None] - output) ** 2),
            REAL,
            r"^loss must give one number per example, got shape \(\) from '<lambda>' for 3 examples"
            " of train; leave out the mean or sum",
        ),
        (
            lambda: built_dense(1),
            lambda y, output: (y[:, None] - output) ** 2,
            REAL,
            r"^loss must give one number per example, got shape \(3, 1\) .*; take the mean "
            r"for each example, tf\.reduce_mean\(\.\.\., axis=-1\)\.$",
        ),
        (
            lambda: built_dense(1),
            lambda y, output: (y - output) ** 2,  # (n,) - (n, 1)
            REAL,
            r"got shape \(3, 3\) .* labels of shape \(3,\) broadcast against outputs of shape "
            r"\(3, 1\); use y\[:, None\], and take the mean .*axis=-1\)\.$",
        ),
        (
            lambda: built_dense(3),
            lambda y, output: (y - output)[:, :, None] ** 2,
            np.eye(3, dtype=np.float32)[[0, 1, 2, 0]],
            r"got shape \(3, 3, 1\) .*; take the mean .*axis=\[1, 2\]\)\.$",
        ),
        (
            lambda: built_dense(3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            [0, 1, 2, 3],
            r"^train\.y must hold class numbers 0 to 2, got 3 in row 3",
        ),
        (
            lambda: built_dense(2),
            keras.losses.CategoricalCrossentropy(from_logits=True),
            np.eye(3, dtype=np.float32)[[0, 1, 2, 0]],
            r"^train\.y does not fit the loss 'categorical_crossentropy': labels of shape \(3, 3\),"
            r" dtype float32, against outputs of shape \(3, 2\)",
        ),
        (
            lambda: built_dense(3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            np.eye(3, dtype=int)[[0, 1, 2, 0]],
            r"^train\.y does not fit the loss 'sparse_categorical_crossentropy': labels of shape",
        ),
    ],
)
def test_sets_and_losses_that_do_not_fit(make, loss, y, message):
    made = make()
    if isinstance(made, keras.Model) and not made.built:
        made(FLAT[:1])
    with pytest.raises(ValueError, match=message):
        GenericNeuralNet(made, loss).validate(Examples(FLAT, y), "train")


def built_dense(units):
    return keras.Sequential([keras.Input((2,)), L.Dense(units)], name="small")


def test_inputs_that_do_not_fit():
    one = GenericNeuralNet(built_dense(1), "mse")
    two = build("two_inputs_to_probabilities")[0]
    undeclared = GenericNeuralNet(built(MixesRows), "mse")
    y = np.array([0, 1, 2, 0])
    x = np.ones((4, 3))
    for net, given, message in (
        (one, x, r"^train\.x must have rows of shape \(2,\) for model 'small', got \(3,\)"),
        (one, np.ones((4, 2, 1)), r"^train\.x must have rows of shape \(2,\) .*got \(2, 1\)"),
        (one, scipy.sparse.csr_matrix(x), r"^train\.x must have rows of shape \(2,\)"),
        (two, x, r"^train\.x must be a dict with the model's inputs \['a', 'b'\], got one array"),
        (two, {"a": x, "c": x}, r"^train\.x must have the model's inputs \['a', 'b'\], got \['a',"),
        (two, {"a": x, "b": x}, r"^train\.x\['b'\] must have rows of shape \(2,\) for model"),
        (undeclared, x, r"^train\.x does not fit the model 'mixes', got x: float32 \(3, 3\)"),
        (undeclared, {"a": x}, r"^train\.x does not fit the model 'mixes', got a: float32"),
    ):
        with pytest.raises(ValueError, match=message):
            net.validate(Examples(given, y), "train")
    with pytest.raises(TypeError, match=r"^train must be Examples\(x, y\), got tuple"):
        one.validate((x, y), "train")


def test_weights_that_are_not_finite_are_named_with_their_layer():
    x, y = np.ones((4, 2)), np.zeros(4)
    layers = [L.Dense(2, name="first", dtype="float64"), L.Dense(1, name="last", dtype="float64")]
    model = keras.Sequential([keras.Input((2,), dtype="float64"), *layers])
    net, train = GenericNeuralNet(model, "mse"), Examples(x, y)
    A = Hessian(net, train, damping=1.0)
    last = layers[1].get_weights()
    layers[1].set_weights([last[0] * np.nan, last[1]])
    message = "^model must have finite weights, got NaN or infinity in layer 'last'; train again"
    for refused in (
        lambda: net.validate(train, "train"),
        lambda: Hessian(net, train),
        lambda: A @ np.ones(net.num_parameters),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    layers[0].set_weights([weight + np.inf for weight in layers[0].get_weights()])
    with pytest.raises(ValueError, match="in layer 'first', 'last'; train"):
        net.validate(train, "train")


def test_a_dataset_is_to_be_wrapped(tanh):
    net, examples, *_ = tanh
    dataset = tf.data.Dataset.from_tensor_slices((examples.x, examples.y)).batch(4)
    message = r"^train must be Examples\(x, y\), got _BatchDataset; wrap it: influence\.Stream"
    with pytest.raises(TypeError, match=message):
        net.validate(dataset, "train")

    class Rows(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return examples.x, examples.y

    with pytest.raises(TypeError, match=r"got Rows; wrap it: influence\.Stream\(dataset\)\.$"):
        net.validate(Rows(), "train")


def test_vectors_that_do_not_fit(tanh):
    net, examples, *_ = tanh
    x, y = examples.x, examples.y
    with pytest.raises(ValueError, match=r"^V must have shape \(21,\) or \(21, m\), got \(20,\)"):
        net.hvp(x, y, np.ones(20))
    with pytest.raises(ValueError, match=r"^V must .* got \(21, 1, 1\)"):
        net.directional(x, y, np.ones((21, 1, 1)))
    with pytest.raises(ValueError, match=r"^v must have shape \(21,\), got \(21, 2\)"):
        net.input_gradient(x, y, np.ones((21, 2)))
    with pytest.raises(ValueError, match=r"^thetas must have shape"):
        net.losses(x, y, np.ones((3, 21)))


def test_integers_have_no_input_gradient():
    net, _, x, y = build("embedded_integers")
    with pytest.raises(TypeError, match="^x must be floating to be differentiated, got int64"):
        net.input_gradient(x, y, net.theta)
    two = build("two_inputs_to_probabilities")[0]
    x = {"a": np.ones((2, 3)), "b": np.ones((2, 2), int)}
    with pytest.raises(TypeError, match=r"^x\['b'\] must be floating to be differentiated"):
        two.input_gradient(x, np.zeros(2, int), two.theta)


def test_gauss_newton_refuses_probabilities():
    net, _, x, y = build("two_inputs_to_probabilities")
    with pytest.raises(ValueError, match="^loss must take logits for a Gauss-Newton matrix, got "
                       "'sparse_categorical_crossentropy' of probabilities"):  # fmt: skip
        net.gauss_newton_product(x, y, net.theta)


def test_many_nets_make_tensorflow_warn_of_nothing(caplog):
    """Check that nets in a loop, which share function names, cause no retracing warning."""
    rows = np.random.default_rng(0).standard_normal((4, 2))
    for _ in range(7):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        net = GenericNeuralNet(model, "mse")
        net.gradients(rows, rows[:, 0])
        net.penalty_hvp(np.ones(3))
    assert not [record for record in caplog.records if "retracing" in record.getMessage()]
