"""Seconds, peak memory and true residual of the same systems, solved by several libraries."""

import dataclasses
import json
import os
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
# `make bench` makes this environment from requirements-bench.txt.
PEERS = ROOT / ".venv-bench"
# `make bench` makes this environment from requirements-bench-tf.txt. It uses our TensorFlow.
PEERS_TF = ROOT / ".venv-bench-tf"
TOLERANCE = 1e-5
OURS, PYDVL, CAPTUM, INFLUENCIAE = "ours", "pyDVL", "captum", "influenciae"
DEFAULT = "one by one"  # CgInfluence's default
_MODULES = {by: f"benchmarks.solve_{by.lower()}" for by in (OURS, PYDVL, CAPTUM, INFLUENCIAE)}
_PATIENCE = 900  # time limit of one process, in seconds


@dataclass(frozen=True)
class Setting:
    """The library, the solver and the options of one run.

    Attributes:
      by: OURS, PYDVL, CAPTUM or INFLUENCIAE.
      method: name of the solver. For OURS it is a key of `solve_ours.SOLVERS`. For pyDVL's CG it is
        "one by one" (the default of CG) or "block". The other names are those of the child module.
      dtype: "float32" or "float64".
      points: number of test points in the comparison.
      solved: number of test points that the process solves. If it is less than `points`, the
        seconds are extrapolated and marked as extrapolated.
      tolerance: relative residual to reach.
      preconditioner_rank: rank of pyDVL's Nystroem preconditioner; 0 for none.
      weight_decay: added to the diagonal of the Hessian.
      rank: rank of a low-rank approximation, or of our Nystroem preconditioner; 0 for none.
      steps: number of steps of LiSSA.
      scale: scale of the peers' LiSSA. Our LiSSA chooses its own.
      batch_size: number of rows in LiSSA's batches; 0 for all rows.
      again_within: a process solves again if its runs took at most this many seconds.
    """

    by: str
    method: str
    dtype: str
    points: int
    solved: int
    tolerance: float = TOLERANCE
    preconditioner_rank: int = 0
    weight_decay: float = WEIGHT_DECAY
    rank: int = 0
    steps: int = 0
    scale: float = 0.0
    batch_size: int = 0
    again_within: float = 20.0


def python_of_peers() -> Path | None:
    """Return the peers' Python interpreter, or None if the peers are not installed."""
    path = PEERS / "bin" / "python"
    return path if path.is_file() and (PEERS / "installed").is_file() else None


def interpreter(by: str) -> tuple[Path, dict[str, str]] | None:
    """Return a library's interpreter and environment variables; None if it is not installed."""
    if by == OURS:
        return Path(sys.executable), {}
    if by == INFLUENCIAE:
        there = (PEERS_TF / "installed").is_file()
        beside = {"PYTHONPATH": str(PEERS_TF), "TF_USE_LEGACY_KERAS": "1"}
        return (Path(sys.executable), beside) if there else None
    python = python_of_peers()
    return None if python is None else (python, {})


def run(problem: Problem, settings: tuple[Setting, ...]) -> dict[str, Any]:
    """Solve in every setting, each in its own process. Check each answer in this process.

    Returns: a dict with these entries:
      `tolerance`: TOLERANCE.
      `runs`: a dict for each setting, from `answer`.
      `fastest`: by number of points and library, the index of the fastest run that solved all
        points to TOLERANCE. None if there is no such run.
      `fastest_default`: by number of points, the same index among pyDVL's runs with the default of
        `CgInfluence`, "one by one".
      `speedup`: by number of points, the seconds of pyDVL's `fastest` divided by those of ours.
      `speedup_over_default`: the seconds of `fastest_default` divided by those of our `fastest`.
      `peers`: the versions of pyDVL, torch and NumPy. None if the peers are not installed.
    """
    peers = python_of_peers()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, problem, max(setting.solved for setting in settings))
        runs = [answer(problem, setting, folder) for setting in settings]
    result: dict[str, Any] = {"tolerance": TOLERANCE, "runs": runs, "fastest": {}}
    result |= {"fastest_default": {}, "speedup": {}, "speedup_over_default": {}}
    for points in sorted({setting.points for setting in settings}):
        ours, theirs = (_fastest(runs, by, points) for by in (OURS, PYDVL))
        default = _fastest(runs, PYDVL, points, method=DEFAULT)
        result["fastest"][points] = {OURS: ours, PYDVL: theirs}
        result["fastest_default"][points] = default
        result["speedup"][points] = _ratio(runs, theirs, ours)
        result["speedup_over_default"][points] = _ratio(runs, default, ours)
    result["peers"] = None if peers is None else _versions(peers)
    return result


def write(folder: Path, problem: Problem, num_points: int) -> None:
    """Write the problem with its first test points to the folder that the child processes read."""
    for dtype in DTYPES:
        train, test = problem.train[dtype], problem.test[dtype].take(slice(0, num_points))
        theta = problem.theta.astype(dtype).reshape(problem.shape[1], -1)
        np.savez(
            folder / child.PROBLEM.format(dtype),
            x=train.x,
            y=train.y,
            x_test=test.x,
            y_test=test.y,
            theta=theta,
        )


def answer(
    problem: Problem, setting: Setting, folder: Path, patience: float = _PATIENCE
) -> dict[str, Any]:
    """Solve in one setting, in a separate process. Check the answer in this process, in float64.

    Args:
      problem: the model and its data.
      setting: the library, the solver and its options.
      folder: the folder that `write` has filled.
      patience: time limit of the process, including start and repetitions, in seconds.

    Returns: the fields of the setting, and either `error` or the results: `seconds` (of the fastest
      repetition), `first_seconds`, `seconds_for_all` (extrapolated if not all points were solved),
      `peak_rss_mb`, `rss_before_mb`, `largest_residual`, `median_residual`, and `meets`. `meets` is
      True if every residual is at most TOLERANCE.
    """
    result = dataclasses.asdict(setting)
    found = interpreter(setting.by)
    if found is None:
        return result | {"error": f"{setting.by} is not installed; `make bench` installs it"}
    python, environment = found
    (folder / child.SETTING).write_text(json.dumps(result))
    command = [str(python), "-m", _MODULES[setting.by], str(folder)]
    print(f"  {describe(result)} ...", end=" ", flush=True)
    try:
        subprocess.run(
            command,
            check=True,
            cwd=ROOT,
            capture_output=True,
            timeout=patience,
            env=os.environ | environment,
        )
    except subprocess.TimeoutExpired:
        print("stopped", flush=True)
        return result | {"error": f"stopped after {patience:g} s"}
    except subprocess.CalledProcessError as failure:
        lines = failure.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        print(lines[-1], flush=True)
        return result | {"error": f"failed: {lines[-1]}"}
    result |= json.loads((folder / child.REPORT).read_text())
    x = np.load(folder / child.SOLUTION, allow_pickle=False)
    residuals = true_residuals(problem, x)
    if not np.isfinite(residuals).all():
        print("not finite", flush=True)
        return result | {"error": "failed: its answer is not finite"}
    result["seconds_for_all"] = result["seconds"] * setting.points / setting.solved
    result["largest_residual"] = float(residuals.max())
    result["median_residual"] = float(np.median(residuals))
    result["meets"] = bool(residuals.max() <= TOLERANCE)
    print(f"{result['seconds']:.2f} s, residual {result['largest_residual']:.1e}", flush=True)
    return result


def true_residuals(problem: Problem, x: NDArray) -> NDArray:
    """Compute the residuals |b - H x| / |b| of the first m test points, (m,), in float64.

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
    """Describe a run's setting in words."""
    words = [f"{run['by']}, {run['method']}, {run['dtype']}"]
    if run["preconditioner_rank"]:
        words.append(f"Nyström preconditioner of rank {run['preconditioner_rank']}")
    if run["tolerance"] != TOLERANCE:
        words.append(f"asked for {run['tolerance']:.0e}")
    return ", ".join(words) + f": {run['solved']} of {run['points']}"


def _fastest(
    runs: list[dict[str, Any]], by: str, points: int, method: str | None = None
) -> int | None:
    fit = [
        i
        for i, run in enumerate(runs)
        if run["by"] == by
        and run["points"] == points == run["solved"]
        and run.get("meets")
        and method in (None, run["method"])
    ]
    return min(fit, key=lambda i: runs[i]["seconds"], default=None)


def _ratio(runs: list[dict[str, Any]], slow: int | None, fast: int | None) -> float | None:
    if slow is None or fast is None:
        return None
    return runs[slow]["seconds"] / runs[fast]["seconds"]


def _versions(python: Path) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, platform; "
        "print(json.dumps({'python': platform.python_version()} "
        "| {p: m.version(p) for p in ('pyDVL', 'torch', 'numpy')}))"
    )
    done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)
