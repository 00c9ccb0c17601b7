"""Tests of Figure 2's options. A bad value is refused before any work, with the option's name."""

import dataclasses
import os

import pytest

import data
from experiments import fig2_leave_one_out as fig2
from experiments.__main__ import main
from experiments.harness.running import Misuse

SMOKE = fig2.PRESETS["smoke"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_removals": 0}, "num_removals must be at least 2, got 0"),
        ({"lissa_seeds": ()}, "lissa_seeds must hold at least one number, got none"),
        ({"lissa_seeds": (0, -1)}, r"lissa_seeds must be at least 0, got \(0, -1\)"),
        ({"weight_decay": -1.0}, "weight_decay must be positive, got -1.0"),
        ({"gradient_tolerance": float("nan")}, "gradient_tolerance must be positive, got nan"),
        ({"cg_rtol": float("inf")}, "cg_rtol must be positive, got inf"),
    ],
)
def test_an_option_that_has_no_meaning_is_refused(changed, message):
    with pytest.raises(Misuse, match=f"^{message}"):
        dataclasses.replace(SMOKE, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_point": 100_000}, r"test_point must lie in \[0, 500\), the test rows, got 100000"),
        ({"test_point": -1}, r"test_point must lie in \[0, 500\), the test rows, got -1"),
        ({"num_removals": 99_999}, "num_removals must be at most 1297, the training rows, got 9"),
        ({"further_removals": 1298}, "further_removals must be at most 1297, .* got 1298"),
        ({"further_test_points": 500}, "further_test_points must be at most 499, .* got 500"),
    ],
)
def test_an_option_beyond_the_data_is_refused(monkeypatch, changed, message):
    # Without its model class, the run cannot fit anything. It must refuse the option before that.
    monkeypatch.setattr(fig2, "MulticlassLogisticRegression", None)
    with pytest.raises(Misuse, match=f"^{message}"):
        fig2.run(dataclasses.replace(SMOKE, **changed), data.load("digits"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--test-point", "100000"], "test_point must lie in [0, 500), the test rows, got 100000"),
        (["--lissa-seeds"], "lissa_seeds must hold at least one number, got none"),
        (["--weight-decay", "-1"], "weight_decay must be positive, got -1.0"),
    ],
)
def test_the_command_line_says_so_with_status_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INFLUENCE_OUT", raising=False)
    assert main(["fig2", "--preset", "smoke", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not os.path.exists("out") or os.listdir("out") == []
