"""Command line of `python -m influence COMMAND MODEL DATA`.

The commands show how training rows affect a trained model. They read their options by argparse. The
experiments use tyro instead, which turns the fields of one dataclass into options. The commands
need more: an option may have several values (`--test-rows 3 17`) or no value (`--text`), several
commands share options, and an error message is one line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pooch

import influence_console as console
from influence.common.convergence import DivergenceError
from influence.tool.request import (
    AUTO,
    COMMANDS,
    RANKINGS,
    RUN,
    USUAL_REMOVE,
    USUAL_SUSPECTS,
    USUAL_TOP,
    USUAL_WRONG,
    Reading,
    Request,
    from_toml,
)

if TYPE_CHECKING:
    from influence.tool.command import Result

PROG = "python -m influence"
# If --text has no value, the column of texts has this name.
_TEXT = "text"
_ABOUT = {
    "explain": "Which training rows made these predictions? Show the most helpful and the most "
    "harmful training rows of some test rows.",
    "audit": "Which training labels look wrong? Rank the training rows, and write a CSV file to "
    "edit.",
    "verify": "Do the predictions hold? Remove training rows, refit, and compare. With --csv, try "
    "the labels of an edited CSV file.",
    "check": "Can the numbers be trusted? Look at the model and the data before the computation.",
    "index": "Keep factors and features on disk, so that the next question takes seconds.",
}
_USAGE = f"""\
usage: {PROG} COMMAND MODEL DATA [options]
       {PROG} replay {RUN}

Ask a trained Keras model about its training data. The answer is one page.

"""
# The command line option for each argument name of the library. Error messages show the option.
_OPTION_OF = {"rows": "--test-rows", "top": "--top", "wrong": "--wrong", "remove": "--remove"}
_OPTION_OF |= {"path": "MODEL", "model": "MODEL", "damping": "--damping", "index": "--index"}
_OPTION_OF |= {"batch_size": "--batch-size", "out": "--out", "loss": "--loss"}
_OPTION_OF |= {"folds": "--folds", "fit": "--fit", "history": "--history", "ranking": "--ranking"}
_OPTION_OF |= {"groups": "--groups", "group_size": "--group-size"}
_INPUTS = """
MODEL  a saved model (.keras or .h5), or module:function that returns a Keras model
DATA   an .npz file with x and y (or x_train, y_train, x_test, y_test)
       a folder with a subfolder of images or .txt files for each class, or with train/ and test/
       a .csv, .tsv or .parquet table: see --target and --text
       module:function that returns data in any form that model.fit takes
"""
_STATUS = """
Exit status: 0 answered, 1 the numbers should not be trusted or there is none, 2 wrong usage or
input, 74 output could not be written, 130 interrupted. Started again, an interrupted command goes
on where it stopped.
"""
_EXAMPLES = f"""
Examples:
  {PROG} explain model.keras photos/ --wrong 10
  {PROG} audit model.keras table.csv --target readmitted --out audited
  {PROG} verify model.keras table.csv --target readmitted --csv audited/audit.csv
  {PROG} check my_code:load_model my_code:load_data
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of the command line.

    Args:
      arguments: the words after `python -m influence`. If None, `main` takes them from sys.argv.

    Returns: the exit status. The help text lists its values.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")  # Matplotlib then needs no display
    words = list(sys.argv[1:] if arguments is None else arguments)
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in ("-h", "--help"):
        print(_help(), end="")
        return 0
    out: Path | None = None
    try:
        if command not in (*COMMANDS, "replay"):
            known = ", ".join((*COMMANDS, "replay"))
            raise ValueError(f"the command comes first and must be one of {known}, got {command!r}")
        options = _parser(command).parse_intermixed_args(rest)
        out = Path(options.out or Path("influence-out", command)).expanduser()
        request = from_toml(Path(options.run)) if command == "replay" else _request(options)
        # These imports take seconds. `--help` and errors in options need none of them.
        console.import_tensorflow()
        from influence.tool.command import run

        _say(run(request, out), options.json)
        return 0
    except _Untrusted:
        return 1
    except SystemExit as stop:  # argparse raises SystemExit after --help or an error
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return console.interrupted()
    except (ValueError, TypeError, IndexError, OSError, DivergenceError) as error:
        return _failed(command, error, out)


class _Untrusted(Exception):
    """Error for an answer that was printed, but whose numbers should not be trusted."""


def _failed(command: str, error: Exception, out: Path | None) -> int:
    """Print an error in one line and return the exit status of the command."""
    if os.environ.get("INFLUENCE_TRACEBACK"):
        raise error
    line = console.unwritten(error, out)
    said = line or console.one_line(str(error))
    for name, option in _OPTION_OF.items():
        if said.startswith(f"{name} must"):
            said = option + said.removeprefix(name)
    print(f"{PROG} {console.one_line(command)}: {said}", file=sys.stderr)
    if line is not None:
        return console.OUTPUT
    return 1 if isinstance(error, DivergenceError) else console.USAGE


def _help() -> str:
    lines = "".join(f"  {name:10}{about}\n" for name, about in _ABOUT.items())
    lines += f"  {'replay':10}Run a {RUN} again. Every command writes one.\n\n"
    more = f"{PROG} COMMAND --help lists the options.\n"
    return _wrapped(_USAGE + lines + more) + _INPUTS + _EXAMPLES + _STATUS


def _wrapped(text: str) -> str:
    """Return the text with its long lines wrapped. Lines of the command list are indented."""
    import textwrap

    found = []
    for line in text.splitlines():
        indent = " " * 12 if line.startswith("  ") else ""
        found += textwrap.wrap(line, 100, subsequent_indent=indent) or [""]
    return "\n".join(found) + "\n"


def _parser(command: str) -> argparse.ArgumentParser:
    parser = console.in_one_line(
        argparse.ArgumentParser(
            prog=f"{PROG} {command}",
            description=_ABOUT.get(command, f"Run a {RUN} again, to the same numbers."),
            epilog=_STATUS if command == "replay" else _INPUTS + _STATUS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    if command == "replay":
        parser.add_argument("run", metavar=RUN, help="a file that a run wrote")
        _add_output(parser)
        return parser
    parser.set_defaults(command_name=command)
    parser.add_argument("model", metavar="MODEL", help="the trained model, see below")
    parser.add_argument("data", metavar="DATA", help="the training rows, see below")
    add = parser.add_argument
    add(
        "--test",
        metavar="DATA",
        help="the test rows, in a form of DATA (default: the training rows)",
    )
    if command == "explain":
        _add_rows(parser, "explain")
        add(
            "--top",
            type=int,
            default=USUAL_TOP,
            metavar="N",
            help=f"training rows of each kind for each test row (default {USUAL_TOP})",
        )
    elif command == "audit":
        add(
            "--top",
            type=int,
            default=USUAL_SUSPECTS,
            metavar="N",
            help=f"rows on the page (default {USUAL_SUSPECTS}); the CSV file has all rows",
        )
        add(
            "--ranking",
            choices=(AUTO, *RANKINGS),
            default=AUTO,
            help="what the order is by (default: auto, which says what it takes and why)",
        )
        add(
            "--folds",
            type=int,
            metavar="K",
            help="train K times, each time without a part of the rows, by --fit; such as 5",
        )
        add(
            "--fit",
            metavar="MODULE:FUNCTION",
            help="your own function (model, x, y), which trains a model with new weights",
        )
    elif command == "verify":
        add(
            "--remove",
            type=int,
            default=USUAL_REMOVE,
            metavar="N",
            help=f"training rows to remove, one at a time (default {USUAL_REMOVE})",
        )
        add("--csv", metavar="FILE", help="the file that audit wrote, with new labels filled in")
        add(
            "--fit",
            metavar="MODULE:FUNCTION",
            help="retrain by your own function (model, x, y) instead",
        )
        add(
            "--groups",
            type=int,
            metavar="K",
            help="remove K groups of rows instead, half with large scores and half at random; "
            "train with new weights by --fit, over two seeds",
        )
        add("--group-size", type=int, metavar="N", help="rows in a group (default: a twentieth)")
        _add_rows(parser, "compare")
    _add_reading(parser)
    _add_computing(parser, command)
    _add_output(parser)
    return parser


def _add_rows(parser: argparse.ArgumentParser, what: str) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--test-rows",
        type=int,
        nargs="+",
        metavar="ROW",
        help=f"numbers of the test rows to {what}, from 0",
    )
    group.add_argument(
        "--wrong",
        type=int,
        metavar="N",
        help=f"{what} the N most confident mistakes (default {USUAL_WRONG})",
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to read DATA")
    add = group.add_argument
    add(
        "--target",
        metavar="COLUMN",
        help="a table's column of labels (default: target, label, labels, class or y)",
    )
    add(
        "--text",
        metavar="COLUMN",
        nargs="?",
        const=_TEXT,
        help=f"a table's column of texts (default {_TEXT}); a folder needs no option",
    )
    add("--drop", metavar="COLUMN", nargs="+", default=[], help="columns the model does not take")
    add("--weight", metavar="COLUMN", help="a table's column of sample weights")
    add(
        "--class-weight",
        metavar="CLASS=WEIGHT",
        nargs="+",
        default=[],
        help="weights by class, as the training had them in fit(class_weight=...)",
    )
    add(
        "--image-size",
        metavar=("HEIGHT", "WIDTH"),
        nargs=2,
        type=int,
        help="the size of images (default: that of the model)",
    )
    add(
        "--scale",
        metavar="NUMBER",
        nargs="+",
        type=float,
        help="a factor for pixels, and an offset, if the training applied them outside the model",
    )


def _add_computing(parser: argparse.ArgumentParser, command: str) -> None:
    group = parser.add_argument_group("how to compute")
    add = group.add_argument
    add(
        "--loss",
        metavar="NAME",
        help="the loss of a model that was not compiled, by Keras' name, or module:function",
    )
    add(
        "--damping",
        type=float,
        metavar="NUMBER",
        help="the number added to the matrix's diagonal (default: chosen, and explained)",
    )
    add("--batch-size", type=int, metavar="N", help="rows in memory at a time (default: chosen)")
    add(
        "--index",
        metavar="DIR",
        help="the folder of kept factors and features (default: "
        "influence/index in the user's cache); only the command index writes to it",
    )
    if command not in ("check", "index"):
        add(
            "--history",
            metavar="FOLDER",
            help="the record of the training, which influence.Recorder wrote as a callback of fit",
        )
        add("--no-check", action="store_true", help="skip the check, and its alerts")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        metavar="FOLDER",
        help="folder of the page, the CSV file and run.toml (default: influence-out/COMMAND)",
    )
    group.add_argument("--json", action="store_true", help="print the answer as JSON")


def _request(options: argparse.Namespace) -> Request:
    """Convert parsed options into a Request.

    Raises: ValueError naming the option if its value is invalid.
    """
    given = vars(options)
    for name, value in given.items():
        if value == "":
            option = name.upper() if name in ("model", "data") else f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} must be followed by a value, got ''.")
    asked: dict[str, Any] = {}
    for name, key in (("test_rows", "rows"), ("wrong", "wrong"), ("top", "top")):
        if given.get(name) is not None:
            asked[key] = given[name]
    if "remove" in given:
        if options.csv is not None:
            asked = {"csv": str(Path(options.csv).expanduser().resolve())}
        else:
            if options.groups is None:
                asked["remove"] = options.remove
            else:
                asked["groups"] = options.groups
            if options.group_size is not None:
                if options.groups is None:
                    raise ValueError("--groups must be given with --group-size, got none.")
                asked["group_size"] = options.group_size
            if options.fit is not None:
                asked["fit"] = _absolute(options.fit)
    elif "ranking" in given:
        asked["ranking"] = options.ranking
        if options.folds is not None:
            asked["folds"] = options.folds
        if options.fit is not None:
            asked["fit"] = _absolute(options.fit)
    scale = options.scale
    if scale is not None and len(scale) not in (1, 2):
        raise ValueError(f"--scale must be a factor and an offset, got {len(scale)} numbers.")
    reading = Reading(
        target=options.target,
        text=options.text,
        drop=tuple(options.drop),
        weight=options.weight,
        class_weight=_class_weight(options.class_weight),
        image_size=None if options.image_size is None else tuple(options.image_size),
        scale=None if scale is None else (scale[0], scale[1] if len(scale) == 2 else 0.0),
    )
    folder = Path(options.index) if options.index else Path(pooch.os_cache("influence"), "index")
    return Request(
        command=options.command_name,
        model=_absolute(options.model),
        data=_absolute(options.data),
        test=None if given.get("test") is None else _absolute(options.test),
        loss=None if options.loss is None else _absolute(options.loss),
        reading=reading,
        asked=asked,
        damping=options.damping,
        batch_size=options.batch_size,
        check=not given.get("no_check", False),
        history=None if given.get("history") is None else _absolute(options.history),
        index=str(folder.expanduser().resolve()),
    )


def _absolute(text: str) -> str:
    """Make the path of an existing file or of `file.py:function` absolute. Keep other texts."""
    file, colon, name = text.rpartition(":")
    if colon and file.endswith(".py") and not Path(text).exists():
        return f"{Path(file).expanduser().resolve()}:{name}"
    path = Path(text).expanduser()
    return str(path.resolve()) if path.exists() else text


def _class_weight(words: Sequence[str]) -> dict[str, float] | None:
    found = {}
    for word in words:
        name, equals, weight = word.rpartition("=")
        try:
            found[name] = float(weight)
        except ValueError:
            equals = ""
        if not equals or not name:
            raise ValueError(f"--class-weight must be like 0=1 1=5, got {word!r}.")
    return found or None


def _say(result: Result, as_json: bool) -> None:
    if as_json:
        files = {name: str(path) for name, path in result.files.items()}
        text = json.dumps({**result.answer.as_dict(), "files": files}, indent=1, allow_nan=False)
        print(text)
    else:
        print(result.answer)
        print(f"\nThe page is {console.shown(result.files['page'])}")
        for name, about in (("csv", "the table"), ("run", "to run it again")):
            print(f"         {console.shown(result.files[name])}  ({about})")
        if result.hint:
            print(result.hint)
    if result.status:
        raise _Untrusted


if __name__ == "__main__":
    console.run(main)
