"""Tests of the commands as processes: Ctrl-C, closed pipes and full disks."""

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import influence_console as console

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = "interrupted: the same command again continues where this stopped\n"
# This imported code catches every exception, but the process must still end.
WAIT = """
print("at", flush=True)
try:
    time.sleep(60)
except BaseException:
    sys.exit(5)
"""
DESTROY = """
class A:
    def __del__(self):
        print("at", flush=True)
        time.sleep(60)
A()
"""


def hear():
    """Restore Python's handling of SIGINT, even if these tests run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path):
    """Give a function that starts `python -m command` with the given code of main and package."""

    def process(body, package="", **options):
        (tmp_path / "command").mkdir()
        begin = "import influence_console as c\nc.begin(__name__)\nimport os, sys, time\n"
        (tmp_path / "command/__init__.py").write_text(begin + package)
        (tmp_path / "command/__main__.py").write_text(
            "import influence_console as console, os, sys, time\ndef main():\n"
            + "".join(f"    {line}\n" for line in body.splitlines())
            + "console.run(main)\n"
        )
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        pipes |= {"preexec_fn": hear} | options
        environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-m", "command"]
        return subprocess.Popen(command, env=environment, text=True, **pipes)

    return process


@pytest.mark.parametrize(
    ("body", "package"),
    [
        ("return 0", WAIT),
        ("print('at', flush=True)\ntime.sleep(60)", ""),
        (f"with console.importing():\n{textwrap.indent(WAIT, '    ')}", ""),
        (DESTROY, ""),
    ],
    ids=["the package's imports", "main", "imports of main", "a destructor"],
)
def test_ctrl_c_is_one_line_and_130(start, body, package):
    process = start(body, package)
    assert process.stdout.readline() == "at\n"
    process.send_signal(signal.SIGINT)
    assert (process.communicate()[1], process.returncode) == (INTERRUPTED, 130)


def test_ctrl_c_is_ignored_where_the_parent_chose_so(start):
    ignored = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    process = start("print('at', flush=True)\ntime.sleep(0.3)\nreturn 3", **ignored)
    assert process.stdout.readline() == "at\n"
    process.send_signal(signal.SIGINT)
    assert (process.communicate()[1], process.wait()) == ("", 3)


def test_a_process_that_imports_a_package_keeps_its_handler():
    code = "import signal, data; print(signal.getsignal(signal.SIGINT).__name__)"
    command = [sys.executable, "-c", code]
    said = subprocess.check_output(command, cwd=ROOT, text=True, preexec_fn=hear)
    assert said == "default_int_handler\n"


WRITES = """
for stream in (sys.stdout, sys.stderr):
    print("x" * 100_000, file=stream, flush=True)
os.system("echo from a child; echo from a child >&2")
print("unflushed")
return 1
"""


def test_closed_pipes_end_nothing(start):
    reads, writes = os.pipe()
    os.close(reads)
    assert start(WRITES, stdout=writes, stderr=writes).wait() == 1
    os.close(writes)


def test_closed_descriptors_end_nothing(start):
    def close():
        os.close(1)
        os.close(2)

    assert start(WRITES, preexec_fn=close).wait() == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_under_the_standard_output_is_status_74_at_the_end(start):
    with open("/dev/full", "w") as full:
        process = start("print('lost', flush=True)\nprint('on', file=sys.stderr)", stdout=full)
    said = "on\nthe standard output could not be written: No space left on device\n"
    assert (process.communicate()[1], process.returncode) == (said, 74)


def test_a_file_limit_is_one_line_and_74(start, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))

    body = "from experiments.harness.record import replacing\nfrom pathlib import Path\n"
    body += f"with replacing(Path({str(tmp_path / 'file')!r})) as p:\n    p.write_text('x' * 99)"
    process = start(body, preexec_fn=limit)
    said = f"{tmp_path}/file could not be written (File too large); make room or allow it, and "
    said += "the same command again continues where this stopped.\n"
    assert (process.communicate()[1], process.returncode) == (said, 74)
    assert os.listdir(tmp_path) == ["command"]


def test_unwritten_finds_the_cause_and_no_other():
    full = OSError(errno.ENOSPC, "No space left on device")
    wrapped = ValueError("wrapped")
    wrapped.__cause__ = full
    assert "out could not be written (No space" in console.unwritten(wrapped, Path("out"))
    denied = PermissionError(errno.EACCES, "Permission denied", "out/a/b")
    assert "out/a/b could not be written (Perm" in console.unwritten(denied, Path("out"))
    for other in (denied, OSError("text"), OSError(errno.ENOENT, "No such file", "out2/a"), None):
        assert console.unwritten(other, Path("elsewhere")) is None


def test_one_line_has_no_control_characters():
    assert console.one_line("a\n b\x1b[31m\tc") == "a b\\x1b[31m c"
