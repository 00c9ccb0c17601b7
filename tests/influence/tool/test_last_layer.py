"""Tests of the refitted last layer against exact refits by NumPy and SciPy."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
import scipy.special

import data
from influence import GenericNeuralNet
from influence.net.margins import class_margins
from influence.net.penultimate import Penultimate
from influence.tool import last_layer as module
from influence.tool.last_layer import WEIGHT_DECAYS, features_of, last_layer
from tests import oracles

layers = keras.layers


def standardised(x):
    x = np.asarray(x, float)
    return oracles.with_ones((x - x.mean(axis=0)) / x.std(axis=0))


def refitted(x, y, decay, num_classes, row):
    """Return the logits of a row by an exact refit without this row."""
    make = oracles.softmax_regression if num_classes > 2 else oracles.logistic_regression
    more = (num_classes,) if num_classes > 2 else ()
    risk = make(x, y, *more, decay)
    width = num_classes if num_classes > 2 else 1
    theta = risk.without([row]).minimum(np.zeros(x.shape[1] * width))
    z = x[row] @ theta.reshape(-1, width)
    return z if width > 1 else np.array([0.0, z[0]])


@pytest.fixture(scope="module")
def digits():
    """Return ten features of 150 digits of four classes, with a tenth of the labels wrong."""
    x, y = data.load("digits").train
    rows = np.flatnonzero(np.asarray(y) < 4)[:150]
    x, y = np.asarray(x)[rows], np.asarray(y)[rows].astype(int)
    x = (x - x.mean(axis=0)) @ np.linalg.svd(x - x.mean(axis=0))[2][:10].T
    bad = np.random.default_rng(0).permutation(150)[:15]
    noisy = y.copy()
    noisy[bad] = (y[bad] + 1) % 4
    return x, noisy, bad, y


@pytest.fixture(scope="module")
def found(digits):
    return last_layer(digits[0], digits[1], 4)


def test_margins_are_those_of_exact_refits_without_the_row(digits, found):
    x, y = standardised(digits[0]), digits[1]
    for row in range(0, 150, 10):
        z = refitted(x, y, found.weight_decay, 4, row)
        exact = z[y[row]] - np.delete(z, y[row]).max()
        # `exact` is after a refit. The library takes one Newton step instead. For rows with a large
        # leverage and a wrong label, this step is a little too long or too short.
        assert found.margins[row] == pytest.approx(exact, abs=0.02 + 0.08 * abs(exact))


def test_the_weight_decay_is_the_largest_within_one_standard_error_of_exact_refits(digits, found):
    x, y = standardised(digits[0]), digits[1]
    some = np.arange(0, 150, 3)
    losses = {}
    grid = sorted(found.searched)
    least = min(grid, key=found.searched.get)
    larger = grid[grid.index(found.weight_decay) + 1]
    for decay in (least / 10, least, found.weight_decay, larger):
        z = np.stack([refitted(x, y, decay, 4, row) for row in some])
        losses[decay] = scipy.special.logsumexp(z, axis=1) - z[np.arange(len(some)), y[some]]
    mean = {decay: loss.mean() for decay, loss in losses.items()}
    assert min(mean, key=mean.get) == least
    most = mean[least] + losses[least].std() / np.sqrt(150)
    assert mean[found.weight_decay] <= most < mean[larger]
    assert found.losses.mean() == pytest.approx(found.searched[found.weight_decay])
    assert found.least[0].mean() == pytest.approx(found.searched[least])
    assert set(found.searched) <= set(WEIGHT_DECAYS)


def test_with_held_out_rows_their_loss_chooses_the_weight_decay():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((120, 30))
    y = (x[:, 0] * 3 + rng.logistic(size=120) > 0).astype(int)
    others = rng.standard_normal((500, 30))
    labels = (others[:, 0] * 3 + rng.logistic(size=500) > 0).astype(int)
    found = last_layer(x, y, 2, (others, labels))
    one = standardised(x)
    seen = oracles.with_ones((others - x.mean(axis=0)) / x.std(axis=0))
    losses = {}
    for decay in found.searched:
        theta = oracles.logistic_regression(one, y, decay).minimum(np.zeros(31))
        losses[decay] = np.logaddexp(0, np.where(labels == 1, -1, 1) * (seen @ theta))
        assert found.searched[decay] == pytest.approx(losses[decay].mean(), rel=1e-5)
    least = min(losses, key=lambda decay: losses[decay].mean())
    most = losses[least].mean() + losses[least].std() / np.sqrt(500)
    assert found.weight_decay == max(d for d in losses if losses[d].mean() <= most) > least
    np.testing.assert_allclose(found.held_out, losses[found.weight_decay], rtol=1e-4, atol=1e-6)


def test_planted_labels_come_first(digits, found):
    first = np.argsort(found.margins)[:15]
    assert np.isin(first, digits[2]).sum() >= 12


def test_two_classes_take_one_logit(digits):
    x, y = digits[0], (digits[3] % 2).astype(int)
    two = last_layer(x, y, 2)
    assert two.outputs.shape == (150, 2) and not two.outputs[:, 0].any()
    z = refitted(standardised(x), y, two.weight_decay, 2, 7)
    np.testing.assert_allclose(two.outputs[7], z, rtol=0.03, atol=0.02)
    np.testing.assert_allclose(two.probabilities.sum(axis=1), 1)


def test_residuals_of_numbers_are_exact():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((40, 3))
    y = 50 + 7 * x[:, 0] + rng.standard_normal(40)
    found = last_layer(x, y, 0, (x[:5], y[:5]))
    one, scaled = standardised(x), (y - y.mean()) / y.std()
    for row in (0, 11, 39):
        A, b = np.delete(one, row, axis=0), np.delete(scaled, row)
        w = np.linalg.solve(A.T @ A / 39 + found.weight_decay * np.eye(4), A.T @ b / 39)
        exact = y[row] - (y.mean() + y.std() * (one[row] @ w))
        assert found.residuals[row] == pytest.approx(exact, rel=1e-8)
    # The outputs of held-out rows come from a fit to all 40 rows.
    w = np.linalg.solve(one.T @ one / 40 + found.weight_decay * np.eye(4), one.T @ scaled / 40)
    left = y[:5] - (y.mean() + y.std() * (one[:5] @ w))
    np.testing.assert_allclose(found.held_out, left**2 / 2, rtol=1e-8)


def test_weights_of_numbers_count_in_exact_refits():
    rng = np.random.default_rng(2)
    x, weights = rng.standard_normal((40, 3)), rng.integers(0, 5, 40)
    y = 50 + 7 * x[:, 0] + rng.standard_normal(40)
    found = last_layer(x, y, 0, (x[:5], y[:5]), weights)
    assert found.weighted
    # A row of weight 3 counts as three equal rows.
    rows = np.repeat(np.arange(40), weights)
    mean, std = y[rows].mean(), y[rows].std()
    one = oracles.with_ones((x - x[rows].mean(axis=0)) / x[rows].std(axis=0))
    scaled, w = (y - mean) / std, weights / weights.mean()

    def refitted(keep):
        A, b = one[keep], scaled[keep]
        matrix = A.T @ (w[keep, None] * A) + len(keep) * found.weight_decay * np.eye(4)
        return np.linalg.solve(matrix, A.T @ (w[keep] * b))

    for row in (0, 11, 39):
        exact = y[row] - (mean + std * (one[row] @ refitted(np.delete(np.arange(40), row))))
        assert found.residuals[row] == pytest.approx(exact, rel=1e-8)
    left = y[:5] - (mean + std * (one[:5] @ refitted(np.arange(40))))
    np.testing.assert_allclose(found.held_out, left**2 / 2, rtol=1e-8)
    alone = last_layer(x, y, 0, None, weights)
    assert alone.searched[alone.weight_decay] == pytest.approx(
        np.average(alone.residuals**2 / 2, weights=weights)
    )


@pytest.mark.parametrize("num_classes", [2, 4])
def test_weights_of_classes_count_as_repeated_rows(digits, num_classes):
    x, y = digits[0], digits[1] % num_classes
    weights = np.random.default_rng(3).integers(0, 4, 150)
    found = last_layer(x, y, num_classes, weights=weights)
    rows = np.repeat(np.arange(150), weights)
    one = oracles.with_ones((x - x[rows].mean(axis=0)) / x[rows].std(axis=0))
    for row in range(0, 150, 25):
        others = rows[rows != row]
        # Without the row, the library multiplies the penalty by 149 / 150, whatever the row's
        # weight. The other factors give the same sum for the repeated rows.
        decay = found.weight_decay * 149 / 150 * len(rows) / len(others)
        make = oracles.softmax_regression if num_classes > 2 else oracles.logistic_regression
        more = (num_classes,) if num_classes > 2 else ()
        width = num_classes if num_classes > 2 else 1
        theta = make(one[others], y[others], *more, decay).minimum(np.zeros(11 * width))
        z = one[row] @ theta.reshape(11, width)
        z = z if width > 1 else np.array([0.0, z[0]])
        exact = z[y[row]] - np.delete(z, y[row]).max()
        # The library takes one Newton step instead of a refit, so allow the same error as above.
        assert found.margins[row] == pytest.approx(exact, abs=0.02 + 0.08 * abs(exact))
    same = last_layer(x, y, num_classes, weights=np.full(150, 0.01))
    plain = last_layer(x, y, num_classes)
    assert not same.weighted
    np.testing.assert_allclose(same.outputs, plain.outputs, rtol=1e-6, atol=1e-8)


def test_held_out_losses_are_those_of_the_refit_with_all_rows(digits):
    x, y = digits[0], digits[1]
    found = last_layer(x, y, 4, (x[:20] + 0.1, y[:20]))
    one = standardised(x)
    risk = oracles.softmax_regression(one, y, 4, found.weight_decay)
    W = risk.minimum(np.zeros(44)).reshape(11, 4)
    z = oracles.with_ones((x[:20] + 0.1 - x.mean(axis=0)) / x.std(axis=0)) @ W
    exact = scipy.special.logsumexp(z, axis=1) - z[np.arange(20), y[:20]]
    np.testing.assert_allclose(found.held_out, exact, rtol=1e-4, atol=1e-6)


def test_principal_components_that_hold_everything_change_nothing(digits, monkeypatch):
    x, y = digits[0], digits[1]
    wide = np.concatenate([x, x @ np.random.default_rng(0).standard_normal((10, 30))], axis=1)
    whole = last_layer(wide, y, 4)
    monkeypatch.setattr(module, "MOST_WEIGHTS", 4 * 21)
    fewer = last_layer(wide, y, 4)
    assert fewer.num_features == 20 and whole.num_features == 40
    assert fewer.dropped < 1e-12 and fewer.weight_decay == whole.weight_decay
    np.testing.assert_allclose(fewer.outputs, whole.outputs, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(module, "MOST_WEIGHTS", 4 * 8)
    with pytest.raises(ValueError, match="must have at most 3 classes, got 4"):
        last_layer(wide, y, 4)


def test_features_that_do_not_vary_are_refused():
    with pytest.raises(ValueError, match="features must vary between rows"):
        last_layer(np.ones((10, 3)), np.arange(10) % 2, 2)


def test_margins_are_differences_to_the_best_other_logit():
    z = np.array([[1.0, 4.0, 2.5], [1.0, 4.0, 2.5]])
    np.testing.assert_array_equal(class_margins(z, np.array([1, 0])), [1.5, -3.0])


def sequential(*stack):
    return keras.Sequential([keras.Input((6,)), *stack])


def nested():
    inner = keras.Sequential([keras.Input((5,)), layers.Dense(4, "relu"), layers.Dense(2)])
    x = keras.Input((6,))
    return keras.Model(x, layers.Softmax()(inner(layers.Dense(5, "tanh")(x))))


def test_features_are_the_inputs_of_the_last_dense_layer():
    x = np.random.default_rng(0).standard_normal((7, 6)).astype(np.float32)
    y = np.arange(7) % 2
    loss = keras.losses.SparseCategoricalCrossentropy()
    model = sequential(layers.Dense(5, "relu"), layers.Dropout(0.5), layers.Dense(2, "softmax"))
    net = GenericNeuralNet(model, loss)
    W, b = model.layers[0].get_weights()
    got = features_of(net, net.given((x, y), "train"))
    np.testing.assert_allclose(got, np.maximum(x @ W + b, 0), rtol=1e-5, atol=1e-6)

    net = GenericNeuralNet(nested(), loss)
    inner = next(part for part in net.model.layers if isinstance(part, keras.Model))
    outer = next(part for part in net.model.layers if type(part) is layers.Dense)
    W, b = outer.get_weights()
    V, a = inner.layers[0].get_weights()
    exact = np.maximum(np.tanh(x @ W + b) @ V + a, 0)
    got = features_of(net, net.given((x, y), "train"))
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-6)

    net = GenericNeuralNet(sequential(layers.Dense(2, "softmax")), loss)
    np.testing.assert_array_equal(features_of(net, net.given((x, y), "train")), x)

    frozen = sequential(
        layers.Dense(5, "relu"), layers.Dense(4, "relu"), layers.Dense(2, "softmax")
    )
    frozen.layers[0].trainable = False
    net = GenericNeuralNet(frozen, loss)
    exact = keras.Model(frozen.inputs, frozen.layers[1].output)(x, training=False)
    got = features_of(net, net.given((x, y), "train"))
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-6)


def test_a_convolution_at_the_end_is_averaged_over_its_positions():
    stack = [layers.Reshape((2, 3, 1)), layers.Conv2D(4, 2, padding="same"), layers.Conv2D(3, 1)]
    model = sequential(*stack, layers.GlobalAveragePooling2D())
    net = GenericNeuralNet(model, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    exact = keras.Model(model.inputs, model.layers[1].output)(x).numpy().mean(axis=(1, 2))
    got = features_of(net, net.given((x, np.arange(5) % 3), "train"))
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-6)


def test_a_model_without_a_known_last_layer_says_why():
    model = keras.Sequential([keras.Input((4, 2)), layers.LSTM(1)])
    net = GenericNeuralNet(model, "mse")
    rows = net.given((np.ones((3, 4, 2), np.float32), np.ones(3, np.float32)), "train")
    assert "last layer of weights is not a dense layer" in features_of(net, rows)


def test_outputs_that_are_added_have_no_penultimate_features():
    x = keras.Input((6,))
    deep = layers.Dense(2)(layers.Dense(5, "relu")(x))
    net = GenericNeuralNet(
        keras.Model(x, layers.Add()([deep, layers.Dense(2)(x)])),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    rows = net.given((np.ones((3, 6), np.float32), np.arange(3) % 2), "train")
    assert "last layer of weights is not a dense layer" in features_of(net, rows)


def test_features_are_not_averaged_over_channels():
    first = {"data_format": "channels_first"}
    stack = [layers.Conv2D(3, 2, **first), layers.GlobalAveragePooling2D(**first)]
    model = keras.Sequential([keras.Input((1, 4, 4)), *stack])
    assert Penultimate.of(SimpleNamespace(flat=SimpleNamespace(model=model))) is None
