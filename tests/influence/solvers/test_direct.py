import re
import tracemalloc

import keras
import numpy as np
import pytest
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator

from influence import (
    Direct,
    DivergenceError,
    Examples,
    GaussNewton,
    GenericNeuralNet,
    Hessian,
    MulticlassLogisticRegression,
    prepare,
    solve,
)
from influence.curvature.chain import chain_hessian
from influence.solvers.direct import dense
from tests.influence.problems import relative_error, symmetric

# From order 64 on, the solver computes the extreme eigenvalues by iteration.
SIZES = [5, 63, 64, 150]


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("negative", [0, 1, 3])
def test_answer_residual_and_smallest_eigenvalue(d, negative):
    A = symmetric([*np.linspace(-1.5, -0.4, negative), *np.linspace(0.3, 2, d - negative)])
    B = np.random.default_rng(0).standard_normal((d, 3))
    solution = solve(A, B, Direct())
    rounding = 1e-12 if negative else 1e-13
    assert relative_error(solution.x, np.linalg.solve(A, B)) < rounding
    assert solution.converged.all() and (solution.residual < rounding / 10).all()
    smallest = np.linalg.eigvalsh(A)[0]
    # min_curvature is the smallest eigenvalue. ARPACK computes it with the tolerance 1e-3.
    np.testing.assert_allclose(solution.min_curvature, smallest, rtol=1e-3)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("others", ["positive", "indefinite"])
def test_singular(d, others):
    rest = np.linspace(0.3, 2, d - 1) * (
        1 if others == "positive" else np.where(np.arange(d - 1) % 2, 1, -1)
    )
    with pytest.raises(DivergenceError, match="^A must not be singular, got an eigenvalue of"):
        solve(symmetric([0.0, *rest]), np.ones(d), Direct())


@pytest.mark.parametrize(
    "matrix", [symmetric([0.0, *np.linspace(0.5, 4, 8)]), np.zeros((9, 9)), np.ones((9, 9))]
)
def test_singular_names_a_damping_that_works(matrix):
    with pytest.raises(DivergenceError, match="^A must not be singular, got an eigenvalue") as info:
        solve(matrix, np.ones(9), Direct())
    found = re.search(r"damping of at least (\S+),", str(info.value))
    assert found is not None
    damping = float(found[1])
    # The suggested damping is far below the nonzero eigenvalues, which are at least 0.5.
    assert 0 < damping < 1e-6
    b = np.random.default_rng(0).standard_normal(9)
    assert solve(matrix + damping * np.eye(9), b, Direct()).converged.all()


@pytest.mark.parametrize("values", [[0.2, *np.linspace(0.5, 2, 99)], [-0.7, -0.2, *[1.0] * 98]])
def test_where_iteration_fails_all_eigenvalues_are_taken(values, monkeypatch):
    def fails(*_, **__):
        raise ArpackNoConvergence("no", np.empty(0), np.empty((0, 0)))

    monkeypatch.setattr("influence.solvers.direct.eigsh", fails)
    solution = solve(symmetric(values), np.ones(100), Direct())
    np.testing.assert_allclose(solution.min_curvature, min(values), rtol=1e-9)
    assert solution.eigenvalue_bound == pytest.approx(0.2, rel=1e-9)
    for rest in (np.linspace(0.3, 2, 99), np.linspace(-1, -0.3, 99)):
        with pytest.raises(DivergenceError, match="^A must not be singular, got an eigenvalue of"):
            solve(symmetric([0.0, *rest]), np.ones(100), Direct())


def test_ill_conditioned_is_not_converged():
    # The matrix is not singular, but rounding in float32 leaves a residual far above 1e-9.
    A = symmetric([1e-5, *np.linspace(1, 2, 9)]).astype(np.float32)
    solution = solve(A, np.ones(10), Direct(rtol=1e-9))
    assert not solution.converged[0] and solution.residual[0] > 1e-9
    assert solution.remedy.startswith("the matrix is too ill conditioned for its dtype: use float6")
    # In float32 an eigenvalue has an error of about 1e-7 of the largest one, 2. This is 2e-7, or
    # 2 % of the smallest one, 1e-5.
    assert solution.min_curvature[0] == pytest.approx(1e-5, rel=0.05)


@pytest.mark.parametrize("kind", ["affine layers", "products", "closed form", "chain"])
def test_preparing_holds_no_more_than_is_counted(kind):
    """Check that `prepare` needs at most the memory of three matrices (d, d) and one batch of rows.

    The matrices are in the net's dtype.
    """
    rng = np.random.default_rng(0)
    if kind == "closed form":
        net = MulticlassLogisticRegression(300, 4, dtype="float32")
        A = Hessian(net, Examples(rng.standard_normal((20, 300)), np.arange(20) % 4), 0.1)
    else:
        layers = [keras.layers.Dense(30), keras.layers.Activation("tanh"), keras.layers.Dense(1)]
        if kind == "products":
            layers[:2] = [keras.layers.Dense(30, activation="tanh")]
        net = GenericNeuralNet(keras.Sequential([keras.Input((38,)), *layers]), "mse")
        x = rng.standard_normal((8, 38)).astype("float32")
        examples = Examples(x, x[:, 0])
        # With this damping the Hessian is positive definite, so it has a Cholesky factor.
        A = Hessian(net, examples, 10.0) if kind == "chain" else GaussNewton(net, examples, 0.1)
        assert kind != "chain" or chain_hessian(net, examples) is not None
    d = net.num_parameters
    assert 1190 < d < 1210
    prepare(A, Direct())  # trace the functions before memory is measured
    tracemalloc.start()
    prepare(A, Direct())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2 * d**2 * 4 < peak < 3 * d**2 * 4 + 4e6


def test_a_dense_form_that_is_not_the_operators_is_refused():
    class Wrong(LinearOperator):
        def __init__(self):
            super().__init__(np.float64, (3, 3))

        def _matvec(self, v):
            return np.diag([1.0, 2.0, 3.0]) @ v

        def dense(self):
            return np.diag([1.0, 2.0, 3.001])

    with pytest.raises(DivergenceError, match="^A must have products that agree with its dense"):
        prepare(Wrong(), Direct())


def test_dense_form_of_anything():
    A = symmetric(np.linspace(1, 2, 6))
    operator = LinearOperator(A.shape, matvec=lambda v: A @ v, dtype=A.dtype)
    np.testing.assert_allclose(dense(operator), A, rtol=1e-14)
    assert dense(operator).dtype == np.float64


def test_the_users_matrix_is_not_overwritten():
    A = symmetric([-1.0, 1.0, 2.0])
    for matrix in (A, symmetric([1.0, 2.0, 3.0])):
        before = matrix.copy()
        solve(matrix, np.ones(3), Direct())
        np.testing.assert_array_equal(matrix, before)


def test_no_global_seed_is_touched():
    A = symmetric(np.linspace(0.3, 2, 80))
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    first = solve(A, np.ones(80), Direct())
    assert np.random.random() == expected
    np.testing.assert_array_equal(
        solve(A, np.ones(80), Direct()).min_curvature, first.min_curvature
    )
