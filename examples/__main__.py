"""`python -m examples NAME`: make an example and ask `python -m influence` four questions."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import influence_console as console
from examples import NAMES, maker

# `verify` removes this many rows. The refits without them take a minute or two.
_REMOVE = 12


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      arguments: the words after `python -m examples`. If None, they are taken from sys.argv.

    Returns: 0, or the last exit status above 1 of a command: the command then refused its input.
    """
    parser = console.in_one_line(
        argparse.ArgumentParser(prog="python -m examples", description=__doc__, allow_abbrev=False)
    )
    parser.add_argument("name", choices=NAMES, help="the example")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="the folder of the real data; without it, the example is small",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("examples-out"),
        help="where to write (default: examples-out)",
    )
    options = parser.parse_args(arguments)
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data must be an existing folder, got {str(options.data)!r}.")
    console.import_tensorflow()
    from influence.__main__ import main as ask

    out = options.out / options.name
    trial = maker(options.name)(out, options.data)
    status = 0
    for command in ("explain", "check", "audit", "verify"):
        words = [*trial.words(command), "--out", str(out / command)]
        if command == "verify":
            words += ["--remove", str(_REMOVE)]
        print(f"\n$ python -m influence {shlex.join(words)}\n", flush=True)
        found = ask(words)
        # `check` returns 1 if the numbers should not be trusted. This is an answer, not a failure.
        status = found if found > 1 else status
    return status


if __name__ == "__main__":
    console.run(main)
