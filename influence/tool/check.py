"""Check whether the influence scores of a model can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from influence.examples.given import Data
from influence.net.checked import Net
from influence.preflight.check import check
from influence.preflight.report import Report
from influence.tool import alerts
from influence.tool.answer import Answer, value_of
from influence.tool.page import Column, Page, Section, Table
from influence.tool.rows import Rows
from influence.tool.subject import QuestionOptions, Subject

_WORDS = {"ok": "ok", "warn": "care", "fail": "fails"}


@dataclass(frozen=True, eq=False)
class Verdict(Answer):
    """The result of `influence.check`.

    Attributes:
      report: the lines of the check.
    """

    report: Report

    @property
    def trusted(self) -> bool:
        """True if no line of the check has the verdict "fail"."""
        return all(line.verdict != "fail" for line in self.report.lines)

    @property
    def summary(self) -> list[str]:
        """The answer in a few sentences."""
        fails = [line.name for line in self.report.lines if line.verdict == "fail"]
        warns = [line.name for line in self.report.lines if line.verdict == "warn"]
        if fails:
            return [
                f"Do not trust the sizes of influence scores for this model: {', '.join(fails)}."
            ]
        if warns:
            return [f"Influence scores for this model can be used with care: {', '.join(warns)}."]
        return ["Influence scores for this model can be trusted. Every check is ok."]

    def records(self) -> list[dict[str, Any]]:
        """Return one dict for each line of the check."""
        return [
            {
                "check": line.name,
                "verdict": _WORDS[line.verdict],
                "value": value_of(line.value),
                "meaning": line.meaning,
                "remedy": line.remedy,
            }
            for line in self.report.lines
        ]

    def numbers(self) -> dict[str, Any]:
        """Return `trusted` (no line has the verdict "fail") and `ok` (every line is "ok")."""
        return {"trusted": self.trusted, "ok": self.report.ok}

    def page(self, size: int) -> Page:
        """Return the page. It has no pictures, so `size` has no effect."""
        columns = [Column("Check"), Column("Verdict"), Column("Value", True, 3)]
        columns += [Column("Meaning"), Column("What to do")]
        table = Table(
            "One line for each question.",
            columns,
            [list(record.values()) for record in self.records()],
        )
        sections = [Section("All checks", parts=[table])]
        title = "Can the numbers be trusted?"
        return Page(title, self.summary, self.alerts, sections, self.facts())

    def __str__(self) -> str:
        """Show the summary and the report."""
        return "\n".join([*self.summary, "", str(self.report)])

    def draw(self, figure: Any) -> None:
        """Draw one bar for each line of the check. Its colour shows the verdict."""
        axes = figure.add_subplot()
        lines = self.report.lines
        colours = {"ok": "#1b6e2d", "warn": "#b26b00", "fail": "#a4161a"}
        axes.barh(range(len(lines)), np.ones(len(lines)), color=[colours[x.verdict] for x in lines])
        axes.set_yticks(range(len(lines)), [line.name for line in lines])
        axes.invert_yaxis()
        axes.set_xticks([])


def checked(
    model: Net,
    train: Data | Rows,
    test: Data | Rows | None = None,
    *,
    options: QuestionOptions = QuestionOptions(),
) -> Verdict:
    """Check the assumptions of influence functions by `influence.check`.

    Args:
      model: a compiled Keras model, a net, or the path of a saved model.
      train: the training set, in any form that `fit` takes.
      test: the rows whose losses will be explained later. If None, training rows are used.
      options: options of the computation.

    Returns: a Verdict, with `report`, `table` and `to_html`.
    Raises: TypeError or ValueError naming the invalid argument.
    """
    subject = Subject.of(model, train, test, options)
    with alerts.listening() as heard:
        report = check(
            subject.net,
            subject.train,
            damping=options.damping,
            test=None if subject.test_rows is None else subject.test,
            batch_size=options.batch_size,
        )
    found = alerts.merged(alerts.of_report(report) + heard.alerts)
    return Verdict(subject, found, report)
