"""The committed results, and the README's table of them."""

import re
from pathlib import Path

import keras
import numpy as np
import pytest

from experiments import report

ROOT = Path(__file__).resolve().parents[2]
README, RESULTS = ROOT / "README.md", ROOT / "results"
needs_results = pytest.mark.skipif(not RESULTS.is_dir(), reason="no results/ yet")


@needs_results
def test_readme_says_what_the_records_say():
    text = README.read_text(encoding="utf-8") if README.is_file() else ""
    if report.BEGIN not in text:
        pytest.skip(f"README.md has no {report.BEGIN} yet")
    assert text == report.with_table(text, RESULTS), "README.md is out of date: run `make readme`"


def test_the_attack_in_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "poison(" in block]
    keras.utils.set_random_seed(0)
    names = {}
    exec(block, names)
    found, x = names["found"], names["train"].x
    assert found.same_bytes.all() and (found.change_if_poisoned > 0).all()
    assert found.flipped.all()
    moved = np.abs(found.inputs - x[found.rows]).max() / (1 / 255)
    assert 0.9 < moved < 1  # pixels are what was moved


@needs_results
def test_results_are_small_and_of_real_data():
    for folder, record in report.read_all(RESULTS):
        assert not record.data["stand_in"], folder
        assert sum(path.stat().st_size for path in folder.rglob("*")) <= 2_000_000, folder
        assert (folder / report.FIGURE).is_file(), folder
