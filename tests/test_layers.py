"""Imports point one way: experiments -> data, influence; inside influence, downwards only.

A module of `influence` that is not named here is a leaf: it imports nothing of ours, and any other
may import it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "experiments": {"experiments", "data", "influence"},
    "data": {"data"},
    "influence": {"influence"},
}
_BELOW_SOLVERS = {"examples", "net", "operators"}
LAYERS = {
    "examples": set(),
    "stream": {"examples"},
    "derivatives": {"examples"},
    "net": {"examples", "derivatives"},
    "operators": {"examples", "net"},
    "solvers": _BELOW_SOLVERS,
    "spectrum": _BELOW_SOLVERS | {"solvers"},
    "models": _BELOW_SOLVERS | {"solvers"},
    "response": _BELOW_SOLVERS | {"solvers"},
    "groups": _BELOW_SOLVERS | {"solvers", "response"},
    "relative": _BELOW_SOLVERS | {"solvers", "response"},
    "score_file": _BELOW_SOLVERS | {"solvers"},
    "scores": _BELOW_SOLVERS | {"solvers", "response", "groups", "relative", "score_file"},
    "datainf": _BELOW_SOLVERS,
    "tracin": _BELOW_SOLVERS,
    "refits": _BELOW_SOLVERS,
    "removal": _BELOW_SOLVERS | {"solvers", "refits"},
    "minimum": {"examples", "net"},
    "retraining": _BELOW_SOLVERS | {"solvers", "refits", "removal", "minimum"},
    "proximal": _BELOW_SOLVERS | {"solvers", "refits", "removal"},
    "continued": _BELOW_SOLVERS | {"models", "refits"},
    "preflight": _BELOW_SOLVERS | {"solvers", "spectrum"},
    "check": _BELOW_SOLVERS | {"preflight", "spectrum"},
    "reach": _BELOW_SOLVERS | {"solvers", "response"},
    "attack_arguments": _BELOW_SOLVERS | {"reach"},
    "attack": _BELOW_SOLVERS | {"solvers", "reach", "attack_arguments", "minimum"},
}
FRONT = {"__init__", "__main__"}  # the public names, the command line: above everything


def violations(root: Path) -> list[str]:
    """Every import under `root` that points the wrong way, as "file:line: what"."""
    found = []
    for package, allowed in PACKAGES.items():
        for path in sorted((root / package).rglob("*.py")):
            for line, parts in _imports(path, root):
                if parts[0] in PACKAGES and parts[0] not in allowed:
                    complaint = f"{package} may not import {parts[0]}"
                elif package == "influence" == parts[0]:
                    complaint = _wrong_layer(path, parts, root)
                else:
                    complaint = ""
                if complaint:
                    found.append(f"{path.relative_to(root).as_posix()}:{line}: {complaint}")
    return found


def _wrong_layer(path: Path, parts: list[str], root: Path) -> str:
    inside = path.relative_to(root / "influence").with_suffix("").parts
    layer = inside[0]
    if layer in FRONT:
        return ""
    if len(parts) == 1:
        return "the library's own modules may not import its front, influence"
    target = parts[1]
    if target == layer and len(inside) > 1:  # within one package
        return ""
    if target in LAYERS.get(layer, set()) or (target not in LAYERS and target not in FRONT):
        return ""
    return f"{layer} may not import {target}"


def _imports(path: Path, root: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, module as parts) of each import, wherever in the file it stands."""
    here = path.relative_to(root).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name.split(".")
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            for name in node.names:  # `from package import module` names a module too
                named = [*base, name.name]
                yield node.lineno, named if _is_module(root.joinpath(*named)) else base


def _is_module(path: Path) -> bool:
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def test_imports_point_one_way():
    assert violations(ROOT) == []


def test_layers_are_there():
    missing = [name for name in LAYERS if not _is_module(ROOT / "influence" / name)]
    assert set(missing) <= {"attack"}, "LAYERS names modules that influence/ does not have"


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("data/load.py", "import influence", "data may not import influence"),
        ("data/load.py", "from experiments import record", "data may not import experiments"),
        ("influence/net.py", "import data.mnist", "influence may not import data"),
        ("influence/net.py", "def f():\n    import experiments", "may not import experiments"),
        ("influence/net.py", "from influence import operators", "net may not import operators"),
        ("influence/net.py", "from . import operators", "net may not import operators"),
        ("influence/net.py", "from .solvers import CG", "net may not import solvers"),
        ("influence/net.py", "from influence import Hessian", "may not import its front"),
        ("influence/net.py", "from influence.__main__ import f", "net may not import __main__"),
        ("influence/leaf.py", "from influence.net.net import f", "leaf may not import net"),
        ("influence/scores.py", "import influence.truth.leave_out", "scores may not import retraining"),
        ("influence/solvers/cg.py", "from ..scores import f", "solvers may not import scores"),
        ("influence/models/cnn.py", "from influence.scores.influence import I", "models may not import"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, text, complaint):
    _tree(tmp_path, {file: text})
    (found,) = violations(tmp_path)
    assert complaint in found
    assert found.startswith(f"{file}:{2 if 'def' in text else 1}: ")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("experiments/fig9.py", "import data, influence\nfrom experiments.record import Record"),
        ("influence/__init__.py", "from influence.scores.influence import Influence"),
        ("influence/__main__.py", "import influence"),
        ("influence/scores.py", "from influence.solvers import CG\nfrom .leaf import f"),
        ("influence/solvers/cg.py", "from influence.solvers.base import f\nfrom .base import g"),
        ("influence/models/cnn.py", "from ..net import GenericNeuralNet"),
        ("influence/net.py", "import numpy as np\nfrom scipy.sparse.linalg import cg"),
    ],
)
def test_a_right_import_passes(tmp_path, file, text):
    _tree(tmp_path, {file: text})
    assert violations(tmp_path) == []


def _tree(root, changed):
    names = ["examples", "net", "operators", "scores", "retraining", "leaf", "__main__"]
    files = {f"influence/{name}.py": "" for name in names}
    files |= {"influence/solvers/base.py": "", "influence/models/cnn.py": ""}
    files |= {f"influence/{name}/__init__.py": "" for name in ("solvers", "models", ".")}
    for file, text in (files | changed).items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
