"""Tests of the committed results: the README's table, the generated pages, and the snippets."""

import re
from pathlib import Path

import keras
import numpy as np
import pandas
import pytest

import experiments
from experiments.harness import markdown, report
from influence import GenericNeuralNet, Influence

ROOT = Path(__file__).resolve().parents[2]
README, RESULTS = ROOT / "README.md", ROOT / "results"
PAGES, USING = ROOT / "docs" / "experiments", ROOT / "docs" / "using.md"
needs_results = pytest.mark.skipif(not RESULTS.is_dir(), reason="no results/ yet")


@needs_results
def test_readme_says_what_the_records_say():
    text = README.read_text(encoding="utf-8")
    now = markdown.with_block(text, markdown.short_table(RESULTS))
    assert text == now, "README.md is out of date: run `make readme`"
    long = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert long == markdown.long_table(RESULTS), "results/README.md is stale: run `make readme`"


@needs_results
def test_readme_is_short_and_so_is_its_table():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
    rows = report.headlines(report.read_all(RESULTS), RESULTS)
    assert 16 <= len(rows) <= 18
    # The first rows are the paper's results. A label says so if a run was shortened.
    assert [row["label"] for row in rows][:4] == [
        "Figure 1",
        "Figure 2, left",
        "Figure 2, middle",
        "Figure 2, right (shortened)",
    ]
    assert all((ROOT / row["page"]).is_file() for row in rows if row["page"])
    assert any(row["page"] == "docs/leverage.md" for row in rows)


@needs_results
def test_every_page_of_an_experiment_says_what_its_record_says():
    now = markdown.pages(RESULTS)
    there = {path.name for path in PAGES.glob("*.md")} - {"README.md"}
    assert there == now.keys() == {f"{name}.md" for name in experiments.summaries()}
    for name, text in now.items():
        said = (PAGES / name).read_text(encoding="utf-8")
        assert said == text, f"docs/experiments/{name} is out of date: run `make readme`"
    # If a record lacks the numbers for a remark, its page omits the remark without an error. So
    # check that this page has its remark.
    assert "the row's own curvature" in now["fig2-cnn-minimum.md"]
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert index == markdown.with_block(index, markdown.index(RESULTS))


@pytest.mark.parametrize(
    "page", [README, USING, *sorted(PAGES.glob("*.md"))], ids=lambda path: path.name
)
def test_links_lead_to_files_and_pages_begin_with_a_title(page):
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ")
    links = re.findall(r"\]\((?!https?:)([^)#]+)(#[^)]*)?\)", text)
    assert links
    for path, anchor in links:
        target = (page.parent / path).resolve()
        assert target.exists(), path
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor[1:] in slugs, (path, anchor)
    for alt in re.findall(r"!\[(.*?)\]", text):
        assert alt[0].isupper() and alt.count(" ") > 4, alt


def run(part: str, **names):
    """Run the snippet of docs/using.md that contains `part`. Return the names that it defines."""
    blocks = re.findall(r"```python\n(.*?)```", USING.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if part in block]
    exec(block, names)
    return names


@pytest.mark.parametrize("kind", ["sequential", "functional"])
def test_the_copy_in_the_docs_is_the_same_model(kind):
    layers = [keras.layers.Dense(4, "tanh"), keras.layers.Dense(3, "softmax")]
    model = keras.Sequential([keras.Input((2,)), *layers])
    if kind == "functional":
        given = keras.Input((2,))
        model = keras.Model(given, layers[1](layers[0](given)))
    model.compile("sgd", "sparse_categorical_crossentropy")
    x = np.random.default_rng(0).standard_normal((5, 2))
    before = model(x.astype("float32")).numpy()
    net = run('dtype="float64"', model=model, GenericNeuralNet=GenericNeuralNet)["net"]
    assert net.dtype == "float64" and net.loss.from_logits
    np.testing.assert_allclose(net.outputs(x), before, atol=1e-6)


def test_the_table_in_the_docs_is_taken():
    inputs = {name: keras.Input((1,), name=name) for name in ("age", "income")}
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Add()(list(inputs.values()))))
    model.compile("sgd", "mse")
    frame = pandas.DataFrame(np.random.default_rng(0).standard_normal((20, 2)), columns=[*inputs])
    names = {"model": model, "frame": frame, "labels": frame["age"], "Influence": Influence}
    run("(frame, labels)", **names)  # the snippet raises an error if the data is refused


@needs_results
def test_results_are_small_and_of_real_data():
    for folder, record in report.read_all(RESULTS):
        assert not record.data["stand_in"], folder
        assert sum(path.stat().st_size for path in folder.rglob("*")) <= 2_000_000, folder
        assert (folder / report.FIGURE).is_file(), folder
