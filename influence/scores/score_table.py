"""The HDF5 file that scores are kept in: how it is made, marked, and told from another.

All room in the file is allotted when it is made, so that later writes touch numbers only and no
bookkeeping of HDF5's. A counter of finished blocks is written after the block it counts has reached
the disk: whatever the moment of a kill -9, what is counted is whole.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from influence.common.checkpoint import check_writable

TABLE, S_TEST = "change_if_removed", "s_test"
CHUNK = (128, 1024)  # 512 KiB in float32: a row and a column are both quick to read
SAMPLE = 64  # tests and rows whose scores are computed again in the net's dtype
PER_TEST = ("residual", "iterations", "converged", "min_curvature")
LOSSES, PENALTY = "losses of the first test examples", "penalty"
TRAINING = "losses of the first training rows"
_COMPUTED = (LOSSES, TRAINING, PENALTY)  # the model's answers: by another machine or thread count
_PROBE_RTOL = 1e-3  # equal to this; everything else is what was given, and equal or not


def create(
    path: Path,
    identity: dict[str, Any],
    *,
    shape: tuple[int, int],
    dtype: str,
    s_test: tuple[int, Any],
    rows: NDArray[np.int64],
    n: int,
    together: tuple[int, int],
) -> None:
    """Make the file, with room for everything, under its name only when it is whole.

    Args:
      path: where.
      identity: what the numbers depend on, by name; kept as attributes.
      shape: (m, k) of the table.
      dtype: of the table.
      s_test: d and dtype of a row of s_test.
      rows: (k,) training rows.
      n: how many training rows there are in all.
      together: tests and rows of the table that are finished at once.

    Raises: ValueError where the disk is too small or cannot be written to.
    """
    (m, k), (d, s_dtype) = shape, s_test
    check_writable(path.parent, "path's parent")
    # One name, so that what a kill -9 in here left behind is overwritten by the next call.
    unfinished = path.with_name(path.name + ".new")
    unfinished.unlink(missing_ok=True)
    needed = m * (k * np.dtype(dtype).itemsize + d * np.dtype(s_dtype).itemsize)
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise ValueError(
            f"path must be where {needed / 1e9:.1f} GB are free, for {m} x {k} scores and s_test, "
            f"got {path.parent} with {free / 1e9:.1f}; ask for fewer rows, or write elsewhere."
        )
    try:
        with h5py.File(unfinished, "w") as file:
            _allot(file, TABLE, (m, k), dtype)
            _allot(file, S_TEST, (m, d), s_dtype)
            _describe(file, n)
            file["rows"] = rows
            for name, kind in zip(PER_TEST, (float, int, bool, float), strict=True):
                file[name] = np.zeros(m, kind)
            file["tests_solved"], file["blocks_done"] = 0, 0
            file.attrs.update(identity)
            file.attrs["together"] = together
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _describe(file: h5py.File, n: int) -> None:
    file[TABLE].attrs.update(
        estimand="predicted change of each test loss were each training row removed, "
        "s_test . grad L(z_i) / n",
        sign="positive: the loss rises without the row, so the row helped",
        unit="that of the test loss, nats for log losses",
        axes="test example, training row (its number is in rows)",
        n=n,
    )
    file[S_TEST].attrs["meaning"] = "H^-1 grad loss of each test example"
    file["rounding_error"] = np.nan
    file["rounding_error"].attrs["meaning"] = (
        f"largest error of {SAMPLE} x {SAMPLE} scores at most, against the net's own dtype, over "
        "the largest score among them"
    )
    packages = ("numpy", "scipy", "h5py", "keras", "tensorflow")
    file.attrs["versions"] = json.dumps({p: importlib.metadata.version(p) for p in packages})


def _allot(file: h5py.File, name: str, shape: tuple, dtype: Any) -> None:
    """A data set whose every chunk has its place in the file from the beginning."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(tuple(map(min, CHUNK, shape)))
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    kind = h5py.h5t.py_create(np.dtype(dtype))
    h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple(shape), properties)


def mark(file: h5py.File, counter: str, value: int) -> None:
    """Count what has been written, once it is on the disk."""
    to_disk(file)  # what is counted, before the count
    file[counter][()] = value
    file.flush()


def to_disk(file: h5py.File) -> None:
    """Hand everything written to the disk, and wait for it."""
    file.flush()
    os.fsync(file.id.get_vfd_handle())


def check_same(path: Path, identity: dict[str, Any]) -> None:
    """Refuse a file of other inputs.

    Raises: ValueError naming them.
    """
    if path.is_dir():
        raise ValueError(f"path must be a file, got the folder {path}.")
    try:
        with h5py.File(path, "r") as file:
            stored = dict(file.attrs)
    except OSError as error:
        raise ValueError(
            f"path must be free or hold scores, got {path}, which cannot be read ({error}); "
            "another process may be writing it, else delete it."
        ) from error
    other = [name for name, value in identity.items() if not _equal(name, stored.get(name), value)]
    if other:
        raise ValueError(
            f"path must be free or hold scores of the same inputs, got {path} with another "
            f"{', another '.join(other)}; give another path, or delete it."
        )


def _equal(name: str, stored: Any, value: Any) -> bool:
    if stored is None or np.shape(stored) != np.shape(value):
        return False
    if name in _COMPUTED:
        return np.allclose(stored, value, rtol=_PROBE_RTOL, atol=1e-6)
    return bool(np.all(stored == value))
