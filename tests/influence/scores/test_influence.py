import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import scipy.stats

from influence import (
    CG,
    ConvergenceWarning,
    Direct,
    DivergenceError,
    Examples,
    GaussNewton,
    Hessian,
    Influence,
    Lanczos,
    LiSSA,
    Scores,
    prepare,
)
from tests.influence.problems import (
    logistic,
    relative_error,
    ridge,
    tanh_net,
    through_keras,
)

ROOT = Path(__file__).resolve().parents[3]
EXACT = {"Direct": Direct(), "CG": CG(rtol=1e-11)}


@pytest.fixture(scope="module")
def problems():
    """By the tape and in closed form; with the intercept outside the penalty and inside."""
    softmax = logistic("softmax", intercept=True)
    return {
        "ridge": ridge(),
        "softmax": softmax,
        "sigmoid": logistic("sigmoid"),
        "softmax by the tape": through_keras(softmax),
    }


PROBLEMS = ["ridge", "softmax", "sigmoid", "softmax by the tape"]


@pytest.fixture(scope="module")
def tanh():
    """(net, train): a network with a penalty, far from a minimum."""
    return tanh_net(l2=0.05)


# --- closed forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("solver", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_scores_are_those_of_the_closed_form(problem, solver, problems):
    p = problems[problem]
    rows = np.arange(len(p.train))
    expected = p.oracle.predicted_changes(p.theta, p.measured, rows)
    scores = Influence(p.net, p.train, solver=solver).scores(p.test)
    # The solver's 1e-11 times the condition of these Hessians, below 100.
    assert relative_error(scores.change_if_removed, expected) < 1e-9
    np.testing.assert_array_equal(scores.rows, rows)
    s_test = np.linalg.solve(p.oracle.hessian(p.theta), p.measured.gradients(p.theta).T)
    assert relative_error(scores.solution.x, s_test) < 1e-9
    assert scores.solution.converged.all() and len(scores.solution.residual) == len(p.test)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_chosen_rows_come_in_the_order_chosen(problem, problems):
    p = problems[problem]
    influence = Influence(p.net, p.train, solver=Direct())
    rows = [30, 2, 17]
    some = influence.scores(p.test, rows)
    assert some.shape == (len(p.test), 3) and some.rows.tolist() == rows
    assert relative_error(some[:], influence.scores(p.test)[:, rows]) < 1e-12
    reverse = np.arange(len(p.train))[::-1]
    backwards = influence.scores(p.test, reverse)
    assert relative_error(backwards[:], influence.scores(p.test)[:, ::-1]) < 1e-12


@pytest.mark.parametrize("problem", PROBLEMS)
def test_parameters_are_those_of_the_closed_form(problem, problems):
    p = problems[problem]
    rows = [30, 2, 17]
    got = Influence(p.net, p.train, solver=Direct()).parameters(rows)
    assert got.shape == (3, p.net.num_parameters)
    assert relative_error(got, p.oracle.predicted_parameters(p.theta, rows)) < 1e-11


@pytest.mark.parametrize("problem", PROBLEMS)
def test_self_influence_is_the_diagonal_of_scores(problem, problems):
    p = problems[problem]
    influence = Influence(p.net, p.train, solver=Direct())
    table = influence.scores(p.train)
    got = influence.self_influence()
    assert relative_error(got, np.diag(table[:])) < 1e-11
    assert relative_error(influence.self_influence([7, 3]), got[[7, 3]]) < 1e-12
    assert (got > 0).mean() > 0.8  # a row helps itself; the penalty's share turns a few small ones


def test_damping_and_gauss_newton_enter_as_said(tanh):
    net, train = tanh
    G = GaussNewton(net, train).dense() + 0.3 * np.eye(net.num_parameters)
    test = Examples(train.x[:3] + 0.1, train.y[:3])
    own = net.gradients(train.x, train.y) + net.penalty_gradient()
    expected = net.gradients(test.x, test.y) @ np.linalg.solve(G, own.T) / len(train)
    influence = Influence(net, train, solver=CG(rtol=1e-11), damping=0.3, curvature=GaussNewton)
    assert relative_error(influence.scores(test)[:], expected) < 1e-8


def test_for_linear_models_gauss_newton_is_the_hessian(problems):
    p = problems["softmax by the tape"]
    by_hessian = Influence(p.net, p.train, damping=0.1, solver=Direct()).scores(p.test)
    by_gn = Influence(p.net, p.train, damping=0.1, solver=Direct(), curvature=GaussNewton)
    assert relative_error(by_gn.scores(p.test)[:], by_hessian[:]) < 1e-11
    H = p.oracle.hessian(p.theta) + 0.1 * np.eye(p.net.num_parameters)
    own = p.oracle.gradients(p.theta) + p.oracle.penalty * p.theta
    expected = p.measured.gradients(p.theta) @ np.linalg.solve(H, own.T) / len(p.train)
    assert relative_error(by_hessian[:], expected) < 1e-11


# --- the truth: sign, scale and bias against exact refits ------------------------------------


@pytest.mark.parametrize(
    ("kind", "weight_decay"),
    [("softmax", 0.01), ("softmax", 1.0), ("sigmoid", 0.01), ("sigmoid", 1.0), ("ridge", 1.0)],
)
def test_scores_are_the_changes_of_exact_refits(kind, weight_decay):
    n = 1000
    if kind == "ridge":
        p = ridge(n, l2=weight_decay / 2)
    else:
        p = logistic(kind, n, weight_decay=weight_decay, intercept=True)
    rows = np.arange(0, n, 20)
    predicted = Influence(p.net, p.train, solver=Direct()).scores(p.test, rows)[:].ravel()
    actual = p.oracle.actual_changes(p.theta, p.measured, rows).ravel()
    line = scipy.stats.linregress(predicted, actual)
    # First order leaves out the row's leverage, d/n on average: here at most 18/1000, and far less
    # where the penalty dominates. Dropping the penalty from the row's gradient shifts every change.
    assert 0.99 < line.slope < 1.03
    assert line.rvalue > 0.999
    assert abs(line.intercept) < 0.01 * actual.std()
    large = np.abs(actual) > 0.05 * actual.std()
    assert (np.sign(predicted) == np.sign(actual))[large].all() and large.sum() > 100


def test_positive_means_the_row_helped(problems):
    """A test point that is also a training row is harmed when its row goes."""
    p = problems["ridge"]
    twin = Examples(p.train.x[[4]], p.train.y[[4]])
    assert abs(p.net.losses(twin.x, twin.y)[0]) > 0.1
    change = Influence(p.net, p.train, solver=Direct()).scores(twin, [4])[0, 0]
    before = p.oracle.losses(p.theta)[4]
    after = p.oracle.losses(p.oracle.without([4]).minimum(p.theta))[4]
    assert after > before and change > 0
    # Exactly: leaving a row out of least squares changes its residual by 1 / (1 - leverage).
    H = p.oracle.hessian(p.theta)
    leverage = p.oracle.hessians(p.theta)[4] @ np.linalg.inv(H) / len(p.train)
    assert change == pytest.approx(after - before, rel=4 * np.trace(leverage))


def test_the_error_of_parameters_falls_with_the_square_of_n():
    errors = {}
    for n in (100, 400):
        p = logistic("softmax", n, weight_decay=0.2)
        rows = np.arange(20)
        predicted = Influence(p.net, p.train, solver=Direct()).parameters(rows)
        actual = p.oracle.actual_parameters(p.theta, rows)
        errors[n] = np.linalg.norm(predicted - actual, axis=1).mean()
        assert errors[n] < 0.25 * np.linalg.norm(actual, axis=1).mean()
    # Four times the rows: a sixteenth, within the luck of twenty rows.
    assert 8 < errors[100] / errors[400] < 32


# --- what must not matter --------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 59, 60, 64])
@pytest.mark.parametrize("problem", ["softmax", "softmax by the tape"])
def test_batch_size_changes_nothing(problem, batch_size, problems):
    p = problems[problem]
    expected = Influence(p.net, p.train, solver=Direct()).scores(p.test)
    influence = Influence(p.net, p.train, solver=Direct(), batch_size=batch_size)
    assert relative_error(influence.scores(p.test)[:], expected[:]) < 1e-10


@pytest.mark.parametrize("problem", ["softmax", "softmax by the tape"])
def test_row_order_permutes_the_scores(problem, problems):
    p = problems[problem]
    rng = np.random.default_rng(0)
    order, test_order = rng.permutation(len(p.train)), rng.permutation(len(p.test))
    expected = Influence(p.net, p.train, solver=CG(rtol=1e-12)).scores(p.test)
    shuffled = Influence(p.net, p.train.take(order), solver=CG(rtol=1e-12))
    got = shuffled.scores(p.test.take(test_order))
    assert relative_error(got[:], expected[:][np.ix_(test_order, order)]) < 1e-10
    own = Influence(p.net, p.train, solver=Direct()).self_influence()
    shuffled = Influence(p.net, p.train.take(order), solver=Direct())
    assert relative_error(shuffled.self_influence(), own[order]) < 1e-10


def test_blocks_of_right_hand_sides_change_nothing(problems, monkeypatch):
    p = problems["softmax"]
    influence = Influence(p.net, p.train, solver=CG(rtol=1e-12))
    scores, own = influence.scores(p.test), influence.self_influence()
    parameters = influence.parameters(np.arange(9))
    monkeypatch.setattr("influence.scores.inverse._MOST_TOGETHER", 4)
    again = influence.scores(p.test)
    assert relative_error(again[:], scores[:]) < 1e-10
    assert relative_error(again.solution.x, scores.solution.x) < 1e-10
    for name in ("residual", "iterations", "converged", "min_curvature"):
        assert getattr(again.solution, name).shape == (7,)
    assert relative_error(influence.self_influence(), own) < 1e-10
    assert relative_error(influence.parameters(np.arange(9)), parameters) < 1e-10


def test_sparse_rows_and_memmaps_change_nothing(problems, tmp_path):
    p = problems["softmax"]
    expected = Influence(p.net, p.train, solver=Direct()).scores(p.test)
    stored = np.memmap(tmp_path / "x", np.float64, "w+", shape=p.train.x.shape)
    stored[:] = p.train.x
    for net in (p.net, problems["softmax by the tape"].net):
        for x in (scipy.sparse.csr_matrix(p.train.x), stored):
            influence = Influence(net, Examples(x, p.train.y), solver=Direct())
            test = Examples(scipy.sparse.csr_matrix(p.test.x), p.test.y)
            assert relative_error(influence.scores(test)[:], expected[:]) < 1e-10
            rows = [5, 1]
            assert relative_error(influence.scores(test, rows)[:], expected[:, rows]) < 1e-10
            own = influence.self_influence([3])
            assert own == pytest.approx(Influence(p.net, p.train).self_influence([3]), rel=1e-5)


THREADS = """
import sys
import numpy as np
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[2]))
tf.config.threading.set_inter_op_parallelism_threads(int(sys.argv[2]))
from tests.influence.scores.test_influence import results_that_use_threads
np.savez(sys.argv[1], **results_that_use_threads())
"""


def results_that_use_threads():
    p = logistic("softmax", 3000, 10, 0.1)
    taped = through_keras(p)
    exact, walk = CG(rtol=1e-12), LiSSA(depth=50, rtol=10)
    return {
        "closed form": Influence(p.net, p.train, solver=exact).scores(p.test)[:],
        "tape": Influence(taped.net, taped.train, solver=exact).scores(p.test)[:],
        "LiSSA": Influence(p.net, p.train, solver=walk).scores(p.test, [0, 1])[:],
    }


@pytest.mark.slow
def test_the_number_of_threads_changes_nothing(tmp_path):
    path = tmp_path / "there.npz"
    one_here = os.environ.get("OMP_NUM_THREADS") == os.environ.get("TF_NUM_INTRAOP_THREADS") == "1"
    threads = "2" if one_here else "1"
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict.fromkeys(names, threads)}
    command = [sys.executable, "-c", THREADS, str(path), threads]
    subprocess.run(command, env=environment, check=True, cwd=tmp_path, capture_output=True)
    with np.load(path) as there:
        for name, value in results_that_use_threads().items():
            assert relative_error(there[name], value) < 1e-10, name


def test_float32_in_float32_out():
    exact = ridge()
    expected = exact.oracle.predicted_changes(exact.theta, exact.measured, np.arange(40))
    p = ridge(dtype="float32")
    influence = Influence(p.net, p.train, solver=CG(rtol=1e-5))
    scores = influence.scores(p.test)
    assert scores[:].dtype == influence.self_influence().dtype == np.float32
    assert influence.parameters([0]).dtype == np.float32
    assert relative_error(scores[:], expected) < 1e-3  # float32 rounding of losses and a 1e-5 solve


# --- no number is given for a good one that is not -------------------------------------------


@pytest.mark.parametrize("solver", [CG(), Direct(), Lanczos(3)], ids=["CG", "Direct", "Lanczos"])
def test_the_damping_that_is_named_counts_what_is_there(tanh, solver):
    net, train = tanh
    smallest = np.linalg.eigvalsh(Hessian(net, train).dense())[0]
    present = -0.4 * smallest
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Influence(net, train, solver=solver, damping=present).scores(train.take([0]))
        message = str(caught[-1].message)
    except DivergenceError as error:
        message = str(error)
    enough, more = re.search(
        r"damping (?:well )?above (\S+) \((\S+) more than now\)", message
    ).groups()
    assert float(enough) == pytest.approx(present + float(more), rel=1e-2)
    assert float(enough) <= -smallest * 1.01  # the truth, or of the directions that were met
    if isinstance(solver, Direct):
        assert float(enough) == pytest.approx(-smallest, rel=1e-2)


def test_direct_answers_for_an_indefinite_matrix_though_rounding_misses_rtol(tanh):
    net, train = tanh
    with pytest.warns(ConvergenceWarning) as caught:
        Influence(net, train, solver=Direct(rtol=1e-30)).scores(train.take([0]))
    first, second = (str(warning.message) for warning in caught)
    assert "Direct left a relative residual of" in first and "larger Direct(rtol=" in first
    assert "the matrix is indefinite" in second


def test_cg_on_an_indefinite_hessian_raises_and_direct_answers(tanh):
    net, train = tanh
    H = Hessian(net, train).dense()
    assert np.linalg.eigvalsh(H)[0] < -0.1
    message = (
        r"^CG left a relative residual of .* \(rtol 1\.0e-06\) in \d+ of 20 systems for the test "
        "gradients: A is not positive definite: negative curvature -.* was met.*GaussNewton"
    )
    with pytest.raises(DivergenceError, match=message):
        Influence(net, train).scores(train)
    with pytest.raises(DivergenceError, match="systems for the rows' gradients: A is not positive"):
        Influence(net, train).self_influence()
    with pytest.raises(DivergenceError, match="systems for the rows' gradients: A is not positive"):
        Influence(net, train).parameters(np.arange(20))
    message = "Direct solved for the test gradients, but the matrix is indefinite .* seen -"
    with pytest.warns(ConvergenceWarning, match=message):
        scores = Influence(net, train, solver=Direct()).scores(train)
    G = net.gradients(train.x, train.y)
    own = G + net.penalty_gradient()
    assert relative_error(scores[:], G @ np.linalg.solve(H, own.T) / 20) < 1e-10
    np.testing.assert_allclose(scores.solution.min_curvature, np.linalg.eigvalsh(H)[0], rtol=1e-9)
    damped = Influence(net, train, damping=-2 * np.linalg.eigvalsh(H)[0]).scores(train)
    assert damped.solution.converged.all() and (damped.solution.min_curvature > 0).all()


def test_a_singular_hessian_is_refused():
    p = ridge(20, num_inputs=3, l2=0.0)
    x = np.column_stack([p.train.x[:, :2], p.train.x[:, 1]])  # a feature twice
    train = Examples(x, p.train.y)
    test = Examples(p.test.x, p.test.y)  # a test point that tells the twins apart
    with pytest.raises(DivergenceError, match="A is singular: curvature .* was met"):
        Influence(p.net, train).scores(test)
    with pytest.raises(DivergenceError, match="^A must not be singular"):
        Influence(p.net, train, solver=Direct()).scores(test)


def test_too_few_iterations_warn_where_the_library_was_called(problems):
    p = problems["softmax"]
    influence = Influence(p.net, p.train, solver=CG(rtol=1e-9, max_iterations=1))
    with pytest.warns(ConvergenceWarning) as caught:
        scores = influence.scores(p.test)
    assert [warning.filename for warning in caught] == [__file__]
    assert "CG left a relative residual of" in str(caught[0].message)
    assert "in 7 of 7 systems for the test gradients: CG stopped at max_iterations = 1" in str(
        caught[0].message
    )
    assert not scores.solution.converged.any()
    with pytest.warns(ConvergenceWarning, match="for the rows' gradients: CG stopped"):
        influence.parameters([1])


def test_a_short_lissa_warns_and_a_diverging_one_raises(problems):
    p = problems["softmax"]
    with pytest.warns(ConvergenceWarning, match=r"^LiSSA left .* \(rtol 1\.0e-01\) .* still noisy"):
        Influence(p.net, p.train, solver=LiSSA(depth=2, repeats=1)).scores(p.test)
    with pytest.raises(DivergenceError, match="^LiSSA diverges at step .* use a scale of"):
        Influence(p.net, p.train, solver=LiSSA(scale=0.1)).scores(p.test)


def test_a_solver_without_a_tolerance_warns_nobody(problems):
    p = problems["softmax"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rough = Influence(p.net, p.train, solver=LiSSA(depth=2, repeats=1, rtol=None))
        solution = rough.scores(p.test).solution
    assert (solution.residual > 0.1).all() and not solution.converged.any()


# --- the table that comes back ---------------------------------------------------------------


def test_scores_behave_as_their_array(problems):
    p = problems["ridge"]
    scores = Influence(p.net, p.train, solver=Direct()).scores(p.test, [3, 1])
    table = scores.change_if_removed
    assert isinstance(scores, Scores) and len(scores) == 7 and scores.shape == (7, 2)
    np.testing.assert_array_equal(np.asarray(scores), table)
    np.testing.assert_array_equal(np.abs(scores), np.abs(table))
    assert np.asarray(scores, dtype=np.float32).dtype == np.float32
    copy = np.array(scores)
    copy[:] = 0
    assert np.any(scores.change_if_removed)
    np.testing.assert_array_equal(scores.mean(axis=0), table.mean(axis=0))
    np.testing.assert_array_equal(scores.mean(axis=1), table.mean(axis=1))
    assert scores.mean() == table.mean()
    np.testing.assert_array_equal(scores[2, :], table[2])


# --- prepared solvers ------------------------------------------------------------------------


def test_what_is_prepared_is_used_as_it_is(problems):
    p = problems["softmax"]
    prepared = prepare(Hessian(p.net, p.train), Direct())
    influence = Influence(p.net, p.train, solver=prepared)
    assert influence.prepared is prepared
    expected = Influence(p.net, p.train, solver=Direct()).scores(p.test)
    np.testing.assert_array_equal(influence.scores(p.test)[:], expected[:])


def test_a_curvature_is_factored_once_for_all_questions(problems, monkeypatch):
    p, count = problems["softmax"], []
    dense = Hessian.dense
    monkeypatch.setattr(Hessian, "dense", lambda A: count.append(1) or dense(A))
    influence = Influence(p.net, p.train, solver=Direct())
    assert not count  # nothing long before there is a question
    influence.scores(p.test)
    influence.self_influence([1])
    influence.parameters([2])
    assert len(count) == 1


def test_what_is_prepared_for_something_else_is_refused(problems):
    p = problems["softmax by the tape"]
    other = through_keras(logistic("softmax", intercept=True))
    moved = prepare(Hessian(other.net, p.train), CG())
    other.net.theta = other.theta + 1
    for net, prepared in (
        (p.net, prepare(Hessian(p.net, p.train, damping=0.1), CG())),
        (p.net, prepare(Hessian(p.net, p.train.take(np.arange(30))), CG())),
        (p.net, prepare(Hessian(problems["softmax"].net, p.train), CG())),
        (p.net, prepare(GaussNewton(p.net, p.train), CG())),
        (p.net, prepare(np.eye(18), CG())),
        (p.net, prepare(np.eye(5), CG())),
        (other.net, moved),
    ):
        with pytest.raises(ValueError, match="^solver must be prepared for this matrix, got one"):
            Influence(net, p.train, solver=prepared)


# --- the model is left as it was -------------------------------------------------------------


def test_no_question_changes_the_model():
    p = through_keras(logistic("softmax"))
    model = p.net.model
    model.compile("adam", loss="mse")
    model.layers[-1].trainable = True
    state = lambda: (  # noqa: E731
        [v.numpy().tobytes() for v in model.variables],
        [(layer.trainable, layer.built) for layer in model.layers],
        (model.optimizer, model.loss, model.compiled),
    )
    before = state()
    influence = Influence(p.net, p.train, damping=0.1)
    influence.scores(p.test)
    influence.self_influence([0, 1])
    influence.parameters([0])
    assert state() == before


def test_scores_belong_to_the_theta_they_were_made_at():
    p = ridge()
    influence = Influence(p.net, p.train)
    p.net.theta = p.theta + 1
    with pytest.raises(RuntimeError, match="^theta has changed since this operator was made"):
        influence.scores(p.test)


# --- what is refused -------------------------------------------------------------------------

Y = np.zeros(4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"net": "model.keras"}, TypeError, "^net must be a GenericNeuralNet, got str"),
        ({"train": (1, 2)}, TypeError, r"^train must be Examples\(x, y\), got tuple"),
        ({"train": Examples(np.ones((4, 3)), Y)}, ValueError, r"^train\.x must have rows of shape"),
        ({"train": Examples(np.ones((4, 5)), Y + 3)}, ValueError, r"^train\.y must hold class num"),
        ({"solver": "cg"}, TypeError, r"^solver must be a solver such as CG\(\) .*, got 'cg'"),
        ({"solver": CG}, TypeError, r"^solver must be a solver such as CG\(\)"),
        ({"damping": -0.1}, ValueError, r"^damping must be a number >= 0, got -0\.1"),
        ({"curvature": "hessian"}, TypeError, "^curvature must be Hessian or GaussNewton, got 'he"),
        ({"curvature": int}, TypeError, "^curvature must be Hessian or GaussNewton, got <class"),
        ({"batch_size": 0}, ValueError, "^batch_size must be a positive integer or None, got 0"),
    ],
)
def test_bad_arguments(options, error, message, problems):
    p = problems["softmax by the tape"]
    with pytest.raises(error, match=message):
        Influence(**{"net": p.net, "train": p.train, **options})


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([60], IndexError, r"^rows must lie in \[0, 60\), got 60 at position 0"),
        ([-1], IndexError, r"^rows must lie in \[0, 60\), got -1"),
        ([1, 1], ValueError, "^rows must name each row once, got 1 twice"),
        ([], ValueError, "^rows must be a one-dimensional, non-empty list"),
        (np.ones(60, bool), TypeError, "^rows must be integers, got dtype bool; np.flatnonzero"),
        ([0.5], TypeError, "^rows must be integers, got dtype float64"),
    ],
)
def test_bad_rows_are_refused_before_any_work(rows, error, message, problems, monkeypatch):
    p = problems["softmax"]
    influence = Influence(p.net, p.train)

    def work(*_):
        raise AssertionError("the work had begun")

    monkeypatch.setattr(Influence, "_solve", work)
    for question in (
        lambda: influence.scores(p.test, rows),
        lambda: influence.parameters(rows),
        lambda: influence.self_influence(rows),
    ):
        with pytest.raises(error, match=message):
            question()


@pytest.mark.parametrize(
    ("test", "error", "message"),
    [
        ((np.ones((4, 5)), Y), TypeError, r"^test must be Examples\(x, y\), got tuple"),
        (Examples(np.ones((4, 3)), Y), ValueError, r"^test\.x must have rows of shape \(5,\)"),
        (Examples(np.ones((4, 5)), Y - 1), ValueError, r"^test\.y must hold class numbers 0 to 2,"),
    ],
)
def test_bad_test_sets_are_refused_before_any_work(test, error, message, problems, monkeypatch):
    p = problems["softmax"]
    influence = Influence(p.net, p.train)
    monkeypatch.setattr(Influence, "_solve", lambda *_: pytest.fail("the work had begun"))
    with pytest.raises(error, match=message):
        influence.scores(test)
