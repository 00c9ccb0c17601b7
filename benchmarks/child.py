"""The common part of all solving processes: read the problem, time the solve, write the answer.

Our environment and the peers' environment both import this file. It therefore imports only NumPy
and the standard library.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROBLEM, SETTING, SOLUTION, REPORT = "problem-{}.npz", "setting.json", "x.npy", "report.json"
_RUNS = 3

Arrays = Mapping[str, NDArray]
Solve = Callable[[], tuple[NDArray, dict[str, Any]]]


def main(made_ready: Callable[[Arrays, dict[str, Any]], Solve]) -> None:
    """Solve the problem in the folder named on the command line, and write the answer there.

    The time includes building the influence object, computing the test gradients and solving. It
    excludes imports, and it excludes reading and converting the arrays.

    Args:
      made_ready: a function (arrays, setting) -> solve. `solve` is the call that is timed. It
        returns the solutions (d, m) and a dict of further facts for the report. `arrays` has x, y,
        x_test, y_test and theta (f, c); all floats have the setting's dtype.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    setting = json.loads((folder / SETTING).read_text())
    with np.load(folder / PROBLEM.format(setting["dtype"]), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    points = slice(0, setting["solved"])
    for name in ("x_test", "y_test"):
        arrays[name] = arrays[name][points]
    solve = made_ready(arrays, setting)
    before = _rss_mb()
    seconds: list[float] = []
    while not seconds or (len(seconds) < _RUNS and max(seconds) <= setting["again_within"]):
        begun = time.perf_counter()
        x, report = solve()
        seconds.append(time.perf_counter() - begun)
    np.save(folder / SOLUTION, x)
    report |= {
        "seconds": min(seconds),
        "first_seconds": seconds[0],
        "runs": len(seconds),
        "peak_rss_mb": _peak_rss_mb(),
        "rss_before_mb": before,
    }
    (folder / REPORT).write_text(json.dumps(report))


def _rss_mb() -> int | None:
    return _status("VmRSS:")


def _peak_rss_mb() -> int:
    # ru_maxrss includes the memory that the parent had when it created this process. VmHWM does
    # not include it.
    peak = _status("VmHWM:")
    if peak is not None:
        return peak
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(size / (2**20 if sys.platform == "darwin" else 2**10))


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((round(int(s.split()[1]) / 1024) for s in lines if s.startswith(key)), None)
