"""Runs of a command: a run reads the data, answers the question and writes the results."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
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
from influence.tool.read import read
from influence.tool.request import RUN, Request, to_toml
from influence.tool.rows import Rows
from influence.tool.store import Store
from influence.tool.subject import Loaded, QuestionOptions, features_are_kept, on_disk
from influence.tool.verify import verify
from influence.tool.verify_groups import verify_groups

CHECKPOINTS = "checkpoints"
_HINT = "The command index keeps the features of the frozen layers for the next question."


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
