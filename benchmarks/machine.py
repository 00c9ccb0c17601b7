"""Facts about the machine that measures, and a function that waits until the machine is quiet."""

import importlib.metadata
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import threadpoolctl

from benchmarks.clock import watched
from experiments.harness.record import commit

QUIET = 0.3  # a machine is quiet if other processes use less than this many cores
_PACKAGES = ("tensorflow", "keras", "numpy", "scipy")
_SAMPLE_SECONDS = 5


def facts() -> dict[str, Any]:
    """Collect processor, cores, BLAS, versions and commit. No host name or path is included."""
    linux = sys.platform == "linux"
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if linux else os.cpu_count(),
        "blas": sorted(
            f"{library['internal_api']} {library['version']}, {library['num_threads']} threads"
            for library in threadpoolctl.threadpool_info()
            if library["user_api"] == "blas"
        ),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": commit(),
    }


def wait_until_quiet(minutes: float) -> dict[str, Any]:
    """Wait until other processes use less than QUIET cores, but not longer than `minutes`.

    Returns: the dict of `watched` for the last few seconds, with the entry `quiet`: True or False,
      or None if the load is unknown on this system.
    """
    deadline = time.monotonic() + 60 * minutes
    while True:
        with watched() as seen:
            time.sleep(_SAMPLE_SECONDS)
        others = seen["cores_used_by_others"]
        if others is None or others < QUIET or time.monotonic() >= deadline:
            return seen | {"quiet": None if others is None else others < QUIET}
        print(f"waiting for a quiet machine: others use {others:.1f} cores", flush=True)


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
