"""Tests of Figure 3: the run on the stand-in, refits against LinearSVC, and the figure."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.svm import LinearSVC

import data
from experiments import fig3_smooth_hinge as fig3
from experiments.harness.claims import failed
from experiments.harness.record import Record
from experiments.harness.running import Misuse

SMOKE = fig3.PRESETS["smoke"]


@pytest.fixture(scope="module")
def record():
    result = fig3.run(SMOKE, data.load("digits"))
    return dataclasses.replace(result, config=dataclasses.asdict(SMOKE))


@pytest.fixture(scope="module")
def rows():
    """Return x, y, test x and test y of the smoke preset, with labels -1 and 1."""
    x, y = data.load("digits").train
    chosen = np.isin(y, (1, 7))
    u, v = data.load("digits").test
    tested = np.isin(v, (1, 7))
    sign = lambda labels: np.where(labels == 1, 1, -1)  # noqa: E731
    return x[chosen][:260], sign(y[chosen])[:260], u[tested][:90], sign(v[tested])[:90]


def svm(x, y, weight_decay):
    C = 1 / (len(y) * weight_decay)
    return (
        LinearSVC(loss="hinge", C=C, tol=1e-9, max_iter=10**6, fit_intercept=False, random_state=0)
        .fit(x, y)
        .coef_[0]
    )


def test_smoke(record):
    metrics, arrays = record.metrics, record.arrays
    assert metrics["num_train"] == 260 and metrics["num_test"] == 90
    assert metrics["worst_refit_gradient_norm"] <= 1e-8
    assert metrics["worst_error_of_actual"] < 1e-6 < metrics["median_size_of_actual"]
    assert metrics["pearson_t0.001"] > 0.8 > metrics["pearson_t0"]
    assert metrics["lead_of_t0.001_over_t0.1"] == pytest.approx(
        metrics["pearson_t0.001"] - metrics["pearson_t0.1"], abs=1e-12
    )
    assert metrics["overshoot_t0"] > 8 > 1.5 > metrics["overshoot_t0.001"]
    assert arrays["t"].tolist() == [0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]
    assert arrays["predicted"].shape == (7, 40) and arrays["pearson"].shape == (7, 4)
    for k, t in enumerate(arrays["t"]):
        expected = np.corrcoef(arrays["predicted"][k], arrays["actual"])[0, 1]
        assert arrays["pearson"][k, 0] == pytest.approx(expected, rel=1e-12)
        if t in (0, 0.001, 0.1):
            assert metrics[f"pearson_t{t:g}"] == pytest.approx(expected, rel=1e-12)
    assert {claim.metric for claim in fig3.CLAIMS} <= metrics.keys()
    assert failed(fig3, "smoke", metrics) == []
    actual, predicted = arrays["actual"], arrays["predicted"][5]
    assert metrics["actual_beyond_papers_axes"] == np.sum(np.abs(actual) > 0.025) > 0
    inside = np.abs(actual) <= 0.025
    expected = np.corrcoef(actual[inside], predicted[inside])[0, 1]
    assert metrics["pearson_inside_papers_axes_t0.1"] == pytest.approx(expected, rel=1e-12)


def test_actual_changes_are_those_of_linear_svc(record, rows):
    x, y, u, v = rows
    hinge = lambda w: np.maximum(0, 1 - v[point] * (u[point] @ w))  # noqa: E731
    point = SMOKE.test_point
    before = hinge(svm(x, y, SMOKE.weight_decay))
    for k in (0, 7, 39):
        row = record.arrays["rows"][k]
        after = hinge(svm(np.delete(x, row, axis=0), np.delete(y, row), SMOKE.weight_decay))
        assert record.arrays["actual"][k] == pytest.approx(after - before, abs=1e-7)


def test_without_curvature_only_the_penalty_is_inverted(record, rows):
    # At t = 0 the hinge has no curvature, so H = lambda I. With the gradients g of the test loss
    # and h_i of training loss i, the prediction is g' (h_i + lambda w) / (n lambda).
    x, y, u, v = rows
    w = svm(x, y, SMOKE.weight_decay)
    margins = y * (x @ w)
    slopes = np.where(np.abs(margins - 1) < 1e-5, 0.5, margins < 1)
    h = -(slopes * y)[:, None] * x
    g = -v[SMOKE.test_point] * u[SMOKE.test_point]
    predicted = (h @ g / SMOKE.weight_decay + w @ g) / len(y)
    chosen = record.arrays["rows"]
    np.testing.assert_allclose(record.arrays["predicted"][0], predicted[chosen], atol=1e-7)
    assert np.sort(np.abs(predicted))[-40] == pytest.approx(np.abs(predicted[chosen]).min())
    assert record.metrics["rows_on_kink"] == np.sum(np.abs(margins - 1) < 1e-5) > 0


def test_test_points_are_of_small_margin(record, rows):
    x, y, u, v = rows
    margins = v * (u @ svm(x, y, SMOKE.weight_decay))
    points = record.arrays["test_points"]
    assert points[0] == SMOKE.test_point and len(set(points)) == 4
    assert set(points[1:]) <= set(np.argsort(margins)[: SMOKE.further_among])
    np.testing.assert_allclose(record.arrays["test_margins"], margins[points], atol=1e-7)
    rank = record.metrics["test_margin_rank"]
    assert np.argsort(margins)[int(rank) - 1] == SMOKE.test_point


def test_a_margin_beyond_the_kink_is_refused():
    with pytest.raises(Misuse, match=r"below 1, .* for test point 1"):
        fig3.run(dataclasses.replace(SMOKE, test_point=1), data.load("digits"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"multiple": 0}, "multiple must be at least 1, got 0"),
        ({"num_removals": 1}, "num_removals must be at least 2, got 1"),
        ({"weight_decay": -1.0}, "weight_decay must be positive, got -1"),
        ({"further_test_points": 0}, "further_test_points must be at least 1, got 0"),
        ({"smooth": (0.1, 0.0)}, r"smooth must be positive, got \(0\.1, 0\.0\)"),
        ({"sweep": ()}, "sweep must hold at least one number, got none"),
        ({"further_among": 3}, "further_among must be at least 4, got 3"),
    ],
)
def test_config_is_checked(changed, message):
    with pytest.raises(Misuse, match=message):
        dataclasses.replace(SMOKE, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"multiple": 500}, r"multiple must be at most \d+, the rows, got 500"),
        ({"test_point": 100_000}, r"test_point must lie in \[0, \d+\), the test rows, got 100000"),
        ({"further_among": 999}, r"further_among must be at most \d+, the test rows, got 999"),
        ({"num_removals": 999}, r"num_removals must be at most \d+, the training rows, got 999"),
    ],
)
def test_options_beyond_the_data_are_misuse(changed, message):
    with pytest.raises(Misuse, match=message):
        fig3.run(dataclasses.replace(SMOKE, **changed), data.load("digits"))


def test_draw(record):
    seen = Record.of(metrics=record.metrics, arrays=record.arrays)
    figure = fig3.draw(dataclasses.replace(seen, config=record.config))
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["Hinge, t = 0", "SmoothHinge, t = 0.001", "SmoothHinge, t = 0.1",
                      "The losses", "Predicted and actual, over t"]  # fmt: skip
    for axis, k in zip(figure.axes, (0, 3, 5), strict=False):
        drawn = np.asarray(axis.collections[0].get_offsets())
        assert axis.get_xlim()[1] >= np.abs(drawn[:, 0]).max()
        assert axis.get_ylim()[1] >= np.abs(drawn[:, 1]).max()
        # There are no published values for a stand-in.
        assert "published" not in axis.texts[0].get_text()
        expected = np.column_stack([record.arrays["actual"], record.arrays["predicted"][k]])
        np.testing.assert_allclose(drawn, expected)
    # At margin s = 1 the hinge is zero, and the smooth hinge is t log 2.
    at_one = [np.interp(1.0, *line.get_data()) for line in figure.axes[3].lines]
    expected = np.array([0, 1e-3, 0.01, 0.1]) * np.log(2)
    np.testing.assert_allclose(at_one, expected, atol=1e-15)
    plt.close(figure)


def test_draw_beside_the_published_values(record):
    real = dataclasses.replace(record, data={"name": "mnist", "stand_in": False, "sha256": ""})
    figure = fig3.draw(real)
    said = [axis.texts[0].get_text() for axis in figure.axes[:3]]
    assert [text.split("\n")[1] for text in said] == [
        "published 0.63", "published 0.95", "published 0.91"
    ]  # fmt: skip
    for axis in figure.axes[:3]:
        ends = [line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == ":"]
        assert ends == [-0.025, 0.025]
    plt.close(figure)


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.skipif(data.find("mnist") is None, reason="mnist not found: set INFLUENCE_DATA")
def test_ones_and_sevens_of_mnist():
    config = fig3.Config(num_removals=30, further_test_points=1, sweep=(1e-3,))
    metrics = fig3.run(config, data.load("mnist")).metrics
    assert metrics["num_train"] == 11_800 and metrics["num_test"] == 2_100
    assert metrics["test_margin"] == pytest.approx(-0.974857, abs=1e-6)
    assert metrics["test_margin_rank"] == 4
    assert metrics["rows_on_kink"] == 63
    assert metrics["worst_refit_gradient_norm"] < 1e-8
    assert 1e-10 < metrics["liblinear_duality_gap"] < 1e-8
    assert metrics["pearson_t0.001"] > metrics["pearson_t0.1"] > metrics["pearson_t0"]
    assert metrics["pearson_t0.001"] > 0.93
    assert metrics["overshoot_t0"] > 8
