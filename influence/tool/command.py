"""Runs of a command: a run reads the data, answers the question and writes the results."""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from influence.net.history import History
from influence.tool.answer import Answer, write_text
from influence.tool.audit import audit
from influence.tool.check import Verdict, checked
from influence.tool.correct import correct
from influence.tool.explain import explain
from influence.tool.index import index
from influence.tool.model import function_of, is_function, read_model
from influence.tool.read import Reading, read
from influence.tool.rows import Rows
from influence.tool.store import Store
from influence.tool.subject import Loaded, QuestionOptions, features_are_kept, on_disk
from influence.tool.verify import verify
from influence.tool.verify_groups import verify_groups

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

COMMANDS = ("explain", "audit", "verify", "check", "index")
RUN, CHECKPOINTS = "run.toml", "checkpoints"
_HINT = "The command index keeps the features of the frozen layers for the next question."
_VERSIONS = ("keras", "numpy", "scipy", "tensorflow")


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


@dataclass(frozen=True, eq=False)
class Result:
    """The result of a run.

    Attributes:
      answer: the answer to the question.
      files: the paths of the written files, with the keys "page", "csv" and "run".
      hint: advice for the next run, or an empty string.
    """

    answer: Answer
    files: dict[str, Path]
    hint: str = ""

    @property
    def status(self) -> int:
        """The exit status: 1 if the command `check` finds that scores cannot be trusted, else 0."""
        return int(isinstance(self.answer, Verdict) and not self.answer.trusted)


def run(request: Request, out: Path) -> Result:
    """Answer a question and write the page, the CSV file and run.toml to a folder.

    An interrupted run leaves its intermediate results in the folder. A run of the same request
    continues from these results.

    Args:
      request: the inputs of the run.
      out: the folder to write to. It is created if it is missing.

    Raises: ValueError, TypeError, IndexError or OSError for invalid input. The message describes
      the error and a valid input. DivergenceError if the computation diverges.
    """
    with on_disk(out / CHECKPOINTS) as folder, warnings.catch_warnings():
        # The commands show warnings about their numbers as alerts. All other warnings are hidden.
        warnings.simplefilter("ignore")
        loaded, rows, test, content = _read(request)
        if request.content and dict(request.content) != content:
            changed = [k for k in content if content[k] != request.content.get(k)]
            raise ValueError(
                f"a replay must have the files of the run, but {' and '.join(changed)} changed "
                "since; run the command itself for the new ones."
            )
        options = QuestionOptions(
            damping=request.damping,
            batch_size=request.batch_size,
            check=request.check,
            index=None if request.index is None else Path(request.index),
            checkpoints=folder,
            history=request.history,
        )
        hint = "" if features_are_kept(loaded, rows, Store(options.index)) else _HINT
        answer = _answer(request, loaded, rows, test, options)
        name = request.command
        files = {"page": answer.to_html(out / f"{name}.html")}
        files["csv"] = answer.to_csv(out / f"{name}.csv")
        files["run"] = out / RUN
        write_text(files["run"], to_toml(request, content))
    return Result(answer, files, "" if request.command == "index" else hint)


def _read(request: Request) -> tuple[Loaded, Rows, Rows | None, dict[str, str]]:
    loss: Any = request.loss
    if loss is not None and is_function(loss):
        loss = function_of(loss, "--loss")
    with named("MODEL", request.model):
        model = read_model(request.model, compiled=loss is None)
    loaded = Loaded.of(model, loss)
    with named("DATA", request.data):
        rows, test = read(request.data, loaded.wanted, request.reading)
    if request.test is not None:
        with named("--test", request.test):
            test, _ = read(request.test, loaded.wanted, request.reading, like=rows)
    weights = [weight.numpy().tobytes() for weight in loaded.net.model.weights]
    content = {"model": hashlib.sha256(b"".join(weights)).hexdigest(), "data": rows.content}
    if test is not None:
        content["test"] = test.content
    if request.history is not None:
        content["history"] = History.load(request.history).digest
    return loaded, rows, test, content


@contextmanager
def named(argument: str, text: str):
    """Convert an unexpected error of a `with` block to a ValueError that names the argument."""
    try:
        yield
    except (ValueError, TypeError, OSError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise ValueError(
            f"{argument} must be a function that returns, got {text!r}, which raised "
            f"{type(error).__name__}: {error}"
        ) from error


def _answer(
    request: Request, loaded: Loaded, rows: Rows, test: Rows | None, options: QuestionOptions
) -> Answer:
    asked = dict(request.asked)
    if request.command == "verify":
        edited, fit = asked.pop("csv", None), asked.pop("fit", None)
        if edited is not None:
            return correct(loaded, rows, test, edits=edited, options=options)  # type: ignore
        function = None if fit is None else function_of(fit, "--fit")
        if "groups" in asked:
            return verify_groups(loaded, rows, test, fit=function, options=options, **asked)  # type: ignore
        return verify(loaded, rows, test, fit=function, options=options, **asked)  # type: ignore
    if request.command == "index":
        return index(loaded, rows, test, folder=str(request.index), options=options)  # type: ignore
    if request.command == "audit":
        fit = asked.pop("fit", None)
        function = None if fit is None else function_of(fit, "--fit")
        return audit(loaded, rows, test, fit=function, options=options, **asked)  # type: ignore
    ask: Callable[..., Answer] = explain if request.command == "explain" else checked
    return ask(loaded, rows, test, options=options, **asked)


# --- run.toml -----------------------------------------------------------------------------------


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
