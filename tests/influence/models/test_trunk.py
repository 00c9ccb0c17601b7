"""The trunk before a head: its way back to the pixels, held against differences and the tape."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from influence import Direct, Examples, Influence, TopLayer
from influence.models import trunk as trunk_module
from influence.models.top_layer import scaled
from tests import oracles
from tests.influence.models.pictures import MEAN, SCALE, SIDE, F, problem
from tests.influence.problems import relative_error

L = keras.layers


@pytest.mark.parametrize("pooled", [False, True])
def test_input_gradient_is_a_difference_of_actual_gradients(pooled):
    net, images, y = problem(5, pooled=pooled, standardised=not pooled)
    rng = np.random.default_rng(3)
    v, along = rng.standard_normal(F), rng.standard_normal(images.shape)
    got = net.input_gradient(images, y, v)

    def slopes(x):
        return net.gradients(x, y) @ v  # (n,): grad loss_i . v

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
    """d(test loss after retraining) / d(pixels), against refits with moved pixels."""
    net, images, y = problem(14)
    train, test = Examples(images, y), Examples(images[:2] * 0.5, 1 - y[:2])
    net.fit(train)
    got = Influence(net, train, solver=Direct()).perturbation(test, [3])[:, 0]
    along = np.random.default_rng(5).standard_normal(images[3].shape)

    def after(t):
        moved = images.copy()
        moved[3] += t[0] * along
        other = TopLayer(net.trunk, weight_decay=net.weight_decay, mean=MEAN, scale=SCALE)
        other.fit(Examples(moved, y), gradient_tolerance=1e-13)
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
    monkeypatch.setattr(trunk_module, "_ELSEWHERE", 16)
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


# --- what is refused ------------------------------------------------------------------------------


def model_of(*layers):
    return keras.Sequential(list(layers), name="other")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: 3, TypeError, "trunk must be a keras.Model, got int"),
        (lambda: keras.Sequential([L.Conv2D(1, 1)]), ValueError, "one input and one output, got 0"),
        (lambda: model_of(keras.Input((4,)), L.Dense(2)), ValueError,
         r"from images \(h, w, c\) to a feature map .* got \(4,\) to \(2,\) in 'other'"),
        (lambda: model_of(keras.Input((8, 8, 3)), L.Reshape((64, 3))), ValueError,
         r"got \(8, 8, 3\) to \(64, 3\)"),
    ],
)  # fmt: skip
def test_what_is_no_trunk(make, error, message):
    with pytest.raises(error, match=message):
        TopLayer(make())


def test_a_trunk_without_a_derivative():
    model = model_of(keras.Input((SIDE, SIDE, 3)), L.Lambda(tf.round))
    net = TopLayer(model)
    images = np.zeros((2, SIDE, SIDE, 3), np.float32)
    assert net.features(images).shape == (2, 3)
    with pytest.raises(ValueError, match="trunk must be differentiable .* from 'other'"):
        net.input_gradient(images, np.array([0, 1]), np.ones(3))
