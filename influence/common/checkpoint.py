"""Store arrays on disk, to continue an interrupted computation later."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray

from influence_console import shown

Arrays = Mapping[str, NDArray]

# In each file, the entry of this name holds the number of the file's format and the checksum.
_SEAL = "format and sha256"
_FORMAT = 1
# `os.stat` gives the disk space of a file (`st_blocks`) in units of this many bytes.
_STAT_BLOCK = 512


def identity(net: Any, examples: Any, *more: Any) -> str:
    """Return a short hash that identifies the net, the examples and the values `more`.

    Of the net, the hash covers its class, its weights, its penalty and its losses on the first 8
    rows. It does not cover the names of layers. It does not cover the states of random generators
    either, because Keras draws new states whenever it loads a model with Dropout.
    """
    few = examples.take(slice(0, 8))
    weights = [weight.numpy() for weight in net.model.weights]
    answers = net.theta, net.losses(few.x, few.y), net.penalty(), net.penalty_gradient()
    return joblib.hash((type(net).__name__, weights, answers, examples.fingerprint, more))[:16]


def check_folder(checkpoints: str | os.PathLike | None) -> Path | None:
    """Create the checkpoint folder if it is missing, and check that it is writable.

    Args:
      checkpoints: the path of the folder, or None for no checkpoints.

    Returns: the folder's path, or None.
    Raises: TypeError if the argument is not a path, ValueError if the folder is not writable.
    """
    if checkpoints is None:
        return None
    if not isinstance(checkpoints, str | os.PathLike):
        raise TypeError(f"checkpoints must be a folder (str or Path) or None, got {checkpoints!r}.")
    return check_writable(Path(checkpoints), "checkpoints")


def check_writable(folder: Path, name: str) -> Path:
    """Create a folder if it is missing and check that it is writable.

    Returns: the folder.
    Raises: ValueError if the folder is not writable. The message contains `name`, the name of the
      argument.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} must be a folder that can be written to, got {shown(folder)} "
            f"({error.strerror})."
        ) from error
    return folder


def reserve(part: Path, needed: int, path: Path) -> None:
    """Reserve `needed` bytes of the disk for an existing file, because HDF5 may crash without them.

    Args:
      part: the file. The bytes that it holds are not changed.
      needed: the number of bytes to reserve, which becomes the size of the file.
      path: the path that the error message shows.

    Raises: ValueError naming `path` if the disk is too full, or if the system forbids a file of
      this size.
    """
    free = shutil.disk_usage(part.parent).free + part.stat().st_blocks * _STAT_BLOCK
    try:
        if needed > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(part, "r+b", buffering=0) as file:
            if hasattr(os, "posix_fallocate"):  # macOS does not have it
                os.posix_fallocate(file.fileno(), 0, needed)
            # The system may limit the size of this process's files. Only a write then fails.
            last = os.pread(file.fileno(), 1, needed - 1) or b"\0"
            os.pwrite(file.fileno(), last, needed - 1)
    except OSError as error:
        raise ValueError(
            f"path must be where {needed:,} bytes can be written, got {shown(path)} where {free:,} "
            f"are free ({error.strerror}); make room, ask for less, or write elsewhere."
        ) from error


def sha256(arrays: Arrays, *more: str) -> str:
    """Compute one SHA-256 of strings and named arrays. The digest also covers shapes and dtypes.

    Raises: ValueError if an array holds Python objects.
    """
    digest = hashlib.sha256(repr((*more, sorted(arrays))).encode())
    for name, array in sorted(arrays.items()):
        if array.dtype.hasobject:
            raise ValueError(f"object arrays cannot be saved, got {name} of dtype {array.dtype}.")
        turned = array.flags.f_contiguous and not array.flags.c_contiguous
        digest.update(repr((array.dtype.str, array.shape, turned)).encode())
        # The bytes are hashed in their memory order. This avoids a copy of a large matrix.
        flat = np.ascontiguousarray(array.T if turned else array).reshape(-1)
        digest.update(flat.view(np.uint8).data)
    return digest.hexdigest()


def kept(path: str | os.PathLike | None, compute: Callable[[], Arrays]) -> dict[str, NDArray]:
    """Return the arrays stored at `path`. If the file is missing, compute and store them first.

    The file is written under a temporary name and then renamed. If the process is killed, `path`
    is therefore a complete file or does not exist.

    Args:
      path: the path of an `.npz` file, or None to compute without storing.
      compute: a function that returns arrays by name. An existing file is not compared with it. If
        `compute` would return other arrays, the caller must therefore pass another `path`.

    Returns: the arrays by name.
    Raises: ValueError if `load` refuses the file.
    """
    if path is None:
        return {name: np.asarray(value) for name, value in compute().items()}
    if not Path(path).exists():
        store(path, compute())
    return load(path)


def store(path: str | os.PathLike, arrays: Arrays) -> None:
    """Write named arrays to an `.npz` file atomically. An existing file is replaced.

    The file also contains a checksum of the arrays and of the file's name.
    """
    path = Path(path)
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays, **{_SEAL: _seal(path, arrays)})
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        Path(partial).unlink(missing_ok=True)
        if isinstance(error, OSError):  # the error for a full disk does not name the file
            error.filename = error.filename or str(path)
        raise


def load(path: str | os.PathLike) -> dict[str, NDArray]:
    """Read the arrays of a file that `store` wrote.

    Returns: the arrays by name.
    Raises: ValueError if `store` did not write the file, or if the file was changed or renamed.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # reading a pipe may never end
        raise _refused(path, "that is no regular file")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        seal = arrays.pop(_SEAL, np.array(("none", "")))
    except Exception as error:  # a damaged file can cause many types of error
        raise _refused(path, f"that cannot be read ({error!r:.200})") from error
    expected = _seal(path, arrays)
    if seal.shape != expected.shape or seal[0] != expected[0]:
        raise _refused(path, f"of another format ({seal!s:.20}; this program's is {_FORMAT})")
    if seal[1] != expected[1]:
        raise _refused(path, "that was altered or renamed: its checksum is another")
    return arrays


def _seal(path: Path, arrays: Arrays) -> NDArray:
    return np.array((str(_FORMAT), sha256(arrays, path.name)))


def _refused(path: Path, why: str) -> ValueError:
    return ValueError(
        f"checkpoints must be files that this program wrote, got {shown(path)} {why}; delete it, "
        "and it is computed again."
    )
