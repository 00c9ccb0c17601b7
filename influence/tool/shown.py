"""Display of one row on a page: as a picture, as table cells, or as text."""

from __future__ import annotations

import base64
import io
import re
import unicodedata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence.tool.rows import Rows

# A page shows at most _CELLS cells of a row. It cuts texts after _TEXT characters, or after _MORE
# characters if a reader opens the rest. It cuts cells after _CELL and names after _NAME characters.
_CELLS, _TEXT, _MORE, _CELL, _NAME = 16, 280, 3000, 60, 120
# An image whose longer side has at most this many pixels is enlarged without smoothing.
_SMALL = 64
# Two numbers of a column are marked as different if they differ by more than this many standard
# deviations of the column.
_APART = 0.5
# A word that two texts share is marked only if it has at least this many characters.
_WORD = 3


def item(rows: Rows, row: int, size: int, against: tuple[Rows, int] | None = None) -> dict:
    """Return a dict with the data that the page's template needs to show a row.

    Args:
      rows: the data set.
      row: the number of the row.
      size: the longest side of a picture, in pixels.
      against: another row as (rows, number), or None. In a table, cells that differ from those of
        the other row are marked. In a text, uncommon words that the other text has too are marked.

    Returns: a dict with `kind` ("image", "table", "text" or "other"), `name` and `row`. The other
      keys depend on `kind`. An image has `uri` and `small` (True for a tiny image). A table has
      `cells`, a list of (name, value, differs). A text has `parts`, a list of (text, is marked),
      `more` (the text after the parts) and `length`.
    """
    found: dict[str, Any] = {"kind": rows.kind, "name": plain(rows.name(row), _NAME), "row": row}
    if rows.kind == "image":
        data, found["small"] = _png(rows, row, size)
        found["uri"] = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    elif rows.kind == "table":
        found["cells"] = _cells(rows, row, against)
    elif rows.kind == "text":
        text = rows.text(row)
        other = None if against is None else against[0].text(against[1])
        found["parts"] = _parts(text[:_TEXT], other, rows)
        found["more"] = plain(text[_TEXT:_MORE], _MORE)
        found["length"] = len(text)
    return found


def plain(text: Any, most: int) -> str:
    """Cut a text to `most` characters, and replace special characters by their codes.

    Special characters are control, format, surrogate and private-use characters. They are
    invisible, or could change the direction of other text. This function does not escape HTML. The
    page's template does that.
    """
    text = str(text)
    cut = text[:most]
    shown = "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else _code(c)
        for c in cut
    )
    return shown + (f" … ({len(text):,} characters)" if len(text) > most else "")


def image_of(rows: Rows, row: int) -> NDArray[np.uint8]:
    """Return the picture of a row as an array (height, width) or (height, width, channels)."""
    shape = rows.image_shape
    x = np.asarray(rows.inputs(row), float)
    x = x.reshape(shape) if shape is not None else x
    low, high = rows.levels or (float(x.min()), float(x.max()))
    x = np.clip((x - low) / (high - low or 1.0), 0, 1) * 255
    found = np.round(x).astype(np.uint8)
    return found[..., 0] if found.shape[-1] == 1 else found


def _png(rows: Rows, row: int, size: int) -> tuple[bytes, bool]:
    """Return the picture of a row as PNG bytes, and True if the image is tiny (`_SMALL`)."""
    from PIL import Image

    if len(rows.files):
        picture = Image.open(rows.files[row])
        picture = picture.convert("RGB")
    else:
        picture = Image.fromarray(image_of(rows, row))
    small = max(picture.size) <= _SMALL
    if max(picture.size) > size:
        picture.thumbnail((size, size))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue(), small


def _cells(rows: Rows, row: int, against: tuple[Rows, int] | None) -> list[tuple[str, str, bool]]:
    own = rows.cells([row])
    other = None if against is None else against[0].cells([against[1]])
    found = []
    for name, value in own.items():
        value, gap = value[0], 0.0
        if other is not None and name in other:
            gap = _gap(value, other[name][0], rows.spread.get(name))
        found.append((plain(name, _CELL), _cell(value), gap > _APART, gap))
    if len(found) > _CELLS:  # keep the cells that differ most, in column order
        most = sorted(range(len(found)), key=lambda k: -found[k][3])[:_CELLS]
        found = [found[k] for k in sorted(most)]
    return [(name, value, differs) for name, value, differs, _ in found]


def _gap(one: Any, two: Any, spread: float | None) -> float:
    """Return the difference of two cells in standard deviations; for strings, 0 or infinity."""
    if spread is None:
        return 0.0 if _cell(one) == _cell(two) else np.inf
    gap = abs(float(one) - float(two))
    return gap / spread if spread > 0 else (np.inf if gap else 0.0)


def _cell(value: Any) -> str:
    if isinstance(value, bytes):
        return plain(value.decode("utf-8", "replace"), _CELL)
    if isinstance(value, int | float | np.number):
        number = float(value)
        return f"{int(number)}" if number == int(number) else f"{number:.4g}"
    return plain(value, _CELL)


def _parts(text: str, other: str | None, rows: Rows) -> list[tuple[str, bool]]:
    """Split a text into pairs (part, marked). Uncommon words that both texts have are marked."""
    if other is None:
        return [(plain(text, _TEXT), False)]
    shared = set(map(str.lower, re.findall(r"\w+", other[: 1 << 20]))) - rows.common_words
    found: list[tuple[str, bool]] = []
    for part in re.split(r"(\w+)", text):
        if not part:
            continue
        mark = len(part) >= _WORD and part.lower() in shared
        if found and found[-1][1] == mark:
            found[-1] = (found[-1][0] + plain(part, _TEXT), mark)
        else:
            found.append((plain(part, _TEXT), mark))
    return found


def _code(character: str) -> str:
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
