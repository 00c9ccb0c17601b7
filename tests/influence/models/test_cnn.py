"""The paper's network: its size, start and risk. How it is trained is in test_adam."""

import keras
import numpy as np
import pytest
import scipy.stats
from sklearn.datasets import load_digits

from influence import Examples
from influence.models.cnn import AllCNN
from tests.influence.problems import relative_error

SMALL = {"filters": 4, "strides": (1, 2), "dtype": "float64"}


@pytest.fixture(scope="module")
def paper():
    return AllCNN()


def test_layers_and_parameters_are_the_paper_s(paper):
    layers = paper.model.layers
    convolutions = [layer for layer in layers if isinstance(layer, keras.layers.Conv2D)]
    found = [(c.filters, c.kernel_size, c.strides, c.padding) for c in convolutions]
    three = [(8, (3, 3), (s, s), "valid") for s in (1, 2, 1, 2, 1)]
    assert found == [*three, (10, (1, 1), (1, 1), "valid")]
    sizes = [28, 26, 12, 10, 4, 2, 2]
    assert [c.input.shape[1] for c in convolutions] == sizes[:-1]
    assert paper.num_parameters == 2616 and paper.dtype == np.float32
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == ["Conv2D", "Activation"] * 6 + ["GlobalAveragePooling2D", "Dense"]
    for layer in layers:
        activation = getattr(layer, "activation", None)
        expected = keras.activations.tanh if "tanh" in layer.name else keras.activations.linear
        assert activation in (None, expected)
    assert paper.outputs(np.zeros((2, 28, 28, 1), np.float32)).shape == (2, 10)


def test_it_starts_from_truncated_normals(paper):
    for layer in paper.model.layers:
        if not layer.weights:
            continue
        kernel, bias = (w.numpy() for w in layer.weights)
        fan_in = np.prod(kernel.shape[:-1])
        deviation = (1 if layer.name == "logits" else 2) / np.sqrt(fan_in)
        assert layer.kernel_initializer.stddev == pytest.approx(deviation, rel=1e-12)
        values = kernel.ravel() / deviation
        assert np.abs(values).max() <= 2 and not bias.any()
        p = scipy.stats.kstest(values, scipy.stats.truncnorm(-2, 2).cdf).pvalue
        assert p > 1e-3, layer.name  # 5 % too wide or narrow a start has p < 1e-3 only with n > 4e3
        assert np.std(values) == pytest.approx(0.88, abs=4 * 0.88 / np.sqrt(2 * values.size))


def test_the_start_follows_from_its_seed_alone(paper):
    np.random.seed(3)
    keras.utils.set_random_seed(4)
    np.testing.assert_array_equal(AllCNN().theta, paper.theta)
    other = AllCNN(seed=1).theta
    assert np.count_nonzero(other == paper.theta) == 5 * 8 + 10 + 10  # the biases
    kernels = [w.numpy() for w in paper.model.trainable_weights if w.shape == (3, 3, 8, 8)]
    assert len({kernel.tobytes() for kernel in kernels}) == 4  # same shape, own numbers


def test_the_risk_is_cross_entropy_of_logits_and_half_the_decay_times_the_kernels_squared():
    net = AllCNN((8, 8, 1), 3, weight_decay=0.3, **SMALL)
    rng = np.random.default_rng(0)
    net.theta = rng.standard_normal(net.num_parameters)
    x, y = rng.standard_normal((5, 8, 8, 1)), np.array([0, 1, 2, 2, 0])
    Z = net.outputs(x)
    log_loss = np.log(np.exp(Z).sum(axis=1)) - Z[np.arange(5), y]
    assert relative_error(net.losses(x, y), log_loss) < 1e-12
    kernels = [w.numpy() for w in net.model.trainable_weights if w.name == "kernel"]
    assert len(kernels) == 4
    penalty = 0.3 / 2 * sum(np.sum(kernel**2) for kernel in kernels)
    assert net.penalty() == pytest.approx(penalty, rel=1e-12)


def test_other_sizes():
    net = AllCNN((7, 9, 2), 4, filters=3, strides=(1, 2))
    assert net.num_parameters == (9 * 2 + 1) * 3 + (9 * 3 + 1) * 3 + (3 + 1) * 4 + (4 + 1) * 4
    assert net.outputs(np.zeros((2, 7, 9, 2), np.float32)).shape == (2, 4)


def test_it_learns_digits():
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32").reshape(-1, 8, 8, 1)
    train, test = Examples(x[:1000], y[:1000]), Examples(x[1000:1500], y[1000:1500])
    net = AllCNN((8, 8, 1), filters=8, strides=(1, 2)).fit(
        train, schedule=((300, 1e-2), (100, 1e-3)), batch_size=100
    )
    assert (net.outputs(train.x).argmax(axis=1) == train.y).mean() > 0.95
    assert (net.outputs(test.x).argmax(axis=1) == test.y).mean() > 0.85


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (((28, 28),), {}, r"^image_shape must be \(height, width, channels\), got \(28, 28\)"),
        (((28, 0, 1),), {}, r"^image_shape must be .*, got \(28, 0, 1\)"),
        (((8, 8, 1),), {}, r"^image_shape must be larger for strides \(1, 2, 1, 2, 1\), got"),
        (((4, 4, 1),), {"strides": (1, 1)}, r"^image_shape must be larger .* use fewer strides"),
        (((8, 8, 1), 1), {}, "^num_classes must be at least 2, got 1"),
        ((), {"filters": 0}, "^filters must be at least 1, got 0"),
        ((), {"strides": ()}, r"^strides must be one or more positive integers, got \(\)"),
        ((), {"strides": (1, 0)}, r"^strides must be .*, got \(1, 0\)"),
        ((), {"weight_decay": -0.1}, r"^weight_decay must be non-negative, got -0\.1"),
        ((), {"weight_decay": np.nan}, "^weight_decay must be non-negative, got nan"),
    ],
)
def test_bad_sizes(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        AllCNN(*arguments, **options)
