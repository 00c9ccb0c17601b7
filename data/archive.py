"""Readers of tar archives and folders. They write no file to disk and follow no links."""

import gzip
import io
import os
import stat
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from influence_console import shown

# An archive may have this many bytes of headers and padding in addition to its files.
_MOST_OVERHEAD = 1 << 26


def read_tar(path: Path, num_bytes: int) -> dict[str, bytes]:
    """Read the files of a gzipped tar archive of one folder.

    Args:
      path: the archive.
      num_bytes: the largest total size of the files in the archive, in bytes.
    Returns: a dict from the path of each regular file below the archive's folder to its content,
      sorted by path. Links, devices, folders and names that begin with a dot are skipped. (File
      managers create hidden files.)
    Raises: ValueError naming the archive if it is not a valid gzipped tar archive, if its files are
      larger than `num_bytes`, or if a name in it has a control character.
    """
    try:
        with gzip.open(path) as stream:
            unpacked = stream.read(num_bytes + _MOST_OVERHEAD + 1)
        if len(unpacked) > num_bytes + _MOST_OVERHEAD:
            raise ValueError(f"{shown(path)}: expected {num_bytes:,} bytes of files, found more.")
        found, total = {}, 0
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts[1:]
                if not member.isreg() or any(part.startswith(".") for part in parts):
                    continue
                total += member.size  # the size of a sparse member includes its holes
                if total > num_bytes:
                    raise ValueError(
                        f"{shown(path)}: expected {num_bytes:,} bytes of files, found more."
                    )
                content = archive.extractfile(member)
                assert content is not None  # regular
                found[_printable("/".join(parts), path)] = content.read()
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(
            f"{shown(path)}: expected a gzipped tar archive, found: {error}"
        ) from error
    return dict(sorted(found.items()))


def read_folder(path: Path) -> dict[str, bytes]:
    """Read the files below a folder. Return a dict from path to content, as `read_tar` does."""
    return {name: (path / name).read_bytes() for name in names_below(path)}


def names_below(path: Path) -> list[str]:
    """List the paths of the files below a folder, sorted, without names that begin with a dot.

    Raises: ValueError if a file is a link, a pipe or a device, or if a name has a control
      character.
    """
    found = []
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in (*links, *files):
            if not name.startswith("."):
                member = Path(folder) / name
                check_plain(member)
                found.append(_printable(member.relative_to(path).as_posix(), path))
    return sorted(found)


def check_plain(path: Path) -> os.stat_result:
    """Raise an error if `path` is neither a regular file nor a folder.

    A pipe would block the reader. A device may have no end. The target of a link may change after
    it has been checked.

    Args:
      path: an existing file or folder.
    Returns: the status of `path`, links not followed.
    Raises: ValueError naming the path and its kind.
    """
    status = path.lstat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(
            f"{shown(path)}: expected a regular file, found {kind}; put the file itself there."
        )
    return status


_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def _printable(name: str, path: Path) -> str:
    """Return `name` unchanged if it has no control character.

    A line break in a name could make one file look like two files in a list.

    Raises: ValueError if the name has a control character.
    """
    if not name.isprintable():
        raise ValueError(
            f"{shown(path)}: expected file names without control characters, found {name!r}; "
            "rename it."
        )
    return name
