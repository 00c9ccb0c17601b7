"""Time of exact leave-one-out refits, and their largest gradient norm, which certifies them."""

import time
from typing import Any

import numpy as np

from benchmarks.problem import Problem
from influence import leave_one_out

_SEED = 0


def run(problem: Problem, *, num_refits: int) -> dict[str, Any]:
    """Time `leave_one_out` by Newton's method, including the factorisation of the Hessian.

    Args:
      problem: the model and its data.
      num_refits: number of refits. Each removes one row, drawn with a fixed seed.

    Returns: `num_refits`; `seconds` of all refits; `worst_gradient_norm`, the largest gradient norm
      of a refit's risk; and `passes_per_refit`, the mean number of passes over the data per refit.
    """
    train = problem.train["float64"]
    rows = np.random.default_rng(_SEED).choice(len(train), num_refits, replace=False)
    net, test = problem.closed_form("float64"), problem.test["float64"].take([0])
    begun = time.perf_counter()
    refits = leave_one_out(net, train, test, rows)
    return {
        "num_refits": num_refits,
        "seconds": time.perf_counter() - begun,
        "worst_gradient_norm": float(refits.gradient_norm.max()),
        "passes_per_refit": float(np.mean(refits.passes)),
    }
