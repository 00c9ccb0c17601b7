"""Poisoning's search: rows ranked again, restarts, and what makes one outcome the better."""

from types import SimpleNamespace

import numpy as np
import pytest

from influence.attack.poison import Rule, _Attack, poison
from influence.attack.targets import check_targets, gradient_norms
from tests.influence.attack import attacked
from tests.influence.attack.attacked import by_refit, replaced


@pytest.fixture(scope="module")
def problem():
    net, train, test, oracle = attacked.logistic()
    return net, train, test.take([0]), oracle


def test_more_poisons_are_ranked_at_the_weights_reached(problem):
    net, train, test, oracle = problem
    rule = Rule(max_steps=4, tries=1, restarts=0)
    options = {"rule": rule, "flip_at": np.inf}
    one = poison(net, train, test, np.arange(40), 0.8, counts=[1], **options)
    risk = oracle.on(replaced(train, one.rows, one.inputs).x, train.y)
    theta = risk.minimum(net.theta)
    s = np.linalg.solve(risk.hessian(theta), oracle.on(test.x, test.y).gradients(theta)[0])
    norms = np.abs(oracle.input_gradients(theta, s, 4)).sum(axis=1)
    order = [row for row in np.argsort(-norms) if row != one.rows[0]]
    found = poison(net, train, test, np.arange(40), 0.8, counts=[1, 3], **options)
    assert found.rows.tolist() == [one.rows[0], *order[:2]]
    clean = np.argsort(-gradient_norms(net, train, test, np.arange(40)))
    assert found.rows.tolist() != clean[:3].tolist()  # so that it was not for nothing


def test_restarts_begin_anywhere_in_the_box_and_the_best_is_kept(problem):
    net, train, test, oracle = problem
    rows = np.array([7, 30])
    still = {"step": 1e-9, "max_steps": 1, "decay": 1.0, "momentum": 0.0, "tries": 0}
    targets = check_targets(net, train, rows, 0.8, None, None)
    starts = [targets.anywhere([0, 1], seed) for seed in range(4)]
    for x in starts:
        assert (np.abs(x - train.x[rows]) <= 0.8).all() and np.abs(x - train.x[rows]).max() > 0.4
    other = check_targets(net, train, [30, 12], 0.8, None, None).anywhere([0], 3)
    np.testing.assert_array_equal(other, [starts[3][1], train.x[12]])  # a row's own draw
    changes = [by_refit(oracle, net, train, test, rows, x)[0] for x in starts]
    assert max(changes) > 0
    found = poison(net, train, test, rows, 0.8, rule=Rule(restarts=4, **still), flip_at=np.inf)
    assert found.change_if_poisoned[0] == pytest.approx(max(changes), abs=1e-7)
    assert set(found.num_poisons[1:]) == {2}


def test_a_row_that_flips_enough_is_better_than_one_that_does_more_on_average():
    state = lambda losses: SimpleNamespace(losses=np.array(losses))  # noqa: E731
    attack = SimpleNamespace(enough=lambda losses: np.count_nonzero(losses > 1) >= 2)
    enough, more = (_Attack._worth(attack, state(x)) for x in ([1.1, 1.1, 0], [9.0, 0.9, 0.9]))
    assert enough > more
