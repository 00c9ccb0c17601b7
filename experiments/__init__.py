"""The experiments that replicate the paper, one module each.

`run` computes a Record from a Config, and `draw` draws the figure from this Record. The module of
an experiment is a file, or the file `figure.py` in a folder. The module defines these names:

    Config                          frozen dataclass with a `seed`; the defaults follow the paper
    PRESETS: dict[str, Config]      "smoke", "standard", "paper"; some have other or fewer keys
    DATA, STAND_IN: str             names for data.load; only the smoke preset loads STAND_IN
    DTYPE: str                      optional; precision of the inputs: "float32", or "float64"
                                    (default)
    CLAIMS: tuple[Claim, ...]       sentences about metrics, with the paper's values and bands
    CHECKS: tuple[Check, ...]       conditions that every run must meet, on any data
    CONDITIONS: dict[str, str]      optional; SHORTENED or STAND_IN for each preset that differs
                                    from the paper
    FINDING: str                    the result in a few words, with names of metrics in braces
    DEVIATIONS: tuple[str, ...]     each difference from the paper, with both values and its effect
    CAPTION: str                    how to read the figure; the first sentence describes the picture
    remarks(record) -> list[str]    optional; sentences for the experiment's page
    run(config, data, *, checkpoints=None) -> Record      arrays and metrics: Record.of(...)
    draw(record) -> Figure          uses only the Record
    photographs(record, data, *, checkpoints=None) -> Figure
                                    optional; shows images that no record may contain. A run writes
                                    this figure to photographs.png, which git ignores

The folder `harness` has the code that runs any experiment. It parses options, loads data, sets the
seed, judges claims and writes files. The folder `shared` has code that two or more experiments use.
"""

import influence_console as console

console.begin(__name__)

import ast
import importlib
from pathlib import Path
from types import ModuleType

# The module of each command. Lists, runs and reports follow this order.
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

# The present (command, preset) for each former pair. Committed records may have a former pair.
_FORMER = {("fig2-cnn", "converged"): ("fig2-cnn-minimum", "standard")}


def present(command: str, preset: str) -> tuple[str, str]:
    """Return the present command and preset. The arguments may be former names from a record."""
    return _FORMER.get((command, preset), (command, preset))


def summaries() -> dict[str, str]:
    """Return the title of each experiment.

    The modules are read and not imported, because importing them would import TensorFlow.

    Returns: a dict from command to title. The title is the first line of the module's docstring.
      Commands whose module does not exist are left out.
    """
    return {command: text.partition("\n")[0] for command, text in descriptions().items()}


def descriptions() -> dict[str, str]:
    """Return a dict from command to the docstring of its module. No module is imported."""
    found = {}
    for command, module in MODULES.items():
        source = _source(module)
        if source is not None:
            doc = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
            found[command] = doc or ""
    return found


def source(command: str) -> str:
    """Return the path of an experiment's module, relative to the repository."""
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
