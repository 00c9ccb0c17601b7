"""Tests of the risk of a compiled model against the loss that Keras reports for the whole set.

Values are compared with `model.evaluate` in one batch, gradients with a plain tape of Keras' own
compiled loss, and Hessian products with finite differences of this gradient.
"""

import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

from influence import Examples, GenericNeuralNet
from tests.influence.problems import relative_error

K, L = keras.losses, keras.layers
N = 12
RNG = np.random.default_rng(0)
X = RNG.standard_normal((N, 3))
WEIGHT = np.where(np.arange(N) == 4, 0.0, RNG.random(N) * 2)
REAL, PAIR, POSITIVE = (RNG.standard_normal((N, k)) for k in (1, 2, 1))
POSITIVE = np.abs(POSITIVE)
CLASSES, BITS = RNG.integers(0, 3, N), RNG.integers(0, 2, (N, 1))
ONE_HOT = np.eye(3)[CLASSES]
STEPS = RNG.integers(0, 3, (N, 4))
WORDS = RNG.integers(1, 3, (N, 2)) * (RNG.random((N, 2)) < 0.8)
WORDS = -np.sort(-WORDS, axis=1)  # zeros mark the end, so they must come last
ROUNDING = 1e-12
# Keras divides a masked loss by the number of valid labels plus 1e-7.
EPSILON = 1e-7
# A central difference with steps of 1e-4 has a relative error of about 1e-8.
DIFFERENCES = 1e-6
ZERO = tf.UnconnectedGradients.ZERO


pytestmark = pytest.mark.usefixtures("float64")


def ending(units, activation=None, steps=None):
    """Return a model with a hidden layer, `units` outputs and the given last activation."""
    x = keras.Input((3,), dtype="float64")
    hidden = L.Dense(2, activation="tanh")(x)
    if steps:
        hidden = L.Reshape((steps, units))(L.Dense(steps * units)(hidden))
        return filled(keras.Model(x, L.Activation(activation)(hidden) if activation else hidden))
    return filled(keras.Model(x, L.Dense(units, activation=activation)(hidden)))


def filled(model):
    rng = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(rng.standard_normal(weight.shape))
    return model


def as_keras_takes(model, y, weight):
    """Return labels and weights in the structure that Keras expects for this model."""
    if isinstance(y, dict):
        several = isinstance(model.output, dict)
        if weight is not None and not isinstance(weight, dict):
            weight = dict.fromkeys(y, weight)
        if not several:
            names = model.output_names
            weight = weight if weight is None else [weight[name] for name in names]
            y = [y[name] for name in names]
    return y, weight


def agrees(model, y, weight=None, *, loss=None, exact=ROUNDING, differences=DIFFERENCES):
    """Assert that risk, gradient and Hessian product equal those of Keras. Return the net."""
    net, examples = GenericNeuralNet(model, loss), Examples(X, y, weight)
    net.validate(examples, "train")
    given, weighed = as_keras_takes(model, y, weight)
    reported = model.evaluate(X, given, sample_weight=weighed, batch_size=N, verbose=0)
    got, gradient = net.loss_and_gradient(X, examples.y)
    assert got + net.penalty() == pytest.approx(np.ravel(reported)[0], rel=max(exact, 1e-14))

    def plain():
        with tf.GradientTape() as tape:
            total = model._compile_loss(given, model(X, training=False), weighed)
            total += sum(model.losses)
        return np.concatenate([np.ravel(g) for g in tape.gradient(total, model.trainable_weights)])

    assert relative_error(gradient + net.penalty_gradient(), plain()) < exact
    v, theta = np.random.default_rng(2).standard_normal(net.num_parameters), net.theta
    product = net.hvp(X, examples.y, v) + net.penalty_hvp(v)
    slopes = []
    for step in (1e-4, -1e-4):
        net.theta = theta + step * v
        slopes.append(plain())
    net.theta = theta
    assert relative_error(product, (slopes[0] - slopes[1]) / 2e-4) < differences
    return net


F8 = {"dtype": "float64"}  # without this option, Keras rounds losses to float32
LOSSES = [
    (K.MeanSquaredError(**F8), 1, None, REAL),
    (K.MeanSquaredError(**F8), 1, None, REAL[:, 0]),
    (K.MeanAbsoluteError(**F8), 2, None, PAIR),
    (K.MeanAbsolutePercentageError(**F8), 1, "softplus", POSITIVE),
    (K.MeanSquaredLogarithmicError(**F8), 1, "softplus", POSITIVE),
    (K.CosineSimilarity(**F8), 2, None, PAIR),
    (K.Huber(delta=0.5, **F8), 1, None, REAL),
    (K.LogCosh(**F8), 1, None, BITS),
    (K.Hinge(**F8), 1, None, BITS),  # the labels are integers and the outputs are floats
    (K.SquaredHinge(**F8), 1, None, 2 * BITS - 1),
    (K.CategoricalHinge(**F8), 3, None, ONE_HOT),
    (K.KLDivergence(**F8), 3, "softmax", ONE_HOT),
    (K.Poisson(**F8), 1, "softplus", POSITIVE),
    (K.BinaryCrossentropy(**F8), 1, "sigmoid", BITS),
    (K.BinaryCrossentropy(from_logits=True, **F8), 1, "sigmoid", BITS[:, 0]),
    (K.BinaryCrossentropy(label_smoothing=0.1, **F8), 3, "sigmoid", ONE_HOT.astype(int)),
    (K.BinaryCrossentropy(**F8), 3, "softmax", ONE_HOT),
    (K.BinaryFocalCrossentropy(**F8), 1, "sigmoid", BITS),
    (K.BinaryFocalCrossentropy(from_logits=True, **F8), 1, "sigmoid", BITS),
    (K.CategoricalCrossentropy(**F8), 3, "softmax", ONE_HOT),
    (K.CategoricalFocalCrossentropy(**F8), 3, "softmax", ONE_HOT),
    (K.SparseCategoricalCrossentropy(**F8), 3, "softmax", CLASSES),
    (K.SparseCategoricalCrossentropy(from_logits=True, **F8), 3, "softmax", CLASSES[:, None]),
    (K.SparseCategoricalCrossentropy(from_logits=True, **F8), 3, None, CLASSES.astype(float)),
    (K.SparseCategoricalCrossentropy(ignore_class=9, **F8), 3, "softmax", CLASSES),
    (K.Dice(axis=-1, **F8), 3, "softmax", ONE_HOT),
    (K.Tversky(axis=-1, **F8), 3, "softmax", ONE_HOT),
    (K.CategoricalGeneralizedCrossEntropy(**F8), 3, "softmax", CLASSES),
]


@pytest.mark.filterwarnings("ignore:.*received `from_logits=True`")
@pytest.mark.parametrize(
    ("loss", "units", "activation", "y"),
    LOSSES,
    ids=[f"{loss.name}-{act}-{y.dtype}-{y.ndim}" for loss, _, act, y in LOSSES],
)
def test_every_loss_with_sample_weights_is_the_one_that_keras_reports(loss, units, activation, y):
    model = ending(units, activation)
    model.compile("sgd", loss, run_eagerly=True)
    ignores = getattr(loss, "ignore_class", None) is not None
    agrees(model, y, WEIGHT, exact=EPSILON if ignores else ROUNDING)


def test_every_loss_of_keras_is_tried():
    """Check that LOSSES has every loss class of Keras except the base class, Circle and CTC.

    Circle compares rows in pairs, so rows have no losses of their own. CTC has its own test.
    """
    names = {n for n, c in vars(K).items() if isinstance(c, type) and issubclass(c, K.Loss)}
    tried = {type(loss).__name__ for loss, *_ in LOSSES}
    assert names - tried == {"Loss", "Circle", "CTC"}


@pytest.mark.parametrize(
    ("loss", "units", "y"),
    [(K.Circle(), 3, CLASSES), (K.Dice(), 3, ONE_HOT), (K.Tversky(), 3, ONE_HOT)],
)
def test_losses_that_mix_rows_are_refused(loss, units, y):
    model = ending(units, "softmax")
    model.compile("sgd", loss)
    for weight in (None, WEIGHT):
        message = "^loss must (depend on its own row alone|give one number per example)"
        with pytest.raises(ValueError, match=message):
            GenericNeuralNet(model).validate(Examples(X, y, weight), "train")


def test_time_steps_of_a_softmax_layer_and_a_graph_of_keras():
    model = ending(3, "softmax", steps=4)
    model.compile("sgd", "sparse_categorical_crossentropy", weighted_metrics=[])
    assert agrees(model, STEPS).loss.head == "softmax"


def test_a_weight_multiplies_the_mean_over_a_rows_time_steps():
    """Compare with NumPy, because Keras refuses weights (n,) for losses (n, T)."""
    model = ending(3, "softmax", steps=4)
    model.compile("sgd", "sparse_categorical_crossentropy")
    net, examples = GenericNeuralNet(model), Examples(X, STEPS, WEIGHT)
    net.validate(examples, "train")
    p = np.take_along_axis(model(X).numpy(), STEPS[:, :, None], axis=2)[:, :, 0]
    expected = -WEIGHT * np.log(p).mean(axis=1)
    np.testing.assert_allclose(net.losses(X, examples.y), expected, rtol=ROUNDING)


def test_ctc_has_second_derivatives():
    """Compare with a sum over all alignments. TensorFlow's own CTC is in float32."""
    model = ending(3, steps=3)
    model.compile("sgd", K.CTC(), run_eagerly=True)
    net = agrees(model, WORDS, WEIGHT, exact=1e-5, differences=5e-3)

    def brute(z):
        total = []
        paths = np.stack(np.meshgrid(*[range(3)] * 3, indexing="ij"), -1).reshape(-1, 3)
        for word, row in zip(WORDS, tf.unstack(z), strict=True):
            wanted = [c for c in word if c]
            own = []
            for path in paths:
                collapsed = [c for i, c in enumerate(path) if i == 0 or c != path[i - 1]]
                if [c for c in collapsed if c] == wanted:
                    own.append(path)
            log_p = tf.gather(tf.nn.log_softmax(row), np.array(own), axis=1, batch_dims=0)
            each = tf.reduce_sum(tf.stack([log_p[t, :, t] for t in range(3)]), axis=0)
            total.append(-tf.reduce_logsumexp(each))
        return tf.reduce_mean(WEIGHT * tf.stack(total))

    def slope(theta):
        net.theta = theta
        with tf.GradientTape() as tape:
            value = brute(model(X))
        gradients = tape.gradient(value, model.trainable_weights)
        return value, np.concatenate([np.ravel(g) for g in gradients])

    theta, y = net.theta, Examples(X, WORDS, WEIGHT).y
    v = np.random.default_rng(2).standard_normal(len(theta))
    product, (got, gradient) = net.hvp(X, y, v), net.loss_and_gradient(X, y)
    value, expected = slope(theta)
    difference = (slope(theta + 1e-4 * v)[1] - slope(theta - 1e-4 * v)[1]) / 2e-4
    assert got == pytest.approx(float(value), rel=ROUNDING)
    assert relative_error(gradient, expected) < ROUNDING
    assert relative_error(product, difference) < DIFFERENCES


# --- additions by `compile` and by a user's code --------------------------------------------------


def by_ops(y, z):
    return keras.ops.mean((y - z) ** 2, axis=-1)


class Fourth(K.Loss):
    def __call__(self, y, z, sample_weight=None):
        values = keras.ops.mean((keras.ops.cast(y, z.dtype) - z) ** 4, axis=-1)
        values = values if sample_weight is None else values * sample_weight
        return keras.ops.mean(values)


class Twice(K.MeanSquaredError):
    def __call__(self, y, z, sample_weight=None):
        return 2 * super().__call__(y, z, sample_weight)


class Root(K.Loss):
    def __call__(self, y, z, sample_weight=None):
        return keras.ops.sqrt(keras.ops.mean((y - z) ** 2))


@pytest.mark.parametrize(
    ("loss", "y", "weight"),
    [
        (by_ops, BITS[:, 0], WEIGHT),
        (lambda y, z: (y - z) ** 2, REAL, None),
        (Fourth(), BITS, WEIGHT),
        (Twice(**F8), REAL, None),
    ],
    ids=["function", "elementwise", "call", "call of another loss"],
)
def test_functions_and_overridden_calls(loss, y, weight):
    model = ending(1)
    model.compile("sgd", loss, loss_weights=0.3, run_eagerly=True)
    assert agrees(model, y, weight).loss.scale == 0.3


@pytest.mark.parametrize("compiled", [True, False])
def test_an_overridden_call_that_is_no_mean_over_rows_is_refused(compiled):
    model = ending(1)
    model.compile("sgd", Root())
    net = GenericNeuralNet(model, None if compiled else Root(**F8))
    message = "^loss must be a mean over rows, got 'root.*', for which Keras reports .* for 12 rows"
    with pytest.raises(ValueError, match=message):
        net.validate(Examples(X, REAL), "train")


def test_an_integer_label_reaches_a_function_that_takes_only_floats():
    net = GenericNeuralNet(ending(1), lambda y, z: (y - z[:, 0]) ** 2)
    y = BITS[:, 0]
    expected = (y - net.model(X).numpy()[:, 0]) ** 2
    np.testing.assert_allclose(net.losses(X, y), expected, rtol=ROUNDING)


def test_a_loss_weight_in_a_list_counts():
    model = ending(1)
    model.compile("sgd", "mse", loss_weights=[0.3], run_eagerly=True)
    assert GenericNeuralNet(model).loss.scale == 0.3


def two(structure, activation="softmax"):
    x = keras.Input((3,), dtype="float64")
    hidden = L.Dense(2, activation="tanh", kernel_regularizer="l2")(x)
    b, a = L.Dense(2, name="b")(hidden), L.Dense(3, activation=activation, name="a")(hidden)
    return filled(keras.Model(x, {"a": a, "b": b} if structure is dict else [b, a]))


EACH = {"a": WEIGHT, "b": WEIGHT[::-1]}
BOTH = {"a": CLASSES, "b": PAIR}
CLASS = "sparse_categorical_crossentropy"


@pytest.mark.parametrize(
    ("structure", "loss", "loss_weights", "weight"),
    [
        (list, ["mse", CLASS], None, WEIGHT),
        (list, ["mse", CLASS], [0.2, 3.0], None),
        (list, {"a": CLASS, "b": "mse"}, {"a": 3.0, "b": 0.2}, EACH),
        (dict, {"a": CLASS, "b": "mse"}, {"b": 0.2, "a": 3.0}, EACH),
        (dict, {"a": CLASS, "b": K.Huber(**F8)}, [3.0, 0.2], WEIGHT),
    ],
)
def test_the_weighted_sum_of_two_outputs_losses(structure, loss, loss_weights, weight):
    model = two(structure)
    model.compile("sgd", loss, loss_weights=loss_weights, run_eagerly=True)
    net = agrees(model, BOTH, weight)
    y, b = Examples(X, BOTH, weight).y, PAIR[:, 0]
    measured = net.measuring(
        lambda y, z: y["b"][:, 0] - (z["b"] if structure is dict else z[0])[:, 0]
    )
    outputs = net.outputs(X)
    # A measurement is not multiplied by the weights of rows or outputs.
    expected = b - (outputs["b"] if structure is dict else outputs[0])[:, 0]
    measured.validate(Examples(X, BOTH, weight), "test")
    np.testing.assert_allclose(measured.losses(X, y), expected, atol=ROUNDING)
    tf.nest.map_structure(np.testing.assert_array_equal, outputs, model.predict(X, verbose=0))


def test_gauss_newton_of_two_outputs():
    """Compare with the mean over rows i of w_i J_i' H_i J_i, summed over both outputs.

    w_i is the row's weight, J_i (c, d) the Jacobian of the output by a plain tape in float64, and
    H_i (c, c) the Hessian of the weighted loss by the output.
    """
    model = two(list)
    model.compile("sgd", ["mse", CLASS], loss_weights=[0.2, 3.0])
    net, y = GenericNeuralNet(model), Examples(X, BOTH, WEIGHT).y
    with tf.GradientTape(persistent=True) as tape:
        hidden = model.layers[1](X)
        b = tf.matmul(hidden, model.get_layer("b").kernel) + model.get_layer("b").bias
        a = tf.matmul(hidden, model.get_layer("a").kernel) + model.get_layer("a").bias
    expected = np.zeros((net.num_parameters, net.num_parameters))
    p = tf.nn.softmax(a).numpy()
    for output, H in (
        # The loss of b is 0.2 times the mean of two squares, so its Hessian is 0.2 I.
        (b, 0.2 * np.broadcast_to(np.eye(2), (N, 2, 2))),
        (a, 3 * (p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None])),
    ):
        parts = tape.jacobian(output, [w.value for w in model.trainable_weights], ZERO)
        J = np.concatenate([np.reshape(part, (*output.shape, -1)) for part in parts], axis=2)
        expected += np.einsum("n,nap,nab,nbq->pq", WEIGHT, J, H, J) / N
    got = net.gauss_newton_product(X, y, np.eye(net.num_parameters))
    assert relative_error(got, expected) < ROUNDING


@keras.saving.register_keras_serializable("test_compiled")
class Adding(L.Layer):
    """A layer that adds a loss of its inputs, as a mean or a sum over the rows."""

    def __init__(self, mean, **options):
        super().__init__(**options)
        self.mean = mean

    def get_config(self):
        return {**super().get_config(), "mean": self.mean}

    def call(self, x):
        self.add_loss((keras.ops.mean if self.mean else keras.ops.sum)(keras.ops.sum(x**4, -1)))
        return x


def adding(mean):
    x = keras.Input((3,), dtype="float64")
    hidden = Adding(mean)(L.Dense(2, activation="tanh")(x))
    model = filled(keras.Model(x, L.Dense(3, activation="softmax", bias_regularizer="l2")(hidden)))
    model.compile("sgd", CLASS, run_eagerly=True)
    return model


def test_an_added_loss_that_is_a_mean_over_rows_belongs_to_each_row():
    net = agrees(adding(True), CLASSES, WEIGHT)
    y = Examples(X, CLASSES, WEIGHT).y
    alone = [net.losses(X[i : i + 1], y[i : i + 1])[0] for i in range(N)]
    np.testing.assert_allclose(net.losses(X, y), alone, rtol=ROUNDING)
    again = pickle.loads(pickle.dumps(net))
    assert relative_error(again.losses(X, y), alone) < ROUNDING
    without = GenericNeuralNet(net.model, CLASS)
    # The losses that layers add also count if the caller gives the loss of the output.
    assert relative_error(without.losses(X, y), alone) < ROUNDING


def test_an_added_loss_that_is_a_sum_over_the_batch_is_refused():
    message = "^model must add losses that are a mean over the rows of its batch, got by add_loss"
    with pytest.raises(ValueError, match=message):
        GenericNeuralNet(adding(False)).validate(Examples(X, CLASSES), "train")


@pytest.mark.parametrize(
    ("loss", "loss_weights", "y", "message"),
    [
        (["mse"], None, BOTH, r"^loss must have an entry for each of .*\['b', 'a'\], got 1"),
        ({"c": "mse"}, None, BOTH, r"^loss must be a dict by the model's outputs .* key 'c'"),
        ("mse", [1.0, 2.0], BOTH, r"^loss_weights must fit the losses of the outputs \['a', 'b'\]"),
        ({"a": None, "b": None}, None, BOTH, r"^loss must be given for at least one of"),
        (["mse", CLASS], None, PAIR, r"^y must have a dict of labels by the model's outputs"),
        (
            ["mse", CLASS],
            None,
            {"a": CLASSES},
            r"^y must have labels for the output 'b', got labels for \['a'\]",
        ),
        (
            ["mse", CLASS],
            None,
            BOTH | {"c": PAIR},
            r"^y must have labels for the model's outputs \['b', 'a'\], got 'c'",
        ),
        (
            ["mse", CLASS],
            None,
            {"a": CLASSES + 1, "b": PAIR},
            r"^train\.y\['a'\] must hold class n",
        ),
    ],
)
def test_losses_and_labels_of_two_outputs_that_do_not_fit(loss, loss_weights, y, message):
    model = two(list)
    model.compile("sgd", loss, loss_weights=loss_weights)
    with pytest.raises(ValueError, match=message):
        GenericNeuralNet(model).validate(Examples(X, y), "train")


def test_labels_by_the_name_of_the_one_output():
    model = ending(1)
    net = GenericNeuralNet(model, "mse")
    (name,) = model.output_names
    net.validate(Examples(X, {name: REAL}), "train")
    np.testing.assert_array_equal(net.losses(X, Examples(X, {name: REAL}).y), net.losses(X, REAL))
    with pytest.raises(ValueError, match=rf"^train\.y must be an array or .*'{name}'\], got .*'b'"):
        net.validate(Examples(X, {"b": REAL}), "train")


def test_class_weights_as_weights_of_the_rows():
    """Compare with the loss that Keras reports for a training step with `class_weight`."""
    model, each = ending(3, "softmax"), {0: 0.5, 1: 2.0, 2: 3.0}
    model.compile(keras.optimizers.SGD(0.0), CLASS, run_eagerly=True)
    weight = np.array([each[c] for c in CLASSES])
    net, examples = GenericNeuralNet(model), Examples(X, CLASSES, weight)
    reported = model.train_on_batch(X, CLASSES, class_weight=each)
    assert net.risk(examples) == pytest.approx(float(reported), rel=1e-6)


def test_weights_by_which_keras_would_divide_are_refused():
    loss = K.MeanSquaredError(reduction="mean_with_sample_weight")
    model = ending(1)
    model.compile("sgd", loss, run_eagerly=True)
    agrees(model, REAL)
    with pytest.raises(ValueError, match=r"^train\.sample_weight must not change what the risk is"):
        GenericNeuralNet(model).validate(Examples(X, REAL, WEIGHT), "train")


def test_a_model_that_computes_its_own_loss_is_refused_without_another_loss():
    class Own(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return keras.ops.mean(y_pred)

    x = keras.Input((3,), dtype="float64")
    model = Own(x, L.Dense(1)(x))
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="^loss must be given for a model that overrides compute"):
        GenericNeuralNet(model)
    assert GenericNeuralNet(model, "mse").loss.name == "mean_squared_error"
