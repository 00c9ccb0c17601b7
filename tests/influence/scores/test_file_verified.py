"""Tests that an existing score file is used only if it has not been altered."""

import hashlib
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from influence import Direct, Influence
from influence.scores import file as score_file
from tests.influence.scores.test_file import contents, problem, small_blocks

__all__ = ["small_blocks"]  # makes this imported fixture visible to pytest


def _one_bit(name, place):
    def alter(path):
        with h5py.File(path, "r+") as file:
            value = file[name][place]
            file[name][place] = np.frombuffer(
                bytes([value.tobytes()[0] ^ 1]) + value.tobytes()[1:], value.dtype
            )[0]

    return alter


def _set(name, value):
    def alter(path):
        with h5py.File(path, "r+") as file:
            file[name][...] = value

    return alter


def _put(name, value):
    def alter(path):
        with h5py.File(path, "r+") as file:
            file.pop(name, None)
            if value is not None:
                file[name] = value

    return alter


def _attribute(name, value, of="/"):
    def alter(path):
        with h5py.File(path, "r+") as file:
            file[of].attrs[name] = value

    return alter


def _pipe(path):
    path.unlink()
    os.mkfifo(path)


# Each entry alters a file of 7 x 60 scores in blocks of 3 x 16, and gives the expected message.
ALTERED = [
    (_one_bit("change_if_removed", (0, 0)), "altered scores in rows (0, 2) and columns (0, 15)"),
    (_set("change_if_removed", np.nan), "altered scores"),
    (_one_bit("s_test", (1, 11)), "an altered s_test, or what is said of it, in 1 to 1"),
    (_one_bit("residual", 2), "an altered s_test, or what is said of it, in 2 to 2"),
    (_set("converged", False), "an altered s_test"),
    (_one_bit("test_sha256", (0, 0)), "an altered s_test"),
    (_set("block_sha256", 0), "altered scores"),
    (_set("tests_solved", -5), "altered counters: -5 of 7 tests"),
    (_set("tests_solved", 8), "altered counters: 8 of 7 tests"),
    (_set("blocks_done", -5), "altered counters: 7 of 7 tests and -5 of 12 blocks"),
    (_set("blocks_done", 13), "altered counters"),
    (_put("change_if_removed", None), "altered change_if_removed: it must be (7, 60) of float32"),
    (_put("change_if_removed", np.zeros((7, 60))), "altered change_if_removed"),
    (_put("tests_solved", np.zeros(2, int)), "altered tests_solved: it must be () of int64"),
    (_put("rows", "none"), "altered rows"),
    (_put("rounding_error", h5py.SoftLink("/s_test")), "altered rounding_error"),
    (_put("more", 1), "foreign data sets: more"),
    (_set("rows", 3), "altered attributes or rows"),
    (_attribute("sign", "negative", "change_if_removed"), "altered attributes or rows"),
    (_attribute("together", (0, 0)), "cannot be read"),
    (_attribute("together", (7, 16)), "altered block_sha256: it must be (4, 32)"),
    (_attribute("damping", 0.5), "another damping"),
    (_attribute("damping", "a"), "another damping"),
    (_attribute("penalty", "a"), "cannot be read"),
    (_attribute("format", 2), "another format (2; this program's is 1)"),
    (_attribute("format", "1"), "another format"),
    (lambda path: os.truncate(path, 3000), "cannot be read"),
    (_pipe, "path must be a file, got the pipe or device"),
]


@pytest.mark.parametrize("finished", [True, False])
def test_an_altered_file_is_refused_by_name(finished, tmp_path, small_blocks, monkeypatch):
    p, path = problem(), tmp_path / "s.h5"
    influence = Influence(p.net, p.train, solver=Direct())
    there = path if finished else tmp_path / "s.h5.partial"
    if finished:
        influence.write_scores(path, p.test)
    else:
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(score_file, "_rounding_error", lambda *_: 1 / 0)
            influence.write_scores(path, p.test)
    whole = there.read_bytes()
    sealed = [
        (_set("rounding_error", 0), "an altered rounding_error"),
        (_set("blocks_done", 11), "altered counters: 7 of 7 tests and 11 of 12 blocks"),
    ]
    for alter, reason in sealed * finished + ALTERED:
        there.write_bytes(whole)
        alter(there)
        with pytest.raises(ValueError) as caught:
            influence.write_scores(path, p.test)
        line = str(caught.value)
        assert reason in line and str(there) in line and "\n" not in line, line


def test_a_file_of_the_format_without_checksums_is_refused(tmp_path):
    p, path = problem(), tmp_path / "s.h5"
    with h5py.File(path, "w") as file:
        file.attrs["solver"] = "Direct()"
    with pytest.raises(ValueError, match=r"another format \(None; this .*path, or delete it\.$"):
        Influence(p.net, p.train, solver=Direct()).write_scores(path, p.test)


def test_checksums_are_sha256_of_the_bytes(tmp_path, small_blocks):
    p = problem()
    got = contents(
        Influence(p.net, p.train, solver=Direct()).write_scores(tmp_path / "s.h5", p.test)
    )
    block = got["change_if_removed"][3:6, 16:32].tobytes()  # this block is the sixth of the file
    assert got["block_sha256"][5].tobytes() == hashlib.sha256(block).digest()
    about = [got[name][4] for name in ("s_test", "residual", "iterations", "converged")]
    test = b"".join(part.tobytes() for part in [*about, got["min_curvature"][4]])
    assert got["test_sha256"][4].tobytes() == hashlib.sha256(test).digest()


def test_a_file_is_read_once_to_verify_it(tmp_path, small_blocks, monkeypatch):
    p, path = problem(), tmp_path / "s.h5"
    influence = Influence(p.net, p.train, solver=Direct())
    influence.write_scores(path, p.test)
    read, get = [0], h5py.Dataset.__getitem__

    def counted(self, key):
        found = get(self, key)
        read[0] += found.nbytes
        return found

    with h5py.File(path) as file:
        size = sum(part.nbytes for part in file.values())
    monkeypatch.setattr(h5py.Dataset, "__getitem__", counted)
    influence.write_scores(path, p.test)
    tables = 7 * 60 * 4 + 7 * p.net.num_parameters * 8
    # The call reads each table once. It also reads checksums and counters, which are small.
    assert tables < read[0] < size + 1000


@pytest.mark.parametrize("name", ["s.h5", "s.h5.partial", "s.h5.partial.new"])
def test_a_file_that_another_process_holds(name, tmp_path):
    p = problem()
    influence = Influence(p.net, p.train, solver=Direct())
    hold = "import h5py, sys\nwith h5py.File(sys.argv[1], 'w'):\n    print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / name)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline()
        with pytest.raises(ValueError, match=f"^path must be free, got .*/{name}, which another p"):
            influence.write_scores(tmp_path / "s.h5", p.test)
        other.communicate(b"\n")
