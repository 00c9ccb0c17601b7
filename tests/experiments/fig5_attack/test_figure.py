"""Tests of Figure 5: the run on the stand-in, the options that it refuses, and its figures."""

import dataclasses
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy.stats import binomtest

from experiments.fig5_attack import figure as fig5
from experiments.harness.record import Record
from experiments.harness.running import Misuse
from experiments.shared import trunks

SMOKE = fig5.PRESETS["smoke"]


@pytest.fixture(scope="module")
def record(splits, folder):
    result = fig5.run(SMOKE, splits, checkpoints=folder)
    return dataclasses.replace(result, config=dataclasses.asdict(SMOKE))


def test_smoke(record, head):
    metrics, arrays = record.metrics, record.arrays
    assert metrics["byte_equal"] == metrics["confirmed_by_cold_refit"] == 1
    assert metrics["worst_gradient_norm"] <= 1e-9
    flips = arrays["paper_flipped_small"].mean(axis=0)
    assert metrics["gain_from_1_to_10_by_papers_rule"] == pytest.approx(flips[2] - flips[0])
    for name in ("gradient_norm", "same_bytes", "confirmed"):
        assert len(arrays[f"{name}_small"]) == 4
    half = metrics["group_many_flipped_cold_small"] >= 3
    assert metrics["group_half_flipped"] == half
    assert metrics["num_attacked_small"] == 4
    assert 0.6 < metrics["held_out_accuracy_small"] <= 1
    for rule in fig5.RULES:
        flipped = arrays[f"{rule}_flipped_small"]
        assert flipped.shape == (4, 3)
        for count, share in zip((1, 2, 10), flipped.mean(axis=0), strict=True):
            assert metrics[f"{rule}_flipped_{count}_small"] == share
    change = arrays["best_change_small"]
    assert (change > 0).all() and (arrays["paper_change_small"] > 0).all()
    points = arrays["points_small"]
    losses = head.net.losses(head.test.x[points], head.test.y[points])
    np.testing.assert_allclose(arrays["clean_loss_small"], losses, rtol=1e-9)
    assert (losses < np.log(2)).all()
    for claim in fig5.CLAIMS:
        for preset in claim.presets or ():
            networks = [trunks.split(head)[0] for head in fig5.PRESETS[preset].heads]
            ends = ["", *(f"_{network}" for network in networks)]
            assert any(
                claim.metric.endswith(end)
                and claim.metric.removesuffix(end) + end.replace(networks[0], "small") in metrics
                or claim.metric.removesuffix(end) + "_small" in metrics
                for end in ends
            ), claim.metric


def test_no_pixel_is_recorded(record):
    pixels = 32 * 32 * 3
    for name, array in record.arrays.items():
        assert array.size < pixels, name


def test_an_interrupted_run_ends_with_the_same_numbers(record, splits, folder, tmp_path):
    points = record.arrays["points_small"]
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    assert len(list(kept.glob("small-group.npz"))) == 1
    (kept / f"small-{points[0]}.npz").unlink()
    again = fig5.run(SMOKE, splits, checkpoints=kept)
    assert again.metrics == pytest.approx(record.metrics, rel=0, abs=0, nan_ok=True)
    for name, array in record.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


def test_group_numbers(record):
    metrics, arrays = record.metrics, record.arrays
    assert metrics["group_one_loss_after_small"] > metrics["group_one_loss_before_small"]
    assert metrics["group_levels_moved_small"] <= 0.49 * (1 + 1e-4)
    assert arrays["many_poisons_small"][0] == 0
    assert len(arrays["many_flipped_small"]) == len(arrays["many_poisons_small"])
    assert metrics["group_most_flipped_small"] == arrays["many_flipped_small"].max()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": ()}, r"heads must be of different networks, got \(\)"),
        ({"heads": ("small/relu1", "small/relu2")}, "heads must be of different networks"),
        ({"weight_decays": ()}, "weight_decays must have an entry for each of 1 heads"),
        ({"standardised": (True, False)}, "standardised must have an entry for each of 1 heads"),
        ({"counts": (2, 10)}, r"counts must increase from 1, got \(2, 10\)"),
        ({"group_counts": (1, 1)}, r"group_counts must increase from 1, got \(1, 1\)"),
        ({"candidates": 9}, "candidates must be no fewer than poisons, got 9 for 10"),
        ({"radius": 0.5}, r"radius must lie in \(0, 0.5\), got 0.5"),
        ({"step": 1.0}, r"step must lie in \(0, 0.98\], got 1.0"),
        ({"num_test": -1}, "num_test must be at least 0, got -1"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
    ],
)
def test_config_is_checked(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **changed)


def test_no_more_images_are_poisoned_than_there_are(splits):
    n = len(splits.train[1])
    message = rf"group_counts must be at most {n}, the training images, got \(1, {n + 1}\)"
    with pytest.raises(Misuse, match=message):
        fig5.run(dataclasses.replace(SMOKE, group_counts=(1, n + 1)), splits)


def test_a_group_has_candidates_for_all_its_poisons(head, monkeypatch):
    asked = {}
    monkeypatch.setattr(fig5, "group", lambda *_, **options: asked.update(options))
    fig5._group(dataclasses.replace(SMOKE, candidates=12, group_counts=(1, 40)), head)
    assert asked["candidates"] == 40
    fig5._group(dataclasses.replace(SMOKE, group_counts=(1, 4)), head)
    assert asked["candidates"] == SMOKE.candidates


def test_presets_are_of_heads_that_there_are():
    for config in fig5.PRESETS.values():
        for name in config.heads:
            network, layer = trunks.split(name)
            assert layer in trunks.NETWORKS[network].layers


def test_photographs_are_of_the_recorded_attack(record, splits):
    figure = fig5.photographs(record, splits)
    test, original, poison, difference = (axis.images[0].get_array() for axis in figure.axes)
    row = int(record.metrics["group_one_row_small"])
    np.testing.assert_array_equal(original, splits.train[0][row])
    np.testing.assert_array_equal(np.rint(255 * np.asarray(poison, float)), original)
    assert np.abs(np.asarray(difference) - 0.5).max() == pytest.approx(
        record.metrics["group_levels_moved_small"], rel=1e-3
    )
    assert test.shape == original.shape
    plt.close(figure)


def test_draw(record):
    seen = Record.of(metrics=record.metrics, arrays=record.arrays)
    figure = fig5.draw(dataclasses.replace(seen, config=record.config))
    assert [axis.get_title() for axis in figure.axes] == [
        "small, to relu2",
        "By what poisons are found (dotted: before)",
        "Many test images at once",
    ]
    paper, best, published = figure.axes[0].lines
    np.testing.assert_allclose(
        best.get_ydata(), 100 * record.arrays["best_flipped_small"].mean(axis=0)
    )
    np.testing.assert_allclose(
        paper.get_ydata(), 100 * record.arrays["paper_flipped_small"].mean(axis=0)
    )
    assert list(published.get_ydata()) == [57.0, 77.0, 99.8]
    flipped = record.arrays["paper_flipped_small"]
    for column, bar in enumerate(figure.axes[0].collections[0].get_segments()):
        share = binomtest(int(flipped[:, column].sum()), len(flipped)).proportion_ci()
        np.testing.assert_allclose(bar[:, 1], [100 * share.low, 100 * share.high])
    plt.close(figure)
