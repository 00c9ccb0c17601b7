import numpy as np
import pytest
import scipy.optimize

from influence import (
    CG,
    ConvergenceWarning,
    Direct,
    DivergenceError,
    Examples,
    GaussNewton,
    Hessian,
    Influence,
    ProximalOptions,
    leave_one_out,
    prepare,
    proximal_response,
)
from influence.truth import proximal, runs
from influence.truth.removal import Removal
from influence.truth.runs import Task
from tests.influence.problems import logistic, relative_error, ridge, tanh_net, untraced

CURVATURE = {"bregman": GaussNewton, "leave_one_out": Hessian}
# The damping for each objective. At theta of the fixture `tanh`, the smallest eigenvalue of the
# Hessian is -1.6, and that of the Gauss-Newton matrix is 0.
DAMPING = {"bregman": 0.5, "leave_one_out": 2.0}
ROWS = [0, 6, 13]
OBJECTIVES = sorted(CURVATURE)
# These are the net and the examples of the fixture `tanh` below, but in float32.
SINGLE = tanh_net(l2=0.05, dtype="float32")
OTHER = tanh_net(l2=0.05, dtype="float32")
OTHER[0].theta = OTHER[0].theta + 1


@pytest.fixture(scope="module")
def tanh():
    """Return (net, examples), a network with a penalty, far from a minimum."""
    return tanh_net(l2=0.05)


@pytest.fixture(scope="module")
def linear():
    return ridge()


def of_tanh(theta, examples):
    """Return the network's outputs (n,) and its penalty, computed in NumPy."""
    W, b, v, c = np.split(theta, [12, 16, 20])
    hidden = np.tanh(examples.x @ W.reshape(3, 4) + b)
    return hidden @ v + c, 0.05 * v @ v


def objective_of(kind, net, examples, row, damping, fraction=1.0):
    """Return the objective F_i for the removed `row`, as a function of theta, by its definition."""
    y, theta_s = examples.y, net.theta
    s, penalty_s = of_tanh(theta_s, examples)
    eye = np.eye(len(theta_s)) * 1e-5

    def risk(theta):
        f, penalty = of_tanh(theta, examples)
        return np.mean((f - y) ** 2) + penalty

    slope = np.array([(risk(theta_s + e) - risk(theta_s - e)) / 2e-5 for e in eye])

    def value(theta):
        f, penalty = of_tanh(theta, examples)
        away = theta - theta_s
        if kind == "bregman":
            v, v_s = theta[16:20], theta_s[16:20]
            D = np.mean((f - y) ** 2 - (s - y) ** 2 - 2 * (s - y) * (f - s))
            D += penalty - penalty_s - 0.1 * v_s @ (v - v_s)
        else:
            D = risk(theta) - risk(theta_s) - slope @ away
        own = (f[row] - y[row]) ** 2 + penalty
        return D - fraction * own / len(y) + damping / 2 * away @ away

    return value


def respond(tanh, objective, rows=ROWS, *, test=None, damping=None, fraction=1.0, **options):
    (net, examples), options = tanh, ProximalOptions(**options)
    given = {"damping": damping or DAMPING[objective], "fraction": fraction}
    return proximal_response(
        net, examples, test or examples, rows, options, objective=objective, **given
    )


@pytest.fixture
def no_work(monkeypatch):
    monkeypatch.setattr(Direct, "prepare", lambda *_: pytest.fail("the work had begun"))
    monkeypatch.setattr(runs, "run", lambda *_: pytest.fail("the work had begun"))


def thetas_of(monkeypatch):
    """Return a list that collects the parameters for which test losses are computed."""
    taken, asked = [], Task.changes
    monkeypatch.setattr(Task, "changes", lambda self, t: taken.append(t) or asked(self, t))
    return taken


# --- the minimisers --------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_is_the_minimum_of_the_objective_as_defined(objective, fraction, tanh, monkeypatch):
    net, examples = tanh
    taken = thetas_of(monkeypatch)
    got = respond(tanh, objective, fraction=fraction, tolerance=1e-9)
    assert got.fraction == fraction
    assert got.converged.all() and got.objective == objective and got.shape == (20, 3)
    for j, row in enumerate(ROWS):
        value = objective_of(objective, net, examples, row, DAMPING[objective], fraction)
        found = scipy.optimize.minimize(value, net.theta, options={"gtol": 1e-7}).x
        theta = taken[0][:, j]
        # SciPy sees only values of F_i, which have rounding errors of about 1e-16. They determine
        # the minimum only to about 1e-7.
        assert (
            np.abs(found - theta).max() < 1e-5 and np.abs(theta - net.theta).max() > 1e-3 * fraction
        )
        assert value(theta) <= value(found) + 1e-12
        change = (of_tanh(theta, examples)[0] - examples.y) ** 2
        change -= (of_tanh(net.theta, examples)[0] - examples.y) ** 2
        np.testing.assert_allclose(got[:, j], change, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_certificate_is_true(objective, tanh, monkeypatch):
    """Compare the reported gradient norms with differences of F_i.

    The differences are at the theta for which the losses are reported. A norm is relative to that
    at the start.
    """
    net, examples = tanh
    taken = thetas_of(monkeypatch)
    with pytest.warns(ConvergenceWarning):
        got = respond(tanh, objective, tolerance=1e-9, max_iterations=2)
    assert (got.iterations == 2).all() and not got.converged.all()
    for j, row in enumerate(ROWS):
        value = objective_of(objective, net, examples, row, DAMPING[objective])
        eye = np.eye(len(net.theta)) * 1e-4
        slopes = [
            [(value(t + e) - value(t - e)) / 2e-4 for e in eye] for t in (taken[0][:, j], net.theta)
        ]
        there, first = np.linalg.norm(slopes, axis=1)
        assert abs(got.gradient_norm[j] - there / first) < 1e-5
        assert got.gradient_norm[j] > 1e-5


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model", ["softmax", "ridge"])
def test_at_a_minimum_without_damping_it_is_the_exact_refit(objective, model, linear):
    """Check models linear in theta at a minimum, without damping.

    Both objectives are then the risk without the row, so the response is the exact refit.
    """
    p = logistic("softmax", 40) if model == "softmax" else linear
    rows = [3, 11, 0]
    options = ProximalOptions(tolerance=1e-9)
    got = proximal_response(p.net, p.train, p.test, rows, options, objective=objective, damping=0.0)
    exact = p.oracle.actual_changes(p.theta, p.measured, rows)
    assert relative_error(got[:], exact) < 1e-7
    if model == "softmax":
        assert relative_error(got[:], leave_one_out(p.net, p.train, p.test, rows)[:]) < 1e-5


def first_order(net, train, objective):
    how = {"damping": DAMPING[objective], "curvature": CURVATURE[objective]}
    return Influence(net, train, solver=Direct(), approximation="first_order", **how)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_its_linearisation_is_damped_influence(objective, tanh):
    """Copy all rows 100 and 1,000 times, and remove a single copy.

    The weight of a row falls tenfold. So must the relative error of damped influence, which is the
    linearisation of the response.
    """
    net, examples = tanh
    errors = []
    for copies in (100, 1000):
        many = Examples(np.tile(examples.x, (copies, 1)), np.tile(examples.y, copies))
        got = respond((net, many), objective, test=examples, tolerance=1e-7)
        predicted = first_order(net, many, objective).scores(examples, ROWS)
        slope = np.sum(got[:] * predicted[:]) / np.sum(predicted[:] ** 2)
        assert abs(slope - 1) < 0.2 / copies
        errors.append(relative_error(got[:], predicted[:]))
    assert errors[0] < 0.01
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_influence_is_the_derivative_by_the_fraction(objective, tanh):
    net, examples = tanh
    predicted = first_order(net, examples, objective).scores(examples, ROWS)[:]
    errors = [
        relative_error(
            respond(tanh, objective, fraction=fraction, tolerance=1e-8)[:] / fraction, predicted
        )
        for fraction in (1.0, 0.1, 0.01)
    ]
    assert errors[0] > 0.1
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.2)


def test_a_row_without_gradient_stays():
    # The net has no penalty, so a row that is fitted exactly has the gradient 0.
    net, examples = tanh_net()
    theta, y = net.theta, examples.y.copy()
    # Set the last layer to zero. The output is then 0 for every input, which is the label of row 4.
    theta[16:] = y[4] = 0
    net.theta, fitted = theta, Examples(examples.x, y)
    got = proximal_response(net, fitted, fitted, [4, 5], damping=0.5)
    np.testing.assert_array_equal(got[:, 0], 0)
    assert got.gradient_norm[0] == 0 and got.iterations[0] == 0 and got.converged.all()
    assert np.abs(got[:, 1]).max() > 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_default_tolerance_is_enough_for_changes_and_quick(objective, tanh):
    rows = np.arange(20)
    exact = respond(tanh, objective, rows, tolerance=1e-10)
    got = respond(tanh, objective, rows)
    assert relative_error(got[:], exact[:]) < 1e-3
    assert (got.gradient_norm <= 1e-4).all() and (got.iterations <= 8).all()


# --- changes that must not matter ------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_blocks_batches_and_order_change_nothing(objective, tanh):
    net, examples = tanh
    expected = respond(tanh, objective, tolerance=1e-10)
    for options in ({"block": 1}, {"batch_size": 1}, {"block": 2, "batch_size": 7}):
        got = respond(tanh, objective, tolerance=1e-10, **options)
        assert np.abs(got[:] - expected[:]).max() < 1e-9 * np.abs(expected[:]).max()
    order = np.random.default_rng(0).permutation(20)
    shuffled = net, examples.take(order)
    rows = np.argsort(order)[ROWS]
    got = respond(shuffled, objective, rows, test=examples, tolerance=1e-10)
    assert np.abs(got[:] - expected[:]).max() < 1e-9 * np.abs(expected[:]).max()
    np.testing.assert_array_equal(got.rows, rows)


def test_any_solver_finds_the_same_minimum_and_what_is_prepared_is_used(tanh, monkeypatch):
    net, examples = tanh
    expected = respond(tanh, "bregman", tolerance=1e-9)
    by_cg = respond(tanh, "bregman", tolerance=1e-9, solver=CG(rtol=1e-5))
    assert relative_error(by_cg[:], expected[:]) < 1e-7
    prepared = prepare(GaussNewton(net, examples, 0.5), Direct())
    monkeypatch.setattr(Direct, "prepare", lambda *_: pytest.fail("prepared again"))
    got = respond(tanh, "bregman", tolerance=1e-9, solver=prepared)
    np.testing.assert_array_equal(got[:], expected[:])
    with pytest.raises(ValueError, match="^solver must be prepared for this matrix"):
        respond(tanh, "leave_one_out", solver=prepared)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_damped_steps_find_the_same_minimum(objective, tanh, monkeypatch):
    taken = thetas_of(monkeypatch)
    expected = respond(tanh, objective, tolerance=1e-9)
    got = respond(tanh, objective, tolerance=1e-9, step_damping=1.0)
    assert (got.iterations > expected.iterations).any() and got.converged.all()
    assert relative_error(got[:], expected[:]) < 1e-7
    assert relative_error(taken[1], taken[0]) < 1e-7
    moved = np.linalg.norm(taken[1] - tanh[0].theta[:, None], axis=0)
    np.testing.assert_allclose(got.distance, moved, rtol=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_rough_gradients_go_most_of_the_way(objective, tanh, monkeypatch):
    exact, given = respond(tanh, objective, tolerance=1e-9), proximal._gradients
    asked = {"float32": 0, "float64": 0}

    def watched(task, net, *more):
        def gradients(thetas, columns):
            asked[net.dtype.name] += len(columns)
            return given(task, net, *more)(thetas, columns)

        return gradients

    monkeypatch.setattr(proximal, "_gradients", watched)
    got = respond(tanh, objective, tolerance=1e-9, rough=SINGLE, rough_tolerance=1e-3)
    assert got.converged.all() and relative_error(got[:], exact[:]) < 1e-7
    assert asked["float32"] > 0 and 0 < asked["float64"] < 0.8 * exact.iterations.sum()
    # Besides its iterations, each row needs one more gradient in float32 and one more in float64,
    # because the search changes from the first to the second.
    assert sum(asked.values()) == got.iterations.sum() + 2 * len(ROWS)
    # Worker processes have their own nets and must find the same result.
    options = {"rough": SINGLE, "rough_tolerance": 1e-3, "num_processes": 2, "block": 2}
    by_workers = respond(tanh, objective, tolerance=1e-9, **options)
    assert relative_error(by_workers[:], got[:]) < 1e-7 and by_workers.converged.all()


def test_float32_is_not_believed(tanh, monkeypatch):
    """Compare two searches by float32 gradients. In the second, they are a billion times too small.

    The second search must take the same step. It must also report the same gradient norm, because
    that is computed in float64.
    """
    taken, given = thetas_of(monkeypatch), proximal._gradients

    def flattered(task, net, *more):
        found = given(task, net, *more)
        return found if net.dtype == "float64" else lambda t, c: found(t, c) * 1e-9

    honest = {"rough": SINGLE, "tolerance": 1e-4, "max_iterations": 1}
    with pytest.warns(ConvergenceWarning):
        expected = respond(tanh, "bregman", **honest)
    monkeypatch.setattr(proximal, "_gradients", flattered)
    with pytest.warns(ConvergenceWarning):
        got = respond(tanh, "bregman", **honest)
    np.testing.assert_array_equal(taken[1], taken[0])
    np.testing.assert_allclose(got.gradient_norm, expected.gradient_norm, rtol=1e-12)
    assert (got.iterations == 1).all() and (got.gradient_norm > 1e-4).all()


def test_the_rows_own_curvature_is_known_but_the_first_step_is_no_longer_for_it(
    linear, monkeypatch
):
    """Check the first step for a row of large leverage, and the number of steps for another row.

    The search knows the curvature that a removed row takes away. The first step is still no longer
    than the step by A, the Hessian of all rows. Without this curvature, row 3 needs more steps.
    """
    p, thetas = linear, []
    x = p.train.x.copy()
    x[5] *= 20
    train, given = Examples(x, p.train.y), proximal._gradients

    def watched(*arguments):
        gradients = given(*arguments)
        return lambda t, columns: thetas.append(t) or gradients(t, columns)

    monkeypatch.setattr(proximal, "_gradients", watched)
    options, goal = ProximalOptions(tolerance=1e-9), {"objective": "leave_one_out", "damping": 0.0}
    got = proximal_response(p.net, train, p.test, [5], options, **goal)
    push = p.net.gradients(x[5:6], train.y[5:6])[0] + p.net.penalty_gradient()
    by_A = np.linalg.norm(prepare(Hessian(p.net, train), Direct()).apply(push[:, None]).x) / 40
    assert np.linalg.norm(thetas[0][:, 0] - p.theta) == pytest.approx(by_A)
    assert got.converged.all() and got.distance[0] > 10 * by_A
    far = len(thetas)
    got = proximal_response(p.net, p.train, p.test, [3], options, **goal)
    assert got.converged.all() and len(thetas) == far + 2 == far + got.iterations[0]
    monkeypatch.setattr(Removal, "pairs", lambda *_: [])
    assert proximal_response(p.net, p.train, p.test, [3], options, **goal).iterations[0] > 2


def test_each_row_has_its_own_tolerance(tanh):
    got = respond(tanh, "bregman", tolerance=[1e-2, 1e-9, 1e-2])
    assert got.converged.all() and (got.gradient_norm[[0, 2]] > 1e-9).all()
    assert got.gradient_norm[1] <= 1e-9


def test_the_model_never_moves(tanh, monkeypatch):
    net, _ = tanh
    before = net.model.get_weights()
    monkeypatch.setattr(
        type(net), "theta", property(type(net).theta.fget, lambda *_: pytest.fail("moved"))
    )
    for objective in OBJECTIVES:
        respond(tanh, objective)
    for weight, was in zip(net.model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, was)


# --- warnings for searches that did not converge ---------------------------------------------


def test_what_misses_the_tolerance_is_marked(tanh):
    with pytest.warns(ConvergenceWarning) as caught:
        got = respond(tanh, "bregman", tolerance=1e-6, max_iterations=1)
    assert [w.filename for w in caught] == [__file__]
    assert str(caught[0].message).startswith(
        f"3 of 3 proximal responses missed their tolerance (the worst by "
        f"{got.gradient_norm.max() * 1e6:.1e} times): allow more max_iterations"
    )
    assert not got.converged.any() and (got.iterations == 1).all()


def test_an_indefinite_matrix_is_refused(tanh):
    with pytest.raises(DivergenceError, match="^the curvature at theta must be positive definite"):
        respond(tanh, "leave_one_out", damping=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"net": "net"}, TypeError, "^net must be a GenericNeuralNet, got str"),
        ({"train": (1, 2)}, TypeError, r"^train must be Examples\(x, y\), got tuple"),
        ({"test": (1, 2)}, TypeError, r"^test must be Examples\(x, y\), got tuple"),
        ({"rows": [20]}, IndexError, r"^rows must lie in \[0, 20\), got 20"),
        ({"rows": [2, 2]}, ValueError, "^rows must name each row once, got 2 twice"),
        ({"objective": "pbrf"}, ValueError, "^objective must be .* 'leave_one_out', got 'pbrf'"),
        ({"damping": -0.1}, ValueError, "^damping must be a number >= 0, got -0.1"),
        ({"damping": None}, ValueError, "^damping must be a number >= 0, got None"),
        ({"fraction": 0.0}, ValueError, r"^fraction must lie in \(0, 1\], got 0\.0"),
        ({"fraction": 1.5}, ValueError, r"^fraction must lie in \(0, 1\], got 1\.5"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, error, message, tanh, no_work):
    net, examples = tanh
    given = {"net": net, "train": examples, "test": examples, "rows": [0], "damping": 0.5}
    with pytest.raises(error, match=message):
        proximal_response(**{**given, **arguments})


FEWER = SINGLE[0], SINGLE[1].take([0, 1])
BACKWARDS = SINGLE[0], SINGLE[1].take(np.arange(20)[::-1])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tolerance", [0.1, 1.0], r"^tolerance must be positive, .* or \(1,\), got"),
        ("tolerance", 0.0, r"^tolerance must be positive, .* got shape \(\) and 0"),
        ("rough_tolerance", 0, "^rough_tolerance must be positive"),
        ("rough", 32, r"^rough must be \(GenericN.*, Examples\) or None, got 32"),
        ("rough", ("net", 1), r"or None, got \('net', 1\)"),
        ("rough", FEWER, "^rough must have 20 rows and 21 parameters, got 2 and 21"),
        ("rough", BACKWARDS, "^rough must have the training set's rows in its order, got other"),
        ("rough", OTHER, "^rough must be at the theta of net"),
        ("step_damping", -1.0, "^step_damping must be finite and at least 0"),
        ("max_iterations", 0, "^max_iterations must be at least 1, got 0"),
        ("solver", "cg", r"^solver must be a solver such as CG\(\)"),
    ],
)
def test_bad_options_are_refused_before_any_work(name, value, message, tanh, no_work):
    with pytest.raises((TypeError, ValueError), match=message):
        respond(tanh, "bregman", [0], **{name: value})


# --- the cache -------------------------------------------------------------------------------


def kept(folder, problem, objective="bregman", **options):
    return respond(problem, objective, [3, 1, 4, 15, 9], block=2, checkpoints=folder, **options)


def test_an_interrupted_run_continues_and_ends_bit_for_bit(tmp_path, monkeypatch, tanh):
    """Interrupt the run by an error. test_runs.py tests kill -9 for the same code."""
    folder, (net, examples) = tmp_path / "kept", tanh_net(l2=0.05)
    again = untraced(net), examples
    calls, found, respond = [], {}, proximal._proximal_block

    def counted(*arguments):
        calls.append(1)
        found[len(arguments[1])] = respond(*arguments)
        return found[len(arguments[1])]

    def known(*arguments):
        calls.append(1)
        return found[len(arguments[1])]

    def dying(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return counted(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(proximal, "_proximal_block", dying)
        kept(folder, tanh)
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(proximal, "_proximal_block", counted)
    expected = kept(None, tanh)
    for left in (1, 0):
        calls.clear()
        got = kept(folder, again)
        assert len(calls) == left
        for name in ("change_if_removed", "gradient_norm", "iterations", "converged"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    monkeypatch.setattr(proximal, "_proximal_block", known)
    others = {
        "damping": 0.6,
        "tolerance": 1e-3,
        "max_iterations": 40,
        "solver": CG(),
        "fraction": 0.5,
        "step_damping": 1.0,
        "rough": SINGLE,
        "objective": "leave_one_out",
        "key": "other",
    }
    finer = {"rough": SINGLE, "rough_tolerance": 0.1}
    for other in (*({name: value} for name, value in others.items()), finer):
        calls.clear()
        kept(folder, tanh, **other)
        assert len(calls) == 3, other  # nothing is taken from the cache, which has other options
