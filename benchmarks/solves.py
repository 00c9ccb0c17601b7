"""One problem, one tolerance, two libraries: seconds, peak memory and true residual of each."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import child
from benchmarks.problem import DTYPES, WEIGHT_DECAY, Problem
from influence import Hessian

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".venv-bench"  # made by `make bench` from requirements-bench.txt
TOLERANCE = 1e-5
OURS, PYDVL = "ours", "pyDVL"
_MODULES = {OURS: "benchmarks.solve_ours", PYDVL: "benchmarks.solve_pydvl"}
_PATIENCE = 300  # seconds that one process may take


@dataclass(frozen=True)
class Setting:
    """One way to solve.

    Attributes:
      by: OURS or PYDVL.
      method: ours: "cg" or "direct"; pyDVL's: "one by one" or "block".
      dtype: "float32" or "float64".
      points: test points in question.
      solved: test points solved in fact; where fewer, the seconds are extrapolated, and say so.
      tolerance: relative residual asked for.
      preconditioner_rank: of pyDVL's Nystroem preconditioner; 0: none.
      weight_decay: on the diagonal of the Hessian.
    """

    by: str
    method: str
    dtype: str
    points: int
    solved: int
    tolerance: float = TOLERANCE
    preconditioner_rank: int = 0
    weight_decay: float = WEIGHT_DECAY


def python_of_peers() -> Path | None:
    """The peers' interpreter, None where they are not installed."""
    path = PEERS / "bin" / "python"
    return path if path.is_file() and (PEERS / "installed").is_file() else None


def run(problem: Problem, settings: tuple[Setting, ...]) -> dict[str, Any]:
    """Solve in every setting, each in its own process, and check each answer here, in float64.

    Returns: `runs`: per setting its fields and seconds (least of some runs), first_seconds,
      seconds_for_all (extrapolated where not all points were solved), peak_rss_mb and
      rss_before_mb, largest and median true residual, `meets`: whether every residual is within
      TOLERANCE; or `error`. `fastest`: by points and library, the index of the fastest run that
      meets it and solved all points, None if none does. `speedup`: by points, pyDVL's fastest over
      ours. `peers`: the versions compared with, None where they are not installed.
    """
    peers = python_of_peers()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for dtype in DTYPES:
            _write(folder / child.PROBLEM.format(dtype), problem, dtype, settings)
        runs = [_run(problem, setting, folder, peers) for setting in settings]
    result: dict[str, Any] = {"tolerance": TOLERANCE, "runs": runs, "fastest": {}, "speedup": {}}
    for points in sorted({setting.points for setting in settings}):
        best = {by: _fastest(runs, by, points) for by in (OURS, PYDVL)}
        result["fastest"][points] = best
        both = [runs[i]["seconds"] for i in best.values() if i is not None]
        result["speedup"][points] = both[1] / both[0] if len(both) == 2 else None
    result["peers"] = None if peers is None else _versions(peers)
    return result


def _write(path: Path, problem: Problem, dtype: str, settings: tuple[Setting, ...]) -> None:
    train = problem.train[dtype]
    test = problem.test[dtype].take(slice(0, max(setting.solved for setting in settings)))
    theta = problem.theta.astype(dtype).reshape(problem.shape[1], -1)
    np.savez(path, x=train.x, y=train.y, x_test=test.x, y_test=test.y, theta=theta)


def _run(problem: Problem, setting: Setting, folder: Path, peers: Path | None) -> dict[str, Any]:
    result = dataclasses.asdict(setting)
    python = sys.executable if setting.by == OURS else peers
    if python is None:
        return result | {"error": f"{setting.by} is not installed; `make bench` installs it"}
    (folder / child.SETTING).write_text(json.dumps(result))
    command = [str(python), "-m", _MODULES[setting.by], str(folder)]
    print(f"  {describe(result)} ...", end=" ", flush=True)
    try:
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        print("stopped", flush=True)
        return result | {"error": f"stopped after {_PATIENCE} s"}
    except subprocess.CalledProcessError as failure:
        lines = failure.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        print(lines[-1], flush=True)
        return result | {"error": f"failed: {lines[-1]}"}
    result |= json.loads((folder / child.REPORT).read_text())
    x = np.load(folder / child.SOLUTION, allow_pickle=False)
    residuals = true_residuals(problem, x)
    result["seconds_for_all"] = result["seconds"] * setting.points / setting.solved
    result["largest_residual"] = float(residuals.max())
    result["median_residual"] = float(np.median(residuals))
    result["meets"] = bool(residuals.max() <= TOLERANCE)
    print(f"{result['seconds']:.2f} s, residual {result['largest_residual']:.1e}", flush=True)
    return result


def true_residuals(problem: Problem, x: NDArray) -> NDArray:
    """|b - H x| / |b| of the first m test points, everything in float64: (m,).

    Args:
      problem: the model and its data.
      x: (d, m) claimed solutions.
    """
    net = problem.closed_form("float64")
    test = problem.test["float64"].take(slice(0, x.shape[1]))
    B = net.gradients(test.x, test.y).T
    gap = B - Hessian(net, problem.train["float64"]) @ x.astype(np.float64)
    return np.linalg.norm(gap, axis=0) / np.linalg.norm(B, axis=0)


def describe(run: dict[str, Any]) -> str:
    """A run's setting in words."""
    words = [f"{run['by']}, {run['method']}, {run['dtype']}"]
    if run["preconditioner_rank"]:
        words.append(f"Nyström preconditioner of rank {run['preconditioner_rank']}")
    if run["tolerance"] != TOLERANCE:
        words.append(f"asked for {run['tolerance']:.0e}")
    return ", ".join(words) + f": {run['solved']} of {run['points']}"


def _fastest(runs: list[dict[str, Any]], by: str, points: int) -> int | None:
    fit = [
        i
        for i, run in enumerate(runs)
        if run["by"] == by and run["points"] == points == run["solved"] and run.get("meets")
    ]
    return min(fit, key=lambda i: runs[i]["seconds"], default=None)


def _versions(python: Path) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, platform; "
        "print(json.dumps({'python': platform.python_version()} "
        "| {p: m.version(p) for p in ('pyDVL', 'torch', 'numpy')}))"
    )
    done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)
