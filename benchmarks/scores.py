"""Scores of all training rows for a given s_test, compared with one gradient."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.clock import in_turns
from benchmarks.problem import DTYPES, Problem
from influence import GenericNeuralNet, Influence


def run(problem: Problem, s_test: NDArray, *, rounds: int) -> dict[str, Any]:
    """Time the scores of one test point, and of many, on all training rows.

    This is the work of `Influence.scores` after its solve: s . grad L(z_i) / n for every row.

    Args:
      problem: the model and its data.
      s_test: (d, m) float64, the solutions.
      rounds: number of rounds, in turns.

    Returns: for `closed_form` and `tape`, in each dtype: seconds of one gradient, of one point's
      scores and of all m points' scores, their ratios to the gradient, and the largest error of a
      score compared with the closed form in float64, relative to that point's largest score.
    """
    nets: dict[str, tuple[GenericNeuralNet, str]] = {}
    for dtype in DTYPES:
        nets[f"closed_form {dtype}"] = (problem.closed_form(dtype), dtype)
        nets[f"tape {dtype}"] = (problem.tape(dtype), dtype)
    tasks: dict[str, Any] = {}
    for name, (net, dtype) in nets.items():
        tasks |= _tasks(name, net, problem, s_test, dtype)
    times = in_turns(tasks, rounds)
    exact = _scores(nets["closed_form float64"][0], problem, "float64", s_test)()
    result: dict[str, Any] = {"num_points": s_test.shape[1]}
    for name, (net, dtype) in nets.items():
        got = {part: times[f"{name} {part}"] for part in ("gradient", "one", "many")}
        error = np.abs(_scores(net, problem, dtype, s_test)() - exact).max(axis=0)
        result[name] = {
            "seconds": {part: dataclasses.asdict(timing) for part, timing in got.items()},
            "one_per_gradient": got["one"].best / got["gradient"].best,
            "many_per_gradient": got["many"].best / got["gradient"].best,
            "largest_error": float((error / np.abs(exact).max(axis=0)).max()),
        }
    return result


def _tasks(
    name: str, net: GenericNeuralNet, problem: Problem, s_test: NDArray, dtype: str
) -> dict[str, Any]:
    train = problem.train[dtype]
    return {
        f"{name} gradient": lambda: net.risk_gradient(train),
        f"{name} one": _scores(net, problem, dtype, s_test[:, :1].copy()),
        f"{name} many": _scores(net, problem, dtype, s_test),
    }


def _scores(net: GenericNeuralNet, problem: Problem, dtype: str, s_test: NDArray) -> Any:
    """Make a call that returns (n, m) scores: the work of `Influence.scores` for a given s_test."""
    train = problem.train[dtype]
    inverse, s = Influence(net, train, approximation="first_order").inverse, s_test.astype(dtype)
    return lambda: inverse.along(s, train)
