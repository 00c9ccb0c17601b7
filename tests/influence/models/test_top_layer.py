"""Tests of TopLayer: a head on a frozen trunk, its features, and derivatives by pixels."""

import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf
from joblib.externals.loky.backend import reduction

from influence import BinaryLogisticRegression, Direct, Examples, Influence, Stream, TopLayer
from influence.models import scaled, top_layer
from influence.models.top_layer import cut
from tests import oracles
from tests.influence.models.pictures import MEAN, SCALE, SIDE, F, by_hand, problem, trunk
from tests.influence.problems import relative_error, sequential

L = keras.layers


def test_features_are_the_pooled_standardised_outputs():
    net, images, _ = problem()
    got = net.features(images)
    assert got.dtype == np.float64 and relative_error(got, by_hand(net, images)) < 1e-12
    assert net.features(got) is got
    plain = TopLayer(net.trunk)
    np.testing.assert_allclose(plain.features(images), by_hand(net, images) * SCALE + MEAN)
    vector, images, _ = problem(pooled=True, standardised=False)
    assert relative_error(vector.features(images), vector.trunk(images).numpy()) < 1e-12


def test_theta_is_the_head_alone_and_the_trunk_is_left_as_it_was():
    net, images, y = problem()
    before = net.trunk.get_weights()
    assert net.num_parameters == F and net.dtype == np.float64
    net.fit(net.featured(Examples(images, y)))
    for was, now in zip(before, net.trunk.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    assert net.trunk.trainable
    default = TopLayer(trunk("float32"))
    assert default.weight_decay == 0.001 and not default.intercept
    assert isinstance(default, BinaryLogisticRegression)


def test_featured_examples_are_the_heads_rows():
    net, images, y = problem(20)
    train = net.featured(Examples(images, y))
    assert relative_error(train.x, by_hand(net, images)) < 1e-12
    np.testing.assert_array_equal(train.y, y)
    assert net.featured(train) is train
    streamed = net.featured(Stream(tf.data.Dataset.from_tensor_slices((images, y)).batch(7)))
    np.testing.assert_array_equal(streamed.x, train.x)
    np.testing.assert_array_equal(streamed.y, y)
    head = BinaryLogisticRegression(F, weight_decay=net.weight_decay)
    head.theta = net.theta
    head.fit(train)
    assert net.fit(train) is net
    np.testing.assert_array_equal(net.theta, head.theta)
    few = train.take([1, 4, 6])
    ours, theirs = (Influence(each, train, solver=Direct()).scores(few) for each in (net, head))
    np.testing.assert_array_equal(ours.change_if_removed, theirs.change_if_removed)


def test_cut_ends_at_a_layer_and_shares_its_weights():
    model = trunk()
    part = cut(model, "last")
    images = problem(2)[1]
    expected = model.get_layer("map")(part(images, training=False))
    np.testing.assert_allclose(model(images, training=False), expected, rtol=1e-12)
    assert part.get_layer("first") is model.get_layer("first")
    with pytest.raises(ValueError, match="layer_name must be a layer of 'trunk', .*'map', got 'm'"):
        cut(model, "m")


def test_pickled_with_its_trunk():
    net, images, _ = problem(3)
    expected = net.features(images)
    again = pickle.loads(reduction.dumps(net))  # joblib pickles nets in this way
    assert relative_error(again.features(images), expected) < 1e-12
    np.testing.assert_array_equal(again.theta, net.theta)


@pytest.mark.parametrize("pooled", [False, True])
def test_input_gradient_is_a_difference_of_actual_gradients(pooled):
    net, images, y = problem(5, pooled=pooled, standardised=not pooled)
    rng = np.random.default_rng(3)
    v, along = rng.standard_normal(F), rng.standard_normal(images.shape)
    got = net.input_gradient(images, y, v)

    def slopes(x):
        return net.gradients(net.features(x), y) @ v  # grad loss_i . v, (n,)

    expected = oracles.central_difference(slopes, images, along, 3e-4)
    assert got.shape == images.shape and got.dtype == images.dtype
    assert relative_error((got * along).sum(axis=(1, 2, 3)), expected) < 1e-9


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_input_gradient_is_the_tapes_of_the_whole_model(dtype):
    net, images, y = problem(11, dtype=dtype)
    v = np.random.default_rng(4).standard_normal(F)
    x, w = tf.constant(images), tf.constant(net.theta[:, None])
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(w)
            pooled = tf.reduce_mean(net.trunk(x, training=False), axis=(1, 2))
            features = (tf.cast(pooled, tf.float64) - MEAN) / SCALE
            z = (features @ w)[:, 0]
            losses = tf.nn.sigmoid_cross_entropy_with_logits(tf.constant(y, tf.float64), z)
            total = tf.reduce_sum(losses)
        along = tf.reduce_sum(inner.gradient(total, w)[:, 0] * v)
    expected = outer.gradient(along, x).numpy()
    got = net.input_gradient(images, y, v)
    assert got.dtype == np.dtype(dtype)
    assert relative_error(got, expected) < {"float64": 1e-12, "float32": 1e-5}[dtype]


def test_moving_pixels_moves_the_refitted_test_loss_as_predicted():
    """Compare d(test loss after retraining) / d(pixels) with refits on changed pixels."""
    net, images, y = problem(14)
    train = net.featured(Examples(images, y))
    test = net.featured(Examples(images[:2] * 0.5, 1 - y[:2]))
    net.fit(train)
    s = Influence(net, train, solver=Direct()).s_test(test).x
    moved = [net.input_gradient(images[3:4], y[3:4], column)[0] for column in s.T]
    got = -np.stack(moved) / len(train)
    along = np.random.default_rng(5).standard_normal(images[3].shape)

    def after(t):
        moved = images.copy()
        moved[3] += t[0] * along
        other = TopLayer(net.trunk, weight_decay=net.weight_decay, mean=MEAN, scale=SCALE)
        other.fit(other.featured(Examples(moved, y)), gradient_tolerance=1e-13)
        return other.losses(test.x, test.y)

    expected = oracles.central_difference(after, np.zeros(1), np.ones(1), 1e-3)
    assert relative_error((got * along).sum(axis=(1, 2, 3)), expected) < 1e-7


def test_neither_batches_nor_order_change_a_bit():
    net, images, y = problem(75, dtype="float32")
    v = np.random.default_rng(6).standard_normal(F)
    rows = np.random.default_rng(7).permutation(75)
    cuts = np.split(rows, [1, 4, 11, 50])
    parts = np.concatenate([net.features(images[r]) for r in cuts])
    np.testing.assert_array_equal(parts, net.features(images)[rows])
    parts = np.concatenate([net.input_gradient(images[r], y[r], v) for r in cuts])
    np.testing.assert_array_equal(parts, net.input_gradient(images, y, v)[rows])


def test_several_images_at_a_time_as_on_a_gpu(monkeypatch):
    net, images, y = problem(37)
    v = np.random.default_rng(6).standard_normal(F)
    expected = net.features(images), net.input_gradient(images, y, v)
    monkeypatch.setattr(top_layer, "_ELSEWHERE", 16)
    assert relative_error(net.features(images), expected[0]) < 1e-12
    assert relative_error(net.input_gradient(images, y, v), expected[1]) < 1e-12


def test_bytes_and_floats_are_the_same_images():
    pixels = np.arange(256, dtype=np.uint8)
    x = scaled(pixels, "float64")
    np.testing.assert_allclose(x, np.linspace(-1, 1, 256), atol=1e-15)
    assert scaled(pixels).dtype == np.float32
    np.testing.assert_array_equal(np.round((scaled(pixels).astype(float) + 1) * 127.5), pixels)
    already = np.linspace(-1, 1, 5)
    assert scaled(already, "float64") is already
    net = problem()[0]
    images = np.random.default_rng(8).integers(0, 256, (3, SIDE, SIDE, 3))
    expected = net.features(images / 127.5 - 1)
    for dtype in ("uint8", "int64"):
        assert relative_error(net.features(images.astype(dtype)), expected) < 1e-12


def test_another_theta_has_another_way_back_to_the_pixels():
    net, images, y = problem(3)
    v, theta = np.ones(F), np.linspace(-1, 1, F)
    expected = net.at(theta).input_gradient(images, y, v)
    net.theta = theta
    np.testing.assert_array_equal(net.input_gradient(images, y, v), expected)


# --- arguments that are refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": np.zeros(4)}, r"mean must be 5 finite numbers, .* got shape \(4,\)"),
        ({"scale": np.array([1, 1, np.nan, 1, 1])}, "scale must be 5 finite .* with NaN"),
        ({"scale": np.array([1, 1, 0, 1, 1])}, "scale must be positive, got 0 at position 2"),
        ({"weight_decay": -1}, "weight_decay must be non-negative, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TopLayer(trunk(), **options)


def test_bad_images():
    net, images, y = problem(4)
    v = np.ones(F)
    with pytest.raises(ValueError, match=r"x must be images of shape .*'trunk', got \(8, 7, 3\)"):
        net.features(images[:, :, :7])
    with pytest.raises(ValueError, match=r"images must be in \[-1, 1\] as floats, got .* to 3"):
        net.features(images + 3 - images.max())
    with pytest.raises(ValueError, match="bytes 0 to 255 as integers, got -1 to 300"):
        net.features(np.full(images.shape, 300) - 301 * (images > 0))
    with pytest.raises(TypeError, match="images must be integers or floats, got dtype bool"):
        net.features(images > 0)
    with pytest.raises(TypeError, match="x must be floating to be differentiated, got uint8"):
        net.input_gradient(np.zeros(images.shape, np.uint8), y, v)
    with pytest.raises(ValueError, match=r"v must have shape \(5,\), got \(4,\)"):
        net.input_gradient(images, y, v[:4])
    with pytest.raises(ValueError, match="x must be images of shape"):
        net.input_gradient(images[:, :7], y, v)
    with pytest.raises(ValueError, match=r"train.x must have rows of shape \(5,\) .* got \(6,\)"):
        net.validate(Examples(np.ones((4, 6)), y), "train")


def test_images_where_features_belong():
    net, images, y = problem(4)
    train, V = Examples(images, y), np.ones((F, 2))
    message = r"must be features of shape \(n, 5\), got \(\d, 8, 8, 3\); .*net.featured\(examples\)"
    for ask in (
        lambda: net.validate(train, "train"),
        lambda: net.fit(train),
        lambda: Influence(net, train),
        lambda: net.hessian(train),
        lambda: net.losses(images, y),
        lambda: net.directional(images, y, V),
        lambda: net.curvatures(images, y, V[:, 0]),
        lambda: net.curvature_gradient(images, y, V[:, 0]),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    net.validate(net.featured(train), "train")


def model_of(shape, *layers):
    return sequential(shape, *layers, name="other")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: 3, TypeError, "trunk must be a keras.Model, got int"),
        (lambda: keras.Sequential([L.Conv2D(1, 1)]), ValueError, "one input and one output, got 0"),
        (
            lambda: model_of((4,), L.Dense(2)),
            ValueError,
            r"from images \(h, w, c\) to a feature map .* got \(4,\) to \(2,\) in 'other'",
        ),
        (
            lambda: model_of((8, 8, 3), L.Reshape((64, 3))),
            ValueError,
            r"got \(8, 8, 3\) to \(64, 3\)",
        ),
    ],
)
def test_what_is_no_trunk(make, error, message):
    with pytest.raises(error, match=message):
        TopLayer(make())


def test_a_trunk_without_a_derivative():
    net = TopLayer(model_of((SIDE, SIDE, 3), L.Lambda(tf.round)))
    images = np.zeros((2, SIDE, SIDE, 3), np.float32)
    assert net.features(images).shape == (2, 3)
    with pytest.raises(ValueError, match="trunk must be differentiable .* from 'other'"):
        net.input_gradient(images, np.array([0, 1]), np.ones(3))
