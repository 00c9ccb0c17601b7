from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse

from influence import CG, Direct, DivergenceError, Examples, GaussNewton, Hessian, prepare
from influence.minimisers.block_lbfgs import _pair, _two_loops
from influence.truth.removal import Removal, apply
from tests import oracles
from tests.influence.problems import logistic, relative_error, ridge, tanh_net, through_keras

GROUPS = [np.array(rows) for rows in ([3], [5, 1], [7, 3, 0, 2, 9], [4], [8, 5], list(range(20)))]
EVERY = np.arange(len(GROUPS))


@pytest.fixture(scope="module", params=["closed", "taped"])
def softmax(request):
    p = logistic("softmax", intercept=True)
    return p if request.param == "closed" else through_keras(p)


@pytest.fixture(params=[None, 1, 3])
def removal(softmax, request):
    return Removal(softmax.net, softmax.train, GROUPS, request.param)


def by_pairs(removed, inverse, B):
    """Return an approximation of (A - H_g / n)^-1 B, by secant updates of the inverse of A.

    Their pairs are those of `removed`. H_g sums the Hessians of loss and penalty over group g.
    """
    pairs = [_pair(*pair) for pair in removed.pairs(inverse, B)]
    return _two_loops(pairs, B, lambda Q: apply(inverse, Q))


def by_steps(removed, inverse, B):
    return removed.solve(inverse, B, np.arange(len(removed.groups)))


@pytest.fixture(params=[by_pairs, by_steps])
def solved(request):
    """Return a function of (Removal, inverse, B) that approximates (A - H_g / n)^-1 B."""
    return request.param


def thetas_of(p):
    noise = np.random.default_rng(0).standard_normal((len(p.theta), len(GROUPS)))
    return p.theta[:, None] + 0.1 * noise


def test_gradients_are_sums_over_the_group(softmax, removal):
    p, thetas = softmax, thetas_of(softmax)
    own = [p.oracle.gradients(t)[g] + 0.05 * t for t, g in zip(thetas.T, GROUPS, strict=True)]
    expected = np.stack([part.sum(axis=0) for part in own], axis=1)
    assert relative_error(removal.gradients(thetas, EVERY), expected) < 1e-12
    few = np.array([5, 2])  # only two of the groups, in another order
    assert relative_error(removal.gradients(thetas[:, few], few), expected[:, few]) < 1e-12


def test_products_are_sums_over_the_group(softmax, removal):
    p, V = softmax, thetas_of(softmax)
    data = p.oracle.hessians(p.theta) + 0.05 * np.eye(len(V))
    own = [data[g].sum(axis=0) @ v for g, v in zip(GROUPS, V.T, strict=True)]
    expected = np.stack(own, axis=1)
    assert relative_error(removal.hvp(V, EVERY), expected) < 1e-12
    few = np.array([4, 0, 5])
    assert relative_error(removal.hvp(V[:, few], few), expected[:, few]) < 1e-12


def test_a_fraction_is_of_every_sum(softmax):
    p, V = softmax, thetas_of(softmax)
    whole, part = (Removal(p.net, p.train, GROUPS, None, fraction) for fraction in (1.0, 0.3))
    np.testing.assert_allclose(part.hvp(V, EVERY), 0.3 * whole.hvp(V, EVERY), rtol=1e-12)
    np.testing.assert_allclose(
        part.gradients(V, EVERY), 0.3 * whole.gradients(V, EVERY), rtol=1e-12
    )


def test_dicts_and_sparse_rows():
    p = logistic("softmax", intercept=True)
    thetas = thetas_of(p)
    expected = Removal(p.net, p.train, GROUPS, None).gradients(thetas, EVERY)
    sparse = Examples(scipy.sparse.csr_matrix(p.train.x), p.train.y)
    got = Removal(p.net, sparse, GROUPS, 3).gradients(thetas, EVERY)
    assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("solver", [Direct(), CG(rtol=1e-10)])
@pytest.mark.parametrize("size", [1, 3])
def test_the_groups_curvature_is_taken_out(solver, size, softmax, solved):
    p = softmax
    groups = [np.arange(first, first + size) for first in range(0, 12, size)]
    removed = Removal(p.net, p.train, groups, None)
    inverse = prepare(Hessian(p.net, p.train), solver)
    data, d, n = p.oracle.hessians(p.theta), len(p.theta), len(p.train)
    B = np.random.default_rng(0).standard_normal((d, len(groups)))
    got = solved(removed, inverse, B)
    for j, group in enumerate(groups):
        own = data[group].sum(axis=0) + size * 0.05 * np.eye(d)
        H = p.oracle.hessian(p.theta) - own / n
        expected = np.linalg.solve(H, B[:, j])
        without = np.linalg.solve(p.oracle.hessian(p.theta), B[:, j])
        # The solve stops at a relative residual of 1e-3, in the norm of A. Allow an error of 2e-3.
        assert relative_error(got[:, j], expected) < 2e-3
        assert relative_error(without, expected) > 1e-2


def test_great_leverage_costs_no_more_steps(monkeypatch, solved):
    """Check that a row of large leverage needs at most three products.

    Its Hessian has rank one, so conjugate gradients need only one direction for it.
    """
    p = ridge()
    x = p.train.x.copy()
    x[5] *= 20
    oracle = replace(p.oracle, features=oracles.with_ones(x))
    H = oracle.hessian(p.theta)
    own = oracle.hessians(p.theta)[5] + np.diag(oracle.penalty)
    assert np.linalg.eigvals(np.linalg.solve(H, own / 40)).real.max() > 0.95
    calls, hvp = [], Removal.hvp
    monkeypatch.setattr(Removal, "hvp", lambda *given: calls.append(1) or hvp(*given))
    train = Examples(x, p.train.y)
    removed = Removal(p.net, train, [np.array([5])], None)
    got = solved(removed, prepare(Hessian(p.net, train), Direct()), np.ones((5, 1)))
    expected = np.linalg.solve(H - own / 40, np.ones(5))
    assert relative_error(got[:, 0], expected) < 2e-3 and len(calls) <= 3


def test_a_group_gets_steps_as_it_has_rows(monkeypatch, solved):
    """Check that larger groups get fewer products, because each of these costs more.

    The answer for a group does not depend on the other groups.
    """
    p = ridge(num_inputs=8)
    calls, hvp = [], Removal.hvp
    monkeypatch.setattr(
        Removal, "hvp", lambda self, V, at: calls.append(at.tolist()) or hvp(self, V, at)
    )
    removed = Removal(p.net, p.train, [np.arange(20), np.arange(30), np.arange(4)], None)
    inverse = prepare(Hessian(p.net, p.train), Direct())
    B = np.random.default_rng(0).standard_normal((9, 3))
    together = solved(removed, inverse, B)
    counts = [sum(j in at for at in calls) for j in range(3)]
    assert counts[:2] == [2, 1] and 3 <= counts[2] <= 10
    for j in range(3):
        one = Removal(p.net, p.train, [removed.groups[j]], None)
        alone = solved(one, inverse, B[:, [j]])
        np.testing.assert_allclose(alone[:, 0], together[:, j], rtol=1e-10)


def test_some_of_the_groups_are_solved_for():
    p = ridge()
    removed = Removal(p.net, p.train, GROUPS, None)
    inverse, few = prepare(Hessian(p.net, p.train), Direct()), np.array([4, 1])
    B = np.random.default_rng(0).standard_normal((5, len(GROUPS)))
    every = removed.solve(inverse, B, EVERY)
    np.testing.assert_allclose(removed.solve(inverse, B[:, few], few), every[:, few], rtol=1e-10)


def test_zero_is_solved_by_zero(solved):
    p = ridge()
    removed = Removal(p.net, p.train, [np.array([1])], None)
    inverse = prepare(Hessian(p.net, p.train), Direct())
    assert removed.pairs(inverse, np.zeros((5, 1))) == []
    np.testing.assert_array_equal(solved(removed, inverse, np.zeros((5, 1))), 0)


def test_negative_curvature_is_refused():
    net, examples = tanh_net()
    removed = Removal(net, examples, [np.array([1])], None)
    inverse = prepare(Hessian(net, examples), Direct())
    with pytest.raises(
        DivergenceError,
        match=r"^the curvature at theta must be positive definite, got (-[\d.]+) in some "
        r"direction; raise the damping by more than [\d.]+ or",
    ):
        removed.pairs(inverse, np.ones((21, 1)))


def test_where_a_group_takes_all_curvature_the_answer_is_still_a_descent(solved):
    """Remove one of only two rows, with a damping so small that A - H_g / n may be indefinite.

    The answer x must still be finite, with b . x > 0.
    """
    net, examples = tanh_net()
    few = examples.take([0, 1])
    A = GaussNewton(net, few, 0.01)
    b = np.random.default_rng(0).standard_normal((21, 1))
    got = solved(Removal(net, few, [np.array([0])], None), prepare(A, Direct()), b)
    assert np.isfinite(got).all() and b[:, 0] @ got[:, 0] > 0
