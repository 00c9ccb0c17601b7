"""Tar archives read into memory: nothing is written to disk, no link followed, nothing run."""

import gzip
import io
import os
import stat
import tarfile
import zlib
from pathlib import Path, PurePosixPath

# Bytes of headers and padding that an archive may have besides its files.
_MOST_OVERHEAD = 1 << 26


def read_tar(path: Path, num_bytes: int) -> dict[str, bytes]:
    """Read the files of a gzipped tar archive of one folder.

    Args:
      path: the archive.
      num_bytes: total size of its files; a larger archive is refused before it is unpacked.
    Returns: {path below that folder: content} of the regular files, sorted by path. Names that
      begin with a dot (file managers create them), links, devices and folders are skipped.
    Raises: ValueError naming the archive if it is not a valid gzipped tar archive, or if a name in
      it has a control character.
    """
    try:
        with gzip.open(path) as stream:
            unpacked = stream.read(num_bytes + _MOST_OVERHEAD + 1)
        if len(unpacked) > num_bytes + _MOST_OVERHEAD:
            raise ValueError(f"{path}: expected {num_bytes:,} bytes of files, found more.")
        found, total = {}, 0
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts[1:]
                if not member.isreg() or any(part.startswith(".") for part in parts):
                    continue
                total += member.size  # for a sparse member, its size with the holes filled
                if total > num_bytes:
                    raise ValueError(f"{path}: expected {num_bytes:,} bytes of files, found more.")
                content = archive.extractfile(member)
                assert content is not None  # regular
                found[_printable("/".join(parts), path)] = content.read()
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path}: expected a gzipped tar archive, found: {error}") from error
    return dict(sorted(found.items()))


def read_folder(path: Path) -> dict[str, bytes]:
    """Read the files below a folder, like `read_tar` those of its archive."""
    return {name: (path / name).read_bytes() for name in names_below(path)}


def names_below(path: Path) -> list[str]:
    """List the paths of the files below a folder, sorted, without names that begin with a dot.

    Raises: ValueError for a link, a pipe or a device among them, or a name with a control
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
    """Refuse what is neither a regular file nor a folder, before anything reads it.

    A pipe would block the reader, a device may have no end, and the target of a link may change
    after it has been checked.

    Args:
      path: an existing file or folder.
    Returns: its status.
    Raises: ValueError naming it and its kind.
    """
    status = path.lstat()
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(
            f"{path}: expected a regular file, found {kind}; put the file itself there."
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
    """Return a name; with a line break in it, one file could pass for two in a listing.

    Raises: ValueError for a control character.
    """
    if not name.isprintable():
        raise ValueError(
            f"{path}: expected file names without control characters, found {name!r}; rename it."
        )
    return name
