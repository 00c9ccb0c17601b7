import numpy as np
import pytest

from benchmarks import all_scores, table
from influence import Influence
from influence.scores import file as score_file


@pytest.fixture(scope="module")
def part(digits):
    return all_scores.run(digits, num_tests=150, square=200)


def test_the_stages_add_up(part):
    seconds = part["seconds"]
    assert set(seconds) == {"prepare", "solve", "multiply", "other", "all"}
    assert all(value > 0 for value in seconds.values())
    stages = sum(value for name, value in seconds.items() if name != "all")
    assert stages == pytest.approx(seconds["all"], rel=1e-9)


def test_the_rate_is_that_of_the_product_alone(part):
    assert part["flop_of_multiply"] == 2 * 1297 * 640 * 150
    rate = part["flop_of_multiply"] / part["seconds"]["multiply"] / 1e9
    assert part["multiply_gflops"] == pytest.approx(rate)
    assert part["fraction_of_machine"] == pytest.approx(rate / part["machine_gflops"])


def test_the_file_is_checked_against_scores_in_float64(part, digits, monkeypatch):
    assert part["converged"] and part["largest_residual"] < 1e-12
    assert 1e-9 < part["largest_error"] < 1e-5  # the table is in float32
    assert 1e-9 < part["rounding_error"] < 1e-5
    # The file holds the table and, for the same test points, s_test in float64. HDF5 stores whole
    # chunks, so the file may be larger than its content.
    held = 150 * (1297 * 4 + 640 * 8) / 1e6
    assert held < part["megabytes"] < 3 * held
    # An error of one per cent in the table is detected.
    multiplied = score_file._Scores.__call__
    monkeypatch.setattr(
        score_file._Scores, "__call__", lambda *args: np.float32(1.01) * multiplied(*args)
    )
    wrong = all_scores.run(digits, num_tests=150, square=200)
    assert wrong["largest_error"] == pytest.approx(0.01, rel=1e-3)


def test_nothing_of_it_is_left(digits, monkeypatch, tmp_path):
    monkeypatch.setattr(all_scores.tempfile, "tempdir", str(tmp_path))
    seen = []
    written = Influence.write_scores
    monkeypatch.setattr(
        Influence,
        "write_scores",
        lambda self, path, *a, **k: seen.append(path) or written(self, path, *a, **k),
    )
    stage = score_file._multiply
    all_scores.run(digits, num_tests=3, square=10)
    assert tmp_path in seen[0].parents and not list(tmp_path.iterdir())
    assert score_file._multiply is stage


def test_in_words(part, digits):
    text = table._all_scores({"all-scores": part, "shape": {"n": 1297}})
    assert text.startswith("The file holds the scores of 1,297 rows for 150 test points. ")
    assert f"{part['fraction_of_machine']:.0%} of the machine's" in text
