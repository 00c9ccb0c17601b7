"""Tests of every solver on every kind of matrix, against an independent dense factorisation."""

import re
import warnings
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy.sparse.linalg import LinearOperator, aslinearoperator

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
from tests.influence.problems import (
    dense_net,
    logistic,
    relative_error,
    ridge,
    sequential,
    symmetric,
    tanh_net,
    through_keras,
)
from tests.influence.solvers.matrices import approximation, inverse

L, F64 = keras.layers, {"dtype": "float64"}
D = 24
_CG = CG(rtol=1e-9, max_iterations=2000)
SOLVERS = {
    "Direct": Direct(),
    "CG": _CG,
    "CG with Direct": replace(_CG, preconditioner=Direct()),
    "CG with Nystrom": replace(_CG, preconditioner=Nystrom(12)),
    "CG with Lanczos": replace(_CG, preconditioner=Lanczos(8)),
    "LiSSA": LiSSA(depth=2000, repeats=1, rtol=1e-2),
    "Lanczos": Lanczos(1000, rtol=1e-6),
    "Lanczos of rank 8": Lanczos(8),
    "Nystrom": Nystrom(1000, rtol=1e-6),
    "Nystrom of rank 8": Nystrom(8),
    "EKFAC": EKFAC(),
    "CG with EKFAC": replace(_CG, preconditioner=EKFAC()),
}
# These solvers are exact. Here Lanczos and Nystrom have full rank.
EXACT = ("Direct", "Lanczos", "Nystrom")
# This must not be a set. The tests of each worker process must be in the same order, and the order
# of a set depends on the process.
APPROXIMATE = ("Lanczos of rank 8", "Nystrom of rank 8", "EKFAC")
REMEDIES = {"Lanczos": "Lanczos of rank 8", "Nystrom": "Nystrom of rank 8", "EKFAC": "EK-FAC is an"}
NETWORK = "Gauss-Newton of a network, damped"
POSITIVE = [
    *("array", "LinearOperator", "products only", "ill conditioned"),
    "Hessian of ridge by the tape",
    "Hessian of softmax in closed form",
    "Hessian of softmax, damped, by the tape",
    "Hessian of a CNN, damped",
    NETWORK,
]


def small_cnn():
    """Return (net, examples, Hessian by nested tapes), with d = 29.

    The penalty on the last layer removes the flat direction of the softmax.
    """
    l2 = keras.regularizers.L2(0.05)
    hidden = L.Conv2D(2, 3, **F64), L.Activation("tanh", **F64), L.GlobalAveragePooling2D(**F64)
    last = L.Dense(3, kernel_regularizer=l2, bias_regularizer=l2, **F64)
    model = sequential((5, 5, 1), *hidden, last, **F64)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    net = GenericNeuralNet(model, loss)
    rng = np.random.default_rng(0)
    net.theta = rng.standard_normal(net.num_parameters)
    x, y = rng.standard_normal((12, 5, 5, 1)), rng.integers(0, 3, 12)
    # Keras' own loss object would round to float32.
    plain = lambda y, z: tf.nn.sparse_softmax_cross_entropy_with_logits(y, z)  # noqa: E731
    penalty = np.repeat([0.0, 2 * 0.05], [20, 9])  # Keras' L2 has no factor 1/2
    return net, Examples(x, y), oracles.dense_hessian(model, plain, x, y) + np.diag(penalty)


def layered_tanh_net():
    """Return (net, examples) of `tanh_net`, with the activation in a separate layer."""
    net, examples = tanh_net()
    layers = L.Dense(4, **F64), L.Activation("tanh", **F64), L.Dense(1, **F64)
    same = GenericNeuralNet(sequential((3,), *layers, **F64), "mse")
    same.theta = net.theta
    return same, examples


@pytest.fixture(scope="module")
def matrices():
    """Map each kind to (operator or array, the same matrix computed independently)."""
    rest = np.linspace(0.5, 4, D - 1)
    well = symmetric(np.linspace(0.5, 4, D))
    arrays = {
        "array": well,
        "ill conditioned": symmetric(np.geomspace(1e-8, 1, D)),
        "indefinite": symmetric([-0.5, *rest]),
        "singular": symmetric([0.0, *rest]),
    }
    linear = ridge(num_rows=30, num_inputs=19)
    p = logistic("softmax", num_inputs=8, weight_decay=0.1)
    taped, softmax = through_keras(p), p.oracle.hessian(p.theta)
    cnn, images, H = small_cnn()
    damping = 0.1 - np.linalg.eigvalsh(H)[0]
    net, examples = layered_tanh_net()
    plain = lambda y, output: (y - output[:, 0]) ** 2  # noqa: E731
    G = oracles.dense_derivatives(net.model, plain, examples.x, examples.y).gauss_newton
    without_dense_form = LinearOperator(well.shape, matvec=lambda v: well @ v, dtype=well.dtype)
    by_tape = Hessian(taped.net, taped.train, 0.2, batch_size=7)
    ridge_hessian = linear.oracle.hessian(linear.theta)
    return {name: (matrix, matrix) for name, matrix in arrays.items()} | {
        "LinearOperator": (aslinearoperator(well), well),
        "products only": (without_dense_form, well),
        "Hessian of ridge by the tape": (Hessian(linear.net, linear.train), ridge_hessian),
        "Hessian of softmax in closed form": (Hessian(p.net, p.train), softmax),
        "Hessian of softmax, damped, by the tape": (by_tape, softmax + 0.2 * np.eye(len(softmax))),
        "Hessian of a CNN, damped": (Hessian(cnn, images, damping), H + damping * np.eye(len(H))),
        "indefinite Hessian of a CNN": (Hessian(cnn, images), H),
        NETWORK: (GaussNewton(net, examples, 0.2), G + 0.2 * np.eye(len(G))),
    }


def solver_for(name, A):
    """Return the solver. LiSSA gets batches of all rows, so it has no sampling noise."""
    how = SOLVERS[name]
    if isinstance(how, LiSSA) and hasattr(A, "examples"):
        how = replace(how, depth=400, batch_size=len(A.examples))
    if name == "CG with EKFAC" and hasattr(A, "examples"):
        how = replace(how, preconditioner=prepare(A, EKFAC()))
    return how


def refused(name, A):
    """Return True if the solver needs EK-FAC and A has no layers. Then also check the error."""
    if "EKFAC" not in name or hasattr(A, "examples"):
        return False
    with pytest.raises(TypeError, match="^A must be a Hessian or GaussNewton operator for EKF"):
        solve(A, np.ones(A.shape[0]), SOLVERS[name])
    return True


@pytest.mark.parametrize("kind", POSITIVE)
@pytest.mark.parametrize("name", SOLVERS)
def test_positive_definite(name, kind, matrices):
    A, matrix = matrices[kind]
    if refused(name, A):
        return
    how, B = solver_for(name, A), np.random.default_rng(0).standard_normal((len(matrix), 3))
    ill = kind == "ill conditioned"
    if ill and isinstance(how, CG):
        # The condition number is 1e8. Rounding errors times this number exceed CG's rtol, 1e-9.
        how = replace(how, rtol=1e-6)
    values = np.linalg.eigvalsh(matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(A, B, how)
        alone = prepare(A, how)(B[:, 1])
    true = np.linalg.norm(B - matrix @ solution.x, axis=0) / np.linalg.norm(B, axis=0)
    rounding = 1e-14 * values[-1] / values[0]
    np.testing.assert_allclose(solution.residual, true, rtol=1e-4, atol=rounding)
    assert solution.iterations.shape == (3,) and (solution.iterations >= 1).all()
    assert alone.x.shape == (len(matrix),) and alone.residual.shape == (1,)
    if not isinstance(how, CG):  # CG's columns share search directions, so one column alone differs
        assert relative_error(alone.x, solution.x[:, 1]) < (1e-6 if ill else 1e-11)
    seen = solution.min_curvature
    if name in EXACT:
        np.testing.assert_allclose(seen, values[0], rtol=1e-8, atol=1e-15)
    elif name in ("LiSSA", "EKFAC"):
        assert np.isnan(seen).all()
    else:
        assert (values[0] * (1 - 1e-6) <= seen).all() and (seen <= values[-1] * (1 + 1e-6)).all()
    if name in APPROXIMATE:
        assert not solution.converged.any()
        assert solution.remedy.startswith(REMEDIES[name.split()[0]])
        assert (np.einsum("ij,ij->j", B, solution.x) > 0).all()
        assert (solution.residual < 3).all()
        if name != "EKFAC":  # test_ekfac.py tests the formula of EKFAC
            expected = np.linalg.solve(approximation(A, matrix, how), B)
            assert relative_error(solution.x, expected) < 1e-6
        return
    if name == "LiSSA" and ill:
        assert not solution.converged.any() and (solution.residual > 0.05).all()
        assert "its series unfinished" in solution.remedy
        return
    assert solution.converged.all() and solution.remedy == "" and alone.converged.all()
    assert (true <= (1e-11 if name in EXACT else 1.001 * how.rtol) + rounding).all()
    # The error is bounded by |x - A^-1 b| <= |A^-1| |b - A x|.
    error = np.linalg.norm(solution.x - np.linalg.solve(matrix, B), axis=0)
    allowed = (true + 1e-7 * ill) * np.linalg.norm(B, axis=0) / values[0]
    assert (error <= allowed * (1 + 1e-6) + rounding).all()
    if isinstance(how, CG):
        assert (solution.iterations < 2000).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_right_hand_sides_of_zero(name, matrices):
    A, matrix = matrices["array"]
    if refused(name, A):
        return
    B = np.zeros((D, 3))
    B[:, 1] = 1
    solution = solve(A, B, SOLVERS[name])
    np.testing.assert_array_equal(solution.x[:, [0, 2]], 0)
    np.testing.assert_array_equal(solution.residual[[0, 2]], 0)
    if name not in APPROXIMATE:
        assert solution.converged.all()
        error = relative_error(solution.x[:, 1], np.linalg.solve(matrix, B[:, 1]))
        assert error < 10 * SOLVERS[name].rtol


@pytest.mark.parametrize("name", SOLVERS)
def test_what_is_prepared_is_not_prepared_again(name, matrices):
    A, b = matrices["array"][0], np.ones(D)
    if refused(name, A):
        return
    prepared = prepare(A, SOLVERS[name])
    assert prepare(A, prepared) is prepared and prepared.solver is SOLVERS[name]
    np.testing.assert_array_equal(solve(A, b, prepared).x, prepared(b).x)
    np.testing.assert_array_equal(b, 1)  # the solver does not overwrite the right-hand side


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "solver",
    [Direct(), CG(), LiSSA(depth=300, repeats=1), Lanczos(D, rtol=1e-5), Nystrom(D, rtol=1e-5)],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.parametrize("of_b", ["float32", "float64", "int64"])
def test_the_matrix_decides_the_dtype(dtype, solver, of_b, matrices):
    A, b = matrices["array"][0], np.arange(1, D + 1).astype(of_b)
    solution = solve(A.astype(dtype), b, solver)
    assert solution.x.dtype == np.dtype(dtype)
    assert solution.converged.all()
    if not isinstance(solver, LiSSA):
        error = relative_error(solution.x, np.linalg.solve(A, b))
        assert error < (1e-4 if dtype == "float32" else 1e-5)
    of_integers = solve(np.array([[4, 1], [1, 3]]), [1, 2], replace(solver, rtol=1e-1))
    assert of_integers.x.dtype == np.float64
    rtol = 1e-1 if isinstance(solver, LiSSA | CG) else 1e-6
    np.testing.assert_allclose(of_integers.x, [1 / 11, 7 / 11], rtol=rtol)


@pytest.mark.parametrize("solver", [Lanczos(7), Nystrom(7), LiSSA(depth=40, repeats=2)], ids=repr)
def test_the_seed_and_nothing_else_decides(solver, matrices):
    # A has the order 80. The solver's space has only rank + 10 = 17 dimensions, so it depends on
    # the seed.
    A = symmetric(np.geomspace(1e-2, 1, 80))
    if isinstance(solver, LiSSA):
        A = matrices["Hessian of softmax, damped, by the tape"][0]
    B = np.random.default_rng(1).standard_normal((A.shape[0], 3))
    first = solve(A, B, solver).x
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    np.testing.assert_array_equal(solve(A, B, solver).x, first)
    assert np.random.random() == expected  # the solver does not use the global seed
    assert relative_error(solve(A, B, replace(solver, seed=1)).x, first) > 1e-4


# --- approximations of low rank --------------------------------------------------------------

SPECTRUM = np.geomspace(1e-2, 1, 40)


@pytest.mark.parametrize("rank", [40, 47])
@pytest.mark.parametrize("kind", [Lanczos, Nystrom])
def test_full_rank_is_exact(kind, rank):
    A, B = symmetric(SPECTRUM), np.random.default_rng(1).standard_normal((40, 3))
    solution = solve(A, B, kind(rank, rtol=1e-10))
    assert relative_error(solution.x, np.linalg.solve(A, B)) < 1e-11
    assert solution.converged.all() and solution.iterations.tolist() == [1] * 3
    np.testing.assert_allclose(solution.min_curvature, 1e-2, rtol=1e-10)
    bound = 1e-2 if kind is Lanczos else np.nan
    assert solution.eigenvalue_bound == pytest.approx(bound, rel=1e-10, nan_ok=True)
    aimless = solve(A, B, kind(rank))
    assert not aimless.converged.any() and (aimless.residual < 1e-12).all()
    missed = solve(A, B, kind(5, rtol=1e-3))
    assert not missed.converged.any()
    start = f"{kind.__name__} of rank 5 leaves out too much of A: use a larger rank"
    assert missed.remedy.startswith(start)


@pytest.mark.parametrize("kind", [Lanczos, Nystrom])
def test_low_rank_plus_damping_is_exact(kind):
    """Check a matrix of rank six, from six rows, plus damping, at rank 9.

    Lanczos and Nystrom replace all other eigenvalues by the floor, the damping. This is exact.
    """
    net, rng = dense_net(1, 20, "mse"), np.random.default_rng(0)
    few = Examples(rng.standard_normal((6, 20)), rng.standard_normal(6))
    A = GaussNewton(net, few, damping=0.3)
    b = rng.standard_normal(21)
    solution = solve(A, b, kind(9, rtol=1e-10))
    assert relative_error(solution.x, np.linalg.solve(A.dense(), b)) < 1e-10
    # GaussNewton knows that no eigenvalue is below the damping.
    assert solution.converged[0] and solution.eigenvalue_bound == 0.3


@pytest.mark.parametrize("rank", [1, 3, 10, 33])
@pytest.mark.parametrize("kind", [Lanczos, Nystrom])
def test_low_rank_is_fixed_linear_and_positive_definite(kind, rank):
    A, B = symmetric(SPECTRUM), np.random.default_rng(1).standard_normal((40, 3))
    M, solution = inverse(A, kind(rank)), solve(A, B, kind(rank))
    np.testing.assert_allclose(M, M.T, atol=1e-12 * np.abs(M).max())
    values = np.linalg.eigvalsh(M)
    # M is the inverse of an approximation of A. The largest eigenvalue of A is 1, and that of the
    # approximation is not larger.
    assert values[0] >= 1 - 1e-9
    # Lanczos replaces all eigenvalues of A but the `rank` largest by a floor. The floor must not be
    # much smaller than the largest eigenvalue that it replaces.
    if kind is Lanczos:
        assert values[-1] <= 1 / SPECTRUM[40 - rank - 1] * 1.5
    np.testing.assert_allclose(solution.x, M @ B, rtol=1e-9, atol=1e-11)
    np.testing.assert_array_equal(solution.x, solve(A, B, kind(rank)).x)
    assert not solution.converged.any() and 1e-2 * (1 - 1e-9) <= solution.min_curvature[0] <= 1


@pytest.mark.parametrize("name", APPROXIMATE)
def test_one_map_for_every_right_hand_side(name, matrices):
    for kind in POSITIVE:
        A, matrix = matrices[kind]
        if refused(name, A):
            continue
        M = solve(A, np.eye(len(matrix)), SOLVERS[name]).x
        np.testing.assert_allclose(M, M.T, atol=1e-9 * np.abs(M).max())
        assert np.linalg.eigvalsh((M + M.T) / 2)[0] > 0
        B = np.random.default_rng(0).standard_normal((len(matrix), 2))
        assert relative_error(solve(A, B, SOLVERS[name]).x, M @ B) < 1e-9


# --- indefinite and singular matrices --------------------------------------------------------


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
        assert solution.converged.all() and (solution.residual < 1e-12).all()
        assert relative_error(solution.x, np.linalg.solve(matrix, B)) < 1e-11
        np.testing.assert_allclose(solution.min_curvature, smallest, rtol=1e-10)
    elif name == "EKFAC":  # EKFAC inverts the Gauss-Newton part, which is positive definite
        solution = solve(A, B, how)
        assert not solution.converged.any() and (solution.residual > 0.1).all()
    elif name in ("CG", "CG with EKFAC") or (kind == "indefinite" and name == "CG with Nystrom"):
        solution = solve(A, B, how)
        stopped, worst = ~solution.converged, solution.min_curvature.min()
        assert stopped.any() and (solution.residual[stopped] > 1e-3).all()
        # min_curvature is a Rayleigh quotient, so it is not below the smallest eigenvalue.
        assert smallest * (1 + 1e-9) <= worst < 0
        assert np.isfinite(solution.x).all()
        what = f"A is not positive definite: negative curvature {worst:.3g} was met"
        assert solution.remedy.startswith(what)
        assert f"a damping well above {-worst:.3g}" in solution.remedy
    elif kind == "indefinite" and name == "Nystrom of rank 8":
        # Nystrom sketches 8 of 24 dimensions. It does not find the negative eigenvalue if its
        # eigenvector is almost orthogonal to them. Then it only reports large residuals.
        solution = solve(A, B, how)
        assert not solution.converged.any() and (solution.residual > 0.1).all()
    elif name == "CG with Direct":
        message = f"^preconditioner must be positive definite, got a curvature of {smallest:.3g}"
        with pytest.raises(ValueError, match=message):
            solve(A, B, how)
    else:
        who = next(who for who in ("Lanczos", "Nystrom", "LiSSA") if who in name)
        what = f"{who} needs a positive definite A"
        if who == "Lanczos":
            what += f" at a rank below d = {len(matrix)}, met a"
        if name == "LiSSA":
            what = r"LiSSA diverges at step \d+ with scale .* along its iterates A has a"
        with pytest.raises(DivergenceError, match=f"^{what}.* negative curvature of -") as info:
            solve(A, B, how)
        found = re.search(r"negative curvature of (-[0-9.e-]+[0-9])", str(info.value))
        assert found is not None
        # The reported curvature is not below the smallest eigenvalue, apart from rounding to the
        # three digits of the message.
        assert smallest * (1 + 0.01) <= float(found[1]) < 0
        if name == "Nystrom" or (who == "Lanczos" and kind == "indefinite"):
            assert float(found[1]) < 0.7 * smallest
        advice = "no scale helps" if name == "LiSSA" else f"a damping well above {found[1][1:]}"
        assert advice in str(info.value)


@pytest.mark.parametrize("name", SOLVERS)
def test_singular(name, matrices):
    A, matrix = matrices["singular"]
    if refused(name, A):
        return
    how, b = SOLVERS[name], np.ones(D)
    if name in EXACT or name == "CG with Direct":
        with pytest.raises(DivergenceError, match="^A must not be singular, got an eigenvalue of"):
            solve(A, b, how)
        return
    solution = solve(A, b, how)
    assert np.isfinite(solution.x).all()
    assert not solution.converged[0] and solution.residual[0] > 1e-3
    if isinstance(how, CG):
        assert "singular" in solution.remedy or "rounding" in solution.remedy
    if name == "LiSSA":
        assert "series unfinished" in solution.remedy


@pytest.mark.parametrize("kind", [Lanczos, Nystrom])
def test_singular_is_refused_by_low_rank_where_it_shows(kind):
    A = symmetric([*np.zeros(30), *np.linspace(1, 2, 10)])
    for rank in (12, 40):
        with pytest.raises(DivergenceError, match="^A must not be singular, got an eigenvalue of"):
            prepare(A, kind(rank))
        prepare(A + 1e-6 * np.eye(40), kind(rank))
    # At rank 5, below the rank 10 of A, the solver finds no eigenvalue of 0. It replaces the zeros
    # by a positive floor, and only the residual shows the error.
    assert solve(A, np.ones(40), kind(5)).residual[0] > 0.1
    with pytest.raises(DivergenceError, match="^A must not be singular"):
        prepare(np.zeros((40, 40)), kind(5))


@pytest.mark.parametrize("when", [0, 5])
@pytest.mark.parametrize("name", SOLVERS)
def test_an_operator_that_gives_nan_is_named(name, when, matrices):
    count, matrix = iter(range(100_000)), matrices["array"][0]

    def product(v):
        return matrix @ v * (np.nan if next(count) >= when else 1)

    A = LinearOperator((D, D), matvec=product, dtype=np.float64)
    if refused(name, A):
        return
    with pytest.raises((DivergenceError, ValueError), match="finite|NaN|nan|infs") as info:
        solve(A, np.ones(D), SOLVERS[name])
    if name.split()[0] in ("LiSSA", "Lanczos", "Nystrom"):
        who = f"^A must have finite products, got NaN or infinity .* in {name.split()[0]};"
        assert re.match(who, str(info.value))


def test_negative_curvature_reaches_the_user_without_a_tolerance_too():
    net, train = tanh_net()
    smallest = np.linalg.eigvalsh(Hessian(net, train).dense())[0]
    message = f"^Lanczos solved for the test gradients, but .* seen {smallest:.3g}"
    with pytest.warns(ConvergenceWarning, match=message) as caught:
        Influence(net, train, solver=Lanczos(1000), curvature=Hessian).scores(train)
    found = [warning for warning in caught if warning.category is ConvergenceWarning]
    assert [warning.filename for warning in found] == [__file__]
    # These solvers meet no negative curvature, so they must not warn.
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        for solver in (Lanczos(5), Nystrom(5)):
            how = {"damping": -2 * smallest, "curvature": Hessian}
            scores = Influence(net, train, solver=solver, **how).scores(train)
            assert not scores.solution.converged.any()
