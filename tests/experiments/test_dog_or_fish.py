"""The kernel SVM against scikit-learn's and against its dual; distances and heads against NumPy."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special
from sklearn.metrics.pairwise import rbf_kernel

from experiments import dog_or_fish
from experiments.dog_or_fish import deep_head, kernel_svm, squared_distances
from tests import oracles

N, M = 30, 6


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (N + M, 5, 4, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def labels(images):
    y = (images[:, :, :, 0].mean(axis=(1, 2)) > 127).astype(np.int64)
    assert 0.3 < y.mean() < 0.7
    return y[:N], y[N:]


@pytest.mark.parametrize("block", [7, 1 << 13])
def test_distances_are_exact(images, block, monkeypatch):
    monkeypatch.setattr(dog_or_fish, "_PIXELS", block)
    flat = images.reshape(N + M, -1) / 127.5 - 1
    expected = ((flat[:, None] - flat[None, :N]) ** 2).sum(axis=2)
    got = squared_distances(images[:N], images)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert (np.diag(got) == 0).all()


def svm(images, labels, t, *, gamma=0.02, weight_decay=0.01):
    distance = squared_distances(images[:N], images)
    return kernel_svm(distance, *labels, gamma=gamma, t=t, weight_decay=weight_decay), distance


def test_the_linear_svms_inner_products_are_the_kernel(images, labels):
    model, _ = svm(images, labels, 0.1)
    flat = images.reshape(N + M, -1) / 127.5 - 1
    K = rbf_kernel(flat, flat[:N], gamma=0.02)
    phi = np.concatenate([model.train.x, model.test.x])
    np.testing.assert_allclose(phi @ model.train.x.T, K, atol=1e-12)
    np.testing.assert_array_equal(model.train.y, 2 * labels[0] - 1)
    np.testing.assert_array_equal(model.test.y, 2 * labels[1] - 1)


@pytest.mark.parametrize("t", [1e-3, 3.0])
def test_the_minimum_is_that_of_the_kernels_own_risk(images, labels, t):
    """In the coefficients c of z = K c: mean softplus(t) + lambda/2 c' K c."""
    model, distance = svm(images, labels, t)
    assert model.gradient_norm < 1e-10
    K, s = np.exp(-0.02 * distance[:N]), 2 * labels[0] - 1

    def risk(c):
        z = K @ c
        u = (1 - s * z) / t
        slope = -s * scipy.special.expit(u) / N + 0.01 * c
        return (t * np.logaddexp(0, u)).mean() + 0.005 * c @ z, K @ slope

    start = np.linalg.solve(model.train.x.T, model.net.theta)  # w = L' c
    value, gradient = risk(start)
    assert np.abs(gradient).max() < 1e-9
    found = scipy.optimize.minimize(risk, np.zeros(N), jac=True, method="BFGS",
                                    options={"gtol": 1e-9, "maxiter": 5000})  # fmt: skip
    assert value <= found.fun + 1e-9
    np.testing.assert_allclose(model.outputs, np.exp(-0.02 * distance[N:]) @ start, atol=1e-9)


def test_twins_have_no_kernel_features(images, labels):
    twins = images.copy()
    twins[7] = twins[3]
    with pytest.raises(ValueError, match=r"no two of which are equal, got .* \[\[7, 3\]\]"):
        svm(twins, labels, 0.1)


def test_a_head_at_its_minimum_and_its_scores():
    rng = np.random.default_rng(1)
    phi, y = rng.standard_normal((50, 4)), rng.integers(0, 2, 50)
    model = deep_head(phi, y[:40], y[40:], weight_decay=0.02)
    oracle = oracles.logistic_regression(phi[:40], y[:40], 0.02)
    theta = oracle.minimum(np.zeros(4))
    np.testing.assert_allclose(model.net.theta, theta, rtol=1e-8)
    assert model.gradient_norm < 1e-10
    points = np.array([3, 0])
    measured = oracle.on(phi[40:][points], y[40:][points])
    expected = oracle.predicted_changes(theta, measured, np.arange(40))
    np.testing.assert_allclose(model.scores(points), expected, rtol=1e-6, atol=1e-12)
    accuracies = [
        np.mean((phi[rows] @ theta > 0) == y[rows]) for rows in (slice(40), slice(40, 50))
    ]
    assert model.accuracies == pytest.approx(accuracies)
    np.testing.assert_allclose(model.outputs, phi[40:] @ theta, rtol=1e-7)


def test_scores_are_what_happens(images, labels):
    """Positive and of the right size: the SVM refitted without an image, at a mild temperature."""
    model, distance = svm(images, labels, 1.0, weight_decay=0.1)
    scores = model.scores(np.arange(M))
    keep = np.delete(np.arange(N), 4)
    again = kernel_svm(distance[np.append(keep, np.arange(N, N + M))][:, keep], labels[0][keep],
                       labels[1], gamma=0.02, t=1.0, weight_decay=0.1)  # fmt: skip
    loss = lambda z: np.logaddexp(0, 1 - model.test.y * z)  # noqa: E731
    actual = loss(again.outputs) - loss(model.outputs)
    np.testing.assert_allclose(scores[:, 4], actual, rtol=0.12, atol=1e-6)
