"""Tests of masked positions and ignored classes against Keras' risk of all rows in one batch."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from influence import Influence
from influence.curvature.operators import GaussNewton, Hessian
from influence.examples.examples import Examples
from influence.net.losses import per_example
from influence.net.net import GenericNeuralNet
from tests.influence import masked
from tests.influence.masked import F8, STEPS, K, L, classes, voided
from tests.influence.problems import relative_error

N = 9
# Keras divides by the number of valid positions plus 1e-7.
EPSILON = 1e-7
WORDS, VECTORS, IMAGES = masked.words(N), masked.vectors(N), masked.images(N)
TAGS, PIXELS = classes(N, STEPS), classes(N, masked.SIDE, masked.SIDE)
BITS = (classes(N, STEPS, 1) > 0).astype(int)
REAL = np.random.default_rng(5).standard_normal((N, STEPS, masked.NUM_CLASSES))
FEATURES = np.random.default_rng(6).standard_normal((N, 4))


def sparse(**options):
    return K.SparseCategoricalCrossentropy(from_logits=True, **F8, **options)


def quartic(y, output):
    return tf.reduce_sum((y - output) ** 4, axis=-1)


# Each entry has four parts: a function that makes the model, inputs, labels, and a mask that is
# True at valid positions.
CASES = {
    "tagging": (lambda: masked.tagger(sparse()), WORDS, TAGS, WORDS != 0),
    "labels_with_an_axis": (lambda: masked.tagger(sparse()), WORDS, TAGS[..., None], WORDS != 0),
    "binary": (
        lambda: masked.tagger(K.BinaryCrossentropy(from_logits=True, **F8), units=1),
        WORDS,
        BITS,
        WORDS != 0,
    ),
    "regression": (lambda: masked.tagger(K.MeanSquaredError(**F8)), WORDS, REAL, WORDS != 0),
    "two_layers_softmax": (
        lambda: masked.masker(K.SparseCategoricalCrossentropy(**F8)),
        VECTORS,
        TAGS,
        WORDS != 0,
    ),
    "ignored_0": (
        lambda: masked.segmenter(sparse(ignore_class=0)),
        IMAGES,
        voided(PIXELS, 0),
        voided(PIXELS, 0) != 0,
    ),
    "void_255": (
        lambda: masked.segmenter(sparse(ignore_class=255)),
        IMAGES,
        voided(PIXELS, 255),
        voided(PIXELS, 255) != 255,
    ),
    "ignored_and_masked": (
        lambda: masked.tagger(sparse(ignore_class=255)),
        WORDS,
        voided(TAGS, 255),
        (WORDS != 0) & (voided(TAGS, 255) != 255),
    ),
    "ignored_rows": (
        lambda: masked.classifier(sparse(ignore_class=255)),
        FEATURES,
        voided(classes(N), 255),
        voided(classes(N), 255) != 255,
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    make, x, y, valid = CASES[request.param]
    model = make()
    net, examples = masked.net_of(model, x, y)
    net.validate(examples, "train")
    return model, net, examples, valid


def test_risk_and_derivatives_are_those_of_keras(case):
    """Compare with Keras' risk of all rows in one batch.

    The library uses one batch, then batches of 4, 4 and 1 rows. These have different numbers of
    valid positions, so a mean of their means would be wrong.
    """
    model, net, examples, valid = case
    x, y = examples.x, examples.y
    risk, gradient = masked.slope(model, lambda: masked.keras_risk(model, x, y))
    H = masked.dense_hessian(model, lambda: masked.keras_risk(model, x, y))
    reported = model.evaluate(x, y, batch_size=N, verbose=0)
    assert risk == pytest.approx(reported, rel=1e-6)  # `evaluate` averages in float32
    for size in (None, 4):
        assert net.risk(examples, size) == pytest.approx(risk, rel=EPSILON)
        assert relative_error(net.risk_gradient(examples, batch_size=size), gradient) < EPSILON
        both = net.risk_and_gradient(examples, size)
        assert both[0] == pytest.approx(risk, rel=EPSILON)
        assert relative_error(both[1], gradient) < EPSILON
        A = Hessian(net, examples, batch_size=size)
        V = np.random.default_rng(7).standard_normal((len(H), 2))
        assert relative_error(A @ V, H @ V) < EPSILON
        assert relative_error(A.dense(), H) < EPSILON
    # Three samples of three rows are together all rows. The mean of their estimates of H V is then
    # exact.
    every = np.arange(N).reshape(3, 3)
    estimates = A.sampled(every, np.broadcast_to(V, (3, *V.shape)))
    assert relative_error(estimates.mean(axis=0), H @ V) < EPSILON
    np.testing.assert_array_equal(net.row_masses(examples), valid.reshape(N, -1).sum(1))


def test_gradient_and_products_are_differences(case):
    model, net, examples, _ = case
    x, y, theta = examples.x, examples.y, net.theta
    v, step = np.random.default_rng(8).standard_normal(len(theta)), 1e-5
    gradient, product = net.risk_gradient(examples), Hessian(net, examples) @ v
    ends = []
    for sign in (1, -1):
        net.theta = theta + sign * step * v
        ends.append(masked.slope(model, lambda: masked.keras_risk(model, x, y)))
    (up, slope_up), (down, slope_down) = ends
    assert gradient @ v == pytest.approx((up - down) / (2 * step), rel=1e-6)
    assert relative_error(product, (slope_up - slope_down) / (2 * step)) < 1e-6


def test_a_row_has_the_loss_that_keras_reports_for_it_alone(case):
    """Compare each row's loss with Keras. Row 1 has no valid position, so its loss is 0."""
    model, net, examples, valid = case
    x, y = examples.x, examples.y
    alone = [
        masked.slope(model, lambda i=i: masked.keras_loss(model, x[i : i + 1], y[i : i + 1]))
        for i in range(N)
    ]
    losses, gradients = np.array([a for a, _ in alone]), np.stack([g for _, g in alone])
    assert not valid[1].any() and losses[1] == 0
    np.testing.assert_allclose(net.losses(x, y), losses, rtol=2e-7)
    np.testing.assert_allclose(net.gradients(x, y), gradients, atol=2e-7 * abs(gradients).max())
    v = np.random.default_rng(9).standard_normal(net.num_parameters)
    assert relative_error(net.directional(x, y, v), gradients @ v) < 2e-7
    H1 = masked.dense_hessian(model, lambda: masked.keras_loss(model, x[:1], y[:1]))
    assert net.curvatures(x, y, v)[0] == pytest.approx(v @ H1 @ v, rel=1e-6)
    assert net.curvatures(x, y, v)[1] == 0


def test_gauss_newton_of_a_linear_head_is_the_hessian(case):
    model, net, examples, _ = case
    if len(net.flat.sizes) > 2:
        pytest.skip("the model is not linear in theta")
    H = masked.dense_hessian(model, lambda: masked.keras_risk(model, examples.x, examples.y))
    A = GaussNewton(net, examples, batch_size=4)
    V = np.random.default_rng(7).standard_normal((len(H), 2))
    assert relative_error(A @ V, H @ V) < EPSILON
    assert relative_error(A.dense(), H) < EPSILON


def test_sample_weights_leave_the_number_of_valid_positions():
    """Check that a weighted risk still divides by the number of valid positions, as in Keras.

    Keras needs weights (n, 1) for losses (n, T).
    """
    model, weight = masked.tagger(sparse()), np.random.default_rng(0).uniform(0.5, 2, N)
    net, examples = GenericNeuralNet(model), Examples(WORDS, TAGS, weight)
    net.validate(examples, "train")
    reported = model._compile_loss(tf.constant(TAGS), model(WORDS), tf.constant(weight[:, None]))
    assert net.risk(examples) == pytest.approx(float(reported), rel=EPSILON)


def test_a_compiled_function_is_masked_as_keras_masks_it():
    model = masked.tagger(quartic)
    net, examples = masked.net_of(model, WORDS, REAL)
    net.validate(examples, "train")
    reported = float(masked.keras_risk(model, WORDS, REAL))  # Keras computes this risk in float32
    assert net.risk(examples) == pytest.approx(reported, rel=1e-5)


def test_a_net_of_another_dtype_keeps_the_masses(case):
    """Check that a float32 copy of the net computes the same risk."""
    _, net, examples, _ = case
    single = net.astype("float32")
    assert single.loss.has_masses
    assert single.risk(examples) == pytest.approx(net.risk(examples), rel=1e-5)


def by_row(y, output):
    return tf.reduce_mean(tf.square(y - output), axis=[1, 2])


class Whole(keras.losses.Loss):
    def __call__(self, y_true, y_pred, sample_weight=None):
        return tf.reduce_mean(tf.square(y_true - y_pred))


@pytest.mark.parametrize("loss", [by_row, Whole(**F8), K.MeanSquaredError(reduction=None)])
def test_losses_without_positions_are_refused_for_a_mask(loss):
    model = masked.tagger("mse")
    with pytest.raises(ValueError, match="^model must not mask its output, got a mask from"):
        GenericNeuralNet(model, loss)


def test_a_mask_that_depends_on_theta_is_refused():
    x = keras.Input((STEPS, 2), **F8)
    h = L.Masking(**F8)(L.Dense(3, "relu", **F8)(x))
    model = keras.Model(x, L.Dense(3, **F8)(h))
    model.compile("sgd", sparse())
    net, examples = masked.net_of(model, VECTORS, TAGS)
    with pytest.raises(ValueError, match="^model must mask positions by its inputs alone"):
        net.validate(examples, "train")


def test_a_compiled_function_with_one_number_a_row_is_refused():
    net, examples = masked.net_of(masked.tagger(by_row), WORDS, REAL)
    with pytest.raises(ValueError, match="loss must give one number for each masked position"):
        net.validate(examples, "train")


def test_several_outputs_with_a_mask_or_an_ignored_class_are_refused():
    x = keras.Input((STEPS,), dtype="int32")
    h = L.Embedding(7, 4, mask_zero=True)(x)
    model = keras.Model(x, [L.Dense(3, name="a")(h), L.Dense(3, name="b")(h)])
    model.compile("sgd", ["mse", "mse"])
    with pytest.raises(ValueError, match="^model must not mask its outputs if there are several"):
        GenericNeuralNet(model)
    h = L.Embedding(7, 4)(x)
    model = keras.Model(x, [L.Dense(3, name="a")(h), L.Dense(3, name="b")(h)])
    loss = K.SparseCategoricalCrossentropy(True, ignore_class=2)
    model.compile("sgd", [loss, "mse"])
    y = {"a": np.full((N, STEPS), 2), "b": REAL}
    with pytest.raises(ValueError, match="must hold no class that the loss ignores, got 2"):
        GenericNeuralNet(model).validate(Examples(WORDS, y), "train")


def test_labels_outside_the_classes_are_refused_beside_the_void_label():
    y = voided(PIXELS, 255)
    y[3, 0, 0] = 7
    net, examples = masked.net_of(masked.segmenter(sparse(ignore_class=255)), IMAGES, y)
    with pytest.raises(ValueError, match=r"class numbers 0 to 2, got (.|\n)* in row 3"):
        net.validate(examples, "train")


def test_a_set_without_a_valid_position_is_refused():
    model = masked.segmenter(sparse(ignore_class=255))
    with pytest.raises(ValueError, match="^train must have a valid position"):
        Influence(model, (IMAGES, np.full_like(PIXELS, 255)))


def test_a_loss_without_masks_has_masses_of_one():
    net, examples = masked.net_of(masked.segmenter(sparse()), IMAGES, PIXELS)
    assert not net.loss.has_masses and net.mass(examples) == N
    assert not per_example("mse", None).has_masses
