"""Check that imports point one way and form no circle.

Inside `influence` and `experiments`, a folder may import only the folders of earlier groups. Files
of one folder may import each other, but not in a circle. Each figure is a group of its own, so no
figure imports another. `experiments` may import `data` and `influence`. These two packages import
no other package of this repository.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import experiments

ROOT = Path(__file__).resolve().parents[1]
FIGURES = {module.partition(".")[0] for module in experiments.MODULES.values()}
ORDER = {
    "influence": (
        {"common"},
        {"minimisers"},
        {"examples"},
        {"net"},
        {"curvature"},
        {"solvers"},
        {"scores", "truth", "models", "preflight"},
        {"attack"},
        {"tool"},
        {"__init__"},
        {"__main__"},
    ),
    "experiments": (
        {"__init__"},
        {"harness"},
        {"shared"},
        FIGURES | {"figure2"},
        {"__main__"},
    ),
}
PACKAGES = {
    "experiments": {"experiments", "data", "influence"},
    "data": {"data"},
    "examples": {"examples", "data", "influence"},
    "influence": {"influence"},
}


def violations(root: Path) -> list[str]:
    """Return a description of every wrong import under `root`, and of every circle."""
    found, graphs = [], {}
    for package, allowed in PACKAGES.items():
        for path in sorted((root / package).rglob("*.py")):
            here = path.relative_to(root).with_suffix("").parts
            for line, target in _imports(path, root):
                if target[0] not in PACKAGES:
                    continue
                complaint = _complaint(here, target, allowed)
                if complaint:
                    found.append(f"{'/'.join(here)}.py:{line}: {complaint}")
                elif target != here:
                    graphs.setdefault(".".join(here), set()).add(".".join(target))
    try:
        TopologicalSorter(graphs).prepare()
    except CycleError as error:
        found.append("a circle: " + " <- ".join(error.args[1]))
    return found


def _complaint(here: tuple[str, ...], target: tuple[str, ...], allowed: set[str]) -> str:
    """Return the reason why a module may not import another, or '' if it may."""
    if target[0] not in allowed:
        return f"{here[0]} may not import {target[0]}"
    order = ORDER.get(here[0], ())
    if target[0] != here[0] or not order or target[1] == here[1]:
        return ""
    level = {name: i for i, names in enumerate(order) for name in names}
    for name in (here[1], target[1]):
        if name not in level:
            return f"{name} has no place in the order"
    wrong = level[target[1]] >= level[here[1]]
    return f"{here[1]} may not import {target[1]}" if wrong else ""


def _imports(path: Path, root: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (line, parts of the module's path) of each import, anywhere in the file."""
    here = path.relative_to(root).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, _file(root, name.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            for name in node.names:  # `from package import module` also imports a module
                yield node.lineno, _file(root, [*base, name.name], base)


def _file(root: Path, *candidates: list[str]) -> tuple[str, ...]:
    """Return the parts of the first candidate that is a module or package under `root`."""
    for parts in candidates:
        if root.joinpath(*parts).with_suffix(".py").is_file():
            return tuple(parts)
        if root.joinpath(*parts, "__init__.py").is_file():
            return (*parts, "__init__")
    return tuple(candidates[-1])


def test_imports_point_one_way():
    assert violations(ROOT) == []


def test_the_order_names_what_is_there():
    for package, order in ORDER.items():
        inside = (p for p in (ROOT / package).iterdir() if p.is_dir() or p.suffix == ".py")
        there = {p.stem for p in inside if not p.name.startswith("__p")}
        assert there <= set().union(*order)


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("data/load.py", "import influence", "data may not import influence"),
        ("data/load.py", "from experiments import record", "data may not import experiments"),
        ("influence/net/net.py", "import data.load", "influence may not import data"),
        ("influence/net/net.py", "def f():\n    import experiments", "may not import experiments"),
        ("influence/net/net.py", "from influence.solvers import cg", "net may not import solvers"),
        ("influence/net/net.py", "from ..solvers.cg import CG", "net may not import solvers"),
        ("influence/net/net.py", "from influence import Hessian", "net may not import __init__"),
        ("influence/net/net.py", "from influence.__main__ import f", "net may not import __main__"),
        ("influence/scores/a.py", "import influence.truth.b", "scores may not import truth"),
        ("influence/models/a.py", "from influence.scores.a import I", "models may not import"),
        ("influence/new/a.py", "import influence.net.net", "new has no place in the order"),
        ("influence/common/a.py", "from influence.minimisers import x", "may not import minimis"),
        ("experiments/harness/a.py", "from experiments.shared import b", "harness may not import"),
        ("experiments/shared/a.py", "from experiments import fig2_cnn", "shared may not import"),
        ("experiments/fig2_cnn.py", "from experiments.fig1_components import f", "import fig1"),
        ("experiments/fig2_cnn.py", "import experiments.fig5_attack.heads", "may not import fig5"),
        ("experiments/fig5_attack/heads.py", "from ..fig2_cnn import f", "may not import fig2_cnn"),
        ("experiments/fig2_cnn.py", "import experiments.__main__", "may not import __main__"),
        ("experiments/shared/a.py", "from experiments.__main__ import f", "shared may not import"),
        ("experiments/__init__.py", "import experiments.harness.a", "may not import harness"),
        ("experiments/fig9.py", "from experiments.harness import a", "fig9 has no place"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, file, text, complaint):
    _tree(tmp_path, {file: text})
    (found,) = violations(tmp_path)
    assert complaint in found
    assert found.startswith(f"{file}:{2 if 'def' in text else 1}: ")


@pytest.mark.parametrize(
    ("folder", "first", "second"),
    [
        ("influence/net", "net: from . import tape", "tape: from influence.net.net import f"),
        ("influence/net", "net: from .tape import f", "tape: def g():\n    from . import net"),
        ("influence/solvers", "__init__: from .cg import CG", "cg: from influence import solvers"),
        ("experiments/harness", "a: from .b import f", "b: import experiments.harness.a"),
        ("experiments/fig5_attack", "figure: from . import heads", "heads: from .figure import f"),
    ],
)
def test_a_circle_in_a_folder_is_found(tmp_path, folder, first, second):
    changed = (file.split(": ", 1) for file in (first, second))
    _tree(tmp_path, {f"{folder}/{name}.py": text for name, text in changed})
    (found,) = violations(tmp_path)
    assert found.startswith("a circle: ")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("experiments/fig2_cnn.py", "import data, influence\nfrom experiments.shared import b"),
        ("experiments/fig5_attack/figure.py", "from experiments.fig5_attack import heads"),
        ("experiments/harness/a.py", "import experiments"),
        ("experiments/__main__.py", "import experiments\nfrom experiments.harness.a import f"),
        ("influence/__init__.py", "from influence.scores.a import Influence"),
        ("influence/__main__.py", "import influence"),
        ("influence/scores/a.py", "from influence.solvers.cg import CG\nfrom .b import f"),
        ("influence/attack/a.py", "from influence.scores.a import f"),
        ("influence/net/net.py", "import numpy as np\nfrom scipy.sparse.linalg import cg"),
    ],
)
def test_a_right_import_passes(tmp_path, file, text):
    _tree(tmp_path, {file: text})
    assert violations(tmp_path) == []


def _tree(root, changed):
    modules = ("net/net", "net/tape", "solvers/cg", "scores/a", "scores/b", "truth/b", "__main__")
    files = {f"influence/{name}.py": "" for name in modules} | {"influence/__init__.py": ""}
    folders = ("common", "minimisers", "net", "solvers", "scores", "truth", "models")
    files |= {f"influence/{name}/__init__.py": "" for name in folders}
    modules = ("__init__", "__main__", "harness/a", "shared/b", "fig2_cnn", "fig5_attack/heads")
    files |= {f"experiments/{name}.py": "" for name in modules}
    for file, text in (files | changed).items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
