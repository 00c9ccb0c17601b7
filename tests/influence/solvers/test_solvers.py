"""Every solver on every operator, those included that must fail."""

import re
import warnings

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from influence import (
    CG,
    BinaryLogisticRegression,
    Direct,
    DivergenceError,
    Examples,
    GaussNewton,
    Hessian,
    Influence,
    LiSSA,
    prepare,
    solve,
)
from tests.influence.problems import (
    logistic,
    relative_error,
    ridge,
    symmetric,
    tanh_net,
    through_keras,
)

D = 9
POSITIVE = symmetric(np.linspace(0.5, 4, D))
INDEFINITE = symmetric([-0.5, *np.linspace(0.5, 4, D - 1)])
SINGULAR = symmetric([0.0, *np.linspace(0.5, 4, D - 1)])

# LiSSA's series at scale s is off by (1 - smallest / s)^depth: about 1e-9 for the arrays here.
SOLVERS = {
    "Direct": Direct(),
    "CG": CG(rtol=1e-10),
    "CG preconditioned by a solver": CG(rtol=1e-10, preconditioner=Direct()),
    "LiSSA on all rows": LiSSA(depth=200, repeats=1, rtol=1e-3),
}


@pytest.fixture(scope="module")
def operators():
    """name -> (operator, the same matrix by other means)."""
    linear = ridge(num_rows=15)
    softmax = logistic("softmax", num_rows=15, num_inputs=3, weight_decay=0.3)
    taped = through_keras(softmax)
    net, examples = tanh_net(hidden=2)
    H = {name: p.oracle.hessian(p.theta) for name, p in (("r", linear), ("s", softmax))}
    return {
        "array": (POSITIVE, POSITIVE),
        "LinearOperator": (aslinearoperator(POSITIVE), POSITIVE),
        "products only": (_products_only(POSITIVE), POSITIVE),
        "Hessian of ridge by the tape": (Hessian(linear.net, linear.train), H["r"]),
        "Hessian of softmax in closed form": (Hessian(softmax.net, softmax.train), H["s"]),
        "Hessian of softmax, damped, by the tape": (
            Hessian(taped.net, taped.train, 0.2, batch_size=7),
            H["s"] + 0.2 * np.eye(len(H["s"])),
        ),
        "GaussNewton of a network, damped": (
            GaussNewton(net, examples, 0.5),
            GaussNewton(net, examples).dense() + 0.5 * np.eye(net.num_parameters),
        ),
    }


def _products_only(matrix):
    """What a user may write: no dense form anywhere."""
    return LinearOperator(matrix.shape, matvec=lambda v: matrix @ v, dtype=matrix.dtype)


OPERATORS = [
    "array",
    "LinearOperator",
    "products only",
    "Hessian of ridge by the tape",
    "Hessian of softmax in closed form",
    "Hessian of softmax, damped, by the tape",
    "GaussNewton of a network, damped",
]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_on_every_operator(solver, operator, operators):
    A, matrix = operators[operator]
    how = SOLVERS[solver]
    if isinstance(how, LiSSA) and hasattr(A, "examples"):  # all rows in every batch: no noise
        scale = np.linalg.eigvalsh(matrix)[-1]
        how = LiSSA(scale=scale, depth=100, repeats=1, batch_size=len(A.examples), rtol=1e-2)
    B = np.random.default_rng(0).standard_normal((len(matrix), 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block = solve(A, B, how)
        alone = prepare(A, how)(B[:, 1])
    X = np.linalg.solve(matrix, B)
    assert relative_error(block.x, X) < 10 * how.rtol
    assert relative_error(alone.x, X[:, 1]) < 10 * how.rtol
    assert block.converged.tolist() == [True] * 3 and block.remedy == ""
    assert alone.converged.tolist() == [True] and alone.residual.shape == (1,)
    true = np.linalg.norm(B - matrix @ block.x, axis=0) / np.linalg.norm(B, axis=0)
    # Both round at 1e-15 where the residual itself is that small.
    np.testing.assert_allclose(block.residual, true, rtol=1e-4, atol=1e-14)
    assert block.iterations.shape == (3,) and (block.iterations >= 1).all()
    if isinstance(how, Direct):
        smallest = np.linalg.eigvalsh(matrix)[0]
        np.testing.assert_allclose(block.min_curvature, smallest, rtol=1e-8)
    elif isinstance(how, CG):
        smallest, largest = np.linalg.eigvalsh(matrix)[[0, -1]]
        assert (block.min_curvature >= smallest * (1 - 1e-9)).all()
        assert (block.min_curvature <= largest).all()
    else:
        assert np.isnan(block.min_curvature).all()  # LiSSA looks at none


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("solver", [Direct(), CG(), LiSSA(depth=300, repeats=1)])
@pytest.mark.parametrize("of_b", ["float32", "float64", "int64"])
def test_the_matrix_decides_the_dtype(dtype, solver, of_b):
    b = np.arange(1, D + 1).astype(of_b)
    solution = solve(POSITIVE.astype(dtype), b, solver)
    assert solution.x.dtype == np.dtype(dtype)
    assert solution.converged.all()
    bound = 1e-5 if dtype == "float32" else 1e-6
    if not isinstance(solver, LiSSA):
        assert relative_error(solution.x, np.linalg.solve(POSITIVE, b)) < bound * 10


@pytest.mark.parametrize("solver", [Direct(), CG()])
def test_a_matrix_of_integers_is_solved_in_float64(solver):
    A = np.array([[4, 1], [1, 3]])
    solution = solve(A, [1, 2], solver)
    np.testing.assert_allclose(solution.x, [1 / 11, 7 / 11], rtol=1e-6)
    assert solution.x.dtype == np.float64


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_right_hand_sides_of_zero(solver):
    B = np.zeros((D, 3))
    B[:, 1] = 1
    solution = solve(POSITIVE, B, solver)
    np.testing.assert_array_equal(solution.x[:, [0, 2]], 0)
    np.testing.assert_array_equal(solution.residual[[0, 2]], 0)
    assert solution.converged.all()
    expected = np.linalg.solve(POSITIVE, B[:, 1])
    assert relative_error(solution.x[:, 1], expected) < 10 * solver.rtol


# --- what must fail --------------------------------------------------------------------------


def test_indefinite_direct_answers_and_says_so():
    b = np.arange(1.0, D + 1)
    solution = solve(INDEFINITE, b, Direct())
    assert relative_error(solution.x, np.linalg.solve(INDEFINITE, b)) < 1e-12
    assert solution.converged.all() and solution.residual[0] < 1e-14
    assert solution.min_curvature[0] == pytest.approx(-0.5, rel=1e-12)


@pytest.mark.parametrize("preconditioner", [None, np.eye(D)])
def test_indefinite_cg_names_the_negative_curvature_and_its_size(preconditioner):
    B = np.random.default_rng(0).standard_normal((D, 3))
    solution = solve(INDEFINITE, B, CG(preconditioner=preconditioner))
    assert not solution.converged.any()
    worst = solution.min_curvature.min()
    assert -0.5 * (1 + 1e-9) <= worst < 0  # a Rayleigh quotient, so not below the least eigenvalue
    assert np.isfinite(solution.x).all() and (solution.residual > 1e-3).all()
    assert solution.remedy.startswith(
        f"A is not positive definite: negative curvature {worst:.3g} was met"
    )
    assert f"a damping well above {-worst:.3g}" in solution.remedy


def test_indefinite_cg_keeps_the_columns_that_never_meet_it():
    values, vectors = np.linalg.eigh(INDEFINITE)
    B = np.column_stack([vectors[:, 0], vectors[:, 3]])
    solution = solve(INDEFINITE, B, CG())
    assert solution.converged.tolist() == [False, True]
    np.testing.assert_allclose(solution.min_curvature, values[[0, 3]], rtol=1e-9)
    assert relative_error(solution.x[:, 1], vectors[:, 3] / values[3]) < 1e-10


def test_indefinite_lissa_says_that_no_scale_helps():
    for scale in (None, 100.0):
        message = "LiSSA diverges at step .* negative curvature.* and no scale helps"
        with pytest.raises(DivergenceError, match=message):
            solve(INDEFINITE, np.ones(D), LiSSA(scale=scale, depth=20_000))


@pytest.mark.parametrize("matrix", [-POSITIVE, np.zeros((D, D))])
def test_lissa_needs_a_positive_eigenvalue(matrix):
    with pytest.raises(DivergenceError, match="^LiSSA needs a positive definite A, got a largest"):
        solve(matrix, np.ones(D), LiSSA())


def test_lissa_names_a_nan():
    A = LinearOperator((D, D), matvec=lambda v: np.full(D, np.nan), dtype=np.float64)
    with pytest.raises(DivergenceError, match="^A must have finite products, got NaN or inf"):
        solve(A, np.ones(D), LiSSA())


@pytest.mark.parametrize("matrix", [SINGULAR, np.zeros((D, D)), np.outer(np.ones(D), np.ones(D))])
def test_singular_direct_names_a_damping_that_works(matrix):
    with pytest.raises(DivergenceError, match="^A must not be singular, got an eigenvalue") as info:
        solve(matrix, np.ones(D), Direct())
    found = re.search(r"damping of at least (\S+),", str(info.value))
    assert found is not None
    damping = float(found[1])
    assert 0 < damping < 1e-6  # far below the matrix's own eigenvalues
    b = np.random.default_rng(0).standard_normal(D)
    assert solve(matrix + damping * np.eye(D), b, Direct()).converged.all()


def test_singular_and_indefinite_direct():
    with pytest.raises(DivergenceError, match="^A must not be singular, got an eigenvalue of"):
        solve(symmetric([-1, 0, *np.linspace(0.5, 4, D - 2)]), np.ones(D), Direct())


def test_singular_cg_says_so_unless_the_system_has_a_solution():
    inside = SINGULAR @ np.ones(D)
    B = np.column_stack([inside, np.ones(D)])
    solution = solve(SINGULAR, B, CG())
    assert solution.converged.tolist() == [True, False]
    assert solution.residual[0] < 1e-6 < solution.residual[1]
    assert np.isfinite(solution.x).all()
    exact_zero = solve(np.diag([1.0, 0.0]), [0.0, 1.0], CG())
    assert exact_zero.min_curvature[0] == 0 and not exact_zero.converged[0]
    assert exact_zero.remedy.startswith("A is singular: curvature 0 was met")
    rounded_zero = solve(np.diag([1.0, 1e-20]), [1.0, 1.0], CG())
    assert rounded_zero.min_curvature[0] == 0 and not rounded_zero.converged[0]
    assert np.abs(rounded_zero.x).max() < 10  # not 1e20
    assert solution.remedy.startswith("A is singular: curvature")


def test_singular_lissa_does_not_count_as_converged():
    solution = solve(SINGULAR, np.ones(D), LiSSA(depth=100, rtol=1e-3))
    assert not solution.converged.any() and "series unfinished" in solution.remedy


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cg_with_more_iterations_than_dimensions(dtype):
    b = np.random.default_rng(0).standard_normal((D, 2))
    solution = solve(POSITIVE.astype(dtype), b, CG(rtol=0, max_iterations=10_000))
    eps = np.finfo(dtype).eps
    assert relative_error(solution.x, np.linalg.solve(POSITIVE, b)) < 100 * eps
    assert (solution.residual < 100 * eps).all()
    if not solution.converged.all():  # unless the residual rounded to zero
        assert "rounding stopped CG above rtol" in solution.remedy
    assert (solution.iterations < 1000).all()


@pytest.mark.parametrize("columns", [1, 5])
def test_cg_ends_where_rounding_does(columns):
    d = 1000
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    A = ((Q * np.geomspace(1, 1e-2, d)) @ Q.T).astype("float32")
    b = rng.standard_normal((d, columns)).astype("float32")
    solution = solve((A + A.T) / 2, b, CG(rtol=0, max_iterations=2000))
    assert solution.residual.max() < 100 * np.finfo("float32").eps
    assert (solution.min_curvature > 0.9e-2).all()
    assert "rounding stopped CG above rtol" in solution.remedy


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("when", [0, 5])
def test_an_operator_that_gives_nan_is_named(solver, when):
    count = iter(range(100_000))

    def product(v):
        return POSITIVE @ v * (np.nan if next(count) >= when else 1)

    A = LinearOperator((D, D), matvec=product, dtype=np.float64)
    with pytest.raises((DivergenceError, ValueError)) as info:
        solve(A, np.ones(D), solver)
    assert re.search("finite|NaN|nan|infs", str(info.value))


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("A", "b", "solver", "error", "message"),
    [
        (np.ones((2, 3)), [1, 1], CG(), ValueError, r"^A must be square, got shape \(2, 3\)"),
        (np.ones(4), [1, 1], CG(), ValueError, r"^A must be square, got shape \(4,\)"),
        (
            aslinearoperator(np.ones((2, 3))),
            [1, 1],
            CG(),
            ValueError,
            r"^A must be square, got shape \(2, 3\)",
        ),
        (
            [[1, np.nan], [np.nan, 1]],
            [1, 1],
            CG(),
            ValueError,
            "^A must be finite, got a NaN or in",
        ),
        ([[1, 2], [0, 1]], [1, 1], CG(), ValueError, "^A must be symmetric, got .* by 2.0e[+]00"),
        (np.eye(2), [1, 1, 1], CG(), ValueError, r"^B must have shape \(2,\) or \(2, m\), got \(3"),
        (np.eye(2), np.ones((2, 1, 1)), CG(), ValueError, r"^B must have shape \(2,\) or"),
        (np.eye(2), np.ones((2, 0)), CG(), ValueError, r"^B must have shape .*, got \(2, 0\)"),
        (np.eye(2), [1, np.inf], CG(), ValueError, "^B must be finite, got a NaN or infinity"),
        (
            np.eye(2),
            [1, 1],
            "cg",
            TypeError,
            r"^solver must be a solver such as CG\(\) .*, got 'cg'",
        ),
        (np.eye(2), [1, 1], CG, TypeError, r"^solver must be a solver such as CG\(\)"),
    ],
)
def test_bad_systems(A, b, solver, error, message):
    with pytest.raises(error, match=message):
        solve(A, b, solver)


def test_nearly_symmetric_is_symmetric_enough():
    A = np.eye(2) + np.array([[0, 1e-7], [0, 0]])
    assert solve(A, [1.0, 1.0], CG()).converged.all()


# --- prepared once, solved many --------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_what_is_prepared_is_not_prepared_again(solver):
    prepared = prepare(POSITIVE, solver)
    assert prepare(POSITIVE, prepared) is prepared
    assert prepared.solver is solver
    b = np.ones(D)
    np.testing.assert_array_equal(solve(POSITIVE, b, prepared).x, prepared(b).x)
    np.testing.assert_array_equal(b, 1)  # right-hand sides are not overwritten


def test_a_curvature_is_factored_once():
    problem = ridge()
    A = Hessian(problem.net, problem.train)
    count = []
    dense = A.dense
    A.dense = lambda: count.append(1) or dense()
    prepared = prepare(A, Direct())
    for _ in range(3):
        prepared(np.ones(5))
    assert len(count) == 1


def test_solvers_are_values():
    assert CG() == CG(rtol=1e-6) and hash(Direct()) == hash(Direct()) and LiSSA() != LiSSA(seed=1)
    assert repr(LiSSA()) == (
        "LiSSA(scale=None, depth=5000, repeats=10, batch_size=1, seed=0, change=0.001, rtol=0.1)"
    )


def test_sets_of_one_row_are_enough():
    problem = ridge()
    one = Examples(problem.train.x[:1], problem.train.y[:1])
    A = Hessian(problem.net, one, damping=0.5)
    matrix = problem.oracle.on(problem.oracle.features[:1], problem.oracle.y[:1]).hessian(
        problem.theta
    )
    for solver in (Direct(), CG(rtol=1e-10)):
        x = solve(A, np.ones(5), solver).x
        assert relative_error(x, np.linalg.solve(matrix + 0.5 * np.eye(5), np.ones(5))) < 1e-9


def test_a_factor_does_not_outlive_its_theta():
    rng = np.random.default_rng(0)
    train = Examples(rng.normal(size=(30, 3)), rng.integers(0, 2, 30))
    net = BinaryLogisticRegression(3).fit(train)
    prepared = prepare(Hessian(net, train), Direct())
    influence = Influence(net, train, solver=prepared)
    net.theta = net.theta + 1
    with pytest.raises(RuntimeError, match="theta has changed"):
        prepared(np.ones(3))
    with pytest.raises(RuntimeError, match="theta has changed"):
        influence.scores(train)
