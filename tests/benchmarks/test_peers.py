"""Tests of the answers of other libraries, where installed, for a problem of twelve parameters."""

import dataclasses
import functools
import json
import os
import subprocess

import numpy as np
import pytest

from benchmarks import child, peers, solve_ours, solves, table
from benchmarks.solves import CAPTUM, INFLUENCIAE, OURS, PYDVL, Setting

DECAY = 0.1
ROWS, FEATURES, CLASSES, POINTS = 20, 4, 3, 3
# The Hessian has 12 eigenvalues. Four of them, one per feature, equal the weight decay, so only 9
# values are distinct. With this rank, Arnoldi is exact.
DISTINCT = 9
# Each LiSSA step multiplies the remaining error by at most 1 - DECAY / scale = 0.9. After 200 steps
# the error is below LiSSA's tolerance in EXACT.
LISSA = {"steps": 200, "scale": 1.0, "batch_size": ROWS}
EXACT = [
    (PYDVL, "block", {}, 1e-5),
    (PYDVL, "one by one", {}, 1e-5),
    (PYDVL, "direct", {}, 1e-12),
    (PYDVL, "LiSSA", LISSA, 1e-7),
    (PYDVL, "Nystrom", {"rank": 12}, 1e-6),  # pyDVL adds a shift to the matrix for stability
    (PYDVL, "Arnoldi", {"rank": 8}, 1e-5),  # pyDVL computes eigenvectors with the tolerance 1e-6
    (PYDVL, "EK-FAC", {}, None),
    (CAPTUM, "naive", {}, 1e-12),
    (CAPTUM, "Arnoldi", {"rank": DISTINCT}, 1e-8),
    (INFLUENCIAE, "exact", {}, 1e-12),
    (INFLUENCIAE, "CGD", {}, 1e-5),
    (INFLUENCIAE, "LiSSA", {**LISSA, "dtype": "float32"}, 1e-5),
    (INFLUENCIAE, "Arnoldi", {"rank": DISTINCT}, 1e-6),
]
OF_OURS = [
    ("cg", {}, 1e-5),
    ("cg after EK-FAC", {}, 1e-5),
    ("cg after Nystrom", {"rank": 4}, 1e-5),
    ("direct", {}, 1e-12),
    ("LiSSA", LISSA, 1e-7),
    ("Nystrom", {"rank": 12}, 1e-10),
    ("Lanczos", {"rank": 12}, 1e-10),
]
# One process computes all answers of one library. It runs as `python -c CODE MODULE FOLDER`.
CODE = """
import importlib, json, pathlib, sys
import numpy as np
module, folder = importlib.import_module(sys.argv[1]), pathlib.Path(sys.argv[2])
for i, setting in enumerate(json.loads((folder / "settings.json").read_text())):
    with np.load(folder / f"problem-{setting['dtype']}.npz") as file:
        x, _ = module.made_ready(dict(file), setting)()
    np.save(folder / f"{i}.npy", x)
"""


@pytest.fixture(scope="module")
def small():
    """Return (arrays, H, B) in float64: the data, H (d, d), and right-hand sides B (d, m)."""
    rng = np.random.default_rng(0)
    x, x_test = rng.standard_normal((ROWS, FEATURES)), rng.standard_normal((POINTS, FEATURES))
    y, y_test = rng.integers(CLASSES, size=ROWS), rng.integers(CLASSES, size=POINTS)
    theta = rng.standard_normal((FEATURES, CLASSES))
    arrays = {"x": x, "y": y, "x_test": x_test, "y_test": y_test, "theta": theta}
    P, Q = softmax(x @ theta), softmax(x_test @ theta)
    H = DECAY * np.eye(FEATURES * CLASSES)
    for row, p in zip(x, P, strict=True):
        H += np.kron(np.outer(row, row), np.diag(p) - np.outer(p, p)) / ROWS
    B = np.einsum("if,ic->fci", x_test, Q - np.eye(CLASSES)[y_test]).reshape(-1, POINTS)
    return arrays, H, B


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def residual(H, B, x):
    return (np.linalg.norm(B - H @ x, axis=0) / np.linalg.norm(B, axis=0)).max()


def setting(by, method, **options):
    base = Setting(by, method, "float64", POINTS, POINTS, weight_decay=DECAY)
    return dataclasses.asdict(dataclasses.replace(base, **options))


@pytest.fixture(scope="module")
def ask(small, tmp_path_factory):
    """Give `ask(library)`, which returns the library's answers, or skips the test without it."""
    return functools.cache(lambda by: answers(by, small[0], tmp_path_factory.mktemp(by)))


def answers(by, arrays, folder):
    found = solves.interpreter(by)
    if found is None:
        pytest.skip(f"{by} is not installed: `make bench` installs it")
    python, environment = found
    for dtype in ("float32", "float64"):
        cast = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in arrays.items()}
        np.savez(folder / child.PROBLEM.format(dtype), **cast)
    settings = [setting(by, method, **options) for who, method, options, _ in EXACT if who == by]
    (folder / "settings.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [str(python), "-c", CODE, solves._MODULES[by], str(folder)],
        cwd=solves.ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {s["method"]: np.load(folder / f"{i}.npy") for i, s in enumerate(settings)}


@pytest.mark.parametrize(
    ("by", "method", "tolerance"),
    [(by, method, tolerance) for by, method, _, tolerance in EXACT if tolerance],
)
def test_a_peer_set_up_at_its_best_solves_our_system(by, method, tolerance, small, ask):
    _, H, B = small
    assert residual(H, B, ask(by)[method]) <= tolerance


def test_ek_fac_of_pydvl_is_that_of_its_pseudo_gradient(small, ask):
    # The layer has no bias. pyDVL's EK-FAC gives `expected` only if the weights are placed where
    # pyDVL expects the biases.
    arrays, _, B = small
    found = ask(PYDVL)["EK-FAC"]
    x, P = arrays["x"], softmax(arrays["x"] @ arrays["theta"])
    G = np.sqrt(P) - P * np.sqrt(P).sum(axis=1, keepdims=True)
    U, V = np.linalg.eigh(x.T @ x)[1], np.linalg.eigh(G.T @ G)[1]
    eigenvalues = ((x @ U) ** 2).T @ ((G @ V) ** 2) / ROWS + DECAY
    basis = np.kron(U, V)
    expected = basis @ ((basis.T @ B) / eigenvalues.reshape(-1, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("method", "options", "tolerance"), OF_OURS)
def test_ours_solve_the_same_system(method, options, tolerance, small):
    arrays, H, B = small
    x, report = solve_ours.made_ready(arrays, setting(OURS, method, **options))()
    assert residual(H, B, x) <= tolerance
    assert report["iterations"] >= 1


def test_our_ek_fac_on_its_own_is_another_matrix(small):
    arrays, H, B = small
    x, _ = solve_ours.made_ready(arrays, setting(OURS, "EK-FAC"))()
    assert 1e-2 < residual(H, B, x) < 2


@pytest.mark.parametrize("d", [640, 7840])
def test_every_setting_is_one_that_somebody_knows(d):
    chosen = peers.settings(1000, d, 2.0, points=10)
    pairs = {(s.by, s.method) for s in chosen}
    assert {method for by, method in pairs if by == OURS} <= set(solve_ours.SOLVERS)
    assert pairs == set(peers.INVERTS) if d <= peers.DENSE else pairs < set(peers.INVERTS)
    for s in chosen:
        if s.method in ("Nystrom", "Lanczos", "Arnoldi", "cg after Nystrom"):
            assert 0 < s.rank < d
        if s.method == "LiSSA":
            assert s.steps and s.batch_size == (1000 if d == 640 else 10)
            assert s.scale == pytest.approx(1.2 if d == 640 else 10.0)
        assert s.points == 10


def test_every_way_of_every_peer_has_its_check():
    checked = {(by, method) for by, method, *_ in EXACT}
    assert checked == {key for key in peers.INVERTS if key[0] != OURS}


def row(by, seconds, largest, **more):
    return {
        "by": by,
        "seconds": seconds,
        "seconds_for_all": seconds,
        "largest_residual": largest,
        **more,
    }


def test_a_peer_is_held_against_our_fastest_that_comes_as_close():
    runs = [
        row(OURS, 1.0, 1e-1),
        row(OURS, 4.0, 1e-6),
        row(OURS, 5.0, 1e-9),
        {"by": OURS, "error": "stopped after 1 s"},
    ]
    near, far = row(PYDVL, 20.0, 1e-3), row(PYDVL, 3.0, 1e-11)
    assert peers.compared(near, runs) == {"ours": 1, "ratio": 5.0}
    assert peers.compared(row(PYDVL, 3.0, 1e-1), runs) == {"ours": 0, "ratio": 3.0}
    assert peers.compared(far, runs) == {"ours": None, "ratio": None}
    rounding = [*runs, row(OURS, 2.0, 9e-13)]
    assert peers.compared(row(PYDVL, 3.0, 1e-15), rounding) == {"ours": 4, "ratio": 1.5}
    assert peers.compared(runs[0], runs) == {}
    assert peers.compared({"by": PYDVL, "error": "failed"}, runs) == {}
    extrapolated = near | {"seconds_for_all": 200.0}
    assert peers.compared(extrapolated, runs)["ratio"] == 50.0


def test_run_and_its_table_with_processes_that_end_at_once(digits, monkeypatch):
    python = (solves.Path("python"), {})
    monkeypatch.setattr(solves, "interpreter", lambda by: None if by == CAPTUM else python)
    monkeypatch.setattr(
        peers, "_versions", lambda by: None if by == CAPTUM else {by: "1.2", "torch": "2"}
    )
    times, residuals = {PYDVL: 3.0, INFLUENCIAE: 0.5, OURS: 0.25}, {PYDVL: 1e-3, OURS: 1e-3}
    asked = {}

    def finished(command, **kwargs):
        folder = solves.Path(command[-1])
        asked.update(json.loads((folder / child.SETTING).read_text()))
        if asked["method"] == "exact":
            raise subprocess.TimeoutExpired(command, kwargs["timeout"])
        if asked["by"] == INFLUENCIAE and asked["method"] == "Arnoldi":
            raise subprocess.CalledProcessError(1, command, stderr=b"Traceback\nValueError: no")
        np.save(folder / child.SOLUTION, np.zeros((640, 1)))
        report = {"seconds": times[asked["by"]], "peak_rss_mb": 1, "rss_before_mb": 1}
        (folder / child.REPORT).write_text(json.dumps(report))

    monkeypatch.setattr(solves.subprocess, "run", finished)
    monkeypatch.setattr(
        solves,
        "true_residuals",
        lambda p, x: np.array(
            [
                np.nan
                if asked["method"] == "direct" and asked["by"] == PYDVL
                else residuals.get(asked["by"], 1e-4)
            ]
        ),
    )
    part = peers.run(digits, points=10, patience=45)
    assert [part[k] for k in ("data", "n", "d", "points")] == ["digits", 1297, 640, 10]
    by_name = {(run["by"], run["method"]): run for run in part["runs"]}
    assert set(by_name) == set(peers.INVERTS)
    assert by_name[PYDVL, "block"]["ratio"] == 12.0
    # There is no ratio of times, because none of our solves has a residual as small as CGD's.
    assert by_name[INFLUENCIAE, "CGD"]["ratio"] is None
    assert by_name[INFLUENCIAE, "CGD"]["seconds_for_all"] == 5.0  # CGD solved one of ten points
    assert by_name[INFLUENCIAE, "exact"]["error"] == "stopped after 45 s"
    assert by_name[INFLUENCIAE, "Arnoldi"]["error"] == "failed: ValueError: no"
    assert by_name[PYDVL, "direct"]["error"] == "failed: its answer is not finite"
    assert "not installed" in by_name[CAPTUM, "naive"]["error"]

    text = table._peers(part)
    assert text.startswith("digits\n\nLogistic regression, n = 1,297, d = 640, 10 test points")
    assert "captum is not installed here" in text and "captum, naive" not in text
    assert "| influenciae, exact, float64: 10 of 10 | H, by pseudo-inverse | stopped after" in text
    assert "| 0.5 (extrapolated: 5 for 10) | 1.0e-04 | none | |" in text
    assert "| 3 | 1.0e-03 | ours, cg, float64, asked for 1e-01: 10 of 10 | 12 |" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {7}


def test_where_peers_live(monkeypatch, tmp_path):
    monkeypatch.setattr(solves, "PEERS", tmp_path / "torch")
    monkeypatch.setattr(solves, "PEERS_TF", tmp_path / "tf")
    assert solves.interpreter(OURS) == (solves.Path(solves.sys.executable), {})
    assert solves.interpreter(PYDVL) is solves.interpreter(CAPTUM) is None
    assert solves.interpreter(INFLUENCIAE) is None
    assert peers._versions(INFLUENCIAE) is None
    (tmp_path / "tf").mkdir()
    (tmp_path / "tf" / "installed").touch()
    environment = {"PYTHONPATH": str(tmp_path / "tf"), "TF_USE_LEGACY_KERAS": "1"}
    assert solves.interpreter(INFLUENCIAE) == (solves.Path(solves.sys.executable), environment)
    assert peers._versions(INFLUENCIAE) is None  # no package is installed in the folder
