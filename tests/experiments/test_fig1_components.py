"""Tests of Figure 1: the four variants against closed forms, and the run on the stand-in."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest

import data
from experiments import fig1_components as fig1
from experiments.harness.claims import failed
from experiments.harness.record import Record
from experiments.harness.running import Misuse
from influence import Direct, Influence
from tests.influence.problems import logistic, relative_error


@pytest.fixture(scope="module")
def record():
    config = fig1.PRESETS["smoke"]
    result = fig1.run(config, data.load("digits"))
    return dataclasses.replace(result, config=dataclasses.asdict(config))


def test_variants_are_their_closed_forms():
    p = logistic("sigmoid")
    influence = Influence(p.net, p.train, solver=Direct(), approximation="first_order")
    full, no_train_loss, no_hessian, neither = fig1.variants(influence, p.test)
    g = p.measured.gradients(p.theta)  # (m, d)
    s_test = np.linalg.solve(p.oracle.hessian(p.theta), g.T).T
    own = p.oracle.gradients(p.theta) + p.net.weight_decay * p.theta
    # The gradient of the loss is (p - y) x, where p is the probability of class 1. Its size |p - y|
    # is large for rows with a large loss. The variant `no_train_loss` replaces this size by 1.
    signed = np.where(p.train.y == 1, -1, 1)[:, None] * p.train.x
    assert relative_error(full, s_test @ own.T) < 1e-10
    assert relative_error(no_train_loss, s_test @ signed.T) < 1e-10
    assert relative_error(no_hessian, g @ own.T) < 1e-10
    assert relative_error(neither, g @ signed.T) < 1e-10


def test_full_variant_is_the_change_of_a_refit():
    p = logistic("sigmoid", num_rows=400)
    full = fig1.variants(Influence(p.net, p.train, solver=Direct()), p.test)[0]
    actual = 400 * p.oracle.actual_changes(p.theta, p.measured, [5, 100])
    # Influence is first order in 1 / n, so its relative error is of order 1 / n, with n = 400.
    assert relative_error(full[:, [5, 100]], actual) < 0.03


def test_smoke(record):
    metrics, arrays = record.metrics, record.arrays
    assert metrics["num_train"] == 265 and metrics["num_test"] == 96
    assert metrics["test_digit"] == 7
    # Without H^-1, the part of a score that comes from the losses is a factor times the inner
    # product of two images. This product is not negative, because no pixel is. The factor is
    # positive if the labels are equal and negative if they differ.
    assert metrics["label_sign_no_hessian"] == 1
    assert metrics["further_lowest_label_sign_no_hessian"] == 1
    assert metrics["worst_refit_gradient_norm"] <= 1e-8
    assert metrics["actual_pearson_full"] > 0.99
    assert metrics["actual_pearson_full"] > metrics["actual_pearson_best_ablation"] + 0.1
    assert 0.8 < metrics["actual_slope_full"] < 1.1
    assert metrics["further_fewest_same_label_among_most_harmful"] >= 1
    assert arrays["values"].shape == (4, 265) and arrays["pearson"].shape == (4, 21)
    np.testing.assert_allclose(arrays["pearson"][0], 1)
    for k, name in enumerate(fig1.VARIANTS[1:], start=1):
        expected = np.corrcoef(arrays["values"][k], arrays["values"][0])[0, 1]
        assert metrics[f"pearson_{name}"] == pytest.approx(expected, rel=1e-12)
        assert arrays["pearson"][k, 0] == pytest.approx(expected, rel=1e-12)
    assert set(np.argsort(-np.abs(arrays["values"][2]))[:20]) <= set(arrays["rows"])
    assert metrics["num_removed"] == len(arrays["rows"]) == len(arrays["actual"]) < 80
    assert {claim.metric for claim in fig1.CLAIMS} <= metrics.keys()
    assert failed(fig1, "smoke", metrics) == []


def test_shown_image_is_the_fifth_most_harmful_of_its_label(record):
    full, same = record.arrays["values"][0], record.arrays["same_label"]
    row = int(record.metrics["shown_row"])
    assert same[row] and full[row] < 0
    assert np.sum(full[same] < full[row]) == 4
    train = data.load("digits").of_classes(7, 1).train
    np.testing.assert_array_equal(record.arrays["harmful_image"].ravel(), train[0][row])
    assert train[1][row] == 0


def test_draw(record):
    figure = fig1.draw(Record.of(metrics=record.metrics, arrays=record.arrays))
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["Without training loss", "Without $H^{-1}$", "Without either",
                      "Test image: a 7", "A 7 that harms it", "Removed and refitted"]  # fmt: skip
    for k in (1, 2, 3):
        drawn = np.sort(np.asarray(figure.axes[k - 1].collections[0].get_offsets()), axis=0)
        expected = np.sort(record.arrays["values"][[k, 0]].T, axis=0)
        np.testing.assert_allclose(drawn, expected)
    image = figure.axes[3].images[0].get_array()
    np.testing.assert_array_equal(image, record.arrays["test_image"])
    plt.close(figure)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shown_rank": 0}, "shown_rank must be at least 1, got 0"),
        ({"further_test_points": 0}, "further_test_points must be at least 1, got 0"),
        ({"num_removals": 1}, "num_removals must be at least 2, got 1"),
        ({"weight_decay": 0.0}, "weight_decay must be positive, got 0"),
    ],
)
def test_config_is_checked(changed, message):
    with pytest.raises(Misuse, match=message):
        dataclasses.replace(fig1.PRESETS["smoke"], **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"test_point": -1}, r"test_point must lie in \[0, \d+\), the test rows, got -1"),
        ({"further_test_points": 999}, r"further_test_points must be at most \d+, .* got 999"),
        ({"num_removals": 999}, r"num_removals must be at most \d+, the training rows, got 999"),
    ],
)
def test_options_beyond_the_data_are_misuse(changed, message):
    with pytest.raises(Misuse, match=message):
        fig1.run(dataclasses.replace(fig1.PRESETS["smoke"], **changed), data.load("digits"))


def test_a_rank_beyond_the_harmful_rows_is_refused():
    config = dataclasses.replace(fig1.PRESETS["smoke"], shown_rank=130)
    with pytest.raises(Misuse, match=r"shown_rank must be at most \d+, .* got 130"):
        fig1.run(config, data.load("digits"))


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.skipif(data.find("mnist") is None, reason="mnist not found: set INFLUENCE_DATA")
def test_ones_and_sevens_of_mnist():
    config = fig1.Config(further_test_points=5, num_removals=5)
    metrics = fig1.run(config, data.load("mnist")).metrics
    assert metrics["num_train"] == 11_894 and metrics["num_test"] == 2_163
    assert metrics["test_digit"] == 7
    assert metrics["largest_no_train_loss"] == pytest.approx(198.36, abs=0.1)
    assert metrics["smallest_full"] == pytest.approx(-56.48, abs=0.05)
    assert metrics["same_label_among_most_harmful"] == 28
    assert metrics["label_sign_no_hessian"] == 1
    assert metrics["label_sign_no_hessian_with_penalty"] == pytest.approx(0.948, abs=0.001)
