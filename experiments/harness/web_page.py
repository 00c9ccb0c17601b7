"""The web page of all records in a folder: the short table, figures, results and provenance."""

import base64
from pathlib import Path
from typing import Any

import jinja2

from experiments.harness import reading, report
from experiments.harness.record import Record, replacing


def write_page(out: Path) -> Path:
    """Write index.html, a page with the short table, figures, results and provenance.

    Args:
      out: folder with one subfolder per record.
    Returns: the path of the page. The page contains its figures, so a browser needs no other file.
      It links to the files of the records.
    Raises: the errors of `report.read_all`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = report.number
    environment.filters["mark"] = _mark
    records = report.read_all(out)
    page = out / "index.html"
    with replacing(page) as partial:
        text = environment.get_template("report.html.j2").render(
            sections=[_section(folder, record) for folder, record in records],
            headlines=report.headlines(records, out),
            counts=report.counts(records),
        )
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return page


def _mark(words: str) -> str:
    """Return the CSS class of a verdict."""
    if report.is_missed(words):
        return "short"
    return "" if words in (report.UNJUDGED, report.BEYOND) or words[0].isdigit() else "holds"


def _section(folder: Path, record: Record) -> dict[str, Any]:
    module = report.module_of(record)
    figure, no_figure = "", ""
    try:
        figure = base64.b64encode(reading.png(folder / report.FIGURE)).decode()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        no_figure = str(error)
    return {
        "name": folder.name,
        "title": report.heading(record),
        "preset": report.preset(record),
        "record": record,
        "stand_in_for": getattr(module, "DATA", "the paper's data"),
        "rows": report.rows(record),
        "deviations": getattr(module, "DEVIATIONS", ()),
        "caption": getattr(module, "CAPTION", ""),
        "remarks": report.remarks(record),
        "alt": report.alt(record),
        "finding": report.sentence(report.finding(record)),
        "files": report.files(folder),
        "command": report.repeat(record) if module else "",
        "cost": report.cost(record),
        "figure": figure,
        "no_figure": no_figure,
    }
