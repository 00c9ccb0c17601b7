"""Tests of rankings of wrong labels, the rule that chooses one, and confident learning."""

from types import SimpleNamespace

import numpy as np
import pytest

from influence.tool.alerts import Alert
from influence.tool.mislabelled import choose, confident, of_memory, order_of

ALERT = Alert("care", "memorised")


def test_small_margins_and_large_losses_come_first():
    values = np.array([0.5, -2.0, np.nan, 1.0])
    assert order_of(values, "margin").tolist() == [1, 0, 3, 2]
    assert order_of(values, "history").tolist() == [1, 0, 3, 2]
    assert order_of(values, "loss").tolist() == [3, 0, 1, 2]
    assert order_of(values, "self_influence").tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize(
    ("known", "memorised", "ranking", "alerts"),
    [
        ("loss margin", None, "margin", 0),
        ("loss margin history", None, "margin", 0),
        ("loss margin", ALERT, "margin", 1),
        ("loss margin history", ALERT, "history", 1),
        ("loss margin history folds", ALERT, "folds", 0),
        ("loss history", None, "history", 0),
        ("loss", None, "loss", 1),
    ],
)
def test_the_rule(known, memorised, ranking, alerts):
    values = {name: np.zeros(1) for name in known.split()}
    found = choose("auto", values, memorised, "of a reason")
    assert found.ranking == ranking and len(found.alerts) == alerts


def test_a_ranking_that_was_asked_for_is_taken():
    assert choose("loss", {"loss": np.zeros(1), "margin": np.zeros(1)}, ALERT).ranking == "loss"
    assert choose("margin", {"margin": np.zeros(1)}, ALERT).alerts == (ALERT,)


def last(own, held_out):
    return SimpleNamespace(least=(np.asarray(own, float), held_out))


def test_the_alert_compares_leave_one_out_with_held_out_losses():
    low, high = np.full(100, 0.1), np.full(400, 0.21)
    assert "has memorised" in of_memory(last(low, high), 0.5).headline
    assert of_memory(last(low, np.full(400, 0.19)), 1.0) is None
    # Two held-out rows have the loss 42, and all others 0. The mean, 0.21, is more than twice the
    # leave-one-out loss, 0.1. But the difference is less than two standard errors: no alert.
    noisy = np.zeros(400)
    noisy[:2] = 42.0
    assert noisy.mean() > 0.2 and noisy.mean() - 2 * noisy.std() / 20 < 0.1
    assert of_memory(last(low, noisy), 1.0) is None


def test_without_held_out_rows_a_network_that_reproduces_its_labels_is_doubted():
    assert "may have memorised" in of_memory(last([0.1], None), 0.992).headline
    assert of_memory(last([0.1], None), 0.98) is None
    assert of_memory(last([0.1], None), None) is None


def test_confident_learning_is_that_of_the_paper():
    p = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.7, 0.1], [0.3, 0.5, 0.2],
                  [0.1, 0.8, 0.1], [0.0, 0.6, 0.4]])  # fmt: skip
    given = np.array([0, 0, 0, 1, 1, 1])
    found = confident(p, given)
    t0, t1 = (0.9 + 0.6 + 0.2) / 3, (0.5 + 0.8 + 0.6) / 3
    np.testing.assert_allclose(found.thresholds[:2], [t0, t1])
    assert np.isnan(found.thresholds[2])
    # Row 2 reaches the threshold of class 1. Row 3 reaches no threshold and keeps its label.
    assert found.suggested.tolist() == [0, 0, 1, 1, 1, 1]
