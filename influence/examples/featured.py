"""Sets of examples that hold the features of a frozen trunk in place of their inputs."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence.common.convergence import warn_user
from influence.common.memory import FEATURES
from influence.common.progress import progress
from influence.examples.examples import Examples, Remaining

# Features are computed for this many rows at a time.
_ROWS = 256
# A temporary file is written only if the free disk space is at least this multiple of its size.
_SPARE = 1.25


class Featured(Examples):
    """View of another set that holds features phi(x) in place of the inputs x.

    The trunk is the frozen first part of a model. The features are computed when they are first
    read, and then cached. Features of at most `memory.FEATURES` bytes are held in memory. Larger
    features are stored in a temporary file on disk. If the disk is too small, a warning is given,
    and every pass computes the features again.

    Args:
      given: the set of examples with the original inputs, which the trunk takes.
      trunk: the trunk. `trunk(x)` returns the features of a batch as a dict of arrays (n, ...), and
        `trunk.digest` identifies the trunk's weights.

    Attributes:
      given, trunk: the arguments.
      where: the place of the cached features: "memory", "disk" or "nowhere". It is None before the
        first use.
      checked: True after a caller has verified that a row's features depend on this row only.
    """

    def __init__(self, given: Examples, trunk: Any):
        object.__setattr__(self, "y", given.y)
        self.given, self.trunk = given, trunk
        self.where: str | None = None
        self.checked = False
        self._features: dict[str, NDArray] = {}

    def __repr__(self) -> str:
        """Show the given set and the place of the features, without computing features."""
        return f"{type(self).__name__}({self.given!r}, in {self.where})"

    @property
    def x(self) -> Any:
        """Features of all rows, a dict of arrays (n, ...).

        Raises: TypeError if the features fit neither into memory nor on the disk.
        """
        if not self.in_memory:
            raise TypeError(
                "x of rows whose features fit neither into memory nor on the disk is not held; use "
                "batches(size)."
            )
        return self._features

    @property
    def in_memory(self) -> bool:
        """True if the features are cached, in memory or on disk. The first use computes them."""
        if self.where is None:
            self._compute()
        return self.where != "nowhere"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the given rows and of the trunk's weights."""
        both = f"{self.given.fingerprint} {self.trunk.digest}"
        return hashlib.sha256(both.encode()).hexdigest()

    @property
    def num_entries(self) -> int:
        """Number of entries in the features of all rows."""
        parts = (self.x if self.in_memory else self.take([0]).x).values()
        return sum(int(np.prod(part.shape[1:])) for part in parts) * len(self)

    def hold(self, features: dict[str, NDArray]) -> None:
        """Cache features of all rows that the trunk has already computed."""
        self.where, self._features = "memory", features

    # --- overridden methods of Examples ---------------------------------------------------------

    def _taken(self, rows: NDArray | slice) -> Examples:
        if self.in_memory:
            return super()._taken(rows)
        part = self.given._taken(rows)
        return Examples._trusted(self.trunk(part.x), part.y)

    def _remaining(self, kept: NDArray[np.int64]) -> Examples:
        return super()._remaining(kept) if self.in_memory else Remaining(self, kept)

    def _read(self, size: int, rows: NDArray[np.int64] | None) -> Iterator[tuple[Any, NDArray]]:
        if self.in_memory:
            yield from super()._read(size, rows)
        else:
            for x, y in self.given._read(size, rows):
                yield self.trunk(x), y

    def _compute(self) -> None:
        """Compute and store the features of all rows, if memory or the disk has room for them."""
        start, total = 0, -(-len(self) // _ROWS)
        where, features = None, {}
        for x, y in progress(self.given.batches(_ROWS), "features of the frozen layers", total):
            found = self.trunk(x)
            if not start:
                where, empty = _place(found, len(self))
                if where == "nowhere":
                    break
                features = {name: empty(part) for name, part in found.items()}
            for name, part in found.items():
                features[name][start : start + len(y)] = part
            start += len(y)
        for part in features.values():
            part.setflags(write=False)
        self.where, self._features = where, features  # last, so that an interruption caches nothing


class Kept(Featured):
    """View with features that were computed earlier. It reads the original rows only on demand.

    Args:
      read: a function that returns the set of examples with the original inputs.
      trunk: as in Featured.
      features: the features of all rows, a dict of arrays (n, ...).
      y: the labels, as `Examples.y` holds them.
    """

    def __init__(self, read: Callable[[], Examples], trunk: Any, features: dict, y: NDArray):
        object.__setattr__(self, "y", y)
        self._read_given, self.trunk, self._features = read, trunk, features
        self.where, self.checked = "memory", True

    def __repr__(self) -> str:
        """Show the number of rows, without reading them."""
        return f"{type(self).__name__}({len(self)} rows)"

    @cached_property
    def given(self) -> Examples:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The set of examples with the original inputs. The first access reads it."""
        return self._read_given()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the labels and features. The features' names identify the trunk's weights."""
        return Examples(self._features, self.y).fingerprint


def featured(given: Examples, trunk: Any) -> Featured:
    """Return a view of `given` with the trunk's features. Each set caches its latest view."""
    known = given.__dict__.get("_featured")
    if known is None or not trunk.same_as(known.trunk):
        known = Featured(given, trunk)
        object.__setattr__(given, "_featured", known)
    return known


def inputs_of(examples: Examples) -> Examples:
    """Return the set with the original inputs: `given` of a Featured set, else the set itself."""
    return examples.given if isinstance(examples, Featured) else examples


def _place(found: dict[str, NDArray], num_rows: int) -> tuple[str, Callable[[NDArray], NDArray]]:
    """Choose where to store the features of all rows, given the features of some rows.

    Returns: "memory", "disk" or "nowhere", and a function that allocates an array (n, ...) there.
    """
    bytes_each = [part.dtype.itemsize * int(np.prod(part.shape[1:])) for part in found.values()]
    needed = num_rows * sum(bytes_each)
    if needed <= FEATURES:
        return "memory", lambda part: np.empty((num_rows, *part.shape[1:]), part.dtype)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if needed * _SPARE <= free:
        return "disk", lambda part: _on_disk((num_rows, *part.shape[1:]), part.dtype)
    warn_user(
        f"The features of {num_rows:,} rows need {needed:,} bytes. Memory may hold {FEATURES:,} of "
        f"them, and {tempfile.gettempdir()} has {free:,} bytes free, so every pass "
        "runs the frozen layers again. Set TMPDIR to a larger disk, or choose a later layer."
    )
    return "nowhere", np.empty_like


def _on_disk(shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
    """Allocate an array in a temporary file. The file is deleted when the array is."""
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype, "w+", shape=shape)
