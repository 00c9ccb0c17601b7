"""Time to score all training rows for a given s_test, compared with the time of one gradient."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.clock import in_turns
from benchmarks.problem import DTYPES, Problem
from influence import GenericNeuralNet, Influence


def run(problem: Problem, s_test: NDArray, *, rounds: int) -> dict[str, Any]:
    """Time the scores of all training rows for one test point, and for many.

    `Influence.scores` does this work after its solve: s . grad L(z_i) / n for every row.

    Args:
      problem: the model and its data.
      s_test: (d, m) float64, the solutions for m test points.
      rounds: number of rounds of `in_turns`.

    Returns: `num_points`, and a dict for each of `closed_form` and `tape` in each dtype. The dict
      has the `seconds` of one gradient, of the scores for one point and of the scores for all m
      points. `one_per_gradient` and `many_per_gradient` are the ratios of these times.
      `largest_error` is the largest difference from the closed form in float64, divided by the
      largest score of the same point.
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
    """Return a function that computes the scores (n, m) of all training rows from s_test."""
    train = problem.train[dtype]
    inverse, s = Influence(net, train, approximation="first_order").inverse, s_test.astype(dtype)
    return lambda: inverse.along(s, train)
