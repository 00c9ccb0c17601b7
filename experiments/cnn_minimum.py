"""The CNN of figure 2 at a local minimum: the way there, predictions, and exact refits."""

from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from experiments.cnn import CG_FLOAT64, ROUNDED, in_double, removals
from influence import (
    CG,
    AllCNN,
    Direct,
    Examples,
    GaussNewton,
    Hessian,
    Influence,
    LiSSA,
    Prepared,
    prepare,
    proximal_response,
    solve,
)
from influence.models.descent import Descent, descend, num_negative

_FLOAT32_GRADIENT = 1e-5  # a gradient's norm that float32 can still tell from rounding
_MOST_REFITTING = 200  # passes for a refit at the minimum, where some directions are nearly flat


def at_minimum(
    config: Any, net: AllCNN, train: Examples, measured: Examples, checkpoints: Path | None
) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """Predictions and exact refits at a local minimum, as near to one as the rounds allow.

    Without damping a proximal leave-one-out is a refit. The damping that is left is there for the
    one direction in which a softmax has no curvature, and for negative curvature if some is left.

    Args:
      config: of `fig2_cnn`.
      net: where training stopped; left at the minimum.
      train: the training set.
      measured: m test examples.
      checkpoints: where finished rounds and refits are kept, or None.

    Returns: (arrays: risk and gradient_norm by round, predicted (m, r) in every way and actual,
      removed (r,), removals_j; metrics).
    """
    descents = _descended(config, net, train, checkpoints)
    double, train64, measured64 = in_double(config, net, train, measured)
    smallest = scipy.linalg.eigvalsh(Hessian(double, train64, checkpoints=checkpoints).dense(),
                                     subset_by_index=[0, 0])[0]  # fmt: skip
    damping = max(config.minimum_damping, -2 * smallest)
    A = Hessian(double, train64, damping, checkpoints=checkpoints)
    direct = prepare(A, Direct(ROUNDED))
    found = _at_minimum(config, double, train64, measured64, A, direct, checkpoints)
    rows = removals(config, found["minimum"])
    removed = np.unique(np.concatenate(rows))
    # Each refit's gradient norm begins at |grad L(z_i)| / n, which its tolerance is relative to.
    own = double.gradients(train64.x[removed], train64.y[removed]) + double.penalty_gradient()
    start = np.linalg.norm(own, axis=1) / len(train)
    refits = proximal_response(
        double, train64, measured64, removed, objective="leave_one_out", damping=damping,
        solver=direct, tolerance=min(config.minimum_tolerance / start.max(), 0.5),
        max_iterations=_MOST_REFITTING, checkpoints=checkpoints,
    )  # fmt: skip
    values = scipy.linalg.eigvalsh(A.dense()) - damping
    last = descents[-1]
    arrays = {
        name: np.concatenate([getattr(one, name) for one in descents])
        for name in ("risk", "gradient_norm", "smallest_eigenvalue")
    }
    arrays |= {f"predicted_{how}": scores[:, removed] for how, scores in found.items()}
    arrays |= {"actual_minimum": refits.change_if_removed, "removed": removed}
    arrays |= {f"removals_{j}": np.searchsorted(removed, some) for j, some in enumerate(rows)}
    metrics = {
        "risk": last.risk[-1],
        "gradient_norm": last.gradient_norm[-1],
        "smallest_eigenvalue": values[0],
        "largest_eigenvalue": values[-1],
        "num_negative_eigenvalues": num_negative(values, np.float64),
        "hessians_formed": len(arrays["risk"]),
        "damping": damping,
        "refit_gradient_norm": (refits.gradient_norm * start).max(),
        "refits_unconverged": np.count_nonzero(~refits.converged),
    }
    return arrays, metrics


def _descended(
    config: Any, net: AllCNN, train: Examples, checkpoints: Path | None
) -> list[Descent]:
    """The ways down in float32, where that is what the net is in, and from there in float64."""
    descents = []
    if config.dtype != "float64":
        # Float32's gradients cost a fifth, and its noise is far below where training stopped.
        descents.append(descend(
            net, train, tolerance=max(config.minimum_tolerance, _FLOAT32_GRADIENT),
            rounds=config.rounds, evaluations=config.evaluations, checkpoints=checkpoints,
        ))  # fmt: skip
    double, train64 = in_double(config, net, train)

    def rounded(theta: NDArray) -> NDArray:
        net.theta = theta
        return Hessian(net, train, checkpoints=checkpoints).dense()

    descents.append(descend(
        double, train64, tolerance=config.minimum_tolerance, rounds=config.rounds,
        evaluations=config.evaluations, hessian=rounded, checkpoints=checkpoints,
    ))  # fmt: skip
    net.theta = double.theta
    return descents


def _at_minimum(
    config: Any, net: AllCNN, train: Examples, measured: Examples, A: Hessian, direct: Prepared,
    checkpoints: Path | None,
) -> dict[str, NDArray]:  # fmt: skip
    """(m, n) predicted changes by the way they were predicted; `minimum` is the exact one's."""

    def scores(solver: Any, damping: float, curvature: Any = Hessian) -> NDArray:
        influence = Influence(net, train, solver=solver, damping=damping, curvature=curvature)
        return influence.scores(measured).change_if_removed

    G = GaussNewton(net, train, A.damping, checkpoints=checkpoints)
    gauss_newton = prepare(G, Direct(ROUNDED))
    more = Hessian(net, train, config.damping, checkpoints=checkpoints)
    lissa = LiSSA(None, config.lissa_depth, 1, config.lissa_batch_size, config.seed, rtol=None)
    # The formed matrix has the products of A: CG on it takes the steps that it would on A.
    X = solve(
        A.dense(), net.gradients(measured.x, measured.y).T,
        CG(CG_FLOAT64, preconditioner=gauss_newton),
    ).x  # fmt: skip
    batches = train.batches(net.rows_per_batch(train, X.shape[1]))
    along = np.concatenate([net.directional(x, y, X) for x, y in batches])
    return {
        "minimum": scores(direct, A.damping),
        "cg": (along + net.penalty_gradient() @ X).T / len(train),
        "gauss_newton": scores(gauss_newton, A.damping, GaussNewton),
        "damped": scores(prepare(more, Direct(ROUNDED)), config.damping),
        "lissa": scores(lissa, A.damping),
    }
