"""Poisoning: training inputs moved, each within a small box, so that test losses rise.

Koh & Liang 2017, section 5.2; the iteration is told in `poison`, what it moves along in
`influence.attack.targets`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.attack.attack_arguments import check_arguments
from influence.attack.targets import (
    BEST_RULE,
    PAPER_RULE,
    Rule,
    Targets,
    mean_s_test,
    mean_size,
    norms_of,
    seen_by,
)
from influence.examples.examples import Examples
from influence.net.minimum import TOLERANCE, check_at_minimum
from influence.net.net import GenericNeuralNet
from influence.solvers import Solver

__all__ = ["BEST_RULE", "PAPER_RULE", "Poisoning", "Rule", "poison"]

_BYTE = 255


@dataclass(frozen=True, eq=False)
class Poisoning:
    """Poisoned training inputs, and what they did to each test loss.

    Attributes:
      change_if_poisoned: (m,) each test loss after a cold refit on the poisoned training set, minus
        before; actual, not predicted. Positive: the loss rose, as it was meant to.
      flipped: (m,) test loss above `flip_at` after the cold refit.
      rows: (k,) the poisoned rows.
      inputs: (k, ...) their inputs.
      features: (k, ...) what the trained part of the net sees of them.
      same_bytes: (k,) whether all 8-bit values round(255 (x - low) / (high - low)) of an input are
        those of the original; None without `bounds`.
      test_losses: (t + 1, m) after each refit on the way, warm; the first are the clean ones.
      num_poisons: (t + 1,) poisons in force then.
      theta: (d,) of the cold refit.
      gradient_norm: Euclidean norm of the risk's gradient there: the refit's certificate.
    """

    change_if_poisoned: NDArray
    flipped: NDArray
    rows: NDArray[np.int64]
    inputs: NDArray
    features: NDArray
    same_bytes: NDArray | None
    test_losses: NDArray
    num_poisons: NDArray
    theta: NDArray
    gradient_norm: float


def poison(
    net: GenericNeuralNet,
    train: Examples,
    test: Examples,
    rows: ArrayLike,
    radius: float,
    *,
    counts: Sequence[int] | None = None,
    rule: Rule = BEST_RULE,
    inputs: NDArray | None = None,
    bounds: tuple[float, float] | None = None,
    flip_at: float = float(np.log(2)),
    flips: int | None = None,
    gradient_norms: NDArray | None = None,
    solver: Solver | None = None,
    fit: Callable[[GenericNeuralNet, Examples], Any] | None = None,
    start: NDArray | None = None,
    tolerance: float = TOLERANCE,
) -> Poisoning:
    """Move training inputs within their boxes so that the mean test loss after retraining rises.

    With s = H^-1 grad (mean test loss) at the present weights, that loss falls along g_i / n, g_i =
    d/dx_i (grad loss_i . s) (Koh & Liang 2017, section 5.2). So each poison moves against g_i and
    is put back into its box, the net is refitted, and again; `rule` says how far and which rows.
    Labels never change. It ends as soon as enough test losses are above `flip_at`; else with the
    moves after which the mean test loss was largest. The outcome is confirmed by a refit that
    begins where no poison has led. The net is left as it was.

    Args:
      net: at the minimum of its risk on `train`. On a frozen trunk, `net.features(x)` is what its
        trained part sees; other nets see x itself.
      train: n rows; where the net has a trunk, best features, so that they are computed once.
      test: m examples whose mean loss, without the penalty, is to rise.
      rows: (c,) training rows, the candidates.
      radius: how far each entry of an input may move, in its unit. Images in [-1, 1] stay in their
        8-bit cells up to a radius of 1/255; .98/255 leaves room for float32's rounding.
      counts: how many of the candidates to poison, increasing: with the first number, and, if that
        was not enough, with the next. All at once if omitted.
      rule: how they are moved and chosen: `BEST_RULE`, the strongest found, `PAPER_RULE`, the
        2017 release's, or a `Rule` of one's own.
      inputs: (c, ...) the candidates' inputs, floating, where `train` holds features of them;
        `train`'s own if omitted.
      bounds: least and largest value of an input's entries, or None.
      flip_at: test loss above which a test example counts as flipped; log 2 is P(label) < 1/2 for
        log losses. Infinity: no early end.
      flips: flipped test examples that are enough; all m if omitted.
      gradient_norms: (c,) |g_i|_1 of the candidates, as `gradient_norms` returns
        them, by which they are ranked; computed if omitted.
      solver: how H^-1 is applied; `Direct` if omitted.
      fit: called instead of `net.fit` on (net, poisoned training set), from the present theta.
      start: (d,) where the confirming refit begins; zero for a convex net and the net's theta for
        any other, if omitted.
      tolerance: Euclidean norm of the risk's gradient up to which the net is at its minimum; from
        elsewhere `change_if_poisoned` would be that of ordinary training.

    Returns: Poisoning; positive: the test loss rose.
    Raises: TypeError, ValueError or IndexError naming the argument, before any long computation;
      ValueError for a net that is not at its minimum.
    """
    targets, counts, flips, start = check_arguments(
        net, train, test, rows, radius, counts=counts, rule=rule, inputs=inputs, bounds=bounds,
        flip_at=flip_at, flips=flips, gradient_norms=gradient_norms, solver=solver, fit=fit,
        start=start, tolerance=tolerance,
    )  # fmt: skip
    train, test = seen_by(net, train), seen_by(net, test)
    check_at_minimum(net, train, tolerance, "give the tolerance that it was fitted to")
    before = net.model.get_weights()
    try:
        enough = lambda losses: np.count_nonzero(losses > flip_at) >= flips  # noqa: E731
        attack = _Attack(net, train, test, targets, rule, solver, fit or type(net).fit, enough)
        attack.run(counts, gradient_norms)
        return attack.confirmed(start, flip_at, bounds)
    finally:
        net.model.set_weights(before)


@dataclass(frozen=True, eq=False)
class _State:
    """Some targets moved, and the net refitted to them."""

    at: NDArray[np.int64]  # positions in the targets
    x: NDArray
    seen: NDArray  # what the trained part sees of x
    theta: NDArray
    losses: NDArray  # (m,)


class _Attack:
    """The search; `state` is the best set of poisons so far, `trace` the way there."""

    def __init__(
        self,
        net: GenericNeuralNet,
        train: Examples,
        test: Examples,
        targets: Targets,
        rule: Rule,
        solver: Solver | None,
        fit: Callable,
        enough: Callable[[NDArray], bool],
    ):
        self.net, self.train, self.test, self.targets = net, train, test, targets
        self.rule, self.solver, self.fit, self.enough = rule, solver, fit, enough
        self.theta, self.losses = net.theta, self._test_losses()  # the clean ones
        self.trace: list[tuple[int, NDArray]] = [(0, self.losses)]

    def run(self, counts: Sequence[int], norms: NDArray | None) -> None:
        """Try rows alone; then move more and more of them together, until it is enough."""
        order = np.arange(len(self.targets.rows))
        if norms is None and (self.rule.tries or counts[0] < len(order)):
            norms = norms_of(self.net, self.train, self.test, self.targets, self.solver)
        if norms is not None:  # of equal ones the lower row: the candidates' order is no matter
            order = np.lexsort((self.targets.rows, -np.asarray(norms)))
        x = self.targets.x.copy()
        tried = []
        for i in order[: self.rule.tries]:
            tried.append(self._moved(np.array([i]), x))
            if counts[0] == 1 and self.enough(tried[-1][-1].losses):
                break
        tried.sort(key=lambda states: self._worth(states[-1]), reverse=True)
        best = [int(states[-1].at[0]) for states in tried]
        order = np.array([*best, *(i for i in order if i not in best)])
        for states in tried:
            x[states[-1].at] = states[-1].x
        moved = len(tried)
        for count in counts:
            if self.rule.tries and moved < count and len(self.trace) > 1:
                order = self._ranked_again(order, moved)
                moved = count
            states = tried[0] if count == 1 and tried else self._moved(order[:count], x)
            for again in range(0 if count == 1 else self.rule.restarts):
                if self.enough(states[-1].losses):
                    break
                elsewhere = self.targets.anywhere(order[:count], again)
                found = self._moved(order[:count], elsewhere, first=0)
                states = max(states, found, key=lambda states: self._worth(states[-1]))
            self.state = states[-1]
            x[self.state.at] = self.state.x
            self.trace += [(count, s.losses) for s in states if s.losses is not self.losses]
            if self.enough(self.state.losses):
                return

    def _worth(self, state: _State) -> tuple[bool, float]:
        """What makes one set of poisons better than another."""
        return self.enough(state.losses), float(state.losses.mean())

    def _ranked_again(self, order: NDArray, moved: int) -> NDArray:
        """The order with the targets after the first `moved` ranked at the present poisons."""
        state, rest = self.state, order[moved:]
        self.net.theta = state.theta
        s = mean_s_test(self.net, self._poisoned(state), self.test, self.solver)
        g = self.targets.gradients(self.net, rest, self.targets.x[rest], s)
        norms = np.abs(g).sum(axis=tuple(range(1, g.ndim)), dtype=np.float64)
        by_norm = np.lexsort((self.targets.rows[rest], -norms))
        return np.concatenate([order[:moved], rest[by_norm]])

    def _moved(self, at: NDArray, x: NDArray, first: int | None = None) -> list[_State]:
        """Move the targets `at` together from x, with a refit after each move; the best is last.

        Args:
          at: positions in the targets.
          x: inputs of all targets.
          first: which move of the rule's is the first. None: the one that x is due to.
        """
        self.net.theta = self.theta
        states = [self._refitted(at, x[at])]
        velocity = np.zeros_like(x[at])
        if first is None:
            # Inputs moved before are not to be thrown far from where that has led them.
            first = 0 if np.array_equal(x[at], self.targets.x[at]) else self.rule.max_steps // 2
        for t in range(first, first + self.rule.max_steps):
            state = states[-1]
            if self.enough(state.losses):
                break
            s = mean_s_test(self.net, self._poisoned(state), self.test, self.solver)
            g = self.targets.gradients(self.net, at, state.x, s)
            velocity = self.rule.momentum * velocity + g / mean_size(g)
            moved = self.targets.moved(at, state.x, self.rule.move(velocity, t))
            if np.array_equal(moved, state.x):
                break
            states.append(self._refitted(at, moved))
        means = [state.losses.mean() for state in states]
        best = len(states) - 1 if self.enough(states[-1].losses) else int(np.argmax(means))
        return states[: best + 1]

    def _refitted(self, at: NDArray, x: NDArray) -> _State:
        """The net fitted, from its present theta, with the targets `at` moved to x."""
        seen = self.net.features(x)
        state = _State(at, x, seen, self.theta, self.losses)
        if not np.array_equal(x, self.targets.x[at]):
            self.fit(self.net, self._poisoned(state))
            state = _State(at, x, seen, self.net.theta, self._test_losses())
        return state

    def _poisoned(self, state: _State) -> Examples:
        x = np.array(self.train.x)
        x[self.targets.rows[state.at]] = state.seen
        return Examples(x, self.train.y)

    def _test_losses(self) -> NDArray:
        size = self.net.rows_per_batch(self.test)
        return np.concatenate([self.net.losses(x, y) for x, y in self.test.batches(size)])

    def confirmed(
        self, start: NDArray, flip_at: float, bounds: tuple[float, float] | None
    ) -> Poisoning:
        """The outcome, by a refit from `start`."""
        state, clean = self.state, self.targets.x[self.state.at]
        poisoned = self._poisoned(state)
        self.net.theta = start
        self.fit(self.net, poisoned)
        losses, same = self._test_losses(), None
        if bounds is not None:
            equal = _bytes(state.x, bounds) == _bytes(clean, bounds)
            same = equal.reshape(len(equal), -1).all(axis=1)
        numbers, test_losses = zip(*self.trace, strict=True)
        return Poisoning(
            change_if_poisoned=losses - self.losses,
            flipped=losses > flip_at,
            rows=self.targets.rows[state.at],
            inputs=state.x,
            features=state.seen,
            same_bytes=same,
            test_losses=np.stack(test_losses),
            num_poisons=np.array(numbers),
            theta=self.net.theta,
            gradient_norm=self.net.gradient_norm(poisoned),
        )


def _bytes(x: NDArray, bounds: tuple[float, float]) -> NDArray:
    low, high = bounds
    return np.round(_BYTE * (x.astype(np.float64) - low) / (high - low)).astype(np.int64)
