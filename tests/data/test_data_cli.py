"""Tests of the command `python -m data`: its output and exit status."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data import download
from data.__main__ import main


def run(capsys, *arguments):
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_as_a_command():
    result = subprocess.run(
        [sys.executable, "-m", "data", "check", "mnist"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert "mnist was not found." in result.stderr
    assert "python -m data fetch mnist" in result.stderr


def test_list(capsys, root):
    status, out, err = run(capsys, "list", "--data-dir", str(root), "mnist", "digits")
    heading, mnist, digits = out.splitlines()
    assert heading.split() == ["name", "what", "terms", "size", "found", "in"]
    assert mnist.startswith("mnist ") and mnist.endswith(f" {root}") and "CC BY-SA" in mnist
    assert "stand-in" in digits and digits.endswith(" embedded")
    assert (status, err) == (0, "")


def test_list_what_is_not_there(capsys):
    status, out, _ = run(capsys, "list", "mnist")
    assert status == 0
    assert out.endswith(" 11.6 MB  not found\n")


def test_check_good(capsys, root):
    status, out, err = run(capsys, "check", "--data-dir", str(root), "mnist", "digits")
    mnist, digits = out.splitlines()
    assert f"mnist: good in {root}: train x (55000, 784) y (55000,), test x (10000, 784)" in mnist
    assert digits.startswith("digits: good: train x (1297, 64) y (1297,), test x (500, 64) y")
    assert (status, err) == (0, "")


def test_check_promises_no_download_where_there_is_no_address(capsys):
    status, _, err = run(capsys, "check", "dogfish", "mnist")
    dogfish, mnist = err.split("mnist: mnist was not found.")
    assert status == 1
    assert "there is no address to download it from; get it by hand." in dogfish
    assert "fetch" not in dogfish and "python -m data fetch mnist" in mnist


def test_check_goes_on_after_a_bad_one(capsys, root):
    (root / "mnist/t10k-labels-idx1-ubyte.gz").write_bytes(b"spoilt")
    status, out, err = run(capsys, "check", "--data-dir", str(root), "mnist", "digits")
    assert status == 1
    assert "t10k-labels-idx1-ubyte.gz is not the file it should be" in err
    assert out.startswith("digits: good")


def test_check_looks_only_in_the_folder_named(capsys, root, tmp_path, monkeypatch):
    monkeypatch.setenv("INFLUENCE_DATA", str(root))
    assert run(capsys, "check", "mnist")[0] == 0
    status, _, err = run(capsys, "check", "mnist", "--data-dir", str(tmp_path / "empty"))
    assert status == 1
    assert "train-images-idx3-ubyte.gz is missing" in err


@pytest.mark.usefixtures("online")
def test_fetch(capsys, made_up_mnist, accept, serve, tmp_path, cache):
    answers = {}
    expected = accept(made_up_mnist, serve(answers))
    status, out, err = run(capsys, "fetch", "mnist")
    assert (status, out) == (1, "")
    assert "mnist: mnist/train-images-idx3-ubyte.gz could not be had from" in err

    for file in expected:
        answers[f"/{file.path}"] = (made_up_mnist / file.path).read_bytes()
    done = f"mnist: downloaded to {cache}\ndigits: needs no file\n"
    assert run(capsys, "fetch", "mnist", "digits") == (0, done, "")
    assert run(capsys, "fetch", "mnist") == (0, f"mnist: already in {cache}\n", "")
    # The data is saved in the named folder, even if another folder already has it.
    folder = tmp_path / "folder"
    asked_for = run(capsys, "fetch", "--data-dir", str(folder), "mnist")
    assert asked_for == (0, f"mnist: downloaded to {folder}\n", "")
    assert len(list((folder / "mnist").iterdir())) == 4


def test_fetch_offline(capsys):
    status, _, err = run(capsys, "fetch", "mnist")
    assert status == 1
    assert "INFLUENCE_OFFLINE=1 is set" in err


@pytest.mark.parametrize("command", ["list", "fetch", "check"])
def test_a_variable_that_names_no_folder_is_misuse(capsys, monkeypatch, tmp_path, command):
    monkeypatch.setenv("INFLUENCE_DATA", str(tmp_path / "dta"))
    with pytest.raises(SystemExit) as ended:
        main([command])
    assert ended.value.code == 2
    assert (
        f"INFLUENCE_DATA must be a folder, there is none at {tmp_path}" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: command"),
        (["chek"], "invalid choice: 'chek'"),
        (["check", "mnits"], ", got 'mnits'"),
        (["check", "--data", "folder"], "unrecognized arguments: --data"),
        (["check", "--data-dir", ""], "root (--data-dir) must name a folder, got ''"),
    ],
)
def test_misuse(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m data: ") and message in line


@pytest.mark.usefixtures("online")
def test_a_full_disk_is_status_74(capsys, monkeypatch, cache):
    def retrieve(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(cache))

    monkeypatch.setattr(download.pooch, "retrieve", retrieve)
    status, out, err = run(capsys, "fetch", "mnist")
    assert (status, out) == (74, "")
    assert err.startswith(f"mnist: {cache} could not be written (No space left on device); make")


def test_help(capsys, cache):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("list ", "fetch ", "check ", "INFLUENCE_OFFLINE", "2 if"))
    assert str(cache) in out
