import numpy as np
import pytest

from influence import CG, prepare, solve
from influence.solvers import Lanczos
from influence.solvers.lanczos import krylov, largest_eigenvalues
from tests.influence.problems import relative_error, symmetric
from tests.influence.solvers.matrices import counting, inverse

D = 40


# --- the inverted matrix ---------------------------------------------------------------------


def test_full_rank_is_exact_on_an_indefinite_matrix(B):
    A = symmetric([-0.7, -0.2, *np.linspace(0.3, 2, D - 2)])
    solution = solve(A, B, Lanczos(D, rtol=1e-10))
    assert relative_error(solution.x, np.linalg.solve(A, B)) < 1e-11
    assert solution.converged.all()
    np.testing.assert_allclose(solution.min_curvature, -0.7, rtol=1e-10)
    # The bound is a lower bound on the absolute eigenvalues. The smallest one is |-0.2|.
    assert solution.eigenvalue_bound == pytest.approx(0.2, rel=1e-10)


def test_the_approximation_is_that_of_the_formula():
    """Check rank 10 for a matrix with ten eigenvalues far above the other thirty.

    Lanczos finds the ten exactly. It replaces the others by the smallest of the ten.
    """
    A = symmetric([*np.linspace(1e-3, 1e-2, 30), *np.arange(1.0, 11.0)])
    values, vectors = np.linalg.eigh(A)
    U = vectors[:, -10:]
    expected = U / values[-10:] @ U.T + (np.eye(D) - U @ U.T) / values[-10]
    assert relative_error(inverse(A, Lanczos(10)), expected) < 1e-6
    assert np.isnan(solve(A, np.ones(D), Lanczos(10)).eigenvalue_bound)


def test_more_rank_less_residual(matrix, B):
    residuals = [solve(matrix, B, Lanczos(rank)).residual.max() for rank in (5, 20, 39, 40)]
    assert residuals == sorted(residuals, reverse=True)
    assert 0.3 < residuals[0] < 1.01 and residuals[-1] < 1e-12


def test_as_a_preconditioner_it_cuts_iterations(B):
    A = symmetric(np.geomspace(1e-4, 1, 200)) + 1e-5 * np.eye(200)
    b = np.random.default_rng(2).standard_normal(200)
    plain = solve(A, b, CG(rtol=1e-8))
    better = solve(A, b, CG(rtol=1e-8, preconditioner=Lanczos(110)))
    assert plain.converged[0] and better.converged[0]
    assert better.iterations[0] < plain.iterations[0] / 3
    assert relative_error(better.x, np.linalg.solve(A, b)) < 1e-4


# --- the Krylov space ------------------------------------------------------------------------


def test_passes_over_the_data_are_shared(matrix):
    for rank, block, passes in ((4, 1, 14), (22, 2, 16), (70, 5, 16), (150, 8, 20)):
        A, widths = counting(symmetric(np.linspace(1, 2, 200)) if rank >= 22 else matrix)
        prepare(A, Lanczos(rank))
        assert widths == [block] * passes


def test_breakdown_goes_on_from_a_fresh_direction():
    """Check that Lanczos goes on when its Krylov space is invariant and cannot grow.

    For a matrix with three different eigenvalues, this happens after three products.
    """
    A = symmetric(np.repeat([1.0, 2.0, 5.0], [10, 20, 10]))
    b = np.random.default_rng(0).standard_normal(D)
    solution = solve(A, b, Lanczos(D))
    assert solution.residual[0] < 1e-13
    assert relative_error(solution.x, np.linalg.solve(A, b)) < 1e-12
    for A in (np.diag([1.0, 2.0, 3.0, 4.0, 5.0]), np.eye(5), np.diag([2.0, 1.0, 1.0, 1.0, 1.0])):
        for rank in (4, 5):
            b = np.arange(1.0, 6.0)
            error = relative_error(solve(A, b, Lanczos(rank)).x, np.linalg.solve(A, b))
            # With five different eigenvalues, rank 4 replaces the smallest one by the second
            # smallest.
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


# --- the bound on the largest eigenvalue -----------------------------------------------------


def test_the_largest_eigenvalues_are_bounded_from_above():
    spectra = [
        np.linspace(0, 3, D),
        [*np.zeros(D - 1), 7.0],
        np.full(D, 2.0),
        np.zeros(D),
        -np.linspace(1, 2, D),
        np.geomspace(1e-3, 1, D),
    ]
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


# --- indefinite and singular matrices --------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_curvature_that_rounds_to_zero_is_zero(dtype):
    A = symmetric([*np.zeros(30), *np.linspace(1, 2, 10)]).astype(dtype)
    for seed in range(10):  # zero is computed with a rounding error, whose sign depends on the seed
        assert solve(A, np.ones(D), Lanczos(5, seed=seed)).min_curvature[0] == 0
