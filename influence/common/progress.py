"""Progress bars on standard error, shown only for long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
# A bar appears after this many seconds.
_DELAY = 5


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Iterate over items; after five seconds, show the label `what` and the time left.

    A terminal shows a moving bar. A log file gets a line every 30 seconds.
    """
    return _bar(items, what, total)


def counter(what: str) -> tqdm:
    """Like `progress` for loops of unknown length: call `update()` once per step.

    `set_postfix_str(..., refresh=False)` adds a text to the bar, such as a residual.
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
