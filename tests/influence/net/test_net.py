import warnings

import keras
import numpy as np
import pytest
import scipy.sparse
import scipy.special
import tensorflow as tf

from influence import ConvergenceWarning, Examples, GenericNeuralNet, Hessian
from tests import oracles
from tests.influence.net import test_zoo as zoo
from tests.influence.problems import (
    Calls,
    dense_net,
    relative_error,
    ridge,
    sequential,
    tanh_net,
    untraced,
)

L = keras.layers
N = 6


# Both sides use the tape in float64, so only the order of additions differs.
ROUNDING = 1e-12


def squares(y, output):
    return tf.reduce_sum((tf.reshape(y, [-1, 1]) - output) ** 2, axis=1)


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
    by_name = zoo.build("skip_connection")
    rows = np.array([[0, 3], [5, 5], [1, 2]])
    for net, x, y in ((tanh[0], tanh[1].x, tanh[1].y), (by_name[0], *by_name[2:])):
        V = np.random.default_rng(3).standard_normal((3, net.num_parameters, 2))
        take = lambda r, x=x: tf.nest.map_structure(lambda part: part[r], x)  # noqa: E731
        got = net.each_batch(question, take(rows), y[rows], V)
        expected = [getattr(net, method)(take(r), y[r], v) for r, v in zip(rows, V, strict=True)]
        assert relative_error(got, np.stack(expected)) < ROUNDING


# --- theta, penalty, risk ---------------------------------------------------------------------


def test_theta_is_the_trainable_weights_in_their_order():
    model = zoo.batch_normalised()
    model.layers[0].trainable = False
    net = GenericNeuralNet(model, "mse")
    names = [w.path.split("/")[-1] for w in model.trainable_weights]
    assert names == ["gamma", "beta", "kernel", "bias"]
    net.theta = theta = np.arange(float(net.num_parameters))
    np.testing.assert_array_equal(net.theta, theta)
    flat = np.concatenate([np.ravel(w) for w in model.get_layer(index=-1).get_weights()])
    np.testing.assert_array_equal(flat, theta[-len(flat) :])
    np.testing.assert_array_equal(model.layers[1].gamma, theta[:3])


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
    return [v.numpy().tolist() for v in model.variables], layers, compiled


def test_no_question_changes_the_model():
    rng, f8 = np.random.default_rng(0), {"dtype": "float64"}
    norm = L.BatchNormalization(**f8)
    hidden = L.Dense(3, trainable=False, **f8)
    model = sequential((2,), hidden, norm, L.Dropout(0.5, **f8), L.Dense(2, **f8), **f8)
    norm.moving_mean.assign(rng.standard_normal(3))
    net = GenericNeuralNet(model, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = rng.standard_normal((6, 2)), np.arange(6) % 2
    model.compile("adam", loss="mse", metrics=["mae"])
    before = state(model)
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
    assert state(model) == before
    assert model.variables and all(isinstance(v, keras.Variable) for v in model.variables)


# --- errors -----------------------------------------------------------------------------------


def dense(units=1, **options):
    return lambda: sequential((2,), L.Dense(units, **options), name="small")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: "model.keras", TypeError, r"be a keras\.Model, got str\.$"),
        (
            lambda: keras.Sequential([L.Dense(1)]),
            ValueError,
            "be built, got the unbuilt 'sequential.*call it on a",
        ),
        (dense(trainable=False), ValueError, "have a trainable weight, got none in 'small'"),
        (
            dense(activity_regularizer="l2", name="active"),
            ValueError,
            "have no activity regulariser, got one on layer 'active'",
        ),
        (
            lambda: sequential((2,), L.Dense(1, dtype="float32"), L.Dense(1, dtype="float64")),
            TypeError,
            "have trainable weights of one dtype, got float32, float64",
        ),
        (
            dense(dtype="float64"),
            ValueError,
            "not round its input, got float64 weights behind the float32 input 'keras_tensor",
        ),
        (dense(dtype="float16"), TypeError, "have float32 or float64 weights, got float16"),
    ],
)
def test_models_that_are_refused(make, error, message):
    with pytest.raises(error, match=f"^model must {message}"):
        GenericNeuralNet(make(), "mse")


def test_a_net_needs_a_loss():
    model = dense()()
    with pytest.raises(ValueError, match="loss must be given for a model that is not compiled"):
        GenericNeuralNet(model)
    model.compile(loss="mse")
    assert GenericNeuralNet(model).loss.name == "mean_squared_error"


def subclassed(function, name):
    model = Calls(function, name, a=L.Dense(1))
    model(FLAT[:1])
    return model


def adding_loss(model, x):
    model.add_loss(tf.reduce_sum(x))
    return model.a(x)


def mixing_rows(model, x):
    return model.a(x - tf.reduce_mean(x, axis=0))


FLAT = np.arange(8, dtype=np.float32).reshape(4, 2)
REAL = np.array([1.0, -2, 3, 0], np.float32)
ONE_HOT = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
PER_EXAMPLE = "^loss must give one number per example, got shape"
LOGITS = {"from_logits": True}


@pytest.mark.parametrize(
    ("make", "loss", "y", "message"),
    [
        (
            lambda: subclassed(lambda model, x: (model.a(x), model.a(x)), "two"),
            "mse",
            REAL,
            r"^y must have a dict of labels by the model's outputs \['output_0', 'output_1'\], got",
        ),
        (
            lambda: subclassed(adding_loss, "adds"),
            "mse",
            REAL,
            "^model must add losses that are a mean over the rows .* by add_loss .* in 'adds' for",
        ),
        (
            lambda: subclassed(mixing_rows, "mixes"),
            "mse",
            REAL,
            "^loss must depend on its own row alone, got .* for row 0 of train",
        ),
        (
            dense(),
            lambda y, output: tf.reduce_mean((y - output) ** 2, axis=-1),  # (n,) - (n, 1)
            REAL,
            r"^loss must depend on its own row alone, .*labels of shape \(4,\) broadcast against "
            r"outputs of shape \(4, 1\)",
        ),
        (
            dense(),
            lambda y, output: tf.reduce_mean((y[:, None] - output) ** 2),
            REAL,
            rf"{PER_EXAMPLE} \(\) from '<lambda>' for 4 examples of train; leave out the mean or",
        ),
        (
            dense(),
            lambda y, output: (y[:, None] - output) ** 2,
            REAL,
            rf"{PER_EXAMPLE} \(4, 1\) .*; take the mean for each example, "
            r"tf\.reduce_mean\(\.\.\., axis=-1\)\.$",
        ),
        (
            dense(),
            lambda y, output: (y - output) ** 2,  # (n,) - (n, 1)
            REAL,
            rf"{PER_EXAMPLE} \(4, 4\) .* labels of shape \(4,\) broadcast against outputs of shape "
            r"\(4, 1\); use y\[:, None\], and take the mean .*axis=-1\)\.$",
        ),
        (
            dense(3),
            lambda y, output: (y - output)[:, :, None] ** 2,
            ONE_HOT,
            rf"{PER_EXAMPLE} \(4, 3, 1\) .*; take the mean .*axis=\[1, 2\]\)\.$",
        ),
        (
            dense(3),
            keras.losses.SparseCategoricalCrossentropy(**LOGITS),
            [0, 1, 2, 3],
            r"^train\.y must hold class numbers 0 to 2, got 3 in row 3",
        ),
        (
            dense(2),
            keras.losses.CategoricalCrossentropy(**LOGITS),
            ONE_HOT,
            r"^train\.y does not fit the loss 'categorical_crossentropy': labels of shape \(4, 3\),"
            r" dtype float32, against outputs of shape \(4, 2\)",
        ),
        (
            dense(3),
            keras.losses.SparseCategoricalCrossentropy(**LOGITS),
            ONE_HOT.astype(int),
            r"^train\.y does not fit the loss 'sparse_categorical_crossentropy': labels of shape",
        ),
    ],
)
def test_sets_and_losses_that_do_not_fit(make, loss, y, message):
    with pytest.raises(ValueError, match=message):
        GenericNeuralNet(make(), loss).validate(Examples(FLAT, y), "train")


def test_inputs_that_do_not_fit():
    one = GenericNeuralNet(dense()(), "mse")
    two = zoo.build("skip_connection")[0]
    undeclared = GenericNeuralNet(subclassed(mixing_rows, "mixes"), "mse")
    y = np.array([0, 1, 2, 0])
    x = np.ones((4, 3))
    for net, given, message in (
        (one, x, r"^train\.x must have rows of shape \(2,\) for model 'small', got \(3,\)"),
        (one, np.ones((4, 2, 2)), r"^train\.x must have rows of shape \(2,\) .*got \(2, 2\)"),
        (one, scipy.sparse.csr_matrix(x), r"^train\.x must have rows of shape \(2,\)"),
        (two, x, r"^train\.x must be a dict with the model's inputs \['a', 'b'\], got one array"),
        (two, {"a": x, "c": x}, r"^train\.x must have the model's inputs \['a', 'b'\], got \['a',"),
        (two, {"b": x, "a": x}, r"^train\.x\['a'\] must have rows of shape \(2,\) for model"),
        (undeclared, x, r"^train\.x does not fit the model 'mixes', got x: float32 \(4, 3\)"),
        (undeclared, {"a": x}, r"^train\.x does not fit the model 'mixes', got a: float32"),
    ):
        with pytest.raises(ValueError, match=message):
            net.validate(Examples(given, y), "train")
    with pytest.raises(TypeError, match=r"^train must be Examples\(x, y\), got tuple"):
        one.validate((x, y), "train")


def test_weights_that_are_not_finite_are_named_with_their_layer():
    x, y = np.ones((4, 2)), np.zeros(4)
    layers = [L.Dense(2, name="first", dtype="float64"), L.Dense(1, name="last", dtype="float64")]
    net = GenericNeuralNet(sequential((2,), *layers, dtype="float64"), "mse")
    train = Examples(x, y)
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


def test_vectors_and_inputs_that_do_not_fit(tanh):
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
    net, _, x, y = zoo.build("masked_ids")
    with pytest.raises(TypeError, match="^x must be floating to be differentiated, got int64"):
        net.input_gradient(x, y, net.theta)
    net, _, x, y = zoo.build("skip_connection")
    with pytest.raises(TypeError, match=r"^x\['b'\] must be floating to be differentiated"):
        net.input_gradient({**x, "b": np.ones((6, 3), int)}, y, net.theta)
    probabilities = dense_net(3, 2, "sparse_categorical_crossentropy")
    with pytest.raises(ValueError, match="^loss must take logits for a Gauss-Newton matrix, got "
                       "'sparse_categorical_crossentropy' of probabilities"):  # fmt: skip
        probabilities.gauss_newton_product(FLAT, [0, 1, 2, 0], probabilities.theta)


def test_many_nets_make_tensorflow_warn_of_nothing(caplog):
    """Check that nets in a loop, which share function names, cause no retracing warning."""
    rows = np.random.default_rng(0).standard_normal((4, 2))
    for _ in range(7):
        net = GenericNeuralNet(dense()(), "mse")
        net.gradients(rows, rows[:, 0])
        net.penalty_hvp(np.ones(3))
    assert not [record for record in caplog.records if "retracing" in record.getMessage()]
