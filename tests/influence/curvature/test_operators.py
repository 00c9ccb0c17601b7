import keras
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator

from influence import Examples, GaussNewton, GenericNeuralNet, Hessian
from tests import oracles
from tests.influence.problems import (
    dense_net,
    logistic,
    relative_error,
    ridge,
    tanh_net,
    through_keras,
)

CURVATURES = [Hessian, GaussNewton]
# Both sides are computed in float64, so they differ only by the order of additions.
ROUNDING = 1e-12


@pytest.fixture(scope="module")
def linear():
    return ridge()


@pytest.fixture(scope="module")
def softmax():
    return through_keras(logistic("softmax", intercept=True))


@pytest.fixture(scope="module")
def tanh():
    """Return (net, examples, plain loss) with an indefinite Hessian."""
    net, examples = tanh_net(l2=0.3)
    return net, examples, lambda y, output: (y - output[:, 0]) ** 2


def block(d, m=3, seed=0):
    return np.random.default_rng(seed).standard_normal((d, m))


# --- the operators as matrices ----------------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
def test_linear_models_have_the_closed_form_whose_two_curvatures_are_one(
    curvature, linear, softmax
):
    for problem in (linear, softmax):
        H = problem.oracle.hessian(problem.theta)
        A = curvature(problem.net, problem.train)
        V = block(len(H))
        assert relative_error(A @ V, H @ V) < ROUNDING
        assert relative_error(A @ V[:, 0], H @ V[:, 0]) < ROUNDING
        assert relative_error(A.dense(), H) < ROUNDING


def test_a_network_has_two_curvatures_and_neither_is_the_empirical_fisher(tanh):
    net, examples, loss = tanh
    dense = oracles.dense_derivatives(net.model, loss, examples.x, examples.y)
    hessian = oracles.dense_hessian(net.model, loss, examples.x, examples.y)
    penalty = np.zeros(net.num_parameters)
    penalty[-5:-1] = 2 * 0.3  # Keras' L2 penalty of the last kernel has no factor 1/2
    H = Hessian(net, examples).dense()
    G = GaussNewton(net, examples).dense()
    assert relative_error(H, hessian + np.diag(penalty)) < ROUNDING
    assert relative_error(G, dense.gauss_newton + np.diag(penalty)) < ROUNDING
    assert np.linalg.eigvalsh(H)[0] < -0.1 and np.linalg.eigvalsh(G)[0] > -1e-12
    fisher = dense.gradients.T @ dense.gradients / len(examples)
    assert relative_error(G - np.diag(penalty), fisher) > 0.5
    assert relative_error(G, H) > 0.1


@pytest.mark.parametrize("curvature", CURVATURES)
def test_damping_is_absolute_and_on_the_diagonal(curvature, tanh):
    net, examples, _ = tanh
    V = block(net.num_parameters)
    plain, damped = curvature(net, examples), curvature(net, examples, 0.7)
    # The difference is smaller than its two terms, so about one digit is lost.
    assert relative_error(damped @ V - plain @ V, 0.7 * V) < 1e-11
    np.testing.assert_allclose(damped.dense() - plain.dense(), 0.7 * np.eye(len(V)), atol=1e-12)
    problem = logistic("softmax")
    H = problem.oracle.hessian(problem.theta) + 0.7 * np.eye(15)
    A = curvature(problem.net, problem.train, 0.7)
    assert relative_error(A.dense(), H) < ROUNDING
    assert relative_error(A @ np.eye(15), H) < ROUNDING


@pytest.mark.parametrize("curvature", CURVATURES)
def test_are_symmetric_scipy_operators(curvature, tanh):
    net, examples, _ = tanh
    A = curvature(net, examples)
    d = net.num_parameters
    assert isinstance(A, LinearOperator) and A.shape == (d, d) and A.dtype == np.float64
    v, w = block(d, 2).T
    assert A.matvec(v).shape == (d,) and (A @ v).shape == (d,) and (A @ v[:, None]).shape == (d, 1)
    assert w @ (A @ v) == pytest.approx(v @ (A @ w), rel=1e-11)
    np.testing.assert_array_equal(A.H @ v, A @ v)
    np.testing.assert_array_equal(A.T @ v, A @ v)
    dense = A.dense()
    np.testing.assert_array_equal(dense, dense.T)
    # The operators can be combined by SciPy's operator algebra.
    assert relative_error((2 * A + A) @ v, 3 * (A @ v)) < ROUNDING


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(a=st.floats(-10, 10), seed=st.integers(0, 1000))
def test_products_are_linear(tanh, a, seed):
    net, examples, _ = tanh
    A = Hessian(net, examples)
    V, W = block(net.num_parameters, 3, seed), block(net.num_parameters, 3, seed + 1)
    AV, AW = A @ V, A @ W
    size = np.linalg.norm(AV) + np.linalg.norm(a * AW)
    assert np.linalg.norm(A @ (V + a * W) - AV - a * AW) < ROUNDING * size


@pytest.mark.parametrize("d", [1, 5])
def test_dense_is_put_together_from_blocks(d, monkeypatch):
    net = dense_net(d, 63, "mse")
    rng = np.random.default_rng(0)
    examples = Examples(rng.standard_normal((9, 63)), rng.standard_normal((9, d)))
    # `dense` multiplies at most 256 columns at once. A has 64 d columns: one block for d = 1, and
    # two for d = 5.
    A = GaussNewton(net, examples)
    x = oracles.with_ones(examples.x)
    H = np.kron(2 * x.T @ x / 9, np.eye(d)) / d  # Keras' "mse" averages over outputs
    assert relative_error(A.dense(), H) < ROUNDING


# --- settings that must not change a result ---------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("batch_size", [1, np.int32(7), 59, 60, 64])
def test_batch_size_changes_nothing(curvature, batch_size, softmax, monkeypatch):
    V = block(softmax.net.num_parameters)
    whole = curvature(softmax.net, softmax.train) @ V
    A = curvature(softmax.net, softmax.train, batch_size=batch_size)
    # The batch size changes the order of additions, and so the result by about 1e-15 of its size.
    assert relative_error(A @ V, whole) < 1e-10
    asked = []
    product = getattr(softmax.net, A._method)
    monkeypatch.setattr(
        type(softmax.net), A._method, lambda _, x, y, V: asked.append(len(y)) or product(x, y, V)
    )
    A @ V
    assert asked == [min(batch_size, 60 - start) for start in range(0, 60, batch_size)]


@pytest.mark.parametrize("curvature", CURVATURES)
def test_row_order_changes_nothing(curvature, tanh):
    net, examples, _ = tanh
    V = block(net.num_parameters)
    order = np.random.default_rng(0).permutation(len(examples))
    shuffled = curvature(net, examples.take(order), batch_size=7)
    assert relative_error(shuffled @ V, curvature(net, examples, batch_size=7) @ V) < 1e-10


def test_sparse_rows_change_nothing(softmax):
    V = block(softmax.net.num_parameters)
    sparse = Examples(scipy.sparse.csr_matrix(softmax.train.x), softmax.train.y)
    for curvature in CURVATURES:
        A = curvature(softmax.net, sparse, batch_size=7)
        assert relative_error(A @ V, curvature(softmax.net, softmax.train) @ V) < ROUNDING
    rows = np.array([[0, 1], [5, 9]])
    W = block(len(V), 4).reshape(2, len(V), 2)
    got = Hessian(softmax.net, sparse).sampled(rows, W)
    assert relative_error(got, Hessian(softmax.net, softmax.train).sampled(rows, W)) < ROUNDING


# --- products estimated from a few rows -------------------------------------------------------


def test_sampled_is_the_operator_of_the_sampled_rows(tanh, softmax):
    a, b = (keras.Input((2,), name=name, dtype="float64") for name in "ab")
    output = keras.layers.Dense(1, dtype="float64")(keras.layers.Multiply(dtype="float64")([a, b]))
    by_name = GenericNeuralNet(keras.Model([a, b], output), "mse")
    x, y = block(20, 2), block(20, 1)
    rows = np.array([[3, 1], [4, 4], [0, 19]])
    for net, examples in (
        tanh[:2],
        (softmax.net, softmax.train),
        (by_name, Examples({"a": x, "b": x[::-1]}, y)),
    ):
        V = np.random.default_rng(1).standard_normal((3, net.num_parameters, 2))
        for curvature in CURVATURES:
            got = curvature(net, examples, 0.2).sampled(rows, V)
            each = zip(rows, V, strict=True)
            expected = [curvature(net, examples.take(r), 0.2) @ v for r, v in each]
            assert relative_error(got, np.stack(expected)) < ROUNDING


# --- results in float32 -----------------------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
def test_float32_in_float32_out(curvature):
    problem = ridge(dtype="float32")
    H = problem.oracle.hessian(problem.theta)
    A = curvature(problem.net, problem.train, 0.1)
    V = block(5)
    assert A.dtype == (A @ V).dtype == A.dense().dtype == np.float32
    # float32 rounding errors are below this bound.
    assert relative_error(A @ V, H @ V + 0.1 * V) < 1e-5


# --- arguments that are refused ---------------------------------------------------------------


BATCH_SIZE = "^batch_size must be a positive integer or None"


@pytest.mark.parametrize(
    ("net", "examples", "options", "error", "message"),
    [
        ("model", None, {}, TypeError, "^net must be a GenericNeuralNet, got str;"),
        (None, "rows", {}, TypeError, r"^examples must be Examples\(x, y\), got str"),
        (None, None, {"damping": -1e-9}, ValueError, r"^damping must be a number >= 0, got -1e-09"),
        (None, None, {"damping": np.nan}, ValueError, "^damping must be a number >= 0, got nan"),
        (None, None, {"damping": np.inf}, ValueError, "^damping must be a number >= 0, got inf"),
        (None, None, {"damping": "1"}, ValueError, "^damping must be a number >= 0, got '1'"),
        *(
            (None, None, {"batch_size": size}, ValueError, f"{BATCH_SIZE}, got {size!r}")
            for size in (0, -3, 1.5, 2.0, True, "7")
        ),
    ],
)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_bad_arguments(linear, curvature, net, examples, options, error, message):
    with pytest.raises(error, match=message):
        curvature(net or linear.net, examples or linear.train, **options)


def test_examples_must_fit_the_net(linear):
    wide = Examples(np.ones((4, 9)), np.ones(4))
    with pytest.raises(ValueError, match=r"^examples\.x must have rows of shape \(4,\)"):
        Hessian(linear.net, wide)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_an_operator_belongs_to_one_theta(curvature):
    problem = ridge()
    A = curvature(problem.net, problem.train)
    problem.net.theta = problem.theta + 1
    questions = [
        lambda: A @ np.ones(5),
        A.dense,
        lambda: A.sampled(np.zeros((1, 1), int), np.ones((1, 5, 1))),
    ]
    for question in questions:
        with pytest.raises(RuntimeError, match="^theta has changed since this operator was made"):
            question()


def test_gauss_newton_refuses_probabilities_when_it_is_made():
    net = dense_net(1, 2, "binary_crossentropy", dtype="float32")
    message = "^loss must take logits for a Gauss-Newton matrix, got 'binary_crossentropy' of prob"
    with pytest.raises(ValueError, match=message):
        GaussNewton(net, Examples(np.ones((3, 2), np.float32), np.array([0, 1, 1])))


# --- known bounds and stored matrices ---------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
def test_print_what_they_are_and_nothing_of_where(curvature, tanh):
    net, examples, _ = tanh
    A = curvature(net, examples, 0.25)
    text = f"{curvature.__name__}(20 rows, d={net.num_parameters}, damping=0.25, theta and labels #"
    assert repr(A).startswith(text)
    again, same = tanh_net(l2=0.3)
    assert repr(curvature(again, same, 0.25)) == repr(A)
    relabelled = Examples(same.x, same.y + 1)
    assert repr(curvature(again, relabelled, 0.25)) != repr(A)
    again.theta = again.theta + 1e-12
    assert repr(curvature(again, same, 0.25)) != repr(A)


def test_gauss_newton_of_many_batches_is_one_traced_map(softmax, monkeypatch):
    A = GaussNewton(softmax.net, softmax.train)
    rows = np.arange(40).reshape(20, 2)
    V = np.ones((20, softmax.net.num_parameters, 2))
    runs = []
    run = softmax.net.flat.run
    monkeypatch.setattr(
        softmax.net.flat, "run", lambda name, *a, **k: runs.append(name) or run(name, *a, **k)
    )
    A.sampled(rows, V)
    assert runs == ["gauss_newton each", "penalty_hvp"]


@pytest.mark.parametrize("kind", CURVATURES)
def test_a_kept_matrix_is_formed_once_for_every_damping(kind, tmp_path, monkeypatch):
    net, examples = tanh_net(l2=0.05)
    expected = kind(net, examples, 0.3).dense()
    kept = kind(net, examples, 0.3, checkpoints=tmp_path).dense()
    np.testing.assert_array_equal(kept, expected)
    formed = []
    monkeypatch.setattr(kind, "_formed", lambda self: formed.append(1) or np.eye(self.shape[0]))
    again = kind(net, examples, 0.1, checkpoints=tmp_path).dense()
    assert not formed
    np.testing.assert_allclose(again, expected - 0.2 * np.eye(len(expected)), atol=1e-14)
    # Now the stored matrix belongs to an old theta and must not be used.
    net.theta = net.theta + 1e-9
    kind(net, examples, 0.1, checkpoints=tmp_path).dense()
    assert formed == [1]
