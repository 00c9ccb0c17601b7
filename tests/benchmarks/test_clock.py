import time

import pytest

from benchmarks import clock, machine


def test_tasks_take_turns_after_one_warm_up_each():
    calls = []
    times = clock.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert "".join(calls) == "ab" * 4
    assert times["a"].rounds == 3
    assert 0 <= times["a"].best <= times["a"].median


def test_the_longer_task_takes_longer():
    times = clock.in_turns({"long": lambda: time.sleep(0.02), "short": lambda: None}, 2)
    assert times["long"].best >= 0.02 > times["short"].best


def test_no_round_is_refused():
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        clock.in_turns({}, 0)


def test_own_work_is_not_that_of_others(monkeypatch):
    # All processes together used 3 s of processor time. This process used 2 s of them.
    monkeypatch.setattr(clock, "_busy", iter([10.0, 13.0]).__next__)
    monkeypatch.setattr(clock, "_own", iter([1.0, 3.0]).__next__)
    monkeypatch.setattr(clock.time, "perf_counter", iter([0.0, 2.0]).__next__)
    with clock.watched() as seen:
        pass
    assert seen["seconds"] == 2.0
    assert seen["cores_used_by_others"] == 0.5


def test_without_proc_others_are_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(clock, "_STAT", tmp_path / "none")
    monkeypatch.setattr(machine, "_SAMPLE_SECONDS", 0.01)
    seen = machine.wait_until_quiet(1)
    assert seen["cores_used_by_others"] is None
    assert seen["quiet"] is None


def test_waiting_ends(monkeypatch, capsys):
    monkeypatch.setattr(machine, "_SAMPLE_SECONDS", 0.01)
    monkeypatch.setattr(machine, "QUIET", -1.0)  # with this limit no machine counts as quiet
    assert machine.wait_until_quiet(0.001)["quiet"] is False
    assert "waiting for a quiet machine" in capsys.readouterr().out


def test_facts_name_the_machine_but_no_path():
    facts = machine.facts()
    assert facts["cores"] >= 1
    assert facts["cpu"]
    assert any("openblas" in library for library in facts["blas"])
    assert "/" not in str(facts["blas"])
