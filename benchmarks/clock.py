"""Comparable times: measured in turns, in one process, with the load of other processes."""

import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

_STAT = Path("/proc/stat")
# Fields user, nice, system, irq, softirq and steal; idle and iowait are not busy.
_BUSY = (0, 1, 2, 5, 6, 7)


@dataclass(frozen=True)
class Timing:
    """The time of one task, in seconds.

    Attributes:
      best: the shortest of all rounds, which other processes disturb least.
      median: the median of all rounds; if it is far above `best`, the rounds were disturbed.
      rounds: the number of rounds.
    """

    best: float
    median: float
    rounds: int


def in_turns(tasks: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Time tasks one after the other, round after round, under the same load.

    Args:
      tasks: the tasks by name. Each is called once before, to warm up.
      rounds: number of rounds, at least 1.

    Returns: a Timing for each task.
    Raises: ValueError for less than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}.")
    for task in tasks.values():
        task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            begun = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - begun)
    return {name: Timing(min(s), median(s), rounds) for name, s in seconds.items()}


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Measure the load by other processes during a block.

    Yields: a dict to which the end of the block adds `seconds`, `load_average` (one minute) and
      `cores_used_by_others`: the processor time not used by this process or its finished children,
      divided by the elapsed time; None if unknown on this system.
    """
    facts: dict[str, Any] = {}
    begun, busy, own = time.perf_counter(), _busy(), _own()
    yield facts
    seconds = time.perf_counter() - begun
    facts["seconds"] = round(seconds, 1)
    with suppress(OSError):
        facts["load_average"] = os.getloadavg()[0]
    after = _busy()
    if busy is None or after is None:
        facts["cores_used_by_others"] = None
    else:
        others = (after - busy) - (_own() - own)
        facts["cores_used_by_others"] = round(max(others, 0.0) / seconds, 2)


def _busy() -> float | None:
    """Read the busy seconds of all cores together since the machine started."""
    try:
        ticks = [int(word) for word in _STAT.read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return None
    return sum(ticks[i] for i in _BUSY) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    parts = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)
