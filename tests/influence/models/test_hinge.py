"""Tests of the hinge models: closed forms, the tape, the SVM's minimum and its duality gap."""

from dataclasses import dataclass

import keras
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import scipy.special

from influence import (
    ConvergenceWarning,
    Direct,
    Examples,
    GenericNeuralNet,
    Influence,
    RefitOptions,
    SmoothHinge,
    leave_one_out,
)
from influence.models import SmoothHingeLoss
from tests import oracles
from tests.influence.problems import relative_error, sequential

ROUNDING = {"float64": 1e-12, "float32": 2e-5}  # the two sides add in another order
KINK = 1.5e-8  # the square root of float64's precision


@dataclass(frozen=True)
class Hinge(oracles.Risk):
    """The oracle for t log(1 + exp((1 - y z) / t)). Its exponentials cannot overflow."""

    t: float

    def _shortfall(self, theta):
        return 1 - self.y * (self.features @ theta)

    def _sigma(self, theta):
        e = np.exp(-np.abs(self._shortfall(theta)) / self.t)
        return np.where(self._shortfall(theta) > 0, 1, e) / (1 + e)

    def losses(self, theta):
        u = self._shortfall(theta)
        return np.maximum(u, 0) + self.t * np.log1p(np.exp(-np.abs(u) / self.t))

    def gradients(self, theta):
        return -(self.y * self._sigma(theta))[:, None] * self.features

    def hessians(self, theta):
        s = self._sigma(theta)
        outer = self.features[:, :, None] * self.features[:, None, :]
        return (s * (1 - s) / self.t)[:, None, None] * outer


def rows(num_rows=60, num_inputs=5, seed=0, noise=1.0):
    """Return (x, y) with labels -1 and 1. The classes are not separable."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_rows, num_inputs)) + 0.2
    z = x @ rng.standard_normal(num_inputs) + noise * rng.standard_normal(num_rows)
    return x, np.where(z > 0, 1, -1)


CASES = [(0.5, False, "float64"), (0.05, True, "float64"), (0.0, True, "float64")]
CASES += [(0.5, True, "float32"), (0.0, False, "float32")]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request):
    """Return (net, x, y, V). The net is away from its minimum, and no margin y z is near 1."""
    t, intercept, dtype = request.param
    x, y = rows(20)
    net = SmoothHinge(5, t, weight_decay=0.05, intercept=intercept, dtype=dtype)
    rng = np.random.default_rng(1)
    net.theta = rng.standard_normal(net.num_parameters)
    V = rng.standard_normal((net.num_parameters, 3)).astype(dtype)
    return net, x.astype(dtype), y, V


# --- the loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [np.asarray, scipy.sparse.csr_matrix])
def test_closed_forms_are_those_of_numpy(case, form):
    net, x, y, V = case
    A = (oracles.with_ones(x) if net.intercept else x).astype(float)
    theta = net.theta.astype(float)
    # Away from the kink, the smooth hinge with t = 1e-9 equals the hinge.
    oracle = Hinge(A, y, 0.05, net.t or 1e-9)
    assert np.abs(1 - y * (A @ theta)).min() > 1e-3
    each, data = oracle.gradients(theta), oracle.hessian(theta) - 0.05 * np.eye(len(theta))
    assert (data == 0).all() == (net.t == 0)
    given = form(x)
    for name, got, wanted in (
        ("losses", net.losses(given, y), oracle.losses(theta)),
        ("gradients", net.gradients(given, y), each),
        ("gradient", net.gradient(given, y), each.mean(axis=0)),
        ("directional", net.directional(given, y, V), each @ V),
        ("hvp", net.hvp(given, y, V) + 0.05 * V, oracle.hessian(theta) @ V),
        ("hessian", net.hessian(Examples(given, y)), oracle.hessian(theta)),
    ):
        assert relative_error(got, wanted) < ROUNDING[net.dtype.name], name
        assert got.dtype == net.dtype, name


@pytest.mark.parametrize("case", CASES[1:4], indirect=True, ids=str)
def test_closed_forms_are_the_tapes_answers(case):
    net, x, y, V = case
    batches = np.array([[0, 3], [4, 4]])
    for name, arguments in {
        "losses": (x, y),
        "gradient": (x, y),
        "gradients": (x, y),
        "hvp": (x, y, V),
        "hvp of each": ("hvp", x[batches], y[batches], np.stack([V[:, :2], V[:, 1:]])),
        "directional": (x, y, V),
        "input_gradient": (x, y, V[:, 0]),
    }.items():
        method = "each_batch" if name.endswith("each") else name
        closed = getattr(net, method)(*arguments)
        taped = getattr(GenericNeuralNet, method)(net, *arguments)
        assert closed.dtype == taped.dtype == net.dtype, name
        if not name.startswith("hvp"):
            assert relative_error(closed, taped) < ROUNDING[net.dtype.name], name
        elif net.t == 0:
            assert (closed == 0).all() and (taped == 0).all()
        else:
            # The curvature is sigma (1 - sigma) / t. The tape loses digits where sigma is nearly 1,
            # so the error is compared with 1 / t.
            np.testing.assert_allclose(closed, taped, atol=ROUNDING[net.dtype.name] / net.t)


@pytest.mark.parametrize("asked", [SmoothHinge, GenericNeuralNet])
@pytest.mark.parametrize("t", [1e-30, 1e-5, 1e-3, 0.1, 0.0])
def test_stable_at_any_margin_and_down_to_t_zero(asked, t):
    margins = np.array([-1e8, -3.0, 0.999, 1.5, 1e8])
    net, x, y = SmoothHinge(1, t), margins[:, None], np.ones(5)
    net.theta = np.ones(1)
    u = 1 - margins
    e = np.exp(-np.abs(u) / (t or 1e-30))
    losses = np.maximum(u, 0) + t * np.log1p(e)
    sigma = np.where(u > 0, 1, e) / (1 + e)
    with np.errstate(all="raise", under="ignore"):
        got = asked.losses(net, x, y)
        slopes = asked.gradients(net, x, y)[:, 0] / margins
        each = asked.each_batch(net, "hvp", x[:, None], y[:, None], np.ones((5, 1, 1)))
    np.testing.assert_allclose(got, losses, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(slopes, -sigma, rtol=1e-12, atol=1e-300)
    curvature = e / (1 + e) ** 2 / t if t else 0 * e
    # The closed form keeps all digits. The tape computes sigma (1 - sigma) / t with a rounding
    # error of about 1e-16 / t, however small the value is.
    rounding = 1e-300 if asked is SmoothHinge else 1e-16 / (t or 1)
    np.testing.assert_allclose(each[:, 0, 0] / margins**2, curvature, rtol=1e-9, atol=rounding)
    # Smoothing raises a loss by at most t log 2.
    assert np.abs(got - np.maximum(u, 0)).max() <= t * np.log(2)


@pytest.mark.parametrize("asked", [SmoothHinge, GenericNeuralNet])
def test_rows_on_the_kink_get_half_the_slope(asked):
    u = np.array([0, 1e-9, -1e-9, 1e-7, -1e-7])
    net, x, y = SmoothHinge(1), (1 - u)[:, None], np.ones(5)
    net.theta = np.ones(1)
    np.testing.assert_allclose(asked.losses(net, x, y), np.maximum(u, 0), atol=1e-16)
    slopes = asked.gradients(net, x, y)[:, 0] / (1 - u)
    np.testing.assert_allclose(slopes, [-0.5, -0.5, -0.5, -1, 0], rtol=1e-12)
    # At the margin 1 the smooth hinge has the slope -1/2 for every t, so this is also its limit for
    # t -> 0.
    smooth = SmoothHinge(1, 1e-3)
    smooth.theta = np.ones(1)
    assert asked.gradients(smooth, x[:1], y[:1]).item() == -0.5


def test_loss_travels_through_keras(tmp_path):
    x, y = rows()
    f8 = {"dtype": "float64"}
    model = sequential((5,), keras.layers.Dense(1, **f8), **f8)
    model.compile(loss=SmoothHingeLoss(0.25, reduction="sum_over_batch_size"))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert type(again.loss) is SmoothHingeLoss
    assert again.loss.get_config() == model.loss.get_config()
    assert again.loss.t == 0.25 and again.loss.name == "smooth_hinge_0.25"
    net = GenericNeuralNet(again)
    theta = net.theta
    expected = Hinge(oracles.with_ones(x), y, 0, 0.25).losses(theta)
    np.testing.assert_allclose(net.losses(x, y), expected, rtol=1e-12)
    for shape in ((-1,), (-1, 1)):
        evaluated = again.evaluate(x, y.reshape(shape), verbose=0)
        assert evaluated == pytest.approx(expected.mean(), rel=1e-6)  # Keras averages in float32


@pytest.mark.parametrize("t", [-0.1, 1e-31, np.inf, np.nan])
@pytest.mark.parametrize("make", [SmoothHingeLoss, lambda t: SmoothHinge(2, t)])
def test_temperature_is_checked(make, t):
    with pytest.raises(ValueError, match=f"t must be 0 or at least 1e-30, got {t}"):
        make(t)


def test_svm_needs_a_penalty():
    with pytest.raises(ValueError, match="weight_decay must be positive at t = 0, got 0"):
        SmoothHinge(2, weight_decay=0)
    assert SmoothHinge(2, 0.1, weight_decay=0).weight_decay == 0


@pytest.mark.parametrize(
    ("labels", "wrong"), [([0, 1, 1], "0 in row 0"), ([1, -1, 2], "2 in row 2")]
)
def test_labels_other_than_signs_are_refused(labels, wrong):
    examples = Examples(np.ones((3, 2)), np.array(labels))
    for t in (0, 0.1):
        with pytest.raises(ValueError, match=f"examples.y must hold labels -1 or 1, got {wrong}"):
            SmoothHinge(2, t).fit(examples)
    # Here the loss, not the net, checks labels.
    net = GenericNeuralNet(SmoothHinge(2).model, SmoothHingeLoss(0.1))
    with pytest.raises(ValueError, match="train.y must hold labels -1 or 1"):
        net.validate(examples, "train")


def test_fit_at_a_positive_temperature():
    x, y = rows()
    net = SmoothHinge(5, 0.1, weight_decay=0.05).fit(Examples(x, y), gradient_tolerance=1e-10)
    oracle = Hinge(x, y, 0.05, 0.1)
    assert np.linalg.norm(oracle.gradient(net.theta)) < 1e-10
    norm = np.linalg.norm(oracle.gradient(np.ones(5)))
    net.theta = np.ones(5)
    assert net.gradient_norm(Examples(x, y)) == pytest.approx(norm, rel=1e-12)
    assert net.gradient_norm(Examples(x, y), batch_size=7) == pytest.approx(norm, rel=1e-12)
    with pytest.raises(ValueError, match=r"t must be 0 for a duality gap, got 0\.1"):
        net.duality_gap(Examples(x, y))


# --- the SVM ---------------------------------------------------------------------------------


def svm_by_slsqp(A, y, weight_decay):
    """Find the SVM's minimum by SLSQP over w and slacks s >= 0, with y x w >= 1 - s."""
    n, d = A.shape
    B = np.hstack([y[:, None] * A, np.eye(n)])
    lowest = scipy.optimize.minimize(
        lambda v: v[d:].mean() + weight_decay / 2 * v[:d] @ v[:d],
        np.append(np.zeros(d), np.ones(n)),
        jac=lambda v: np.append(weight_decay * v[:d], np.full(n, 1 / n)),
        bounds=[(None, None)] * d + [(0, None)] * n,
        constraints={"type": "ineq", "fun": lambda v: B @ v - 1, "jac": lambda v: B},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return lowest.x[:d]


def steepest_descent(A, y, theta, weight_decay):
    """Return the smallest derivative of the risk at theta, over 4,000 and more unit directions.

    For a row on the kink, this is the one-sided derivative. At a minimum, the result is >= 0.
    """
    u = 1 - y * (A @ theta)
    slopes = -y[:, None] * A
    on = np.abs(u) <= KINK
    rng = np.random.default_rng(0)
    D = rng.standard_normal((A.shape[1], 4000))
    D = np.hstack([D, slopes[on].T, -slopes[on].T, theta[:, None]])
    D /= np.linalg.norm(D, axis=0)
    rates = slopes[u > KINK].sum(axis=0) @ D + np.maximum(slopes[on] @ D, 0).sum(axis=0)
    return (rates / len(y) + weight_decay * theta @ D).min()


SVMS = {
    "tall": ({}, 0.05, False),
    "penalised hard": ({}, 2.0, False),
    "intercept": ({}, 0.01, True),
    "wide": ({"num_rows": 12, "num_inputs": 30}, 0.05, False),
    "separable": ({"noise": 0.0}, 1e-3, True),
}


@pytest.mark.parametrize("name", SVMS)
@pytest.mark.parametrize("form", [np.asarray, scipy.sparse.csr_matrix])
def test_fit_at_zero_is_the_svm(name, form):
    options, weight_decay, intercept = SVMS[name]
    x, y = rows(**options)
    A = oracles.with_ones(x) if intercept else x
    train = Examples(form(x), y)
    net = SmoothHinge(x.shape[1], weight_decay=weight_decay, intercept=intercept)
    assert net.fit(train) is net
    risk = lambda w: np.maximum(0, 1 - y * (A @ w)).mean() + weight_decay / 2 * w @ w  # noqa: E731
    general = svm_by_slsqp(A, y, weight_decay)
    assert risk(net.theta) <= risk(general) + 1e-14
    assert relative_error(net.theta, general) < 1e-5  # the accuracy that SLSQP reaches
    assert steepest_descent(A, y, net.theta, weight_decay) > -1e-8
    assert net.gradient_norm(train) <= 1e-8
    gap = net.gradient_norm(train) ** 2 / (2 * weight_decay)
    assert net.duality_gap(train) == pytest.approx(gap, rel=1e-12)


def test_fit_at_zero_of_repeated_rows():
    # Each row occurs three times. The dual problem then has many solutions, and the rows on the
    # kink have a singular Gram matrix.
    x, y = rows(30)
    once = SmoothHinge(5, weight_decay=0.05).fit(Examples(x, y))
    thrice = SmoothHinge(5, weight_decay=0.05)
    thrice.fit(Examples(np.tile(x, (3, 1)), np.tile(y, 3)))
    assert relative_error(thrice.theta, once.theta) < 1e-7


@pytest.mark.parametrize("seed", range(5))
def test_fit_at_zero_does_not_depend_on_where_it_begins(seed):
    x, y = rows(200, 10)
    train = Examples(x, y)
    net = SmoothHinge(10, weight_decay=0.01).fit(train)
    found = net.theta
    rng = np.random.default_rng(seed)
    net.theta = found + 10.0 ** (-2 * seed) * rng.standard_normal(10)
    net.fit(train)
    # Each of the two fits is within 1e-6 of the minimum w*: |w - w*| <= (gradient norm) / lambda,
    # and the fit stops at a gradient norm of 1e-8, with lambda = 0.01.
    assert np.linalg.norm(net.theta - found) <= 2e-6


def test_minimum_in_closed_form():
    # For one row x = 1, y = 1, the risk max(0, 1 - w) + lambda w^2 / 2 has its minimum at w =
    # min(1, 1 / lambda). Both fits start at this minimum. Other fits would start with LinearSVC,
    # which needs rows of both labels.
    train = Examples(np.ones((1, 1)), np.ones(1))
    for weight_decay, lowest in ((0.25, 1.0), (4.0, 0.25)):
        net = SmoothHinge(1, weight_decay=weight_decay)
        net.theta = np.array([lowest])
        assert net.gradient_norm(train) < 1e-8
        assert net.fit(train).theta == pytest.approx([lowest], rel=1e-15)
    # At w = 0.5 the row's dual variable is a = 1, to which w(a) = 1 / lambda belongs. The duality
    # gap is then lambda/2 (w - 1/lambda)^2, with lambda = 4.
    net.theta = np.array([0.5])
    assert net.duality_gap(train) == pytest.approx(2 * (0.5 - 0.25) ** 2, rel=1e-14)


@pytest.mark.parametrize("distance", [1e-6, 1e-3, 1.0])
def test_gap_bounds_risk_and_distance(distance):
    x, y = rows()
    train = Examples(x, y)
    net = SmoothHinge(5, weight_decay=0.05).fit(train)
    lowest, theta = net.risk(train), net.theta
    rng = np.random.default_rng(2)
    for _ in range(20):
        step = rng.standard_normal(5)
        net.theta = theta + distance * step / np.linalg.norm(step)
        gap = net.duality_gap(train)
        assert gap >= net.risk(train) - lowest - 1e-15
        assert net.gradient_norm(train) / 0.05 >= distance
        assert net.gradient_norm(train) == pytest.approx(np.sqrt(2 * 0.05 * gap), rel=1e-12)


def test_a_minimum_that_rounding_hides_is_reported():
    x, y = rows()
    train = Examples(x, y)
    net = SmoothHinge(5, weight_decay=0.05)
    with pytest.warns(ConvergenceWarning, match=r"duality gap worth .* above 1\.0e-30"):
        net.fit(train, gradient_tolerance=1e-30)
    assert 1e-30 < net.gradient_norm(train) < 1e-8
    with pytest.warns(ConvergenceWarning, match="more iterations"):
        SmoothHinge(5, weight_decay=0.05).fit(train, max_iterations=1)


def test_one_label_alone_is_refused_where_linear_svc_is_needed():
    x, _ = rows()
    with pytest.raises(ValueError, match=r"examples\.y must hold both -1 and 1, got only 1"):
        SmoothHinge(5).fit(Examples(x, np.ones(60, int)))


# --- removing rows ---------------------------------------------------------------------------


def test_leave_one_out_of_the_svm():
    x, y = rows()
    train, test = Examples(x, y), Examples(*rows(7, seed=3))
    net = SmoothHinge(5, weight_decay=0.05).fit(train)
    assert not net.convex  # therefore refits call `net.fit`
    removed = [0, 7, 33]
    refits = leave_one_out(net, train, test, removed, RefitOptions(tolerance=1e-8))
    assert refits.converged.all() and refits.gradient_norm.max() <= 1e-8
    before = np.maximum(0, 1 - test.y * (test.x @ net.theta))
    for k, row in enumerate(removed):
        A, b = np.delete(x, row, axis=0), np.delete(y, row)
        after = np.maximum(0, 1 - test.y * (test.x @ svm_by_slsqp(A, b, 0.05)))
        np.testing.assert_allclose(refits[:, k], after - before, atol=1e-5)
    assert np.abs(refits.change_if_removed).max() > 1e-3


def test_a_refit_that_does_nothing_is_found_out():
    x, y = rows()
    train = Examples(x, y)
    net = SmoothHinge(5, weight_decay=0.05).fit(train)
    with pytest.warns(ConvergenceWarning, match="1 of 1 refits"):
        options = RefitOptions(tolerance=1e-8, fit=lambda net, remaining: None)
        refits = leave_one_out(net, train, train.take([0]), [7], options)
    moved = svm_by_slsqp(np.delete(x, 7, axis=0), np.delete(y, 7), 0.05) - net.theta
    assert refits.gradient_norm[0] >= 0.05 * np.linalg.norm(moved) > 1e-4


def test_influence_of_a_smooth_hinge_is_the_refits():
    x, y = rows(300)
    train, test = Examples(x, y), Examples(*rows(7, seed=3))
    net = SmoothHinge(5, 0.5, weight_decay=0.05).fit(train, gradient_tolerance=1e-10)
    assert net.convex
    predicted = Influence(net, train, solver=Direct()).scores(test)
    oracle = Hinge(x, y, 0.05, 0.5)
    wanted = oracle.predicted_changes(net.theta, oracle.on(test.x, test.y), np.arange(300))
    assert relative_error(predicted.change_if_removed, wanted) < 1e-10
    options = RefitOptions(method="newton", tolerance=1e-10)
    actual = leave_one_out(net, train, test, [3, 50], options)
    # The relative error of first order is about a row's weight, 1 / 300.
    assert relative_error(predicted[:, [3, 50]], actual.change_if_removed) < 0.03
