"""Small trainings that a Recorder records, and callbacks that watch or interrupt them."""

from __future__ import annotations

import keras
import numpy as np

from influence import Examples, History, Recorder

N, EPOCHS, BATCH = 90, 5, 16


def rows(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((N, 6)).astype(np.float32)
    return x, (x @ rng.standard_normal((6, 3))).argmax(axis=1)


def built(units=3, activation="softmax", loss="sparse_categorical_crossentropy", optimizer=None):
    """Return a network with batch normalisation and dropout, equal in every call."""
    keras.utils.set_random_seed(3)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="tanh"),
            layers.BatchNormalization(),
            layers.Dropout(0.2, seed=1),
            layers.Dense(units, activation=activation),
        ]
    )
    model.compile(optimizer or keras.optimizers.SGD(0.1, momentum=0.5), loss)
    return model


class Watch(keras.callbacks.Callback):
    """Callback that stores Keras' predictions for all rows, and theta, after each epoch."""

    def __init__(self, x):
        super().__init__()
        self.x, self.outputs, self.thetas = x, [], []

    def on_epoch_end(self, epoch, logs=None):
        self.outputs.append(self.model.predict(self.x, verbose=0))
        self.thetas.append(start(self.model))


def trained(folder, model, train, weight=None, epochs=EPOCHS, **options):
    """Train with a Recorder. Return the history and the `Watch` of the same training."""
    x, y = train
    examples = train if weight is None else Examples(x, y, weight)
    watch = Watch(x)
    options = {"every": 1} | options
    callbacks = [Recorder(folder, examples, **options), watch]
    model.fit(
        x, y, sample_weight=weight, epochs=epochs, batch_size=BATCH, verbose=0, callbacks=callbacks
    )
    return History.load(folder), watch


def start(model):
    return np.concatenate([np.ravel(w.numpy()) for w in model.trainable_weights])


class Stop(keras.callbacks.Callback):
    """Callback that raises an error in the middle of an epoch, or at its end."""

    def __init__(self, epoch, batch=None):
        super().__init__()
        self.epoch, self.batch, self.now = epoch, batch, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if self.now == self.epoch and self.batch is not None and batch >= self.batch:
            raise KeyboardInterrupt

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch and self.batch is None:
            raise KeyboardInterrupt


def fit(folder, callbacks, epochs=4, model=None, **options):
    """Train without dropout and shuffling. An interruption then changes no number."""
    x, y = rows()
    if model is None:
        keras.utils.set_random_seed(3)
        layers = [keras.Input((6,)), keras.layers.Dense(5, activation="tanh")]
        layers += [keras.layers.BatchNormalization(), keras.layers.Dense(3, activation="softmax")]
        model = keras.Sequential(layers)
        loss = "sparse_categorical_crossentropy"
        model.compile(keras.optimizers.Adam(0.01), loss)
    options = {"shuffle": False, "batch_size": BATCH, "verbose": 0} | options
    recorder = Recorder(folder, (x, y), every=1)
    model.fit(x, y, epochs=epochs, callbacks=callbacks(recorder), **options)
    return model
