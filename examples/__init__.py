"""Five complete examples of a model and its data, explained by `python -m influence`.

`python -m examples NAME` makes the data, trains the model, and runs the commands explain, check,
audit and verify. It prints each command before running it. Every example runs on small data that
come with this repository. With `--data DIR` it runs on real data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

# The modules of the examples, by the name on the command line.
NAMES = ("images", "photographs", "table", "mails", "regression")


@dataclass(frozen=True)
class Trial:
    """The files of a trained model and its data, in the form that `python -m influence` takes.

    Attributes:
      model: the file of the model.
      data: the file or folder of the training rows, or of all rows.
      options: further options that every command needs, such as `--target`.
      test: the file or folder of the test rows; None if `data` has them too.
    """

    model: Path
    data: Path
    options: tuple[str, ...] = ()
    test: Path | None = None

    def words(self, command: str) -> list[str]:
        """Return the arguments of `python -m influence` that run a command on this model.

        Args:
          command: the command, such as "explain".
        """
        found = [command, str(self.model), str(self.data), *self.options]
        if self.test is not None:
            found += ["--test", str(self.test)]
        return found


def maker(name: str) -> Callable[[Path, Path | None], Trial]:
    """Return the function `make` of an example.

    `make(out, folder)` writes the data to `out`, trains the model and returns a Trial. `folder` is
    the folder of the real data, or None for small data.

    Raises: ValueError for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"the example must be one of {', '.join(NAMES)}, got {name!r}")
    return import_module(f"{__name__}.{name}").make
