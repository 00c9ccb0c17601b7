"""Adam on minibatches: Kingma & Ba's algorithm, the order of the rows, interruption."""

from itertools import islice

import keras
import numpy as np
import pytest

from influence import DivergenceError, Examples, GenericNeuralNet
from influence.models import adam
from influence.models.cnn import AllCNN
from tests.influence.problems import dense_net, relative_error, ridge

SCHEDULE = ((5, 1e-2), (4, 1e-3))


def small(seed=0):
    return AllCNN((5, 5, 1), 3, filters=2, strides=(1,), seed=seed)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((11, 5, 5, 1)).astype(np.float32)
    return Examples(x, np.arange(11) % 3)


def by_hand(oracle, theta, rates):
    """Kingma & Ba (2015), algorithm 1 in the form that ends section 2, on all rows."""
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
    adam.minimise(p.net, p.train, schedule=((20, 0.05), (10, 0.01)), batch_size=99, seed=0)
    expected = by_hand(p.oracle, start, [0.05] * 20 + [0.01] * 10)
    # Keras keeps the rates and both constants in float32.
    assert relative_error(p.theta - start, expected - start) < 1e-5


def test_minibatches_are_the_rows_that_are_said():
    """One step on rows 3 and 1 is one step on those rows alone."""
    p, q = ridge(), ridge()
    rows = next(adam.batch_rows(len(p.train), 2, 5, 0))
    adam.minimise(p.net, p.train, schedule=((1, 0.1),), batch_size=2, seed=5)
    adam.minimise(q.net, q.train.take(rows), schedule=((1, 0.1),), batch_size=2, seed=0)
    assert relative_error(p.theta, q.theta) < 1e-12


@pytest.mark.parametrize(("n", "batch_size"), [(11, 3), (10, 5), (4, 4), (5, 4)])
def test_rows_are_shuffled_passes_end_to_end(n, batch_size):
    steps = 2 * n
    batches = list(islice(adam.batch_rows(n, batch_size, 7, 0), steps))
    assert all(batch.shape == (batch_size,) for batch in batches)
    passes = np.concatenate(batches).reshape(-1, n)
    for order in passes:
        assert sorted(order) == list(range(n))
    assert len({tuple(order) for order in passes}) > 1
    for first in (1, 3, n):  # from any step on as if from the first
        rest = list(islice(adam.batch_rows(n, batch_size, 7, first), steps - first))
        np.testing.assert_array_equal(rest, batches[first:])
    assert not np.array_equal(next(adam.batch_rows(n, batch_size, 8, 0)), batches[0]) or n == 4


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
    monkeypatch.setattr(adam, "_SAVE_EVERY", 2)


def stopped_after(monkeypatch, steps):
    """A `progress` that ends the world before step `steps` + 1."""

    def until(items, what, total):
        for i, item in enumerate(items):
            if i == steps:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(adam, "progress", until)


@pytest.mark.parametrize("steps", [1, 4, 7])  # before the first save, on one, in the last stage
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
        patch.setattr(adam, "progress", lambda items, what, total: taken.append(total) or items)
        again = small().fit(images, **options)
        assert taken == [9 - steps // 2 * 2]
        np.testing.assert_array_equal(again.theta, whole)
        # What is done is read, not done again.
        np.testing.assert_array_equal(small().fit(images, **options).theta, whole)
        assert taken[1] == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_all_that_training_moves_is_kept(tmp_path, monkeypatch, every_two_steps):
    """Batch statistics and dropout's generator too."""

    def net():
        keras.utils.set_random_seed(0)
        layers = keras.layers
        stack = [
            keras.Input((3,)), layers.Dense(4), layers.BatchNormalization(), layers.Dropout(0.5),
            layers.Dense(1),
        ]  # fmt: skip
        return GenericNeuralNet(keras.Sequential(stack), "mse")

    rng = np.random.default_rng(0)
    train = Examples(
        rng.standard_normal((8, 3)).astype("float32"), rng.standard_normal(8).astype("float32")
    )
    options = {"schedule": ((5, 0.1),), "batch_size": 3, "seed": 0}
    whole, again = net(), net()
    adam.minimise(whole, train, **options)
    with monkeypatch.context() as patch:
        stopped_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            adam.minimise(net(), train, checkpoints=tmp_path, **options)
    adam.minimise(again, train, checkpoints=tmp_path, **options)
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


# --- what is refused --------------------------------------------------------------------------


def test_an_infinite_risk_stops_training_and_puts_theta_back():
    net = dense_net(1, 2, "mse")
    before = net.theta
    train = Examples(np.full((4, 2), 1e200), np.zeros(4))
    message = "^the risk must stay finite, got inf at step 1 with learning rate 0.1; use a smaller"
    with pytest.raises(DivergenceError, match=message):
        adam.minimise(net, train, schedule=((5, 0.1),), batch_size=2, seed=0)
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
