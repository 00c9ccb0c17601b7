"""Reader of the command line argument MODEL, a file or a function of a Python module."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from influence.net.saved import is_saved, load_model

_ENDINGS = (".keras", ".h5", ".hdf5")


def read_model(text: str, *, compiled: bool = True) -> Any:
    """Load a model from a file, or get it from a function.

    Args:
      text: the path of a file `.keras` or `.h5`, or `module:function`. The function takes no
        arguments and returns a Keras model or a net.
      compiled: False if the caller gives a loss. The saved model then needs no compiled loss.

    Raises: ValueError naming MODEL if the file or the function does not exist. The errors of
      `load_model`.
    """
    if is_function(text):
        return function_of(text, "MODEL")()
    path = Path(text).expanduser()
    if not is_saved(path) or path.suffix not in _ENDINGS:
        found = "there is no such file" if not path.exists() else f"it ends in {path.suffix!r}"
        raise ValueError(
            f"MODEL must be a file .keras or .h5, or module:function, got {text!r}: {found}."
        )
    return load_model(path, compiled=compiled)


def is_function(text: str) -> bool:
    """Return True for a text like `module:function` that is not the path of an existing file."""
    module, _, name = text.rpartition(":")
    return bool(module) and name.isidentifier() and not Path(text).exists()


def function_of(text: str, argument: str) -> Callable[..., Any]:
    """Import the function that `module:function` or `file.py:function` names.

    Python searches the current folder for the module first.

    Raises: ValueError naming the argument, if the import fails or the function does not exist.
    """
    module, _, name = text.rpartition(":")
    try:
        found = getattr(_module(module), name, None)
    except (ImportError, OSError, SyntaxError) as error:
        raise ValueError(
            f"{argument} must be module:function, got {text!r}, whose module cannot be imported "
            f"({type(error).__name__}: {error})."
        ) from error
    if not callable(found):
        raise ValueError(
            f"{argument} must be module:function, got {text!r}, but {module!r} has no function "
            f"{name!r}."
        )
    return found


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")
        return importlib.import_module(name)
    path = Path(name).expanduser().resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is no Python file")
    # Load each file once. Otherwise its classes would exist twice, as different objects.
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
