"""Tests of the logistic models' closed forms against NumPy and against the tape."""

import keras
import numpy as np
import pytest
import scipy.sparse

from influence import (
    BinaryLogisticRegression,
    ConvergenceWarning,
    Direct,
    DivergenceError,
    Examples,
    GenericNeuralNet,
    Hessian,
    Influence,
    MulticlassLogisticRegression,
    leave_one_out,
)
from influence.models.design import Design
from influence.net.questions import PerRow, Total
from tests import oracles
from tests.influence.problems import logistic, relative_error

KINDS = ["softmax", "sigmoid"]
LOSSES = {
    "softmax": keras.losses.SparseCategoricalCrossentropy,
    "sigmoid": keras.losses.BinaryCrossentropy,
}
# Both sides differ only by the order of additions.
ROUNDING = {"float64": 1e-12, "float32": 2e-5}


def label(case):
    kind, intercept, dtype = case
    return f"{kind}-{'intercept' if intercept else 'plain'}-{dtype}"


@pytest.fixture(
    scope="module",
    params=[(k, i, d) for k in KINDS for i in (False, True) for d in ("float64", "float32")],
    ids=label,
)
def case(request):
    """Return (problem, tolerance, V (d, 3), thetas (d, 3)), with the net away from its minimum."""
    kind, intercept, dtype = request.param
    p = logistic(kind, 20, intercept=intercept, dtype=dtype)
    rng = np.random.default_rng(1)
    p.net.theta = p.theta + 0.3 * rng.standard_normal(p.net.num_parameters)
    V = rng.standard_normal((p.net.num_parameters, 3)).astype(dtype)
    return p, ROUNDING[dtype], V, p.theta[:, None] + V


FORMATS = {"dense": np.asarray, "sparse": scipy.sparse.csr_matrix}


@pytest.mark.parametrize("form", FORMATS)
def test_closed_forms_are_those_of_numpy(case, form):
    p, tolerance, V, thetas = case
    net, oracle, y = p.net, p.oracle, p.train.y
    theta, x = p.theta.astype(np.float64), FORMATS[form](p.train.x)
    at = np.asarray(thetas, np.float64).T
    data = oracle.hessian(theta) - p.net.weight_decay * np.eye(len(theta))
    each = oracle.gradients(theta)
    means = np.stack([oracle.gradients(t).mean(axis=0) for t in at], axis=1)
    inputs = oracle.input_gradients(theta, V[:, 0].astype(float), 5)
    expected = {
        "losses": (net.losses(x, y), oracle.losses(theta)),
        "losses at": (net.losses(x, y, thetas), np.stack([oracle.losses(t) for t in at], 1)),
        "gradients": (net.gradients(x, y), each),
        # Outputs are linear in theta. The gradient of the Bregman divergence is then the gradient
        # at the given theta minus that at the net's theta.
        "bregman": (net.bregman_gradient(x, y, thetas), means - each.mean(axis=0)[:, None]),
        "gradient": (net.gradient(x, y), each.mean(axis=0)),
        "gradient at": (net.gradient(x, y, thetas), means),
        "loss and gradient": (net.loss_and_gradient(x, y)[1], each.mean(axis=0)),
        "hvp": (net.hvp(x, y, V), data @ V),
        "hvp of a vector": (net.hvp(x, y, V[:, 0]), data @ V[:, 0]),
        "directional": (net.directional(x, y, V), each @ V),
        "directional of a vector": (net.directional(x, y, V[:, 0]), each @ V[:, 0]),
        "input gradient": (net.input_gradient(x, y, V[:, 0]), inputs),
        "hessian": (net.hessian(Examples(x, y)), oracle.hessian(theta)),
        "penalty gradient": (net.penalty_gradient(), net.weight_decay * theta),
        "penalty gradient at": (net.penalty_gradient(thetas), net.weight_decay * thetas),
        "penalty hvp": (net.penalty_hvp(V), net.weight_decay * V),
        "risk gradient": (net.risk_gradient(Examples(x, y)), oracle.gradient(theta)),
        "risk": (np.array([net.risk(Examples(x, y))]), np.array([oracle.value(theta)])),
    }
    for name, (got, wanted) in expected.items():
        assert relative_error(got, wanted) < tolerance, name
        assert got.dtype == net.dtype or name == "risk", name
    assert net.loss_and_gradient(x, y)[0] == pytest.approx(oracle.losses(theta).mean(), rel=1e-5)
    assert net.penalty() == pytest.approx(net.weight_decay / 2 * theta @ theta, rel=1e-6)


@pytest.mark.parametrize(
    "case", [("softmax", True, "float64"), ("sigmoid", False, "float64")], indirect=True, ids=label
)
def test_closed_forms_are_the_tapes_answers(case):
    """Compare with the base class, which differentiates the Keras model by the tape.

    The test above compares the other two kinds of models, and float32, with NumPy.
    """
    p, tolerance, V, thetas = case
    net, x, y = p.net, p.train.x, p.train.y
    rows = np.array([[0, 3], [4, 4]])
    W = np.stack([V[:, :2], V[:, 1:]])
    for name, arguments in {
        "outputs": (x,),
        "losses": (x, y),
        "losses at": (x, y, thetas),
        "gradient": (x, y),
        "gradient at": (x, y, thetas),
        "gradients": (x, y),
        "hvp": (x, y, V),
        "hvp of each": ("hvp", x[rows], y[rows], W),
        "gauss_newton of each": ("gauss_newton", x[rows], y[rows], W),
        "gradient of each": ("gradient", x[rows], y[rows], thetas.T[1:, :, None]),
        "bregman_gradient": (x, y, thetas),
        "directional": (x, y, V),
        "input_gradient": (x, y, V[:, 0]),
        "gauss_newton_product": (x, y, V),
        "penalty_gradient": (),
        "penalty_hvp": (V,),
    }.items():
        method = "each_batch" if name.endswith("each") else name.removesuffix(" at")
        closed = getattr(net, method)(*arguments)
        taped = getattr(GenericNeuralNet, method)(net, *arguments)
        assert closed.dtype == taped.dtype == net.dtype, name
        assert relative_error(closed, taped) < tolerance, name
        # Each method has a closed form of its own, except gauss_newton_product, which is hvp.
        if name != "gauss_newton_product":
            assert method in vars(type(net).__mro__[1]) or method in vars(type(net)), name
    assert net.penalty() == pytest.approx(GenericNeuralNet.penalty(net), rel=1e-6)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_cached_for_a_theta_and_change_no_bit(kind, form, monkeypatch):
    p = logistic(kind, 70)
    net, examples = p.net, Examples(FORMATS[form](p.train.x), p.train.y)
    rng = np.random.default_rng(2)
    V, other = rng.standard_normal((net.num_parameters, 2)), p.theta + 1
    asked, times = [], Design.times
    monkeypatch.setattr(
        Design, "times", lambda *arguments: asked.append(arguments) or times(*arguments)
    )
    for theta in (None, other, None):
        view = net.at(theta)
        for method in ("hvp", "directional", "gauss_newton_product", "bregman_gradient"):
            ask = examples.each_row if method == "directional" else examples.sum_over
            question = (PerRow if method == "directional" else Total)(method, V)
            expected = question(view, None, examples.x, examples.y)  # this call uses no cache
            asked.clear()
            np.testing.assert_array_equal(ask(question, net, theta), expected)
            # `asked` counts products with X. There is one to compute X theta, and hvp has another
            # one, X V.
            assert len(asked) == (2 if method == "hvp" else 1)
            np.testing.assert_array_equal(ask(question, net, theta), expected)


def test_the_dense_hessian_is_the_operators(case):
    p, tolerance, *_ = case
    A = Hessian(p.net, p.train, 0.3)
    products = A @ np.eye(len(p.theta), dtype=p.net.dtype)
    assert relative_error(A.dense(), products) < tolerance
    by_rows = p.net.hessian(p.train.take(np.r_[3:20, 0:3]))
    assert relative_error(by_rows, p.net.hessian(p.train)) < tolerance


def test_more_rows_than_a_block_of_the_hessian():
    p = logistic("softmax", num_rows=2500, num_inputs=3)
    assert relative_error(p.net.hessian(p.train), p.oracle.hessian(p.theta)) < 1e-12


def test_logits_far_from_zero_neither_overflow_nor_cancel():
    x, y = np.array([[1.0], [1.0], [-1.0]]), np.array([0, 1, 1])
    binary = BinaryLogisticRegression(1)
    binary.theta = np.array([800.0])
    np.testing.assert_allclose(binary.losses(x, y), [800, 0, 800], atol=1e-300)
    np.testing.assert_allclose(binary.gradients(x, y)[:, 0], [1, 0, 1])
    multi = MulticlassLogisticRegression(1, 2)
    multi.theta = np.array([-400.0, 400.0])
    np.testing.assert_allclose(multi.losses(x, y), [800, 0, 800], atol=1e-300)
    np.testing.assert_allclose(multi.gradients(x, y), [[-1, 1], [0, 0], [-1, 1]], atol=1e-300)
    small = np.array([[1e-9]])
    binary.theta = np.array([1.0])
    got = binary.losses(small, np.array([1]))[0]
    assert got == pytest.approx(np.log(2) - 5e-10, rel=1e-15)


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float64, bool])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_of_any_kind(kind, dtype, shape):
    p = logistic(kind, 20)
    y = np.minimum(p.train.y, 1)
    other = y.astype(dtype).reshape(shape)
    for question in (p.net.losses, p.net.gradients):
        np.testing.assert_array_equal(question(p.train.x, other), question(p.train.x, y))
    p.net.validate(Examples(p.train.x, other), "train")


def test_labels_between_classes_for_the_sigmoid():
    net = BinaryLogisticRegression(2)
    net.theta = np.array([0.5, -1.0])
    x, y = np.array([[1.0, 2.0]]), np.array([0.25])
    z = x @ net.theta
    expected = 0.25 * np.logaddexp(0, -z) + 0.75 * np.logaddexp(0, z)
    np.testing.assert_allclose(net.losses(x, y), expected, rtol=1e-15)
    np.testing.assert_allclose(GenericNeuralNet.losses(net, x, y), expected, rtol=1e-12)


# --- fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_fit_reaches_the_minimum(kind, intercept, form):
    p = logistic(kind, intercept=intercept)
    expected = p.theta
    p.net.theta = np.zeros_like(expected)
    examples = Examples(FORMATS[form](p.train.x), p.train.y)
    assert p.net.fit(examples) is p.net
    assert np.linalg.norm(p.oracle.gradient(p.theta)) <= 1e-10
    # |theta - minimum| <= |gradient| / smallest eigenvalue. This eigenvalue is at least the weight
    # decay, 0.05.
    assert np.linalg.norm(p.theta - expected) <= 1e-10 / 0.05


def test_fit_in_float32_says_how_far_it_came():
    p = logistic("softmax", dtype="float32")
    p.net.theta = np.zeros(p.net.num_parameters)
    p.net.fit(p.train, gradient_tolerance=1e-5)
    assert np.linalg.norm(p.oracle.gradient(p.theta.astype(float))) < 1.5e-5
    message = r"^Newton's steps stopped at .* above 1\.0e-12: .*use float64 or a larger tolerance"
    with pytest.warns(ConvergenceWarning, match=message):
        p.net.fit(p.train, gradient_tolerance=1e-12)


def test_fit_says_when_it_stops_early():
    p = logistic("softmax")
    p.net.theta = np.zeros(p.net.num_parameters)
    with pytest.warns(ConvergenceWarning, match=r"Newton's steps stopped .* allow more"):
        p.net.fit(p.train, max_iterations=1)


def test_fit_is_deterministic_and_starts_where_the_net_is():
    p = logistic("sigmoid")
    starts = [np.zeros(5), np.full(5, 10.0)]
    found = []
    for start in (*starts, starts[0]):
        p.net.theta = start
        p.net.fit(p.train)
        found.append(p.theta)
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_allclose(found[0], found[1], atol=1e-8)


def test_fit_without_a_penalty():
    """Check that the fit converges without a penalty, although the softmax risk is then flat.

    It does not change along one direction of theta.
    """
    p = logistic("softmax", num_rows=200, num_inputs=2)
    free = MulticlassLogisticRegression(2, 3, weight_decay=0.0).fit(p.train)
    oracle = oracles.softmax_regression(p.oracle.features, p.oracle.y, 3, 0.0)
    assert np.linalg.norm(oracle.gradient(free.theta)) <= 1e-10


# --- one Newton step ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_one_step_is_newtons_on_the_risk_without_the_row(kind, intercept, form):
    p = logistic(kind, intercept=intercept)
    rows = [4, 0, 33]
    examples = Examples(FORMATS[form](p.train.x), p.train.y)
    for shift in (0.0, 0.1):  # at the minimum, then away from it
        p.net.theta = p.theta + shift
        got = p.net.one_step_leave_one_out(examples, rows)
        expected = []
        for row in rows:
            left = p.oracle.without([row])
            step = np.linalg.solve(left.hessian(p.theta), left.gradient(p.theta))
            expected.append(p.theta - step)
        assert relative_error(got, np.stack(expected)) < 1e-12


def test_one_step_is_nearer_to_the_refit_than_first_order():
    p = logistic("sigmoid", num_rows=30)
    rows = np.arange(30)
    actual = p.oracle.actual_parameters(p.theta, rows)
    first_order = p.oracle.predicted_parameters(p.theta, rows)
    one_step = p.net.one_step_leave_one_out(p.train, rows) - p.theta
    errors = [np.linalg.norm(e - actual) for e in (one_step, first_order)]
    assert errors[0] < errors[1] / 3
    with pytest.raises(IndexError, match=r"^rows must lie in \[0, 30\), got 30"):
        p.net.one_step_leave_one_out(p.train, [30])


# --- arguments that are refused ----------------------------------------------------------------

DECAY = "^weight_decay must be non-negative"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MulticlassLogisticRegression(0, 3), "^num_features must be at least 1, got 0"),
        (lambda: BinaryLogisticRegression(-1), "^num_features must be at least 1, got -1"),
        (lambda: MulticlassLogisticRegression(2, 1), "^num_classes must be at least 2, got 1"),
        (lambda: BinaryLogisticRegression(2, weight_decay=-0.1), rf"{DECAY}, got -0\.1"),
        (lambda: MulticlassLogisticRegression(2, 3, weight_decay=np.nan), f"{DECAY}, got nan"),
    ],
)
def test_bad_hyperparameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_sets_and_vectors():
    binary, multi = BinaryLogisticRegression(2), MulticlassLogisticRegression(2, 3)
    x = np.ones((4, 2))
    for net, y, message in (
        (binary, [0, 1, 2, 0], r"^examples\.y must hold labels in \[0, 1\], got 2 in row 2"),
        (binary, [0, -1, 1, 0], r"^examples\.y must hold labels in \[0, 1\], got -1 in row 1"),
        (multi, [0, 1, 2, 3], r"^examples\.y must hold class numbers 0 to 2, got 3 in row 3"),
        (multi, [0, 0.5, 2, 1], r"^examples\.y must hold class numbers, got 0\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            net.fit(Examples(x, y))
    with pytest.raises(ValueError, match=r"^examples\.x must have rows of shape \(2,\)"):
        binary.fit(Examples(np.ones((4, 3)), [0, 1, 1, 0]))
    for V in (np.ones(3), np.ones((2, 1, 1))):
        with pytest.raises(ValueError, match=r"^V must have shape \(2,\) or \(2, m\), got"):
            binary.hvp(x, np.zeros(4), V)
    with pytest.raises(ValueError, match=r"^v must have shape \(2,\), got \(2, 2\)"):
        binary.input_gradient(x, np.zeros(4), np.ones((2, 2)))
    with pytest.raises(TypeError, match="^x must be floating to be differentiated, got int64"):
        binary.input_gradient(x.astype(int), np.zeros(4), np.ones(2))


def test_a_risk_that_is_not_finite_is_named():
    net = BinaryLogisticRegression(1)
    net.theta = np.array([1e200])
    message = "^the risk must stay finite, got"
    with np.errstate(all="ignore"), pytest.raises(DivergenceError, match=message):
        net.fit(Examples(np.array([[1e200], [-1e200]]), [1, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_sample_weights_count_as_the_tape_says_and_as_repeated_rows(kind):
    p = logistic(kind, 20)
    net, n = p.net, len(p.train)
    rng = np.random.default_rng(2)
    weights, V = rng.integers(0, 4, n), rng.standard_normal((net.num_parameters, 2))
    weighted = Examples(p.train.x, p.train.y, weights)
    net.theta = p.theta + 0.3 * V[:, 0]
    tape = GenericNeuralNet(net.model, LOSSES[kind](from_logits=True))
    for question in (
        lambda net: net.losses(weighted.x, weighted.y),
        lambda net: net.risk_gradient(weighted),
        lambda net: net.hvp(weighted.x, weighted.y, V),
        lambda net: net.directional(weighted.x, weighted.y, V),
        lambda net: net.output_terms(weighted.x, weighted.y)[2],
    ):
        assert relative_error(question(net), question(tape)) < 1e-10
    product = net.hvp(weighted.x, weighted.y, V) + net.penalty_hvp(V)
    assert relative_error(net.hessian(weighted) @ V, product) < 1e-12
    # A row of weight 2 counts as two rows. The weighted risk divides by n. Over the N repeated rows
    # the mean divides by N, so the weight decay must be multiplied by n / N.
    rows = np.repeat(np.arange(n), weights)
    make = type(net)
    classes = () if kind == "sigmoid" else (net.num_outputs,)
    again = make(net.num_features, *classes, weight_decay=net.weight_decay * n / len(rows),
                 intercept=net.intercept)  # fmt: skip
    again.fit(Examples(p.train.x[rows], p.train.y[rows]))
    net.fit(weighted)
    assert relative_error(net.theta, again.theta) < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_scores_and_refits_with_sample_weights_are_those_of_the_tape(kind):
    p = logistic(kind, 20)
    net, rows = p.net, [0, 3, 8]
    weights = np.random.default_rng(2).integers(1, 4, len(p.train))
    weighted = Examples(p.train.x, p.train.y, weights)
    net.fit(weighted)
    test = Examples(p.train.x[:5] + 0.1, p.train.y[:5])
    tape = GenericNeuralNet(net.model, LOSSES[kind](from_logits=True))
    how = {"solver": Direct(), "damping": 0.0, "curvature": Hessian}
    for approximation in ("first_order", "one_step"):
        one, other = (
            np.asarray(Influence(each, weighted, approximation=approximation, **how).scores(test))
            for each in (net, tape)
        )
        assert relative_error(one, other) < 1e-6
    own, other = (Influence(each, weighted, **how).self_influence() for each in (net, tape))
    assert relative_error(own, other) < 1e-6
    found = leave_one_out(net, weighted, test, rows)
    assert found.converged.all()
    before, theta = net.losses(test.x, test.y), net.theta
    for j, row in enumerate(rows):
        net.fit(weighted.without([row]))
        after = net.losses(test.x, test.y)
        np.testing.assert_allclose(found.change_if_removed[:, j], after - before, rtol=1e-4)
        net.theta = theta
