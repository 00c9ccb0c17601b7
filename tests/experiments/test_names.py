"""Tests of file names with control characters, which must not break the lines of messages."""

import gzip

import pytest

import data.__main__ as data_command
import influence_console as console
from experiments.__main__ import main
from experiments.harness.record import Record
from influence import Influence
from influence.common.checkpoint import check_folder
from tests.influence.problems import ridge

NAME, SHOWN = "a\nb\x1b[31m", r"a\nb\x1b[31m"


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / NAME
    made.mkdir()
    return made


def test_only_names_that_do_not_print_are_changed():
    assert console.shown("a folder/é'") == "a folder/é'"
    assert console.shown("a\nb") == r"'a\nb'"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["report", "--out", "{}/gone"], 2),
        (["report", "--out", "{}/file"], 2),
        (["report", "--out", "{}/altered"], 2),
        (["report", "--out", "{}"], 0),
        (["fake", "--preset", "smoke", "--data-dir", "{}/gone"], 2),
        (["fake", "--preset", "smoke", "--data-dir", "{}/file"], 2),
        (["fake", "--preset", "smoke", "--redraw", "--out", "{}"], 2),
        (["fake", "--preset", "smoke", "--out", "{}/file"], 2),
    ],
)
def test_commands_print_whole_lines(words, status, fake, folder, capsys):
    (folder / "file").touch()
    altered = folder / "altered" / "fake-paper"
    Record(data={"name": "mnist", "stand_in": False, "sha256": "5a"}).save(altered)
    (altered / "record.json").write_text("{")
    assert main([word.format(folder) for word in words]) == status
    printed = capsys.readouterr()
    assert SHOWN in (printed.err if status else printed.out)
    assert (printed.err if status else printed.out).count("\n") == 1


def test_data_prints_whole_lines(folder, capsys):
    (folder / "mnist").mkdir()
    with gzip.open(folder / "mnist" / "train-images-idx3-ubyte.gz", "w") as file:
        file.write(b"another")
    assert data_command.main(["check", "mnist", "--data-dir", str(folder)]) == 1
    said = capsys.readouterr().err
    assert SHOWN in said and NAME not in said


def test_the_library_prints_whole_lines(folder):
    (folder / "file").write_bytes(b"no scores")
    p = ridge()
    for call in (
        lambda: check_folder(folder / "file"),
        lambda: Influence(p.net, p.train).write_scores(folder / "file", p.test),
        lambda: Influence(p.net, p.train).write_scores(folder, p.test),
    ):
        with pytest.raises(ValueError) as raised:
            call()
        assert SHOWN in str(raised.value) and "\n" not in str(raised.value)
