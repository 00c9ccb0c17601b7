"""Tests that every code block in the documentation runs and gives the values in its comments."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sybil", reason="requirements-docs.txt is not installed")

from docs import write_notebooks as notebooks
from tests.docs import pages


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Change to an empty folder, and let Matplotlib draw without a display."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("path", pages.documents(), ids=lambda p: str(p.relative_to(pages.ROOT)))
def test_the_blocks_of_a_page_run(path, elsewhere):
    assert pages.evaluate(path, _given(path)) > 0


def _given(path: Path) -> dict:
    """Return the names that a page uses without defining them, with values.

    They are a model, its training and test rows, and the public names of the library.
    """
    if path.name != "README.md":
        return {}
    import keras
    import pandas

    import data
    import influence

    x, y = data.load("digits").train
    keras.utils.set_random_seed(0)
    penalty = keras.regularizers.L2(0.01)
    layer = keras.layers.Dense(10, kernel_regularizer=penalty, bias_regularizer=penalty)
    model = keras.Sequential([keras.Input((64,)), layer])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = np.array(x[:300]), np.array(y[:300])
    model.fit(x, y, epochs=20, verbose=0)
    given = {name: getattr(influence, name) for name in influence.__all__}
    given |= {"model": model, "x_train": x[:200], "y_train": y[:200]}
    given |= {"x_test": x[200:], "y_test": y[200:]}
    return given | {"frame": pandas.DataFrame(x), "labels": y}


@pytest.mark.parametrize("path", sorted(notebooks.FOLDER.glob("*.md")), ids=lambda p: p.stem)
def test_a_notebook_is_that_of_its_page(path):
    text = path.with_suffix(".ipynb").read_text(encoding="utf-8")
    expected = notebooks.notebook(path.read_text(encoding="utf-8"))
    assert text == expected, "run `python docs/write_notebooks.py`"
    assert all(not cell.get("outputs") for cell in json.loads(text)["cells"])


def test_there_are_three_notebooks():
    found = sorted(path.stem for path in notebooks.FOLDER.glob("*.ipynb"))
    assert found == ["images", "mnist", "table"]


@pytest.mark.parametrize(
    ("value", "comment"),
    [
        (0.99968, "0.9997"),
        (0.99968, "0.9997: nearly one"),
        (1297, "1,297 rows"),
        (-3.04e-5, "-3.0e-5"),
        (np.float32(0.5), "0.50"),
        (np.array([1.04, 2.0]), "[1.0, 2]"),
        (np.zeros((3, 7)), "(3, n) changes"),
        (([True], 0.00352), "[True] and 0.0035, by a refit"),
        (48, "50 or 48"),
        ("first_order", "'first_order'"),
        (None, "None"),
        (3.0, "words without a digit"),
        ((2, 5), "(2, 5)"),
    ],
)
def test_a_true_comment_passes(value, comment):
    pages.compare(value, comment)


@pytest.mark.parametrize(
    ("value", "comment"),
    [
        (0.99958, "0.9997"),
        (1298, "1,297 rows"),
        (-3.06e-5, "-3.0e-5"),
        (np.array([1.06, 2.0]), "[1.0, 2]"),
        (np.array([1.0, 2.0, 3.0]), "[1.0, 2]"),
        (np.zeros((4, 7)), "(3, n) changes"),
        (([False], 0.00352), "[True] and 0.0035, by a refit"),
        (49, "50 or 48"),
        (True, "1"),
        ("one_step", "'first_order'"),
        (0, "None"),
        (3.0, "about 3"),  # the comment has a digit but does not begin with it
    ],
)
def test_a_false_comment_is_found(value, comment):
    with pytest.raises(pages.Wrong):
        pages.compare(value, comment)


def page(tmp_path, text):
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_false_line_is_named(tmp_path):
    path = page(tmp_path, "# A\n\n```python\nx = 1\nx + 1  # 2\nx + 2  # 4\n```\n")
    with pytest.raises(pages.Wrong, match=r"page\.md:6: the page says '4', but the value is 3"):
        pages.evaluate(path)


def test_what_a_block_prints_is_compared(tmp_path):
    text = "```python\nprint('a 1.50')\nprint('b')\n```\n\n```output\n{}\n```\n"
    for shown in ("a 1.50\nb", "a 1.51\nb", "...\nb", "a 1.5\n..."):
        assert pages.evaluate(page(tmp_path, text.format(shown))) == 2
    for shown in ("a 1.53\nb", "a 1.50", "a 1.50\nc", "..."[:2]):
        with pytest.raises(pages.Wrong):
            pages.evaluate(page(tmp_path, text.format(shown)))


@pytest.mark.parametrize(
    "line",
    [
        "python -m influence explain model.keras photos/ --wrong 10",
        "influence check model.keras data.npz",
        "python -m influence replay run.toml",
        "python -m experiments fig2 --preset paper",
        "python -m data fetch mnist",
        "python -m examples table",
        "make docs",
    ],
)
def test_a_command_that_exists_passes(line):
    pages.check_command(line)


@pytest.mark.parametrize(
    "line",
    [
        "python -m influence explain model.keras photos/ --rong 10",
        "python -m influence exlain model.keras photos/",
        "python -m influence audit model.keras",
        "python -m experiments fig9",
        "python -m experiments fig2 --presets paper",
        "python -m data fetch mnits",
        "python -m examples tables",
        "make documents",
        "influense check model.keras data.npz",
    ],
)
def test_a_command_that_does_not_exist_is_found(line):
    with pytest.raises((ValueError, SystemExit)):
        pages.check_command(line)
