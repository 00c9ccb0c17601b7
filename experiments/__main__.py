"""`python -m experiments`: run experiments, compare them with the paper, draw and record them."""

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro

import experiments
from experiments.harness import report
from experiments.harness.record import replacing
from experiments.harness.running import SMOKE, STANDARD, Job, Misuse, redraw, run, say

PROG = "python -m experiments"
_TYRO: Any = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every experiment."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """smoke (embedded data), standard (two CPU cores) or paper (the paper's protocol); if omitted,
    standard if the data is found, else smoke"""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """folder to search for the data before $INFLUENCE_DATA and the user cache"""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("out")
    """folder to write to; the default is $INFLUENCE_OUT if it is set"""
    redraw: bool = False
    """draw again from the existing record, without running"""


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Options of the report."""

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("out")
    """folder of the records; the page index.html is written there"""
    readme: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """rewrite this file's table of results instead of writing the page"""
    results: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("results")
    """folder of the records for the table"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      arguments: the words after `python -m experiments`; sys.argv's if omitted.
    Returns: 0 if every claim holds, 1 if one falls short (or, in `all`, an experiment breaks),
      2 on misuse, 130 if interrupted.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")  # draw to files: there may be no display
    words = sys.argv[1:] if arguments is None else list(arguments)
    command, *rest = words or ["list"]
    try:
        if command in ("list", "-h", "--help"):
            return _list(rest)
        if command == "report":
            return _report(rest)
        if command == "all":
            return _all(rest)
        if command not in experiments.summaries():
            known = ", ".join(["list", "all", "report", *experiments.summaries()])
            raise Misuse(f"the command comes first and must be one of {known}, got {command!r}.")
        return _one(command, rest)
    except Misuse as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # by tyro: 0 after --help, 2 after an option that it refused
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command again continues where this stopped", file=sys.stderr)
        return 130


def _list(rest: Sequence[str]) -> int:
    if rest:
        raise Misuse(f"list takes no options, got {' '.join(rest)!r}.")
    print(f"usage: {PROG} {{COMMAND,all,report,list}} [--preset NAME] [--data-dir DIR] [--out DIR]")
    print(f"       {PROG} COMMAND --help     shows an experiment's own options\n")
    summaries = experiments.summaries() | {
        "all": "Every experiment above, one after the other.",
        "report": "All records as one page, or as the README's table (report --help).",
    }
    for command, summary in summaries.items():
        print(f"  {command:{_width(summaries)}}{summary}")
    print("\nExit status: 0 every claim holds, 1 one falls short, 2 misuse.")
    return 0


def _report(rest: Sequence[str]) -> int:
    options = tyro.cli(
        ReportOptions, args=rest, prog=f"{PROG} report", default=ReportOptions(out=_default_out())
    )
    try:
        if options.readme is None:
            print(f"report written to {report.write_page(options.out)}")
            return 0
        text = report.with_table(options.readme.read_text(encoding="utf-8"), options.results)
        with replacing(options.readme) as partial:
            partial.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise Misuse(str(error)) from error
    print(f"{options.readme}: table written from {options.results}")
    return 0


def _all(rest: Sequence[str]) -> int:
    options = tyro.cli(
        Options, args=rest, prog=f"{PROG} all", config=_TYRO, default=Options(out=_default_out())
    )
    _check(options)
    statuses = {}
    for command in experiments.summaries():
        try:
            module = experiments.load(command)
            preset = _preset(command, module, options)
            statuses[command] = _do(command, module, options, preset, module.PRESETS[preset])
        except Misuse as error:
            print(f"{command}: {error}", file=sys.stderr)
            statuses[command] = 2
        except Exception:  # one broken experiment must not hide the others
            traceback.print_exc()
            statuses[command] = 1
    words = ["every claim holds", "FALLS SHORT or broke, see above", "could not be run, see above"]
    for command, status in statuses.items():
        print(f"{command:{_width(statuses)}}{words[status]}")
    return max(statuses.values(), default=0)


def _one(command: str, rest: Sequence[str]) -> int:
    # Parse twice: the preset and the data folder decide the defaults of all other options.
    first = argparse.ArgumentParser(prog=f"{PROG} {command}", add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--data-dir", "--data_dir", type=Path)  # tyro accepts both spellings
    early = Options(**vars(first.parse_known_args(rest)[0]))
    _check(early)
    module = experiments.load(command)
    preset = _preset(command, module, early)
    config = module.PRESETS[preset]
    both: Any = dataclasses.make_dataclass("both", [("run", Options), ("config", type(config))])
    parsed = tyro.cli(
        both,
        args=rest,
        prog=f"{PROG} {command}",
        description=f"{experiments.summaries()[command]}\n\nDefaults shown: preset {preset}, "
        f"of {', '.join(module.PRESETS)}.",
        default=both(Options(preset=preset, out=_default_out()), config),
        config=_TYRO,
    )
    return _do(command, module, parsed.run, preset, parsed.config)


def _width(commands: Iterable[str]) -> int:
    return max(10, *(len(command) + 2 for command in commands))


def _default_out() -> Path:
    return Path(os.environ.get("INFLUENCE_OUT") or "out")


def _check(options: Options) -> None:
    folder = options.data_dir
    if folder is not None and not folder.expanduser().is_dir():
        raise Misuse(f"--data-dir must be a folder, there is none at {folder}.")


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


def _do(command: str, module: ModuleType, options: Options, preset: str, config: Any) -> int:
    job = Job(command, module, preset, config, options.data_dir, options.out)
    return 0 if (redraw if options.redraw else run)(job) else 1


if __name__ == "__main__":
    sys.exit(main())
