import re

import numpy as np
import pytest
from scipy.sparse.linalg import aslinearoperator

from influence import CG, Direct, GaussNewton, Hessian, LiSSA, prepare, solve
from influence.solvers import Lanczos, Nystrom
from influence.solvers.preconditioner import inverse_of
from tests.influence.problems import relative_error, symmetric, tanh_net

D = 12
MATRIX = symmetric(np.geomspace(0.01, 1, D))
INDEFINITE = symmetric([-0.5, *np.linspace(0.5, 4, D - 1)])


INVERSE = np.linalg.inv(MATRIX)
EXACT = [Direct(), prepare(MATRIX, Direct()), Lanczos(D), INVERSE, aslinearoperator(INVERSE)]
APPROXIMATE = [Lanczos(5), Nystrom(5), prepare(MATRIX, Nystrom(5)), None]


@pytest.mark.parametrize("preconditioner", EXACT + APPROXIMATE)
def test_what_is_fixed_linear_and_positive_definite_serves(preconditioner):
    B = np.random.default_rng(0).standard_normal((D, 3))
    M = inverse_of(preconditioner, aslinearoperator(MATRIX))(np.eye(D))
    np.testing.assert_allclose(M, M.T, atol=1e-10 * np.abs(M).max())
    assert np.linalg.eigvalsh(M)[0] > 0
    solution = solve(MATRIX, B, CG(rtol=1e-10, preconditioner=preconditioner))
    assert solution.converged.all()
    exact = any(preconditioner is one for one in EXACT)
    assert (solution.iterations.tolist() == [1] * 3) == exact
    error = relative_error(solution.x, np.linalg.solve(MATRIX, B))
    assert error < (1e-9 if exact else 1e-7)


@pytest.mark.parametrize(
    ("preconditioner", "named"),
    [
        (CG(), r"CG\(rtol=1e-06.*: where it stops, and so what it answers, depends on the right"),
        (prepare(MATRIX, CG()), r"CG\(rtol=1e-06.*: where it stops"),
        (LiSSA(), r"LiSSA\(scale=None.*: its batches come in an order, so .* not symmetric"),
        (LiSSA(scale=5.0, change=0.0), "LiSSA.*: its batches come in an order"),
    ],
)
def test_solvers_that_are_not_one_symmetric_map_are_refused_by_name(preconditioner, named):
    with pytest.raises(
        TypeError, match=f"^preconditioner must be fixed, linear and positive definite, got {named}"
    ):
        CG(preconditioner=preconditioner)


@pytest.mark.parametrize("preconditioner", ["jacobi", Direct, 3, np.ones(3), lambda r: r])
def test_what_is_no_preconditioner_is_refused(preconditioner):
    message = r"^preconditioner must be a solver such as Nystrom\(100\), what prepare returned, or"
    with pytest.raises(TypeError, match=message):
        CG(preconditioner=preconditioner)


@pytest.mark.parametrize("solver", [Direct(), Lanczos(D)])
def test_an_indefinite_matrix_makes_no_preconditioner(solver):
    message = f"^preconditioner must be positive definite, got a curvature of -0.5 from {solver!r}"
    for preconditioner in (solver, prepare(INDEFINITE, solver)):
        with pytest.raises(ValueError, match=re.escape(message[1:])):
            prepare(INDEFINITE, CG(preconditioner=preconditioner))


@pytest.mark.parametrize("matrix", [-np.eye(D), np.zeros((D, D)), np.full((D, D), np.nan)])
def test_an_inverse_that_is_not_positive_definite_is_refused(matrix):
    with pytest.raises(ValueError, match="^preconditioner must be positive definite, got v'Mv = "):
        prepare(MATRIX, CG(preconditioner=matrix))


@pytest.mark.parametrize("preconditioner", [np.eye(3), prepare(np.eye(3), Direct())])
def test_the_shape_must_be_that_of_the_matrix(preconditioner):
    message = r"^preconditioner must have the shape of A, \(12, 12\), got \(3, 3\)"
    with pytest.raises(ValueError, match=message):
        prepare(MATRIX, CG(preconditioner=preconditioner))


def test_gauss_newton_preconditions_a_damped_hessian():
    net, examples = tanh_net()
    H = Hessian(net, examples, 3.0)
    inverse = prepare(GaussNewton(net, examples, 3.0), Direct())
    b = np.ones(net.num_parameters)
    plain, better = (solve(H, b, CG(1e-10, preconditioner=M)) for M in (None, inverse))
    assert better.converged[0] and better.iterations[0] < plain.iterations[0]
    assert relative_error(better.x, np.linalg.solve(H.dense(), b)) < 1e-8


def test_what_is_prepared_prints_the_same_in_every_process():
    """Check the repr, because it is part of the names of refits stored on disk."""
    net, examples = tanh_net()
    again, same = tanh_net()
    labels = [
        repr(CG(preconditioner=prepare(GaussNewton(n, e, 0.5), Nystrom(3))))
        for n, e in ((net, examples), (again, same))
    ]
    assert labels[0] == labels[1] and " at 0x" not in labels[0]
    assert re.fullmatch(
        r"CG\(rtol=1e-06, max_iterations=None, preconditioner=prepare\(GaussNewton\(20 rows, d=21, "
        r"damping=0\.5, theta and labels #[0-9a-f]{8}\), Nystrom\(rank=3, seed=0, rtol=None\)\)\)",
        labels[0],
    )
    other = repr(prepare(GaussNewton(net, examples, 0.25), Nystrom(3)))
    assert other not in labels[0]
    again.theta = again.theta + 1e-9
    assert repr(prepare(GaussNewton(again, same, 0.5), Nystrom(3))) not in labels[0]
    assert " at 0x" not in repr(prepare(MATRIX, Direct()))
