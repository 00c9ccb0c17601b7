from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.harness import markdown, report
from tests.experiments.harness.records import CLAIMS, METRICS, save


def test_the_long_table_has_every_claim_of_every_record(tmp_path):
    save(tmp_path / "fig2-paper", claims=CLAIMS, metrics=METRICS)
    save(tmp_path / "fig1-paper", experiment="fig1", stand_in=True, claims=CLAIMS[:1])
    page = markdown.long_table(tmp_path)
    first, second = page.split("\n## ")[1:]
    assert first.startswith("Figure 1, `fig1-paper`, stand-in data: digits\n")
    assert "| 0.999990 |" not in first and "| not judged | `pearson` | 4.1 |" in first
    assert second.splitlines()[2:] == [
        "| claim | the paper's | ours | band | verdict | metric | source |",
        "|---|---|---|---|---|---|---|",
        "| Correlation | 0.86 | 0.853 [0.79, 0.9] | 0.774 to 0.946 | reproduced | `pearson` "
        "| 4.1 |",
        "| Lost \\| rows | – | 0.25 | at most 0.5 | beyond the paper | `lost` |  |",
        "| Slope | y = x | 0.5 | at least 0.985 | not reproduced | `slope` | 4.1 |",
        "| Error | – | 2e-06 | at most 1e-06 | beyond the paper; our aim missed | `error` |  |",
    ]


def test_the_short_table_has_a_row_per_headline_of_the_fullest_record(tmp_path):
    results = tmp_path / "results"
    save(results / "fig2-paper", claims=CLAIMS, metrics=METRICS)
    other = METRICS | {"pearson": 0.1}
    save(results / "fig2-standard", preset="standard", claims=CLAIMS, metrics=other)
    save(results / "gone", experiment="gone", claims=CLAIMS[:1], metrics=METRICS)
    assert markdown.short_table(results).splitlines() == [
        "| paper | what | the paper's | ours | |",
        "|---|---|---|---|---|",
        "| [Left](docs/experiments/fig2.md) | r \\| slope | 0.86 / y = x | 0.853 [0.79, 0.9] / 0.5 "
        "| 1 of 2 reproduced |",
        "| Left | r \\| slope | 0.86 | 0.853 [0.79, 0.9] | reproduced |",
        "| [Figure 2, left and middle](docs/experiments/fig2.md) | rows lost | – | 0.25 "
        "| beyond the paper |",
        "",
        "All claims: 1 not reproduced, 2 reproduced, 1 beyond the paper, 1 beyond the paper (our "
        "aim missed).",
    ]


def test_labels_name_stand_ins_and_shortened_protocols(tmp_path):
    save(tmp_path / "fig4-standard", experiment="fig4", preset="standard", claims=CLAIMS[2:3],
         metrics=METRICS)  # fmt: skip
    save(tmp_path / "fig2-cnn-tenfold", experiment="fig2-cnn", preset="tenfold", claims=CLAIMS[:1],
         metrics=METRICS)  # fmt: skip
    first, second = markdown.short_table(tmp_path).splitlines()[2:4]
    assert first.startswith("| [Left (shortened)](docs/experiments/fig2-cnn.md) |")
    assert second.startswith("| [Left (stand-in)](docs/experiments/fig4.md) |")
    assert second.endswith("| **not reproduced** |")


def test_refits_of_any_leverage_and_an_audit_add_a_row_each(tmp_path):
    results = tmp_path / "results"
    (results / "audit").mkdir(parents=True)
    assert report.headlines([], results) == []
    head = "model,leverage,slope of first order,slope of one step\n"
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "leverage.csv").write_text(f"{head}a,0.1,1.05,1\na,0.5,2,1.01\n")
    (results / "audit" / "audit.csv").write_text(
        "set,ranking,margin@10,history@10,cleanlab@10,target_recall,target_above\n"
        "a,margin,0.9,0.1,0.8,True,\nb,history,0.1,0.7,0.6,True,True\nc,margin,0.5,0.1,,,\n"
    )
    step, audit = report.headlines([], results)
    assert (step["ours"], step["verdict"], step["page"]) == (
        "1 / 0", report.BEYOND, "docs/leverage.md")  # fmt: skip
    assert step["what"].startswith("of 2 rows ")
    assert (audit["label"], audit["ours"]) == ("Wrong labels", "0.8 / 0.7")
    assert audit["verdict"] == report.BEYOND and "median of 2 cases" in audit["what"]
    told = (results / "audit" / "audit.csv").read_text()
    (results / "audit" / "audit.csv").write_text(told.replace("True,True", "False,True"))
    assert report.headlines([], results)[1]["verdict"] == report.MISSED


def test_a_page_holds_question_command_figure_numbers_and_deviations(fake):
    main(["fake", "--preset", "paper", "--shift", "1.5", "--out", "results"])
    (folder,) = Path("results").iterdir()
    record = report.Record.load(folder)
    (page,) = markdown.pages(Path("results")).values()
    assert page.startswith("# A fake figure: the mean of random numbers\n\nMore words.\n")
    parts = [
        f"**Result.** A mean of {report.number(record.metrics['mean'])}.",
        "## Run it\n\n    python -m experiments fake --preset paper --shift 1.5\n",
        "[how to get it](README.md#data)",
        f"![A line of random numbers.](../../results/{folder.name}/figure.png)",
        f"[PDF](../../results/{folder.name}/figure.pdf), [record](",
        "### How to read it\n\nA line of random numbers. a: higher is larger.\n",
        "| The shift of the mean | 0.125 | 1.5 | -1 to 1.25 | **not reproduced** | figure 9 |",
        "## Where we depart from the paper\n\n- **Fakes:** we <fake> it; the paper did not\n",
        "## Cost and provenance\n\nTime: ",
        f"| commit | `{record.provenance['commit']}` |",
        "| data | `mnist`, SHA-256 `5a5a",
        "`rows` 1, 2,",
        "*`make readme` writes this page",
    ]
    places = [page.index(part) for part in parts]  # index raises an error if a part is missing
    assert places == sorted(places)


def test_other_presets_follow_and_stand_ins_are_left_out(fake):
    for preset in ("standard", "smoke", "paper"):
        main(["fake", "--preset", preset, "--out", "results"])
    (page,) = markdown.pages(Path("results")).values()
    assert page.index("fake-paper/figure.png") < page.index("## Another run: preset standard")
    assert "fake-standard/record.json" in page and "fake-smoke" not in page
    assert (
        markdown.index(Path("results"))
        .splitlines()[2]
        .startswith("| [A fake figure: the mean of random numbers](fake.md) | `paper` |")
    )


def test_an_experiment_without_a_run_has_a_page_too(fake):
    Path("results").mkdir()
    (page,) = markdown.pages(Path("results")).values()
    assert "No run on real data is committed yet." in page and "## Figure" not in page
    assert markdown.index(Path("results")).endswith("(fake.md) | – | – | – | – |")


def test_an_interrupted_run_says_so(tmp_path):
    facts = {"seconds": 130.0, "peak_rss_mb": 1400, "cpu_count": 2, "resumed": True}
    record = report.Record(provenance=facts)
    assert (report.time(record), report.memory(record)) == ("2 min (its last part)", "1.4 GB")
    assert report.cost(record).endswith("its whole time is unknown.")
    assert report.cost(report.Record(provenance=facts | {"resumed": False, "seconds": 14.4})) == (
        "Time: 14 s. CPU cores: 2. Memory: 1.4 GB, without workers."
    )
    whole = facts | {"stretches": 2}
    assert report.time(report.Record(provenance=whole)) == "2 min"
    assert report.cost(report.Record(provenance=whole)).endswith("1.4 GB, with workers.")
    assert report.cost(report.Record()) == ""


def test_the_pages_command_writes_pages_and_their_list(fake):
    main(["fake", "--preset", "paper", "--out", "results"])
    Path("docs").mkdir()
    Path("docs/README.md").write_text("# Pages\n<!-- results -->\n<!-- /results -->\nEnd\n")
    assert main(["report", "--pages", "docs", "--results", "results"]) == 0
    assert {path.name for path in Path("docs").iterdir()} == {"README.md", "fake.md"}
    said = Path("docs/README.md").read_text()
    assert said.startswith("# Pages\n<!-- results -->\n| experiment |") and said.endswith("End\n")
    assert not Path("out").exists()
    assert main(["report", "--pages", "nowhere", "--results", "results"]) == 2


def test_the_readme_command_rewrites_its_block_and_the_long_table(tmp_path, capsys):
    results = tmp_path / "results"
    save(results / "fig2-paper", claims=CLAIMS, metrics=METRICS)
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<!-- results -->\nold\n<!-- /results -->\nEnd\n")
    command = ["report", "--readme", str(readme), "--results", str(results)]
    assert main(command) == 0
    text, table = readme.read_text(), markdown.short_table(results)
    assert text == f"# Title\n<!-- results -->\n{table}\n<!-- /results -->\nEnd\n"
    assert (results / "README.md").read_text() == markdown.long_table(results)
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
def test_readme_must_have_its_markers_once_and_in_order(text):
    with pytest.raises(ValueError, match="readme must hold one"):
        markdown.with_block(text, "")
