"""Arrays stored on disk, so that an interrupted computation can continue."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray]


def identity(net: Any, examples: Any, *more: Any) -> str:
    """Return a short name that changes with the net, with the examples or with `more`.

    The net is identified by its class, its variables and its answers for a few examples: the names
    and numbers that Keras gives to layers do not count.
    """
    few = examples.take(slice(0, 8))
    variables = [variable.numpy() for variable in net.model.variables]
    answers = net.theta, net.losses(few.x, few.y), net.penalty(), net.penalty_gradient()
    return joblib.hash((type(net).__name__, variables, answers, examples.fingerprint, more))[:16]


def check_folder(checkpoints: str | os.PathLike | None) -> Path | None:
    """Create the checkpoint folder and check that it is writable, before any long work.

    Args:
      checkpoints: the folder; None: no checkpoints.

    Returns: the folder's path, or None.
    Raises: TypeError if it is not a path, ValueError if it is not writable.
    """
    if checkpoints is None:
        return None
    if not isinstance(checkpoints, str | os.PathLike):
        raise TypeError(f"checkpoints must be a folder (str or Path) or None, got {checkpoints!r}.")
    return check_writable(Path(checkpoints), "checkpoints")


def check_writable(folder: Path, name: str) -> Path:
    """Create a folder if it is missing and check that it is writable.

    Returns: the folder.
    Raises: ValueError, with the argument's `name`, if the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} must be a folder that can be written to, got {folder} ({error.strerror})."
        ) from error
    return folder


def kept(path: str | os.PathLike | None, compute: Callable[[], Arrays]) -> dict[str, NDArray]:
    """Return the arrays stored at `path`; if the file is missing, compute and store them first.

    The file is written under a temporary name and then renamed. A process that is killed at any
    moment therefore leaves a complete file or none.

    Args:
      path: an `.npz` file; None: compute without storing.
      compute: returns named arrays. `path` must identify everything that they depend on.

    Returns: the arrays by name.
    """
    if path is None:
        return {name: np.asarray(value) for name, value in compute().items()}
    if not Path(path).exists():
        store(path, compute())
    return load(path)


def store(path: str | os.PathLike, arrays: Arrays) -> None:
    """Write named arrays to an `.npz` file, completely or not at all; replace an existing file."""
    path = Path(path)
    arrays = {name: np.asarray(value) for name, value in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        Path(partial).unlink(missing_ok=True)
        if isinstance(error, OSError):  # of a full disk; its error names no file
            error.filename = error.filename or str(path)
        raise


def load(path: str | os.PathLike) -> dict[str, NDArray]:
    """Read the arrays of a file that `store` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
