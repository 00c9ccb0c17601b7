"""Tests of one Newton step without a row, against dense algebra in NumPy and exact refits."""

import keras
import numpy as np
import pytest
import scipy.special
import tensorflow as tf
from sklearn.datasets import load_diabetes, load_digits

import data
from influence import (
    CG,
    EKFAC,
    BinaryLogisticRegression,
    Direct,
    DivergenceError,
    Examples,
    GaussNewton,
    GenericNeuralNet,
    Hessian,
    Influence,
    MulticlassLogisticRegression,
    Stream,
    leave_group_out,
    leave_one_out,
    leave_one_out_outputs,
)
from influence.net import measurements

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(scope="module")
def digits():
    """Return 200 images of digits, 12 of them with wrong labels, and 6 test images."""
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(y))
    x, y = x[order] / 16, y[order]
    wrong = rng.choice(200, 12, replace=False)
    train = y[:200].copy()
    train[wrong] = (train[wrong] + 3) % 10
    return Examples(x[:200], train), Examples(x[1000:1006], y[1000:1006]), wrong


def softmax_step(x, y, theta, decay, removed):
    """Take one Newton step on the mean softmax loss without some rows, in plain NumPy.

    Returns: the new theta (f, c). The penalty is decay / 2 |theta|^2.
    """
    (n, f), c = x.shape, theta.shape[1]
    kept = np.setdiff1d(np.arange(n), removed)
    p = scipy.special.softmax(x @ theta, axis=1)
    slopes = p - np.eye(c)[y]
    gradient = x[kept].T @ slopes[kept] / len(kept) + decay * theta
    S = p[:, :, None] * np.eye(c) - p[:, :, None] * p[:, None]
    H = np.einsum("nf,ng,nab->fagb", x[kept], x[kept], S[kept], optimize=True) / len(kept)
    H = H.reshape(f * c, f * c) + decay * np.eye(f * c)
    return theta - np.linalg.solve(H, gradient.ravel()).reshape(f, c)


def softmax_losses(x, y, theta):
    z = x @ theta
    return scipy.special.logsumexp(z, axis=1) - z[np.arange(len(y)), y]


def test_scores_of_softmax_regression_are_those_of_a_newton_step(digits):
    train, test, _ = digits
    net = MulticlassLogisticRegression(64, 10, weight_decay=1e-3).fit(train)
    rows = np.array([7, 0, 150, 33])
    scores = Influence(net, train).scores(test, rows)
    W = net.theta.reshape(64, 10)
    here = softmax_losses(test.x, test.y, W)
    for at, row in enumerate(rows):
        moved = softmax_step(train.x, train.y, W, 1e-3, [row])
        change = softmax_losses(test.x, test.y, moved) - here
        np.testing.assert_allclose(scores[:, at], change, rtol=1e-6, atol=1e-11)
    assert scores.approximation == "one_step"


def test_one_step_predicts_refits_where_first_order_is_far_too_small(digits):
    train, test, wrong = digits
    net = MulticlassLogisticRegression(64, 10, weight_decay=1e-3).fit(train)
    first = Influence(net, train, approximation="first_order").scores(test, wrong)
    one = Influence(net, train).scores(test, wrong)
    actual = np.asarray(leave_one_out(net, train, test, wrong)).ravel()
    large = np.abs(actual) > 0.01

    def slope(scores):
        return np.polyfit(np.asarray(scores).ravel(), actual, 1)[0]

    assert np.corrcoef(one.change_if_removed.ravel(), actual)[0, 1] > 0.98
    assert 0.8 < slope(one) < 1.25
    assert slope(first) > 2.5
    assert (np.sign(one.change_if_removed.ravel()) == np.sign(actual))[large].all()


def test_outputs_without_a_row_are_the_textbooks_for_least_squares():
    x, y = load_diabetes(return_X_y=True)
    x, y = x / x.std(axis=0), (y - y.mean()) / y.std()
    model = keras.Sequential(
        [keras.Input((10,), dtype="float64"), keras.layers.Dense(1, dtype="float64")]
    )
    model.compile(loss="mse")
    A = np.column_stack([x, np.ones(len(y))])
    net = GenericNeuralNet(model)
    net.theta = np.linalg.lstsq(A, y, rcond=None)[0]
    fitted = A @ net.theta
    leverage = np.einsum("ni,ij,nj->n", A, np.linalg.inv(A.T @ A), A)
    found = leave_one_out_outputs(net, (x, y[:, None]))
    wanted = y - (y - fitted) / (1 - leverage)
    np.testing.assert_allclose(found.outputs[:, 0], wanted, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.leverage, leverage, rtol=1e-10)
    np.testing.assert_allclose(found.losses, ((y - fitted) / (1 - leverage)) ** 2, rtol=1e-9)


@pytest.mark.parametrize("kind", ["digits", "spam"])
def test_losses_without_a_row_are_those_of_refits(kind, digits):
    if kind == "digits":
        train, rows = digits[0], np.union1d(digits[2], np.arange(20))
        net = MulticlassLogisticRegression(64, 10, weight_decay=1e-2).fit(train)
    else:
        x, y = data.load("spam").train
        train, rows = Examples(x[:200], y[:200]), np.arange(40)
        net = BinaryLogisticRegression(x.shape[1], weight_decay=1e-3).fit(train)
    found = leave_one_out_outputs(net, train, rows)
    own = train.take(rows)
    before = net.losses(own.x, own.y)
    actual = np.diag(np.asarray(leave_one_out(net, train, own, rows)))
    predicted = found.losses - before
    assert found.leverage.max() > 0.3
    assert np.corrcoef(predicted, actual)[0, 1] > 0.99
    assert 0.95 < np.polyfit(predicted, actual, 1)[0] < 1.15
    assert (np.sign(predicted) == np.sign(actual)).all()


def ridge(x, y, decay, weights):
    """Return the minimum W of mean_i weights_i |y_i - [x_i, 1] W|^2 + decay |W|^2."""
    A = np.column_stack([x, np.ones(len(x))])
    H = A.T @ (weights[:, None] * A) / len(x) + decay * np.eye(A.shape[1])
    return np.linalg.solve(H, A.T @ (weights[:, None] * y) / len(x))


def test_weighted_rows_of_a_regression_with_a_penalty_are_exact():
    rng = np.random.default_rng(1)
    x, y, weights = rng.normal(size=(40, 6)), rng.normal(size=(40, 1)), rng.uniform(0.2, 2, 40)
    layer = keras.layers.Dense(
        1, kernel_regularizer=keras.regularizers.L2(0.05),
        bias_regularizer=keras.regularizers.L2(0.05), dtype="float64",
    )  # fmt: skip
    model = keras.Sequential([keras.Input((6,), dtype="float64"), layer])
    model.compile(loss="mse")
    net = GenericNeuralNet(model)
    net.theta = ridge(x, y, 0.05, weights).ravel()
    train, test = Examples(x, y, weights), Examples(x[:3] + 0.1, y[:3])
    found = leave_one_out_outputs(net, train)
    scores = Influence(net, train).scores(test)
    before = net.losses(test.x, test.y)
    for row in range(40):
        kept = np.arange(40) != row
        W = ridge(x[kept], y[kept], 0.05, weights[kept])
        np.testing.assert_allclose(found.outputs[row], np.append(x[row], 1) @ W, rtol=1e-9)
        losses = ((np.column_stack([test.x, np.ones(3)]) @ W - test.y) ** 2)[:, 0]
        np.testing.assert_allclose(scores[:, row], losses - before, rtol=1e-7, atol=1e-12)


def two_outputs():
    """Return (net, x, y): a float64 net with a regression and a binary output, at its minimum."""
    rng = np.random.default_rng(2)
    inputs = keras.Input((4,), dtype="float64")
    l2 = {"kernel_regularizer": keras.regularizers.L2(0.02), "dtype": "float64"}
    value = keras.layers.Dense(2, name="value", **l2)(inputs)
    sign = keras.layers.Dense(1, activation="sigmoid", name="sign", **l2)(inputs)
    model = keras.Model(inputs, [value, sign])
    model.compile(loss=["mse", "binary_crossentropy"], loss_weights=[0.5, 2.0])
    x = rng.normal(size=(30, 4))
    y = {"value": rng.normal(size=(30, 2)), "sign": rng.integers(0, 2, (30, 1))}
    net = GenericNeuralNet(model).fit((x, y), gradient_tolerance=1e-12)
    return net, x, y


def test_several_outputs_match_a_newton_step_in_numpy():
    net, x, y = two_outputs()
    found = leave_one_out_outputs(net, (x, y))
    A = np.column_stack([x, np.ones(30)])
    V = net.theta[:10].reshape(5, 2)
    w = net.theta[10:]
    p = scipy.special.expit(A @ w)
    for row in (0, 11, 29):
        kept = np.arange(30) != row
        B, penalty = A[kept], 0.04 * np.diag([1, 1, 1, 1, 0])
        # The loss of "value" is .5 times the mean of two squares. Its second derivative by each of
        # the two outputs is .5.
        G = 0.5 * B.T @ (B @ V - y["value"][kept]) / 29 + penalty @ V
        step = V - np.linalg.solve(0.5 * B.T @ B / 29 + penalty, G)
        np.testing.assert_allclose(found.outputs["value"][row], A[row] @ step, rtol=1e-7)
        g = 2 * B.T @ (p[kept] - y["sign"][kept, 0]) / 29 + penalty @ w
        H = 2 * B.T @ ((p * (1 - p))[kept, None] * B) / 29 + penalty
        logit = A[row] @ (w - np.linalg.solve(H, g))
        expected = scipy.special.expit(logit)
        np.testing.assert_allclose(found.outputs["sign"][row, 0], expected, rtol=1e-6)


def small_network(dtype="float64"):
    """Return a trained network with two hidden layers, 60 rows and 4 test rows."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(64, 5)), rng.integers(0, 3, 64)
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(4, activation="tanh", kernel_regularizer="l2", dtype=dtype),
        keras.layers.Dense(3, activation="softmax", dtype=dtype),
    ]
    model = keras.Sequential([keras.Input((5,), dtype=dtype), *layers])
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, y, epochs=5, verbose=0)
    return GenericNeuralNet(model), Examples(x[:60], y[:60]), Examples(x[60:], y[60:])


def tape_jacobians(net, x):
    """Return the Jacobians (n, c, d) of the logits by a plain tape, one output at a time."""
    theta, rows = net.theta_tensor(), []
    for row in np.asarray(x):
        with tf.GradientTape() as tape:
            tape.watch(theta)
            z = net.flat.output(theta, tf.constant(row[None]))[0]
        rows.append(tape.jacobian(z, theta).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("solver", [Direct(), CG(1e-12)])
def test_scores_of_a_network_match_dense_algebra_on_jacobians(solver):
    net, train, test = small_network()
    n, damping, rows = 60, 0.05, np.array([4, 0, 59])
    how = {"solver": solver, "damping": damping, "curvature": GaussNewton}
    scores = Influence(net, train, approximation="one_step", **how).scores(test, rows)
    J, T = tape_jacobians(net, train.x), tape_jacobians(net, test.x)
    z, z_test = (np.log(net.outputs(part.x)) for part in (train, test))
    p = scipy.special.softmax(z, axis=1)
    S = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None]
    kernel = np.arange(net.num_parameters) < 20
    penalty = 0.02 * np.where(kernel, net.theta, 0)
    P = np.diag(0.02 * kernel) + damping * np.eye(net.num_parameters)
    G = np.einsum("nad,nab,nbe->nde", J, S, J)
    for at, row in enumerate(rows):
        own = (p[row] - np.eye(3)[train.y[row]]) @ J[row]
        matrix = (G.sum(axis=0) - G[row] + (n - 1) * P) / (n - 1)
        move = np.linalg.solve(matrix, (own + penalty) / (n - 1))
        moved = z_test + T @ move
        change = scipy.special.logsumexp(moved, axis=1) - moved[np.arange(4), test.y]
        change -= scipy.special.logsumexp(z_test, axis=1) - z_test[np.arange(4), test.y]
        np.testing.assert_allclose(scores[:, at], change, rtol=1e-6, atol=1e-12)
        share = np.einsum("ab,bd,da->", S[row], J[row] @ np.linalg.inv(G.mean(0) + P * (1 - 1 / n)),
                          J[row].T) / n  # fmt: skip
        np.testing.assert_allclose(scores.leverage[at], share, rtol=1e-7)


def test_every_way_to_the_blocks_gives_the_same_scores(monkeypatch):
    net, train, test = small_network()
    few = train.take(np.arange(12))

    def scores(blocks):
        influence = Influence(
            net, few, solver=Direct(), damping=0.01, curvature=GaussNewton,
            approximation="one_step",
        )  # fmt: skip
        monkeypatch.setattr(type(influence.inverse), "blocks_by", blocks)
        return influence.scores(test)

    # "dense" and "gram" form M, which has only 1 - 1 / n of the penalty and damping in A. "solves"
    # uses A in place of M, so its leverages agree only to 10 %.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(net, "penalty_hvp", lambda V: np.zeros_like(V))
        dense, gram = scores("dense"), scores("gram")
    np.testing.assert_allclose(gram.change_if_removed, dense.change_if_removed, rtol=1e-8)
    np.testing.assert_allclose(gram.leverage, dense.leverage, rtol=1e-8)
    solved = scores("solves")
    np.testing.assert_allclose(solved.leverage, scores("dense").leverage, rtol=0.1)


def test_ekfac_blocks_are_exact_for_one_linear_layer():
    rng = np.random.default_rng(4)
    model = keras.Sequential([keras.Input((3,), dtype="float64"),
                              keras.layers.Dense(2, dtype="float64")])  # fmt: skip
    model.compile(loss="mse")
    net = GenericNeuralNet(model)
    train = Examples(rng.normal(size=(90, 3)), rng.normal(size=(90, 2)))
    how = {"damping": 0.1, "curvature": GaussNewton, "approximation": "one_step"}
    found = Influence(net, train, solver=EKFAC(), **how).scores(train)
    A = np.column_stack([train.x, np.ones(90)])
    # The loss is the mean of two squares, so its Hessian by the two outputs is I.
    inverse = np.linalg.inv(A.T @ A / 90 + 0.1 * np.eye(4))
    np.testing.assert_allclose(found.leverage, 2 * np.einsum("ni,ij,nj->n", A, inverse, A) / 90)
    dense = Influence(net, train, solver=Direct(), **how).scores(train)
    # EK-FAC uses a matrix with damping / n too much, about a thousandth of the curvature.
    largest = np.abs(dense.change_if_removed).max()
    gap = np.abs(found.change_if_removed - dense.change_if_removed).max()
    assert gap < 5e-3 * largest


def test_ekfac_blocks_of_convolutions_are_quadratic_forms_of_its_inverse():
    rng = np.random.default_rng(5)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1), dtype="float64"),
            keras.layers.Conv2D(3, 3, activation="relu", dtype="float64"),
            keras.layers.Flatten(),
            keras.layers.Dense(3, dtype="float64"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net = GenericNeuralNet(model, loss)
    train = Examples(rng.normal(size=(8, 6, 6, 1)), rng.integers(0, 3, 8))
    prepared = Influence(net, train, solver=EKFAC(), damping=0.1, curvature=GaussNewton)
    inverse = prepared.prepared(np.eye(net.num_parameters)).x
    J = tape_jacobians(net, train.x)
    blocks = prepared.prepared.apply.output_blocks(net, None, train.x, train.y)
    np.testing.assert_allclose(blocks, J @ inverse @ J.transpose(0, 2, 1), rtol=1e-8, atol=1e-12)
    test, r = (
        Examples(rng.normal(size=(3, 6, 6, 1)), rng.integers(0, 3, 3)),
        rng.normal(size=(8, 3)),
    )
    ask = prepared.prepared.apply.output_moves(net, test.x, test.y)
    moves = ask(net.pulling(), None, train.x, r).reshape(8, 3, 3)
    T = tape_jacobians(net, test.x)
    wanted = np.einsum("tcd,de,nbe,nb->ntc", T, inverse, J, r)
    np.testing.assert_allclose(moves, wanted, rtol=1e-8, atol=1e-12)


def test_a_group_is_removed_by_one_step_of_all_its_rows(digits):
    train, test, wrong = digits
    net = MulticlassLogisticRegression(64, 10, weight_decay=1e-3).fit(train)
    influence = Influence(net, train)
    W = net.theta.reshape(64, 10)
    moved = softmax_step(train.x, train.y, W, 1e-3, wrong)
    change = softmax_losses(test.x, test.y, moved) - softmax_losses(test.x, test.y, W)
    found = influence.group(test, wrong)
    assert found.order == "one_step"
    np.testing.assert_allclose(np.asarray(found), change, rtol=1e-6, atol=1e-10)
    actual = np.asarray(leave_group_out(net, train, test, [wrong]))[:, 0]
    assert np.corrcoef(change, actual)[0, 1] > 0.95
    assert influence.group(test, wrong, 1).order == 1


def test_a_group_of_a_network_matches_dense_algebra():
    net, train, test = small_network()
    rows, n, damping = np.array([9, 2, 30, 31]), 60, 0.05
    how = {"damping": damping, "curvature": GaussNewton}
    found = Influence(net, train, solver=Direct(), **how).group(test, rows, "one_step")
    J, T, z = (
        tape_jacobians(net, train.x),
        tape_jacobians(net, test.x),
        np.log(net.outputs(train.x)),
    )
    p = scipy.special.softmax(z, axis=1)
    S = p[:, :, None] * np.eye(3) - p[:, :, None] * p[:, None]
    kernel, kept = np.arange(net.num_parameters) < 20, np.setdiff1d(np.arange(n), rows)
    penalty = 0.02 * np.where(kernel, net.theta, 0)
    own = np.einsum("na,nad->d", p[rows] - np.eye(3)[train.y[rows]], J[rows]) + 4 * penalty
    matrix = np.einsum("nad,nab,nbe->de", J[kept], S[kept], J[kept]) / 56
    matrix += np.diag(0.02 * kernel) + damping * np.eye(len(kernel))
    z_test = np.log(net.outputs(test.x))
    moved = z_test + T @ np.linalg.solve(matrix, own / 56)
    change = scipy.special.logsumexp(moved, axis=1) - moved[np.arange(4), test.y]
    change -= scipy.special.logsumexp(z_test, axis=1) - z_test[np.arange(4), test.y]
    np.testing.assert_allclose(np.asarray(found), change, rtol=1e-6, atol=1e-12)


def test_a_measurement_is_taken_at_the_moved_outputs(digits):
    train, test, _ = digits
    net = MulticlassLogisticRegression(64, 10, weight_decay=1e-3).fit(train)
    rows, W = np.array([3, 190]), net.theta.reshape(64, 10)
    scores = Influence(net, train).scores(test, rows, measurement=measurements.margin)

    def margins(theta):
        z = test.x @ theta
        own = z[np.arange(6), test.y].copy()
        z[np.arange(6), test.y] = -np.inf
        return own - scipy.special.logsumexp(z, axis=1)

    for at, row in enumerate(rows):
        change = margins(softmax_step(train.x, train.y, W, 1e-3, [row])) - margins(W)
        np.testing.assert_allclose(scores[:, at], change, rtol=1e-6, atol=1e-9)


def test_a_question_about_all_test_rows_takes_one_step_by_name_only(digits):
    train, test, _ = digits
    net = MulticlassLogisticRegression(64, 10, weight_decay=1e-3).fit(train)
    rows = np.arange(5)
    planned = Influence(net, train)
    assert planned.scores(test, rows, reduce="mean").approximation == "first_order"
    named = Influence(net, train, approximation="one_step")
    each = named.scores(test, rows)
    mean = named.scores(test, rows, reduce="mean")
    np.testing.assert_allclose(mean[0], each.mean(axis=0), rtol=1e-12)
    assert mean.approximation == "one_step"
    with pytest.raises(ValueError, match="approximation must be 'first_order' if reduce"):
        named.scores(test, rows, reduce=lambda y, z: 0.0)


def test_the_plan_takes_one_step_where_leverage_is_large(digits):
    train, test, _ = digits
    assert Influence(
        MulticlassLogisticRegression(64, 10, weight_decay=1e-3).fit(train), train
    ).plan.reasons[4].startswith("the mean leverage")  # fmt: skip
    strong = MulticlassLogisticRegression(64, 10, weight_decay=10.0).fit(train)
    plan = Influence(strong, train).plan
    assert plan.approximation == "first_order" and "mean leverage is at most" in plan.reasons[4]
    assert "first order" in repr(plan)
    net = MulticlassLogisticRegression(64, 10, weight_decay=1e-3).fit(train)
    assert Influence(net, train, approximation="first_order").plan.approximation == "first_order"


def test_the_estimated_leverage_is_the_effective_dimension(digits):
    train, _, _ = digits
    net = MulticlassLogisticRegression(64, 10, weight_decay=1e-2).fit(train)
    scores = Influence(net, train, approximation="one_step").scores(train)
    mean = float(Influence(net, train).plan.reasons[4].split()[-1])
    assert mean == pytest.approx(scores.leverage.mean(), rel=0.1)


def test_networks_with_an_explicit_hessian_keep_first_order():
    net, train, test = small_network()
    plan = Influence(net, train, curvature=Hessian, damping=1.0).plan
    assert plan.approximation == "first_order" and "indefinite" in plan.reasons[4]


def test_first_order_names_rows_of_large_leverage(digits):
    train, test, _ = digits
    net = MulticlassLogisticRegression(64, 10, weight_decay=1e-3).fit(train)
    influence = Influence(net, train, solver=Direct(), approximation="first_order")
    with pytest.warns(UserWarning, match=r"leverage above 0\.1, such as rows \d+ \(\d"):
        scores = influence.scores(test)
    one = Influence(net, train, approximation="one_step").scores(test)
    known = np.isfinite(scores.leverage)
    assert 1 <= known.sum() <= 16
    # The one-step method also removes the row's share of the penalty, 1 / n of it. Its leverages
    # are therefore larger, by about 1 / n of their size.
    np.testing.assert_allclose(scores.leverage[known], one.leverage[known], rtol=0.02)


def test_a_row_that_alone_fixes_a_weight_is_named():
    x = np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.0], [0.0, 1.0]])
    model = keras.Sequential(
        [keras.Input((2,), dtype="float64"), keras.layers.Dense(1, use_bias=False, dtype="float64")]
    )
    model.compile(loss="mse")
    net = GenericNeuralNet(model)
    net.theta = np.array([0.5, 2.0])
    with pytest.warns(UserWarning, match="rows 3 carry all curvature"):
        found = leave_one_out_outputs(net, (x, np.array([[0.4], [0.6], [0.2], [1.9]])))
    assert found.leverage[3] == pytest.approx(1) and np.isfinite(found.outputs).all()


def test_a_group_that_alone_fixes_a_weight_is_refused_by_name():
    x = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    model = keras.Sequential(
        [keras.Input((2,), dtype="float64"), keras.layers.Dense(1, use_bias=False, dtype="float64")]
    )
    model.compile(loss="mse")
    net, train = GenericNeuralNet(model), (x, np.array([[0.4], [0.6], [0.2], [1.9]]))
    net.theta = np.array([0.5, 1.05])
    influence = Influence(net, train)
    with pytest.raises(DivergenceError, match="rows must leave curvature in every direction"):
        influence.group(train, [2, 3], "one_step")
    assert np.isfinite(np.asarray(influence.group(train, [1, 3], "one_step"))).all()


def test_outputs_continue_after_an_interruption(tmp_path, digits, monkeypatch):
    train, _, _ = digits
    net = MulticlassLogisticRegression(64, 10, weight_decay=1e-3).fit(train)
    whole = leave_one_out_outputs(net, train)
    from influence.scores import one_step, out_of_sample

    monkeypatch.setattr(out_of_sample, "_STORED_ROWS", 64)
    calls = []
    without = one_step.OneStep.without

    def interrupted(self, rows):
        calls.append(rows[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return without(self, rows)

    monkeypatch.setattr(one_step.OneStep, "without", interrupted)
    with pytest.raises(KeyboardInterrupt):
        leave_one_out_outputs(net, train, checkpoints=tmp_path)
    again = leave_one_out_outputs(net, train, checkpoints=tmp_path)
    assert calls == [0, 64, 128, 128, 192]
    np.testing.assert_allclose(again.logits, whole.logits, rtol=1e-10)
    np.testing.assert_allclose(again.losses, whole.losses, rtol=1e-9)
    assert again.outputs.shape == (200, 10)


def test_results_do_not_depend_on_batch_size_or_order(digits):
    train, test, _ = digits
    net = MulticlassLogisticRegression(64, 10, weight_decay=1e-3).fit(train)
    rows = np.array([9, 3, 150])
    whole = Influence(net, train).scores(test)
    small = Influence(net, train, batch_size=7).scores(test, rows)
    np.testing.assert_allclose(small.change_if_removed, whole[:, rows], rtol=1e-8)
    np.testing.assert_allclose(small.leverage, whole.leverage[rows], rtol=1e-9)


def test_what_one_step_cannot_do_is_refused_by_name(digits):
    train, test, _ = digits
    net = MulticlassLogisticRegression(64, 10, weight_decay=1e-3).fit(train)
    with pytest.raises(ValueError, match="approximation must be 'first_order', 'one_step' or None"):
        Influence(net, train, approximation="newton")
    with pytest.raises(ValueError, match="order must be 1, 2, 'one_step' or None, got 3"):
        Influence(net, train).group(test, [1], 3)
    on_disk = Stream(tf.data.Dataset.from_tensor_slices((train.x, train.y)).batch(50))
    assert Influence(net, on_disk).plan.reasons[4] == "the training rows are not in memory"
    with pytest.raises(ValueError, match="approximation must be 'first_order' for a training set"):
        Influence(net, on_disk, approximation="one_step").scores(test)
