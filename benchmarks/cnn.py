"""s_test of the paper's convolutional network, by every method that reaches it: seconds, residual.

Its Hessian has negative eigenvalues, the smallest about -0.008, and is damped by 0.01. All is in
float32.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.problem import Problem
from influence import CG, Direct, DivergenceError, Examples, GaussNewton, Hessian, prepare, solve
from influence.curvature.chain import chain_hessian
from influence.curvature.layers import affine_layers
from influence.models.cnn import AllCNN
from influence.solvers import EKFAC, Solver

# EK-FAC is also tried at this many times the matrix's damping, where it is most likely to help.
_MORE = 100
# Seed of the paper's script for its subset of rows, drawn in the same way.
_SUBSET_SEED = 0


@dataclass(frozen=True)
class Network:
    """The network, its training, and the system.

    Attributes:
      num_rows: training images, the first of RandomState(0)'s permutation.
      point: the test image.
      filters, strides: those of the convolutions, as in AllCNN.
      schedule: (steps, learning rate) of each stage of the training, which is not timed.
      damping: damping of the Hessian and the Gauss-Newton matrix.
      rtol: relative residual to reach.
      patience: seconds of products after which CG is stopped.
    """

    num_rows: int = 5500
    point: int = 6558
    filters: int = 8
    strides: tuple[int, ...] = (1, 2, 1, 2, 1)
    schedule: tuple[tuple[int, float], ...] = ((10_000, 1e-3), (5_000, 1e-4), (5_000, 1e-5))
    damping: float = 0.01
    rtol: float = 1e-4
    patience: float = 450.0


def run(problem: Problem, network: Network, *, checkpoints: Path | None) -> dict[str, Any]:
    """Train, or continue from a checkpoint, and solve (H + damping I) x = b by every method.

    The time of each method starts from the network and its rows, with the product already traced.
    It includes the preparation, the solve, and the residual of the answer, recomputed from H.

    Args:
      problem: the images.
      network: the network and the system.
      checkpoints: a folder that stores the training, so that it is done once; None: not stored.

    Returns: `network`; `d`; `risk` and `gradient_norm` at the end of training; `product_seconds` of
      one Hessian product; `runs`, for each method `method`, `seconds`, `prepare_seconds` of them,
      `iterations`, `residual`, `meets`, `remedy`, or `error`; and `cg_iterations`: the iterations
      of CG in float64 on the damped matrices "Hessian" and "Gauss-Newton", preconditioned by
      "none", "EK-FAC", "EK-FAC damped more" (100 times), and "layers" (the exact inverse of every
      layer's own block of the Gauss-Newton matrix). None if CG met negative curvature.
    """
    net, train, test = _trained(problem, network, checkpoints)
    H = Hessian(net, train, network.damping)
    b = net.gradients(test.x, test.y)[0]
    H.matvec(b)  # traces it
    begun = time.perf_counter()
    H.matvec(b)
    product = time.perf_counter() - begun
    limit, rtol = max(int(network.patience / product), 1), network.rtol
    kept: dict[str, NDArray] = {}

    def after_gauss_newton() -> Solver:
        # The same as prepare(GaussNewton(net, train, damping), Direct()), but the matrix is stored.
        kept["G"] = GaussNewton(net, train, network.damping).dense()
        return CG(rtol, limit, prepare(kept["G"], Direct()))

    ways: dict[str, Callable[[], Solver]] = {
        "CG after Gauss-Newton": after_gauss_newton,
        "EK-FAC": lambda: EKFAC(rtol),
        "Direct": lambda: Direct(rtol),
        "CG": lambda: CG(rtol, limit),
        "CG after EK-FAC": lambda: CG(rtol, limit, EKFAC()),
    }
    if chain_hessian(net, train.take([0])) is None:  # forming the matrix would take d products
        del ways["Direct"]
    runs = []
    for method, make in ways.items():
        print(f"  {method} ...", end=" ", flush=True)
        runs.append({"method": method} | _timed(H, b, make))
        print(
            runs[-1].get("error")
            or "{seconds:.1f} s, {iterations} iterations, residual {residual:.1e}".format(
                **runs[-1]
            ),
            flush=True,
        )
    return {
        "network": asdict(network),
        "d": len(b),
        "risk": net.risk(train),
        "gradient_norm": net.gradient_norm(train),
        "product_seconds": product,
        "runs": runs,
        "cg_iterations": _iterations(net, train, kept["G"], H.dense(), b, network),
    }


def fastest(part: dict[str, Any]) -> dict[str, Any] | None:
    """Find the fastest of the runs that met the tolerance."""
    good = [run for run in part["runs"] if run.get("meets")]
    return min(good, key=lambda run: run["seconds"], default=None)


def _trained(
    problem: Problem, network: Network, checkpoints: Path | None
) -> tuple[AllCNN, Examples, Examples]:
    def images(x: NDArray) -> NDArray:
        side = round(x.shape[1] ** 0.5)
        return x.reshape(-1, side, side, 1)

    every, test = problem.train["float32"], problem.test["float32"].take([network.point])
    rows = np.random.RandomState(_SUBSET_SEED).permutation(len(every))[: network.num_rows]
    train = Examples(images(every.x[rows]), every.y[rows])
    net = AllCNN(train.x.shape[1:], filters=network.filters, strides=network.strides)
    steps = sum(steps for steps, _ in network.schedule)
    print(f"  training for {steps} steps, unless a checkpoint is there ...", flush=True)
    net.fit(train, schedule=network.schedule, checkpoints=checkpoints)
    return net, train, Examples(images(test.x), test.y)


def _timed(H: Hessian, b: NDArray, make: Callable[[], Solver]) -> dict[str, Any]:
    begun = time.perf_counter()
    try:
        prepared = prepare(H, make())
        ready = time.perf_counter() - begun
        solution = prepared(b)
    except DivergenceError as error:
        return {"error": str(error)}
    return {
        "seconds": time.perf_counter() - begun,
        "prepare_seconds": ready,
        "iterations": int(solution.iterations[0]),
        "residual": float(solution.residual[0]),
        "meets": bool(solution.converged[0]),
        "remedy": solution.remedy,
    }


def _iterations(
    net: AllCNN, train: Examples, G: NDArray, H: NDArray, b: NDArray, network: Network
) -> dict[str, dict[str, int | None]]:
    """Count CG's iterations in float64 on the Gauss-Newton matrix G and on H, by preconditioner."""
    layers = np.zeros(G.shape)
    for affine in affine_layers(net, train.take(slice(0, 2)).x).layers:
        own = np.ix_(affine.entries.ravel(), affine.entries.ravel())
        layers[own] = np.linalg.inv(G[own].astype(np.float64))

    def ekfac(damping: float) -> Any:
        return prepare(GaussNewton(net, train, damping), EKFAC())

    more = _MORE * network.damping
    by = {
        "none": None,
        "EK-FAC": ekfac(network.damping),
        "EK-FAC damped more": ekfac(more),
        "layers": layers,
    }
    found: dict[str, dict[str, int | None]] = {}
    for matrix, A in {"Gauss-Newton": G, "Hessian": H}.items():
        found[matrix] = {}
        for name, M in by.items():
            solution = solve(A.astype(np.float64), b, CG(network.rtol, preconditioner=M))
            found[matrix][name] = int(solution.iterations[0]) if solution.converged[0] else None
    return found
