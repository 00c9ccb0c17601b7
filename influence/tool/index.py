"""Index: factors and features stored on disk, so that later questions take seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from influence.common.checkpoint import check_writable
from influence.examples.given import Data
from influence.net.checked import Net
from influence.tool import alerts
from influence.tool.answer import Answer
from influence.tool.explain import plan_facts
from influence.tool.page import Column, Page, Section, Table
from influence.tool.rows import Rows
from influence.tool.subject import QuestionOptions, Subject


@dataclass(frozen=True, eq=False)
class Index(Answer):
    """The files that are stored for one model and one training set.

    Attributes:
      folder: the folder of the files. Each file name contains a hash of the inputs of the
        computation. If the model, a row or an option changes, the old files are not used.
      files: the size of each file in bytes, by file name.
    """

    folder: Path
    files: dict[str, int]

    @property
    def summary(self) -> list[str]:
        """The answer in a few sentences."""
        return [
            f"{len(self.files)} files with {sum(self.files.values()) / 1e6:,.1f} MB are kept in "
            f"{self.folder}.",
            "A question about the same model and the same training rows now reads them.",
        ]

    def records(self) -> list[dict[str, Any]]:
        """Return one dict for each file."""
        return [{"file": name, "bytes": size} for name, size in sorted(self.files.items())]

    def numbers(self) -> dict[str, Any]:
        """Return the folder, and the total size of its files in bytes."""
        return {"folder": str(self.folder), "bytes": sum(self.files.values())}

    def page(self, size: int) -> Page:
        """Return the page. It has no pictures, so `size` has no effect."""
        columns = [Column("File"), Column("Bytes", True)]
        rows = [list(record.values()) for record in self.records()]
        sections = [Section("Files", parts=[Table("The kept files.", columns, rows)])]
        title = "What is kept for this model"
        return Page(title, self.summary, self.alerts, sections, self.facts())

    def facts(self) -> list[tuple[str, Any]]:
        """Return pairs (name, value) about the model, the data and the computation."""
        return [*super().facts(), *plan_facts(self.subject)]

    def draw(self, figure: Any) -> None:
        """Draw the sizes of the files as bars."""
        axes = figure.add_subplot()
        names = sorted(self.files)
        axes.barh(range(len(names)), [self.files[name] / 1e6 for name in names])
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("MB")


def index(
    model: Net,
    train: Data | Rows,
    test: Data | Rows | None = None,
    *,
    folder: str | Path,
    options: QuestionOptions = QuestionOptions(),
) -> Index:
    """Compute and store the results that every question about a model and its rows needs.

    The results are the features of the frozen layers, the choice of matrix, damping and solver, the
    matrix itself or the factors of EK-FAC, and the lines of the check. Other questions read these
    results if their options are `QuestionOptions(index=folder)`.

    Args:
      model: a compiled Keras model, a net, or the path of a saved model.
      train: the training set, in any form that `fit` takes.
      test: test rows whose features are stored too, or None.
      folder: the folder of the files. It is created if it is missing.
      options: options of the computation.

    Returns: an Index.
    Raises: TypeError or ValueError naming the invalid argument.
    """
    folder = check_writable(Path(folder), "index")
    options = replace(options, index=folder, checkpoints=folder)
    with alerts.listening() as heard:
        subject = Subject.of(model, train, test, options)
        report = subject.report
        subject.influence.prepared  # noqa: B018 - forms, factors and stores the matrix
    found = alerts.merged(
        alerts.of_report(report, subject.plan) + alerts.of_plan(subject.plan) + heard.alerts
    )
    files = {file.name: file.stat().st_size for file in folder.glob("*.npz")}
    return Index(subject, found, folder, files)
