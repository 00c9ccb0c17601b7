"""The CNN of figure 2 on some data: predictions of what removals change, and three truths.

What `fig2_cnn` asks of one trained network; that file says what for.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import joblib
import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from experiments.shared.compare import largest
from experiments.shared.descent import num_negative
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
    Scores,
    continued_training,
    prepare,
    proximal_response,
    solve,
)
from influence.common.checkpoint import kept

ROUNDED = 1e-3  # relative residual that a factorisation in float32 leaves at most
CG_FLOAT64 = 1e-7  # relative residual
_LOST = 0.1  # of the first gradient norm: what is left above it is no minimum


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
    """The network and sets of examples in float64; themselves, where that is what they are."""
    if config.dtype == "float64":
        return net, *sets
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
      checkpoints: where matrices are kept, or None.

    Returns: (changes (m, n) by the way they were predicted, metrics, the factored matrices by the
      name of the proximal objective that they belong to).
    """
    damping = config.damping
    gauss_newton = prepare(
        GaussNewton(net, train, damping, checkpoints=checkpoints), Direct(ROUNDED)
    )
    direct = prepare(Hessian(net, train, damping, checkpoints=checkpoints), Direct(ROUNDED))
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
    doubled = prepare(Hessian(net, train, 2 * damping, checkpoints=checkpoints), Direct(ROUNDED))
    found["doubled"] = Influence(net, train, solver=doubled, damping=2 * damping).scores(measured)
    predicted = {how: scores.change_if_removed for how, scores in found.items()}
    metrics = {
        "cg_iterations": found["cg"].solution.iterations.max(),
        "cg_residual": found["cg"].solution.residual.max(),
        "lissa_residual": found["lissa"].solution.residual.max(),
    } | _in_float64(config, net, train, measured, gauss_newton, found["cg"], checkpoints)
    return predicted, metrics, {"leave_one_out": direct, "bregman": gauss_newton}


def _in_float64(
    config: Any, net: AllCNN, train: Examples, measured: Examples, gauss_newton: Prepared,
    by_cg: Scores, checkpoints: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """The exact Hessian's spectrum, and s_test by CG against that by the factored matrix.

    In float32 rounding makes an error of 1e-4 in either, so that the first test point's is solved
    for in float64 too.
    """
    double, train, measured = in_double(config, net, train, measured)
    A = Hessian(double, train, config.damping, checkpoints=checkpoints)
    values = scipy.linalg.eigvalsh(A.dense()) - config.damping
    exact = solve(A, double.gradients(measured.x, measured.y).T, Direct())
    b = double.gradients(measured.x[:1], measured.y[:1]).T
    name = joblib.hash((net.theta, train.fingerprint, measured.fingerprint, config.damping))
    s_test = kept(
        checkpoints and checkpoints / f"cg-{name[:16]}.npz",
        lambda: {"x": solve(A, b, CG(CG_FLOAT64, preconditioner=gauss_newton)).x},
    )["x"]

    def error(x: NDArray, true: NDArray) -> NDArray:
        return np.linalg.norm(x - true, axis=0) / np.linalg.norm(true, axis=0)

    return {
        "smallest_eigenvalue": values[0],
        "largest_eigenvalue": values[-1],
        "num_negative_eigenvalues": num_negative(values, np.float64),
        "direct_residual": exact.residual.max(),
        "cg_against_direct": error(s_test, exact.x[:, :1]).max(),
        "cg_in_float32_against_direct": error(by_cg.solution.x, exact.x).max(),
    }


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

    Returns: (changes (m, r) by truth, NaN where none was found; metrics, and arrays (r,) with each
      proximal minimum's gradient norm).
    """
    found: dict[str, Any] = {}
    changes: dict[str, NDArray] = {}
    objectives: tuple[tuple[str, Literal["leave_one_out", "bregman"]], ...]
    objectives = ("proximal", "leave_one_out"), ("bregman", "bregman")
    for truth, objective in objectives:
        response = proximal_response(
            net, train, measured, removed, objective=objective, damping=config.damping,
            solver=prepared[objective], tolerance=config.tolerance,
            num_processes=config.num_processes, checkpoints=checkpoints,
        )  # fmt: skip
        # Without the row's own curvature there may be no minimum nearby; rounding leaves less.
        lost = response.gradient_norm > _LOST
        changes[truth] = np.where(lost, np.nan, response.change_if_removed)
        found[f"{truth}_gradient_norm"] = response.gradient_norm
        found[f"{truth}_iterations"] = response.iterations.mean()
        found[f"{truth}_lost"] = np.count_nonzero(lost)
        found[f"{truth}_unconverged"] = np.count_nonzero(~response.converged & ~lost)
    train_on = partial(
        continued_training, net, train, measured, moments=net.moments,
        batch_size=config.batch_size, checkpoints=checkpoints,
    )  # fmt: skip
    here = {"steps": config.continued_steps, "rate": config.continued_rate}
    continued = train_on(removed, seed=config.seed + 1, **here)
    changes["continued"] = continued.change_if_removed
    some = np.full(changes["continued"].shape, np.nan)
    at = np.searchsorted(removed, first)
    some[:, at] = train_on(first, seed=config.seed + 2, **here).change_if_removed
    changes["again"] = some
    few = first[: config.slow_removals]
    slow = train_on(few, seed=config.seed + 1, steps=config.continued_steps, rate=config.slow_rate)
    found["proximal_float32_error"] = _rounding(
        config, net, train, measured, removed, first, changes["proximal"], checkpoints
    )
    return changes, found | {
        "drift": continued.drift,
        "slow_spread": slow[0].std(),
        "slow_drift": slow.drift[0],
        "slow_pearson": np.corrcoef(slow[0], continued[0][at[: len(few)]])[0, 1],
    }


def _rounding(
    config: Any, net: AllCNN, train: Examples, measured: Examples, removed: NDArray,
    first: NDArray, found: NDArray, checkpoints: Path | None,
) -> float:  # fmt: skip
    """What float32 and the tolerance make of proximal leave-one-out, relative to its largest.

    Against float64 and a tolerance a hundred times smaller, for some of the first test point's
    rows, spread over their influence.
    """
    double, train, measured = in_double(config, net, train, measured)
    some = first[:: -(-len(first) // config.double_removals)]
    A = Hessian(double, train, config.damping, checkpoints=checkpoints)
    exact = proximal_response(
        double, train, measured, some, objective="leave_one_out", damping=config.damping,
        solver=prepare(A, Direct()), tolerance=config.tolerance / 100, max_iterations=40,
        block=-(-len(some) // config.num_processes), num_processes=config.num_processes,
        checkpoints=checkpoints,
    )  # fmt: skip
    rough = found[0, np.searchsorted(removed, some)]
    known = (exact.gradient_norm <= config.tolerance) & np.isfinite(rough)
    return float(np.abs(rough - exact[0])[known].max() / np.abs(exact[0][known]).max())


def removals(config: Any, predicted: Any) -> list[NDArray]:
    """The rows to remove for each test point: those of largest |influence|, the largest first."""
    return [
        largest(scores, config.further_removals if j else config.num_removals)
        for j, scores in enumerate(np.asarray(predicted))
    ]
