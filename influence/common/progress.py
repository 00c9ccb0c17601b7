"""Progress bars on standard error. A bar appears only if the work takes more than a few seconds."""

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
    """Iterate over items. After five seconds, show a bar with the label `what`.

    A terminal shows a moving bar. A log file gets at most one line every 30 seconds.
    """
    return _bar(items, what, total)


def counter(what: str) -> tqdm:
    """Return a bar for a loop of unknown length. The caller calls `update()` once per step.

    The bar's `set_postfix_str(..., refresh=False)` adds a text, such as a residual.
    """
    return _bar(None, what, None)


class _Stderr:
    """Standard error stream for bars. It ignores failed writes, such as writes to a closed pipe."""

    def write(self, text: str) -> None:
        with suppress(OSError, ValueError, AttributeError):  # AttributeError: stderr is None
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
