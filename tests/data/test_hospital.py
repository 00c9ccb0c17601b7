"""Tests of the generated hospital stays.

They are the same on every machine and are marked as a stand-in.
"""

import numpy as np
import pytest

import data


@pytest.fixture(scope="module")
def splits():
    return data.load("hospital")


def column(splits, name):
    return splits.feature_names.index(name)


def test_sizes_labels_and_children(splits):
    (x, y), (x_test, y_test) = splits.train, splits.test
    assert x.shape == (4000, 29) and x_test.shape == (1000, 29)
    assert np.bincount(y).tolist() == [2000, 2000]
    child = column(splits, "age_[0-10)")
    assert (x[:, child].sum(), y[x[:, child] == 1].sum()) == (24, 3)
    assert (x_test[:, child].sum(), y_test[x_test[:, child] == 1].sum()) == (40, 0)
    ages = [name.startswith("age_") for name in splits.feature_names]
    np.testing.assert_array_equal(x[:, ages].sum(axis=1), 1)


def test_test_rows_come_as_they_are(splits):
    # Of the adults, 25 to 35 % are readmitted. Of the patients who died, fewer than 10 % are.
    x, y = splits.test
    adults = x[:, column(splits, "age_[0-10)")] == 0
    died = x[:, column(splits, "discharge_disposition_id_11")] == 1
    assert 0.25 < y[adults].mean() < 0.35
    assert 30 < died.sum() < 75 and y[died].mean() < 0.1


def test_no_row_is_in_both_splits(splits):
    # A few test rows may equal a training row by chance. If the split were wrong, many would.
    rows = [set(map(tuple, x)) for x, _ in (splits.train, splits.test)]
    assert len(rows[0] & rows[1]) < 10
