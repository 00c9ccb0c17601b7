"""Time and error of the scores of all training rows for all test points, written to a file."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import numpy as np

from benchmarks.problem import Problem
from influence import Direct, Influence
from influence.scores import file as score_file

_DTYPE = "float32"
_SEED = 0
# The scores of this many test points and this many rows are recomputed in float64.
_SAMPLE = 20
_ROUNDS = 3  # timed products in each measurement of the machine's rate


def run(problem: Problem, *, num_tests: int, square: int) -> dict[str, Any]:
    """Time `Influence.write_scores` with `Direct`, which solves in float64 and writes float32.

    The stage `multiply` multiplies the gradients of the n rows by the m solutions. This counts as
    2 n d m operations. The seconds of the stage also include forming the gradients and writing the
    scores. The rate of the stage is compared with the rate of square float32 matrix products. The
    same process measures the latter before and after the stages.

    Args:
      problem: the model and its data.
      num_tests: m, the number of test points. If there are fewer, all of them are used.
      square: size of the square matrices whose product gives the machine's rate.

    Returns: `num_tests`; `dtype`; `seconds` of `prepare`, `solve`, `multiply`, `other` and `all`;
      `flop_of_multiply`; `multiply_gflops`, `machine_gflops` and their ratio `fraction_of_machine`;
      `megabytes` of the file; `largest_residual` of the solves; `converged`, True if all solves
      converged; `rounding_error`, read from the file; and `largest_error`. The last is the largest
      difference between a sample of the file's scores and `Influence.scores`, divided by the
      largest score of the sample.
    """
    net, train = problem.closed_form("float64"), problem.train["float64"]
    test = problem.test["float64"].take(slice(0, num_tests))
    rates = [_gflops(square)]
    influence = Influence(net, train, solver=Direct(), approximation="first_order")
    seconds: dict[str, float] = {}
    with _timed(seconds, "all"):
        with _timed(seconds, "prepare"):
            influence.prepared  # noqa: B018
        with tempfile.TemporaryDirectory() as folder:
            with _stages(seconds):
                path = influence.write_scores(Path(folder) / "scores.h5", test, dtype=_DTYPE)
            with _timed(seconds, "checked"):
                facts = _facts(path, influence, test)
    seconds["all"] -= seconds.pop("checked")
    seconds["other"] = 2 * seconds["all"] - sum(seconds.values())
    rates.append(_gflops(square))
    work = 2 * len(train) * len(problem.theta) * len(test)
    rate = work / seconds["multiply"] / 1e9
    return facts | {
        "num_tests": len(test),
        "dtype": _DTYPE,
        "seconds": seconds,
        "flop_of_multiply": work,
        "multiply_gflops": rate,
        "machine_gflops": max(rates),
        "fraction_of_machine": rate / max(rates),
    }


def _facts(path: Path, influence: Influence, test: Any) -> dict[str, Any]:
    """Read the facts stored in the file, and compare a sample of its scores with float64 scores."""
    rng = np.random.default_rng(_SEED)
    tests, rows = (
        np.sort(rng.choice(size, min(_SAMPLE, size), replace=False))
        for size in (len(test), len(influence.train))
    )
    exact = influence.scores(test.take(tests), rows)[:]
    with h5py.File(path, "r") as file:
        got = np.stack([np.asarray(file["change_if_removed"][i])[rows] for i in tests])  # pyright: ignore
        return {
            "megabytes": path.stat().st_size / 1e6,
            "largest_residual": float(np.max(file["residual"])),  # pyright: ignore
            "converged": bool(np.all(file["converged"])),  # pyright: ignore
            "rounding_error": float(file["rounding_error"][()]),  # pyright: ignore
            "largest_error": float(np.abs(got - exact).max() / np.abs(exact).max()),
        }


def _gflops(square: int) -> float:
    """Measure the machine's highest rate of square float32 matrix products, in GFLOP/s."""
    S, T = np.random.default_rng(_SEED).standard_normal((2, square, square)).astype(_DTYPE)
    np.matmul(S, T)
    best = np.inf
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        np.matmul(S, T)
        best = min(best, time.perf_counter() - begun)
    return 2 * square**3 / best / 1e9


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    begun = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begun


@contextmanager
def _stages(seconds: dict[str, float]) -> Iterator[None]:
    """Time the private functions `_solve` and `_multiply`, the stages of `write_scores`."""

    def timed(stage: Callable, name: str) -> Callable:
        def watched(*args: Any) -> None:
            with _timed(seconds, name):
                stage(*args)

        return watched

    solve, multiply = timed(score_file._solve, "solve"), timed(score_file._multiply, "multiply")
    with mock.patch.multiple(score_file, _solve=solve, _multiply=multiply):
        yield
