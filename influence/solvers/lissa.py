"""LiSSA: the inverse's power series, on estimates of the matrix from a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

from influence.convergence import DivergenceError
from influence.operators import Curvature
from influence.progress import progress
from influence.solvers.base import Raw

_CHECK_EVERY = 16  # steps between looks at the norm
_PROBE_BATCHES = 32  # batches whose largest eigenvalue sets the scale
_PROBE_STEPS = 20  # power iterations on each
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
    nothing else that varies: not on the number of right-hand sides, nor on threads.

    Args:
      scale: at least half the largest eigenvalue of every batch's matrix, or it may diverge; None
        takes the largest eigenvalue found among a sample of batches.
      depth: steps of each run.
      repeats: runs to average.
      batch_size: rows of each estimate.
      seed: of the shuffled order.
      rtol: true relative residual up to which a column counts as converged. Larger than other
        solvers', because the error falls only with the square root of depth x repeats. None: no
        such aim; the residual is reported, nothing counts as converged, nobody is warned.

    Raises: ValueError for hyperparameters out of range; DivergenceError, with a scale that would
      work, when the norm outgrows what any convergent series can reach.
    """

    scale: float | None = None
    depth: int = 5000
    repeats: int = 10
    batch_size: int = 1
    seed: int = 0
    rtol: float | None = 0.1

    def __post_init__(self):
        """Check the hyperparameters."""
        if self.scale is not None and not (np.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be positive or None, got {self.scale}.")
        if self.rtol is not None and not self.rtol >= 0:
            raise ValueError(f"rtol must be non-negative or None, got {self.rtol}.")
        for name in ("depth", "repeats", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")

    def prepare(self, A: LinearOperator) -> Callable[[NDArray], Raw]:
        """Choose the scale if none was given."""
        scale = self.scale or largest_eigenvalue(A, self.batch_size)
        if not scale > 0:
            raise DivergenceError(
                f"LiSSA needs a positive definite A, got a largest eigenvalue of {scale:.3g}; use "
                "damping, or GaussNewton, or Direct, which answers for indefinite matrices."
            )
        return lambda B: self._run(A, B, scale)

    def _run(self, A: LinearOperator, B: NDArray, scale: float) -> Raw:
        if isinstance(A, Curvature):
            walk = self._walk(len(A.examples))
            repeats, product = self.repeats, A.sampled
        else:
            # Without rows to sample every run is the same.
            walk = (np.zeros((1, 1), int) for _ in range(self.depth))
            repeats, product = 1, lambda rows, V: (A @ V[0])[None]
        H = np.repeat(B[None], repeats, axis=0)  # (repeats, d, m)
        size = np.linalg.norm(B, axis=0)
        for step, rows in enumerate(progress(walk, "LiSSA", self.depth), start=1):
            with np.errstate(over="ignore", invalid="ignore"):
                H = B + H - product(rows, H) / scale
                if step % _CHECK_EVERY and step < self.depth:
                    continue
                # While no factor expands, |h_t| <= (t + 1) |v|; tenfold leaves room for some.
                if not (np.linalg.norm(H, axis=1) <= 10 * (step + 1) * size).all():
                    raise DivergenceError(
                        f"LiSSA diverges at step {step} with scale {scale:.4g}; "
                        + _advice(scale, largest_eigenvalue(A, self.batch_size))
                    )
        remedy = (
            f"LiSSA's average is still noisy or its series unfinished after {self.depth} steps x "
            f"{self.repeats} repeats: use more of either, a larger batch_size, more damping, or CG."
        )
        return Raw(H.mean(axis=0) / scale, self.depth, np.nan, remedy)

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
    """Largest eigenvalue of A, or for sampled batches the largest found among a fixed sample."""
    rng = np.random.default_rng(_PROBE_SEED)
    d = A.shape[0]
    if not isinstance(A, Curvature):
        start = rng.standard_normal(d)
        first = A @ start
        if not np.isfinite(first).all() or not first.any():
            return float(first.sum())
        if d < 3:
            return float(np.linalg.eigvalsh(A @ np.eye(d))[-1])
        try:
            found = eigsh(A, k=1, which="LA", v0=start, tol=1e-2, return_eigenvectors=False)
        except ArpackError:
            return float("nan")
        return 1.05 * float(found[0])
    rows = rng.integers(len(A.examples), size=(_PROBE_BATCHES, batch_size))
    V = rng.standard_normal((_PROBE_BATCHES, d, 1)).astype(A.dtype)
    size = np.linalg.norm(V, axis=1, keepdims=True)
    for _ in range(_PROBE_STEPS):
        V = A.sampled(rows, V / size)
        size = np.linalg.norm(V, axis=1, keepdims=True)
    return 1.05 * float(size.max())
