"""Tests of poisons against refits by scikit-learn, and of how unusual a poisoned row is.

A row is unusual if its loss ranks high or if it is far from the mean of its class.
"""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from experiments.fig5_attack import attacks, heads
from experiments.fig5_attack import figure as fig5
from influence.attack.poison import Rule

SMOKE = fig5.PRESETS["smoke"]


def refitted(x, y, weight_decay):
    """Return the weights of logistic regression, fitted by scikit-learn."""
    C = 1 / (len(y) * weight_decay)
    model = LogisticRegression(C=C, fit_intercept=False, tol=1e-10, max_iter=10_000)
    return model.fit(x, y).coef_[0]


def test_a_poison_does_what_is_said_of_it(head):
    point = heads.right(SMOKE, head)[0]
    test = head.test.take([point])
    rows, norms = attacks.ranked(head, test, 16)
    assert (np.diff(norms) <= 0).all() and len(set(rows)) == 16
    found = head.attacked(test, rows[:10], rule=Rule(max_steps=3, tries=0), flip_at=np.inf)
    # The next lines repeat the attack step by step: the bytes of the pixels, the trunk's features,
    # and the weights by scikit-learn.
    levels = np.rint(127.5 * (found.inputs.astype(float) + 1))
    np.testing.assert_array_equal(levels, head.images[found.rows])
    x = np.array(head.train.x)
    x[found.rows] = head.net.features(found.inputs)
    theta = refitted(x, head.train.y, SMOKE.weight_decays[0])
    sign = 2 * test.y[0] - 1
    loss = np.logaddexp(0, -sign * (test.x[0] @ theta))
    before = head.net.losses(test.x, test.y)[0]
    assert found.change_if_poisoned[0] == pytest.approx(loss - before, rel=1e-3)
    assert found.change_if_poisoned[0] > 0


def test_ranking_is_that_of_all_rows(head):
    test = head.test.take([heads.right(SMOKE, head)[1]])
    every, norms = attacks.ranked(head, test, len(head.train))
    some, _ = attacks.ranked(head, test, 64)
    assert sorted(every) == list(range(len(head.train)))
    assert some[:5].tolist() == every[:5].tolist()
    assert norms[0] > norms[-1]


def test_standing(head):
    test = head.test.take([heads.right(SMOKE, head)[0]])
    row = int(np.argmax(head.net.losses(head.train.x, head.train.y)))
    rule = Rule(max_steps=1, tries=0)
    found = head.attacked(test, np.array([row]), rule=rule, flip_at=np.inf)
    before = head.net.theta
    where = attacks.standing(head, found)
    np.testing.assert_array_equal(head.net.theta, before)
    assert where.shape == (1, 3, 2)
    # The poisoned row has the largest loss, so an inspection by loss checks no image before it.
    assert where[0, attacks.SIGNS.index("loss"), 0] == 0
    means = [head.train.x[head.train.y == c].mean(axis=0) for c in (0, 1)]
    far = [np.linalg.norm(x - means[y]) for x, y in zip(head.train.x, head.train.y, strict=True)]
    assert where[0, 2, 0] == np.sum(np.array(far) > far[row]) / len(far)
    moved = np.linalg.norm(found.features[0] - means[head.train.y[row]])
    assert where[0, 2, 1] == pytest.approx(np.mean(np.delete(far, row) > moved), abs=1 / len(far))


def test_geometry(head, monkeypatch):
    monkeypatch.setattr(attacks, "_COMPONENTS", 20)
    test = head.test.take([heads.right(SMOKE, head)[0]])
    found = head.attacked(test, np.array([7]), rule=Rule(max_steps=1, tries=0), flip_at=np.inf)
    facts = attacks.geometry(head, found)
    assert 0 < facts["levels_moved"] <= 0.49 * (1 + 1e-4)
    shift = found.features[0] - head.train.x[7]
    assert facts["features_moved"] == pytest.approx(np.linalg.norm(shift), rel=1e-9)
    own = head.train.x[head.train.y == head.train.y[7]].mean(axis=0)
    assert facts["to_own_before"] == pytest.approx(np.linalg.norm(head.train.x[7] - own))
    parts = facts["moved_in_components"] ** 2 + facts["moved_outside_components"] ** 2
    assert parts == pytest.approx(facts["features_moved"] ** 2, rel=1e-6)


def test_a_refit_that_disagrees_is_not_confirmed(head, monkeypatch):
    attacked = heads.Head.attacked

    def other(self, *arguments, **options):
        found = attacked(self, *arguments, **options)
        return dataclasses.replace(found, flipped=~found.flipped)

    monkeypatch.setattr(heads.Head, "attacked", other)
    rule = Rule(max_steps=1, tries=0, restarts=0)
    point = heads.right(SMOKE, head)[0]
    found = attacks.single(head, point, counts=(1, 2), candidates=8, paper=rule, best=rule)
    assert not found["confirmed"]
    found = attacks.group(
        head, heads.alike(SMOKE, head), counts=(1,), candidates=8, one=rule, many=rule
    )
    assert not found["all_confirmed"]
