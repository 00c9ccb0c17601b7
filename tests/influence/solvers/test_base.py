"""Tests of the arguments of `solve`, of what all solvers share, and of bounds on errors of scores.

A bound is for the error g . (x - A^-1 b) that an inexact solution x causes in a score.
"""

from dataclasses import replace

import keras
import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from influence import (
    CG,
    Direct,
    Examples,
    GaussNewton,
    GenericNeuralNet,
    Hessian,
    Influence,
    LiSSA,
    prepare,
    solve,
)
from influence.solvers import EKFAC, Lanczos, Nystrom
from influence.solvers.base import Raw, answers_indefinite, is_exact
from tests.influence.problems import (
    logistic,
    relative_error,
    ridge,
    sequential,
    symmetric,
    tanh_net,
    through_keras,
)


def errors_and_bounds(matrix, solution, B):
    """Return |g . (x - A^-1 b)| and the solution's bound on it, for 20 vectors g and every b."""
    G = np.random.default_rng(7).standard_normal((20, len(matrix)))
    truth = np.linalg.solve(matrix, B)
    return np.abs(G @ (solution.x - truth)), solution.score_error_bound(G)


@pytest.fixture(scope="module")
def known():
    """Return {name: (operator, bound)}. The operator knows this lower bound on its eigenvalues."""
    net, train = tanh_net()
    softmax, sigmoid = (logistic(kind, weight_decay=0.05) for kind in ("softmax", "sigmoid"))
    return {
        "softmax": (Hessian(softmax.net, softmax.train, 0.1), 0.15),
        "sigmoid": (Hessian(sigmoid.net, sigmoid.train, 0.1), 0.15),
        "Gauss-Newton of a network": (GaussNewton(net, train, 0.5), 0.5),
    }


WALK = LiSSA(depth=20, repeats=3, change=0.0)


@pytest.mark.parametrize(
    "solver", [CG(1e-3), CG(1e-8), WALK, Nystrom(3), Nystrom(15), Lanczos(3), Direct()], ids=repr
)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "Gauss-Newton of a network"])
def test_no_score_is_further_off_than_its_bound(kind, solver, known):
    A, smallest = known[kind]
    assert A.smallest_eigenvalue_bound == pytest.approx(smallest)
    matrix = A.dense()
    B = np.random.default_rng(0).standard_normal((len(matrix), 4))
    solution = solve(A, B, solver)
    error, bound = errors_and_bounds(matrix, solution, B)
    assert bound.shape == (20, 4)
    assert (error <= bound + 1e-13).all()  # 1e-13 allows for rounding
    if error.max() > 1e-10:
        # The bound is not much too large. It assumes that g is parallel to the error of x, but the
        # cosine of a random g is about 1 / sqrt(d), here 1/4. It also assumes that the smallest
        # eigenvalue equals its lower bound, which is nearly so.
        assert np.median(bound / error) < 100
    else:
        assert bound.max() < 1e-6 and not isinstance(solver, LiSSA)


@pytest.mark.parametrize("size", [1e-6, 1.0])
def test_the_bound_is_reached_where_everything_lies_along_one_direction(size):
    A = symmetric(np.linspace(0.2, 3, 30))
    values, vectors = np.linalg.eigh(A)
    exact = solve(A, np.ones((30, 1)), Direct())
    step = size * vectors[:, :1]  # the error lies along the eigenvector of the smallest eigenvalue
    moved = replace(exact, x=exact.x + step, residual_norm=np.linalg.norm(A @ step, axis=0))
    error = np.abs(vectors[:, :1].T @ (moved.x - exact.x))
    np.testing.assert_allclose(error, moved.score_error_bound(vectors[:, :1].T), rtol=2e-3)


@pytest.mark.parametrize("d", [30, 100])
@pytest.mark.parametrize("smallest", [0.2, -0.3, 1e-6])
def test_direct_finds_the_bound_itself(d, smallest):
    """Check that Direct finds a close lower bound on |eigenvalues|, of indefinite matrices too."""
    A = symmetric([smallest, *np.linspace(0.5, 3, d - 1)])
    found = solve(A, np.ones(d), Direct()).eigenvalue_bound
    assert abs(smallest) * (1 - 3e-3) < found <= abs(smallest) * (1 + 1e-9)


def test_where_nothing_is_known_nothing_is_claimed():
    A = symmetric(np.linspace(0.2, 3, 30))
    solution = solve(A, np.ones(30), CG())
    assert np.isnan(solution.eigenvalue_bound)
    assert np.isnan(solution.score_error_bound(np.ones((2, 30)))).all()
    net, train = tanh_net()
    assert np.isnan(Hessian(net, train, 5.0).smallest_eigenvalue_bound)
    # A bound of 0 on the eigenvalues of A gives no bound on A^-1, and so none on errors of scores.
    singular = GaussNewton(net, train)
    assert singular.smallest_eigenvalue_bound == 0
    assert np.isnan(solve(singular, singular @ np.ones(21), CG()).eigenvalue_bound)


def test_the_residual_norm_is_the_residual_in_absolute_size():
    A = symmetric(np.linspace(0.2, 3, 30))
    B = np.random.default_rng(0).standard_normal((30, 3)) * [1, 100, 0]
    solution = solve(A, B, CG(1e-2))
    true = np.linalg.norm(B - A @ solution.x, axis=0)
    np.testing.assert_allclose(solution.residual_norm, true, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("gradients", [np.ones(30), np.ones((2, 29)), np.ones((2, 30, 1))])
def test_gradients_of_another_shape(gradients):
    solution = solve(np.eye(30), np.ones(30), CG())
    with pytest.raises(ValueError, match=r"^gradients must have shape \(k, 30\), got"):
        solution.score_error_bound(gradients)


class Skewed(LinearOperator):
    """A matrix with a small fault: its products differ from its dense form by `away`.

    The difference is too small for the check that `Direct` makes.
    """

    def __init__(self, matrix, away):
        super().__init__(np.float64, matrix.shape)
        self.products, self.matrix = matrix + away, matrix

    def _matmat(self, V):
        return self.products @ V

    def dense(self):
        return self.matrix.copy()


@pytest.mark.parametrize("m", [1, 4, 30])
def test_the_residual_of_direct_is_that_of_the_products(m):
    A = Skewed(symmetric(np.linspace(0.2, 3, 30)), 1e-10 * symmetric(np.linspace(-1, 1, 30), 1))
    B = np.random.default_rng(0).standard_normal((30, m)) * np.geomspace(1e-3, 1e3, m)
    solution = solve(A, B, Direct(rtol=1e-12))
    true = np.linalg.norm(B - A.products @ solution.x, axis=0) / np.linalg.norm(B, axis=0)
    assert (true > 1e-12).all() and not solution.converged.any()
    watched = solution.residual if m <= 4 else solution.residual[[0, 9, 19, 29]]
    np.testing.assert_allclose(watched, true if m <= 4 else true[[0, 9, 19, 29]], rtol=1e-3)
    # Only four columns are multiplied by A. From them the other residuals are estimated, within a
    # factor of five.
    assert (solution.residual > 0.5 * true).all() and (solution.residual < 5 * true).all()
    error, bound = errors_and_bounds(A.products, solution, B)
    assert (error <= bound).all()


def test_what_the_products_differ_by_is_taken_off_the_bound():
    """Check that the bound holds for the products, whose smallest eigenvalue is 9e-8.

    `Direct` factors the dense form, whose smallest eigenvalue is 1e-7.
    """
    A = Skewed(symmetric([1e-7, *np.linspace(0.5, 3, 29)]), -1e-8 * np.eye(30))
    bound = solve(A, np.ones(30), Direct()).eigenvalue_bound
    assert 1e-8 < bound <= 9e-8


# --- systems and solvers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("A", "b", "message"),
    [
        (np.ones((2, 3)), [1, 1], r"^A must be square, got shape \(2, 3\)"),
        (np.ones(4), [1, 1], r"^A must be square, got shape \(4,\)"),
        (aslinearoperator(np.ones((2, 3))), [1, 1], r"^A must be square, got shape \(2, 3\)"),
        ([[1, np.nan], [np.nan, 1]], [1, 1], "^A must be finite, got a NaN or in"),
        ([[1, 2], [0, 1]], [1, 1], "^A must be symmetric, got .* by 2.0e[+]00"),
        (np.eye(2), [1, 1, 1], r"^B must have shape \(2,\) or \(2, m\), got \(3"),
        (np.eye(2), np.ones((2, 1, 1)), r"^B must have shape \(2,\) or"),
        (np.eye(2), np.ones((2, 0)), r"^B must have shape .*, got \(2, 0\)"),
        (np.eye(2), [1, np.inf], "^B must be finite, got a NaN or infinity"),
    ],
)
def test_bad_systems(A, b, message):
    with pytest.raises(ValueError, match=message):
        solve(A, b, CG())


@pytest.mark.parametrize(("solver", "named"), [("cg", " .*, got 'cg'"), (CG, "")])
def test_bad_solvers(solver, named):
    with pytest.raises(TypeError, match=rf"^solver must be a solver such as CG\(\){named}"):
        solve(np.eye(2), [1, 1], solver)


def test_nearly_symmetric_is_symmetric_enough():
    A = np.eye(2) + np.array([[0, 1e-7], [0, 0]])
    assert solve(A, [1.0, 1.0], CG()).converged.all()


def test_a_curvature_is_factored_once_and_a_factor_does_not_outlive_its_theta():
    problem = ridge()
    A = Hessian(problem.net, problem.train)
    count, dense = [], A.dense
    A.dense = lambda: count.append(1) or dense()
    prepared = prepare(A, Direct())
    for _ in range(3):
        prepared(np.ones(5))
    assert len(count) == 1
    influence = Influence(problem.net, problem.train, solver=prepared)
    problem.net.theta = problem.theta + 1
    for question in (lambda: prepared(np.ones(5)), lambda: influence.scores(problem.test)):
        with pytest.raises(RuntimeError, match="theta has changed"):
            question()


def test_sets_of_one_row_are_enough():
    problem = ridge()
    one = Examples(problem.train.x[:1], problem.train.y[:1])
    A = Hessian(problem.net, one, damping=0.5)
    oracle = problem.oracle.on(problem.oracle.features[:1], problem.oracle.y[:1])
    matrix = oracle.hessian(problem.theta)
    for solver in (Direct(), CG(rtol=1e-10)):
        x = solve(A, np.ones(5), solver).x
        assert relative_error(x, np.linalg.solve(matrix + 0.5 * np.eye(5), np.ones(5))) < 1e-9


def test_solvers_are_values():
    assert CG() == CG(rtol=1e-6) and hash(Direct()) == hash(Direct()) and LiSSA() != LiSSA(seed=1)
    assert repr(LiSSA()) == (
        "LiSSA(scale=None, depth=5000, repeats=10, batch_size=1, seed=0, change=0.001, rtol=0.1)"
    )
    assert EKFAC() == EKFAC(rtol=None) and repr(EKFAC()) == "EKFAC(rtol=None)"


@pytest.mark.parametrize(
    ("solver", "exact", "indefinite"),
    [
        (Direct(), True, True),
        (Lanczos(3), False, True),
        (CG(), False, False),
        (LiSSA(), False, False),
        (Nystrom(3), False, False),
        (EKFAC(), False, False),
    ],
    ids=repr,
)
def test_solvers_say_what_they_are(solver, exact, indefinite):
    assert (is_exact(solver), answers_indefinite(solver)) == (exact, indefinite)
    assert is_exact(replace(solver, rtol=0.5)) == exact  # `exact` does not depend on rtol


class Own:
    """A user's solver without the class attributes `exact` and `answers_indefinite`."""

    rtol = 1e-3

    def prepare(self, A):
        return lambda B: Raw(np.linalg.solve(A @ np.eye(A.shape[0]), B))


def test_a_solver_without_the_class_attributes_works():
    p = ridge()
    prepared = prepare(Hessian(p.net, p.train), Own())
    for solver in (Own(), prepared):
        assert not is_exact(solver) and not answers_indefinite(solver)
    assert is_exact(prepare(np.eye(2), Direct()))
    scores, exact = (
        Influence(p.net, p.train, solver=solver, approximation="first_order").scores(p.test)
        for solver in (Own(), Direct())
    )
    assert relative_error(scores[:], exact[:]) < 1e-9


RTOL = "^rtol must be non-negative"
RANK = "^rank must be an integer of at least 1, got"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CG(-1e-3), rf"{RTOL}, got -0\.001"),
        (lambda: CG(float("nan")), f"{RTOL}, got nan"),
        (lambda: CG(max_iterations=0), "^max_iterations must be an integer of at least 1, got 0"),
        (lambda: CG(float("inf")), "^rtol must be finite, got inf"),
        (lambda: CG(rtol="1"), f"{RTOL}, got '1'"),  # pyright: ignore[reportArgumentType]
        (lambda: LiSSA(depth=1.5), r"^depth must be an integer of at least 1, got 1\.5"),  # pyright: ignore[reportArgumentType]
        (lambda: Direct(-1e-3), rf"{RTOL}, got -0\.001"),
        (lambda: Direct(float("nan")), f"{RTOL}, got nan"),
        (lambda: EKFAC(-1e-3), rf"{RTOL} or None, got -0\.001"),
        (lambda: EKFAC(float("nan")), f"{RTOL} or None, got nan"),
        (lambda: Lanczos(0), f"{RANK} 0"),
        (lambda: Lanczos(2.0), rf"{RANK} 2\.0"),
        (lambda: Lanczos(True), f"{RANK} True"),
        (lambda: Lanczos(5, seed=-1), "^seed must be an integer of at least 0, got -1"),
        (lambda: Lanczos(5, rtol=-1.0), rf"{RTOL} or None, got -1\.0"),
        (lambda: Nystrom(0), f"{RANK} 0"),
        (lambda: Nystrom(5, seed=0.5), r"^seed must be an integer of at least 0, got 0\.5"),
        (lambda: Nystrom(5, rtol=float("nan")), f"{RTOL} or None, got nan"),
        (lambda: LiSSA(rtol=-1e-3), rf"{RTOL} or None, got -0\.001"),
        (lambda: LiSSA(rtol=float("nan")), f"{RTOL} or None, got nan"),
        (lambda: LiSSA(scale=0.0), r"^scale must be positive or None, got 0\.0"),
        (lambda: LiSSA(scale=-1.0), r"^scale must be positive or None, got -1\.0"),
        (lambda: LiSSA(scale=float("nan")), "^scale must be positive or None, got nan"),
        (lambda: LiSSA(depth=0), "^depth must be an integer of at least 1, got 0"),
        (lambda: LiSSA(repeats=0), "^repeats must be an integer of at least 1, got 0"),
        (lambda: LiSSA(change=-1e-3), r"^change must be non-negative, got -0\.001"),
        (lambda: LiSSA(change=float("nan")), "^change must be non-negative, got nan"),
        (lambda: LiSSA(batch_size=-1), "^batch_size must be an integer of at least 1, got -1"),
    ],
)
def test_bad_hyperparameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- bounds that the models know -------------------------------------------------------------


def test_bounds_of_models_lie_below_their_spectra():
    softmax, squares = logistic("softmax", weight_decay=0.3), ridge(l2=0.1)
    taped = through_keras(softmax)
    net, train = tanh_net(l2=0.05)
    declared = through_keras(softmax)
    declared.net.convex = True
    known = {
        "closed form": (Hessian(softmax.net, softmax.train), 0.3),
        "closed form, damped": (Hessian(softmax.net, softmax.train, 0.2), 0.5),
        "Gauss-Newton of it": (GaussNewton(softmax.net, softmax.train, 0.2), 0.5),
        "its Keras model": (GaussNewton(taped.net, taped.train), 0.3),
        "not said to be convex": (Hessian(taped.net, taped.train), np.nan),
        "declared to be convex": (Hessian(declared.net, declared.train, 0.2), 0.2),
        "an unpenalised bias": (GaussNewton(squares.net, squares.train, 0.1), 0.1),
        "a penalty on one layer": (GaussNewton(net, train, 0.1), 0.1),
    }
    for name, (A, bound) in known.items():
        np.testing.assert_allclose(A.smallest_eigenvalue_bound, bound, rtol=1e-12, err_msg=name)
        if not np.isnan(bound):
            assert np.linalg.eigvalsh(A.dense())[0] >= bound * (1 - 1e-9), name


def test_penalties_that_are_not_known_bound_nothing():
    class Cubic(keras.regularizers.Regularizer):
        def __call__(self, w):
            return keras.ops.sum(w**3)

    def convexity(**options):
        layer = keras.layers.Dense(1, dtype="float64", **options)
        return GenericNeuralNet(sequential((2,), layer, dtype="float64"), "mse").penalty_convexity

    for regularizer, expected in (
        (keras.regularizers.L1L2(0.1, 0.2), 0.4),
        (keras.regularizers.L1(0.1), 0.0),
        (Cubic(), np.nan),
        (None, 0.0),
    ):
        found = convexity(use_bias=False, kernel_regularizer=regularizer)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    l2 = keras.regularizers.L2(0.1)
    assert np.isnan(convexity(kernel_regularizer=l2, bias_regularizer=Cubic()))
    assert np.isnan(convexity(kernel_regularizer=Cubic(), bias_regularizer=l2))


# --- solves through Influence ----------------------------------------------------------------


@pytest.mark.parametrize("problem", ["softmax", "sigmoid", "ridge"])
def test_scores_come_with_a_bound(problem):
    p = ridge(l2=0.1) if problem == "ridge" else logistic(problem)
    options = {"approximation": "first_order"}
    if problem == "ridge":
        options |= {"curvature": GaussNewton, "damping": 0.1}
    exact = Influence(p.net, p.train, solver=Direct(), **options).scores(p.test, [7, 3, 11])
    influence = Influence(p.net, p.train, solver=Nystrom(3), **options)
    rough = influence.scores(p.test, [7, 3, 11])
    error, bound = np.abs(rough[:] - exact[:]), influence.error_bound(rough)
    assert bound.shape == error.shape == (7, 3)
    assert (error <= bound).all() and np.median(bound / error) < 100
    G = p.net.gradients(p.train.x, p.train.y)[[7, 3, 11]] + p.net.penalty_gradient()
    smallest = influence.operator.smallest_eigenvalue_bound
    sizes = np.outer(rough.solution.residual_norm, np.linalg.norm(G, axis=1))
    assert relative_error(bound, sizes / smallest / len(p.train)) < 1e-12
    p.net.theta = p.theta + 1
    with pytest.raises(RuntimeError, match="^theta has changed since this operator was made"):
        influence.error_bound(rough)


def test_scores_without_a_known_bound_say_so():
    p = ridge()
    influence = Influence(p.net, p.train, solver=CG())
    assert np.isnan(influence.error_bound(influence.scores(p.test, [0, 1]))).all()
    by_direct = Influence(p.net, p.train, solver=prepare(influence.operator, Direct()))
    assert (by_direct.error_bound(by_direct.scores(p.test, [0, 1])) < 1e-13).all()
