import warnings

import keras
import numpy as np
import pytest
import scipy.sparse
import scipy.special
import tensorflow as tf

from influence import ConvergenceWarning, Examples, GenericNeuralNet, Hessian
from tests.influence.net import test_zoo as zoo
from tests.influence.problems import Calls, dense_net, relative_error, ridge, sequential

L = keras.layers
N = 6


# Both sides are computed by the tape in float64, so they differ only by the order of additions.
ROUNDING = 1e-12


def test_float64_data_into_a_float32_model_is_rounded_not_refused():
    net = dense_net(1, 3, "mse", dtype="float32")
    x, y = np.eye(3), np.ones(3)
    net.theta = np.arange(4.0)
    np.testing.assert_array_equal(net.losses(x, y), [(0 + 3 - 1) ** 2, 9, 16])
    assert net.losses(x, y).dtype == np.float32


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


# --- arguments that are refused ---------------------------------------------------------------


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
            # (n,) - (n, 1) is broadcast to (n, n).
            lambda y, output: tf.reduce_mean((y - output) ** 2, axis=-1),
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
            lambda y, output: (y - output) ** 2,  # broadcasts (n,) - (n, 1)
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
    """Check that nets made in a loop cause no warning of TensorFlow about retracing.

    Their traced functions have the same names.
    """
    rows = np.random.default_rng(0).standard_normal((4, 2))
    for _ in range(7):
        net = GenericNeuralNet(dense()(), "mse")
        net.gradients(rows, rows[:, 0])
        net.penalty_hvp(np.ones(3))
    assert not [record for record in caplog.records if "retracing" in record.getMessage()]
