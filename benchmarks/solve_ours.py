"""s_test by this library, in a process of its own: `python -m benchmarks.solve_ours FOLDER`."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import child
from influence import (
    CG,
    ConvergenceWarning,
    Direct,
    Examples,
    Influence,
    MulticlassLogisticRegression,
)

_SOLVERS: dict[str, Any] = {"cg": CG, "direct": Direct}


def made_ready(arrays: child.Arrays, setting: dict[str, Any]) -> child.Solve:
    """The network, its data and the solver; what `child.main` times is the rest."""
    f, c = arrays["theta"].shape
    net = MulticlassLogisticRegression(
        f, c, weight_decay=setting["weight_decay"], dtype=setting["dtype"]
    )
    net.theta = arrays["theta"].ravel()
    train = Examples(arrays["x"], arrays["y"])
    test = Examples(arrays["x_test"], arrays["y_test"])
    solver = _SOLVERS[setting["method"]](rtol=setting["tolerance"])

    def solve() -> tuple[NDArray, dict[str, Any]]:
        with warnings.catch_warnings():  # the parent judges the residual
            warnings.simplefilter("ignore", ConvergenceWarning)
            solution = Influence(net, train, solver=solver).s_test(test)
        return solution.x, {"iterations": int(np.max(solution.iterations))}

    return solve


if __name__ == "__main__":
    child.main(made_ready)
