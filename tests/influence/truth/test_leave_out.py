import warnings
from dataclasses import replace

import keras
import numpy as np
import pytest
import scipy.sparse

from influence import (
    CG,
    ConvergenceWarning,
    Direct,
    Examples,
    GenericNeuralNet,
    Hessian,
    Influence,
    RefitOptions,
    Refits,
    leave_group_out,
    leave_one_out,
    prepare,
)
from influence.truth import leave_out as module
from influence.truth.runs import Task
from tests.influence.problems import logistic, relative_error, ridge, tanh_net, through_keras

N = 60
ROWS = [11, 3, 40, 0, 29]
SHARES = (0.01, 0.05, 0.25, 0.5)


def rows_out(p, rows=ROWS, **options):
    return leave_one_out(p.net, p.train, p.test, rows, RefitOptions(**options))


def groups_out(p, groups, **options):
    return leave_group_out(p.net, p.train, p.test, groups, RefitOptions(**options))


def groups_of(p):
    """Return groups of rows, from one row to half of them. Groups overlap.

    The first half of the groups has random rows. The other half has rows of similar features.
    """
    rng, order = np.random.default_rng(0), np.argsort(p.train.x[:, 0])
    sizes = [max(int(share * len(p.train)), 1) for share in SHARES]
    random = [rng.choice(len(p.train), size, replace=False) for size in sizes]
    return random + [order[:size] for size in sizes]


def changes(p, groups):
    """Return the changes of the test losses (m, k) after refits by the oracle.

    A refit ends at a gradient norm below 1e-12.
    """
    before = p.measured.losses(p.theta)
    after = [p.measured.losses(p.oracle.without(g).minimum(p.theta)) for g in groups]
    return np.stack([a - before for a in after], axis=1)


@pytest.fixture(scope="module")
def actual(softmax):
    return changes(softmax, [[row] for row in ROWS])


@pytest.fixture(scope="module")
def taped_ridge():
    """Return ridge regression in a net without closed forms, which is declared as convex.

    Its bias has no penalty.
    """
    problem = ridge()
    problem.net.convex = True
    return problem


@pytest.fixture
def thetas(monkeypatch):
    """Return a list that collects the parameters for which test losses are computed."""
    taken, asked = [], Task.changes
    monkeypatch.setattr(Task, "changes", lambda self, t: taken.append(t) or asked(self, t))
    return taken


# --- the changes -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("weight_decay", [1e-3, 0.05, 1.0])
def test_newton_is_the_independent_refit(kind, weight_decay):
    p = logistic(kind, N, weight_decay=weight_decay, intercept=True)
    groups = groups_of(p)
    got = groups_out(p, groups, tolerance=1e-12)
    expected = changes(p, groups)
    assert got.converged.all() and (got.gradient_norm <= 1e-12).all()
    # A refit stops at a gradient norm of 1e-12, so |theta - minimum| <= 1e-12 / weight_decay. The
    # gradients of test losses have norms of about 1. So the errors of the changes of test losses
    # are also at most about 1e-12 / weight_decay.
    assert np.abs(got[:] - expected).max() < 1e-8 and np.abs(expected).max() > 0.02
    for column, group in zip(got.rows, groups, strict=True):
        np.testing.assert_array_equal(column, group)


def test_leave_one_out_is_leave_group_out_of_single_rows(softmax, actual):
    one = rows_out(softmax, tolerance=1e-12)
    # As above, |theta - minimum| <= 1e-12 / 0.05. The changes are about 1e-3, so their relative
    # errors are small, too.
    assert relative_error(one.change_if_removed, actual) < 1e-8
    assert isinstance(one, Refits) and one.rows.tolist() == ROWS and one.names == ()
    assert one.shape == (7, 5) and one.converged.all()
    assert (one.passes >= 2).all() and (one.passes <= 12).all()
    groups = groups_out(softmax, [[row] for row in ROWS], tolerance=1e-12)
    np.testing.assert_array_equal(groups[:], one[:])
    np.testing.assert_array_equal(groups.gradient_norm, one.gradient_norm)
    np.testing.assert_array_equal(groups.passes, one.passes)


def test_parameters_are_those_of_fit_without_the_rows(softmax, thetas):
    p, groups, before = softmax, groups_of(softmax), softmax.theta
    got = groups_out(p, groups, tolerance=1e-12)
    np.testing.assert_array_equal(p.theta, before)
    for group, theta, change in zip(groups, thetas[0].T, got[:].T, strict=True):
        p.net.fit(p.train.without(group), gradient_tolerance=1e-12)
        refitted, losses = p.theta, p.net.losses(p.test.x, p.test.y)
        p.net.theta = before
        assert np.abs(refitted - theta).max() < 1e-9
        assert np.abs(losses - p.net.losses(p.test.x, p.test.y) - change).max() < 1e-9


def test_the_default_tolerance_is_enough_for_changes(softmax, actual):
    rows, groups = rows_out(softmax), groups_out(softmax, groups_of(softmax))
    for refits in (rows, groups):
        assert (refits.gradient_norm <= 1e-8).all() and (refits.passes <= 12).all()
    assert np.abs(rows[:] - actual).max() < 1e-6 and np.abs(actual).max() > 1e-3
    assert groups.passes[0] < groups.passes[len(SHARES) - 1]  # the larger group takes more passes


def test_by_the_tape_as_in_closed_form(softmax):
    taped = through_keras(softmax)
    taped.net.convex = True
    groups = groups_of(softmax)[2::4]  # groups of 25 %, one random and one of similar rows
    got = groups_out(taped, groups, tolerance=1e-11)
    assert relative_error(got[:], changes(softmax, groups)) < 1e-8


def test_ridge_in_closed_form(taped_ridge):
    """Check a quadratic risk, for which Newton's method is exact.

    Two passes would be enough if the curvature without the group were known exactly. It is
    approximated, so small groups may take four.
    """
    groups = [np.arange(20), np.array([39, 1]), np.array([11])]
    got = groups_out(taped_ridge, groups, tolerance=1e-10)
    assert relative_error(got[:], changes(taped_ridge, groups)) < 1e-8
    assert (got.passes[1:] <= 4).all()


def test_newton_takes_dicts(taped_ridge):
    a, b = (keras.Input((2,), name=name, dtype="float64") for name in "ab")
    both = keras.layers.Concatenate(dtype="float64")([a, b])
    l2 = keras.regularizers.L2(0.1)
    output = keras.layers.Dense(1, kernel_regularizer=l2, dtype="float64")(both)
    net = GenericNeuralNet(keras.Model([a, b], output), "mse")
    net.convex, net.theta = True, taped_ridge.theta
    cut = lambda e: Examples({"a": e.x[:, :2], "b": e.x[:, 2:]}, e.y)  # noqa: E731
    got = leave_one_out(net, cut(taped_ridge.train), cut(taped_ridge.test), ROWS[:2])
    assert relative_error(got[:], rows_out(taped_ridge, ROWS[:2])[:]) < 1e-9


def with_leverage(kind, num_rows, factor, **options):
    """Return a problem in which the inputs of row 5 are multiplied by `factor`, at its minimum."""
    p = logistic(kind, num_rows, **options)
    x = p.train.x.copy()
    x[5] *= factor
    oracle = replace(p.oracle, features=x)
    p.net.theta = oracle.minimum(p.theta)
    return replace(p, train=Examples(x, p.train.y), oracle=oracle)


def test_a_row_of_great_leverage_is_refitted_too():
    """Check the removal of a row that has a large part in the Hessian.

    The factored Hessian of all rows, by which refits take their steps, is then inaccurate.
    """
    p = with_leverage("sigmoid", 40, 30)
    refits = rows_out(p, [5, 6], tolerance=1e-11)
    assert refits.converged.all()
    assert relative_error(refits[:], changes(p, [[5], [6]])) < 1e-7


def test_refits_far_from_the_full_datas_curvature_arrive():
    """Check the removal of row 6 where row 5, an outlier, dominates the Hessian of all rows.

    This Hessian is a bad approximation at the refit's end. The refit must still converge.
    """
    p = with_leverage("sigmoid", 10, 100, weight_decay=1e-3)
    refits = rows_out(p, [6], max_passes=200)
    assert refits.converged.all() and refits.passes[0] < 60
    expected = changes(p, [[6]])
    # A refit stops at a gradient norm of 1e-8. The smallest eigenvalue is at least the weight
    # decay, 1e-3. So theta has an error of at most 1e-8 / 1e-3, and test gradients are about 1.
    assert np.abs(refits[:] - expected).max() < 1e-4 and np.abs(expected).max() > 0.1


def test_one_row_may_be_left():
    p = logistic("sigmoid", 6, 2)
    got = groups_out(p, [[0, 1, 2, 3, 4]], tolerance=1e-10)
    assert np.abs(got[:] - changes(p, [[0, 1, 2, 3, 4]])).max() < 1e-8


def test_the_gradient_norm_is_true(softmax, thetas):
    """Compare with the oracle's gradient norm at the theta of the reported test losses."""
    groups = groups_of(softmax)
    with pytest.warns(ConvergenceWarning):
        got = groups_out(softmax, groups, tolerance=1e-12, max_passes=2)
    true = [
        np.linalg.norm(softmax.oracle.without(group).gradient(theta))
        for group, theta in zip(groups, thetas[0].T, strict=True)
    ]
    np.testing.assert_allclose(got.gradient_norm, true, rtol=1e-6)
    assert not got.converged.all() and (got.passes == 2).all()


def agreement(predicted, actual):
    """Return Pearson's r, the slope, the share of equal signs, and the relative largest error."""
    predicted, actual = predicted.ravel(), actual.ravel()
    r = np.corrcoef(predicted, actual)[0, 1]
    slope = predicted @ actual / (predicted @ predicted)
    error = np.abs(predicted - actual).max() / np.abs(actual).max()
    return r, slope, np.mean(predicted * actual > 0), error


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_one_step_in_closed_form_predicts_refits_of_rows_with_leverage(kind):
    """Compare one Newton step with exact refits, for data with a row of large leverage.

    First order ignores the curvature of the removed row, so its error is much larger.
    """
    p = with_leverage(kind, 40, 8)
    rows = np.arange(40)
    actual = rows_out(p, rows, tolerance=1e-12)
    stepped = p.net.one_step_leave_one_out(p.train, rows).T
    one_step = p.net.losses(p.test.x, p.test.y, stepped) - p.measured.losses(p.theta)[:, None]
    r, slope, same_signs, error = agreement(one_step, actual[:])
    assert r > 0.998 and abs(slope - 1) < 0.02 and same_signs > 0.98 and error < 0.1
    influence = Influence(p.net, p.train, solver=Direct(), approximation="first_order")
    first_order = influence.scores(p.test)
    r, slope, _, more = agreement(first_order[:], actual[:])
    assert r > 0.97 and 1.1 < slope < 1.4 and more > 2.5 * error


# --- changes that must not matter ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("block", 1), ("block", 3), ("batch_size", 1), ("batch_size", 7), ("solver", CG(rtol=1e-4))],
)
def test_blocks_batches_and_solvers_change_nothing(name, value, softmax):
    groups = groups_of(softmax)
    expected = groups_out(softmax, groups, tolerance=1e-12)
    got = groups_out(softmax, groups, tolerance=1e-12, **{name: value})
    # In both calls theta is within 1e-12 / 0.05 = 2e-11 of the minimum.
    assert np.abs(got[:] - expected[:]).max() < 1e-10


def test_row_order_permutes_the_refits(softmax):
    order = np.random.default_rng(0).permutation(N)
    expected = rows_out(softmax, order[ROWS], tolerance=1e-12)
    got = rows_out(replace(softmax, train=softmax.train.take(order)), tolerance=1e-12)
    assert np.abs(got[:] - expected[:]).max() < 1e-10


def test_sparse_rows_change_nothing(softmax, actual):
    train, test = (
        Examples(scipy.sparse.csr_matrix(e.x), e.y) for e in (softmax.train, softmax.test)
    )
    refits = rows_out(replace(softmax, train=train, test=test), tolerance=1e-12)
    assert relative_error(refits[:], actual) < 1e-8


def test_what_is_prepared_is_not_prepared_again(softmax, actual, monkeypatch):
    prepared = prepare(Hessian(softmax.net, softmax.train), Direct())
    monkeypatch.setattr(Direct, "prepare", lambda *_: pytest.fail("prepared again"))
    refits = rows_out(softmax, solver=prepared, tolerance=1e-12)
    assert relative_error(refits[:], actual) < 1e-8


def test_a_dict_names_its_columns(softmax):
    named = {"digits": [1, 2], 7: np.array([5])}
    got, expected = groups_out(softmax, named), groups_out(softmax, list(named.values()))
    assert got.names == ("digits", 7) and expected.names == ()
    np.testing.assert_array_equal(got[:], expected[:])


# --- refits by the net's own fit -------------------------------------------------------------


def test_fit_warm_and_cold_are_newton(softmax):
    groups, zero = groups_of(softmax), np.zeros(softmax.net.num_parameters)
    expected = changes(softmax, groups)
    for start in (None, zero):
        refits = groups_out(softmax, groups, method="fit", start=start, tolerance=1e-10)
        # The smallest eigenvalue is at least 0.05. The error of theta is then at most the tolerance
        # over this number, 1e-10 / 0.05 = 2e-9.
        assert refits.converged.all() and (refits.passes == 1).all()
        assert np.abs(refits[:] - expected).max() < 1e-8
        assert (0 < refits.gradient_norm).all() and (refits.gradient_norm <= 1e-10).all()


def test_the_tolerance_is_that_of_the_own_fit_and_one_warning_names_all_misses(taped_ridge):
    def fit(net, examples):
        net.fit(examples, gradient_tolerance=1e-7)

    expected = changes(taped_ridge, [[row] for row in ROWS[:2]])
    for given in (None, fit):
        got = rows_out(taped_ridge, ROWS[:2], method="fit", fit=given, tolerance=1e-7)
        assert got.converged.all() and np.abs(got[:] - expected).max() < 1e-6
    with pytest.warns(ConvergenceWarning) as caught:
        got = rows_out(taped_ridge, ROWS[:2], method="fit", tolerance=1e-30)
    assert not got.converged.any() and len(caught) == 1
    assert str(caught[0].message).startswith(
        "2 of 2 refits ended above a gradient norm of 1.0e-30"
    ) and str(caught[0].message).endswith("): use float64, or a larger tolerance.")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_without_a_tolerance_the_own_fit_stops_relative_to_the_removal(dtype):
    """Compare with ridge regression in closed form, where the own fit gets no tolerance.

    The fit must stop at a gradient so small, compared to that of the removed row, that changes have
    a relative error of 1e-7 in float64.
    """
    p = ridge(60, l2=1e-3, dtype=dtype)
    expected = changes(ridge(60, l2=1e-3), [[row] for row in ROWS])
    got = rows_out(p, ROWS, method="fit")
    added = [np.linalg.norm(p.oracle.gradients(p.theta)[row]) / len(p.train) for row in ROWS]
    if dtype == "float64":
        assert got.converged.all()
        assert (got.gradient_norm <= 1.1e-8 * np.array(added)).all()
    reached = 1e-7 if dtype == "float64" else 1e-3
    assert (np.abs(got[:] - expected).max(axis=0) <= reached * np.abs(expected).max(axis=0)).all()


def test_training_on_from_no_minimum_is_warned_of():
    # With more than two hidden units, the penalty would make some useless at the minimum. The risk
    # would then be flat in some directions, and rounding would keep the gradient above the
    # tolerance.
    net, examples = tanh_net(hidden=2, l2=0.05)
    with pytest.warns(ConvergenceWarning, match="^net is at a gradient norm of .* go on with the"):
        away = leave_one_out(net, examples, examples, [0, 6])
    net.fit(examples)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        there = leave_one_out(net, examples, examples, [0, 6])
    # Away from the minimum, a refit also continues the training. This drift is in every column of
    # `away`, and is larger than the changes at the minimum.
    assert np.abs(away[:].mean(axis=1)).max() > 2 * np.abs(there[:]).max()


def test_fit_is_called_on_the_remaining_rows_from_the_start(softmax):
    groups, seen, start = [[7, 4, 2], np.array([0])], [], np.arange(18.0)

    def fit(net, examples):
        seen.append((net.theta, examples))
        net.theta = np.full_like(start, 0.25)

    before = softmax.theta
    refits = groups_out(softmax, groups, method="fit", fit=fit, start=start)
    for (theta, examples), group in zip(seen, groups, strict=True):
        np.testing.assert_array_equal(theta, start)
        np.testing.assert_array_equal(examples.x, np.delete(softmax.train.x, group, axis=0))
        np.testing.assert_array_equal(examples.y, np.delete(softmax.train.y, group))
    at = np.full_like(start, 0.25)
    expected = softmax.measured.losses(at) - softmax.measured.losses(before)
    np.testing.assert_allclose(refits[:], np.stack([expected, expected], axis=1), rtol=1e-12)
    norms = [np.linalg.norm(softmax.oracle.without(group).gradient(at)) for group in groups]
    np.testing.assert_allclose(refits.gradient_norm, norms, rtol=1e-12)
    # Without a tolerance, gradient norms are reported but no refit counts as converged.
    assert not refits.converged.any()
    np.testing.assert_array_equal(softmax.theta, before)


def test_the_method_is_that_of_the_net(softmax, monkeypatch):
    for name, p in (("_newton_block", softmax), ("_fit_block", through_keras(softmax))):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                rows_out(p, [1])


# --- the model is left unchanged -------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_all_weights_are_put_back(fails):
    norm = keras.layers.BatchNormalization(dtype="float64")
    model = keras.Sequential(
        [keras.Input((3,), dtype="float64"), norm, keras.layers.Dense(1, dtype="float64")]
    )
    norm.moving_mean.assign([1.0, 2.0, 3.0])
    model.compile("adam", loss="mse")
    net = GenericNeuralNet(model)
    rng = np.random.default_rng(0)
    train = Examples(rng.standard_normal((6, 3)), rng.standard_normal(6))
    before = model.get_weights()
    compiled = (model.optimizer, model.loss, model.optimizer.iterations.numpy())

    def fit(net, examples):
        for weight in net.model.weights:
            weight.assign(weight + 1)
        if fails:
            raise FloatingPointError("the user's fit failed")

    if fails:
        with pytest.raises(FloatingPointError, match="the user's fit failed"):
            leave_one_out(net, train, train, [0], RefitOptions(fit=fit))
    else:
        change = leave_one_out(net, train, train, [0], RefitOptions(fit=fit))
        assert np.abs(change[:]).max() > 0.1
    for after, weight in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(after, weight)
    assert compiled == (model.optimizer, model.loss, model.optimizer.iterations.numpy())


def test_newton_never_moves_the_model(softmax, monkeypatch):
    variables = softmax.net.model.variables
    before = [v.numpy() for v in variables]
    with monkeypatch.context() as patch:
        patch.setattr(type(softmax.net), "theta", property(lambda net: net._theta_now))
        softmax.net._theta_now = np.concatenate([v.ravel() for v in before])
        rows_out(softmax)  # the patched `theta` has no setter, so moving the net would fail
    for after, weight in zip(variables, before, strict=True):
        np.testing.assert_array_equal(after.numpy(), weight)


# --- warnings for refits that did not converge -----------------------------------------------


def test_refits_that_miss_the_tolerance_are_marked(softmax):
    with pytest.warns(ConvergenceWarning) as caught:
        refits = rows_out(softmax, tolerance=1e-12, max_passes=1)
    assert [w.filename for w in caught] == [__file__]
    worst = refits.gradient_norm.max()
    assert str(caught[0].message).startswith(
        f"5 of 5 refits ended above a gradient norm of 1.0e-12 (worst {worst:.1e}): allow more"
    )
    assert not refits.converged.any() and (refits.gradient_norm > 1e-12).all()
    assert (refits.passes == 1).all()


def test_a_net_that_is_not_at_its_minimum_is_refused():
    p = logistic("sigmoid")
    p.net.theta = p.theta + 1e-6
    norm = np.linalg.norm(p.oracle.gradient(p.theta))
    with pytest.raises(
        ValueError,
        match=f"^net must be at the minimum of its risk, got a gradient norm of {norm:.1e}, above "
        "the tolerance 1.0e-08; call net.fit",
    ):
        rows_out(p, [0])


def test_newton_is_for_convex_nets():
    net, examples = tanh_net()
    with pytest.raises(ValueError, match="^method must be 'fit' for GenericNeuralNet, which is"):
        leave_one_out(net, examples, examples, [0], RefitOptions(method="newton"))


@pytest.mark.parametrize("make", [ridge, lambda: through_keras(logistic("softmax"))])
def test_own_fits_reach_eight_digits_of_each_change_by_default(make):
    p, rows = make(), np.arange(8)
    refits = leave_one_out(p.net, p.train, p.test, rows)
    expected = changes(p, rows[:, None])
    errors = np.abs(refits[:] - expected).max(axis=0)
    assert refits.converged.all()
    assert (errors < 1e-8 * np.abs(expected).max(axis=0)).all()
