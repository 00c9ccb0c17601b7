"""Tests of the paper's network: its size, start and risk, and its training by Adam."""

import keras
import numpy as np
import pytest
import scipy.stats
from sklearn.datasets import load_digits

from influence import DivergenceError, Examples, GenericNeuralNet
from influence.minimisers.adam import batch_rows
from influence.models import cnn
from influence.models.cnn import AllCNN, train_by_adam
from tests.influence.problems import dense_net, relative_error, ridge, sequential

SMALL = {"filters": 4, "strides": (1, 2), "dtype": "float64"}
SCHEDULE = ((5, 1e-2), (4, 1e-3))


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
    other = AllCNN((7, 9, 2), 4, filters=3, strides=(1, 2))
    assert other.num_parameters == (9 * 2 + 1) * 3 + (9 * 3 + 1) * 3 + (3 + 1) * 4 + (4 + 1) * 4
    assert other.outputs(np.zeros((2, 7, 9, 2), np.float32)).shape == (2, 4)


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
        # In a kernel of more than 4,000 values, an error of 5 % in `deviation` would be detected.
        assert p > 1e-3, layer.name
        assert np.std(values) == pytest.approx(0.88, abs=4 * 0.88 / np.sqrt(2 * values.size))


def test_the_start_follows_from_its_seed_alone(paper):
    np.random.seed(3)
    keras.utils.set_random_seed(4)
    np.testing.assert_array_equal(AllCNN().theta, paper.theta)
    other = AllCNN(seed=1).theta
    # Another seed changes all weights except the biases, which start at zero. Five layers have 8
    # biases, and two have 10.
    assert np.count_nonzero(other == paper.theta) == 5 * 8 + 10 + 10
    kernels = [w.numpy() for w in paper.model.trainable_weights if w.shape == (3, 3, 8, 8)]
    # Kernels of the same shape start with different values.
    assert len({kernel.tobytes() for kernel in kernels}) == 4


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


def test_it_learns_digits():
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32").reshape(-1, 8, 8, 1)
    train, test = Examples(x[:1000], y[:1000]), Examples(x[1000:1500], y[1000:1500])
    net = AllCNN((8, 8, 1), filters=8, strides=(1, 2))
    net.fit(train, schedule=((300, 1e-2), (100, 1e-3)), batch_size=100)
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


# --- training ---------------------------------------------------------------------------------


def small(seed=0):
    return AllCNN((5, 5, 1), 3, filters=2, strides=(1,), seed=seed)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((11, 5, 5, 1)).astype(np.float32)
    return Examples(x, np.arange(11) % 3)


def by_hand(oracle, theta, rates):
    """Return theta after full-batch steps by Kingma & Ba (2015), end of section 2."""
    m = v = np.zeros_like(theta)
    for t, rate in enumerate(rates, start=1):
        g = oracle.gradient(theta)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = rate * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        theta = theta - step * m / (np.sqrt(v) + 1e-7)
    return theta


def test_every_step_is_kingma_and_ba_s_on_the_risk_with_its_penalty():
    p = ridge()
    start = p.theta + 1
    p.net.theta = start
    train_by_adam(p.net, p.train, schedule=((20, 0.05), (10, 0.01)), batch_size=99, seed=0)
    expected = by_hand(p.oracle, start, [0.05] * 20 + [0.01] * 10)
    # Keras stores the rates and Adam's two constants in float32.
    assert relative_error(p.theta - start, expected - start) < 1e-5


def test_minibatches_are_those_of_batch_rows():
    """Check that a step on a minibatch equals a step on a training set of only its rows."""
    p, q = ridge(), ridge()
    rows = next(batch_rows(len(p.train), 2, 5, 0))
    train_by_adam(p.net, p.train, schedule=((1, 0.1),), batch_size=2, seed=5)
    train_by_adam(q.net, q.train.take(rows), schedule=((1, 0.1),), batch_size=2, seed=0)
    assert relative_error(p.theta, q.theta) < 1e-12


def test_the_seed_decides_and_nothing_else(images):
    thetas = []
    for seed in (0, 0, 1):
        np.random.seed(len(thetas))
        keras.utils.set_random_seed(len(thetas))
        thetas.append(small().fit(images, schedule=SCHEDULE, batch_size=4, seed=seed).theta)
    np.testing.assert_array_equal(thetas[0], thetas[1])
    assert relative_error(thetas[2], thetas[0]) > 1e-4


# --- interruption -----------------------------------------------------------------------------


@pytest.fixture
def every_two_steps(monkeypatch):
    monkeypatch.setattr(cnn, "_SAVE_EVERY", 2)


def stopped_after(monkeypatch, steps):
    """Replace `progress` by a function that interrupts the training after the given steps."""

    def until(items, what, total):
        for i, item in enumerate(items):
            if i == steps:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(cnn, "progress", until)


# The training stops before its first save, just after a save, or in the last stage of its schedule.
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_what_was_interrupted_ends_with_the_same_bits(
    steps, images, tmp_path, monkeypatch, every_two_steps
):
    whole = small().fit(images, schedule=SCHEDULE, batch_size=4).theta
    options = {"schedule": SCHEDULE, "batch_size": 4, "checkpoints": tmp_path}
    with monkeypatch.context() as patch:
        stopped_after(patch, steps)
        with pytest.raises(KeyboardInterrupt):
            small().fit(images, **options)
    taken = []
    with monkeypatch.context() as patch:
        patch.setattr(cnn, "progress", lambda items, what, total: taken.append(total) or items)
        again = small().fit(images, **options)
        assert taken == [9 - steps // 2 * 2]
        np.testing.assert_array_equal(again.theta, whole)
        # A third call finds the finished training on disk and takes no step.
        np.testing.assert_array_equal(small().fit(images, **options).theta, whole)
        assert taken[1] == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_all_that_training_moves_is_kept(tmp_path, monkeypatch, every_two_steps):
    """Check that batch statistics and the state of dropout's generator are restored too."""

    def net():
        keras.utils.set_random_seed(0)
        layers = keras.layers
        hidden = [layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5)]
        return GenericNeuralNet(sequential((3,), *hidden, layers.Dense(1)), "mse")

    rng = np.random.default_rng(0)
    train = Examples(rng.standard_normal((8, 3), "f4"), rng.standard_normal(8, "f4"))
    options = {"schedule": ((5, 0.1),), "batch_size": 3, "seed": 0}
    whole, again = net(), net()
    train_by_adam(whole, train, **options)
    with monkeypatch.context() as patch:
        stopped_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train_by_adam(net(), train, checkpoints=tmp_path, **options)
    train_by_adam(again, train, checkpoints=tmp_path, **options)
    for ours, theirs in zip(again.model.variables, whole.model.variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_another_training_s_checkpoint_is_not_taken(images, tmp_path):
    kept = {"schedule": SCHEDULE, "batch_size": 4, "checkpoints": tmp_path}
    small().fit(images, **kept)
    other = Examples(images.x[::-1].copy(), images.y)
    trainings = [
        (small(), images, {**kept, "schedule": ((9, 1e-2),)}),
        (small(), images, {**kept, "batch_size": 5}),
        (small(), images, {**kept, "seed": 1}),
        (small(1), images, kept),
        (small(), other, kept),
        (AllCNN((5, 5, 1), 3, filters=2, strides=(1,), weight_decay=0.1), images, kept),
        (AllCNN((5, 5, 1), 3, filters=2, strides=(2,)), images, kept),
    ]
    for count, (net, examples, options) in enumerate(trainings, start=2):
        net.fit(examples, **options)
        assert len(list(tmp_path.iterdir())) == count


# --- arguments that are refused ---------------------------------------------------------------


def test_an_infinite_risk_stops_training_and_puts_theta_back():
    net = dense_net(1, 2, "mse")
    before = net.theta
    train = Examples(np.full((4, 2), 1e200), np.zeros(4))
    message = "^the risk must stay finite, got inf at step 1 with learning rate 0.1; use a smaller"
    with pytest.raises(DivergenceError, match=message):
        train_by_adam(net, train, schedule=((5, 0.1),), batch_size=2, seed=0)
    np.testing.assert_array_equal(net.theta, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": ()}, "^schedule must have at least one .steps, learning rate. pair"),
        ({"schedule": ((0, 0.1),)}, r"^schedule must be .* integer steps, got \(0, 0\.1\)"),
        ({"schedule": ((2.5, 0.1),)}, r"^schedule must be .*, got \(2\.5, 0\.1\)"),
        ({"schedule": ((True, 0.1),)}, r"^schedule must be .*, got \(True, 0\.1\)"),
        ({"schedule": ((3, 0.0),)}, r"^schedule must have positive learning .*, got \(3, 0\.0\)"),
        ({"schedule": ((3, np.nan),)}, "^schedule must have positive learning rates, got .*nan"),
        ({"batch_size": 0}, "^batch_size must be a positive integer, got 0"),
        ({"batch_size": 2.0}, r"^batch_size must be a positive integer, got 2\.0"),
        ({"batch_size": True}, "^batch_size must be a positive integer, got True"),
    ],
)
def test_bad_arguments(options, message, images):
    with pytest.raises(ValueError, match=message):
        small().fit(images, **{"schedule": SCHEDULE, **options})


def test_examples_that_do_not_fit_are_refused_first(images):
    with pytest.raises(ValueError, match=r"^examples\.y must hold class numbers 0 to 2, got 3"):
        small().fit(Examples(images.x, images.y + 1), schedule=SCHEDULE)
