import re

import numpy as np
import pytest

from influence.preflight.report import Line, Report
from influence.solvers import Direct
from influence.solvers.plan import Plan
from influence.tool import page as pages
from influence.tool.alerts import ORDER_NOT_SIZE, Alert, merged, of_line, of_report
from influence.tool.answer import as_text_cell
from influence.tool.chart import Point, scatter
from influence.tool.page import Chart, Column, Gallery, Page, Section, Table, render
from influence.tool.rows import Rows, Wanted
from influence.tool.shown import item, plain

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7*7}}"


def rows_of(x, **how):
    x = np.asarray(x)
    wanted = Wanted({"x": (x.shape[1:], "float32")})
    value = (x, np.zeros(len(x)))
    return Rows(lambda: value, wanted, **how)


def small_page(size=64, text=HOSTILE):
    """Return a page that has every kind of element. Every text in the page is `text`."""
    rng = np.random.default_rng(0)
    pictures = rows_of(rng.random((4, 16, 16, 3)), names=[text] * 4)
    table = rows_of(rng.random((4, 3)), columns=(text, "b", "c"), names=[text] * 4)
    words = rows_of(np.array([["one two three " + text], ["three four " + text]], object))
    cards = [{"item": item(pictures, k, size), "facts": [text], "id": f"row-{k}"} for k in range(4)]
    points = [Point(k / 4, k**2 / 9 - 0.3, f"{text} {k}", f"row-{k}", k % 2) for k in range(4)]
    chart = Chart(text, scatter(points, text, text), cards, [text, "other"])
    columns = [Column("Row"), Column(text), Column("Value", True)]
    cells = [[item(table, k, size, (table, 0)), f"{text} {k}", v] for k, v in
             enumerate([3.0, -10.0, 0.25, float("nan")])]  # fmt: skip
    others = [{"item": item(words, 1, size, (words, 0)), "facts": [], "id": "w"}]
    parts = [chart, Gallery(text, cards, "good", text), Gallery("none", []),
             Gallery("texts", others, "bad"), Table(text, columns, cells)]  # fmt: skip
    alerts = [Alert("stop", text, text, text), Alert("care", "b"), Alert("note", "c", "d")]
    section = Section(text, [text], item(pictures, 0, size), parts)
    return Page(text, [text], alerts, [section], [(text, text)])


def test_every_value_is_escaped():
    text = render(small_page)
    assert "<script>alert" not in text and "onerror=alert(2)&gt;" in text
    assert "<img src=x" not in text
    assert "{{7*7}}" in text  # values are not rendered as templates
    assert len(re.findall(r"<script>", text)) == 1  # the only script is the page's own


def test_the_page_asks_for_nothing():
    text = render(small_page)
    assert "default-src 'none'" in text
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", text) == []
    assert "url(" not in text and "@import" not in text


def test_pictures_shrink_until_the_page_fits(monkeypatch):
    whole = len(render(lambda size: small_page(min(size, 48))).encode())
    asked = []

    def page(size):
        asked.append(size)
        return small_page(48 if size < 128 else 64, "x" * (0 if size < 128 else 20_000))

    monkeypatch.setattr(pages, "MOST_BYTES", whole)
    assert len(render(page).encode()) <= whole
    assert asked == [160, 128, 96]
    monkeypatch.setattr(pages, "MOST_BYTES", 40_000)
    columns = [Column("Row"), Column("Value", True)]
    rows = [["x" * 100, k] for k in range(1000)]
    text = render(
        lambda size: Page("t", ["s"], [], [Section("h", parts=[Table("c", columns, rows)])])
    )
    assert len(text.encode()) <= 40_000
    assert 50 < text.count("<tr>") < 1000 and "The CSV file has all of it" in text
    monkeypatch.setattr(pages, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="a page must have at most 1,000 bytes, got"):
        render(small_page)


def test_texts_are_cut_and_hidden_characters_shown():
    assert plain("a" * 1_000_000, 10) == "a" * 10 + " … (1,000,000 characters)"
    assert plain("a\u202eb\u2066c\x00d\ud800e", 99) == "a\\u202eb\\u2066c\\u0000d\\ud800e"
    assert plain("é 中 🙂\n\t", 99) == "é 中 🙂\n\t"


def test_cells_that_differ_and_words_that_are_shared_are_marked():
    x = np.array([[0.0, 1.0, 5.0], [0.1, -1.0, 5.0], [0.05, 0.0, 5.0], [0.0, 4.0, 5.0]])
    table = rows_of(x, columns=("a", "b", "c"))
    found = item(table, 0, 64, (table, 1))["cells"]
    # Rows 0 and 1 differ by 2.4 standard deviations in column a, by 1.07 in b, and by 0 in c. So a
    # and b are marked as different.
    assert found == [("a", "0", True), ("b", "1", True), ("c", "5", False)]
    assert [c[2] for c in item(table, 0, 64, (table, 2))["cells"]] == [True, True, False]
    assert [c[2] for c in item(table, 0, 64)["cells"]] == [False, False, False]
    texts = np.array([["red apple the pie"], ["Apple and red wine"], ["blue sky the"]], object)
    words = rows_of(texts)
    parts = item(words, 0, 64, (words, 1))["parts"]
    # The two texts share "red" and "apple". But these words occur in most texts, so none is marked.
    assert [text for text, shared in parts if shared] == []
    many = rows_of(np.concatenate([texts, [[f"word{k}"] for k in range(20)]]).astype(object))
    parts = item(many, 0, 64, (many, 1))["parts"]
    assert [text for text, shared in parts if shared] == ["red", "apple"]
    assert "".join(text for text, _ in parts) == "red apple the pie"


def test_wide_tables_show_the_columns_that_differ_most():
    x = np.zeros((2, 40))
    x[1, [3, 31]] = 1.0
    found = item(rows_of(x), 0, 64, (rows_of(x), 1))["cells"]
    assert len(found) == 16
    assert [name for name, _, differs in found if differs] == ["x[3]", "x[31]"]


def test_the_chart_has_the_points_where_they_belong():
    points = [Point(0.0, 0.0, "a", "a"), Point(1.0, 2.0, "b", "b")]
    drawing = scatter(points, "x", "y")
    (ax, ay), (bx, by) = ((p["cx"], p["cy"]) for p in drawing["points"])
    assert bx > ax and by < ay  # in SVG, y decreases upwards
    scale = (drawing["diagonal"][3] - drawing["diagonal"][1]) / (
        drawing["diagonal"][2] - drawing["diagonal"][0]
    )
    # From the first point to the second, y rises twice as much as x. `scale` is the slope of the
    # line y = x on the screen.
    assert (by - ay) / (bx - ax) == pytest.approx(2 * scale, rel=1e-3)
    assert [float(text) for _, text in drawing["x_ticks"]] == [0.0, 0.5, 1.0, 1.5, 2.0]
    one = scatter([Point(0.0, 0.0, "a", "a")], "x", "y")
    assert np.isfinite(one["points"][0]["cx"])


def test_alerts_are_ordered_and_those_about_sizes_become_one():
    found = merged(
        [
            Alert("note", "n"),
            Alert("care", f"{ORDER_NOT_SIZE} One.", "a", "r"),
            Alert("stop", "s"),
            Alert("care", f"{ORDER_NOT_SIZE} Two.", "b", "r"),
            Alert("note", "n"),
        ]
    )
    assert [alert.level for alert in found] == ["stop", "care", "note"]
    assert found[1] == Alert("care", f"{ORDER_NOT_SIZE} One. Two.", "a b", "r")


def test_lines_of_a_check_become_plain_words():
    fails = of_line(Line("stationary point", 9.0, "fail", "meaning", "remedy"))
    assert fails.level == "care" and fails.headline.startswith(ORDER_NOT_SIZE)
    assert fails.detail == "meaning" and fails.remedy == "remedy"
    assert of_line(Line("labels", 9.0, "fail", "m")).level == "stop"
    assert of_line(Line("precision", 0.1, "warn", "m")).level == "note"
    report = Report((Line("precision", 0.1, "warn", "m"), Line("labels", 1.0, "ok", "m")))
    plan = Plan("Hessian", 0.0, Direct(), "float64", ("", "", "", ""))
    assert len(of_report(report)) == 1 and of_report(report, plan) == [] == of_report(None)
    assert of_line(Line("a new check", 9.0, "warn", "m")).headline == (
        "The check 'a new check' asks for care."
    )


def test_formulas_of_spreadsheets_become_texts():
    assert as_text_cell("=1+1") == "'=1+1"
    assert [as_text_cell(v) for v in ("a=1", "", 3, None)] == ["a=1", "", 3, None]
