"""Progress of long work on the standard error, silent for work that is short."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
_DELAY = 5  # seconds


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Iterate, and after five seconds show what is being done and how long is left.

    A terminal gets a moving bar, a log a line every half a minute.
    """
    return _bar(items, what, total)


def counter(what: str) -> tqdm:
    """The same for steps that are counted by `update` as nobody knows how many there will be.

    `set_postfix_str(..., refresh=False)` says how far they got.
    """
    return _bar(None, what, None)


def _bar(items: Iterable | None, what: str, total: int | None) -> tqdm:
    return tqdm(
        items,
        desc=what,
        total=total,
        delay=_DELAY,
        leave=False,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
