"""Tables and pages of results in markdown, for README, results/README.md and docs/experiments."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import experiments
from experiments.harness import report
from experiments.harness.record import Record

BEGIN, END = "<!-- results -->", "<!-- /results -->"
# The repository's path relative to docs/experiments, for links.
_UP = "../.."


def short_table(results: Path) -> str:
    """Format the README's table of results: the paper's values and ours.

    Args:
      results: folder with one subfolder per record.
    Returns: a markdown table with the rows of `report.headlines`, and a sentence that counts all
      verdicts. The first column links to the pages.
    Raises: the errors of `report.read_all`.
    """
    lines = ["| paper | what | the paper's | ours | |", "|---|---|---|---|---|"]
    records = report.read_all(results)
    for row in report.headlines(records, results):
        where = f"[{row['label']}]({row['page']})" if row["page"] else row["label"]
        lines.append(_line((where, row["what"], row["paper"], row["ours"], _bold(row["verdict"]))))
    return "\n".join([*lines, "", report.counts(records)])


def long_table(results: Path) -> str:
    """Format every claim of every record as a markdown page.

    Args:
      results: folder with one subfolder per record.
    Returns: the text of the page.
    Raises: the errors of `report.read_all`.
    """
    parts = [
        "# Every claim of every run",
        "`make readme` writes this page from the records in this folder. A claim compares one "
        "number with the paper (its text, or its authors' code and notebooks of 2017), or with an "
        "aim of ours. Brackets hold a 95 % interval. The tolerance is the published value's own "
        "uncertainty or, where it has none, 10 %.",
    ]
    for folder, record in report.read_all(results):
        label = report.label(record)
        name = f"`{folder.name}`" if label == folder.name else f"{label}, `{folder.name}`"
        if record.data["stand_in"]:
            name += f", stand-in data: {record.data['name']}"
        parts += [f"## {name}", _claims(record, metric=True)]
    return "\n\n".join(parts) + "\n"


def with_block(text: str, block: str) -> str:
    """Replace the generated block of a text.

    Args:
      text: the text, with one BEGIN and one END marker.
      block: the new block.
    Returns: the text with the block between the markers.
    Raises: ValueError unless the text has exactly one BEGIN and, after it, exactly one END.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ValueError(f"readme must hold one {BEGIN} and, after it, one {END}.")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def pages(results: Path) -> dict[str, str]:
    """Return the text of a markdown page about each experiment.

    Args:
      results: folder with one subfolder per record. The pages link to it as `../../results`.
    Returns: a dict from file names, such as "fig1.md", to texts.
    Raises: the errors of `report.read_all`.
    """
    found: dict[str, list[tuple[Path, Record]]] = {name: [] for name in experiments.summaries()}
    for folder, record in report.read_all(results):
        if report.command(record) in found and not record.data["stand_in"]:
            found[report.command(record)].append((folder, record))
    return {f"{name}.md": _page(name, records) for name, records in found.items()}


def index(results: Path) -> str:
    """Format the list of the experiments' pages as a markdown table.

    Args:
      results: folder with one subfolder per record.
    Returns: the table, with a row per experiment. The row describes the record that
      `report.fullest` chooses. If there is no such record, the row has dashes.
    Raises: the errors of `report.read_all`.
    """
    best = {report.command(one): one for _, one in report.fullest(report.read_all(results))}
    lines = ["| experiment | preset | time | memory | claims |", "|---|---|---|---|---|"]
    for name, summary in experiments.summaries().items():
        record = best.get(name)
        cells = ["–"] * 4
        if record is not None:
            time, memory = report.time(record), report.memory(record)
            cells = [f"`{report.preset(record)}`", time, memory, report.counts_of(record)]
        lines.append(_line((f"[{summary.rstrip('.')}]({name}.md)", *cells)))
    return "\n".join(lines)


def _page(name: str, records: list[tuple[Path, Record]]) -> str:
    module = experiments.load(name)
    title, _, text = experiments.descriptions()[name].partition("\n")
    parts = [f"# {title.rstrip('.')}", text.strip()]
    said = report.finding(records[0][1]) if records else ""
    parts += [f"**Result.** {report.sentence(said)}" if said else "", "## Run it"]
    preset = report.preset(records[0][1]) if records else next(iter(module.PRESETS))
    command = f"python -m experiments {name} --preset {preset}"
    parts += [
        f"    {report.repeat(records[0][1]) if records else command}",
        f"It needs the data set `{module.DATA}` ([how to get it](README.md#data)). Without it, "
        f"`--preset smoke` runs on the stand-in `{module.STAND_IN}` in seconds. The code is "
        f"[{experiments.source(name)}]({_UP}/{experiments.source(name)}).",
    ]
    if records:
        parts += ["## Figure", *_figure(*records[0]), "### How to read it", module.CAPTION]
        parts += report.remarks(records[0][1])
        parts += ["## The paper's numbers and ours", *_results(records[0][1])]
    else:
        parts.append("No run on real data is committed yet.")
    parts += ["## Where we depart from the paper", "\n".join(map(_deviation, module.DEVIATIONS))]
    if records:
        parts += ["## Cost and provenance", *_provenance(records[0][1])]
    for folder, record in records[1:]:
        parts += [
            f"## Another run: preset {report.preset(record)}",
            f"    {report.repeat(record)}",
            *_figure(folder, record),
            *_results(record),
            *_provenance(record),
        ]
    parts.append("*`make readme` writes this page from the records in `results/`.*")
    return "\n\n".join(part for part in parts if part) + "\n"


def _figure(folder: Path, record: Record) -> list[str]:
    there = f"{_UP}/results/{folder.name}"
    links = [f"[{words}]({there}/{name})" for words, name in report.files(folder).items()]
    return [
        f"![{report.alt(record)}]({there}/{report.FIGURE})",
        f"The same figure and its numbers: {', '.join(links)}.",
    ]


def _results(record: Record) -> list[str]:
    return [
        f"{len(record.claims)} claims: {report.counts_of(record)}. Brackets hold a 95 % interval. "
        "The band of a published value is its own uncertainty or, where it has none, 10 %. Where "
        "the paper has words or nothing, the band is our choice. "
        f"[bands.csv]({_UP}/tests/experiments/bands.csv) has the date on which it was set.",
        _claims(record, metric=False),
    ]


def _claims(record: Record, *, metric: bool) -> str:
    """Format the claims as a table, with or without the names of the metrics."""
    keys = ["sentence", "paper", "ours", "band", "verdict", *["metric"] * metric, "source"]
    heads = {"sentence": "claim", "paper": "the paper's"}
    lines = [_line(heads.get(key, key) for key in keys), "|" + "---|" * len(keys)]
    for row in report.rows(record):
        cells = row | {"metric": f"`{row['metric']}`"}
        if not metric:
            cells["verdict"] = _bold(row["verdict"])
        lines.append(_line(cells[key] for key in keys))
    return "\n".join(lines)


def _deviation(text: str) -> str:
    """Format a deviation as a list item. The words up to the first colon are bold."""
    head, colon, rest = text.partition(": ")
    return f"- **{head}:** {rest}" if colon else f"- {text}"


def _provenance(record: Record) -> list[str]:
    facts = record.provenance
    versions = ", ".join(f"{name} {text}" for name, text in sorted(facts["versions"].items()))
    lines = ["| | |", "|---|---|"]
    lines += [
        _line((key, value))
        for key, value in (
            ("commit", f"`{facts.get('commit', 'unknown')}`"),
            ("versions", versions),
            ("data", f"`{record.data['name']}`, SHA-256 `{record.data['sha256']}`"),
            ("seed", facts.get("seed", "–")),
            ("options", ", ".join(f"`{k}` {_text(v)}" for k, v in sorted(record.config.items()))),
        )
    ]
    return [report.cost(record), "\n".join(lines)]


def _text(value: Any) -> str:
    return re.sub(r"[\[\]]", "", str(value)) if isinstance(value, list) else str(value)


def _bold(verdict: str) -> str:
    return f"**{verdict}**" if report.is_missed(verdict) else verdict


def _line(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"
