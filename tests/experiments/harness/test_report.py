from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.harness import markdown, report
from experiments.harness.record import Record
from tests.experiments.harness.records import save


def test_judging_again_changes_claims_alone(fake, capsys):
    from experiments.harness.claims import Claim

    main(["fake", "--preset", "paper"])
    folder = Path("out/fake-paper")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["judge", "--results", "out"]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    fake.CLAIMS = (Claim("mean", "Mean", None, 2, None), Claim("new", "New"))
    capsys.readouterr()
    assert main(["judge", "--results", "out"]) == 0
    assert capsys.readouterr().out == "fake-paper: 1 claims judged, without new: run it again\n"
    (claim,) = Record.load(folder).claims
    assert (claim["metric"], claim["holds"]) == ("mean", False)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"record.json"}
    assert main(["judge", "--results", "modules/fake_figure.py"]) == 2
    assert main(["judge", "--results", "nowhere"]) == 2


def test_records_of_a_former_name_are_judged_as_the_present_experiment(tmp_path):
    save(tmp_path / "fig2-cnn-converged", experiment="fig2-cnn", preset="converged",
          metrics={"pearson_part": 0.9998, "pearson_minimum": 0.88})  # fmt: skip
    (line,) = report.judge_all(tmp_path)
    assert "2 claims judged, without train_accuracy" in line
    record = Record.load(tmp_path / "fig2-cnn-converged")
    assert [claim["holds"] for claim in record.claims] == [True, False]
    assert "[Network at a true minimum](docs/experiments/fig2-cnn-minimum.md)" in (
        markdown.short_table(tmp_path)
    )


def test_broken_record_is_named(tmp_path, capsys):
    save(tmp_path / "fig2-paper")
    (tmp_path / "fig2-paper" / "record.json").write_text("{")
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert "fig2-paper" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.99999, "0.99999"), (1e-9, "1e-09"), (1.0, "1"), (-0.0, "-0"),
        (0.8533, "0.853"), (0.9996, "0.9996"), (-0.99999999, "-1"), (13.0, "13"), (1.36012, "1.36"),
        (-133.5, "-134"), (11894, "11,894"), (-3242.4, "-3,242"),
    ],
)  # fmt: skip
def test_number(value, text):
    assert report.number(value) == text
