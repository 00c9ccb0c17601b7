"""Tests of affine layers' Gauss-Newton factors against a dense Jacobian."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from influence import BinaryLogisticRegression, Examples, GaussNewton, GenericNeuralNet
from influence.curvature.layers import affine_layers
from tests import oracles
from tests.influence.problems import Calls, relative_error, sequential, traced_once

L = keras.layers
N = 5
SPARSE = "sparse_categorical_crossentropy"


def log_loss(y, output):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y, output)


def logits(name="loss"):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, name=name)


def net_of(*layers, loss=None, shape=(6, 5, 2), before=None):
    """Return a sequential float64 net with random weights and biases."""
    before_us = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float64")
    try:
        model = sequential(shape, *(make() for make in layers), dtype="float64")
    finally:
        keras.config.set_dtype_policy(before_us)
    if before:
        before(model)
    loss = loss or logits()
    net = traced_once(GenericNeuralNet(model, loss), loss)
    net.theta = 0.5 * np.random.default_rng(0).standard_normal(net.num_parameters)
    return net


def conv(*args, **kwargs):
    return lambda: L.Conv2D(*args, **kwargs)


def dense(*args, **kwargs):
    return lambda: L.Dense(*args, **kwargs)


def tanh():
    return L.Activation("tanh")


def data(*shape):
    return np.random.default_rng(1).standard_normal((N, *shape)), np.arange(N) % 3


def gauss_newton(net, x, y):
    """Return the Gauss-Newton matrix mean_i sum_s p_is p_is', (d, d), computed by loops.

    The vectors p_is of row i satisfy J_i' H_i J_i = sum_s p_is p_is', where H_i is the Hessian of
    the loss by the outputs. Also check that `roots` gives these vectors.
    """
    layers = affine_layers(net, {k: v[:2] for k, v in x.items()} if isinstance(x, dict) else x[:2])
    parts = layers.pseudo_gradients(x, y)
    p = np.full((N, parts[0][1].shape[2], net.num_parameters), np.nan)
    for affine, (a, g) in zip(layers.layers, parts, strict=True):
        for i, s in np.ndindex(p.shape[:2]):
            at = zip(a[i], g[i, :, s], strict=True)  # one pair (a, g) for each position
            p[i, s, affine.entries] = sum(a[..., :, None] * g[..., None, :] for a, g in at)
    assert relative_error(layers.roots(x, y), p) < 1e-12
    return np.einsum("isd,ise->de", p, p) / N


CONVOLUTIONS = {
    "valid": {"filters": 3, "kernel_size": 3},
    "same": {"filters": 3, "kernel_size": (3, 2), "padding": "same"},
    "strided": {"filters": 2, "kernel_size": (2, 3), "strides": (2, 1)},
    "strided same": {"filters": 2, "kernel_size": 3, "strides": 2, "padding": "same"},
    "dilated same": {"filters": 2, "kernel_size": 2, "dilation_rate": (2, 1), "padding": "same"},
    "without bias": {"filters": 3, "kernel_size": (1, 2), "use_bias": False},
}


DENSE = {
    "two layers": (dense(4), tanh, dense(3)),
    "without bias": (dense(4, use_bias=False), tanh, dense(3, use_bias=False)),
    "over time": (lambda: L.Reshape((2, 4)), dense(3), tanh, L.Flatten, dense(3)),
    "over pixels": (lambda: L.Reshape((2, 2, 2)), dense(3), tanh, L.Flatten, dense(3)),
    "linear activation": (dense(4, activation="linear"), tanh, dense(3)),
}


class Doubled(L.Dense):
    def call(self, inputs):
        return 2 * super().call(inputs)


IMAGE, VOLUME, SERIES = (6, 5, 2), (4, 3, 3, 2), (7, 2)
CASES = (
    {
        name: (IMAGE, conv(**options), tanh, L.Flatten, dense(3))
        for name, options in CONVOLUTIONS.items()
    }
    | {f"dense, {name}": ((8,), *layers) for name, layers in DENSE.items()}
    | {
        name: (shape, make, tanh, L.Flatten, dense(4, activation="softplus"), dense(3))
        for name, (shape, make) in {
            "fused activation": (IMAGE, conv(2, 2, activation="tanh")),
            "a call that does more": ((4,), lambda: Doubled(4)),
            "grouped": (IMAGE, conv(4, (3, 2), groups=2, padding="same")),
            "grouped, without bias": (IMAGE, conv(2, 2, groups=2, use_bias=False)),
            "depthwise": (IMAGE, lambda: L.DepthwiseConv2D((2, 3), depth_multiplier=3)),
            "depthwise, strided": (IMAGE, lambda: L.DepthwiseConv2D(2, 2, "same", use_bias=False)),
            "depthwise series": (SERIES, lambda: L.DepthwiseConv1D(3, depth_multiplier=2)),
            "series": (SERIES, lambda: L.Conv1D(3, 3, strides=2, activation="gelu")),
            "causal series": (SERIES, lambda: L.Conv1D(3, 2, dilation_rate=2, padding="causal")),
            "volume": (VOLUME, lambda: L.Conv3D(2, (2, 1, 3), strides=(1, 2, 1), padding="same")),
            "einsum": (
                IMAGE,
                lambda: L.EinsumDense("abcd,def->abcfe", (6, 5, 3, 2), bias_axes="fe"),
            ),
            "einsum of two axes": (IMAGE, lambda: L.EinsumDense("abcd,dce->abe", (6, 3))),
            "batch normalisation": (IMAGE, lambda: L.BatchNormalization()),
            "offset alone": (IMAGE, lambda: L.BatchNormalization(scale=False)),
            "layer normalisation": (SERIES, lambda: L.LayerNormalization()),
            "scale alone": (SERIES, lambda: L.LayerNormalization(center=False)),
            "group normalisation": ((6, 4), lambda: L.GroupNormalization(2)),
            "root mean square normalisation": (SERIES, lambda: L.RMSNormalization()),
        }.items()
    }
)


def check(net, x, y, loss=log_loss):
    truth = oracles.dense_derivatives(net.model, loss, x, y).gauss_newton
    assert relative_error(gauss_newton(net, x, y), truth) < 1e-12


def drawn(model):
    """Give normalisation layers random moving statistics, as if the model were trained."""
    for weight in model.non_trainable_weights:
        weight.assign(np.random.default_rng(2).uniform(0.5, 2, weight.shape))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_layers(case):
    shape, *layers = case
    check(net_of(*layers, shape=shape, before=drawn), *data(*shape))


def test_an_embedding_and_attention():
    x = keras.Input((5,), dtype="int32")
    h = L.Embedding(6, 4, dtype="float64")(x)
    h = h + L.MultiHeadAttention(2, 3, dtype="float64")(h, h)
    h = L.GlobalAveragePooling1D(dtype="float64")(L.LayerNormalization(dtype="float64")(h))
    net = GenericNeuralNet(keras.Model(x, L.Dense(3, dtype="float64")(h)), logits())
    rng = np.random.default_rng(0)
    net.theta = 0.5 * rng.standard_normal(net.num_parameters)
    check(net, rng.integers(0, 6, (N, 5)), np.arange(N) % 3)


def test_layers_in_between_and_frozen_ones():
    """Check a net with frozen layers, with layers that have no weights, and with activations.

    Some activations are layers, and one is an argument of its layer.
    """

    def freeze(model):
        for layer in model.layers:
            layer.trainable = layer.name not in ("first", "norm")
        model.layers[-1].kernel.trainable = False

    first = conv(2, 2, activation="relu", name="first"), lambda: L.BatchNormalization(name="norm")
    hidden = conv(3, 2), tanh, L.MaxPooling2D, L.Flatten, lambda: L.Dropout(0.5), dense(4), tanh
    net = net_of(*first, *hidden, dense(3), before=freeze)
    x, y = data(6, 5, 2)
    # The last layer's kernel is frozen, so theta has only its three biases.
    assert affine_layers(net, x).layers[-1].entries.shape == (1, 3)
    check(net, x, y)


def test_functional_with_a_skip_and_two_inputs():
    a, b = (keras.Input((3,), name=name, dtype="float64") for name in "ab")
    hidden = L.Activation("tanh", dtype="float64")(L.Dense(3, dtype="float64")(a))
    skipped = L.Concatenate(dtype="float64")([hidden, a, b])
    net = GenericNeuralNet(keras.Model([a, b], L.Dense(2, dtype="float64")(skipped)), "mse")
    rng = np.random.default_rng(0)
    net.theta = rng.standard_normal(net.num_parameters)
    x = {"a": rng.standard_normal((N, 3)), "b": rng.standard_normal((N, 3))}
    y = rng.standard_normal((N, 2))
    check(net, x, y, lambda y, output: tf.reduce_mean((y - output) ** 2, axis=1))


def built(function, **layers):
    model = Calls(function, "owner", "float64", **layers)
    model(np.zeros((1, 4)))
    return GenericNeuralNet(model, logits())


def named(units, name="hidden"):
    return L.Dense(units, dtype="float64", name=name)


def test_subclassed():
    """Check a layer in a list, a layer in an inner model, and two layers with the same name."""
    net = built(
        lambda model, x: model.inner(tf.tanh(model.parts[0](inputs=x))),
        parts=[named(3)],
        inner=keras.Sequential([named(3)]),
    )
    check(net, *data(4))


def test_one_output_and_labels_without_an_axis():
    net = BinaryLogisticRegression(3, intercept=True)
    net.theta = np.array([1.0, -1, 0.5, 0.2])
    x, _ = data(3)
    y = np.array([0, 1, 1, 0, 1])
    oracle = oracles.logistic_regression(oracles.with_ones(x), y, 0.0)
    assert relative_error(gauss_newton(net, x, y), oracle.hessian(net.theta)) < 1e-12


def cosine(y, output):
    return 1 - tf.cos(output[:, 0] - tf.cast(y, output.dtype))


def test_a_loss_that_is_not_convex_in_the_output_counts_with_its_positive_part():
    net = net_of(dense(1), shape=(3,), loss=cosine)
    x, _ = data(3)
    y = np.linspace(-3.0, 3.0, N)
    curvature = np.cos(net.outputs(x)[:, 0] - y)
    assert (curvature < -0.1).any() and (curvature > 0.1).any()
    A = oracles.with_ones(x)
    expected = (A * np.maximum(curvature, 0)[:, None]).T @ A / N
    assert relative_error(gauss_newton(net, x, y), expected) < 1e-12


def test_calling_leaves_the_model_as_it_was():
    net = net_of(conv(2, 2), tanh, L.Flatten, dense(3))
    x, y = data(6, 5, 2)
    layer, before = net.model.layers[0], net.outputs(x)
    own = []
    vars(layer)["call"] = lambda inputs: own.append(1) or type(layer).call(layer, inputs)
    affine_layers(net, x).pseudo_gradients(x, y)
    assert own and "call" in vars(layer) and "call" not in vars(net.model.layers[-1])
    del vars(layer)["call"]
    np.testing.assert_array_equal(net.outputs(x), before)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_dense_gauss_newton_matrix_comes_from_the_roots(batch_size, monkeypatch):
    net = net_of(conv(2, 3, kernel_regularizer="l2"), tanh, L.Flatten, dense(3))
    x, y = data(6, 5, 2)
    d = net.num_parameters
    A = GaussNewton(net, Examples(x, y), 0.3, batch_size=batch_size)
    products = A @ np.eye(d)
    with monkeypatch.context() as patch:
        patch.setattr(GaussNewton, "_undamped", None)  # multiplying by A would raise an error
        ours = A.dense()
    assert relative_error(ours, products) < 1e-12
    np.testing.assert_array_equal(ours, ours.T)


OTHERS = {
    "recurrent": (SERIES, lambda: L.GRU(3), dense(3)),
    "normalisation over another axis": (
        IMAGE,
        lambda: L.BatchNormalization(1),
        L.Flatten,
        dense(3),
    ),
    "more layers": ((4,), lambda: L.PReLU(), dense(3)),
}


@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS)
def test_roots_of_other_layers_come_row_by_row(case, monkeypatch):
    shape, *layers = case
    net = net_of(*layers, shape=shape, before=drawn)
    x, y = data(*shape)
    truth = oracles.dense_derivatives(net.model, log_loss, x, y).gauss_newton
    monkeypatch.setattr(GaussNewton, "_undamped", None)  # multiplying by A would raise an error
    assert relative_error(GaussNewton(net, Examples(x, y)).dense(), truth) < 1e-12


def test_the_dense_matrix_of_another_loss_comes_from_products():
    x, _ = data(4)
    # This loss is not convex in the output, so its Gauss-Newton matrix is indefinite. It is not a
    # sum of r r' over vectors r, and `dense` must use products instead of such roots.
    net = net_of(dense(2), tanh, dense(1), shape=(4,), loss=cosine)
    A = GaussNewton(net, Examples(x, np.linspace(-3.0, 3.0, N)))
    assert np.linalg.eigvalsh(A.dense())[0] < -1e-3
    assert relative_error(A.dense(), A @ np.eye(net.num_parameters)) < 1e-12


# --- arguments that are refused ---------------------------------------------------------------


def squeezed(model, x):
    """Apply the layer to inputs whose axes of rows and of time steps are merged into one."""
    return model.last(tf.reshape(model.hidden(tf.reshape(x, [-1, 2])), [-1, 4]))


def tied(model, x):
    """Use the layer's kernel a second time, outside the layer."""
    return tf.matmul(tf.tanh(model.hidden(x)), model.hidden.kernel, transpose_b=True)[:, :3]


def repeated(times):
    def call(model, x):
        for _ in range(model.times[0]):
            x = model.hidden(x)
        return model.last(x)

    return built(call, times=[times], hidden=named(4), last=named(3, "last"))


def own_weight():
    model = Calls(lambda model, x: model.last(x) + model.shift, "owner", "float64", last=named(3))
    model.shift = model.add_weight(shape=(3,), name="shift")
    model(np.zeros((1, 4)))
    return GenericNeuralNet(model, logits())


def with_lora():
    net = net_of(dense(4, name="hidden"), tanh, dense(3), shape=(4,))
    net.model.layers[0].enable_lora(2)
    return GenericNeuralNet(net.model, logits())


def shared():
    a = keras.Input((4,), dtype="float64")
    both = named(4, "both")
    hidden = L.Activation("tanh", dtype="float64")(both(a))
    return GenericNeuralNet(keras.Model(a, named(3, "last")(both(hidden))), logits())


REFUSED = {
    "normalisation over another axis": (
        lambda: net_of(
            conv(2, 2), lambda: L.BatchNormalization(1, name="norm"), L.Flatten, dense(3)
        ),
        "^model must hold theta in layers that are affine .* such as Dense and Conv2D, got the "
        "weight 'gamma' of BatchNormalization layer 'norm'; set its trainable = False .*, or use",
    ),
    "recurrent": (
        lambda: net_of(lambda: L.GRU(3, name="gru"), dense(3), shape=SERIES),
        "got the weight .* of GRUCell layer .*; set its trainable = False",
    ),
    "scales of two axes": (
        lambda: net_of(lambda: L.LayerNormalization([1, 2], name="norm"), L.Flatten, dense(3)),
        "got the weight 'gamma' of LayerNormalization layer 'norm'",
    ),
    "a bias of positions": (
        lambda: net_of(
            lambda: L.EinsumDense("abc,cd->abd", (7, 3), bias_axes="bd", name="einsum"),
            L.Flatten,
            dense(3),
            shape=SERIES,
        ),
        "got the weight 'kernel' of EinsumDense layer 'einsum'",
    ),
    "a model's own weight": (
        own_weight,
        "^model must hold theta .* 'shift' of Calls layer 'owner'",
    ),
    "low-rank adapters": (
        with_lora,
        "^model must hold theta in kernels and biases .* 'lora_kernel_a' of layer 'hidden'; set",
    ),
    "called twice": (
        lambda: repeated(2),
        "^model must call each layer once for EK-FAC, got 2 calls of layer 'hidden'; set",
    ),
    "shared in a functional model": (
        shared,
        "^model must call each layer once for EK-FAC, got 2 calls of layer 'both'",
    ),
    "rows and steps as one axis": (
        lambda: built(squeezed, hidden=named(2), last=named(3, "last")),
        r"^model must keep one row per example for EK-FAC, got shape \(4, 2\) for 2 examples in "
        "layer 'hidden'; set",
    ),
    "tied weights": (
        lambda: built(tied, hidden=named(4)),
        r"^model must use the weights of layer 'hidden' for a W \+ b alone for EK-FAC, got a "
        "derivative by them that is off by .*: its call does more, or they are shared; set",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_such_factors_is_refused_by_name(make, message):
    net = make()
    shape = net.model.input_shape[1:] if hasattr(net.model, "input_shape") else (4,)
    with pytest.raises(ValueError, match=message):
        affine_layers(net, np.random.default_rng(0).standard_normal((2, *shape)))


def test_a_layer_that_is_never_called_and_channels_first():
    net = repeated(1)
    net.model.times[0] = 0
    with pytest.raises(ValueError, match="got 0 calls of layer 'hidden'"):
        affine_layers(net, np.zeros((2, 4)))
    net = net_of(conv(2, 2, name="first"), L.Flatten, dense(3))
    net.model.layers[0].data_format = "channels_first"
    with pytest.raises(ValueError, match="got the weight 'kernel' of Conv2D layer 'first'"):
        affine_layers(net, np.zeros((2, 6, 5, 2)))


def test_a_kernel_without_influence_and_a_set_of_one_row_are_no_errors():
    net = net_of(dense(4), tanh, dense(3), shape=(4,))
    net.theta = np.zeros(net.num_parameters)
    factors = affine_layers(net, np.ones((2, 4)))
    a, g = factors.pseudo_gradients(np.ones((N, 4)), np.arange(N) % 3)[0]
    assert a.shape == (N, 1, 5) and g.shape == (N, 1, 3, 4) and not g.any()
    (a, g), *_ = factors.pseudo_gradients(np.ones((1, 4)), np.array([1]))
    assert a.shape == (1, 1, 5) and g.shape == (1, 1, 3, 4)
