"""The contents of reports about records: rows of tables, sentences, and the order of records.

The modules `markdown` and `web_page` format these contents.
"""

import csv
import dataclasses
import json
import re
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import experiments
from experiments.harness import claims
from experiments.harness.claims import NOT_REPRODUCED, OURS
from experiments.harness.record import ARRAYS, RECORD, Record, to_json
from influence_console import shown

FIGURE, PDF = "figure.png", "figure.pdf"
BEYOND, MISSED, UNJUDGED = "beyond the paper", "beyond the paper; our aim missed", "not judged"
# An experiment may have records of several presets. The fullest one is the first in this order. The
# short table shows only this record.
_FULLEST = ("paper", "tenfold", "standard", "smoke")
# A prediction counts as wrong if the slope of actual on predicted changes differs from 1 by more
# than this.
_SLOPE_OFF = 0.1


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
    """Return a claim's verdict in words. For a claim of ours, it says if our aim was met."""
    if claim["holds"] is None:
        return UNJUDGED
    if claim["kind"] == OURS:
        return BEYOND if claim["holds"] else MISSED
    return claim["verdict"]


def number(value: float | None) -> str:
    """Format a number with three significant digits.

    A number below 1 gets more digits, up to six, if it would be rounded to 1. Numbers from 100 on
    get no decimals, and thousands are separated by commas. None becomes a dash.
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
    Returns: (folder, record) pairs in the order of `experiments.MODULES`. For each experiment, the
      fullest preset comes first.
    Raises: FileNotFoundError if there is no such folder; ValueError if a record cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"folder must hold experiments' records, {shown(folder)} does not exist."
        )
    order = list(experiments.MODULES)
    pairs = [(path.parent, Record.load(path.parent)) for path in folder.glob(f"*/{RECORD}")]

    def place(pair: tuple[Path, Record]) -> tuple[int, int, str]:
        name = command(pair[1])
        return _place(name, order), _place(preset(pair[1]), _FULLEST), pair[0].name

    return sorted(pairs, key=place)


def _place(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def judge_all(results: Path) -> list[str]:
    """Judge the records of a folder again by the present claims, without running anything.

    Only the claims in record.json change. A claim is left out if the record lacks its metric. The
    experiment must then run again.

    Args:
      results: folder with one subfolder per record.
    Returns: a line per record.
    Raises: the errors of `read_all`.
    """
    lines = []
    for folder, record in read_all(results):
        module = module_of(record)
        if module is None:
            lines.append(f"{folder.name}: no such experiment, left as it is")
            continue
        found = claims.judged(
            module, preset(record), record.metrics, stand_in=record.data["stand_in"]
        )
        known = [claim for claim in found if claim["metric"] in record.metrics]
        dataclasses.replace(record, claims=known).save_claims(folder)
        missing = [claim["metric"] for claim in found if claim["metric"] not in record.metrics]
        said = f", without {', '.join(missing)}: run it again" if missing else ""
        lines.append(f"{folder.name}: {len(known)} claims judged{said}")
    return lines


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


def headlines(records: list[tuple[Path, Record]], folder: Path) -> list[dict[str, str]]:
    """Return the rows of the short table: the paper's results, then results beyond the paper.

    Args:
      records: (folder, record) pairs, from `read_all`.
      folder: folder of the records. Two other files add a row each, if they exist:
        `audit/audit.csv` in this folder, and `docs/leverage.csv` beside this folder.
    Returns: one dict per row, with the keys label, what, paper, ours, verdict, experiment, record
      and page. A row combines all claims of a record that share a headline. `experiment` is the
      command, `record` the name of the record's folder, and `page` a file of the repository. Each
      of the three may be "".
    """
    found: list[dict[str, str]] = []
    for place, record in fullest(records):
        groups: dict[str, list[dict[str, Any]]] = {}
        for claim in record.claims:
            groups.setdefault(claim["headline"], []).append(claim)
        found += [_headline(place, record, words, some) for words, some in groups.items() if words]
    found += [*_one_step(folder.resolve().parent / "docs"), *_audit(folder / "audit")]
    return sorted(found, key=lambda row: row["verdict"] in (BEYOND, MISSED))


def _headline(
    place: Path, record: Record, headline: str, some: list[dict[str, Any]]
) -> dict[str, str]:
    head, colon, what = headline.partition(": ")
    if not colon:
        head, what = label(record), headline
    condition = getattr(module_of(record), "CONDITIONS", {}).get(preset(record), "")
    papers = [_paper(claim) for claim in some]
    name = command(record)
    known = name in experiments.summaries()
    return {
        "label": f"{head} ({condition})" if condition else head,
        "what": what,
        "paper": papers[0] if len(set(papers)) == 1 else " / ".join(papers),
        "ours": " / ".join(_ours(claim) for claim in some),
        "verdict": _joint(some),
        "experiment": name if known else "",
        "record": place.name,
        "page": f"docs/experiments/{name}.md" if known else "",
    }


def _one_step(docs: Path) -> list[dict[str, str]]:
    """Return the row about one-step predictions, from the results of `docs/leverage.py`."""
    path = docs / "leverage.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    wrong = [
        sum(abs(float(line[f"slope of {how}"]) - 1) > _SLOPE_OFF for line in lines)
        for how in ("first order", "one step")
    ]
    return [
        {
            "label": "One step",
            "what": f"of {len(lines)} rows of any leverage, those whose actual changes are over "
            f"{100 * _SLOPE_OFF:.0f} % off the predicted ones: first order, and one Newton step",
            "paper": "–",
            "ours": " / ".join(map(str, wrong)),
            "verdict": BEYOND,
            "experiment": "",
            "record": "",
            "page": "docs/leverage.md",
        }
    ]


def _audit(folder: Path) -> list[dict[str, str]]:
    """Return the row about wrong labels, from the results of `benchmarks.mislabelled`."""
    path = folder / "audit.csv"
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        cases = [case for case in csv.DictReader(file) if case.get("cleanlab@10")]
    if not cases:
        return []
    shares = [(float(case[f"{case['ranking']}@10"]), float(case["cleanlab@10"])) for case in cases]
    ours, theirs = (statistics.median(column) for column in zip(*shares, strict=True))
    aims = [text for case in cases for key, text in case.items() if key.startswith("target_")]
    return [
        {
            "label": "Wrong labels",
            "what": f"share found with 10 % of the rows checked, median of {len(cases)} cases: "
            "audit, and cleanlab with five trainings",
            "paper": "–",
            "ours": f"{number(ours)} / {number(theirs)}",
            "verdict": MISSED if "False" in aims else BEYOND,
            "experiment": "",
            "record": "",
            "page": "results/audit/README.md",
        }
    ]


def fullest(records: list[tuple[Path, Record]]) -> list[tuple[Path, Record]]:
    """Return the (folder, record) pair of each experiment's fullest preset on real data."""
    best: dict[str, tuple[Path, Record]] = {}
    for folder, record in records:  # the fullest preset comes first
        if not record.data["stand_in"]:
            best.setdefault(command(record), (folder, record))
    return list(best.values())


def _joint(some: list[dict[str, Any]]) -> str:
    """Combine the verdicts of several claims into one verdict in words."""
    words = [verdict(claim) for claim in some]
    if len(set(words)) == 1:
        return words[0]
    held = [word for word, claim in zip(words, some, strict=True) if claim["holds"]]
    if not held:
        return NOT_REPRODUCED
    return MISSED if MISSED in words else f"{len(held)} of {len(some)} {held[0]}"


def is_missed(words: str) -> bool:
    """Return True if the words are the verdict of a claim that does not hold."""
    return words in (NOT_REPRODUCED, MISSED)


def counts(records: list[tuple[Path, Record]]) -> str:
    """Return a sentence with the counts of the verdicts over every experiment's fullest run."""
    words = [verdict(claim) for _, record in fullest(records) for claim in record.claims]
    if not words:
        return "Nothing was compared with the paper."
    return f"All claims: {_counted(words)}."


def counts_of(record: Record) -> str:
    """Return the counts of a record's verdicts, such as "8 reproduced, 2 beyond the paper"."""
    return _counted([verdict(claim) for claim in record.claims]) or "no claims"


def _counted(words: list[str]) -> str:
    kinds = sorted(set(words), key=lambda word: (word in (BEYOND, MISSED), word))
    short = {kind: kind.replace(", shortened", " (shortened)") for kind in kinds}
    short |= {MISSED: f"{BEYOND} (our aim missed)"}
    return ", ".join(f"{words.count(kind)} {short[kind]}" for kind in kinds)


def command(record: Record) -> str:
    """Return the present command of a record. The record itself may have a former name."""
    return experiments.present(record.experiment, record.preset)[0]


def preset(record: Record) -> str:
    """Return the present preset of a record. The record itself may have a former name."""
    return experiments.present(record.experiment, record.preset)[1]


def label(record: Record) -> str:
    """Return the part of the paper that a record's experiment replicates, such as "Figure 1"."""
    summary = experiments.summaries().get(command(record), record.experiment)
    return summary.partition(":")[0]


def module_of(record: Record) -> ModuleType | None:
    """Import the module of a record's experiment. Return None if there is no such experiment."""
    known = command(record) in experiments.summaries()
    return experiments.load(command(record)) if known else None


def repeat(record: Record) -> str:
    """Return the command that repeats a run, with the options that differ from its preset."""
    module, words = module_of(record), ["--preset", preset(record)]
    usual = getattr(module, "PRESETS", {}).get(preset(record))
    if usual is not None:
        defaults = json.loads(to_json(dataclasses.asdict(usual)))
        given = json.loads(to_json(record.config))
        for name, value in given.items():
            if defaults.get(name, value) != value:
                words += [f"--{name.replace('_', '-')}", *_flat(value)]
    return shlex.join(["python", "-m", "experiments", command(record), *words])


def _flat(value: Any) -> list[str]:
    if isinstance(value, list):
        return [word for entry in value for word in _flat(entry)]
    return [str(value)]


def time(record: Record) -> str:
    """Return the time of a run, such as "14 s", or "–" if it is unknown.

    Older records of interrupted runs have only the time since the last interruption.
    """
    seconds = record.provenance.get("seconds")
    if not isinstance(seconds, int | float):
        return "–"
    words = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"{words} (its last part)" if _is_partial(record) else words


def memory(record: Record) -> str:
    """Return the peak memory of a run, such as "1.4 GB", or "–" if it is unknown.

    Records whose provenance has `stretches` include the memory of the workers.
    """
    megabytes = record.provenance.get("peak_rss_mb")
    return f"{megabytes / 1000:.1f} GB" if isinstance(megabytes, int | float) else "–"


def cost(record: Record) -> str:
    """Return sentences about the time and memory of a run, or "" if the time is unknown."""
    if time(record) == "–":
        return ""
    cores = record.provenance.get("cpu_count", "unknown")
    workers = "with" if "stretches" in record.provenance else "without"
    said = f"Time: {time(record)}. CPU cores: {cores}. Memory: {memory(record)}, {workers} workers."
    if _is_partial(record):
        said += " The run was interrupted, so its whole time is unknown."
    return said


def _is_partial(record: Record) -> bool:
    return bool(record.provenance.get("resumed")) and "stretches" not in record.provenance


def files(folder: Path) -> dict[str, str]:
    """Return a dict from description to name of the existing files in a record's folder."""
    every = {"PDF": PDF, "record": RECORD, "arrays": ARRAYS}
    return {words: name for words, name in every.items() if (folder / name).is_file()}


def heading(record: Record) -> str:
    """Return the experiment's title, without a full stop."""
    return experiments.summaries().get(command(record), record.experiment).rstrip(".")


def finding(record: Record) -> str:
    """Return the run's result in a few words, or "" if a metric is missing."""
    words = getattr(module_of(record), "FINDING", "")
    # A metric's name may contain a dot, so str.format cannot be used.
    names = re.findall(r"\{(.+?)\}", words)
    if not set(names) <= record.metrics.keys():
        return ""
    return re.sub(r"\{(.+?)\}", lambda name: number(record.metrics[name[1]]), words)


def sentence(words: str) -> str:
    """Make a sentence of the words: capitalise the first letter and add a full stop.

    A symbol at the beginning, as in "r = 0.9", is not capitalised.
    """
    if not words:
        return ""
    return f"{words if re.match(r'. = ', words) else words[0].upper() + words[1:]}."


def remarks(record: Record) -> list[str]:
    """Return the experiment's remarks on a record; [] if the record lacks the arrays for them."""
    try:
        return getattr(module_of(record), "remarks", lambda record: [])(record)
    except (LookupError, ValueError):
        return []


def alt(record: Record) -> str:
    """Describe the figure in a sentence, for readers who cannot see it."""
    caption = getattr(module_of(record), "CAPTION", "")
    return caption.partition(". ")[0].rstrip(".") + "." if caption else f"{heading(record)}."
