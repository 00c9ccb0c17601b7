"""Poisoning: training inputs moved, each within a small box, so that test losses rise.

Koh & Liang 2017, section 5.2. With s = H^-1 grad (mean test loss) at the present weights, the mean
test loss after retraining falls along + d/dx_i (grad loss_i . s) / n, so each poisoned input takes
a step against that derivative's sign and is put back into its box; the net is refitted; and again.
Labels never change. `influence.reach` has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.examples import Examples
from influence.net import GenericNeuralNet
from influence.reach import Reach, Targets, check_targets, mean_s_test, reach_of, seen_by
from influence.solvers import Direct, Solver

_BYTE = 255


@dataclass(frozen=True)
class Rule:
    """How poisons are moved and chosen; the defaults are the strongest found.

    At move t the velocity is v_t = momentum v_(t-1) + g / mean |g|, and every entry moves by
    - radius step decay^t clip(v_t / (softness mean |v_t|), -1, 1): by its sign alone at softness 0.

    Args:
      step: of the first move, in radii.
      decay: each further step, times the one before.
      momentum: share of the last velocity in the next, in [0, 1).
      softness: of the sign: entries of |v| below this share of the mean move in proportion.
      max_steps: moves at most of each set of poisons.
      tries: how many rows, those of largest |g|_1 at the clean weights, are moved alone first; the
        poisons are those that then did most, and go on from there together. 0: the rows of largest
        |g|_1 are the poisons, from their own inputs on.

    Raises: ValueError.
    """

    step: float = 1.0
    decay: float = 0.8
    momentum: float = 0.5
    softness: float = 0.5
    max_steps: int = 8
    tries: int = 10

    def __post_init__(self):
        """Check the hyperparameters."""
        for name, low, high in (("step", 0, 2), ("decay", 0, 1)):
            if not low < getattr(self, name) <= high:
                raise ValueError(f"{name} must lie in ({low}, {high}], got {getattr(self, name)}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}.")
        if not self.softness >= 0:
            raise ValueError(f"softness must be non-negative, got {self.softness}.")
        for name, least in (("max_steps", 1), ("tries", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")

    def move(self, velocity: NDArray, t: int) -> NDArray:
        """Of each entry at move t, in radii."""
        direction = np.sign(velocity)
        if self.softness:
            mean = np.abs(velocity).mean(axis=_entries(velocity), keepdims=True)
            scale = np.where(mean > 0, self.softness * mean, 1)
            direction = np.clip(velocity / scale, -1, 1)
        return -self.step * self.decay**t * direction


PAPER_RULE = Rule(step=0.04, decay=1.0, momentum=0.0, softness=0.0, max_steps=100, tries=0)
"""The release's: at most 100 moves of .02 of an 8-bit level, in a box of .5 to each side."""


@dataclass(frozen=True, eq=False)
class Poisoning:
    """Poisoned training inputs, and what they did to each test loss.

    Attributes:
      change_if_poisoned: (m,) each test loss after a cold refit on the poisoned training set, minus
        before; actual, not predicted. Positive: the loss rose, as it was meant to.
      flipped: (m,) test loss above `flip_at` after the cold refit.
      rows: (k,) the poisoned rows, in the order in which they were chosen.
      inputs: (k, ...) their inputs.
      features: (k, ...) what the trained part of the net sees of them.
      same_bytes: (k,) whether all 8-bit values round(255 (x - low) / (high - low)) of an input are
        those of the original; None without `bounds`.
      test_losses: (t + 1, m) after each refit that was kept; the first are the clean ones.
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
    rule: Rule = Rule(),
    inputs: NDArray | None = None,
    bounds: tuple[float, float] | None = None,
    flip_at: float = float(np.log(2)),
    flips: int | None = None,
    gradient_norms: NDArray | None = None,
    solver: Solver = Direct(),
    fit: Callable[[GenericNeuralNet, Examples], Any] | None = None,
    start: NDArray | None = None,
) -> Poisoning:
    """Move training inputs within their boxes so that the mean test loss after retraining rises.

    See the file's head for the iteration. It ends as soon as enough test losses are above
    `flip_at`, and the outcome is confirmed by a refit that begins where no poison has led. The net
    is left as it was.

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
      rule: how they are chosen and moved.
      inputs: (c, ...) the candidates' inputs, floating, where `train` holds features of them.
      bounds: least and largest value of an input's entries, or None.
      flip_at: test loss from which a test example counts as flipped; log 2 is P(label) < 1/2 for
        log losses. Infinity: no early end.
      flips: flipped test examples that are enough; all m if omitted.
      gradient_norms: (c,) what `reach.gradient_norms` returned for the candidates, not to be
        computed again.
      solver: how H^-1 is applied.
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
        raise ValueError(
            f"gradient_norms must have shape ({c},), got {np.shape(gradient_norms)}."
        )
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
    """Some targets moved and the net refitted."""

    at: NDArray[np.int64]  # positions in the targets
    x: NDArray
    seen: NDArray  # what the trained part sees of x
    theta: NDArray
    losses: NDArray  # (m,)


class _Attack:
    """The search for the moves; `state` is where it is, `trace` how it came there."""

    def __init__(
        self,
        net: GenericNeuralNet,
        train: Examples,
        test: Examples,
        targets: Targets,
        rule: Rule,
        solver: Solver,
        fit: Callable,
        enough: Callable[[NDArray], bool],
    ):
        self.net, self.train, self.test, self.targets = net, train, test, targets
        self.rule, self.solver, self.fit, self.enough = rule, solver, fit, enough
        self.clean = net.theta
        none = np.arange(0)
        losses = self._test_losses()
        self.state = _State(none, targets.x[none], train.x[none], self.clean, losses)
        self.trace = [(0, losses)]

    def run(self, counts: Sequence[int], norms: NDArray | None) -> None:
        """Try rows alone; then move more and more of them together, until it is enough."""
        order = np.arange(len(self.targets.rows))
        # All of them poisoned as they are: their order is no matter.
        if norms is None and (self.rule.tries or counts[0] < len(order)):
            norms = norms_of(self.net, self.train, self.test, self.targets, self.solver)
        if norms is not None:
            # Of equal norms the lower row, so that the candidates' order is no matter.
            order = np.lexsort((self.targets.rows, -np.asarray(norms)))
        x = self.targets.x.copy()
        tried: list[_State] = []
        for i in order[: self.rule.tries]:
            tried.append(self._moved(np.array([i]), x))
            if counts[0] == 1 and self.enough(tried[-1].losses):
                break
        for state in tried:
            x[state.at] = state.x
        # A stable sort: those not tried come after, by their norms.
        tried.sort(key=lambda state: -state.losses.mean())
        best = [int(state.at[0]) for state in tried]
        order = np.array(best + [int(i) for i in order if i not in best])
        for count in counts:
            if count == 1 and tried:
                self._keep(tried[0])
            else:
                self._keep(self._moved(order[:count], x))
                x[self.state.at] = self.state.x
            if self.enough(self.state.losses):
                return

    def _moved(self, at: NDArray, x: NDArray) -> _State:
        """Move the targets `at` together from x, refitting after each move: the best state seen."""
        x, seen, moved = x[at], self.train.x[self.targets.rows[at]], not np.array_equal
        self.net.theta = self.clean
        states = []
        if (x != self.targets.x[at]).any():
            states.append(self._refitted(at, x))
        velocity = np.zeros_like(x)
        return states
    def confirmed(
        self, start: NDArray, flip_at: float, bounds: tuple[float, float] | None
    ) -> Poisoning:
        """The outcome, by a refit from `start`."""
        at, clean = np.array(self.inside), self.trace[0][1]
        self.net.theta = start
        losses = self._refitted(self.inside, self.seen)
        same = None
        if bounds is not None:
            pair = (_bytes(self.x[at], bounds), _bytes(self.targets.x[at], bounds))
            same = np.equal(*pair).reshape(len(at), -1).all(axis=1)
        numbers, test_losses = zip(*self.trace, strict=True)
        return Poisoning(
            change_if_poisoned=losses - clean,
            flipped=losses > flip_at,
            rows=self.targets.rows[at],
            inputs=self.x[at],
            features=self.seen[at],
            same_bytes=same,
            test_losses=np.stack(test_losses),
            num_poisons=np.array(numbers),
            theta=self.net.theta,
            gradient_norm=self.net.gradient_norm(self._poisoned(self.inside, self.seen)),
        )

    # --- the net on the poisoned training set -----------------------------------------------------

    def _poisoned(self, inside: list[int], seen: NDArray) -> Examples:
        x = np.array(self.train.x)
        x[self.targets.rows[inside]] = seen[inside]
        return Examples(x, self.train.y)

    def _refitted(self, inside: list[int], seen: NDArray) -> NDArray:
        """Test losses (m,) after a fit from the present theta."""
        self.fit(self.net, self._poisoned(inside, seen))
        return self._test_losses()

    def _test_losses(self) -> NDArray:
        size = self.net.rows_per_batch(self.test)
        return np.concatenate([self.net.losses(x, y) for x, y in self.test.batches(size)])

    def _s_test(self) -> NDArray:
        poisoned = self._poisoned(self.inside, self.seen)
        return mean_s_test(self.net, poisoned, self.test, self.solver)

    def _predicted(self, at: NDArray, seen: NDArray, s: NDArray) -> NDArray:
        return self.targets.changes(self.net, at, seen, s, len(self.train))

    def _keep(self, losses: NDArray) -> None:
        self.losses = losses
        self.trace.append((len(self.inside), losses))


def _bytes(x: NDArray, bounds: tuple[float, float]) -> NDArray:
    low, high = bounds
    return np.round(_BYTE * (x.astype(np.float64) - low) / (high - low)).astype(np.int64)
