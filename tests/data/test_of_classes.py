"""Tests of `Splits.of_classes`, which makes a problem of two classes from the digits."""

import numpy as np
import pytest
import scipy.sparse

from data.splits import Splits


def splits(form=np.asarray):
    y = np.array([1, 7, 3, 7, 1, 1])
    train = form(np.arange(12.0).reshape(6, 2)), y
    return Splits("digits", train, (form(np.eye(3)), np.array([7, 1, 2])), True, "5a")


@pytest.mark.parametrize(
    ("classes", "labels", "tested"),
    [((7, 1), [1, 0, 0, 1, 1], [0, 1]), ((1, 7), [0, 1, 1, 0, 0], [1, 0])],
)
def test_rows_keep_their_order_and_classes_are_numbered(classes, labels, tested):
    pair = splits().of_classes(*classes)
    np.testing.assert_array_equal(pair.train[0][:, 0], [0, 2, 6, 8, 10])
    assert pair.train[1].tolist() == labels and pair.train[1].dtype == np.int64
    np.testing.assert_array_equal(pair.test[0], np.eye(3)[:2])
    assert pair.test[1].tolist() == tested
    assert (pair.name, pair.stand_in, pair.sha256) == ("digits", True, "5a")
    assert not pair.train[0].flags.writeable


def test_sparse_rows():
    pair = splits(scipy.sparse.csr_matrix).of_classes(7, 1)
    np.testing.assert_array_equal(pair.train[0].toarray()[:, 0], [0, 2, 6, 8, 10])


def test_classes_are_checked():
    with pytest.raises(ValueError, match=r"classes must name each label once, got \(7, 7\)"):
        splits().of_classes(7, 7)
    with pytest.raises(ValueError, match="classes must have rows in test, 3 has none"):
        splits().of_classes(7, 3)
