from dataclasses import replace

import numpy as np

from benchmarks import networks, problem, table, targets
from benchmarks.__main__ import SMOKE


def test_every_question_is_timed_in_passes_and_an_audit_finds_wrong_labels():
    digits = problem.load("digits", None)
    shape = replace(SMOKE.perceptron, epochs=40, audited=1000, rounds=1)
    part = networks.run(digits, shape)
    assert part["d"] == 64 * 20 + 20 + 20 * 20 + 20 + 20 * 10 + 10
    names = {"prepare", "self_influence", "scores_of_1", "scores_of_10", "one_step_of_1"}
    assert set(part["passes"]) == names and min(part["passes"].values()) > 0
    audit = part["audit"]
    assert audit["num_wrong"] == 50
    for found in audit["recall"].values():
        # found[2] is the recall after a check of 20 % of the rows. A random order would have 0.2.
        assert (np.diff(found) >= 0).all() and found[2] > 0.7
    found = targets.metrics({"networks": part})
    assert found["audit_recall"] == audit["recall"]["self_influence"][1]
    assert f"{part['d']:,} weights" in table._networks({"networks": part})
