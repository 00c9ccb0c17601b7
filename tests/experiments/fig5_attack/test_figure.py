"""Figure 5: the experiment on the stand-in, its poisons refitted by another route, its figure."""

import dataclasses
import shutil

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import data
from experiments.fig5_attack import attacks, heads
from experiments.fig5_attack import figure as fig5
from experiments.harness.record import Record
from experiments.harness.running import Misuse
from experiments.shared import trunks
from influence import Examples
from influence.attack.poison import Rule

SMOKE = fig5.PRESETS["smoke"]


@pytest.fixture(scope="module")
def splits():
    return data.load("fishlike")


@pytest.fixture(scope="module")
def head(splits):
    return heads.fitted(SMOKE, 0, splits, None)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def record(splits, folder):
    result = fig5.run(SMOKE, splits, checkpoints=folder)
    return dataclasses.replace(result, config=dataclasses.asdict(SMOKE))


def refitted(x, y, weight_decay):
    """scikit-learn's theta."""
    C = 1 / (len(y) * weight_decay)
    model = LogisticRegression(C=C, fit_intercept=False, tol=1e-10, max_iter=10_000)
    return model.fit(x, y).coef_[0]


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


def test_a_poison_does_what_is_said_of_it(head):
    point = heads.right(SMOKE, head)[0]
    test = head.test.take([point])
    rows, norms = attacks.ranked(head, test, 16)
    assert (np.diff(norms) <= 0).all() and len(set(rows)) == 16
    found = head.attacked(test, rows[:10], rule=Rule(max_steps=3, tries=0), flip_at=np.inf)
    # From its pixels on: bytes as before, features as the trunk makes them, scikit-learn's weights.
    levels = np.rint(127.5 * (found.inputs.astype(float) + 1))
    np.testing.assert_array_equal(levels, head.images[found.rows])
    x = np.array(head.train.x)
    x[found.rows] = head.net.features(found.inputs)
    theta = refitted(x, head.train.y, SMOKE.weight_decays[0])
    sign = 2 * test.y[0] - 1
    loss = np.logaddexp(0, -sign * (test.x[0] @ theta))
    before = head.net.losses(test.x, test.y)[0]
    assert found.change_if_poisoned[0] == pytest.approx(loss - before, rel=1e-3)
    assert found.change_if_poisoned[0] > 0


def test_ranking_is_that_of_all_rows(head):
    test = head.test.take([heads.right(SMOKE, head)[1]])
    every, norms = attacks.ranked(head, test, len(head.train))
    some, _ = attacks.ranked(head, test, 64)
    assert sorted(every) == list(range(len(head.train)))
    assert some[:5].tolist() == every[:5].tolist()
    assert norms[0] > norms[-1]


def test_standing(head):
    test = head.test.take([heads.right(SMOKE, head)[0]])
    row = int(np.argmax(head.net.losses(head.train.x, head.train.y)))
    rule = Rule(max_steps=1, tries=0)
    found = head.attacked(test, np.array([row]), rule=rule, flip_at=np.inf)
    before = head.net.theta
    where = attacks.standing(head, found)
    np.testing.assert_array_equal(head.net.theta, before)
    assert where.shape == (1, 3, 2)
    assert where[0, attacks.SIGNS.index("loss"), 0] == 0  # of the largest loss
    means = [head.train.x[head.train.y == c].mean(axis=0) for c in (0, 1)]
    far = [np.linalg.norm(x - means[y]) for x, y in zip(head.train.x, head.train.y, strict=True)]
    assert where[0, 2, 0] == np.sum(np.array(far) > far[row]) / len(far)
    moved = np.linalg.norm(found.features[0] - means[head.train.y[row]])
    assert where[0, 2, 1] == pytest.approx(np.mean(np.delete(far, row) > moved), abs=1 / len(far))


def test_geometry(head, monkeypatch):
    monkeypatch.setattr(attacks, "_COMPONENTS", 20)
    test = head.test.take([heads.right(SMOKE, head)[0]])
    found = head.attacked(test, np.array([7]), rule=Rule(max_steps=1, tries=0), flip_at=np.inf)
    facts = attacks.geometry(head, found)
    assert 0 < facts["levels_moved"] <= 0.49 * (1 + 1e-4)
    shift = found.features[0] - head.train.x[7]
    assert facts["features_moved"] == pytest.approx(np.linalg.norm(shift), rel=1e-9)
    own = head.train.x[head.train.y == head.train.y[7]].mean(axis=0)
    assert facts["to_own_before"] == pytest.approx(np.linalg.norm(head.train.x[7] - own))
    parts = facts["moved_in_components"] ** 2 + facts["moved_outside_components"] ** 2
    assert parts == pytest.approx(facts["features_moved"] ** 2, rel=1e-6)


def test_the_group_is_of_one_class_and_near(head):
    points = heads.alike(SMOKE, head)
    assert len(points) == 6 and points[0] == heads.right(SMOKE, head)[0]
    assert len(set(head.test.y[points])) == 1
    far = np.linalg.norm(head.test.x - head.test.x[points[0]], axis=1)
    right = head.net.losses(head.test.x, head.test.y) < np.log(2)
    others = np.setdiff1d(np.flatnonzero((head.test.y == head.test.y[points[0]]) & right), points)
    assert far[points].max() <= far[others].min()


def test_group_numbers(record):
    metrics, arrays = record.metrics, record.arrays
    assert metrics["group_one_loss_after_small"] > metrics["group_one_loss_before_small"]
    assert metrics["group_levels_moved_small"] <= 0.49 * (1 + 1e-4)
    assert arrays["many_poisons_small"][0] == 0
    assert len(arrays["many_flipped_small"]) == len(arrays["many_poisons_small"])
    assert metrics["group_most_flipped_small"] == arrays["many_flipped_small"].max()


def test_standardised_features_are_those_the_head_sees(splits):
    config = dataclasses.replace(SMOKE, standardised=(True,))
    head, about = heads.fitted(config, 0, splits, None)
    np.testing.assert_allclose(head.train.x.mean(axis=0), 0, atol=1e-9)
    deviation = head.train.x.std(axis=0)
    assert np.isclose(deviation, 1).sum() + np.isclose(deviation, 0).sum() == len(deviation)
    images = head.net.features(splits.test[0][:5])
    np.testing.assert_allclose(images, head.test.x[:5], atol=1e-4)
    assert about["test_accuracy"] == head.accuracy(head.test) > 0.6


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
        "small/relu2", "By what poisons are found (dotted: before)", "Many test images at once",
    ]  # fmt: skip
    paper, best, published = figure.axes[0].lines
    np.testing.assert_allclose(
        best.get_ydata(), 100 * record.arrays["best_flipped_small"].mean(axis=0)
    )
    np.testing.assert_allclose(
        paper.get_ydata(), 100 * record.arrays["paper_flipped_small"].mean(axis=0)
    )
    assert list(published.get_ydata()) == [57.0, 77.0, 99.8]
    plt.close(figure)


def test_who_is_wrong_before_is_not_in_the_group(head):
    points = heads.alike(SMOKE, head)
    x = np.array(head.test.x)
    # Across the boundary by little: as near as it was, but wrong.
    theta = head.net.theta
    x[points[1]] -= (1 + 1e-3) * (x[points[1]] @ theta) / (theta @ theta) * theta
    wrong = dataclasses.replace(head, test=Examples(x, head.test.y))
    assert head.net.losses(x, head.test.y)[points[1]] > np.log(2)
    assert points[1] not in heads.alike(SMOKE, wrong)
    assert len(heads.alike(SMOKE, wrong)) == 6


def test_a_refit_that_disagrees_is_not_confirmed(head, monkeypatch):
    attacked = heads.Head.attacked

    def other(self, *arguments, **options):
        found = attacked(self, *arguments, **options)
        return dataclasses.replace(found, flipped=~found.flipped)

    monkeypatch.setattr(heads.Head, "attacked", other)
    rule = Rule(max_steps=1, tries=0, restarts=0)
    point = heads.right(SMOKE, head)[0]
    found = attacks.single(head, point, counts=(1, 2), candidates=8, paper=rule, best=rule)
    assert not found["confirmed"]
    found = attacks.group(
        head, heads.alike(SMOKE, head), counts=(1,), candidates=8, one=rule, many=rule
    )
    assert not found["all_confirmed"]


def test_heads_are_chosen_by_held_out_training_images(splits, head, tmp_path):
    found = heads.heads_of("small", splits, seed=0, folder=None, checkpoints=tmp_path)
    assert found["held_out_accuracy"].shape == (2, len(heads.WEIGHT_DECAYS))
    i, j = 1, heads.WEIGHT_DECAYS.index(SMOKE.weight_decays[0])
    assert found["held_out_accuracy"][i, j] == heads.held_out_accuracy(head.net, head.train, 0)
    losses = head.net.losses(head.train.x, head.train.y)
    assert found["training_loss"][i, j] == pytest.approx(losses.mean(), rel=1e-6)
    assert found["training_accuracy"][i, j] == head.accuracy(head.train)
    again = heads.heads_of("small", splits, seed=0, folder=None, checkpoints=tmp_path)
    np.testing.assert_array_equal(again["training_loss"], found["training_loss"])


@pytest.mark.parametrize(
    ("accuracy", "loss", "best"),
    [
        ([[0.985, 0.986], [0.99, 0.95]], [[0.02, 0.005], [0.004, 0.004]], ("a", 1e-3)),
        ([[0.90, 0.91], [0.93, 0.95]], [[0.004, 0.004], [0.004, 0.1]], ("b", 1e-3)),
    ],
)
def test_the_rule_of_choice(accuracy, loss, best):
    found = {"layers": np.array(["a", "b"], "S"), "weight_decays": np.array([1e-2, 1e-3]),
             "held_out_accuracy": np.array(accuracy), "training_loss": np.array(loss)}  # fmt: skip
    assert heads.chosen(found, 1800) == best
