"""Tests of Inverse through Influence: solves, warnings, refusals, and passes over rows."""

import re
import warnings

import numpy as np
import pytest

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
    prepare,
)
from influence.scores.inverse import Inverse
from tests.influence.problems import logistic, relative_error, ridge, tanh_net, through_keras


@pytest.fixture(scope="module")
def problems():
    softmax = logistic("softmax", intercept=True)
    return {"softmax": softmax, "softmax by the tape": through_keras(softmax)}


@pytest.fixture(scope="module")
def tanh():
    """Return (net, train), a network with a penalty, far from a minimum."""
    return tanh_net(l2=0.05)


# --- passes over rows --------------------------------------------------------------------------


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


@pytest.mark.parametrize("problem", ["softmax", "softmax by the tape"])
def test_rows_in_any_order_are_read_in_one_pass(problem, problems, monkeypatch):
    p = problems[problem]
    inverse = Inverse(p.net, p.train)
    S = np.random.default_rng(0).standard_normal((18, 3))
    own = p.oracle.gradients(p.theta) + p.oracle.penalty * p.theta
    rows = np.random.default_rng(1).permutation(60)[:30]
    assert relative_error(inverse.along(S, p.train, rows), own[rows] @ S / 60) < 1e-12
    assert relative_error(inverse.along(S, p.train), own @ S / 60) < 1e-12
    other = p.measured.gradients(p.theta) + p.oracle.penalty * p.theta
    assert (
        relative_error(inverse.along(S, p.test, np.array([6, 2])), other[[6, 2]] @ S / 60) < 1e-12
    )
    monkeypatch.setattr("influence.scores.inverse._MOST_TOGETHER", 7)
    seen = list(inverse.row_gradients(rows))
    assert [G.shape for _, _, G in seen] == [(18, 7)] * 4 + [(18, 2)]
    order = np.concatenate([at for at, *_ in seen])
    assert (np.diff(rows[order]) > 0).all()
    losses, full = (np.concatenate(part, axis=1) for part in list(zip(*seen, strict=True))[1:])
    assert relative_error(full.T, own[rows[order]]) < 1e-12
    assert relative_error(losses.T, p.oracle.gradients(p.theta)[rows[order]]) < 1e-12


# --- errors and warnings for inaccurate solves -----------------------------------------------


@pytest.mark.parametrize("solver", [CG(), Direct(), Lanczos(3)], ids=["CG", "Direct", "Lanczos"])
def test_the_damping_that_is_named_counts_what_is_there(tanh, solver):
    net, train = tanh
    smallest = np.linalg.eigvalsh(Hessian(net, train).dense())[0]
    present = -0.4 * smallest
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            how = {"solver": solver, "damping": present, "curvature": Hessian}
            Influence(net, train, **how).scores(train.take([0]))
        message = " ".join(str(warning.message) for warning in caught)
    except DivergenceError as error:
        message = str(error)
    found = re.search(r"damping (?:well )?above (\S+) \((\S+) more than now\)", message)
    enough, more = map(float, found.groups())
    assert enough == pytest.approx(present + more, rel=1e-2)
    # CG knows only the negative curvature that it met, so it may name too small a damping.
    assert enough <= -smallest * 1.01
    if isinstance(solver, Direct):
        assert enough == pytest.approx(-smallest, rel=1e-2)


def test_direct_answers_for_an_indefinite_matrix_though_rounding_misses_rtol(tanh):
    net, train = tanh
    with pytest.warns(ConvergenceWarning) as caught:
        influence = Influence(net, train, solver=Direct(rtol=1e-30), curvature=Hessian)
        influence.scores(train.take([0]))
    first, second = (str(warning.message) for warning in caught[:2])
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
    by_cg = Influence(net, train, solver=CG(), curvature=Hessian)
    with pytest.raises(DivergenceError, match=message):
        by_cg.scores(train)
    with pytest.raises(DivergenceError, match="systems for the rows' gradients: A is not positive"):
        by_cg.self_influence()
    with pytest.raises(DivergenceError, match="systems for the rows' gradients: A is not positive"):
        by_cg.parameters(np.arange(20))
    message = "Direct solved for the test gradients, but the matrix is indefinite .* seen -"
    with pytest.warns(ConvergenceWarning, match=message):
        scores = Influence(net, train, solver=Direct(), curvature=Hessian).scores(train)
    G = net.gradients(train.x, train.y)
    own = G + net.penalty_gradient()
    assert relative_error(scores[:], G @ np.linalg.solve(H, own.T) / 20) < 1e-10
    np.testing.assert_allclose(scores.solution.min_curvature, np.linalg.eigvalsh(H)[0], rtol=1e-9)
    damping = -2 * np.linalg.eigvalsh(H)[0]
    damped = Influence(net, train, solver=CG(), damping=damping, curvature=Hessian).scores(train)
    assert damped.solution.converged.all() and (damped.solution.min_curvature > 0).all()


def test_a_singular_hessian_is_refused():
    p = ridge(20, num_inputs=3, l2=0.0)
    # In the training rows, features 1 and 2 are equal, so H is singular. In the test rows they
    # differ, so test gradients do not lie in the range of H.
    x = np.column_stack([p.train.x[:, :2], p.train.x[:, 1]])
    train = Examples(x, p.train.y)
    test = Examples(p.test.x, p.test.y)
    with pytest.raises(DivergenceError, match="A is singular: curvature .* was met"):
        Influence(p.net, train, solver=CG(), curvature=Hessian).scores(test)
    with pytest.raises(DivergenceError, match="^A must not be singular"):
        Influence(p.net, train, solver=Direct(), curvature=Hessian).scores(test)


def test_too_few_iterations_warn_where_the_library_was_called(problems):
    p = problems["softmax"]
    influence = Influence(p.net, p.train, solver=CG(rtol=1e-9, max_iterations=1))
    with pytest.warns(ConvergenceWarning) as caught:
        scores = influence.scores(p.test)
    assert [warning.filename for warning in caught] == [__file__]
    message = str(caught[0].message)
    assert message.startswith("CG left a relative residual of")
    assert "in 7 of 7 systems for the test gradients: CG stopped at max_iterations = 1" in message
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


# --- prepared solvers ------------------------------------------------------------------------


def test_what_is_prepared_is_used_as_it_is(problems):
    p = problems["softmax"]
    prepared = prepare(Hessian(p.net, p.train), Direct())
    influence = Influence(p.net, p.train, solver=prepared)
    assert influence.prepared is influence.inverse.prepared is prepared
    assert influence.inverse.solver == Direct()
    expected = Influence(p.net, p.train, solver=Direct()).scores(p.test)
    np.testing.assert_array_equal(influence.scores(p.test)[:], expected[:])


def test_a_curvature_is_factored_once_for_all_questions(problems, monkeypatch):
    p, count = problems["softmax"], []
    dense = Hessian.dense
    monkeypatch.setattr(Hessian, "dense", lambda A: count.append(1) or dense(A))
    influence = Influence(p.net, p.train, solver=Direct())
    assert not count  # the matrix is not formed before the first use
    influence.scores(p.test)
    influence.self_influence([1])
    influence.parameters([2])
    assert len(count) == 1


def test_what_is_prepared_for_something_else_is_refused(problems):
    p = problems["softmax by the tape"]
    other = through_keras(logistic("softmax", intercept=True))
    moved = prepare(Hessian(other.net, p.train), CG())
    other.net.theta = other.theta + 1
    for net, prepared, *options in (
        (p.net, prepare(Hessian(p.net, p.train, damping=0.1), CG()), {"damping": 0.2}),
        (p.net, prepare(Hessian(p.net, p.train.take(np.arange(30))), CG())),
        (p.net, prepare(Hessian(problems["softmax"].net, p.train), CG())),
        (p.net, prepare(GaussNewton(p.net, p.train), CG()), {"curvature": Hessian}),
        (p.net, prepare(np.eye(18), CG())),
        (p.net, prepare(np.eye(5), CG())),
        (other.net, moved),
    ):
        with pytest.raises(ValueError, match="^solver must be prepared for this matrix, got one"):
            Influence(net, p.train, solver=prepared, **(options[0] if options else {}))


def test_scores_belong_to_the_theta_they_were_made_at():
    p = ridge()
    influence = Influence(p.net, p.train)
    p.net.theta = p.theta + 1
    with pytest.raises(RuntimeError, match="^theta has changed since this Influence was made"):
        influence.scores(p.test)


# --- arguments that are refused --------------------------------------------------------------

Y = np.zeros(4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"net": "model"}, TypeError, "^net must be a GenericNeuralNet, got str"),
        ({"net": "a.keras"}, FileNotFoundError, "^path must be a file of a saved model, got a.ker"),
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
