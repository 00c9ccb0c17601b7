"""Audit of training labels: a ranking of the training rows by how wrong their labels look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence.common.numbers import is_integer
from influence.common.progress import progress
from influence.examples.given import Data
from influence.examples.labels import sample_weights
from influence.net.checked import Net
from influence.tool import alerts, mislabelled
from influence.tool.answer import Answer, short, value_of
from influence.tool.explain import history_facts, label_of, plan_facts
from influence.tool.folds import out_of_fold
from influence.tool.last_layer import LastLayer, OutOfSample, features_of, last_layer
from influence.tool.mislabelled import WORDS, Choice
from influence.tool.page import Column, Page, Section, Table
from influence.tool.request import AUTO, RANKINGS, USUAL_SUSPECTS
from influence.tool.rows import Rows
from influence.tool.shown import item, plain
from influence.tool.subject import QuestionOptions, Subject

# Self-influence is computed and stored in blocks of this many rows. An interrupted run continues
# after the last stored block.
_PART = 2048
# If the model has at most this many weights, self-influence is fast to compute. It is then computed
# even if another ranking is requested.
_CHEAP = 256
# The user writes new labels into the column NEW_LABEL of the CSV file. The word REMOVE in this
# column removes the row.
NEW_LABEL, REMOVE = "new_label", "remove"
_TITLES = {
    "margin": "Margin without the row",
    "folds": "Margin out of fold",
    "history": "Margin in training",
    "self_influence": "Self-influence",
    "loss": "Loss",
}


@dataclass(frozen=True, eq=False)
class Audit(Answer):
    """The training rows, sorted by how suspect their labels are.

    Attributes:
      values: dict from the name of each computed ranking to its (n,) values.
        `influence.tool.mislabelled` describes the rankings.
      choice: the ranking that sorts the rows, and the reason for it.
      order: (n,) the row numbers, the most suspect row first.
      suggested: dict from the rows with a doubted label to the suggested class numbers.
      thresholds: (c,) the thresholds of confident learning, or None if no label can be suggested.
      last: the refitted last layer, or None if it could not be refitted.
      top: number of rows on the page.
    """

    values: dict[str, NDArray]
    choice: Choice
    order: NDArray[np.int64]
    suggested: dict[int, int]
    thresholds: NDArray | None
    last: LastLayer | None
    top: int

    @property
    def self_influence(self) -> NDArray | None:
        """(n,) predicted rise of each row's loss if the row is left out; None if not computed."""
        return self.values.get("self_influence")

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
            }
            for ranking in RANKINGS:
                values = self.values.get(ranking)
                record[ranking] = None if values is None else value_of(values[row])
            record["confidence"] = None if sure is None else value_of(sure[row])
            record[NEW_LABEL] = ""
            found.append(record)
        return found

    def numbers(self) -> dict[str, Any]:
        """Return a dict of the numbers that the table does not contain.

        They are the number of rows and of suggested labels, the ranking and its reason, the
        thresholds of confident learning, and the weight decay and mean losses of the last layer.
        """
        found: dict[str, Any] = {
            "num_rows": len(self.order),
            "num_suggestions": len(self.suggested),
            "ranking": self.choice.ranking,
            "why": self.choice.why,
        }
        if self.thresholds is not None:
            found["thresholds"] = [value_of(t) for t in self.thresholds]
        if self.last is not None:
            held_out = self.last.held_out
            found["last_layer"] = {
                "weight_decay": self.last.weight_decay,
                "leave_one_out_loss": value_of(self.last.losses.mean()),
                "held_out_loss": None if held_out is None else value_of(held_out.mean()),
            }
        return found

    @property
    def summary(self) -> list[str]:
        """The answer in a few sentences."""
        n, choice = len(self.order), self.choice
        found = [
            f"Check the labels of {n:,} training rows in this order. The order is that of the "
            f"{WORDS[choice.ranking]}. {choice.why}"
        ]
        known = self.subject.of_train
        if known.of_classes:
            if self.thresholds is not None:
                found.append(
                    f"Confident learning doubts {len(self.suggested):,} labels, and suggests "
                    "another one for each of them."
                )
            found.append(f"The model predicts {known.accuracy:.1%} of the given labels.")
        found.append(
            f"To try corrections, write labels into the column {NEW_LABEL} of the CSV file "
            f"({REMOVE!r} leaves a row out), and run `verify --csv` with the edited file."
        )
        return found

    def page(self, size: int) -> Page:
        """Return the page. `size` limits the longer side of its pictures, in pixels."""
        names = self.subject.train_rows
        ranked = [self.choice.ranking]
        ranked += [name for name in RANKINGS if name in self.values and name not in ranked]
        keys = ["rank", "label", "predicted", "suggested", *ranked, "confidence"]
        columns = [Column("Row")]
        columns += [Column("Rank", True), Column("Label"), Column("Predicted"), Column("Suggested")]
        columns += [Column(_TITLES[name], True) for name in ranked]
        columns += [Column("Confidence", True, 3)]
        rows = []
        for record in self.records()[: self.top]:
            shown = item(names, record["row"], min(size, 96))
            rows.append([shown, *(record[key] for key in keys)])
        caption = (
            f"The most suspect rows, by the {WORDS[self.choice.ranking]}. A small margin, or a "
            "large loss or self-influence, is suspect. A suggested label is that of confident "
            "learning."
        )
        section = Section("Rows to check first", parts=[Table(caption, columns, rows)])
        title = "Which training labels look wrong?"
        return Page(title, self.summary, self.alerts, [section], self.facts())

    def facts(self) -> list[tuple[str, Any]]:
        """Return pairs (name, value) about the model, the data and the computation."""
        found = [*super().facts(), ("Ranking", f"{self.choice.ranking} ({self.choice.why})")]
        last = self.last
        if last is not None:
            text = f"{last.num_features} features, weight decay {last.weight_decay:g}, mean loss "
            text += f"{short(float(last.losses.mean()))} with each row left out"
            if last.held_out is not None:
                text += f", {short(float(last.held_out.mean()))} on held-out rows"
            if last.dropped:
                text += f"; principal components without {last.dropped:.1%} of the variance"
            if last.weighted:
                text += "; rows count by their sample weights"
            found.append(("Refitted last layer", text))
        found += history_facts(self.subject)
        return [*found, *(plan_facts(self.subject) if "self_influence" in self.values else [])]

    def draw(self, figure: Any) -> None:
        """Plot the values of the ranking against the rank, the most suspect row first."""
        axes = figure.add_subplot()
        values = self.values[self.choice.ranking]
        axes.plot(np.arange(1, len(self.order) + 1), values[self.order])
        axes.set_xscale("log")
        axes.set_xlabel("rows, most suspect first")
        axes.set_ylabel(_TITLES[self.choice.ranking].lower())


def audit(
    model: Net,
    train: Data | Rows,
    test: Data | Rows | None = None,
    *,
    top: int = USUAL_SUSPECTS,
    ranking: str = AUTO,
    folds: int | None = None,
    fit: Callable[..., Any] | None = None,
    options: QuestionOptions = QuestionOptions(),
) -> Audit:
    """Rank the training rows so that rows with wrong labels come first.

    By default, the rows are sorted by the margin of their labels. The margin of a row is computed
    by the last layer, refitted to its minimum without the row (`influence.tool.last_layer`). The
    network itself is not retrained. If the network seems to have memorised its labels, an alert
    says so. The rows are then sorted by the history of the training, if the options contain one.
    `influence.tool.mislabelled` gives the exact rule.

    If the labels are classes, confident learning (Northcutt et al. 2021) suggests labels from the
    outputs of the refitted last layer, or from the outputs of the folds if `folds` is given. If the
    rows are sorted by the history, a label is doubted if its mean margin is negative.

    Args:
      model: a compiled Keras model, a net, or the path of a saved model.
      train: the training set, in any form that `fit` takes.
      test: rows that were not used for training, or None. Their losses show whether the network has
        memorised labels.
      top: number of rows on the page.
      ranking: "auto", or one of "margin", "folds", "history", "self_influence" and "loss".
        "self_influence" solves one linear system for each row, or for each block of rows.
      folds: number of folds. `fit` trains the network once without each fold.
      fit: a function (model, x, y) or (model, x, y, sample_weight). It trains a Keras model on the
        rows (x, y). The model is compiled and has new weights. Frozen layers keep their weights.
      options: options of the computation. With `checkpoints`, an interrupted call continues after
        the last finished fold, or after the last finished block of self-influence.

    Returns: an Audit, with `table`, `to_csv` and `to_html`. A notebook shows its page.
    Raises: TypeError or ValueError naming the invalid argument.
    """
    _check(top, ranking, folds, fit)
    subject = Subject.of(model, train, test, options)
    n = len(subject.train)
    if folds is not None and folds > n:
        raise ValueError(f"folds must be at most the {n} training rows, got {folds}.")
    history = subject.history
    if ranking == "history" and history is None:
        raise ValueError("options.history must be given for the ranking 'history', got None.")
    values = {} if history is None else {"history": history.area()}
    found = alerts.of_history(history, subject.net)
    with alerts.listening() as heard:
        known = subject.of_train
        if ranking == "self_influence":
            found += alerts.of_report(subject.report, subject.plan) + alerts.of_plan(subject.plan)
        else:
            found += alerts.of_report(subject.rows_report)
        if ranking == "self_influence" or subject.net.num_parameters <= _CHEAP:
            values["self_influence"] = _self_influence(subject)
        values["loss"] = known.losses.astype(np.float64)
        last, missing = _last_layer(subject)
        best: OutOfSample | None = last
        if last is not None:
            values["margin"] = _margins(last)
        if folds is not None and fit is not None:
            best = out_of_fold(subject, folds, fit)
            values["folds"] = _margins(best)
    memorised = None if last is None else mislabelled.of_memory(last, _reproduced(subject))
    if ranking != AUTO and ranking not in values:
        raise ValueError(f"ranking must be one that this model has, got {ranking!r}: {missing}.")
    choice = mislabelled.choose(ranking, values, memorised, missing)
    order = mislabelled.order_of(values[choice.ranking], choice.ranking)
    suggested, thresholds = _suggested(subject, best, choice.ranking)
    found += [*choice.alerts, *heard.alerts]
    if not known.of_classes:
        head = "The labels are not classes, so no label is suggested."
        more = "The order still shows the rows that the other rows do not explain."
        found.append(alerts.Alert("note", head, more))
    return Audit(
        subject,
        alerts.merged(found),
        values=values,
        choice=choice,
        order=order,
        suggested=suggested,
        thresholds=thresholds,
        last=last,
        top=top,
    )


def _check(top: int, ranking: str, folds: Any, fit: Any) -> None:
    """Raise ValueError if an argument of `audit` is invalid."""
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}.")
    if ranking not in (AUTO, *RANKINGS):
        names = ", ".join(map(repr, (AUTO, *RANKINGS)))
        raise ValueError(f"ranking must be one of {names}, got {ranking!r}.")
    if folds is not None and not is_integer(folds, 2):
        raise ValueError(f"folds must be at least 2, got {folds!r}.")
    if (folds is None) != (fit is None):
        there, gone = ("fit", "folds") if folds is None else ("folds", "fit")
        remedy = "fit trains the model without each fold, such as a function (model, x, y)."
        raise ValueError(f"{gone} must be given with {there}, got None; {remedy}")
    if ranking == "folds" and folds is None:
        raise ValueError("folds must be given for the ranking 'folds', got None.")


def _last_layer(subject: Subject) -> tuple[LastLayer | None, str]:
    """Return the last layer, refitted on all rows, and "". If impossible: None and the reason."""
    known = subject.of_train
    if known.given is None:
        return None, "the labels are neither classes nor one number for each row"
    if not known.of_classes and np.ptp(known.given) == 0:
        return None, "all labels are the same number"
    size = subject.options.batch_size
    features = features_of(subject.net, subject.train, size)
    if isinstance(features, str):
        return None, features
    held_out = None
    if subject.test_rows is not None and subject.of_test.given is not None:
        other = features_of(subject.net, subject.test, size)
        if not isinstance(other, str):
            held_out = other, subject.of_test.given
    weights = sample_weights(subject.train.y)
    try:
        return last_layer(features, known.given, known.num_classes, held_out, weights), ""
    except ValueError as error:
        return None, str(error).removesuffix(".")


def _margins(found: OutOfSample) -> NDArray:
    """Return the margins (n,) for classes, or minus the absolute residuals (n,) for numbers."""
    return found.margins if found.of_classes else -np.abs(found.residuals)


def _reproduced(subject: Subject) -> float | None:
    """Return the accuracy on training rows; R^2 if labels are numbers; None for other labels."""
    known = subject.of_train
    if known.of_classes:
        return known.accuracy
    if known.given is None or known.predicted is None:
        return None
    return 1 - float(np.mean((known.given - known.predicted) ** 2) / np.var(known.given))


def _suggested(
    subject: Subject, best: OutOfSample | None, ranking: str
) -> tuple[dict[int, int], NDArray | None]:
    """Return the suggested labels by row, and the thresholds of confident learning.

    If the rows are ranked by the history, the outputs may have memorised labels. A label is then
    doubted if the row's mean margin over the epochs is negative. The suggested label is the most
    probable other class. This rule needs a history of class margins. A history may also consist of
    residuals or losses with a minus sign. Those are negative for almost every row, so the rule
    would doubt almost every label.
    """
    known = subject.of_train
    if best is None or not best.of_classes or known.given is None:
        return {}, None
    given = known.given
    found = mislabelled.confident(best.probabilities, given)
    chosen = found.suggested
    history = subject.history
    if ranking == "history" and history is not None and history.of_classes:
        other = best.outputs.copy()
        other[np.arange(len(given)), given] = -np.inf
        chosen = np.where(history.area() < 0, other.argmax(axis=1), given)
    rows = np.flatnonzero(chosen != given)
    return {int(row): int(chosen[row]) for row in rows}, found.thresholds


def _self_influence(subject: Subject) -> NDArray:
    """Return the self-influence (n,) of all rows. A work folder stores each finished block."""
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
