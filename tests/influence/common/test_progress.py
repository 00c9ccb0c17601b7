import io
import os
import sys

import numpy as np
import pytest

from influence import CG, Hessian, Influence, spectrum
from influence.common import progress as module
from influence.common.progress import progress
from tests.influence.problems import logistic, relative_error, tanh_net


def test_short_work_is_silent(capfd):
    assert list(progress(range(5), "counting")) == [0, 1, 2, 3, 4]
    assert list(progress((i for i in "ab"), "letters", total=2)) == ["a", "b"]
    assert capfd.readouterr() == ("", "")


def test_long_work_says_what_is_done_on_the_standard_error(capfd, monkeypatch):
    tqdm = module.tqdm
    monkeypatch.setattr(module, "tqdm", lambda *a, **k: tqdm(*a, **{**k, "delay": 0}))
    p = logistic("sigmoid")
    slow = Influence(p.net, p.train).self_influence([1, 2])
    out, err = capfd.readouterr()
    assert "solving for training rows" in err and out == ""
    monkeypatch.undo()
    assert relative_error(Influence(p.net, p.train).self_influence(np.array([1, 2])), slow) < 1e-12


@pytest.mark.parametrize("stderr", ["closed pipe", "closed", None])
def test_bars_that_cannot_be_shown_end_no_work(monkeypatch, stderr):
    if stderr is not None:
        reads, writes = os.pipe()
        os.close(reads)
        raw = os.fdopen(writes, "wb", buffering=0)
        stderr = io.TextIOWrapper(raw, write_through=True) if "pipe" in stderr else raw.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    tqdm = module.tqdm
    monkeypatch.setattr(module, "tqdm", lambda *a, **k: tqdm(*a, **{**k, "delay": 0}))
    assert list(progress(range(5), "counting")) == [0, 1, 2, 3, 4]


def test_iterations_of_unknown_number_are_counted_and_say_how_far_they_got(capfd, monkeypatch):
    tqdm = module.tqdm
    monkeypatch.setattr(module, "_bar", lambda *a: tqdm(a[0], desc=a[1], total=a[2], mininterval=0))
    net, train = tanh_net(l2=0.05)
    net.fit(train, gradient_tolerance=1e-3)
    assert "fitting, data passes: " in (err := capfd.readouterr().err) and "gradient norm " in err
    Influence(net, train, solver=CG(), damping=2.0).scores(train.take([0]))
    err = capfd.readouterr().err
    assert "conjugate gradients: " in err and "relative residual " in err
    assert spectrum(Hessian(net, train)).products > 0
    assert "eigenvalues, products: " in capfd.readouterr().err
