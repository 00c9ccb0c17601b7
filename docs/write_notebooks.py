"""`python docs/write_notebooks.py`: write docs/notebooks/*.ipynb from the pages of the same names.

A notebook has the page's text, and its blocks of Python as cells, without outputs. The tests run
the page. They also fail if a notebook is not that of its page.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "notebooks"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# These lines are for the site: front matter, and links to the notebook itself.
_SITE_ONLY = re.compile(r"^<!-- site -->\n.*?^<!-- /site -->\n", re.DOTALL | re.MULTILINE)


def notebook(page: str) -> str:
    """Return the notebook of a page, as the text of an .ipynb file."""
    cells = []
    # `split` gives text and blocks in turn.
    for number, part in enumerate(_BLOCK.split(_SITE_ONLY.sub("", page))):
        if part.strip():
            cells.append(_cell("code" if number % 2 else "markdown", part.strip(), len(cells)))
    about = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    whole = {"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _cell(kind: str, text: str, number: int) -> dict:
    cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
    if kind == "code":
        cell |= {"execution_count": None, "outputs": []}
    return cell | {"source": text.splitlines(keepends=True)}


def main() -> None:
    """Write all notebooks."""
    for page in sorted(FOLDER.glob("*.md")):
        text = notebook(page.read_text(encoding="utf-8"))
        page.with_suffix(".ipynb").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
