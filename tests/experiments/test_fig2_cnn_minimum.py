"""Tests of Figure 2, right, for a small network at a minimum of its risk.

The run with its refits is compared with dense matrices, and an interrupted run with a whole one.
"""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments import fig2_cnn_minimum
from experiments.harness.record import Record
from influence import proximal_response

pytestmark = pytest.mark.usefixtures("networks_traced_once")

SMOKE = fig2_cnn_minimum.PRESETS["smoke"]


@pytest.fixture(scope="module")
def refitted_from():
    """Return a list that collects the net's gradient norm at the start of each set of refits."""
    return []


@pytest.fixture(scope="module")
def converged(digits, folder, refitted_from):
    def response(net, train, *arguments, **options):
        refitted_from.append(net.gradient_norm(train))
        return proximal_response(net, train, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fig2_cnn_minimum, "proximal_response", response)
        return fig2_cnn_minimum.run(SMOKE, digits, checkpoints=folder)


def test_at_a_minimum_influence_is_what_refits_say(converged, refitted_from):
    arrays, metrics = converged.arrays, converged.metrics
    assert metrics["gradient_norm"] <= 1e-6 and metrics["num_negative_eigenvalues"] == 0
    assert metrics["risk"] == arrays["risk"][-1] < arrays["risk"][0]
    assert metrics["refits_unconverged"] == 0 and metrics["refit_gradient_norm"] <= 1e-6
    for how in ("cg", "gauss_newton", "damped", "lissa"):
        assert arrays[f"predicted_{how}"].shape == arrays["predicted_minimum"].shape
    predicted = arrays["predicted_minimum"]
    atol = 1e-4 * np.abs(predicted).max()
    np.testing.assert_allclose(arrays["predicted_cg"], predicted, atol=atol)
    assert arrays["step_pearson"][-2] == pytest.approx(metrics["pearson_minimum"], rel=1e-12)
    first = arrays["removals_0"]
    r = np.corrcoef(predicted[0, first], arrays["actual_minimum"][0, first])
    assert metrics["pearson_minimum"] == pytest.approx(r[0, 1], rel=1e-12)
    assert metrics["pearson_minimum"] > 0.9
    part, first = arrays["actual_part"], first[: SMOKE.further_removals]
    assert np.isfinite(part[:, first]).all() and metrics["parts_unconverged"] == 0
    assert np.isnan(np.delete(part, first, axis=1)).all()
    actual = part, arrays["actual_minimum"]
    lost = [np.abs(predicted - one)[0, first].max() for one in actual]
    # The refits of `part` remove a tenth of a row's weight, and their change is multiplied by ten.
    # The error of first order is then about a tenth of its error for the removal of whole rows.
    assert lost[0] < 0.2 * lost[1]
    assert metrics["slope_part"] == pytest.approx(1, abs=0.05)
    num = len(arrays["removed"])
    assert arrays["refit_distance"].shape == arrays["refit_passes"].shape == (num,)
    assert (arrays["refit_passes"] > 0).all() and (arrays["refit_distance"] > 1e-4).all()
    # Both sets of refits start at the theta whose gradient norm the record reports.
    assert refitted_from == [metrics["gradient_norm"]] * 2


def test_an_interrupted_run_ends_with_the_same_numbers(converged, digits, folder):
    for kind in ("refits", "descent"):  # the other stages are already finished
        paths = sorted(folder.glob(f"{kind}-*"))
        assert paths
        for path in paths[::2]:
            path.unlink()
    again = fig2_cnn_minimum.run(SMOKE, digits, checkpoints=folder)
    assert again.metrics == converged.metrics
    for name, array in converged.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


def test_draw(converged):
    some = dict(converged.arrays)
    some["actual_minimum"] = some["actual_minimum"].copy()
    some["actual_minimum"][0, some["removals_0"][0]] = np.nan
    metrics = converged.metrics | {"parts_unconverged": 2}
    figure = fig2_cnn_minimum.draw(Record.of(metrics=metrics, arrays=some))
    *_, part, last = (axis for axis in figure.axes if axis.get_title())
    num = len(some["removals_0"])
    assert last.texts[0].get_text().endswith(f"{num - 1} rows\n1 left out")
    assert len(last.collections[0].get_offsets()) == num - 1
    assert part.texts[0].get_text().endswith(f"{SMOKE.further_removals} rows\n2 left out")
    cells = figure.axes[-1].tables[0].get_celld()
    shown = [cells[i, 4].get_text().get_text() for i in range(1, len(fig2_cnn_minimum.STEPS) + 1)]
    few = SMOKE.further_removals
    assert shown == [str(known) for known in [num] * 4 + [few, few - 1] + [num - 1] * 2]
    plt.close(figure)
    figure = fig2_cnn_minimum.draw(Record.of(metrics=converged.metrics, arrays=converged.arrays))
    way, part, whole = (axis for axis in figure.axes if axis.get_title())
    np.testing.assert_allclose(way.lines[0].get_ydata(), converged.arrays["gradient_norm"])
    for axis, name in ((part, "actual_part"), (whole, "actual_minimum")):
        drawn = np.asarray(axis.collections[0].get_offsets())
        expected = converged.arrays[name], converged.arrays["predicted_minimum"]
        rows = converged.arrays["removals_0"]
        points = np.transpose([one[0, rows] for one in expected])
        np.testing.assert_allclose(drawn, points[np.isfinite(points).all(axis=1)])
    plt.close(figure)


def test_presets_and_claims(converged):
    assert {claim.metric for claim in fig2_cnn_minimum.CLAIMS} <= converged.metrics.keys()
    assert set(fig2_cnn_minimum.PRESETS) == {"smoke", "standard"}
    standard = fig2_cnn_minimum.PRESETS["standard"]
    assert standard.rounds == 12 and sum(steps for steps, _ in standard.schedule) == 20_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minimum_damping": 0.0}, "minimum_damping must be positive, got 0"),
        ({"rounds": -1}, "rounds must be at least 0, got -1"),
        ({"further_removals": 9}, "num_removals must be at least further_removals"),
    ],
)
def test_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **options)


def test_remarks_name_the_rows_left_out_and_the_effect_of_own_curvature():
    predicted = np.array([0.1, -0.4, 0.3, -0.2, 0.26])
    # Removing row i removes the share own[i] of the curvature, so its change is 1 / (1 - own[i])
    # times the prediction.
    own = np.array([0.6, 0.1, 0.5, 0.4, 0.2])
    actual = predicted / (1 - own)
    actual[2] = np.nan
    arrays = {
        "test_points": np.array([7, 8]),
        "removals_0": np.arange(5),
        "predicted_minimum": predicted[None],
        "actual_minimum": actual[None],
        "actual_part": (predicted / (1 - 0.1 * own))[None],
    }
    out, why = fig2_cnn_minimum.remarks(Record(arrays=arrays))
    assert out.startswith("Who is left out: 1 of the 5 rows of test point 7 ")
    assert "they have the place 2. Their mean |predicted change| is 0.300 nats" in out
    # The row at place 2 has no refit. The mean |prediction| of the others is (0.1 + 0.4 + 0.2 +
    # 0.26) / 4 = 0.24.
    assert "that of the others 0.240 nats" in out
    rest = np.isfinite(actual)
    r = np.corrcoef(predicted[rest], actual[rest])[0, 1]
    assert f"over the same 4 rows goes from {r:.3f} to 1.000" in why and "to 1.00." in why
