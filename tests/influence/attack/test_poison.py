"""Poisoning: against exact refits, every corner of the box, and the release's rule by hand."""

from itertools import product

import numpy as np
import pytest

from influence.attack.poison import Rule, poison
from influence.attack.targets import gradient_norms
from tests.influence.attack import attacked
from tests.influence.attack.attacked import RADIUS, by_refit, replaced

SIGNS = {"decay": 1.0, "momentum": 0.0, "softness": 0.0, "tries": 0, "restarts": 0}
ONE_STEP = Rule(step=0.5, max_steps=1, **SIGNS)


@pytest.fixture(scope="module")
def problem():
    net, train, test, oracle = attacked.logistic()
    return net, train, test.take([0]), oracle


def test_the_change_is_that_of_an_exact_refit(problem):
    net, train, _, oracle = problem
    test = attacked.logistic()[2]
    theta = net.theta
    found = poison(net, train, test, np.arange(40), RADIUS, counts=[3], flip_at=np.inf)
    expected = by_refit(oracle, net, train, test, found.rows, found.inputs)
    np.testing.assert_allclose(found.change_if_poisoned, expected, atol=1e-9)
    assert found.change_if_poisoned.mean() > 0.01
    assert np.abs(found.inputs - train.x[found.rows]).max() <= RADIUS * (1 + 1e-12)
    assert len(set(found.rows)) == 3
    np.testing.assert_array_equal(found.features, found.inputs)
    # The warm refits end where the cold one does; what is returned is the best of them.
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
    found = poison(net, train, test, rows, 0.8, counts=[1], rule=rule, flip_at=np.inf)
    assert found.change_if_poisoned[0] >= 0.99 * best
    # By its gradient at the clean weights alone another row seems best.
    alone = Rule(max_steps=12, tries=0)
    other = poison(net, train, test, rows, 0.8, counts=[1], rule=alone, flip_at=np.inf)
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


def test_the_second_step_is_taken_at_the_refitted_weights(problem):
    net, train, test, oracle = problem
    row, rule = [11], Rule(step=0.1, max_steps=2, **SIGNS)
    x, theta = train.x[row].copy(), net.theta
    for _ in range(2):
        risk = oracle.on(replaced(train, row, x).x, train.y)
        g_test = oracle.on(test.x, test.y).gradients(theta)[0]
        s = np.linalg.solve(risk.hessian(theta), g_test)
        g = oracle.on(x, train.y[row]).input_gradients(theta, s, 4)
        x = x - 0.1 * RADIUS * np.sign(g)
        theta = oracle.on(replaced(train, row, x).x, train.y).minimum(theta)
    found = poison(net, train, test, row, RADIUS, rule=rule, flip_at=np.inf)
    np.testing.assert_allclose(found.inputs, x, atol=1e-12)
    np.testing.assert_allclose(found.theta, theta, atol=1e-9)


def test_velocity_and_decay_by_hand(problem):
    net, train, test, oracle = problem
    rule = Rule(step=0.2, decay=0.5, momentum=0.7, softness=2.0, max_steps=3, tries=0)
    x, theta, v = train.x[[11]].copy(), net.theta, 0
    for t in range(3):
        risk = oracle.on(replaced(train, [11], x).x, train.y)
        s = np.linalg.solve(risk.hessian(theta), oracle.on(test.x, test.y).gradients(theta)[0])
        g = oracle.on(x, train.y[[11]]).input_gradients(theta, s, 4)
        v = 0.7 * v + g / np.abs(g).mean()
        x = x - 0.2 * 0.5**t * RADIUS * np.clip(v / (2 * np.abs(v).mean()), -1, 1)
        theta = oracle.on(replaced(train, [11], x).x, train.y).minimum(theta)
    found = poison(net, train, test, [11], RADIUS, rule=rule, flip_at=np.inf)
    assert len(found.test_losses) == 4
    np.testing.assert_allclose(found.inputs, x, atol=1e-11)


def test_it_ends_with_enough_flips(problem):
    net, train, _, _ = problem
    test = attacked.logistic()[2]
    arguments = (net, train, test, np.arange(40), RADIUS)
    rule = Rule(tries=0)
    every = poison(*arguments, counts=[1, 3], rule=rule, flip_at=np.inf)
    clean = every.test_losses[0]
    first_of_three = int(np.argmax(every.num_poisons == 3))
    # What one poison never reaches and three do not at once.
    with_one = every.test_losses[:first_of_three].max(axis=0)
    point = int(np.argmax(every.test_losses[-1] - with_one))
    flip_at = (with_one[point] + every.test_losses[-1][point]) / 2
    alone = test.take([point])
    found = poison(net, train, alone, np.arange(40), RADIUS, counts=[1, 3], rule=rule,
                   flip_at=float(flip_at))  # fmt: skip
    assert clean[point] < flip_at
    assert found.flipped.tolist() == [True]
    assert (found.test_losses[:-1] <= flip_at).all() and found.test_losses[-1, 0] > flip_at
    np.testing.assert_allclose(
        found.change_if_poisoned, found.test_losses[-1] - clean[point], atol=1e-9
    )
    # One of three test examples is enough if so few are asked for.
    low = float(np.sort(clean)[-1]) + 1e-3
    one = poison(*arguments, counts=[1, 3], rule=rule, flip_at=low, flips=1)
    assert one.flipped.sum() >= 1 and len(one.test_losses) < len(every.test_losses)
    assert (one.test_losses[:-1] <= low).all()


def test_a_try_that_flips_ends_the_tries(problem):
    net, train, test, _ = problem
    fits = []

    def fit(net, examples):
        fits.append(1)
        net.fit(examples)

    rule, flip_at = Rule(tries=10, max_steps=3), float(net.losses(test.x, test.y)[0]) + 1e-6
    found = poison(net, train, test, np.arange(40), RADIUS, counts=[1, 2], rule=rule,
                   flip_at=flip_at, fit=fit)  # fmt: skip
    assert found.flipped.all() and len(found.rows) == 1
    assert len(fits) == 2  # the first move, and the refit that confirms it


def test_tries_choose_by_what_was_attained(problem):
    net, train, test, oracle = problem
    rule = Rule(tries=6, max_steps=4)
    norms = gradient_norms(net, train, test, np.arange(40))
    tried = np.argsort(-norms)[:6]
    alone = [
        poison(net, train, test, [row], RADIUS, rule=Rule(tries=0, max_steps=4), flip_at=np.inf)
        for row in tried
    ]
    changes = np.array([one.change_if_poisoned[0] for one in alone])
    best = np.argsort(-changes)
    one = poison(net, train, test, np.arange(40), RADIUS, counts=[1], rule=rule, flip_at=np.inf)
    assert one.rows.tolist() == [tried[best[0]]]
    np.testing.assert_allclose(one.change_if_poisoned[0], changes[best[0]], rtol=1e-9)
    two = poison(net, train, test, np.arange(40), RADIUS, counts=[2], rule=rule, flip_at=np.inf)
    assert two.rows.tolist() == tried[best[:2]].tolist()
    assert best.tolist() != list(range(6))  # not the order of the norms
    # They go on from where each alone has come to.
    x = np.concatenate([alone[i].inputs for i in best[:2]])
    together = by_refit(oracle, net, train, test, two.rows, x)[0]
    np.testing.assert_allclose(two.test_losses[1, 0] - two.test_losses[0, 0], together, atol=1e-9)
    assert two.change_if_poisoned[0] >= together - 1e-9


def test_rows_tried_alone_go_on_together_with_smaller_steps(problem):
    net, train, test, oracle = problem
    rule, rows = Rule(tries=2, max_steps=2, decay=0.5, softness=0.0), np.array([11, 30])
    alone = [
        poison(net, train, test, [row], RADIUS, rule=Rule(tries=0, max_steps=2, decay=0.5,
                                                          softness=0.0), flip_at=np.inf)
        for row in rows
    ]  # fmt: skip
    found = poison(net, train, test, rows, RADIUS, rule=rule, flip_at=np.inf)
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
    x = np.clip(x - 0.5 * RADIUS * np.sign(g), *box)  # step decay^1, not step
    theta = oracle.on(replaced(train, rows, x).x, train.y).minimum(theta)
    losses.append(measured.losses(theta)[0])
    assert losses[1] > losses[0]  # so that both are on the way to the best
    np.testing.assert_allclose(found.test_losses[1:3, 0], losses, atol=1e-9)


def test_what_comes_back_is_the_best_that_was_seen(problem):
    net, train, test, _ = problem
    moves = []

    def fit(net, examples):  # worse and worse after the second move
        moves.append(examples.x[5].copy())
        net.theta = net.theta * (0.9 if len(moves) < 3 else 1.2)

    start, rule = net.theta, Rule(tries=0, max_steps=5)
    found = poison(net, train, test, [5], RADIUS, rule=rule, fit=fit, flip_at=np.inf, start=start)
    assert len(moves) == 6  # five moves, and the refit that confirms
    np.testing.assert_array_equal(found.inputs[0], moves[1])
    np.testing.assert_array_equal(moves[5], moves[1])
    assert len(found.test_losses) == 3
    np.testing.assert_allclose(found.theta, 1.2 * start)  # it began at `start`


def test_candidates_in_any_order(problem):
    net, train, test, _ = problem
    order = np.random.default_rng(3).permutation(40)
    one = poison(net, train, test, np.arange(40), RADIUS, counts=[2], flip_at=np.inf)
    other = poison(net, train, test, order, RADIUS, counts=[2], flip_at=np.inf)
    assert one.rows.tolist() == other.rows.tolist()
    np.testing.assert_allclose(one.change_if_poisoned, other.change_if_poisoned, rtol=1e-9)


@pytest.mark.parametrize("rule", [Rule(tries=3, max_steps=2), ONE_STEP])
def test_norms_that_are_known_are_not_computed_again(problem, rule):
    net, train, test, _ = problem
    rows = np.arange(10)
    norms = gradient_norms(net, train, test, rows)
    arguments = {"counts": [2], "rule": rule, "flip_at": np.inf}
    one = poison(net, train, test, rows, RADIUS, gradient_norms=norms, **arguments)
    other = poison(net, train, test, rows, RADIUS, **arguments)
    np.testing.assert_array_equal(one.inputs, other.inputs)
    turned = poison(net, train, test, rows, RADIUS, gradient_norms=-norms, **arguments)
    assert turned.rows.tolist() != other.rows.tolist()
