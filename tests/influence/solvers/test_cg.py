import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator

from influence import CG, solve
from tests.influence.problems import relative_error, symmetric
from tests.influence.solvers.matrices import counting

D = 40


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    d=st.integers(1, 12),
    m=st.integers(1, 4),
    condition=st.floats(1, 1e4),
    seed=st.integers(0, 10_000),
)
def test_solves_every_positive_definite_system(d, m, condition, seed):
    A = symmetric(np.geomspace(1 / condition, 1, d) if d > 1 else [1 / condition], seed)
    B = np.random.default_rng(seed).standard_normal((d, m))
    solution = solve(A, B, CG(rtol=1e-9))
    assert solution.converged.all() and (solution.residual <= 1e-9).all()
    # The error is bounded by |x - A^-1 b| <= |A^-1| |b - A x|.
    error = np.linalg.norm(solution.x - np.linalg.solve(A, B), axis=0)
    assert (error <= condition * 1e-9 * np.linalg.norm(B, axis=0) * (1 + 1e-6)).all()


def test_as_many_iterations_as_distinct_eigenvalues():
    A = symmetric(np.repeat([1.0, 2.0, 5.0], [10, 20, 10]))
    solution = solve(A, np.random.default_rng(0).standard_normal((D, 3)), CG(rtol=1e-10))
    assert solution.iterations.tolist() == [3, 3, 3]


@pytest.mark.parametrize("seed", [579, 966, 1089, 1105, 1158, 1293])
def test_residuals_that_become_parallel_do_not_stall_a_block(seed):
    """Solve four systems with a matrix of three distinct eigenvalues, for seeds that once stalled.

    Without rounding, CG takes three iterations. It may take at most two more.
    """
    rng = np.random.default_rng(seed)
    A = symmetric(rng.choice([1e-3, 1.0, 1e3], 10), seed)
    B = rng.standard_normal((10, 4)) * [1e-30, 1e-15, 1e-3, 1.0]
    solution = solve(A, B, CG(1e-5))
    assert solution.converged.all() and solution.iterations.max() <= 5


def test_a_block_answers_as_its_columns_do_in_fewer_iterations(matrix, B):
    matrix = matrix + 0.1 * np.eye(D)
    B = B * [1, 1e-6, 1e6, 1, 1]  # rtol is relative to each column's own norm
    block = solve(matrix, B, CG(rtol=1e-8))
    for j in range(B.shape[1]):
        alone = solve(matrix, B[:, j], CG(rtol=1e-8))
        # The error of each x is at most rtol times the condition number: 1e-8 * 10.
        assert relative_error(block.x[:, j], alone.x) < 1e-7
        assert block.iterations[j] < alone.iterations[0] / 2


def test_together_a_block_needs_its_share_of_the_dimensions(matrix, B):
    """Check that 5 columns need 8 iterations, for a matrix of order 40.

    After k iterations they have searched 5 k dimensions. One more iteration is allowed for
    rounding.
    """
    block = solve(matrix, B, CG(rtol=1e-8))
    assert block.converged.all() and (block.iterations <= D / 5 + 1).all()


def test_columns_that_repeat_each_other_are_no_trouble(matrix, B):
    twice = np.column_stack([B, B[:, :2], 3 * B[:, 1] - B[:, 2], 0 * B[:, 0]])
    solution = solve(matrix, twice, CG(rtol=1e-9))
    assert solution.converged.all()
    assert relative_error(solution.x, np.linalg.solve(matrix, twice)) < 1e-6


def test_more_columns_than_dimensions(matrix):
    B = np.random.default_rng(0).standard_normal((D, 2 * D))
    solution = solve(matrix, B, CG(rtol=1e-9))
    assert solution.converged.all() and (solution.iterations <= 2).all()


def test_one_product_an_iteration_and_columns_that_are_done_leave(matrix, B):
    values, vectors = np.linalg.eigh(matrix)
    # The first column needs one iteration and the second needs two.
    easy = np.column_stack([vectors[:, 3], vectors[:, :2].sum(axis=1)])
    A, widths = counting(matrix)
    solution = solve(A, np.column_stack([easy, B[:, 0]]), CG(rtol=1e-6))
    steps = solution.iterations
    assert steps[:2].tolist() == [1, 2] and steps[2] > 10
    # A column leaves the block when it has converged. The last product is with all three solutions.
    # It gives the residuals that are reported.
    assert widths == [3, 2] + [1] * (steps[2] - 2) + [3]


def test_the_residual_is_the_true_one_where_the_recurrence_is_not():
    # CG updates its residual by a recurrence. In float32 and with this condition number, 1e6, it
    # becomes smaller than the true residual b - A x, which must be reported.
    A = symmetric(np.geomspace(1e-6, 1, D)).astype(np.float32)
    b = np.random.default_rng(0).standard_normal(D).astype(np.float32)
    solution = solve(A, b, CG(rtol=1e-5, max_iterations=2000))
    true = np.linalg.norm(b - A @ solution.x) / np.linalg.norm(b)
    # Here x is large, so A x in float32 has a large rounding error. Allow 5 % for it.
    assert solution.residual[0] == pytest.approx(true, rel=0.05)
    assert solution.converged[0] == (solution.residual[0] <= 1e-5)
    if not solution.converged[0]:
        assert solution.remedy


@pytest.mark.parametrize("condition", [1e2, 1e3])
def test_the_rtol_that_rounding_allows_is_named_and_is_met(condition):
    A = symmetric(np.geomspace(1 / condition, 1, D)).astype(np.float32)
    b = np.random.default_rng(0).standard_normal((D, 3)).astype(np.float32)
    stopped = solve(A, b, CG(rtol=1e-8))
    assert not stopped.converged.any()
    start, rtol = stopped.remedy.split("(rtol=")
    assert start == "rounding stopped CG above rtol: use float64 or CG"
    rtol = float(rtol.rstrip(")."))
    assert stopped.residual.max() < rtol < 20.1 * stopped.residual.max()
    assert solve(A, b, CG(rtol=rtol)).converged.all()


def test_rounding_at_a_singular_matrix_names_the_rtol_too():
    singular = symmetric([0.0] + [1.0, 2, 3] * 13).astype(np.float32)
    b = singular @ np.random.default_rng(0).standard_normal(D).astype(np.float32)
    stopped = solve(singular, b, CG(rtol=1e-12))
    assert stopped.remedy.startswith("A is singular")
    rtol = float(stopped.remedy.split("(rtol=")[1].rstrip(")."))
    assert solve(singular, b, CG(rtol=rtol)).converged.all()
    nothing = solve(np.diag([1.0, 0.0]), [1.0, 1.0], CG())
    assert nothing.remedy.endswith("drop the redundant parameters.")


def test_a_drifted_recurrence_starts_again():
    """Check that CG restarts from the true residual if rounding has made its own one wrong.

    Without the restart, this ill-conditioned float32 system would not converge.
    """
    A = symmetric(np.geomspace(1e-7, 1, 200)).astype(np.float32)
    b = (A @ np.ones(200, np.float32)).astype(np.float32)
    first = solve(A, b, CG(rtol=1e-6, max_iterations=10_000))
    assert first.residual[0] < 1e-6 and first.converged[0]


def test_too_few_iterations_are_reported_with_the_remedy(matrix, B):
    solution = solve(matrix, B, CG(rtol=1e-8, max_iterations=3))
    assert solution.iterations.tolist() == [3] * 5
    assert not solution.converged.any() and (solution.residual > 1e-8).all()
    assert solution.remedy.startswith("CG stopped at max_iterations = 3: allow more")
    one = solve(matrix, B, CG(max_iterations=1))
    assert one.remedy.startswith("CG stopped at max_iterations = 1: allow more")


def test_iterations_are_bounded_by_ten_times_the_dimension():
    A = symmetric(np.geomspace(1e-12, 1, 5))
    b = np.random.default_rng(0).standard_normal(5)
    assert solve(A, b, CG(rtol=1e-15)).iterations[0] <= 50


def test_curvature_is_the_smallest_rayleigh_quotient_met(matrix):
    values, vectors = np.linalg.eigh(matrix)
    solution = solve(matrix, vectors[:, [7, 20]], CG())
    # Each column reports the smallest curvature over all search directions of the block.
    np.testing.assert_allclose(solution.min_curvature, values[7], rtol=1e-10)
    alone = solve(matrix, vectors[:, 20], CG())
    np.testing.assert_allclose(alone.min_curvature, values[20], rtol=1e-10)


def test_zero_right_hand_side_needs_no_product(matrix):
    A, widths = counting(matrix)
    solution = solve(A, np.zeros((D, 2)), CG())
    assert solution.iterations.tolist() == [0, 0] and np.isnan(solution.min_curvature).all()
    np.testing.assert_array_equal(solution.x, 0)
    assert widths == []


# --- indefinite and singular matrices --------------------------------------------------------

INDEFINITE = symmetric([-0.5, *np.linspace(0.5, 4, 8)])
SINGULAR = symmetric([0.0, *np.linspace(0.5, 4, 8)])


def test_a_preconditioner_does_not_hide_negative_curvature():
    B = np.random.default_rng(0).standard_normal((9, 3))
    for preconditioner in (None, np.eye(9)):
        solution = solve(INDEFINITE, B, CG(preconditioner=preconditioner))
        assert not solution.converged.any() and (solution.residual > 1e-3).all()
        assert -0.5 * (1 + 1e-9) <= solution.min_curvature.min() < 0
        assert solution.remedy.startswith("A is not positive definite: negative curvature -")


def test_columns_that_never_meet_it_are_solved():
    values, vectors = np.linalg.eigh(INDEFINITE)
    B = np.column_stack([vectors[:, 0], vectors[:, 3]])
    solution = solve(INDEFINITE, B, CG())
    assert solution.converged.tolist() == [False, True]
    np.testing.assert_allclose(solution.min_curvature, values[[0, 3]], rtol=1e-9)
    assert relative_error(solution.x[:, 1], vectors[:, 3] / values[3]) < 1e-10


def test_singular_is_said_unless_the_system_has_a_solution():
    inside = SINGULAR @ np.ones(9)
    B = np.column_stack([inside, np.ones(9)])
    solution = solve(SINGULAR, B, CG())
    assert solution.converged.tolist() == [True, False]
    assert solution.residual[0] < 1e-6 < solution.residual[1]
    assert np.isfinite(solution.x).all()
    exact_zero = solve(np.diag([1.0, 0.0]), [0.0, 1.0], CG())
    assert exact_zero.min_curvature[0] == 0 and not exact_zero.converged[0]
    assert exact_zero.remedy.startswith("A is singular: curvature 0 was met")
    rounded_zero = solve(np.diag([1.0, 1e-20]), [1.0, 1.0], CG())
    assert rounded_zero.min_curvature[0] == 0 and not rounded_zero.converged[0]
    assert np.abs(rounded_zero.x).max() < 10  # the exact solution has an entry of 1e20
    assert solution.remedy.startswith("A is singular: curvature")


# --- rounding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_with_more_iterations_than_dimensions(dtype):
    A = symmetric(np.linspace(0.5, 4, 9))
    b = np.random.default_rng(0).standard_normal((9, 2))
    solution = solve(A.astype(dtype), b, CG(rtol=0, max_iterations=10_000))
    eps = np.finfo(dtype).eps
    assert relative_error(solution.x, np.linalg.solve(A, b)) < 100 * eps
    assert (solution.residual < 100 * eps).all()
    if not solution.converged.all():  # the residual may round to zero, which counts as converged
        assert "rounding stopped CG above rtol" in solution.remedy
    assert (solution.iterations < 1000).all()


@pytest.mark.parametrize("columns", [1, 5])
def test_ends_where_rounding_does(columns):
    d = 1000
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    A = ((Q * np.geomspace(1, 1e-2, d)) @ Q.T).astype("float32")
    b = rng.standard_normal((d, columns)).astype("float32")
    solution = solve((A + A.T) / 2, b, CG(rtol=0, max_iterations=2000))
    assert solution.residual.max() < 100 * np.finfo("float32").eps
    assert (solution.min_curvature > 0.9e-2).all()
    assert "rounding stopped CG above rtol" in solution.remedy


# --- preconditioners -------------------------------------------------------------------------


def test_an_approximate_inverse_saves_iterations_and_changes_no_answer(B):
    scales = np.geomspace(1, 1e3, D)
    A = symmetric(np.linspace(1, 2, D)) * np.sqrt(np.outer(scales, scales))
    B = B[:, :2]
    plain = solve(A, B, CG(rtol=1e-8, max_iterations=2000))
    # The preconditioner is an operator with `matvec` only. SciPy multiplies its columns one by one.
    diagonal = LinearOperator(A.shape, matvec=lambda v: np.ravel(v) / scales, dtype=A.dtype)
    better = solve(A, B, CG(rtol=1e-8, preconditioner=diagonal))
    assert better.converged.all() and plain.converged.all()
    assert better.iterations.max() < plain.iterations.min() / 2
    assert relative_error(better.x, np.linalg.solve(A, B)) < 1e-5
