"""Tests of a score file on a full disk, or under a limit on the size of files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np

from influence.common import checkpoint

ROOT = Path(__file__).resolve().parents[3]
# HDF5 may end its process, so a child process writes the file, in four attempts. First the space is
# too small for the file. The second attempt has enough space, but is interrupted after the solves.
# Then the space is too small for the rest. The fourth attempt has no limit and must finish.
CHILD = """
import resource
from pathlib import Path
from influence import Direct, Influence
from influence.scores import file, inverse
from tests.influence.problems import logistic

file._CHUNK, inverse._MOST_TOGETHER = (1, 16), 2
p = logistic("softmax", num_rows=60, num_inputs=4, intercept=True)
influence = Influence(p.net, p.train, solver=Direct())
multiply, solve, solved = file._multiply, inverse.Inverse.solve, []

def counting(self, B, what):
    solved.append(B.shape[1])
    return solve(self, B, what)

inverse.Inverse.solve = counting

def write(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        influence.write_scores("s.h5", p.test)
    except (ValueError, KeyboardInterrupt) as error:
        print(type(error).__name__, error, sum(solved), sorted(map(str, Path().iterdir())))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def interrupted(*_):
    raise KeyboardInterrupt

write(10_000)
file._multiply = interrupted
write(resource.RLIM_INFINITY)
file._multiply = multiply
write(Path("s.h5.partial").stat().st_size - 1)
write(resource.RLIM_INFINITY)
influence.write_scores("whole.h5", p.test)
print(sum(solved))
"""


def test_too_little_space_is_said_at_once_and_loses_nothing(tmp_path):
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, third, last = done.stdout.splitlines()
    said = r"ValueError path must be where [\d,]+ bytes can be written, got s\.h5\S* where [\d,]+"
    said += r" are free \(File too large\); make room, ask for less, or write elsewhere\. "
    assert re.fullmatch(said + r"0 \[\]", first)
    assert second == "KeyboardInterrupt  7 ['s.h5.partial']"
    assert re.fullmatch(said + r"7 \['s\.h5\.partial'\]", third)
    # The four attempts and the second file, "whole.h5", together solved 14 systems. Each file needs
    # 7, one for each test example, so none was solved twice.
    assert last == "14"
    with h5py.File(tmp_path / "s.h5") as found, h5py.File(tmp_path / "whole.h5") as expected:
        table = expected["change_if_removed"][()]
        assert table.any()
        np.testing.assert_array_equal(found["change_if_removed"][()], table)


def test_the_space_of_the_file_is_reserved(tmp_path):
    """Check that the file gets its disk blocks when it is made, before any score is written.

    A file that is only extended to its size has no blocks.
    """
    path = tmp_path / "part"
    path.write_bytes(b"kept")
    checkpoint.reserve(path, 1 << 20, path)
    assert path.stat().st_blocks * 512 >= 1 << 20 and path.read_bytes()[:5] == b"kept\0"


def _environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}
