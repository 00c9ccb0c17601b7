"""`python -m benchmarks.mislabelled`: plant wrong labels, rank the rows, and write results/audit/.

Finished cases are stored, so an interrupted run continues with the next case. cleanlab runs in a
separate environment. Its rankings are left out if that environment does not exist.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import influence_console as console
from benchmarks.mislabelled import case, report
from benchmarks.mislabelled.sets import SETS
from influence.common import checkpoint

SHARES = (0.05, 0.1, 0.2)
_KEPT, _RESULTS = Path("out/audit"), Path("results/audit")


def cases(names: Sequence[str]) -> list[tuple[str, str, float]]:
    """Return (set, kind, share) of all cases.

    A set with two classes has only the kind "uniform": a row has only one other class.
    """
    found = []
    for share in (SHARES[1], SHARES[2], SHARES[0]):
        for name in names:
            kinds = ("uniform", "confusable") if name in ("digits", "mnist") else ("uniform",)
            found += [(name, kind, share) for kind in kinds]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return 0."""
    parser = argparse.ArgumentParser("python -m benchmarks.mislabelled", allow_abbrev=False)
    console.in_one_line(parser)
    add = parser.add_argument
    add("sets", nargs="*", metavar="SET", help=f"{', '.join(SETS)}; default all")
    add("--data-dir", type=Path, metavar="DIR", help="where to look for the data first")
    add("--kept", type=Path, default=_KEPT, metavar="DIR", help=f"finished cases ({_KEPT})")
    add("--out", type=Path, default=_RESULTS, metavar="DIR", help=f"results ({_RESULTS})")
    add("--minutes", type=float, default=60, metavar="M", help="begin no case after this time")
    add("--cleanlab", metavar="PYTHON", help="the Python of an environment with cleanlab")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.sets if name not in SETS]
    if unknown:
        parser.error(f"SET must be one of {', '.join(SETS)}, got {', '.join(unknown)}.")
    begun = time.perf_counter()
    options.kept.mkdir(parents=True, exist_ok=True)
    for name, kind, share in cases(options.sets or list(SETS)):
        path = options.kept / f"{name}-{kind}-{round(100 * share):02d}.npz"
        late = time.perf_counter() - begun > 60 * options.minutes
        if path.exists() or late:
            continue
        print(f"{path.stem} ...", end=" ", flush=True)
        at = time.perf_counter()
        try:
            found = case.run(name, SETS[name], share, kind, options.data_dir)
        except FileNotFoundError as error:
            print(f"left out: {' '.join(str(error).split())[:200]}", flush=True)
            continue
        checkpoint.store(path, {key: np.asarray(value) for key, value in found.items()})
        print(f"{time.perf_counter() - at:.0f} s", flush=True)
    python = options.cleanlab or _bench_python()
    if python is not None:
        script = Path(case.__file__).with_name("cleanlab_scores.py")
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        subprocess.run([python, str(script), str(options.kept)], check=True, env=clean)
    report.write(options.kept, options.out, len(cases(list(SETS))))
    return 0


def _bench_python() -> str | None:
    path = Path(sys.prefix).parent / ".venv-bench" / "bin" / "python"
    return str(path) if path.exists() else None


if __name__ == "__main__":
    console.run(main)
