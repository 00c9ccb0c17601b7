"""s_test by this library, in a separate process: `python -m benchmarks.solve_ours FOLDER`."""

import importlib
import warnings
from collections.abc import Callable
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
    LiSSA,
    MulticlassLogisticRegression,
)


def _approximation(name: str, *arguments: Any) -> Any:
    """Make a solver from the name of its class. Only the module of this class is imported."""
    module = importlib.import_module(f"influence.solvers.{name.lower()}")
    return getattr(module, name)(*arguments)


SOLVERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cg": lambda s: CG(s["tolerance"]),
    "cg after EK-FAC": lambda s: CG(s["tolerance"], preconditioner=_approximation("EKFAC")),
    "cg after Nystrom": lambda s: CG(
        s["tolerance"], preconditioner=_approximation("Nystrom", s["rank"])
    ),
    "direct": lambda s: Direct(s["tolerance"]),
    "EK-FAC": lambda s: _approximation("EKFAC"),
    "Lanczos": lambda s: _approximation("Lanczos", s["rank"]),
    "LiSSA": lambda s: LiSSA(
        depth=s["steps"], repeats=1, batch_size=s["batch_size"], change=0.0, rtol=None
    ),
    "Nystrom": lambda s: _approximation("Nystrom", s["rank"]),
}


def made_ready(arrays: child.Arrays, setting: dict[str, Any]) -> child.Solve:
    """Make the net, its data and the solver. Return the call that `child.main` times."""
    f, c = arrays["theta"].shape
    net = MulticlassLogisticRegression(
        f, c, weight_decay=setting["weight_decay"], dtype=setting["dtype"]
    )
    net.theta = arrays["theta"].ravel()
    train = Examples(arrays["x"], arrays["y"])
    test = Examples(arrays["x_test"], arrays["y_test"])
    solver = SOLVERS[setting["method"]](setting)

    def solve() -> tuple[NDArray, dict[str, Any]]:
        with warnings.catch_warnings():  # the parent process checks the residual
            warnings.simplefilter("ignore", ConvergenceWarning)
            influence = Influence(net, train, solver=solver, approximation="first_order")
            solution = influence.s_test(test)
        return solution.x, {"iterations": int(np.max(solution.iterations))}

    return solve


if __name__ == "__main__":
    child.main(made_ready)
