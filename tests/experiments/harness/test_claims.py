"""Tests of claims, which have five verdicts by their bands, and of checks, which pass or fail."""

import math
from types import SimpleNamespace

import pytest

from experiments.harness import claims
from experiments.harness.claims import RELEASED, Check, Claim, Published, Sample

FIGURE = Published("figure 9", 0.86)


@pytest.mark.parametrize(
    ("low", "high", "value", "holds"),
    [
        (0.9, 1.0, 0.95, True),
        (0.9, 1.0, 0.9, True),  # the bounds belong to the band
        (0.9, 1.0, 1.0, True),
        (0.9, 1.0, 0.89, False),
        (0.9, 1.0, 1.01, False),
        (None, 1e-6, -5.0, True),
        (0.9, None, 1e9, True),
        (0.9, 1.0, math.nan, False),
        (None, None, math.nan, False),
        (0.9, None, math.inf, False),  # an infinite value never holds
    ],
)
def test_a_metric_holds_within_its_band(low, high, value, holds):
    judged = Claim("r", "words", None, low, high).judge({"r": value})
    assert judged["holds"] is holds
    assert judged["value"] == (value if math.isfinite(value) else None)
    assert Check("r", low, high).passes({"r": value}) is holds


def test_all_of_a_verdict():
    claim = Claim("r", "Correlation", Published("table 1", 0.5, 0.2, RELEASED), headline="r")
    assert claim.judge({"r": 0.6}) == {
        "metric": "r", "sentence": "Correlation", "paper": 0.5, "words": "", "source": "table 1",
        "kind": "released artefact", "low": 0.3, "high": 0.7, "value": 0.6, "interval": [],
        "holds": True, "verdict": "reproduced", "headline": "r",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("published", "value", "conditions", "verdict"),
    [
        (FIGURE, 0.9, "", "reproduced"),
        (FIGURE, 0.9, "shortened", "reproduced, shortened"),
        (FIGURE, 0.9, "stand-in", "reproduced on a stand-in"),
        (FIGURE, 0.95, "", "not reproduced"),  # .95 is above the band, which ends at .946
        (FIGURE, 0.77, "shortened", "not reproduced"),
        (FIGURE, math.nan, "stand-in", "not reproduced"),
        (None, 0.9, "", "not comparable"),
        (None, 0.1, "", "not comparable"),
    ],
)
def test_the_five_verdicts(published, value, conditions, verdict):
    band = (None, None) if published else (0.8, 1.0)
    claim = Claim("r", "words", published, *band)
    assert claim.judge({"r": value}, conditions=conditions)["verdict"] == verdict


def test_nothing_is_compared_on_a_stand_in():
    judged = Claim("r", "words", FIGURE).judge({"r": 0.0}, stand_in=True)
    assert (judged["holds"], judged["verdict"]) == (None, "not comparable")


def test_a_missing_metric_is_not_reproduced():
    judged = Claim("r", "words", FIGURE).judge({})
    assert (judged["value"], judged["holds"], judged["verdict"]) == (None, False, "not reproduced")


def test_the_band_is_the_papers_uncertainty_or_a_tenth():
    claim = Claim("r", "words", Published("1", -150.0))
    assert (claim.low, claim.high) == (-165, -135)
    claim = Claim("r", "words", Published("1", 13, 3))
    assert (claim.low, claim.high) == (10, 16)
    # The default band would be .95 +- 10 %. A claim may give a narrower band, here [.93, 1].
    claim = Claim("r", "words", Published("1", 0.95), 0.93, 1.0)
    assert (claim.low, claim.high) == (0.93, 1.0)
    with pytest.raises(ValueError, match=r"low of r must lie within the tolerance .* got 0\.6"):
        Claim("r", "words", FIGURE, 0.6, 0.9)


def _tail(share, least, size):
    """Return the probability of at least `least` successes in `size` trials."""
    return sum(
        math.comb(size, k) * share**k * (1 - share) ** (size - k) for k in range(least, size + 1)
    )


# The interval [low, high] of Clopper and Pearson is for the true share. If the share is `low`, a
# count of at least the observed one has probability 2.5 %. If the share is `high`, a count of at
# most the observed one has this probability.
@pytest.mark.parametrize("count", [0, 1, 30, 59, 60])
def test_the_interval_of_a_share_is_clopper_and_pearsons(count):
    for size in (60, "trials"):
        low, high = Sample("share", size).interval(count / 60, {"trials": 60})
        assert _tail(low, count, 60) == pytest.approx(0.025 if count else 1, rel=1e-6)
        upper = 1 - _tail(high, count + 1, 60)
        assert upper == pytest.approx(0.025 if count < 60 else 1, rel=1e-6)
    assert Sample("share", "trials").interval(count / 60, {}) is None


def test_the_interval_of_a_correlation():
    found = Sample("correlation", 100).interval(0.853, {})
    assert found == pytest.approx([0.789, 0.899], abs=1e-3)  # from Fisher's z transformation
    assert Sample("correlation", 100).interval(1.0, {}) is None


def test_an_interval_holds_where_it_meets_the_band():
    claim = Claim("share", "words", Published("1", 0.567, 0.041), sample=Sample("share", 60))
    # The band is .567 +- .041. The first interval, [.37, .63], overlaps it. The second one, [.11,
    # .32], does not.
    judged = claim.judge({"share": 0.5})
    assert judged["holds"] and judged["interval"][1] == pytest.approx(0.632, abs=1e-3)
    assert not claim.judge({"share": 0.2})["holds"]


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.9), (math.nan, 1.0), (0.0, math.nan)])
def test_a_band_must_not_be_empty(low, high):
    for make in (lambda: Claim("r", "words", None, low, high), lambda: Check("r", low, high)):
        with pytest.raises(ValueError, match="low must not exceed high"):
            make()


def test_a_published_result_has_a_kind_and_a_value_or_words():
    with pytest.raises(ValueError, match="kind must be 'paper' or 'released artefact', got 'ours'"):
        Published("1", 0.5, kind="ours")
    for wrong in ({}, {"value": 1.0, "words": "one"}):
        with pytest.raises(ValueError, match="give a value or words"):
            Published("1", **wrong)


def test_a_module_is_judged_by_preset():
    module = SimpleNamespace(
        CLAIMS=(Claim("a", "A", FIGURE), Claim("b", "B", presets=("paper",))),
        CHECKS=(Check("a", 0, 1), Check("b", 0, 1, presets=("paper",)), Check("c", 0, 1)),
        CONDITIONS={"standard": "shortened"},
    )
    metrics = {"a": 0.9, "b": 2.0, "c": 2.0}
    (judged,) = claims.judged(module, "standard", metrics, stand_in=False)
    assert judged["verdict"] == "reproduced, shortened"
    assert len(claims.judged(module, "paper", metrics, stand_in=False)) == 2
    assert [check.metric for check in claims.failed(module, "standard", metrics)] == ["c"]
    assert [check.metric for check in claims.failed(module, "paper", metrics)] == ["b", "c"]
