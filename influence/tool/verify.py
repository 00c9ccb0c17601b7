"""Comparison of predicted changes with actual changes after refits without single rows."""

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

# The chart distinguishes at most this many series by colour.
_SERIES = 6
# The order of the scores holds if the Spearman correlation is at least _ORDER_HOLDS. Below
# _ORDER_FAILS, the scores do not predict the changes. The sizes hold if the Pearson
# correlation is also at least _ORDER_HOLDS, and the slope is between 1 / _SIZE_HOLDS and
# _SIZE_HOLDS.
_ORDER_HOLDS, _ORDER_FAILS, _SIZE_HOLDS = 0.8, 0.5, 1.25
# If the correlation of the actual changes under two seeds is below this number, an alert is shown.
# The seed then causes more than half of the variance of the changes.
RELIABLE = 0.5
# A proximal response must reach this gradient norm, relative to the norm at its start.
# _CONVEX_TOLERANCE applies if the scores use the Hessian. _TOLERANCE applies if they use a
# Gauss-Newton matrix, as for networks. For networks, a smaller norm hardly alters the loss changes,
# and kinks such as those of ReLU may prevent it.
_CONVEX_TOLERANCE, _TOLERANCE = 1e-4, 1e-2
# Each proximal response uses at most this many data passes.
_PASSES = 30
# If the scores use a Gauss-Newton matrix and CG without a preconditioner, the steps of proximal
# responses use a Nystrom sketch of this rank instead.
_RANK = 50
# Proximal responses run in blocks of this many removed rows. An interrupted run continues after the
# last finished block.
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
    """Predicted and actual changes of test losses by the removal of single training rows.

    Attributes:
      test_rows: (m,) the test rows whose losses are compared.
      rows: (k,) the training rows that were removed, one at a time.
      chosen: the first `chosen` entries of `rows` have large scores. The others were drawn at
        random.
      predicted: (m, k) predicted changes of the test losses. Positive: the row helped.
      actual: (m, k) actual changes of the test losses. Positive: the row helped.
      converged: (k,) True if the refit without the row reached its tolerance.
      left: (k,) gradient norm at the end of the refit, relative to the norm at its start. NaN if it
        is unknown.
      truth: the method of the actual changes, in words.
      why: a sentence about the choice of the test rows.
      reliability: correlation r of the actual changes under two seeds, NaN if there are no seeds.
        `actual` is then the mean over both seeds. The correlation of any prediction with this mean
        is at most about the square root of 2 r / (1 + r).
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
        """Compare the predicted with the actual changes of the removed rows `rows[part]`.

        Returns: dict with the correlations `pearson` and `spearman`, with `slope`, the slope of the
          regression line of actual on predicted changes, and with `sign`, the share of changes with
          equal signs. NaN if the numbers are not defined.
        """
        return agreement(self.predicted[:, part].ravel(), self.actual[:, part].ravel())

    def numbers(self) -> dict[str, Any]:
        """Return the reliability, and the agreement for all, large-score and random rows."""
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
        """Return the page. `size` limits the longer side of its pictures, in pixels."""
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
        """Draw a scatter plot of actual against predicted changes, with the line y = x."""
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
    """Remove training rows one at a time, and compare actual with predicted loss changes.

    Half of the removed rows have large scores. The other half is drawn at random. Predictions agree
    better for rows with large scores, so a test with only these rows would be too favourable.

    The method for the actual changes depends on the arguments:

    - If `fit` is given, it retrains the model.
    - If the options contain the history of the training, and the training can be repeated from it,
      the model is retrained from its initial weights (`influence.truth.repeated.retrained`). The
      changes are means over two seeds.
    - Otherwise, if the net is at a minimum of its risk, `leave_one_out` retrains the net. There is
      one exception. If the scores use the Hessian, and the net is not convex or its gradient norm
      exceeds 1e-8, `proximal_response` is used. Without damping, it gives the same changes.
    - Otherwise `proximal_response` computes the changes, with the damping of the scores. If the net
      is not at a minimum, retraining would also continue the training. The changes would then
      include this progress.

    Args:
      model: a compiled Keras model, a net, or the path of a saved model.
      train: the training set, in any form that `fit` takes.
      test: the test set. If None, the losses of training rows are compared.
      remove: number of training rows to remove, at least 2.
      rows: (m,) the test rows whose losses are compared, or None.
      wrong: number of mistakes to compare, or None. The most confident mistakes are taken. Give
        `rows` or `wrong`, not both. If both are None, five mistakes are compared.
      fit: a function (model, x, y) or (model, x, y, sample_weight), or None. It trains a Keras
        model on the rows (x, y). The model is compiled, and has its frozen layers and its trained
        weights. It does not contain lookup layers: x is their output.
      options: options of the computation. With `checkpoints`, an interrupted call can be continued.

    Returns: a Verification, with `agreement`, `table`, `plot` and `to_html`.
    Raises: TypeError, ValueError or IndexError naming the invalid argument.
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
    """Result of the refits: actual changes of m test losses without each of k training rows.

    Attributes:
      changes, converged, left, reliability: as in `Verification`.
      words: the method, as `Verification.truth`.
      said: further alerts.
    """

    changes: NDArray
    converged: NDArray
    words: str
    left: NDArray | None = None
    reliability: float = float("nan")
    said: tuple[alerts.Alert, ...] = ()


def draw_rows(scores: Scores, count: int) -> tuple[NDArray[np.int64], int]:
    """Draw `count` training rows: half with large scores for a test row, and half at random.

    Returns: the rows (k,), and the number of rows with large scores. These rows come first.
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
        # `fit` trains the whole model, which needs the original inputs and not the features.
        whole = inputs_of(subject.train)
        test = inputs_of(subject.test).take(chosen)
        found = leave_one_out(subject.net.uncut(), whole, test, removed, options)
        # `fit` has no tolerance, so `found.converged` is always False. True prevents an alert about
        # refits that miss their tolerance.
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
    # At a minimum of the risk, with the undamped Hessian, the proximal response equals retraining.
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
    """Return the solver that computes the steps of proximal responses.

    The solver changes the number of steps, but not the result, because the gradient norm certifies
    the minimum. With CG, each step would need many products with the Gauss-Newton matrix. A Nystrom
    sketch of this matrix needs such products only once.
    """
    solver, influence = subject.plan.solver, subject.influence
    if not isinstance(solver, CG) or isinstance(influence.operator, Hessian):
        return influence.prepared
    return Nystrom(_RANK) if solver.preconditioner is None else solver.preconditioner


def finish_axes(axes: Any) -> None:
    """Add the line y = x, the axis labels and a legend to a plot of actual against predicted."""
    axes.axline((0, 0), slope=1, color="0.5", linestyle="--", linewidth=1)
    axes.set_xlabel("predicted change of the loss")
    axes.set_ylabel("actual change of the loss")
    axes.legend(fontsize="small")


def besides_sizes(found: list[alerts.Alert]) -> list[alerts.Alert]:
    """Remove the alerts that begin with `ORDER_NOT_SIZE`, because `verify` measures the sizes."""
    return [a for a in found if not a.headline.startswith(alerts.ORDER_NOT_SIZE)]


def of_verdict(found: dict[str, float]) -> list[alerts.Alert]:
    """Return an alert if the order or the sizes of the scores do not hold, else an empty list."""
    text = verdict(found)
    if text.startswith("The scores hold:"):
        return []
    level = "stop" if "Do not use" in text else "care"
    return [alerts.Alert(level, text, words(found) + ".")]


def agreement(predicted: NDArray, actual: NDArray) -> dict[str, float]:
    """Compare two arrays of changes. The result is as in `Verification.agreement`."""
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
    """Return the numbers of an agreement as text in one line."""
    return (
        f"Pearson {short(found['pearson'])}, Spearman {short(found['spearman'])}, slope "
        f"{short(found['slope'])} (actual on predicted), equal signs {found['sign']:.0%}"
        if np.isfinite(found["pearson"])
        else "the changes are all equal"
    )


def verdict(found: dict[str, float]) -> str:
    """Return a verdict on the scores as text: do their order and their sizes hold?"""
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
