"""Tests of the page of all records, as text and in a real headless Chromium."""

import base64
import html
import json
import shutil
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.harness import web_page
from tests.experiments.harness.records import CLAIMS, METRICS, save

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip


def test_page_holds_everything(fake):
    main(["fake", "--preset", "smoke"])
    main(["fake", "--preset", "paper", "--shift", "1.5"])
    assert main(["report"]) == 0
    with open("out/index.html", encoding="utf-8") as file:
        page = file.read()
    with open("out/fake-paper-" + page.split("fake-paper-")[1][:8] + "/figure.png", "rb") as file:
        assert base64.b64encode(file.read()).decode() in page
    assert "we &lt;fake&gt; it; the paper did not" in page  # HTML in a text is escaped
    assert "Stand-in data: digits, not mnist." in page
    assert page.count("Stand-in data") == 1
    assert '<td class="short">not reproduced</td>' in page
    # The page shows no claims for the stand-in.
    assert page.count("The shift of the mean</td>") == 1
    assert "All claims: 1 not reproduced." in page
    assert "<h2>A fake figure: the mean of random numbers</h2>" in page
    for word in ("tensorflow", "peak rss mb", "SHA-256 " + "5a" * 32, "shift = 1.5"):
        assert word in page
    assert 'src="http' not in page and "<link" not in page  # the page loads no other file
    assert '<img alt="A line of random numbers."' in page
    assert "<code>python -m experiments fake --preset paper --shift 1.5</code>" in page
    for name in ("figure.pdf", "record.json", "arrays.h5"):
        assert f'href="fake-smoke/{name}"' in page
    assert page.index('id="fake-paper-') < page.index('id="fake-smoke"')


def test_page_does_without_records_figures_and_modules(tmp_path):
    assert "No records yet" in web_page.write_page(tmp_path).read_text()
    save(tmp_path / "gone-paper", experiment="gone", stand_in=True)
    page = html.unescape(web_page.write_page(tmp_path).read_text())
    assert "No figure: draw it" in page
    assert "digits, not the paper's data" in page


def test_page_says_that_a_record_has_no_checksum(tmp_path):
    save(tmp_path / "fig2-paper")
    save(tmp_path / "fig1-paper", experiment="fig1")
    path = tmp_path / "fig1-paper" / "record.json"
    content = json.loads(path.read_text())
    del content["format"], content["sha256"]
    path.write_text(json.dumps(content))
    before = path.read_bytes()
    page = web_page.write_page(tmp_path).read_text()
    assert page.count("This record has no checksum") == 1
    assert page.index('id="fig1-paper"') < page.index("no checksum") < page.index('id="fig2-paper"')
    assert path.read_bytes() == before


@pytest.fixture
def opened(tmp_path):
    """Give a function that opens a page of two records in Chromium, at a given width."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium, or see .ci/run")
    save(tmp_path / "fig2-paper", claims=CLAIMS, metrics=METRICS)
    save(tmp_path / "fig2-cnn-tenfold", experiment="fig2-cnn", preset="tenfold", claims=CLAIMS,
         metrics=METRICS)  # fmt: skip
    path = web_page.write_page(tmp_path)
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])

        def open_(width):
            page = browser.new_page(viewport={"width": width, "height": 844})
            page.goto(path.as_uri())
            return page

        yield open_
        browser.close()


def test_the_numbers_are_on_the_screen_of_a_phone(opened):
    page = opened(390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    cells = page.locator("td.n").all()
    assert len(cells) > 10
    for cell in cells:
        box = cell.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    # On a narrow screen, the first result is visible without scrolling, and CSS labels it "ours".
    assert cells[1].inner_text() == "0.853 [0.79, 0.9] / 0.5"
    assert cells[1].bounding_box()["y"] < 844
    label = "getComputedStyle(document.querySelectorAll('td.n')[1], '::before').content"
    assert "ours" in page.evaluate(label)


def test_the_page_begins_with_the_short_table_and_its_links_work(opened):
    page = opened(1200)
    first = page.locator("main > *").nth(2)
    assert first.evaluate("e => e.tagName") == "TABLE"
    links = first.locator("a")
    assert links.first.inner_text() == "Left" and links.first.get_attribute("href") == "#fig2-paper"
    titles = page.locator("h2").all_inner_texts()
    assert titles[0].startswith("Figure 2, left and middle: predicted against actual")
    assert not any("fig2" in title for title in titles)
    assert page.locator("section a").first.get_attribute("href") == "fig2-paper/record.json"


def test_axe_finds_no_violation(opened):
    axe = pytest.importorskip("axe_playwright_python")
    for width in (390, 1200):
        page = opened(width)
        for details in page.locator("details").all():
            details.locator("summary").click()
        page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
        found = page.evaluate("axe.run()")
        assert found["passes"]
        assert [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found["violations"]] == []
