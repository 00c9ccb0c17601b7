"""Reports that show our results beside the paper's: an HTML page and the tables in markdown."""

import base64
import dataclasses
import itertools
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2

import experiments
from experiments.harness import claims, reading
from experiments.harness.claims import NOT_REPRODUCED, OURS
from experiments.harness.record import RECORD, Record, replacing
from influence_console import shown

FIGURE = "figure.png"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
BEYOND, MISSED, UNJUDGED = "beyond the paper", "beyond the paper; our aim missed", "not judged"
# Of several records of an experiment, the short table shows that of the first of these presets.
_FULLEST = ("paper", "standard", "smoke")


def rows(record: Record) -> list[dict[str, str]]:
    """Format a record's claims as text for a table.

    Args:
      record: a judged record.
    Returns: one dict per claim, with the keys metric, sentence, paper, ours, band, source and
      verdict.
    """
    return [
        {
            "metric": claim["metric"],
            "sentence": claim["sentence"],
            "paper": _paper(claim),
            "ours": _ours(claim),
            "band": _band(claim["low"], claim["high"]),
            "source": claim["source"],
            "verdict": verdict(claim),
        }
        for claim in record.claims
    ]


def verdict(claim: dict[str, Any]) -> str:
    """Return a claim's verdict in words. A claim of ours has none, so its aim is judged."""
    if claim["holds"] is None:
        return UNJUDGED
    if claim["kind"] == OURS:
        return BEYOND if claim["holds"] else MISSED
    return claim["verdict"]


def number(value: float | None) -> str:
    """Format a number with three significant digits, and more where it would be shown as 1.

    Thousands are separated by commas. None is a dash.
    """
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    digits = 3
    while digits < 6 and abs(value) < 1 and abs(float(f"{value:.{digits}g}")) == 1:
        digits += 1
    return f"{value:.{digits}g}"


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

    def place(pair: tuple[Path, Record]) -> tuple[int, str]:
        name = _command(pair[1])
        return order.index(name) if name in order else len(order), pair[0].name

    return sorted(pairs, key=place)


def judge_all(results: Path) -> list[str]:
    """Judge the records of a folder again by the present claims, without running anything.

    Only the claims in record.json change. A claim is left out if the record lacks its metric: the
    experiment must run again.

    Args:
      results: folder with one subfolder per record.
    Returns: a line per record.
    Raises: the errors of `read_all`.
    """
    lines = []
    for folder, record in read_all(results):
        module = _module(record)
        if module is None:
            lines.append(f"{folder.name}: no such experiment, left as it is")
            continue
        found = claims.judged(
            module, _preset(record), record.metrics, stand_in=record.data["stand_in"]
        )
        known = [claim for claim in found if claim["metric"] in record.metrics]
        dataclasses.replace(record, claims=known).save_claims(folder)
        missing = [claim["metric"] for claim in found if claim["metric"] not in record.metrics]
        said = f", without {', '.join(missing)}: run it again" if missing else ""
        lines.append(f"{folder.name}: {len(known)} claims judged{said}")
    return lines


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
    environment.filters["mark"] = _mark
    records = read_all(out)
    sections = [_section(folder, record) for folder, record in records]
    page = out / "index.html"
    with replacing(page) as partial:
        text = environment.get_template("report.html.j2").render(
            sections=sections, headlines=_headlines(records), counts=_counts(records)
        )
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return page


def short_table(results: Path) -> str:
    """Format the headlines of our results and the paper's as a markdown table, with counts.

    Args:
      results: folder with one subfolder per record.
    Returns: the table. A row holds the claims that share a headline.
    Raises: the errors of `read_all`.
    """
    records = read_all(results)
    lines = ["| paper | what | the paper's | ours | |", "|---|---|---|---|---|"]
    lines += [_line(row.values()) for row in _headlines(records)]
    return "\n".join([*lines, "", _counts(records)])


def long_table(results: Path) -> str:
    """Format every claim of every record as a markdown page.

    Args:
      results: folder with one subfolder per record.
    Returns: the text of the page.
    Raises: the errors of `read_all`.
    """
    parts = [
        "# Every claim of every run",
        "`make readme` writes this page from the records in this folder. A claim compares one "
        "number with the paper (its text, or its authors' code and notebooks of 2017), or with an "
        "aim of ours. Brackets hold a 95 % interval. The tolerance is the published value's own "
        "uncertainty or, where it has none, 10 %.",
    ]
    for folder, record in read_all(results):
        label = _label(record)
        name = f"`{folder.name}`" if label == folder.name else f"{label}, `{folder.name}`"
        lines = [
            "| claim | the paper's | ours | band | verdict | metric | source |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            _line((*map(row.get, ("sentence", "paper", "ours", "band", "verdict")),
                   f"`{row['metric']}`", row["source"]))
            for row in rows(record)
        ]  # fmt: skip
        if record.data["stand_in"]:
            name += f", stand-in data: {record.data['name']}"
        parts += [f"## {name}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def with_table(readme: str, results: Path) -> str:
    """Replace the table in a README's text.

    Args:
      readme: the text, with one BEGIN and one END marker.
      results: folder with one subfolder per record.
    Returns: the text with `short_table(results)` between the markers.
    Raises: ValueError unless there is one BEGIN and, after it, one END; the errors of `read_all`.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"readme must hold one {BEGIN} and, after it, one {END}.")
    return f"{before}{BEGIN}\n{short_table(results)}\n{END}{after}"


def _line(cells: Any) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _paper(claim: dict[str, Any]) -> str:
    return claim["words"] or number(claim["paper"])


def _ours(claim: dict[str, Any]) -> str:
    ends = ", ".join(f"{end:.2g}" for end in claim["interval"] if end is not None)
    return number(claim["value"]) + (f" [{ends}]" if ends else "")


def _band(low: float | None, high: float | None) -> str:
    ends = ["" if end is None else f"{end:,.5g}" for end in (low, high)]
    if all(ends):
        return ends[0] if low == high else " to ".join(ends)
    return f"at least {ends[0]}" if ends[0] else f"at most {ends[1]}" if ends[1] else "any"


def _headlines(records: list[tuple[Path, Record]]) -> list[dict[str, str]]:
    """Return the rows of the short table: label, what, paper, ours and verdict."""
    found = []
    for record in _fullest(records):
        told = [claim for claim in record.claims if claim["headline"]]
        for headline, group in itertools.groupby(told, lambda claim: claim["headline"]):
            some = list(group)
            papers = [_paper(claim) for claim in some]
            same = len(set(papers)) == 1
            found.append(
                {
                    "label": _label(record),
                    "what": headline,
                    "paper": papers[0] if same else " / ".join(papers),
                    "ours": " / ".join(_ours(claim) for claim in some),
                    "verdict": _joint(some),
                }
            )
    return found


def _fullest(records: list[tuple[Path, Record]]) -> list[Record]:
    """Return the record of each experiment's fullest preset on real data."""
    best: dict[str, Record] = {}
    for _, record in records:
        old = best.get(_command(record))
        if not record.data["stand_in"] and (old is None or _place(record) < _place(old)):
            best[_command(record)] = record
    return list(best.values())


def _joint(some: list[dict[str, Any]]) -> str:
    """Return one verdict for several claims."""
    words = [verdict(claim) for claim in some]
    if len(set(words)) == 1:
        return words[0]
    held = [word for word, claim in zip(words, some, strict=True) if claim["holds"]]
    if not held:
        return NOT_REPRODUCED
    return MISSED if MISSED in words else f"{len(held)} of {len(some)} {held[0]}"


def _counts(records: list[tuple[Path, Record]]) -> str:
    """Count the verdicts of every experiment's fullest run in a sentence."""
    words = [verdict(claim) for record in _fullest(records) for claim in record.claims]
    if not words:
        return "Nothing was compared with the paper."
    kinds = sorted(set(words), key=lambda word: (word in (BEYOND, MISSED), word))
    return f"All claims: {', '.join(f'{words.count(kind)} {kind}' for kind in kinds)}."


def _mark(words: str) -> str:
    """Return the style of a verdict on the page."""
    if words in (NOT_REPRODUCED, MISSED):
        return "short"
    return "" if words in (UNJUDGED, BEYOND) or words[0].isdigit() else "holds"


def _place(record: Record) -> int:
    preset = _preset(record)
    return _FULLEST.index(preset) if preset in _FULLEST else len(_FULLEST)


def _command(record: Record) -> str:
    return experiments.present(record.experiment, record.preset)[0]


def _preset(record: Record) -> str:
    return experiments.present(record.experiment, record.preset)[1]


def _label(record: Record) -> str:
    summary = experiments.summaries().get(_command(record), record.experiment)
    return summary.partition(":")[0]


def _module(record: Record) -> ModuleType | None:
    known = _command(record) in experiments.summaries()
    return experiments.load(_command(record)) if known else None


def _section(folder: Path, record: Record) -> dict[str, Any]:
    module = _module(record)
    figure, no_figure = "", ""
    try:
        figure = base64.b64encode(reading.png(folder / FIGURE)).decode()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        no_figure = str(error)
    return {
        "name": folder.name,
        "summary": experiments.summaries().get(_command(record), ""),
        "record": record,
        "stand_in_for": getattr(module, "DATA", "the paper's data"),
        "rows": rows(record),
        "deviations": getattr(module, "DEVIATIONS", ()),
        "figure": figure,
        "no_figure": no_figure,
    }
