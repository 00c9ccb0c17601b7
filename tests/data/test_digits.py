"""Tests of the digits: the split is fixed and is marked as a stand-in."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

import data


@pytest.fixture(scope="module")
def splits():
    return data.load("digits")


def test_sizes_and_label_counts(splits):
    assert splits.train[0].shape == (1297, 64) and splits.test[0].shape == (500, 64)
    counts = [np.bincount(y).tolist() for _, y in (splits.train, splits.test)]
    total = np.bincount(load_digits(return_X_y=True)[1])
    np.testing.assert_array_equal(np.sum(counts, axis=0), total)
    assert min(counts[1]) > 35  # each class should have about 50 test rows


def test_splits_partition_the_rows(splits):
    rows = np.concatenate([splits.train[0], splits.test[0]])
    labels = np.concatenate([splits.train[1], splits.test[1]])
    found = np.column_stack([rows * 16, labels])
    expected = np.column_stack([*load_digits(return_X_y=True)])
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


def test_is_always_found():
    folder = data.find("digits")
    assert folder is not None and data.load("digits", folder).name == "digits"
