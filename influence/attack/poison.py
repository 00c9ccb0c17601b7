"""Poisoning: training inputs moved, each within a small box, so that test losses rise.

With s = H^-1 grad (mean test loss), the mean test loss after retraining changes with the input of
row i as

    d (mean test loss) / dx_i = -g_i / n      g_i = d/dx_i (grad loss_i . s)

This is exact at the minimum of the risk (Koh & Liang 2017, section 2.2, where -g_i is I_pert,loss).
The penalty does not depend on x and drops out. Within a box of half width radius, the step of
largest first-order effect is -radius sign(g_i). Its effect is radius |g_i|_1 / n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

from influence.attack.targets import BEST_RULE, Rule, Targets, check_targets, mean_size
from influence.common.numbers import is_integer
from influence.examples.examples import Examples, check_rows
from influence.net.minimum import TOLERANCE, check_at_minimum
from influence.net.net import GenericNeuralNet, checked
from influence.net.questions import PerRow, Total
from influence.scores.inverse import Inverse
from influence.solvers import Direct, Solver
from influence.solvers.base import check_solver

# The largest 8-bit value.
_BYTE = 255
# Rows by which a set is known to fit the net.
_PROBE_ROWS = 3


@dataclass(frozen=True, eq=False)
class PoisonOptions:
    """Options of `poison` whose defaults suit most attacks.

    Args:
      inputs: (c, ...) the candidates' inputs, floating, where `train` holds features of them;
        `train`'s own if omitted.
      flip_at: test loss above which a test example counts as flipped. log 2 is P(label) < 1/2 for
        log losses; infinity: the search never ends early.
      flips: number of flipped test examples that is enough; all m if omitted.
      gradient_norms: (c,) |g_i|_1 of the candidates, as the function `gradient_norms` returns them;
        they rank the candidates. Computed if omitted.
      solver: how H^-1 is applied; `Direct` if omitted.
      fit: called instead of `net.fit` on (net, poisoned training set), from the present theta.
      start: (d,) where the confirming refit begins. If omitted: zero for a convex net, the net's
        theta for any other.
      tolerance: largest Euclidean norm of the risk's gradient at which the net counts as at its
        minimum. Elsewhere `change_if_poisoned` would contain ordinary training.

    Raises: TypeError or ValueError naming the argument.
    """

    inputs: NDArray | None = None
    flip_at: float = float(np.log(2))
    flips: int | None = None
    gradient_norms: NDArray | None = None
    solver: Solver | None = None
    fit: Callable[[GenericNeuralNet, Examples], Any] | None = None
    start: NDArray | None = None
    tolerance: float = TOLERANCE

    def __post_init__(self):
        if self.solver is not None:
            check_solver(self.solver)
        fit = self.fit
        if fit is not None and not callable(fit):
            raise TypeError(f"fit must be a function of a net and a training set, got {fit!r}.")
        for name in ("flip_at", "tolerance"):
            value = getattr(self, name)
            if not (isinstance(value, int | float | np.number) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value!r}.")


@dataclass(frozen=True, eq=False)
class Poisoning:
    """Poisoned training inputs, and the change of each test loss.

    Attributes:
      change_if_poisoned: (m,) each test loss after a cold refit on the poisoned training set, minus
        before; actual, not predicted. Positive: the loss rose, as intended.
      flipped: (m,) True where the test loss is above `flip_at` after the cold refit.
      rows: (k,) the poisoned rows.
      inputs: (k, ...) their inputs.
      features: (k, ...) their features, which the trained part of the net sees.
      same_bytes: (k,) True where all 8-bit values round(255 (x - low) / (high - low)) of an input
        equal those of the original; None without `bounds`.
      test_losses: (t + 1, m) after each warm refit of the search; the first are the clean ones.
      num_poisons: (t + 1,) the number of poisons at each of them.
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
    bounds: tuple[float, float] | None = None,
    rule: Rule = BEST_RULE,
    options: PoisonOptions = PoisonOptions(),
) -> Poisoning:
    """Move training inputs within their boxes so that the mean test loss after retraining rises.

    Koh & Liang 2017, section 5.2: each poison moves against g_i = d/dx_i (grad loss_i . s) and is
    clipped to its box; then the net is refitted, and the next move begins at its weights. `rule`
    sets the steps and chooses the rows. Labels never change. The search ends as soon as enough test
    losses are above `options.flip_at`, otherwise with the moves of the largest mean test loss. A
    refit from `options.start`, far from the poisoned weights, confirms the outcome. The net is left
    as it was.

    Args:
      net: at the minimum of its risk on `train`. On a frozen trunk, `net.features(x)` is what its
        trained part sees; other nets see x itself.
      train: n rows. A net with a trunk takes images or their features.
      test: m examples whose mean loss, without the penalty, is to rise.
      rows: (c,) training rows, the candidates.
      radius: how far each entry of an input may move, in its unit. Images in [-1, 1] stay in their
        8-bit cells up to a radius of 1/255; .98/255 leaves room for float32's rounding.
      counts: numbers of candidates to poison, increasing. The attack tries the first number, and
        the next one if that was not enough. All at once if omitted.
      bounds: least and largest value of an input's entries, or None.
      rule: steps and choice of the poisons: `BEST_RULE`, the strongest found, `PAPER_RULE`, that of
        the 2017 release, or your own `Rule`.
      options: everything else.

    Returns: Poisoning; positive: the test loss rose.
    Raises: TypeError, ValueError or IndexError naming the argument, before any long computation;
      ValueError for a net that is not at its minimum.
    """
    checked(net)
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a Rule such as BEST_RULE or PAPER_RULE, got {rule!r}.")
    if not isinstance(options, PoisonOptions):
        raise TypeError(f"options must be PoisonOptions(...), got {options!r}.")
    _check_examples(net, train, "train")
    _check_examples(net, test, "test")
    num_candidates = len(check_rows(rows, len(train)))
    counts = _counts(counts, num_candidates)
    _check_options(options, net, len(test), num_candidates)
    targets = check_targets(net, train, rows, radius, options.inputs, bounds)
    train, test = net.featured(train), net.featured(test)
    check_at_minimum(net, train, options.tolerance, "give the tolerance that it was fitted to")
    before = net.model.get_weights()
    try:
        attack = _Attack(net, train, test, targets, rule, options)
        attack.run(counts)
        return attack.confirmed(bounds)
    finally:
        net.model.set_weights(before)


def gradient_norms(
    net: GenericNeuralNet,
    train: Examples,
    test: Examples,
    rows: ArrayLike,
    *,
    inputs: NDArray | None = None,
    solver: Solver | None = None,
) -> NDArray:
    """Compute the L1 norms of g_i, by which the paper's attack ranks training rows.

    radius / n times the norm is the largest rise of the mean test loss, to first order, when the
    row moves within a box of that radius. Bounds, which may cut the box, are ignored.

    Args:
      net: at the minimum of its risk on `train`.
      train: n rows; see `poison`.
      test: m examples whose mean loss is to rise.
      rows: (c,) training rows.
      inputs: (c, ...) the rows' inputs, where `train` holds features of them.
      solver: how H^-1 is applied; `Direct` if omitted.

    Returns: (c,), in the unit of the loss for each unit of the input.
    Raises: as `poison`.
    """
    _check_examples(net, train, "train")
    _check_examples(net, test, "test")
    targets = check_targets(net, train, rows, 1.0, inputs, None)
    return _norms_of(net, net.featured(train), net.featured(test), targets, solver)


def mean_s_test(
    net: GenericNeuralNet, train: Examples, test: Examples, solver: Solver | None = None
) -> NDArray:
    """Solve for H^-1 grad (mean test loss) at the net's theta: (d,).

    Without a solver, `Direct`. A strongly convex net with a closed-form Hessian needs only the
    Cholesky factor: `Direct` would also compute bounds on eigenvalues, which takes longer.
    """
    if solver is None and net.strong_convexity > 0:
        H = net.hessian(train)
        if H is not None:
            g = test.sum_over(Total("gradient"), net) / len(test)
            return scipy.linalg.cho_solve(scipy.linalg.cho_factor(H), g)
    return Inverse(net, train, solver=solver or Direct()).s_test(test).x.mean(axis=1)


def _norms_of(
    net: GenericNeuralNet, train: Examples, test: Examples, targets: Targets, solver: Solver | None
) -> NDArray:
    """Compute `gradient_norms` without its checks."""
    s = mean_s_test(net, train, test, solver)
    return _l1_norms(targets.gradients(net, slice(None), targets.x, s))


def _l1_norms(g: NDArray) -> NDArray:
    return np.abs(g).sum(axis=tuple(range(1, g.ndim)), dtype=np.float64)


# --- the search -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _State:
    """Inputs of some targets, and the net refitted to them."""

    at: NDArray[np.int64]  # positions in the targets
    x: NDArray
    seen: NDArray  # features of x
    theta: NDArray
    losses: NDArray  # (m,)


class _Attack:
    """Search for poisons; `state` is the best set so far, `trace` the test losses on the way."""

    def __init__(
        self,
        net: GenericNeuralNet,
        train: Examples,
        test: Examples,
        targets: Targets,
        rule: Rule,
        options: PoisonOptions,
    ):
        self.net, self.train, self.test, self.targets = net, train, test, targets
        self.rule, self.options, self.fit = rule, options, options.fit or type(net).fit
        self.flips = options.flips or len(test)
        cold = np.zeros_like(net.theta) if net.convex else net.theta
        self.start = cold if options.start is None else options.start
        self.theta, self.losses = net.theta, self._test_losses()  # the clean ones
        self.trace: list[tuple[int, NDArray]] = [(0, self.losses)]

    def enough(self, losses: NDArray) -> bool:
        """Return whether enough test examples are flipped."""
        return np.count_nonzero(losses > self.options.flip_at) >= self.flips

    def run(self, counts: Sequence[int]) -> None:
        """Move single rows, then more and more rows together, until enough losses are flipped."""
        order, norms = np.arange(len(self.targets.rows)), self.options.gradient_norms
        if norms is None and (self.rule.tries or counts[0] < len(order)):
            solver = self.options.solver
            norms = _norms_of(self.net, self.train, self.test, self.targets, solver)
        if norms is not None:  # ties by row number, so that the candidates' order has no effect
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
        """Return the key by which sets of poisons are compared; larger is better."""
        return self.enough(state.losses), float(state.losses.mean())

    def _ranked_again(self, order: NDArray, moved: int) -> NDArray:
        """Rank the targets after the first `moved` at the present poisons: the whole order."""
        state, rest = self.state, order[moved:]
        self.net.theta = state.theta
        g = self.targets.gradients(self.net, rest, self.targets.x[rest], self._s_test(state))
        by_norm = np.lexsort((self.targets.rows[rest], -_l1_norms(g)))
        return np.concatenate([order[:moved], rest[by_norm]])

    def _moved(self, at: NDArray, x: NDArray, first: int | None = None) -> list[_State]:
        """Move the targets `at` together from x and refit after each move; the best is last.

        `first` is the number t of the first move; None: 0 from clean inputs, else max_steps // 2.
        """
        self.net.theta = self.theta
        states = [self._refitted(at, x[at])]
        velocity = np.zeros_like(x[at])
        if first is None:
            # Earlier moves led here; a full first step would lose what they gained.
            first = 0 if np.array_equal(x[at], self.targets.x[at]) else self.rule.max_steps // 2
        for t in range(first, first + self.rule.max_steps):
            state = states[-1]
            if self.enough(state.losses):
                break
            g = self.targets.gradients(self.net, at, state.x, self._s_test(state))
            velocity = self.rule.momentum * velocity + g / mean_size(g)
            moved = self.targets.moved(at, state.x, self.rule.move(velocity, t))
            if np.array_equal(moved, state.x):
                break
            states.append(self._refitted(at, moved))
        means = [state.losses.mean() for state in states]
        best = len(states) - 1 if self.enough(states[-1].losses) else int(np.argmax(means))
        return states[: best + 1]

    def _refitted(self, at: NDArray, x: NDArray) -> _State:
        """Fit the net, from its present theta, with the targets `at` moved to x."""
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

    def _s_test(self, state: _State) -> NDArray:
        return mean_s_test(self.net, self._poisoned(state), self.test, self.options.solver)

    def _test_losses(self) -> NDArray:
        return self.test.each_row(PerRow("losses"), self.net)

    def confirmed(self, bounds: tuple[float, float] | None) -> Poisoning:
        """Refit from `start` and return the outcome."""
        state, clean = self.state, self.targets.x[self.state.at]
        poisoned = self._poisoned(state)
        self.net.theta = self.start
        self.fit(self.net, poisoned)
        losses, same = self._test_losses(), None
        if bounds is not None:
            equal = _bytes(state.x, bounds) == _bytes(clean, bounds)
            same = equal.reshape(len(equal), -1).all(axis=1)
        numbers, test_losses = zip(*self.trace, strict=True)
        return Poisoning(
            change_if_poisoned=losses - self.losses,
            flipped=losses > self.options.flip_at,
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


# --- what `poison` is given -----------------------------------------------------------------------


def _check_options(options: PoisonOptions, net: GenericNeuralNet, m: int, c: int) -> None:
    """Check the options that depend on the net, its m test examples and its c candidates."""
    flips, norms, start = options.flips, options.gradient_norms, options.start
    d = net.num_parameters
    if flips is not None and not (is_integer(flips, 1) and flips <= m):
        raise ValueError(f"flips must be a whole number in [1, {m}], got {flips!r}.")
    if norms is not None and np.shape(norms) != (c,):
        raise ValueError(f"gradient_norms must have shape ({c},), got {np.shape(norms)}.")
    if start is not None and np.shape(start) != (d,):
        raise ValueError(f"start must have shape ({d},), got {np.shape(start)}.")
    if start is not None and not np.isfinite(start).all():
        raise ValueError("start must be finite, got a NaN or infinity.")


def _check_examples(net: GenericNeuralNet, examples: Examples, name: str) -> None:
    """Validate examples of images or of features; only a few images go through the trunk."""
    if not isinstance(examples, Examples):
        net.validate(examples, name)  # refuses it
    _ = examples.x  # a stream has none and says so
    probe = examples.take(slice(0, _PROBE_ROWS))
    seen = net.featured(probe)
    net.validate(examples if seen is probe else seen, name)
    net.loss.check_labels(examples.y, net.outputs(seen.x).shape, name)


def _counts(counts: Any, c: int) -> list[int]:
    if counts is None:
        return [c]
    try:
        found = list(counts)
    except TypeError:
        found = []
    whole = bool(found) and all(is_integer(count, 1) for count in found)
    if not (whole and found[-1] <= c and all(np.diff(list(map(int, found))) > 0)):
        raise ValueError(f"counts must be increasing whole numbers in [1, {c}], got {counts!r}.")
    return [int(count) for count in found]
