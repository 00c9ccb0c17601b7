"""`python -m experiments`: run experiments, compare them with the paper, draw and record them."""

import argparse
import dataclasses
import difflib
import io
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro

import experiments
import influence_console as console
from experiments.harness import claims, markdown, report, web_page
from experiments.harness.record import replacing
from experiments.harness.running import (
    SMOKE,
    STANDARD,
    Job,
    Misuse,
    Unwritten,
    redraw,
    run,
    say,
    write_figure,
)

PROG = "python -m experiments"
# Numbers of columns of the output. The help has 40 to 200 columns: it is unreadable with fewer than
# 40, and tyro never returns with fewer than 6. Errors have 10,000 columns, so they are not wrapped.
_NARROWEST, _WIDEST, _NO_WRAP = 40, 200, 10_000
_TYRO: Any = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every experiment."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """smoke (embedded data), standard (sized for two CPU cores) or paper (the paper's protocol); if
    omitted, standard is used if the data is found, otherwise smoke"""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """folder to search for the data before $INFLUENCE_DATA and the user cache"""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("out")
    """folder to write to; the default is $INFLUENCE_OUT if it is set"""
    redraw: bool = False
    """draw the figure again from the existing record, without running the experiment"""


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Options of the report."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("out")
    """folder of the records; the page index.html is written there"""
    readme: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """file whose table of results is rewritten, together with README.md and figure2.png in the
    folder of --results; the page is then not written"""
    pages: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """folder for a page in markdown about each experiment; the list in its README.md is rewritten
    too; the folder is docs/experiments in this repository"""
    results: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("results")
    """folder of the records that the tables show"""


@dataclasses.dataclass(frozen=True)
class JudgeOptions:
    """Options of judging finished runs again."""

    results: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("results")
    """folder of the records; only their claims are written anew, from their own metrics"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      arguments: the words after `python -m experiments`. If None, they are taken from sys.argv.
    Returns: the exit status. 0: every claim and check holds. 1: one does not hold, or an experiment
      of `all` raises an error. 2: misuse. 74: output could not be written. 130: interrupted.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")  # draw without a display
    words = sys.argv[1:] if arguments is None else list(arguments)
    command, *rest = words or ["list"]
    try:
        if command in ("list", "-h", "--help"):
            return _list(rest)
        if command == "report":
            return _report(rest)
        if command == "judge":
            return _judge(rest)
        if command == "all":
            return _all(rest)
        if command not in experiments.summaries():
            known = ", ".join(["list", "all", "report", "judge", *experiments.summaries()])
            command, wrong = "", command
            raise Misuse(f"the command comes first and must be one of {known}, got {wrong!r}.")
        return _one(command, rest)
    except (Misuse, Unwritten) as error:
        print(f"{f'{PROG} {command}'.rstrip()}: {error}", file=sys.stderr)
        return console.USAGE if isinstance(error, Misuse) else console.OUTPUT
    except SystemExit as stop:  # raised by tyro after --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return console.interrupted()


def _list(rest: Sequence[str]) -> int:
    if rest:
        raise Misuse(f"list takes no options, got {' '.join(rest)!r}.")
    print(
        f"usage: {PROG} {{COMMAND,all,report,judge,list}} [--preset NAME] [--data-dir DIR] "
        "[--out DIR]"
    )
    print(f"       {PROG} COMMAND --help     shows an experiment's own options\n")
    summaries = experiments.summaries() | {
        "all": "Every experiment above, one after the other.",
        "report": "All records as one page, or as the README's table (report --help).",
        "judge": "Judge finished runs by the present claims, without running (judge --help).",
    }
    for command, summary in summaries.items():
        print(f"  {command:{_width(summaries)}}{summary}")
    print(
        "\nExit status: 0 every claim holds, 1 one falls short, 2 usage, 74 output could not be "
        "written, 130 interrupted."
    )
    return 0


def _report(rest: Sequence[str]) -> int:
    options = _parsed(ReportOptions(out=_default_out()), rest, "report")
    for name, folder in (("--out", options.out), ("--results", options.results)):
        if folder.exists() and not folder.is_dir():
            raise Misuse(f"{name} must be a folder of records, {console.shown(folder)} is a file.")
    try:
        if options.readme is None and options.pages is None:
            print(f"report written to {console.shown(web_page.write_page(options.out))}")
            return 0
        texts = _texts(options)
        for path, text in texts.items():
            with replacing(path) as partial:
                partial.write_text(text, encoding="utf-8")
        if options.readme is not None:
            from experiments import figure2  # late, because it loads the library

            found = figure2.records(options.results)
            if found is not None:
                paths = (options.results / f"figure2{ending}" for ending in (".png", ".pdf"))
                write_figure(figure2.draw(*found), *paths)
    except (OSError, ValueError) as error:
        line = console.unwritten(error)
        raise Misuse(str(error)) if line is None else Unwritten(line) from error
    where = ", ".join(console.shown(path) for path in (options.readme, options.pages) if path)
    print(f"{where}: {len(texts)} files written from {console.shown(options.results)}")
    return 0


def _texts(options: ReportOptions) -> dict[Path, str]:
    """Return a dict from the path of each generated file to its new text."""
    texts, results = {}, options.results
    if options.readme is not None:
        before = options.readme.read_text(encoding="utf-8")
        texts[options.readme] = markdown.with_block(before, markdown.short_table(results))
        texts[results / "README.md"] = markdown.long_table(results)
    if options.pages is not None:
        index = options.pages / "README.md"
        before = index.read_text(encoding="utf-8")
        texts[index] = markdown.with_block(before, markdown.index(results))
        texts |= {options.pages / name: text for name, text in markdown.pages(results).items()}
    return texts


def _judge(rest: Sequence[str]) -> int:
    options = _parsed(JudgeOptions(), rest, "judge")
    if options.results.exists() and not options.results.is_dir():
        raise Misuse(
            f"--results must be a folder of records, {console.shown(options.results)} is a file."
        )
    try:
        for line in report.judge_all(options.results):
            print(line)
    except (OSError, ValueError) as error:
        line = console.unwritten(error)
        raise Misuse(str(error)) if line is None else Unwritten(line) from error
    return 0


def _all(rest: Sequence[str]) -> int:
    options = _parsed(Options(out=_default_out()), rest, "all")
    _check(options)
    statuses, checks, compared = {}, 0, False
    for command in experiments.summaries():
        try:
            module = experiments.load(command)
            preset = _preset(command, module, options)
            job = _job(command, module, options, preset, module.PRESETS[preset])
            statuses[command] = _do(dataclasses.replace(job, brief=preset == SMOKE), options)
            checks += len(claims.of_preset(module.CHECKS, preset))
            compared |= preset != SMOKE
        except Misuse as error:
            print(f"{command}: {error}", file=sys.stderr)
            statuses[command] = 2
        except Unwritten:  # the other experiments would fail too
            raise
        except Exception:  # the other experiments must still run
            traceback.print_exc()
            statuses[command] = 1
    for status, words in ((1, "fell short or broke"), (2, "could not be run")):
        names = [command for command, found in statuses.items() if found == status]
        if names:
            print(f"{', '.join(names)} {words}, see above")
    bad = any(statuses.values())
    print(_summary(len(statuses), None if bad else checks, compared=compared))
    return max(statuses.values(), default=0)


def _summary(ran: int, checks: int | None, *, compared: bool) -> str:
    """Return the last line that `all` prints.

    `checks` is the number of passed checks, or None if an experiment failed.
    """
    said = f"{ran} experiments" if checks is None else f"{ran} ran, {checks} checks passed"
    if compared:
        return f"{said}."
    return (
        f"{said}, nothing compared with the paper; for that: python -m data fetch mnist, then "
        f"{PROG} fig2 --preset paper"
    )


def _one(command: str, rest: Sequence[str]) -> int:
    # The words are parsed twice. The first pass reads only the preset and the data folder, because
    # they determine the defaults of the other options.
    _refuse_empty(rest)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    first.add_argument("--data-dir", "--data_dir", type=Path)  # tyro accepts both spellings
    try:
        early = Options(**vars(first.parse_known_args(rest)[0]))
    except argparse.ArgumentError as error:
        raise Misuse(
            f"{error.argument_name}: {error.message} (--help lists the options)."
        ) from error
    _check(early)
    module = experiments.load(command)
    preset = _preset(command, module, early)
    config = module.PRESETS[preset]
    both: Any = dataclasses.make_dataclass("both", [("run", Options), ("config", type(config))])
    about = f"{experiments.summaries()[command]}\n\nDefaults shown: preset {preset}, "
    parsed = _parsed(
        both(Options(preset=preset, out=_default_out()), config),
        rest,
        command,
        f"{about}of {', '.join(module.PRESETS)}.",
    )
    return _do(_job(command, module, parsed.run, preset, parsed.config), parsed.run)


def _parsed(default: Any, words: Sequence[str], command: str, about: str | None = None) -> Any:
    """Parse the words of a command line into a dataclass of the type of `default`.

    Each field of `default` is an option, or a dataclass of options. Its value is the default of the
    option. `about` is the description that the help shows.
    """
    _refuse_empty(words)
    _refuse_unknown(words, [f"--{name.replace('_', '-')}" for name in _names(default)])
    asked = any(word in ("-h", "--help") for word in words)
    columns = min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
    said = io.StringIO()
    try:
        with redirect_stderr(said), _columns(columns if asked else _NO_WRAP):
            return tyro.cli(
                type(default),
                args=words,
                prog=f"{PROG} {command}",
                description=about,
                default=default,
                config=_TYRO,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise Misuse(_unboxed(said.getvalue())) from None


@contextmanager
def _columns(number: int) -> Iterator[None]:
    """Set the terminal width that tyro uses during a `with` block."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(number)
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _names(options: Any) -> list[str]:
    fields = ((f.name, getattr(options, f.name)) for f in dataclasses.fields(options))
    return [
        name
        for field, value in fields
        for name in (_names(value) if dataclasses.is_dataclass(value) else [field])
    ]


def _refuse_empty(words: Sequence[str]) -> None:
    # An empty path must be refused, because Path("") is the current folder.
    for word, following in zip(words, [*words[1:], None], strict=False):
        if word.startswith("--") and (following == "" or word.endswith("=")):
            raise Misuse(f"{word.rstrip('=')} must be followed by a value, got ''.")


def _refuse_unknown(words: Sequence[str], names: Sequence[str]) -> None:
    for word in words:
        option = word.partition("=")[0].replace("_", "-")  # tyro accepts both spellings
        if option in ("-h", "--help", *names) or not re.match(r"--?(?!inf|nan)[a-zA-Z]", word):
            continue
        near = difflib.get_close_matches(option, names, 1, 0.6)
        meant = f"; did you mean {near[0]}?" if near else ""
        shown = console.one_line(word.partition("=")[0])
        raise Misuse(f"unrecognised option {shown}{meant} (--help lists them)")


def _unboxed(text: str) -> str:
    """Convert an error of tyro, which is drawn in a box, to one line.

    The line contains tyro's message, and the form of the option if tyro shows it.
    """
    lines = [line.strip("│╭╮╰╯─ ") for line in text.splitlines()]
    # In ASCII, tyro draws the box with lines of dashes. They count as empty.
    lines = ["" if set(line) <= {"-"} else line for line in lines]
    begin = 2 if lines[1] == "" else 1  # skip the title
    end = lines.index("", begin)
    said = console.one_line(" ".join(lines[begin:end]))
    form = next((line for line in lines[end:] if line.startswith("--")), "")
    said = said.removeprefix("Error parsing config: ").replace("Unrecognized options", "unexpected")
    return f"{said}{f'; it takes {form}' if form else ''} (--help lists the options)"


def _width(commands: Iterable[str]) -> int:
    return max(10, *(len(command) + 2 for command in commands))


def _default_out() -> Path:
    return Path(os.environ.get("INFLUENCE_OUT") or "out")


def _check(options: Options) -> None:
    folder = options.data_dir
    if folder is not None and not folder.expanduser().is_dir():
        there = (
            f"{console.shown(folder)} is a file"
            if folder.expanduser().exists()
            else f"there is none at {console.shown(folder)}"
        )
        raise Misuse(f"--data-dir must be a folder, {there}.")


def _preset(command: str, module: ModuleType, options: Options) -> str:
    import data

    if options.preset is None:
        try:
            found = data.find(module.DATA, options.data_dir)
        except ValueError as error:  # $INFLUENCE_DATA is not a folder
            raise Misuse(str(error)) from error
        preset, why = (STANDARD, f"found in {found}") if found else (SMOKE, "not found")
        say(f"{command}: preset {preset}, as {module.DATA} is {why}")
        return preset
    if options.preset not in module.PRESETS:
        known = ", ".join(module.PRESETS)
        raise Misuse(f"--preset must be one of {known} for {command}, got {options.preset!r}.")
    return options.preset


def _job(command: str, module: ModuleType, options: Options, preset: str, config: Any) -> Job:
    return Job(command, module, preset, config, options.data_dir, options.out)


def _do(job: Job, options: Options) -> int:
    return 0 if (redraw if options.redraw else run)(job) else 1


if __name__ == "__main__":
    console.run(main)
