"""LiSSA: the inverse's power series, on estimates of the matrix from a few rows at a time."""

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
from influence.solvers.base import Raw, finite_products, not_finite
from influence.solvers.lanczos import largest_eigenvalues

_CHECK_EVERY = 16  # steps between looks at the norm
_PROBE_BATCHES = 32  # batches whose largest eigenvalue sets the scale, besides the whole matrix's
_PROBE_STEPS = 16  # Lanczos steps on each
_PROBE_SEED = 1  # any fixed number: the scale must not depend on the walk's seed


@dataclass(frozen=True)
class LiSSA:
    """Linear-time stochastic second-order algorithm (Agarwal, Bullins & Hazan 2017).

    h <- v + h - A_batch h / scale, from h = v; after `depth` steps h / scale estimates A^-1 v; the
    mean over `repeats` runs is returned. On a fixed matrix that is exactly
    (1/scale) sum_{j=0}^{depth} (I - A/scale)^j v.

    Differs from the 2017 release of Koh & Liang in one thing: damping belongs to A, so it is
    absolute; there the fixed point was (H + damping scale I)^-1 v. As there, rows are walked
    through in a shuffled order without replacement, not drawn independently.

    All repeats and all right-hand sides advance together. The result depends on `seed`, and on
    nothing else that varies: not on the number of right-hand sides, nor on threads. It is linear in
    v for a given scale and `change` = 0, but not symmetric: the batches come in an order.

    Args:
      scale: at least half the largest eigenvalue of every batch's matrix, or it may diverge; None
        takes a Lanczos bound on the largest eigenvalue of A and of a sample of batches, and where
        an unseen batch makes a column outgrow what converges, starts that column again with twice
        the scale: on a positive definite matrix it cannot diverge.
      depth: steps of each run, at most.
      repeats: runs to average.
      batch_size: rows of each estimate.
      seed: of the shuffled order.
      change: a column stops early, at a power of two of steps, when the mean over repeats, averaged
        over the latter half of its steps, differs by no more than this, relatively, from what it
        was at half as many. What more steps would add is mostly less than ten times that, but no
        promise: the residual says what is left. 0: never early.
      rtol: true relative residual up to which a column counts as converged. Larger than other
        solvers', because the error falls only with the square root of depth x repeats. None: no
        such aim; the residual is reported, nothing counts as converged, nobody is warned.

    Raises: ValueError for hyperparameters out of range; DivergenceError, with a scale that would
      work, when the norm outgrows what any convergent series can reach; with scale None only for
      an A that is not positive definite.
    """

    exact: ClassVar[bool] = False
    answers_indefinite: ClassVar[bool] = False

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
        """Check the hyperparameters."""
        if self.scale is not None and not (np.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be positive or None, got {self.scale}.")
        if self.rtol is not None and not self.rtol >= 0:
            raise ValueError(f"rtol must be non-negative or None, got {self.rtol}.")
        if not self.change >= 0:
            raise ValueError(f"change must be non-negative, got {self.change}.")
        for name in ("depth", "repeats", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def prepare(self, A: LinearOperator) -> Callable[[NDArray], Raw]:
        """Choose the scale if none was given."""
        scale = self.scale or largest_eigenvalue(A, self.batch_size)
        if np.isnan(scale):
            raise not_finite(A, "LiSSA")
        if not scale > 0:
            raise DivergenceError(
                f"LiSSA needs a positive definite A, got a largest eigenvalue of {scale:.3g}; use "
                "damping, or GaussNewton, or Direct, which answers for indefinite matrices."
            )
        return lambda B: self._solve(A, B, scale)

    def _solve(self, A: LinearOperator, B: NDArray, scale: float) -> Raw:
        """Run, and run what outgrew a scale of our own choice again, with twice that."""
        X, iterations = np.empty_like(B), np.empty(B.shape[1], int)
        columns = np.arange(B.shape[1])
        while columns.size:
            h, steps, grew = self._run(A, B[:, columns], scale)
            X[:, columns], iterations[columns] = h / scale, steps
            if grew.any():
                self._check_growth(A, B[:, columns[grew]], h[:, grew], steps[grew].min(), scale)
            columns, scale = columns[grew], 2 * scale
        remedy = (
            f"LiSSA's average is still noisy or its series unfinished after {iterations.max()} "
            f"steps x {self.repeats} repeats: use more of either, a smaller change, a larger "
            "batch_size, more damping, or CG."
        )
        return Raw(X, iterations, np.nan, remedy)

    def _run(self, A: LinearOperator, B: NDArray, scale: float) -> tuple[NDArray, ...]:
        """(d, m) mean of h over repeats, (m,) steps, (m,) whether it outgrew what converges."""
        if isinstance(A, Curvature):
            walk = self._walk(len(A.examples))
            repeats, product = self.repeats, A.sampled
        else:
            # Without rows to sample every run is the same.
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
                # While no factor expands, |h_t| <= (t + 1) |v|; tenfold leaves room for some.
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
        """Raise unless a larger scale may help and is ours to choose."""
        diverges = f"LiSSA diverges at step {step} with scale {scale:.4g}"
        if self.scale is not None:
            raise DivergenceError(
                f"{diverges}; {_advice(scale, largest_eigenvalue(A, self.batch_size))}"
            )
        finite = np.isfinite(H).all(axis=0)
        if not finite.any():  # an overflow, which says nothing of A, unless A itself has it
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
        """Rows (repeats, batch_size) of each step: shuffled passes, cut run after run."""
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
    """A Lanczos bound on the largest eigenvalue of A and, with rows, of a sample of batches."""
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
    """The mean over repeats, averaged over the latter half of the looks so far."""

    def __init__(self, B: NDArray, change: float):
        self.change, self.looks = change, 0
        self.total, self.before = np.zeros_like(B), np.full_like(B, np.nan)

    def settled(self, H: NDArray) -> NDArray:
        """Look at H (repeats, d, m): (m,) whether the average has stopped changing."""
        self.looks += 1
        if not self.change:
            return np.zeros(H.shape[2], bool)
        self.total = self.total + H.mean(axis=0)
        if self.looks & (self.looks - 1):  # judged at powers of two
            return np.zeros(H.shape[2], bool)
        now, before = self.total / max(self.looks // 2, 1), self.before
        self.before, self.total = now, np.zeros_like(now)
        return np.linalg.norm(now - before, axis=0) <= self.change * np.linalg.norm(now, axis=0)

    def drop(self, columns: NDArray) -> None:
        """Forget columns (m,) that are done."""
        self.total, self.before = self.total[:, ~columns], self.before[:, ~columns]
