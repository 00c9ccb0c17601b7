"""Tests of continued training without a row: Adam by hand, interruption, blocks and bad input."""

from itertools import islice

import numpy as np
import pytest

from influence import ContinuedOptions, DivergenceError, Examples, continued_training
from influence.minimisers.adam import Moments, batch_rows
from influence.models.cnn import AllCNN, train_by_adam
from influence.truth import continued
from tests.influence.problems import relative_error, ridge

STEPS, RATE = 7, 0.01


def by_hand(p, theta, moments, removed, batch_size, seed):
    """Return theta after STEPS of Adam (Kingma & Ba 2015), with `removed` left out of minibatches.

    The minibatches are those of `batch_rows`. `removed` = None leaves nothing out.
    """
    m, v = moments.first.copy(), moments.second.copy()
    rows = batch_rows(len(p.train), batch_size, seed, 0)
    for t in range(moments.steps + 1, moments.steps + STEPS + 1):
        left = [row for row in next(rows) if row != removed]
        g = (
            p.oracle.gradients(theta)[left].mean(axis=0)
            + p.net.penalty_gradient(theta[:, None])[:, 0]
        )
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = RATE * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        theta = theta - step * m / (np.sqrt(v) + 1e-7)
    return theta


def train_on(p, rows, moments, **options):
    given = {"steps": STEPS, "rate": RATE, "moments": moments, "at": (2, 4)}
    return continued_training(p.net, p.train, p.test, rows, ContinuedOptions(**options), **given)


@pytest.fixture(scope="module")
def trained():
    p = ridge()
    p.net.theta = p.theta + 1
    moments = train_by_adam(p.net, p.train, schedule=((20, 0.05),), batch_size=5, seed=3)
    return p, moments


@pytest.mark.parametrize(("batch_size", "rows"), [(5, [4, 0, 7]), (7, [33, 4])])
def test_is_adam_without_the_row_less_adam_with_it(trained, batch_size, rows):
    p, moments = trained
    theta = p.net.theta
    # The order ends one pass with row 33 and begins the next with it, so a batch of 7 has it twice.
    if batch_size == 7:
        straddling = list(islice(batch_rows(40, 7, 0, 0), STEPS))[5]
        assert np.count_nonzero(straddling == 33) == 2
    found = train_on(p, rows, moments, batch_size=batch_size)

    def losses(removed):
        p.net.theta = by_hand(p, theta, moments, removed, batch_size, 0)
        try:
            return p.net.losses(p.test.x, p.test.y)
        finally:
            p.net.theta = theta

    control = losses(None)
    expected = np.stack([losses(row) - control for row in rows], axis=1)
    assert relative_error(found[:], expected) < 1e-9
    assert relative_error(found.drift, control - p.net.losses(p.test.x, p.test.y)) < 1e-9
    np.testing.assert_array_equal(p.net.theta, theta)
    assert found.steps == STEPS and found.rate == RATE
    np.testing.assert_array_equal(found.rows, rows)


def test_moments_are_those_of_keras(trained):
    """Check that continued training on all rows equals one more stage of Keras' training."""
    p, _ = trained
    q = ridge()
    q.net.theta = start = q.theta + 1
    train_by_adam(q.net, q.train, schedule=((20, 0.05), (STEPS, RATE)), batch_size=99, seed=0)
    expected = q.net.losses(q.test.x, q.test.y)
    q.net.theta = start
    moments = train_by_adam(q.net, q.train, schedule=((20, 0.05),), batch_size=99, seed=0)
    before = q.net.losses(q.test.x, q.test.y)
    found = train_on(q, [0], moments, batch_size=99)
    # Keras stores the rates and Adam's two constants in float32.
    assert relative_error(found.drift, expected - before) < 1e-4


@pytest.mark.parametrize("options", [{"block": 1}, {"block": 3}])
def test_blocks_and_order_change_nothing(trained, options):
    p, moments = trained
    whole = train_on(p, [4, 0, 7], moments, batch_size=5)
    other = train_on(p, [7, 4, 0], moments, batch_size=5, **options)
    np.testing.assert_allclose(other[:], whole[:][:, [2, 0, 1]], atol=1e-14)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_what_was_interrupted_ends_with_the_same_bits(trained, steps, tmp_path, monkeypatch):
    p, moments = trained
    whole = train_on(p, [4, 0, 7], moments, batch_size=5, block=2)
    monkeypatch.setattr(continued, "_SAVE_EVERY", 2)

    def until(items, what, total):
        for i, item in enumerate(items):
            if i == steps:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(continued, "progress", until)
        with pytest.raises(KeyboardInterrupt):
            train_on(p, [4, 0, 7], moments, batch_size=5, block=2, checkpoints=tmp_path)
    again = train_on(p, [4, 0, 7], moments, batch_size=5, block=2, checkpoints=tmp_path)
    np.testing.assert_array_equal(again[:], whole[:])
    np.testing.assert_array_equal(again.drift, whole.drift)
    np.testing.assert_array_equal(again.changes_at, whole.changes_at)


def test_changes_along_the_way_are_those_of_fewer_steps(trained):
    p, moments = trained
    found = train_on(p, [4, 0, 7], moments, batch_size=5)
    assert found.at == (2, 4) and found.changes_at.shape == (2, len(p.test), 3)
    options = ContinuedOptions(batch_size=5)
    for steps, changes in zip(found.at, found.changes_at, strict=True):
        fewer = continued_training(
            p.net, p.train, p.test, [4, 0, 7], options, steps=steps, rate=RATE, moments=moments
        )
        np.testing.assert_allclose(changes, fewer[:], rtol=1e-12, atol=1e-15)


def test_of_a_convolutional_network():
    rng = np.random.default_rng(0)
    examples = Examples(rng.normal(size=(11, 5, 5, 1)).astype("f4"), np.arange(11) % 3)
    net = AllCNN((5, 5, 1), 3, filters=2, strides=(1,))
    assert net.moments is None
    net.fit(examples, schedule=((5, 1e-2),), batch_size=4)
    assert net.moments.steps == 5
    few, options = examples.take([1, 2]), ContinuedOptions(batch_size=11)
    found = continued_training(
        net, examples, few, [3], options, steps=3, rate=1e-3, moments=net.moments
    )
    other = AllCNN((5, 5, 1), 3, filters=2, strides=(1,))
    other.fit(examples, schedule=((5, 1e-2),), batch_size=4)
    moments, theta = other.moments, other.theta[:, None]
    rest = examples.without([3])
    for _ in range(3):
        theta, moments = moments.step(theta, other.risk_gradient(rest, theta), 1e-3)
    before = other.losses(few.x, few.y)
    change = other.losses(few.x, few.y, theta)[:, 0] - before
    np.testing.assert_allclose(found[:, 0] + found.drift, change, atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"steps": 1.5}, "steps must be a positive integer, got 1.5"),
        ({"rate": 0.0}, "rate must be positive, got 0.0"),
        ({"at": (2, 3)}, r"at must be increasing positive integers below steps, 2, got \[2, 3\]"),
        ({"at": (1, 1)}, "at must be increasing positive integers"),
        ({"moments": Moments(0, np.zeros(2), np.zeros(2))}, "moments must be of"),
    ],
)
def test_bad_input_is_refused(trained, options, message):
    p, _ = trained
    with pytest.raises(ValueError, match="batch_size must be at least 3"):
        ContinuedOptions(batch_size=2)
    with pytest.raises(ValueError, match=message):
        continued_training(p.net, p.train, p.test, [0], **{"steps": 2, "rate": 0.1, **options})


def test_what_is_not_finite_is_named():
    p = ridge()
    with np.errstate(all="ignore"), pytest.raises(DivergenceError, match="use a smaller rate"):
        continued_training(p.net, p.train, p.test, [0], steps=3, rate=1e308)
