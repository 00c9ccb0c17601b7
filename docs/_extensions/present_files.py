"""Files of the repository outside of docs/: some are pages, the others are downloads.

A link in a page's source leads to the file, so that it also works where the source is read. In the
site, a link to a file that is a page leads to the page. A link to any other file outside of docs/
makes the file a download. A list of generated pages is left out until there is one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

_ROOT = Path(__file__).resolve().parents[2]
_DOCS = _ROOT / "docs"
# The page in docs/ that shows each file, if the file exists.
_PAGES = {"CHANGELOG.md": "changelog", "results/benchmarks/README.md": "benchmarks"}
# `_LIST` matches a toctree with a glob pattern. If no page matches the pattern, the toctree is
# removed, because Sphinx would warn about it.
_OPTIONS = r"(?::\w+:.*\n)*"
_LIST = re.compile(rf"^```{{toctree}}\n{_OPTIONS}:glob:\n{_OPTIONS}\n(\S+)\n```\n", re.MULTILINE)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s]+)(?=\))")


def setup(app: Sphinx) -> dict[str, bool]:
    """Read the files into their pages, and follow the links to files outside of docs/."""
    app.connect("source-read", _read)
    # Their files change without them.
    app.connect("env-get-outdated", lambda *_: ["experiments", *_PAGES.values()])
    return {"parallel_read_safe": True}


def _read(app: Sphinx, name: str, source: list[str]) -> None:
    folder = (_DOCS / name).parent
    source[0] = _LIST.sub(lambda found: found[0] if [*folder.glob(found[1])] else "", source[0])
    shown = [file for file, page in _PAGES.items() if page == name and (_ROOT / file).is_file()]
    if shown:
        source[0] = (_ROOT / shown[0]).read_text(encoding="utf-8")
        folder = (_ROOT / shown[0]).parent
    source[0] = _LINK.sub(lambda link: _target(link[1], folder, (_DOCS / name).parent), source[0])


def _target(link: str, folder: Path, place: Path) -> str:
    """Return the link that the site needs.

    Args:
      link: a link, relative to `folder`.
      folder: the folder of the file that has the link.
      place: the folder of the page that shows it.
    """
    path, _, anchor = link.partition("#")
    file = Path(os.path.normpath(folder / path))
    if not path or not file.is_relative_to(_ROOT):
        return link
    page = _PAGES.get(file.relative_to(_ROOT).as_posix())
    if page is not None:
        found = os.path.relpath(_DOCS / f"{page}.md", place)
        return f"{found}#{anchor}" if anchor else found
    if folder == place and file.is_relative_to(_DOCS):
        return link
    found = os.path.relpath(file, place)
    # MyST takes a link to Markdown for one to a page.
    return f"path:{found}" if file.suffix == ".md" and not file.is_relative_to(_DOCS) else found
