import os
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import scipy.sparse
import tensorflow as tf

from influence import (
    CG,
    ConvergenceWarning,
    Direct,
    Examples,
    GenericNeuralNet,
    Hessian,
    Influence,
    Refits,
    leave_one_out,
    prepare,
)
from influence.truth import leave_out as module
from influence.truth import runs
from tests.influence.problems import logistic, relative_error, ridge, tanh_net, through_keras

ROOT = Path(__file__).resolve().parents[3]
ROWS = [11, 3, 40, 0, 29]


@pytest.fixture(scope="module")
def softmax():
    return logistic("softmax", intercept=True)


@pytest.fixture(scope="module")
def actual(softmax):
    """(m, k) by the oracle: minimised from scratch to 1e-12."""
    return softmax.oracle.actual_changes(softmax.theta, softmax.measured, ROWS)


@pytest.fixture(scope="module")
def taped_ridge():
    """A linear model by the tape, its bias outside the penalty; convex, as its owner knows."""
    problem = ridge()
    problem.net.convex = True
    return problem


# --- the numbers -----------------------------------------------------------------------------


def test_newton_is_the_independent_refit(softmax, actual):
    refits = leave_one_out(softmax.net, softmax.train, softmax.test, ROWS, tolerance=1e-12)
    # |theta - minimum| <= 1e-12 / 0.05; the changes themselves are about 1e-3.
    assert relative_error(refits.change_if_removed, actual) < 1e-8
    assert isinstance(refits, Refits) and refits.rows.tolist() == ROWS
    assert refits.shape == (7, 5) and refits.converged.all()
    assert (refits.passes >= 2).all() and (refits.passes <= 12).all()


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("weight_decay", [1e-3, 1.0])
def test_newton_at_weak_and_strong_penalties(kind, weight_decay):
    p = logistic(kind, weight_decay=weight_decay)
    refits = leave_one_out(p.net, p.train, p.test, ROWS, tolerance=1e-12)
    expected = p.oracle.actual_changes(p.theta, p.measured, ROWS)
    assert relative_error(refits[:], expected) < 1e-7


def test_the_default_tolerance_is_enough_for_changes(softmax, actual):
    refits = leave_one_out(softmax.net, softmax.train, softmax.test, ROWS)
    assert (refits.gradient_norm <= 1e-8).all()
    assert np.abs(refits[:] - actual).max() < 1e-6 and np.abs(actual).max() > 1e-3


def test_newton_by_the_tape_is_the_closed_form_of_ridge(taped_ridge):
    p, rows = taped_ridge, [11, 3, 39, 0]
    expected = p.oracle.actual_changes(p.theta, p.measured, rows)
    refits = leave_one_out(p.net, p.train, p.test, rows, tolerance=1e-11)
    assert relative_error(refits[:], expected) < 1e-8


def test_newton_by_the_tape_is_newton_in_closed_form(softmax):
    taped = through_keras(softmax)
    taped.net.convex = True
    by_tape = leave_one_out(taped.net, taped.train, taped.test, ROWS[:2])
    closed = leave_one_out(softmax.net, softmax.train, softmax.test, ROWS[:2])
    assert relative_error(by_tape[:], closed[:]) < 1e-8
    np.testing.assert_array_equal(by_tape.passes, closed.passes)


def test_newton_takes_dicts(taped_ridge):
    a, b = (keras.Input((2,), name=name, dtype="float64") for name in "ab")
    both = keras.layers.Concatenate(dtype="float64")([a, b])
    l2 = keras.regularizers.L2(0.1)
    output = keras.layers.Dense(1, kernel_regularizer=l2, dtype="float64")(both)
    net = GenericNeuralNet(keras.Model([a, b], output), "mse")
    net.convex, net.theta = True, taped_ridge.theta
    cut = lambda e: Examples({"a": e.x[:, :2], "b": e.x[:, 2:]}, e.y)  # noqa: E731
    got = leave_one_out(net, cut(taped_ridge.train), cut(taped_ridge.test), ROWS[:2])
    expected = leave_one_out(taped_ridge.net, taped_ridge.train, taped_ridge.test, ROWS[:2])
    assert relative_error(got[:], expected[:]) < 1e-9


def test_a_row_of_great_leverage_is_refitted_too():
    """Its removal changes the Hessian most, where the full-data factor is worst."""
    p = logistic("sigmoid", num_rows=40)
    x = p.train.x.copy()
    x[5] *= 30
    oracle = replace(p.oracle, features=x)
    p.net.theta = oracle.minimum(p.theta)
    refits = leave_one_out(p.net, Examples(x, p.train.y), p.test, [5, 6], tolerance=1e-11)
    expected = oracle.actual_changes(p.theta, p.measured, [5, 6])
    assert refits.converged.all() and relative_error(refits[:], expected) < 1e-7


def test_refits_far_from_the_full_datas_curvature_arrive():
    """Beside an outlier's, the full-data curvature is far too small for the other rows' steps."""
    p = logistic("sigmoid", num_rows=10, weight_decay=1e-3)
    x = p.train.x.copy()
    x[5] *= 100
    oracle = replace(p.oracle, features=x)
    p.net.theta = oracle.minimum(p.theta)
    refits = leave_one_out(p.net, Examples(x, p.train.y), p.test, [6], max_passes=200)
    assert refits.converged.all() and refits.passes[0] < 60
    expected = oracle.actual_changes(p.theta, p.measured, [6])
    # 1e-8 over the smallest eigenvalue, at least 1e-3, times gradients of size 1.
    assert np.abs(refits[:] - expected).max() < 1e-4 and np.abs(expected).max() > 0.1


def test_the_gradient_norm_is_true(softmax, monkeypatch):
    """Recomputed by the oracle at the parameters that the test losses were taken at."""
    taken = []
    losses = softmax.net.losses

    def spy(x, y, thetas=None):
        if thetas is not None:
            taken.append(thetas.copy())
        return losses(x, y, thetas)

    monkeypatch.setattr(softmax.net, "losses", spy)
    for tolerance in (1e-4, 1e-9):
        refits = leave_one_out(softmax.net, softmax.train, softmax.test, ROWS, tolerance=tolerance)
        thetas = taken.pop()[:, 1:]  # beside the net's own
        true = [
            np.linalg.norm(softmax.oracle.without([row]).gradient(theta))
            for row, theta in zip(ROWS, thetas.T, strict=True)
        ]
        assert (refits.gradient_norm <= tolerance).all() and refits.converged.all()
        # Gradients are differences of numbers near 1, so right to about 1e-16.
        np.testing.assert_allclose(refits.gradient_norm, true, rtol=1e-4, atol=1e-15)


def test_predictions_have_the_sign_and_scale_of_refits(softmax):
    rows = np.arange(60)
    predicted = Influence(softmax.net, softmax.train, solver=Direct()).scores(softmax.test)
    refits = leave_one_out(softmax.net, softmax.train, softmax.test, rows)
    slope = np.sum(predicted[:] * refits[:]) / np.sum(predicted[:] ** 2)
    assert 1 < slope < 1.3  # first order leaves out the row's leverage, 18/60 on average at most


# --- what must not matter --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"block": 1}, {"block": 2}, {"batch_size": 1},
                                     {"batch_size": 7}, {"batch_size": 64}])  # fmt: skip
def test_blocks_and_batches_change_nothing(options, softmax):
    expected = leave_one_out(softmax.net, softmax.train, softmax.test, ROWS, tolerance=1e-12)
    got = leave_one_out(softmax.net, softmax.train, softmax.test, ROWS, tolerance=1e-12, **options)
    # The changes are 1e-3, and both ends are within 1e-12 / 0.05 of the minimum.
    assert np.abs(got[:] - expected[:]).max() < 1e-10
    np.testing.assert_array_equal(got.rows, expected.rows)


def test_row_order_permutes_the_refits(softmax):
    order = np.random.default_rng(0).permutation(60)
    expected = leave_one_out(softmax.net, softmax.train, softmax.test, order[ROWS], tolerance=1e-12)
    got = leave_one_out(softmax.net, softmax.train.take(order), softmax.test, ROWS, tolerance=1e-12)
    assert np.abs(got[:] - expected[:]).max() < 1e-10


def test_sparse_rows_change_nothing(softmax, actual):
    train = Examples(scipy.sparse.csr_matrix(softmax.train.x), softmax.train.y)
    test = Examples(scipy.sparse.csr_matrix(softmax.test.x), softmax.test.y)
    refits = leave_one_out(softmax.net, train, test, ROWS, tolerance=1e-12)
    assert relative_error(refits[:], actual) < 1e-8


@pytest.mark.parametrize("solver", [CG(rtol=1e-10), CG(rtol=1e-3)])
def test_any_solver_reaches_the_same_refits(solver, softmax, actual):
    refits = leave_one_out(
        softmax.net, softmax.train, softmax.test, ROWS, solver=solver, tolerance=1e-12
    )
    assert refits.converged.all() and relative_error(refits[:], actual) < 1e-8


def test_what_is_prepared_is_not_prepared_again(softmax, actual, monkeypatch):
    prepared = prepare(Hessian(softmax.net, softmax.train), Direct())
    monkeypatch.setattr(Direct, "prepare", lambda *_: pytest.fail("prepared again"))
    refits = leave_one_out(
        softmax.net, softmax.train, softmax.test, ROWS, solver=prepared, tolerance=1e-12
    )
    assert relative_error(refits[:], actual) < 1e-8


# --- by the net's own fit --------------------------------------------------------------------


def test_fit_warm_and_cold_are_newton(softmax, actual):
    zero = np.zeros(softmax.net.num_parameters)
    for start in (None, zero):
        refits = leave_one_out(
            softmax.net, softmax.train, softmax.test, ROWS, method="fit", start=start,
            tolerance=1e-9,
        )  # fmt: skip
        # LinearModel.fit goes to 1e-10; over the smallest eigenvalue, 0.05, that is 2e-9 of theta.
        assert refits.converged.all() and (refits.passes == 1).all()
        assert np.abs(refits[:] - actual).max() < 1e-8
        assert (0 < refits.gradient_norm).all() and (refits.gradient_norm <= 1e-10).all()


def test_fit_of_a_generic_net(taped_ridge):
    p = taped_ridge
    expected = p.oracle.actual_changes(p.theta, p.measured, ROWS[:2])

    def fit(net, examples):
        net.fit(examples, gradient_tolerance=1e-7)

    refits = leave_one_out(p.net, p.train, p.test, ROWS[:2], method="fit", fit=fit, tolerance=1e-7)
    assert refits.converged.all() and np.abs(refits[:] - expected).max() < 1e-6


def test_the_own_fit_goes_to_the_tolerance_and_is_warned_of_once(taped_ridge):
    p = taped_ridge
    expected = p.oracle.actual_changes(p.theta, p.measured, ROWS[:2])
    got = leave_one_out(p.net, p.train, p.test, ROWS[:2], method="fit", tolerance=1e-7)
    assert got.converged.all() and np.abs(got[:] - expected).max() < 1e-6
    with pytest.warns(ConvergenceWarning) as caught:
        got = leave_one_out(p.net, p.train, p.test, ROWS[:2], method="fit", tolerance=1e-30)
    assert not got.converged.any() and len(caught) == 1
    assert str(caught[0].message).startswith(
        "2 of 2 refits ended above a gradient norm of 1.0e-30"
    ) and str(caught[0].message).endswith("): use float64, or a larger tolerance.")


def test_training_on_from_no_minimum_is_told_from_removal():
    net, examples = tanh_net(l2=0.05)
    with pytest.warns(ConvergenceWarning, match="^net is at a gradient norm of .* go on with the"):
        away = leave_one_out(net, examples, examples, [0, 6])
    net.fit(examples)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        there = leave_one_out(net, examples, examples, [0, 6])
    # What was warned of: one and the same drift in every column, larger than what tells them apart.
    assert np.abs(away[:].mean(axis=1)).max() > 2 * np.abs(there[:]).max()


def test_fit_is_called_on_the_remaining_rows_from_the_start(softmax):
    seen, start = [], np.arange(float(softmax.net.num_parameters))

    def fit(net, examples):
        seen.append((net.theta, examples))
        net.theta = np.full_like(start, 0.25)

    before = softmax.theta
    refits = leave_one_out(
        softmax.net, softmax.train, softmax.test, [7, 2], method="fit", fit=fit, start=start
    )
    for (theta, examples), row in zip(seen, [7, 2], strict=True):
        np.testing.assert_array_equal(theta, start)
        np.testing.assert_array_equal(examples.x, np.delete(softmax.train.x, row, axis=0))
        np.testing.assert_array_equal(examples.y, np.delete(softmax.train.y, row))
    at = np.full_like(start, 0.25)
    expected = softmax.measured.losses(at) - softmax.measured.losses(before)
    np.testing.assert_allclose(refits[:], np.stack([expected, expected], axis=1), rtol=1e-12)
    norms = [np.linalg.norm(softmax.oracle.without([row]).gradient(at)) for row in (7, 2)]
    np.testing.assert_allclose(refits.gradient_norm, norms, rtol=1e-12)
    assert not refits.converged.any()  # no tolerance: reported, not judged, and nobody is warned
    np.testing.assert_array_equal(softmax.theta, before)


def test_the_method_is_that_of_the_net(softmax, monkeypatch):
    for name, net in (("_newton_block", softmax.net), ("_fit_block", through_keras(softmax).net)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                leave_one_out(net, softmax.train, softmax.test, [1])


# --- the model is left as it was -------------------------------------------------------------


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
            leave_one_out(net, train, train, [0], fit=fit)
    else:
        change = leave_one_out(net, train, train, [0], fit=fit)
        assert np.abs(change[:]).max() > 0.1
    for after, weight in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(after, weight)
    assert compiled == (model.optimizer, model.loss, model.optimizer.iterations.numpy())


def dropping():
    """(net, examples): a model that draws as it trains."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dropout(0.5), keras.layers.Dense(1)]
    rng = np.random.default_rng(0)
    net = GenericNeuralNet(keras.Sequential([keras.Input((6,)), *layers]), "mse")
    examples = Examples(rng.standard_normal((5, 6)), rng.standard_normal(5))
    return net, examples


def draws(net, examples):
    """A step whose length is drawn."""
    net.theta = net.theta + float(tf.reduce_sum(net.model(np.ones((4, 6)), training=True)))


def test_what_a_fit_draws_depends_on_no_other_refit(tmp_path):
    net, train = dropping()
    state = [variable.numpy() for variable in net.model.variables]
    options = {"method": "fit", "fit": draws, "key": "draws"}
    expected = leave_one_out(net, train, train, [0, 1, 2], **options)
    for after, before in zip(net.model.variables, state, strict=True):
        np.testing.assert_array_equal(after.numpy(), before)
    backwards = leave_one_out(net, train, train, [2, 1, 0], **options)
    np.testing.assert_array_equal(backwards[:], expected[:, ::-1])
    leave_one_out(net, train, train, [1], checkpoints=tmp_path, **options)  # and then interrupted
    continued = leave_one_out(net, train, train, [0, 1, 2], checkpoints=tmp_path, **options)
    same(continued, expected)
    net.model(np.ones((4, 6)), training=True)  # what is drawn from here on is something else
    other = leave_one_out(net, train, train, [0, 1, 2], checkpoints=tmp_path, **options)
    assert np.abs(other[:] - expected[:]).min() > 1e-3


def test_newton_never_moves_the_model(softmax, monkeypatch):
    model = softmax.net.model
    before = [v.numpy() for v in model.variables]
    with monkeypatch.context() as patch:
        patch.setattr(type(softmax.net), "theta", property(lambda net: net._theta_now))
        softmax.net._theta_now = np.concatenate([v.ravel() for v in before])
        leave_one_out(softmax.net, softmax.train, softmax.test, ROWS)  # setting theta would fail
    for after, weight in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(after.numpy(), weight)


# --- no number is given for a good one that is not -------------------------------------------


def test_refits_that_miss_the_tolerance_are_marked(softmax):
    with pytest.warns(ConvergenceWarning) as caught:
        refits = leave_one_out(
            softmax.net, softmax.train, softmax.test, ROWS, tolerance=1e-12, max_passes=1
        )
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
        leave_one_out(p.net, p.train, p.test, [0])


Y = np.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"net": "net"}, TypeError, "^net must be a GenericNeuralNet, got str"),
        ({"train": (1, 2)}, TypeError, r"^train must be Examples\(x, y\), got tuple"),
        ({"test": (1, 2)}, TypeError, r"^test must be Examples\(x, y\), got tuple"),
        ({"train": Examples(np.ones((4, 2)), Y)}, ValueError, r"^train\.x must have rows of shape"),
        ({"test": Examples(np.ones((4, 5)), Y + 3)}, ValueError, r"^test\.y must hold class numb"),
        ({"train": Examples(np.ones((1, 5)), Y[:1]), "rows": [0]}, ValueError,
         "^train must have at least 2 rows"),
        ({"rows": [60]}, IndexError, r"^rows must lie in \[0, 60\), got 60"),
        ({"rows": [2, 2]}, ValueError, "^rows must name each row once, got 2 twice"),
        ({"rows": []}, ValueError, "^rows must be a one-dimensional, non-empty list"),
        ({"rows": np.ones(60, bool)}, TypeError, "^rows must be integers, got dtype bool"),
        ({"method": "sgd"}, ValueError, "^method must be 'newton' or 'fit', got 'sgd'"),
        ({"tolerance": 0.0}, ValueError, r"^tolerance must be positive, got 0\.0"),
        ({"tolerance": np.nan}, ValueError, "^tolerance must be positive, got nan"),
        ({"start": np.zeros(3)}, ValueError, r"^start must have shape \(18,\), got \(3,\)"),
        ({"start": np.full(18, np.nan)}, ValueError, "^start must be finite"),
        ({"block": 0}, ValueError, "^block must be at least 1, got 0"),
        ({"max_passes": 0}, ValueError, "^max_passes must be at least 1, got 0"),
        ({"batch_size": 0}, ValueError, "^batch_size must be a positive integer or None, got 0"),
        ({"method": "fit", "batch_size": 0}, ValueError, "^batch_size must be a positive integer"),
        ({"num_processes": 0}, ValueError, "^num_processes must not be 0"),
        ({"solver": "cg"}, TypeError, r"^solver must be a solver such as CG\(\)"),
        ({"fit": print, "method": "fit", "checkpoints": "folder"}, ValueError,
         "^key must say what `fit` does when both fit and checkpoints are given"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_any_work(arguments, error, message, softmax, monkeypatch):
    monkeypatch.setattr(Direct, "prepare", lambda *_: pytest.fail("the work had begun"))
    monkeypatch.setattr(runs, "run", lambda *_: pytest.fail("the work had begun"))
    given = {"net": softmax.net, "train": softmax.train, "test": softmax.test, "rows": [0]}
    with pytest.raises(error, match=message):
        leave_one_out(**{**given, **arguments})


def test_newton_is_for_convex_nets():
    net, examples = tanh_net()
    with pytest.raises(ValueError, match="^method must be 'fit' for GenericNeuralNet, which is"):
        leave_one_out(net, examples, examples, [0], method="newton")


# --- kept on disk ----------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import numpy as np
from influence import leave_one_out
from influence.truth import leave_out
from tests.influence.truth.test_leave_out import interrupted_problem

refit, done = leave_out._newton_block, []

def dying(*arguments):
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(1)
    return refit(*arguments)

leave_out._newton_block = dying
p, options = interrupted_problem("newton")
leave_one_out(p.net, p.train, p.test, np.arange(9), checkpoints=sys.argv[1], **options)
"""


def interrupted_problem(method):
    p = logistic("softmax", num_rows=30, num_inputs=3)
    keras.layers.Dense(1)  # Keras numbers its layers: that must be no part of what is kept
    options = {"method": method, "block": 2}
    return p, options


def counting(monkeypatch, name):
    calls, refit = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: calls.append(given[1]) or refit(*given))
    return calls


def same(got, expected):
    for name in ("change_if_removed", "rows", "gradient_norm", "passes", "converged"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


def test_a_killed_run_continues_and_ends_bit_for_bit(tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(folder)]
    killed = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(list(folder.iterdir())) == 3
    continues_bit_for_bit("newton", folder, 5 - 3, monkeypatch)


def test_an_interrupted_run_of_fits_continues_and_ends_bit_for_bit(tmp_path, monkeypatch):
    p, options = interrupted_problem("fit")
    refit, done = module._fit_block, []

    def interrupted(*arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return refit(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_fit_block", interrupted)
        leave_one_out(p.net, p.train, p.test, np.arange(9), checkpoints=tmp_path, **options)
    assert len(list(tmp_path.iterdir())) == 3
    continues_bit_for_bit("fit", tmp_path, 9 - 3, monkeypatch)


def continues_bit_for_bit(method, folder, num_left, monkeypatch):
    p, options = interrupted_problem(method)
    calls = counting(monkeypatch, f"_{method}_block")
    uninterrupted = leave_one_out(p.net, p.train, p.test, np.arange(9), **options)
    for expected in (num_left, 0):  # what was kept is not done again
        calls.clear()
        continued = leave_one_out(
            p.net, p.train, p.test, np.arange(9), checkpoints=folder, **options
        )
        assert len(calls) == expected
        same(continued, uninterrupted)


def test_what_was_kept_for_something_else_is_not_taken(tmp_path, monkeypatch):
    calls = counting(monkeypatch, "_fit_block")
    p = logistic("softmax", num_rows=30, num_inputs=3)
    x, y = p.train.x, p.train.y

    def fit(net, examples):
        net.theta = net.theta + 1

    def run(net=p.net, train=p.train, test=p.test, key="plus one", **options):
        calls.clear()
        leave_one_out(
            net, train, test, [0], method="fit", fit=fit, key=key, checkpoints=tmp_path, **options
        )
        return len(calls)

    assert run() == 1
    assert run() == 0
    moved = x.copy()
    moved[25, 0] += 1e-9
    relabelled = y.copy()
    relabelled[25] = (relabelled[25] + 1) % 3
    assert run(train=Examples(moved, y)) == 1
    assert run(train=Examples(x, relabelled)) == 1
    assert run(test=p.test.take([0, 1])) == 1
    assert run(start=np.zeros(9)) == 1
    assert run(key="plus two") == 1
    assert run(batch_size=7) == 1
    weaker = logistic("softmax", num_rows=30, num_inputs=3, weight_decay=0.02)
    weaker.net.theta = p.theta
    assert run(net=weaker.net) == 1
    assert run(net=through_keras(p).net) == 1
    theta = p.theta
    p.net.theta = theta + 1e-12
    assert run() == 1
    p.net.theta = theta
    assert run() == 0


def test_frozen_weights_and_losses_are_part_of_what_is_kept(tmp_path, monkeypatch):
    calls = counting(monkeypatch, "_fit_block")
    model = keras.Sequential(
        [keras.Input((2,), dtype="float64"), keras.layers.Dense(2, dtype="float64"),
         keras.layers.Dense(1, dtype="float64")]
    )  # fmt: skip
    model.layers[0].trainable = False
    examples = Examples(np.random.default_rng(0).standard_normal((5, 2)), np.arange(5.0))

    def run(loss, delta=None):
        calls.clear()
        net = GenericNeuralNet(model, loss)
        options = {"fit": lambda *_: None, "key": "none"}
        leave_one_out(net, examples, examples, [0], checkpoints=tmp_path, **options)
        return len(calls)

    assert run(keras.losses.Huber(delta=0.5)) == 1
    assert run(keras.losses.Huber(delta=0.5)) == 0
    assert run(keras.losses.Huber(delta=0.7)) == 1  # of the same name
    model.layers[0].bias.assign([0.5, 0.5])
    assert run(keras.losses.Huber(delta=0.5)) == 1
