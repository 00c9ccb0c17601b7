"""Tests of removing groups of rows together, against exact refits."""

import json

import keras
import numpy as np
import pytest

from influence import QuestionOptions, verify_groups
from influence.tool.verify_groups import SEEDS, draw_groups
from tests import oracles
from tests.influence.tool.conftest import PENALTY, softmax_model

SEEN = []


def refit(model, x, y):
    """Set the weights to the exact minimum on the rows plus small noise from the global seed."""
    SEEN.append(len(y))
    risk = oracles.softmax_regression(oracles.with_ones(x.astype(float)), y, 3, PENALTY)
    theta = risk.minimum(np.zeros(15)) + 1e-3 * np.random.standard_normal(15)
    model.set_weights([theta[:12].reshape(4, 3), theta[12:]])


@pytest.fixture(scope="module")
def found(problem):
    model = softmax_model(problem.theta)
    return verify_groups(
        model, problem.train, problem.test, groups=6, group_size=3, fit=refit, rows=[2, 5]
    )


def test_actual_changes_are_those_of_refits_against_a_refit_of_all_rows(problem, found):
    assert found.by_seed.shape == (len(SEEDS), 2, 6)
    for k, seed in enumerate(SEEDS):
        losses = []
        for group in (None, *found.groups):
            np.random.seed(seed)
            risk = problem.risk if group is None else problem.risk.without(group)
            theta = risk.minimum(np.zeros(15)) + 1e-3 * np.random.standard_normal(15)
            losses.append(problem.measured.losses(theta)[[2, 5]])
        exact = (np.array(losses[1:]) - losses[0]).T
        np.testing.assert_allclose(found.by_seed[k], exact, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(found.actual, found.by_seed.mean(axis=0))


def test_half_of_the_groups_are_chosen_and_half_random(problem, found):
    scores = problem.risk.one_step_changes(problem.theta, problem.measured, np.arange(45))[[2, 5]]
    assert found.drawn == ["chosen"] * 3 + ["random"] * 3
    order = np.argsort(scores[0])
    np.testing.assert_array_equal(found.groups[0], np.sort(order[-3:]))
    np.testing.assert_array_equal(found.groups[1], np.sort(order[:3]))
    np.testing.assert_array_equal(found.groups[2], np.sort(np.argsort(scores[1])[-3:]))
    sums = np.stack([scores[:, group].sum(axis=1) for group in found.groups], axis=1)
    np.testing.assert_allclose(found.predicted, sums, rtol=1e-4, atol=1e-7)


def test_the_summary_says_what_holds_for_each_kind_of_group(found, tmp_path):
    text = " ".join(found.summary)
    assert "Groups with large scores: Pearson" in text and "Random groups: Pearson" in text
    numbers = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert set(numbers["agreement"]) == {"all", "chosen", "random"}
    x, y = found.by_seed
    assert numbers["seeds_agree"] == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    assert len(found.table()) == 12
    assert found.to_html(tmp_path / "g.html").read_text().count("random group ") == 6
    assert len(found.plot().axes[0].collections) == 2


def test_an_interrupted_run_goes_on_after_the_last_training(problem, found, tmp_path):
    options = QuestionOptions(check=False, checkpoints=tmp_path)
    how = {"groups": 6, "group_size": 3, "fit": refit, "rows": [2, 5], "options": options}
    first = verify_groups(problem.model, problem.train, problem.test, **how)
    SEEN.clear()
    second = verify_groups(problem.model, problem.train, problem.test, **how)
    assert SEEN == []
    np.testing.assert_array_equal(first.by_seed, second.by_seed)
    np.testing.assert_allclose(first.by_seed, found.by_seed, atol=1e-6)


def test_changes_by_chance_are_said(problem):
    def noise(model, x, y):
        rng = np.random.default_rng([np.random.randint(1000), int(1e4 * abs(x.sum()))])
        model.set_weights([rng.standard_normal(w.shape) for w in model.get_weights()])

    found = verify_groups(
        softmax_model(problem.theta), problem.train, problem.test, groups=8, group_size=2,
        fit=noise, options=QuestionOptions(check=False),
    )  # fmt: skip
    assert abs(found.repeats()) < 0.5
    assert any("Chance decides" in alert.headline for alert in found.alerts)


def test_more_groups_than_ends_take_the_next_rows():
    values = np.arange(12.0)[None]
    groups, how = draw_groups(values, 8, 3)
    assert [list(g) for g in groups[:4]] == [[9, 10, 11], [0, 1, 2], [6, 7, 8], [3, 4, 5]]
    assert how.count("random") == 4


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"groups": 3}, "groups must be at least 4, got 3"),
        ({"group_size": 23}, "group_size must be from 1 to 22, .* got 23"),
        ({"fit": None}, "fit must be given with groups"),
        ({"rows": [1], "wrong": 2}, "wrong must be left out"),
    ],
)
def test_wrong_arguments_are_named(problem, how, says):
    with pytest.raises(ValueError, match=says):
        verify_groups(problem.model, problem.train, **({"groups": 4, "fit": refit} | how))


def test_a_model_that_keras_cannot_clone_is_named(problem):
    class Own(keras.Model):
        def __init__(self, width):
            super().__init__()
            self.dense = keras.layers.Dense(width)

        def call(self, x):
            return self.dense(x)

    model = Own(3)
    model(problem.train[0])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    options = QuestionOptions(check=False)
    with pytest.raises(ValueError, match="model must be one that Keras can clone"):
        verify_groups(model, problem.train, groups=4, fit=refit, options=options)
