import numpy as np
import pytest

from influence.preflight.report import Line, Report

GOOD = Line("first", 0.5, "ok", "As it should be.")
DOUBTFUL = Line("second", 12345.6, "warn", "Perhaps.", "Look again.")
BAD = Line("third", np.nan, "fail", "This is wrong. " * 6, "Do that.")


@pytest.mark.parametrize(
    ("lines", "ok"),
    [((GOOD,), True), ((GOOD, DOUBTFUL), False), ((BAD, GOOD), False), ((GOOD, GOOD), True)],
)
def test_ok_is_every_line_ok(lines, ok):
    assert Report(lines).ok == ok


def test_lines_are_found_by_their_names():
    report = Report((GOOD, BAD))
    assert report["third"] is BAD and report["first"] is GOOD
    with pytest.raises(KeyError, match="name must be one of 'first', 'third', got 'fourth'"):
        report["fourth"]


def test_a_report_is_a_table():
    first, second, remedy, *third = str(Report((GOOD, DOUBTFUL, BAD))).splitlines()
    assert first == f"ok    {'first':<26} {'0.5':>9}  As it should be."
    assert second == f"warn  {'second':<26} {'1.23e+04':>9}  Perhaps."
    assert remedy == " " * 44 + "-> Look again."
    assert third[0].startswith(f"FAIL  {'third':<26} {'':>9}  This is wrong.")
    assert third[-1] == " " * 44 + "-> Do that." and max(map(len, third)) <= 100
    assert " ".join("".join(line[43:] for line in third[:-1]).split()) == BAD.meaning.strip()
