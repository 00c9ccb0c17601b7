"""Tests that a frozen trunk runs once for each row, and that no result changes.

The expected values come from a separate model of the head. Its inputs are features, computed by
calling the layers of the trunk one by one.
"""

import pickle
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import influence
from influence.curvature.operators import GaussNewton, Hessian
from influence.examples import featured
from influence.examples.examples import Examples
from influence.examples.stream import Stream
from influence.net.checked import checked
from influence.net.net import GenericNeuralNet
from influence.scores.influence import Influence
from influence.solvers import CG, EKFAC, Direct
from influence.truth.leave_out import RefitOptions, leave_one_out

pytestmark = pytest.mark.usefixtures("float64")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
DECAY = keras.regularizers.L2(0.05)
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(30, 6, 6, 2)), rng.integers(0, 3, 30)
XT, YT = rng.normal(size=(4, 6, 6, 2)), rng.integers(0, 3, 4)
RTOL = 1e-10  # both sides are computed in float64


@keras.saving.register_keras_serializable("test_trunk")
class Counter(keras.layers.Layer):
    """A layer that counts the rows that pass through it."""

    rows = 0

    def call(self, x):
        def count(value):
            Counter.rows += len(value)
            return value

        counted = tf.numpy_function(count, [x], x.dtype)
        return tf.ensure_shape(counted, x.shape)


def network(nested=True, counts=False):
    """Return a model: convolutions, BatchNormalization with random statistics, two Dense layers."""
    keras.utils.set_random_seed(1)
    trunk = [
        keras.layers.Conv2D(4, 3, activation="relu", name="first"),
        keras.layers.BatchNormalization(name="normalised"),
        keras.layers.Conv2D(5, 2, activation="tanh", name="second"),
    ]
    trunk += [Counter(name="counter")] if counts else []
    inputs = x = keras.Input((6, 6, 2), name="image")
    x = keras.layers.Rescaling(2.0)(x)
    if nested:
        x = keras.Sequential([keras.Input((6, 6, 2)), *trunk], name="base")(x)
    else:
        for layer in trunk:
            x = layer(x)
    x = keras.layers.GlobalAveragePooling2D(name="pooled")(x)
    x = keras.layers.Dense(4, activation="tanh", kernel_regularizer=DECAY, name="hidden")(x)
    x = keras.layers.Dense(3, kernel_regularizer=DECAY, bias_regularizer=DECAY, name="head")(x)
    model = keras.Model(inputs, x)
    statistics = trunk[1].non_trainable_variables
    for variable in statistics:
        variable.assign(rng.uniform(0.5, 2, variable.shape))
    return model, trunk


def head_alone(model, names, x):
    """Return a model of the last layers `names` only, and its inputs for each array of x."""
    layers = [model.get_layer(name) for name in names]
    inputs = z = keras.Input(layers[0].input.shape[1:])
    for layer in layers:
        copy = type(layer).from_config(layer.get_config())
        z = copy(z)
        copy.set_weights(layer.get_weights())
    front = keras.Model(model.inputs, layers[0].input)
    return keras.Model(inputs, z), [front(part, training=False).numpy() for part in x]


def frozen(how, counts=False):
    """Return (net, model). Theta has the weights of the layers `hidden` and `head` only.

    If `how` is "layers", `GenericNeuralNet` gets these two names. Otherwise all other layers are
    frozen in Keras.
    """
    model, trunk = network(nested=how != "flat", counts=counts)
    if how == "layers":
        return GenericNeuralNet(model, LOSS, layers=["hidden", "head"]), model
    for layer in trunk:
        layer.trainable = False
    return GenericNeuralNet(model, LOSS), model


@pytest.mark.parametrize("how", ["layers", "frozen", "flat"])
def test_every_number_is_that_of_the_head_on_features(how):
    net, model = frozen(how)
    flags = [layer.trainable for layer in model._flatten_layers()]
    head, (features, tested) = head_alone(model, ["hidden", "head"], (X, XT))
    alone = GenericNeuralNet(head, LOSS)
    np.testing.assert_array_equal(net.theta, alone.theta)
    V = rng.normal(size=(net.num_parameters, 2))
    for kind in (Hessian, GaussNewton):
        one, two = kind(net, (X, Y), 0.3), kind(alone, (features, Y), 0.3)
        np.testing.assert_allclose(one @ V, two @ V, rtol=RTOL, atol=1e-14)
        np.testing.assert_allclose(one.dense(), two.dense(), rtol=RTOL, atol=1e-14)
    np.testing.assert_allclose(net.outputs(XT), alone.outputs(tested), rtol=RTOL)
    # All kinds of trunks share the code that computes scores, so one kind is asked of each solver.
    for solver in (Direct(), CG(1e-12), EKFAC()) if how == "flat" else (EKFAC(),):
        options = {"solver": solver, "damping": 0.3, "curvature": GaussNewton}
        ours = Influence(net, (X, Y), **options)
        theirs = Influence(alone, (features, Y), **options)
        one, two = ours.scores((XT, YT)), theirs.scores((tested, YT))
        np.testing.assert_allclose(one, two, rtol=RTOL, atol=1e-13)
        np.testing.assert_allclose(ours.self_influence(), theirs.self_influence(), rtol=RTOL)
    assert net.flat.trunk is not None and net.model is model
    assert [layer.trainable for layer in model._flatten_layers()] == flags


def test_refits_are_those_of_the_head():
    net, model = frozen("layers")
    head, (features, tested) = head_alone(model, ["hidden", "head"], (X, XT))
    alone = GenericNeuralNet(head, LOSS)
    net.fit((X, Y), gradient_tolerance=1e-9)
    alone.theta = net.theta
    one = leave_one_out(net, (X, Y), (XT, YT), rows=[0, 7])
    two = leave_one_out(alone, (features, Y), (tested, YT), rows=[0, 7])
    assert one.converged.all() and np.abs(two).max() > 1e-4
    np.testing.assert_allclose(one, two, rtol=1e-6)  # the refits have this relative tolerance


def test_the_trunk_runs_once_for_each_row():
    net, _ = frozen("frozen", counts=True)
    assert net.flat.trunk is not None
    Counter.rows = 0
    scores = Influence(net, (X, Y), solver=CG(), damping=0.3, curvature=GaussNewton)
    scores.scores((XT, YT))
    # The trunk runs once for each row. For each of the two sets, a check also computes one row
    # again, in a batch of its own.
    assert Counter.rows == len(X) + len(XT) + 2
    test = Examples(XT, YT)
    scores.scores(test)
    Counter.rows = 0
    scores.scores(test)
    scores.self_influence()
    scores.s_test(test, measurement=lambda y, z: z[:, 0])
    assert Counter.rows == 0


def test_layers_inside_an_inner_model_may_hold_theta():
    model, _ = network()
    net = GenericNeuralNet(model, LOSS, layers=["second", "head"])
    assert [layer.name for layer in net.flat.trunk.model.layers[-2:]] == ["first", "normalised"]
    assert [w.path.split("/")[-2] for w in net.flat.weights] == ["second"] * 2 + ["head"] * 2
    whole = GenericNeuralNet(model, LOSS)
    wanted = [id(weight) for weight in net.flat.weights]
    mask = np.concatenate([np.full(w.shape, id(w) in wanted).ravel() for w in whole.flat.weights])
    train = Examples(X, Y)
    found = Hessian(net, train) @ np.eye(net.num_parameters)
    units = np.eye(whole.num_parameters)[:, mask]
    np.testing.assert_allclose(found, (Hessian(whole, train) @ units)[mask], rtol=RTOL, atol=1e-14)
    # The frozen weights have penalties too. They are constants, which the net's penalty includes.
    assert net.penalty() == pytest.approx(whole.penalty(), rel=1e-14)


def test_derivatives_by_inputs_pass_through_the_trunk():
    net, _ = frozen("frozen")
    v, step = rng.normal(size=net.num_parameters), 1e-5
    found = net.input_gradient(X[:2], Y[:2], v)
    for row, entry in ((0, (1, 2, 0)), (1, (5, 5, 1))):
        moved = np.zeros_like(X[:2])
        moved[(row, *entry)] = step
        high, low = (net.directional(X[:2] + s * moved, Y[:2], v)[row] for s in (1, -1))
        assert found[(row, *entry)] == pytest.approx((high - low) / (2 * step), rel=1e-6)
    predicted = Influence(net, (X, Y), solver=Direct(), damping=0.3, curvature=GaussNewton)
    s = predicted.s_test((XT, YT)).x
    by_pixels = predicted.perturbation((XT, YT), [3])
    assert by_pixels.shape == (4, 1, 6, 6, 2)
    np.testing.assert_allclose(
        by_pixels[2, 0], -net.input_gradient(X[3:4], Y[3:4], s[:, 2])[0] / len(X), rtol=RTOL
    )


@pytest.mark.parametrize("where", ["disk", "nowhere"])
def test_features_beyond_the_budget_are_on_disk_or_computed_again(where, monkeypatch):
    net, _ = frozen("frozen")
    V = rng.normal(size=(net.num_parameters, 2))
    right = Hessian(net, (X, Y)) @ V
    monkeypatch.setattr(featured, "FEATURES", 10)
    if where == "nowhere":
        usage = type("Usage", (), {"free": 100})
        monkeypatch.setattr(featured.shutil, "disk_usage", lambda path: usage)
    train = net.given((X, Y), "train")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        np.testing.assert_allclose(Hessian(net, train) @ V, right, rtol=RTOL, atol=1e-14)
    assert train.where == where and len(caught) == (where == "nowhere")
    assert all("has 100 bytes free" in str(warning.message) for warning in caught)
    assert train.num_entries == len(X) * 5
    left = train.without([0, 3])
    np.testing.assert_allclose(
        net.risk(left), net.uncut().risk((np.delete(X, [0, 3], 0), np.delete(Y, [0, 3]))), rtol=RTOL
    )


def test_streams_and_taken_rows():
    net, _ = frozen("frozen")
    stream = Stream(tf.data.Dataset.from_tensor_slices((X, Y)).batch(7))
    whole = net.uncut()
    assert net.risk(stream) == pytest.approx(whole.risk((X, Y)), rel=1e-12)
    train = net.given(stream, "train")
    assert net.given(train, "train") is train is net.given(stream, "train")
    some = train.take([4, 2])
    assert net.given(some, "some") is some
    np.testing.assert_allclose(
        net.losses(some.x, some.y), whole.losses(X[[4, 2]], Y[[4, 2]]), rtol=RTOL
    )
    assert featured.inputs_of(train) is stream
    assert train.fingerprint != stream.fingerprint
    assert whole.given(train, "train") is stream


def test_a_copy_in_another_dtype_shares_the_trunk():
    net, model = frozen("frozen")
    train = net.given((X, Y), "train")
    copy = net.astype("float32")
    assert copy.given(train, "train") is train and copy.dtype == np.float32
    assert copy.risk(train) == pytest.approx(net.risk(train), rel=1e-6)
    np.testing.assert_allclose(copy.model(XT), model(XT), rtol=1e-5)
    v = rng.normal(size=net.num_parameters)
    np.testing.assert_allclose(
        copy.input_gradient(XT, YT, v), net.input_gradient(XT, YT, v), rtol=1e-3, atol=1e-5
    )
    np.testing.assert_array_equal(copy.theta, net.theta.astype(np.float32))


def test_a_pickled_net_is_cut_again():
    net, _ = frozen("layers")
    train = net.given((X, Y), "train")
    risk = net.risk(train)
    other, rows = pickle.loads(pickle.dumps((net, train)))
    assert other.model is other.flat.parts.whole and other.flat.trunk is not None
    assert other.given(rows, "train") is rows
    assert other.risk(rows) == pytest.approx(risk, rel=1e-12)
    other.theta = 2 * net.theta
    head = np.concatenate([np.ravel(w) for w in other.model.get_layer("head").get_weights()])
    np.testing.assert_array_equal(head, 2 * net.theta[-len(head) :])


def test_a_fit_of_the_callers_own_gets_inputs():
    net, _ = frozen("frozen")
    seen = []

    def fit(net, rows):
        seen.append(rows.x.shape)
        net.model(rows.x)

    leave_one_out(net, (X, Y), (XT, YT), rows=[2], options=RefitOptions(fit=fit))
    assert seen == [(29, 6, 6, 2)]

    def retrains_all(net, rows):
        net.model.get_layer("base").layers[0].bias.assign(np.ones(4))

    with pytest.raises(RuntimeError, match="weights outside theta have changed"):
        leave_one_out(net, (X, Y), (XT, YT), rows=[2], options=RefitOptions(fit=retrains_all))


def test_changed_weights_of_the_trunk_are_refused():
    net, model = frozen("frozen")
    train = net.given((X, Y), "train")
    model.get_layer("base").layers[0].bias.assign(np.ones(4))
    with pytest.raises(RuntimeError, match="make a new net for the new weights"):
        net.risk(train)
    again = GenericNeuralNet(model, LOSS)
    assert again.given(train, "train") is not train
    assert again.risk(train) == pytest.approx(again.uncut().risk((X, Y)), rel=1e-12)


@keras.saving.register_keras_serializable("test_trunk")
class Centred(keras.layers.Layer):
    """A layer that subtracts the mean over the rows of the batch."""

    def call(self, x):
        return x - keras.ops.mean(x, axis=0, keepdims=True)


@keras.saving.register_keras_serializable("test_trunk")
class Penalised(keras.layers.Layer):
    """A layer that adds a loss."""

    def call(self, x):
        self.add_loss(keras.ops.mean(x**2))
        return x


def dense_then(*layers, frozen=True):
    first = keras.layers.Dense(3, trainable=not frozen)
    return keras.Sequential([keras.Input((4,)), first, *layers, keras.layers.Dense(1)])


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.last = keras.layers.Dense(3, trainable=False), keras.layers.Dense(1)

    def call(self, x):
        return self.last(self.first(x))


def rows_apart():
    """Return a model whose frozen layer takes each time step as a row."""
    x = keras.Input((5, 4))
    z = keras.ops.reshape(x, (-1, 4))
    z = keras.layers.Dense(3, trainable=False)(z)
    z = keras.layers.Dense(2)(z)
    return keras.Model(x, keras.layers.Dense(1)(keras.ops.reshape(z, (-1, 10))))


def masked():
    x = keras.Input((5,), dtype="int32")
    z = keras.layers.Embedding(7, 3, mask_zero=True, trainable=False)(x)
    z = keras.layers.Dense(3, trainable=False)(z)
    return keras.Model(x, keras.layers.Dense(1)(keras.layers.LSTM(2)(z)))


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 4)))
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: dense_then(frozen=False),
        lambda: dense_then(Penalised()),
        subclassed,
        rows_apart,
        masked,
        lambda: keras.Sequential(
            [keras.Input((4,)), keras.layers.Rescaling(2.0), keras.layers.Dense(1)]
        ),
    ],
)
def test_other_models_are_not_cut(make):
    assert GenericNeuralNet(make(), "mse").flat.trunk is None


def test_a_trunk_that_mixes_rows_is_refused():
    net = GenericNeuralNet(dense_then(Centred()), "mse")
    with pytest.raises(ValueError, match="model must compute each row by itself, got features of"):
        checked(net, (rng.normal(size=(9, 4)), rng.normal(size=(9, 1))))


def test_inputs_that_do_not_fit_the_trunk_are_refused():
    net, _ = frozen("frozen")
    with pytest.raises(ValueError, match=r"train.x must have rows of shape \(6, 6, 2\)"):
        checked(net, (X[:, :4], Y))


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (["haed"], ValueError, "layers must name layers of .*'hidden', 'head', got 'haed'"),
        ([], ValueError, "got none"),
        ("pooled", ValueError, "layers must name layers with weights, got 'pooled'"),
        (3, TypeError, "layers must be a list of names of layers, got 3"),
    ],
)
def test_unknown_layers_are_refused(layers, error, message):
    with pytest.raises(error, match=message):
        GenericNeuralNet(network()[0], LOSS, layers=layers)


def test_check_and_notes_tell_of_the_trunk():
    net, model = frozen("layers")
    assert "Run once for each row, before theta: 3 layers up to 'pooled'." in repr(net)
    model.compile(loss=LOSS)
    net.fit((X, Y))
    report = influence.check(net, (X, Y), test=(XT, YT))
    assert not [line for line in report.lines if line.verdict == "fail"]
