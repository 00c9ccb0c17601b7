"""The certificate of a solve: what bounds the error of any score."""

from dataclasses import replace

import keras
import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator

from influence import (
    CG,
    Direct,
    GaussNewton,
    GenericNeuralNet,
    Hessian,
    Influence,
    LiSSA,
    prepare,
    solve,
)
from influence.solvers import Lanczos, Nystrom
from tests.influence.problems import (
    logistic,
    relative_error,
    ridge,
    symmetric,
    tanh_net,
    through_keras,
)


def errors_and_bounds(matrix, solution, B):
    """|g . (x - A^-1 b)| and its bound, for twenty vectors g and every b."""
    G = np.random.default_rng(7).standard_normal((20, len(matrix)))
    truth = np.linalg.solve(matrix, B)
    return np.abs(G @ (solution.x - truth)), solution.score_error_bound(G)


@pytest.fixture(scope="module")
def known():
    """name -> (operator that knows a bound, the bound)."""
    net, train = tanh_net()
    softmax, sigmoid = (logistic(kind, weight_decay=0.05) for kind in ("softmax", "sigmoid"))
    return {
        "softmax": (Hessian(softmax.net, softmax.train, 0.1), 0.15),
        "sigmoid": (Hessian(sigmoid.net, sigmoid.train, 0.1), 0.15),
        "Gauss-Newton of a network": (GaussNewton(net, train, 0.5), 0.5),
    }


@pytest.mark.parametrize(
    "solver",
    [CG(1e-3), CG(1e-8), LiSSA(depth=20, repeats=3, change=0.0), Nystrom(3), Nystrom(15),
     Lanczos(3), Direct()],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "Gauss-Newton of a network"])
def test_no_score_is_further_off_than_its_bound(kind, solver, known):
    A, smallest = known[kind]
    assert A.smallest_eigenvalue_bound == pytest.approx(smallest)
    matrix = A.dense()
    B = np.random.default_rng(0).standard_normal((len(matrix), 4))
    solution = solve(A, B, solver)
    error, bound = errors_and_bounds(matrix, solution, B)
    assert bound.shape == (20, 4)
    assert (error <= bound + 1e-13).all()  # rounding, where the answer is exact
    if error.max() > 1e-10:
        # Not vacuous: a random g lies along the error by one part in sqrt(d), about 4, and the
        # bound on the smallest eigenvalue is not far below it.
        assert np.median(bound / error) < 100
    else:
        assert bound.max() < 1e-6 and not isinstance(solver, LiSSA)


@pytest.mark.parametrize("size", [1e-6, 1.0])
def test_the_bound_is_reached_where_everything_lies_along_one_direction(size):
    A = symmetric(np.linspace(0.2, 3, 30))
    values, vectors = np.linalg.eigh(A)
    exact = solve(A, np.ones((30, 1)), Direct())
    step = size * vectors[:, :1]  # an error along the smallest eigenvalue's vector
    moved = replace(exact, x=exact.x + step, residual_norm=np.linalg.norm(A @ step, axis=0))
    error = np.abs(vectors[:, :1].T @ (moved.x - exact.x))
    np.testing.assert_allclose(error, moved.score_error_bound(vectors[:, :1].T), rtol=2e-3)


@pytest.mark.parametrize("d", [30, 100])
@pytest.mark.parametrize("smallest", [0.2, -0.3, 1e-6])
def test_direct_finds_the_bound_itself(d, smallest):
    """In size, so for an indefinite matrix too."""
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
    # A bound of zero bounds nothing.
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
    """A matrix whose dense form differs from its products, by less than what is refused."""

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
    # Of the others what four columns let expect: the same rate, and no more than three times it.
    assert (solution.residual > 0.5 * true).all() and (solution.residual < 5 * true).all()
    error, bound = errors_and_bounds(A.products, solution, B)
    assert (error <= bound).all()


def test_what_the_products_differ_by_is_taken_off_the_bound():
    """The dense form's smallest eigenvalue is 1e-7, that of the products 9e-8."""
    A = Skewed(symmetric([1e-7, *np.linspace(0.5, 3, 29)]), -1e-8 * np.eye(30))
    bound = solve(A, np.ones(30), Direct()).eigenvalue_bound
    assert 1e-8 < bound <= 9e-8


# --- what the models know --------------------------------------------------------------------


def test_bounds_of_models_lie_below_their_spectra():
    softmax, squares = logistic("softmax", weight_decay=0.3), ridge(l2=0.1)
    taped = through_keras(softmax)
    net, train = tanh_net(l2=0.05)
    known = {
        "closed form": (Hessian(softmax.net, softmax.train), 0.3),
        "closed form, damped": (Hessian(softmax.net, softmax.train, 0.2), 0.5),
        "Gauss-Newton of it": (GaussNewton(softmax.net, softmax.train, 0.2), 0.5),
        "its Keras model": (GaussNewton(taped.net, taped.train), 0.3),
        "not said to be convex": (Hessian(taped.net, taped.train), np.nan),
        "an unpenalised bias": (GaussNewton(squares.net, squares.train, 0.1), 0.1),
        "a penalty on one layer": (GaussNewton(net, train, 0.1), 0.1),
    }
    for name, (A, bound) in known.items():
        np.testing.assert_allclose(A.smallest_eigenvalue_bound, bound, rtol=1e-12, err_msg=name)
        if not np.isnan(bound):
            assert np.linalg.eigvalsh(A.dense())[0] >= bound * (1 - 1e-9), name


def test_a_net_declared_convex_has_no_negative_curvature():
    p = through_keras(logistic("softmax"))
    p.net.convex = True
    assert Hessian(p.net, p.train, 0.2).smallest_eigenvalue_bound == 0.2


def test_penalties_that_are_not_known_bound_nothing():
    class Cubic(keras.regularizers.Regularizer):
        def __call__(self, w):
            return keras.ops.sum(w**3)

    for regularizer, expected in (
        (keras.regularizers.L1L2(0.1, 0.2), 0.4),
        (keras.regularizers.L1(0.1), 0.0),
        (Cubic(), np.nan),
        (None, 0.0),
    ):
        model = keras.Sequential(
            [
                keras.Input((2,), dtype="float64"),
                keras.layers.Dense(
                    1, use_bias=False, kernel_regularizer=regularizer, dtype="float64"
                ),
            ]
        )
        net = GenericNeuralNet(model, "mse")
        np.testing.assert_allclose(net.penalty_convexity, expected, rtol=1e-6)
    for order in (1, -1):  # a known one before or after
        l2, cubic = (keras.regularizers.L2(0.1), Cubic())[::order]
        model = keras.Sequential(
            [
                keras.Input((2,), dtype="float64"),
                keras.layers.Dense(
                    1, kernel_regularizer=l2, bias_regularizer=cubic, dtype="float64"
                ),
            ]
        )
        assert np.isnan(GenericNeuralNet(model, "mse").penalty_convexity)


# --- through Influence -----------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["softmax", "sigmoid", "ridge"])
def test_scores_come_with_a_bound(problem):
    p = ridge(l2=0.1) if problem == "ridge" else logistic(problem)
    options = {"curvature": GaussNewton, "damping": 0.1} if problem == "ridge" else {}
    exact = Influence(p.net, p.train, solver=Direct(), **options).scores(p.test, [7, 3, 11])
    influence = Influence(p.net, p.train, solver=Nystrom(3), **options)
    rough = influence.scores(p.test, [7, 3, 11])
    error, bound = np.abs(rough[:] - exact[:]), influence.error_bound(rough)
    assert bound.shape == error.shape == (7, 3)
    assert (error <= bound).all() and np.median(bound / error) < 100
    G = p.net.gradients(p.train.x, p.train.y)[[7, 3, 11]] + p.net.penalty_gradient()
    smallest = influence.operator.smallest_eigenvalue_bound
    expected = (
        np.outer(rough.solution.residual_norm, np.linalg.norm(G, axis=1)) / smallest / len(p.train)
    )
    assert relative_error(bound, expected) < 1e-12


def test_a_bound_is_of_the_theta_of_the_scores():
    p = logistic("sigmoid")
    influence = Influence(p.net, p.train)
    scores = influence.scores(p.test, [0, 1])
    p.net.theta = p.theta + 1
    with pytest.raises(RuntimeError, match="^theta has changed since this operator was made"):
        influence.error_bound(scores)


def test_scores_without_a_known_bound_say_so():
    p = ridge()
    influence = Influence(p.net, p.train)
    assert np.isnan(influence.error_bound(influence.scores(p.test, [0, 1]))).all()
    by_direct = Influence(p.net, p.train, solver=prepare(influence.operator, Direct()))
    assert (by_direct.error_bound(by_direct.scores(p.test, [0, 1])) < 1e-13).all()
