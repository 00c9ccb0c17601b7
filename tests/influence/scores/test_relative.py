"""Tests of Influence.relative against its definition in closed form."""

import numpy as np
import pytest

from influence import CG, ConvergenceWarning, Direct, DivergenceError, Examples, Hessian, Influence
from influence.net.measurements import margin
from tests.influence.problems import logistic, relative_error, ridge, tanh_net, through_keras

ROWS = [30, 2, 17]


@pytest.fixture(scope="module")
def problems():
    softmax = logistic("softmax", intercept=True)
    return {"ridge": ridge(), "softmax": softmax, "softmax by the tape": through_keras(softmax)}


def sizes(problem, kind, rows):
    """Return the sizes (k,) of the predicted moves D of theta: |D| or sqrt(D' H D)."""
    D = problem.oracle.predicted_parameters(problem.theta, rows)
    M = np.eye(D.shape[1]) if kind == "theta" else problem.oracle.hessian(problem.theta)
    return np.sqrt(np.einsum("kd,de,ke->k", D, M, D))


@pytest.mark.parametrize("kind", ["theta", "loss"])
@pytest.mark.parametrize("problem", ["ridge", "softmax", "softmax by the tape"])
def test_is_the_score_for_each_unit_of_the_move(problem, kind, problems):
    p = problems[problem]
    expected_sizes = sizes(p, kind, ROWS)
    scores = p.oracle.predicted_changes(p.theta, p.measured, ROWS)
    got = Influence(p.net, p.train, solver=Direct()).relative(p.test, ROWS, kind)
    assert relative_error(got.relative_change_if_removed, scores / expected_sizes) < 1e-10
    assert relative_error(got.size, expected_sizes) < 1e-10
    assert (got.rows.tolist(), got.kind, got.measurement) == (ROWS, kind, "loss")
    assert (np.sign(got[:]) == np.sign(scores)).all()


def test_the_papers_formulas_have_no_n(problems):
    """Compare with the formulas of Barshan et al.

    The score and the size of the change of theta both have the factor 1/n. It cancels in their
    ratio.
    """
    p = problems["softmax"]
    g = p.oracle.gradients(p.theta)[ROWS] + p.oracle.penalty * p.theta
    X = np.linalg.solve(p.oracle.hessian(p.theta), g.T)
    V = p.measured.gradients(p.theta)
    influence = Influence(p.net, p.train, solver=CG(rtol=1e-11))
    by_theta = influence.relative(p.test, ROWS)
    assert relative_error(by_theta[:], V @ X / np.linalg.norm(X, axis=0)) < 1e-9
    by_loss = influence.relative(p.test, ROWS, "loss")
    assert relative_error(by_loss[:], V @ X / np.sqrt(np.einsum("kd,dk->k", g, X))) < 1e-9


def test_no_row_is_larger_than_its_kind_allows(problems):
    """Check the bounds on |ratio| that follow from the inequality of Cauchy and Schwarz.

    With the gradient v of the test loss they are |v| for "theta" and sqrt(v' H^-1 v) for "loss".
    """
    p = problems["softmax"]
    influence = Influence(p.net, p.train, solver=Direct())
    V = p.measured.gradients(p.theta)
    limits = {
        "theta": np.linalg.norm(V, axis=1),
        "loss": np.sqrt(np.einsum("md,dm->m", V, influence.s_test(p.test).x)),
    }
    for kind, limit in limits.items():
        got = influence.relative(p.test, kind=kind)
        assert got.shape == (7, 60)
        largest = np.abs(got[:]).max(axis=1)
        assert (largest <= limit * (1 + 1e-12)).all() and (largest > 0.2 * limit).all()


def test_outliers_no_longer_come_first():
    """Check an outlier with a wrong label: it has the largest score, but not the largest ratio."""
    p = ridge(60, l2=0.01)
    x, y = p.train.x.copy(), p.train.y.copy()
    x[7], y[7] = 3 * x[7], y[7] - 20
    oracle = p.oracle.on(np.column_stack([x, np.ones(60)]), y)
    p.net.theta = oracle.minimum(p.theta)
    influence = Influence(p.net, Examples(x, y), solver=Direct(), approximation="first_order")
    assert (np.abs(influence.scores(p.test)).argmax(axis=1) == 7).sum() == 6
    for kind in ("theta", "loss"):
        relative = np.abs(influence.relative(p.test, kind=kind))
        assert not (relative.argmax(axis=1) == 7).any()
        assert (relative.sum(axis=0) > relative.sum(axis=0)[7]).sum() > 20


def test_a_measurement_in_place_of_the_loss(problems):
    p = problems["softmax"]
    influence = Influence(p.net, p.train, solver=Direct(), approximation="first_order")
    got = influence.relative(p.test, ROWS, measurement=margin)
    scores = influence.scores(p.test, ROWS, measurement=margin)
    assert got.measurement == "margin"
    assert relative_error(got[:], scores[:] / sizes(p, "theta", ROWS)) < 1e-10


def test_blocks_and_batches_change_nothing(problems, monkeypatch):
    p = problems["softmax"]
    expected = Influence(p.net, p.train, solver=Direct()).relative(p.test, kind="loss")
    monkeypatch.setattr("influence.scores.inverse._MOST_TOGETHER", 4)
    got = Influence(p.net, p.train, solver=Direct(), batch_size=7).relative(p.test, kind="loss")
    assert relative_error(got[:], expected[:]) < 1e-11
    assert relative_error(got.size, expected.size) < 1e-11


def test_a_row_that_moves_nothing_has_no_direction():
    p = ridge(l2=0.0)
    x, y = p.train.x.copy(), p.train.y.copy()
    # Set the label to the model's output for this row, so that the row's gradient is zero.
    y[3] = (np.append(x[3], 1) @ p.theta).item()
    influence = Influence(p.net, Examples(x, y), solver=Direct())
    g = p.net.gradients(x[[3]], y[[3]])
    # NumPy and TensorFlow may round the output differently. Then take TensorFlow's output.
    if np.any(g):
        y[3] = p.net.outputs(x[[3]])[0, 0]
        influence = Influence(p.net, Examples(x, y), solver=Direct())
    for kind in ("theta", "loss"):
        got = influence.relative(p.test, [3, 4], kind)
        assert got.size[0] == 0 < got.size[1]
        assert np.isnan(got[:, 0]).all() and np.isfinite(got[:, 1]).all()


def test_a_saddle_has_no_size_of_loss():
    net, train = tanh_net()
    influence = Influence(net, train, solver=Direct(), curvature=Hessian)
    with (
        pytest.warns(ConvergenceWarning, match="the matrix is indefinite"),
        pytest.raises(DivergenceError, match="^kind must be 'theta' where the matrix is not pos"),
    ):
        influence.relative(train, kind="loss")


def test_bad_arguments_are_refused_before_any_work(problems, monkeypatch):
    p = problems["softmax"]
    influence = Influence(p.net, p.train)
    monkeypatch.setattr(
        "influence.scores.inverse.Inverse.solve", lambda *_: pytest.fail("the work had begun")
    )
    with pytest.raises(ValueError, match="^kind must be 'theta' or 'loss', got 'l2'"):
        influence.relative(p.test, kind="l2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(IndexError, match=r"^rows must lie in \[0, 60\), got 60"):
        influence.relative(p.test, [60])
    with pytest.raises(TypeError, match=r"^test must be Examples\(x, y\), got int"):
        influence.relative(3)  # pyright: ignore[reportArgumentType]
