"""The handling of Ctrl-C, closed pipes and failed writes in a command.

    begin(__name__)     the first statement of the package's __init__.py
    run(main)           the last statement of its __main__.py

This module imports little, because Ctrl-C is not yet handled during its imports.
"""

import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

USAGE, OUTPUT, INTERRUPTED = 2, 74, 130
# The system reports these errors for a full disk, a quota, a size limit or a read-only device.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_LINE = "interrupted: the same command again continues where this stopped"
# `_leave` writes to this descriptor. An import may redirect descriptor 2, so `begin` duplicates it.
_stderr = 2


def begin(package: str) -> bool:
    """Make Ctrl-C during the imports of `python -m package` print one line and end the process.

    A process that only imports the package is not changed.

    Args:
      package: the name of the package. Its __init__.py calls this before its other imports.

    Returns: True if the process runs `python -m package`.
    """
    # Python imports the package before it runs the module `package.__main__`. During this import,
    # argv[0] is "-m".
    following = dict(zip(sys.orig_argv, sys.orig_argv[1:], strict=False)).get("-m")
    command = sys.argv[:1] == ["-m"] and following == package
    if command:
        _begin()
    return command


def influence() -> None:
    """Run the command `influence`, which is `python -m influence`."""
    _begin()
    from influence.__main__ import main

    run(main)


def experiments() -> None:
    """Run the command `influence-experiments`, which is `python -m experiments`."""
    _begin()
    from experiments.__main__ import main

    run(main)


def _begin() -> None:
    global _stderr
    _open_standard_descriptors()
    _stderr = os.dup(2)
    _on_interrupt(_leave)


@contextmanager
def importing() -> Iterator[None]:
    """Make Ctrl-C in a `with` block end the process at once, if `run` handles Ctrl-C.

    Use it around imports: imported code may swallow a KeyboardInterrupt or print its traceback.
    """
    ours = signal.getsignal(signal.SIGINT) is _raise
    if ours:
        _on_interrupt(_leave)
    try:
        yield
    finally:
        if ours:
            _on_interrupt(_raise)


def import_tensorflow() -> None:
    """Import TensorFlow without its log lines about the processor and the missing GPU."""
    with importing(), _quiet():
        importlib.import_module("tensorflow")


def run(main: Callable[[], int]) -> None:
    """Run a command and exit with its status.

    If standard output or standard error is a closed pipe, the command continues without it. If
    standard output cannot be written for another reason, the end of the command prints one line and
    the status is 74. Ctrl-C prints one line and ends the process with status 130.

    Args:
      main: the command, a function without arguments that returns the exit status.
    Raises: SystemExit with the status, and the errors of `main` that are no failed writes.
    """
    _open_standard_descriptors()
    out, err = _Output(1), _Output(2)
    sys.stdout, sys.stderr = out.as_text(sys.stdout), err.as_text(sys.stderr)
    sys.unraisablehook = _unraisable
    _on_interrupt(_raise)
    try:
        status = main()
    except SystemExit as stop:  # raised by argparse
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
    signal.signal(signal.SIGINT, lambda *_: os._exit(status))  # main has ended
    sys.exit(status)


def interrupted() -> int:
    """Print the message of an interrupted command and return its exit status."""
    # After the first Ctrl-C, `_leave` is the handler. A second one must not print the line again.
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    print(_LINE, file=sys.stderr)
    return INTERRUPTED


def unwritten(error: BaseException | None, folder: os.PathLike | None = None) -> str | None:
    """Describe in one line an error whose cause is a file that could not be written.

    Args:
      error: the exception. Its causes are examined too.
      folder: the output folder of the command, or None. Every OSError that names a file in this
        folder counts as a failed write. Elsewhere only a full or read-only device does.
    Returns: the line, with the file and the remedy; None if the error has another cause.
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
                    f"{shown(path or folder or 'a file')} could not be written ({why}); make room "
                    "or allow it, and the same command again continues where this stopped."
                )
        error = error.__cause__ or error.__context__
    return None


def in_one_line(parser):
    """Make an argparse.ArgumentParser report errors in one line, without its usage.

    Returns: the same parser.
    """
    parser.error = lambda message: parser.exit(
        USAGE, f"{parser.prog}: {one_line(message)} (--help says more)\n"
    )
    return parser


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path for a message: unchanged, or by `repr` if it has control characters."""
    text = os.fspath(path)
    return text if text.isprintable() else repr(text)


def one_line(text: str) -> str:
    """Return the text on one line, without control characters."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


@contextmanager
def _quiet() -> Iterator[None]:
    # TensorFlow's C++ code logs to file descriptor 2, partly before it reads this variable. We
    # show these log lines only if the import fails.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    stderr = os.dup(2)
    with _held() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _held() -> IO[bytes]:
    import tempfile

    try:
        return tempfile.TemporaryFile()
    except OSError:  # no temporary file can be written, as on a full disk: drop the log lines
        return open(os.devnull, "w+b")


class _Output(io.FileIO):
    """A standard descriptor. After a failed write it is redirected to the null device.

    Attributes:
      failure: the reason of the failed write; None if no write failed or the pipe was closed.
    """

    failure: str | None = None

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data) -> int | None:
        """Write the bytes; drop them if the write fails."""
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.failure = error.strerror
            # We redirect the descriptor itself, so that child processes continue too.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return memoryview(data).nbytes

    def as_text(self, old) -> io.TextIOWrapper:
        """Return a text stream that writes to this descriptor, with the settings of `old`."""
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
    """Open the null device as each standard descriptor that the parent process has closed."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `descriptor`


def _on_interrupt(handler: Callable) -> None:
    # The parent process may have chosen to ignore the signal.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def _leave(*_: object) -> None:
    with suppress(OSError):
        os.write(_stderr, f"{_LINE}\n".encode())
    if "multiprocessing" in sys.modules:  # joblib's workers ignore Ctrl-C, so end them here
        with suppress(Exception):
            for child in sys.modules["multiprocessing"].active_children():
                child.kill()
    os._exit(INTERRUPTED)


def _raise(*_: object) -> None:
    _on_interrupt(_leave)  # a second Ctrl-C, during the clean-up, ends the process at once
    raise KeyboardInterrupt


def _unraisable(found) -> None:
    """End the process if Ctrl-C came where Python cannot raise it, for example in a destructor."""
    if issubclass(found.exc_type, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(found)
