import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from influence import Examples, GenericNeuralNet, Hessian, MulticlassLogisticRegression
from influence.examples.stream import Stream
from influence.preflight import hessian
from influence.preflight.check import check
from tests.influence.preflight.test_hessian import cube_of_wrong_curvature
from tests.influence.preflight.test_labels import blobs
from tests.influence.preflight.test_rows import D64, LeftOn, TrainingMode
from tests.influence.problems import (
    dense_net,
    logistic,
    relative_error,
    ridge,
    sequential,
    tanh_net,
    through_keras,
    traced_once,
)

L = keras.layers


def named(report, verdict):
    return {line.name for line in report.lines if line.verdict == verdict}


def penalised(layer, *args, l2=0.02, **options):
    R = keras.regularizers.L2(l2)
    return layer(*args, kernel_regularizer=R, bias_regularizer=R, **D64, **options)


def trained(model, loss, x, y):
    net = traced_once(GenericNeuralNet(model, loss), loss)
    rng = np.random.default_rng(1)
    net.theta = rng.standard_normal(net.num_parameters) / 2
    train = Examples(x, y)
    return net.fit(train, gradient_tolerance=1e-9), train


def tanh_classifier():
    """Return a network at its minimum, with dropout and a frozen layer, and its training set."""
    frozen = L.Dense(3, trainable=False, **D64)
    layers = [frozen, penalised(L.Dense, 4, activation="tanh"), L.Dropout(0.5, **D64)]
    model = sequential((2,), *layers, penalised(L.Dense, 3), **D64)
    frozen.set_weights([np.array([[1.0, 0, 1], [0, 1, -1]]), np.zeros(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return trained(model, loss, *blobs(spread=0.5))


def convolutional():
    """Return a small convolutional net at its minimum, and its training set of one-hot labels."""
    layers = penalised(L.Conv2D, 2, 3, activation="tanh"), L.GlobalAveragePooling2D(**D64)
    model = sequential((5, 5, 1), *layers, penalised(L.Dense, 2), **D64)
    rng = np.random.default_rng(0)
    y = np.arange(24) % 2
    x = rng.standard_normal((24, 5, 5, 1)) + 2 * y[:, None, None, None]
    return trained(model, keras.losses.CategoricalCrossentropy(from_logits=True), x, np.eye(2)[y])


def of(problem):
    return problem.net, problem.train


GOOD = {
    "softmax": lambda: of(logistic("softmax", intercept=True)),
    "sigmoid in float32": lambda: of(logistic("sigmoid", dtype="float32")),
    "softmax by Keras": lambda: of(through_keras(logistic("softmax"))),
    "tanh": tanh_classifier,
    "convolutional": convolutional,
}


@pytest.mark.parametrize("kind", GOOD)
def test_no_false_alarm_and_nothing_is_changed(kind):
    net, train = GOOD[kind]()
    before = [v.numpy() for v in net.model.variables]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = check(net, train)
    assert report.ok, str(report)
    assert len(report.lines) == 13 and {line.remedy for line in report.lines} == {""}
    for variable, value in zip(net.model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_with_test_rows_damping_and_batches():
    p = logistic("softmax")
    values = np.linalg.eigvalsh(p.oracle.hessian(p.theta)) + 0.5
    report = check(p.net, p.train, damping=0.5, test=p.test, batch_size=7)
    assert report.ok, str(report)
    assert len(report.lines) == 15
    assert report["test fits the net"].value == len(p.test)
    assert report["smallest eigenvalue"].value == pytest.approx(values[0], rel=1e-9)
    assert report["largest eigenvalue"].value == pytest.approx(values[-1], rel=1e-9)
    lost = values[-1] / values[0] * np.finfo(float).eps
    assert report["precision"].value == pytest.approx(lost, rel=1e-9)
    assert "change test losses by" in report["stationary point"].meaning


def test_eigenvalues_of_a_long_theta_come_with_their_errors():
    rng = np.random.default_rng(0)
    net = MulticlassLogisticRegression(1100, 2, weight_decay=0.05)
    train = Examples(rng.standard_normal((100, 1100)) / 10, np.arange(100) % 2)
    net.fit(train)
    report = check(net, train)
    assert report.ok, str(report)
    # There are more weights than rows. In some directions only the penalty has curvature.
    assert report["smallest eigenvalue"].value == pytest.approx(0.05, rel=1e-3)
    H = net.hvp(train.x, train.y, np.eye(2200)[:, :3])
    assert report["largest eigenvalue"].value > 0.05 + H[0, 0]


# --- faults that the check must find --------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (lambda: LeftOn(0.5, **D64), "same answer twice"),
        (lambda: TrainingMode(**D64), "loss per example"),
    ],
)
def test_layers_left_in_training_mode_are_found(layer, name):
    x = np.random.default_rng(0).standard_normal((20, 2)) + 3
    model = sequential((2,), layer(), L.Dense(8, **D64), L.Dense(1, **D64), **D64)
    report = check(GenericNeuralNet(model, "mse"), Examples(x, x[:, 0]))
    assert report[name].verdict == "fail"
    assert report.lines[-1].name == "derivatives" and report.lines[-1].verdict == "warn"


def test_a_summed_loss_is_found():
    p = ridge()
    summed = GenericNeuralNet(p.net.model, lambda y, z: tf.reduce_sum((y - z[:, 0]) ** 2))
    report = check(summed, p.train)
    assert named(report, "fail") == {"train fits the net", "loss per example"}
    assert report.lines[-1].name == "derivatives"
    with pytest.raises(ValueError, match="^loss must not be reduced by a sum"):
        GenericNeuralNet(p.net.model, keras.losses.MeanSquaredError(reduction="sum"))


def test_an_unconverged_net_is_found():
    p = logistic("softmax")
    theta, way = p.theta, np.random.default_rng(0).standard_normal(15)
    for distance, verdict in ((0.3, "fail"), (3e-3, "warn"), (1e-4, "ok")):
        p.net.theta = theta + distance * way
        report = check(p.net, p.train)
        assert report["stationary point"].verdict == verdict
        assert named(report, "ok") >= {line.name for line in report.lines} - {"stationary point"}


def test_labels_off_by_one_are_found():
    x, y = blobs(spread=0.5)
    net = MulticlassLogisticRegression(2, 3)
    net.fit(Examples(x, y))
    assert check(net, Examples(x, y)).ok
    report = check(net, Examples(x, y + 1))
    assert named(report, "fail") == {"train fits the net", "labels"}
    assert report["labels"].remedy == "Subtract 1 from the labels."
    report = check(net, Examples(x, (y + 1) % 3))
    assert named(report, "fail") == {"labels", "stationary point"}


def test_a_row_of_infinite_loss_is_found():
    net = dense_net(1, 2, lambda y, z: -tf.math.log(z[:, 0]))
    net.theta = np.array([1.0, 1, 0])
    x = np.random.default_rng(0).uniform(1, 2, (30, 2))
    good = Examples(x.copy(), np.ones(30))
    x[4] = [1, -1]
    bad = Examples(x, np.ones(30))
    report = check(net, bad)
    assert named(report, "fail") == {"finite train rows"}
    assert "(row 4)" in report["finite train rows"].meaning
    assert report.lines[-1].name == "derivatives"
    assert named(check(net, good, test=bad), "fail") == {"finite test rows"}


def test_a_saddle_is_found():
    x, y = blobs(spread=0.5)
    hidden = L.Dense(3, activation="tanh", use_bias=False, **D64)
    model = sequential((2,), hidden, L.Dense(3, use_bias=False, **D64), **D64)
    net = GenericNeuralNet(model, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    net.theta = np.zeros(net.num_parameters)  # the gradient is zero here, but it is no minimum
    train = Examples(x, y)
    report = check(net, train, curvature=Hessian)
    assert named(report, "fail") == {"smallest eigenvalue"}
    assert named(report, "warn") == {"precision"}
    line = report["smallest eigenvalue"]
    assert line.value < -0.1 and "a saddle" in line.meaning
    damping = float(line.remedy.split("damping=")[1].split(" ")[0])
    damped = check(net, train, damping=damping, curvature=Hessian)
    assert damped["smallest eigenvalue"].value > 0.01
    assert named(damped, "fail") == set() and named(damped, "warn") == {"smallest eigenvalue"}


def test_a_loss_without_curvature_is_a_line():
    net, train = tanh_net()
    report = check(GenericNeuralNet(net.model, "mae"), train)
    assert report["curvature"].verdict == "fail"
    assert "must have curvature in the outputs" in report["curvature"].meaning


def test_the_way_to_the_minimum_is_that_of_a_shifted_hessian_at_a_saddle():
    net, train = tanh_net()
    A = Hessian(net, train)
    values = np.linalg.eigvalsh(A.dense())
    shift = 2 * abs(values[0]) + 1e-6 * values[-1]
    line = hessian.stationary(net, A, None, shift)
    found = check(net, train, curvature=Hessian)["stationary point"]
    assert found.meaning == line.meaning and found.value == pytest.approx(line.value, rel=1e-9)
    assert hessian.stationary(net, A, None, 0.0) != line


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float32_at_condition_1e8_is_found(dtype):
    rng = np.random.default_rng(0)
    net = dense_net(1, 2, "mse", dtype=dtype)
    x = rng.standard_normal((50, 2)) * [1, 1e-4]
    A = np.column_stack([x, np.ones(50)])
    y = A @ [1, 1, 1] + rng.standard_normal(50)
    net.theta = np.linalg.lstsq(A, y)[0]
    report = check(net, Examples(x.astype(dtype), y.astype(dtype)))
    values = np.linalg.eigvalsh(2 * A.T @ A / 50)
    assert 5e7 < values[-1] / values[0] < 5e8
    if dtype == "float64":
        assert report.ok, str(report)
        lost = values[-1] / values[0] * np.finfo(float).eps
        assert report["precision"].value == pytest.approx(lost, rel=1e-6)
    else:
        assert report["precision"].verdict == "fail" and report["precision"].value > 1
        assert "Use float64" in report["precision"].remedy


def test_a_wrong_custom_gradient_is_found():
    p = ridge()
    loss = lambda y, z: cube_of_wrong_curvature((y - z[:, 0]) ** 2)  # noqa: E731
    report = check(GenericNeuralNet(p.net.model, loss), p.train)
    assert report["Hessian = differences"].verdict == "fail"


def test_examples_that_do_not_fit_are_all_that_is_said():
    p = ridge()
    wrong = Examples(np.ones((4, 9)), np.ones(4))
    report = check(p.net, wrong)
    assert [line.name for line in report.lines] == ["train fits the net", "derivatives"]
    assert named(check(p.net, p.train, test=wrong), "fail") == {"test fits the net"}


def test_weights_that_are_not_finite_are_all_that_is_said():
    p = ridge()
    weights = p.net.model.trainable_weights
    before = weights[0].numpy()
    weights[0].assign(before * np.nan)
    report = check(p.net, p.train)
    assert [line.name for line in report.lines] == ["finite weights", "derivatives"]
    assert report["finite weights"].verdict == "fail"
    assert "got NaN or infinity in layer" in report["finite weights"].meaning


# --- changes that must not matter -----------------------------------------------------------------


def test_about_seven_passes_beside_products(monkeypatch):
    p = logistic("softmax")
    rows, products = [0], [0]
    batches, hvp = Examples.batches, p.net.hvp

    def counted(self, *arguments):
        for x, y in batches(self, *arguments):
            rows[0] += len(y)
            yield x, y

    def counted_hvp(x, y, V):
        products[0] += len(y)
        return hvp(x, y, V)

    monkeypatch.setattr(Examples, "batches", counted)
    monkeypatch.setattr(p.net, "hvp", counted_hvp)
    assert check(p.net, p.train, batch_size=7).ok
    assert (rows[0] - products[0]) / len(p.train) <= 7


def test_batch_size_changes_no_number():
    p = logistic("softmax")
    p.net.theta = p.theta + 0.1
    # The compared values are rows, accuracy, penalty, eigenvalues and drift. All are well above
    # rounding errors.
    reports = (check(p.net, p.train, batch_size=size) for size in (None, 7))
    values = [[line.value for line in report.lines if line.value > 1e-5] for report in reports]
    assert len(values[0]) >= 5 and relative_error(*values) < 1e-9


def test_a_stream_is_asked_like_arrays():
    p = logistic("softmax")
    dataset = tf.data.Dataset.from_tensor_slices((p.train.x, p.train.y)).batch(16)
    assert check(p.net, Stream(dataset), batch_size=7) == check(p.net, p.train, batch_size=7)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("net", None), {}, TypeError, r"^net must be a GenericNeuralNet, got str;"),
        ((None, "rows"), {}, TypeError, r"^train must be Examples\(x, y\), got str;"),
        (
            (None, tf.data.Dataset.range(3)),
            {},
            TypeError,
            r"^dataset must give batches \(x, y\), got a int64",
        ),
        ((None, None), {"test": 3}, TypeError, r"^test must be Examples\(x, y\), got int;"),
        ((None, None), {"damping": -1}, ValueError, "^damping must be a number >= 0, got -1"),
        ((None, None), {"damping": "1"}, ValueError, "^damping must be a number >= 0, got '1'"),
        ((None, None), {"batch_size": 0}, ValueError, "^batch_size must be a positive integer or"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    p = logistic("softmax")
    net, train = (given or good for given, good in zip(arguments, (p.net, p.train), strict=True))
    with pytest.raises(error, match=message):
        check(net, train, **options)
    with pytest.raises(ValueError, match="^train must have at least 2 rows to leave one out, got"):
        check(p.net, p.train.take([0]))
