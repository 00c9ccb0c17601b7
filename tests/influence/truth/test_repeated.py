"""Tests of trainings repeated from a history without a row, against the same training in NumPy."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from influence import GenericNeuralNet, History, Recorder
from influence.truth import repeated
from influence.truth.repeated import retrained, why_not
from tests.influence import recorded
from tests.influence.recorded import N, descend, losses, rows

EPOCHS, BATCH = 4, 16
ROWS = [3, 20, 7]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a trained model, its history, and test rows."""
    folder = tmp_path_factory.mktemp("history")
    model = recorded.train(folder, EPOCHS, BATCH)
    return model, History.load(folder), rows(9, seed=1)


def batches(seed, without=None):
    """Yield the rows of each batch of a training, in random orders from the seed."""
    rng = np.random.default_rng(seed)
    for _ in range(EPOCHS):
        order = rng.permutation(N)
        for start in range(0, N, BATCH):
            batch = order[start : start + BATCH]
            yield batch if without is None else batch[batch != without]


def test_is_the_same_training_in_numpy(made):
    model, history, test = made
    before = [w.numpy() for w in model.variables]
    got = retrained(model, rows(), test, ROWS, history)
    x, y = rows()
    start = history.theta(0)
    for s, seed in enumerate((0, 1)):
        whole = losses(descend(start, x, y, batches(seed)), *test)
        for k, row in enumerate(ROWS):
            less = losses(descend(start, x, y, batches(seed, row)), *test)
            np.testing.assert_allclose(got.by_seed[s, :, k], less - whole, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(got.change_if_removed, got.by_seed.mean(axis=0))
    expected = np.corrcoef(got.by_seed.reshape(2, -1))[0, 1]
    assert got.reliability == pytest.approx(expected)
    assert got.rows.tolist() == ROWS
    for weight, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)


def test_all_rows_in_a_batch_are_the_recorded_training(tmp_path):
    """Check that full-batch training on all rows ends at the recorded weights."""
    model = recorded.train(tmp_path, EPOCHS)
    history = History.load(tmp_path)
    net = GenericNeuralNet(model)
    train = net.given(rows(), "train")
    with recorded.double():  # as in the recorded training, the learning rate is in float64
        training = repeated._Training(net, train, history)
        with training.running():
            training.run(0, -1)
            ended = net.theta
    np.testing.assert_allclose(ended, history.theta(EPOCHS), rtol=1e-12)
    np.testing.assert_array_equal(net.theta, history.theta(EPOCHS))


def test_adam_a_schedule_and_running_means_are_repeated(tmp_path):
    x, y = rows()

    def built():
        keras.utils.set_random_seed(0)
        # The layer has no bias. Before a normalisation, the gradient of a bias is zero, but it is
        # computed with rounding errors. Adam would divide them by their own size.
        layers = [keras.Input((4,)), keras.layers.Dense(5, use_bias=False)]
        layers.append(keras.layers.BatchNormalization())
        model = keras.Sequential([*layers, keras.layers.Dense(3, activation="softmax")])
        schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 1, 0.7)
        model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy")
        return model

    model = built()
    callback = Recorder(tmp_path, (x, y), every=1)
    model.fit(x, y, epochs=5, batch_size=N, verbose=0, callbacks=[callback])
    net, history = GenericNeuralNet(model), History.load(tmp_path)
    training = repeated._Training(net, net.given((x, y), "train"), history)
    with training.running():
        training.run(0, -1)
        again = [w.numpy() for w in model.weights]
        net.theta = net.theta + 1
    for weight, value in zip(model.weights, again, strict=True):
        np.testing.assert_allclose(weight.numpy(), value, rtol=1e-4, atol=1e-5)


def test_an_interrupted_call_goes_on(made, tmp_path, monkeypatch):
    model, history, test = made
    whole = retrained(model, rows(), test, ROWS, history, seeds=(0,))
    plain, count = repeated._Training.run, []

    def stops(training, *job):
        count.append(job)
        if len(count) == 3:
            raise KeyboardInterrupt
        return plain(training, *job)

    monkeypatch.setattr(repeated._Training, "run", stops)
    how = {"seeds": (0,), "checkpoints": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        retrained(model, rows(), test, ROWS, history, **how)
    got = retrained(model, rows(), test, ROWS, history, **how)
    np.testing.assert_array_equal(got.by_seed, whole.by_seed)
    assert [job for job in count].count((0, -1)) == 1 and len(count) == 5
    assert np.isnan(got.reliability)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda history, net: history.about.update(began=2), "begin at the start"),
        (lambda history, net: history.about.update(optimizer_steps=9), "begin at the start"),
        (lambda history, net: history.rows_seen.__setitem__(0, 7), "over the recorded rows once"),
        (lambda history, net: history.about.update(optimizer="Own"), "optimiser Own is not one"),
        (lambda history, net: history.rates.__setitem__(0, np.nan), "rate of an epoch is not"),
        (
            lambda history, net: setattr(net, "theta", net.theta + 1),
            "are not those after any",
        ),
        (lambda history, net: history.start_file.unlink(), "weights at its start are missing"),
    ],
)
def test_what_cannot_be_repeated_is_refused(tmp_path, change, reason):
    net = GenericNeuralNet(recorded.train(tmp_path, 1))
    history = History.load(tmp_path)
    train = net.given(rows(), "train")
    assert why_not(net, train, history) is None
    change(history, net)
    assert reason in str(why_not(net, train, history))
    with pytest.raises(ValueError, match="^history must be that of a training that can be repe"):
        retrained(net, train, rows(9, 1), [0], history)


def test_other_sample_weights_than_the_recorded_ones_are_refused(tmp_path):
    x, y = rows()
    weights = np.where(y == 0, 3.0, 1.0)
    model = recorded.model()
    callback = Recorder(tmp_path, (x, y, weights), every=1)
    with recorded.double():
        model.fit(x, y, sample_weight=weights, epochs=2, verbose=0, callbacks=[callback])
    net, history = GenericNeuralNet(model), History.load(tmp_path)
    assert why_not(net, net.given((x, y, weights), "train"), history) is None
    for other in ((x, y), (x, y, np.roll(weights, 1))):
        assert "other sample weights" in str(why_not(net, net.given(other, "train"), history))


def test_a_seed_must_be_given(made):
    model, history, test = made
    with pytest.raises(ValueError, match="^seeds must have at least one, got none"):
        retrained(model, rows(), test, ROWS, history, seeds=())
