"""Tests of heads on a trunk's features.

They cover the group of similar test images, standardised features, and the choice among heads.
"""

import dataclasses

import numpy as np
import pytest

from experiments.fig5_attack import figure as fig5
from experiments.fig5_attack import heads
from influence import Examples

SMOKE = fig5.PRESETS["smoke"]


def test_the_group_is_of_one_class_and_near(head):
    points = heads.alike(SMOKE, head)
    assert len(points) == 6 and points[0] == heads.right(SMOKE, head)[0]
    assert len(set(head.test.y[points])) == 1
    far = np.linalg.norm(head.test.x - head.test.x[points[0]], axis=1)
    right = head.net.losses(head.test.x, head.test.y) < np.log(2)
    others = np.setdiff1d(np.flatnonzero((head.test.y == head.test.y[points[0]]) & right), points)
    assert far[points].max() <= far[others].min()


def test_standardised_features_are_those_the_head_sees(splits):
    config = dataclasses.replace(SMOKE, standardised=(True,))
    head, about = heads.fitted(config, 0, splits, None)
    np.testing.assert_allclose(head.train.x.mean(axis=0), 0, atol=1e-9)
    deviation = head.train.x.std(axis=0)
    assert np.isclose(deviation, 1).sum() + np.isclose(deviation, 0).sum() == len(deviation)
    images = head.net.features(splits.test[0][:5])
    np.testing.assert_allclose(images, head.test.x[:5], atol=1e-4)
    assert about["test_accuracy"] == head.accuracy(head.test) > 0.6


def test_who_is_wrong_before_is_not_in_the_group(head):
    points = heads.alike(SMOKE, head)
    x = np.array(head.test.x)
    # Move the image along theta, just across the decision boundary. Its features are as near to the
    # group as before, but the head now classifies the image wrongly.
    theta = head.net.theta
    x[points[1]] -= (1 + 1e-3) * (x[points[1]] @ theta) / (theta @ theta) * theta
    wrong = dataclasses.replace(head, test=Examples(x, head.test.y))
    assert head.net.losses(x, head.test.y)[points[1]] > np.log(2)
    assert points[1] not in heads.alike(SMOKE, wrong)
    assert len(heads.alike(SMOKE, wrong)) == 6


def test_heads_are_chosen_by_held_out_training_images(splits, head, tmp_path):
    found = heads.heads_of("small", splits, seed=0, folder=None, checkpoints=tmp_path)
    assert found["held_out_accuracy"].shape == (2, len(heads.WEIGHT_DECAYS))
    i, j = 1, heads.WEIGHT_DECAYS.index(SMOKE.weight_decays[0])
    assert found["held_out_accuracy"][i, j] == heads.held_out_accuracy(head.net, head.train, 0)
    losses = head.net.losses(head.train.x, head.train.y)
    assert found["training_loss"][i, j] == pytest.approx(losses.mean(), rel=1e-6)
    assert found["training_accuracy"][i, j] == head.accuracy(head.train)
    again = heads.heads_of("small", splits, seed=0, folder=None, checkpoints=tmp_path)
    np.testing.assert_array_equal(again["training_loss"], found["training_loss"])


@pytest.mark.parametrize(
    ("accuracy", "loss", "best"),
    [
        ([[0.985, 0.986], [0.99, 0.95]], [[0.02, 0.005], [0.004, 0.004]], ("a", 1e-3)),
        ([[0.90, 0.91], [0.93, 0.95]], [[0.004, 0.004], [0.004, 0.1]], ("b", 1e-3)),
    ],
)
def test_the_rule_of_choice(accuracy, loss, best):
    found = {"layers": np.array(["a", "b"], "S"), "weight_decays": np.array([1e-2, 1e-3]),
             "held_out_accuracy": np.array(accuracy), "training_loss": np.array(loss)}  # fmt: skip
    assert heads.chosen(found, 1800) == best
