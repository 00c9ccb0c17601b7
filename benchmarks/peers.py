"""Every solver of every other library compared with ours, for the same right-hand sides.

Most solvers of the peers do not invert the Hessian. INVERTS names the matrix that each solver
inverts. All answers are therefore judged by one measure: the residual
|b - (H + weight decay I) x| / |b| in float64. The time of a peer's solver is compared with the time
of our fastest solver whose residual is no larger. Residuals below ROUNDING count as equal.

The weight decay is the same for all libraries. pyDVL takes it as `regularization`. captum takes n
times the weight decay as `hessian_reg`. For influenciae we add the penalty to the loss of each row.
The child modules solve_pydvl, solve_captum and solve_influenciae describe the other settings. They
are the best settings that we found for each peer.
"""

import json
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy.sparse.linalg import eigsh

from benchmarks.problem import Problem
from benchmarks.solves import CAPTUM, INFLUENCIAE, OURS, PYDVL, Setting, answer, interpreter, write
from influence import Hessian

INVERTS = {
    (PYDVL, "block"): "H",
    (PYDVL, "one by one"): "H",
    (PYDVL, "direct"): "H",
    (PYDVL, "LiSSA"): "H, but for the series' rest and the batches' noise",
    (PYDVL, "Nystrom"): "a random sketch of H, weight decay alone outside",
    (PYDVL, "Arnoldi"): "H on its largest eigenvectors, weight decay alone outside",
    (PYDVL, "EK-FAC"): "Kronecker factors of one pseudo-gradient a row, no Fisher matrix",
    (CAPTUM, "naive"): "H",
    (CAPTUM, "Arnoldi"): "H on a Krylov space, zero outside",
    (INFLUENCIAE, "exact"): "H, by pseudo-inverse",
    (INFLUENCIAE, "CGD"): "H",
    (INFLUENCIAE, "LiSSA"): "H, but for the series' rest",
    (INFLUENCIAE, "Arnoldi"): "H on a Krylov space, zero outside",
    (OURS, "cg"): "H",
    (OURS, "cg after EK-FAC"): "H",
    (OURS, "cg after Nystrom"): "H",
    (OURS, "direct"): "H",
    (OURS, "LiSSA"): "H, but for the series' rest and the batches' noise",
    (OURS, "Lanczos"): "H on its largest eigenvectors, their smallest eigenvalue outside",
    (OURS, "Nystrom"): "a random sketch of H, its smallest eigenvalue outside",
    (OURS, "EK-FAC"): "Kronecker factors of the Gauss-Newton matrix, which is H here",
}
DENSE = 1000  # with at most this many parameters, every library can form the matrix
RANK = 100
ROUNDING = 1e-12  # a float64 residual below this is only rounding error
# From a rank of about 40 on, influenciae's basis loses orthogonality and its answer gets worse.
_RANK_OF_INFLUENCIAE = 30
# For each point, each step of influenciae's LiSSA takes one pass over the data, row by row.
_STEPS_OF_INFLUENCIAE = 50
_AGAIN_WITHIN = 5.0
_PACKAGES = {
    PYDVL: ("pyDVL", "torch"),
    CAPTUM: ("captum", "torch"),
    INFLUENCIAE: ("influenciae", "tf-keras", "tensorflow"),
}
_ORDER = (*_PACKAGES, OURS)


def settings(
    num_rows: int, num_parameters: int, largest_eigenvalue: float, *, points: int
) -> tuple[Setting, ...]:
    """List the settings to run, for the solvers of the peers and for ours.

    Up to DENSE parameters the list has all solvers, and LiSSA uses all rows in every step. Above
    DENSE the matrix is not formed, and LiSSA uses batches. The list then omits solvers that can
    reach any residual, because the module `solves` runs them. It keeps those of ours that the
    approximations are compared with.

    Args:
      num_rows: n.
      num_parameters: d.
      largest_eigenvalue: largest eigenvalue of the Hessian. The scale of the peers' LiSSA is a
        multiple of this value.
      points: number of test points to solve. influenciae's iterative solvers take the points one by
        one, so they solve only the first point.
    """
    base = Setting(PYDVL, "block", "float64", points, points, again_within=_AGAIN_WITHIN)

    def one(by: str, method: str, **options: Any) -> Setting:
        return replace(base, by=by, method=method, **options)

    approximations = [
        one(PYDVL, "Nystrom", rank=RANK),
        one(PYDVL, "Arnoldi", rank=RANK),
        one(PYDVL, "EK-FAC"),
        one(CAPTUM, "Arnoldi", rank=RANK),
        one(INFLUENCIAE, "CGD", solved=1),
        one(OURS, "cg", tolerance=0.1),
        one(OURS, "Nystrom", rank=RANK),
        one(OURS, "Lanczos", rank=RANK),
        one(OURS, "EK-FAC"),
        one(OURS, "cg after EK-FAC"),
    ]
    if num_parameters > DENSE:
        # With a smaller scale, the remainder of the series is smaller, but the noise of the batches
        # is larger. This scale is the best for pyDVL on MNIST: its largest residual is .27. At 1.2,
        # 2.5, 10 and 20 times the largest eigenvalue it is .51, .35, .29 and .41. Our LiSSA chooses
        # its own scale.
        sampled = {"steps": 1000, "scale": 5 * largest_eigenvalue, "batch_size": num_rows // 100}
        return (*approximations, *(one(by, "LiSSA", **sampled) for by in (PYDVL, OURS)))
    # If every step uses all rows, the series is shortest for a scale slightly above half the
    # largest eigenvalue.
    series = {"steps": 600, "scale": 0.6 * largest_eigenvalue, "batch_size": num_rows}
    return (
        *approximations,
        one(PYDVL, "block"),
        one(PYDVL, "one by one"),
        one(PYDVL, "direct"),
        one(PYDVL, "LiSSA", **series),
        one(CAPTUM, "naive"),
        one(INFLUENCIAE, "exact"),
        one(INFLUENCIAE, "Arnoldi", rank=_RANK_OF_INFLUENCIAE),
        one(
            INFLUENCIAE,
            "LiSSA",
            dtype="float32",
            solved=1,
            **series | {"steps": _STEPS_OF_INFLUENCIAE},
        ),
        one(OURS, "cg"),
        one(OURS, "cg after Nystrom", rank=RANK),
        one(OURS, "direct"),
        one(OURS, "LiSSA", **series),
    )


def run(problem: Problem, *, points: int, patience: float) -> dict[str, Any]:
    """Run every solver. For each run of a peer, find our fastest run with no larger residual.

    Args:
      problem: the model and its data.
      points: number of test points.
      patience: the time limit of one process, in seconds.

    Returns: `data`, `n`, `d`, `points`, `patience`, `versions` and `runs`.
      `versions` has the versions of each peer, or None for a peer that is not installed.
      `runs` is sorted by library, ours last. Each run has the fields of `solves.answer` and
      `inverts`. A peer's run with an answer also has `ours` and `ratio`. `ours` is the index of our
      fastest run whose largest residual is no larger. `ratio` is the peer's seconds for all points
      divided by the seconds of that run. Both are None if we have no such run.
    """
    H = Hessian(problem.closed_form("float64"), problem.train["float64"])
    largest = float(eigsh(H, k=1, tol=1e-2, return_eigenvectors=False)[0])
    n, d = len(problem.train["float64"]), H.shape[0]
    chosen = sorted(settings(n, d, largest, points=points), key=lambda s: _ORDER.index(s.by))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, problem, points)
        runs = [
            answer(problem, setting, folder, patience)
            | {"inverts": INVERTS[setting.by, setting.method]}
            for setting in chosen
        ]
    return {
        "data": problem.name,
        "n": n,
        "d": d,
        "points": points,
        "patience": patience,
        "versions": {by: _versions(by) for by in _PACKAGES},
        "runs": [result | compared(result, runs) for result in runs],
    }


def compared(result: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return `ours` and `ratio` for a peer's run, as `run` describes them.

    For our own runs, and for runs without an answer, the dict is empty.
    """
    if result["by"] == OURS or "error" in result:
        return {}
    fit = [
        i
        for i, run in enumerate(runs)
        if run["by"] == OURS
        and "error" not in run
        and run["largest_residual"] <= max(result["largest_residual"], ROUNDING)
    ]
    best = min(fit, key=lambda i: runs[i]["seconds"], default=None)
    ratio = None if best is None else result["seconds_for_all"] / runs[best]["seconds"]
    return {"ours": best, "ratio": ratio}


def _versions(by: str) -> dict[str, str] | None:
    """Return the versions of a peer and its dependencies; None if the peer is not installed."""
    found = interpreter(by)
    if found is None:
        return None
    python, environment = found
    code = (
        "import importlib.metadata as m, json, sys; "
        "print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [str(python), "-c", code, *_PACKAGES[by]],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    return json.loads(done.stdout) if done.returncode == 0 else None
