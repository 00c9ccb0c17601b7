"""What reports say about records: the rows of their tables, in words, and the order of records.

`markdown` and `web_page` lay this out.
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
# Of several records of an experiment, the short table shows that of the first of these presets.
_FULLEST = ("paper", "tenfold", "standard", "smoke")
# A prediction counts as wrong if the slope of actual on predicted changes is off by more than this.
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
    Returns: (folder, record) pairs in the order of `experiments.MODULES`, the fullest preset first.
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

    Only the claims in record.json change. A claim is left out if the record lacks its metric: the
    experiment must run again.

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
    """Return the rows of the short table: the paper's results first, then what goes beyond them.

    Args:
      records: (folder, record) pairs, from `read_all`.
      folder: folder of the records. `docs/leverage.csv` beside it and `audit/audit.csv` inside it
        add a row each, if they exist.
    Returns: one dict per row, with the keys label, what, paper, ours, verdict, experiment, record
      and page. A row holds all claims of a record that share a headline. experiment and record are
      the command and the name of the record's folder, or "". page is a file of the repository.
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
    """Return the row about one step, from the exact refits that `docs/leverage.py` made."""
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
    """Return the row about wrong labels, from the cases that `benchmarks.mislabelled` ran."""
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
    """Return the record of each experiment's fullest preset on real data, with its folder."""
    best: dict[str, tuple[Path, Record]] = {}
    for folder, record in records:  # the fullest preset comes first
        if not record.data["stand_in"]:
            best.setdefault(command(record), (folder, record))
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


def is_missed(words: str) -> bool:
    """Return True for the verdict of a claim that does not hold."""
    return words in (NOT_REPRODUCED, MISSED)


def counts(records: list[tuple[Path, Record]]) -> str:
    """Count the verdicts of every experiment's fullest run in a sentence."""
    words = [verdict(claim) for _, record in fullest(records) for claim in record.claims]
    if not words:
        return "Nothing was compared with the paper."
    return f"All claims: {_counted(words)}."


def counts_of(record: Record) -> str:
    """Count the verdicts of one record, as in "8 reproduced, 2 beyond the paper"."""
    return _counted([verdict(claim) for claim in record.claims]) or "no claims"


def _counted(words: list[str]) -> str:
    kinds = sorted(set(words), key=lambda word: (word in (BEYOND, MISSED), word))
    short = {kind: kind.replace(", shortened", " (shortened)") for kind in kinds}
    short |= {MISSED: f"{BEYOND} (our aim missed)"}
    return ", ".join(f"{words.count(kind)} {short[kind]}" for kind in kinds)


def command(record: Record) -> str:
    """Return the present command of a record, whose names may be former ones."""
    return experiments.present(record.experiment, record.preset)[0]


def preset(record: Record) -> str:
    """Return the present preset of a record, whose names may be former ones."""
    return experiments.present(record.experiment, record.preset)[1]


def label(record: Record) -> str:
    """Return what the record's experiment replicates, such as "Figure 1"."""
    summary = experiments.summaries().get(command(record), record.experiment)
    return summary.partition(":")[0]


def module_of(record: Record) -> ModuleType | None:
    """Import the experiment of a record; None if there is no such experiment."""
    known = command(record) in experiments.summaries()
    return experiments.load(command(record)) if known else None


def repeat(record: Record) -> str:
    """Return the command that repeats a record's run, with the options that differ."""
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
    """Return how long a run took, as in "14 s"; "–" if unknown.

    An older record of an interrupted run has only the time of the last stretch.
    """
    seconds = record.provenance.get("seconds")
    if not isinstance(seconds, int | float):
        return "–"
    words = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return f"{words} (its last part)" if _is_partial(record) else words


def memory(record: Record) -> str:
    """Return the largest memory of a run's process, as in "1.4 GB"; "–" if unknown.

    Records with `stretches` count the workers too.
    """
    megabytes = record.provenance.get("peak_rss_mb")
    return f"{megabytes / 1000:.1f} GB" if isinstance(megabytes, int | float) else "–"


def cost(record: Record) -> str:
    """Say in a few sentences how long the run took and how much memory it used."""
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
    """Return the files of a record that exist, by what they are."""
    every = {"PDF": PDF, "record": RECORD, "arrays": ARRAYS}
    return {words: name for words, name in every.items() if (folder / name).is_file()}


def heading(record: Record) -> str:
    """Return the experiment's title, without a full stop."""
    return experiments.summaries().get(command(record), record.experiment).rstrip(".")


def finding(record: Record) -> str:
    """Say the run's result in a few words; "" if a metric is missing."""
    words = getattr(module_of(record), "FINDING", "")
    # A metric's name may have a dot, so str.format does not serve.
    names = re.findall(r"\{(.+?)\}", words)
    if not set(names) <= record.metrics.keys():
        return ""
    return re.sub(r"\{(.+?)\}", lambda name: number(record.metrics[name[1]]), words)


def sentence(words: str) -> str:
    """Return the words with a capital letter and a full stop. A symbol such as r stays small."""
    if not words:
        return ""
    return f"{words if re.match(r'. = ', words) else words[0].upper() + words[1:]}."


def remarks(record: Record) -> list[str]:
    """Return the remarks of the experiment on a record; none on a record with other arrays."""
    try:
        return getattr(module_of(record), "remarks", lambda record: [])(record)
    except (LookupError, ValueError):
        return []


def alt(record: Record) -> str:
    """Describe the figure in a sentence, for readers who cannot see it."""
    caption = getattr(module_of(record), "CAPTION", "")
    return caption.partition(". ")[0].rstrip(".") + "." if caption else f"{heading(record)}."
