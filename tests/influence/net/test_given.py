"""Tests of all data forms that `fit` takes, and of Keras models in place of nets."""

import keras
import numpy as np
import pandas
import pytest
import tensorflow as tf

import influence
from influence import (
    ContinuedOptions,
    Direct,
    Examples,
    GaussNewton,
    GenericNeuralNet,
    Hessian,
    Influence,
    RefitOptions,
    Stream,
    check,
    class_weights,
    continued_training,
    datainf,
    leave_group_out,
    leave_one_out,
    poison,
    proximal_response,
    tracin,
)
from tests.influence.dense_scores import dense_scores

L = keras.layers
N, L2 = 30, 0.05
RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(N, 3)), RNG.normal(size=(N, 1))
Y = (A[:, :1] + B + 0.3 * RNG.normal(size=(N, 1)) > 0).astype(float)
W = RNG.uniform(0.2, 3, N)
M = 4


def two_inputs(names=(None, None), l2=L2, dtype="float64"):
    keras.utils.set_random_seed(1)
    a, b = (keras.Input((k,), dtype=dtype, name=n) for k, n in zip((3, 1), names, strict=True))
    penalty = {f"{kind}_regularizer": keras.regularizers.L2(l2) for kind in ("kernel", "bias")}
    options = penalty if l2 else {}
    h = L.Dense(2, "tanh", dtype=dtype, **options)(L.Concatenate(dtype=dtype)([a, b]))
    model = keras.Model([a, b], L.Dense(1, dtype=dtype, **options)(h))
    model.compile("sgd", keras.losses.BinaryCrossentropy(from_logits=True))
    return model


def in_float32(model):
    """Return a float32 copy. In float64, Keras fails to add the penalty to the loss."""
    copy = two_inputs(dtype="float32")
    copy.set_weights(model.get_weights())
    return copy


def cross_entropy(y, z):
    return tf.nn.sigmoid_cross_entropy_with_logits(y, z)[:, 0]


def weighted(y, z):
    return y[:, 1] * cross_entropy(y[:, :1], z)


@pytest.fixture(scope="module")
def unnamed():
    model = two_inputs()
    plain = two_inputs(l2=0)
    plain.set_weights(model.get_weights())
    train, test = ([A, B], Y), ([A[:M], B[:M]], Y[:M])
    expected = dense_scores(plain, cross_entropy, train, test, L2, damping=1.0)
    of_weights = dense_scores(
        plain,
        weighted,
        ([A, B], np.column_stack([Y, W])),
        ([A[:M], B[:M]], np.column_stack([Y, W])[:M]),
        L2,
        damping=1.0,
    )
    return model, GenericNeuralNet(model), expected, of_weights


class Batches(keras.utils.PyDataset):
    def __init__(self, *data):
        super().__init__()
        self.data = data

    def __len__(self):
        return 3

    def __getitem__(self, i):
        part = slice(10 * i, 10 * i + 10)
        (a, b), *rest = self.data
        return [a[part], b[part]], *(r[part] for r in rest)


def slices(*data):
    return tf.data.Dataset.from_tensor_slices(data).batch(7)


def named(model, a, b, by):
    return dict(zip([by(tensor) for tensor in model.inputs], (a, b), strict=True))


def forms(model):
    """Yield the name of each form, and the same training and test rows in this form."""
    layer = lambda tensor: tensor._keras_history[0].name  # noqa: E731
    tensor = lambda tensor: tensor.name  # noqa: E731
    a, b, y = A[:M], B[:M], Y[:M]
    yield "list", ([A, B], Y), ([a, b], y)
    yield "tuple", ((A, B), Y), ((a, b), y)
    yield "columns (n,)", ((A, B[:, 0]), Y[:, 0]), ((a, b[:, 0]), y[:, 0])
    yield "tensors", ([tf.constant(A), tf.constant(B)], tf.constant(Y)), ([a, b], y)
    yield "layers' names", (named(model, A, B, layer), Y), (named(model, a, b, layer), y)
    yield "names of tensors", (named(model, A, B, tensor), Y), (named(model, a, b, tensor), y)
    yield "more columns", ({**named(model, A, B, tensor), "z": Y}, Y), ([a, b], y)
    yield (
        "frames",
        ([pandas.DataFrame(A), pandas.Series(B[:, 0])], pandas.Series(Y[:, 0])),
        ([a, b], y),
    )
    yield "Examples of a list", Examples([A, B], Y), Examples((a, b), y)
    yield "Examples by layer", Examples(named(model, A, B, layer), Y), ([a, b], y)
    yield "dataset", slices((A, B), Y), slices((a, b), y)
    yield "Examples of a dataset", Examples(slices((A, B), Y)), Examples(slices((a, b), y))
    yield "Stream", Stream(slices((A, B), Y)), ([a, b], y)
    yield "PyDataset", Batches((A, B), Y), ([a, b], y)


def test_every_form_of_two_inputs_has_the_scores_of_a_dense_matrix(unnamed):
    model, net, expected, _ = unnamed
    for form, train, test in forms(model):
        scores = Influence(net, train, solver=Direct(), damping=1.0, curvature=Hessian).scores(test)
        np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-13, err_msg=form)


def test_two_rows_of_two_inputs_are_inputs(unnamed):
    _, net, expected, _ = unnamed
    scores = Influence(net, ([A, B], Y), solver=Direct(), damping=1.0, curvature=Hessian)
    got = scores.scores(([A[:2], B[:2]], Y[:2]))
    np.testing.assert_allclose(got, expected[:2], rtol=1e-9, atol=1e-13)


def test_sample_weights_in_the_third_place(unnamed):
    model, net, _, expected = unnamed
    train, test = ([A, B], Y, W), ([A[:M], B[:M]], Y[:M], W[:M])
    for form in (train, slices((A, B), Y, W), Batches((A, B), Y, W), Examples([A, B], Y, W)):
        scores = Influence(net, form, solver=Direct(), damping=1.0, curvature=Hessian).scores(test)
        np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-13)
    reported = in_float32(model).evaluate([A, B], Y, sample_weight=W, batch_size=7, verbose=0)
    assert net.risk(train) == pytest.approx(reported, rel=1e-5)  # Keras sums in float32


def test_class_weights_are_those_of_fit(unnamed):
    model, net, *_ = unnamed
    weights = class_weights(Y, {0: 0.3, 1: 5.0})
    # The epoch has one batch. Keras reports its loss at the weights before the training step.
    fitted = in_float32(model).fit(
        [A, B], Y, class_weight={0: 0.3, 1: 5.0}, batch_size=N, verbose=0
    )
    assert net.risk(([A, B], Y, weights)) == pytest.approx(fitted.history["loss"][0], rel=1e-5)


def test_a_table_gives_each_input_its_column():
    model = two_inputs(("a", "b"))
    narrow = {"a": keras.Input((1,), dtype="float64", name="a"), "b": model.inputs[1]}
    z = L.Dense(1, dtype="float64")(L.Concatenate(dtype="float64")(list(narrow.values())))
    model = keras.Model(narrow, z)
    model.compile("sgd", "mse")
    table = pandas.DataFrame({"a": A[:, 0], "other": 1.0, "b": B[:, 0]})
    plain = keras.Sequential([keras.Input((2,), dtype="float64"), L.Dense(1, dtype="float64")])
    plain.set_weights(model.get_weights())
    x = np.column_stack([A[:, 0], B[:, 0]])
    square = lambda y, z: tf.square(y - z)[:, 0]  # noqa: E731
    expected = dense_scores(plain, square, (x, Y), (x[:M], Y[:M]), damping=0.1)
    how = {"solver": Direct(), "damping": 0.1, "approximation": "first_order"}
    net = GenericNeuralNet(model)
    for train, test in (
        ((table, Y), (table[:M], Y[:M])),
        ((dict(table), Y), (dict(table[:M]), Y[:M])),
        (slices(dict(table[["a", "b"]]), Y), (table[:M], Y[:M])),
    ):
        scores = Influence(net, train, **how).scores(test)
        np.testing.assert_allclose(scores, expected, rtol=1e-9, atol=1e-13)


def test_every_question_takes_data_as_fit_does(tmp_path):
    penalty = keras.regularizers.L2(L2)
    x, y = A[:12], A[:12] @ [1.0, -2.0, 0.5] + B[:12, 0]
    dense = L.Dense(1, use_bias=False, dtype="float64", kernel_regularizer=penalty)
    model = keras.Sequential([keras.Input((3,), dtype="float64"), dense])
    model.compile("sgd", "mse")
    net, n, rows = GenericNeuralNet(model), len(x), np.arange(4)
    ridge = lambda x, y: np.linalg.solve(x.T @ x + L2 * len(y) * np.eye(3), x.T @ y)  # noqa: E731
    theta = ridge(x, y)
    model.set_weights([theta[:, None]])
    train, test = (x, y[:, None]), (x[:2], y[:2, None])
    loss = lambda theta: (x[:2] @ theta - y[:2]) ** 2  # noqa: E731
    removed = [np.delete(np.arange(n), i) for i in rows]
    actual = np.stack([loss(ridge(x[r], y[r])) - loss(theta) for r in removed], 1)

    H = 2 * x.T @ x / n + 2 * L2 * np.eye(3)
    slopes = lambda x, y: 2 * (x @ theta - y)[:, None] * x  # noqa: E731
    G, g = slopes(x, y) + 2 * L2 * theta, slopes(x[:2], y[:2])
    np.testing.assert_allclose(Hessian(net, train) @ np.eye(3), H, rtol=1e-9)
    np.testing.assert_allclose(GaussNewton(net, train) @ np.eye(3), H, rtol=1e-9)
    found = Influence(net, train, solver=Direct(), approximation="first_order")
    expected = g @ np.linalg.solve(H, G.T) / n
    np.testing.assert_allclose(found.scores(test), expected, rtol=1e-8)
    np.testing.assert_allclose(found.adding(test, train), -expected, rtol=1e-8)
    np.testing.assert_allclose(found.group(test, [1, 2]), expected[:, 1:3].sum(1), rtol=1e-8)
    assert found.relative(test).shape == found.s_test(test).x.shape[1:] + (n,)
    assert found.perturbation(test, [0]).shape == (2, 1, 3)
    assert found.write_scores(tmp_path / "scores.h5", test).exists()

    options = RefitOptions(method="fit")
    alone = leave_one_out(net, train, test, rows, options)
    np.testing.assert_allclose(alone, actual, rtol=1e-4, atol=1e-9)
    groups = leave_group_out(net, train, test, [[i] for i in rows], options)
    np.testing.assert_allclose(groups, actual, rtol=1e-4, atol=1e-9)
    response = proximal_response(net, train, test, rows, damping=0.0, objective="leave_one_out")
    np.testing.assert_allclose(response, _responses(x, y, theta, rows, loss), rtol=1e-6)
    few = ContinuedOptions(batch_size=n)
    assert continued_training(net, train, test, [0], few, steps=1, rate=0.1).shape == (2, 1)
    by_steps = tracin(net, train, test, thetas=[theta], learning_rates=[1.0])
    np.testing.assert_allclose(by_steps, g @ slopes(x, y).T, rtol=1e-9)
    assert datainf(net, train, test, damping=1.0).shape == (2, n)
    assert check(net, train, test=test)["stationary point"].verdict == "ok"
    moved = poison(net, train, test, [0, 1], 0.1)
    assert moved.change_if_poisoned.mean() > 0
    np.testing.assert_allclose(net.fit(train).theta, theta, rtol=1e-5)


def test_every_question_takes_a_keras_model_for_a_net(tmp_path):
    x, y = A[:12], B[:12]
    model = keras.Sequential([keras.Input((3,), dtype="float64"), L.Dense(1, dtype="float64")])
    train, test = (x, y), (x[:2], y[:2])
    steps = {"steps": 1, "rate": 0.1}
    questions = (
        lambda: Influence(model, train),
        lambda: Hessian(model, train),
        lambda: GaussNewton(model, train),
        lambda: check(model, train),
        lambda: leave_one_out(model, train, test, [0]),
        lambda: leave_group_out(model, train, test, [[0]]),
        lambda: proximal_response(model, train, test, [0], damping=0.1),
        lambda: continued_training(model, train, test, [0], **steps),
        lambda: tracin(model, train, test, thetas=[np.zeros(4)], learning_rates=[1.0]),
        lambda: datainf(model, train, test, damping=1.0),
        lambda: poison(model, train, test, [0], 0.1),
    )
    # The model is not compiled. If a function complains only about the missing loss, it has
    # accepted the Keras model in place of a net.
    for question in questions:
        with pytest.raises(ValueError, match="^loss must be given for a model that is not"):
            question()
    model.compile("sgd", "mse")
    inside = np.column_stack([x, np.ones(12)])
    H = 2 * inside.T @ inside / 12
    np.testing.assert_allclose(Hessian(model, train) @ np.eye(4), H, rtol=1e-9)


def _responses(x, y, theta, rows, loss):
    """Return the changes of `loss` (m, k) if row i is taken out, for each i of `rows`.

    The new parameters are the exact minimum of R(theta) - L(z_i, theta) / n, in closed form.
    """
    n = len(x)
    found = []
    for i in rows:
        matrix = x.T @ x - np.outer(x[i], x[i]) + (n - 1) * L2 * np.eye(3)
        found.append(loss(np.linalg.solve(matrix, x.T @ y - x[i] * y[i])) - loss(theta))
    return np.stack(found, 1)


@pytest.mark.parametrize("value", [None, 3, A, [A], (A, "label"), {"x": A}, iter([A]), "text"])
def test_data_that_cannot_be_examples(unnamed, value):
    message = r"^train must be Examples\(x, y\), got .*; \(x, y\), \(x, y, sample_weight\) and a"
    with pytest.raises(TypeError, match=message):
        Influence(unnamed[1], value)


@pytest.mark.parametrize("net", [None, 3, "text", keras.layers.Dense(1)])
def test_things_that_are_no_net(net):
    message = "^net must be a GenericNeuralNet, got .*; a compiled Keras model and the path of a "
    for question in (
        lambda: Influence(net, ([A, B], Y)),
        lambda: check(net, ([A, B], Y)),
        lambda: leave_one_out(net, ([A, B], Y), ([A, B], Y), [0]),
    ):
        with pytest.raises(TypeError, match=message):
            question()


def test_data_that_does_not_fit_is_named(unnamed):
    net = unnamed[1]
    train = ([A, B], Y)
    shuffled = slices((A, B), Y).shuffle(100)
    for value, message in (
        (([A, B, B], Y), r"^test\.x must have the model's inputs"),
        ((A, Y), r"^test\.x must be a dict with the model's inputs"),
        (([A, A], Y), r"^test\.x\['.*'\] must have rows of shape \(1,\)"),
        (shuffled, "^dataset must give the same rows in every pass, got in the second row"),
        (([A, B], Y, -W), "^sample_weight must be finite and >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Influence(net, train).scores(value)
    with pytest.raises(TypeError, match=r"^test\.x\[0\] must be an array of numbers, got .* strin"):
        Influence(net, train).scores(Examples([np.full((N, 3), "a"), B], Y))
    with pytest.raises(TypeError, match="^y and sample_weight must be left out beside a dataset"):
        Examples(slices(A, Y), Y)
    with pytest.raises(ValueError, match="^dataset must hold at least one row"):
        Examples(slices(A, Y).take(0))


@pytest.mark.parametrize(
    ("y", "weights", "error", "message"),
    [
        (Y, [1, 2], TypeError, "^class_weight must be a dict"),
        (Y, {0: 1.0, 2: 3.0}, ValueError, "^class_weight must name classes of y, got 2"),
        (Y[:, :, None], {0: 1.0}, ValueError, r"^y must have shape \(n,\)"),
        (["a"], {0: 1.0}, TypeError, "^y must be an array of numbers"),
    ],
)
def test_bad_class_weights(y, weights, error, message):
    with pytest.raises(error, match=message):
        class_weights(y, weights)


def test_class_weights_of_one_hot_labels():
    y = np.eye(3)[[0, 2, 1, 2]]
    assert influence.class_weights(y, {2: 4.0, 0: 0.5}).tolist() == [0.5, 4.0, 1.0, 4.0]


def test_a_list_of_labels_belongs_to_the_outputs_in_their_order():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    model = keras.Model(inputs, [L.Dense(1, name="v")(inputs), L.Dense(1, name="u")(inputs)])
    model.compile("sgd", ["mse", keras.losses.BinaryCrossentropy(from_logits=True)], [1.0, 0.5])
    real, weights = B + 2, [W, W[::-1]]
    reported = model.evaluate(A, [real, Y], sample_weight=weights, batch_size=N, verbose=0)[0]
    net = GenericNeuralNet(model)
    for data in (
        (A, [real, Y], weights),
        (A, {"v": real, "u": Y}, {"v": W, "u": W[::-1]}),
        slices(A, (real, Y), (W, W[::-1])),
    ):
        assert net.risk(data) == pytest.approx(reported, rel=1e-5)
