"""The cost of a run: its total time, and the peak memory of the process and its workers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from experiments.harness.record import replacing, to_json

# Seconds between two readings of the memory, and between two writes of the file.
_SAMPLE, _WRITE = 1.0, 10.0


@contextmanager
def metered(path: Path) -> Iterator[dict[str, Any]]:
    """Measure the cost of a run: of this `with` block and of earlier, interrupted blocks.

    An interrupted run may be continued. Each continuation begins a new stretch of the run. The file
    is written every ten seconds, so a killed run loses at most the cost of ten seconds.

    Args:
      path: the file with the cost of the earlier stretches. It is created if it is missing.
    Yields: a dict that is filled at the end of the block. `seconds` is the time of all stretches,
      `stretches` is their number, and `resumed` is True if there are several. `peak_rss_mb` is the
      largest sum of the resident memory of this process and its descendants, read once a second,
      in MB of 2^20 bytes.
    """
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    begun, done = time.perf_counter(), threading.Event()
    peak = before.get("peak_rss_mb", 0)

    def facts() -> dict[str, Any]:
        stretches = before.get("stretches", 0) + 1
        seconds = before.get("seconds", 0.0) + time.perf_counter() - begun
        return {"seconds": round(seconds, 2), "stretches": stretches, "peak_rss_mb": peak}

    def write() -> None:
        with replacing(path) as partial:
            partial.write_text(to_json(facts()), encoding="utf-8")

    def sample() -> None:
        nonlocal peak
        written = time.perf_counter()
        while True:
            peak = max(peak, _rss_mb())
            if time.perf_counter() - written >= _WRITE:
                written = time.perf_counter()
                with suppress(OSError):  # the run itself reports a full disk
                    write()
            if done.wait(_SAMPLE):
                return

    write()
    found: dict[str, Any] = {}
    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        with suppress(OSError):
            write()
    found |= facts() | {"resumed": facts()["stretches"] > 1}


def _rss_mb() -> int:
    """Return the resident memory of this process and its descendants, in MB of 2^20 bytes."""
    total, me = 0, psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.Error):  # the process has ended
            total += process.memory_info().rss
    return round(total / 2**20)
