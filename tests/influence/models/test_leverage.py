"""Tests of closed forms of x' H^-1 x and self-influence, by matrices of order d and order n."""

import numpy as np
import pytest
import scipy.sparse

from influence import (
    CG,
    BinaryLogisticRegression,
    Direct,
    DivergenceError,
    Examples,
    GaussNewton,
    Influence,
    LiSSA,
)
from influence.models import leverage
from tests import oracles
from tests.influence.problems import logistic, relative_error

FORMATS = {"dense": np.asarray, "sparse": scipy.sparse.csr_matrix}
# The condition numbers of these Hessians are below 1e4.
ROUNDING = 1e-11


def problem(num_rows, num_inputs, *, intercept=False, form="dense", weight_decay=0.01, seed=0):
    """Return (net, examples, oracle), with the net away from its minimum."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(0.7, (num_rows, num_inputs)).astype(float)
    y = rng.integers(2, size=num_rows)
    net = BinaryLogisticRegression(num_inputs, weight_decay=weight_decay, intercept=intercept)
    net.theta = rng.standard_normal(net.num_parameters)
    features = oracles.with_ones(x) if intercept else x
    oracle = oracles.logistic_regression(features, y, weight_decay)
    return net, Examples(FORMATS[form](x), y), oracle


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("shape", [(70, 9), (70, 150)], ids=["tall", "wide"])
def test_leverages_and_self_influence_are_those_of_the_definition(shape, intercept, form):
    net, examples, oracle = problem(*shape, intercept=intercept, form=form)
    inverse = np.linalg.inv(oracle.hessian(net.theta))
    expected = np.einsum("ij,jk,ik->i", oracle.features, inverse, oracle.features)
    assert relative_error(net.leverages(examples), expected) < ROUNDING
    rows = [5, 3, 69]
    assert relative_error(net.leverages(examples, rows), expected[rows]) < ROUNDING
    moves = oracle.predicted_parameters(net.theta, np.arange(70))
    expected = np.einsum("id,id->i", oracle.gradients(net.theta), moves)
    influence = Influence(net, examples, solver=Direct())
    # This call uses the closed form.
    assert relative_error(influence.self_influence(), expected) < ROUNDING
    one_by_one = [influence.self_influence(rows) for rows in np.split(np.arange(70), [60])]
    # The closed form is used for at least 64 rows. These two calls ask for 60 and 10 rows, so the
    # solver answers them.
    assert relative_error(np.concatenate(one_by_one), expected) < ROUNDING


def test_both_sides_of_woodburys_identity_agree_where_curvature_vanishes():
    """Compare the formula by matrices of order n with that by matrices of order d.

    The curvatures of the rows differ by many orders of magnitude.
    """
    net, examples, _ = problem(40, 60, weight_decay=1e-4)
    net.theta = 2 * net.theta
    rows, K = np.arange(40), net.design.gram(examples.x)
    by_rows = leverage._by_rows(net, examples, rows, K)
    by_parameters = leverage._by_parameters(net, examples, rows)
    curvature = np.exp(-np.abs(net.outputs(examples.x)))
    assert curvature.min() < 1e-12 and curvature.max() > 0.05
    for one, other in zip(by_rows, by_parameters, strict=True):
        assert relative_error(one, other) < 1e-9  # the condition number is about 1e5


@pytest.mark.parametrize("shape", [(50, 4), (50, 80)], ids=["tall", "wide"])
def test_blocks_of_rows_change_nothing(monkeypatch, shape):
    net, examples, _ = problem(*shape)
    whole = net.leverages(examples)
    monkeypatch.setattr(leverage, "_COLUMNS", 7)
    assert relative_error(net.leverages(examples), whole) < 1e-14


def test_a_gram_matrix_serves_whatever_the_labels():
    net, examples, _ = problem(30, 50, intercept=True)
    K = net.design.gram(examples.x)
    x = oracles.with_ones(examples.x)
    assert relative_error(K, x @ x.T) < 1e-14
    flipped = Examples(examples.x, 1 - examples.y)
    got = net.leverages(flipped, gram=K)
    np.testing.assert_array_equal(got, net.leverages(flipped))
    # A wrong Gram matrix gives a wrong result. This shows that `leverages` uses the given matrix.
    assert not np.allclose(net.leverages(examples, gram=2 * K), got, rtol=0.1)


def test_one_step_names_a_singular_hessian():
    net, examples, _ = problem(30, 4, weight_decay=0.0)
    examples = Examples(examples.x * [1, 0, 1, 1], examples.y)
    with pytest.raises(DivergenceError, match="use a weight_decay above 0.0"):
        net.one_step_leave_one_out(examples, [0])


# --- when Influence uses the closed form -------------------------------------------------------

ANSWER = np.arange(70.0)


@pytest.fixture
def known(monkeypatch, request):
    """Return a problem whose net has a fake closed form of self-influence that returns ANSWER.

    It has 90 inputs, or the number that the test gives.
    """
    p = logistic("sigmoid", 70, getattr(request, "param", 90))
    monkeypatch.setattr(p.net, "self_influence", lambda examples, rows: ANSWER[rows])
    return p


@pytest.mark.parametrize("solver", [CG(), Direct()])
@pytest.mark.parametrize("prepared", [False, True])
def test_the_closed_form_answers_for_many_rows(known, solver, prepared):
    influence = Influence(known.net, known.train, solver=solver)
    if prepared:
        influence.scores(known.test)
    rows = np.arange(70)[::-1][:64]
    np.testing.assert_array_equal(influence.self_influence(), ANSWER)
    np.testing.assert_array_equal(influence.self_influence(rows), ANSWER[rows])


@pytest.mark.parametrize("known", [5], indirect=True)
def test_direct_is_preferred_where_it_is_as_fast(known):
    assert np.abs(Influence(known.net, known.train, solver=Direct()).self_influence()).max() < 1
    np.testing.assert_array_equal(Influence(known.net, known.train).self_influence(), ANSWER)


@pytest.mark.parametrize(
    "options",
    [
        {"damping": 0.1},
        {"curvature": GaussNewton},
        {"solver": LiSSA(depth=20, rtol=1e9)},
        {"rows": np.arange(63)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_closed_form_is_not_asked_for_anything_else(known, options):
    rows = options.pop("rows", None)
    got = Influence(known.net, known.train, **options).self_influence(rows)
    # The values of the solver are below 1. Those of the closed form, ANSWER, go up to 69.
    assert np.abs(got).max() < 1


def test_theta_must_be_the_one_that_the_influence_was_made_for(known):
    influence = Influence(known.net, known.train)
    known.net.theta = known.theta + 1
    with pytest.raises(RuntimeError, match="theta has changed"):
        influence.self_influence()


@pytest.mark.parametrize(
    "net",
    [
        logistic("softmax", 10).net,
        logistic("sigmoid", 10, dtype="float32").net,
        BinaryLogisticRegression(5, weight_decay=0.0),
    ],
    ids=["several outputs", "float32", "no penalty"],
)
def test_nets_without_a_safe_closed_form_have_none(net):
    examples = Examples(np.ones((10, 5), net.dtype), np.arange(10) % 2)
    assert net.self_influence(examples, np.arange(10)) is None


def test_matrices_too_large_are_not_factored(monkeypatch):
    net, examples, _ = problem(30, 50)
    assert net.self_influence(examples, np.arange(30)) is not None
    monkeypatch.setattr(leverage, "_LARGEST_FACTOR", 29)
    assert net.self_influence(examples, np.arange(30)) is None


# --- arguments that are refused ----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 4), (30, 50)], ids=["tall", "wide"])
def test_a_singular_hessian_is_named(shape):
    net, examples, _ = problem(*shape, weight_decay=0.0)
    same = Examples(np.ones(shape), examples.y)
    with pytest.raises(DivergenceError, match="singular one; use a weight_decay above 0.0"):
        net.leverages(same)


def test_bad_arguments():
    p = logistic("softmax", 10)
    with pytest.raises(ValueError, match="model must have one output, got 3"):
        p.net.leverages(p.train)
    net, examples, _ = problem(30, 50)
    with pytest.raises(ValueError, match=r"gram must have shape \(30, 30\), got \(50, 50\)"):
        net.leverages(examples, gram=np.eye(50))
    with pytest.raises(IndexError, match="rows must lie in"):
        net.leverages(examples, [30])
