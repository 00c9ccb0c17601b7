"""One self-contained HTML page for an answer. It makes no request and needs no other file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from influence.tool.alerts import Alert
from influence.tool.shown import plain

# A page takes at most this many bytes. Pictures are made smaller until it does.
MOST_BYTES = 5_000_000
SIZES = (160, 128, 96, 72, 48, 32)
_FOLDER = Path(__file__).parent
_LEFT_OUT = "The page would be too large, so it shows the first part. The CSV file has all of it."
# A cell of a table shows at most this many characters.
_CELL = 200


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      title: what stands above it.
      number: True for a column of numbers, which is sorted by size.
      digits: significant digits of its numbers.
    """

    title: str
    number: bool = False
    digits: int = 4


@dataclass(frozen=True)
class Table:
    """A table that a reader can sort and filter.

    Attributes:
      caption: what it shows, in a sentence.
      columns: the columns.
      rows: for each row its values: texts, numbers, None, or items of `influence.tool.shown`.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    kind: str = "table"

    def cells(self) -> list[list[dict[str, Any]]]:
        """Return what the template shows of each value."""
        return [
            [_cell(value, column) for value, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Gallery:
    """Rows of a set side by side.

    Attributes:
      title: what they have in common.
      items: dicts with `item` (of `influence.tool.shown`), `facts` (lines of text) and `id`.
      tone: "good", "bad" or "": the colour of the edge.
      about: a sentence under the title.
    """

    title: str
    items: Sequence[dict[str, Any]]
    tone: str = ""
    about: str = ""
    kind: str = "gallery"


@dataclass(frozen=True)
class Chart:
    """A scatter, as `influence.tool.chart.scatter` returns it, with a panel beside it.

    Attributes:
      title: what it shows.
      drawing: the numbers to draw.
      panels: dicts like the items of a Gallery. A point shows the panel of its id.
      legend: the names of the series.
    """

    title: str
    drawing: dict[str, Any]
    panels: Sequence[dict[str, Any]]
    legend: Sequence[str] = ()
    kind: str = "chart"


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading.

    Attributes:
      heading: the heading.
      lines: sentences under it.
      item: the row that the section is about, of `influence.tool.shown`, or None.
      parts: tables, galleries and charts.
    """

    heading: str
    lines: Sequence[str] = ()
    item: dict[str, Any] | None = None
    parts: Sequence[Table | Gallery | Chart] = ()


@dataclass(frozen=True)
class Page:
    """Everything that a page shows.

    Attributes:
      title: the page's title.
      summary: the answer in a few sentences.
      alerts: what not to believe. They come first.
      sections: the answer.
      facts: pairs (name, value) about the model, the data and the run.
    """

    title: str
    summary: Sequence[str]
    alerts: Sequence[Alert]
    sections: Sequence[Section]
    facts: Sequence[tuple[str, Any]] = field(default_factory=tuple)


def render(page_of: Callable[[int], Page]) -> str:
    """Return the page as HTML, of at most 5 MB.

    Pictures become smaller until the page fits. Then parts are left out, and the page says so.

    Args:
      page_of: a function from the largest side of pictures, in pixels, to the page.

    Raises: ValueError if the page is too large even with its first part alone.
    """
    for size in SIZES[:-1]:
        text = _html(page_of(size))
        if len(text.encode()) <= MOST_BYTES:
            return text
    page = page_of(SIZES[-1])
    while True:
        text = _html(page)
        if len(text.encode()) <= MOST_BYTES:
            return text
        shorter = _shortened(page)
        if shorter is None:
            raise ValueError(
                f"a page must have at most {MOST_BYTES:,} bytes, got {len(text.encode()):,}; ask "
                "for fewer rows."
            )
        page = shorter


def _shortened(page: Page) -> Page | None:
    """Return the page with half of its sections or rows, or None if nothing can be left out."""
    sections = list(page.sections)
    if len(sections) > 2:
        sections = [*sections[: (len(sections) - 1) // 2], sections[-1]]
    else:
        longest = max(
            (len(t.rows) for s in sections for t in s.parts if isinstance(t, Table)), default=1
        )
        if longest < 2:
            return None
        sections = [
            replace(s, parts=[_halved(part, longest) for part in s.parts]) for s in sections
        ]
    summary = [line for line in page.summary if line != _LEFT_OUT]
    return replace(page, sections=sections, summary=[*summary, _LEFT_OUT])


def _halved(part: Table | Gallery | Chart, longest: int) -> Table | Gallery | Chart:
    if not isinstance(part, Table) or len(part.rows) < longest:
        return part
    return replace(part, rows=list(part.rows)[: longest // 2])


def _html(page: Page) -> str:
    template = _environment().get_template("page.html.j2")
    facts = [(name, plain(value, 1000)) for name, value in page.facts]
    return template.render(page=page, facts=facts, script_hash=_script_hash())


@cache
def _environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("page.css", "page.js"):
        # These two files are ours. Everything else that a page shows is escaped.
        found.globals[name.replace(".", "_")] = markupsafe.Markup(_read(name))
    return found


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _script_hash() -> str:
    """Return the hash by which the page allows its own script, and no other."""
    return base64.b64encode(hashlib.sha256(_read("page.js").encode()).digest()).decode()


def _cell(value: Any, column: Column) -> dict[str, Any]:
    if isinstance(value, dict):
        return {"item": value, "text": value["name"], "key": value["name"]}
    if value is None or value != value:
        return {"text": "–", "key": "" if not column.number else "-Infinity"}
    if column.number:
        number = float(value)
        text = f"{int(number)}" if number == int(number) and abs(number) < 1e15 else ""
        return {"text": text or f"{number:.{column.digits}g}", "key": repr(number)}
    return {"text": plain(value, _CELL), "key": plain(value, _CELL)}
