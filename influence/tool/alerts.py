"""Alerts: warnings about unreliable numbers, with the reasons, in plain words."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from influence.common.convergence import ConvergenceWarning
from influence.net.history import History
from influence.preflight.report import Line, Report
from influence.solvers import EKFAC
from influence.solvers.plan import Plan

Level = Literal["stop", "care", "note"]
ORDER_NOT_SIZE = "Use the order of the rows, not the sizes."
# For each line of the check, by its name: the alert's headline for the verdict "fail", and its
# headline for the verdict "warn".
_HEADLINES: dict[str, tuple[str, str]] = {
    "stationary point": (
        f"{ORDER_NOT_SIZE} The model is not at a minimum of its training risk.",
        "Use the sizes with care. The training is not quite finished.",
    ),
    "smallest eigenvalue": (
        "Do not use these numbers. The curvature matrix has no meaningful inverse.",
        f"{ORDER_NOT_SIZE} The damping holds the weights near where they are.",
    ),
    "largest eigenvalue": ("Do not use these numbers. The risk has no minimum here.", ""),
    "precision": (
        "Do not use these numbers. Rounding may change all of their digits.",
        "Rounding may change the last digits of these numbers.",
    ),
    "labels": (
        "Do not use these numbers. The labels do not seem to be those of the training.",
        "The labels or inputs may not be those of the training.",
    ),
    "loss per example": (
        "Do not use these numbers. The loss of a row depends on the other rows.",
        "",
    ),
    "same answer twice": (
        "Do not use these numbers. The model answers differently each time.",
        "",
    ),
    "Hessian = differences": (
        "Do not use these numbers. The second derivatives are wrong.",
        "The curvature leaves out the kinks of the model, such as those of ReLU.",
    ),
    "Hessian symmetric": ("Do not use these numbers. The second derivatives are wrong.", ""),
    "penalty": (
        "Do not use these numbers. The penalty is not that of the training.",
        "The training minimised something else than the risk that is explained.",
    ),
    "derivatives": ("", "The derivatives were not checked, because of the faults above."),
}


# If one of these lines has the verdict "warn", only a small part of each number is in doubt. The
# alert then has the level "note".
_NOTES = ("Hessian = differences", "precision")


@dataclass(frozen=True)
class Alert:
    """A warning that a reader must see before the numbers.

    Attributes:
      level: "stop" if the numbers must not be used. "care" if only some of the numbers, or only
        their order, can be used. "note" for a remark.
      headline: the alert in one or two plain sentences.
      detail: the finding that caused the alert.
      remedy: advice for the reader, or an empty string if no action is needed.
    """

    level: Level
    headline: str
    detail: str = ""
    remedy: str = ""


def of_report(report: Report | None, plan: Plan | None = None) -> list[Alert]:
    """Return an alert for each line of a check whose verdict is not "ok".

    The check computes in the net's dtype. If the plan solves in float64, the precision of the net's
    dtype does not matter. The line "precision" then gives no alert.
    """
    lines = () if report is None else report.lines
    exact = plan is not None and plan.dtype == "float64"
    found = [line for line in lines if line.verdict != "ok"]
    return [of_line(line) for line in found if not (exact and line.name == "precision")]


def of_line(line: Line) -> Alert:
    """Return the alert for one line of a check whose verdict is not "ok"."""
    fails = line.verdict == "fail"
    usual = (
        f"Do not use these numbers. The check {line.name!r} failed."
        if fails
        else f"The check {line.name!r} asks for care."
    )
    headline = _HEADLINES.get(line.name, ("", ""))[0 if fails else 1] or usual
    # At weights that are not a minimum, the scores still rank the rows (Bae et al. 2022). A failure
    # whose headline recommends the order therefore has the level "care" and not "stop".
    level: Level = "stop" if fails and not headline.startswith(ORDER_NOT_SIZE) else "care"
    if line.name in _NOTES and not fails:
        level = "note"
    return Alert(level, headline, line.meaning, line.remedy)


def of_plan(plan: Plan) -> list[Alert]:
    """Return an alert if EK-FAC approximates the plan's matrix, else an empty list."""
    if not isinstance(plan.solver, EKFAC):
        return []
    return [
        Alert(
            "care",
            f"{ORDER_NOT_SIZE} The curvature matrix is approximated layer by layer.",
            plan.reasons[2][:1].upper() + plan.reasons[2][1:] + ".",
            "Run `verify` to see how far the predicted changes agree with actual ones.",
        )
    ]


def of_history(history: History | None, net: Any) -> list[Alert]:
    """Return an alert if no recorded epoch ended with the net's weights, else an empty list."""
    if history is None or history.epoch_of(net.theta) is not None:
        return []
    return [
        Alert(
            "care",
            "The record of the training may be that of another model.",
            "The model's weights are not those after any epoch of the record.",
            "Give the record of this model, or the model as that training left it.",
        )
    ]


@dataclass(eq=False)
class Heard:
    """The warnings that a computation raised.

    Attributes:
      caught: the warnings, as `warnings.catch_warnings` records them.
    """

    caught: list[Any] = field(default_factory=list)

    @property
    def alerts(self) -> list[Alert]:
        """One alert for each distinct warning about convergence or about an impossible change."""
        found = {}
        for warning in self.caught:
            text = str(warning.message)
            if issubclass(warning.category, ConvergenceWarning):
                head = "Some numbers were not computed to the requested precision."
                found[text] = Alert("care", head, text[:1].upper() + text[1:])
            elif "cannot be" in text:
                head = "Do not use the sizes of some predicted changes. They are impossible."
                found[text] = Alert("care", head, text, "Run `verify` for the actual changes.")
        return list(found.values())


@contextmanager
def listening() -> Iterator[Heard]:
    """Collect the warnings that a `with` block raises. They are not printed."""
    heard = Heard()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        heard.caught = caught
        yield heard


def merged(found: list[Alert]) -> tuple[Alert, ...]:
    """Return the distinct alerts, sorted by level: "stop", "care", "note".

    The alerts that begin with `ORDER_NOT_SIZE` are merged into one alert.
    """
    order = {"stop": 0, "care": 1, "note": 2}
    unique = list({(alert.headline, alert.detail): alert for alert in found}.values())
    same = [alert for alert in unique if alert.headline.startswith(ORDER_NOT_SIZE)]
    if len(same) > 1:
        reasons = [alert.headline.removeprefix(ORDER_NOT_SIZE).strip() for alert in same]
        headline = " ".join([ORDER_NOT_SIZE, *dict.fromkeys(reasons)])
        details, remedies = (
            " ".join(dict.fromkeys(getattr(alert, key) for alert in same if getattr(alert, key)))
            for key in ("detail", "remedy")
        )
        rest = [alert for alert in unique if alert not in same]
        unique = [Alert(same[0].level, headline, details, remedies), *rest]
    return tuple(sorted(unique, key=lambda alert: order[alert.level]))
