"""Chord steps with secant updates: many small minimisations in lockstep from one inverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LEAST_PAIRS = 20  # (step, change of gradient) that are remembered, however large theta is
_BYTES = 1 << 23  # of pairs that a function may hold beyond those: each mends one more direction
_PATIENCE = 20  # passes without a smaller gradient until what the function did since is looked at
_FALL = 1e-5  # share of its whole fall that they must have brought; less is taken for rounding
_ROSE = 2.0  # times the smallest gradient: what they must have met; less is taken for rounding
_CURVED = 1e-8  # cosine between step and change of gradient from which a pair is used
_OVERSHOOT = 0.5  # of the slope a step began with: the steepest climb it may end on
_LONGER = 1.5  # times a step that was taken: what the next may be


@dataclass(frozen=True, eq=False)
class Found:
    """Where k minimisations ended.

    Attributes:
      thetas: (d, k) of the smallest gradient each has seen.
      norms: (k,) Euclidean norms of those gradients.
      passes: (k,) gradients that each took; neither the first nor that which judged the rough ones.
    """

    thetas: NDArray
    norms: NDArray
    passes: NDArray


def minimise(
    gradients: Callable[[NDArray, NDArray], NDArray],
    inverse: Callable[[NDArray, NDArray], NDArray],
    thetas: NDArray,
    first: NDArray,
    tolerance: NDArray,
    max_passes: int,
    *,
    pairs: Sequence[tuple[NDArray, NDArray]] = (),
    longest: NDArray | None = None,
    rough: tuple[Callable[[NDArray, NDArray], NDArray], NDArray] | None = None,
) -> Found:
    """Minimise k functions of theta together, by limited-memory BFGS around a given inverse.

    The inverse Hessian at the start makes the first step Newton's; what later gradients show of the
    curvature elsewhere is added by the two-loop recursion (Nocedal 1980). A step is taken unless it
    ends on a climb half as steep as its descent began (the upper half of the approximate Wolfe
    conditions, Hager & Zhang 2005, which gradients alone decide and rounding spares) and the
    gradient has grown. One that is not taken still teaches its curvature, and the next is at most
    half as long; after one that is taken, half again as long, or as long if it ended on such a
    climb: a function that bends much on the way is not left for where Newton's step would go.
    Where gradients no longer shrink, a long way down is told from rounding by how far they rose,
    and by the sum of -(g_before + g_after) . step / 2, the function's fall but for third order.

    Args:
      gradients: (thetas (d, j), columns (j,)) -> (d, j), for those of the k functions.
      inverse: (G (d, j), columns (j,)) -> (d, j), about the inverse Hessians at the start times G;
        positive definite.
      thetas: (d, k) the start.
      first: (d, k) the gradients there.
      tolerance: (k,) norms of gradients to stop at.
      max_passes: calls of `gradients`, or of the rough ones, at most.
      pairs: (P, Y), (d, k) each, by which the inverse is updated first: Y is what the Hessian at
        the start makes of P; zero for a function that lacks one.
      longest: (k,) how long the first steps may be; None: as long as they come.
      rough: cheaper gradients with more rounding, and (k,) norms until which they are taken; what
        is returned is judged by `gradients` all the same.

    Returns: Found.
    """
    thetas, G = thetas.copy(), first.copy()
    norms = np.linalg.norm(G, axis=0)
    best = Found(thetas.copy(), norms.copy(), np.zeros(len(norms), int))
    longest = np.full(len(norms), np.inf) if longest is None else longest.copy()
    stale, fallen, mark = np.zeros(len(norms), int), np.zeros(len(norms)), np.zeros(len(norms))
    highest = norms.copy()  # of the gradients since `mark`
    most = max(_BYTES // (2 * thetas.itemsize * len(thetas)), _LEAST_PAIRS)
    exact = np.full(len(norms), rough is None)
    until = tolerance.copy() if rough is None else rough[1].copy()

    def at(thetas: NDArray, columns: NDArray) -> NDArray:
        found = np.empty_like(thetas)
        for of, some in ((gradients, exact[columns]), (rough and rough[0], ~exact[columns])):
            if of and some.any():
                found[:, some] = of(thetas[:, some], columns[some])
        return found

    def ended(columns: NDArray) -> NDArray:
        return (best.norms[columns] <= until[columns]) | (stale[columns] >= _PATIENCE)

    def judge(columns: NDArray) -> None:
        """From the rough to the exact gradients, at the best theta."""
        if not len(columns):
            return
        thetas[:, columns] = best.thetas[:, columns]
        G[:, columns] = gradients(thetas[:, columns], columns)
        norms[columns] = highest[columns] = np.linalg.norm(G[:, columns], axis=0)
        best.norms[columns], until[columns] = norms[columns], tolerance[columns]
        exact[columns] = True
        stale[columns], mark[columns] = 0, fallen[columns]

    todo = np.flatnonzero(norms > tolerance)
    seen = [_pair(P[:, todo], Y[:, todo]) for P, Y in pairs]
    for _ in range(max_passes):
        if not len(todo):
            break
        g = G[:, todo]
        steps = -_two_loops(seen, g, lambda Q: inverse(Q, todo))  # noqa: B023
        steps *= np.minimum(1, longest[todo] / np.linalg.norm(steps, axis=0))
        tried = thetas[:, todo] + steps
        steps = tried - thetas[:, todo]  # as far as it rounds to
        there = at(tried, todo)
        tried_norms = np.linalg.norm(there, axis=0)
        seen = [*seen[1 - most :], _pair(steps, there - g)]
        climbs = _dot(there, steps) > -_OVERSHOOT * _dot(g, steps)
        taken = np.isfinite(tried_norms) & (~climbs | (tried_norms < norms[todo]))
        moved = todo[taken]
        thetas[:, moved], G[:, moved] = tried[:, taken], there[:, taken]
        norms[moved] = tried_norms[taken]
        fallen[moved] -= (_dot(there + g, steps) / 2)[taken]
        lengths = np.linalg.norm(steps, axis=0)
        longer = np.where(climbs, lengths, np.maximum(longest[todo], _LONGER * lengths))
        longest[todo] = np.where(taken, longer, lengths / 2)
        better = todo[norms[todo] < best.norms[todo]]
        best.thetas[:, better], best.norms[better] = thetas[:, better], norms[better]
        best.passes[todo] += 1
        stale[todo] += 1
        highest[todo] = np.maximum(highest[todo], norms[todo])
        under_way = fallen - mark > _FALL * np.abs(fallen)
        under_way &= (highest > _ROSE * best.norms) & (stale >= _PATIENCE)
        again = np.concatenate([better, todo[under_way[todo]]])
        stale[again], mark[again], highest[again] = 0, fallen[again], norms[again]
        judge(todo[ended(todo) & ~exact[todo]])
        stay = ~ended(todo)
        if not stay.all():
            for i, (S, Y, weight) in enumerate(seen):  # in place: they are most of the memory
                seen[i] = S[:, stay], Y[:, stay], weight[stay]
            todo = todo[stay]
    judge(todo[~exact[todo]])
    return best


def _two_loops(pairs: list, G: NDArray, inverse: Callable[[NDArray], NDArray]) -> NDArray:
    """The updated inverse times G, column by column."""
    Q, shares = G.copy(), []
    for S, Y, weight in reversed(pairs):
        shares.append(weight * _dot(S, Q))
        Q -= shares[-1] * Y
    R = inverse(Q)
    for (S, Y, weight), share in zip(pairs, reversed(shares), strict=True):
        R = R + (share - weight * _dot(Y, R)) * S
    return R


def _pair(S: NDArray, Y: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """(steps, changes of gradient, 1 / their product); all zero where no curvature was seen."""
    Y = np.where(np.isfinite(Y).all(axis=0), Y, 0)
    product = _dot(S, Y)
    curved = product > _CURVED * np.linalg.norm(S, axis=0) * np.linalg.norm(Y, axis=0)
    weight = np.divide(1, product, out=np.zeros_like(product), where=curved)
    return S, Y, weight


def _dot(U: NDArray, V: NDArray) -> NDArray:
    return np.einsum("ij,ij->j", U, V)
