"""Tests of EK-FAC against the exact inverse where both are equal, else against its definition."""

import pickle
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from influence import (
    CG,
    Direct,
    DivergenceError,
    Examples,
    GaussNewton,
    GenericNeuralNet,
    Hessian,
    Influence,
    MulticlassLogisticRegression,
    prepare,
    solve,
)
from influence.curvature.layers import affine_layers
from influence.models.cnn import AllCNN
from influence.solvers.ekfac import EKFAC, factors_of, prepared_from
from tests import oracles
from tests.influence.problems import (
    dense_net,
    logistic,
    relative_error,
    sequential,
    symmetric,
    traced_once,
)
from tests.influence.solvers import matrices

inverse = partial(matrices.inverse, solver=EKFAC())
L = keras.layers
F64 = {"dtype": "float64"}


def l2(strength):
    return keras.regularizers.L2(strength / 2)


def linear(*, use_bias, kernel_penalty=0.0, bias_penalty=0.0, num_rows=30):
    penalties = {"kernel_regularizer": l2(kernel_penalty)}
    if use_bias:
        penalties["bias_regularizer"] = l2(bias_penalty)
    layer = L.Dense(3, use_bias=use_bias, **penalties, **F64)
    net = traced_once(GenericNeuralNet(sequential((4,), layer, **F64), "mse"), "mse")
    rng = np.random.default_rng(0)
    net.theta = rng.standard_normal(net.num_parameters)
    x = rng.standard_normal((num_rows, 4)) * [1, 2, 0.3, 1] + 0.5
    return net, Examples(x, rng.standard_normal((num_rows, 3)))


def images(num_rows=12, shape=(6, 5, 2), num_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return Examples(rng.standard_normal((num_rows, *shape)), np.arange(num_rows) % num_classes)


def convolutional(padding="same", penalty=0.2):
    """Return a net of two convolutions and a dense layer, with strides, padding and a penalty."""
    options: dict = {"kernel_regularizer": l2(penalty), **F64}
    first = L.Conv2D(3, 2, strides=(2, 1), padding=padding, **options), L.Activation("tanh", **F64)
    second = L.Conv2D(2, (2, 3), use_bias=False, **options), L.Activation("tanh", **F64)
    last = L.GlobalAveragePooling2D(**F64), L.Dense(3, **options)
    model = sequential((6, 5, 2), *first, *second, *last, **F64)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    net = traced_once(GenericNeuralNet(model, loss), loss)
    net.theta = 0.6 * np.random.default_rng(1).standard_normal(net.num_parameters)
    return net


# --- nets for which EK-FAC is exact -----------------------------------------------------------

PENALTIES = {
    "no": {},
    "kernel's": {"kernel_penalty": 0.3},
    "one": {"kernel_penalty": 0.3, "bias_penalty": 0.3},
    "two": {"kernel_penalty": 0.3, "bias_penalty": 0.05},
}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("use_bias", [True, False])
def test_one_linear_layer_with_squared_error_is_exact(use_bias, penalty):
    net, examples = linear(use_bias=use_bias, **PENALTIES[penalty])
    B = np.random.default_rng(2).standard_normal((net.num_parameters, 3))
    for A in (Hessian(net, examples), GaussNewton(net, examples), GaussNewton(net, examples, 0.1)):
        solution = solve(A, B, EKFAC(rtol=1e-8))
        # EK-FAC is exact here, so the error is far below its rtol, 1e-8.
        assert relative_error(solution.x, solve(A, B, Direct()).x) < 1e-10
        assert solution.converged.all() and not solution.remedy
        assert relative_error(solve(A, B[:, 0], EKFAC()).x, solution.x[:, 0]) < 1e-12


def test_a_network_is_approximated_and_says_so():
    net, examples = convolutional(), images()
    A = GaussNewton(net, examples, 0.1)
    b = np.random.default_rng(0).standard_normal(net.num_parameters)
    without_aim, with_aim = (solve(A, b, EKFAC(rtol=rtol)) for rtol in (None, 1e-3))
    assert not without_aim.converged.any() and not with_aim.converged.any()
    assert 0.01 < with_aim.residual[0] < 10 and np.isnan(with_aim.min_curvature[0])
    true = np.linalg.norm(b - A @ with_aim.x) / np.linalg.norm(b)
    assert with_aim.residual[0] == pytest.approx(true, rel=1e-10)
    assert with_aim.remedy.startswith("EK-FAC is an approximation, layer by layer: use CG")


# --- other nets, against the definition -------------------------------------------------------


def patches(layer, image, out_shape):
    """Return the input patch of each output pixel of a convolution, (pixels, f)."""
    (kh, kw), (sh, sw) = layer.kernel_size, layer.strides
    if layer.padding == "same":
        sizes = zip(out_shape, (sh, sw), (kh, kw), image.shape, strict=False)
        need = [max((o - 1) * s + k - i, 0) for o, s, k, i in sizes]
        image = np.pad(image, [*((p // 2, p - p // 2) for p in need), (0, 0)])
    corners = [(r * sh, q * sw) for r, q in np.ndindex(*out_shape)]
    return np.array([image[r : r + kh, q : q + kw].ravel() for r, q in corners])


def factors(net, examples):
    """Return the factors (mean_i sum_t a a', mean_i sum_st g g' / T) of each layer.

    a is the layer's input and g its pseudo-gradient, at position t of T and for root s. The sums
    are computed row by row, from plain tapes.
    """
    layers = net.model.layers
    found = {}
    for x in examples.x:
        values = [x[None]]
        for layer in layers:
            values.append(layer(values[-1]).numpy())
        p = np.exp(values[-1][0]) / np.exp(values[-1][0]).sum()
        curved = np.diag(p) - np.outer(p, p)
        for i, layer in enumerate(layers):
            if not layer.trainable_weights:
                continue
            z = tf.constant(values[i + 1])
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(z)
                output = z
                for later in layers[i + 1 :]:
                    output = later(output)
            J = tape.jacobian(output, z, experimental_use_pfor=False).numpy().reshape(len(p), -1)
            # J (c', T c) is the Jacobian of the logits by the layer's output at all T positions.
            # J' H J is sum_s g_s g_s'. The factor needs only the T diagonal blocks (c, c).
            c = z.shape[-1]
            T = J.shape[1] // c
            gg = (J.T @ curved @ J).reshape(T, c, T, c)
            S = np.einsum("tctd->cd", gg) / T
            a = values[i][0]
            if isinstance(layer, L.Conv2D):
                a = patches(layer, a, z.shape[1:3])
            a = a.reshape(T, -1)
            if layer.use_bias:
                a = np.column_stack([a, np.ones(T)])
            old = found.get(i, (0, 0))
            n = len(examples)
            found[i] = (old[0] + a.T @ a / n, old[1] + S / n)
    return list(found.values())


def log_loss(y, output):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y, output)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_eigenbases_of_the_kronecker_factors_and_corrected_eigenvalues(padding):
    """Compare with EK-FAC's definition in dense matrices.

    The eigenvectors are those of the Kronecker factors. The eigenvalues are the diagonal of the
    dense Gauss-Newton matrix in this basis.
    """
    net, examples, penalty, damping = convolutional(padding), images(), 0.2, 0.1
    G = oracles.dense_derivatives(net.model, log_loss, examples.x, examples.y).gauss_newton
    expected = np.zeros_like(G)
    end = 0
    layers = [layer for layer in net.model.layers if layer.trainable_weights]
    for (A, S), layer in zip(factors(net, examples), layers, strict=True):
        f, c = len(A), len(S)
        entries = slice(end, end := end + f * c)
        row_penalty = np.full(f, penalty)
        if layer.use_bias:
            row_penalty[-1] = 0.0
        U = np.linalg.eigh(A + np.diag(row_penalty) / (np.trace(S) / c))[1]
        K = np.kron(U, np.linalg.eigh(S)[1])
        H = G[entries, entries] + np.diag(np.repeat(row_penalty, c))
        eigenvalues = np.diag(K.T @ H @ K) + damping
        expected[entries, entries] = (K / eigenvalues) @ K.T
    assert end == len(G)
    for curvature in (GaussNewton, Hessian):  # for both, EK-FAC uses the Gauss-Newton part
        assert relative_error(inverse(curvature(net, examples, damping)), expected) < 1e-9


def test_the_correction_is_that_of_the_definition_not_the_product_of_eigenvalues():
    """Check that the eigenvalues are those of EK-FAC and not those of K-FAC.

    K-FAC multiplies the eigenvalues of the two factors. These products differ here, because inputs
    and pseudo-gradients are dependent.
    """
    p = logistic("softmax", intercept=True)
    A, ours = p.oracle.features, inverse(Hessian(p.net, p.train, 0.01))
    P = p.net.outputs(p.train.x)
    P = np.exp(P) / np.exp(P).sum(axis=1, keepdims=True)
    S = np.diag(P.mean(axis=0)) - P.T @ P / len(P)
    a, U = np.linalg.eigh(A.T @ A / len(A))
    s, V = np.linalg.eigh(S)
    K = np.kron(U, V)
    corrected = np.diag(K.T @ p.oracle.hessian(p.theta) @ K)
    assert relative_error(ours, (K / (corrected + 0.01)) @ K.T) < 1e-9
    product = np.kron(a, s) + 0.05  # the weight decay is 0.05
    assert relative_error(ours, (K / (product + 0.01)) @ K.T) > 0.02
    assert relative_error(product, corrected) > 0.02


# --- changes that must not matter -------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_batch_size_and_row_order_change_nothing(batch_size, monkeypatch):
    net, examples = convolutional(), images()
    whole = inverse(GaussNewton(net, examples, 0.1))
    shuffled = examples.take(np.random.default_rng(0).permutation(len(examples)))
    for rows in (examples, shuffled):
        A = GaussNewton(net, rows, 0.1, batch_size=batch_size)
        assert relative_error(inverse(A), whole) < 1e-11
    # With this limit on memory, EKFAC takes one row at a time.
    monkeypatch.setattr("influence.solvers.ekfac.VECTORS", 1)
    assert relative_error(inverse(GaussNewton(net, examples, 0.1)), whole) < 1e-11


class Elsewhere(Examples):
    """Examples that pickle every question, as if the rows were in another process."""

    def map_over(self, question, *args, **options):
        return super().map_over(pickle.loads(pickle.dumps(question)), *args, **options)


def test_questions_can_be_sent_to_the_rows():
    net, here = convolutional(), images()
    there = GaussNewton(net, Elsewhere(here.x, here.y), 0.1)
    np.testing.assert_array_equal(inverse(there), inverse(GaussNewton(net, here, 0.1)))


def test_float32_is_float64_rounded():
    p, rounded = (logistic("softmax", dtype=dtype) for dtype in ("float64", "float32"))
    ours = inverse(Hessian(rounded.net, rounded.train, 0.1))
    assert ours.dtype == np.float32
    assert relative_error(ours, inverse(Hessian(p.net, p.train, 0.1))) < 1e-4


# --- as a preconditioner ----------------------------------------------------------------------


DIGITS = load_digits(return_X_y=True)


def iterations(A, b, preconditioner):
    solution = solve(A, b, CG(rtol=1e-8, preconditioner=preconditioner))
    assert solution.converged.all()
    return int(solution.iterations[0]), solution.x


def test_preconditions_the_paper_s_convex_model():
    """Check softmax regression on images. With EKFAC, CG takes a third fewer iterations."""
    x, y = DIGITS
    train = Examples(x[:500] / 16, y[:500])
    net = MulticlassLogisticRegression(64, 10, weight_decay=0.1, intercept=True).fit(train)
    A = Hessian(net, train)
    b = net.gradients(x[500:501] / 16, y[500:501])[0]
    plain, x0 = iterations(A, b, None)
    fewer, x1 = iterations(A, b, EKFAC())
    assert plain >= 1.4 * fewer
    assert relative_error(x1, x0) < 1e-7
    assert relative_error(x0, solve(A, b, Direct()).x) < 1e-7


def test_preconditioning_a_network_gives_the_same_answer():
    """Check a network. CG saves no iterations, because EK-FAC omits the coupling of layers."""
    x, y = DIGITS
    train = Examples((x[:60] / 16).reshape(-1, 8, 8, 1), y[:60])
    net = AllCNN((8, 8, 1), filters=2, strides=(1, 2), dtype="float64")
    net.fit(train, schedule=((300, 1e-2),), batch_size=20)
    b = net.gradients((x[60:61] / 16).reshape(-1, 8, 8, 1), y[60:61])[0]
    damping = 0.06  # the smallest eigenvalue of the Hessian is -0.05
    H, G = (curvature(net, train, damping) for curvature in (Hessian, GaussNewton))
    matrix, gauss_newton = H.dense(), G.dense()
    plain, x0 = iterations(matrix, b, None)
    taken, x1 = iterations(matrix, b, prepare(H, EKFAC()))
    truth = np.linalg.solve(matrix, b)
    assert relative_error(x0, truth) < 1e-5 and relative_error(x1, truth) < 1e-5
    assert taken <= 1.2 * plain
    # The reason is not that Kronecker factors are approximate. With the exact inverses of the
    # blocks of single layers, CG takes more than half as many iterations.
    blocks = np.zeros_like(gauss_newton)
    for affine in affine_layers(net, train.x[:2]).layers:
        own = np.ix_(affine.entries.ravel(), affine.entries.ravel())
        blocks[own] = np.linalg.inv(gauss_newton[own])
    assert iterations(matrix, b, blocks)[0] > 0.5 * taken
    # With the exact inverse of the whole Gauss-Newton matrix, which has the blocks between layers,
    # CG takes at most half of the iterations without a preconditioner.
    whole, x2 = iterations(matrix, b, prepare(G, Direct()))
    assert 2 * whole <= plain and relative_error(x2, truth) < 1e-5


# --- arguments that are refused ---------------------------------------------------------------


@pytest.mark.parametrize("A", [symmetric([1.0, 2.0, 3.0]), 2 * Hessian(*linear(use_bias=True))])
def test_only_curvatures_have_layers(A):
    message = "^A must be a Hessian or GaussNewton operator for EKFAC"
    for solver in (EKFAC(), CG(preconditioner=EKFAC())):
        with pytest.raises(TypeError, match=message):
            solve(A, np.ones(A.shape[0]), solver)


def test_layers_are_refused_by_name():
    net = GenericNeuralNet(sequential((4, 2), L.GRU(3, **F64), L.Dense(1, **F64), **F64), "mse")
    message = "^model must hold theta in layers that are affine .* of GRUCell layer 'gru_cell'"
    with pytest.raises(ValueError, match=message):
        prepare(Hessian(net, Examples(np.ones((3, 4, 2)), np.ones((3, 1)))), EKFAC())


def test_a_penalty_that_mixes_weights_is_refused():
    class Product(keras.regularizers.Regularizer):
        def __call__(self, x):
            return x[0, 0] * x[1, 1]

    layer = L.Dense(3, kernel_regularizer=Product(), name="mixed", **F64)
    net = GenericNeuralNet(sequential((4,), layer, **F64), "mse")
    message = "^model must have regularisers of each weight by itself .* among the layers mixed; us"
    with pytest.raises(ValueError, match=message):
        prepare(Hessian(net, linear(use_bias=True)[1]), EKFAC())


def test_probabilities_are_refused():
    net = dense_net(1, 4, "binary_crossentropy")
    examples = Examples(linear(use_bias=True)[1].x, np.arange(30) % 2)
    with pytest.raises(ValueError, match="^loss must take logits for a Gauss-Newton matrix"):
        prepare(Hessian(net, examples), EKFAC())


def test_a_singular_matrix_is_named_with_a_damping_that_works():
    net, examples = linear(use_bias=True, num_rows=3)  # three rows are fewer than the 5 inputs
    message = "^A must be positive definite for EKFAC, got an eigenvalue of .* in layer 'dense"
    with pytest.raises(DivergenceError, match=message) as info:
        prepare(Hessian(net, examples), EKFAC())
    damping = float(str(info.value).split("at least ")[1].split(",")[0])
    assert 0 < damping < 1e-13
    assert np.isfinite(inverse(Hessian(net, examples, damping))).all()


def test_a_loss_that_is_not_finite_is_named():
    def nan(y, output):
        return tf.where(output[:, 0] < 1e9, output[:, 0] ** 2 * np.nan, 0.0)

    net, examples = linear(use_bias=True)
    broken = GenericNeuralNet(net.model, lambda y, output: output[:, 0] ** 2)
    A = Hessian(broken, examples)
    A.net = GenericNeuralNet(net.model, nan)  # a fake for a loss that becomes NaN in a later batch
    with pytest.raises((DivergenceError, ValueError), match="NaN|infinite|finite"):
        prepare(A, EKFAC())


def test_theta_must_not_have_moved():
    net, examples = linear(use_bias=True)
    A = Hessian(net, examples, 0.1)
    prepared = prepare(A, EKFAC())
    net.theta = net.theta + 1
    for question in (lambda: prepare(A, EKFAC()), lambda: prepared(np.ones(net.num_parameters))):
        with pytest.raises(RuntimeError, match="^theta has changed"):
            question()


def test_self_influence_takes_no_products_for_residuals(monkeypatch):
    net, examples = linear(use_bias=True)
    influence = Influence(net, examples, solver=EKFAC(), damping=0.1)
    G = net.gradients(examples.x, examples.y)
    H = Hessian(net, examples, 0.1).dense()
    own = G + net.penalty_gradient()
    expected = np.einsum("id,id->i", G, np.linalg.solve(H, own.T).T) / len(G)
    prepared = influence.prepared
    monkeypatch.setattr(GaussNewton, "_undamped", None)  # computing a product would raise an error
    monkeypatch.setattr(Hessian, "_undamped", None)
    assert np.isnan(prepared(own.T, measure=False).residual).all()
    # EK-FAC is exact for one layer and the squared error, so self-influence equals the dense
    # formula.
    assert relative_error(influence.self_influence(), expected) < 1e-10


@pytest.mark.parametrize("make", [convolutional, lambda: tanh_layers(penalty=0.1)])
def test_self_influence_by_factors_is_that_of_solves(make):
    net, rows = make(), np.array([7, 2, 5])
    train = images() if len(net.model.input_shape) == 4 else tanh_rows()
    influence = Influence(net, train, solver=EKFAC(), damping=0.3)
    G = net.gradients(train.x, train.y)
    own = G + net.penalty_gradient()
    expected = np.einsum("id,id->i", G, influence.prepared(own.T).x.T) / len(G)
    assert relative_error(influence.self_influence(), expected) < 1e-10
    assert relative_error(influence.self_influence(rows), expected[rows]) < 1e-10


def tanh_rows():
    rng = np.random.default_rng(3)
    return Examples(rng.standard_normal((15, 4)), rng.standard_normal((15, 2)))


def tanh_layers(penalty):
    """Return a net of two dense layers with a normalisation between them. The first has a tanh."""
    options: dict = {"kernel_regularizer": l2(penalty), **F64}
    layers = L.Dense(5, activation="tanh", **options), L.LayerNormalization(**F64)
    net = GenericNeuralNet(sequential((4,), *layers, L.Dense(2, **options), **F64), "mse")
    net.theta = np.random.default_rng(2).standard_normal(net.num_parameters)
    return net


def test_stored_factors_give_the_same_inverse():
    net, train = linear(use_bias=True, kernel_penalty=0.3, bias_penalty=0.3)
    A = GaussNewton(net, train, 0.1)
    made = prepare(A, EKFAC())
    again = prepared_from(A, EKFAC(), factors_of(made))
    B = np.random.default_rng(0).standard_normal((net.num_parameters, 3))
    np.testing.assert_array_equal(again(B).x, made(B).x)
    influences = [
        Influence(net, train, solver=p, damping=0.1).self_influence() for p in (made, again)
    ]
    np.testing.assert_array_equal(*influences)
    with pytest.raises(TypeError, match="prepared must be a prepared EKFAC"):
        factors_of(prepare(A, Direct()))
