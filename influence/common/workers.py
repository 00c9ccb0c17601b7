"""Worker processes that leave Ctrl-C to the process that started them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

from joblib.externals.loky.backend import resource_tracker as joblib_tracker


@contextmanager
def started_deaf() -> Iterator[None]:
    """Start worker processes in this block; SIGINT does not reach them.

    A terminal sends SIGINT to every process of a command, and each worker would print a traceback.
    The block's own process still raises KeyboardInterrupt, and joblib then ends the workers.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    for tracker in (joblib_tracker, resource_tracker):
        tracker.ensure_running()  # now, as its start unblocks the signal
    # Processes and threads inherit the blocked signal; it is delivered here after the block.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
