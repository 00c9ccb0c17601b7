"""Tests of poisoning against exact refits and against the authors' rule.

For a single poison, the comparison is with the best of all corners of the box.
"""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from influence import CG, Direct, DivergenceError, Examples, prepare
from influence.attack.poison import PoisonOptions, _Attack, gradient_norms, mean_s_test, poison
from influence.attack.targets import PAPER_RULE, Rule, check_targets
from tests.influence.attack import attacked
from tests.influence.attack.attacked import RADIUS, by_refit, mean_loss, refitted_loss, replaced

SIGNS = {"decay": 1.0, "momentum": 0.0, "softness": 0.0, "tries": 0, "restarts": 0}
ONE_STEP = Rule(step=0.5, max_steps=1, **SIGNS)
TO_THE_END = PoisonOptions(flip_at=np.inf)
ROWS = np.array([3, 8, 20])


@pytest.fixture(scope="module")
def problem():
    net, train, test, oracle = attacked.logistic()
    return net, train, test.take([0]), oracle


def test_the_change_is_that_of_an_exact_refit(problem):
    net, train, _, oracle = problem
    test = attacked.logistic()[2]
    theta = net.theta
    found = poison(net, train, test, np.arange(40), RADIUS, counts=[3], options=TO_THE_END)
    expected = by_refit(oracle, net, train, test, found.rows, found.inputs)
    np.testing.assert_allclose(found.change_if_poisoned, expected, atol=1e-9)
    assert found.change_if_poisoned.mean() > 0.01
    assert np.abs(found.inputs - train.x[found.rows]).max() <= RADIUS * (1 + 1e-12)
    assert len(set(found.rows)) == 3
    np.testing.assert_array_equal(found.features, found.inputs)
    assert found.same_bytes is None
    # During the attack, each refit starts from the weights of the previous one. The last of them
    # must give the same test losses as a refit from scratch. No state before it has a larger mean
    # test loss.
    last = found.test_losses[-1] - found.test_losses[0]
    np.testing.assert_allclose(last, expected, atol=1e-9)
    np.testing.assert_allclose(found.test_losses[0], net.losses(test.x, test.y), atol=1e-15)
    assert found.test_losses.mean(axis=1).argmax() == len(found.test_losses) - 1
    assert found.num_poisons[0] == 0 and set(found.num_poisons[1:]) == {3}
    assert found.gradient_norm < 1e-9
    poisoned = oracle.on(replaced(train, found.rows, found.inputs).x, train.y)
    assert np.linalg.norm(poisoned.gradient(found.theta)) < 1e-9
    np.testing.assert_array_equal(net.theta, theta)


def test_one_poison_is_as_bad_as_any_corner_of_any_row(problem):
    net, train, test, oracle = problem
    rows = np.arange(0, 40, 4)
    signs = np.array(list(product([-1, 1], repeat=4)))
    best = max(
        by_refit(oracle, net, train, test, row, train.x[row] + 0.8 * sign)[0]
        for row in rows
        for sign in signs
    )
    rule = Rule(max_steps=12)
    found = poison(net, train, test, rows, 0.8, counts=[1], rule=rule, options=TO_THE_END)
    assert found.change_if_poisoned[0] >= 0.99 * best
    # With tries=0 the row is chosen only by its gradient at the clean weights. This row is not
    # better than the one that the attack found by trying.
    alone = Rule(max_steps=12, tries=0)
    other = poison(net, train, test, rows, 0.8, counts=[1], rule=alone, options=TO_THE_END)
    assert other.change_if_poisoned[0] <= found.change_if_poisoned[0]


def test_one_step_of_the_release_by_hand(problem):
    net, train, test, oracle = problem
    theta = net.theta
    g_test = oracle.on(test.x, test.y).gradients(theta)[0]
    s = np.linalg.solve(oracle.hessian(theta), g_test)
    g = oracle.input_gradients(theta, s, 4)
    order = np.argsort(-np.abs(g).sum(axis=1))
    expected = train.x[order[:2]] - 0.5 * RADIUS * np.sign(g[order[:2]])
    found = poison(net, train, test, np.arange(40), RADIUS, counts=[2], rule=ONE_STEP)
    assert found.rows.tolist() == order[:2].tolist()
    np.testing.assert_allclose(found.inputs, expected, atol=1e-12)
    assert found.num_poisons.tolist() == [0, 2]
    change = by_refit(oracle, net, train, test, found.rows, expected)
    np.testing.assert_allclose(found.change_if_poisoned, change, atol=1e-9)


@pytest.mark.parametrize(
    "rule",
    [
        Rule(step=0.1, max_steps=2, **SIGNS),
        Rule(step=0.2, decay=0.5, momentum=0.7, softness=2.0, max_steps=3, tries=0),
    ],
)
def test_steps_are_taken_at_the_refitted_weights_by_hand(problem, rule):
    net, train, test, oracle = problem
    row, x, theta, v = [11], train.x[[11]].copy(), net.theta, 0
    for t in range(rule.max_steps):
        risk = oracle.on(replaced(train, row, x).x, train.y)
        s = np.linalg.solve(risk.hessian(theta), oracle.on(test.x, test.y).gradients(theta)[0])
        g = oracle.on(x, train.y[row]).input_gradients(theta, s, 4)
        v = rule.momentum * v + g / np.abs(g).mean()
        by = np.clip(v / (2 * np.abs(v).mean()), -1, 1) if rule.softness else np.sign(v)
        x = x - rule.step * rule.decay**t * RADIUS * by
        theta = oracle.on(replaced(train, row, x).x, train.y).minimum(theta)
    found = poison(net, train, test, row, RADIUS, rule=rule, options=TO_THE_END)
    assert len(found.test_losses) == rule.max_steps + 1
    np.testing.assert_allclose(found.inputs, x, atol=1e-11)
    np.testing.assert_allclose(found.theta, theta, atol=1e-9)


def test_it_ends_with_enough_flips(problem):
    net, train, _, _ = problem
    test = attacked.logistic()[2]
    rule = Rule(tries=0)
    all_three = (net, train, test, np.arange(40), RADIUS)
    every = poison(*all_three, counts=[1, 3], rule=rule, options=TO_THE_END)
    clean = every.test_losses[0]
    first_of_three = int(np.argmax(every.num_poisons == 3))
    # With one poison, no loss reaches the threshold `flip_at`. With three poisons, the loss of this
    # test example exceeds it, but only after some moves. The attack must end there.
    with_one = every.test_losses[:first_of_three].max(axis=0)
    point = int(np.argmax(every.test_losses[-1] - with_one))
    flip_at = (with_one[point] + every.test_losses[-1][point]) / 2
    alone = test.take([point])
    options = PoisonOptions(flip_at=float(flip_at))
    arguments = (net, train, alone, np.arange(40), RADIUS)
    found = poison(*arguments, counts=[1, 3], rule=rule, options=options)
    assert clean[point] < flip_at
    assert found.flipped.tolist() == [True]
    assert (found.test_losses[:-1] <= flip_at).all() and found.test_losses[-1, 0] > flip_at
    np.testing.assert_allclose(
        found.change_if_poisoned, found.test_losses[-1] - clean[point], atol=1e-9
    )
    # With flips=1, the attack ends when one of the three test examples has been flipped.
    low = float(np.sort(clean)[-1]) + 1e-3
    options = PoisonOptions(flip_at=low, flips=1)
    one = poison(*all_three, counts=[1, 3], rule=rule, options=options)
    assert one.flipped.sum() >= 1 and len(one.test_losses) < len(every.test_losses)
    assert (one.test_losses[:-1] <= low).all()


def test_a_try_that_flips_ends_the_tries(problem):
    net, train, test, _ = problem
    fits = []

    def fit(net, examples):
        fits.append(1)
        net.fit(examples)

    rule, flip_at = Rule(tries=10, max_steps=3), float(net.losses(test.x, test.y)[0]) + 1e-6
    arguments, options = (net, train, test, np.arange(40)), PoisonOptions(flip_at=flip_at, fit=fit)
    found = poison(*arguments, RADIUS, counts=[1, 2], rule=rule, options=options)
    assert found.flipped.all() and len(found.rows) == 1
    # The first of the ten rows to try reaches the goal. There is one fit after its move, and one
    # that confirms the result.
    assert len(fits) == 2


def test_tries_choose_by_what_was_attained(problem):
    net, train, test, oracle = problem
    rule = Rule(tries=6, max_steps=4)
    norms = gradient_norms(net, train, test, np.arange(40))
    tried = np.argsort(-norms)[:6]
    alone = [
        poison(net, train, test, [row], RADIUS, rule=Rule(tries=0, max_steps=4), options=TO_THE_END)
        for row in tried
    ]
    changes = np.array([one.change_if_poisoned[0] for one in alone])
    best = np.argsort(-changes)
    one = poison(net, train, test, np.arange(40), RADIUS, counts=[1], rule=rule, options=TO_THE_END)
    assert one.rows.tolist() == [tried[best[0]]]
    np.testing.assert_allclose(one.change_if_poisoned[0], changes[best[0]], rtol=1e-9)
    two = poison(net, train, test, np.arange(40), RADIUS, counts=[2], rule=rule, options=TO_THE_END)
    assert two.rows.tolist() == tried[best[:2]].tolist()
    # The rows were tried in the order of their gradient norms. Their true effects have another
    # order.
    assert best.tolist() != list(range(6))
    # The two rows then move together. Each starts from the inputs to which it moved on its own.
    x = np.concatenate([alone[i].inputs for i in best[:2]])
    together = by_refit(oracle, net, train, test, two.rows, x)[0]
    np.testing.assert_allclose(two.test_losses[1, 0] - two.test_losses[0, 0], together, atol=1e-9)
    assert two.change_if_poisoned[0] >= together - 1e-9


def test_rows_tried_alone_go_on_together_with_smaller_steps(problem):
    net, train, test, oracle = problem
    rule, rows = Rule(tries=2, max_steps=2, decay=0.5, softness=0.0), np.array([11, 30])
    by_itself = replace(rule, tries=0)
    alone = [
        poison(net, train, test, [row], RADIUS, rule=by_itself, options=TO_THE_END) for row in rows
    ]
    found = poison(net, train, test, rows, RADIUS, rule=rule, options=TO_THE_END)
    order = np.argsort([-one.change_if_poisoned[0] for one in alone])
    rows, x = rows[order], np.concatenate([alone[i].inputs for i in order])
    assert found.rows.tolist() == rows.tolist()
    theta = oracle.on(replaced(train, rows, x).x, train.y).minimum(net.theta)
    measured = oracle.on(test.x, test.y)
    losses = [measured.losses(theta)[0]]
    risk = oracle.on(replaced(train, rows, x).x, train.y)
    s = np.linalg.solve(risk.hessian(theta), measured.gradients(theta)[0])
    g = oracle.on(x, train.y[rows]).input_gradients(theta, s, 4)
    box = train.x[rows] - RADIUS, train.x[rows] + RADIUS
    x = np.clip(x - 0.5 * RADIUS * np.sign(g), *box)  # the second step is the first times the decay
    theta = oracle.on(replaced(train, rows, x).x, train.y).minimum(theta)
    losses.append(measured.losses(theta)[0])
    # The test loss still rises, so both states come before the best one, and the result has them.
    assert losses[1] > losses[0]
    np.testing.assert_allclose(found.test_losses[1:3, 0], losses, atol=1e-9)


def test_what_comes_back_is_the_best_that_was_seen(problem):
    net, train, test, _ = problem
    moves = []

    def fit(net, examples):  # the test loss rises again after the second move
        moves.append(examples.x[5].copy())
        net.theta = net.theta * (0.9 if len(moves) < 3 else 1.2)

    start, rule = net.theta, Rule(tries=0, max_steps=5)
    options = PoisonOptions(fit=fit, flip_at=np.inf, start=start)
    found = poison(net, train, test, [5], RADIUS, rule=rule, options=options)
    assert len(moves) == 6  # five moves, and one refit to confirm the best
    np.testing.assert_array_equal(found.inputs[0], moves[1])
    np.testing.assert_array_equal(moves[5], moves[1])
    assert len(found.test_losses) == 3
    np.testing.assert_allclose(found.theta, 1.2 * start)  # the fit started at `start`


def test_candidates_in_any_order(problem):
    net, train, test, _ = problem
    order = np.random.default_rng(3).permutation(40)
    one = poison(net, train, test, np.arange(40), RADIUS, counts=[2], options=TO_THE_END)
    other = poison(net, train, test, order, RADIUS, counts=[2], options=TO_THE_END)
    assert one.rows.tolist() == other.rows.tolist()
    np.testing.assert_allclose(one.change_if_poisoned, other.change_if_poisoned, rtol=1e-9)


@pytest.mark.parametrize("rule", [Rule(tries=3, max_steps=2), ONE_STEP])
def test_norms_that_are_known_are_not_computed_again(problem, rule):
    net, train, test, _ = problem
    rows = np.arange(10)
    norms = gradient_norms(net, train, test, rows)
    other, one, turned = (
        poison(net, train, test, rows, RADIUS, counts=[2], rule=rule, options=options)
        for options in (
            TO_THE_END,
            *(replace(TO_THE_END, gradient_norms=n) for n in (norms, -norms)),
        )
    )
    np.testing.assert_array_equal(one.inputs, other.inputs)
    assert turned.rows.tolist() != other.rows.tolist()


# --- the search -----------------------------------------------------------------------------------


def test_more_poisons_are_ranked_at_the_weights_reached(problem):
    net, train, test, oracle = problem
    rule = Rule(max_steps=4, tries=1, restarts=0)
    options = {"rule": rule, "options": TO_THE_END}
    one = poison(net, train, test, np.arange(40), 0.8, counts=[1], **options)
    risk = oracle.on(replaced(train, one.rows, one.inputs).x, train.y)
    theta = risk.minimum(net.theta)
    s = np.linalg.solve(risk.hessian(theta), oracle.on(test.x, test.y).gradients(theta)[0])
    norms = np.abs(oracle.input_gradients(theta, s, 4)).sum(axis=1)
    order = [row for row in np.argsort(-norms) if row != one.rows[0]]
    found = poison(net, train, test, np.arange(40), 0.8, counts=[1, 3], **options)
    assert found.rows.tolist() == [one.rows[0], *order[:2]]
    clean = np.argsort(-gradient_norms(net, train, test, np.arange(40)))
    # The attack ranks the rows again after each poison. It then chooses other rows than the first
    # ones of the ranking at the clean weights.
    assert found.rows.tolist() != clean[:3].tolist()


def test_restarts_begin_anywhere_in_the_box_and_the_best_is_kept(problem):
    net, train, test, oracle = problem
    rows = np.array([7, 30])
    still = {"step": 1e-9, "max_steps": 1, "decay": 1.0, "momentum": 0.0, "tries": 0}
    targets = check_targets(net, train, rows, 0.8, None, None)
    starts = [targets.anywhere([0, 1], seed) for seed in range(4)]
    for x in starts:
        assert (np.abs(x - train.x[rows]) <= 0.8).all() and np.abs(x - train.x[rows]).max() > 0.4
    other = check_targets(net, train, [30, 12], 0.8, None, None).anywhere([0], 3)
    # The random numbers of a row do not depend on the other rows in the call.
    np.testing.assert_array_equal(other, [starts[3][1], train.x[12]])
    changes = [by_refit(oracle, net, train, test, rows, x)[0] for x in starts]
    assert max(changes) > 0
    found = poison(net, train, test, rows, 0.8, rule=Rule(restarts=4, **still), options=TO_THE_END)
    assert found.change_if_poisoned[0] == pytest.approx(max(changes), abs=1e-7)
    assert set(found.num_poisons[1:]) == {2}


def test_a_row_that_flips_enough_is_better_than_one_that_does_more_on_average():
    state = lambda losses: SimpleNamespace(losses=np.array(losses))  # noqa: E731
    attack = SimpleNamespace(enough=lambda losses: np.count_nonzero(losses > 1) >= 2)
    enough, more = (_Attack._worth(attack, state(x)) for x in ([1.1, 1.1, 0], [9.0, 0.9, 0.9]))
    assert enough > more


# --- networks, images, trunks ---------------------------------------------------------------------


def test_a_network():
    net, train, test = attacked.network()
    test = test.take([0])
    options, rule = replace(TO_THE_END, fit=attacked.tight), Rule(tries=0, max_steps=1)
    found = poison(net, train, test, [2, 9], 0.1, counts=[1], rule=rule, options=options)
    before = net.losses(test.x, test.y)
    attacked.tight(net, replaced(train, found.rows, found.inputs))
    np.testing.assert_allclose(
        found.change_if_poisoned, net.losses(test.x, test.y) - before, rtol=1e-6
    )
    assert found.change_if_poisoned[0] > 0


@pytest.mark.parametrize(("levels", "same"), [(0.49, True), (0.6, False), (3.0, False)])
def test_bytes(levels, same):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 5))
    pixels[:, 0], pixels[:, 1] = 0, 255  # bounds limit the moves of these pixels
    train = Examples((pixels / 127.5 - 1).astype(np.float32), (pixels[:, 2] > 127).astype(int))
    net = attacked.BinaryLogisticRegression(5, weight_decay=0.1)
    net.fit(train)
    given = {"bounds": (-1, 1), "rule": PAPER_RULE, "options": TO_THE_END}
    found = poison(net, train, train.take([0]), [4, 6], levels / 127.5, **given)
    assert found.inputs.dtype == np.float32
    assert found.same_bytes is not None and found.same_bytes.tolist() == [same, same]
    again = np.rint(255 * (found.inputs.astype(float) + 1) / 2)
    assert (again == pixels[found.rows]).all() == same
    assert found.inputs.min() >= -1 and found.inputs.max() <= 1
    assert np.abs(127.5 * (found.inputs + 1) - pixels[found.rows]).max() == pytest.approx(
        levels, rel=1e-4
    )


def test_a_trunk_is_asked_for_the_candidates_alone():
    net, train, test, inputs = attacked.on_trunk()
    net.seen_inputs = 0
    rule = Rule(step=0.2, max_steps=4, **SIGNS)
    options = replace(TO_THE_END, inputs=inputs[ROWS])
    found = poison(net, train, test, ROWS, RADIUS, rule=rule, options=options)
    # The check of the arguments reads the inputs of the three candidate rows. So does each of five
    # states. No other row is read.
    assert net.seen_inputs == 3 + 5 * 3
    np.testing.assert_allclose(found.features, np.tanh(found.inputs @ net.A), atol=1e-15)
    net.fit(replaced(train, found.rows, found.features), gradient_tolerance=1e-12)
    np.testing.assert_allclose(found.theta, net.theta, atol=1e-9)
    assert found.change_if_poisoned.mean() > 0


def test_images_and_features_give_the_same():
    net, train, test, inputs = attacked.on_trunk()
    images = Examples(inputs, train.y)
    rule, options = Rule(max_steps=3, **SIGNS), replace(TO_THE_END, inputs=inputs[ROWS])
    one = poison(net, train, test, ROWS, RADIUS, rule=rule, options=options)
    assert np.abs(one.inputs - inputs[one.rows]).max() > RADIUS / 2
    for given in (options, TO_THE_END):  # the images move whether or not `inputs` is given
        other = poison(net, images, test, ROWS, RADIUS, rule=rule, options=given)
        np.testing.assert_array_equal(one.inputs, other.inputs)
        np.testing.assert_array_equal(one.change_if_poisoned, other.change_if_poisoned)
    norms = gradient_norms(net, train, test, ROWS, inputs=inputs[ROWS])
    np.testing.assert_array_equal(gradient_norms(net, images, test, ROWS), norms)


# --- the ranking ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [attacked.logistic, attacked.network])
def test_s_test_by_any_solver(make):
    net, train, test, *_ = make()
    I = np.eye(net.num_parameters)  # noqa: E741
    H = net.hvp(train.x, train.y, I) + net.penalty_hvp(I)
    expected = np.linalg.solve(H, net.gradient(test.x, test.y))
    for solver in (None, Direct(), CG(1e-12)):
        np.testing.assert_allclose(mean_s_test(net, train, test, solver), expected, rtol=1e-7)


# Each feature occurs twice, so only the penalty makes H definite. 1e-30 is lost in rounding.
@pytest.mark.parametrize("weight_decay", [0.0, 1e-30])
def test_a_singular_hessian_is_named(weight_decay):
    net, train, test, _ = attacked.logistic(weight_decay=0.02)
    flat = attacked.BinaryLogisticRegression(8, weight_decay=weight_decay)
    double = [Examples(np.c_[part.x, part.x], part.y) for part in (train, test)]
    with pytest.raises(DivergenceError, match="A must not be singular"):
        mean_s_test(flat, *double)


def test_norms_by_hand():
    net, train, test, oracle = attacked.logistic()
    rows, theta = np.array([7, 0, 12]), net.theta
    g_test = oracle.on(test.x, test.y).gradients(theta).mean(axis=0)
    s = np.linalg.solve(oracle.hessian(theta), g_test)
    g = oracle.on(train.x[rows], train.y[rows]).input_gradients(theta, s, 4)
    found = gradient_norms(net, train, test, rows)
    np.testing.assert_allclose(found, np.abs(g).sum(axis=1), rtol=1e-9)
    # Move one row to the best corner of a small box. The rise of the test loss is the row's norm,
    # times the half width of the box, over n.
    for row, size, step in zip(rows, found, -1e-3 * np.sign(g), strict=True):
        rise = refitted_loss(net, train, test, row, train.x[row] + step) - mean_loss(net, test)
        assert 1e-3 * size / len(train) == pytest.approx(rise, rel=1e-2)


def test_norms_through_a_trunk_are_by_the_inputs():
    net, train, test, inputs = attacked.on_trunk()
    rows = np.array([2, 31])
    found = gradient_norms(net, train, test, rows, inputs=inputs[rows])
    s = mean_s_test(net, train, test, CG(1e-12))
    g = net.input_gradient(inputs[rows], train.y[rows], s)
    np.testing.assert_allclose(found, np.abs(g).sum(axis=1), rtol=1e-6)
    # Without `inputs`, the norms are with respect to features.
    assert (found != gradient_norms(net, train, test, rows)).all()


# --- arguments that are refused -------------------------------------------------------------------


WHOLE, POSITIVE = "increasing whole numbers in", "must be a positive number"


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"net": "net"}, TypeError, "net must be a GenericNeuralNet, got str"),
        ({"train": (1, 2)}, TypeError, r"train must be Examples\(x, y\), got tuple"),
        ({"test": None}, TypeError, r"test must be Examples\(x, y\), got NoneType"),
        ({"rows": [1, 1]}, ValueError, "rows must name each row once, got 1 twice"),
        ({"counts": [0, 1]}, ValueError, rf"counts must be {WHOLE} \[1, 2\], got \[0, 1\]"),
        ({"counts": [1, 3]}, ValueError, rf"counts must be {WHOLE} \[1, 2\], got \[1, 3\]"),
        ({"counts": [2, 1]}, ValueError, rf"counts must be {WHOLE} \[1, 2\], got \[2, 1\]"),
        ({"counts": []}, ValueError, rf"counts must be {WHOLE} \[1, 2\], got \[\]"),
        ({"counts": [1.5]}, ValueError, rf"counts must be {WHOLE} \[1, 2\], got \[1.5\]"),
        ({"counts": [True]}, ValueError, rf"counts must be {WHOLE} \[1, 2\], got \[True\]"),
        ({"counts": 2}, ValueError, rf"counts must be {WHOLE} \[1, 2\], got 2"),
        ({"rule": "paper"}, TypeError, "rule must be a Rule such as .*, got 'paper'"),
        ({"options": {}}, TypeError, r"options must be PoisonOptions\(\.\.\.\), got {}"),
        ({"flip_at": np.nan}, ValueError, f"flip_at {POSITIVE}, got nan"),
        ({"flip_at": 0.0}, ValueError, f"flip_at {POSITIVE}, got 0.0"),
        ({"flip_at": [0.5]}, ValueError, rf"flip_at {POSITIVE}, got \[0.5\]"),
        ({"tolerance": -1e-8}, ValueError, f"tolerance {POSITIVE}, got -1e-08"),
        ({"flips": 4}, ValueError, r"flips must be a whole number in \[1, 3\], got 4"),
        ({"flips": 0}, ValueError, r"flips must be a whole number in \[1, 3\], got 0"),
        ({"flips": 1.5}, ValueError, r"flips must be a whole number in \[1, 3\], got 1.5"),
        ({"gradient_norms": np.ones(3)}, ValueError, r"gradient_norms must have shape \(2,\)"),
        ({"solver": 3}, TypeError, r"solver must be a solver such as CG\(\) or Direct\(\), got 3"),
        ({"solver": prepare(np.eye(4), Direct())}, TypeError, "solver must be a solver .* prepare"),
        ({"fit": 3}, TypeError, "fit must be a function of a net and a training set, got 3"),
        ({"start": np.zeros(3)}, ValueError, r"start must have shape \(4,\), got \(3,\)"),
        ({"start": np.full(4, np.nan)}, ValueError, "start must be finite, got a NaN or infinity"),
    ],
)
def test_wrong_arguments_are_refused_before_the_trunk_is_asked(changed, error, message):
    net, train, test, inputs = attacked.on_trunk()
    train, test = Examples(inputs, train.y), Examples(inputs[:3], train.y[:3])
    arguments = {"net": net, "train": train, "test": test, "rows": [1, 2], "radius": 0.1}
    options = {name: changed[name] for name in changed if hasattr(TO_THE_END, name)}
    net.seen_inputs = 0
    with pytest.raises(error, match=message):
        poison(
            **(
                arguments
                | {"options": PoisonOptions(**options)}
                | {name: changed[name] for name in changed if name not in options}
            )
        )
    assert net.seen_inputs <= 6  # only the check that examples fit the net has read inputs


def test_examples_that_do_not_fit_are_refused_before_the_trunk_is_asked():
    net, train, test, inputs = attacked.on_trunk()
    images, wrong = Examples(inputs, train.y), Examples(inputs, 7 * train.y + 1)
    for pair in ((wrong, test), (images, wrong)):
        net.seen_inputs = 0
        with pytest.raises(ValueError, match=r"(train|test)\.y must hold labels in \[0, 1\]"):
            poison(net, *pair, [1], 0.1)
        assert net.seen_inputs <= 6


def test_a_net_that_is_not_at_its_minimum_is_refused():
    net, train, test, inputs = attacked.on_trunk()
    arguments = (net, train, test, ROWS, RADIUS)
    options = PoisonOptions(inputs=inputs[ROWS])
    given = {"rule": Rule(max_steps=1, **SIGNS), "options": options}
    theta = net.theta
    net.theta = theta + 1e-5
    norm = net.gradient_norm(train)
    assert norm > 1e-7
    message = f"net must be at the minimum of its risk, got a gradient norm of {norm:.1e}, above"
    with pytest.raises(ValueError, match=message):
        poison(*arguments, **given)
    loose = given | {"options": replace(options, tolerance=2 * norm)}
    assert poison(*arguments, **loose).gradient_norm < 1e-8
    net.theta = theta
    assert poison(*arguments, **given).gradient_norm < 1e-8
