"""Progress bars on standard error, shown only for long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TypeVar

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


class _Stderr:
    """The standard error for bars: a closed pipe or a full disk ends the bars, never the work."""

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError, AttributeError):  # AttributeError: there is none
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def _bar(items: Iterable | None, what: str, total: int | None) -> tqdm:
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        items,
        desc=what,
        total=total,
        delay=_DELAY,
        leave=False,
        dynamic_ncols=True,
        mininterval=0.5 if terminal else 30,
        file=_Stderr(),  # pyright: ignore[reportArgumentType]
    )
