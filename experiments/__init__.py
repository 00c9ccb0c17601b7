"""The paper's figures, one module each: Config -> run -> Record -> draw.

A figure is a file, or a folder with `figure.py`. Its module offers

    Config                          frozen dataclass with a `seed`; the defaults follow the paper
    PRESETS: dict[str, Config]      "smoke", "standard", "paper"; not every figure has all three
    DATA, STAND_IN: str             names for data.load; only the smoke preset uses the stand-in
    DTYPE: str                      precision of x, "float32" or "float64"; "float64" if missing
    CLAIMS: tuple[Claim, ...]       sentences about metrics, with the paper's values and bands
    CHECKS: tuple[Check, ...]       invariants of every run on any data
    CONDITIONS: dict[str, str]      SHORTENED or STAND_IN for presets that differ from the paper;
                                    optional
    FINDING: str                    the result in a few words, with metrics in braces
    DEVIATIONS: tuple[str, ...]     each difference from the paper, with both values and its effect
    CAPTION: str                    how to read the figure; the first sentence describes the picture
    remarks(record) -> list[str]    optional; sentences for the experiment's page
    run(config, data, *, checkpoints=None) -> Record      arrays and metrics: Record.of(...)
    draw(record) -> Figure          uses only the Record
    photographs(record, data, *, checkpoints=None) -> Figure
                                    optional; shows images that no record may contain. A run writes
                                    them to photographs.png, which git ignores

The harness parses options, loads data, sets the seed, judges claims and writes files. `shared` has
code that two or more figures use.
"""

import influence_console as console

console.begin(__name__)

import ast
import importlib
from pathlib import Path
from types import ModuleType

# This dict maps each command to its module, in the order of lists, runs and reports.
MODULES = {
    "fig1": "fig1_components",
    "fig2": "fig2_leave_one_out",
    "fig2-cnn": "fig2_cnn",
    "fig2-cnn-minimum": "fig2_cnn_minimum",
    "fig3": "fig3_smooth_hinge",
    "fig4": "fig4_rbf_vs_inception.figure",
    "fig5": "fig5_attack.figure",
    "fig6": "fig6_mislabelled_spam",
    "hospital": "hospital_readmission.figure",
}

# Committed records may bear the former name of an experiment and its preset. This dict maps it to
# the present name.
_FORMER = {("fig2-cnn", "converged"): ("fig2-cnn-minimum", "standard")}


def present(command: str, preset: str) -> tuple[str, str]:
    """Return the present command and preset of a record, whose names may be former ones."""
    return _FORMER.get((command, preset), (command, preset))


def summaries() -> dict[str, str]:
    """List the experiments without importing them, because they import TensorFlow.

    Returns: a dict from command to the first line of its module's docstring. Modules that do not
      exist are left out.
    """
    return {command: text.partition("\n")[0] for command, text in descriptions().items()}


def descriptions() -> dict[str, str]:
    """Return a dict from command to its module's docstring, like `summaries`."""
    found = {}
    for command, module in MODULES.items():
        source = _source(module)
        if source is not None:
            doc = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
            found[command] = doc or ""
    return found


def source(command: str) -> str:
    """Return the path of an experiment's module inside the repository."""
    return f"experiments/{MODULES[command].replace('.', '/')}.py"


def load(command: str) -> ModuleType:
    """Import one experiment.

    Args:
      command: a key of `summaries()`.
    Returns: the module of the experiment.
    Raises: ValueError if there is no such experiment.
    """
    if command not in MODULES or _source(MODULES[command]) is None:
        raise ValueError(f"command must be one of {', '.join(summaries())}, got {command!r}.")
    console.import_tensorflow()
    with console.importing():
        return importlib.import_module(f"{__name__}.{MODULES[command]}")


def _source(module: str) -> Path | None:
    file = Path(*module.split(".")).with_suffix(".py")
    candidates = (Path(folder) / file for folder in __path__)
    return next((path for path in candidates if path.is_file()), None)
