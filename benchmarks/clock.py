"""Timers with comparable results: tasks take turns in one process, and the load is measured."""

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
      best: the shortest time of all rounds. Other processes disturbed this round least.
      median: the median time of all rounds. It is far above `best` if other processes disturbed
        many rounds.
      rounds: the number of rounds.
    """

    best: float
    median: float
    rounds: int


def in_turns(tasks: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Time tasks in rounds. Every round calls each task once, so all tasks meet the same load.

    Args:
      tasks: the tasks by name. Each is called once before the first round, to warm up.
      rounds: number of rounds, at least 1.

    Returns: the Timing of each task, by name.
    Raises: ValueError if `rounds` is less than 1.
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
    """Measure the load that other processes cause while a block runs.

    Yields: an empty dict. At the end of the block it gets `seconds`, `load_average` (of one minute)
      and `cores_used_by_others`. The latter is the processor time of other processes divided by the
      elapsed time, or None if it is unknown on this system. The processor time of this process and
      of its finished children is not included.
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
    """Return the seconds for which the cores were busy since the machine started, summed up."""
    try:
        ticks = [int(word) for word in _STAT.read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return None
    return sum(ticks[i] for i in _BUSY) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    parts = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)
