"""Times that can be compared: taken in turns, in one process, with the neighbours watched."""

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
_BUSY = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal; not idle and iowait


@dataclass(frozen=True)
class Timing:
    """How long one task took, in seconds.

    Attributes:
      best: the least of all rounds, which others on the machine disturb least.
      median: of all rounds; far from `best`, it says that the rounds were disturbed.
      rounds: how many.
    """

    best: float
    median: float
    rounds: int


def in_turns(tasks: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Timing]:
    """Time tasks one after the other, round after round, so that they see the same machine.

    Args:
      tasks: what to time, by name. Each is called once more, before, to warm up.
      rounds: at least 1.

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
    """Say how busy others kept the machine during a block.

    Yields: a dict to which the end of the block adds `seconds`, `load_average` (one minute) and
      `cores_used_by_others`: processor time that neither this process nor its finished children
      took, over the time passed; None where the system does not tell.
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
    """Seconds that all cores together have worked since the machine started."""
    try:
        ticks = [int(word) for word in _STAT.read_text().split("\n", 1)[0].split()[1:]]
    except OSError:
        return None
    return sum(ticks[i] for i in _BUSY) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    parts = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in parts)
