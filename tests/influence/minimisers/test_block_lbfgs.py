import numpy as np
import pytest

from influence.minimisers import block_lbfgs
from influence.minimisers.block_lbfgs import minimise
from tests.influence.problems import symmetric


def every(start, num):
    return np.repeat(np.asarray(start, float)[:, None], num, axis=1)


def quadratics(matrices, minima):
    """Return (gradients, asked) for quadratic functions with matrices H_j and minima c_j.

    `gradients` gives H_j (theta_j - c_j). It appends the columns j of each call to `asked`.
    """
    asked = []

    def gradients(thetas, columns):
        asked.append(columns.tolist())
        away = thetas - minima[:, columns]
        return np.stack([matrices[c] @ away[:, j] for j, c in enumerate(columns)], axis=1)

    return gradients, asked


def run(gradients, inverse, start, tolerance=1e-10, max_passes=50, dtype=float):
    start = np.asarray(start, dtype)
    num = start.shape[1]
    first = gradients(start, np.arange(num))
    return minimise(gradients, inverse, start, first, np.full(num, tolerance), max_passes)


def test_the_right_inverse_needs_one_pass():
    matrices = [symmetric([1, 2, 5], seed) for seed in range(2)]
    minima = np.array([[1.0, 0], [2, 0], [3, 0]])
    gradients, asked = quadratics(matrices, minima)
    solve = lambda G, columns: np.stack(  # noqa: E731
        [np.linalg.solve(matrices[c], G[:, j]) for j, c in enumerate(columns)], axis=1
    )
    found = run(gradients, solve, np.zeros((3, 2)))
    np.testing.assert_allclose(found.thetas, minima, atol=1e-12)
    # Both gradients at the start were asked for. The second function starts at its minimum, so only
    # the first function is evaluated again.
    assert asked == [[0, 1], [0]] and found.passes.tolist() == [1, 0]


def test_secant_updates_find_the_curvature_that_the_inverse_lacks():
    """Check a search whose inverse, I, is wrong in the two directions of curvature 3 and 7.

    Secant updates must find these curvatures in few passes.
    """
    H = symmetric([1, 1, 1, 1, 3, 7])
    c = np.arange(6.0)[:, None]
    gradients, _ = quadratics([H], c)
    found = run(gradients, lambda G, _: G, np.zeros((6, 1)))
    np.testing.assert_allclose(found.thetas, c, atol=1e-9)
    assert found.passes[0] < 14
    by_chord = np.zeros((6, 1))
    for _ in range(14):  # without secant updates, steps by the same inverse diverge
        by_chord = by_chord - gradients(by_chord, np.array([0]))
    assert np.abs(by_chord - c).max() > 1e6


def test_columns_do_not_depend_on_each_other():
    rng = np.random.default_rng(0)
    matrices = [symmetric(rng.uniform(0.5, 3, 4), seed) for seed in range(5)]
    minima = rng.standard_normal((4, 5))
    gradients, _ = quadratics(matrices, minima)
    together = run(gradients, lambda G, _: G, np.zeros((4, 5)))
    for j in range(5):
        alone, _ = quadratics([matrices[j]], minima[:, [j]])
        found = run(alone, lambda G, _: G, np.zeros((4, 1)))
        np.testing.assert_allclose(found.thetas[:, 0], together.thetas[:, j], rtol=1e-12)
        assert found.passes[0] == together.passes[j]


def test_a_step_that_climbs_is_not_taken_but_learned_from():
    """Minimise log cosh, which is nearly linear far from zero, from 3.

    Newton's step goes to about -200. It must be rejected, and the next step must be shorter.
    """
    seen = []

    def gradients(thetas, columns):
        seen.append(thetas[0, 0])
        return np.tanh(thetas)

    curvature = 1 / np.cosh(3.0) ** 2
    found = run(gradients, lambda G, _: G / curvature, [[3.0]])
    assert abs(found.thetas[0, 0]) < 1e-10 and found.norms[0] < 1e-10
    assert seen[1] < -90  # the first step is much too long
    assert 0 < 3 - seen[2] <= (3 - seen[1]) / 2  # the second step is at most half as long


def test_a_step_is_at_most_half_as_long_as_one_that_was_refused():
    """Refuse steps by NaN gradients. Each refused step must halve the length, and do nothing else.

    The steps from 1 have the lengths 16, 8, 4 and 2. The last one is accepted.
    """
    seen = []

    def gradients(thetas, columns):
        seen.append(thetas[0, 0])
        return np.where(thetas > -1, thetas, np.nan)

    found = run(gradients, lambda G, _: 16 * G, [[1.0]])
    np.testing.assert_allclose(seen[1:5], [-15, -7, -3, -1])
    assert abs(found.thetas[0, 0]) < 1e-10


def test_pairs_that_are_given_are_known_from_the_start():
    """Give function 0 the secant pairs of all directions in which the inverse is wrong.

    Function 0 then needs one pass. Function 1, which is equal but gets no pairs, needs more.
    """
    H, c = symmetric([1, 1, 1, 3, 7]), np.arange(5.0)[:, None]
    values, vectors = np.linalg.eigh(H)
    gradients, _ = quadratics([H, H], np.hstack([c, c]))
    none = np.zeros((5, 1))
    pairs = [(np.hstack([v, none]), np.hstack([H @ v, none])) for v in vectors[:, 3:].T[:, :, None]]
    start = np.zeros((5, 2))
    first = gradients(start, np.arange(2))
    found = minimise(gradients, lambda G, _: G, start, first, np.full(2, 1e-10), 50, pairs=pairs)
    np.testing.assert_allclose(found.thetas, np.hstack([c, c]), atol=1e-9)
    assert found.passes[0] == 1 < found.passes[1]


def test_pairs_that_others_are_given_change_nothing(monkeypatch):
    """Minimise a function alone with two given pairs, and beside a function with six given pairs.

    Given pairs of the other function change nothing. They also do not count towards the limit of
    stored pairs, here 4.
    """
    monkeypatch.setattr(block_lbfgs, "_LEAST_PAIRS", 4)
    monkeypatch.setattr(block_lbfgs, "_BYTES", 0)
    H, c = symmetric(np.geomspace(1, 1e2, 12)), np.ones((12, 1))
    vectors = np.linalg.eigh(H)[1][:, -6:]
    pairs = [(v[:, None], H @ v[:, None]) for v in vectors.T]
    none = np.zeros((12, 1))
    beside = [
        (np.hstack([P if i < 2 else none, P]), np.hstack([Y if i < 2 else none, Y]))
        for i, (P, Y) in enumerate(pairs)
    ]
    found = []
    for given, k in ((pairs[:2], 1), (beside, 2)):
        gradients, _ = quadratics([H] * k, np.repeat(c, k, axis=1))
        start = np.zeros((12, k))
        first = gradients(start, np.arange(k))
        found.append(
            minimise(gradients, lambda G, _: G, start, first, np.zeros(k), 15, pairs=given)
        )
    alone, together = found
    # The function with six given pairs uses all of them, in addition to four stored pairs.
    assert together.norms[1] < alone.norms[0] / 2
    np.testing.assert_allclose(together.thetas[:, 0], alone.thetas[:, 0], rtol=1e-8)


def test_steps_grow_with_those_that_were_taken():
    """Minimise |t| far from its minimum. With each accepted step, the trust radius must grow."""
    seen = []

    def gradients(thetas, columns):
        seen.append(thetas[0].tolist())
        return np.where(np.abs(thetas) > 1, np.sign(thetas), thetas)

    start = np.array([[100.0]])
    found = minimise(
        gradients,
        lambda G, _: 1000 * G,
        start,
        np.ones((1, 1)),
        np.full(1, 1e-10),
        50,
        longest=np.array([2.0]),
    )
    lengths = np.abs(np.diff([[100.0], *seen], axis=0))[:, 0]
    np.testing.assert_allclose(lengths[:6], 2 * 1.5 ** np.arange(6))
    assert found.norms[0] < 1e-10


def test_after_a_step_that_went_too_far_the_next_is_no_longer():
    """Give a first step that ends on a steep climb, where the gradient is a little smaller.

    The step is accepted for its smaller gradient. The next step must not be longer.
    """
    seen, scales = [], iter([1.8, *[100.0] * 20])

    def gradients(thetas, columns):
        seen.append(thetas[:, 0])
        return np.array([[-0.8], [0.5]])

    minimise(
        gradients,
        lambda G, _: next(scales) * G,
        np.zeros((2, 1)),
        np.array([[1.0], [0]]),
        np.full(1, 1e-10),
        2,
    )
    np.testing.assert_allclose(seen[0], [-1.8, 0])
    assert np.linalg.norm(seen[1] - seen[0]) == pytest.approx(1.8)


def test_a_search_stays_in_the_valley_it_begins_in():
    """Minimise -cos from 1.5, where the curvature is so small that Newton's step is too long.

    The search then ends in a far valley. With a limit on the first step, it must end at 0.
    """
    gradients = lambda t, _: np.sin(t)  # noqa: E731
    inverse = lambda G, _: G / np.cos(1.5)  # noqa: E731
    start, first, tolerance = np.full((1, 1), 1.5), np.full((1, 1), np.sin(1.5)), np.full(1, 1e-10)
    far = minimise(gradients, inverse, start, first, tolerance, 50)
    near = minimise(gradients, inverse, start, first, tolerance, 50, longest=np.ones(1))
    assert abs(far.thetas[0, 0]) > 6 and far.norms[0] < 1e-10
    assert abs(near.thetas[0, 0]) < 1e-10


def test_directions_of_negative_curvature_are_descended():
    """Minimise theta^4 / 4 - theta^2 / 2 from near 0, which is a maximum.

    Newton's step would go to 0. The search must go to the minima at 1 and -1.
    """
    found = run(lambda t, _: t**3 - t, lambda G, _: G, [[0.05, -0.05]])
    np.testing.assert_allclose(found.thetas, [[1, -1]], atol=1e-9)


def test_what_cannot_be_reached_is_given_up_and_the_best_returned():
    """Use gradients with errors of about 1e-3, so that the tolerance 1e-10 cannot be reached.

    The search must stop after few passes and return a theta near the minimum.
    """
    rng = np.random.default_rng(0)
    H = symmetric([1, 2, 3])
    noisy = lambda t, _: H @ t + 1e-3 * rng.standard_normal(t.shape)  # noqa: E731
    found = run(noisy, lambda G, _: G / 2, np.ones((3, 1)), max_passes=1000)
    assert 1e-10 < found.norms[0] < 5e-3 and found.passes[0] < 100
    one = run(lambda t, _: H @ t, lambda G, _: G / 10, np.ones((3, 1)), max_passes=1)
    assert one.passes[0] == 1
    np.testing.assert_allclose(one.norms, np.linalg.norm(H @ one.thetas, axis=0))


def test_a_long_way_down_is_gone_though_gradients_grow():
    """Minimise Rosenbrock's function, along its valley.

    Beside the valley, gradients are a hundred times larger. The search must not end there.
    """

    def rosenbrock(t, _):
        away = t[1] - t[0] ** 2
        return np.stack([2 * (t[0] - 1) - 400 * t[0] * away, 200 * away])

    start = np.array([[-1.9], [1.9**2 + 1e-4]])  # the start is in the valley, far from the minimum
    found = run(rosenbrock, lambda G, _: G / 1000, start, max_passes=2000)
    np.testing.assert_allclose(found.thetas, 1, atol=1e-8)

    # Add a variable along which the first step decreases the function about a million times more
    # than the later steps do. The later steps must still count as progress.
    def after(t, columns):
        return np.concatenate([rosenbrock(t[:2], columns), 2e7 * t[2:]])

    inverse = lambda G, _: G / np.array([[1000], [1000], [2e7]])  # noqa: E731
    found = run(after, inverse, np.concatenate([start, [[1.0]]]), 1e-6, max_passes=2000)
    np.testing.assert_allclose(found.thetas, [[1], [1], [0]], atol=1e-5)


def test_a_long_straight_slope_is_gone_down():
    """Minimise a function whose gradient keeps its size for more than `_PATIENCE` passes.

    The search must go on, because the function decreases.
    """
    slope = lambda t, _: np.where(np.abs(t) > 1, np.sign(t), t)  # noqa: E731
    start, first = np.array([[1e8]]), np.ones((1, 1))
    options = {"longest": np.ones(1)}
    inverse = lambda G, _: 1e9 * G  # noqa: E731
    found = minimise(slope, inverse, start, first, np.full(1, 1e-10), 100, **options)
    assert found.norms[0] <= 1e-10 and found.passes[0] > 40


@pytest.mark.parametrize("ratio", [10, 100])
def test_rounding_is_no_way_down(ratio):
    """Use gradients with large noise, by which the function seems to decrease in every pass.

    The search must still stop after fewer than 100 passes.
    """
    H, rng = symmetric(np.geomspace(1, 100, 30)), np.random.default_rng(0)
    size = np.linalg.norm(H @ np.ones(30)) / ratio
    noise = lambda t: size / np.sqrt(30) * rng.standard_normal(t.shape)  # noqa: E731
    found = run(
        lambda t, _: H @ t + noise(t),
        lambda G, _: np.linalg.solve(H, G),
        np.ones((30, 1)),
        max_passes=1000,
        dtype="float32",
    )
    assert found.passes[0] < 100


def test_a_search_that_cannot_move_ends():
    start = np.full((1, 1), 1000, np.float32)  # the rounding error of 1000 is larger than a step
    first = np.full((1, 1), 1e-6, np.float32)
    stuck = minimise(lambda t, _: first, lambda G, _: G, start, first, np.zeros(1), 300)
    asked = []

    def once(thetas, _):
        """Return a smaller gradient at the second call, then only NaN."""
        asked.append(thetas)
        return np.array([[[1], [0.1]], [[0], [-0.9]], [[np.nan], [np.nan]]][min(len(asked), 3) - 1])

    lost = run(once, lambda G, _: np.array([[1], [100]]) * G, [[0.0], [0.0]], max_passes=300)
    assert lost.norms[0] == 0.9  # the step to the smaller gradient was accepted
    assert stuck.passes[0] < 30 and lost.passes[0] < 30


def searched(max_passes, until=1e-3):
    """Minimise three equal functions by low-precision gradients, then by exact gradients.

    The third function starts at its minimum. Low-precision gradients have the error 0.01. They are
    used until their norm is below `until`.

    Returns: what `minimise` returns, and the columns of each call by kind of gradient.
    """
    H, c, asked = symmetric([1, 2, 5]), np.ones((3, 1)), {"exact": [], "rough": []}

    def by(name, error):
        def gradients(thetas, columns):
            asked[name].append(columns.tolist())
            return H @ (thetas - c) + error

        return gradients

    start = np.array([[0, 9.0, 1], [0, 9, 1], [0, -9, 1]])
    found = minimise(
        by("exact", 0),
        lambda G, _: G / 3,
        start,
        H @ (start - c),
        np.full(3, 1e-9),
        max_passes,
        rough=(by("rough", 0.01), np.full(3, until)),
    )
    true = np.linalg.norm(H @ (found.thetas - c), axis=0)
    np.testing.assert_allclose(found.norms, true, rtol=1e-9, atol=1e-15)
    return found, asked


def test_what_rough_gradients_found_is_judged_by_the_exact_ones():
    # Three passes are not enough to reach `until`. Exact gradients are asked for once, to report
    # the norms of the two functions that moved.
    found, asked = searched(3)
    assert found.passes.tolist() == [3, 3, 0] and asked["exact"] == [[0, 1]]
    # This search goes on with exact gradients; the third function is never evaluated.
    found, asked = searched(50)
    columns = sum(asked["exact"] + asked["rough"], [])
    assert (found.norms <= 1e-9).all() and len(columns) == found.passes.sum() + 4
    assert 2 not in columns
    # The low-precision gradients never reach the norm 0. When they stop shrinking, the search
    # changes to exact gradients.
    found, _ = searched(500, until=0.0)
    assert (found.norms <= 1e-9).all()


def test_rough_gradients_are_not_taken_where_the_first_is_small_enough():
    found, asked = searched(50, until=10.0)
    assert (found.norms <= 1e-9).all()
    assert sum(asked["rough"], []).count(0) == 0 < sum(asked["rough"], []).count(1)


def test_the_exact_ones_go_on_from_the_smallest_gradient():
    """Check that the exact search starts at the best theta, not at the last one."""
    H, tried = np.diag([1.0, 100]), []

    def rough(thetas, _):
        tried.append(thetas)
        return H @ thetas

    start = np.array([[10.0], [0]])
    slanted = lambda G, _: np.array([[0.1, 0], [0.02, 0.01]]) @ G  # noqa: E731
    asked = []

    def exact(thetas, _):
        asked.append(thetas)
        return H @ thetas

    minimise(exact, slanted, start, H @ start, np.full(1, 1e-9), 1, rough=(rough, np.zeros(1)))
    sizes = [np.linalg.norm(H @ one) for one in (start, *tried)]
    np.testing.assert_array_equal(asked[0], [start, *tried][int(np.argmin(sizes))])
    assert np.argmin(sizes) < len(tried)


def test_rounding_among_rough_gradients_teaches_the_exact_ones_nothing():
    """Check that secant pairs from noisy low-precision gradients are dropped.

    With these pairs, the search by exact gradients would need more passes.
    """
    H, passes = symmetric(np.geomspace(1, 100, 40)), []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        start = rng.standard_normal((40, 1))
        first = H @ start
        size = 1e-3 * np.linalg.norm(first)
        asked = []

        def noisy(t, _, rng=rng, size=size):
            return H @ t + size / np.sqrt(40) * rng.standard_normal(t.shape)

        def exact(t, _, asked=asked):
            asked.append(t)
            return H @ t

        found = minimise(
            exact,
            lambda G, _: np.linalg.solve(H + 0.5 * np.eye(40), G),
            start,
            first,
            1e-9 * np.linalg.norm(first, axis=0),
            500,
            rough=(noisy, np.full(1, 0.3 * size)),
        )
        assert found.norms[0] <= 1e-9 * np.linalg.norm(first)
        passes.append(len(asked))
    assert np.mean(passes) < 15, passes


def test_only_so_many_pairs_are_remembered(monkeypatch):
    H = symmetric(np.geomspace(1, 1e2, 30))
    gradients, _ = quadratics([H], np.ones((30, 1)))
    passes = {}
    for least, fit in ((3, 0), (100, 0), (3, 100), (3, 3)):
        monkeypatch.setattr(block_lbfgs, "_LEAST_PAIRS", least)
        monkeypatch.setattr(block_lbfgs, "_BYTES", fit * 2 * 30 * 8)
        found = run(gradients, lambda G, _: G / 30, np.zeros((30, 1)), 1e-6, 500)
        assert found.norms[0] <= 1e-6
        passes[least, fit] = found.passes[0]
    assert passes[3, 100] == passes[100, 0] < passes[3, 0] == passes[3, 3]


def test_the_start_is_left_alone():
    start = np.ones((2, 1))
    first = start.copy()
    minimise(lambda t, _: t, lambda G, _: G, start, first, np.array([1e-9]), 5)
    np.testing.assert_array_equal(start, 1)
    np.testing.assert_array_equal(first, 1)
