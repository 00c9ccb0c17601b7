"""Which training labels look wrong? Rows that the other rows do not explain come first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence.common.memory import VECTORS, fitting
from influence.common.progress import progress
from influence.examples import labels as packing
from influence.examples.given import Data
from influence.net.checked import Net
from influence.preflight.labels import threshold_of
from influence.tool import alerts
from influence.tool.answer import Answer, value_of
from influence.tool.explain import label_of, plan_facts
from influence.tool.page import Column, Page, Section, Table
from influence.tool.rows import Rows
from influence.tool.shown import item, plain
from influence.tool.subject import QuestionOptions, Subject

# The page shows this many rows, and for them a label without the row itself is computed.
USUAL_TOP = 100
# An interrupted audit goes on after this many rows.
_PART = 2048
# The column of the CSV file that a person fills in, and the word that leaves a row out.
NEW_LABEL, REMOVE = "new_label", "remove"


@dataclass(frozen=True, eq=False)
class Audit(Answer):
    """The training rows in the order in which their labels should be checked.

    Attributes:
      self_influence: (n,) predicted change of each row's own loss if the row is left out.
      order: (n,) all rows, the largest self-influence first.
      suggested: for some rows, the class that the model would predict without the row.
      top: number of rows that the page shows.
    """

    self_influence: NDArray
    order: NDArray[np.int64]
    suggested: dict[int, int]
    top: int

    def records(self) -> list[dict[str, Any]]:
        """Return one dict for each training row, the most suspect first."""
        known, names = self.subject.of_train, self.subject.train_rows
        sure = known.confidence
        found = []
        for rank, row in enumerate(map(int, self.order), 1):
            suggestion = self.suggested.get(row)
            record = {
                "rank": rank,
                "row": row,
                "name": plain(names.name(row), 300),
                "label": label_of(known, names, row),
                "predicted": label_of(known, names, row, predicted=True),
                "suggested": "" if suggestion is None else plain(names.class_name(suggestion), 120),
                "self_influence": value_of(self.self_influence[row]),
                "loss": value_of(known.losses[row]),
                "confidence": None if sure is None else value_of(sure[row]),
                NEW_LABEL: "",
            }
            found.append(record)
        return found

    def numbers(self) -> dict[str, Any]:
        """Return counts."""
        return {"num_rows": len(self.order), "num_suggestions": len(self._doubted)}

    @property
    def _doubted(self) -> list[int]:
        given = self.subject.of_train.given
        return [
            row for row, label in self.suggested.items() if given is None or label != given[row]
        ]

    @property
    def summary(self) -> list[str]:
        """The answer in a few sentences."""
        n, total = len(self.order), float(np.sum(np.abs(self.self_influence))) or 1.0
        few = max(n // 100, 1)
        share = float(np.sum(np.abs(self.self_influence[self.order[:few]]))) / total
        first = "The first row has" if few == 1 else f"The first {few:,} rows have"
        found = [
            f"Check the labels of {n:,} training rows in this order. {first} {share:.0%} of all "
            "self-influence.",
        ]
        known = self.subject.of_train
        if known.of_classes:
            found.append(
                f"For {len(self._doubted)} of the first {len(self.suggested)} rows the model would "
                "predict another label if it had not seen the row."
            )
            found.append(f"The model predicts {known.accuracy:.1%} of the given labels.")
        found.append(
            f"To try corrections, write labels into the column {NEW_LABEL} of the CSV file "
            f"({REMOVE!r} leaves a row out), and run `verify --csv` with the edited file."
        )
        return found

    def page(self, size: int) -> Page:
        """Return the page, with pictures of at most `size` pixels."""
        names = self.subject.train_rows
        keys = ["rank", "label", "predicted", "suggested", "self_influence", "loss", "confidence"]
        columns = [Column("Row")]
        columns += [Column("Rank", True), Column("Label"), Column("Predicted"), Column("Suggested")]
        columns += [Column("Self-influence", True), Column("Loss", True)]
        columns += [Column("Confidence", True, 3)]
        rows = []
        for record in self.records()[: self.top]:
            shown = item(names, record["row"], min(size, 96))
            rows.append([shown, *(record[key] for key in keys)])
        caption = (
            "The most suspect rows. Self-influence is the predicted rise of a row's own loss if "
            "the row were left out. A suggested label is what the model would then predict."
        )
        section = Section("Rows to check first", parts=[Table(caption, columns, rows)])
        title = "Which training labels look wrong?"
        return Page(title, self.summary, self.alerts, [section], self.facts())

    def facts(self) -> list[tuple[str, Any]]:
        """Return pairs (name, value) about the model, the data and the computation."""
        return [*super().facts(), *plan_facts(self.subject)]

    def draw(self, figure: Any) -> None:
        """Draw all self-influences in their order."""
        axes = figure.add_subplot()
        axes.plot(np.arange(1, len(self.order) + 1), self.self_influence[self.order])
        axes.set_xscale("log")
        axes.set_xlabel("rows, most suspect first")
        axes.set_ylabel("self-influence")


def audit(
    model: Net,
    train: Data | Rows,
    *,
    top: int = USUAL_TOP,
    options: QuestionOptions = QuestionOptions(),
) -> Audit:
    """Rank the training rows by self-influence, to find wrong labels.

    Self-influence is the predicted change of a row's own loss if the row is left out
    (`Influence.self_influence`). It is large for rows that the other rows do not explain. For the
    first rows a label is suggested: the class that the model would predict if theta moved as the
    row's removal moves it, to first order (`Influence.parameters`).

    Args:
      model: a compiled Keras model, a net, or the path of a saved model.
      train: the training set, in any form that `fit` takes.
      top: number of rows on the page, and of rows with a suggested label.
      options: options of the computation.

    Returns: an Audit, with `table`, `to_csv` and `to_html`. A notebook shows its page.
    Raises: TypeError or ValueError that names the argument that is wrong.
    """
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}.")
    subject = Subject.of(model, train, None, options)
    with alerts.listening() as heard:
        report = subject.report
        own = _self_influence(subject)
        order = np.argsort(-own, kind="stable")
        suspects = order[: min(top, len(order))]
        suggested = _suggested(subject, suspects) if subject.of_train.of_classes else {}
    found = alerts.of_report(report, subject.plan) + alerts.of_plan(subject.plan) + heard.alerts
    if not subject.of_train.of_classes:
        found.append(
            alerts.Alert(
                "note",
                "The labels are no classes, so no label is suggested.",
                "The order still shows the rows that the other rows do not explain.",
            )
        )
    return Audit(subject, alerts.merged(found), own, order, suggested, top)


def _self_influence(subject: Subject) -> NDArray:
    """Compute the self-influence of all rows. With a folder, in parts that are kept."""
    if subject.store.work is None:
        return subject.influence.self_influence().astype(np.float64)
    n = len(subject.train)
    starts = range(0, n, _PART)
    parts = []
    for start in progress(starts, "self-influence", len(starts)):
        rows = np.arange(start, min(start + _PART, n))
        found = subject.store.kept(
            f"self-{subject.key}-{start}",
            lambda rows=rows: {"own": subject.influence.self_influence(rows)},
        )
        parts.append(found["own"])
    return np.concatenate(parts).astype(np.float64)


def _suggested(subject: Subject, rows: NDArray[np.int64]) -> dict[int, int]:
    """Return the class that the model would predict for each row if it had not seen the row."""
    influence = subject.influence
    net = influence.net
    size = fitting(VECTORS, 4 * net.num_parameters * net.dtype.itemsize, 64)
    y = packing.labels(influence.train.y)
    limit = threshold_of(net.loss, y) if isinstance(y, np.ndarray) else None
    found = {}
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        moves = influence.parameters(part)
        some = influence.train.take(part)
        for k, row in enumerate(part):
            one = some.take([k])
            outputs = np.ravel(net.at(net.theta + moves[k]).outputs(one.x))
            if len(outputs) > 1:
                found[int(row)] = int(outputs.argmax())
            elif limit is not None:
                found[int(row)] = int(outputs[0] > limit)
    return found
