import numpy as np
import pytest

from influence import CG, DivergenceError, GaussNewton, Hessian, prepare, solve
from influence.solvers import Nystrom
from tests.influence.problems import logistic, relative_error, symmetric
from tests.influence.solvers.matrices import Damped, approximation, counting, inverse

D = 40


# --- the inverted matrix ---------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 5, 20, 39])
def test_the_approximation_is_that_of_the_formula(rank, damping, matrix):
    A, solver = Damped(matrix, damping), Nystrom(rank, seed=3)
    expected = np.linalg.inv(approximation(A, A.matrix, solver))
    assert relative_error(inverse(A, solver), expected) < 1e-9


def test_damping_is_taken_off_before_the_sketch():
    """Check a matrix of rank 6 plus the damping 0.3 I, at rank 7.

    If Nystrom knows the damping, it sketches the matrix without it, and the answer is exact.
    """
    low = symmetric([*np.zeros(34), *np.linspace(1, 2, 6)])
    b = np.random.default_rng(0).standard_normal(D)
    known = solve(Damped(low, 0.3), b, Nystrom(7))
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
    # The weight decay and the damping add 0.15 I. The eight losses add a matrix of rank 8.
    solution = solve(A, b, Nystrom(9, rtol=1e-10))
    assert solution.converged[0]
    assert relative_error(solution.x, np.linalg.solve(matrix, b)) < 1e-10
    assert solution.eigenvalue_bound == pytest.approx(0.15)


def test_one_pass_over_the_data(matrix):
    A, widths = counting(matrix)
    prepare(A, Nystrom(11))
    assert widths == [11]


@pytest.mark.parametrize(("rank", "factor"), [(10, 1.2), (60, 8), (90, 30)])
def test_as_a_preconditioner_it_cuts_iterations(rank, factor):
    """Check that Nystrom as a preconditioner saves iterations of CG, and more at higher rank."""
    A = Damped(symmetric(np.geomspace(1e-12, 1, 200)), 1e-5)
    b = np.random.default_rng(2).standard_normal(200)
    # CG takes 619 iterations alone, and 472, 50 and 11 with preconditioners of rank 10, 60 and 90.
    plain = solve(A, b, CG(rtol=1e-8))
    better = solve(A, b, CG(rtol=1e-8, preconditioner=Nystrom(rank)))
    assert plain.converged[0] and better.converged[0]
    assert plain.iterations[0] > factor * better.iterations[0]
    # The error is at most rtol, 1e-8, times the condition number, 1e5.
    assert relative_error(better.x, np.linalg.solve(A.matrix, b)) < 1e-3


# --- matrices that only the damping makes definite -------------------------------------------


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


# --- indefinite and singular matrices --------------------------------------------------------


def test_negative_curvature_is_named():
    A = symmetric([-1.5, *np.linspace(0.3, 2, D - 1)])
    with pytest.raises(DivergenceError, match="^Nystrom needs a positive definite A, met a nega"):
        prepare(A, Nystrom(30))
    with pytest.raises(DivergenceError, match=r"curvature of -1\.5, .* damping well above 1\.5"):
        prepare(A, Nystrom(D))
