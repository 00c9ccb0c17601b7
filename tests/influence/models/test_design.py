"""Tests of Design's products against a dense X, and of each Link against finite differences."""

import numpy as np
import pytest
import scipy.sparse

from influence.examples.labels import packed
from influence.models import design
from influence.models.design import Design, Weighted
from influence.models.hinge import HingeLink
from influence.models.logistic import Sigmoid, Softmax
from tests import oracles
from tests.influence.problems import relative_error

W = np.linspace(0, 2, 9)
LINKS = {
    "softmax": (Softmax(), 4, np.arange(9) % 4),
    "sigmoid": (Sigmoid(), 1, np.arange(9) % 2),
    "sigmoid, labels between": (Sigmoid(), 1, np.linspace(0, 1, 9)[:, None]),
    "smooth hinge": (HingeLink(0.7), 1, 2 * (np.arange(9) % 2) - 1),
    "weighted softmax": (Weighted(Softmax()), 4, packed(np.arange(9) % 4, W)),
    "weighted sigmoid": (Weighted(Sigmoid()), 1, packed(np.arange(9) % 2, W)),
}


@pytest.mark.parametrize(("link", "c"), [(Softmax(), 3), (Sigmoid(), 1)])
def test_sample_weights_multiply_the_loss_of_their_row(link, c):
    Z, y = np.random.default_rng(0).standard_normal((9, c, 2)), np.arange(9) % (c + 1) % 3
    plain = link.loss(Z, y)
    np.testing.assert_array_equal(Weighted(link).loss(Z, packed(y, W)), W[:, None] * plain)
    np.testing.assert_array_equal(Weighted(link).loss(Z, y), plain)


@pytest.mark.parametrize("name", LINKS)
def test_a_links_derivatives_are_differences_of_its_loss(name):
    link, c, y = LINKS[name]
    rng = np.random.default_rng(0)
    Z, U = rng.standard_normal((9, c, 2)), rng.standard_normal((9, c, 3))
    assert link.loss(Z, y).shape == (9, 2)
    for k in range(2):  # the parameter vectors one by one
        z = Z[:, :, k : k + 1]
        np.testing.assert_allclose(link.loss(Z, y)[:, k], link.loss(z, y)[:, 0], rtol=1e-15)
        for m in range(3):
            u = U[:, :, m : m + 1]
            slope = oracles.central_difference(lambda z: link.loss(z, y), z, u, 1e-3)
            assert relative_error((link.slope(z, y) * u).sum(axis=1), slope) < 1e-9
            curved = oracles.central_difference(lambda z: link.slope(z, y), z, u, 1e-3)
            assert relative_error(link.curved(z, y, U)[:, :, m : m + 1], curved) < 1e-9
    np.testing.assert_array_equal(link.slope(Z, y)[:, :, :1], link.slope(Z[:, :, :1], y))


@pytest.mark.parametrize("name", LINKS)
def test_weights_make_the_curvature(name):
    """Compare the weights with the second derivatives S (n, c, c) of the losses by the outputs z.

    For one output the weights are S. For softmax they are minus the entries below its diagonal.
    """
    link, c, y = LINKS[name]
    Z = np.random.default_rng(1).standard_normal((9, c, 1))
    curvature = link.curved(Z, y, np.repeat(np.eye(c)[None], 9, axis=0))  # (n, c, c)
    weights = link.weights(Z, y)
    assert (weights >= 0).all()
    a, b = np.tril_indices(c, -1) if c > 1 else ([0], [0])
    np.testing.assert_allclose((-1 if c > 1 else 1) * weights, curvature[:, a, b], atol=1e-16)


def test_the_hinge_at_zero_has_half_the_slope_on_its_kink_and_no_curvature():
    link, y = HingeLink(0.0), np.array([1, -1, 1, -1])
    Z = np.array([1, -1, 0, -3.0]).reshape(4, 1, 1)
    np.testing.assert_array_equal(link.loss(Z, y)[:, 0], [0, 0, 1, 0])
    np.testing.assert_array_equal(link.slope(Z, y).ravel(), [-0.5, 0.5, -1, 0])
    np.testing.assert_array_equal(link.curved(Z, y, np.ones((4, 1, 2))), np.zeros((4, 1, 2)))
    np.testing.assert_array_equal(link.shortfall(Z, y).ravel(), [0, 0, 1, -2])


# --- products ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [np.asarray, scipy.sparse.csr_matrix])
@pytest.mark.parametrize("intercept", [False, True])
def test_products_are_those_of_a_dense_x(intercept, form):
    rng = np.random.default_rng(2)
    n, f, c = 13, 5, 3
    values = rng.poisson(0.7, (n, f)).astype(float)
    x, X = form(values), oracles.with_ones(values) if intercept else values
    made = Design(f, c, intercept, np.dtype("float64"))
    d = X.shape[1] * c
    assert made.num_parameters == d
    V, E = rng.standard_normal((d, 2)), rng.standard_normal((n, c, 2))
    W = V.reshape(-1, c, 2)
    np.testing.assert_allclose(made.times(x, V), np.einsum("nf,fck->nck", X, W), rtol=1e-13)
    np.testing.assert_allclose(made.times(x, V[:, 0])[:, :, 0], X @ W[:, :, 0], rtol=1e-13)
    back = np.einsum("nf,nck->fck", X, E).reshape(d, 2)
    np.testing.assert_allclose(made.transposed_times(x, E), back, rtol=1e-12, atol=1e-14)
    along = np.einsum("nf,nc,fcm->nm", X, E[:, :, 0], W)
    np.testing.assert_allclose(made.along(x, E[:, :, 0], V), along, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(made.gram(x), X @ X.T, rtol=1e-14)


@pytest.mark.parametrize("num_weights", [1, 12])
@pytest.mark.parametrize("own_threads", [False, True])
@pytest.mark.parametrize("form", [np.asarray, scipy.sparse.csr_matrix])
def test_weighted_grams(monkeypatch, form, own_threads, num_weights):
    monkeypatch.setattr(design, "_HESSIAN_ROWS", 4)
    monkeypatch.setattr(design, "_WORTH_THREADS", 0 if own_threads else np.inf)
    rng = np.random.default_rng(3)
    values, w = rng.standard_normal((13, 5)), rng.uniform(size=(13, num_weights))
    made = Design(5, 1, True, np.dtype("float64"))
    X = oracles.with_ones(values)
    got = made.weighted_gram(form(values), w)
    expected = np.einsum("nf,nk,ng->kfg", X, w, X)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(got, got.swapaxes(1, 2))


def test_more_than_one_vector_a_row_is_refused():
    made = Design(5, 1, False, np.dtype("float64"))
    message = r"^x must be features of shape \(n, 5\), got \(2, 5, 1\); .*net.featured\(examples\)"
    with pytest.raises(ValueError, match=message):
        made.times(np.ones((2, 5, 1)), np.ones(5))
