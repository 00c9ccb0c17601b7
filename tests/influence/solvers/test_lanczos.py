import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator

from influence import CG, DivergenceError, Examples, GaussNewton, prepare, solve
from influence.solvers import Lanczos
from influence.solvers.lanczos import krylov, largest_eigenvalues
from tests.influence.problems import dense_net, relative_error, symmetric

D = 40
SPECTRUM = np.geomspace(1e-2, 1, D)


@pytest.fixture(scope="module")
def matrix():
    return symmetric(SPECTRUM)


@pytest.fixture(scope="module")
def B():
    return np.random.default_rng(1).standard_normal((D, 3))


def counting(matrix):
    widths = []

    def product(V):
        widths.append(V.shape[1])
        return matrix @ V

    return LinearOperator(
        matrix.shape, matvec=lambda v: product(v.reshape(-1, 1)), matmat=product, dtype=matrix.dtype
    ), widths


def inverse(matrix, solver):
    """The approximate inverse, dense."""
    return prepare(matrix, solver).apply(np.eye(len(matrix))).x


# --- what is inverted ------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [D, D + 7])
def test_full_rank_is_exact(rank, matrix, B):
    solution = solve(matrix, B, Lanczos(rank, rtol=1e-10))
    assert relative_error(solution.x, np.linalg.solve(matrix, B)) < 1e-11
    assert solution.converged.all() and solution.iterations.tolist() == [1] * 3
    np.testing.assert_allclose(solution.min_curvature, 1e-2, rtol=1e-10)
    assert solution.eigenvalue_bound == pytest.approx(1e-2, rel=1e-10)


def test_full_rank_is_exact_on_an_indefinite_matrix(B):
    A = symmetric([-0.7, -0.2, *np.linspace(0.3, 2, D - 2)])
    solution = solve(A, B, Lanczos(D, rtol=1e-10))
    assert relative_error(solution.x, np.linalg.solve(A, B)) < 1e-11
    assert solution.converged.all()
    np.testing.assert_allclose(solution.min_curvature, -0.7, rtol=1e-10)
    assert solution.eigenvalue_bound == pytest.approx(0.2, rel=1e-10)  # in size


def test_the_approximation_is_that_of_the_formula():
    """Ten eigenvalues far apart from the rest: found exactly, the floor being the tenth."""
    A = symmetric([*np.linspace(1e-3, 1e-2, 30), *np.arange(1.0, 11.0)])
    values, vectors = np.linalg.eigh(A)
    U = vectors[:, -10:]
    expected = U / values[-10:] @ U.T + (np.eye(D) - U @ U.T) / values[-10]
    assert relative_error(inverse(A, Lanczos(10)), expected) < 1e-6
    assert np.isnan(solve(A, np.ones(D), Lanczos(10)).eigenvalue_bound)


@pytest.mark.parametrize("rank", [1, 3, 10, 33])
def test_is_fixed_linear_and_positive_definite(rank, matrix, B):
    M = inverse(matrix, Lanczos(rank))
    np.testing.assert_allclose(M, M.T, atol=1e-12 * np.abs(M).max())
    values = np.linalg.eigvalsh(M)
    # Between 1 / largest and 1 / floor, the floor being above what is left out.
    assert values[0] >= 1 * (1 - 1e-9) and values[-1] <= 1 / SPECTRUM[D - rank - 1] * 1.5
    np.testing.assert_allclose(solve(matrix, B, Lanczos(rank)).x, M @ B, rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(
        solve(matrix, B, Lanczos(rank)).x, solve(matrix, B, Lanczos(rank)).x
    )


def test_low_rank_plus_damping_is_exact():
    """Six rows and damping: a rank above six leaves nothing out, and the floor is the damping."""
    net = dense_net(1, 20, "mse")
    rng = np.random.default_rng(0)
    few = Examples(rng.standard_normal((6, 20)), rng.standard_normal(6))
    A = GaussNewton(net, few, damping=0.3)
    b = rng.standard_normal(21)
    solution = solve(A, b, Lanczos(8, rtol=1e-10))
    assert relative_error(solution.x, np.linalg.solve(A.dense(), b)) < 1e-10
    assert solution.converged[0] and solution.eigenvalue_bound == 0.3  # GaussNewton knows


def test_more_rank_less_residual(matrix, B):
    residuals = [solve(matrix, B, Lanczos(rank)).residual.max() for rank in (5, 20, 39, 40)]
    assert residuals == sorted(residuals, reverse=True)
    assert 0.3 < residuals[0] < 1.01 and residuals[-1] < 1e-12


def test_without_an_aim_nothing_counts_as_converged(matrix, B):
    solution = solve(matrix, B, Lanczos(D))
    assert not solution.converged.any() and (solution.residual < 1e-12).all()
    judged = solve(matrix, B, Lanczos(5, rtol=1e-3))
    assert not judged.converged.any()
    assert judged.remedy.startswith("Lanczos of rank 5 leaves out too much of A: use a larger rank")


def test_as_a_preconditioner_it_cuts_iterations(B):
    A = symmetric(np.geomspace(1e-4, 1, 200)) + 1e-5 * np.eye(200)
    b = np.random.default_rng(2).standard_normal(200)
    plain = solve(A, b, CG(rtol=1e-8))
    better = solve(A, b, CG(rtol=1e-8, preconditioner=Lanczos(60)))
    assert plain.converged[0] and better.converged[0]
    assert better.iterations[0] < plain.iterations[0] / 3
    assert relative_error(better.x, np.linalg.solve(A, b)) < 1e-4


# --- the Krylov space ------------------------------------------------------------------------


def test_passes_over_the_data_are_shared(matrix):
    for rank, block, passes in ((4, 1, 8), (16, 2, 16), (64, 8, 16), (80, 8, 20)):
        A, widths = counting(symmetric(np.linspace(1, 2, 200)) if rank >= 64 else matrix)
        prepare(A, Lanczos(rank))
        assert widths == [block] * passes


def test_breakdown_goes_on_from_a_fresh_direction():
    """Three distinct eigenvalues: the space of one vector closes after three products."""
    A = symmetric(np.repeat([1.0, 2.0, 5.0], [10, 20, 10]))
    b = np.random.default_rng(0).standard_normal(D)
    solution = solve(A, b, Lanczos(D))
    assert solution.residual[0] < 1e-13
    assert relative_error(solution.x, np.linalg.solve(A, b)) < 1e-12
    for A in (np.diag([1.0, 2.0, 3.0, 4.0, 5.0]), np.eye(5), np.diag([2.0, 1.0, 1.0, 1.0, 1.0])):
        for rank in (4, 5):
            b = np.arange(1.0, 6.0)
            error = relative_error(solve(A, b, Lanczos(rank)).x, np.linalg.solve(A, b))
            # Rank 4 of five different eigenvalues takes the smallest for the one above it.
            assert error < 1e-12 if rank == 5 or A[4, 4] == 1 else error > 0.01


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("block", [1, 3, 8])
def test_the_basis_is_orthonormal_and_the_matrix_on_it_is_a(dtype, block):
    A = symmetric([*np.geomspace(1e-6, 1, 30), *np.zeros(10)]).astype(dtype)
    Q, T = krylov(counting(A)[0], D, block=block, seed=0)
    eps = np.finfo(dtype).eps
    assert Q.dtype == np.dtype(dtype)
    np.testing.assert_allclose(Q.T @ Q, np.eye(D), atol=20 * eps)
    np.testing.assert_allclose(T, Q.T @ A @ Q, atol=50 * eps)
    np.testing.assert_array_equal(T, T.T)


@pytest.mark.parametrize("block", [1, 3, 8])
def test_the_basis_is_orthonormal_where_products_bring_nothing_new(block):
    for A in (np.zeros((D, D)), np.ones((D, D)), np.eye(D)):
        Q, T = krylov(counting(A)[0], D, block=block, seed=0)
        np.testing.assert_allclose(Q.T @ Q, np.eye(D), atol=1e-14)
        np.testing.assert_allclose(np.linalg.eigvalsh(T), np.linalg.eigvalsh(A), atol=1e-12)


def test_the_seed_and_nothing_else_decides(matrix, B):
    first = solve(matrix, B, Lanczos(7)).x
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    np.testing.assert_array_equal(solve(matrix, B, Lanczos(7)).x, first)
    assert np.random.random() == expected  # the global seed is not touched
    assert relative_error(solve(matrix, B, Lanczos(7, seed=1)).x, first) > 1e-6
    np.testing.assert_allclose(solve(matrix, B[:, 1], Lanczos(7)).x, first[:, 1], rtol=1e-10)


def test_float32_in_float32_out(matrix, B):
    solution = solve(matrix.astype(np.float32), B, Lanczos(D, rtol=1e-3))
    assert solution.x.dtype == np.float32
    assert relative_error(solution.x, np.linalg.solve(matrix, B)) < 1e-4  # eps times condition 100


# --- the bound on the largest eigenvalue -----------------------------------------------------


def test_the_largest_eigenvalues_are_bounded_from_above():
    spectra = [np.linspace(0, 3, D), [*np.zeros(D - 1), 7.0], np.full(D, 2.0), np.zeros(D),
               -np.linspace(1, 2, D), np.geomspace(1e-3, 1, D)]  # fmt: skip
    matrices = np.stack([symmetric(values, seed) for seed, values in enumerate(spectra)])
    start = np.random.default_rng(0).standard_normal((len(spectra), D))
    truth = np.linalg.eigvalsh(matrices)[:, -1]
    size = np.abs(np.linalg.eigvalsh(matrices)).max(axis=1)
    for steps, below, above in ((4, 0.02, 0.05), (16, 1e-12, 0.02), (60, 1e-12, 1e-12)):
        found = largest_eigenvalues(lambda V: matrices @ V, start, steps)
        assert (found >= truth - below * size).all()
        assert (found <= truth + above * size).all()


def test_a_matrix_that_is_not_finite_has_no_largest_eigenvalue():
    matrices = np.stack([np.eye(3), np.full((3, 3), np.nan)])
    found = largest_eigenvalues(lambda V: matrices @ V, np.ones((2, 3)), 16)
    assert found[0] == pytest.approx(1) and np.isnan(found[1])


# --- what must fail --------------------------------------------------------------------------


def test_an_indefinite_matrix_has_no_floor():
    A = symmetric([-0.7, *np.linspace(0.3, 2, D - 1)])
    message = "^Lanczos needs a positive definite A at a rank below d = 40, met a negative curv"
    with pytest.raises(DivergenceError, match=message) as info:
        prepare(A, Lanczos(20))
    met = float(str(info.value).split("curvature of ")[1].split(",")[0])
    assert -0.7 * (1 + 1e-9) <= met < -0.5
    assert f"a damping well above {-met:.3g}" in str(info.value)


@pytest.mark.parametrize("rank", [12, D])
def test_a_singular_matrix_is_refused_where_it_shows(rank):
    A = symmetric([*np.zeros(30), *np.linspace(1, 2, 10)])
    with pytest.raises(DivergenceError, match="^A must not be singular, got an eigenvalue of"):
        prepare(A, Lanczos(rank))
    prepare(A + 1e-6 * np.eye(D), Lanczos(rank))
    # Below its own rank the floor is an eigenvalue of A, and the residual tells the rest.
    assert solve(A, np.ones(D), Lanczos(5)).residual[0] > 0.1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_curvature_that_rounds_to_zero_is_zero(dtype):
    A = symmetric([*np.zeros(30), *np.linspace(1, 2, 10)]).astype(dtype)
    for seed in range(10):  # the sign of what is met is rounding's
        assert solve(A, np.ones(D), Lanczos(5, seed=seed)).min_curvature[0] == 0


def test_products_that_are_not_finite_are_named():
    A = LinearOperator((D, D), matvec=lambda v: np.full(D, np.nan), dtype=float)
    with pytest.raises(DivergenceError, match="^A must have finite products, got NaN .* in Lanczo"):
        prepare(A, Lanczos(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "^rank must be an integer of at least 1, got 0"),
        ({"rank": 2.0}, r"^rank must be an integer of at least 1, got 2\.0"),
        ({"rank": True}, "^rank must be an integer of at least 1, got True"),
        ({"rank": 5, "seed": -1}, "^seed must be an integer of at least 0, got -1"),
        ({"rank": 5, "rtol": -1.0}, r"^rtol must be non-negative or None, got -1\.0"),
    ],
)
def test_bad_hyperparameters(options, message):
    with pytest.raises(ValueError, match=message):
        Lanczos(**options)
