"""Sybil evaluators for the code blocks of pages: Python, printed output and shell commands.

A comment behind a line of Python shows the line's value:

    x.sum()  # 0.9997                 the value, rounded to the digits shown
    a, b  # [1, 2], True              one value for each
    x  # (3, n)                       the shape of an array; letters stand for any size
    len(x)  # 55000 or 1297           one of the two
    x.sum()  # about a third          words without a digit, which are not compared

A block ```output shows the printed output of the Python block before it. In it, a line `...`
stands for any lines.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shlex
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser

ROOT = Path(__file__).resolve().parents[2]
# The code blocks of these pages are run. The pages in docs/experiments are not listed, because they
# are generated from records.
PATTERNS = ("README.md", "docs/*.md", "docs/api/*.md", "docs/notebooks/*.md")
_BLOCK = re.compile(r"^ *```(?:python|bash|sh|console)$", re.MULTILINE)
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\d|\d)?(?:\.\d+|\d\.?)(?:[eE][-+]?\d+)?")
# A value may differ from the shown number by this share of the last digit: a half, plus a small
# allowance for rounding.
_OFF = 0.51


class Wrong(AssertionError):
    """A page whose text differs from the result of its code blocks."""


def documents() -> list[Path]:
    """Return the pages that have blocks of code."""
    found = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
    return [path for path in found if _BLOCK.search(path.read_text(encoding="utf-8"))]


def evaluate(path: Path, namespace: dict[str, Any] | None = None) -> int:
    """Run all blocks of a page in one namespace, in order. Return the number of blocks.

    Raises: Wrong if a value differs from its comment; the message has the file and the line.
    """
    parsers = [
        CodeBlockParser("python", _python),
        CodeBlockParser("output", _output),
        *(CodeBlockParser(name, _shell) for name in ("bash", "sh", "console")),
    ]
    document: Document = Sybil(parsers).parse(path)
    document.namespace.update(namespace or {})
    examples = list(document.examples())
    for example in examples:
        example.evaluate()
    return len(examples)


# --- Python ---------------------------------------------------------------------------------------


def _python(example: Example) -> None:
    """Run a block of Python, and compare its values with the comments behind them."""
    source, first = str(example.parsed), example.line + 1
    comments = _comments(source)
    said = io.StringIO()
    for statement in ast.parse(source).body:
        ast.increment_lineno(statement, first - 1)
        here = f"{example.path}:{statement.end_lineno}"
        with contextlib.redirect_stdout(said):
            if not isinstance(statement, ast.Expr):
                code = compile(ast.Module([statement], []), example.path, "exec")
                exec(code, example.namespace)
                continue
            value = eval(
                compile(ast.Expression(statement.value), example.path, "eval"), example.namespace
            )
        comment = comments.get((statement.end_lineno or 0) - first + 1)
        if comment is not None:
            compare(value, comment, here)
    example.document.said = said.getvalue()


def _comments(source: str) -> dict[int, str]:
    """Return the comment behind each line of code, keyed by line number."""
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1][: token.start[1]].strip()
    }


def compare(value: Any, comment: str, here: str = "") -> None:
    """Check that `value` is one of the values with which the comment begins: "3" or "3 or 4".

    A comment without digits is not compared. `here` is the file and line, for the message.

    Raises: Wrong if the value differs from all of them, or if the comment does not begin with a
      value but has digits.
    """
    choices = []
    rest = comment
    while True:
        shown, rest = _leading(rest)
        if not shown:
            break
        choices.append(shown)
        if not rest.startswith(" or "):
            break
        rest = rest.removeprefix(" or ")
    if not choices:
        if re.search(r"\d", comment):
            raise Wrong(f"{here}: the comment must begin with the value, got {comment!r}.")
        return
    if not any(_is_shown(value, shown) for shown in choices):
        raise Wrong(f"{here}: the page says {comment!r}, but the value is {_short(value)}.")


def _leading(text: str) -> tuple[list[str], str]:
    """Return (values, rest): the values with which the text begins, and the text after them."""
    found = []
    while True:
        one = _one(text)
        if not one:
            return found, text
        found.append(one)
        text = text[len(one) :]
        more = re.match(r"(?:, and |, | and )", text)
        if not more or not _one(text[more.end() :]):
            return found, text
        text = text[more.end() :]


def _one(text: str) -> str:
    """Return the first value at the beginning of a text, or '' if there is none."""
    word = re.match(r"(?:True|False|None|nan|inf)\b", text)
    if word:
        return word[0]
    if text[:1] in "[(":
        depth = 0
        for position, sign in enumerate(text):
            depth += (sign in "[(") - (sign in "])")
            if not depth:
                return text[: position + 1]
    if text[:1] in "'\"":
        end = text.find(text[0], 1)
        return text[: end + 1] if end > 0 else ""
    number = _NUMBER.match(text)
    # The text `3 rows` begins with a value. The texts `3x` and `2-norm` do not.
    return number[0].rstrip(",") if number and not re.match(r"[\w-]", text[number.end() :]) else ""


def _is_shown(value: Any, shown: list[str]) -> bool:
    if len(shown) > 1:
        several = isinstance(value, tuple | list) and len(value) == len(shown)
        return several and all(_is_one(v, s) for v, s in zip(value, shown, strict=True))
    return _is_one(value, shown[0])


def _is_one(value: Any, shown: str) -> bool:
    if shown[0] in "'\"":
        return str(value) == shown[1:-1]
    if shown[0] == "(" and hasattr(value, "shape"):
        sizes = [part.strip() for part in shown[1:-1].split(",") if part.strip()]
        return len(sizes) == len(value.shape) and all(
            not size.isdigit() or int(size) == own
            for size, own in zip(sizes, value.shape, strict=True)
        )
    if shown[0] in "[(":
        own = [] if not shown[1:-1].strip() else _split(shown[1:-1])
        if isinstance(value, dict) or not hasattr(value, "__len__"):
            return False
        return len(value) == len(own) and all(map(_is_one, value, own))
    if shown in ("True", "False", "None"):
        return str(value) == shown and np.ndim(value) == 0
    if isinstance(value, bool | np.bool_ | str) or value is None or np.ndim(value):
        return False
    return close(float(value), shown)


def _split(text: str) -> list[str]:
    """Split a text at its commas, except those inside brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "[(") - (sign in "])")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]


def close(value: float, shown: str) -> bool:
    """Return True if `value`, rounded to as many digits as `shown` has, equals `shown`."""
    if shown in ("nan", "inf"):
        return str(value) == shown
    plain = shown.replace(",", "")
    mantissa, _, exponent = plain.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    unit = 10.0 ** (int(exponent or 0) - decimals)
    return abs(value - float(plain)) <= _OFF * unit


def _short(value: Any) -> str:
    return re.sub(r"\s+", " ", repr(value))[:200]


# --- the output of a block ------------------------------------------------------------------------


def _output(example: Example) -> None:
    """Compare this block with the output of the last Python block.

    Numbers may differ by one in the last digit. A line `...` stands for any number of lines.
    """
    said = getattr(example.document, "said", "")
    if not _same_lines(said.rstrip().splitlines(), str(example.parsed).rstrip().splitlines()):
        raise Wrong(f"{example.path}:{example.line}: the block before this printed\n{said}")


def _same_lines(said: list[str], shown: list[str]) -> bool:
    if not shown:
        return not said
    if shown[0].strip() == "...":
        return any(_same_lines(said[skip:], shown[1:]) for skip in range(len(said) + 1))
    return bool(said) and _same_line(said[0], shown[0]) and _same_lines(said[1:], shown[1:])


def _same_line(said: str, shown: str) -> bool:
    if _NUMBER.sub("0", said).split() != _NUMBER.sub("0", shown).split():
        return False
    pairs = zip(_NUMBER.findall(said), _NUMBER.findall(shown), strict=True)
    return all(one == other or _one_apart(one, other) for one, other in pairs)


def _one_apart(one: str, other: str) -> bool:
    """Return True if two numbers differ by at most one in the last digit shown."""
    plain = other.replace(",", "").lower()
    mantissa, _, exponent = plain.partition("e")
    unit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(one.replace(",", "")) - float(plain)) <= 1.01 * unit


# --- commands -------------------------------------------------------------------------------------


def _shell(example: Example) -> None:
    """Check that every command of a block exists and has the options used. No command is run."""
    for number, line in enumerate(_lines(str(example.parsed)), example.line + 1):
        try:
            check_command(line)
        except (ValueError, SystemExit, LookupError) as error:
            raise Wrong(f"{example.path}:{number}: {line!r}: {error}") from error


def _lines(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip().removeprefix("$ ")


def check_command(line: str) -> None:
    """Check one command line.

    Raises: ValueError, LookupError or SystemExit if the command or an option does not exist.
    """
    words = shlex.split(line, comments=True)
    while words and re.match(r"\w+=", words[0]):  # skip assignments of environment variables
        del words[0]
    if "&&" in words:
        at = words.index("&&")
        check_command(shlex.join(words[:at]))
        return check_command(shlex.join(words[at + 1 :]))
    if re.fullmatch(r"(?:\.venv/bin/)?python3?", words[0]) and words[1] == "-m":
        program, rest = words[2], words[3:]
    else:
        program, rest = words[0], words[1:]
    known = _COMMANDS.get(program)
    if known is None:
        raise ValueError(f"the command must be one of {', '.join(_COMMANDS)}, got {program!r}.")
    return known(rest)


def _influence(rest: list[str]) -> None:
    from influence.__main__ import _parser
    from influence.tool.request import COMMANDS

    if rest[0] not in (*COMMANDS, "replay", "--help", "COMMAND"):
        raise ValueError(f"there is no command {rest[0]!r}.")
    if rest[0] in COMMANDS or rest[0] == "replay":
        arguments = [word for word in rest[1:] if word != "--help"]
        if arguments:
            _parser(rest[0]).parse_intermixed_args(arguments)


def _data(rest: list[str]) -> None:
    from data.__main__ import _parser
    from data.registry import named

    for name in _parser().parse_intermixed_args(rest).names:
        named(name)


def _experiments(rest: list[str]) -> None:
    import experiments
    from experiments import __main__ as command

    if rest[0] in ("list", "all", "report", "judge"):
        known = ("--preset", "--data-dir", "--out", "--readme", "--results")
    else:
        if rest[0] not in experiments.summaries():
            raise ValueError(f"there is no experiment {rest[0]!r}.")
        known = ("--preset", "--data-dir", "--out", "--redraw", "--help")
    options = [word for word in rest[1:] if word.startswith("--")]
    unknown = [word for word in options if word not in known]
    if unknown or not hasattr(command, "main"):
        raise ValueError(f"there is no option {unknown}.")


def _examples(rest: list[str]) -> None:
    from examples import NAMES

    if rest[0] not in NAMES:
        raise ValueError(f"there is no example {rest[0]!r}.")


def _make(rest: list[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in [word for word in rest if "=" not in word]:
        if not re.search(rf"^{re.escape(target)}:", text, re.MULTILINE):
            raise ValueError(f"there is no target {target!r}.")


def _anything(rest: list[str]) -> None:
    """Accept any arguments of a system command."""


# These are commands of the operating system. Only their names are checked.
_SYSTEM = ("pip", "cd", "source", "git", "docker", "mkdir", "jupyter", "pytest")
_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "influence": _influence,
    "influence-experiments": _experiments,
    "data": _data,
    "experiments": _experiments,
    "examples": _examples,
    "make": _make,
    **dict.fromkeys(_SYSTEM, _anything),
}
