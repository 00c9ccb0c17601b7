"""Tests of Adam's step against its formula, and of the rows of minibatches."""

from itertools import islice

import numpy as np
import pytest

from influence.minimisers import adam
from tests.influence.problems import relative_error


def test_every_step_is_kingma_and_ba_s_in_each_column():
    """Compare with the formula at the end of section 2 (Kingma & Ba 2015), for two columns."""
    rng = np.random.default_rng(0)
    theta, c = rng.standard_normal((2, 4, 2))
    moments, expected = adam.Moments.none(4, "float64"), theta.copy()
    m = v = np.zeros((4, 2))
    for t, rate in enumerate([0.05, 0.05, 0.01, 0.01], start=1):
        theta, moments = moments.step(theta, theta - c, rate)
        g = expected - c
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = rate * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        expected = expected - step * m / (np.sqrt(v) + 1e-7)
        assert moments.steps == t
        assert relative_error(theta, expected) < 1e-14


@pytest.mark.parametrize(("n", "batch_size"), [(11, 3), (10, 5), (4, 4), (5, 4)])
def test_rows_are_shuffled_passes_end_to_end(n, batch_size):
    steps = 2 * n
    batches = list(islice(adam.batch_rows(n, batch_size, 7, 0), steps))
    assert all(batch.shape == (batch_size,) for batch in batches)
    passes = np.concatenate(batches).reshape(-1, n)
    for order in passes:
        assert sorted(order) == list(range(n))
    assert len({tuple(order) for order in passes}) > 1
    for first in (1, 3, n):  # batches that start at step `first` equal the whole list from there on
        rest = list(islice(adam.batch_rows(n, batch_size, 7, first), steps - first))
        np.testing.assert_array_equal(rest, batches[first:])
    assert not np.array_equal(next(adam.batch_rows(n, batch_size, 8, 0)), batches[0]) or n == 4
