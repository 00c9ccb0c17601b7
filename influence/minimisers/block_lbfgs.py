"""Chord steps with secant updates: many small minimisations in lockstep from one inverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LEAST_PAIRS = 20  # (step, change of gradient) that are remembered, however large theta is
_BYTES = 1 << 23  # of pairs that a function may hold beyond those: each mends one more direction
_PATIENCE = 20  # passes without a smaller gradient until what the function did since is looked at
# By precision, the share of its whole fall that they must have brought, and what they must have
# met, in times of the smallest gradient; less is taken for rounding.
_FALL = {"float32": 1e-5, "float64": 1e-10}
_ROSE = {"float32": 2.0, "float64": 0.0}
_TOLD = 10.0  # times the rounding of gradients: the least change of theirs that is believed
_CURVED = 1e-8  # cosine between step and change of gradient from which a pair is used
_OVERSHOOT = 0.5  # of the slope a step began with: the steepest climb it may end on
_LONGER = 1.5  # times a step that was taken: what the next may be

Gradients = Callable[[NDArray, NDArray], NDArray]  # (thetas (d, j), columns (j,)) -> (d, j)


@dataclass(frozen=True, eq=False)
class Found:
    """Where k minimisations ended.

    Attributes:
      thetas: (d, k) of the smallest gradient each has seen.
      norms: (k,) Euclidean norms of the gradients there, never of rough ones.
      passes: (k,) gradients that each took, rough ones too; neither the first nor those where it
        went from rough ones to exact ones.
    """

    thetas: NDArray
    norms: NDArray
    passes: NDArray


def minimise(
    gradients: Gradients,
    inverse: Gradients,
    thetas: NDArray,
    first: NDArray,
    tolerance: NDArray,
    max_passes: int,
    *,
    pairs: Sequence[tuple[NDArray, NDArray]] = (),
    longest: NDArray | None = None,
    rough: tuple[Gradients, NDArray] | None = None,
) -> Found:
    """Minimise k functions of theta together, by limited-memory BFGS around a given inverse.

    The inverse Hessian at the start makes the first step Newton's; what later gradients show of the
    curvature elsewhere is added by the two-loop recursion (Nocedal 1980). A step is taken unless it
    ends on a climb half as steep as its descent began (the upper half of the approximate Wolfe
    conditions, Hager & Zhang 2005, which gradients alone decide and rounding spares) and the
    gradient has grown. One that is not taken still teaches its curvature.

    No step is longer than its function's radius, at first `longest`. A step that is not taken sets
    the radius to half its length; one taken although it ended on such a climb, to its length; any
    other leaves it at least half again as long as the step. So a function that bends much on the
    way is not left for where Newton's step would go.

    Where gradients no longer shrink, a long way down is told from rounding by the sum of
    -(g_before + g_after) . step / 2, the function's fall but for third order, and, unless they are
    in float64, by how far they rose.

    Args:
      gradients: (thetas (d, j), columns (j,)) -> (d, j), for those of the k functions.
      inverse: (G (d, j), columns (j,)) -> (d, j), about the inverse Hessians at the start times G;
        positive definite.
      thetas: (d, k) the start.
      first: (d, k) the gradients there, exact ones.
      tolerance: (k,) norms of gradients to stop at.
      max_passes: calls of `gradients`, or of the rough ones, at most.
      pairs: (P, Y), (d, k) each, by which the inverse is updated first: Y is what the matrix that
        the steps are to start from makes of P; zero for a function that lacks one.
      longest: (k,) how long the first steps may be; None: as long as they come.
      rough: cheaper gradients with more rounding, and (k,) norms until which they are taken, or
        until they shrink no more; from where they were smallest `gradients` goes on, with those
        of their pairs that rounding cannot have made.

    Returns: Found.
    """
    now = _Searches(gradients, thetas, first, tolerance, longest, rough)
    most = max(_BYTES // (2 * thetas.itemsize * len(thetas)), _LEAST_PAIRS)
    todo = np.flatnonzero(now.norms > tolerance)
    seen = [_pair(P[:, todo], Y[:, todo]) for P, Y in pairs]
    given = len(seen)
    for _ in range(max_passes):
        if not len(todo):
            break
        g = now.G[:, todo]
        steps = -_two_loops(seen, g, lambda Q: inverse(Q, todo))  # noqa: B023
        steps *= np.minimum(1, now.longest[todo] / np.linalg.norm(steps, axis=0))
        tried = now.thetas[:, todo] + steps
        steps = tried - now.thetas[:, todo]  # as far as it rounds to
        there = now.gradients(tried, todo)
        seen.append(_pair(steps, there - g))
        del seen[given:-most]
        now.step(todo, steps, tried, there)
        now.look(todo)
        rough_ended = now.ended(todo) & ~now.exact[todo]
        if rough_ended.any():
            rounding = now.judge(todo[rough_ended])
            for _, Y, weight in seen[given:]:
                told = np.linalg.norm(Y[:, rough_ended], axis=0) > _TOLD * rounding
                weight[rough_ended] *= told
        stay = ~now.ended(todo)
        if not stay.all():
            for i, (S, Y, weight) in enumerate(seen):  # in place: they are most of the memory
                seen[i] = S[:, stay], Y[:, stay], weight[stay]
            todo = todo[stay]
    now.judge(todo[~now.exact[todo]])
    return now.best


class _Searches:
    """Where k minimisations are; `columns` says which of them a method is about."""

    def __init__(
        self,
        gradients: Gradients,
        thetas: NDArray,
        first: NDArray,
        tolerance: NDArray,
        longest: NDArray | None,
        rough: tuple[Gradients, NDArray] | None,
    ):
        k = thetas.shape[1]
        self.thetas, self.G = thetas.copy(), first.copy()
        self.norms = np.linalg.norm(first, axis=0)
        self._gradients, self._tolerance = gradients, tolerance
        self._rough, until = rough or (None, np.full(k, np.inf))
        self.exact = ~(self.norms > until)  # whose gradients are the exact ones
        self.until = np.where(self.exact, tolerance, until)
        self.best = Found(thetas.copy(), self.norms.copy(), np.zeros(k, int))
        self.longest = np.full(k, np.inf) if longest is None else longest.copy()
        self.stale = np.zeros(k, int)  # passes since the gradient was last smaller than ever
        self.fallen, self.mark = np.zeros(k), np.zeros(k)  # how far the function, until then too
        self.highest = self.norms.copy()  # the largest gradient since then

    def gradients(self, thetas: NDArray, columns: NDArray) -> NDArray:
        """(d, j), of each column the exact or the rough ones."""
        found = np.empty_like(thetas)
        exact = self.exact[columns]
        for of, some in ((self._gradients, exact), (self._rough, ~exact)):
            if of and some.any():
                found[:, some] = of(thetas[:, some], columns[some])
        return found

    def step(self, columns: NDArray, steps: NDArray, tried: NDArray, there: NDArray) -> None:
        """Take the steps that are to be taken, and set how long the next may be."""
        g, norms = self.G[:, columns], np.linalg.norm(there, axis=0)
        climbs = _dot(there, steps) > -_OVERSHOOT * _dot(g, steps)
        taken = np.isfinite(norms) & (~climbs | (norms < self.norms[columns]))
        moved = columns[taken]
        self.thetas[:, moved], self.G[:, moved] = tried[:, taken], there[:, taken]
        self.norms[moved] = norms[taken]
        self.fallen[moved] -= (_dot(there + g, steps) / 2)[taken]
        lengths = np.linalg.norm(steps, axis=0)
        longer = np.maximum(self.longest[columns], _LONGER * lengths)
        longer = np.where(climbs, lengths, longer)
        self.longest[columns] = np.where(taken, longer, lengths / 2)

    def look(self, columns: NDArray) -> None:
        """Keep what is best so far, and count passes since, unless a long way down was gone."""
        best, norms = self.best, self.norms[columns]
        smaller = norms < best.norms[columns]
        better = columns[smaller]
        best.thetas[:, better], best.norms[better] = self.thetas[:, better], norms[smaller]
        best.passes[columns] += 1
        self.stale[columns] += 1
        self.highest[columns] = np.maximum(self.highest[columns], norms)
        fallen = self.fallen[columns]
        fall, rose = (
            np.where(self.exact[columns], least[self.thetas.dtype.name], least["float32"])
            for least in (_FALL, _ROSE)
        )
        under_way = (
            self.stuck(columns)
            & (fallen - self.mark[columns] > fall * np.abs(fallen))
            & (self.highest[columns] > rose * best.norms[columns])
        )
        self._begin(columns[smaller | under_way])

    def ended(self, columns: NDArray) -> NDArray:
        """(j,) by the gradients that each takes."""
        return (self.best.norms[columns] <= self.until[columns]) | self.stuck(columns)

    def stuck(self, columns: NDArray) -> NDArray:
        """(j,) whose gradients shrink no more."""
        return self.stale[columns] >= _PATIENCE

    def judge(self, columns: NDArray) -> NDArray:
        """From rough to exact gradients, at the best theta; (j,) by how much they differ there."""
        if not len(columns):
            return np.empty(0)
        there = self.best.thetas[:, columns]
        rough = self.gradients(there, columns)
        self.exact[columns], self.until[columns] = True, self._tolerance[columns]
        self.thetas[:, columns], self.G[:, columns] = there, self.gradients(there, columns)
        self.norms[columns] = np.linalg.norm(self.G[:, columns], axis=0)
        self.best.norms[columns] = self.norms[columns]
        self._begin(columns)
        return np.linalg.norm(self.G[:, columns] - rough, axis=0)

    def _begin(self, columns: NDArray) -> None:
        """Count passes, the fall and the rise of gradients from here."""
        self.stale[columns], self.mark[columns] = 0, self.fallen[columns]
        self.highest[columns] = self.norms[columns]


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
