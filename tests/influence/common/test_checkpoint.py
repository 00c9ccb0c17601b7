import os
import tracemalloc

import numpy as np
import pytest

from influence import (
    ContinuedOptions,
    Hessian,
    ProximalOptions,
    RefitOptions,
    continued_training,
    leave_one_out,
    proximal_response,
)
from influence.common import checkpoint
from influence.common.checkpoint import kept
from influence.truth import runs
from tests.influence.problems import logistic

ARRAYS = {
    "change_if_removed": np.array([[1.5, -2.25], [np.nan, np.inf]]),
    "passes": np.arange(3, dtype=np.int32),
    "converged": np.array([True, False]),
}


def same(got, expected):
    assert set(got) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == array.dtype


def never():
    raise AssertionError("computed again")


def test_what_was_stored_comes_back_bit_for_bit_and_is_not_computed_again(tmp_path):
    path = tmp_path / "deep" / "er" / "block.npz"
    same(kept(path, lambda: ARRAYS), ARRAYS)
    same(kept(path, never), ARRAYS)
    same(kept(str(path), never), ARRAYS)
    assert [p.name for p in path.parent.iterdir()] == ["block.npz"]


def test_without_a_path_nothing_is_stored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    same(kept(None, lambda: ARRAYS), ARRAYS)
    assert kept(None, lambda: {"a": [1, 2]})["a"].tolist() == [1, 2]
    assert list(tmp_path.iterdir()) == []


def test_a_computation_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        kept(tmp_path / "block.npz", lambda: {"a": np.array(1 / 0)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interruption_while_writing_leaves_nothing(step, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            kept(tmp_path / "block.npz", lambda: ARRAYS)
    assert list(tmp_path.iterdir()) == []
    same(kept(tmp_path / "block.npz", lambda: ARRAYS), ARRAYS)


def test_the_file_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    """Check that the file is written under another name and renamed when it is complete.

    A partial file that a kill -9 left behind is never read.
    """
    path, replace = tmp_path / "block.npz", os.replace

    def look(partial, target):
        assert not path.exists() and str(partial).endswith(".partial")
        with np.load(partial) as stored:
            same({name: stored[name] for name in ARRAYS}, ARRAYS)
        replace(partial, target)

    monkeypatch.setattr(checkpoint.os, "replace", look)
    (tmp_path / "block.npzleft-by-a-kill.partial").write_bytes(b"PK half a file")
    same(kept(path, lambda: ARRAYS), ARRAYS)
    same(kept(path, never), ARRAYS)


def flipped(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def rewritten(path, **changes):
    """Write the file again with NumPy only, like a user who edits its arrays."""
    with np.load(path) as stored:
        np.savez(path, **{**stored, **changes})


def moved(path):
    """Replace the file by a file that was stored under another name."""
    kept(path.with_name("other.npz"), lambda: ARRAYS).clear()
    os.replace(path.with_name("other.npz"), path)


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda path: rewritten(path, passes=np.arange(3, dtype=np.int64)), "altered or renamed"),
        (lambda path: rewritten(path, passes=np.arange(3, dtype=np.int32)[:, None]), "altered"),
        (lambda path: rewritten(path, more=np.zeros(1)), "altered or renamed"),
        (lambda path: rewritten(path, converged=np.array([True, True])), "altered or renamed"),
        (lambda path: rewritten(path, **{checkpoint._SEAL: np.array(("2", ""))}), "another format"),
        (lambda path: np.savez(path, **ARRAYS), r"another format \(\['none' ''\]; this program's"),
        (moved, "altered or renamed"),
        (lambda path: flipped(path, 200), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"\x93NUMPY" + bytes(90)), "cannot be read"),
        (as_pipe, "that is no regular file; delete it"),
    ],
)
def test_what_was_not_stored_here_is_refused(tmp_path, alter, reason):
    path = tmp_path / "block.npz"
    kept(path, lambda: ARRAYS)
    alter(path)
    with pytest.raises(ValueError, match=reason) as caught:
        kept(path, never)
    line = str(caught.value)
    assert str(path) in line and "\n" not in line and len(line) < 600
    path.unlink()
    same(kept(path, lambda: ARRAYS), ARRAYS)


def test_any_flipped_byte_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "block.npz"
    kept(path, lambda: ARRAYS)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 7):
        path.write_bytes(whole)
        flipped(path, place)
        try:
            same(kept(path, never), ARRAYS)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 50


def test_a_transposed_matrix_is_hashed_without_a_copy():
    matrix = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    assert checkpoint.sha256({"a": matrix}) != checkpoint.sha256({"a": matrix.copy("C")})
    assert checkpoint.sha256({"a": matrix[::2]}) == checkpoint.sha256({"a": matrix[::2].copy("C")})
    large = np.zeros((1000, 1000), order="F")
    tracemalloc.start()
    checkpoint.sha256({"a": large})
    assert tracemalloc.get_traced_memory()[1] < 1e5
    tracemalloc.stop()


def test_objects_are_not_stored(tmp_path):
    with pytest.raises(ValueError, match="(?i)object arrays cannot be saved"):
        kept(tmp_path / "block.npz", lambda: {"a": np.array([None])})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(
    tmp_path, monkeypatch, below
):
    p = logistic("sigmoid")
    given = p.net, p.train, p.test, [0, 1]
    monkeypatch.setattr(runs, "_kept", None)
    file = tmp_path / "file"
    file.write_text("")
    folder = file / below if below else file
    for work in (
        lambda: leave_one_out(*given, RefitOptions(checkpoints=folder)),
        lambda: proximal_response(*given, ProximalOptions(checkpoints=folder), damping=0.1),
        lambda: continued_training(
            *given, ContinuedOptions(batch_size=8, checkpoints=folder), steps=2, rate=0.1
        ),
        lambda: Hessian(p.net, p.train, checkpoints=folder),
    ):
        with pytest.raises(
            ValueError, match=rf"^checkpoints must be a folder .*, got {folder} \(.+\)"
        ):
            work()
    Hessian(p.net, p.train, checkpoints=tmp_path / "new")
    assert (tmp_path / "new").is_dir() and not list((tmp_path / "new").iterdir())


def test_checkpoints_must_be_a_path():
    with pytest.raises(TypeError, match="^checkpoints must be a folder .* or None, got 3"):
        checkpoint.check_folder(3)  # type: ignore[arg-type]
