"""Tests of random systems of many kinds and sizes. Every answer that counts as converged is right.

`make systems` solves 200 systems of each kind. The tests solve $SYSTEMS of each kind, or 2 if the
variable is not set. The first system has the seed $SYSTEMS_FROM, or 0.
"""

import os
import warnings

import numpy as np
import pytest
import scipy.sparse
from scipy.sparse.linalg import LinearOperator

from influence import (
    CG,
    EKFAC,
    Direct,
    DivergenceError,
    Examples,
    GaussNewton,
    Lanczos,
    LiSSA,
    MulticlassLogisticRegression,
    Nystrom,
    solve,
)
from tests.influence.problems import logistic

COUNT, FIRST = int(os.environ.get("SYSTEMS", "2")), int(os.environ.get("SYSTEMS_FROM", "0"))
# With the last six seeds, CG once stalled in a block or met an error in SciPy.
SEEDS = sorted({*range(FIRST, FIRST + COUNT), 51, 63, 154, 175, 176, 193})
EXACT = {
    "CG": CG(1e-5),
    "CG preconditioned": CG(1e-5, preconditioner=Nystrom(5)),
    "Direct": Direct(1e-5),
}
SOLVERS = EXACT | {
    "LiSSA": LiSSA(depth=300, repeats=1),
    "Lanczos": Lanczos(4, rtol=0.1),
    "Lanczos, full rank": Lanczos(1000, rtol=1e-5),
    "Nystrom": Nystrom(4, rtol=0.1),
    "Nystrom, full rank": Nystrom(1000, rtol=1e-5),
}


def _of(rng, values):
    Q = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    A = (Q * values) @ Q.T
    return (A + A.T) / 2


def _rows(rng, d):
    X = rng.standard_normal((2 * d, d))
    # Some rows are equal, some rows are zero, and the last feature is zero.
    X[::3], X[1::4], X[:, -1] = X[0], 0, 0
    return X.T @ X / len(X)


KINDS = {
    "well conditioned": lambda rng, d: _of(rng, rng.uniform(1, 10, d)),
    "ill conditioned": lambda rng, d: _of(rng, 10.0 ** rng.uniform(-12, 0, d)),
    "indefinite": lambda rng, d: _of(rng, rng.uniform(0.1, 1, d) * rng.choice([-1, 1], d)),
    "singular": lambda rng, d: _of(rng, np.where(np.arange(d) < d / 2, 0, 1.0)),
    "clustered": lambda rng, d: _of(rng, rng.choice([1e-3, 1.0, 1e3], d)),
    "equal and zero rows": _rows,
    "d = 1": lambda rng, d: rng.uniform(0.1, 2, (1, 1)),
}
BLOCKS = {
    "one": lambda rng, d: rng.standard_normal((d, 1)),
    "many": lambda rng, d: rng.standard_normal((d, 20 * d)),
    "of all sizes": lambda rng, d: rng.standard_normal((d, 4)) * [1e-30, 1e-15, 1e-3, 1.0],
}


def _solved(A, B, solver):
    """Return the solution, or None if the solver raises a DivergenceError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return solve(A, B, solver)
        except DivergenceError:
            return None


def _check(A, B, solution, rtol):
    """Check that all converged columns have residuals of at most rtol, apart from rounding.

    The residuals are computed in long double.
    """
    exact = np.longdouble
    R = B.astype(exact) - A.astype(exact) @ solution.x.astype(exact)
    scale = np.abs(B).max(axis=0)
    scale[scale == 0] = 1
    true = np.linalg.norm(R / scale, axis=0) / np.linalg.norm(B / scale, axis=0)
    rounding = 4 * np.finfo(A.dtype).eps * len(A)
    size = np.linalg.norm(A, 2) * np.linalg.norm(solution.x / scale, axis=0)
    slack = rounding * (1 + size / np.linalg.norm(B / scale, axis=0))
    assert (true[solution.converged] <= (rtol + slack)[solution.converged]).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOLVERS)
def test_what_counts_as_converged_is_right(name, kind, block, dtype):
    for seed in SEEDS:
        rng = np.random.default_rng([seed, list(KINDS).index(kind)])
        d = 1 if kind == "d = 1" else int(rng.integers(2, 12))
        A, B = KINDS[kind](rng, d).astype(dtype), BLOCKS[block](rng, d).astype(dtype)
        solution = _solved(A, B, SOLVERS[name])
        if solution is not None:
            assert np.isfinite(solution.x).all() and np.isfinite(solution.residual).all()
            _check(A, B, solution, SOLVERS[name].rtol)
        solvable = ("well conditioned", "d = 1") + (("clustered",) if dtype == "float64" else ())
        if name in EXACT and kind in solvable:
            assert solution is not None and solution.converged.all()


INPUTS = {
    "one row": lambda rng: rng.standard_normal((1, 5)),
    "few rows": lambda rng: rng.standard_normal((3, 5)),
    "many rows": lambda rng: rng.standard_normal((12, 5)),
    "equal and zero rows": lambda rng: rng.standard_normal((4, 5))[[0, 0, 0, 1, 2, 3]] * _ZEROS,
    "features of all sizes": lambda rng: rng.standard_normal((12, 5)) * [1e-9, 1e-3, 1, 30, 1e3],
    "large": lambda rng: rng.standard_normal((12, 5)) * 1e90,
    "small": lambda rng: rng.standard_normal((12, 5)) * 1e-90,
}
_ZEROS = np.array([[1.0]] * 4 + [[0.0]] * 2)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", [*SOLVERS, "EKFAC"])
def test_what_counts_as_converged_is_right_of_a_net(name, inputs):
    p = logistic("softmax")
    solver = SOLVERS.get(name, EKFAC(rtol=0.1))
    count = min(COUNT, 20) if name == "LiSSA" else COUNT  # LiSSA is slow here
    for seed in range(FIRST, FIRST + count):
        rng = np.random.default_rng([seed, list(INPUTS).index(inputs)])
        x = INPUTS[inputs](rng)
        p.net.theta = rng.standard_normal(15) / np.abs(x).max()
        H = GaussNewton(p.net, Examples(x, rng.integers(3, size=len(x))), rng.choice([0.0, 1e-3]))
        A, B = H.dense(), rng.standard_normal((15, 3)) * [1e-30, 1, 1e30]
        solution = _solved(H, B, solver)
        if solution is not None:
            _check(A, B, solution, solver.rtol)


# --- matrices and right-hand sides of any size --------------------------------------------------


class Products(LinearOperator):
    """A matrix that gives only its products."""

    def __init__(self, matrix):
        self._matrix = matrix
        super().__init__(matrix.dtype, matrix.shape)

    def _matmat(self, V):
        return self._matrix @ V


@pytest.mark.parametrize(
    ("dtype", "exponents"), [("float32", (-100, -60, 60, 100)), ("float64", (-980, -500, 500, 980))]
)
@pytest.mark.parametrize("held", [np.asarray, Products], ids=["array", "operator"])
@pytest.mark.parametrize("name", SOLVERS)
def test_the_answer_scales_with_b_and_with_the_inverse_of_a(name, held, dtype, exponents):
    """Multiply b and A by powers of two.

    With b, the answer must scale exactly. With A, it must scale inversely, up to rounding.
    """
    rng = np.random.default_rng(1)
    A = _of(rng, rng.uniform(1, 10, 24)).astype(dtype)
    B = rng.standard_normal((24, 2)).astype(dtype)
    solver, eps = SOLVERS[name], np.finfo(dtype).eps
    expected = solve(A, B, solver)
    for exponent in exponents:
        found = solve(A, np.ldexp(B, exponent), solver)
        np.testing.assert_array_equal(np.ldexp(found.x, -exponent), expected.x)
        for field in ("residual", "iterations", "converged", "min_curvature"):
            np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
        for a, b in ((exponent, 0), (exponent, exponent // 2)):
            found = solve(held(np.ldexp(A, a)), np.ldexp(B, b), solver)
            # A combines all entries of x, so each entry may have the rounding error of the largest.
            gap = np.abs(np.ldexp(found.x, a - b) - expected.x).max(axis=0)
            assert (gap <= 50 * eps * np.abs(expected.x).max(axis=0)).all()
            np.testing.assert_allclose(found.residual, expected.residual, rtol=1e-3, atol=20 * eps)
            np.testing.assert_array_equal(found.iterations, expected.iterations)
            np.testing.assert_array_equal(found.converged, expected.converged)
            lowest = np.ldexp(found.min_curvature, -a)
            np.testing.assert_allclose(lowest, expected.min_curvature, rtol=500 * eps)
    s = 1e-300 if dtype == "float64" else 1e-35
    found = solve(A, B * B.dtype.type(s), solver)
    np.testing.assert_allclose(found.x / s, expected.x, rtol=2e-3)
    assert (found.converged == expected.converged).all()


@pytest.mark.parametrize("exponent", [-460, 460])
@pytest.mark.parametrize("name", [*SOLVERS, "EKFAC"])
def test_inputs_of_any_size_give_the_same_answer(name, exponent):
    """Use inputs s x, weights theta / s and s^2 times the penalty, with s a power of two.

    The outputs stay the same, and A is multiplied by s^2. So the solutions, times s^2, must agree.
    """
    solver, b = SOLVERS.get(name, EKFAC(rtol=0.1)), np.linspace(1, 2, 15)
    x, y = np.random.default_rng(0).standard_normal((12, 5)), np.arange(12) % 3
    found = []
    for power in (0, exponent):
        weight_decay = float(np.ldexp(0.01, 2 * power))
        net = MulticlassLogisticRegression(5, 3, weight_decay=weight_decay)
        net.theta = np.ldexp(np.linspace(-1, 1, 15), -power)
        A = GaussNewton(net, Examples(np.ldexp(x, power), y))
        solution = solve(A, b, solver)
        exact = np.linalg.solve(np.ldexp(A.dense(), -2 * power), b)
        found.append((np.ldexp(solution.x, 2 * power), solution.residual[0], solution.iterations))
        if solution.converged and name in (*EXACT, "Lanczos, full rank", "Nystrom, full rank"):
            assert np.abs(found[-1][0] - exact).max() < 1e-5 * np.abs(exact).max()
    assert np.abs(found[1][0] - found[0][0]).max() < 1e-10 * np.abs(found[0][0]).max()
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-3, abs=1e-12)
    assert found[1][2] == found[0][2]


def test_a_solution_that_the_dtype_cannot_hold_is_refused():
    A = np.eye(2, dtype=np.float32)
    for b in (np.array([1e200, 1.0]), np.array([1e300, 1e-300])):
        with pytest.raises(ValueError, match="^B must have a solution within float32, got entries"):
            solve(A, b, CG())


def test_more_right_hand_sides_than_rows():
    A = np.diag(np.arange(1.0, 7))
    B = np.random.default_rng(0).standard_normal((6, 5000))
    found = solve(A, B, CG(1e-9))
    assert found.converged.all() and found.iterations.max() <= 2
    np.testing.assert_allclose(found.x, B / np.diag(A)[:, None], rtol=1e-6, atol=1e-9)


# --- kinds of A and B ---------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [CG(1e-10), Direct(), Lanczos(3), Nystrom(3), LiSSA(rtol=1e-3)])
def test_sparse_integer_and_boolean_matrices(solver):
    A, b = np.diag([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0])
    for held in (scipy.sparse.csr_matrix(A), scipy.sparse.coo_array(A), A.astype(int)):
        np.testing.assert_allclose(solve(held, b, solver).x, [1, 0.5, 0.25], rtol=1e-2)
    np.testing.assert_allclose(solve(np.eye(3, dtype=bool), b, solver).x, b, rtol=1e-2)


def test_a_sparse_matrix_is_checked_as_an_array_is():
    for matrix, message in (
        (np.ones((2, 3)), "A must be square, got shape"),
        (np.array([[1.0, 2], [0, 1]]), "A must be symmetric"),
        (np.array([[np.nan, 0], [0, 1]]), "A must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            solve(scipy.sparse.csr_matrix(matrix), np.ones(2), CG())
