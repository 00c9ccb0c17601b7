"""The process of a command: Ctrl-C, closed pipes and writes that fail.

    begin(__name__)     first in the package's __init__.py
    run(main)           last in its __main__.py

Every import here costs time in which Ctrl-C is not yet handled, so there are few.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

USAGE, OUTPUT, INTERRUPTED = 2, 74, 130
# Errors of a place that takes no more: a full disk, a quota, a limit, a read-only device.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_LINE = "interrupted: the same command again continues where this stopped"
# Standard error for `_leave`; `begin` makes it a duplicate, as an import may redirect descriptor 2.
_stderr = 2


def begin(package: str) -> None:
    """Make Ctrl-C during the imports end the process in one line, if it is `python -m package`.

    A process that only imports the package is left as it is.

    Args:
      package: the name of the caller, which calls this before its own imports.
    """
    global _stderr
    # argv[0] is "-m" while Python looks for the module to run.
    following = dict(zip(sys.orig_argv, sys.orig_argv[1:], strict=False)).get("-m")
    if sys.argv[:1] == ["-m"] and following == package:
        _open_standard_descriptors()
        _stderr = os.dup(2)
        _on_interrupt(_leave)


@contextmanager
def importing() -> Iterator[None]:
    """Make Ctrl-C in the block end the process at once, if `run` runs it.

    Imported code may swallow a KeyboardInterrupt or print its traceback.
    """
    ours = signal.getsignal(signal.SIGINT) is _raise
    if ours:
        _on_interrupt(_leave)
    try:
        yield
    finally:
        if ours:
            _on_interrupt(_raise)


def run(main: Callable[[], int]) -> None:
    """Run a command and exit with its status.

    A closed pipe as standard output or error is ignored. Standard output that cannot be written for
    another reason is reported at the end, in one line, with status 74. Ctrl-C ends the process in
    one line, with status 130.

    Args:
      main: returns the exit status.
    Raises: SystemExit with the status; what `main` raises.
    """
    _open_standard_descriptors()
    out, err = _Output(1), _Output(2)
    sys.stdout, sys.stderr = out.as_text(sys.stdout), err.as_text(sys.stderr)
    sys.unraisablehook = _unraisable
    _on_interrupt(_raise)
    try:
        status = main()
    except SystemExit as stop:  # of argparse
        status = int(stop.code or 0)
    except KeyboardInterrupt:
        status = interrupted()
    except Exception as error:
        line = unwritten(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        status = OUTPUT
    sys.stdout.flush()
    if out.failure is not None:
        print(f"the standard output could not be written: {out.failure}", file=sys.stderr)
        status = OUTPUT
    signal.signal(signal.SIGINT, lambda *_: os._exit(status))  # nothing is left to interrupt
    sys.exit(status)


def interrupted() -> int:
    """Print the line of an interrupted command; return its exit status."""
    if signal.getsignal(signal.SIGINT) is _leave:  # a second Ctrl-C adds no second line
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    print(_LINE, file=sys.stderr)
    return INTERRUPTED


def unwritten(error: BaseException | None, folder: os.PathLike | None = None) -> str | None:
    """Say in one line that an error, or a cause of it, is a place that could not be written to.

    Args:
      error: what was raised.
      folder: where the command writes: every OSError that names a file of it counts; without it,
        only those of full or read-only places do.
    Returns: the line, with the file and how to go on; None if the error is another.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
            why, nowhere = os.strerror(error.errno), "No usable temporary directory"
            if (error.strerror or "").startswith(nowhere):
                path, why = "a temporary file", error.strerror
            elif error.errno not in _FULL and not (
                folder and path.startswith(os.fspath(folder) + os.sep)
            ):
                path = why = ""
            if why:
                return one_line(
                    f"{path or folder or 'a file'} could not be written ({why}); make room or "
                    "allow it, and the same command again continues where this stopped."
                )
        error = error.__cause__ or error.__context__
    return None


def in_one_line(parser):
    """Make an argparse.ArgumentParser refuse a command line in one line, without its usage.

    Returns: the parser.
    """
    parser.error = lambda message: parser.exit(
        USAGE, f"{parser.prog}: {one_line(message)} (--help says more)\n"
    )
    return parser


def one_line(text: str) -> str:
    """Return the text on one line, without control characters."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


class _Output(io.FileIO):
    """A standard descriptor whose failures end nothing: later writes go to the null device.

    Attributes:
      failure: the reason for which it cannot be written; None if it can, or is a closed pipe.
    """

    failure: str | None = None

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data) -> int | None:
        """Write the bytes, or drop them."""
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.failure = error.strerror
            # Descriptors are redirected, so that other writers and child processes go on too.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return memoryview(data).nbytes

    def as_text(self, old) -> io.TextIOWrapper:
        """Return a text stream to this descriptor that replaces `old`."""
        if old is None:
            return io.TextIOWrapper(io.BufferedWriter(self), errors="backslashreplace")
        with suppress(OSError):
            old.flush()
        buffer = self if old.write_through else io.BufferedWriter(self)
        return io.TextIOWrapper(
            buffer,  # pyright: ignore[reportArgumentType]
            encoding=old.encoding,
            errors=old.errors,
            line_buffering=old.line_buffering,
            write_through=old.write_through,
        )


def _open_standard_descriptors() -> None:
    """Open the null device for standard descriptors that the parent process has closed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _on_interrupt(handler: Callable) -> None:
    # A parent process such as nohup may have chosen to ignore it.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def _leave(*_: object) -> None:
    with suppress(OSError):
        os.write(_stderr, f"{_LINE}\n".encode())
    if "multiprocessing" in sys.modules:  # end joblib's workers, which Ctrl-C does not reach
        with suppress(Exception):
            for child in sys.modules["multiprocessing"].active_children():
                child.kill()
    os._exit(INTERRUPTED)


def _raise(*_: object) -> None:
    _on_interrupt(_leave)  # of a second Ctrl-C, while the first is cleaned up after
    raise KeyboardInterrupt


def _unraisable(found) -> None:
    """End at an interruption that Python can only report, as in a destructor."""
    if issubclass(found.exc_type, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(found)
