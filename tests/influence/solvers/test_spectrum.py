import sys

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator

from influence import (
    CG,
    ConvergenceWarning,
    DivergenceError,
    Examples,
    GaussNewton,
    Hessian,
    History,
    solve,
)
from influence.solvers.spectrum import spectrum, suggest_damping
from tests.influence import recorded
from tests.influence.problems import dense_net, logistic, symmetric, tanh_net, through_keras
from tests.influence.solvers.matrices import counting

# `influence.solvers.spectrum` is the function that the package exports, not the module.
MODULE = sys.modules["influence.solvers.spectrum"]

D = 150


@pytest.fixture(params=["dense", "iterated"])
def path(request, monkeypatch):
    """Run each test with dense and with iterative eigenvalues."""
    if request.param == "iterated":
        monkeypatch.setattr(MODULE, "_FEW", 8)


def test_both_ends(path):
    values = np.concatenate([[-0.5, -0.1], np.geomspace(1e-3, 1, D - 4), [5.0, 7.0]])
    A = symmetric(values)
    for k in (1, 2):
        found = spectrum(A, k)
        np.testing.assert_allclose(found.smallest, values[:k], rtol=1e-9)
        np.testing.assert_allclose(found.largest, values[::-1][:k], rtol=1e-9)
        assert found.converged
        assert (found.smallest_residuals < 7e-6).all() and (found.largest_residuals < 7e-6).all()


def test_residuals_are_true_ones(path):
    """Check the residuals of eigenvalues that few products have found only inaccurately."""
    A = symmetric(np.linspace(-1, 1, 600))
    found = spectrum(A, max_products=1, rtol=1e-10)
    assert found.smallest[0] >= -1 - 1e-12 and found.largest[0] <= 1 + 1e-12
    # Some eigenvalue of A is not further from the found value than the residual.
    values = np.linspace(-1, 1, 600)
    for value, residual in (
        (found.smallest[0], found.smallest_residuals[0]),
        (found.largest[0], found.largest_residuals[0]),
    ):
        assert np.abs(values - value).min() <= residual + 1e-12


def test_what_did_not_converge_says_so(monkeypatch):
    monkeypatch.setattr(MODULE, "_FEW", 8)
    monkeypatch.setattr(MODULE, "_LARGEST_BASIS", 32)
    A = symmetric(np.geomspace(1e-9, 1, 400))
    found = spectrum(A, max_products=40, rtol=1e-12)
    assert not found.converged
    assert found.smallest_residuals[0] > 1e-12 and found.smallest[0] > 1e-9
    assert found.products < 400
    with pytest.warns(ConvergenceWarning, match="the spectrum's ends still have residuals of .* "):
        monkeypatch.setattr(MODULE, "_LARGEST_BASIS", 3)
        suggest_damping(A - 0.1 * np.eye(400))


def test_an_eigenvalue_of_zero_is_found_in_few_products(monkeypatch):
    """Check a smallest eigenvalue of 0. Its tolerance is relative to the largest eigenvalue.

    An error relative to the value 0 itself could never be small enough.
    """
    monkeypatch.setattr(MODULE, "_FEW", 8)
    monkeypatch.setattr(MODULE, "_LARGEST_BASIS", 40)
    found = spectrum(symmetric(np.linspace(0, 1, 300)))
    assert found.converged and abs(found.smallest[0]) < 1e-6
    assert found.products < 220


@pytest.mark.parametrize("matrix", [np.zeros((D, D)), 3 * np.eye(D), -3 * np.eye(D)])
def test_multiples_of_the_identity(path, matrix):
    found = spectrum(matrix, 2)
    np.testing.assert_allclose(found.smallest, matrix[0, 0], atol=1e-14)
    np.testing.assert_allclose(found.largest, matrix[0, 0], atol=1e-14)
    assert found.converged


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e200, 1e300])
def test_matrices_of_extreme_size(path, size):
    """Check that residuals and the suggested damping scale with the matrix."""
    A = symmetric(np.linspace(-1, 10, D))
    found = spectrum(size * A)
    assert found.converged and found.smallest[0] == pytest.approx(-size, rel=1e-9)
    assert found.largest[0] == pytest.approx(10 * size, rel=1e-9)
    residuals = [found.smallest_residuals[0] / size, found.largest_residuals[0] / size]
    assert 0 < min(residuals) and max(residuals) < 1e-4
    assert suggest_damping(size * A) / size == pytest.approx(suggest_damping(A), rel=1e-3)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_small_matrices(d):
    values = np.arange(1.0, d + 1)
    found = spectrum(symmetric(values), d)
    np.testing.assert_allclose(found.smallest, values, rtol=1e-12)
    np.testing.assert_allclose(found.largest, values[::-1], rtol=1e-12)


def test_products_are_counted(path):
    A = symmetric(np.geomspace(1e-2, 1, D))
    operator, widths = counting(A)
    found = spectrum(operator)
    assert found.products == sum(widths)


def test_operators_of_nets(path):
    net, examples = tanh_net()
    values = np.linalg.eigvalsh(Hessian(net, examples).dense())
    found = spectrum(Hessian(net, examples, 0.3), 2)
    np.testing.assert_allclose(found.smallest, values[:2] + 0.3, rtol=1e-8)
    np.testing.assert_allclose(found.largest, values[:-3:-1] + 0.3, rtol=1e-8)


def test_float32_is_judged_by_float32(path):
    A = symmetric(np.geomspace(1e-2, 1, D)).astype(np.float32)
    found = spectrum(A)
    assert found.converged and found.smallest[0] == pytest.approx(1e-2, rel=1e-3)


def test_the_same_matrix_gives_the_same_answer_and_no_global_seed_is_touched(path):
    A = symmetric(np.geomspace(1e-2, 1, D))
    first = spectrum(A)
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    again = spectrum(A)
    assert np.random.random() == expected
    np.testing.assert_array_equal(again.smallest, first.smallest)
    np.testing.assert_array_equal(again.largest, first.largest)


# --- damping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [1e-5, 1e-2])
def test_the_damping_suggested_makes_it_definite_and_less_does_not(path, margin):
    A = symmetric([-0.3, *np.linspace(0.01, 4, D - 1)])
    damping = suggest_damping(A, margin=margin)
    values = np.linalg.eigvalsh(A + damping * np.eye(D))
    assert values[0] > 0 and values[-1] / values[0] <= 1 / margin * (1 + 1e-6)
    exact = (margin * 4 + 0.3) / (1 - margin)
    # The suggestion is on the safe side: it exceeds the exact value by the error of the
    # eigenvalues, which is at most 5e-6 of the largest one, 4.
    assert exact * (1 - 1e-12) <= damping < exact + 5e-6 * 4
    assert solve(A + damping * np.eye(D), np.ones(D), CG(max_iterations=5000)).converged.all()
    below = A + (0.3 - 1e-3) * np.eye(D)
    assert suggest_damping(below, margin=margin) > 0


def test_no_damping_where_none_is_needed(path):
    assert suggest_damping(symmetric(np.linspace(0.1, 4, D))) == 0.0
    p = logistic("softmax", weight_decay=0.05)
    assert suggest_damping(Hessian(p.net, p.train)) == 0.0


@pytest.mark.parametrize("values", [np.full(D, -1.0), np.linspace(-3, -0.1, D), [-3, *[1e-3] * D]])
def test_where_negative_curvature_is_largest_the_margin_is_of_that(path, values):
    A, size = symmetric(values), -np.min(values)
    damping = suggest_damping(A, margin=1e-2)
    assert damping == pytest.approx(size * (1 + 1e-2) / (1 - 1e-2), rel=1e-5)
    shifted = np.linalg.eigvalsh(A) + damping
    assert shifted[0] > 0.02 * size and shifted[-1] / shifted[0] <= 100


def test_no_damping_suits_a_matrix_of_zeros(path):
    with pytest.raises(ValueError, match="^A must not be zero, got no eigenvalue but 0"):
        suggest_damping(np.zeros((D, D)))


def test_what_was_found_by_iteration_is_not_complete(path):
    small = spectrum(symmetric(np.geomspace(1e-2, 1, D)))
    assert small.complete == (MODULE._FEW > D)


def test_damping_is_added_to_what_there_is():
    net, examples = tanh_net()
    smallest, largest = np.linalg.eigvalsh(Hessian(net, examples).dense())[[0, -1]]
    whole = suggest_damping(Hessian(net, examples))
    rest = suggest_damping(Hessian(net, examples, 0.1 * -smallest))
    assert whole == pytest.approx((1e-5 * largest - smallest) / (1 - 1e-5), rel=1e-9)
    assert rest == pytest.approx(whole - 0.1 * -smallest, rel=1e-4)
    values = np.linalg.eigvalsh(Hessian(net, examples, whole).dense())
    assert values[0] == pytest.approx(1e-5 * values[-1], rel=1e-6)


def test_what_the_model_knows_counts():
    """Check a Gauss-Newton matrix of rank 3, whose smallest eigenvalue is 0."""
    rng = np.random.default_rng(0)
    few = Examples(rng.standard_normal((3, 20)), rng.standard_normal(3))
    net = dense_net(1, 20, "mse")
    assert GaussNewton(net, few).smallest_eigenvalue_bound == 0.0
    largest = np.linalg.eigvalsh(GaussNewton(net, few).dense())[-1]
    # The suggestion takes the bound that the model knows, 0. The computed eigenvalue may be
    # negative by rounding.
    assert suggest_damping(GaussNewton(net, few), margin=1e-3) == pytest.approx(
        1e-3 * largest / (1 - 1e-3), rel=1e-9
    )


def test_through_keras_the_same():
    p = logistic("sigmoid", weight_decay=1e-4)
    taped = through_keras(p)
    a = spectrum(Hessian(p.net, p.train))
    b = spectrum(Hessian(taped.net, taped.train))
    np.testing.assert_allclose(a.smallest, b.smallest, rtol=1e-9)


# --- arguments that are refused --------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"^k must be an integer in \[1, 3\], got 0"),
        ({"k": 4}, r"^k must be an integer in \[1, 3\], got 4"),
        ({"k": 1.0}, r"^k must be an integer in \[1, 3\], got 1\.0"),
        ({"rtol": 0.0}, r"^rtol must lie between 0 and 1, got 0\.0"),
        ({"rtol": float("nan")}, "^rtol must lie between 0 and 1, got nan"),
        ({"max_products": 0}, "^max_products must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        spectrum(np.eye(3), **options)


def test_bad_matrices(path):
    with pytest.raises(ValueError, match="^A must be square"):
        spectrum(np.ones((2, 3)))
    with pytest.raises(ValueError, match="^A must be symmetric"):
        spectrum(np.triu(np.ones((3, 3))))
    nan = LinearOperator((D, D), matvec=lambda v: np.full(D, np.nan), dtype=float)
    with pytest.raises(DivergenceError, match="^A must have finite products, got NaN"):
        spectrum(nan)


@pytest.mark.parametrize("margin", [0.0, 1.0, -0.1, float("nan")])
def test_bad_margins(margin):
    with pytest.raises(ValueError, match=f"^margin must lie between 0 and 1, got {margin}"):
        suggest_damping(np.eye(3), margin=margin)


def test_the_damping_is_at_least_that_of_the_recorded_training(tmp_path):
    recorded.train(tmp_path, epochs=3, batch_size=16)
    history = History.load(tmp_path)
    least = (1 - recorded.MOMENTUM) / (recorded.RATE * 3 * 3)
    assert suggest_damping(symmetric(np.linspace(0.1, 4, D)), history=history) == pytest.approx(
        least, rel=1e-6
    )
    indefinite = symmetric(np.linspace(-9, 4, D))
    assert suggest_damping(indefinite, history=history) == suggest_damping(indefinite) > least
