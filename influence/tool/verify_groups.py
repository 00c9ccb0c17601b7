"""Comparison of predicted with actual changes for groups of rows, by the user's own training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common.progress import progress
from influence.examples.featured import inputs_of
from influence.examples.given import Data
from influence.net.checked import Net
from influence.net.questions import PerRow
from influence.scores.influence import Scores
from influence.tool import alerts, own_training
from influence.tool.answer import Answer, short, value_of
from influence.tool.chart import Point, scatter
from influence.tool.explain import choose, plan_facts
from influence.tool.page import Chart, Column, Page, Section, Table
from influence.tool.request import USUAL_WRONG
from influence.tool.rows import Rows
from influence.tool.shown import plain
from influence.tool.store import name_of
from influence.tool.subject import QuestionOptions, Subject
from influence.tool.verify import (
    RELIABLE,
    agreement,
    besides_sizes,
    finish_axes,
    of_verdict,
    verdict,
    words,
)

# The model is trained under each of these seeds: once on all rows, and once without each group.
SEEDS = (0, 1)
# Default size of a group, as a share of the training rows.
_SHARE = 0.05
_CHOSEN, _RANDOM = "chosen", "random"


@dataclass(frozen=True, eq=False)
class GroupVerification(Answer):
    """Predicted and actual changes of test losses by the removal of groups of training rows.

    Attributes:
      test_rows: (m,) the test rows whose losses are compared.
      groups: k arrays of training rows.
      drawn: k words: "chosen" for a group with large scores, "random" for a random group.
      predicted: (m, k) predicted changes of the test losses: the sum of the scores of the group's
        rows. Positive: the group helped.
      by_seed: (s, m, k) actual changes under each of s seeds: the test loss after training without
        the group, minus the test loss after training on all rows under the same seed.
      why: a sentence about the choice of the test rows.
    """

    test_rows: NDArray[np.int64]
    groups: list[NDArray[np.int64]]
    drawn: list[str]
    predicted: NDArray
    by_seed: NDArray
    why: str

    @property
    def actual(self) -> NDArray:
        """(m, k) actual changes of the test losses, the mean over the seeds."""
        return self.by_seed.mean(axis=0)

    def agreement(self, drawn: str | None = None) -> dict[str, float]:
        """Compare predicted with actual changes.

        Args:
          drawn: "chosen" or "random" to compare only these groups, or None for all groups.

        Returns: a dict as from `Verification.agreement`.
        """
        some = np.array([drawn in (None, how) for how in self.drawn])
        return agreement(self.predicted[:, some].ravel(), self.actual[:, some].ravel())

    def repeats(self) -> float:
        """Return the Pearson correlation of the actual changes under the first two seeds.

        Predictions cannot correlate with the actual changes much better than this.
        """
        return agreement(self.by_seed[0].ravel(), self.by_seed[1].ravel())["pearson"]

    def numbers(self) -> dict[str, Any]:
        """Return the agreements for all, chosen and random groups, and the result of `repeats`."""
        found = {
            name: {key: value_of(value) for key, value in self.agreement(drawn).items()}
            for name, drawn in (("all", None), (_CHOSEN, _CHOSEN), (_RANDOM, _RANDOM))
        }
        repeats = value_of(self.repeats())
        return {"agreement": found, "seeds_agree": repeats, "test_rows": self.test_rows.tolist()}

    def records(self) -> list[dict[str, Any]]:
        """Return one dict for each pair of a test row and a group."""
        test = self.subject.shown_test
        return [
            {
                "test_row": int(row),
                "test_name": plain(test.name(int(row)), 300),
                "group": j,
                "drawn": self.drawn[j],
                "predicted": value_of(self.predicted[i, j]),
                "actual": value_of(self.actual[i, j]),
                **{f"seed_{s}": value_of(self.by_seed[k, i, j]) for k, s in enumerate(SEEDS)},
                "rows": " ".join(map(str, group)),
            }
            for i, row in enumerate(self.test_rows)
            for j, group in enumerate(self.groups)
        ]

    @property
    def summary(self) -> list[str]:
        """The answer in a few sentences."""
        size, chosen = len(self.groups[0]), self.drawn.count(_CHOSEN)
        return [
            verdict(self.agreement()),
            f"{len(self.groups)} groups of {size} training rows were removed, {chosen} with large "
            f"scores and {len(self.groups) - chosen} at random. The actual changes are those of "
            f"your own training with new weights, as means over {len(SEEDS)} seeds, against your "
            "own training on all rows.",
            f"All: {words(self.agreement())}.",
            f"Groups with large scores: {words(self.agreement(_CHOSEN))}.",
            f"Random groups: {words(self.agreement(_RANDOM))}.",
            f"The changes under the two seeds agree with each other: Pearson "
            f"{short(self.repeats())}.",
            self.why,
        ]

    def page(self, size: int) -> Page:
        """Return the page. It has no pictures, so `size` has no effect."""
        test, panels, points = self.subject.shown_test, [], []
        for i, row in enumerate(self.test_rows):
            for j, drawn in enumerate(self.drawn):
                x, y = float(self.predicted[i, j]), float(self.actual[i, j])
                if np.isfinite(x) and np.isfinite(y):
                    text = f"{drawn} group {j}, test {plain(test.name(int(row)), 80)}: "
                    text += f"predicted {x:.3g}, actual {y:.3g}"
                    points.append(Point(x, y, text, "", int(drawn == _RANDOM)))
        parts: list[Any] = []
        if points:
            drawing = scatter(points, "predicted change of the loss", "actual change of the loss")
            title = "Predicted against actual change of each test loss, one point for each group"
            parts.append(Chart(title, drawing, panels, ["chosen groups", "random groups"]))
        keys = ["test_name", "group", "drawn", "predicted", "actual"]
        keys += [f"seed_{seed}" for seed in SEEDS]
        columns = [Column("Test row"), Column("Group", True), Column("Drawn")]
        columns += [Column("Predicted", True), Column("Actual", True)]
        columns += [Column(f"Seed {seed}", True) for seed in SEEDS]
        caption = "Change of the test loss without the group. Positive: the group helped."
        table = Table(caption, columns, [[r[key] for key in keys] for r in self.records()])
        sections = [Section("Predicted and actual", parts=parts)]
        sections.append(Section("All changes", parts=[table]))
        title = "Do the predictions hold for groups?"
        return Page(title, self.summary, self.alerts, sections, self.facts())

    def facts(self) -> list[tuple[str, Any]]:
        """Return pairs (name, value) about the model, the data and the computation."""
        return [*super().facts(), *plan_facts(self.subject)]

    def draw(self, figure: Any) -> None:
        """Draw a scatter plot of actual against predicted changes, with the line y = x."""
        axes = figure.add_subplot()
        for how in (_CHOSEN, _RANDOM):
            some = np.array([drawn == how for drawn in self.drawn])
            axes.scatter(self.predicted[:, some], self.actual[:, some], s=18, label=f"{how} groups")
        finish_axes(axes)


def verify_groups(
    model: Net,
    train: Data | Rows,
    test: Data | Rows | None = None,
    *,
    groups: int,
    fit: Callable[..., Any],
    group_size: int | None = None,
    rows: ArrayLike | None = None,
    wrong: int | None = None,
    options: QuestionOptions = QuestionOptions(),
) -> GroupVerification:
    """Remove groups of training rows, retrain by `fit`, and compare the loss changes.

    Half of the groups have large scores. Such a group has the most helpful rows of one test row, or
    its most harmful rows. The other half of the groups is drawn at random. Predictions agree better
    for groups with large scores, so a test with only these groups would be too favourable.

    The predicted change is the sum of the scores of the group's rows. For the actual change, the
    model is trained with new weights, on all rows and without the group. Both trainings are done
    under the same two seeds. `keras.utils.set_random_seed` is called before each training.

    Args:
      model: a compiled Keras model, a net, or the path of a saved model.
      train: the training set, in any form that `fit` takes.
      test: the test set. If None, the losses of training rows are compared.
      groups: number of groups, at least 4.
      fit: a function (model, x, y) or (model, x, y, sample_weight). It trains a Keras model on the
        rows (x, y). The model is compiled and has new weights. Frozen layers keep their weights.
      group_size: number of rows in a group. If None, a twentieth of the training rows.
      rows: (m,) the test rows whose losses are compared, or None.
      wrong: number of mistakes to compare, or None. The most confident mistakes are taken. Give
        `rows` or `wrong`, not both. If both are None, five mistakes are compared.
      options: options of the computation. With `checkpoints`, an interrupted call can be continued
        after the last finished training.

    Returns: a GroupVerification, with `agreement`, `table`, `plot` and `to_html`.
    Raises: TypeError, ValueError or IndexError naming the invalid argument.
    """
    if rows is not None and wrong is not None:
        raise ValueError("wrong must be left out if rows are given, got both.")
    if groups < 4:
        raise ValueError(f"groups must be at least 4, got {groups}.")
    if not callable(fit):
        raise ValueError("fit must be given with groups: a function (model, x, y), got None.")
    subject = Subject.of(model, train, test, options)
    n = len(subject.train)
    size = max(round(_SHARE * n), 1) if group_size is None else group_size
    if not 1 <= size <= n // 2:
        raise ValueError(
            f"group_size must be from 1 to {n // 2}, half of the training rows, got {size}."
        )
    chosen, why = choose(subject, rows, USUAL_WRONG if wrong is None and rows is None else wrong)
    with alerts.listening() as heard:
        report = subject.report
        scores = subject.influence.scores(subject.test.take(chosen))
        drawn, how = draw_groups(scores, groups, size)
        actual = _actual(subject, chosen, drawn, fit)
    values = np.asarray(scores)
    answer = GroupVerification(
        subject,
        (),
        test_rows=chosen,
        groups=drawn,
        drawn=how,
        predicted=np.stack([values[:, group].sum(axis=1) for group in drawn], axis=1),
        by_seed=actual,
        why=why,
    )
    said = besides_sizes(alerts.of_report(report, subject.plan) + heard.alerts)
    return replace(answer, alerts=alerts.merged([*_of_agreement(answer), *said]))


def draw_groups(scores: Scores, count: int, size: int) -> tuple[list[NDArray[np.int64]], list[str]]:
    """Draw `count` groups of training rows: half with large scores, and half at random.

    Returns: the groups as arrays of rows, and for each group the word "chosen" or "random".
    """
    values = np.asarray(scores)
    found = []
    for j in range((count + 1) // 2):
        order = np.argsort(values[(j // 2) % len(values)], kind="stable")
        # Each test row gives two groups: its most helpful and its most harmful rows. If more groups
        # are needed, they take the rows that follow in the order of the scores.
        start = size * (j // (2 * len(values)))
        start = min(start, len(order) - size)
        along = order[::-1] if j % 2 == 0 else order
        found.append(np.sort(along[start : start + size]))
    rng = np.random.default_rng(0)
    how = [_CHOSEN] * len(found) + [_RANDOM] * (count - len(found))
    while len(found) < count:
        found.append(np.sort(rng.permutation(values.shape[1])[:size]))
    return found, how


def _actual(
    subject: Subject, chosen: NDArray[np.int64], groups: list[NDArray], fit: own_training.Fit
) -> NDArray:
    """Train without each of k groups. Return the changes of m test losses (s, m, k) by seed."""
    whole = inputs_of(subject.train)
    tested = inputs_of(subject.test).take(chosen)
    name = name_of("group", subject.key, tested.fingerprint, own_training.source(fit))

    def losses(group: NDArray | None, seed: int) -> NDArray:
        def compute() -> dict[str, NDArray]:
            rows = whole if group is None else whole.without(group)
            with own_training.trained_anew(subject.net, rows, fit, seed) as net:
                question = PerRow("losses")
                size = subject.options.batch_size
                return {"losses": tested.each_row(question, net, batch_size=size)}

        key = name_of(name, seed, group)
        return subject.store.kept(key, compute)["losses"].astype(np.float64)

    tasks = [(seed, group) for seed in SEEDS for group in (None, *groups)]
    bar = progress(tasks, "retraining without groups", len(tasks))
    found = np.array([losses(group, seed) for seed, group in bar])
    found = found.reshape(len(SEEDS), len(groups) + 1, len(chosen))
    return (found[:, 1:] - found[:, :1]).transpose(0, 2, 1)


def _of_agreement(answer: GroupVerification) -> list[alerts.Alert]:
    found = of_verdict(answer.agreement())
    repeats = answer.repeats()
    if repeats < RELIABLE:
        head = "Chance decides the actual changes as much as the removed rows do."
        why = f"Under two seeds they agree with a Pearson correlation of {short(repeats)} only."
        found.append(alerts.Alert("care", head, why, "Give larger groups by --group-size."))
    return found
