import numpy as np
import pytest

from benchmarks import child, solves, table
from benchmarks.problem import WEIGHT_DECAY
from benchmarks.solves import OURS, PYDVL, Setting
from influence import Examples, Hessian

needs_pydvl = pytest.mark.skipif(
    solves.python_of_peers() is None, reason="pyDVL is not installed: `make bench` installs it"
)


def test_the_problem_is_solved_at_its_minimum(digits):
    net = digits.closed_form("float64")
    assert np.linalg.norm(net.risk_gradient(digits.train["float64"])) <= 1e-8
    assert digits.shape == (1297, 64, 10)


def test_true_residual(digits):
    net, test = digits.closed_form("float64"), digits.test["float64"].take([0, 1])
    B = net.gradients(test.x, test.y).T
    exact = np.linalg.solve(Hessian(net, digits.train["float64"]).dense(), B)
    # The residual of the exact solution is only rounding: less than 1e-12.
    assert solves.true_residuals(digits, exact).max() < 1e-12
    # The relative residual is 1 for x = 0, and 0.1 for 0.9 times the exact solution.
    found = solves.true_residuals(digits, exact * [0.0, 0.9])
    np.testing.assert_allclose(found, [1.0, 0.1], rtol=1e-9)


@pytest.mark.parametrize(
    ("by", "method"),
    [
        (OURS, "cg"),
        pytest.param(PYDVL, "one by one", marks=needs_pydvl),
        pytest.param(PYDVL, "block", marks=needs_pydvl),
    ],
)
def test_every_way_solves_the_same_system(digits, by, method):
    result = solves.run(digits, (Setting(by, method, "float64", 3, 3),))
    (run,) = result["runs"]
    assert run["meets"], run
    assert run["largest_residual"] <= solves.TOLERANCE
    assert run["peak_rss_mb"] > 50
    assert result["fastest"][3][by] == 0


def test_fewer_points_than_asked_are_extrapolated_and_never_the_fastest(digits, monkeypatch):
    monkeypatch.setattr(solves, "python_of_peers", lambda: None)
    fake(monkeypatch, seconds=2.0)
    result = solves.run(digits, (Setting(OURS, "cg", "float64", 4, 1),))
    assert result["runs"][0]["seconds_for_all"] == 8.0
    assert result["fastest"][4][OURS] is None
    assert result["speedup"][4] is None


def test_speedup_is_that_of_the_fastest_within_tolerance(digits, monkeypatch):
    monkeypatch.setattr(solves, "python_of_peers", lambda: "python")
    monkeypatch.setattr(solves, "_versions", lambda python: {"pyDVL": "0"})
    fake(
        monkeypatch,
        seconds=iter([2.0, 1.0, 30.0, 20.0, 3.0]).__next__,
        residual=iter([1e-6, 1e-6, 1e-6, 1e-6, 2e-5]).__next__,
    )
    ways = [(OURS, "cg"), (OURS, "direct"), (PYDVL, "one by one"), (PYDVL, "block")]
    ways.append((PYDVL, "block"))
    result = solves.run(digits, tuple(Setting(*way, "float64", 2, 2) for way in ways))
    assert [run["meets"] for run in result["runs"]] == [True, True, True, True, False]
    assert result["fastest"][2] == {OURS: 1, PYDVL: 3}
    assert result["fastest_default"][2] == 2
    assert result["speedup"][2] == 20.0
    assert result["speedup_over_default"][2] == 30.0


def test_a_peer_that_is_not_there_is_said_to_be_missing(digits, monkeypatch):
    monkeypatch.setattr(solves, "python_of_peers", lambda: None)
    result = solves.run(digits, (Setting(PYDVL, "block", "float64", 2, 2),))
    assert "not installed" in result["runs"][0]["error"]
    assert result["peers"] is None


def test_a_failing_process_is_reported_with_its_last_line(digits, monkeypatch):
    monkeypatch.setitem(solves._MODULES, OURS, "json.nowhere")
    result = solves.run(digits, (Setting(OURS, "cg", "float64", 2, 2),))
    assert result["runs"][0]["error"].startswith("failed: ")
    assert result["runs"][0]["error"].endswith("No module named json.nowhere")
    assert result["fastest"][2][OURS] is None


def test_a_process_that_takes_too_long_is_stopped(digits, tmp_path):
    solves.write(tmp_path, digits, 1)
    result = solves.answer(digits, Setting(OURS, "cg", "float64", 1, 1), tmp_path, patience=0.1)
    assert result["error"] == "stopped after 0.1 s"


def test_an_answer_that_is_not_finite_is_none(digits, monkeypatch):
    monkeypatch.setattr(solves, "python_of_peers", lambda: None)
    fake(monkeypatch, seconds=1.0, residual=lambda: np.nan)
    (run,) = solves.run(digits, (Setting(OURS, "cg", "float64", 1, 1),))["runs"]
    assert run["error"] == "failed: its answer is not finite"
    assert "meets" not in run


def test_setting_in_words():
    words = table.describe(
        {
            "by": PYDVL,
            "method": "block",
            "dtype": "float32",
            "points": 9,
            "solved": 3,
            "tolerance": 1e-6,
            "preconditioner_rank": 20,
        }
    )
    assert words == (
        "pyDVL, block, float32, Nyström preconditioner of rank 20, asked for 1e-06: 3 of 9"
    )


def test_the_child_reads_what_the_parent_writes(digits, tmp_path):
    setting = Setting(OURS, "cg", "float32", 2, 2)
    solves.write(tmp_path, digits, 2)
    path = tmp_path / child.PROBLEM.format("float32")
    with np.load(path, allow_pickle=False) as file:
        assert {name: file[name].dtype for name in file.files} == {
            "x": np.float32,
            "y": np.int64,
            "x_test": np.float32,
            "y_test": np.int64,
            "theta": np.float32,
        }
        assert isinstance(Examples(file["x"], file["y"]), Examples)
        assert file["theta"].shape == (64, 10)
        assert len(file["x_test"]) == 2
    assert setting.weight_decay == WEIGHT_DECAY


def fake(monkeypatch, seconds, residual=lambda: 1e-6):
    """Replace child processes by fakes that end at once with the given seconds and residuals."""

    def finished(command, **kwargs):
        folder = solves.Path(command[-1])
        np.save(folder / child.SOLUTION, np.zeros((640, 1)))
        value = seconds() if callable(seconds) else seconds
        report = {"seconds": value, "peak_rss_mb": 1, "rss_before_mb": 1}
        (folder / child.REPORT).write_text(solves.json.dumps(report))

    monkeypatch.setattr(solves.subprocess, "run", finished)
    monkeypatch.setattr(solves, "true_residuals", lambda p, x: np.array([residual()]))
