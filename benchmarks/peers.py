"""Every solver of every peer beside ours, on the same right-hand sides, at equal true residual.

Most of the peers' solvers invert another matrix than the Hessian; INVERTS says which. All answers
are therefore judged by one measure, the residual |b - (H + weight decay I) x| / |b| in float64, and
each peer's time is held against that of our fastest solver that comes at least as close. What is
below ROUNDING counts as equal.

The weight decay is the same everywhere: pyDVL takes it as `regularization`, captum as `hessian_reg`
times n, influenciae in each row's loss. What else each needs to be told, so that it is compared at
its best, stands in its child module: solve_pydvl, solve_captum, solve_influenciae.
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
DENSE = 1000  # parameters up to which everybody can form the matrix
RANK = 100
ROUNDING = 1e-12  # residuals in float64 below this are rounding, here and there
_RANK_OF_INFLUENCIAE = 30  # from about 40 on its basis is no longer orthogonal, and it gets worse
_STEPS_OF_INFLUENCIAE = 50  # one pass for each point and step, row by row
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
    """What is run: the peers' solvers, then ours.

    Up to DENSE parameters these are all of them, with LiSSA on all rows at every step. Beyond, the
    matrix is not formed, LiSSA takes batches, and those that reach any residual asked for are left
    to `solves`, but for the few of ours that the others are held against.

    Args:
      num_rows: n.
      num_parameters: d.
      largest_eigenvalue: of the Hessian, from which LiSSA's scale is chosen for the peers.
      points: test points solved; by influenciae's iterations, which take them one by one, only the
        first.
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
        # A smaller scale finishes the series and leaves the batches' noise, a larger one the
        # reverse. This is pyDVL's best on MNIST: largest residuals .27, against .51, .35, .29 and
        # .41 at 1.2, 2.5, 10 and 20 times the largest eigenvalue. Ours chooses its own.
        sampled = {"steps": 1000, "scale": 5 * largest_eigenvalue, "batch_size": num_rows // 100}
        return (*approximations, *(one(by, "LiSSA", **sampled) for by in (PYDVL, OURS)))
    # On all rows a scale of just over half the largest eigenvalue makes the shortest series.
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
    """Run every solver and find, for each peer's, our fastest that comes at least as close.

    Args:
      problem: the model and its data.
      points: test points.
      patience: seconds that one process may take.

    Returns: `data`, `n`, `d`, `points`, `patience`, `versions` by peer (None: not installed), and
      `runs`, peer by peer, ours last: what `solves.answer` says of each and `inverts`; for a peer's
      that answered also `ours`, the index of our fastest run whose largest residual is no larger,
      and `ratio`, its seconds for all points over ours'; both None where there is none.
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
    """Our fastest of some runs that comes at least as close as a peer's, and how much faster."""
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
    """Of a peer and what it stands on; None where it cannot be asked."""
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
