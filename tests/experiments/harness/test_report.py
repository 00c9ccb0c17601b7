import base64
import html
import json
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.harness import report
from experiments.harness.claims import Claim, Published, Sample
from experiments.harness.record import Record


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
    assert '<td class="short">not reproduced</td>' in page
    assert page.count("The shift of the mean</td>") == 1  # no claim is shown of the stand-in
    assert "All claims: 1 not reproduced." in page
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


CLAIMS = (
    Claim("pearson", "Correlation", Published("4.1", 0.86), sample=Sample("correlation", 103),
          headline="r"),
    Claim("slope", "Slope", Published("4.1", words="y = x"), 0.985, None, headline="r"),
    Claim("lost", "Lost | rows", None, None, 0.5, headline="rows lost"),
    Claim("error", "Error", None, None, 1e-6),
)  # fmt: skip
METRICS = {"pearson": 0.853, "error": 2e-6, "slope": 0.5, "lost": 0.25}


def test_the_long_table_has_every_claim_of_every_record(tmp_path):
    _save(tmp_path / "fig2-paper", claims=CLAIMS, metrics=METRICS)
    _save(tmp_path / "fig1-paper", experiment="fig1", stand_in=True, claims=CLAIMS[:1])
    page = report.long_table(tmp_path)
    first, second = page.split("\n## ")[1:]
    assert first.startswith("Figure 1, `fig1-paper`, stand-in data: digits\n")
    assert "| 0.999990 |" not in first and "| not judged | `pearson` | 4.1 |" in first
    assert second.splitlines()[2:] == [
        "| claim | the paper's | ours | band | verdict | metric | source |",
        "|---|---|---|---|---|---|---|",
        "| Correlation | 0.86 | 0.853 [0.79, 0.9] | 0.774 to 0.946 | reproduced | `pearson` "
        "| 4.1 |",
        "| Slope | y = x | 0.5 | at least 0.985 | not reproduced | `slope` | 4.1 |",
        "| Lost \\| rows | – | 0.25 | at most 0.5 | beyond the paper | `lost` |  |",
        "| Error | – | 2e-06 | at most 1e-06 | beyond the paper; our aim missed | `error` |  |",
    ]


def test_the_short_table_has_a_row_per_headline_of_the_fullest_record(tmp_path):
    _save(tmp_path / "fig2-paper", claims=CLAIMS, metrics=METRICS)
    other = METRICS | {"pearson": 0.1}
    _save(tmp_path / "fig2-standard", preset="standard", claims=CLAIMS, metrics=other)
    assert report.short_table(tmp_path).splitlines() == [
        "| paper | what | the paper's | ours | |",
        "|---|---|---|---|---|",
        "| Figure 2, left and middle | r | 0.86 / y = x | 0.853 [0.79, 0.9] / 0.5 "
        "| 1 of 2 reproduced |",
        "| Figure 2, left and middle | rows lost | – | 0.25 | beyond the paper |",
        "",
        "All claims: 1 not reproduced, 1 reproduced, 1 beyond the paper, 1 beyond the paper; "
        "our aim missed.",
    ]


def test_the_readme_command_rewrites_its_block_and_the_long_table(tmp_path, capsys):
    results = tmp_path / "results"
    _save(results / "fig2-paper", claims=CLAIMS, metrics=METRICS)
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- results -->\nold\n<!-- /results -->\nEnd\n")
    command = ["report", "--readme", str(readme), "--results", str(results)]
    assert main(command) == 0
    text, table = readme.read_text(), report.short_table(results)
    assert text == f"# Title\n<!-- results -->\n{table}\n<!-- /results -->\nEnd\n"
    assert (results / "README.md").read_text() == report.long_table(results)
    assert main(command) == 0
    assert readme.read_text() == text
    readme.write_text("# Title\n")
    assert main(command) == 2
    assert "readme must hold one <!-- results -->" in capsys.readouterr().err


def test_judging_again_changes_claims_alone(fake, capsys):
    from experiments.harness.claims import Claim

    main(["fake", "--preset", "paper"])
    folder = Path("out/fake-paper")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["judge", "--results", "out"]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    fake.CLAIMS = (Claim("mean", "Mean", None, 2, None), Claim("new", "New"))
    capsys.readouterr()
    assert main(["judge", "--results", "out"]) == 0
    assert capsys.readouterr().out == "fake-paper: 1 claims judged, without new: run it again\n"
    (claim,) = Record.load(folder).claims
    assert (claim["metric"], claim["holds"]) == ("mean", False)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"record.json"}
    assert main(["judge", "--results", "modules/fake_figure.py"]) == 2
    assert main(["judge", "--results", "nowhere"]) == 2


def test_records_of_a_former_name_are_judged_as_the_present_experiment(tmp_path):
    _save(tmp_path / "fig2-cnn-converged", experiment="fig2-cnn", preset="converged",
          metrics={"pearson_part": 0.9998, "pearson_minimum": 0.88})  # fmt: skip
    (line,) = report.judge_all(tmp_path)
    assert "2 claims judged, without train_accuracy" in line
    record = Record.load(tmp_path / "fig2-cnn-converged")
    assert [claim["holds"] for claim in record.claims] == [True, False]
    assert "Figure 2, right, at a true minimum" in report.short_table(tmp_path)


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
    [
        (None, "–"), (0.99999, "0.99999"), (1e-9, "1e-09"), (1.0, "1"), (-0.0, "-0"),
        (0.8533, "0.853"), (0.9996, "0.9996"), (-0.99999999, "-1"), (13.0, "13"), (1.36012, "1.36"),
        (-133.5, "-134"), (11894, "11,894"), (-3242.4, "-3,242"),
    ],
)  # fmt: skip
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
