"""The data sets of the experiments: search, download, checks and splits.

    x, y = data.load("mnist").train  # (55000, 784) in [0, 1], (55000,) in 0..9

`load` searches three folders, in this order: the folder that the caller names (`--data-dir`),
$INFLUENCE_DATA, and the user cache. In each it looks for files such as `<folder>/mnist/*.gz`. If no
folder has the data set, `load` downloads it into the cache, unless INFLUENCE_OFFLINE=1 is set.
Every file is checked each time it is read. `python -m data --help` describes the commands that
list, download and check data sets.
"""

import influence_console as console

console.begin(__name__)

from pathlib import Path

import numpy as np
import numpy.typing as npt

from data import download, files
from data.networks import weights
from data.registry import SETS, named
from data.splits import Splits, sha256_of_arrays

__all__ = ["Splits", "find", "load", "names", "weights"]


def names() -> tuple[str, ...]:
    """Return the names that `load` accepts."""
    return tuple(SETS)


def find(name: str, root: files.Root = None) -> Path | None:
    """Find the folder of a data set, without downloading or checking it.

    Args:
      name: one of `names()`.
      root: a folder to look in before $INFLUENCE_DATA and the user cache, or None.
    Returns: the data folder that `load` would read, or None if `load` would have to download the
      files. For a data set without files, the folder of this package.
    Raises: ValueError if there is no such data set; TypeError or ValueError if root is no path.
    """
    dataset = named(name)
    if not dataset.files:
        return Path(__file__).parent
    return files.find(dataset.files, root)


def load(name: str, root: files.Root = None, *, dtype: npt.DTypeLike = "float64") -> Splits:
    """Load a data set. Download it into the user cache if it is not found.

    `load` never writes to `root` or $INFLUENCE_DATA.

    Args:
      name: one of `names()`.
      root: a folder to look in before $INFLUENCE_DATA and the user cache, or None.
      dtype: dtype of x, "float64" (use it for convex models) or "float32" (for networks).
        Photographs are always uint8.
    Returns: the Splits of the data set, with read-only arrays.
    Raises: ValueError for an unknown name or dtype, or if a file is not the expected one;
      FileNotFoundError, with the files to provide, if the data set was not found and could not be
      downloaded; TypeError or ValueError if root is no path.
    """
    dataset, x_dtype = named(name), _float_dtype(dtype)
    folder = find(name, root) or download.obtain(name, dataset.files, root)
    check_unchanged = files.unchanged(dataset.files, folder)
    sha256 = files.verify(dataset.files, folder)
    train, test, *names = dataset.read(folder, x_dtype)
    check_unchanged()
    if not dataset.files:
        sha256 = sha256_of_arrays((*train, *test))
    where = folder if dataset.files else None
    return Splits(name, train, test, dataset.stand_in, sha256, *names, folder=where)


def _float_dtype(dtype: npt.DTypeLike) -> np.dtype:
    try:
        known = np.dtype(dtype)
    except TypeError:
        known = None
    if known is None or known not in (np.dtype("float32"), np.dtype("float64")):
        raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}.")
    return known
