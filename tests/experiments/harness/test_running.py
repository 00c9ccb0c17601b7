"""Tests of checkpoints: after any change of the code, a run starts from the beginning."""

from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.harness import record, running

ROOT = Path(__file__).resolve().parents[3]


def test_the_code_is_that_of_the_repository():
    assert running._ROOT == record._ROOT == ROOT
    assert (ROOT / "requirements.txt").is_file()


@pytest.mark.parametrize(
    "file",
    [
        "experiments/fig9.py",
        "experiments/harness/record.py",
        "experiments/fig9_folder/parts/heads.py",
        "influence/net/net.py",
        "data/load.py",
    ],
)
def test_changed_code_starts_afresh(fake, tmp_path, monkeypatch, capsys, file):
    path = tmp_path / "code" / file
    path.parent.mkdir(parents=True)
    path.write_text("a = 1")
    monkeypatch.setattr(running, "_ROOT", tmp_path / "code")
    stopping = ["fake", "--preset", "paper", "--stops"]
    assert [main(stopping), main(stopping)] == [130, 130]
    assert fake.SEEN == [["cost.json", "run.json"], ["cost.json", "half", "run.json"]]
    path.write_text("a = 2")
    assert main(stopping) == 130
    assert fake.SEEN[2] == ["cost.json", "run.json"]
    assert "of other options, data or code: starting afresh" in capsys.readouterr().out
