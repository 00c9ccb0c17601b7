"""Tests that too large problems are refused before any work, and of EK-FAC's stored sums."""

import re

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator

from influence import CG, Examples, GaussNewton, Influence, prepare
from influence.common import memory
from influence.solvers import EKFAC, Direct, Lanczos, Nystrom
from tests.influence.problems import dense_net, logistic


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (Direct(), "A must be small enough to be factored, with d = 10,000,000, got one that takes "
         "2,400,000 GB of this machine's 1,000; use CG or EKFAC"),
        (Nystrom(7_000), "rank must be small enough for Nystrom of a matrix with d = 10,000,000, "
         "got one that takes 1,120 GB of this machine's 1,000; use a rank below 7000"),
        (Lanczos(7_000), "rank must be small enough for Lanczos .* 1,121 GB"),
    ],
    ids=["Direct", "Nystrom", "Lanczos"],
)  # fmt: skip
def test_a_solver_beyond_memory_is_refused_before_any_product(solver, message, monkeypatch):
    monkeypatch.setattr(memory, "of_machine", lambda: 10**12)
    d = 10_000_000
    A = LinearOperator((d, d), matvec=lambda v: pytest.fail("the work had begun"), dtype=float)
    with pytest.raises(ValueError, match=f"^{message}"):
        prepare(A, solver)


def linear():
    rng = np.random.default_rng(0)
    net = dense_net(2, 3, "mse", l2=0.1)
    return net, Examples(rng.standard_normal((20, 3)), rng.standard_normal((20, 2)))


def refuse_passes(monkeypatch):
    def begun(*args, **kwargs):
        pytest.fail("a pass over the data had begun")

    monkeypatch.setattr(Examples, "sum_over", begun)


def test_factors_beyond_memory_are_refused_before_any_pass(monkeypatch):
    net, train = linear()
    A = GaussNewton(net, train, 0.1)
    monkeypatch.setattr(memory, "of_machine", lambda: 100)
    refuse_passes(monkeypatch)
    with pytest.raises(ValueError, match="^A must have factors that fit into memory for EKFAC"):
        prepare(A, EKFAC())


def test_scores_beyond_memory_are_refused_before_any_pass(monkeypatch):
    p = logistic("sigmoid")
    scores = Influence(p.net, p.train, solver=CG())
    assert scores.scores(p.test).shape == (len(p.test), len(p.train))
    monkeypatch.setattr(memory, "of_machine", lambda: 10)
    refuse_passes(monkeypatch)
    m, n = len(p.test), len(p.train)
    message = f"test must have scores that fit into memory, for {m} x {n} pairs, got one that takes"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*use write_scores"):
        scores.scores(p.test)


def test_stored_factors_serve_every_damping_without_a_pass(monkeypatch, tmp_path):
    net, train = linear()
    b = np.random.default_rng(0).standard_normal(net.num_parameters)
    right = {
        damping: prepare(GaussNewton(net, train, damping), EKFAC())(b, measure=False).x
        for damping in (0.1, 2.0)
    }
    assert np.abs(right[0.1] - right[2.0]).max() > 1e-3
    prepare(GaussNewton(net, train, 0.1, checkpoints=tmp_path), EKFAC())
    assert len(list(tmp_path.glob("ekfac-*.npz"))) == 2
    # Remove the result of the second pass, as if the run had been interrupted in this pass. Then
    # only the second pass is made again.
    next(tmp_path.glob("ekfac-diagonals-*.npz")).unlink()
    asked, sum_over = [], Examples.sum_over

    def counting(self, question, *args, **kwargs):
        asked.append(question)
        return sum_over(self, question, *args, **kwargs)

    monkeypatch.setattr(Examples, "sum_over", counting)
    for damping, passes in ((0.1, 1), (2.0, 1)):
        A = GaussNewton(net, train, damping, checkpoints=tmp_path)
        found = prepare(A, EKFAC())(b, measure=False).x
        np.testing.assert_allclose(found, right[damping], rtol=1e-9)
        assert len(asked) == passes
