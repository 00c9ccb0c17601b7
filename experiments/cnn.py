"""The CNN of figure 2 on some data: predictions of what removals change, and three truths.

What `fig2_cnn` asks of one trained network; that file says what for.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from experiments.compare import largest
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
    continued_training,
    prepare,
    proximal_response,
    solve,
)
from influence.checkpoint import kept
from influence.models.descent import descend, num_negative

_ROUNDED = 1e-3  # relative residual that a factorisation in float32 leaves at most
_REFINEMENTS = 3
_MOST_REFITTING = 200  # passes for a refit at the minimum, where some directions are nearly flat


def images(data: Any, config: Any) -> tuple[Examples, Examples]:
    """A shuffled part of the training set, and the test set, as images with one channel."""
    (x, y), (x_test, y_test) = data.train, data.test
    rows = np.random.RandomState(0).permutation(len(y))[: config.num_train]
    side = int(np.sqrt(x.shape[1]))

    def shaped(x: NDArray) -> NDArray:
        return x.reshape(-1, side, side, 1).astype(config.dtype, copy=False)

    return Examples(shaped(x[rows]), y[rows]), Examples(shaped(x_test), y_test)


def network(config: Any, train: Examples, dtype: str | None = None) -> AllCNN:
    """The network before training."""
    return AllCNN(
        train.x.shape[1:], int(train.y.max()) + 1, filters=config.filters, strides=config.strides,
        weight_decay=config.weight_decay, dtype=dtype or config.dtype,
        seed=config.seed,
    )  # fmt: skip


def in_double(config: Any, net: AllCNN, *sets: Examples) -> tuple[Any, ...]:
    """The network and sets of examples in float64."""
    double = network(config, sets[0], "float64")
    double.theta = net.theta.astype(np.float64)
    return double, *(Examples(part.x.astype(np.float64), part.y) for part in sets)


def predictions(
    config: Any, net: AllCNN, train: Examples, measured: Examples, checkpoints: Path | None
) -> tuple[dict[str, NDArray], dict[str, Any], dict[str, Prepared]]:
    """What removing each row is predicted to change, and the curvature behind it.

    Args:
      config: of `fig2_cnn`.
      net: where training stopped.
      train: the training set, n rows.
      measured: m test examples.
      checkpoints: where what takes minutes is kept, or None.

    Returns: (changes (m, n) by the way they were predicted, metrics, the factored matrices by the
      name of the proximal objective that they belong to).
    """
    matrix = kept(
        checkpoints and checkpoints / "hessian.npz", lambda: {"H": Hessian(net, train).dense()}
    )["H"]
    values, vectors = scipy.linalg.eigh(matrix.astype(np.float64))
    damping = config.damping
    gauss_newton = prepare(GaussNewton(net, train, damping), Direct(_ROUNDED))
    direct = prepare(Hessian(net, train, damping), Direct(_ROUNDED))
    lissa = LiSSA(None, config.lissa_depth, 1, config.lissa_batch_size, config.seed, rtol=None)
    solvers = {
        "cg": CG(config.cg_rtol, preconditioner=gauss_newton), "direct": direct, "lissa": lissa,
    }  # fmt: skip
    found = {
        how: Influence(net, train, solver=solver, damping=damping).scores(measured)
        for how, solver in solvers.items()
    }
    found["gauss_newton"] = Influence(
        net, train, solver=gauss_newton, damping=damping, curvature=GaussNewton
    ).scores(measured)
    predicted = {how: scores.change_if_removed for how, scores in found.items()}
    doubled = matrix + 2 * damping * np.eye(len(matrix), dtype=matrix.dtype)
    s_test = solve(doubled, net.gradients(measured.x, measured.y).T, Direct(_ROUNDED)).x
    batches = train.batches(net.rows_per_batch(train, len(measured)))
    along = np.concatenate([net.directional(x, y, s_test) for x, y in batches])
    predicted["direct_doubled"] = (along + net.penalty_gradient() @ s_test).T / len(train)
    metrics = {
        "smallest_eigenvalue": values[0],
        "largest_eigenvalue": values[-1],
        "num_negative_eigenvalues": num_negative(values, matrix.dtype),
        "cg_iterations": found["cg"].solution.iterations.max(),
        "cg_residual": found["cg"].solution.residual.max(),
        "lissa_residual": found["lissa"].solution.residual.max(),
        "cg_against_direct": _cg_against_direct(config, net, train, measured, gauss_newton,
                                                values, vectors, checkpoints),
    }  # fmt: skip
    return predicted, metrics, {"leave_one_out": direct, "bregman": gauss_newton}


def _cg_against_direct(
    config: Any, net: AllCNN, train: Examples, measured: Examples, gauss_newton: Prepared,
    values: NDArray, vectors: NDArray, checkpoints: Path | None,
) -> float:  # fmt: skip
    """Relative error of CG's s_test, of the first test point.

    Both in float64: in float32 rounding makes an error of 1e-4 in either. The exact solution is
    that of the formed matrix, refined against products in float64.
    """
    double, train, measured = in_double(config, net, train, measured)
    A = Hessian(double, train, config.damping)
    b = double.gradients(measured.x[:1], measured.y[:1]).T

    def both() -> dict[str, NDArray]:
        x = np.zeros_like(b)
        for _ in range(_REFINEMENTS):
            x += vectors @ (vectors.T @ (b - A @ x) / (values + config.damping)[:, None])
        return {"cg": solve(A, b, CG(1e-7, preconditioner=gauss_newton)).x, "direct": x}

    s_test = kept(checkpoints and checkpoints / "float64.npz", both)
    return float(np.linalg.norm(s_test["cg"] - s_test["direct"]) / np.linalg.norm(s_test["direct"]))


def truths(
    config: Any, net: AllCNN, train: Examples, measured: Examples, removed: NDArray,
    first: NDArray, prepared: dict[str, Prepared], checkpoints: Path | None,
) -> tuple[dict[str, NDArray], dict[str, Any]]:  # fmt: skip
    """What removing rows actually changes, in three meanings.

    Args:
      config: of `fig2_cnn`.
      net: where training stopped.
      train: the training set.
      measured: m test examples.
      removed: (r,) increasing training rows.
      first: those of the first test point, the most influential first.
      prepared: the factored matrices by the name of the proximal objective.
      checkpoints: where finished removals are kept, or None.

    Returns: (changes (m, r) by truth, metrics).
    """
    metrics: dict[str, Any] = {}
    changes: dict[str, NDArray] = {}
    objectives: tuple[tuple[str, Literal["leave_one_out", "bregman"]], ...]
    objectives = ("proximal", "leave_one_out"), ("bregman", "bregman")
    for truth, objective in objectives:
        response = proximal_response(
            net, train, measured, removed, objective=objective, damping=config.damping,
            solver=prepared[objective], tolerance=config.tolerance, checkpoints=checkpoints,
        )  # fmt: skip
        changes[truth] = response.change_if_removed
        metrics[f"{truth}_gradient_norm"] = response.gradient_norm.max()
        metrics[f"{truth}_unconverged"] = np.count_nonzero(~response.converged)
        metrics[f"{truth}_iterations"] = response.iterations.mean()
    train_on = partial(
        continued_training, net, train, measured, steps=config.continued_steps,
        rate=config.continued_rate, moments=net.moments, batch_size=config.batch_size,
        checkpoints=checkpoints,
    )  # fmt: skip
    continued = train_on(removed, seed=config.seed + 1)
    changes["continued"] = continued.change_if_removed
    few = first[: config.noise_removals]
    again = train_on(few, seed=config.seed + 2)[0]
    same = continued[0][np.searchsorted(removed, few)]
    metrics |= {"lost_noise": 1 - np.corrcoef(same, again)[0, 1], "drift": continued.drift[0]}
    return changes, metrics


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

    Returns: (arrays: risk and gradient_norm by round, predicted and actual (m, r), removed (r,),
      removals_j; metrics).
    """
    double, train64, measured64 = in_double(config, net, train, measured)

    def rounded(theta: NDArray) -> NDArray:
        net.theta = theta
        return Hessian(net, train).dense()

    descent = descend(
        double, train64, tolerance=config.minimum_tolerance, rounds=config.rounds,
        evaluations=config.evaluations, hessian=rounded, checkpoints=checkpoints,
    )  # fmt: skip
    damping = max(config.minimum_damping, -2 * descent.smallest_eigenvalue[-1])
    direct = prepare(Hessian(double, train64, damping), Direct(_ROUNDED))
    predicted = Influence(double, train64, solver=direct, damping=damping).scores(measured64)
    rows = removals(config, predicted)
    removed = np.unique(np.concatenate(rows))
    refits = proximal_response(
        double, train64, measured64, removed, objective="leave_one_out", damping=damping,
        solver=direct, tolerance=config.refit_tolerance, max_iterations=_MOST_REFITTING,
        checkpoints=checkpoints,
    )  # fmt: skip
    net.theta = double.theta
    arrays = {
        "risk": descent.risk, "gradient_norm": descent.gradient_norm, "removed": removed,
        "smallest_eigenvalue": descent.smallest_eigenvalue,
        "predicted_minimum": predicted[:, removed], "actual_minimum": refits.change_if_removed,
    }  # fmt: skip
    arrays |= {f"removals_{j}": np.searchsorted(removed, some) for j, some in enumerate(rows)}
    metrics = {
        "risk": descent.risk[-1],
        "gradient_norm": descent.gradient_norm[-1],
        "smallest_eigenvalue": descent.smallest_eigenvalue[-1],
        "num_negative_eigenvalues": descent.num_negative[-1],
        "rounds": len(descent.risk) - 1,
        "damping": damping,
        "refit_gradient_norm": refits.gradient_norm.max(),
        "refits_unconverged": np.count_nonzero(~refits.converged),
    }
    return arrays, metrics


def removals(config: Any, predicted: Any) -> list[NDArray]:
    """The rows to remove for each test point: those of largest |influence|, the largest first."""
    return [
        largest(scores, config.further_removals if j else config.num_removals)
        for j, scores in enumerate(np.asarray(predicted))
    ]
