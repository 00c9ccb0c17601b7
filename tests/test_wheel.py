"""Tests of the wheel that `pip install .` builds: its files, its commands and its types."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("influence", "experiments", "data")
_SETUPTOOLS = tuple(map(int, importlib.metadata.version("setuptools").split(".")[:1]))
pytestmark = pytest.mark.skipif(
    _SETUPTOOLS < (77,), reason="setuptools is older than 77: pip install -r requirements-dev.txt"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return a wheel that was built offline from a copy. A build writes into its source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("out")
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copy(ROOT / "influence_console.py", source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, source)
    (built,) = out.glob("*.whl")
    return built


def pip(*words):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_wheel_holds_every_file_that_the_packages_read(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
    wanted = {"influence_console.py"}
    for name in PACKAGES:
        paths = (path for path in (ROOT / name).rglob("*") if path.is_file())
        wanted |= {
            path.relative_to(ROOT).as_posix() for path in paths if "__pycache__" not in path.parts
        }
    assert held == wanted
    kinds = {Path(name).suffix for name in held}
    assert kinds == {".py", ".pyi", ".typed", ".j2", ".css", ".js", ".csv"}


def test_the_wheel_names_its_licence_and_its_commands(wheel):
    with zipfile.ZipFile(wheel) as file:
        (info,) = {name.partition("/")[0] for name in file.namelist() if ".dist-info/" in name}
        about = file.read(f"{info}/METADATA").decode()
        commands = file.read(f"{info}/entry_points.txt").decode()
        assert "MIT License" in file.read(f"{info}/licenses/LICENSE").decode()
    assert "\nLicense-Expression: MIT\n" in about
    assert "\nRequires-Dist: tensorflow==" in about
    assert commands.split("\n")[:3] == [
        "[console_scripts]",
        "influence = influence_console:influence",
        "influence-experiments = influence_console:experiments",
    ]


def test_the_installed_commands_run_outside_this_folder(wheel, tmp_path):
    there = tmp_path / "installed"
    pip("install", "--no-deps", "--no-index", "--target", there, wheel)
    environment = os.environ | {"PYTHONPATH": str(there)}
    for command, words, said in (
        ("influence-experiments", ("list",), "fig6"),
        ("influence-experiments", ("report",), "report written to out/index.html"),
        ("influence", ("--help",), "explain"),
    ):
        (tmp_path / "out").mkdir(exist_ok=True)
        done = subprocess.run(
            [there / "bin" / command, *words],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
