"""Claims and checks about the metrics of a run.

A claim compares one metric with the paper or with an aim of ours, and gives a verdict. A check is a
condition that every run must meet, such as a small gradient norm of each refit. A check does not
compare anything with the paper.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

# The source of a claim is of one of these three kinds.
PAPER, RELEASED, OURS = "paper", "released artefact", "ours"
# A claim has one of these five verdicts.
REPRODUCED = "reproduced"
REPRODUCED_SHORTENED = "reproduced, shortened"
REPRODUCED_ON_STAND_IN = "reproduced on a stand-in"
NOT_REPRODUCED = "not reproduced"
NOT_COMPARABLE = "not comparable"
# A module's CONDITIONS marks each preset that differs from the paper with one of these words.
# SHORTENED means fewer steps or repeats. STAND_IN means that other data or networks are used.
SHORTENED, STAND_IN = "shortened", "stand-in"
_HELD = {
    "": REPRODUCED,
    SHORTENED: REPRODUCED_SHORTENED,
    STAND_IN: REPRODUCED_ON_STAND_IN,
}
# A published value without an uncertainty has this relative tolerance.
_TOLERANCE = 0.1
# A normal variable lies within this many standard deviations with probability 95 %.
_DEVIATIONS = 1.959963984540054


@dataclass(frozen=True)
class Published:
    """A published result.

    Args:
      source: the section or the file that contains the result.
      value: the value, or None if the source gives only words.
      uncertainty: half the width of the band around the value. `source` or a comment gives the
        reason for it. None means 10 % of the value.
      kind: PAPER, or RELEASED if the result is from the authors' 2017 code or its notebooks.
      words: the result in words, if the source gives no value.
    Raises: ValueError if the kind is unknown, or if not exactly one of value and words is given.
    """

    source: str
    value: float | None = None
    uncertainty: float | None = None
    kind: str = PAPER
    words: str = ""

    def __post_init__(self):
        if self.kind not in (PAPER, RELEASED):
            raise ValueError(f"kind must be {PAPER!r} or {RELEASED!r}, got {self.kind!r}.")
        if (self.value is None) == (not self.words):
            raise ValueError(f"give a value or words, got {self.value} and {self.words!r}.")

    @property
    def tolerance(self) -> float:
        """Half the width of the band around the value; infinite if there is no value."""
        if self.uncertainty is not None:
            return self.uncertainty
        return math.inf if self.value is None else _TOLERANCE * abs(self.value)


@dataclass(frozen=True)
class Sample:
    """The sample from which a metric is computed. It determines the metric's 95 % interval.

    Args:
      kind: "share" (Clopper and Pearson's interval) or "correlation" (Fisher's interval).
      size: the number of trials or of pairs, or the name of a metric with this number.
    """

    kind: str
    size: int | str

    def interval(self, value: float, metrics: Mapping[str, float]) -> list[float] | None:
        """Compute the 95 % interval of a metric.

        Args:
          value: the metric's value.
          metrics: all metrics of the run.
        Returns: [low, high], or None if the value or the sample's size has no interval.
        """
        size = metrics.get(self.size, math.nan) if isinstance(self.size, str) else self.size
        if not (math.isfinite(value) and math.isfinite(size) and abs(value) <= 1):
            return None
        if self.kind == "share":
            from scipy.stats import binomtest  # importing it takes a second

            found = binomtest(round(value * size), int(size)).proportion_ci(method="exact")
            return [float(found.low), float(found.high)]
        if abs(value) == 1 or size <= 3:
            return None
        centre, half = math.atanh(value), _DEVIATIONS / math.sqrt(size - 3)
        return [math.tanh(centre - half), math.tanh(centre + half)]


@dataclass(frozen=True)
class Claim:
    """A sentence about one metric, with a band in which the metric should lie.

    The band of a published value is the value +- its tolerance, unless a narrower one is given. The
    claim holds if the metric lies in the band. If the metric has an interval, the claim holds if
    the interval and the band overlap.

    Args:
      metric: name of the metric in `Record.metrics`.
      sentence: description of the metric for a reader of the paper.
      published: the published result, or None if the claim is ours.
      low, high: the ends of the band. None means no limit on that side.
      sample: the sample of the metric, or None if the metric has no interval.
      presets: the presets that compute the metric, or None for all presets.
      headline: text of the claim's row in the README's table, in the form "label: words"; "" if the
        claim has no row. Claims with the same headline share a row.
    Raises: ValueError if the band is empty, or wider than the tolerance of the published value.
    """

    metric: str
    sentence: str
    published: Published | None = None
    low: float | None = None
    high: float | None = None
    sample: Sample | None = None
    presets: tuple[str, ...] | None = None
    headline: str = ""

    def __post_init__(self):
        published = self.published
        if published is not None and published.value is not None:
            value, tolerance = published.value, published.tolerance
            ends = (value - tolerance, value + tolerance)
            for name, end in zip(("low", "high"), ends, strict=True):
                if getattr(self, name) is None:
                    object.__setattr__(self, name, end)
                # The margin of 1e-12 allows for rounding errors.
                elif not ends[0] - 1e-12 <= getattr(self, name) <= ends[1] + 1e-12:
                    raise ValueError(
                        f"{name} of {self.metric} must lie within the tolerance of the published "
                        f"value, {ends[0]:.6g} to {ends[1]:.6g}, got {getattr(self, name):.6g}."
                    )
        _check_band(self.metric, self.low, self.high)

    @property
    def kind(self) -> str:
        """The kind of the claim's source: PAPER, RELEASED or OURS."""
        return OURS if self.published is None else self.published.kind

    def judge(
        self, metrics: Mapping[str, float], *, stand_in: bool = False, conditions: str = ""
    ) -> dict[str, Any]:
        """Compare a run's metric with the band.

        Args:
          metrics: the run's metrics.
          stand_in: True if the run used stand-in data. Then nothing is compared.
          conditions: "", SHORTENED or STAND_IN.
        Returns: a dict with the verdict, in the form that `reading.check` requires. Its entry
          `holds` is None if nothing is compared. If the metric is missing, NaN or infinite, the
          entry `value` is None and the claim does not hold.
        """
        value = metrics.get(self.metric, math.nan)
        found = self.sample.interval(value, metrics) if self.sample is not None else None
        ends = found or [value, value]
        holds = None
        if not stand_in:
            holds = (
                math.isfinite(value)
                and ends[1] >= (-math.inf if self.low is None else self.low)
                and ends[0] <= (math.inf if self.high is None else self.high)
            )
        published = self.published or Published(source="", words="none")
        return {
            "metric": self.metric,
            "sentence": self.sentence,
            "paper": published.value,
            "words": published.words if self.published else "",
            "source": published.source,
            "kind": self.kind,
            "low": self.low,
            "high": self.high,
            "value": value if math.isfinite(value) else None,
            "interval": found or [],
            "holds": holds,
            "verdict": self._verdict(holds, conditions),
            "headline": self.headline,
        }

    def _verdict(self, holds: bool | None, conditions: str) -> str:
        if holds is None or self.published is None:
            return NOT_COMPARABLE
        return _HELD[conditions] if holds else NOT_REPRODUCED


@dataclass(frozen=True)
class Check:
    """A condition that every run must meet on any data: low <= metric <= high.

    Args:
      metric: name of the metric.
      low, high: the ends of the band. None means no limit on that side.
      presets: the presets that compute the metric, or None for all presets.
    Raises: ValueError if the band is empty.
    """

    metric: str
    low: float | None
    high: float | None
    presets: tuple[str, ...] | None = None

    def __post_init__(self):
        _check_band(self.metric, self.low, self.high)

    def passes(self, metrics: Mapping[str, float]) -> bool:
        """Return True if the metric exists, is finite and lies in the band."""
        value = metrics.get(self.metric, math.nan)
        low = -math.inf if self.low is None else self.low
        return math.isfinite(value) and low <= value <= (
            math.inf if self.high is None else self.high
        )


def of_preset(entries: Sequence[Any], preset: str) -> list[Any]:
    """Return those claims or checks whose metric a preset computes."""
    return [one for one in entries if one.presets is None or preset in one.presets]


def judged(
    module: ModuleType, preset: str, metrics: Mapping[str, float], *, stand_in: bool
) -> list[dict[str, Any]]:
    """Judge all claims of a module about a run.

    Args:
      module: the module of the experiment, with the names that `experiments` describes.
      preset: the preset that ran.
      metrics: the run's metrics.
      stand_in: True if the run used stand-in data.
    Returns: one verdict per claim.
    """
    conditions = getattr(module, "CONDITIONS", {}).get(preset, "")
    return [
        claim.judge(metrics, stand_in=stand_in, conditions=conditions)
        for claim in of_preset(module.CLAIMS, preset)
    ]


def failed(module: ModuleType, preset: str, metrics: Mapping[str, float]) -> list[Check]:
    """Return the checks of a module that fail for a run."""
    return [
        check
        for check in of_preset(getattr(module, "CHECKS", ()), preset)
        if not check.passes(metrics)
    ]


def _check_band(metric: str, low: float | None, high: float | None) -> None:
    if not ((-math.inf if low is None else low) <= (math.inf if high is None else high)):
        raise ValueError(f"low must not exceed high, got {low} and {high} for {metric}.")
