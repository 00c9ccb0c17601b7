"""The report of a check. It has one line for each test, with the meaning and a remedy."""

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
    """The result of one test.

    Attributes:
      name: short name of the test.
      value: the number on which the verdict is based; NaN if there is none. `meaning` explains it.
      verdict: "ok", "warn" or "fail". "warn" means that scores need care, or that the test is
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
    """The name and value of a `Line` without a verdict. Each method returns it with a verdict."""

    name: str
    value: float = float("nan")

    def ok(self, meaning: str) -> Line:
        """Return the Line of a test that found no fault."""
        return Line(self.name, self.value, "ok", meaning)

    def warn(self, meaning: str, remedy: str) -> Line:
        """Return the Line of a result that is usable with care, or of an undecided test."""
        return Line(self.name, self.value, "warn", meaning, remedy)

    def fail(self, meaning: str, remedy: str) -> Line:
        """Return the Line of a test that found a fault, which makes scores wrong."""
        return Line(self.name, self.value, "fail", meaning, remedy)


@dataclass(frozen=True)
class Report:
    """The lines of a check, in the order of the tests. `str` returns them as a table.

    Attributes:
      lines: one Line for each test.
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
        """Return a table, 100 characters wide: verdict, name, value, meaning and remedy."""
        return "\n".join(_row(line) for line in self.lines)


def _row(line: Line) -> str:
    value = "" if line.value != line.value else f"{line.value:.3g}"
    head = f"{_SHOWN[line.verdict]:<5} {line.name:<26} {value:>9}"
    texts = [line.meaning] + ([f"-> {line.remedy}"] if line.remedy else [])
    lines = [part for text in texts for part in textwrap.wrap(text, _WIDTH - _INDENT)]
    return "\n".join(f"{head if i == 0 else '':<{_INDENT}}{part}" for i, part in enumerate(lines))
