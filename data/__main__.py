"""`python -m data {list,fetch,check} [names]`: list, download and check the data sets."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import data
import influence_console as console
from data import download, files
from data.registry import SETS, named
from data.splits import DataSet

_DESCRIPTION = """\
See, download and check the data sets of the experiments.

  list    show each data set, its terms, its size and where it is
  fetch   download what is missing, into --data-dir or else the user cache
  check   verify checksums, read the files and show the shapes
"""

_EPILOG = """\
Without --data-dir, data sets are looked for in $INFLUENCE_DATA, then in the user cache
({cache}).
Set INFLUENCE_OFFLINE=1 to forbid all downloads.

Exit status: 0 if all is well, 1 if fetch or check found something missing or wrong,
2 if the command line was not understood, 74 if a file could not be written, 130 if interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      arguments: the words after `python -m data`. If None, they are taken from sys.argv.
    Returns: the exit status, 0, 1 or 74.
    Raises: SystemExit with status 2 if the arguments are not understood, 0 after `--help`.
    """
    parser = _parser()
    # Intermixed parsing lets names follow options. Before Python 3.12 plain parsing refuses
    # `fetch --data-dir D mnist`.
    options = parser.parse_intermixed_args(arguments)
    try:
        datasets = [named(name) for name in options.names or SETS]
        files.places(options.data_dir)
    except ValueError as error:
        parser.error(str(error))
    if options.command == "list":
        print(_table(datasets, options.data_dir))
        return 0
    act = {"fetch": _fetch, "check": _check}[options.command]
    status = 0
    for dataset in datasets:
        try:
            print(f"{dataset.name}: {act(dataset, options.data_dir)}")
        except (OSError, ValueError) as error:
            unwritten = console.unwritten(error)
            print(f"{dataset.name}: {unwritten or error}", file=sys.stderr)
            status = max(status, console.OUTPUT if unwritten else 1)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = console.in_one_line(
        argparse.ArgumentParser(
            prog="python -m data",
            description=_DESCRIPTION,
            epilog=_EPILOG.format(cache=files.cache_folder()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    parser.add_argument("command", choices=("list", "fetch", "check"), help="what to do, see above")
    parser.add_argument(
        "names",
        nargs="*",
        default=[],  # else, if the command is missing, argparse says that names are required
        help=f"of {', '.join(SETS)}; all of them if omitted",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="list: look here first; fetch: download to here; check: only the files here",
    )
    return parser


def _table(datasets: Sequence[DataSet], data_dir: str | None) -> str:
    rows = [("name", "what", "terms", "size", "found in")]
    for dataset in datasets:
        size, place = "-", "embedded"
        if dataset.files:
            size = f"{sum(file.size for file in dataset.files) / 1e6:.1f} MB"
            place = str(data.find(dataset.name, data_dir) or "not found")
        rows.append((dataset.name, dataset.what, dataset.terms, size, place))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _fetch(dataset: DataSet, data_dir: str | None) -> str:
    if not dataset.files:
        return "needs no file"
    folder = _folder(dataset, data_dir)
    if folder is not None and not files.missing(dataset.files, folder):
        files.verify(dataset.files, folder)
        return f"already in {console.shown(folder)}"
    folder = folder or files.cache_folder()
    download.fetch(dataset.files, folder)
    return f"downloaded to {console.shown(folder)}"


def _check(dataset: DataSet, data_dir: str | None) -> str:
    folder = _folder(dataset, data_dir)
    if folder is None:
        why = f"not tried; `python -m data fetch {dataset.name}` does it."
        if not all(file.urls for file in dataset.files):
            why = "there is no address to download it from; get it by hand."
        raise FileNotFoundError(files.explain_missing(dataset.name, dataset.files, None, why))
    files.verify(dataset.files, folder)
    splits = data.load(dataset.name, folder, dtype="float32")
    shapes = ", ".join(
        f"{split} x {x.shape} y {y.shape}"
        for split, (x, y) in (("train", splits.train), ("test", splits.test))
    )
    where = f" in {console.shown(folder)}" if dataset.files else ""
    return f"good{where}: {shapes}, SHA-256 {splits.sha256}"


def _folder(dataset: DataSet, data_dir: str | None) -> Path | None:
    """Return `data_dir` if it is given, else the first folder with all files, or None."""
    return Path(data_dir).expanduser() if data_dir else data.find(dataset.name)


if __name__ == "__main__":
    console.run(main)
