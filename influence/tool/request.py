"""The request of a run, the default values of its options, and run.toml, which stores a request.

The command line uses this module to read its options. The module does not import TensorFlow, so
`--help` and errors in options appear at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

COMMANDS = ("explain", "audit", "verify", "check", "index")
RUN = "run.toml"
# USUAL_TOP: for each test row, `explain` shows this many helpful training rows, and as many harmful
# ones.
# USUAL_WRONG: `explain` and `verify` take this many confident mistakes as test rows.
USUAL_TOP, USUAL_WRONG = 8, 5
# USUAL_SUSPECTS: `audit` shows this many rows on its page.
# USUAL_REMOVE: `verify` removes this many rows.
USUAL_SUSPECTS, USUAL_REMOVE = 100, 30
# The rankings of `audit`, in the order of the columns of its table. With AUTO, `audit` chooses one.
RANKINGS, AUTO = ("margin", "folds", "history", "self_influence", "loss"), "auto"
_VERSIONS = ("keras", "numpy", "scipy", "tensorflow")


@dataclass(frozen=True)
class Reading:
    """Options for reading DATA.

    Attributes:
      target: the name of the table column with the labels. If None, a column with a usual name such
        as "target" is used.
      text: the name of the table column with the texts. If None and the model takes one text, the
        column of strings is used; if there are several, the one with the input's name or "text".
      drop: the names of table columns that are no inputs of the model.
      weight: the name of the table column with the sample weights, or None.
      class_weight: weights by class number or class name, as in `fit(class_weight=...)`, or None.
      image_size: (height, width) of images, in pixels. If None, the size that the model takes.
      scale: (factor, offset) for pixel values, if the training applied them outside the model; else
        None.
    """

    target: str | None = None
    text: str | None = None
    drop: tuple[str, ...] = ()
    weight: str | None = None
    class_weight: Mapping[str, float] | None = None
    image_size: tuple[int, int] | None = None
    scale: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """All inputs of a run. The file run.toml stores a Request.

    Attributes:
      command: one of `COMMANDS`.
      model: the text MODEL of the command line, an argument of `read_model`.
      data: the text DATA of the command line, an argument of `read`.
      test: the text of the option --test, an argument of `read`, or None.
      loss: the name of a Keras loss or `module:function`, for a model that was not compiled.
      reading: options for reading DATA.
      asked: further arguments of the command's Python function, such as `top`.
      damping: the damping. If None, the library chooses it.
      batch_size: number of rows in memory at a time. If None, the library chooses it.
      check: False to skip the check before the computation.
      history: the folder that `Recorder` wrote during training, or None.
      index: a folder of stored results, or None. Only the command `index` writes to it.
      content: SHA-256 digests of the model, the data, the test rows and the history. A replay
        raises ValueError if a digest differs.
    """

    command: str
    model: str
    data: str
    test: str | None = None
    loss: str | None = None
    reading: Reading = Reading()
    asked: Mapping[str, Any] = field(default_factory=dict)
    damping: float | None = None
    batch_size: int | None = None
    check: bool = True
    history: str | None = None
    index: str | None = None
    content: Mapping[str, str] = field(default_factory=dict)


def to_toml(request: Request, content: Mapping[str, str]) -> str:
    """Return a request, its content digests and the versions of the libraries as TOML text."""
    plain = asdict(request)
    reading, asked = plain.pop("reading"), plain.pop("asked")
    plain.pop("content")
    classes = reading.pop("class_weight", None)
    tables = {"reading": reading, "class_weight": classes or {}, "asked": asked}
    tables |= {"content": dict(content), "versions": _versions()}
    lines = ["# The same numbers again: python -m influence replay run.toml", *_lines(plain)]
    for name, table in tables.items():
        if any(value is not None for value in table.values()):
            lines += ["", f"[{name}]", *_lines(table)]
    return "\n".join(lines) + "\n"


def from_toml(path: Path) -> Request:
    """Read a request from a file that `to_toml` wrote.

    Raises: ValueError naming the file and the error.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"replay must get a run.toml, got {str(path)!r} ({reason}).") from error
    try:
        found = tomllib.loads(text)
        found.pop("versions", None)
        classes = found.pop("class_weight", None)
        reading: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in found.pop("reading", {}).items()
        }
        request = Request(**found, reading=Reading(**reading, class_weight=classes))
    except (tomllib.TOMLDecodeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"replay must get a run.toml that a run wrote, got {str(path)!r} "
            f"({' '.join(str(error).split())})."
        ) from error
    if request.command not in COMMANDS:
        raise ValueError(
            f"replay must get a command of {', '.join(COMMANDS)}, got {request.command!r}."
        )
    return request


def _lines(table: Mapping[str, Any]) -> list[str]:
    return [f"{_key(k)} = {_value(value)}" for k, value in table.items() if value is not None]


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("_", "").replace("-", "").isalnum()
    return name if bare else _string(name)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return _string(str(value))


def _string(text: str) -> str:
    """Return a text as a TOML string. Its escapes are those of JSON, without surrogate pairs."""
    parts = [
        json.dumps(c)[1:-1] if ord(c) < 0x7F else c if c.isprintable() else f"\\U{ord(c):08X}"
        for c in text.encode("utf-8", "replace").decode("utf-8")
    ]
    return '"' + "".join(parts) + '"'


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _VERSIONS:
        found[name] = metadata.version(name)
    return found
