"""Poisoning: training inputs moved, each within a small box, so that test losses rise.

Koh & Liang 2017, section 5.2. With s = H^-1 grad (mean test loss) at the present weights, the mean
test loss after retraining falls along g_i / n, g_i = d/dx_i (grad loss_i . s), so each poisoned
input moves against g_i and is put back into its box; the net is refitted; and again. Labels never
change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.examples import Examples
from influence.net import GenericNeuralNet
from influence.reach import (
    BEST_RULE,
    PAPER_RULE,
    Rule,
    Targets,
    check_targets,
    mean_s_test,
    mean_size,
    norms_of,
    seen_by,
)
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
) -> Poisoning:
    """Move training inputs within their boxes so that the mean test loss after retraining rises.

    See the file's head for the iteration. It ends as soon as enough test losses are above
    `flip_at`; else with the moves after which the mean test loss was largest. The outcome is
    confirmed by a refit that begins where no poison has led. The net is left as it was.

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
      rule: how they are moved and chosen.
      inputs: (c, ...) the candidates' inputs, floating, where `train` holds features of them.
      bounds: least and largest value of an input's entries, or None.
      flip_at: test loss above which a test example counts as flipped; log 2 is P(label) < 1/2 for
        log losses. Infinity: no early end.
      flips: flipped test examples that are enough; all m if omitted.
      gradient_norms: (c,) what `reach.gradient_norms` returned for the candidates, not to be
        computed again.
      solver: how H^-1 is applied; `Direct` if omitted.
      fit: called instead of `net.fit` on (net, poisoned training set), from the present theta.
      start: (d,) where the confirming refit begins; zero for a convex net and the net's theta for
        any other, if omitted.

    Returns: Poisoning; positive: the test loss rose.
    Raises: TypeError, ValueError or IndexError naming the argument, before any long computation.
    """
    if not isinstance(net, GenericNeuralNet):
        raise TypeError(f"net must be a GenericNeuralNet, got {type(net).__name__}.")
    train, test = seen_by(net, train), seen_by(net, test)
    net.validate(train, "train")
    net.validate(test, "test")
    targets = check_targets(net, train, rows, radius, inputs, bounds)
    c = len(targets.rows)
    counts = [c] if counts is None else list(counts)
    if not counts or counts[0] < 1 or counts[-1] > c or (np.diff(counts) <= 0).any():
        raise ValueError(f"counts must be increasing numbers in [1, {c}], got {counts}.")
    flips = len(test) if flips is None else flips
    if not 1 <= flips <= len(test):
        raise ValueError(f"flips must lie in [1, {len(test)}], got {flips}.")
    if gradient_norms is not None and np.shape(gradient_norms) != (c,):
        raise ValueError(f"gradient_norms must have shape ({c},), got {np.shape(gradient_norms)}.")
    if start is None:
        start = np.zeros_like(net.theta) if net.convex else net.theta
    elif np.shape(start) != (net.num_parameters,):
        raise ValueError(f"start must have shape ({net.num_parameters},), got {np.shape(start)}.")
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
        tried.sort(key=lambda states: -states[-1].losses.mean())
        best = [int(states[-1].at[0]) for states in tried]
        order = np.array([*best, *(i for i in order if i not in best)])
        for states in tried:
            x[states[-1].at] = states[-1].x
        for count in counts:
            states = tried[0] if count == 1 and tried else self._moved(order[:count], x)
            self.state = states[-1]
            x[self.state.at] = self.state.x
            self.trace += [(count, s.losses) for s in states if s.losses is not self.losses]
            if self.enough(self.state.losses):
                return

    def _moved(self, at: NDArray, x: NDArray) -> list[_State]:
        """Move the targets `at` together from x, with a refit after each move; the best is last."""
        self.net.theta = self.theta
        states = [self._refitted(at, x[at])]
        velocity = np.zeros_like(x[at])
        # Inputs that were moved before are not to be thrown far from where that has led them.
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
