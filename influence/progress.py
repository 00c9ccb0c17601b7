"""Progress of long work on the standard error, silent for work that is short."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Iterate, and after five seconds show what is being done and how long is left.

    A terminal gets a moving bar, a log a line every half a minute.
    """
    return tqdm(
        items,
        desc=what,
        total=total,
        delay=5,
        leave=False,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
