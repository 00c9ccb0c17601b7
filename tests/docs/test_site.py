"""Tests of the built documentation: it uses no other server, and its links and names are right."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("sphinx", reason="requirements-docs.txt is not installed")
pytest.importorskip("furo", reason="requirements-docs.txt is not installed")

import influence

ROOT = Path(__file__).resolve().parents[2]
# The browser loads the files of these tags when it opens a page. The attribute has the address.
_LOADS = {
    "script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src",
    "embed": "src", "object": "data",
}  # fmt: skip
_LOADING_LINKS = {"stylesheet", "preload", "icon", "shortcut", "prefetch", "preconnect", "manifest"}


class Page(HTMLParser):
    """Parser that collects a page's ids, the addresses that it loads, and its links."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if _LOADS.get(tag) in given:
            self.loads.append(given[_LOADS[tag]])
        if tag == "link":
            loads = _LOADING_LINKS & set(given.get("rel", "").split())
            (self.loads if loads else self.links).append(given.get("href", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Return the folder of the built site. Sphinx treats warnings as errors."""
    out = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "--quiet"]
    words += ["-d", str(out / "doctrees"), str(ROOT / "docs"), str(out / "html")]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return out / "html"


@pytest.fixture(scope="module")
def parsed(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def _is_elsewhere(address: str) -> bool:
    return bool(urlsplit(address).netloc)


@pytest.mark.slow
def test_no_page_loads_anything_from_another_server(site, parsed):
    assert len(parsed) > 20
    found = [(p.name, a) for p, page in parsed.items() for a in page.loads if _is_elsewhere(a)]
    assert found == []
    # Styles may load fonts and images, and scripts may fetch data. Neither may use another server.
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", text), path.name
    for path in site.rglob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?:fetch|import|importScripts)\(\s*['\"](?:https?:)?//", text), path


@pytest.mark.slow
def test_links_and_anchors_lead_somewhere(parsed):
    broken = []
    for path, page in parsed.items():
        for link in (*page.links, *page.loads):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                broken.append((path.name, link))
            elif parts.fragment and target in parsed:
                if unquote(parts.fragment) not in parsed[target].ids:
                    broken.append((path.name, link))
    assert broken == []


@pytest.mark.slow
def test_every_public_name_is_in_the_api(parsed):
    ids = set().union(*(page.ids for path, page in parsed.items() if path.parent.name == "api"))
    missing = [name for name in influence.__all__ if f"influence.{name}" not in ids]
    assert missing == []
    members = re.compile(r"influence\.Influence\.\w+")
    shown = {name for name in ids if members.fullmatch(name)}
    own = {f"influence.Influence.{n}" for n in vars(influence.Influence) if not n.startswith("_")}
    assert own <= shown


@pytest.mark.slow
def test_docstrings_are_shown_as_they_are_written(site):
    text = (site / "api" / "scores.html").read_text(encoding="utf-8")
    plain = re.sub(r"<[^>]+>", "", text)
    assert "s_test . grad L(z_i) / n" in plain
    assert "D2 = D1 + k / (n - k) H^-1 (H_U - H) D1" in plain
    assert "problematic" not in text  # Sphinx gives this class to text that it cannot parse
    assert not re.search(r"(?<!`)``?\w+``?(?!`)", plain), "a backtick is left"


def test_docstrings_become_markup(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_extensions"))
    from plain_docstrings import rewritten

    text = """Return |x| of `x` and `Examples`, v_(t-1).

        y = a * b
    Args: as `scores`.
    Returns: (k,): numbers.
    Raises: ValueError for a; TypeError for b.
    Raises: TypeError or ValueError for c.
    Attributes:
      x, y: numbers.
    """
    lines = [line.removeprefix("    ") for line in text.splitlines()]
    found = [line for line in rewritten(lines) if line]
    assert found == [
        r"Return \|x\| of ``x`` and :py:obj:`~influence.Examples`, v\_(t-1).",
        "::",
        "      y = a * b",
        "**Args:** as ``scores``.",
        "Returns:",
        r"  (k,)\: numbers.",
        "Raises:",
        "  ValueError: for a.",
        "  TypeError: for b.",
        "**Raises:** TypeError or ValueError for c.",
        "Attributes:",
        "  x,y: numbers.",
    ]
