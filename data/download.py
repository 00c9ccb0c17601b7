"""Downloading the files of a data set with pooch: whole and checked, or not at all.

pooch writes to a temporary name beside the target and renames it once its SHA-256 agrees, so a
download that breaks, is interrupted or delivers something else leaves no file behind. Only
`kill -9` can leave the temporary one, whose name nothing looks for.
"""

import os
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pooch

from data.files import (
    DataFile,
    Root,
    cache_folder,
    explain_missing,
    find,
    located,
    verify,
    verify_at,
)


def offline() -> bool:
    """Whether $INFLUENCE_OFFLINE forbids downloads: set to anything but "" or "0"."""
    return os.environ.get("INFLUENCE_OFFLINE", "") not in ("", "0")


def fetch(files: Sequence[DataFile], folder: Path) -> None:
    """Download those of `files` that are not yet in `folder`.

    Each URL of a file is tried in turn until one delivers the right bytes. Files already there
    are checked and never overwritten. A progress bar is shown if stderr is a terminal.

    Args:
      files: what `folder` is to hold.
      folder: the data folder; made if need be.
    Raises: ConnectionError if a file can be had from none of its URLs, with the reason for each,
      or if downloads are forbidden by $INFLUENCE_OFFLINE; ValueError if a file already there is
      not the expected one.
    """
    for file in files:
        if located(file, folder) is not None:
            verify([file], folder)
        else:
            _fetch_one(file, folder / file.path)


def obtain(name: str, files: Sequence[DataFile], root: Root) -> Path:
    """The folder that holds all of `files`, downloaded into the user cache if they are nowhere.

    Args:
      name: what they are, for the message.
      files: what is needed.
      root: a folder to look in first, or None.
    Returns: the data folder.
    Raises: FileNotFoundError, saying what to put where, if they could not be downloaded; TypeError
      or ValueError if root is no path.
    """
    folder = find(files, root)
    if folder is None:
        folder = cache_folder()
        try:
            fetch(files, folder)
        except OSError as error:
            raise FileNotFoundError(explain_missing(name, files, root, str(error))) from error
    return folder


def _fetch_one(file: DataFile, target: Path) -> None:
    if not file.urls:
        what = f" It is {file.contents}" if file.contents else ""
        raise ConnectionError(f"{file.path} has no address to download from: get it by hand.{what}")
    if offline():
        raise ConnectionError(
            f"{file.path} was not tried, as INFLUENCE_OFFLINE="
            f"{os.environ['INFLUENCE_OFFLINE']} is set; unset it to download."
        )
    pooch.get_logger().setLevel("WARNING")  # at INFO it reports every step
    failures = []

    def download(url: str, output_file: str, _pooch) -> None:
        _download(url, output_file)
        if file.unpacked is not None:
            verify_at(file, Path(output_file))  # before pooch gives it its name

    for url in file.urls:
        try:
            pooch.retrieve(
                url,
                # An archive is known by what is in it: whoever packed it, the bytes may differ.
                None if file.unpacked is not None else file.digests[0],
                fname=target.name,
                path=target.parent,
                # pooch's annotation names other arguments than it passes, and documents.
                downloader=download,  # pyright: ignore[reportArgumentType]
            )
            return
        # requests' exceptions are OSErrors; pooch reports a wrong digest by ValueError.
        except (OSError, ValueError) as error:
            failures.append(f"{url}: {type(error).__name__}: {error}")
    raise ConnectionError("\n".join([f"{file.path} could not be had from", *failures]))


def _download(url: str, output_file: str) -> None:
    """Write what `url` serves to `output_file`; of "address#member", that member of the zip."""
    http = pooch.HTTPDownloader(progressbar=sys.stderr.isatty())
    address, member = urldefrag(url)
    # pooch made the file readable by its owner alone, which would survive the rename and lock
    # others out of a shared folder. Made anew, it obeys the umask.
    os.remove(output_file)
    if not member:
        http(address, output_file, None)
        return
    with tempfile.TemporaryFile() as archive:
        http(address, archive, None)
        try:
            with (
                zipfile.ZipFile(archive) as folder,
                folder.open(unquote(member)) as source,
                open(output_file, "wb") as target,
            ):
                shutil.copyfileobj(source, target)
        except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
            raise ValueError(
                f"expected a zip archive with {unquote(member)} in it, found: {error}"
            ) from error
