import re

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from influence import (
    BinaryLogisticRegression,
    DivergenceError,
    Examples,
    GaussNewton,
    Hessian,
    LiSSA,
    solve,
)
from influence.solvers.lissa import largest_eigenvalue
from tests.influence.problems import logistic, relative_error, ridge, symmetric

D = 8
MATRIX = symmetric(np.linspace(0.2, 3, D))


def series(matrix, v, scale, depth):
    """Return (1/scale) sum_{j=0}^{depth} (I - A/scale)^j v, computed by eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    factors = (1 - (1 - values / scale) ** (depth + 1)) / values
    return vectors @ (factors[:, None] * (vectors.T @ v.reshape(len(v), -1)))


@pytest.fixture(scope="module")
def softmax():
    return logistic("softmax", num_rows=30, num_inputs=3, weight_decay=0.1)


@pytest.mark.parametrize("depth", [1, 5, 16, 17, 200])
@pytest.mark.parametrize("scale", [3.0, 10.0, 1.6])
def test_exact_value_at_finite_depth(depth, scale):
    B = np.random.default_rng(0).standard_normal((D, 2))
    for A in (MATRIX, aslinearoperator(MATRIX)):
        solution = solve(A, B, LiSSA(scale=scale, depth=depth, repeats=3, change=0.0))
        assert relative_error(solution.x, series(MATRIX, B, scale, depth)) < 1e-12
        assert solution.iterations.tolist() == [depth] * 2


@pytest.mark.parametrize("curvature", [Hessian, GaussNewton])
def test_exact_value_when_every_batch_is_the_whole_set(curvature, softmax):
    damping, n = 0.05, len(softmax.train)
    H = softmax.oracle.hessian(softmax.theta) + damping * np.eye(9)
    b = np.random.default_rng(0).standard_normal(9)
    solver = LiSSA(scale=4.0, depth=20, repeats=2, batch_size=n)
    solution = solve(curvature(softmax.net, softmax.train, damping), b, solver)
    assert relative_error(solution.x, series(H, b, 4.0, 20)[:, 0]) < 1e-12


def test_rows_are_walked_through_without_replacement(softmax, monkeypatch):
    seen = []
    sampled = Hessian.sampled
    monkeypatch.setattr(
        Hessian, "sampled", lambda A, rows, V: seen.append(rows) or sampled(A, rows, V)
    )
    # Each of the 2 runs takes 25 steps with 3 rows each: 75 rows, or 2.5 passes over the 30 rows.
    solve(
        Hessian(softmax.net, softmax.train, 1.0),
        np.arange(9.0),
        LiSSA(scale=10.0, depth=25, repeats=2, batch_size=3),
    )
    assert len(seen) == 25 and seen[0].shape == (2, 3)
    walk = np.stack(seen, axis=1).reshape(-1)  # the rows of the first run, then those of the second
    counts = np.bincount(walk, minlength=30)
    assert counts.tolist() == [5] * 30
    np.testing.assert_array_equal(np.sort(walk[:30]), np.arange(30))
    assert (walk[:30] != np.arange(30)).any()


def test_the_average_over_runs_is_what_single_rows_give(softmax):
    """Compare the mean of two runs with the recursion h <- b + (I - H_i / scale) h in NumPy.

    Both take the rows i in the same order.
    """
    rng = np.random.default_rng(5)
    order = np.concatenate([rng.permutation(30) for _ in range(2)])[: 2 * 25].reshape(2, 25)
    hessians = softmax.oracle.hessians(softmax.theta) + (0.1 + 0.3) * np.eye(9)
    b, runs = np.random.default_rng(0).standard_normal(9), []
    for run in order:
        h = b
        for row in run:
            h = b + h - hessians[row] @ h / 6.0
        runs.append(h / 6.0)
    A = Hessian(softmax.net, softmax.train, 0.3)
    solution = solve(A, b, LiSSA(scale=6.0, depth=25, repeats=2, seed=5))
    assert relative_error(solution.x, np.mean(runs, axis=0)) < 1e-12


def test_right_hand_sides_do_not_see_each_other(softmax):
    A = Hessian(softmax.net, softmax.train, 0.3)
    solver = LiSSA(depth=40, repeats=2)
    B = np.random.default_rng(0).standard_normal((9, 3))
    block = solve(A, B, solver)
    for j in range(3):
        assert relative_error(block.x[:, j], solve(A, B[:, j], solver).x) < 1e-12


def test_damping_means_the_same_for_every_scale(softmax):
    """Check that damping is absolute. The authors' 2017 code multiplied it by the scale."""
    A = Hessian(softmax.net, softmax.train, damping=0.5)
    matrix = softmax.oracle.hessian(softmax.theta) + 0.5 * np.eye(9)
    b = np.arange(9.0)
    # A step multiplies the error by at most 1 - 0.6 / scale, because the smallest eigenvalue is 0.6
    # with penalty and damping. After 250 steps with scale 8, the error is below (1 - 0.6/8)^250 =
    # 3e-9.
    for scale in (2.0, 8.0):
        solver = LiSSA(scale=scale, depth=250, repeats=1, batch_size=30)
        assert relative_error(solve(A, b, solver).x, np.linalg.solve(matrix, b)) < 1e-7


def test_sampling_converges_to_the_answer(softmax):
    A = Hessian(softmax.net, softmax.train, 0.5)
    B = np.random.default_rng(0).standard_normal((9, 2))
    exact = np.linalg.solve(softmax.oracle.hessian(softmax.theta) + 0.5 * np.eye(9), B)
    rough = solve(A, B, LiSSA(depth=100, repeats=2))
    fine = solve(A, B, LiSSA(depth=100, repeats=300))
    # The noise of the mean over runs falls with the square root of their number: from 2 to 300 runs
    # by a factor of 12. Require a factor of 4.
    assert relative_error(fine.x, exact) < relative_error(rough.x, exact) / 4
    assert relative_error(fine.x, exact) < 0.03
    assert fine.converged.all() and (fine.residual < 0.1).all()


# --- early stopping --------------------------------------------------------------------------


@pytest.mark.parametrize("change", [1e-2, 1e-3, 1e-6])
def test_a_column_stops_when_its_average_does(change):
    values, vectors = np.linalg.eigh(MATRIX)
    B = np.column_stack([vectors[:, -1], vectors[:, 0], vectors.sum(axis=1), np.zeros(D)])
    solution = solve(MATRIX, B, LiSSA(scale=4.0, change=change))
    steps = solution.iterations
    for j in range(4):
        # The average over steps only decides when to stop. The answer is the series at the last
        # step.
        expected = series(MATRIX, B[:, j], 4.0, int(steps[j]))[:, 0]
        np.testing.assert_allclose(solution.x[:, j], expected, rtol=1e-11, atol=1e-13)
        alone = solve(MATRIX, B[:, j], LiSSA(scale=4.0, change=change))
        assert alone.iterations[0] == steps[j]
    assert set(steps) <= {32, 64, 128, 256, 512, 1024}
    assert steps[0] == steps[3] == 32 < steps[1]
    # Column 1 of B is an eigenvector. Its h at step t is proportional to 1 - r^(t + 1), with r = 1
    # - eigenvalue / scale. Compute the averages over the last half of the steps, and so the last
    # step.
    r, before = 1 - values[0] / 4.0, None
    for looks in (1, 2, 4, 8, 16, 32, 64):
        t = 16 * np.arange(looks // 2 + 1, looks + 1)
        average = np.mean(1 - r ** (t + 1))
        if before is not None and abs(average - before) <= change * average:
            break
        before = average
    assert steps[1] == 16 * looks
    exact = np.linalg.solve(MATRIX, B[:, :3])
    assert relative_error(solution.x[:, :3], exact) < 10 * change


def test_without_a_change_every_step_is_taken():
    solution = solve(MATRIX, np.ones(D), LiSSA(scale=4.0, depth=3000, change=0.0))
    assert solution.iterations.tolist() == [3000]


def test_noise_is_not_taken_for_an_end(softmax):
    """Check that two noisy runs, with one row in each step, do not stop before the last step.

    Each average still differs from the one before by more than a thousandth, the limit.
    """
    A = Hessian(softmax.net, softmax.train, 0.3)
    B = np.random.default_rng(0).standard_normal((9, 3))
    solution = solve(A, B, LiSSA(depth=600, repeats=2))
    assert solution.iterations.tolist() == [600] * 3
    whole = solve(A, B, LiSSA(depth=600, repeats=2, change=0.0))
    np.testing.assert_array_equal(solution.x, whole.x)


def test_an_unfinished_series_says_so():
    solution = solve(MATRIX, np.ones(D), LiSSA(depth=2))
    assert not solution.converged[0] and solution.residual[0] > 0.1
    assert solution.remedy.startswith("LiSSA's average is still noisy or its series unfinished aft")


# --- divergence ------------------------------------------------------------------------------


def scale_named_in(message):
    found = re.search(r"use a scale of (\S+) or larger", message)
    assert found is not None, message
    return float(found[1])


def test_divergence_is_named_with_a_scale_that_works():
    with pytest.raises(DivergenceError, match="^LiSSA diverges at step 16 with scale 1;") as error:
        solve(MATRIX, np.ones(D), LiSSA(scale=1.0))
    scale = scale_named_in(str(error.value))
    assert 3 <= scale < 3.3  # the largest eigenvalue is 3
    solution = solve(MATRIX, np.ones(D), LiSSA(scale=scale, change=0.0))
    assert solution.converged[0] and solution.residual[0] < 1e-12


@pytest.mark.parametrize("batch_size", [1, 5])
def test_divergence_on_sampled_rows_is_named_with_a_scale_that_works(softmax, batch_size):
    A = Hessian(softmax.net, softmax.train, 0.5)
    with pytest.raises(DivergenceError, match="^LiSSA diverges at step .* with scale 0.3") as error:
        solve(A, np.arange(9.0), LiSSA(scale=0.3, batch_size=batch_size))
    scale = scale_named_in(str(error.value))
    solution = solve(
        A, np.arange(9.0), LiSSA(scale=scale, depth=200, repeats=50, batch_size=batch_size)
    )
    assert solution.converged[0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_overflow_is_divergence_without_a_word_from_numpy(dtype):
    with np.errstate(all="raise"):
        with pytest.raises(DivergenceError, match="with scale 1e-30"):
            solve(MATRIX.astype(dtype), np.ones(D), LiSSA(scale=1e-30))


def test_divergence_is_looked_for_at_the_last_step_too():
    # The largest eigenvalue is 3 and the scale is 1. |1 - 3/1| = 2, so the norm doubles in each
    # step. The solver checks the norm every 16 steps and at the end, here at step 13.
    with pytest.raises(DivergenceError, match="at step 13 "):
        solve(MATRIX, np.ones(D), LiSSA(scale=1.0, depth=13))


def test_on_an_indefinite_matrix_no_scale_helps():
    A = symmetric([-0.5, *np.linspace(0.5, 4, D - 1)])
    for scale in (None, 100.0):
        message = "LiSSA diverges at step .* negative curvature.* and no scale helps"
        with pytest.raises(DivergenceError, match=message):
            solve(A, np.ones(D), LiSSA(scale=scale, depth=20_000))


@pytest.mark.parametrize("matrix", [-MATRIX, np.zeros((D, D))])
def test_a_positive_eigenvalue_is_needed(matrix):
    with pytest.raises(DivergenceError, match="^LiSSA needs a positive definite A, got a largest"):
        solve(matrix, np.ones(D), LiSSA())


# --- the chosen scale ------------------------------------------------------------------------


def with_outliers(size, dtype="float64"):
    """Return the operator and the dense matrix of a logistic regression with eight outliers.

    At theta = 0 the Hessian of a loss is x x'/4. The outliers have the value `size` in feature 0,
    in which all other rows are zero. LiSSA chooses its scale by a few batches without outliers.
    """
    rng = np.random.default_rng(0)
    x = np.column_stack([np.zeros(400), rng.standard_normal((400, 3))]).astype(dtype)
    y = np.arange(400) % 2
    net = BinaryLogisticRegression(4, weight_decay=0.1, dtype=dtype)
    A = Hessian(net, Examples(x, y), 0.5)
    looked_at, sampled = [], A.sampled
    A.sampled = lambda rows, V: looked_at.append(rows) or sampled(rows, V)
    largest_eigenvalue(A, 1)
    long = np.setdiff1d(np.arange(400), looked_at)[:8]
    x[long] = [size, 0, 0, 0]
    return Hessian(net, Examples(x, y), 0.5), x.T @ x / 4 / 400 + 0.6 * np.eye(4)


def test_a_batch_that_was_not_looked_at_doubles_the_scale():
    A, matrix = with_outliers(60.0)
    scale = largest_eigenvalue(A, 1)
    # The Hessian of an outlier's loss has the eigenvalue 60^2 / 4 = 900. A scale below half of it
    # diverges.
    assert scale < 20 < 60**2 / 4 / 2
    B = np.column_stack([np.eye(4)[0], np.eye(4)[1], np.ones(4)])
    options = {"depth": 600, "repeats": 4, "change": 0.0}
    with pytest.raises(DivergenceError, match="^LiSSA diverges at step .* with scale"):
        solve(A, B, LiSSA(scale=scale, **options))
    solution = solve(A, B, LiSSA(**options))
    assert solution.iterations.tolist() == [600] * 3
    scales = [scale * 2**k for k in range(8)]
    found = [
        next(s for s in scales if gives(A, B[:, j], LiSSA(scale=s, **options), solution.x[:, j]))
        for j in range(3)
    ]
    # `found` has the scale with which each column was solved. Column 1 has no part along the
    # outliers' feature, so its scale was not doubled.
    assert found[1] == scale and found[0] == found[2]
    larger = found[0]
    assert larger >= 4 * scale
    assert not gives(A, B[:, 0], LiSSA(scale=2 * larger, **options), solution.x[:, 0])
    with pytest.raises(DivergenceError):
        solve(A, B[:, 0], LiSSA(scale=larger / 2, **options))
    exact = np.linalg.solve(matrix, B[:, 1])
    assert relative_error(solution.x[:, 1], exact) < 0.2


def gives(A, b, solver, expected):
    try:
        return np.allclose(solve(A, b, solver).x, expected, rtol=1e-9)
    except DivergenceError:
        return False


def test_an_overflow_doubles_the_scale_too():
    A, _ = with_outliers(1e9, "float32")  # a batch with three outliers overflows float32
    solution = solve(A, np.ones(4), LiSSA(depth=200, repeats=1))
    assert np.isfinite(solution.x).all() and not solution.converged[0]


def test_a_matrix_that_is_not_finite_is_not_run_again_and_again():
    A = LinearOperator((D, D), matvec=lambda v: np.full(D, np.nan), dtype=float)
    with pytest.raises(DivergenceError, match="finite"):
        LiSSA()._check_growth(A, np.ones((D, 1)), np.full((D, 1), np.inf), 16, 1.0)


def test_the_chosen_scale_is_the_largest_eigenvalue():
    for matrix in (MATRIX, symmetric([0.5, 2.0]), symmetric([7.0])):
        largest = np.linalg.eigvalsh(matrix)[-1]
        assert largest * 0.99 <= largest_eigenvalue(aslinearoperator(matrix), 1) < 1.07 * largest
    assert np.isnan(largest_eigenvalue(aslinearoperator(MATRIX * np.nan), 1))


def test_the_chosen_scale_covers_the_sampled_batches():
    rng = np.random.default_rng(0)
    problem = ridge(num_rows=30, num_inputs=3)
    x = np.repeat(rng.standard_normal((1, 3)), 30, axis=0)
    examples = Examples(x, np.zeros(30))
    # All rows are equal, so the loss's Hessian is 2 x x', where x includes the 1 of the intercept.
    # Its only nonzero eigenvalue is 2 |x|^2.
    largest = 2 * (np.sum(x[0] ** 2) + 1)
    found = largest_eigenvalue(Hessian(problem.net, examples), 1)
    # The penalty adds at most 0.2, and the estimate may be a few per cent too large.
    assert largest * (1 - 1e-3) < found < (largest + 0.2) * 1.06
