import base64
import html
import json

import pytest

from experiments.__main__ import main
from experiments.harness import report
from experiments.harness.record import Claim, Record


def _save(folder, *, experiment="fig2", preset="paper", stand_in=False, claims=(), metrics=None):
    metrics = metrics or {"pearson": 0.99999}
    made = Record(
        experiment=experiment,
        preset=preset,
        config={"seed": 0},
        data={"name": "digits" if stand_in else "mnist", "stand_in": stand_in, "sha256": "5a"},
        metrics=metrics,
        claims=[claim.judge(metrics, stand_in=stand_in) for claim in claims],
        provenance={"seed": 0, "commit": "abc", "versions": {"keras": "3"}},
    )
    made.save(folder)


def test_page_holds_everything(fake):
    main(["fake", "--preset", "smoke"])
    main(["fake", "--preset", "paper", "--shift", "1.5"])
    assert main(["report"]) == 0
    with open("out/index.html", encoding="utf-8") as file:
        page = file.read()
    with open("out/fake-paper-" + page.split("fake-paper-")[1][:8] + "/figure.png", "rb") as file:
        assert base64.b64encode(file.read()).decode() in page
    assert "we &lt;fake&gt; it; the paper did not" in page  # escaped
    assert "Stand-in data: digits, not mnist." in page
    assert page.count("Stand-in data") == 1
    assert '<td class="short">FALLS SHORT</td>' in page
    assert '<td class="">not judged</td>' in page
    assert "A fake figure: the mean of random numbers." in page
    for word in ("tensorflow", "peak rss mb", "SHA-256 " + "5a" * 32, "shift = 1.5"):
        assert word in page
    assert 'src="http' not in page and "<link" not in page  # self-contained


def test_page_does_without_records_figures_and_modules(tmp_path):
    assert "No records yet" in report.write_page(tmp_path).read_text()
    _save(tmp_path / "gone-paper", experiment="gone", stand_in=True)
    page = html.unescape(report.write_page(tmp_path).read_text())
    assert "No figure: draw it" in page
    assert "digits, not the paper's data" in page


def test_table_has_one_row_per_claim_in_order(tmp_path):
    claims = (
        Claim("pearson", 0.86, 0.99, 1.0),
        Claim("error", None, None, 1e-6),
        Claim("slope", None, 0.985, None),
        Claim("lost", None, None, None),
    )
    metrics = {"pearson": 0.9999912, "error": 2e-6, "slope": 1.0}
    _save(tmp_path / "fig2-paper", claims=claims, metrics=metrics)
    _save(tmp_path / "fig1-paper", experiment="fig1", stand_in=True, claims=claims[:1])
    assert report.table(tmp_path) == "\n".join(
        [
            "| experiment | metric | paper | ours | band | |",
            "|---|---|---|---|---|---|",
            "| fig1 (paper), stand-in data: digits | `pearson` | 0.86 | 0.99999 | 0.99 to 1 "
            "| not judged |",
            "| fig2 (paper) | `pearson` | 0.86 | 0.999991 | 0.99 to 1 | holds |",
            "| fig2 (paper) | `error` | – | 2e-06 | at most 1e-06 | FALLS SHORT |",
            "| fig2 (paper) | `slope` | – | 1 | at least 0.985 | holds |",
            "| fig2 (paper) | `lost` | – | – | any | FALLS SHORT |",
        ]
    )


def test_readme_command_rewrites_its_block_and_nothing_else(tmp_path, capsys):
    _save(tmp_path / "results" / "fig2-paper", claims=(Claim("pearson", None, 0.9, 1.0),))
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- results -->\nold\n<!-- /results -->\nEnd\n")
    command = ["report", "--readme", str(readme), "--results", str(tmp_path / "results")]
    assert main(command) == 0
    text = readme.read_text()
    table = report.table(tmp_path / "results")
    assert text == f"# Title\n<!-- results -->\n{table}\n<!-- /results -->\nEnd\n"
    assert main(command) == 0
    assert readme.read_text() == text
    readme.write_text("# Title\n")
    assert main(command) == 2
    assert "readme must hold one <!-- results -->" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!-- results -->",
        "<!-- /results --> <!-- results -->",
        "<!-- results --> <!-- results --> <!-- /results -->",
        "<!-- results --> <!-- /results --> <!-- /results -->",
    ],
)
def test_readme_must_have_its_markers_once_and_in_order(tmp_path, text):
    with pytest.raises(ValueError, match="readme must hold one"):
        report.with_table(text, tmp_path)


def test_broken_record_is_named(tmp_path, capsys):
    _save(tmp_path / "fig2-paper")
    (tmp_path / "fig2-paper" / "record.json").write_text("{")
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert "fig2-paper" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.99999, "0.99999"), (1e-9, "1e-09"), (1.0, "1"), (-0.0, "-0")],
)
def test_number(value, text):
    assert report.number(value) == text


def test_page_says_that_a_record_has_no_checksum(tmp_path):
    _save(tmp_path / "fig2-paper")
    _save(tmp_path / "fig1-paper", experiment="fig1")
    path = tmp_path / "fig1-paper" / "record.json"
    content = json.loads(path.read_text())
    del content["format"], content["sha256"]
    path.write_text(json.dumps(content))
    before = path.read_bytes()
    page = report.write_page(tmp_path).read_text()
    assert page.count("This record has no checksum") == 1
    assert page.index('id="fig1-paper"') < page.index("no checksum") < page.index('id="fig2-paper"')
    assert path.read_bytes() == before
