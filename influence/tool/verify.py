"""How far do predicted changes agree with actual ones, after refits without rows?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import ArrayLike, NDArray

from influence.curvature.operators import Hessian
from influence.examples.examples import Examples
from influence.examples.featured import inputs_of
from influence.examples.given import Data
from influence.net.checked import Net
from influence.scores.influence import Scores
from influence.solvers import CG, Nystrom
from influence.tool import alerts, own_training
from influence.tool.answer import Answer, short, value_of
from influence.tool.chart import Point, scatter
from influence.tool.explain import choose, label_of, plan_facts
from influence.tool.page import Chart, Column, Page, Section, Table
from influence.tool.request import USUAL_REMOVE, USUAL_WRONG
from influence.tool.rows import Rows
from influence.tool.shown import item, plain
from influence.tool.subject import QuestionOptions, Subject
from influence.truth.leave_out import RefitOptions, leave_one_out
from influence.truth.proximal import ProximalOptions, proximal_response
from influence.truth.repeated import retrained, why_not

# The chart has at most this many series. Each has a colour.
_SERIES = 6
# From this rank correlation on the order holds. The sizes do if the Pearson correlation passes it
# too and the slope is within this factor of 1.
_ORDER_HOLDS, _ORDER_FAILS, _SIZE_HOLDS = 0.8, 0.5, 1.25
# Below this correlation between two seeds, less than half of the changes' variance is the rows'.
RELIABLE = 0.5
# The gradient norm that a refit must reach, relative to that of the removal: for a convex risk, and
# for a network. A network's changes hardly move below, and its kinks may keep it from less.
_CONVEX_TOLERANCE, _TOLERANCE = 1e-4, 1e-2
# A proximal response takes at most this many data passes.
_PASSES = 30
# A sketch of this rank gives the steps of proximal responses where the scores' solver is CG.
_RANK = 50
# This many rows are refitted together. An interrupted run goes on after each block.
_BLOCK = 5
_RETRAINED = "retraining without the row, to the minimum of the risk"
_AGAIN = (
    "training again without the row from the recorded start, by the recorded recipe, less the same "
    "training on all rows; the mean over two seeds, because the order of the rows is not known"
)
_OWN = "retraining without the row by your own function"
_PROXIMAL = (
    "the proximal response: the model moves to where the row's loss no longer counts, and stays "
    "near its present weights"
)


@dataclass(frozen=True, eq=False)
class Verification(Answer):
    """Predicted changes beside actual ones.

    Attributes:
      test_rows: (m,) the test rows whose losses are compared.
      rows: (k,) the training rows that were removed, one at a time.
      chosen: number of rows, the first ones, that were chosen for their large scores. The others
        were drawn at random.
      predicted, actual: (m, k) changes of the test losses. Positive: the row helped.
      converged: (k,) True if the row's refit reached its tolerance.
      reliability: correlation of two seeds' actual changes, NaN if there are no seeds. A
        prediction cannot agree with the changes better than the root of 2 r / (1 + r).
      left: (k,) share of the removal's gradient that the refit left, NaN if it is not known.
      truth: how the actual changes were computed, in words.
      why: how the test rows were chosen.
    """

    test_rows: NDArray[np.int64]
    rows: NDArray[np.int64]
    chosen: int
    predicted: NDArray
    actual: NDArray
    converged: NDArray
    left: NDArray
    truth: str
    why: str
    reliability: float = float("nan")

    def agreement(self, part: slice = slice(None)) -> dict[str, float]:
        """Compare all changes of some of the removed rows.

        Returns: `pearson`, `spearman`, `slope` of the least-squares line of actual on predicted
          changes, and `sign`, the share of equal signs. NaN if they are not defined.
        """
        return agreement(self.predicted[:, part].ravel(), self.actual[:, part].ravel())

    def numbers(self) -> dict[str, Any]:
        """Return how far predicted and actual changes agree."""
        parts = {"all": slice(None), "largest_scores": slice(0, self.chosen)}
        parts["random"] = slice(self.chosen, None)
        found = {
            name: {key: value_of(value) for key, value in self.agreement(part).items()}
            for name, part in parts.items()
        }
        about = {"truth": self.truth, "test_rows": self.test_rows.tolist()}
        return {"agreement": found, **about, "reliability": value_of(self.reliability)}

    def records(self) -> list[dict[str, Any]]:
        """Return one dict for each pair of a test row and a removed row."""
        train, test = self.subject.train_rows, self.subject.shown_test
        return [
            {
                "test_row": int(row),
                "test_name": plain(test.name(int(row)), 300),
                "train_row": int(other),
                "train_name": plain(train.name(int(other)), 300),
                "train_label": label_of(self.subject.of_train, train, int(other)),
                "drawn": "largest score" if j < self.chosen else "random",
                "predicted": value_of(self.predicted[i, j]),
                "actual": value_of(self.actual[i, j]),
                "converged": bool(self.converged[j]),
                "gradient_left": value_of(self.left[j]),
            }
            for i, row in enumerate(self.test_rows)
            for j, other in enumerate(self.rows)
        ]

    @property
    def summary(self) -> list[str]:
        """The answer in a few sentences."""
        found = self.agreement()
        parts = [
            verdict(found),
            f"{len(self.rows)} training rows were removed one at a time, {self.chosen} with large "
            f"scores and {len(self.rows) - self.chosen} at random. The actual changes are those "
            f"of {self.truth}.",
            f"All: {words(found)}.",
        ]
        if 1 < self.chosen < len(self.rows) - 1:
            parts.append(f"Rows with large scores: {words(self.agreement(slice(0, self.chosen)))}.")
            parts.append(f"Random rows: {words(self.agreement(slice(self.chosen, None)))}.")
        return [*parts, self.why]

    def page(self, size: int) -> Page:
        """Return the page, with pictures of at most `size` pixels."""
        train, test = self.subject.train_rows, self.subject.shown_test
        panels, points = [], []
        for j, row in enumerate(map(int, self.rows)):
            label = label_of(self.subject.of_train, train, row)
            facts = [f"label {label}"] if label else []
            facts.append("chosen for its large score" if j < self.chosen else "drawn at random")
            panels.append({"item": item(train, row, size), "facts": facts, "id": f"row-{row}"})
        for i, row in enumerate(self.test_rows):
            for j, other in enumerate(self.rows):
                x, y = float(self.predicted[i, j]), float(self.actual[i, j])
                if np.isfinite(x) and np.isfinite(y):
                    name, of_test = train.name(int(other)), test.name(int(row))
                    text = f"training {plain(name, 80)}, test {plain(of_test, 80)}: "
                    text += f"predicted {x:.3g}, actual {y:.3g}"
                    points.append(Point(x, y, text, f"row-{other}", i))
        parts: list[Any] = []
        if points:
            drawing = scatter(points, "predicted change of the loss", "actual change of the loss")
            legend = [f"test {plain(test.name(int(row)), 60)}" for row in self.test_rows[:_SERIES]]
            title = "Predicted against actual change of each test loss"
            parts.append(Chart(title, drawing, panels, legend))
        columns = [Column("Test row"), Column("Training row"), Column("Label"), Column("Drawn")]
        columns += [Column("Predicted", True), Column("Actual", True)]
        keys = ("test_name", "train_name", "train_label", "drawn", "predicted", "actual")
        caption = "Change of the test loss without the training row. Positive: the row helped."
        table = Table(caption, columns, [[r[key] for key in keys] for r in self.records()])
        sections = [Section("Predicted and actual", parts=parts)]
        sections.append(Section("All changes", parts=[table]))
        title = "Do the predictions hold?"
        return Page(title, self.summary, self.alerts, sections, self.facts())

    def facts(self) -> list[tuple[str, Any]]:
        """Return pairs (name, value) about the model, the data and the computation."""
        facts = [*super().facts(), *plan_facts(self.subject)]
        return [*facts, ("Actual changes", self.truth)]

    def draw(self, figure: Any) -> None:
        """Draw actual against predicted changes, with the line y = x."""
        axes = figure.add_subplot()
        for i, row in enumerate(self.test_rows):
            name = plain(self.subject.shown_test.name(int(row)), 40)
            axes.scatter(self.predicted[i], self.actual[i], s=18, label=f"test {name}")
        finish_axes(axes)


def verify(
    model: Net,
    train: Data | Rows,
    test: Data | Rows | None = None,
    *,
    remove: int = USUAL_REMOVE,
    rows: ArrayLike | None = None,
    wrong: int | None = None,
    fit: Callable[..., Any] | None = None,
    options: QuestionOptions = QuestionOptions(),
) -> Verification:
    """Remove training rows one at a time, and compare the actual with the predicted changes.

    Half of the rows have large scores, and half are drawn at random, because rows with large scores
    agree better than others. The actual changes come from `leave_one_out` if the net is at a
    minimum of its risk. Elsewhere retraining would also go on with the training, so the changes are
    those of `proximal_response`, with the damping of the scores. If the options have the history of
    the training, and the training can be repeated from it, the changes are those of training again
    from its start (`influence.truth.repeated.retrained`), the mean over two seeds.

    Args:
      model: a compiled Keras model, a net, or the path of a saved model.
      train: the training set, in any form that `fit` takes.
      test: the test set. None compares the losses of training rows.
      remove: number of training rows to remove.
      rows: (m,) the test rows whose losses are compared.
      wrong: number of mistakes to compare, instead of `rows`. Without both, five.
      fit: a function (model, x, y) or (model, x, y, sample_weight) that trains a Keras model on the
        rows that it gets. It replaces the refits above. The model is the whole one behind lookup
        layers, compiled, with its trained weights.
      options: options of the computation. With `checkpoints`, an interrupted call is continued.

    Returns: a Verification, with `agreement`, `table`, `plot` and `to_html`.
    Raises: TypeError, ValueError or IndexError that names the argument that is wrong.
    """
    if rows is not None and wrong is not None:
        raise ValueError("wrong must be left out if rows are given, got both.")
    if remove < 2:
        raise ValueError(f"remove must be at least 2, got {remove}.")
    subject = Subject.of(model, train, test, options)
    chosen, why = choose(subject, rows, USUAL_WRONG if wrong is None and rows is None else wrong)
    with alerts.listening() as heard:
        report = subject.report
        scores = subject.influence.scores(subject.test.take(chosen))
        removed, largest = draw_rows(scores, min(remove, len(subject.train) - 1))
        found = _actual(subject, chosen, removed, fit)
    predicted = np.asarray(scores)[:, removed]
    said = besides_sizes(alerts.of_report(report, subject.plan) + heard.alerts)
    left = np.full(len(removed), np.nan) if found.left is None else found.left
    answer = Verification(
        subject,
        (),
        test_rows=chosen,
        rows=removed,
        chosen=largest,
        predicted=predicted,
        actual=found.changes,
        converged=found.converged,
        left=left,
        truth=found.words,
        why=why,
        reliability=found.reliability,
    )
    return replace(answer, alerts=alerts.merged([*_of_agreement(answer), *found.said, *said]))


@dataclass(frozen=True, eq=False)
class _Actual:
    """Actual changes (m, k), the state of the k refits, and how they were computed."""

    changes: NDArray
    converged: NDArray
    words: str
    left: NDArray | None = None
    reliability: float = float("nan")
    said: tuple[alerts.Alert, ...] = ()


def draw_rows(scores: Scores, count: int) -> tuple[NDArray[np.int64], int]:
    """Draw training rows: half with large scores for some test row, and half at random.

    Returns: the rows (k,), those with large scores first, and the number of these.
    """
    values = np.abs(np.asarray(scores))
    largest = values.max(axis=1, keepdims=True)
    share = (values / np.where(largest > 0, largest, 1)).max(axis=0)
    order = np.argsort(-share, kind="stable")
    half = (count + 1) // 2
    rest = np.random.default_rng(0).permutation(np.sort(order[half:]))
    return np.concatenate([order[:half], rest[: count - half]]), half


def _actual(
    subject: Subject, chosen: NDArray, removed: NDArray, fit: Callable[..., Any] | None
) -> _Actual:
    folder, size = subject.store.work, subject.options.batch_size
    test = subject.test.take(chosen)
    kept: dict[str, Any] = {"batch_size": size, "checkpoints": folder}
    if fit is not None:
        options = RefitOptions(
            fit=own_training.fitting(fit), key=own_training.source(fit), method="fit", **kept
        )
        # The function gets the inputs of the whole model, with its frozen layers.
        whole = inputs_of(subject.train)
        test = inputs_of(subject.test).take(chosen)
        found = leave_one_out(subject.net.uncut(), whole, test, removed, options)
        # A function without a tolerance is never `converged`.
        return _Actual(found.change_if_removed, np.ones(len(removed), bool), _OWN)
    history = subject.history
    if history is not None:
        reason = why_not(subject.net, subject.train, history)
        if reason is None:
            again = retrained(subject.net, subject.train, test, removed, history, **kept)
            return _Actual(
                again.change_if_removed,
                np.ones(len(removed), bool),
                _AGAIN,
                reliability=again.reliability,
            )
        note = alerts.Alert(
            "note",
            "The training cannot be repeated from its history.",
            f"It was asked for, but {reason}.",
        )
        return replace(_without_history(subject, test, removed), said=(note,))
    return _without_history(subject, test, removed)


def _without_history(subject: Subject, test: Examples, removed: NDArray) -> _Actual:
    influence, net, size = subject.influence, subject.influence.net, subject.options.batch_size
    kept: dict[str, Any] = {"batch_size": size, "checkpoints": subject.store.work}
    if net.convex and net.gradient_norm(subject.train, size) <= 1e-8:
        options = RefitOptions(method="newton", **kept)
        found = leave_one_out(net, subject.train, test, removed, options)
        return _Actual(found.change_if_removed, found.converged, _RETRAINED)
    hessian = isinstance(influence.operator, Hessian)
    if subject.at_minimum and not hessian:
        found = leave_one_out(net, subject.train, test, removed, RefitOptions(method="fit", **kept))
        return _Actual(found.change_if_removed, found.converged, _RETRAINED)
    # At a minimum, this is retraining if the matrix is the undamped Hessian.
    found = proximal_response(
        net,
        subject.train,
        test,
        removed,
        ProximalOptions(
            solver=_steps(subject),
            tolerance=_CONVEX_TOLERANCE if hessian else _TOLERANCE,
            max_iterations=_PASSES,
            block=_BLOCK,
            **kept,
        ),
        damping=subject.plan.damping,
        objective="leave_one_out" if hessian else "bregman",
    )
    words = _RETRAINED if subject.at_minimum else _PROXIMAL
    return _Actual(found.change_if_removed, found.converged, words, found.gradient_norm)


def _steps(subject: Subject) -> Any:
    """Return the inverse for the steps of proximal responses.

    Any inverse leads to the same minimum, which the gradient certifies. Where the scores' solver
    solves each system by many products, a sketch of the matrix costs them only once.
    """
    solver, influence = subject.plan.solver, subject.influence
    if not isinstance(solver, CG) or isinstance(influence.operator, Hessian):
        return influence.prepared
    return Nystrom(_RANK) if solver.preconditioner is None else solver.preconditioner


def finish_axes(axes: Any) -> None:
    """Draw the line y = x in a drawing of actual against predicted changes, and name its axes."""
    axes.axline((0, 0), slope=1, color="0.5", linestyle="--", linewidth=1)
    axes.set_xlabel("predicted change of the loss")
    axes.set_ylabel("actual change of the loss")
    axes.legend(fontsize="small")


def besides_sizes(found: list[alerts.Alert]) -> list[alerts.Alert]:
    """Return the alerts except those that doubt the sizes, because `verify` measures the sizes."""
    return [a for a in found if not a.headline.startswith(alerts.ORDER_NOT_SIZE)]


def of_verdict(found: dict[str, float]) -> list[alerts.Alert]:
    """Return an alert if an agreement is not that of scores that hold in order and size."""
    text = verdict(found)
    if text.startswith("The scores hold:"):
        return []
    level = "stop" if "Do not use" in text else "care"
    return [alerts.Alert(level, text, words(found) + ".")]


def agreement(predicted: NDArray, actual: NDArray) -> dict[str, float]:
    """Compare predicted with actual changes, as `Verification.agreement` describes."""
    good = np.isfinite(predicted) & np.isfinite(actual)
    predicted, actual = predicted[good], actual[good]
    nan = float("nan")
    if len(predicted) < 2 or np.ptp(predicted) == 0 or np.ptp(actual) == 0:
        return {"pearson": nan, "spearman": nan, "slope": nan, "sign": nan}
    line = scipy.stats.linregress(predicted, actual)
    return {
        "pearson": float(line.rvalue),  # type: ignore[attr-defined]
        "spearman": float(scipy.stats.spearmanr(predicted, actual)[0]),  # type: ignore[index]
        "slope": float(line.slope),  # type: ignore[attr-defined]
        "sign": float(np.mean(np.sign(predicted) == np.sign(actual))),
    }


def words(found: dict[str, float]) -> str:
    """Return an agreement in one line."""
    return (
        f"Pearson {short(found['pearson'])}, Spearman {short(found['spearman'])}, slope "
        f"{short(found['slope'])} (actual on predicted), equal signs {found['sign']:.0%}"
        if np.isfinite(found["pearson"])
        else "the changes are all equal"
    )


def verdict(found: dict[str, float]) -> str:
    """Say in one sentence what of the scores holds."""
    pearson, order, slope = found["pearson"], found["spearman"], found["slope"]
    if not np.isfinite(pearson):
        return "Nothing can be said, because the changes are all equal."
    if order < _ORDER_FAILS:
        return "The scores do not predict the actual changes of this model. Do not use them."
    if order < _ORDER_HOLDS:
        return "The scores hold roughly. Use the order of the rows with care, and not the sizes."
    if pearson >= _ORDER_HOLDS and 1 / _SIZE_HOLDS <= slope <= _SIZE_HOLDS:
        return "The scores hold: the order and the sizes of the changes."
    if 1 / _SIZE_HOLDS <= slope <= _SIZE_HOLDS:
        return "Use the order, not the size. The actual changes scatter around the predicted ones."
    times = f"about {slope:.2g} times as large as" if slope > 0 else "opposite to"
    return f"Use the order, not the size. The actual changes are {times} the predicted ones."


def _of_agreement(answer: Verification) -> list[alerts.Alert]:
    found = of_verdict(answer.agreement())
    if answer.reliability < RELIABLE:
        head = "Training again by another order of the rows changes as much as a removed row."
        why = f"The changes of two seeds have a correlation of {answer.reliability:.2g}. No score "
        why += "of single rows can agree with them much better. Groups of rows have larger changes."
        found.append(alerts.Alert("care", head, why))
    if answer.truth == _PROXIMAL:
        head = "The actual changes are proximal responses and not those of retraining."
        why = "The model is not at a minimum of its risk, so retraining would also continue the "
        why += "training. How far the scores predict that, only --fit (your own training) shows."
        found.append(alerts.Alert("note", head, why))
    if not answer.converged.all():
        count = int(np.count_nonzero(~answer.converged))
        head = f"{count} of {len(answer.rows)} refits did not reach their tolerance."
        share = np.median(answer.left[~answer.converged])
        detail = "Their actual changes are not exact. "
        if np.isfinite(share):
            detail += f"Half of them left at least {share:.0%} of the gradient to be removed. "
        detail += "Where a model has kinks, such as those of ReLU, a refit may end at one."
        found.append(alerts.Alert("care", head, detail))
    return found
