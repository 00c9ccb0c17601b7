"""Tests of `data.load`: its arguments, its result, and its error when nothing is found."""

import dataclasses

import numpy as np
import pytest

import data


def test_names():
    assert data.names()[:4] == ("mnist", "digits", "diabetes", "hospital")


@pytest.mark.parametrize("call", [data.load, data.find])
def test_unknown_name(call):
    with pytest.raises(ValueError, match="name must be one of 'mnist', 'digits', .*, got 'mnits'"):
        call("mnits")


@pytest.mark.parametrize("dtype", ["float16", "int64", "flaot", ">f8"])
def test_unknown_dtype(dtype):
    message = f"dtype must be 'float32' or 'float64', got '{dtype}'"
    with pytest.raises(ValueError, match=message):
        data.load("digits", dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64", np.float32])
@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("digits", "ab30b8e97a09fc4508926666ae70264ec9c09c32c599b9168d122286ad613e49"),
        ("hospital", "2977134300121eb442fd796e969f38c6c269129d72597e95dcf9707826271892"),
        ("spam", "4a9f33f2a1043ca0de7aacd6b37157465be0ee6ea4853124ac8e32151780ee95"),
        ("fishlike", "57d75f69d8da45e2c8b23ac53fd337bff4698b38e32647a2e78fa279b36c6d31"),
    ],
)
def test_stand_ins_never_change(name, digest, dtype):
    """Check that values and split of a stand-in have the same digest as ever, for both dtypes."""
    splits = data.load(name, dtype=dtype)
    assert splits.sha256 == digest and splits.stand_in
    assert splits.train[0].dtype == (np.uint8 if name == "fishlike" else np.dtype(dtype))
    assert splits.train[1].dtype == np.int64


def test_splits_cannot_be_changed_and_their_repr_is_a_line():
    splits = data.load("digits")
    for array in (*splits.train, *splits.test):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        splits.stand_in = False  # type: ignore[misc]
    assert repr(splits) == f"Splits(name='digits', stand_in=True, sha256='{splits.sha256}')"


def test_found_by_environment_variable(root, monkeypatch):
    monkeypatch.setenv("INFLUENCE_DATA", str(root))
    assert data.find("mnist") == root
    assert data.load("mnist", dtype="float32").name == "mnist"


def test_nowhere_to_be_found(tmp_path, cache):
    assert data.find("mnist", tmp_path) is None
    with pytest.raises(FileNotFoundError) as error:
        data.load("mnist", tmp_path)
    message = str(error.value)
    assert message.startswith("mnist was not found.")
    assert f"--data-dir {tmp_path}: lacks mnist/train-images-idx3-ubyte.gz, " in message
    assert f"user cache {cache}: no such folder" in message
    assert "INFLUENCE_OFFLINE=1 is set" in message
    assert "mnist/t10k-labels-idx1-ubyte.gz  4,542 bytes  SHA-256 f7ae60f9" in message
    assert "from https://storage.googleapis.com/cvdf-datasets/mnist/t10k-labels" in message
    assert not cache.exists()


def test_wrong_file_ends_the_search(root, cache, monkeypatch):
    # A bad copy in the named folder is an error even if a later folder has a good one.
    monkeypatch.setenv("INFLUENCE_DATA", str(root))
    bad = root.parent / "bad"
    (bad / "mnist").mkdir(parents=True)
    for path in (root / "mnist").iterdir():
        (bad / "mnist" / path.name).write_bytes(b"spoilt")
    with pytest.raises(ValueError, match="bad/mnist/train-images.* is not the file it should be"):
        data.load("mnist", bad)
