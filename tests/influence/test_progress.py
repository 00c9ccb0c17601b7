import numpy as np

from influence import Influence
from influence import progress as module
from influence.progress import progress
from tests.influence.problems import logistic, relative_error


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
