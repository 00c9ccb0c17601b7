"""Reports that show our results beside the paper's: an HTML page and the README's table."""

import base64
from pathlib import Path
from typing import Any

import jinja2

import experiments
from experiments.harness import reading
from experiments.harness.record import RECORD, Record, replacing
from influence_console import shown

FIGURE = "figure.png"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
_VERDICTS = {True: "holds", False: "FALLS SHORT", None: "not judged"}


def rows(record: Record) -> list[dict[str, str]]:
    """Format a record's claims as text for a table.

    Args:
      record: a judged record.
    Returns: one dict per claim, with the keys metric, paper, ours, band and verdict.
    """
    return [
        {
            "metric": claim["metric"],
            "paper": number(claim["paper"]),
            "ours": number(claim["value"]),
            "band": _band(claim["low"], claim["high"]),
            "verdict": _VERDICTS[claim["holds"]],
        }
        for claim in record.claims
    ]


def number(value: float | None) -> str:
    """Format a number with six significant digits, so 0.99999 is not shown as 1. None: a dash."""
    return "–" if value is None else f"{value:.6g}"


def read_all(folder: Path) -> list[tuple[Path, Record]]:
    """Read the records in the subfolders of a folder.

    Args:
      folder: folder with one subfolder per record.
    Returns: (folder, record) pairs in the order of `experiments.MODULES`, then by folder name.
    Raises: FileNotFoundError if there is no such folder; ValueError if a record cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder must hold experiments' records, {shown(folder)} does not exist."
        )
    order = list(experiments.MODULES)
    pairs = [(path.parent, Record.load(path.parent)) for path in folder.glob(f"*/{RECORD}")]
    return sorted(
        pairs,
        key=lambda pair: (
            order.index(pair[1].experiment) if pair[1].experiment in order else len(order),
            pair[0].name,
        ),
    )


def write_page(out: Path) -> Path:
    """Write index.html, a page with figures, results, deviations and provenance.

    Args:
      out: folder with one subfolder per record.
    Returns: the path of the page. It needs no other file.
    Raises: the errors of `read_all`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    sections = [_section(folder, record) for folder, record in read_all(out)]
    page = out / "index.html"
    with replacing(page) as partial:
        text = environment.get_template("report.html.j2").render(sections=sections)
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return page


def table(results: Path) -> str:
    """Format our results and the paper's as a markdown table.

    Args:
      results: folder with one subfolder per record.
    Returns: the table, one row per claim.
    Raises: the errors of `read_all`.
    """
    lines = ["| experiment | metric | paper | ours | band | |", "|---|---|---|---|---|---|"]
    for _, record in read_all(results):
        name = f"{record.experiment} ({record.preset})"
        if record.data["stand_in"]:
            name += f", stand-in data: {record.data['name']}"
        for row in rows(record):
            cells = (name, f"`{row['metric']}`", *list(row.values())[1:])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(readme: str, results: Path) -> str:
    """Replace the table in a README's text.

    Args:
      readme: the text, with one BEGIN and one END marker.
      results: folder with one subfolder per record.
    Returns: the text with `table(results)` between the markers.
    Raises: ValueError unless there is one BEGIN and, after it, one END; the errors of `read_all`.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"readme must hold one {BEGIN} and, after it, one {END}.")
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def _band(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{number(low)} to {number(high)}"
    if low is not None:
        return f"at least {number(low)}"
    return "any" if high is None else f"at most {number(high)}"


def _section(folder: Path, record: Record) -> dict[str, Any]:
    known = record.experiment in experiments.summaries()
    module = experiments.load(record.experiment) if known else None
    figure, no_figure = "", ""
    try:
        figure = base64.b64encode(reading.png(folder / FIGURE)).decode()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        no_figure = str(error)
    return {
        "name": folder.name,
        "summary": experiments.summaries().get(record.experiment, ""),
        "record": record,
        "stand_in_for": getattr(module, "DATA", "the paper's data"),
        "rows": rows(record),
        "deviations": getattr(module, "DEVIATIONS", ()),
        "figure": figure,
        "no_figure": no_figure,
    }
