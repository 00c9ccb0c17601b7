"""Tests of replaced and refused operations against NumPy and finite differences."""

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from influence import Examples, GenericNeuralNet
from influence.net import ops
from tests import oracles
from tests.influence.net.layer_grid import measured
from tests.influence.problems import relative_error, sequential

L = keras.layers
ROOT = Path(__file__).resolve().parents[3]
IMAGES = np.random.default_rng(0).uniform(0.1, 0.9, (2, 5, 4, 3)).astype("float32")


# --- layers that crashed --------------------------------------------------------------------------


def test_layers_that_killed_the_process(tmp_path):
    """Check layers in a process with two threads, where an error of oneDNN once killed the process.

    With one thread the error does not appear.
    """
    names = ["MultiHeadAttention", "Dense of rank 4"]
    command = [sys.executable, "-m", "tests.influence.net.layer_grid", str(tmp_path / "file")]
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": "1"}
    done = subprocess.run(command + names, cwd=ROOT, env=environment, capture_output=True)
    found = [json.loads(line) for line in (tmp_path / "file").read_text().splitlines()]
    assert [(f["layer"], f["status"]) for f in found] == [(name, "right") for name in names]
    assert done.returncode == 0


PRODUCTS = {  # shapes of x and y, then whether each is transposed
    "rank 2": ((3, 1, 5, 4), (4, 2), False, False),
    "rank 3": ((3, 1, 5, 4), (1, 4, 2), False, False),
    "rank 4": ((3, 1, 5, 4), (1, 1, 2, 4), False, True),
    "transposed": ((3, 1, 4, 5), (4, 2), True, False),
}


def dynamic(*arrays):
    """Return a TensorSpec for each array, in which all axes before the last two have unknown sizes.

    A matrix has no such axes, so its sizes are all known.
    """
    return [
        tf.TensorSpec(
            [None] * (a.ndim - 2) + list(a.shape[-2:]) if a.ndim > 2 else a.shape, a.dtype
        )
        for a in arrays
    ]


@pytest.mark.parametrize("shapes", PRODUCTS.values(), ids=PRODUCTS)
@pytest.mark.parametrize("known", [True, False], ids=["static", "dynamic"])
def test_no_product_has_the_shapes_that_onednn_computes_wrongly(shapes, known):
    *sizes, over_x, over_y = shapes
    x, y = (np.random.default_rng(1).standard_normal(size) for size in sizes)

    def product(x, y):
        z = tf.matmul(x, y, transpose_a=over_x, transpose_b=over_y)
        return z, *tf.gradients(tf.reduce_sum(z**2), [x, y])

    specs = [tf.TensorSpec(a.shape, a.dtype) for a in (x, y)] if known else dynamic(x, y)
    with ops.exact():
        traced = tf.function(product, input_signature=specs, autograph=False)
        graph = traced.get_concrete_function().graph
    for op in graph.get_operations():
        if op.type == "BatchMatMulV2":
            left, right = (t.shape for t in op.inputs)
            # oneDNN computes some products wrongly that broadcast a factor. So the product itself
            # must broadcast neither factor.
            assert left.rank != 4 or right.rank == 4
            assert "BroadcastTo" in {t.op.type for t in op.inputs} or left[1] != 1
    a = np.swapaxes(x, -1, -2) if over_x else x
    b = np.swapaxes(y, -1, -2) if over_y else y
    z, by_x, by_y = (t.numpy() for t in traced(x, y))
    assert relative_error(z, a @ b) < 1e-14
    slope = 2 * (a @ b) @ np.swapaxes(b, -1, -2)
    assert relative_error(by_x, np.swapaxes(slope, -1, -2) if over_x else slope) < 1e-14
    slope = (2 * np.swapaxes(a, -1, -2) @ (a @ b)).sum(axis=(0, 1))
    assert relative_error(np.squeeze(by_y), slope.T if over_y else slope) < 1e-14


# --- replaced operations --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["UpSampling2D, bilinear", "Resizing, bicubic",
             "Resizing, pad", "Activation, softsign"],
)  # fmt: skip
def test_layers_whose_derivatives_tensorflow_cuts_or_lacks(name):
    found = measured(name, repeats=1)
    assert found["status"] == "right", found


def resized(method, antialias=False):
    return lambda x: tf.image.resize(x, (7, 3), method, antialias=antialias)


FUNCTIONS = {
    "softsign": lambda x: tf.nn.softsign(x - 0.5),
    "math.softsign": lambda x: tf.math.softsign(x - 0.5),
    "hsv_to_rgb": lambda x: tf.image.hsv_to_rgb(x),
    "moments": lambda x: tf.concat(tf.nn.moments(x, [1, 2]), 0),
    "moments, keepdims": lambda x: tf.concat(tf.nn.moments(x, [-1], keepdims=True), 0),
    "legacy": lambda x: tf.compat.v1.image.resize_bilinear(x, (7, 3), align_corners=True),
    "gaussian": resized("gaussian"),
    **{name: resized(name) for name in ("bilinear", "bicubic", "nearest", "area", "lanczos5")},
    **{f"{name}, smooth": resized(name, True) for name in ("bilinear", "bicubic", "mitchellcubic")},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replacements_have_the_values_of_tensorflow_and_both_derivatives(name):
    function = FUNCTIONS[name]
    expected = function(tf.constant(IMAGES)).numpy()
    with ops.exact():
        assert relative_error(function(tf.constant(IMAGES)), expected) < 1e-6
    x = IMAGES.astype("float64")

    def value(x):
        with ops.exact():
            return function(x)

    def slope(x):
        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(value(x) ** 3)
        gradient: Any = tape.gradient(total, x)
        return gradient.numpy()

    v = np.random.default_rng(2).standard_normal(x.shape) / 10
    with tf.GradientTape() as tape:
        variable: Any = tf.constant(x)
        tape.watch(variable)
        with tf.GradientTape() as inner:
            inner.watch(variable)
            total = tf.reduce_sum(value(variable) ** 3)
        first: Any = inner.gradient(total, variable)
    direction: Any = tf.constant(v)
    second: Any = tape.gradient(first, variable, output_gradients=direction)
    along = oracles.central_difference(lambda x: np.sum(value(x) ** 3), x, v)
    assert relative_error(np.sum(first * v), along) < 1e-8
    true = oracles.central_difference(slope, x, v)
    assert relative_error(second, true) < 1e-8


@pytest.mark.parametrize("exponent", [1, 2, 3, 4])
def test_powers_of_zero_have_all_derivatives(exponent):
    """Compare all derivatives of x^k with closed forms, at 0 too, where the k-th one is k!."""
    x: Any = tf.constant([0.0, 2.0], tf.float64)
    zero = tf.UnconnectedGradients.ZERO
    functions: list[Any] = [lambda x: x**exponent]
    for _ in range(3):

        def slope(x, function=functions[-1]):
            with tf.GradientTape() as tape:
                tape.watch(x)
                total = tf.reduce_sum(function(x))
            return tape.gradient(total, x, unconnected_gradients=zero)

        functions.append(slope)
    with ops.exact():
        for k, function in enumerate(functions):
            factor = math.perm(exponent, k)
            expected = factor * x.numpy() ** max(exponent - k, 0)
            assert np.array_equal(function(x), expected)


def test_layers_whose_activations_are_computed_again():
    """Check layers made in a `keras.RematScope`, which compute their activations twice.

    The scope calls a TensorFlow function that fails in a graph. The library must still work.
    """
    plain = sequential((3,), L.Dense(4, activation="tanh"), L.Dense(1))
    with keras.RematScope(mode="full"):
        again = sequential((3,), L.Dense(4, activation="tanh"), L.Dense(1))
    again.set_weights(plain.get_weights())
    x, y = IMAGES[0, 0], np.arange(4, dtype="float32")
    v = np.random.default_rng(4).standard_normal(plain.count_params())
    expected, got = (GenericNeuralNet(model, "mse").hvp(x, y, v) for model in (plain, again))
    assert np.linalg.norm(expected) > 0.1 and relative_error(got, expected) < 1e-6


def test_images_of_integers_are_resized_by_tensorflow():
    images = tf.constant(IMAGES * 255, tf.uint8)
    for method in ("bilinear", "nearest"):
        expected = tf.image.resize(images, (7, 3), method)
        with ops.exact():
            got = tf.image.resize(images, (7, 3), method)
        assert got.dtype == expected.dtype and np.array_equal(got, expected)


def test_tensorflow_is_unchanged_outside_the_block_and_in_other_threads():
    before = tf.nn.moments, tf.nn.softsign

    def operations(function):
        graph = tf.function(function).get_concrete_function(tf.ones(3)).graph
        return {op.type for op in graph.get_operations()}

    seen = []
    inside, leave = threading.Event(), threading.Event()

    def other():
        with ops.exact():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait()
    # `exact` replaces Softsign. The other thread is inside `exact` now, and this one is not.
    seen.append(operations(lambda x: tf.nn.softsign(x)))
    with ops.exact(), ops.exact():
        seen.append(operations(lambda x: tf.nn.softsign(x)))
        leave.set()
        thread.join()
        seen.append(operations(lambda x: tf.nn.softsign(x)))
    assert ["Softsign" in types for types in seen] == [True, False, False]
    assert (tf.nn.moments, tf.nn.softsign) == before
    with pytest.raises(ZeroDivisionError), ops.exact():
        raise ZeroDivisionError
    assert (tf.nn.moments, tf.nn.softsign) == before


# --- refused operations ---------------------------------------------------------------------------

_IDENTITY: Any = tf.constant([[1.0, 0, 0, 0, 1, 0, 0, 0]])
REFUSED = {
    "ImageProjectiveTransformV3": lambda x: keras.ops.image.affine_transform(
        x, tf.repeat(_IDENTITY, tf.shape(x)[0], axis=0)
    ),
    "LRN": tf.nn.local_response_normalization,
    "Softsign": lambda x: tf.raw_ops.Softsign(features=x),
    "ResizeBilinear": lambda x: tf.raw_ops.ResizeBilinear(images=x, size=[4, 4]),
    "AdjustContrastv2": lambda x: tf.image.adjust_contrast(x, 0.5),
    "stop_gradient": tf.stop_gradient,
    "stop_gradient by Keras": keras.ops.stop_gradient,
    "FakeQuantWithMinMaxArgs": tf.quantization.fake_quant_with_min_max_args,
    "Lu": lambda x: tf.linalg.lu(x[:, :3, :3, 0])[0],
    "PyFunc": lambda x: tf.reshape(tf.numpy_function(np.sin, [x], tf.float32), tf.shape(x)),
}
INSIDE = {
    "a loop": lambda x: tf.map_fn(lambda t: tf.raw_ops.Softsign(features=t), x),
    "a function": tf.function(lambda x: tf.raw_ops.Softsign(features=x)),
}


def with_weights_before(function, before=True):
    layer = L.Lambda(function, output_shape=(None, None, 3), name="bad")
    layers = [L.Dense(3), layer] if before else [layer, L.Dense(3)]
    return sequential((5, 4, 3), *layers, L.GlobalAveragePooling2D(), L.Dense(1))


@pytest.mark.parametrize(
    "name, function",
    [*REFUSED.items(), *(("Softsign", function) for function in INSIDE.values())],
)
def test_operations_without_correct_derivatives_are_refused_by_name(name, function):
    if name == "Lu":
        function = lambda x: REFUSED["Lu"](x)[:, :, :, None] * tf.ones(3)  # noqa: E731
    net = GenericNeuralNet(with_weights_before(function), "mse")
    examples = Examples(IMAGES, np.zeros(2, "float32"))
    name = name.split()[0]
    with pytest.raises(NotImplementedError, match=f"got {name} in layer 'bad'"):
        net.validate(examples, "train")
    with pytest.raises(NotImplementedError, match=name):
        net.hvp(IMAGES, examples.y, np.ones(net.num_parameters))
    with pytest.raises(NotImplementedError, match=name):
        net.curvatures(IMAGES, examples.y, np.ones(net.num_parameters))


@pytest.mark.parametrize("name", ["LRN", "stop_gradient", "AdjustContrastv2", "PyFunc"])
def test_operations_on_inputs_alone_are_not_refused(name):
    net = GenericNeuralNet(with_weights_before(REFUSED[name], before=False), "mse")
    net.validate(Examples(IMAGES, np.zeros(2, "float32")), "train")
    assert np.isfinite(net.hvp(IMAGES, np.zeros(2, "f4"), np.ones(net.num_parameters))).all()


def test_derivatives_by_inputs_are_refused_where_the_first_derivative_is_wrong():
    v = np.ones(16, "float32")
    for name, refused in {"ImageProjectiveTransformV3": True, "LRN": False}.items():
        net = GenericNeuralNet(with_weights_before(REFUSED[name], before=False), "mse")
        if not refused:
            assert np.isfinite(net.input_gradient(IMAGES, np.zeros(2, "f4"), v)).all()
            continue
        with pytest.raises(NotImplementedError, match=f"got {name} in layer 'bad'"):
            net.input_gradient(IMAGES, np.zeros(2, "f4"), v)


def test_stops_inside_tensorflow_that_change_no_derivative_are_not_refused():
    function = lambda x: x - tf.reduce_logsumexp(x, axis=-1, keepdims=True)  # noqa: E731
    net = GenericNeuralNet(with_weights_before(function), "mse")
    net.validate(Examples(IMAGES, np.zeros(2, "float32")), "train")


def test_a_loss_that_stops_gradients_is_refused():
    loss = lambda y, z: z[:, 0] * tf.stop_gradient(z[:, 0] - y)  # noqa: E731
    net = GenericNeuralNet(sequential((3,), L.Dense(1)), loss)
    with pytest.raises(NotImplementedError, match="model and loss must not stop gradients"):
        net.validate(Examples(np.ones((2, 3), "float32"), np.zeros(2, "float32")), "train")


def test_a_loss_with_a_replaced_function():
    loss = lambda y, z: tf.nn.softsign(z[:, 0] - y) ** 2  # noqa: E731
    model = sequential((3,), L.Dense(1))
    net = GenericNeuralNet(model, loss)
    x, y = IMAGES[0, 0, :, :], np.arange(4, dtype="float32")
    net.validate(Examples(x, y), "train")
    v = np.random.default_rng(3).standard_normal(net.num_parameters)
    z = x.astype("float64") @ model.layers[-1].kernel.numpy()[:, 0] - y
    # The loss is (z / (1 + |z|))^2, where z is output minus label. This is its second derivative.
    curvature = 2 / (1 + abs(z)) ** 4 - 4 * abs(z) / (1 + abs(z)) ** 4
    ones = oracles.with_ones(x.astype("float64"))
    true = ones.T @ (curvature * (ones @ v)) / 4
    assert relative_error(net.hvp(x, y, v), true) < 1e-5


def test_ctc_is_refused():
    model = sequential((5, 2), L.Dense(4))
    net = GenericNeuralNet(model, lambda y, z: keras.ops.ctc_loss(
        y, z, tf.fill(tf.shape(z)[:1], 2), tf.fill(tf.shape(z)[:1], 5)))  # fmt: skip
    x = np.random.default_rng(0).standard_normal((3, 5, 2)).astype("float32")
    with pytest.raises(NotImplementedError, match="ctc_loss"):
        net.hvp(x, np.array([[1, 2], [2, 1], [3, 1]]), np.ones(net.num_parameters))
