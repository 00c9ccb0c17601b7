"""Every solver on every kind of matrix, against a dense factorisation of it by other means."""

import re
import warnings
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf

from influence import (
    CG,
    ConvergenceWarning,
    Direct,
    DivergenceError,
    Examples,
    GaussNewton,
    GenericNeuralNet,
    Hessian,
    Influence,
    LiSSA,
    prepare,
    solve,
)
from influence.solvers import EKFAC, Lanczos, Nystrom
from tests import oracles
from tests.influence.problems import logistic, relative_error, symmetric, tanh_net

D = 24
SOLVERS = {
    "Direct": Direct(),
    "CG": CG(rtol=1e-9, max_iterations=2000),
    "CG with Nystrom": CG(rtol=1e-9, max_iterations=2000, preconditioner=Nystrom(12)),
    "CG with Lanczos": CG(rtol=1e-9, max_iterations=2000, preconditioner=Lanczos(8)),
    "LiSSA": LiSSA(depth=2000, repeats=1, rtol=1e-2),
    "Lanczos": Lanczos(1000, rtol=1e-6),
    "Lanczos of rank 8": Lanczos(8),
    "Nystrom": Nystrom(1000, rtol=1e-6),
    "Nystrom of rank 8": Nystrom(8),
    "EKFAC": EKFAC(),
    "CG with EKFAC": CG(rtol=1e-9, max_iterations=2000, preconditioner=EKFAC()),
}
# A tuple: the tests' order must not hang on the hash seed of each worker.
APPROXIMATE = ("Lanczos of rank 8", "Nystrom of rank 8", "EKFAC")
REMEDIES = {"Lanczos": "Lanczos of rank 8", "Nystrom": "Nystrom of rank 8", "EKFAC": "EK-FAC is an"}
KINDS = [
    "well conditioned",
    "ill conditioned",
    "indefinite",
    "singular",
    "Hessian of logistic regression",
    "Hessian of a CNN",
    "indefinite Hessian of a CNN",
    "Gauss-Newton",
]


def small_cnn():
    """(net, examples, its Hessian by a tape in a tape); d = 29.

    The penalty on the last layer takes the softmax' one flat direction away.
    """
    l2 = keras.regularizers.L2(0.05)
    model = keras.Sequential(
        [
            keras.Input((5, 5, 1), dtype="float64"),
            keras.layers.Conv2D(2, 3, dtype="float64"),
            keras.layers.Activation("tanh", dtype="float64"),
            keras.layers.GlobalAveragePooling2D(dtype="float64"),
            keras.layers.Dense(3, kernel_regularizer=l2, bias_regularizer=l2, dtype="float64"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    net = GenericNeuralNet(model, loss)
    rng = np.random.default_rng(0)
    net.theta = rng.standard_normal(net.num_parameters)
    x, y = rng.standard_normal((12, 5, 5, 1)), rng.integers(0, 3, 12)
    # Keras' own loss object rounds to float32.
    plain = lambda y, z: tf.nn.sparse_softmax_cross_entropy_with_logits(y, z)  # noqa: E731
    penalty = np.repeat([0.0, 2 * 0.05], [20, 9])  # Keras' L2 has no 1/2
    return net, Examples(x, y), oracles.dense_hessian(model, plain, x, y) + np.diag(penalty)


def layered_tanh_net():
    """`tanh_net`, its activation in a layer of its own."""
    net, examples = tanh_net()
    layers = [
        keras.layers.Dense(4, dtype="float64"),
        keras.layers.Activation("tanh", dtype="float64"),
        keras.layers.Dense(1, dtype="float64"),
    ]
    same = GenericNeuralNet(keras.Sequential([keras.Input((3,), dtype="float64"), *layers]), "mse")
    same.theta = net.theta
    return same, examples


@pytest.fixture(scope="module")
def matrices():
    """kind -> (operator or array, the same matrix by other means)."""
    rest = np.linspace(0.5, 4, D - 1)
    arrays = {
        "well conditioned": symmetric(np.linspace(0.5, 4, D)),
        "ill conditioned": symmetric(np.geomspace(1e-8, 1, D)),
        "indefinite": symmetric([-0.5, *rest]),
        "singular": symmetric([0.0, *rest]),
    }
    p = logistic("softmax", num_inputs=8, weight_decay=0.1)
    cnn, images, H = small_cnn()
    damping = 0.1 - np.linalg.eigvalsh(H)[0]
    net, examples = layered_tanh_net()
    plain = lambda y, output: (y - output[:, 0]) ** 2  # noqa: E731
    G = oracles.dense_derivatives(net.model, plain, examples.x, examples.y).gauss_newton
    return {name: (matrix, matrix) for name, matrix in arrays.items()} | {
        "Hessian of logistic regression": (Hessian(p.net, p.train), p.oracle.hessian(p.theta)),
        "Hessian of a CNN": (Hessian(cnn, images, damping), H + damping * np.eye(len(H))),
        "indefinite Hessian of a CNN": (Hessian(cnn, images), H),
        "Gauss-Newton": (GaussNewton(net, examples, 0.2), G + 0.2 * np.eye(len(G))),
    }


def solver_for(name, A):
    """LiSSA with all rows in every batch, so that what it lacks is depth and not luck."""
    how = SOLVERS[name]
    if isinstance(how, LiSSA) and hasattr(A, "examples"):
        how = replace(how, depth=400, batch_size=len(A.examples))
    if name == "CG with EKFAC" and hasattr(A, "examples"):
        how = replace(how, preconditioner=prepare(A, EKFAC()))
    return how


def refused(name, A):
    """EK-FAC has layers to ask, or none and says so."""
    if "EKFAC" not in name or hasattr(A, "examples"):
        return False
    with pytest.raises(TypeError, match="^A must be a Hessian or GaussNewton operator for EKF"):
        solve(A, np.ones(len(A)), SOLVERS[name])
    return True


def approximation(name, A, matrix):
    """What a solver of rank 8 inverts, U diag(values) U' + floor (I - U U'), by its formula."""
    rng, d = np.random.default_rng(0), len(matrix)
    if name == "Lanczos of rank 8":
        w, Q = rng.standard_normal(d), np.zeros((d, 0))
        for _ in range(16):
            for _ in range(2):
                w = w - Q @ (Q.T @ w)
            w = w / np.linalg.norm(w)
            Q, w = np.column_stack([Q, w]), matrix @ w
        values, S = np.linalg.eigh(Q.T @ matrix @ Q)
        U, values = Q @ S[:, -8:], values[-8:]
    else:
        Omega = np.linalg.qr(rng.standard_normal((d, 8)))[0]
        known = getattr(A, "smallest_eigenvalue_bound", 0.0)
        known = A.damping if np.isnan(known) else known
        # What stays of it in the sketch, where A is definite by its damping alone.
        known = known if np.linalg.eigvalsh(Omega.T @ matrix @ Omega)[0] >= known else 0.0
        M = matrix - known * np.eye(d)
        low = M @ Omega @ np.linalg.solve(Omega.T @ M @ Omega, Omega.T @ M)
        values, U = np.linalg.eigh((low + low.T) / 2)
        U, values = U[:, -8:], values[-8:] + known
    return (U * values) @ U.T + values[0] * (np.eye(d) - U @ U.T)


POSITIVE = [
    kind for kind in KINDS if kind not in ("singular", "indefinite") and "indef" not in kind
]


@pytest.mark.parametrize("kind", POSITIVE)
@pytest.mark.parametrize("name", SOLVERS)
def test_positive_definite(name, kind, matrices):
    A, matrix = matrices[kind]
    if refused(name, A):
        return
    how, B = solver_for(name, A), np.random.default_rng(0).standard_normal((len(matrix), 3))
    if kind == "ill conditioned" and isinstance(how, CG):
        how = replace(how, rtol=1e-6)  # 1e-9 is within rounding, 1e-16 times the condition 1e8
    values = np.linalg.eigvalsh(matrix)
    solution = solve(A, B, how)
    true = np.linalg.norm(B - matrix @ solution.x, axis=0) / np.linalg.norm(B, axis=0)
    rounding = 1e-14 * values[-1] / values[0]
    np.testing.assert_allclose(solution.residual, true, rtol=1e-3, atol=rounding)
    seen = solution.min_curvature
    assert np.isnan(seen).all() or (values[0] * (1 - 1e-6) <= seen).all()
    assert np.isnan(seen).all() or (seen <= values[-1] * (1 + 1e-6)).all()
    if name in APPROXIMATE:
        assert not solution.converged.any()
        assert solution.remedy.startswith(REMEDIES[name.split()[0]])
        assert (np.einsum("ij,ij->j", B, solution.x) > 0).all()
        assert (solution.residual < 3).all()
        if name != "EKFAC":  # whose formula is in test_ekfac.py
            expected = np.linalg.solve(approximation(name, A, matrix), B)
            assert relative_error(solution.x, expected) < 1e-6
        return
    if name == "LiSSA" and kind == "ill conditioned":
        assert not solution.converged.any() and (solution.residual > 0.05).all()
        assert "its series unfinished" in solution.remedy
        return
    assert solution.converged.all() and solution.remedy == ""
    assert (true <= 1.001 * how.rtol + rounding).all()
    # |x - A^-1 b| <= |A^-1| |b - A x|
    error = np.linalg.norm(solution.x - np.linalg.solve(matrix, B), axis=0)
    allowed = (true + 1e-7 * (kind == "ill conditioned")) * np.linalg.norm(B, axis=0) / values[0]
    assert (error <= allowed * (1 + 1e-6) + rounding).all()
    if isinstance(how, CG):
        assert (solution.iterations < 2000).all()


@pytest.mark.parametrize("kind", ["indefinite", "indefinite Hessian of a CNN"])
@pytest.mark.parametrize("name", SOLVERS)
def test_indefinite(name, kind, matrices):
    A, matrix = matrices[kind]
    if refused(name, A):
        return
    how, B = solver_for(name, A), np.random.default_rng(0).standard_normal((len(matrix), 3))
    smallest = np.linalg.eigvalsh(matrix)[0]
    if name in ("Direct", "Lanczos"):
        solution = solve(A, B, how)
        assert solution.converged.all()
        assert relative_error(solution.x, np.linalg.solve(matrix, B)) < 1e-9
        np.testing.assert_allclose(solution.min_curvature, smallest, rtol=1e-6)
    elif name == "EKFAC":  # that of the Gauss-Newton part, which is definite
        solution = solve(A, B, how)
        assert not solution.converged.any() and (solution.residual > 0.1).all()
    elif name in ("CG", "CG with EKFAC") or (kind == "indefinite" and name == "CG with Nystrom"):
        solution = solve(A, B, how)
        assert not solution.converged.all()
        worst = solution.min_curvature.min()
        assert smallest * (1 + 1e-9) <= worst < 0
        assert f"negative curvature {worst:.3g} was met" in solution.remedy
    elif kind == "indefinite" and name == "Nystrom of rank 8":
        # One direction of 24 that eight random ones have little of: CG is who meets it, see above.
        solution = solve(A, B, how)
        assert not solution.converged.any() and (solution.residual > 0.1).all()
    else:
        what = "LiSSA diverges at step" if name == "LiSSA" else f"{name.split()[-1]} needs a posit"
        if name in APPROXIMATE or name == "Nystrom":
            what = f"{name.split()[0]} needs a positive definite A"
        with pytest.raises(DivergenceError, match=f"^{what}.* negative curvature of -") as info:
            solve(A, B, how)
        found = re.search(r"negative curvature of (-[0-9.e-]+[0-9])", str(info.value))
        assert found is not None
        assert smallest * (1 + 0.01) <= float(found[1]) < 0  # printed with three digits


@pytest.mark.parametrize("name", SOLVERS)
def test_singular(name, matrices):
    A, matrix = matrices["singular"]
    if refused(name, A):
        return
    how, b = SOLVERS[name], np.ones(D)
    if name in ("Direct", "Lanczos", "Nystrom"):
        with pytest.raises(DivergenceError, match="^A must not be singular, got an eigenvalue of"):
            solve(A, b, how)
        return
    solution = solve(A, b, how)
    assert np.isfinite(solution.x).all()
    assert not solution.converged[0] and solution.residual[0] > 1e-3
    if isinstance(how, CG):
        assert "singular" in solution.remedy or "rounding" in solution.remedy


@pytest.mark.parametrize("name", APPROXIMATE)
def test_one_map_for_every_right_hand_side(name, matrices):
    for kind in POSITIVE:
        A, matrix = matrices[kind]
        if refused(name, A):
            continue
        M = solve(A, np.eye(len(matrix)), SOLVERS[name]).x
        np.testing.assert_allclose(M, M.T, atol=1e-9 * np.abs(M).max())
        assert np.linalg.eigvalsh((M + M.T) / 2)[0] > 0


def test_negative_curvature_reaches_the_user_without_a_tolerance_too():
    net, train = tanh_net()
    smallest = np.linalg.eigvalsh(Hessian(net, train).dense())[0]
    message = f"^Lanczos solved for the test gradients, but .* seen {smallest:.3g}".replace(
        "+", "."
    )
    with pytest.warns(ConvergenceWarning, match=message) as caught:
        Influence(net, train, solver=Lanczos(1000)).scores(train)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():  # and where there is none, nothing is said
        warnings.simplefilter("error")
        for solver in (Lanczos(5), Nystrom(5)):
            scores = Influence(net, train, solver=solver, damping=-2 * smallest).scores(train)
            assert not scores.solution.converged.any()
