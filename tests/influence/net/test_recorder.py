"""Tests of the record of a training against Keras' own predictions and losses."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from influence import Examples, GenericNeuralNet, History, Recorder, class_weights
from influence.common import checkpoint
from influence.net import history as module
from tests.influence.net.trainings import BATCH, EPOCHS, N, Stop, built, fit, rows, start, trained


def test_margins_and_losses_are_those_of_keras_predictions(first):
    x, y = rows()
    found, watch = first
    p = np.array(watch.outputs, np.float64)
    own = np.log(p[:, np.arange(N), y])
    others = np.log(p)
    others[:, np.arange(N), y] = -np.inf
    assert found.kind == "classes"
    np.testing.assert_allclose(found.margins, own - others.max(axis=2), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.losses, -own, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(found.epochs, [1, 2, 3, 4, 5])
    np.testing.assert_array_equal(found.thetas[1:], watch.thetas)
    np.testing.assert_array_equal(found.checkpoints, [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(found.thetas[0], start(built()))
    np.testing.assert_allclose(found.area(), (own - others.max(axis=2)).mean(axis=0), atol=1e-5)


def test_the_recipe_is_that_of_the_training(first):
    found, _ = first
    assert found.batch_size == BATCH
    np.testing.assert_array_equal(found.steps, [6] * EPOCHS)
    np.testing.assert_array_equal(found.rows_seen, [N] * EPOCHS)
    np.testing.assert_allclose(found.rates, [0.1] * EPOCHS, rtol=1e-6)
    about = found.about
    assert about["optimizer"] == "SGD" and about["optimizer_config"]["momentum"] == 0.5
    assert about["seed"] == 3 and about["order"].startswith("not known")
    assert about["versions"]["keras"] == keras.__version__
    assert about["data"] == Examples(*rows()).fingerprint
    assert found.notes == () and found.sample_weight is None
    # The damping is (1 - momentum) / (eta T), with the learning rate eta = 0.1 and T steps: 5
    # epochs of 6 steps.
    assert found.damping() == pytest.approx(0.5 / (0.1 * 30), rel=1e-6)


def test_learned_is_the_epoch_from_which_a_margin_stays_positive(first):
    found, _ = first
    for row, epoch in enumerate(found.learned()):
        right = found.margins[:, row] > 0
        if epoch == 0:
            assert not right[-1]
        else:
            assert right[epoch - 1 :].all() and (epoch == 1 or not right[epoch - 2])
    assert 0 < np.count_nonzero(found.learned()) < N


def test_one_logit_has_the_sign_of_the_label(tmp_path):
    x, y = rows()
    y = (y > 0).astype(np.float32)
    found, watch = trained(tmp_path, built(1, "sigmoid", "binary_crossentropy"), (x, y))
    p = np.array(watch.outputs, np.float64)[..., 0]
    logits = np.log(p) - np.log1p(-p)
    assert found.kind == "binary"
    np.testing.assert_allclose(found.margins, np.where(y > 0, logits, -logits), atol=1e-5)
    np.testing.assert_allclose(
        found.losses, -np.log(np.where(y > 0, p, 1 - p)), rtol=1e-4, atol=1e-6
    )


def test_several_labels_have_the_least_signed_logit(tmp_path):
    x, _ = rows()
    y = (np.random.default_rng(1).random((N, 3)) > 0.5).astype(np.float32)
    found, watch = trained(tmp_path, built(3, "sigmoid", "binary_crossentropy"), (x, y))
    p = np.array(watch.outputs, np.float64)
    logits = np.log(p) - np.log1p(-p)
    expected = np.where(y > 0, logits, -logits).min(axis=2)
    np.testing.assert_allclose(found.margins, expected, atol=1e-5)


def test_a_number_has_minus_its_residual(tmp_path):
    x, _ = rows()
    y = (x @ np.arange(12).reshape(6, 2)).astype(np.float32)
    found, watch = trained(tmp_path, built(2, None, "mse", "adam"), (x, y))
    gap = np.array(watch.outputs, np.float64) - y
    assert found.kind == "residual"
    np.testing.assert_allclose(found.margins, -np.linalg.norm(gap, axis=2), rtol=1e-5)
    np.testing.assert_allclose(found.losses, (gap**2).mean(axis=2), rtol=1e-5)
    with pytest.raises(ValueError, match="^history must be one of classes"):
        found.learned()
    with pytest.raises(ValueError, match=r"^history must be that of SGD .* got Adam"):
        found.damping()


def test_weights_multiply_losses_and_not_margins(tmp_path):
    x, y = rows()
    weight = class_weights(y, {0: 3.0, 1: 0.5})
    found, watch = trained(tmp_path, built(), (x, y), weight)
    p = np.array(watch.outputs, np.float64)
    own = p[:, np.arange(N), y]
    np.testing.assert_allclose(found.losses, -np.log(own) * weight, rtol=1e-4, atol=1e-6)
    p[:, np.arange(N), y] = 0
    np.testing.assert_allclose(found.margins, np.log(own) - np.log(p.max(axis=2)), atol=1e-4)
    np.testing.assert_array_equal(found.sample_weight, weight)


def test_two_inputs_and_two_outputs(tmp_path):
    x, y = rows()
    keras.utils.set_random_seed(0)
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    hidden = keras.layers.Dense(5, activation="tanh")(keras.layers.Concatenate()([a, b]))
    one = keras.layers.Dense(3, name="one")(hidden)
    two = keras.layers.Dense(1, activation="sigmoid", name="two")(hidden)
    model = keras.Model([a, b], {"one": one, "two": two})
    sparse = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    losses = {"one": sparse, "two": "binary_crossentropy"}
    model.compile("adam", losses, loss_weights={"one": 2.0, "two": 0.5})
    inputs = {"a": x[:, :4], "b": x[:, 4:]}
    labels = {"one": y, "two": (y > 1).astype(np.float32)}
    callback = Recorder(tmp_path, Examples(inputs, labels), every=1)
    model.fit(inputs, labels, epochs=2, verbose=0, callbacks=[callback])
    found = History.load(tmp_path)
    out = model.predict(inputs, verbose=0)
    z, p = out["one"].astype(float), out["two"][:, 0].astype(float)
    own = z[np.arange(N), y]
    others = z.copy()
    others[np.arange(N), y] = -np.inf
    logit = np.log(p) - np.log1p(-p)
    second = np.where(y > 1, logit, -logit)
    np.testing.assert_allclose(
        found.margins[-1], np.minimum(own - others.max(axis=1), second), atol=1e-5
    )
    loss = np.log(np.exp(z).sum(axis=1)) - own
    bce = np.log1p(np.exp(-second))
    np.testing.assert_allclose(found.losses[-1], 2 * loss + 0.5 * bce, rtol=1e-4, atol=1e-5)


def test_lookups_in_front_and_a_frozen_trunk(tmp_path):
    _, y = rows()
    words = np.array(["a b", "b c", "c a d"])[y]
    given = tf.constant(words)  # Keras does not take a NumPy array of strings
    lookup = keras.layers.TextVectorization(output_mode="multi_hot")
    lookup.adapt(words)
    frozen = keras.layers.Dense(4, activation="tanh", trainable=False)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((), dtype="string"), lookup, frozen])
    model.add(keras.layers.Dense(3))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    model.fit(given, y, epochs=2, verbose=0, callbacks=[Recorder(tmp_path, (words, y), every=1)])
    z = model.predict(given, verbose=0).astype(float)
    own = z[np.arange(N), y]
    expected = np.log(np.exp(z).sum(axis=1)) - own
    np.testing.assert_allclose(History.load(tmp_path).losses[-1], expected, rtol=1e-4)


def test_running_means_in_front_of_the_weights_are_followed(tmp_path):
    x, y = rows()
    keras.utils.set_random_seed(0)
    norm = keras.layers.BatchNormalization(center=False, scale=False, momentum=0.5)
    first = keras.layers.Dense(4, trainable=False)
    model = keras.Sequential([keras.Input((6,)), first, norm, keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    found, watch = trained(tmp_path, model, (10 * x + 5, y))
    z = np.array(watch.outputs, np.float64)
    expected = np.log(np.exp(z).sum(axis=2)) - z[:, np.arange(N), y]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_mixed_precision_is_followed(tmp_path):
    x, y = rows()
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = built(loss="sparse_categorical_crossentropy")
    finally:
        keras.config.set_dtype_policy(before)
    found, watch = trained(tmp_path, model, (x, y), epochs=2)
    p = np.array(watch.outputs, np.float64)[:, np.arange(N), y]
    np.testing.assert_allclose(found.losses, -np.log(p), atol=0.05)  # bfloat16 has 2 to 3 digits
    np.testing.assert_array_equal(found.thetas[-1], watch.thetas[-1])


# --- the time of recording ------------------------------------------------------------------------


class Clock:
    """A fake clock. Each training step takes a second, and each recorded row takes extra time."""

    def __init__(self, monkeypatch, per_pass, growth=0.0):
        self.now, self.per_pass, self.growth = 0.0, per_pass, growth
        monkeypatch.setattr(Recorder, "_clock", staticmethod(lambda: self.now))
        plain = Recorder._passed

        def passed(recorder):
            self.now += self.per_pass
            self.per_pass += self.growth
            return plain(recorder)

        monkeypatch.setattr(Recorder, "_passed", passed)


class Tick(keras.callbacks.Callback):
    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def on_train_batch_begin(self, batch, logs=None):
        self.clock.now += 1.0


@pytest.mark.parametrize(
    ("per_pass", "expected"),
    [
        # An epoch takes 6 s. At 1.5 s for each pass over the rows, every epoch can be recorded.
        (1.5, list(range(1, 17))),
        (1.6, None),
        (3.0, None),
        (200.0, [1, 16]),
    ],
)
def test_recording_takes_a_quarter_of_the_time(tmp_path, monkeypatch, per_pass, expected):
    clock = Clock(monkeypatch, per_pass)
    fit(tmp_path, lambda recorder: [_timed(recorder), Tick(clock)], epochs=16)
    found = History.load(tmp_path)
    assert found.seconds[:, 0].sum() == 16 * 6
    assert found.seconds[:, 1].sum() == pytest.approx(per_pass * len(found.epochs))
    if expected is not None:
        assert found.epochs.tolist() == expected
    else:
        assert found.epochs[0] == 1 and found.epochs[-1] == 16 and 2 < len(found.epochs) < 16
        assert found.share <= 0.25
        # The allowed share of the time is a quarter. The rule must also use a good part of it.
        assert found.share > 0.1
        assert "epochs were not recorded" in found.notes[0]
    assert found.share <= 0.25 or len(found.epochs) == 2


def test_a_pass_that_becomes_slower_is_made_less_often(tmp_path, monkeypatch):
    clock = Clock(monkeypatch, 1.0, growth=0.5)
    fit(tmp_path, lambda recorder: [_timed(recorder), Tick(clock)], epochs=32)
    found = History.load(tmp_path)
    assert found.share <= 0.25 and found.epochs[-1] == 32
    assert np.diff(found.epochs).max() > np.diff(found.epochs)[0]


@pytest.mark.parametrize(("every", "expected"), [(1, [1, 2, 3, 4, 5]), (3, [1, 4, 5])])
def test_every_by_name_switches_the_rule_off(tmp_path, monkeypatch, every, expected):
    clock = Clock(monkeypatch, 1e6)
    model = built()
    x, y = rows()
    callbacks = [Recorder(tmp_path, (x, y), every=every), Tick(clock)]
    model.fit(x, y, epochs=5, verbose=0, callbacks=callbacks)
    assert History.load(tmp_path).epochs.tolist() == expected


def _timed(recorder):
    recorder._every = None
    return recorder


def test_the_last_epoch_is_recorded_if_training_stops_early(tmp_path):
    class Early(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 4

    x, y = rows()
    for name, order in (("after", 1), ("before", -1)):
        model = built()
        callbacks = [Recorder(tmp_path / name, (x, y), every=3), Early()][::order]
        model.fit(x, y, epochs=9, verbose=0, callbacks=callbacks)
        found = History.load(tmp_path / name)
        assert found.epochs.tolist() == [1, 4, 5]
        np.testing.assert_array_equal(found.thetas[-1], start(model))


def test_weights_are_kept_as_asked(tmp_path, monkeypatch):
    found, _ = trained(tmp_path / "none", built(), rows(), epochs=2, keep_weights=False)
    assert found.checkpoints.tolist() == [0] and len(found.epochs) == 2
    with pytest.raises(ValueError, match=r"^epoch must be one of \[0\], .* got 2"):
        found.theta(2)
    monkeypatch.setattr("influence.net.recorder._MOST_BYTES", 1000)
    found, _ = trained(tmp_path / "large", built(), rows(), epochs=2)
    assert found.checkpoints.tolist() == [0]
    found, _ = trained(tmp_path / "all", built(), rows(), epochs=2, keep_weights=True)
    assert found.checkpoints.tolist() == [0, 1, 2]


# --- arguments that are refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"folder": 3}, TypeError, "^folder must be a path, got int"),
        ({"every": 0}, ValueError, "^every must be a positive integer or None, got 0"),
        ({"keep_weights": 3}, ValueError, "^keep_weights must be True, False or None, got 3"),
        ({"train": (row for row in ())}, TypeError, "^train must have rows in an order that stays"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, error, message):
    given = {"folder": tmp_path, "train": rows()} | options
    with pytest.raises(error, match=message):
        Recorder(given.pop("folder"), given.pop("train"), **given)


@pytest.mark.parametrize(
    ("train", "error", "message"),
    [
        (lambda x, y: (x, y + 1), ValueError, r"^train.y must hold class numbers 0 to 2, got 3"),
        (lambda x, y: x, TypeError, r"^train must be Examples\(x, y\), got ndarray"),
        (lambda x, y: (x[:, :3], y), ValueError, r"^train.x must have .*shape .*6"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_training(tmp_path, train, error, message):
    x, y = rows()
    with pytest.raises(error, match=message):
        built().fit(x, y, verbose=0, callbacks=[Recorder(tmp_path, train(x, y)), Stop(0, 0)])
    assert not list(tmp_path.iterdir())


def test_other_rows_than_those_of_fit_are_said(tmp_path):
    x, y = rows()
    with pytest.warns(UserWarning, match="^train has 90 rows, but the first epoch trained on 72"):
        callback = Recorder(tmp_path, (x, y))
        built().fit(x, y, validation_split=0.2, verbose=0, callbacks=[callback])
    found = History.load(tmp_path)
    assert found.rows_seen.tolist() == [72] and "had 72 rows" in found.notes[0]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("dataset", [False, True])
def test_another_callbacks_evaluate_does_not_change_the_number_of_rows(tmp_path, order, dataset):
    x, y = rows()

    class Asks(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.evaluate(x[:7], y[:7], verbose=0)

    callbacks = [Asks(), Recorder(tmp_path, (x, y), every=1)][::order]
    # After `filter`, Keras does not know the number of batches before the first epoch has ended.
    if dataset:
        given = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
        given = given.filter(lambda x, y: tf.shape(y)[0] > 0)
        built().fit(given, epochs=3, verbose=0, callbacks=callbacks)
    else:
        built().fit(x, y, epochs=3, batch_size=BATCH, verbose=0, callbacks=callbacks)
    found = History.load(tmp_path)
    assert found.rows_seen.tolist() == [N] * 3 and found.batch_size == BATCH
    assert found.steps.tolist() == [6] * 3
    assert found.notes == ()


def test_a_folder_without_a_history_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^history must be a folder that influence.Recorder wrote"):
        History.load(tmp_path)
    with pytest.raises(TypeError, match="^folder must be a path"):
        History.load(3)  # type: ignore[arg-type]
    trained(tmp_path, built(), rows(), epochs=1)
    header = tmp_path / module.HEADER
    about = json.loads(str(checkpoint.load(header)["about"]))
    checkpoint.store(header, {"about": np.array(json.dumps(about | {"format": 99}))})
    with pytest.raises(ValueError, match="^history must have format 1, got 99"):
        History.load(tmp_path)


def test_rows_and_nets_of_another_training_are_refused(first):
    found, _ = first
    x, y = rows()
    found.check_rows(Examples(x.astype(float), y.astype(np.uint8)))  # equal labels of another dtype
    with pytest.raises(ValueError, match="^train must have the 90 rows of the history"):
        found.check_rows(Examples(x[1:], y[1:]))
    with pytest.raises(ValueError, match="^train must have the labels of the history"):
        found.check_rows(Examples(x, np.roll(y, 1)))
    with pytest.raises(ValueError, match="^net must have the .* weights of the history"):
        found.check_net(GenericNeuralNet(built(4)))


def test_a_schedule_has_its_mean_rate(tmp_path):
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 12, 0.0)
    found, _ = trained(tmp_path, built(optimizer=keras.optimizers.SGD(schedule)), rows(), epochs=2)
    expected = 0.1 * (1 - np.arange(12) / 12).reshape(2, 6).mean(axis=1)
    np.testing.assert_allclose(found.rates, expected, rtol=1e-5)
