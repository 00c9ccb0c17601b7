"""The download of a data set's files with pooch. Each file is either complete or absent.

pooch downloads to a temporary file in the target's folder and renames it if its digest is right. A
download that fails, is interrupted or delivers other content leaves no file. Only `kill -9` can
leave the temporary file. No reader searches for its name.
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
    """Return True if $INFLUENCE_OFFLINE forbids downloads: if it is set and neither "" nor "0"."""
    return os.environ.get("INFLUENCE_OFFLINE", "") not in ("", "0")


def fetch(files: Sequence[DataFile], folder: Path) -> None:
    """Download those of `files` that are not yet in `folder`.

    The URLs of a file are tried in turn until one delivers the right bytes. Existing files are
    checked and never overwritten. If stderr is a terminal, it shows a progress bar.

    Args:
      files: the files that `folder` should contain.
      folder: the data folder, which is created if it does not exist.
    Raises: ConnectionError if no URL delivers a file, with the reason for each, or if
      $INFLUENCE_OFFLINE forbids downloads; ValueError if an existing file is not the expected one.
    """
    for file in files:
        if located(file, folder) is not None:
            verify([file], folder)
        else:
            _fetch_one(file, folder / file.path)


def obtain(name: str, files: Sequence[DataFile], root: Root) -> Path:
    """Find the folder with all of `files`. If there is none, download them into the user cache.

    Args:
      name: name of the data set, for the message.
      files: the files that are needed.
      root: a folder to look in first, or None.
    Returns: the data folder.
    Raises: FileNotFoundError, listing the files to provide, if the download fails; TypeError or
      ValueError if root is no path.
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
    pooch.get_logger().setLevel("WARNING")  # at level INFO, pooch reports every step
    failures = []

    def download(url: str, output_file: str, _pooch) -> None:
        _download(url, output_file)
        if file.unpacked is not None:
            verify_at(file, Path(output_file))  # before pooch renames it

    for url in file.urls:
        try:
            pooch.retrieve(
                url,
                # For an archive, `download` checks the contents. The archive itself may differ.
                None if file.unpacked is not None else file.digests[0],
                fname=target.name,
                path=target.parent,
                # pooch calls `downloader` with the arguments that its documentation names. Its type
                # annotation of `downloader` names others.
                downloader=download,  # pyright: ignore[reportArgumentType]
            )
            return
        # requests raises subclasses of OSError. pooch raises ValueError for a wrong digest.
        except (OSError, ValueError) as error:
            if console.unwritten(error):  # other addresses would meet the same full disk
                raise
            failures.append(f"{url}: {type(error).__name__}: {error}")
    raise ConnectionError("\n".join([f"{file.path} could not be had from", *failures]))


def _download(url: str, output_file: str) -> None:
    """Download `url` to `output_file`. For "address#member", extract that member of the zip."""
    http = pooch.HTTPDownloader(progressbar=sys.stderr.isatty())
    address, member = urldefrag(url)
    # Only the owner can read the file that pooch creates. In a shared folder, other users need it
    # too. So we remove the file and make a new file, whose permissions follow the umask.
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
