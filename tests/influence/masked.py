"""Small models with masked positions, and their risks by Keras' own loss over one batch."""

import keras
import numpy as np
import tensorflow as tf

from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet

L, K = keras.layers, keras.losses
F8 = {"dtype": "float64"}
NUM_CLASSES, STEPS, SIDE = 3, 5, 3


def tagger(loss, penalty=None, units=NUM_CLASSES, activation=None):
    """Return a model of padded sequences. Its embedding is frozen: outputs are linear in theta."""
    regulariser = keras.regularizers.L2(penalty) if penalty else None
    embedding = L.Embedding(7, 4, mask_zero=True, trainable=False, **F8)
    head = L.Dense(
        units, activation, kernel_regularizer=regulariser, bias_regularizer=regulariser, **F8
    )
    model = keras.Sequential([keras.Input((STEPS,), dtype="int32"), embedding, head])
    return _with_weights(model, loss)


def segmenter(loss, penalty=None):
    """Return a model that maps small images to a class for each pixel."""
    regulariser = keras.regularizers.L2(penalty) if penalty else None
    layer = L.Conv2D(
        NUM_CLASSES,
        2,
        padding="same",
        kernel_regularizer=regulariser,
        bias_regularizer=regulariser,
        **F8,
    )
    return _with_weights(keras.Sequential([keras.Input((SIDE, SIDE, 2), **F8), layer]), loss)


def masker(loss):
    """Return a model of two layers that masks the time steps whose inputs are all zero."""
    layers = [L.Masking(**F8), L.Dense(3, "tanh", **F8), L.Dense(NUM_CLASSES, "softmax", **F8)]
    return _with_weights(keras.Sequential([keras.Input((STEPS, 2), **F8), *layers]), loss)


def classifier(loss):
    """Return a model with one class per row."""
    model = keras.Sequential([keras.Input((4,), **F8), L.Dense(NUM_CLASSES, **F8)])
    return _with_weights(model, loss)


def _with_weights(model, loss):
    rng = np.random.default_rng(3)
    model.set_weights([rng.standard_normal(w.shape) for w in model.get_weights()])
    model.compile("sgd", loss, run_eagerly=True)
    return model


def words(n, seed=0):
    """Return word ids (n, T). Id 0 marks padding. Row 1 has only padding."""
    rng = np.random.default_rng(seed)
    x = rng.integers(1, 7, (n, STEPS))
    x[np.arange(STEPS) >= rng.integers(1, STEPS + 1, n)[:, None]] = 0
    x[1] = 0
    return x


def vectors(n, seed=0):
    """Return inputs (n, T, 2). Steps of zeros are masked. In row 1 all steps are zeros."""
    x = np.random.default_rng(seed).standard_normal((n, STEPS, 2))
    return x * (words(n, seed) != 0)[:, :, None]


def images(n, seed=0):
    """Return random images (n, h, w, 2)."""
    return np.random.default_rng(seed).standard_normal((n, SIDE, SIDE, 2))


def classes(*shape, seed=1):
    """Return random class numbers."""
    return np.random.default_rng(seed).integers(0, NUM_CLASSES, shape)


def voided(y, label, seed=2):
    """Return labels in which some entries, and all of row 1, are replaced by `label`.

    `label` is the number that marks an ignored position.
    """
    void = np.random.default_rng(seed).random(y.shape) < 0.4
    void[1] = True
    return np.where(void, label, y).astype("uint8")


def keras_loss(model, x, y):
    """Return the loss that Keras computes for these rows in one batch, without the penalty."""
    output = model(tf.constant(x), training=False)
    if isinstance(model.loss, keras.losses.Loss):
        return model.loss(tf.constant(y), output)
    return model._compile_loss(tf.constant(y), output)  # this function of Keras rounds to float32


def keras_risk(model, x, y):
    """Return Keras' loss plus the regularisers, as a tensor."""
    return tf.cast(keras_loss(model, x, y), "float64") + sum(
        tf.cast(part, "float64") for part in model.losses
    )


def slope(model, function):
    """Return the value of a function of the model's weights, and its gradient (d,)."""
    with tf.GradientTape() as tape:
        value = function()
    zero = tf.UnconnectedGradients.ZERO
    parts = tape.gradient(value, model.trainable_weights, unconnected_gradients=zero)
    return float(value), np.concatenate([np.ravel(part) for part in parts])


def dense_hessian(model, function):
    """Return the Hessian (d, d) of a function of the model's weights, by nested tapes."""
    weights = model.trainable_weights
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            value = function()
        flat = tf.concat([tf.reshape(g, [-1]) for g in inner.gradient(value, weights)], 0)
    blocks = outer.jacobian(flat, weights, experimental_use_pfor=False)
    return np.concatenate([np.reshape(block, (len(flat), -1)) for block in blocks], 1)


def net_of(model, x, y):
    """Return the net of a compiled model, and its examples."""
    return GenericNeuralNet(model), Examples(x, y)
