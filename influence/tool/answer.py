"""Base class of all answers: a table, a plot, an HTML page, and a dict for JSON."""

from __future__ import annotations

import html
import os
import tempfile
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from influence.tool.alerts import Alert
from influence.tool.page import Page, render
from influence.tool.subject import Subject

_FRAME_HEIGHT = 640


@dataclass(frozen=True, eq=False)
class Answer:
    """Base class of answers to a question about a model.

    Attributes:
      subject: the model and its rows.
      alerts: warnings about the numbers, the most serious first.
    """

    subject: Subject
    alerts: tuple[Alert, ...]

    @abstractmethod
    def records(self) -> list[dict[str, Any]]:
        """Return one dict of plain Python values for each row of the table."""

    @abstractmethod
    def page(self, size: int) -> Page:
        """Return the page. `size` limits the longer side of its pictures, in pixels."""

    @abstractmethod
    def draw(self, figure: Any) -> None:
        """Draw the answer on a Matplotlib figure."""

    @property
    @abstractmethod
    def summary(self) -> list[str]:
        """The answer in a few sentences."""

    def numbers(self) -> dict[str, Any]:
        """Return a dict of the numbers of the answer that the table does not contain."""
        return {}

    def table(self) -> Any:
        """Return the answer as a pandas data frame."""
        import pandas as pd

        return pd.DataFrame(self.records())

    def plot(self) -> Any:
        """Return the answer as a Matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4.5), layout="constrained")
        self.draw(figure)
        return figure

    def to_html(self, path: str | os.PathLike) -> Path:
        """Write the answer as one HTML file. It opens without other files and without a network.

        Returns: the path of the file.
        Raises: OSError if the file cannot be written, ValueError if the page would be too large.
        """
        path = Path(path)
        write_text(path, render(self.page))
        return path

    def to_csv(self, path: str | os.PathLike) -> Path:
        """Write the table as a CSV file, in UTF-8.

        A spreadsheet would read some cells as formulas. These cells get an apostrophe in front.

        Returns: the path of the file.
        """
        frame = self.table()
        for column in frame.columns:
            if frame[column].dtype.kind == "O":
                frame[column] = [as_text_cell(value) for value in frame[column]]
        write_text(Path(path), frame.to_csv(index=False))
        return Path(path)

    def as_dict(self) -> dict[str, Any]:
        """Return the answer as a dict of plain Python values, ready for JSON."""
        return {
            "question": type(self).__name__.lower(),
            "summary": self.summary,
            "alerts": [vars(alert) for alert in self.alerts],
            "facts": {name: str(value) for name, value in self.facts()},
            **self.numbers(),
            "rows": self.records(),
        }

    def facts(self) -> list[tuple[str, Any]]:
        """Return pairs (name, value) about the model, the data and the computation."""
        subject = self.subject
        net = subject.net
        found: list[tuple[str, Any]] = [
            ("Model", f"{net.model.name!r}, {net.num_parameters:,} trained weights, {net.dtype}")
        ]
        found += [("Note", note) for note in net.notes]
        for name, rows in (("Training rows", subject.train_rows), ("Test rows", subject.test_rows)):
            if rows is not None:
                source = f", {rows.source}" if rows.source else ""
                found.append((name, f"{len(rows):,}{source}"))
                found += [("Note", note) for note in rows.notes]
        return found

    def __str__(self) -> str:
        """Show the headlines of the alerts, and the summary."""
        lines = [f"{alert.level.upper()}: {alert.headline}" for alert in self.alerts]
        return "\n".join([*lines, *self.summary])

    def _repr_html_(self) -> str:
        """Return an HTML frame that shows the page in a notebook. The frame isolates its script."""
        text = html.escape(render(self.page), quote=True)
        return (
            f'<iframe srcdoc="{text}" sandbox="allow-scripts" title="{type(self).__name__}" '
            f'style="width:100%;height:{_FRAME_HEIGHT}px;border:1px solid #8886"></iframe>'
        )


def write_text(path: Path, text: str) -> None:
    """Write a text to a file. If the write is interrupted, an existing file stays unchanged.

    Raises: OSError naming the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    except BaseException as error:
        Path(partial).unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def as_text_cell(value: Any) -> Any:
    """Put an apostrophe before a string that a spreadsheet would read as a formula."""
    starts = isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r")
    return f"'{value}" if starts else value


def value_of(number: Any) -> Any:
    """Convert a NumPy number to a plain Python number, and NaN or infinity to None."""
    if number is None:
        return None
    if isinstance(number, np.bool_ | bool):
        return bool(number)
    if isinstance(number, np.integer | int):
        return int(number)
    number = float(number)
    return number if np.isfinite(number) else None


def short(number: float | None, digits: int = 3) -> str:
    """Format a number with `digits` significant digits. None, NaN and infinity become a dash."""
    return "–" if number is None or not np.isfinite(number) else f"{number:.{digits}g}"


def listed(names: Sequence[Any], most: int = 5) -> str:
    """Join the first `most` names by commas, and add the number of the other names."""
    shown = ", ".join(map(str, list(names)[:most]))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
