"""Worker processes that do not react to Ctrl-C."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from joblib.externals.loky.backend import resource_tracker as joblib_tracker


@contextmanager
def started_deaf() -> Iterator[None]:
    """Block SIGINT for worker processes that the caller starts inside the `with` block.

    On Ctrl-C, a terminal sends SIGINT to every process of a command. Each worker would print a
    traceback. The caller still raises KeyboardInterrupt, and joblib then ends the workers.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    for tracker in (joblib_tracker, resource_tracker):
        tracker.ensure_running()  # the start of a tracker unblocks SIGINT
    # New processes and threads inherit the mask. A SIGINT sent now arrives after the block.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
