"""Block L-BFGS: many minimisations that advance together, each from a given inverse Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from influence.common.memory import VECTORS
from influence.common.numbers import dots, numbers

# The memory of each function has room for at least this many pairs (step, change of gradient).
_LEAST_PAIRS = 20
# The stored pairs of one function take at most this many bytes, unless `_LEAST_PAIRS` pairs need
# more.
_BYTES = VECTORS >> 5
# A search is stuck if its smallest gradient norm has not improved for this many passes. A stuck
# search ends, unless the function still decreases. It still decreases if the conditions of both
# constants below, _FALL and _ROSE, hold.
_PATIENCE = 20
# Condition of _FALL: since the count of passes last restarted, the function has decreased by more
# than this fraction of its total decrease. A smaller decrease may be rounding error. The fraction
# depends on the gradients' dtype.
_FALL = {"float32": 1e-5, "float64": 1e-10}
# Condition of _ROSE: since the count last restarted, the largest gradient norm exceeded this
# multiple of the smallest norm so far. With the multiple 0, the condition always holds.
_ROSE = {"float32": 2.0, "float64": 0.0}
# A pair from low-precision gradients is used only if the norm of its change of gradient exceeds
# this multiple of the gradients' error.
_TOLD = 10.0
# A pair is used only if the cosine between its step and its change of gradient exceeds this.
_CURVED = 1e-8
# A step overshoots if b > -_OVERSHOOT a, where a < 0 is the slope along the step at its start, and
# b the slope at its end.
_OVERSHOOT = 0.5
# After an accepted step without overshoot, the radius is at least this multiple of the step's
# length.
_LONGER = 1.5

# A function of thetas (d, j) and of columns (j,), the indices of j functions. It returns (d, j).
Gradients = Callable[[NDArray, NDArray], NDArray]


@dataclass(frozen=True, eq=False)
class Found:
    """The results of k minimisations.

    Attributes:
      thetas: (d, k) for each function, the theta with the smallest gradient norm among those tried.
      norms: (k,) Euclidean norms of the exact gradients at `thetas`.
      passes: (k,) number of gradients computed for each function, including low-precision ones. The
        gradients at the start and at the change to exact gradients are not counted.
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
    """Minimise k functions of theta together, by L-BFGS with given initial inverse Hessians.

    If `inverse` applies the inverse Hessian at the start, the first step is Newton's step. For
    later steps, the two-loop recursion (Nocedal 1980) adds the curvature along earlier steps,
    including rejected ones.

    A step overshoots if b > -a / 2, where a < 0 is the slope along the step at its start, and b the
    slope at its end. Such a step violates the upper approximate Wolfe condition (Hager & Zhang
    2005), whose test needs only gradients and tolerates rounding. A step is rejected if it
    overshoots and the gradient norm has not decreased.

    Each function has a radius, which is the largest allowed length of its steps. The radius starts
    at `longest`. A rejected step sets the radius to half the step's length. An accepted step that
    overshoots sets the radius to the step's length. After any other step, the radius is at least
    1.5 times the step's length. The radius prevents a Newton step that is too long because the
    curvature changes along the step.

    The gradient norm of a search may stop shrinking for two reasons: a long descent, or rounding
    error. In this case the search continues only if the function still decreases. The decrease over
    one step is -(g_before + g_after) . step / 2, where g is the gradient. Its error is of third
    order in the step. In float32, the gradient norm must also have exceeded twice its smallest
    value since the search last made progress.

    Args:
      gradients: a function of thetas (d, j) and columns (j,). It returns the gradients (d, j) of
        the functions `columns` at `thetas`.
      inverse: a function of G (d, j) and columns (j,). It multiplies each column of G by a positive
        definite approximation of the function's inverse Hessian at the start.
      thetas: (d, k) the theta at which each search starts.
      first: (d, k) the exact gradients at `thetas`.
      tolerance: (k,) gradient norms at which the searches stop.
      max_passes: the largest number of calls of `gradients` or of the low-precision gradients.
      pairs: pairs (P, Y) of (d, k) arrays that update `inverse` before the first step. Column j of
        Y is the wanted initial Hessian of function j times column j of P. The columns of a function
        without such a pair are zero.
      longest: (k,) initial radii; None: no limit.
      rough: a function that computes cheaper low-precision gradients, and (k,) gradient norms.
        Search j uses this function until its gradient norm reaches norm j or no longer shrinks.
        From the theta with the smallest gradient norm, the search then continues with `gradients`.
        Low-precision pairs are dropped if rounding error may dominate them.

    Returns: Found.
    """
    thetas, first = numbers(thetas, "thetas"), numbers(first, "first")
    tolerance = numbers(tolerance, "tolerance")
    longest = longest if longest is None else numbers(longest, "longest")
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
            for i, (S, Y, weight) in enumerate(seen):  # A loop over the pairs saves memory.
                seen[i] = S[:, stay], Y[:, stay], weight[stay]
            todo = todo[stay]
    now.judge(todo[~now.exact[todo]])
    return now.best


class _Searches:
    """The state of k minimisations. The argument `columns` selects functions by their indices."""

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
        self.exact = ~(self.norms > until)  # True: the search uses exact gradients
        self.until = np.where(self.exact, tolerance, until)
        self.best = Found(thetas.copy(), self.norms.copy(), np.zeros(k, int))
        self.longest = np.full(k, np.inf) if longest is None else longest.copy()
        self.stale = np.zeros(k, int)  # passes since the last `_begin`
        self.fallen, self.mark = np.zeros(k), np.zeros(k)  # `mark`: `fallen` at `_begin`
        self.highest = self.norms.copy()  # largest gradient norm since the last `_begin`

    def gradients(self, thetas: NDArray, columns: NDArray) -> NDArray:
        """Compute gradients (d, j): exact ones where `exact` is True, else low-precision ones."""
        found = np.empty_like(thetas)
        exact = self.exact[columns]
        for of, some in ((self._gradients, exact), (self._rough, ~exact)):
            if of and some.any():
                found[:, some] = of(thetas[:, some], columns[some])
        return found

    def step(self, columns: NDArray, steps: NDArray, tried: NDArray, there: NDArray) -> None:
        """Accept or reject the steps, and update the radii."""
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
        """Store the best theta of each search, and count its passes without improvement.

        The count restarts at zero if the search improved or still descends.
        """
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
        """Return booleans (j,). True: the search has reached its gradient norm or is stuck."""
        return (self.best.norms[columns] <= self.until[columns]) | self.stuck(columns)

    def stuck(self, columns: NDArray) -> NDArray:
        """Return booleans (j,). True: the gradient norm no longer shrinks."""
        return self.stale[columns] >= _PATIENCE

    def judge(self, columns: NDArray) -> NDArray:
        """Continue with exact gradients from the best thetas.

        Returns: (j,) the error norms of the low-precision gradients at these thetas.
        """
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
        """Restart the count of passes, and the records of the decrease and of the largest norm."""
        self.stale[columns], self.mark[columns] = 0, self.fallen[columns]
        self.highest[columns] = self.norms[columns]


def _two_loops(pairs: list, G: NDArray, inverse: Callable[[NDArray], NDArray]) -> NDArray:
    """Multiply each column of G by an inverse Hessian: `inverse` with the pairs' secant updates."""
    Q, shares = G.copy(), []
    for S, Y, weight in reversed(pairs):
        shares.append(weight * dots(S, Q))
        Q -= shares[-1] * Y
    R = inverse(Q)
    for (S, Y, weight), share in zip(pairs, reversed(shares), strict=True):
        R = R + (share - weight * dots(Y, R)) * S
    return R


def _pair(S: NDArray, Y: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Return S, Y and the weights 1 / s'y of their columns s and y.

    A weight is 0 if s'y is not clearly positive. The pair of these columns then has no effect.
    """
    Y = np.where(np.isfinite(Y).all(axis=0), Y, 0)
    product = dots(S, Y)
    curved = product > _CURVED * np.linalg.norm(S, axis=0) * np.linalg.norm(Y, axis=0)
    weight = np.divide(1, product, out=np.zeros_like(product), where=curved)
    return S, Y, weight
