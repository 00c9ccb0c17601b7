"""Explanation of predictions by the most helpful and the most harmful training rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.examples.examples import check_rows
from influence.examples.given import Data
from influence.net.checked import Net
from influence.scores import asked
from influence.scores.influence import Scores
from influence.tool import alerts
from influence.tool.answer import Answer, short, value_of
from influence.tool.page import Column, Gallery, Page, Section, Table
from influence.tool.request import USUAL_TOP, USUAL_WRONG
from influence.tool.rows import Rows
from influence.tool.shown import item, plain
from influence.tool.subject import QuestionOptions, Subject

_ONLY_TO_ZERO = "this loss cannot fall below 0"


@dataclass(frozen=True, eq=False)
class Explanation(Answer):
    """The most helpful and the most harmful training rows of some predictions.

    Attributes:
      rows: (m,) the explained test rows.
      scores: (m, n) predicted change of each test loss if one training row is left out. Positive:
        the row helped.
      top: largest number of helpful rows, and of harmful rows, for each test row.
      helpful: for each test row, the training rows with the largest positive scores. The largest
        score is first.
      harmful: for each test row, the training rows with the most negative scores. The most negative
        score is first.
      error_bounds: dict from (index into `rows`, training row) to a bound on the score's error. The
        bound covers the solver's error only. NaN if no bound is known.
      why: a sentence about the choice of the test rows.
    """

    rows: NDArray[np.int64]
    scores: Scores
    top: int
    helpful: list[NDArray[np.int64]]
    harmful: list[NDArray[np.int64]]
    error_bounds: dict[tuple[int, int], float]
    why: str

    @cached_property
    def learned(self) -> NDArray[np.int64] | None:
        """(n,) epoch in which the network learned each row, as in `History.learned`.

        After this epoch the row's margin stayed positive. 0 if the network did not learn the row.
        None if there is no history with class margins.
        """
        history = self.subject.history
        return None if history is None or not history.of_classes else history.learned()

    @cached_property
    def impossible(self) -> NDArray[np.bool_]:
        """(m, n) True where a score predicts a negative value of a loss that cannot be negative."""
        changes = np.asarray(self.scores)
        if not asked.never_negative(self.subject.net.loss):
            return np.zeros(changes.shape, bool)
        return asked.impossible(self.subject.of_test.losses[self.rows].astype(float), changes)

    def records(self) -> list[dict[str, Any]]:
        """Return one dict for each pair of a test row and one of its helpful or harmful rows."""
        found = []
        train, test = self.subject.train_rows, self.subject.shown_test
        given = self.subject.of_train
        leverage, impossible = _leverage(self.scores), self.impossible
        for position, row in enumerate(self.rows):
            for effect, chosen in (("helped", self.helpful), ("hurt", self.harmful)):
                for rank, other in enumerate(chosen[position], 1):
                    record = {
                        "test_row": int(row),
                        "test_name": test.name(int(row)),
                        "effect": effect,
                        "rank": rank,
                        "train_row": int(other),
                        "train_name": train.name(int(other)),
                        "train_label": label_of(given, train, int(other)),
                        "change_if_removed": value_of(self.scores[position, other]),
                        "error_bound": value_of(self.error_bounds.get((position, int(other)))),
                    }
                    record["impossible"] = bool(impossible[position, other])
                    if leverage is not None:
                        record["leverage"] = value_of(leverage[int(other)])
                    if self.learned is not None:
                        record["learned_in_epoch"] = int(self.learned[int(other)])
                    found.append(record)
        return found

    def numbers(self) -> dict[str, Any]:
        """Return label, prediction, confidence, loss and solver residual of each explained row."""
        return {"test": [self._about(position) for position in range(len(self.rows))]}

    def _about(self, position: int) -> dict[str, Any]:
        row = int(self.rows[position])
        known, names = self.subject.of_test, self.subject.shown_test
        sure = known.confidence
        return {
            "row": row,
            "name": names.name(row),
            "label": label_of(known, names, row),
            "predicted": label_of(known, names, row, predicted=True),
            "confidence": None if sure is None else value_of(sure[row]),
            "loss": value_of(known.losses[row]),
            "residual": value_of(self.scores.solution.residual[position]),
        }

    @property
    def summary(self) -> list[str]:
        """The answer in a few sentences."""
        found = [self.why]
        for position in range(min(len(self.rows), 10)):
            about = self._about(position)
            helped, hurt = self.helpful[position], self.harmful[position]
            parts = []
            if len(helped):
                parts.append(f"{self._named(helped[0])} helped most")
            if len(hurt):
                parts.append(f"{self._named(hurt[0])} hurt most")
            found.append(
                f"Test {plain(about['name'], 120)} ({_prediction_words(about)}): "
                f"{' and '.join(parts) or 'no training row changes its loss'}."
            )
        return found

    def _named(self, row: int) -> str:
        names = self.subject.train_rows
        label = label_of(self.subject.of_train, names, int(row))
        return plain(names.name(int(row)), 120) + (f" (label {label})" if label else "")

    def page(self, size: int) -> Page:
        """Return the page. `size` limits the longer side of most pictures, in pixels."""
        sections = [self._section(position, size) for position in range(len(self.rows))]
        columns = [Column("Test row"), Column("Effect"), Column("Rank", True)]
        columns += [Column("Training row"), Column("Label"), Column("Change if removed", True)]
        columns += [Column("Error bound", True, 2)]
        keys = ["test_name", "effect", "rank", "train_name", "train_label", "change_if_removed"]
        keys += ["error_bound"]
        records = self.records()
        if _leverage(self.scores) is not None:
            columns.append(Column("Leverage", True, 2))
            keys.append("leverage")
        if self.learned is not None:
            columns.append(Column("Learned in epoch", True))
            keys.append("learned_in_epoch")
        caption = (
            "Predicted change of the test row's loss if the training row were left out. Positive: "
            "the row helped. The error bound is that of the solver alone."
        )
        if any(record["impossible"] for record in records):
            caption += f" Impossible: {_ONLY_TO_ZERO}. Use the order there, not the size."
            columns.append(Column("Impossible"))
            keys.append("impossible")
        shown = [r | {"impossible": "impossible" if r["impossible"] else ""} for r in records]
        table = Table(caption, columns, [[r[key] for key in keys] for r in shown])
        sections.append(Section("All shown rows", parts=[table]))
        return Page(
            "Which training rows made these predictions?",
            self.summary,
            self.alerts,
            sections,
            self.facts(),
        )

    def _section(self, position: int, size: int) -> Section:
        row = int(self.rows[position])
        about = self._about(position)
        test = self.subject.shown_test
        residual = about["residual"]
        lines = [f"The model's answer: {_prediction_words(about)}."]
        if residual is not None:
            lines.append(f"The system was solved to a relative residual of {short(residual, 2)}.")
        parts = [
            Gallery(
                "These training rows helped most",
                [self._card(position, int(k), size) for k in self.helpful[position]],
                "good",
                "Without one of them the loss of this prediction would rise.",
            ),
            Gallery(
                "These training rows hurt most",
                [self._card(position, int(k), size) for k in self.harmful[position]],
                "bad",
                "Without one of them the loss of this prediction would fall.",
            ),
        ]
        shown = item(test, row, max(size, 96))
        return Section(f"Test {plain(test.name(row), 120)}", lines, shown, parts)

    def _card(self, position: int, row: int, size: int) -> dict[str, Any]:
        test = self.subject.shown_test, int(self.rows[position])
        names = self.subject.train_rows
        facts = []
        label = label_of(self.subject.of_train, names, row)
        if label:
            facts.append(f"label {plain(label, 60)}")
        change = float(self.scores[position, row])
        facts.append(f"without it the loss changes by {change:+.3g}")
        if self.impossible[position, row]:
            facts.append(f"impossible: {_ONLY_TO_ZERO}")
        bound = self.error_bounds.get((position, row), np.nan)
        if np.isfinite(bound):
            facts.append(f"solver's error at most {short(bound, 2)}")
        leverage = _leverage(self.scores)
        if leverage is not None:
            facts.append(f"leverage {short(leverage[row], 2)}")
        if self.learned is not None:
            epoch = int(self.learned[row])
            facts.append(f"learned in epoch {epoch}" if epoch else "not learned in training")
        return {"item": item(names, row, size, test), "facts": facts, "id": f"train-{row}"}

    def facts(self) -> list[tuple[str, Any]]:
        """Return pairs (name, value) about the model, the data and the computation."""
        found = [*super().facts(), *plan_facts(self.subject)]
        return [*found, *history_facts(self.subject)]

    def draw(self, figure: Any) -> None:
        """Draw the scores of the helpful and harmful rows of the first test row as bars."""
        axes = figure.add_subplot()
        chosen = [*self.helpful[0], *self.harmful[0][::-1]]
        values = [float(self.scores[0, row]) for row in chosen]
        colours = ["#1b6e2d" if value > 0 else "#a4161a" for value in values]
        axes.barh(range(len(chosen)), values, color=colours)
        names = [plain(self.subject.train_rows.name(int(row)), 30) for row in chosen]
        axes.set_yticks(range(len(chosen)), names)
        axes.invert_yaxis()
        axes.set_xlabel("change of the loss if the row is left out")
        axes.set_title(f"Test {plain(self.subject.shown_test.name(int(self.rows[0])), 40)}")


def explain(
    model: Net,
    train: Data | Rows,
    test: Data | Rows | None = None,
    *,
    rows: ArrayLike | None = None,
    wrong: int | None = None,
    top: int = USUAL_TOP,
    options: QuestionOptions = QuestionOptions(),
) -> Explanation:
    """Find the training rows with the largest effects on some predictions.

    A score is the predicted change of a test row's loss if one training row is left out
    (`Influence.scores`). Positive: the loss rises without the training row, so the row helped.

    Args:
      model: a compiled Keras model, a net, or the path of a saved model.
      train: the training set, in any form that `fit` takes.
      test: the test set. If None, predictions of training rows are explained.
      rows: (m,) the test rows to explain, or None.
      wrong: number of mistakes to explain, or None. The most confident mistakes are taken. Give
        `rows` or `wrong`, not both. If both are None, five mistakes are explained.
      top: largest number of helpful rows, and of harmful rows, for each test row.
      options: options of the computation.

    Returns: an Explanation, with `table`, `plot` and `to_html`. A notebook shows its page.
    Raises: TypeError, ValueError or IndexError naming the invalid argument.
    """
    if rows is not None and wrong is not None:
        raise ValueError("wrong must be left out if rows are given, got both.")
    for name, value in (("wrong", wrong), ("top", top)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    subject = Subject.of(model, train, test, options)
    chosen, why = choose(subject, rows, wrong)
    found: list[alerts.Alert] = []
    with alerts.listening() as heard:
        report = subject.report
        scores = _scores(subject, chosen)
        helpful, harmful = extremes(scores, top)
        shown = np.unique(np.concatenate([*helpful, *harmful, np.zeros(0, int)]).astype(int))
        bounds = _bounds(subject, scores, shown) if len(shown) else {}
    found += alerts.of_report(report, subject.plan) + alerts.of_plan(subject.plan) + heard.alerts
    found += alerts.of_history(subject.history, subject.net)
    if subject.test_rows is None:
        found.append(
            alerts.Alert(
                "note",
                "No test rows were given, so predictions of training rows are explained.",
                "A row's own effect on its loss is among the scores.",
                "Give test rows to explain predictions that the model was not trained on.",
            )
        )
    return Explanation(
        subject, alerts.merged(found), chosen, scores, top, helpful, harmful, bounds, why
    )


def choose(
    subject: Subject, rows: ArrayLike | None, wrong: int | None
) -> tuple[NDArray[np.int64], str]:
    """Return the test rows to explain (m,), and a sentence about their choice.

    Raises: ValueError or IndexError for rows that do not exist.
    """
    n = len(subject.test)
    if rows is not None:
        return check_rows(np.asarray(rows), n), "The test rows are those that were asked for."
    count = min(USUAL_WRONG if wrong is None else wrong, n)
    found, mistakes = subject.of_test.most_wrong(count)
    if not subject.of_test.of_classes:
        return found, f"The test rows are the {count} with the largest losses."
    if mistakes >= count:
        return found, f"The test rows are the {count} most confident of {mistakes:,} mistakes."
    if not mistakes:
        why = f"The model makes no mistake on {n:,} rows, so the test rows are those of the largest"
        return found, f"{why} losses."
    return found, (
        f"The test rows are all {mistakes} mistakes on {n:,} rows, and the {count - mistakes} "
        "other rows of the largest losses."
    )


def extremes(scores: Any, top: int) -> tuple[list[NDArray], list[NDArray]]:
    """Return, for each test row, the training rows with the largest and the smallest scores.

    Args:
      scores: (m, n) scores.
      top: largest number of helpful rows, and of harmful rows, for each test row.

    Returns: (helpful, harmful), two lists of m arrays of training rows. Helpful rows have positive
      scores, harmful rows have negative scores. The largest absolute value comes first.
    """
    helpful, harmful = [], []
    for values in np.asarray(scores):
        order = np.argsort(-values, kind="stable")
        helpful.append(np.array([k for k in order[:top] if values[k] > 0], np.int64))
        harmful.append(np.array([k for k in order[::-1][:top] if values[k] < 0], np.int64))
    return helpful, harmful


def label_of(known: Any, rows: Rows, row: int, predicted: bool = False) -> str:
    """Return a row's label, or predicted label, as text; "" if labels are not single numbers."""
    values = known.predicted if predicted else known.given
    if values is None:
        return ""
    return plain(rows.class_name(values[row]), 120)


def plan_facts(subject: Subject) -> list[tuple[str, Any]]:
    """Return pairs (name, text) about the matrix, damping, solver, dtype and approximation.

    Each text gives the choice and its reason.
    """
    plan = subject.plan
    names = ("Matrix", "Damping", "Solver", "Precision", "Approximation")
    choices = (plan.curvature, f"{plan.damping:.3g}", repr(plan.solver), plan.dtype)
    choices += (plan.approximation.replace("_", " "),)
    pairs = zip(names, choices, plan.reasons, strict=True)
    return [(name, f"{choice} ({why})") for name, choice, why in pairs]


def history_facts(subject: Subject) -> list[tuple[str, Any]]:
    """Return pairs (name, text) about the recorded training; an empty list without a history."""
    history = subject.history
    if history is None:
        return []
    found = [
        f"{len(history.trained)} epochs by {history.about['optimizer']}",
        f"{len(history.epochs)} of them recorded",
        f"margin: {history.about['margin']}",
    ]
    if history.of_classes:
        meaning = (
            "a row is learned in the first recorded epoch after which its margin stays above 0"
        )
        found.append(meaning)
    return [("Training", "; ".join([*found, *history.notes]))]


def _prediction_words(about: dict[str, Any]) -> str:
    parts = []
    if about["predicted"]:
        sure = about["confidence"]
        more = "" if sure is None else f" with probability {sure:.1%}"
        parts.append(f"predicted {about['predicted']}{more}")
    if about["label"]:
        parts.append(f"label {about['label']}")
    parts.append(f"loss {short(about['loss'])}")
    return ", ".join(parts)


def _scores(subject: Subject, chosen: NDArray[np.int64]) -> Scores:
    return subject.influence.scores(subject.test.take(chosen))


def _bounds(
    subject: Subject, scores: Scores, shown: NDArray[np.int64]
) -> dict[tuple[int, int], float]:
    """Return a dict from (index of test row, training row) to a bound on the solver's error."""
    some = replace(scores, change_if_removed=np.asarray(scores)[:, shown], rows=shown)
    bounds = subject.influence.error_bound(some)
    return {
        (i, int(row)): float(bounds[i, j])
        for i in range(len(bounds))
        for j, row in enumerate(shown)
    }


def _leverage(scores: Scores) -> NDArray | None:
    """Return the leverage (n,) of the training rows, or None if the scores do not contain it."""
    found = getattr(scores, "leverage", None)
    return None if found is None else np.asarray(found)
