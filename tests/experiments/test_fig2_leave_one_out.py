"""Tests of Figure 2: the smoke run against NumPy and a refit from scratch, and the figure."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import fig2_leave_one_out as fig2
from influence import Examples, MulticlassLogisticRegression

SMOKE = dataclasses.replace(fig2.PRESETS["smoke"], further_test_points=1, num_removals=50)


@pytest.fixture(scope="module")
def record(digits, folder):
    return fig2.run(SMOKE, digits, checkpoints=folder)


def slope(actual, predicted):
    return np.polyfit(actual, predicted, 1)[0]


def test_influence_predicts_what_refits_say(record):
    metrics, arrays = record.metrics, record.arrays
    actual, predicted = arrays["actual"], arrays["predicted_cg"]
    assert actual.shape == predicted.shape == arrays["rows"].shape == (50,)
    r = np.corrcoef(actual, predicted)[0, 1]
    assert metrics["pearson_cg"] == pytest.approx(r, rel=1e-12) and r > 0.9999
    assert metrics["slope_cg"] == pytest.approx(slope(actual, predicted), rel=1e-9)
    # The slope is below 1: first order predicts too small a change, because it ignores the
    # curvature that a removed row takes away. This is a large part for the few rows of the digits.
    assert 0.95 < metrics["slope_cg"] < 1
    assert metrics["sign_agreement_cg"] == 1
    assert (metrics["smallest_actual"], metrics["largest_actual"]) == (actual.min(), actual.max())
    assert metrics["cg_against_direct"] < 1e-6
    assert metrics["worst_refit_gradient_norm"] <= SMOKE.gradient_tolerance
    assert (np.diff(np.abs(predicted)) <= 0).all()  # the rows are sorted by size, the largest first


def test_lissa_s_numbers_are_of_its_arrays(record):
    metrics, arrays = record.metrics, record.arrays
    actual, by_seed = arrays["actual"], arrays["predicted_lissa"]
    assert by_seed.shape == (2, 50) and (by_seed[0] != by_seed[1]).any()
    r = [np.corrcoef(actual, predicted)[0, 1] for predicted in by_seed]
    assert metrics["lissa_worst_pearson"] == pytest.approx(min(r), rel=1e-12) and min(r) > 0.99
    assert metrics["lissa_median_pearson"] == pytest.approx(np.median(r), rel=1e-12)
    slopes = np.array([slope(actual, predicted) for predicted in by_seed])
    assert metrics["lissa_median_slope"] == pytest.approx(np.median(slopes), rel=1e-9)
    worst = slopes[np.abs(slopes - 1).argmax()]
    assert metrics["lissa_worst_slope"] == pytest.approx(worst, rel=1e-9)
    assert abs(worst - 1) < 0.1


def test_further_test_points(record):
    arrays = record.arrays
    assert arrays["test_points"][0] == 11 and len(arrays["test_points"]) == 2
    actual, predicted = arrays["further_actual"][0], arrays["further_predicted_cg"][0]
    r = np.corrcoef(actual, predicted)[0, 1]
    assert len(actual) == 20 and r > 0.999
    assert record.metrics["further_worst_pearson"] == pytest.approx(r, rel=1e-12)
    intercept = np.polyfit(actual, predicted, 1)[1]
    assert record.metrics["further_worst_intercept"] == pytest.approx(intercept, rel=1e-6)


def test_a_refit_from_scratch_says_the_same(record, digits):
    train, test = Examples(*digits.train), Examples(*digits.test)
    losses = []
    for some in (train, train.without(record.arrays["rows"][:1])):
        net = MulticlassLogisticRegression(train.x.shape[1], 10, weight_decay=SMOKE.weight_decay)
        net.fit(some)
        losses.append(net.losses(test.x[11:12], test.y[11:12])[0])
    assert record.arrays["actual"][0] == pytest.approx(losses[1] - losses[0], rel=1e-6)


def test_one_newton_step_is_nearer_to_refits_than_first_order(record):
    metrics, arrays = record.metrics, record.arrays
    stepped, actual = arrays["predicted_one_step"], arrays["actual"][:40]
    errors = [np.abs(predicted - actual) for predicted in (stepped, arrays["predicted_cg"][:40])]
    assert len(stepped) == 40 and errors[0].max() < errors[1].max() / 4
    largest = errors[0].max() / np.abs(actual).max()
    assert metrics["largest_error_one_step"] == pytest.approx(largest, rel=1e-9)
    assert metrics["slope_one_step"] == pytest.approx(slope(actual, stepped), rel=1e-9)
    assert metrics["pearson_one_step"] > metrics["pearson_cg"]


def test_every_claim_is_of_a_metric(record):
    assert {claim.metric for claim in fig2.CLAIMS} <= record.metrics.keys()


def test_draw(record):
    figure = fig2.draw(record)
    figure.canvas.draw()
    arrays = record.arrays
    runs = arrays["predicted_lissa"]
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [
        "Conjugate gradients", f"LiSSA (median of {len(runs)} seeds)", "The 40 largest rows"
    ]  # fmt: skip
    seeds = sorted(runs, key=lambda run: np.corrcoef(run, arrays["actual"])[0, 1])
    predictions = arrays["predicted_cg"], seeds[len(seeds) // 2]
    for axis, predicted in zip(figure.axes, predictions, strict=False):
        points = np.asarray(axis.collections[0].get_offsets())
        np.testing.assert_allclose(points, np.column_stack([arrays["actual"], predicted]))
        assert axis.get_aspect() == 1 and axis.get_xlim() == axis.get_ylim()
        (line,) = axis.lines
        np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
        assert np.abs(points).max() < line.get_xdata()[-1]
        assert axis.get_xlabel() == "Actual change in loss (nats)"
        r = np.corrcoef(*points.T)[0, 1]
        shown = float(axis.texts[0].get_text().removeprefix("r = "))
        assert abs(r - shown) <= 5e-4  # r is shown with three decimals
    assert figure.axes[0].get_ylabel() == "Predicted change in loss (nats)"
    errors = figure.axes[2]
    first, step = (np.asarray(dots.get_offsets())[:, 1] for dots in errors.collections)
    actual = arrays["actual"][:40]
    np.testing.assert_allclose(first, 1e4 * (arrays["predicted_cg"][:40] - actual))
    np.testing.assert_allclose(step, 1e4 * (arrays["predicted_one_step"] - actual))
    texts = [text.get_text() for text in errors.get_legend().get_texts()]
    assert f"slope {record.metrics['slope_one_step']:.4f}" in texts[1]
    plt.close(figure)
