"""Poisoning: move training inputs, each within a small box, so that test losses rise.

Let H be the risk's Hessian and s = H^-1 grad (mean test loss). If the input x_i of row i changes,
the mean test loss after retraining changes by the derivative

    d (mean test loss) / dx_i = -g_i / n      g_i = d/dx_i (grad loss_i . s)

The derivative is exact at the minimum of the risk. In Koh & Liang (2017, section 2.2),
the symbol for -g_i is `I_pert,loss`. The penalty does not depend on x, so g_i does not contain it.
The box of x_i has the half width `radius`. The step with the largest first-order effect is
-radius sign(g_i). It raises the mean test loss by radius |g_i|_1 / n.
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
from influence.curvature.operators import Hessian
from influence.examples.examples import Examples, check_rows
from influence.examples.given import Data
from influence.examples.labels import fields, is_packed
from influence.net.checked import Net, checked
from influence.net.minimum import TOLERANCE, check_at_minimum
from influence.net.net import GenericNeuralNet
from influence.net.questions import PerRow, Total
from influence.net.refused import check_no_masses
from influence.scores.inverse import Inverse
from influence.solvers import Direct, Solver
from influence.solvers.base import check_solver

# The largest 8-bit value of a pixel.
_BYTE = 255
# `_check_examples` computes the features of this many rows to check that a set fits the net.
_PROBE_ROWS = 3


@dataclass(frozen=True, eq=False)
class PoisonOptions:
    """Options of `poison` whose defaults suit most attacks.

    Args:
      inputs: (c, ...) the candidates' inputs, floating. They are needed if `train` holds features.
        If omitted, the inputs in `train` are used.
      flip_at: a test example counts as flipped if its loss is above this value. For log losses, log
        2 means P(label) < 1/2. With an infinite value, the search never ends early.
      flips: the search ends when this many test examples are flipped; all m if omitted.
      gradient_norms: (c,) |g_i|_1 of the candidates, the result of the function `gradient_norms`.
        The candidates are ranked by these norms. The norms are computed if omitted.
      solver: the solver that applies H^-1; `Direct` if omitted.
      fit: function of (net, poisoned training set) that is called instead of `net.fit`. The fit
        starts from the net's present theta.
      start: (d,) the theta at which the confirming refit begins. If omitted, it is zero for a
        convex net and the net's theta for any other net.
      tolerance: `poison` refuses a net if the Euclidean norm of its risk gradient is larger. For
        such a net, `change_if_poisoned` would also contain the effect of further training.

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

    A warm refit starts at the weights of the previous refit. The cold refit confirms the result and
    starts at `PoisonOptions.start`.

    Attributes:
      change_if_poisoned: (m,) each test loss after the cold refit on the poisoned training set,
        minus the loss before. This is the actual change. Positive: the loss rose, as intended.
      flipped: (m,) True where the test loss is above `flip_at` after the cold refit.
      rows: (k,) the poisoned rows.
      inputs: (k, ...) the poisoned inputs of these rows.
      features: (k, ...) the features of these inputs, which the trained part of the net takes.
      same_bytes: (k,) True if all 8-bit values round(255 (x - low) / (high - low)) of an input
        equal those of the original input; None without `bounds`.
      test_losses: (t + 1, m) test losses before the attack (first row) and after each of t warm
        refits. Refits of discarded attempts are not listed. If the smallest count is above 1, the
        refits that try single rows are not listed either.
      num_poisons: (t + 1,) the number of poisons at each row of `test_losses`.
      theta: (d,) theta after the cold refit.
      gradient_norm: Euclidean norm of the poisoned risk's gradient at this theta. A small norm
        shows that the cold refit converged.
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
    net: Net,
    train: Data,
    test: Data,
    rows: ArrayLike,
    radius: float,
    *,
    counts: Sequence[int] | None = None,
    bounds: tuple[float, float] | None = None,
    rule: Rule = BEST_RULE,
    options: PoisonOptions = PoisonOptions(),
) -> Poisoning:
    """Move training inputs within their boxes so that the mean test loss after retraining rises.

    This is the attack of Koh & Liang (2017, section 5.2). Each poison moves against
    g_i = d/dx_i (grad loss_i . s) and is clipped to its box. Then the net is refitted, and the next
    move begins at the new weights. `rule` sets the steps and chooses the rows. Labels never change.
    The search ends as soon as enough test losses are above `options.flip_at`. Otherwise it returns
    the moves with the largest mean test loss. A refit from `options.start` confirms the outcome.
    The net does not change.

    Args:
      net: a net at the minimum of its risk on `train`. If the net has a frozen trunk, its trained
        part takes `net.features(x)`. Otherwise it takes x itself.
      train: n rows. A net with a trunk takes images or their features.
      test: m examples. The attack raises their mean loss without the penalty.
      rows: (c,) training rows that may be poisoned, the candidates.
      radius: largest move of each entry of an input, in the unit of the input. Images in [-1, 1]
        keep their 8-bit values up to a radius of 1/255; .98/255 allows for float32's rounding.
      counts: increasing numbers of candidates to poison. The attack begins with the first number.
        It continues with the next number if too few test examples are flipped. If `counts` is
        omitted, the attack poisons all c candidates at once.
      bounds: the smallest and the largest value that an input's entries may have, or None.
      rule: the rule for the steps and the choice of the poisons. `BEST_RULE` is the strongest rule
        that we found. `PAPER_RULE` is the rule of the authors' 2017 code. You can also give your
        own `Rule`.
      options: all other options.

    Returns: Poisoning. Positive changes mean that the test loss rose.
    Raises: TypeError, ValueError or IndexError naming the argument, before any long computation;
      ValueError for a net that is not at its minimum.
    """
    net = checked(net)[0].uncut()
    train, test = net.given(train, "train"), net.given(test, "test")
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
    net: Net,
    train: Data,
    test: Data,
    rows: ArrayLike,
    *,
    inputs: NDArray | None = None,
    solver: Solver | None = None,
) -> NDArray:
    """Compute the L1 norms of g_i. The paper's attack ranks training rows by these norms.

    If a row moves within a box of half width radius, the mean test loss rises by at most
    radius / n times the row's norm, to first order. Bounds of the inputs are ignored.

    Args:
      net: a net at the minimum of its risk on `train`.
      train: n rows; see `poison`.
      test: m examples. The attack raises their mean loss.
      rows: (c,) training rows.
      inputs: (c, ...) the rows' inputs, needed if `train` holds features.
      solver: the solver that applies H^-1; `Direct` if omitted.

    Returns: (c,), in the unit of the loss per unit of the input.
    Raises: the errors of `poison` for bad arguments.
    """
    net = checked(net)[0].uncut()
    train, test = net.given(train, "train"), net.given(test, "test")
    _check_examples(net, train, "train")
    _check_examples(net, test, "test")
    targets = check_targets(net, train, rows, 1.0, inputs, None)
    return _norms_of(net, net.featured(train), net.featured(test), targets, solver)


def mean_s_test(
    net: GenericNeuralNet, train: Examples, test: Examples, solver: Solver | None = None
) -> NDArray:
    """Solve for H^-1 grad (mean test loss) at the net's theta: (d,).

    The default solver is `Direct`. If the net is strongly convex and has a closed-form Hessian, a
    Cholesky factor is used in its place. `Direct` takes longer, because it also bounds eigenvalues.
    """
    if solver is None and net.strong_convexity > 0:
        H = net.hessian(train)
        if H is not None:
            g = test.sum_over(Total("gradient"), net) / len(test)
            try:
                return scipy.linalg.cho_solve(scipy.linalg.cho_factor(H), g)
            except np.linalg.LinAlgError:
                pass  # `Direct` below raises an error that names a sufficient damping
    how: dict[str, Any] = {"curvature": Hessian, "approximation": "first_order"}
    inverse = Inverse(net, train, solver=solver or Direct(), **how)
    return inverse.s_test(test).x.mean(axis=1)


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
    """Moved inputs of some targets, and the net's theta and test losses after a refit on them."""

    at: NDArray[np.int64]  # these targets' positions in `Targets`
    x: NDArray
    seen: NDArray  # the features of x, which the trained part of the net takes
    theta: NDArray
    losses: NDArray  # (m,) test losses


class _Attack:
    """A search for poisons. `state` is the best set of poisons for the latest count.

    `trace` lists the number of poisons and the test losses after each refit that led to `state`.
    """

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
        self.theta, self.losses = net.theta, self._test_losses()  # Both are values before any move.
        self.trace: list[tuple[int, NDArray]] = [(0, self.losses)]

    def enough(self, losses: NDArray) -> bool:
        """Return True if enough test examples are flipped."""
        return np.count_nonzero(losses > self.options.flip_at) >= self.flips

    def run(self, counts: Sequence[int]) -> None:
        """Move single rows, then each count of rows together, until enough examples flip."""
        order, norms = np.arange(len(self.targets.rows)), self.options.gradient_norms
        if norms is None and (self.rule.tries or counts[0] < len(order)):
            solver = self.options.solver
            norms = _norms_of(self.net, self.train, self.test, self.targets, solver)
        if norms is not None:  # row numbers decide between equal norms
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
        """Return a key by which sets of poisons are compared. A larger key is better."""
        return self.enough(state.losses), float(state.losses.mean())

    def _ranked_again(self, order: NDArray, moved: int) -> NDArray:
        """Rank the targets after the first `moved` again, at the weights of the present poisons."""
        state, rest = self.state, order[moved:]
        self.net.theta = state.theta
        g = self.targets.gradients(self.net, rest, self.targets.x[rest], self._s_test(state))
        by_norm = np.lexsort((self.targets.rows[rest], -_l1_norms(g)))
        return np.concatenate([order[:moved], rest[by_norm]])

    def _moved(self, at: NDArray, x: NDArray, first: int | None = None) -> list[_State]:
        """Move the targets `at` together from x. Return the states up to the best, one per refit.

        The net is refitted after each move. `first` is the number t of the first move. None means 0
        if x is clean, else max_steps // 2.
        """
        self.net.theta = self.theta
        states = [self._refitted(at, x[at])]
        velocity = np.zeros_like(x[at])
        if first is None:
            # Earlier moves led to x. A step as long as the step at t = 0 would undo their gain.
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


# --- checks of the arguments of `poison` ----------------------------------------------------------


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
    """Refuse examples that do not fit the net or the attack.

    If the rows hold the inputs of a trunk, only the first three pass through it. The labels of all
    rows are checked.
    """
    _ = examples.x  # this raises an error for a stream, which has no x
    check_no_masses(net, "an attack")
    if is_packed(examples.y):
        raise ValueError(
            f"{name} must have plain labels without sample_weight for an attack, got "
            f"{sorted(fields(examples.y))}."
        )
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
