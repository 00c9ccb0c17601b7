"""LiSSA with the paper's settings: seconds for one test point, and the error of the scores."""

import time
from typing import Any

import numpy as np

from benchmarks.problem import Problem
from influence import CG, Influence, LiSSA

# The authors' 2017 code uses these values for Figure 2.
SCALE, BATCH_SIZE = 25.0, 1
_EXACT = 1e-10  # relative residual of the reference solution


def run(problem: Problem, *, point: int, depth: int, repeats: int) -> dict[str, Any]:
    """Time `LiSSA(25, depth, repeats, 1)` on one test point, in float64, without an early stop.

    Args:
      problem: the model and its data.
      point: index of the test point.
      depth: number of steps of a run; 5,000 in the paper.
      repeats: number of runs to average; 10 in the paper.

    Returns: `point`, `depth`, `repeats`, `scale`, `batch_size`; the `seconds` and the true relative
      `residual` of s_test; and `pearson`, the correlation between the scores and the exact scores
      over all rows.
    """
    net, train = problem.closed_form("float64"), problem.train["float64"]
    test = problem.test["float64"].take([point])
    solver = LiSSA(SCALE, depth, repeats, BATCH_SIZE, change=0.0, rtol=None)
    begun = time.perf_counter()
    solution = Influence(net, train, solver=solver, approximation="first_order").s_test(test)
    seconds = time.perf_counter() - begun
    exact = Influence(net, train, solver=CG(_EXACT), approximation="first_order")
    both = np.column_stack([solution.x, exact.s_test(test).x])
    scores = exact.inverse.along(both, train)
    return {
        "point": point,
        "scale": SCALE,
        "depth": depth,
        "repeats": repeats,
        "batch_size": BATCH_SIZE,
        "seconds": seconds,
        "residual": float(solution.residual[0]),
        "pearson": float(np.corrcoef(scores.T)[0, 1]),
    }
