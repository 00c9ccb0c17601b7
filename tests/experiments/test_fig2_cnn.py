"""Tests of Figure 2, right, on a small network.

The predicted and the actual changes of test losses are compared with their definitions.
"""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.linalg

import data
from experiments import fig2_cnn
from experiments.fig2_cnn import STEPS, TRUTHS
from experiments.harness.record import Record
from experiments.harness.running import Misuse
from experiments.shared import mnist_cnn
from influence import Direct, GaussNewton, Hessian, ProximalOptions, prepare, proximal_response

pytestmark = pytest.mark.usefixtures("networks_traced_once")

SMALL = dataclasses.replace(
    fig2_cnn.PRESETS["smoke"], num_train=120, filters=2, strides=(2,), schedule=((150, 1e-2),),
    num_removals=8, further_removals=4, slow_removals=4, double_removals=3, lissa_depth=50,
    continued_steps=20, continued_at=(5, 10), damping=0.05,
)  # fmt: skip


@pytest.fixture(scope="module")
def record(digits, folder):
    return fig2_cnn.run(SMALL, digits, checkpoints=folder)


@pytest.fixture(scope="module")
def trained(digits):
    """Return (net, train, test points). The net is trained as in the run that gave `record`."""
    train, test = mnist_cnn.images(digits, SMALL)
    net = mnist_cnn.network(SMALL, train)
    net.fit(train, schedule=SMALL.schedule, batch_size=SMALL.batch_size)
    return net, train, test.take(SMALL.test_points)


def test_predictions_are_those_of_the_dense_hessian(record, trained):
    net, train, measured = trained
    H = Hessian(net, train, SMALL.damping).dense()
    own = net.gradients(train.x, train.y) + net.penalty_gradient()
    S = scipy.linalg.solve(H, net.gradients(measured.x, measured.y).T)
    expected = (own @ S).T / len(train)
    removed, first = record.arrays["removed"], record.arrays["removals_0"]
    scale = np.abs(expected).max()
    for how, error in (("direct", 1e-8), ("cg", 1e-3)):
        found = record.arrays[f"predicted_{how}"]
        np.testing.assert_allclose(found, expected[:, removed], atol=error * scale)
    assert set(removed[first]) == set(np.argsort(-np.abs(expected[0]))[:8])
    assert len(record.arrays["removals_1"]) == 4
    assert record.metrics["cg_against_direct"] < 1e-4
    values = np.linalg.eigvalsh(H) - SMALL.damping
    assert record.metrics["smallest_eigenvalue"] == pytest.approx(values[0], abs=1e-9)
    assert record.metrics["num_negative_eigenvalues"] == np.count_nonzero(values < -1e-12)


def test_metrics_are_of_the_arrays(record):
    arrays, metrics = record.arrays, record.metrics
    first = arrays["removals_0"]
    predicted = arrays["predicted_cg"][0, first]
    for truth in TRUTHS:
        actual = arrays[f"actual_{truth}"][0, first]
        r = np.corrcoef(predicted, actual)[0, 1]
        assert metrics[f"pearson_{truth}"] == pytest.approx(r, rel=1e-12)
        slope = np.polyfit(actual, predicted, 1)[0]
        assert metrics[f"slope_{truth}"] == pytest.approx(slope, rel=1e-9)
        assert metrics[f"worst_pearson_{truth}"] <= metrics[f"median_pearson_{truth}"]
    named = (name for name in arrays if name.startswith(("predicted_", "actual_")))
    sides = {name.partition("_")[2]: arrays[name] for name in named}
    for i, (one, other, _) in enumerate(STEPS):
        line = np.polyfit(sides[other][0, first], sides[one][0, first], 1)
        r = np.corrcoef(sides[one][0, first], sides[other][0, first])[0, 1]
        assert arrays["step_pearson"][i] == pytest.approx(r, rel=1e-9)
        assert arrays["step_slope"][i] == pytest.approx(line[0], rel=1e-6)
    # Damped influence is the linearisation of the proximal response, so the two correlate.
    assert metrics["pearson_proximal"] > 0.9
    for truth in ("proximal", "bregman"):
        assert arrays[f"{truth}_gradient_norm"].max() <= SMALL.tolerance
        assert metrics[f"{truth}_lost"] == 0
    # The metric is the error of the refits by float32 and by their tolerance. This net is in
    # float64, so only the tolerance causes an error.
    assert metrics["proximal_float32_error"] < 0.05
    assert arrays["drift"].shape == (2,) and (arrays["drift"] != 0).all()
    assert 0 < metrics["slow_spread"] < 0.2 * np.std(arrays["actual_continued"][0, first])


def test_rows_without_a_proximal_minimum_are_left_out_and_counted(trained, monkeypatch):
    net, train, measured = trained
    curvatures = {"leave_one_out": Hessian, "bregman": GaussNewton}
    made = {key: curvature(net, train, SMALL.damping) for key, curvature in curvatures.items()}
    prepared = {key: prepare(A, Direct()) for key, A in made.items()}
    monkeypatch.setattr(fig2_cnn, "_LOST", 1e-4)
    monkeypatch.setattr(fig2_cnn, "_rounding", lambda *a: 0.0)
    removed = np.arange(6)
    rough = dataclasses.replace(SMALL, tolerance=0.5, continued_steps=2, continued_at=(1,))
    changes, found = fig2_cnn.truths(rough, net, train, measured, removed, removed, prepared, None)
    lost = found["proximal_gradient_norm"] > 1e-4
    assert found["proximal_lost"] == np.count_nonzero(lost) > 0
    np.testing.assert_array_equal(np.isnan(changes["proximal"]), np.tile(lost, (2, 1)))


def test_truths_are_the_library_s(record, trained):
    net, train, measured = trained
    rows = record.arrays["removed"][:2]
    how = {"objective": "leave_one_out", "damping": SMALL.damping}
    options = ProximalOptions(tolerance=1e-6)
    response = proximal_response(net, train, measured, rows, options, **how)
    found = record.arrays["actual_proximal"][:, :2]
    np.testing.assert_allclose(found, response[:], atol=0.05 * np.abs(response[:]).max())


def test_an_interrupted_run_ends_with_the_same_numbers(record, digits, folder):
    paths = sorted(folder.glob("refits-*"))  # only stored refits are removed, no other stage
    assert paths
    for path in paths[::2]:
        path.unlink()
    again = fig2_cnn.run(SMALL, digits, checkpoints=folder)
    assert again.metrics == record.metrics
    for name, array in record.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


def test_draw(record):
    shown = Record.of(metrics=record.metrics, arrays=record.arrays)
    figure = fig2_cnn.draw(dataclasses.replace(shown, config=dataclasses.asdict(SMALL)))
    panels = [axis for axis in figure.axes if axis.get_title()]
    titles = list(TRUTHS.values())
    assert panels[0].get_title() == f"{titles[0]}\n(20 steps at 0.001)"
    assert [axis.get_title() for axis in panels[1:]] == titles[1:]
    assert panels[1].get_xlim() == panels[2].get_xlim()
    assert all(axis.get_xlim() == axis.get_ylim() for axis in panels)
    first = record.arrays["removals_0"]
    for axis, truth in zip(panels, TRUTHS, strict=True):
        drawn = np.asarray(axis.collections[0].get_offsets())
        expected = record.arrays[f"actual_{truth}"], record.arrays["predicted_cg"]
        np.testing.assert_allclose(drawn, np.transpose([side[0, first] for side in expected]))
    cells = figure.axes[-1].tables[0].get_celld()
    for i, r in enumerate(record.arrays["step_pearson"], start=1):
        assert cells[i, 2].get_text().get_text() == f"{1 - r:.1e}"
        assert cells[i, 4].get_text().get_text() == str(len(first))
    plt.close(figure)


def test_every_preset_is_judged_by_what_it_computes(record):
    for claim in fig2_cnn.CLAIMS:
        if claim.presets is None or "smoke" in claim.presets:
            assert claim.metric in record.metrics
    assert set(fig2_cnn.PRESETS) == {"smoke", "standard", "tenfold", "paper"}
    tenfold, paper = fig2_cnn.PRESETS["tenfold"], fig2_cnn.PRESETS["paper"]
    wanted = [(steps / 10, 10 * rate) for steps, rate in paper.schedule]
    np.testing.assert_allclose(tenfold.schedule, wanted)
    assert tenfold.continued_steps * 10 == paper.continued_steps
    paper = fig2_cnn.PRESETS["paper"]
    assert sum(steps for steps, _ in paper.schedule) == 500_000
    assert (paper.continued_steps, paper.continued_rate) == (30_000, 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"further_removals": 30}, "num_removals must be at least further_removals"),
        ({"slow_removals": 2}, "slow_removals must lie between 3 and num_removals"),
        ({"damping": 0.0}, "damping must be positive, got 0"),
        ({"further_removals": 1}, "further_removals must be at least 2, got 1"),
        ({"test_points": ()}, "test_points must hold at least one number, got none"),
        ({"test_points": (3, -1)}, r"test_points must be at least 0, got \(3, -1\)"),
        ({"continued_steps": 0}, "continued_steps must be positive, got 0"),
        (
            {"continued_at": (5, 20)},
            r"continued_at must be below continued_steps, 20, got \(5, 20\)",
        ),
        ({"random_removals": 2}, "random_removals must lie between 3 and num_train"),
        ({"dtype": "float16"}, "dtype must be 'float32' or 'float64'"),
    ],
)
def test_config_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_train": 9999}, r"num_train must be at most \d+, the training rows, got 9999"),
        ({"test_points": (3, 9999)}, r"test_points must lie in \[0, \d+\), .* got \(3, 9999\)"),
    ],
)
def test_options_beyond_the_data_are_misuse(options, message):
    with pytest.raises(Misuse, match=message):
        fig2_cnn.run(dataclasses.replace(SMALL, **options), data.load("digits"))
