"""Tests of the hospital experiment: its domain mismatch, the numbers that show it, the figure."""

import dataclasses
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest

import data
from experiments.harness.claims import failed
from experiments.harness.running import Misuse
from experiments.hospital_readmission import claims
from experiments.hospital_readmission import figure as hospital
from experiments.shared.compare import largest_bars
from tests import oracles

SMOKE = hospital.PRESETS["smoke"]
REAL = data.find("diabetes")


@pytest.fixture(scope="module")
def splits():
    return data.load("hospital")


@pytest.fixture(scope="module")
def record(splits, folder):
    return hospital.run(SMOKE, splits, checkpoints=folder)


@pytest.fixture(scope="module")
def closed_form(splits):
    """Return (risk, theta, child): the risk without the removed rows, its minimum, a test child.

    `child` is the risk of this single test row. All are oracles in NumPy.
    """
    x, y = splits.train
    age = splits.feature_names.index("age_[0-10)")
    stays = [i for i in range(len(x)) if x[i, age] and not y[i]]
    kept = [i for i in range(len(x)) if i not in stays[:-1]]
    risk = oracles.logistic_regression(x[kept], y[kept], SMOKE.weight_decay)
    child = risk.on(splits.test[0][[SMOKE.test_child]], splits.test[1][[SMOKE.test_child]])
    return risk, risk.minimum(np.zeros(x.shape[1])), child


def test_every_claim_has_its_metric_and_every_check_passes_on_the_stand_in(record):
    assert failed(hospital, "smoke", record.metrics) == []
    # One claim is about the feature that marks patients who died. The stand-in has this feature
    # too, so its run must give a metric for every claim.
    assert {claim.metric for claim in hospital.CLAIMS} <= set(record.metrics)


def test_twenty_children_are_taken_out_and_most_test_children_flip(record, splits):
    arrays, metrics = record.arrays, record.metrics
    assert metrics["num_train"] == 4000 - 20
    assert metrics["train_children_before"] == 24 and metrics["train_children"] == 4
    assert arrays["readmitted"].sum() == 3 and len(arrays["test_children"]) == 40
    before, after = arrays["probability_correct_before"], arrays["probability_correct"]
    assert before.min() > 0.5
    expected = arrays["test_children"][after < 0.5]
    np.testing.assert_array_equal(arrays["flipped"], expected)
    assert metrics["test_children_flipped"] == len(expected) == 35
    age = splits.feature_names.index("age_[0-10)")
    assert splits.test[0][arrays["flipped"], age].all()


def test_influence_and_refits_are_those_of_the_closed_form(record, closed_form):
    risk, theta, child = closed_form
    arrays = record.arrays
    np.testing.assert_allclose(arrays["coefficients"], theta, atol=1e-7)
    rows = arrays["removed"]
    predicted = risk.predicted_changes(theta, child, rows)[0]
    # The smallest eigenvalue of the Hessian is at least the weight decay, 1e-4. A fit that stops at
    # a gradient norm of 1e-10 therefore leaves an error of at most 1e-10 / 1e-4 = 1e-6 in theta.
    np.testing.assert_allclose(arrays["influence"][rows], predicted, rtol=1e-5)
    some = [0, 1, 2, 3, 40]
    actual = risk.actual_changes(theta, child, rows[some])[0]
    np.testing.assert_allclose(arrays["removed_actual"][some], actual, rtol=1e-4)
    everyone = risk.without(arrays["children"]).minimum(theta)
    together = child.losses(everyone)[0] - child.losses(theta)[0]
    assert abs(record.metrics["all_children_actual"] - together) < 1e-5


def test_derivative_by_the_input_is_the_closed_form_s(record, closed_form):
    risk, theta, child = closed_form
    s_test = np.linalg.solve(risk.hessian(theta), child.gradients(theta)[0])
    expected = -risk.input_gradients(theta, s_test, len(theta)) / len(risk.y)
    children = record.arrays["children"]
    derivative = record.arrays["derivative"]
    np.testing.assert_allclose(derivative, expected[children], rtol=1e-5, atol=1e-8)
    assert record.metrics["worst_derivative_error"] < 1e-5
    by_size = np.argsort(-np.abs(derivative[~record.arrays["readmitted"]][0]))
    assert record.arrays["moved"].tolist() == by_size[:10].tolist()


def test_the_stopped_model_is_the_one_that_stopped(record, splits):
    # The authors' code stops its models after 1,000 iterations. On the stand-in, a model converges
    # in 1,000 iterations, but not in the two iterations of `early`.
    assert record.metrics["stopped_gradient_norm"] < 1e-5
    assert abs(record.metrics["stopped_ratio_to_next"] - record.metrics["ratio_to_next"]) < 1e-2
    early = dataclasses.replace(SMOKE, release_iterations=2, num_removals=4, num_moved_features=1)
    metrics = hospital.run(early, splits).metrics
    assert metrics["stopped_gradient_norm"] > 1e-3 > metrics["gradient_norm"]
    assert abs(metrics["stopped_ratio_to_next"] - metrics["ratio_to_next"]) > 1e-2


def test_figure(record, splits):
    figure = hospital.draw(record)
    rows, children, features, coefficients = figure.axes
    figure.draw_without_rendering()
    arrays = record.arrays
    influence = arrays["stopped_influence"]
    order = np.argsort(influence)
    expected = np.concatenate([influence[order[:10]], influence[order[::-1][:10]]])
    np.testing.assert_array_equal([bar.get_width() for bar in rows.patches], expected)
    reds = [bar.get_facecolor() for bar in rows.patches[:3]]
    assert len(set(reds)) == 1 and reds[0] != rows.patches[5].get_facecolor()
    # The only line is the vertical line at 0. Published values would be a second line.
    assert [len(line.get_xdata()) for line in rows.lines] == [2]
    (drawn,) = [line for line in children.lines if len(line.get_xdata()) == 40]
    np.testing.assert_array_equal(drawn.get_ydata(), arrays["probability_correct"])
    derivative = -3980 * arrays["derivative"][~arrays["readmitted"]][0]
    for axis, values in ((features, derivative), (coefficients, arrays["coefficients"])):
        names = [label.get_text() for label in axis.get_yticklabels()]
        widths = [bar.get_width() for bar in axis.patches]
        order = np.argsort(-np.abs(values))[:20]
        np.testing.assert_allclose(widths, values[order])
        long = np.array(splits.feature_names)[order]
        assert names == [name.replace("_disposition_id", "") for name in long]
        # The bars of the test child's own features have another colour than the others.
        assert len({bar.get_facecolor() for bar in axis.patches}) == 2
    (refitted,) = [line for line in features.lines if line.get_label() == "refitted"]
    np.testing.assert_allclose(refitted.get_xdata(), -3980 * arrays["moved_actual"])
    for axis in figure.axes:
        assert axis.get_xlabel() and min(t.get_fontsize() for t in axis.get_xticklabels()) >= 7
    plt.close(figure)


def _as_published(record):
    """Return the record with the notebook's printed children, probabilities and influences."""
    rows, before, after = claims.published_children().T
    influence = np.zeros(19980)
    influence[list(claims.HARMFUL + claims.HELPFUL)] = claims.INFLUENCES
    named = {"probability_correct_before": before, "probability_correct": after}
    arrays = record.arrays | {"test_children": rows.astype(int), "stopped_influence": influence}
    arrays |= {f"{start}{key}": value for key, value in named.items() for start in ("", "stopped_")}
    data = {"name": "diabetes", "stand_in": False, "sha256": ""}
    return dataclasses.replace(record, arrays=arrays, data=data)


def test_figure_beside_the_notebook(record):
    figure = hospital.draw(_as_published(record))
    rows, children, *_ = figure.axes
    (ticks,) = [line for line in rows.lines if len(line.get_xdata()) == 20]
    np.testing.assert_array_equal(ticks.get_xdata(), [bar.get_width() for bar in rows.patches])
    drawn = [line for line in children.lines if len(line.get_xdata()) == 137]
    assert len(drawn) == 3
    for line in drawn:
        np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    plt.close(figure)


def test_the_printed_numbers_are_whole():
    rows, before, after = claims.published_children().T
    assert len(rows) == 137 and (np.diff(rows) > 0).all() and 1742 in rows
    # These are the means of the notebook's numbers, and its count of wrong predictions.
    assert before.mean() == pytest.approx(0.816, abs=5e-4)
    assert after.mean() == pytest.approx(0.583, abs=5e-4)
    assert (before > 0.5).all() and np.sum(after < 0.5) == 13
    assert len(set(claims.HARMFUL + claims.HELPFUL)) == len(claims.INFLUENCES) == 20


def test_the_comparison_row_by_row_finds_what_differs(record):
    rows, before, after = claims.published_children().T
    seen = SimpleNamespace(test_children=rows.astype(int))
    influence = np.zeros(19980)
    influence[list(claims.HARMFUL + claims.HELPFUL)] = claims.INFLUENCES
    arrays = {"probability_correct_before": before, "probability_correct": after.copy()}
    found = hospital._beside_the_notebook(seen, arrays, influence)
    assert found == {
        "worst_probability_before": 0, "worst_probability": 0, "published_flips_among_ours": 13,
        "published_harmful_in_place": 10, "published_helpful_in_place": 10,
        "worst_printed_influence": 0,
    }  # fmt: skip
    arrays["probability_correct"][after.argmin()] = 0.6
    influence[claims.HARMFUL[1]] *= 1.5  # the second most harmful row becomes the most harmful
    found = hospital._beside_the_notebook(seen, arrays, influence)
    assert found["published_flips_among_ours"] == 12
    assert found["worst_probability"] == pytest.approx(0.6 / after.min() - 1)
    assert found["published_harmful_in_place"] == 8 and found["published_helpful_in_place"] == 10
    assert found["worst_printed_influence"] == pytest.approx(0.5)


def test_bars_need_not_hold_the_marked_one():
    figure, axis = plt.subplots()
    names, values = np.array(["a", "b", "c", "d"]), np.array([0.5, -3.0, 0.1, 2.0])
    assert largest_bars(axis, names, values, marked="c", count=3).tolist() == [1, 3, 0]
    assert [bar.get_width() for bar in axis.patches] == [-3.0, 2.0, 0.5]
    assert len({bar.get_facecolor() for bar in axis.patches}) == 1
    # The axis is inverted, so the largest bar is on top.
    assert axis.get_ylim()[0] > axis.get_ylim()[1]
    plt.close(figure)


@pytest.mark.parametrize("name, value", [("num_removals", 3), ("num_moved_features", 0)])
def test_config_refuses(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be at least {value + 1}, got {value}"):
        hospital.Config(**{name: value})


def test_the_test_child_must_be_one(splits):
    with pytest.raises(ValueError, match="^test_child must be .* such as 13, got 14"):
        hospital.run(dataclasses.replace(SMOKE, test_child=14), splits)


@pytest.mark.parametrize("name", ["num_removals", "num_moved_features"])
def test_options_beyond_the_data_are_misuse(splits, name):
    with pytest.raises(Misuse, match=rf"^{name} must be at most \d+, the .*, got 99999"):
        hospital.run(dataclasses.replace(SMOKE, **{name: 99_999}), splits)


@pytest.mark.real_data
@pytest.mark.skipif(REAL is None, reason="diabetes not found; set INFLUENCE_DATA")
def test_real_children_are_found():
    config = hospital.Config(num_removals=4, num_moved_features=1, release_iterations=5)
    record = hospital.run(config, data.load("diabetes", REAL))
    arrays, metrics = record.arrays, record.metrics
    assert arrays["children"].tolist() == [9366, 11116, 13685, 19590]
    assert sorted(arrays["removed"]) == [9366, 11116, 13685, 19590]
    signs = np.sign(arrays["influence"][arrays["children"]]).tolist()
    assert signs == np.sign(arrays["removed_actual"][np.argsort(arrays["removed"])]).tolist()
    assert signs == [-1, -1, -1, 1]
    assert metrics["num_features"] == 127 and metrics["test_children"] == 137
    assert metrics["test_children_flipped"] == 30 and 1742 in arrays["flipped"]
    assert 24 < metrics["ratio_to_next"] < 25 and metrics["coefficients_larger"] == 12
