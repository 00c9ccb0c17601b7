import numpy as np
import pytest
from scipy.sparse.linalg import aslinearoperator

from benchmarks import cnn, table, targets
from benchmarks.__main__ import SMOKE
from influence import CG, Direct, GaussNewton, Hessian
from influence.solvers.base import Raw


@pytest.fixture(scope="module")
def trained(part, digits, folder):
    net, train, test = cnn._trained(digits, SMOKE.network, folder)
    return net, train, net.gradients(test.x, test.y)[0]


def test_every_way_but_ek_fac_alone_reaches_the_tolerance(part):
    runs = {run["method"]: run for run in part["runs"]}
    assert set(runs) >= {"CG", "CG after Gauss-Newton", "CG after EK-FAC", "EK-FAC"}
    for method, run in runs.items():
        assert "error" not in run, run
        assert run["meets"] == (method != "EK-FAC"), run
        assert (run["residual"] <= SMOKE.network.rtol) == run["meets"]
        assert 0 <= run["prepare_seconds"] < run["seconds"]
    assert runs["EK-FAC"]["residual"] > 0.05
    assert runs["CG after Gauss-Newton"]["iterations"] < 0.7 * runs["CG"]["iterations"]


def test_iterations_are_those_of_the_definition(part, trained):
    net, train, b = trained
    G = GaussNewton(net, train, SMOKE.network.damping).dense().astype(float)
    H = Hessian(net, train, SMOKE.network.damping).dense().astype(float)
    for matrix, A in {"Gauss-Newton": G, "Hessian": H}.items():
        found = part["cg_iterations"][matrix]
        plain = plain_iterations(A, b.astype(float), SMOKE.network.rtol)
        assert found["none"] == pytest.approx(plain, abs=1)
        assert 0 < found["layers"] <= found["EK-FAC"] and found["EK-FAC damped more"] > 0


def plain_iterations(A, b, rtol):
    """Return the number of iterations that textbook conjugate gradients need."""
    x, r = np.zeros_like(b), b.copy()
    p, steps = r.copy(), 0
    while np.linalg.norm(b - A @ x) > rtol * np.linalg.norm(b):
        step = (r @ r) / (p @ A @ p)
        x += step * p
        before, r = r @ r, r - step * (A @ p)
        p = r + (r @ r) / before * p
        steps += 1
    return steps


def test_the_residual_is_the_damped_hessians(part, trained):
    net, train, b = trained
    H = Hessian(net, train).dense() + SMOKE.network.damping * np.eye(part["d"])
    x = np.linalg.solve(H, b)
    solved = cnn._timed(Hessian(net, train, SMOKE.network.damping), b, lambda: Known(0.9 * x))
    assert solved["residual"] == pytest.approx(0.1, rel=1e-2)


class Known:
    """A solver that returns the answer that it was made with."""

    rtol = 1e-4

    def __init__(self, x):
        self.x = x

    def prepare(self, A):
        return lambda B: Raw(self.x[:, None].astype(B.dtype), 1)


def test_training_is_kept_and_found_again(part, digits, folder, trained):
    (kept,) = folder.iterdir()
    before = kept.read_bytes()
    net, _, _ = trained
    again, train, test = cnn._trained(digits, SMOKE.network, None)
    np.testing.assert_array_equal(net.theta, again.theta)
    assert kept.read_bytes() == before
    rows = np.random.RandomState(0).permutation(1297)[:100]
    np.testing.assert_array_equal(train.x.reshape(100, -1), digits.train["float32"].x[rows])
    np.testing.assert_array_equal(test.y, digits.test["float32"].y[:1])
    assert part["risk"] == net.risk(train)


def test_what_stops_a_way_is_said(trained):
    net, train, b = trained
    H = Hessian(net, train, SMOKE.network.damping)
    stopped = cnn._timed(H, b, lambda: CG(1e-4, 1))
    assert stopped["iterations"] == 1 and not stopped["meets"]
    assert stopped["remedy"].startswith("CG stopped at max_iterations = 1")
    singular = cnn._timed(aslinearoperator(np.diag([0.0, 1.0])), np.ones(2), Direct)
    assert singular["error"].startswith("A must not be singular")


def test_the_target_is_held_against_the_fastest_that_meets_it():
    runs = [
        {"method": "a", "error": "no"},
        {"method": "b", "seconds": 1.0, "meets": False},
        {"method": "c", "seconds": 9.0, "meets": True},
        {"method": "d", "seconds": 7.0, "meets": True},
    ]
    assert targets.metrics({"cnn": {"runs": runs}}) == {"cnn_seconds": 7.0}
    assert targets.metrics({"cnn": {"runs": runs[:2]}}) == {}
    exact = {"method": "Direct", "seconds": 9.0, "prepare_seconds": 8.0, "meets": False}
    assert targets.metrics({"cnn": {"runs": [exact]}}) == {"cnn_hessian_seconds": 8.0}


def test_in_words(part):
    text = table._cnn({"cnn": {**part, "runs": [*part["runs"], {"method": "x", "error": "no"}]}})
    assert text.startswith("s_test of test point 0, 100 images, d = ")
    assert "| x | no | | | | no |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    # A line of the table of methods has 7 vertical bars. A line of the table of iterations has 6.
    assert widths == {7, 6}
    plain = part["cg_iterations"]["Hessian"]["none"]
    assert f"| Hessian | {plain} (1) |" in text
