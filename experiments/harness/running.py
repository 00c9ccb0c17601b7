"""The steps of every experiment: load data, set the seed, run, judge, save and draw."""

import dataclasses
import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import influence_console as console
from experiments.harness import claims, report
from experiments.harness.cost import metered
from experiments.harness.record import Record, provenance, replacing, to_json

SMOKE, STANDARD = "smoke", "standard"
# The file of the figure with photographs. Git and the report ignore it.
PHOTOGRAPHS = "photographs.png"
_CHECKPOINTS, _LABEL, _COST = "checkpoints", "run.json", "cost.json"
# A module without DTYPE uses this precision.
_DTYPE = "float64"
_DPI = 200
# Keras and NumPy accept seeds below this number.
_NUM_SEEDS = 2**32
_ROOT = Path(__file__).resolve().parents[2]


class Misuse(ValueError):  # tyro reports a ValueError of a Config like its own errors
    """A request that cannot be fulfilled. The message names the remedy. The exit status is 2."""


class Unwritten(Exception):
    """An output that could not be written. The message names the file. The exit status is 74."""


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raise Unwritten if the `with` block cannot write a file in `folder`.

    Args:
      folder: the folder to which the block writes.
    Raises: Unwritten. A full or read-only device outside `folder` also raises it.
    """
    try:
        yield
    except Exception as error:
        line = console.unwritten(error, folder)
        if line is None:
            raise
        raise Unwritten(line) from error


@dataclasses.dataclass(frozen=True)
class Job:
    """An experiment to run.

    Args:
      command: name of the experiment on the command line.
      module: the module of the experiment, with the names that `experiments` describes.
      preset: a key of module.PRESETS.
      config: the preset's Config, or one that differs from it in some options.
      data_dir: folder to search first for the data, or None.
      out: folder that contains, or will contain, `folder`.
      brief: True if a run on stand-in data should print only its result, in one line.
    """

    command: str
    module: ModuleType
    preset: str
    config: Any
    data_dir: Path | None
    out: Path
    brief: bool = False

    @property
    def folder(self) -> Path:
        """`<out>/<command>-<preset>`, followed by a hash if options differ from the preset's."""
        name = f"{self.command}-{self.preset}"
        if self.config != self.module.PRESETS[self.preset]:  # do not overwrite the preset's results
            text = to_json(dataclasses.asdict(self.config))
            name += f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        return self.out / name


def run(job: Job) -> bool:
    """Run an experiment, judge its claims, write its record and figure, and print the verdicts.

    Args:
      job: the experiment.
    Returns: True if every claim that is compared holds and every check passes.
    Raises: Misuse if the folder is not writable, the data is missing, or an option does not fit the
      size of the data; Unwritten if a file cannot be written.
    """
    if not 0 <= job.config.seed < _NUM_SEEDS:
        raise Misuse(f"seed must lie in [0, {_NUM_SEEDS}), got {job.config.seed}.")
    _check_writable(job.folder)
    with writing_to(job.folder):
        _compute_and_save(job)
    holds = redraw(job)  # draws from the written files
    # Checkpoints are deleted last. They are still needed if the figure cannot be written.
    shutil.rmtree(job.folder / _CHECKPOINTS)
    return holds


def _compute_and_save(job: Job) -> None:
    try:
        record, splits = _compute(job)
    except Misuse:
        checkpoints = job.folder / _CHECKPOINTS
        names = {path.name for path in checkpoints.glob("*")}
        if names and names <= {_LABEL, _COST}:
            shutil.rmtree(checkpoints)
        with suppress(OSError):  # the folder is not empty: it holds an earlier run
            job.folder.rmdir()
        raise
    record.save(job.folder)
    if hasattr(job.module, "photographs"):
        checkpoints = job.folder / _CHECKPOINTS
        figure = job.module.photographs(record, splits, checkpoints=checkpoints)
        write_figure(figure, job.folder / PHOTOGRAPHS)


def redraw(job: Job) -> bool:
    """Draw an experiment's figure from its record, and print the verdicts.

    Args:
      job: the experiment.
    Returns: True if every claim that is compared holds and every check passes.
    Raises: Misuse if there is no record or the folder cannot be written to; Unwritten if a file
      cannot be written.
    """
    try:
        record = Record.load(job.folder)
    except (OSError, ValueError) as error:
        raise Misuse(f"--redraw needs a finished run: {error}") from error
    _check_writable(job.folder)
    with writing_to(job.folder):
        _draw(job.module, record, job.folder)
    if record.data["stand_in"]:
        say(f"{job.command}: {_finding(record, job.module)}")
    else:
        say(_verdicts(record, job.module))
    if not job.brief:
        say(f"{console.shown(job.folder)}: record.json, arrays.h5, figure.png, figure.pdf")
    return record.holds and not claims.failed(job.module, job.preset, record.metrics)


def say(line: str) -> None:
    """Print a line of progress at once. Without a flush, it could appear minutes later."""
    print(line, flush=True)


def _check_writable(folder: Path) -> None:
    from influence.common.checkpoint import check_writable

    # The folder is checked before the long work, which may take an hour.
    try:
        check_writable(folder, "--out")
    except ValueError as error:
        line = console.unwritten(error)
        if line is not None:
            raise Unwritten(line) from error
        user = f" As user {os.getuid()}." if hasattr(os, "getuid") else ""
        raise Misuse(
            f"{error}{user} With docker: mkdir out, then add --user $(id -u) to docker run."
        ) from error


def _compute(job: Job) -> tuple[Record, Any]:
    """Compute the record; return it and the data."""
    import keras

    import data

    module = job.module
    name = module.STAND_IN if job.preset == SMOKE else module.DATA
    facts = provenance(job.config.seed)  # now, because the code may change during the run
    if not job.brief:
        say(f"{job.command}: reading {name}")
    try:
        splits = data.load(name, job.data_dir, dtype=getattr(module, "DTYPE", _DTYPE))
    except (OSError, ValueError) as error:
        raise Misuse(f"{error}\nOr, on embedded stand-in data: --preset {SMOKE}") from error
    if splits.stand_in and job.preset != SMOKE:
        raise Misuse(f"DATA must be real for preset {job.preset}, {name} is a stand-in.")
    about = {"name": splits.name, "stand_in": splits.stand_in, "sha256": splits.sha256}
    checkpoints = _checkpoints(job, about)
    if not job.brief:
        say(f"{job.command}: running preset {job.preset}, seed {job.config.seed}")
    keras.backend.clear_session()  # discard the state of earlier experiments
    keras.utils.set_random_seed(job.config.seed)
    with warnings.catch_warnings(), metered(checkpoints / _COST) as cost:
        # The experiments use first-order influence deliberately, as in the paper.
        warnings.filterwarnings("ignore", message=".*have a leverage above")
        result = module.run(job.config, splits, checkpoints=checkpoints)
    record = dataclasses.replace(
        result,
        experiment=job.command,
        preset=job.preset,
        config=dataclasses.asdict(job.config),
        data=about,
        claims=claims.judged(module, job.preset, result.metrics, stand_in=splits.stand_in),
        provenance=facts | cost,
    )
    return record, splits


def _checkpoints(job: Job, about: dict[str, Any]) -> Path:
    """Return the folder of checkpoints. Empty it if the options, the data or the code differ."""
    digest = hashlib.sha256()
    sources = [*_ROOT.glob("influence/**/*.py"), *_ROOT.glob("data/**/*.py")]
    sources += [*_ROOT.glob("experiments/**/*.py"), job.module.__file__]
    for source in sorted(map(str, sources)):
        digest.update(Path(source).read_bytes())
    key = to_json([dataclasses.asdict(job.config), about, digest.hexdigest()])
    checkpoints = job.folder / _CHECKPOINTS
    label = checkpoints / _LABEL
    if label.is_file() and label.read_text(encoding="utf-8") == key:
        say(f"continuing the run interrupted in {console.shown(job.folder)}")
        return checkpoints
    if checkpoints.exists():
        say(f"{console.shown(checkpoints)} is of other options, data or code: starting afresh")
        shutil.rmtree(checkpoints)
    checkpoints.mkdir()
    with replacing(label) as partial:
        partial.write_text(key, encoding="utf-8")
    return checkpoints


def _draw(module: ModuleType, record: Record, folder: Path) -> None:
    figure = module.draw(record)
    if record.data["stand_in"]:  # the text is above all titles; savefig includes it
        text = f"stand-in data: {record.data['name']}, not {module.DATA}"
        figure.text(0.5, 1.0, text, ha="center", va="bottom", color="firebrick")
    write_figure(figure, folder / "figure.png", folder / "figure.pdf")


def write_figure(figure: Any, *paths: Path) -> None:
    """Write a Matplotlib figure to .png or .pdf files, and close it."""
    import matplotlib.pyplot as plt

    # Without date and version, equal records give equal bytes.
    metadata = {".png": {"Software": None}, ".pdf": {"CreationDate": None}}
    for path in paths:
        kind = path.suffix
        with replacing(path) as partial:
            figure.savefig(
                partial, format=kind[1:], dpi=_DPI, bbox_inches="tight", metadata=metadata[kind]
            )
    plt.close(figure)


def _verdicts(record: Record, module: ModuleType) -> str:
    """Return a table of the claims as text. The long sentences are in the last column."""
    head = {"verdict": "verdict", "ours": "ours", "paper": "paper", "band": "band"}
    lines = [tuple(row[key] for key in head) for row in (head, *report.rows(record))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    said = ["claim", *(claim["sentence"] for claim in record.claims)]
    rows = (
        "  ".join([*map(str.ljust, line, widths), words])
        for line, words in zip(lines, said, strict=True)
    )
    title = f"\n{record.experiment}, preset {record.preset}"
    return "\n  ".join([title, *rows, f"{_checked(record, module)}."])


def _finding(record: Record, module: ModuleType) -> str:
    """Return one line with the result on stand-in data, without the paper's values."""
    found = report.finding(record)
    where = f"on {record.data['name']}, a stand-in for {module.DATA}"
    return f"{found} {where}; {_checked(record, module)}"


def _checked(record: Record, module: ModuleType) -> str:
    every = claims.of_preset(module.CHECKS, record.preset)
    bad = claims.failed(module, record.preset, record.metrics)
    said = f"{len(every) - len(bad)} {'check' if len(every) - len(bad) == 1 else 'checks'} passed"
    if not bad:
        return said
    wrong = (
        f"{check.metric} = {report.number(record.metrics.get(check.metric))}, not within "
        f"{check.low} to {check.high}"
        for check in bad
    )
    return f"{said}, {len(bad)} FAILED: {'; '.join(wrong)}"
