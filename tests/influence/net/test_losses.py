import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf

from influence.net.losses import per_example
from tests.influence.problems import sequential

RNG = np.random.default_rng(0)
N = 5
LOGITS = RNG.standard_normal((N, 3))
LOGIT = LOGITS[:, :1]
PROBABILITIES = scipy.special.softmax(LOGITS, axis=1)
PROBABILITY = scipy.special.expit(LOGIT)
CLASSES = np.array([0, 2, 1, 1, 0])
BITS = np.array([0, 1, 1, 0, 1])
TARGET = RNG.standard_normal(N)

LOG_SOFTMAX = -scipy.special.log_softmax(LOGITS, axis=1)[np.arange(N), CLASSES]
LOG_SIGMOID = np.logaddexp(0, LOGIT[:, 0]) - BITS * LOGIT[:, 0]
SQUARES = (TARGET - LOGIT[:, 0]) ** 2


class Quartic(keras.losses.Loss):
    """A loss class as a user may write it."""

    def call(self, y_true, y_pred):
        return tf.reduce_sum((y_true - y_pred) ** 4, axis=-1)


def quartic(y, output):
    return tf.reduce_sum((y - output) ** 4, axis=-1)


K = keras.losses
SPARSE = K.SparseCategoricalCrossentropy(from_logits=True)
BINARY = K.BinaryCrossentropy(from_logits=True)


# Keras clips probabilities below 1e-7. No probability here is that small.
@pytest.mark.parametrize(
    ("loss", "y", "output", "expected"),
    [
        ("mse", TARGET, LOGIT, SQUARES),
        ("mse", TARGET[:, None], LOGIT, SQUARES),
        ("mse", TARGET, LOGIT[:, 0], SQUARES),
        ("mse", TARGET[:, None], LOGIT[:, 0], SQUARES),
        (K.MeanSquaredError(), TARGET, LOGIT[:, 0], SQUARES),
        (BINARY, BITS, LOGIT[:, 0], LOG_SIGMOID),
        ("mean_squared_error", LOGITS[::-1], LOGITS, ((LOGITS[::-1] - LOGITS) ** 2).mean(axis=1)),
        ("MeanSquaredError", TARGET, LOGIT, SQUARES),
        (K.MeanSquaredError(), TARGET, LOGIT, SQUARES),
        (K.MeanSquaredError(reduction="none"), TARGET, LOGIT, SQUARES),
        (K.Huber(delta=0.5), 9 + TARGET, LOGIT, 0.5 * (9 + TARGET - LOGIT[:, 0]) - 0.125),
        ("binary_crossentropy", BITS, PROBABILITY, LOG_SIGMOID),
        ("binary_crossentropy", BITS[:, None], PROBABILITY, LOG_SIGMOID),
        (BINARY, BITS, LOGIT, LOG_SIGMOID),
        (BINARY, BITS[:, None], LOGIT, LOG_SIGMOID),
        (K.binary_crossentropy, BITS.astype(float), PROBABILITY, LOG_SIGMOID),
        ("sparse_categorical_crossentropy", CLASSES, PROBABILITIES, LOG_SOFTMAX),
        (K.SparseCategoricalCrossentropy(), CLASSES, PROBABILITIES, LOG_SOFTMAX),
        (SPARSE, CLASSES, LOGITS, LOG_SOFTMAX),
        (SPARSE, CLASSES[:, None], LOGITS, LOG_SOFTMAX),
        (K.CategoricalCrossentropy(from_logits=True), np.eye(3)[CLASSES], LOGITS, LOG_SOFTMAX),
        (Quartic(), LOGITS[::-1], LOGITS, ((LOGITS[::-1] - LOGITS) ** 4).sum(axis=1)),
        (quartic, LOGITS[::-1], LOGITS, ((LOGITS[::-1] - LOGITS) ** 4).sum(axis=1)),
        (  # two time steps per row, each with a class; the loss averages over them
            SPARSE,
            np.stack([CLASSES, CLASSES], axis=1),
            np.stack([LOGITS, LOGITS + 3], axis=1),
            LOG_SOFTMAX,
        ),
        (  # 2 x 3 pixels per row, each with a class
            SPARSE,
            np.broadcast_to(CLASSES[:, None, None], (N, 2, 3)),
            np.broadcast_to(LOGITS[:, None, None], (N, 2, 3, 3)),
            LOG_SOFTMAX,
        ),
        (
            "mse",
            np.broadcast_to(TARGET[:, None, None], (N, 2, 3)),
            np.broadcast_to(LOGIT[:, None], (N, 2, 3)),
            SQUARES,
        ),
    ],
)
def test_one_number_per_example_in_float64(loss, y, output, expected):
    values = per_example(loss, None).function(tf.constant(y), tf.constant(output)).numpy()
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "loss", ["mse", K.MeanSquaredError(), K.mean_squared_error, ["mse"], {"only": "mse"}]
)
def test_the_compiled_loss_is_the_default(loss):
    model = sequential((2,), keras.layers.Dense(1, name="only"))
    model.compile("adam", loss)
    got = per_example(None, model)
    assert got.name == "mean_squared_error"
    np.testing.assert_allclose(got.function(TARGET, tf.constant(LOGIT)), SQUARES, rtol=1e-12)


@pytest.mark.parametrize(
    ("loss", "name", "from_logits"),
    [
        ("mse", "mean_squared_error", True),
        (K.Huber(), "huber_loss", True),
        ("binary_crossentropy", "binary_crossentropy", False),
        (K.BinaryCrossentropy(), "binary_crossentropy", False),
        (K.BinaryCrossentropy(from_logits=True), "binary_crossentropy", True),
        (K.BinaryFocalCrossentropy(), "binary_focal_crossentropy", False),
        ("categorical_crossentropy", "categorical_crossentropy", False),
        (K.CategoricalFocalCrossentropy(), "categorical_focal_crossentropy", False),
        (K.SparseCategoricalCrossentropy(), "sparse_categorical_crossentropy", False),
        (K.KLDivergence(), "kl_divergence", False),
        ("kl_divergence", "kl_divergence", False),
        (K.SparseCategoricalCrossentropy(from_logits=True, name="mine"), "mine", True),
        (quartic, "quartic", True),
    ],
)
def test_what_is_known_about_a_loss(loss, name, from_logits):
    got = per_example(loss, None)
    assert (got.name, got.from_logits) == (name, from_logits)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (None, ValueError, "loss must be given for a model that is not compiled with one"),
        ("mean_sqared", ValueError, "loss must be the name of a Keras loss, got 'mean_sqared'"),
        (
            K.MeanSquaredError(reduction="sum"),
            ValueError,
            "loss must not be reduced by a sum, got 'mean_squared_error' with reduction='sum'",
        ),
        (3, TypeError, r"loss must be a Keras loss, its name or a callable .*, got int\."),
        (["mse"], TypeError, r"loss must be .*, got list\."),
        (K.MeanSquaredError, TypeError, r"loss must be .*, got the class MeanSquaredError\."),
    ],
)
def test_what_is_no_loss(loss, error, message):
    with pytest.raises(error, match=message):
        per_example(loss, keras.Sequential())


@pytest.mark.parametrize(("loss", "kind"), [(["mse", "mae"], "list"), ({"a": 1, "b": 2}, "dict")])
def test_of_several_compiled_losses_one_must_be_passed(loss, kind):
    model = sequential((2,), keras.layers.Dense(1))
    model.loss = loss
    message = f"^loss must be given for a model .* got a {kind} of 2 compiled; pass loss=\\.$"
    with pytest.raises(ValueError, match=message):
        per_example(None, model)


@pytest.mark.parametrize(
    ("loss", "y", "message"),
    [
        (SPARSE, [0, 1, 3], r"class numbers 0 to 2, got 3 in row 2\."),
        (SPARSE, [0, -1, 1], r"class numbers 0 to 2, got -1 in row 1\."),
        (SPARSE, [[0], [1], [3]], r"class numbers 0 to 2, got \[3\] in row 2\."),
        (SPARSE, [0.0, 1.5, 2.0], r"class numbers, got 1\.5\."),
        ("sparse_categorical_crossentropy", [3], "class numbers 0 to 2, got 3 in row 0"),
        ("binary_crossentropy", [0, 1, 2], r"labels in \[0, 1\], got 2 in row 2\."),
        (BINARY, [-1, 1], r"labels in \[0, 1\], got -1 in row 0"),
        (K.BinaryFocalCrossentropy(), [0.5, 1.01], r"labels in \[0, 1\], got 1\.01 in row 1"),
    ],
)
def test_labels_out_of_range(loss, y, message):
    with pytest.raises(ValueError, match=rf"^train\.y must hold {message}"):
        per_example(loss, None).check_labels(np.array(y), (N, 3), "train")


def test_a_loss_may_name_its_own_labels_and_say_that_it_is_convex():
    loss = Quartic()
    loss.labels, loss.convex = (-1, 1), True
    checked = per_example(loss, None)
    assert checked.convex is True
    checked.check_labels(np.array([1, -1, 1]), (3, 1), "train")
    with pytest.raises(ValueError, match=r"^train\.y must hold labels -1 or 1, got 0 in row 2\."):
        checked.check_labels(np.array([1, -1, 0]), (3, 1), "train")


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (SPARSE, [0, 1, 2]),
        (SPARSE, [0.0, 1.0, 2.0]),
        (SPARSE, [True, False]),
        ("binary_crossentropy", [0.0, 0.25, 1.0]),
        ("mse", [-100.0, 100.0]),
        (quartic, [-100.0]),
    ],
)
def test_labels_in_range(loss, y):
    per_example(loss, None).check_labels(np.array(y), (N, 3), "train")


@pytest.mark.parametrize(
    ("loss", "convex"),
    [
        ("mse", True),
        ("mae", True),
        ("huber", True),
        ("log_cosh", True),
        ("squared_hinge", True),
        (SPARSE, True),
        (K.BinaryCrossentropy(from_logits=True, label_smoothing=0.1), True),
        (K.CategoricalCrossentropy(from_logits=True), True),
        ("binary_crossentropy", False),  # this loss takes probabilities, not logits
        (K.BinaryFocalCrossentropy(from_logits=True), False),
        ("cosine_similarity", False),
        # This loss is convex, but does not declare it.
        (lambda y, output: output[:, 0] ** 2, False),
    ],
)
def test_which_losses_are_known_to_be_convex_in_the_output(loss, convex):
    assert per_example(loss, None).convex is convex


@pytest.mark.parametrize("kind", ["softmax", "one-hot", "sigmoid", "two sigmoids"])
def test_curvature_of_a_saturated_cross_entropy_keeps_float32s_digits(kind):
    """Compare H u with its formula in float64, for logits so large that p is nearly 0 or 1.

    H is the Hessian of the loss by the outputs. Entry a of H u is p_a sum_b p_b (u_a - u_b). For
    each sigmoid output it is p (1 - p) u over the number of outputs.
    """
    rng = np.random.default_rng(0)
    outputs = {"softmax": 4, "one-hot": 4, "sigmoid": 1, "two sigmoids": 2}[kind]
    z = (20 * rng.standard_normal((6, outputs))).astype(np.float32)
    u, Z = rng.standard_normal(z.shape).astype(np.float32), z.astype(np.float64)
    if "sigmoid" in kind:
        loss, y = keras.losses.BinaryCrossentropy(from_logits=True), (z > 0) * 1.0
        expected = scipy.special.expit(Z) * scipy.special.expit(-Z) * u / outputs
    else:
        y = rng.integers(4, size=6)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if kind == "one-hot":
            loss, y = keras.losses.CategoricalCrossentropy(from_logits=True), np.eye(4)[y]
        p = scipy.special.softmax(Z, axis=1)
        expected = np.einsum("na,nb,nab->na", p, p, u[:, :, None] - u[:, None, :].astype(float))
    curved = per_example(loss, keras.Sequential()).curved(tf.constant(y), tf.constant(z))
    np.testing.assert_allclose(curved(tf.constant(u)), expected, rtol=2e-5)
