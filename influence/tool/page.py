"""One self-contained HTML page for an answer. It needs no other file and no network."""

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

# A page has at most this many bytes.
MOST_BYTES = 5_000_000
# Largest sides of pictures in pixels. `render` tries them in this order until the page fits.
SIZES = (160, 128, 96, 72, 48, 32)
_FOLDER = Path(__file__).parent
_LEFT_OUT = "The page would be too large, so it shows the first part. The CSV file has all of it."
# A table cell shows at most this many characters.
_CELL = 200


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
      title: the heading of the column.
      number: True if the values are numbers, and the page sorts them as numbers.
      digits: number of significant digits that the page shows.
    """

    title: str
    number: bool = False
    digits: int = 4


@dataclass(frozen=True)
class Table:
    """A table that a reader can sort and filter.

    Attributes:
      caption: a sentence that describes the table.
      columns: the columns.
      rows: the values of each table row, one for each column. A value is a text, a number, None, or
        a dict that `influence.tool.shown.item` returned.
      kind: the name by which the template recognises a table.
    """

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]
    kind: str = "table"

    def cells(self) -> list[list[dict[str, Any]]]:
        """Return one dict for each cell, with the shown text or item and the key for sorting."""
        return [
            [_cell(value, column) for value, column in zip(row, self.columns, strict=True)]
            for row in self.rows
        ]


@dataclass(frozen=True)
class Gallery:
    """Examples of a data set, shown side by side.

    Attributes:
      title: the heading of the gallery.
      items: one dict for each example, with the keys `item` (from `influence.tool.shown.item`),
        `facts` (lines of text) and `id`.
      tone: the colour of the border: "good", "bad" or "" for neutral.
      about: a sentence under the title.
      kind: the name by which the template recognises a gallery.
    """

    title: str
    items: Sequence[dict[str, Any]]
    tone: str = ""
    about: str = ""
    kind: str = "gallery"


@dataclass(frozen=True)
class Chart:
    """A scatter plot, with a panel beside it that describes the selected point.

    Attributes:
      title: the heading of the chart.
      drawing: the dict that `influence.tool.chart.scatter` returned.
      panels: dicts like the items of a Gallery. A selected point shows the panel whose `id` equals
        the point's `shows`.
      legend: the names of the series.
      kind: the name by which the template recognises a chart.
    """

    title: str
    drawing: dict[str, Any]
    panels: Sequence[dict[str, Any]]
    legend: Sequence[str] = ()
    kind: str = "chart"


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
      heading: the heading of the section.
      lines: sentences under the heading.
      item: the example that the section describes, from `influence.tool.shown.item`, or None.
      parts: the tables, galleries and charts of the section.
    """

    heading: str
    lines: Sequence[str] = ()
    item: dict[str, Any] | None = None
    parts: Sequence[Table | Gallery | Chart] = ()


@dataclass(frozen=True)
class Page:
    """The content of a page.

    Attributes:
      title: the page's title.
      summary: the answer in a few sentences.
      alerts: warnings about the numbers. The page shows them first.
      sections: the details of the answer.
      facts: pairs (name, value) about the model, the data and the run.
    """

    title: str
    summary: Sequence[str]
    alerts: Sequence[Alert]
    sections: Sequence[Section]
    facts: Sequence[tuple[str, Any]] = field(default_factory=tuple)


def render(page_of: Callable[[int], Page]) -> str:
    """Return a page as HTML text of at most 5 MB.

    If the page is too large, its pictures are made smaller. If it is too large with the smallest
    pictures, sections or table rows are left out. The page then says so.

    Args:
      page_of: a function from the largest side of pictures, in pixels, to the page.

    Raises: ValueError if the page is too large and nothing more can be left out.
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
    """Return the page without about half of its sections, or of the rows of its longest tables.

    Returns: the shorter page; None if nothing more can be left out.
    """
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
        # These two files belong to the library. All other content of the page is escaped.
        found.globals[name.replace(".", "_")] = markupsafe.Markup(_read(name))
    return found


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _script_hash() -> str:
    """Return the SHA-256 of page.js in base64. The page allows only a script with this hash."""
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
