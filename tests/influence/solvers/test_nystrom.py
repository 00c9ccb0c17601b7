import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator

from influence import CG, DivergenceError, Examples, GaussNewton, Hessian, prepare, solve
from influence.solvers import Nystrom
from tests.influence.problems import dense_net, logistic, relative_error, symmetric, tanh_net

D = 40
SPECTRUM = np.geomspace(1e-2, 1, D)


@pytest.fixture(scope="module")
def matrix():
    return symmetric(SPECTRUM)


@pytest.fixture(scope="module")
def B():
    return np.random.default_rng(1).standard_normal((D, 3))


class Damped(LinearOperator):
    """A matrix that says what damping it holds."""

    def __init__(self, matrix, damping):
        self.matrix, self.damping = matrix + damping * np.eye(len(matrix)), damping
        super().__init__(matrix.dtype, matrix.shape)

    def _matmat(self, V):
        return self.matrix @ V

    def _matvec(self, v):
        return self.matrix @ v


def inverse(matrix, solver):
    return prepare(matrix, solver).apply(np.eye(matrix.shape[0])).x


# --- what is inverted ------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [D, D + 7])
def test_full_rank_is_exact(rank, matrix, B):
    solution = solve(matrix, B, Nystrom(rank, rtol=1e-10))
    assert relative_error(solution.x, np.linalg.solve(matrix, B)) < 1e-11
    assert solution.converged.all()
    np.testing.assert_allclose(solution.min_curvature, 1e-2, rtol=1e-10)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 5, 20, 39])
def test_the_approximation_is_that_of_the_formula(rank, damping, matrix):
    """The textbook's formula, with the sketch that the seed stands for."""
    A = Damped(matrix, damping)
    Omega = np.linalg.qr(np.random.default_rng(3).standard_normal((D, rank)))[0]
    low = matrix @ Omega @ np.linalg.solve(Omega.T @ matrix @ Omega, Omega.T @ matrix)
    values, vectors = np.linalg.eigh(low)
    U, kept = vectors[:, -rank:], values[-rank:]
    approximation = U * (kept + damping) @ U.T
    approximation += (kept[0] + damping) * (np.eye(D) - U @ U.T)
    assert relative_error(inverse(A, Nystrom(rank, seed=3)), np.linalg.inv(approximation)) < 1e-9


def test_damping_is_taken_off_before_the_sketch():
    """Low rank plus damping: exact, if the rank is not spent on the damping."""
    low = symmetric([*np.zeros(34), *np.linspace(1, 2, 6)])
    b = np.random.default_rng(0).standard_normal(D)
    known = solve(Damped(low, 0.3), b, Nystrom(7))  # the seventh value, zero, is the floor
    assert known.residual[0] < 1e-13
    assert relative_error(known.x, np.linalg.solve(low + 0.3 * np.eye(D), b)) < 1e-13
    unknown = solve(low + 0.3 * np.eye(D), b, Nystrom(7))
    assert unknown.residual[0] > 1e-2


@pytest.mark.parametrize("curvature", [Hessian, GaussNewton])
def test_the_penalty_of_a_convex_model_is_taken_off_too(curvature):
    p = logistic("sigmoid", num_rows=8, num_inputs=30, weight_decay=0.05)
    A = curvature(p.net, p.train, damping=0.1)
    b = np.random.default_rng(0).standard_normal(30)
    matrix = p.oracle.hessian(p.theta) + 0.1 * np.eye(30)
    solution = solve(A, b, Nystrom(9, rtol=1e-10))  # eight rows: rank 8 and 0.15 I
    assert solution.converged[0]
    assert relative_error(solution.x, np.linalg.solve(matrix, b)) < 1e-10
    assert solution.eigenvalue_bound == pytest.approx(0.15)


def test_low_rank_gauss_newton_plus_damping_is_exact():
    net = dense_net(1, 20, "mse")
    rng = np.random.default_rng(0)
    few = Examples(rng.standard_normal((6, 20)), rng.standard_normal(6))
    A = GaussNewton(net, few, damping=0.3)
    b = rng.standard_normal(21)
    assert relative_error(solve(A, b, Nystrom(9)).x, np.linalg.solve(A.dense(), b)) < 1e-10


@pytest.mark.parametrize("rank", [1, 3, 10, 33])
def test_is_fixed_linear_and_positive_definite(rank, matrix, B):
    M = inverse(matrix, Nystrom(rank))
    np.testing.assert_allclose(M, M.T, atol=1e-12 * np.abs(M).max())
    assert np.linalg.eigvalsh(M)[0] >= 1 * (1 - 1e-9)  # what is sketched is never above A
    solution = solve(matrix, B, Nystrom(rank))
    np.testing.assert_allclose(solution.x, M @ B, rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(solution.x, solve(matrix, B, Nystrom(rank)).x)
    assert not solution.converged.any()
    assert 1e-2 <= solution.min_curvature[0] <= 1


def test_one_pass_over_the_data(matrix):
    widths = []
    A = LinearOperator(
        (D, D), matvec=None, matmat=lambda V: widths.append(V.shape[1]) or matrix @ V, dtype=float
    )
    prepare(A, Nystrom(11))
    assert widths == [11]


@pytest.mark.parametrize(("rank", "factor"), [(10, 1.2), (60, 8), (90, 30)])
def test_as_a_preconditioner_it_cuts_iterations(rank, factor):
    """From 1e5 the condition number falls towards the first eigenvalue left out over damping."""
    A = Damped(symmetric(np.geomspace(1e-12, 1, 200)), 1e-5)
    b = np.random.default_rng(2).standard_normal(200)
    plain = solve(A, b, CG(rtol=1e-8))  # 619 iterations
    better = solve(A, b, CG(rtol=1e-8, preconditioner=Nystrom(rank)))  # 472, 50, 11
    assert plain.converged[0] and better.converged[0]
    assert plain.iterations[0] > factor * better.iterations[0]
    assert relative_error(better.x, np.linalg.solve(A.matrix, b)) < 1e-3  # 1e-8 times 1e5


def test_the_seed_and_nothing_else_decides(matrix, B):
    first = solve(matrix, B, Nystrom(7)).x
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    np.testing.assert_array_equal(solve(matrix, B, Nystrom(7)).x, first)
    assert np.random.random() == expected
    assert relative_error(solve(matrix, B, Nystrom(7, seed=1)).x, first) > 1e-6


def test_float32_in_float32_out(matrix, B):
    solution = solve(matrix.astype(np.float32), B, Nystrom(D, rtol=1e-2))
    assert solution.x.dtype == np.float32 and solution.converged.all()
    assert relative_error(solution.x, np.linalg.solve(matrix, B)) < 1e-3


# --- definite by its damping alone -----------------------------------------------------------


def test_a_matrix_that_only_damping_makes_definite_is_sketched_whole():
    low = symmetric([-0.2, *np.linspace(0.01, 2, D - 1)])
    b = np.random.default_rng(0).standard_normal(D)
    A = Damped(low, 0.3)
    for rank in (20, D):
        M = inverse(A, Nystrom(rank))
        assert np.linalg.eigvalsh((M + M.T) / 2)[0] > 0
    exact = solve(A, b, Nystrom(D))
    assert exact.residual[0] < 1e-12
    assert exact.min_curvature[0] == pytest.approx(0.1, rel=1e-9)


# --- what must fail --------------------------------------------------------------------------


def test_negative_curvature_is_named():
    A = symmetric([-1.5, *np.linspace(0.3, 2, D - 1)])
    with pytest.raises(DivergenceError, match="^Nystrom needs a positive definite A, met a nega"):
        prepare(A, Nystrom(30))
    with pytest.raises(DivergenceError, match=r"curvature of -1\.5, .* damping well above 1\.5"):
        prepare(A, Nystrom(D))


def test_negative_curvature_of_a_network_is_named_and_damping_mends_it():
    net, examples = tanh_net()
    d, b = net.num_parameters, np.ones(net.num_parameters)
    smallest = np.linalg.eigvalsh(Hessian(net, examples).dense())[0]
    with pytest.raises(DivergenceError, match=f"negative curvature of {smallest:.3g}, and"):
        solve(Hessian(net, examples), b, Nystrom(d))
    damped = solve(Hessian(net, examples, -2 * smallest), b, Nystrom(d))
    assert damped.residual[0] < 1e-11
    assert damped.min_curvature[0] == pytest.approx(-smallest, rel=1e-9)


def test_a_singular_matrix_is_refused_where_it_shows():
    A = symmetric([*np.zeros(30), *np.linspace(1, 2, 10)])
    for rank in (12, D):
        with pytest.raises(DivergenceError, match="^A must not be singular, got an eigenvalue of"):
            prepare(A, Nystrom(rank))
        prepare(A + 1e-6 * np.eye(D), Nystrom(rank))
    assert solve(A, np.ones(D), Nystrom(5)).residual[0] > 0.1
    with pytest.raises(DivergenceError, match="^A must not be singular"):
        prepare(np.zeros((D, D)), Nystrom(5))


def test_products_that_are_not_finite_are_named():
    A = LinearOperator((D, D), matvec=lambda v: np.full(D, np.nan), dtype=float)
    with pytest.raises(DivergenceError, match="^A must have finite products, got NaN .* in Nystro"):
        prepare(A, Nystrom(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "^rank must be an integer of at least 1, got 0"),
        ({"rank": 5, "seed": 0.5}, r"^seed must be an integer of at least 0, got 0\.5"),
        ({"rank": 5, "rtol": float("nan")}, "^rtol must be non-negative or None, got nan"),
    ],
)
def test_bad_hyperparameters(options, message):
    with pytest.raises(ValueError, match=message):
        Nystrom(**options)
