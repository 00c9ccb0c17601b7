"""Block L-BFGS: many small minimisations in lockstep, started from one inverse Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from influence.common.memory import VECTORS
from influence.common.numbers import dots

# Pairs of (step, change of gradient) that each function stores at least.
_LEAST_PAIRS = 20
# Bytes of pairs that each function may store: every pair corrects one more direction.
_BYTES = VECTORS >> 5
# Passes without a smaller gradient after which the search ends, unless it is still under way.
_PATIENCE = 20
# By precision: a search is under way if these passes brought more than this share of the function's
# total decrease. A smaller share may be rounding.
_FALL = {"float32": 1e-5, "float64": 1e-10}
# By precision: they must also have met a gradient this many times as large as the smallest.
_ROSE = {"float32": 2.0, "float64": 0.0}
# A change of gradient is used if it is at least this many times the gradients' rounding.
_TOLD = 10.0
# A pair is used if the cosine between step and change of gradient is at least this.
_CURVED = 1e-8
# A step may end on a climb of at most this share of the slope it began with.
_OVERSHOOT = 0.5
# The next step may be this many times as long as an accepted one.
_LONGER = 1.5

Gradients = Callable[[NDArray, NDArray], NDArray]  # (thetas (d, j), columns (j,)) -> (d, j)


@dataclass(frozen=True, eq=False)
class Found:
    """The results of k minimisations.

    Attributes:
      thetas: (d, k) the theta with the smallest gradient that each has seen.
      norms: (k,) Euclidean norms of the exact gradients there.
      passes: (k,) gradients that each took, low-precision ones included. The first is not counted,
        nor those at the change from low-precision to exact gradients.
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

    With the inverse Hessian at the start the first step is Newton's. The two-loop recursion
    (Nocedal 1980) adds the curvature that later gradients show. A step is rejected if it ends on a
    climb steeper than half its initial descent and the gradient has grown. (This is the upper half
    of the approximate Wolfe conditions, Hager & Zhang 2005. It needs only gradients and tolerates
    rounding.) The curvature along a rejected step is used too.

    No step is longer than its function's radius, at first `longest`. A rejected step halves the
    radius. A step accepted on a steep climb sets it to the step's length. After any other step it
    is at least 1.5 times the step's length. So a function whose curvature changes much is not left
    by one long Newton step.

    If gradients no longer shrink, a long descent is distinguished from rounding by the sum of
    -(g_before + g_after) . step / 2, the function's decrease up to third order, and, unless
    gradients are in float64, by how much they grew.

    Args:
      gradients: (thetas (d, j), columns (j,)) -> (d, j), for those of the k functions.
      inverse: (G (d, j), columns (j,)) -> (d, j), about the inverse Hessians at the start times G;
        positive definite.
      thetas: (d, k) the start.
      first: (d, k) the exact gradients there.
      tolerance: (k,) norms of gradients to stop at.
      max_passes: the largest number of calls of `gradients` or of the low-precision gradients.
      pairs: (P, Y), (d, k) each, by which the inverse is updated first. Y is P times the matrix
        that the steps should start from; columns of functions without a pair are zero.
      longest: (k,) largest lengths of the first steps; None: no limit.
      rough: cheaper gradients of low precision, and (k,) norms. They are used until they reach
        these norms or shrink no more. From the smallest one `gradients` continues, with those of
        their pairs that rounding cannot explain.

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
        steps = tried - now.thetas[:, todo]  # the steps after rounding
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
            for i, (S, Y, weight) in enumerate(seen):  # in place: pairs take most of the memory
                seen[i] = S[:, stay], Y[:, stay], weight[stay]
            todo = todo[stay]
    now.judge(todo[~now.exact[todo]])
    return now.best


class _Searches:
    """The state of k minimisations; a method works on those given by `columns`."""

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
        self.exact = ~(self.norms > until)  # True for those that use exact gradients
        self.until = np.where(self.exact, tolerance, until)
        self.best = Found(thetas.copy(), self.norms.copy(), np.zeros(k, int))
        self.longest = np.full(k, np.inf) if longest is None else longest.copy()
        self.stale = np.zeros(k, int)  # passes since the smallest gradient
        self.fallen, self.mark = np.zeros(k), np.zeros(k)  # the function's decrease, now and then
        self.highest = self.norms.copy()  # the largest gradient since then

    def gradients(self, thetas: NDArray, columns: NDArray) -> NDArray:
        """Compute gradients (d, j), for each column exact or of low precision."""
        found = np.empty_like(thetas)
        exact = self.exact[columns]
        for of, some in ((self._gradients, exact), (self._rough, ~exact)):
            if of and some.any():
                found[:, some] = of(thetas[:, some], columns[some])
        return found

    def step(self, columns: NDArray, steps: NDArray, tried: NDArray, there: NDArray) -> None:
        """Accept or reject steps, and set the radius of the next ones."""
        g, norms = self.G[:, columns], np.linalg.norm(there, axis=0)
        climbs = dots(there, steps) > -_OVERSHOOT * dots(g, steps)
        taken = np.isfinite(norms) & (~climbs | (norms < self.norms[columns]))
        moved = columns[taken]
        self.thetas[:, moved], self.G[:, moved] = tried[:, taken], there[:, taken]
        self.norms[moved] = norms[taken]
        self.fallen[moved] -= (dots(there + g, steps) / 2)[taken]
        lengths = np.linalg.norm(steps, axis=0)
        longer = np.maximum(self.longest[columns], _LONGER * lengths)
        longer = np.where(climbs, lengths, longer)
        self.longest[columns] = np.where(taken, longer, lengths / 2)

    def look(self, columns: NDArray) -> None:
        """Store the best thetas; count the passes since, unless a search is under way."""
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
        """Return True (j,) for those that are done with the gradients they use."""
        return (self.best.norms[columns] <= self.until[columns]) | self.stuck(columns)

    def stuck(self, columns: NDArray) -> NDArray:
        """Return True (j,) for those whose gradients no longer shrink."""
        return self.stale[columns] >= _PATIENCE

    def judge(self, columns: NDArray) -> NDArray:
        """Change to exact gradients at the best theta; return their difference there, (j,)."""
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
        """Restart the count of passes, the decrease and the largest gradient."""
        self.stale[columns], self.mark[columns] = 0, self.fallen[columns]
        self.highest[columns] = self.norms[columns]


def _two_loops(pairs: list, G: NDArray, inverse: Callable[[NDArray], NDArray]) -> NDArray:
    """Multiply the updated inverse by G, column by column."""
    Q, shares = G.copy(), []
    for S, Y, weight in reversed(pairs):
        shares.append(weight * dots(S, Q))
        Q -= shares[-1] * Y
    R = inverse(Q)
    for (S, Y, weight), share in zip(pairs, reversed(shares), strict=True):
        R = R + (share - weight * dots(Y, R)) * S
    return R


def _pair(S: NDArray, Y: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Return (steps, changes of gradient, 1 / their product); weight 0 without curvature."""
    Y = np.where(np.isfinite(Y).all(axis=0), Y, 0)
    product = dots(S, Y)
    curved = product > _CURVED * np.linalg.norm(S, axis=0) * np.linalg.norm(Y, axis=0)
    weight = np.divide(1, product, out=np.zeros_like(product), where=curved)
    return S, Y, weight
