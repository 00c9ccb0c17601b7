"""Tar archives read into memory: nothing in them is written to disk, followed or run."""

import gzip
import io
import tarfile
import zlib
from pathlib import Path, PurePosixPath

_MOST_OVERHEAD = 1 << 26  # bytes of headers and padding beside the files


def read_tar(path: Path, num_bytes: int) -> dict[str, bytes]:
    """The files of a gzipped tar archive of one folder.

    Args:
      path: the archive.
      num_bytes: what its files amount to; one that holds more is refused before it is unpacked.
    Returns: {path below that folder: content} of the regular files, sorted by path; names beginning
      with a dot are left out, being the file manager's. Links, devices and folders are passed over.
    Raises: ValueError naming the archive if it is not what a gzipped tar archive should be.
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
                total += member.size  # of a sparse member, what its holes are filled up to
                if total > num_bytes:
                    raise ValueError(f"{path}: expected {num_bytes:,} bytes of files, found more.")
                content = archive.extractfile(member)
                assert content is not None  # regular
                found["/".join(parts)] = content.read()
    except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path}: expected a gzipped tar archive, found: {error}") from error
    return dict(sorted(found.items()))


def read_folder(path: Path) -> dict[str, bytes]:
    """The files below a folder, as `read_tar` gives those of the archive it was unpacked from."""
    return {name: (path / name).read_bytes() for name in names_below(path)}


def names_below(path: Path) -> list[str]:
    """Paths of the files below a folder, sorted; names beginning with a dot are left out."""
    below = (member.relative_to(path) for member in path.rglob("*") if member.is_file())
    shown = (name for name in below if not any(part.startswith(".") for part in name.parts))
    return sorted(name.as_posix() for name in shown)
