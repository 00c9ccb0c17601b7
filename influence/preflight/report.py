"""The report of a check: a line for each question, with its meaning and a remedy."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

_WIDTH = 100
# The sentences of a line begin at this column.
_INDENT = 44
_SHOWN = {"ok": "ok", "warn": "warn", "fail": "FAIL"}


@dataclass(frozen=True)
class Line:
    """The answer to one question.

    Attributes:
      name: short name of the question.
      value: the number behind the verdict, NaN if there is none. `meaning` says what it measures.
      verdict: "ok", "warn" or "fail". "warn" means that scores need care, or that the question is
        undecided. "fail" means that scores would now be wrong.
      meaning: the finding in words.
      remedy: the user's next step; empty if none is needed.
    """

    name: str
    value: float
    verdict: Literal["ok", "warn", "fail"]
    meaning: str
    remedy: str = ""


@dataclass(frozen=True)
class Finding:
    """The name and value of a `Line`. Each method makes the Line with one verdict."""

    name: str
    value: float = float("nan")

    def ok(self, meaning: str) -> Line:
        """Return the Line of a question without a fault."""
        return Line(self.name, self.value, "ok", meaning)

    def warn(self, meaning: str, remedy: str) -> Line:
        """Return the Line of a result that is usable with care, or of an undecided question."""
        return Line(self.name, self.value, "warn", meaning, remedy)

    def fail(self, meaning: str, remedy: str) -> Line:
        """Return the Line of a fault that makes scores wrong."""
        return Line(self.name, self.value, "fail", meaning, remedy)


@dataclass(frozen=True)
class Report:
    """The lines of a check, in the order of the questions. `str` makes a table of the lines.

    Attributes:
      lines: one Line for each question.
    """

    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        """True if every line is ok."""
        return all(line.verdict == "ok" for line in self.lines)

    def __getitem__(self, name: str) -> Line:
        """Return the line with this name.

        Raises: KeyError, which lists the existing names.
        """
        for line in self.lines:
            if line.name == name:
                return line
        names = ", ".join(repr(line.name) for line in self.lines)
        raise KeyError(f"name must be one of {names}, got {name!r}.")

    def __str__(self) -> str:
        """Make a table, 100 characters wide: verdict, question, value, meaning, remedy."""
        return "\n".join(_row(line) for line in self.lines)


def _row(line: Line) -> str:
    value = "" if line.value != line.value else f"{line.value:.3g}"
    head = f"{_SHOWN[line.verdict]:<5} {line.name:<26} {value:>9}"
    texts = [line.meaning] + ([f"-> {line.remedy}"] if line.remedy else [])
    lines = [part for text in texts for part in textwrap.wrap(text, _WIDTH - _INDENT)]
    return "\n".join(f"{head if i == 0 else '':<{_INDENT}}{part}" for i, part in enumerate(lines))
