from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import figure2

RESULTS = Path(__file__).parents[2] / "results"


def test_the_three_panels_are_those_of_the_records():
    found = figure2.records(RESULTS)
    assert found is not None
    linear, network = found
    figure = figure2.draw(linear, network)
    a, b, c = figure.axes
    points = a.collections[0].get_offsets()
    np.testing.assert_array_equal(points[:, 0], linear.arrays["actual"])
    np.testing.assert_array_equal(points[:, 1], linear.arrays["predicted_cg"])
    first = network.arrays["removals_0"]
    true = network.arrays["actual_continued"][0, first]
    predicted = network.arrays["predicted_cg"][0, first]
    points = c.collections[0].get_offsets()
    np.testing.assert_array_equal(points, np.column_stack([true, predicted]))
    assert c.get_xlim() == c.get_ylim() == (-0.05, 0.05)
    beyond = np.sum(np.maximum(np.abs(true), np.abs(predicted)) > 0.05)
    assert c.texts[-1].get_text() == f"{beyond} beyond the axes"
    r = np.corrcoef(true, predicted)[0, 1]
    assert any(text.get_text().startswith(f"r = {r:.2f}\n") for text in c.texts)
    median = sorted(
        np.corrcoef(run, linear.arrays["actual"])[0, 1] for run in linear.arrays["predicted_lissa"]
    )[2]
    drawn = b.collections[0].get_offsets()
    assert np.corrcoef(drawn.T)[0, 1] == pytest.approx(median)
    plt.close(figure)


def test_without_a_record_there_is_no_figure(tmp_path):
    assert figure2.records(tmp_path) is None
