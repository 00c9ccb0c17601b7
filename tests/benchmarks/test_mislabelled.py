"""Tests of the benchmark that plants wrong labels: which labels it changes, and what it reports.

Its report says how many wrong labels each ranking finds, and which targets a case misses.
"""

import numpy as np
import pandas as pd
import pytest

from benchmarks.mislabelled import report
from benchmarks.mislabelled.__main__ import cases
from benchmarks.mislabelled.sets import planted
from influence.common import checkpoint


def test_planted_labels_are_wrong_and_confusable_ones_are_the_likeliest_others():
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = (np.array([0.0, 1.0, 9.0])[y] + 0.1 * rng.standard_normal(300)).astype(np.float32)[:, None]
    noisy, wrong = planted(y, x, 0.1, "uniform")
    assert wrong.sum() == 30 and set(np.unique(noisy)) == {0, 1, 2}
    noisy, wrong = planted(y, x, 0.1, "confusable")
    assert wrong.sum() == 30
    for label, other in ((0, 1), (1, 0), (2, 1)):
        assert set(noisy[wrong & (y == label)]) == {other}


def test_recall_is_the_share_of_wrong_labels_among_the_first_rows():
    wrong = np.array([1, 0, 1, 0, 0, 0, 0, 0, 0, 1], bool)
    values = np.arange(10.0)
    assert report.recall(values, wrong, 0.3, small_first=True) == pytest.approx(2 / 3)
    assert report.recall(values, wrong, 0.2, small_first=False) == pytest.approx(1 / 3)


def case(seed, alert=""):
    rng = np.random.default_rng(seed)
    wrong = np.arange(200) < 20
    found = {name: np.where(wrong, -1.0, 1) + rng.standard_normal(200) for name in
             ("margin", "history", "folds")}  # fmt: skip
    found |= {name: -found["margin"] for name in ("loss", "self_influence")}
    found |= {"wrong": wrong, "given": np.zeros(200, int), "alert": np.array(alert)}
    found |= {"ranking": np.array("margin"), "ranking_with_history": np.array("margin")}
    found |= {f"seconds_{name}": np.array(float(k + 1)) for k, name in
              enumerate(("audit", "history", "training", "folds", "self_influence"))}  # fmt: skip
    return found | {"accuracy": np.array(0.9), "test_accuracy": np.array(0.95)}


def test_the_page_states_misses(tmp_path):
    kept, out = tmp_path / "kept", tmp_path / "out"
    first, second = case(0), case(1, alert="memorised")
    for name, values in (("digits-uniform-10", first), ("mnist-confusable-20", second)):
        checkpoint.store(kept / f"{name}.npz", values)
        (kept / "cleanlab").mkdir(exist_ok=True)
        # With these scores, cleanlab ranks the wrong labels of the first set first, and those of
        # the second set last.
        by = np.where(first["wrong"], -1.0, 1.0) * (1 if "uniform" in name else -1)
        np.savez(kept / "cleanlab" / f"{name}.npz", self_confidence=by, normalized_margin=by)
    report.write(kept, out, 24)
    table = pd.read_csv(out / "audit.csv")
    assert table["cleanlab@10"].tolist() == [1.0, 0.0]
    assert table["target_recall"].tolist() == [False, True]
    assert table["target_time"].tolist() == [True, True]
    text = (out / "README.md").read_text()
    assert (
        "1 of 2" in text
        and "2 of 24 planned cases" in text
        and "| recall |" in text
        and (out / "audit.png").exists()
    )
    margin = report.recall(first["margin"], first["wrong"], 0.1, True)
    assert table["margin@10"][0] == pytest.approx(margin, abs=1e-3)


def test_two_classes_have_one_kind_of_wrong_labels():
    found = cases(["digits", "diabetes"])
    assert found[0] == ("digits", "uniform", 0.1)
    assert len(found) == 9 and sum(kind == "confusable" for _, kind, _ in found) == 3
