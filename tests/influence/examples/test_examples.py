import copy
import dataclasses
import pickle
import tracemalloc

import numpy as np
import pandas
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from influence import Examples
from influence.examples.examples import check_rows

X = np.arange(12.0).reshape(6, 2)
Y = np.arange(6)


def bounded(num_examples):
    """Return settings of Hypothesis for few random cases, which are the same in every run."""
    return settings(max_examples=num_examples, deadline=None, derandomize=True, database=None)


# --- storage ----------------------------------------------------------------------------------


def test_arrays_are_kept_as_views_dtype_included_and_read_only(tmp_path):
    x = X.astype(np.float32)
    examples = Examples(x, Y)
    assert examples.x.dtype == np.float32 and np.shares_memory(examples.x, x)
    assert len(examples) == 6
    with pytest.raises(ValueError, match="read-only"):
        examples.x[0, 0] = 1
    with pytest.raises(ValueError, match="read-only"):
        examples.take([1]).y[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        examples.x = X
    x[0, 0] = 5.0  # the user's own array is still writable
    lists = Examples([[1, 2], [3, 4]], [0, 1])
    assert lists.x.shape == (2, 2) and lists.y.dtype.kind == "i"
    stored = np.memmap(tmp_path / "x", np.float64, "w+", shape=X.shape)
    stored[:] = X
    examples = Examples(stored, Y)
    assert isinstance(examples.x, np.memmap) and np.shares_memory(examples.x, stored)
    np.testing.assert_array_equal(examples.take([4, 1]).x, X[[4, 1]])


def test_what_is_left_of_a_memmap_stays_on_disk(tmp_path):
    big = np.memmap(tmp_path / "x", np.float64, "w+", shape=(3000, 500))  # 12 MB
    big[:] = np.arange(3000.0)[:, None]
    examples = Examples({"a": big, "b": np.arange(3000)}, np.arange(3000))
    tracemalloc.start()
    left = examples.without([3, 2999]).without([0])
    sums = [x["a"].sum() for x, _ in left.batches(100)]
    few = [x["a"].sum() for x, _ in left.batches(100, np.arange(0, 2997, 7))]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6
    kept = np.delete(np.arange(3000), [0, 3, 2999])
    assert len(left) == 2997 and left.y.tolist() == kept.tolist() and not left.y.flags.writeable
    assert sum(sums) == 500 * kept.sum() and sum(few) == 500 * kept[::7].sum()
    np.testing.assert_array_equal(left.x["a"][:, 7], kept)  # each access reads from the file
    np.testing.assert_array_equal(left.take([5, 0]).x["a"][:, 0], kept[[5, 0]])
    assert left.num_entries == 2997 * 501
    x = {name: part[kept] for name, part in examples.x.items()}
    assert left.fingerprint == Examples(x, kept).fingerprint


@pytest.mark.parametrize("kind", ["csr_matrix", "csc_array", "coo_matrix"])
def test_sparse_becomes_rows_that_can_be_taken(kind):
    examples = Examples(getattr(scipy.sparse, kind)(X), Y)
    assert examples.x.format == "csr"
    np.testing.assert_array_equal(examples.take([5, 0]).x.toarray(), X[[5, 0]])
    np.testing.assert_array_equal(examples.without([0]).x.toarray(), X[1:])
    (first, second) = examples.batches(4)
    np.testing.assert_array_equal(first[0].toarray(), X[:4])
    np.testing.assert_array_equal(second[0].toarray(), X[4:])


def test_dict_of_inputs_moves_together():
    examples = Examples({"a": X, "b": 10 * X[:, 0]}, Y)
    part = examples.without([1, 3]).take([2, 0])
    np.testing.assert_array_equal(part.x["a"], X[[4, 0]])
    np.testing.assert_array_equal(part.x["b"], 10 * X[[4, 0], 0])
    np.testing.assert_array_equal(part.y, [4, 0])
    assert [x["b"].tolist() for x, _ in examples.batches(5)] == [[0, 20, 40, 60, 80], [100]]


def test_repr_shows_shapes_and_dtypes_and_survives_pickling():
    assert repr(Examples(X, Y)) == f"Examples(x=float64[6, 2], y={Y.dtype}[6])"
    assert repr(Examples({"a": X}, Y)).startswith("Examples(x={'a': 'float64[6, 2]'}")
    again = pickle.loads(pickle.dumps(Examples(X, Y)))
    np.testing.assert_array_equal(again.x, X)
    np.testing.assert_array_equal(again.y, Y)


# --- properties of parts of a set -------------------------------------------------------------


@bounded(30)
@given(n=st.integers(1, 20), size=st.integers(1, 25))
def test_batches_are_the_rows_in_order(n, size):
    x = np.arange(float(n))
    parts = list(Examples(x, x).batches(size))
    assert [len(y) for _, y in parts] == [size] * (n // size) + ([n % size] if n % size else [])
    np.testing.assert_array_equal(np.concatenate([x for x, _ in parts]), x)
    np.testing.assert_array_equal(np.concatenate([y for _, y in parts]), x)


@bounded(30)
@given(n=st.integers(2, 20), data=st.data())
def test_take_and_without_split_the_set(n, data):
    rows = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n - 1, unique=True))
    x = np.arange(float(n))
    examples = Examples(x, -x)
    np.testing.assert_array_equal(examples.take(rows).x, rows)
    left = examples.without(rows)
    np.testing.assert_array_equal(left.x, np.setdiff1d(x, rows))
    np.testing.assert_array_equal(left.y, -left.x)


@bounded(30)
@given(n=st.integers(1, 20), size=st.integers(1, 25), data=st.data())
def test_batches_of_chosen_rows(n, size, data):
    rows = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    x = np.arange(float(n))
    for held in (x, scipy.sparse.csr_matrix(x[:, None])):
        parts = list(Examples(held, -x).batches(size, rows))
        assert all(len(y) == size for _, y in parts[:-1]) and 1 <= len(parts[-1][1]) <= size
        got = [x.toarray()[:, 0] if scipy.sparse.issparse(x) else x for x, _ in parts]
        np.testing.assert_array_equal(np.concatenate(got), rows)
        np.testing.assert_array_equal(np.concatenate([y for _, y in parts]), -np.array(rows))


def test_one_batch_by_default_neighbours_are_views_and_a_row_may_be_taken_twice():
    ((x, y),) = Examples(X, Y).batches()
    assert x.shape == (6, 2) and y.shape == (6,)
    ((x, _),) = Examples(X, Y).batches(9, [2, 3, 4])
    assert np.shares_memory(x, X)
    assert Examples(X, Y).take([2, 2]).y.tolist() == [2, 2]
    assert Examples(X, Y).take(slice(1, 3)).y.tolist() == [1, 2]


# --- sums and maps over rows --------------------------------------------------------------------


class _Net:
    """A minimal net for tests of sums and maps. Its answers are proportional to theta."""

    theta, memo = np.array([2.0]), None

    def __init__(self):
        # The cache refers to `flat` by a weak reference. A set allows this.
        self.flat, self.widths = set(), []

    def rows_per_batch(self, examples, num_vectors):
        self.widths.append(num_vectors)
        return 4

    def remembering(self, memo):
        view = copy.copy(self)
        view.memo = memo
        return view


def _scaled(net, theta, x, y):
    return (net.theta if theta is None else theta)[0] * x[:, 0]


def _sums(net, theta, x, y):
    return x.sum(axis=0), len(y)


class _Counting:
    """A question (see Examples.map_over) that computes and caches one square for each row."""

    num_vectors, keeps = 3, True

    def __init__(self):
        self.computed = 0

    def __call__(self, net, theta, x, y):
        if net.memo is None or "squares" not in net.memo:
            self.computed += 1
            squares = _scaled(net, theta, x, y) ** 2
            if net.memo is None:
                return squares
            net.memo["squares"] = squares
        return net.memo["squares"]


@pytest.mark.parametrize("held", [X, scipy.sparse.csr_matrix(X)])
def test_sum_over_adds_up_batches_in_order(held):
    net = _Net()
    total, count = Examples(held, Y).sum_over(_sums, net)
    np.testing.assert_allclose(np.ravel(total), X.sum(axis=0), rtol=1e-15)
    assert count == len(Y) and net.widths == [1]
    assert Examples(X, Y).sum_over(lambda net, theta, x, y: len(y), net, batch_size=1) == len(Y)


def test_each_row_answers_in_the_order_of_the_rows():
    examples, net = Examples(X, Y), _Net()
    np.testing.assert_array_equal(examples.each_row(_scaled, net), 2 * X[:, 0])
    np.testing.assert_array_equal(examples.each_row(_scaled, net, np.array([3.0])), 3 * X[:, 0])
    for rows in ([5, 0, 3], [1, 2], [4]):
        got = examples.each_row(_scaled, net, rows=rows, batch_size=2)
        np.testing.assert_array_equal(got, 2 * X[rows, 0])
    blocks = list(examples.map_over(_scaled, net, rows=[0, 2, 5], batch_size=2, what="rows"))
    assert [len(block) for block in blocks] == [2, 1]


def test_what_a_question_keeps_is_computed_once_for_each_theta_and_batch():
    examples, net, question = Examples(X, Y), _Net(), _Counting()
    expected = (2 * X[:, 0]) ** 2
    for _ in range(3):
        np.testing.assert_array_equal(examples.each_row(question, net), expected)
    # The six rows give two batches of at most four. Only the first of three calls computes them.
    assert question.computed == 2
    np.testing.assert_array_equal(examples.each_row(question, net, np.array([1.0])), expected / 4)
    assert question.computed == 4
    examples.each_row(question, net)  # computed again, because only the last theta is cached
    assert question.computed == 6
    examples.each_row(question, net, rows=[1, 2])  # one batch, computed: some rows are not cached
    examples.each_row(question, _Net())  # two batches, computed: each net has its own cache
    assert question.computed == 9
    assert "_cached" not in vars(pickle.loads(pickle.dumps(examples)))


def test_a_cache_above_its_budget_is_given_up(monkeypatch):
    monkeypatch.setattr("influence.examples.examples.CACHE", 8 * 3)
    examples, net, question = Examples(X, Y), _Net(), _Counting()
    for _ in range(2):
        np.testing.assert_array_equal(examples.each_row(question, net), (2 * X[:, 0]) ** 2)
    assert question.computed == 4


# --- arguments that are refused ---------------------------------------------------------------


def spoilt(value, row):
    x = X.copy()
    x[row, 1] = value
    return x


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 4])
def test_a_value_that_is_not_finite_is_named_with_its_row(value, row):
    bad = spoilt(value, row)
    for x, y, name in (
        (bad, Y, "x"),
        (scipy.sparse.csr_matrix(bad), Y, "x"),
        ({"a": X, "b": bad.astype(np.float32)}, Y, r"x\['b'\]"),
        (X, bad, "y"),
    ):
        message = f"^{name} must be finite, got NaN or infinity in row {row}; drop the row"
        with pytest.raises(ValueError, match=message):
            Examples(x, y)


def test_nan_is_found_beyond_the_first_block_of_rows():
    x = np.zeros((10_000, 1), np.float32)
    x[9_000] = np.nan
    for held in (x, scipy.sparse.csr_matrix(x)):
        with pytest.raises(ValueError, match="in row 9000"):
            Examples(held, np.zeros(10_000))


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X, Y[:5], ValueError, "x and y must have as many rows as each other, got 6 in x and 5 in"),
        ({"a": X, "b": X[:4]}, Y, ValueError, r"got 4 in x\['b'\] and 6 in y"),
        ({"y": X[:4]}, Y, ValueError, r"got 4 in x\['y'\] and 6 in y"),
        (X[:0], Y[:0], ValueError, r"y must have at least one row, got shape \(0,\)"),
        (X[:0], Y, ValueError, r"x must have at least one row, got shape \(0, 2\)"),
        (X, Y[:0], ValueError, r"y must have at least one row, got shape \(0,\)"),
        ({}, Y, ValueError, "x must hold at least one array, got an empty dict"),
        (3.0, Y, ValueError, "x must have one row per example, got a scalar"),
        (X, 1, ValueError, "y must have one row per example, got a scalar"),
        (X.astype(object), Y, TypeError, "x must be an array of numbers, got dtype object"),
        (X, np.array(list("abcdef")), TypeError, "y must be an array of numbers, got dtype <U1"),
        (X.astype(complex), Y, TypeError, "x must be an array of numbers, got dtype complex128"),
        ({"a": X, "b": [None] * 6}, Y, TypeError, r"x\['b'\] must be an array of numbers"),
        ([X, X[:4]], Y, TypeError, "^x must be an array of numbers, got rows of unlike shapes"),
        (X, None, TypeError, "^y must be given beside x, got x of type ndarray"),
        ([[1, 2], [3]], Y[:2], TypeError, "^x must be an array of numbers, got rows of unlike sha"),
        (
            ["a", None] * 3,
            Y,
            TypeError,
            "^x must have a string in every row, got None in row 1",
        ),
        (X, list("abcdef"), TypeError, r"^y .* of strings; use np.unique\(y, return_inverse=True"),
    ],
)
def test_bad_arrays(x, y, error, message):
    with pytest.raises(error, match=message):
        Examples(x, y)


def test_frames():
    frame = pandas.DataFrame({"a": X[:, 0], "b": list("abcdef"), "d": list("abcdef")})
    frame["c"] = pandas.array(range(6), dtype="Float32")
    assert Examples(frame, Y).x.keys() == {"a", "b", "c", "d"}
    assert Examples(frame[["a"]], pandas.Series(Y)).x.shape == (6, 1)
    with pytest.raises(TypeError, match="^y .* got dtype object of strings; use np.unique"):
        Examples(X, frame["b"])
    mixed = frame[["c"]].assign(e=pandas.array(range(6), dtype="Int64"))
    assert np.array_equal(Examples(mixed, Y).x, np.column_stack([range(6), range(6)]))
    mixed["e"] = pandas.array([1, None, 2, 3, 4, 5], dtype="Int64")
    with pytest.raises(ValueError, match="^x must be finite, got NaN or infinity in row 1"):
        Examples(mixed, Y)


BAD_ROWS = [
    ([], ValueError, r"one-dimensional, non-empty list of row numbers, got shape \(0,\)"),
    (3, ValueError, r"one-dimensional, non-empty list of row numbers, got 3; use \[3\]"),
    ([[1]], ValueError, r"one-dimensional, non-empty list of row numbers, got shape \(1, 1\)"),
    ([0.0], TypeError, r"must be integers, got dtype float64\.$"),
    ([True] * 6, TypeError, "got dtype bool; np.flatnonzero turns a mask into row numbers"),
    ([2, 6], IndexError, r"must lie in \[0, 6\), got 6 at position 1"),
    ([0, 1, -1], IndexError, r"must lie in \[0, 6\), got -1 at position 2"),
    ([4, 1, 4], ValueError, "must name each row once, got 4 twice"),
]


@pytest.mark.parametrize(("rows", "error", "message"), BAD_ROWS)
def test_bad_rows(rows, error, message):
    for question in (lambda rows: check_rows(rows, 6), Examples(X, Y).without):
        with pytest.raises(error, match=f"^rows .*{message}"):
            question(rows)
    with pytest.raises(error, match="^removed "):
        check_rows(rows, 6, "removed")


def test_rows_that_are_read_in_turn_must_increase():
    with pytest.raises(ValueError, match="^rows must increase, got 4 before 1; use np.sort"):
        next(Examples(X, Y).batches(2, [0, 4, 1]))
    with pytest.raises(IndexError, match="^rows must lie in"):
        next(Examples(X, Y).batches(2, [0, 6]))


def test_good_rows_become_int64():
    rows = check_rows(np.array([5, 0], np.uint8), 6)
    assert rows.dtype == np.int64 and rows.tolist() == [5, 0]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        *(case for case in BAD_ROWS if case[0] != [4, 1, 4]),  # rows may repeat here
        (slice(6, 9), ValueError, r"must name at least one row, got slice\(6, 9, None\) of 6"),
    ],
)
def test_take_refuses(rows, error, message):
    with pytest.raises(error, match=f"^rows .*{message}"):
        Examples(X, Y).take(rows)


def test_without_must_leave_something():
    with pytest.raises(ValueError, match="rows must leave at least one example, got all 6"):
        Examples(X, Y).without(np.arange(6))


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "3"])
def test_batches_refuse_a_bad_size(size):
    with pytest.raises(ValueError, match=f"size must be a positive integer, got {size!r}"):
        next(Examples(X, Y).batches(size))
