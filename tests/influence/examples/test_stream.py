import gc
import itertools
import tracemalloc
from functools import partial

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf

from influence import (
    CG,
    Direct,
    Examples,
    GaussNewton,
    Hessian,
    Influence,
    LiSSA,
    RefitOptions,
    leave_one_out,
)
from influence.examples.stream import Stream
from influence.models.hinge import SmoothHinge
from influence.scores.datainf import datainf
from influence.scores.tracin import tracin
from tests.influence.problems import dense_net, logistic, ridge, through_keras

N = 23
RNG = np.random.default_rng(0)
X = RNG.standard_normal((N, 2, 3)).astype(np.float32)
Y = np.arange(N) % 3
EXAMPLES = Examples(X, Y)


class Batches(keras.utils.PyDataset):
    """A dataset of the given rows in batches. `asked` lists the batch numbers that were read."""

    def __init__(self, x, y, size=5):
        super().__init__()
        self.x, self.y, self.size, self.asked = x, y, size, []

    def __len__(self):
        return -(-len(self.y) // self.size)

    def __getitem__(self, index):
        self.asked.append(index)
        rows = slice(index * self.size, (index + 1) * self.size)
        x = {k: v[rows] for k, v in self.x.items()} if isinstance(self.x, dict) else self.x[rows]
        return x, self.y[rows]


def dataset(x, y, size=5):
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(size)


KINDS = {"tf.data": dataset, "PyDataset": Batches}


def as_stream(examples, kind="tf.data", size=5):
    return Stream(KINDS[kind](examples.x, examples.y, size))


def same(got, expected):
    """Assert that two pairs (x, y) are equal to the last bit."""
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, dict):
            assert a.keys() == b.keys()
            same(a.values(), b.values())
        else:
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype and a.shape == b.shape


def same_batches(stream, expected, size, rows=None):
    for a, b in zip(stream.batches(size, rows), expected.batches(size, rows), strict=True):
        same(a, b)


# --- the methods of Examples ------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [1, 5, 30])
def test_batches_are_those_of_the_arrays(kind, own):
    stream = as_stream(EXAMPLES, kind, own)
    assert len(stream) == N and not stream.in_memory
    np.testing.assert_array_equal(stream.y, Y)
    rows = np.array([0, 4, 5, 6, 17, 22])
    for size in (1, 4, 5, 23, 100, None):
        for chosen in (None, rows, np.arange(3, 11), [22]):
            same_batches(stream, EXAMPLES, size, chosen)


@pytest.mark.parametrize("kind", KINDS)
def test_take_and_without_are_those_of_the_arrays(kind):
    stream = as_stream(EXAMPLES, kind)
    for rows in ([0], [7, 2], [20, 3, 20, 22], slice(0, 3), slice(4, 20, 3), slice(None)):
        got, expected = stream.take(rows), EXAMPLES.take(rows)
        assert type(got) is Examples
        same((got.x, got.y), (expected.x, expected.y))
    left, expected = stream.without([1, 9, 22]), EXAMPLES.without([1, 9, 22])
    assert len(left) == len(expected) == N - 3 and not left.in_memory
    np.testing.assert_array_equal(left.y, expected.y)
    same_batches(left, expected, 6)
    same_batches(left, expected, 2, [0, 8, 9])
    again, expected = left.without([0, 19]), expected.without([0, 19])
    same(again.take([5, 0]).x, expected.take([5, 0]).x)
    assert left.fingerprint == EXAMPLES.without([1, 9, 22]).fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_by_name(kind):
    examples = Examples({"b": X, "a": np.arange(N)}, np.eye(3)[Y])
    stream = as_stream(examples, kind)
    same_batches(stream, examples, 4)
    same(stream.take([12, 3]).x.values(), examples.take([12, 3]).x.values())
    shapes = "x={'b': 'float32[23, 2, 3]', 'a': 'int64[23]'}, y=float64[23, 3]"
    assert repr(stream) == f"Stream({shapes})"
    assert stream.fingerprint == examples.fingerprint
    assert stream.num_entries == examples.num_entries == N * 7


def test_the_fingerprint_is_of_the_rows_not_of_what_holds_them(tmp_path):
    stored = np.memmap(tmp_path / "x", np.float32, "w+", shape=X.shape)
    stored[:] = X
    names = {
        Examples(X, Y).fingerprint,
        Examples(stored, Y).fingerprint,
        as_stream(EXAMPLES, size=4).fingerprint,
        as_stream(EXAMPLES, "PyDataset", 7).fingerprint,
    }
    assert len(names) == 1
    other = X.copy()
    other[22, 1, 2] += 1e-6
    flat = X.reshape(N, 6)
    for x, y in ((other, Y), (flat, Y), (X.astype(float), Y), (X, Y % 2), (X[::-1], Y)):
        assert Examples(x, y).fingerprint not in names
    sparse = [scipy.sparse.csr_matrix(x).astype(float) for x in (flat, other.reshape(N, 6))]
    assert Examples(sparse[0], Y).fingerprint == Examples(sparse[0].copy(), Y).fingerprint
    assert Examples(sparse[0], Y).fingerprint != Examples(sparse[1], Y).fingerprint


def test_a_py_dataset_is_asked_only_for_the_batches_that_are_wanted():
    data = Batches(X, Y)
    stream = Stream(data)
    assert data.asked == [0, 1, 2, 3, 4] * 2
    data.asked.clear()
    stream.take([21, 10])
    assert data.asked == [2, 4]
    data.asked.clear()
    stream.take([3]), stream.take(slice(0, 8))  # the first rows stay in memory, so no batch is read
    assert data.asked == []


def test_empty_batches_are_no_rows():
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(5)
    gaps = data.map(lambda x, y: (x[y > 0], y[y > 0])).concatenate(data.take(1))
    gaps = data.take(1).map(lambda x, y: (x[:0], y[:0])).concatenate(gaps)
    expected = Examples(np.concatenate([X[Y > 0], X[:5]]), np.concatenate([Y[Y > 0], Y[:5]]))
    same_batches(Stream(gaps), expected, 4)


def test_large_labels_stay_on_disk(monkeypatch):
    monkeypatch.setattr("influence.examples.stream._LABEL_BYTES", 100)
    stream = as_stream(Examples(X, X))
    assert isinstance(stream.y, np.memmap) and not stream.y.flags.writeable
    # The labels are in a file without a name. It must exist as long as the array of labels.
    gc.collect()
    np.testing.assert_array_equal(stream.y, X)
    same_batches(stream, Examples(X, X), 7)
    assert not isinstance(as_stream(EXAMPLES).y, np.memmap) or len(Y) * 8 > 100


# --- all other functions take a stream --------------------------------------------------------


@pytest.fixture(scope="module")
def problems():
    softmax = logistic("softmax", intercept=True)
    return {"closed form": softmax, "tape": through_keras(softmax)}


@pytest.mark.parametrize(("problem", "kind"), [("closed form", "tf.data"), ("tape", "PyDataset")])
def test_every_question_has_the_answer_of_the_arrays(problem, kind, problems):
    p = problems[problem]
    train, test = as_stream(p.train, kind, 7), as_stream(p.test, kind, 2)
    V = np.random.default_rng(0).standard_normal((p.net.num_parameters, 3))
    for curvature in (Hessian, GaussNewton):
        np.testing.assert_array_equal(curvature(p.net, train) @ V, curvature(p.net, p.train) @ V)
    assert p.net.risk(train) == p.net.risk(p.train)
    np.testing.assert_array_equal(p.net.risk_gradient(train), p.net.risk_gradient(p.train))
    rows = [30, 2, 17]
    questions = (
        lambda influence, test: influence.scores(test)[:],
        lambda influence, test: influence.scores(test, rows)[:],
        lambda influence, test: influence.perturbation(test, rows),
        lambda influence, test: influence.group(test, rows, 2)[:],
        lambda influence, test: influence.relative(test, rows)[:],
        lambda influence, test: influence.adding(test, test)[:],
        lambda influence, _: influence.parameters(rows),
        lambda influence, _: influence.self_influence(rows),
        lambda influence, _: influence.self_influence(),
    )
    how = {"approximation": "first_order"}  # the one-step approximation needs rows in memory
    for options in ({"solver": Direct(), "batch_size": 9}, {"solver": CG(1e-3)}):
        ours, theirs = (Influence(p.net, t, **options, **how) for t in (train, p.train))
        for question in questions:
            np.testing.assert_array_equal(question(ours, test), question(theirs, p.test))
    for options in ({"rows": rows}, {}):
        for question in (
            lambda *sets, **o: tracin(p.net, *sets, thetas=[p.theta], learning_rates=[0.1], **o),
            lambda *sets, **o: datainf(p.net, *sets, damping=0.1, **o),
        ):
            got, expected = question(train, test, **options), question(p.train, p.test, **options)
            np.testing.assert_array_equal(got[:], expected[:])
    how |= {"solver": LiSSA(depth=5, repeats=2, scale=50.0, rtol=None)}
    got, expected = (Influence(p.net, t, **how).scores(p.test, [1]) for t in (train, p.train))
    np.testing.assert_array_equal(got[:], expected[:])


def test_fits_and_refits_have_the_answer_of_the_arrays():
    for p in (logistic("sigmoid"), ridge()):
        train = as_stream(p.train, size=7)
        fitted = []
        for examples in (train, p.train):
            p.net.theta = np.zeros(p.net.num_parameters)
            fitted.append(p.net.fit(examples, gradient_tolerance=1e-8).theta)
        np.testing.assert_array_equal(*fitted)
        refit = {"method": "fit", "fit": partial(type(p.net).fit, gradient_tolerance=1e-9)}
        options = RefitOptions(**({"method": "newton"} if p.net.convex else refit))
        got = leave_one_out(p.net, train, as_stream(p.test), [3, 30], options)
        expected = leave_one_out(p.net, p.train, p.test, [3, 30], options)
        np.testing.assert_array_equal(got[:], expected[:])


def test_the_svm_is_fitted_on_a_stream():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 3))
    examples = Examples(x, np.sign(x @ [1, 2, -1] + 0.5 * rng.standard_normal(40)).astype(int))
    streamed = as_stream(examples, size=7)
    smooth = [SmoothHinge(3, 0.1, weight_decay=0.1).fit(e).theta for e in (examples, streamed)]
    np.testing.assert_array_equal(*smooth)
    svm = SmoothHinge(3, weight_decay=0.1)
    with pytest.raises(TypeError, match="^x of a Stream is not held in memory"):
        svm.fit(streamed)  # fit starts with LinearSVC, which needs x in memory
    near = svm.fit(examples).theta
    again = []
    for held in (streamed, examples):
        svm.theta = near
        again.append(svm.fit(held).theta)
    np.testing.assert_array_equal(*again)
    assert svm.duality_gap(streamed) == svm.duality_gap(examples)


def test_self_influence_of_more_parameters_than_rows_needs_no_inputs_in_memory():
    p = logistic("sigmoid", num_rows=80, num_inputs=100, weight_decay=0.5)
    expected = Influence(p.net, p.train).self_influence()
    got = Influence(p.net, as_stream(p.train)).self_influence()
    np.testing.assert_allclose(got, expected, rtol=1e-5)  # CG has the relative tolerance 1e-6


def test_only_one_batch_is_in_memory():
    n, shape = 2000, (32, 32)

    def rows():
        for start in range(0, n, 50):
            x = np.random.default_rng(start).standard_normal((50, *shape))
            yield x.astype(np.float32), np.arange(start, start + 50) % 2

    signature = (tf.TensorSpec((None, *shape), tf.float32), tf.TensorSpec((None,), tf.int64))
    data = tf.data.Dataset.from_generator(rows, output_signature=signature)
    flat = data.map(lambda x, y: (tf.reshape(x, (-1, 1024)), y))
    net = dense_net(2, 1024, keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                    l2=0.1, dtype="float32")  # fmt: skip
    V = np.ones((net.num_parameters, 2), np.float32)
    # Trace the functions before memory is measured.
    Hessian(net, Stream(flat.take(2)), batch_size=100) @ V
    tracemalloc.start()
    stream = Stream(flat)
    Hessian(net, stream, batch_size=100) @ V
    stream.without([5]).take([7])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The limit is 40 % of all inputs; TensorFlow's memory is not counted.
    assert peak < 0.4 * n * 1024 * 4


# --- arguments that are refused ---------------------------------------------------------------


def shuffled(**options):
    return tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(N, **options).batch(5)


class Changing(Batches):
    """A dataset whose rows change after each pass."""

    def __init__(self, rows):
        super().__init__(X, Y)
        self.rows = rows

    def on_epoch_end(self):
        self.x, self.y = X[self.rows], Y[self.rows]


CHANGES = {
    "shuffling": np.random.default_rng(1).permutation(N),
    "growing": np.r_[0:N, 0:5],
    "shrinking": np.arange(11),
}


def random_values(x, y):
    """Add noise to the batch that starts at row 15."""
    return x + (x[0, 0, 0] == X[15, 0, 0]) * np.random.standard_normal(x.shape).astype(x.dtype), y


def generated(rows):
    """Return a dataset of one batch per item of `rows()`."""
    signature = (tf.TensorSpec(X.shape, tf.float32), tf.TensorSpec(Y.shape, tf.int64))
    return tf.data.Dataset.from_generator(rows, output_signature=signature)


# NumPy's noise differs in each pass. TensorFlow would repeat its noise after a global seed.
NOISE = np.random.default_rng(0)


def noisy():
    return generated(lambda: [((X + NOISE.standard_normal(X.shape)).astype(X.dtype), Y)])


def once():
    batches = iter([(X, Y)])
    return generated(lambda: batches)


def test_a_fixed_shuffle_is_an_order():
    stream = Stream(shuffled(seed=1, reshuffle_each_iteration=False))
    passes = [np.concatenate([x for x, _ in stream.batches(4)]) for _ in range(2)]
    np.testing.assert_array_equal(*passes)
    assert not np.array_equal(passes[0], X)


class Unbounded(Batches):
    @property
    def num_batches(self):
        return None


class As(Batches):
    """A dataset that applies a function to each batch (x, y)."""

    def __init__(self, change, x=X, y=Y):
        super().__init__(x, y)
        self.change = change

    def __getitem__(self, index):
        return self.change(*super().__getitem__(index))


def spoilt():
    x = X.copy()
    x[17, 1, 1] = np.nan
    return x


def ragged():
    rows = tf.RaggedTensor.from_row_lengths(np.arange(6.0), [1, 2, 3])
    return tf.data.Dataset.from_tensor_slices((rows, [0, 1, 2])).batch(2)


def varying(x, y):
    # The batch that starts at row 15 has the first label 0.
    return (x, y) if y[0] != 0 else (x[:, :1], y)


def slices(*arrays):
    return tf.data.Dataset.from_tensor_slices(arrays)


def sparse(x, y):
    return scipy.sparse.csr_matrix(x[:, 0]), y


SHUFFLED = (
    r"^dataset must give the same rows in every pass, got in the second row \d+ of the first "
    r"at the place of row \d+: it is shuffled; use shuffle\(\.\.\., reshuffle_each_iteration=F"
)
VALUE_ERRORS = [
    (lambda: dataset(X, Y).repeat(), r"^dataset must end, .* \.take\(n\), or no"),
    (lambda: Unbounded(X, Y), "^dataset must end, got an infinite one"),
    (
        lambda: generated(lambda: itertools.repeat((X, Y))),
        "^dataset must end, got more than max_rows = 100 rows; use .take",
    ),
    (lambda: dataset(X, Y).skip(5), "^dataset must hold at least one row, got an"),
    (once, "got 23 in the first and only 0 in the second; a generator must start"),
    (lambda: Changing(CHANGES["shrinking"]), "got 23 in the first and only 11 in the second; a g"),
    (lambda: Changing(CHANGES["growing"]), "got 23 in the first and more in the second"),
    (lambda: Changing(CHANGES["shuffling"]), SHUFFLED),
    (lambda: shuffled(seed=1), SHUFFLED),
    (
        lambda: As(random_values),
        "got in the second values in row 15 that the first does not have: it is random; leave",
    ),
    (noisy, "values in row 0 that the first does not have"),
    (lambda: dataset(spoilt(), Y), "^x must be finite, .* in row 17; drop"),
    (lambda: dataset({"a": X, "b": spoilt()}, Y), r"^x\['b'\] must be finite"),
    (lambda: dataset(X, np.where(Y, Y, np.nan)), "^y must be finite, .* in row 0;"),
    (lambda: As(lambda x, y: ({}, y)), "^x must hold at least one array, got an e"),
    (lambda: slices(X, Y), r"^y must have one row per example.*by \.batch\(size\)"),
    (lambda: slices(X, np.eye(3)[Y]), "^x and y .* got 2 in x and 3 in y, in the b"),
    (
        lambda: As(varying),
        r"^x must have rows of one shape and dtype, got float32 \(1, 3\) in row 0 and float32 "
        r"\(2, 3\) in row 5; pad or convert",
    ),
    (
        lambda: As(lambda x, y: ({"ab"[int(y[0] != 0)]: x}, y)),
        r"^x must have the same inputs in every batch, got \[\"x\['a'\]\"\] in the first and "
        r"\[\"x\['b'\]\"\] in the one that begins with row 5",
    ),
]
TYPE_ERRORS = [
    (lambda: (X, Y), r"got tuple; arrays and memmaps go into Examples\(x, y\)"),
    (lambda: iter([X]), "^dataset must be a tf.data.Dataset or a .*got list_itera"),
    (lambda: slices(X).batch(5).map(lambda x: x), "^dataset .* got a ndarray"),
    (lambda: slices(X).batch(5), r"batches \(x, y\), got a tuple of 1"),
    (lambda: As(lambda x, y: {"x": x, "y": y}), r"batches \(x, y\), got a dict"),
    (lambda: As(lambda x, y: (x, y, y, y)), r"batches \(x, y\), got a tuple of 4"),
    (lambda: dataset(X, (Y, Y)), "^y must be an array of labels or a dict .* a tuple of 2"),
    (lambda: dataset(X, np.full(N, "a")), "^y must be a dense array of numbers, got"),
    (ragged, "^x must be a dense array of numbers, got ndarray of dtype obj"),
    (lambda: As(sparse), "^x must be a dense array of numbers, got csr_matrix"),
    (lambda: As(lambda x, y: ([[1], [2, 3]], y)), "^x must be an array, or a dict or tuple"),
    (lambda: As(lambda x, y: (x, "label")), "^y must be a dense array of numbers"),
]


@pytest.mark.parametrize(
    ("error", "make", "message"),
    [(ValueError, *case) for case in VALUE_ERRORS] + [(TypeError, *case) for case in TYPE_ERRORS],
)
def test_datasets_that_are_refused(error, make, message):
    with pytest.raises(error, match=message):
        Stream(make(), max_rows=100)


@pytest.mark.parametrize("max_rows", [0, -1, 2.5, True])
def test_bad_max_rows(max_rows):
    with pytest.raises(ValueError, match="^max_rows must be a positive integer, got"):
        Stream(dataset(X, Y), max_rows=max_rows)


def test_inputs_are_not_to_be_had_as_a_whole_and_rows_must_increase():
    stream = as_stream(EXAMPLES)
    for held in (stream, stream.without([1])):
        with pytest.raises(TypeError, match=r"^x of a Stream is not held in memory; use batches"):
            held.x  # noqa: B018
    same((stream.take(slice(None)).x,), (X,))
    with pytest.raises(ValueError, match="^rows must increase, got 7 before 3; use np.sort"):
        next(stream.batches(2, [1, 7, 3]))


@pytest.mark.parametrize("rows", CHANGES.values(), ids=CHANGES)
def test_a_dataset_that_changes_later_is_found(rows):
    data = Changing(rows)
    data.on_epoch_end, change = (lambda: None), data.on_epoch_end
    stream = Stream(data)
    change()
    message = "^dataset must stay as it was when the Stream was made, got other labels or fewer r"
    with pytest.raises(RuntimeError, match=message):
        list(stream.batches(5))
