"""Docstrings of plain text, shown as pages.

The docstrings are written to be read in the source: equations are indented text, `names` stand
between single backticks, and short sections are one line (`Returns: (k, d).`). Sphinx would read
|x|, v_i* and `name` as markup. This extension writes each docstring as markup with the same look.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

import influence

_SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")
_HEAD = re.compile(rf"^({'|'.join(_SECTIONS)}):(?: (.*))?$")
# One error, and not `TypeError or ValueError ...`.
_ERROR = re.compile(r"([A-Z]\w*(?:Error|Warning)) (?!or |[A-Z]\w*Error)(.*)")
# Several names with one text. Napoleon would take all but the last for a type.
_NAMES = re.compile(r"^( +)(\w+(?:, \w+)+): ")
_ITEM = re.compile(r"^(- |\d+\. )")


def setup(app: Sphinx) -> dict[str, bool]:
    """Rewrite each docstring before napoleon reads its sections."""
    app.connect("autodoc-process-docstring", _process, priority=100)
    return {"parallel_read_safe": True}


def _process(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]):
    lines[:] = rewritten(lines)


def rewritten(lines: list[str]) -> list[str]:
    """Return the lines of a docstring as reStructuredText with sections in Google's form."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        # A section may follow another without an empty line.
        if not line.strip() or _HEAD.match(line):
            blocks.append([])
        if line.strip():
            blocks[-1].append(line)
    found: list[str] = []
    section = ""
    for block in filter(None, blocks):
        head = _HEAD.match(block[0])
        if head:
            section = head[1]
            found += ["", *_section(section, head[2] or "", block[1:])]
        elif block[0].startswith(" ") and section in ("Args", "Attributes"):
            found += ["", *map(_marked, block)]
        elif block[0].startswith(" "):
            found += ["", "::", "", *("  " + line for line in block)]
        else:
            section = ""
            found += ["", *_paragraph(block)]
    return [*found, ""]


def _section(name: str, first: str, rest: list[str]) -> list[str]:
    """Return the lines of one section of a docstring in Google's form.

    `first` is the text on the line of the section's name, or empty. `rest` has the lines below it.
    """
    if not first:
        joined = [_NAMES.sub(lambda m: f"{m[1]}{m[2].replace(', ', ',')}: ", line) for line in rest]
        return [f"{name}:", *map(_marked, joined)]
    words = " ".join([first, *(line.strip() for line in rest)])
    errors = _errors(words) if name == "Raises" else []
    if errors:
        return ["Raises:", *(f"  {_marked(part)}" for part in errors)]
    if name in ("Args", "Attributes", "Raises"):  # a sentence instead of a list
        return [f"**{name}:** {_marked(words)}"]
    # Napoleon would take words before a colon for a type.
    return [f"{name}:", f"  {_marked(words).replace(': ', chr(92) + ': ', 1)}"]


def _errors(words: str) -> list[str]:
    """Split `TypeError for a; ValueError for b.` into `TypeError: for a.` and `ValueError: ...`.

    Returns: the parts, or nothing if one does not begin with the name of one error.
    """
    parts = re.split(r"(?<=[.;]) (?=[A-Z]\w*(?:Error|Warning)\b)", words)
    found = [_ERROR.match(part.rstrip(";.")) for part in parts]
    return [f"{match[1]}: {match[2]}." for match in found if match] if all(found) else []


def _paragraph(block: list[str]) -> list[str]:
    """Return a paragraph, a list, or a paragraph that leads to one.

    A line in a sentence may begin with a minus. It begins a list only if it is the first one, or
    after a colon or another item.
    """
    found: list[str] = []
    in_list = False
    for line in block:
        if _ITEM.match(line) and not in_list:
            in_list = not found or found[-1].endswith(":")
            if in_list and found:
                found.append("")
        minus = line.startswith("- ") and not in_list
        found.append(("\\" if minus else "") + _marked(line))
    return found


def _marked(line: str) -> str:
    """Return a line with its names as literals or links, and its other signs as text."""
    indent = line[: len(line) - len(line.lstrip())]
    parts = re.split(r"(`[^`]+`)", line[len(indent) :])
    return indent + "".join(_name(p[1:-1]) if p[:1] == "`" else _text(p) for p in parts)


def _name(name: str) -> str:
    if name in influence.__all__ and name != "measurements":
        return f":py:obj:`~influence.{name}`"
    return f"``{name}``"


def _text(text: str) -> str:
    text = re.sub(r"([\\*|`])", r"\\\1", text)
    return re.sub(r"_(?!\w)", r"\\_", text)
