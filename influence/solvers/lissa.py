"""LiSSA: a power series for the inverse. Each step estimates the matrix from a few rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from influence.common.convergence import DivergenceError
from influence.common.progress import progress
from influence.curvature.operators import Curvature
from influence.solvers.base import Raw, check_integer, check_rtol, finite_products, not_finite
from influence.solvers.lanczos import largest_eigenvalues

# LiSSA checks the norms of h once in this many steps.
_CHECK_EVERY = 16
# The largest eigenvalues of the whole matrix and of this many batches determine the scale.
_PROBE_BATCHES = 32
# Lanczos takes at most this many steps for each of these eigenvalues.
_PROBE_STEPS = 16
# LiSSA tries at most this many scales, each twice the one before.
_MOST_DOUBLINGS = 30
# This seed is fixed, because the scale must not depend on LiSSA's `seed`.
_PROBE_SEED = 1


@dataclass(frozen=True)
class LiSSA:
    """Linear-time stochastic second-order algorithm (Agarwal, Bullins & Hazan 2017).

    For a right-hand side v, a run starts from h = v. Each step replaces h by
    v + h - A_batch h / scale, where A_batch estimates A from a few rows. After `depth` steps
    h / scale estimates A^-1 v. LiSSA returns the mean over `repeats` runs. If A_batch is always A,
    this is exactly (1/scale) sum_{j=0}^{depth} (I - A/scale)^j v.

    LiSSA differs from the 2017 code of Koh & Liang in one point. Here the damping is part of A, so
    it is absolute. There the fixed point is (H + damping scale I)^-1 v, with H the Hessian. As in
    that code, rows are taken in a shuffled order without replacement.

    All repeats and all right-hand sides advance together. The result depends on `seed`, but not on
    the number of right-hand sides or threads. For a given scale and `change` = 0, the result is
    linear in v. This linear map is not symmetric, because the batches come in an order.

    Args:
      scale: the number that divides A in the series. The series may diverge if the scale is below
        half the largest eigenvalue of some A_batch. If None, the scale is a Lanczos bound on the
        largest eigenvalue of A and of a sample of batches. A column that still grows too large
        restarts with twice the scale. So the series cannot diverge on a positive definite matrix.
      depth: the largest number of steps of each run.
      repeats: number of runs to average.
      batch_size: number of rows in each estimate of A.
      seed: seed of the shuffled order.
      change: relative change at which a column stops early. At some steps, LiSSA averages h over
        the repeats and over the latter half of the steps so far. It compares this average with the
        average at half as many steps. After an early stop, more steps usually change h by less than
        ten times `change`. The residual shows the true error. With `change` = 0, no column stops
        early.
      rtol: largest true relative residual at which a column counts as converged. The default is
        larger than that of other solvers, because the error falls only with the square root of
        depth x repeats. If None, the residual is reported, but no column counts as converged and no
        warning is given.

    Raises: ValueError for hyperparameters out of range; DivergenceError if the norm of h exceeds
      that of every convergent series. If the caller gave a scale, the message names a scale that
      would work. With scale None the error means that A is not positive definite.
    """

    unfit_as_preconditioner: ClassVar[str] = (
        "its batches come in an order, so what it applies is not symmetric"
    )

    scale: float | None = None
    depth: int = 5000
    repeats: int = 10
    batch_size: int = 1
    seed: int = 0
    change: float = 1e-3
    rtol: float | None = 0.1

    def __post_init__(self):
        if self.scale is not None and not (np.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be positive or None, got {self.scale}.")
        check_rtol(self.rtol, optional=True)
        if not self.change >= 0:
            raise ValueError(f"change must be non-negative, got {self.change}.")
        for name in ("depth", "repeats", "batch_size"):
            check_integer(name, getattr(self, name), 1)
        check_integer("seed", self.seed, 0)

    def prepare(self, A: LinearOperator) -> Callable[[NDArray], Raw]:
        """Choose the scale if the user gave none. Return a function that runs the series."""
        given = np.ldexp(self.scale or 0.0, -getattr(A, "exponent", 0))  # in A's units
        scale = float(given) or largest_eigenvalue(A, self.batch_size)
        if np.isnan(scale):
            raise not_finite(A, "LiSSA")
        if not scale > 0:
            raise DivergenceError(
                f"LiSSA needs a positive definite A, got a largest eigenvalue of {scale:.3g}; use "
                "damping, or GaussNewton, or Direct, which answers for indefinite matrices."
            )
        return lambda B: self._solve(A, B, scale)

    def _solve(self, A: LinearOperator, B: NDArray, scale: float) -> Raw:
        """Run the series. If a column grows too large, restart it with twice the scale."""
        X, iterations = np.empty_like(B), np.empty(B.shape[1], int)
        columns = np.arange(B.shape[1])
        for _ in range(_MOST_DOUBLINGS):
            h, steps, grew = self._run(A, B[:, columns], scale)
            X[:, columns], iterations[columns] = h / scale, steps
            if grew.any():
                self._check_growth(A, B[:, columns[grew]], h[:, grew], steps[grew].min(), scale)
            columns, scale = columns[grew], 2 * scale
            if not columns.size:
                break
        else:
            raise DivergenceError(
                f"LiSSA diverges at every scale up to {scale:.4g}: use more damping, or "
                "GaussNewton, or Direct."
            )
        remedy = (
            f"LiSSA's average is still noisy or its series unfinished after {iterations.max()} "
            f"steps x {self.repeats} repeats: use more of either, a smaller change, a larger "
            "batch_size, more damping, or CG."
        )
        return Raw(X, iterations, np.nan, remedy)

    def _run(self, A: LinearOperator, B: NDArray, scale: float) -> tuple[NDArray, ...]:
        """Return the mean h (d, m), the steps (m,), and True where h grew too large (m,)."""
        if isinstance(A, Curvature):
            walk = self._walk(len(A.examples))
            repeats, product = self.repeats, A.sampled
        else:
            # A has no rows to sample, so all repeats would be equal.
            walk = (np.zeros((1, 1), int) for _ in range(self.depth))
            repeats, product = 1, lambda rows, V: (A @ V[0])[None]
        m = B.shape[1]
        found, steps, grew = np.empty_like(B), np.zeros(m, int), np.zeros(m, bool)
        columns, average = np.arange(m), _LatterHalf(B, self.change)
        H = np.repeat(B[None], repeats, axis=0)  # (repeats, d, m)
        for step, rows in enumerate(progress(walk, "LiSSA", self.depth), start=1):
            with np.errstate(over="ignore", invalid="ignore"):
                H = B + H - product(rows, H) / scale
                if step % _CHECK_EVERY and step < self.depth:
                    continue
                # |h| <= (step + 1) |v| if every factor I - A_batch / scale has norm <= 1. The limit
                # is ten times larger, so a few factors may have a larger norm.
                most = 10 * (step + 1) * np.linalg.norm(B, axis=0)
                grows = ~(np.linalg.norm(H, axis=1) <= most).all(axis=0)
                leaves = grows | average.settled(H) | (step == self.depth)
                if not leaves.any():
                    continue
                gone = columns[leaves]
                found[:, gone] = H[:, :, leaves].mean(axis=0)
            steps[gone], grew[gone] = step, grows[leaves]
            columns, H, B = columns[~leaves], H[:, :, ~leaves], B[:, ~leaves]
            average.drop(leaves)
            if not columns.size or (grows.any() and self.scale):
                break
        return found, steps, grew

    def _check_growth(
        self, A: LinearOperator, B: NDArray, H: NDArray, step: int, scale: float
    ) -> None:
        """Raise DivergenceError if the user gave the scale, or if no larger scale can help."""
        diverges = f"LiSSA diverges at step {step} with scale {scale:.4g}"
        if self.scale is not None:
            raise DivergenceError(
                f"{diverges}; {_advice(scale, largest_eigenvalue(A, self.batch_size))}"
            )
        finite = np.isfinite(H).all(axis=0)
        if not finite.any():  # either the series or A itself has overflowed
            finite_products(A, B, "LiSSA")
            return
        V = H[:, finite] / np.abs(H[:, finite]).max(axis=0)
        curvature = np.sum(V * (A @ V), axis=0) / np.sum(V * V, axis=0)
        if curvature.min() < -np.sqrt(len(V)) * np.finfo(V.dtype).eps * scale:
            raise DivergenceError(
                f"{diverges}, above the largest eigenvalue found: along its iterates A has a "
                f"negative curvature of {curvature.min():.3g}, and no scale helps: use more "
                "damping, or GaussNewton, or Direct."
            )

    def _walk(self, num_examples: int) -> Iterator[NDArray]:
        """Yield the rows (repeats, batch_size) of each step, from shuffled passes over all rows."""
        rng = np.random.default_rng(self.seed)
        per_run = self.depth * self.batch_size
        passes = -(-self.repeats * per_run // num_examples)
        order = np.concatenate([rng.permutation(num_examples) for _ in range(passes)])
        runs = order[: self.repeats * per_run].reshape(self.repeats, self.depth, self.batch_size)
        return (runs[:, step] for step in range(self.depth))


def _advice(scale: float, largest: float) -> str:
    if largest > scale:
        return f"use a scale of {largest:.4g} or larger, or CG."
    return (
        f"the largest eigenvalue found is no larger, {largest:.4g}, so A has negative curvature "
        "and no scale helps: use more damping, or GaussNewton, or Direct. If A is positive "
        f"definite, some batches are larger than those looked at: use a scale of {2 * scale:.4g}."
    )


def largest_eigenvalue(A: LinearOperator, batch_size: int) -> float:
    """Return a Lanczos bound on the largest eigenvalue of A and, if A has rows, of some batches."""
    rng = np.random.default_rng(_PROBE_SEED)
    dtype = np.result_type(A.dtype, np.float32)
    start = rng.standard_normal((1 + _PROBE_BATCHES, A.shape[0])).astype(dtype)
    found = largest_eigenvalues(lambda V: (A @ V[0])[None], start[:1], _PROBE_STEPS)
    if isinstance(A, Curvature):
        rows = rng.integers(len(A.examples), size=(_PROBE_BATCHES, batch_size))
        batches = largest_eigenvalues(lambda V: A.sampled(rows, V), start[1:], _PROBE_STEPS)
        found = np.concatenate([found, batches])
    return float(found.max())


class _LatterHalf:
    """The average of h over the repeats and over the latter half of the checks so far."""

    def __init__(self, B: NDArray, change: float):
        self.change, self.looks = change, 0
        self.total, self.before = np.zeros_like(B), np.full_like(B, np.nan)

    def settled(self, H: NDArray) -> NDArray:
        """Add H (repeats, d, m). Return booleans (m,): True if the average has stopped changing."""
        self.looks += 1
        if not self.change:
            return np.zeros(H.shape[2], bool)
        self.total = self.total + H.mean(axis=0)
        if self.looks & (self.looks - 1):  # compare averages only after 1, 2, 4, 8, ... checks
            return np.zeros(H.shape[2], bool)
        now, before = self.total / max(self.looks // 2, 1), self.before
        self.before, self.total = now, np.zeros_like(now)
        return np.linalg.norm(now - before, axis=0) <= self.change * np.linalg.norm(now, axis=0)

    def drop(self, columns: NDArray) -> None:
        """Remove the columns for which `columns` (m,) is True."""
        self.total, self.before = self.total[:, ~columns], self.before[:, ~columns]
