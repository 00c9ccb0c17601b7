"""Tar archives read into memory: nothing is written to disk, no link followed, nothing run."""

import gzip
import io
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
    Raises: ValueError naming the archive if it is not a valid gzipped tar archive.
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
                found["/".join(parts)] = content.read()
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path}: expected a gzipped tar archive, found: {error}") from error
    return dict(sorted(found.items()))


def read_folder(path: Path) -> dict[str, bytes]:
    """Read the files below a folder, like `read_tar` those of its archive."""
    return {name: (path / name).read_bytes() for name in names_below(path)}


def names_below(path: Path) -> list[str]:
    """List the paths of the files below a folder, sorted, without names that begin with a dot."""
    below = (member.relative_to(path) for member in path.rglob("*") if member.is_file())
    shown = (name for name in below if not any(part.startswith(".") for part in name.parts))
    return sorted(name.as_posix() for name in shown)
