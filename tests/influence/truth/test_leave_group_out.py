import numpy as np
import pytest

from influence import CG, ConvergenceWarning, Direct, Examples, leave_one_out
from influence.truth import leave_out as module
from influence.truth import runs
from influence.truth.leave_out import leave_group_out
from influence.truth.runs import Task
from tests.influence.problems import logistic, relative_error, ridge, tanh_net, through_keras

N = 60
SHARES = (0.01, 0.05, 0.25, 0.5)


def groups_of(p):
    """1 to 50 % of the rows, at random and those alike: unequal sizes, and they overlap."""
    rng, order = np.random.default_rng(0), np.argsort(p.train.x[:, 0])
    sizes = [max(int(share * len(p.train)), 1) for share in SHARES]
    random = [rng.choice(len(p.train), size, replace=False) for size in sizes]
    return random + [order[:size] for size in sizes]


def changes(p, groups):
    """(m, k) by the oracle: minimised from scratch to 1e-12."""
    before = p.measured.losses(p.theta)
    after = [p.measured.losses(p.oracle.without(g).minimum(p.theta)) for g in groups]
    return np.stack([a - before for a in after], axis=1)


@pytest.fixture(scope="module")
def softmax():
    return logistic("softmax", N, intercept=True)


# --- the numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("weight_decay", [1e-3, 0.05])
def test_newton_is_the_independent_refit(kind, weight_decay):
    p = logistic(kind, N, weight_decay=weight_decay, intercept=True)
    groups = groups_of(p)
    got = leave_group_out(p.net, p.train, p.test, groups, tolerance=1e-12)
    expected = changes(p, groups)
    assert got.converged.all() and (got.gradient_norm <= 1e-12).all()
    # |theta - minimum| <= 1e-12 / weight_decay, and test gradients are of size 1.
    assert np.abs(got[:] - expected).max() < 1e-8 and np.abs(expected).max() > 0.1
    for column, group in zip(got.rows, groups, strict=True):
        np.testing.assert_array_equal(column, group)


def test_parameters_are_those_of_fit_without_the_rows(softmax, monkeypatch):
    p, taken, asked = softmax, [], Task.changes
    monkeypatch.setattr(Task, "changes", lambda self, t: taken.append(t) or asked(self, t))
    groups, before = groups_of(p), p.theta
    got = leave_group_out(p.net, p.train, p.test, groups, tolerance=1e-12)
    np.testing.assert_array_equal(p.theta, before)
    for group, theta, change in zip(groups, taken[0].T, got[:].T, strict=True):
        p.net.fit(p.train.without(group), gradient_tolerance=1e-12)
        refitted, losses = p.theta, p.net.losses(p.test.x, p.test.y)
        p.net.theta = before
        assert np.abs(refitted - theta).max() < 1e-9
        assert np.abs(losses - p.net.losses(p.test.x, p.test.y) - change).max() < 1e-9


def test_every_refit_reaches_the_default_tolerance(softmax):
    got = leave_group_out(softmax.net, softmax.train, softmax.test, groups_of(softmax))
    assert (got.gradient_norm <= 1e-8).all() and (got.passes <= 12).all()
    small = got.passes[: len(SHARES)]
    assert small[0] < small[-1]  # what is farther away takes longer


def test_the_gradient_norm_is_true(softmax, monkeypatch):
    p, taken, asked = softmax, [], Task.changes
    monkeypatch.setattr(Task, "changes", lambda self, t: taken.append(t) or asked(self, t))
    groups = groups_of(p)
    with pytest.warns(ConvergenceWarning):
        got = leave_group_out(p.net, p.train, p.test, groups, tolerance=1e-12, max_passes=2)
    true = [
        np.linalg.norm(p.oracle.without(group).gradient(theta))
        for group, theta in zip(groups, taken[0].T, strict=True)
    ]
    np.testing.assert_allclose(got.gradient_norm, true, rtol=1e-6)
    assert not got.converged.all() and (got.passes == 2).all()


def test_groups_of_one_row_are_leave_one_out(softmax):
    p, rows = softmax, [11, 3, 40]
    one = leave_one_out(p.net, p.train, p.test, rows)
    groups = leave_group_out(p.net, p.train, p.test, [[row] for row in rows])
    np.testing.assert_array_equal(groups[:], one[:])
    np.testing.assert_array_equal(groups.gradient_norm, one.gradient_norm)
    np.testing.assert_array_equal(groups.passes, one.passes)


def test_by_the_tape_as_in_closed_form(softmax):
    taped = through_keras(softmax)
    taped.net.convex = True
    groups = groups_of(softmax)[2::4]  # 25 % at random, and of those alike
    got = leave_group_out(taped.net, taped.train, taped.test, groups, tolerance=1e-11)
    assert relative_error(got[:], changes(softmax, groups)) < 1e-8


def test_ridge_in_closed_form():
    """A quadratic: two passes would do, were the group's curvature taken out exactly."""
    p = ridge()
    p.net.convex = True
    groups = [np.arange(20), np.array([39, 1])]
    got = leave_group_out(p.net, p.train, p.test, groups, tolerance=1e-10)
    assert relative_error(got[:], changes(p, groups)) < 1e-8
    assert (got.passes[1:] <= 4).all()


def test_removing_the_same_rows_twice_over_changes_nothing_else(softmax):
    p = softmax
    a, b = np.arange(15), np.arange(10, 30)
    got = leave_group_out(p.net, p.train, p.test, [a, b, a[::-1]], tolerance=1e-12)
    assert np.abs(got[:, 0] - got[:, 2]).max() < 1e-10
    assert np.abs(got[:, 0] - got[:, 1]).max() > 1e-3


# --- what must not matter --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"block": 1}, {"block": 3}, {"batch_size": 1},
                                     {"batch_size": 7}, {"solver": CG(rtol=1e-4)}])  # fmt: skip
def test_blocks_batches_and_solvers_change_nothing(options, softmax):
    p, groups = softmax, groups_of(softmax)
    expected = leave_group_out(p.net, p.train, p.test, groups, tolerance=1e-12)
    got = leave_group_out(p.net, p.train, p.test, groups, tolerance=1e-12, **options)
    assert np.abs(got[:] - expected[:]).max() < 1e-10  # both within 1e-12 / 0.05 of the minimum


def test_a_dict_names_its_columns(softmax):
    p = softmax
    named = {"digits": [1, 2], 7: np.array([5])}
    got = leave_group_out(p.net, p.train, p.test, named)
    assert got.names == ("digits", 7)
    expected = leave_group_out(p.net, p.train, p.test, list(named.values()))
    np.testing.assert_array_equal(got[:], expected[:])
    assert expected.names == ()


# --- by the net's own fit --------------------------------------------------------------------


def test_fit_is_called_on_the_remaining_rows():
    net, examples = tanh_net()
    groups, seen, before = [[1, 4, 2], np.array([0])], [], net.theta

    def fit(net, remaining):
        seen.append(remaining)
        net.theta = net.theta + 0.5

    got = leave_group_out(net, examples, examples, groups, fit=fit)
    for remaining, group in zip(seen, groups, strict=True):
        np.testing.assert_array_equal(remaining.x, np.delete(examples.x, group, axis=0))
    np.testing.assert_array_equal(net.theta, before)
    moved = net.losses(examples.x, examples.y, before[:, None] + 0.5)[:, 0]
    expected = moved - net.losses(examples.x, examples.y)
    np.testing.assert_allclose(got[:], np.stack([expected] * 2, axis=1), rtol=1e-10)
    assert not got.converged.any() and (got.passes == 1).all()


def test_fit_is_newton(softmax):
    p, groups = softmax, groups_of(softmax)
    got = leave_group_out(p.net, p.train, p.test, groups, method="fit", tolerance=1e-9)
    assert got.converged.all() and np.abs(got[:] - changes(p, groups)).max() < 1e-8


# --- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([], ValueError, "^groups must hold at least one group of rows, got none"),
        ({}, ValueError, "^groups must hold at least one group of rows, got none"),
        (3, TypeError, "^groups must be a list of arrays of row numbers or a dict .* got int"),
        ("ab", TypeError, "^groups must be a list of arrays of row numbers .* got str"),
        (iter([[1]]), TypeError, "^groups must be a list of arrays of row numbers"),
        ([1, 2], ValueError, r"^groups\[0\] must be a one-dimensional, .* got 1; use \[1\]"),
        ([[1], []], ValueError, r"^groups\[1\] must be a one-dimensional, non-empty list"),
        ({"a": [1], "b": []}, ValueError, r"^groups\['b'\] must be a one-dimensional, non-empty"),
        ([[0, N]], IndexError, rf"^groups\[0\] must lie in \[0, {N}\), got {N} at position 1"),
        ([[-1]], IndexError, r"^groups\[0\] must lie in \[0, 60\), got -1"),
        ([[1, 2, 1]], ValueError, r"^groups\[0\] must name each row once, got 1 twice"),
        ([[0.0]], TypeError, r"^groups\[0\] must be integers, got dtype float64"),
        ([np.ones(N, bool)], TypeError, r"^groups\[0\] must be integers, got dtype bool"),
        ({"all": range(N)}, ValueError,
         r"^groups\['all'\] must leave a row to train on, got all 60"),
    ],
)  # fmt: skip
def test_bad_groups_are_refused_before_any_work(groups, error, message, softmax, monkeypatch):
    monkeypatch.setattr(Direct, "prepare", lambda *_: pytest.fail("the work had begun"))
    monkeypatch.setattr(runs, "run", lambda *_: pytest.fail("the work had begun"))
    with pytest.raises(error, match=message):
        leave_group_out(softmax.net, softmax.train, softmax.test, groups)


def test_other_bad_arguments_are_refused_as_by_leave_one_out(softmax):
    with pytest.raises(ValueError, match="^block must be at least 1, got 0"):
        leave_group_out(softmax.net, softmax.train, softmax.test, [[1]], block=0)
    with pytest.raises(TypeError, match="^net must be a GenericNeuralNet"):
        leave_group_out("net", softmax.train, softmax.test, [[1]])  # pyright: ignore


# --- kept on disk ----------------------------------------------------------------------------


def interrupted(folder, groups=None):
    p = logistic("softmax", 30, 3)
    return leave_group_out(
        p.net, p.train, p.test, groups or groups_of(p), block=3, checkpoints=folder
    )


def test_an_interrupted_run_continues_and_ends_bit_for_bit(tmp_path, monkeypatch):
    """What a kill -9 leaves is tested in test_retraining.py; it is kept by the same code."""
    folder = tmp_path / "kept"
    calls, refit = [], module._newton_block

    def dying(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return refit(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_newton_block", dying)
        interrupted(folder)
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(module, "_newton_block", lambda *given: calls.append(1) or refit(*given))
    expected = interrupted(None)
    calls.clear()
    got = interrupted(folder)
    assert len(calls) == 1
    for name in ("change_if_removed", "gradient_norm", "passes", "converged"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    calls.clear()
    other = groups_of(logistic("softmax", 30, 3))
    other[7] = other[7][1:]
    interrupted(folder, other)
    assert len(calls) == 1  # only the block with the other group


def test_one_row_may_be_left():
    p = logistic("sigmoid", 6, 2)
    got = leave_group_out(p.net, p.train, p.test, [[0, 1, 2, 3, 4]], tolerance=1e-10)
    assert np.abs(got[:] - changes(p, [[0, 1, 2, 3, 4]])).max() < 1e-8
    two = Examples(p.train.x[:2], p.train.y[:2])
    with pytest.raises(ValueError, match=r"^groups\[0\] must leave a row to train on, got all 2"):
        leave_group_out(p.net, two, p.test, [[0, 1]])
