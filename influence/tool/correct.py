"""Correction of labels: the predicted and the actual fall of the mean test loss."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence.examples import labels as packing
from influence.examples.examples import Examples
from influence.examples.given import Data
from influence.net.checked import Net
from influence.tool import alerts
from influence.tool.answer import Answer, listed, short, value_of
from influence.tool.audit import NEW_LABEL, REMOVE
from influence.tool.explain import label_of, plan_facts
from influence.tool.page import Column, Page, Section, Table
from influence.tool.predictions import Predictions
from influence.tool.rows import Rows
from influence.tool.shown import item, plain
from influence.tool.subject import QuestionOptions, Subject
from influence.truth.edits import EditResponse, Edits, edit_response

# The predicted and the actual gain agree if they differ by at most this factor.
_AGREE = 1.25


@dataclass(frozen=True, eq=False)
class Correction(Answer):
    """The effect of changed labels and removed rows on the mean test loss.

    Attributes:
      edits: dict from training rows to new labels, or to None for a removed row.
      predicted: (k,) predicted change of the mean test loss by each edit. Negative: the loss falls.
      response: the parameters and the test losses after all edits.
      accuracy: (before, after), the accuracy on the test rows, or None if the labels are not
        classes.
      at_minimum: True if `response` is the result of retraining on the edited rows. If False,
        `response` is a proximal response, which stays near the present weights.
    """

    edits: dict[int, float | None]
    predicted: NDArray
    response: EditResponse
    accuracy: tuple[float, float] | None
    at_minimum: bool

    @property
    def predicted_gain(self) -> float:
        """Predicted fall of the mean test loss by all edits together."""
        return -float(self.predicted.sum())

    @property
    def actual_gain(self) -> float:
        """Actual fall of the mean test loss by all edits together."""
        found = self.response
        return float(np.mean(found.losses_before, dtype=np.float64)) - float(
            np.mean(found.losses, dtype=np.float64)
        )

    def numbers(self) -> dict[str, Any]:
        """Return gains, mean losses and accuracies. A gain is a fall of the mean loss."""
        before = float(np.mean(self.response.losses_before, dtype=np.float64))
        return {
            "predicted_gain": value_of(self.predicted_gain),
            "actual_gain": value_of(self.actual_gain),
            "mean_loss_before": value_of(before),
            "mean_loss_after": value_of(before - self.actual_gain),
            "accuracy_before": None if self.accuracy is None else self.accuracy[0],
            "accuracy_after": None if self.accuracy is None else self.accuracy[1],
            "converged": self.response.converged,
        }

    def records(self) -> list[dict[str, Any]]:
        """Return one dict for each edit, the largest predicted gain first."""
        names, known = self.subject.train_rows, self.subject.of_train
        rows = list(self.edits)
        found = []
        for k in np.argsort(self.predicted, kind="stable"):
            row, new = rows[k], self.edits[rows[k]]
            found.append(
                {
                    "row": row,
                    "name": plain(names.name(row), 300),
                    "label": label_of(known, names, row),
                    NEW_LABEL: REMOVE if new is None else plain(names.class_name(new), 120),
                    "predicted_gain": value_of(-self.predicted[k]),
                }
            )
        return found

    @property
    def summary(self) -> list[str]:
        """The answer in a few sentences."""
        gone = sum(new is None for new in self.edits.values())
        what = f"{len(self.edits) - gone} labels were changed and {gone} rows left out."
        where = "test rows" if self.subject.test_rows is not None else "training rows"
        lines = [
            f"{what} The mean loss of {len(self.subject.test):,} {where} falls by "
            f"{short(self.actual_gain)}. Predicted was {short(self.predicted_gain)}."
        ]
        if self.actual_gain < 0:
            lines[0] = (
                f"{what} The mean loss of {len(self.subject.test):,} {where} rises by "
                f"{short(-self.actual_gain)}. The predicted gain was {short(self.predicted_gain)}."
            )
        if self.accuracy is not None:
            before, after = self.accuracy
            lines.append(f"The share of right predictions was {before:.1%} and is {after:.1%}.")
        truth = (
            "retraining on the edited rows"
            if self.at_minimum
            else (
                "the proximal response, which stays near the present weights, because the model is "
                "not at a minimum of its risk"
            )
        )
        return [*lines, f"The actual change is that of {truth}."]

    def page(self, size: int) -> Page:
        """Return the page. `size` limits the longer side of its pictures, in pixels."""
        columns = [Column("Row"), Column("Label"), Column("New label")]
        columns.append(Column("Predicted gain", True))
        keys = ("label", NEW_LABEL, "predicted_gain")
        rows = [
            [item(self.subject.train_rows, r["row"], min(size, 96)), *(r[key] for key in keys)]
            for r in self.records()
        ]
        caption = "Each edit, with the predicted fall of the mean loss by this edit alone."
        parts = [Table(caption, columns, rows)]
        title = "What do the corrections gain?"
        sections = [Section("Edits", parts=parts)]
        return Page(title, self.summary, self.alerts, sections, self.facts())

    def facts(self) -> list[tuple[str, Any]]:
        """Return pairs (name, value) about the model, the data and the computation."""
        found = self.response
        certificate = f"gradient norm {found.gradient_norm:.1e} of that at the start"
        passes = f"{found.passes} data passes, {certificate}"
        return [*super().facts(), *plan_facts(self.subject), ("Refit", passes)]

    def draw(self, figure: Any) -> None:
        """Draw the predicted and the actual gain as two bars."""
        axes = figure.add_subplot()
        axes.bar(["predicted", "actual"], [self.predicted_gain, self.actual_gain])
        axes.set_ylabel("fall of the mean loss")


def correct(
    model: Net,
    train: Data | Rows,
    test: Data | Rows | None = None,
    *,
    edits: Mapping[int, Any] | str | os.PathLike,
    options: QuestionOptions = QuestionOptions(),
) -> Correction:
    """Change labels or leave rows out, and compare the predicted gain with the actual gain.

    A gain is a fall of the mean test loss. The predicted gain is the sum of the first-order
    predictions for the single edits. The predicted change by a new label is the sum of two changes:
    removing the row with the old label, and adding the row with the new label. `edit_response`
    computes the actual change.

    Args:
      model: a compiled Keras model, a net, or the path of a saved model.
      train: the training set, in any form that `fit` takes.
      test: the test set. If None, the training rows with their old labels are the test set.
      edits: the path of a CSV file that `audit` wrote and a user edited, or a dict from training
        rows to new labels. A label is the name or the number of a class, or the value of a
        regression. The label "remove" leaves the row out.
      options: options of the computation.

    Returns: a Correction.
    Raises: TypeError, ValueError or IndexError naming the invalid argument or row.
    """
    subject = Subject.of(model, train, test, options)
    of_rows = subject.train_rows
    if isinstance(edits, Mapping):
        found = _checked(dict(edits), subject, "edits")
    else:
        found = _checked(_read(Path(edits)), subject, f"the CSV file {Path(edits).name!r}")
    rows = np.array(sorted(found), np.int64)
    found = {int(row): found[int(row)] for row in rows}
    removed = np.array([found[int(row)] is None for row in rows])
    with alerts.listening() as heard:
        report = subject.report
        influence = subject.influence
        old = influence.train.take(rows)
        relabelled = np.flatnonzero(~removed)
        new = None
        if len(relabelled):
            values = [found[int(rows[k])] for k in relabelled]
            new = _relabelled(old.take(relabelled), values)
            influence.net.validate(new, "edits")
        predicted = influence.scores(subject.test, rows, reduce="mean").change_if_removed[0].copy()
        if new is not None:
            adding = influence.adding(subject.test, new, reduce="mean")
            predicted[relabelled] += adding.change_if_added[0]
        response = edit_response(
            influence.net,
            influence.train,
            subject.test,
            Edits(rows, new, removed),
            influence.prepared,
            batch_size=options.batch_size,
        )
    said = alerts.of_report(report, subject.plan) + alerts.of_plan(subject.plan) + heard.alerts
    net = influence.net.at(response.theta)
    after = Predictions.of(net, subject.test, like=subject.train).accuracy
    before = subject.of_test.accuracy
    accuracy = None if before is None or after is None else (before, after)
    answer = Correction(
        subject,
        (),
        edits=found,
        predicted=predicted,
        response=response,
        accuracy=accuracy,
        at_minimum=subject.at_minimum and not subject.plan.damping,
    )
    said += _of_gain(answer)
    if of_rows is subject.shown_test:
        head = "No test rows were given. The gain is measured on the training rows themselves."
        said.append(alerts.Alert("note", head, "It counts the old labels as right."))
    return replace(answer, alerts=alerts.merged(said))


def _of_gain(answer: Correction) -> list[alerts.Alert]:
    predicted, actual = answer.predicted_gain, answer.actual_gain
    ratio = actual / predicted if predicted else np.inf
    if 1 / _AGREE <= ratio <= _AGREE:
        return []
    if ratio > 0:
        head = "Use the direction of the predicted gain, not its size."
    else:
        head = "Do not use the predicted gain. The actual one has the opposite sign."
    return [alerts.Alert("care", head, f"Predicted {short(predicted)}, actual {short(actual)}.")]


def _read(path: Path) -> dict[Any, Any]:
    """Return a dict from row to new label, for the rows of the CSV file that have a new label."""
    import pandas as pd

    try:
        frame = pd.read_csv(
            path, dtype=str, keep_default_na=False, encoding="utf-8-sig", sep=None, engine="python"
        )
    except FileNotFoundError:
        raise ValueError(
            f"--csv must be a file that audit wrote, got {str(path)!r}, which is not there."
        ) from None
    except Exception as error:  # pandas raises many types of errors
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--csv must be a CSV file, got {str(path)!r} ({type(error).__name__}: {reason})."
        ) from error
    missing = [name for name in ("row", NEW_LABEL) if name not in frame.columns]
    if missing:
        raise ValueError(
            f"--csv must have the columns row and {NEW_LABEL}, as audit writes them, got "
            f"{listed(list(frame.columns), 12)}."
        )
    filled = frame[frame[NEW_LABEL].str.strip() != ""]
    if filled["row"].duplicated().any():
        twice = filled["row"][filled["row"].duplicated()].iloc[0]
        raise ValueError(f"--csv must name each row once, got row {twice} twice.")
    return dict(zip(filled["row"].str.strip(), filled[NEW_LABEL].str.strip(), strict=True))


def _checked(edits: dict[Any, Any], subject: Subject, where: str) -> dict[int, float | None]:
    """Validate the edits, and drop the edits that do not change the label.

    Returns: dict from row number to the new label as a number, or to None for a removed row.
    Raises: ValueError or IndexError naming the invalid row or label.
    """
    names, known = subject.train_rows, subject.of_train
    numbers = {str(name): k for k, name in enumerate(names.classes)}
    n = len(names)
    found: dict[int, float | None] = {}
    for key, value in edits.items():
        try:
            row = int(key)
        except (TypeError, ValueError):
            raise ValueError(f"{where} must have row numbers, got {key!r}.") from None
        if not 0 <= row < n:
            raise IndexError(f"{where} must have rows from 0 to {n - 1}, got {row}.")
        text = str(value).strip().removeprefix("'")
        if text == REMOVE:
            found[row] = None
            continue
        try:
            number = float(numbers[text]) if text in numbers else float(text)
        except ValueError:
            number = float("nan")
        classes = known.num_classes
        if not np.isfinite(number) or (
            classes and not (number == int(number) and 0 <= number < classes)
        ):
            allowed = listed([repr(name) for name in names.classes] or list(range(classes)), 10)
            raise ValueError(
                f"{where} must have for row {row} {REMOVE!r} or a label"
                f"{f' of {allowed}' if classes else ''}, got {text!r}."
            )
        if known.given is None:
            raise ValueError(f"{where} must change labels that are one number for each row.")
        if number != known.given[row]:
            found[row] = number
    if not found:
        raise ValueError(f"{where} must change at least one row, got no change.")
    if len(found) >= n:
        raise ValueError(f"{where} must leave at least one row unchanged, got all {n}.")
    return found


def _relabelled(rows: Examples, values: list[Any]) -> Examples:
    """Return a copy of the rows with other labels. The label format does not change."""
    y = np.array(rows.y)
    field = y[packing.PLAIN] if packing.is_packed(y) else y
    numbers = np.asarray(values, float)
    if field.ndim == 2 and field.shape[1] > 1:  # one-hot labels
        field[:] = np.eye(field.shape[1])[numbers.astype(int)]
    elif set(np.unique(field)) <= {-1, 1} and (field < 0).any():  # labels -1, 1 of a hinge loss
        field[:] = np.where(numbers > 0, 1, -1).reshape(field.shape)
    else:
        field[:] = numbers.reshape(field.shape)
    return Examples(rows.x, y)
