"""Tests of the page in a real headless Chromium. Without Chromium they are skipped."""

import shutil
from pathlib import Path

import pytest

from influence.tool.page import render
from tests.influence.tool.test_page import HOSTILE, small_page

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium, or see .ci/run"
)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Open the page. At the end, check that the page logged nothing and requested no files."""
    said, asked = [], []

    def open_(width=1200, scheme="light"):
        path = tmp_path / "page.html"
        path.write_text(render(small_page), encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [
        (tmp_path / "page.html").as_uri()
    ] * sum(url.startswith("file:") for url in asked)


def test_hostile_texts_stay_text(opened):
    page = opened()
    assert page.title() == HOSTILE
    assert page.locator("h1").inner_text() == HOSTILE
    assert page.locator("script").count() == 1
    assert page.locator("img[src=x]").count() == 0


def test_the_alerts_come_first(opened):
    page = opened()
    assert page.locator("main h2").first.inner_text() == "Before you believe a number"
    assert page.locator(".alerts li").first.get_attribute("class") == "stop"


def test_a_heading_sorts_the_table_by_size(opened):
    page = opened()
    column = "tbody tr td:nth-child(3)"
    button = page.locator("th button").nth(2)
    before = page.locator(column).all_inner_texts()
    assert before == ["3", "-10", "0.25", "–"]
    button.click()
    assert page.locator(column).all_inner_texts() == ["3", "0.25", "-10", "–"]
    assert page.locator("th").nth(2).get_attribute("aria-sort") == "descending"
    button.click()
    assert page.locator(column).all_inner_texts() == ["–", "-10", "0.25", "3"]
    # Sort a column of text from A to Z by the keyboard.
    page.locator("th button").nth(1).press("Enter")
    assert page.locator(column).all_inner_texts() == ["3", "-10", "0.25", "–"]
    assert page.locator("th").nth(2).get_attribute("aria-sort") is None


def test_the_filter_hides_rows_and_counts_the_others(opened):
    page = opened()
    page.locator("input[type=search]").fill("0.25")
    assert page.locator("tbody tr:visible").count() == 1
    assert page.locator("output").inner_text() == "1 of 4 rows"
    page.locator("input[type=search]").fill("")
    assert page.locator("tbody tr:visible").count() == 4


def test_a_point_shows_its_training_row_by_mouse_and_by_keyboard(opened):
    page = opened()
    points, panel = page.locator("circle.point[tabindex]"), page.locator(".panel")
    assert points.count() == 4
    assert "No point is chosen" in panel.inner_text()
    points.nth(3).hover()
    assert f"{HOSTILE} 3" in panel.inner_text()
    assert panel.locator("img").count() == 1
    points.nth(0).focus()
    page.keyboard.press("Tab")
    assert f"{HOSTILE} 1" in panel.inner_text()
    assert "chosen" in points.nth(1).get_attribute("class")


def test_the_theme_follows_the_system_and_the_button(opened):
    def paper(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = opened(), opened(scheme="dark")
    white, black = paper(light), paper(dark)
    assert white == "rgb(255, 255, 255)" != black
    button = dark.locator("[data-theme-button]")
    button.click()
    assert paper(dark) == white and button.inner_text() == "Colours: light"
    button.click()
    assert paper(dark) == black
    for _ in range(2):  # the button switches to light, then to dark
        light.locator("[data-theme-button]").click()
    assert paper(light) == black


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(opened, width):
    page = opened(width)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width


def test_the_print_shows_all_rows_without_controls(opened):
    page = opened()
    page.emulate_media(media="print")
    assert not page.locator("input[type=search]").is_visible()
    assert not page.locator("[data-theme-button]").is_visible()
    assert page.locator("tbody tr:visible").count() == 4
    assert page.pdf()[:4] == b"%PDF"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(opened, scheme):
    axe = pytest.importorskip("axe_playwright_python")
    page = opened(scheme=scheme)
    for details in page.locator("details").all():
        details.locator("summary").click()
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    assert found["passes"]
    assert [(v["id"], [n["html"][:200] for n in v["nodes"]]) for v in found["violations"]] == []
