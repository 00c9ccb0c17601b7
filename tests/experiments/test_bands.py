"""Check that the bands of all claims equal a committed list, which gives a date for each band.

A band is chosen before the run that it judges. Whoever changes a band must also change this list,
so git shows both changes. The committed runs pass every check.
"""

import csv
import datetime
import re
from pathlib import Path

import pytest

import experiments
from experiments.harness import claims, report

BANDS = Path(__file__).parent / "bands.csv"
RESULTS = Path(__file__).resolve().parents[2] / "results"


def _number(value):
    return "" if value is None else f"{value:.9g}"


def claimed():
    """Return (experiment, metric, low, high) of every claim, sorted."""
    return sorted(
        (command, claim.metric, _number(claim.low), _number(claim.high))
        for command in experiments.summaries()
        for claim in experiments.load(command).CLAIMS
    )


def test_no_band_differs_from_the_committed_list():
    with BANDS.open(newline="", encoding="utf-8") as file:
        head, *rows = csv.reader(file)
    assert head == ["experiment", "metric", "low", "high", "set"]
    assert sorted(tuple(row[:4]) for row in rows) == claimed()
    for row in rows:
        datetime.date.fromisoformat(row[4])


def test_the_judged_claims_of_committed_records_are_the_present_ones():
    for folder, record in report.read_all(RESULTS):
        command, preset = experiments.present(record.experiment, record.preset)
        found = claims.judged(
            experiments.load(command), preset, record.metrics, stand_in=record.data["stand_in"]
        )
        known = [claim for claim in found if claim["metric"] in record.metrics]
        assert record.claims == known, f"{folder.name}: run `python -m experiments judge`"


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in RESULTS.glob("*/*.json")
                                          if path.name == "record.json"))  # fmt: skip
def test_committed_runs_pass_every_check(folder):
    record = report.Record.load(RESULTS / folder)
    command, preset = experiments.present(record.experiment, record.preset)
    module = experiments.load(command)
    assert claims.failed(module, preset, record.metrics) == []
    # FINDING refers to metrics in braces. Two names are those of the stand-in's networks, `small`
    # and `learnt`. The metrics of a real run have other names.
    said = module.FINDING.replace("_small}", "_mobilenet}").replace("learnt/relu2", "svm")
    told = re.findall(r"\{(.+?)\}", said)
    assert told and set(told) <= record.metrics.keys()


@pytest.mark.parametrize("command", list(experiments.summaries()))
def test_every_sentence_reads(command):
    module = experiments.load(command)
    assert module.CHECKS and module.FINDING and not module.FINDING.endswith(".")
    for claim in module.CLAIMS:
        assert claim.sentence[0].isupper() and not claim.sentence.endswith("."), claim.sentence
        assert set(getattr(module, "CONDITIONS", {})) <= set(module.PRESETS)
