"""Tests of labels by output name and of sample weights. Both are packed into one array."""

import pickle
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from influence import Examples, Stream
from influence.examples.labels import labels, packed, sample_weights

N = 7
X = np.arange(2.0 * N).reshape(N, 2)
Y = {"digit": np.arange(N) % 3, "box": np.arange(4.0 * N).reshape(N, 4)}
W = np.linspace(0, 2, N)


def test_plain_labels_stay_as_they_are():
    y = np.arange(N)
    examples = Examples(X, y)
    assert np.shares_memory(examples.y, y) and examples.y.dtype == y.dtype
    assert sample_weights(examples.y) is None and labels(examples.y) is examples.y


def test_labels_and_weights_are_found_again_in_every_subset_of_rows():
    examples = Examples(X, Y, sample_weight={"digit": W})
    rows = np.array([5, 0, 5, 3])
    for some, where in [(examples.take(rows), rows), (examples.without([1, 2]), [0, 3, 4, 5, 6])]:
        found = labels(some.y)
        assert set(found) == {"digit", "box"}
        np.testing.assert_array_equal(found["digit"], Y["digit"][where])
        np.testing.assert_array_equal(found["box"], Y["box"][where])
        np.testing.assert_array_equal(sample_weights(some.y)["digit"], W[where])
    x, y = examples.stacked(np.array([[0, 1], [6, 2]]))
    assert y["box"].shape == (2, 2, 4) and x.shape == (2, 2, 2)
    weighted = Examples(X, Y["digit"], sample_weight=W[:, None])
    np.testing.assert_array_equal(labels(weighted.y), Y["digit"])
    np.testing.assert_array_equal(sample_weights(weighted.y), W)
    again = Examples(X + 1, weighted.y)  # x changes; labels and weights stay
    np.testing.assert_array_equal(sample_weights(again.y), W)
    assert "sample_weight" in repr(weighted)
    read: Any = weighted.without([0])  # Any, because pyright does not know this attribute
    np.testing.assert_array_equal(read.sample_weight, W[1:])
    read = Examples(X, W)
    assert read.sample_weight is None


def test_the_fingerprint_covers_names_and_weights():
    prints = {
        Examples(X, Y["digit"]).fingerprint,
        Examples(X, Y["digit"], W).fingerprint,
        Examples(X, Y["digit"], W + 1).fingerprint,
        Examples(X, {"digit": Y["digit"]}).fingerprint,
        Examples(X, {"number": Y["digit"]}).fingerprint,
        Examples(X, Y).fingerprint,
    }
    assert len(prints) == 6
    same = pickle.loads(pickle.dumps(Examples(X, Y, W)))
    assert same.fingerprint == Examples(X.copy(), dict(reversed(Y.items())), W).fingerprint


def test_a_stream_reads_weights_and_labels_by_name():
    weight = np.where(np.arange(N) < 3, 0.0, W)  # so all weights of the first batch are 0
    rows: Any = (X, Y, weight)
    stream = Stream(tf.data.Dataset.from_tensor_slices(rows).batch(3))
    same = Examples(X, Y, weight)
    assert stream.fingerprint == same.fingerprint
    np.testing.assert_array_equal(stream.y, same.y.astype(stream.y.dtype))
    ((_, y),) = stream.batches()
    np.testing.assert_array_equal(sample_weights(y), weight)
    with pytest.raises(ValueError, match="^sample_weight must have a weight above 0, got 7 zeros"):
        Stream(tf.data.Dataset.from_tensor_slices((X, W, 0 * W)).batch(3))


@pytest.mark.parametrize(
    ("y", "weight", "message"),
    [
        (W, W - 1, "^sample_weight must be finite and >= 0, got -1.0 in row 0"),
        (W, 0 * W, "^sample_weight must have a weight above 0, got 7 zeros"),
        (W, np.where(W > 1, np.nan, W), "^sample_weight must be finite, got NaN .* row 4"),
        (W, W[1:], "^sample_weight must have as many rows as y, got 6 and 7"),
        (W, np.ones((N, 3)), r"^sample_weight must have one weight per row, .* shape \(7, 3\)"),
        (W, {"a": W}, r"^sample_weight must be an array or a dict by the names of y, \[\]"),
        (Y, {"digits": W}, r"names of y, \['box', 'digit'\], got \['digits'\]"),
        (Y, {"box": -W}, r"^sample_weight\['box'\] must be finite and >= 0, got -0.33"),
        ({}, None, "^y must hold at least one array, got an empty dict"),
        ({1: W}, None, "^y must have the names of the model's outputs, got the key 1"),
        ({"sample_weight": W}, None, "^y must have the names .* got the key 'sample_weight'"),
        ({"a": W, "b": W[1:]}, None, r"^y\['b'\] must have as many rows as y\['a'\], got 6 and 7"),
        ({"a": W + np.inf}, None, r"^y\['a'\] must be finite, got NaN"),
        (packed(W, W), W, "^sample_weight must be given once"),
        ({"a": 3.0}, None, r"^y\['a'\] must have one row per example, got a scalar"),
    ],
)
def test_bad_labels_and_weights_are_refused_by_name(y, weight, message):
    with pytest.raises(ValueError, match=message):
        Examples(X, y, weight)


def test_weights_that_are_no_numbers_are_refused_by_name():
    with pytest.raises(TypeError, match="^sample_weight must be an array of numbers"):
        Examples(X, W, list("abcdefg"))
