"""The download of a data set's files with pooch: each is complete and checked, or absent.

pooch writes to a temporary name beside the target and renames it if its SHA-256 agrees. So a
download that fails, is interrupted or delivers other content leaves no file. Only `kill -9` can
leave the temporary file, whose name is never searched for.
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

import influence_console as console
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
    """Return True if $INFLUENCE_OFFLINE forbids downloads: set to anything except "" or "0"."""
    return os.environ.get("INFLUENCE_OFFLINE", "") not in ("", "0")


def fetch(files: Sequence[DataFile], folder: Path) -> None:
    """Download those of `files` that are not yet in `folder`.

    Each URL of a file is tried in turn until one delivers the right bytes. Existing files are
    checked and never overwritten. A progress bar is shown if stderr is a terminal.

    Args:
      files: the files that `folder` should contain.
      folder: the data folder; created if it does not exist.
    Raises: ConnectionError if no URL delivers a file, with the reason for each, or if
      $INFLUENCE_OFFLINE forbids downloads; ValueError if an existing file is not the expected one.
    """
    for file in files:
        if located(file, folder) is not None:
            verify([file], folder)
        else:
            _fetch_one(file, folder / file.path)


def obtain(name: str, files: Sequence[DataFile], root: Root) -> Path:
    """Find the folder with all of `files`; download them into the user cache if there is none.

    Args:
      name: name of the data set, for the message.
      files: the files that are needed.
      root: a folder to look in first, or None.
    Returns: the data folder.
    Raises: FileNotFoundError, with the files to provide, if they could not be downloaded; TypeError
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
            verify_at(file, Path(output_file))  # before pooch renames it

    for url in file.urls:
        try:
            pooch.retrieve(
                url,
                # An archive is identified by its contents: its own bytes may differ.
                None if file.unpacked is not None else file.digests[0],
                fname=target.name,
                path=target.parent,
                # pooch's annotation differs from the arguments that it documents and passes.
                downloader=download,  # pyright: ignore[reportArgumentType]
            )
            return
        # requests' exceptions are OSErrors; pooch reports a wrong digest by ValueError.
        except (OSError, ValueError) as error:
            if console.unwritten(error):  # other addresses would meet the same full disk
                raise
            failures.append(f"{url}: {type(error).__name__}: {error}")
    raise ConnectionError("\n".join([f"{file.path} could not be had from", *failures]))


def _download(url: str, output_file: str) -> None:
    """Download `url` to `output_file`; for "address#member", extract that member of the zip."""
    http = pooch.HTTPDownloader(progressbar=sys.stderr.isatty())
    address, member = urldefrag(url)
    # pooch's file is readable only by its owner, also after the rename, which would lock others out
    # of a shared folder. A new file obeys the umask.
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
