"""The digits: a fixed split, marked as a stand-in."""

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
    assert min(counts[1]) > 35  # about 50 +- 6 are expected: each class is tested


def test_splits_partition_the_rows(splits):
    rows = np.concatenate([splits.train[0], splits.test[0]])
    labels = np.concatenate([splits.train[1], splits.test[1]])
    found = np.column_stack([rows * 16, labels])
    expected = np.column_stack([*load_digits(return_X_y=True)])
    np.testing.assert_array_equal(found[np.lexsort(found.T)], expected[np.lexsort(expected.T)])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtypes_and_digest(dtype):
    splits = data.load("digits", dtype=dtype)
    assert splits.train[0].dtype == np.dtype(dtype) and splits.train[1].dtype == np.int64
    # k/16 is exact in both dtypes, so both have the same digest. It depends on the split too.
    assert splits.sha256 == "ab30b8e97a09fc4508926666ae70264ec9c09c32c599b9168d122286ad613e49"
    assert splits.stand_in


def test_is_always_found():
    folder = data.find("digits")
    assert folder is not None and data.load("digits", folder).name == "digits"
