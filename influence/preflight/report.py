"""What a check says: a line for each question, with what the answer means and what to do."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Literal

_WIDTH = 100
_INDENT = 44  # where the sentences begin
_SHOWN = {"ok": "ok", "warn": "warn", "fail": "FAIL"}


@dataclass(frozen=True)
class Line:
    """The answer to one question.

    Attributes:
      name: the question.
      value: the number that was judged, NaN where there is none; `meaning` says what it is.
      verdict: "ok"; "warn": usable with care, or it could not be told; "fail": scores computed now
        do not mean what they say.
      meaning: what was found, in words.
      remedy: what to do; empty where nothing needs doing.
    """

    name: str
    value: float
    verdict: Literal["ok", "warn", "fail"]
    meaning: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """The lines of a check, in the order in which they were asked; `str` makes a table of them.

    Attributes:
      lines: one for each question.
    """

    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        """Whether every line is ok."""
        return all(line.verdict == "ok" for line in self.lines)

    def __getitem__(self, name: str) -> Line:
        """The line of that name.

        Raises: KeyError, with the names that there are.
        """
        for line in self.lines:
            if line.name == name:
                return line
        names = ", ".join(repr(line.name) for line in self.lines)
        raise KeyError(f"name must be one of {names}, got {name!r}.")

    def __str__(self) -> str:
        """A table of 100 columns: verdict, question, value, meaning, remedy."""
        return "\n".join(_row(line) for line in self.lines)


def _row(line: Line) -> str:
    value = "" if line.value != line.value else f"{line.value:.3g}"
    head = f"{_SHOWN[line.verdict]:<5} {line.name:<26} {value:>9}"
    texts = [line.meaning] + ([f"-> {line.remedy}"] if line.remedy else [])
    lines = [part for text in texts for part in textwrap.wrap(text, _WIDTH - _INDENT)]
    return "\n".join(f"{head if i == 0 else '':<{_INDENT}}{part}" for i, part in enumerate(lines))
