"""The search for the files of a data set, and the check of their contents.

This module writes no file. A file is used only if its digest is one that the data set lists. A
file with another digest raises an error. Such a file is never changed or replaced, because the user
may need it.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pooch

from data.archive import check_plain, names_below, read_tar
from influence_console import shown

Root = str | os.PathLike[str] | None
_MD5 = "md5:"  # prefix of an MD5 digest, as in pooch
# A file is hashed only if its size is at most 2 times the expected size plus 1 MiB.
_MOST_TIMES, _MOST_MORE = 2, 1 << 20


@dataclass(frozen=True)
class DataFile:
    """A file, a folder of files, or an archive of a folder, from which a data set is read.

    Attributes:
      path: the path below a data folder, with forward slashes: "mnist/x.gz".
      size: the size in bytes; the sum over all files for a folder.
      digests: the accepted SHA-256 values, in hex. The first is that of the download. `sha256_of`
        defines the digest of a folder. An entry "md5:..." is an MD5 digest, for publishers that
        give no other. If `digests` is empty, any content is accepted.
      urls: the addresses to download from, tried in turn. Empty if the user must obtain the file.
        A URL "address#member" means the member of that name in a zip archive.
      unpacked: None, or the path of the folder that a gzipped tar archive unpacks to. The folder is
        used if there is no archive. If `unpacked` is set, `size` and `digests` are those of the
        folder's files, not of the archive. Any archive with the same files is therefore accepted.
      contents: a description for the user. It is needed if there is no digest or no URL.
    """

    path: str
    size: int
    digests: tuple[str, ...]
    urls: tuple[str, ...] = ()
    unpacked: str | None = None
    contents: str = ""


class Place(NamedTuple):
    """A folder that may contain data sets, and the name of the setting that specifies it."""

    setting: str
    folder: Path


def cache_folder() -> Path:
    """Return the user's cache folder, the default for downloads."""
    return Path(pooch.os_cache("influence"))


def places(root: Root = None) -> list[Place]:
    """List the folders to search, in order: `root`, $INFLUENCE_DATA, the user cache.

    Args:
      root: a folder named by the caller (`--data-dir`), or None.
    Returns: one Place for each setting that is set. $INFLUENCE_DATA must name an existing folder;
      the others need not exist.
    Raises: TypeError if root is not a path; ValueError if root is the empty string, or if the
      folder of $INFLUENCE_DATA does not exist.
    """
    if root is not None and not isinstance(root, (str, os.PathLike)):
        raise TypeError(f"root (--data-dir) must be a folder (str or Path) or None, got {root!r}.")
    if root == "":
        # The string is empty if a shell variable is unset. Path("") would be the current folder.
        raise ValueError(
            "root (--data-dir) must name a folder, got ''; leave it out to use "
            "$INFLUENCE_DATA and the user cache."
        )
    found = []
    if root is not None:
        found.append(Place("--data-dir", Path(root).expanduser()))
    if os.environ.get("INFLUENCE_DATA"):
        folder = Path(os.environ["INFLUENCE_DATA"]).expanduser()
        if not folder.is_dir():  # otherwise a typing error would look like missing data
            raise ValueError(
                f"INFLUENCE_DATA must be a folder, there is none at {shown(folder)}; unset it to "
                "use the user cache."
            )
        found.append(Place("$INFLUENCE_DATA", folder))
    found.append(Place("user cache", cache_folder()))
    return found


def located(file: DataFile, folder: Path) -> Path | None:
    """Return the path in `folder` of a file or its unpacked folder; None if neither exists."""
    candidates = [folder / name for name in (file.path, file.unpacked) if name is not None]
    # If the user may not enter a folder, Path.exists raises an error, but lexists returns False.
    return next((path for path in candidates if os.path.lexists(path)), None)


def missing(files: Sequence[DataFile], folder: Path) -> list[DataFile]:
    """List those of `files` that are not in `folder`."""
    return [file for file in files if located(file, folder) is None]


def find(files: Sequence[DataFile], root: Root = None) -> Path | None:
    """Find the first place that has all of `files`, without checking their contents.

    A place that has only some of the files is skipped, because a data set is read from one folder.

    Args:
      files: the files to look for.
      root: a folder to look in first, or None.
    Returns: the data folder (not the data set's own folder below it), or None.
    Raises: the errors of `places`.
    """
    for place in places(root):
        if not missing(files, place.folder):
            return place.folder
    return None


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file or a folder, in hex.

    The digest of a folder is that of a text. The text has one line "digest  relative/path" for each
    file below the folder, sorted by path. Names that begin with a dot are skipped: file managers
    create them.
    """
    if path.is_dir():
        return _digest_of_listing((sha256_of(path / name), name) for name in names_below(path))
    return pooch.file_hash(str(path), alg="sha256")


def verify(files: Sequence[DataFile], folder: Path) -> str:
    """Check every one of `files` in `folder` against its SHA-256.

    Args:
      files: the files that must be there.
      folder: the data folder.
    Returns: one digest for all of `files`. For plain files, `sha256sum <sorted paths> | sha256sum`
      prints it in `folder`.
    Raises: FileNotFoundError if a file is missing, ValueError if a file is not the expected one.
    """
    return _digest_of_listing((_verified_digest(file, folder), file.path) for file in files)


def explain_missing(name: str, files: Sequence[DataFile], root: Root, why: str) -> str:
    """Describe where a data set was searched, why it was not downloaded, and what to do.

    Args:
      name: name of the data set.
      files: the files that it needs.
      root: the folder that the caller named, or None.
      why: the reason why the files were not downloaded.
    Returns: a message of several lines.
    """
    lines = [f"{name} was not found.", "Looked in:"]
    for setting, folder in places(root):
        if not folder.is_dir():
            state = "no such folder"
        else:
            state = "lacks " + ", ".join(file.path for file in missing(files, folder))
        lines.append(f"  {setting} {shown(folder)}: {state}")
    lines += ["Download:", *(f"  {line}" for line in why.splitlines())]
    lines.append(
        "To use it, put these files into one of those folders, or into a new one named "
        "by --data-dir or $INFLUENCE_DATA:"
    )
    for file in files:
        known_by = file.contents
        if file.digests:
            known_by = f"{file.size:,} bytes  {_named(file.digests[0])}"
        if file.unpacked is not None:
            known_by = f"or the folder {file.unpacked} that it unpacks to, {known_by} of that"
        lines.append(f"  {file.path}  {known_by}")
        lines += [f"    from {url}" for url in file.urls]
    return "\n".join(lines)


def verify_at(file: DataFile, path: Path) -> str:
    """Check the file at any `path`, like `verify`.

    Args:
      file: the expected file.
      path: a file, or the folder that an archive unpacks to.
    Returns: the SHA-256 of the file; for an archive, that of its folder (see `sha256_of`).
    Raises: ValueError if it is not the expected file, or if it is or contains a link, a pipe or a
      device.
    """
    check_plain(path)
    packed = file.unpacked is not None and not path.is_dir()
    if packed:
        contents = read_tar(path, file.size)
        hashes = ((hashlib.sha256(content).hexdigest(), name) for name, content in contents.items())
        digest, size = _digest_of_listing(hashes), sum(map(len, contents.values()))
    else:
        size = sum(status.st_size for status in statuses(path).values())
        if file.digests and size > _MOST_TIMES * file.size + _MOST_MORE:
            raise ValueError(
                f"{shown(path)} is not the file it should be: expected {_known_by(file)}, "
                f"found {size:,} bytes. It was left untouched: move it away or replace it, then "
                "try again."
            )
        digest = sha256_of(path)
    if not file.digests or digest in file.digests:
        return digest
    if any(known.startswith(_MD5) for known in file.digests) and path.is_file():
        if _MD5 + pooch.file_hash(str(path), alg="md5") in file.digests:
            return digest
    of = "files of " if file.unpacked is not None else ""
    guess = " It looks truncated." if size < file.size else ""
    raise ValueError(
        f"{shown(path)} is not the file it should be: expected {of}{_known_by(file)}, found "
        f"{size:,} bytes with SHA-256 {digest}.{guess} It was left untouched: move it away or "
        "replace it, then try again."
    )


def statuses(path: Path) -> dict[Path, os.stat_result]:
    """Return the status of a file, or of every file below a folder, by path.

    Raises: ValueError for links, pipes and devices.
    """
    members = [path / name for name in names_below(path)] if path.is_dir() else [path]
    return {member: check_plain(member) for member in members}


def unchanged(files: Sequence[DataFile], folder: Path) -> Callable[[], None]:
    """Record the state of `files`; return a function that raises an error if they have changed.

    Call this before `verify`. Call the returned function after reading: it checks that the files
    read are the files that were verified.

    Raises: ValueError naming a changed file, raised by the returned function.
    """

    def state() -> dict[Path, tuple[int, ...]]:
        paths = (path for file in files if (path := located(file, folder)) is not None)
        return {
            member: (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
            for path in paths
            if not path.is_symlink()
            for member, s in statuses(path).items()
        }

    before = state()

    def check() -> None:
        after = state()
        if after != before:
            changed = sorted(k for k in {*before, *after} if before.get(k) != after.get(k))
            raise ValueError(
                f"{changed[0]} changed while it was read; wait until it is written, then try again."
            )

    return check


def _verified_digest(file: DataFile, folder: Path) -> str:
    path = located(file, folder)
    if path is None:
        raise FileNotFoundError(
            f"{folder / file.path} is missing: expected {_known_by(file)}, found nothing."
        )
    return verify_at(file, path)


def _known_by(file: DataFile) -> str:
    """Describe the expected file.

    The description is the size and the digests, or `contents` if the file has no digests.
    """
    if not file.digests:
        return file.contents
    return f"{file.size:,} bytes with {' or '.join(map(_named, file.digests))}"


def _named(digest: str) -> str:
    return f"MD5 {digest[len(_MD5) :]}" if digest.startswith(_MD5) else f"SHA-256 {digest}"


def _digest_of_listing(entries: Iterable[tuple[str, str]]) -> str:
    """Compute the SHA-256 of a listing of (digest, path) pairs, sorted by path.

    The listing has the format of `sha256sum`.
    """
    by_path = sorted(entries, key=lambda entry: entry[1])
    listing = "".join(f"{digest}  {path}\n" for digest, path in by_path)
    return hashlib.sha256(listing.encode()).hexdigest()
