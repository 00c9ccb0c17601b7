"""Tests of Figure 4: the run on the stand-in against computations by hand, and its figures."""

import dataclasses

import h5py
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from sklearn.metrics.pairwise import rbf_kernel

import data
from data.images import resized
from experiments.fig4_rbf_vs_inception import figure as fig4
from experiments.fig4_rbf_vs_inception import models
from experiments.fig4_rbf_vs_inception.models import deep_head, kernel_svm, squared_distances
from experiments.harness.claims import failed, of_preset
from experiments.harness.running import Misuse
from experiments.shared import trunks
from tests import oracles

SMOKE = fig4.PRESETS["smoke"]
NAMES = ["svm", *SMOKE.heads]
N, M = 30, 6  # number of training and test images


@pytest.fixture(scope="module")
def splits():
    return data.load("fishlike")


@pytest.fixture(scope="module")
def record(splits, folder):
    result = fig4.run(SMOKE, splits, checkpoints=folder)
    return dataclasses.replace(result, config=dataclasses.asdict(SMOKE))


def point(record):
    return int(record.metrics["test_point"])


def test_smoke(record, splits):
    metrics, arrays = record.metrics, record.arrays
    assert metrics["num_train"] == 200 and metrics["num_test"] == 80
    assert metrics["worst_gradient_norm"] < 1e-9
    assert [name.decode() for name in arrays["models"]] == NAMES
    assert arrays["score"].shape == (3, 200) and arrays["spearman"].shape == (3, 10)
    assert (splits.test[1][arrays["test_fish"]] == 1).all()
    assert {claim.metric for claim in of_preset(fig4.CLAIMS, "smoke")} <= metrics.keys()
    assert failed(fig4, "smoke", metrics) == []
    assert metrics["test_accuracy_svm"] > 0.75 and metrics["lowest_test_accuracy_deep"] > 0.65


def test_distances_and_scores_of_the_test_point(record, splits):
    (x, y), (x_test, y_test) = splits.train, splits.test
    flat = x.reshape(200, -1) / 127.5 - 1
    shown = x_test[point(record)].reshape(-1) / 127.5 - 1
    distance = np.linalg.norm(flat - shown, axis=1)
    np.testing.assert_allclose(record.arrays["distance"], distance, rtol=1e-12)
    images = np.concatenate([x, x_test])
    phi = trunks.features(["learnt/relu2"], images, root=None, folder=None)["learnt/relu2"]
    head = deep_head(phi, y, y_test, weight_decay=SMOKE.weight_decay)
    scores = head.scores(record.arrays["test_fish"])
    np.testing.assert_allclose(record.arrays["score"][1], scores[0], rtol=1e-6, atol=1e-12)
    rank = [scipy.stats.spearmanr(np.abs(scores[0]), distance)[0], record.arrays["spearman"][1, 0]]
    assert rank[0] == pytest.approx(rank[1], abs=1e-6)
    order = np.argsort(-scores, axis=1)
    dogs = [np.sum(y[rows[: SMOKE.top_deep]] == 0) for rows in order]
    assert record.arrays["dogs_in_top"][1].tolist() == dogs
    assert record.metrics["median_dogs_in_top_learnt/relu2"] == np.median(dogs)
    first = [int(np.flatnonzero(y[rows] == 0)[0]) for rows in order]
    assert record.arrays["rank_of_first_dog"][1].tolist() == first
    largest = np.abs(scores).max(axis=1)
    np.testing.assert_allclose(record.arrays["largest_influence"][1], largest, rtol=1e-6)
    z = phi[200 + point(record)] @ head.net.theta
    sure = record.metrics["probability_of_test_point_learnt/relu2"]
    assert sure == pytest.approx(1 / (1 + np.exp(-z)), rel=1e-6)


def test_the_kernel_sees_images_of_its_own_side(splits, record):
    result = fig4.run(dataclasses.replace(SMOKE, side=16, test_point=point(record)), splits)
    (x, _), (x_test, _) = splits.train, splits.test
    smaller = [resized(part, 16).reshape(len(part), -1) / 127.5 - 1 for part in (x, x_test)]
    expected = np.linalg.norm(smaller[0] - smaller[1][point(record)], axis=1)
    np.testing.assert_allclose(result.arrays["distance"], expected, rtol=1e-12)


def test_metrics_are_those_of_the_arrays(record):
    metrics, arrays = record.metrics, record.arrays
    ratios = arrays["largest_influence"][0] / arrays["largest_influence"][1:]
    assert metrics["least_median_ratio_of_largest_influence"] == np.median(ratios, axis=1).min()
    of_point = [metrics[f"ratio_of_largest_influence_of_test_point_{name}"] for name in NAMES[1:]]
    # `scores` has the largest |score| of each model for the test point. The SVM is model 0.
    scores = np.abs(arrays["score"]).max(axis=1)
    np.testing.assert_allclose(of_point, scores[0] / scores[1:], rtol=1e-12)
    assert metrics["least_ratio_of_largest_influence_of_test_point"] == min(of_point)
    assert min(of_point) != np.median(ratios, axis=1).min()
    medians = np.median(arrays["spearman"], axis=1)
    assert metrics["median_spearman_svm"] == medians[0]
    assert metrics["lowest_median_spearman_deep"] == medians[1:].min()
    assert metrics["largest_median_spearman_deep"] == medians[1:].max()
    assert metrics["fewest_dogs_in_top_deep"] == arrays["dogs_in_top"][1:].min()
    share = 1 - arrays["dogs_in_top"][0].mean() / SMOKE.top_svm
    assert metrics["same_class_in_top_svm"] == pytest.approx(share)
    median = 1 - np.median(arrays["dogs_in_top"][0]) / SMOKE.top_svm
    assert metrics["median_same_class_in_top_svm"] == pytest.approx(median)
    of_class = np.where(arrays["labels"] == 1, 1, -1) * np.sign(arrays["score"][0])
    # The sort must be stable, because many scores are equal.
    by_size = np.argsort(-np.abs(arrays["score"][0]), kind="stable")
    share = np.mean(of_class[by_size[:100]] == 1)
    assert metrics["sign_of_class_in_largest_svm_of_test_point"] == pytest.approx(share)
    helpful = np.argsort(-arrays["score"][0], kind="stable")[:100]
    share = arrays["labels"][helpful].mean()
    assert metrics["same_class_in_top_100_svm_of_test_point"] == pytest.approx(share)
    assert metrics["median_same_class_in_top_100_svm"] == np.median(arrays["same_class"])
    first = 1 + arrays["rank_of_first_dog"][1:, 0]
    assert metrics["earliest_first_dog_of_test_point"] == first.min()
    assert metrics["latest_first_dog_of_test_point"] == first.max()
    sure = [metrics[f"probability_of_test_point_{name}"] for name in NAMES[1:]]
    assert metrics["lowest_probability_of_test_point"] == min(sure)
    assert 0 < metrics["features_seconds"] < 300 and metrics["photographs_side"] == 32
    for i in range(3):
        helpful = arrays["most_helpful"][i]
        assert (np.diff(arrays["score"][i, helpful]) <= 0).all()
        assert arrays["score"][i].max() == arrays["score"][i, helpful[0]]
        dogs = arrays["most_helpful_dogs"][i]
        assert (arrays["labels"][dogs] == 0).all()
        assert arrays["score"][i, dogs[0]] == arrays["score"][i, arrays["labels"] == 0].max()


def test_fish_have_a_slope_and_the_first_is_like_the_papers(record, splits):
    (x, y), (x_test, y_test) = splits.train, splits.test
    images = np.concatenate([x, x_test])
    distance = squared_distances(x, images)
    svm = kernel_svm(distance, y, y_test, gamma=SMOKE.gamma / 200, t=SMOKE.temperature,
                     weight_decay=SMOKE.weight_decay)  # fmt: skip
    margins = svm.outputs
    fish = np.flatnonzero((y_test == 1) & (margins < 1))
    points = record.arrays["test_fish"]
    assert set(points) <= set(fish) and len(set(points)) == 10
    assert points[0] == fish[np.argmin(np.abs(margins[fish] - 0.990029))] == point(record)
    assert record.metrics["fish_of_margin_below_1_svm"] == len(fish) < 40
    np.testing.assert_allclose(record.arrays["outputs"][0], margins[points], atol=1e-9)
    assert record.metrics["margin_of_test_point_svm"] == pytest.approx(margins[points[0]])
    chosen = dataclasses.replace(SMOKE, test_point=int(points[4]), num_fish=3)
    again = fig4._fish(chosen, margins, y_test)
    assert again[0] == points[4] and len(set(again)) == 3
    certain = int(np.flatnonzero((y_test == 1) & (margins > 1.1))[0])
    with pytest.raises(ValueError, match=f"test_point must have a margin below 1, .* {certain}"):
        fig4._fish(dataclasses.replace(SMOKE, test_point=certain), margins, y_test)


def test_no_pixel_is_recorded(record, splits, tmp_path):
    """Check that no stored array is large enough to hold an image."""
    data = {"name": splits.name, "stand_in": splits.stand_in, "sha256": splits.sha256}
    dataclasses.replace(record, data=data).save(tmp_path)
    pixels = splits.train[0][0].size
    with h5py.File(tmp_path / "arrays.h5") as file:
        assert all(file[name].size < pixels for name in file)


def test_interruption_loses_nothing(splits, record, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(fig4, "deep_head", stopped)
        fig4.run(SMOKE, splits, checkpoints=tmp_path)
    for network in ("learnt", "small"):
        assert len(list(tmp_path.glob(f"{network}-*.npz"))) == 2
    again = fig4.run(SMOKE, splits, checkpoints=tmp_path)
    for name, array in record.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


def test_draw(record):
    figure = fig4.draw(record)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[:3] == ["RBF SVM on pixels", "Learnt, relu2", "Small, relu2"]
    arrays = record.arrays
    for i, axis in enumerate(figure.axes[:3]):
        low, high = axis.get_ylim()
        assert low == -high
        scale = 10.0 ** -np.floor(np.log10(1.25 * np.quantile(np.abs(arrays["score"][i]), 0.995)))
        within, beyond = (np.asarray(part.get_offsets()) for part in axis.collections)
        score = scale * arrays["score"][i]
        is_beyond = np.abs(score) > high
        for drawn, which in ((within, ~is_beyond), (beyond, is_beyond)):
            expected = np.column_stack([arrays["distance"], np.clip(score, low, high)])[which]
            np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(expected, axis=0))
        said = [text.get_text() for text in axis.texts if "beyond" in text.get_text()]
        assert bool(said) == is_beyond.any()
        colours = axis.collections[0].get_facecolors()
        is_fish = arrays["labels"][~is_beyond].sum()
        assert sorted(np.unique(colours, axis=0, return_counts=True)[1]) == sorted(
            [is_fish, np.sum(~is_beyond) - is_fish]
        )
    assert not any(axis.images for axis in figure.axes)
    medians = [line.get_xdata()[0] for line in figure.axes[3].lines[:3]]
    np.testing.assert_allclose(medians, np.median(arrays["spearman"], axis=1))
    plt.close(figure)


@pytest.mark.parametrize(
    ("heads", "side", "said"),
    [
        (("inception/mixed8", "mobilenet/conv_pw_13_relu", "inception/mixed5"), 224,
         "Photographs of Imagenette, English springer against tench; Inception v3 and MobileNet "
         ".75 cut at the layer named:\nthe paper's own are not available."),
        (("inception-keras/mixed10",), 224,
         "Photographs of Imagenette, English springer against tench:\nthe paper's own are not "
         "available."),
        (("mobilenet/conv_pw_9_relu",), 299,
         "MobileNet .75 cut at the layer named:\nthe paper's own are not available."),
        (("inception-keras/mixed10",), 299, ""),
    ],
)  # fmt: skip
def test_a_figure_says_where_it_is_not_of_what_the_papers_is_of(record, heads, side, said):
    names, count = np.array(["svm", *heads], "S"), 1 + len(heads)
    arrays = record.arrays | {"models": names} | {
        key: np.resize(record.arrays[key], (count, *record.arrays[key].shape[1:]))
        for key in ("score", "spearman", "dogs_in_top", "largest_influence")
    }  # fmt: skip
    metrics = record.metrics | {"photographs_side": side}
    real = dataclasses.replace(record, arrays=arrays, metrics=metrics, data={"stand_in": False})
    figure = fig4.draw(real)
    assert figure.get_supxlabel() == said
    plt.close(figure)
    figure = fig4.draw(dataclasses.replace(real, data={"stand_in": True}))
    assert figure.get_supxlabel() == ""
    plt.close(figure)


def test_photographs_show_the_images_that_helped(record, splits):
    figure = fig4.photographs(record, splits)
    shown = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(shown) == 1 + 3 * 2 * 5
    np.testing.assert_array_equal(shown[0], splits.test[0][point(record)])
    rows = np.stack([record.arrays["most_helpful"], record.arrays["most_helpful_dogs"]], axis=1)
    for image, row in zip(shown[1:], rows.ravel(), strict=True):
        np.testing.assert_array_equal(image, splits.train[0][row])
    plt.close(figure)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"side": 0}, "side must be at least 1, got 0"),
        ({"num_fish": 0}, "num_fish must be at least 1, got 0"),
        ({"top_svm": 0}, "top_svm must be at least 1, got 0"),
        ({"weight_decay": 0.0}, "weight_decay must be positive, got 0.0"),
        ({"gamma": np.inf}, "gamma must be positive, got inf"),
        ({"temperature": -1.0}, "temperature must be positive, got -1.0"),
        ({"heads": ()}, "heads must name at least one network/layer, got none"),
        ({"heads": ("vgg/5",)}, "a head must be named network/layer .* got 'vgg/5'"),
    ],
)
def test_config_is_checked(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMOKE, **changed)


def test_a_dog_and_options_beyond_the_data_are_refused(splits, monkeypatch):
    dog = int(np.flatnonzero(splits.test[1] == 0)[0])
    with pytest.raises(ValueError, match=f"test_point must be a fish .*, got {dog}"):
        fig4.run(dataclasses.replace(SMOKE, test_point=dog), splits)
    assert fig4.PRESETS["standard"].test_point is None
    # Without this function, computing features would fail. Options are refused before that.
    monkeypatch.setattr(trunks, "timed_features", None)
    for name, what in (("top_svm", "training images"), ("num_fish", "test fish of margins below")):
        with pytest.raises(Misuse, match=rf"{name} must be at most \d+, the {what}.*, got 9999"):
            fig4.run(dataclasses.replace(SMOKE, **{name: 9999}), splits)


def test_missing_weights_are_said_before_any_work(splits, monkeypatch):
    def missing(heads, root):
        raise Misuse(f"{heads} missing")

    monkeypatch.setattr(trunks, "check", missing)
    monkeypatch.setattr(fig4, "squared_distances", None)
    with pytest.raises(Misuse, match="learnt/relu2"):
        fig4.run(SMOKE, splits)


def test_the_papers_preset_is_the_papers():
    config = fig4.PRESETS["paper"]
    assert config.heads == ("inception-keras/mixed10",) and config.test_point == 462
    assert (config.weight_decay, config.gamma, config.temperature) == (0.001, 0.05, 0.001)
    assert config.side == 299


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (N + M, 5, 4, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def labels(images):
    y = (images[:, :, :, 0].mean(axis=(1, 2)) > 127).astype(np.int64)
    assert 0.3 < y.mean() < 0.7
    return y[:N], y[N:]


@pytest.mark.parametrize("block", [7, 1 << 13])
def test_distances_are_exact(images, block, monkeypatch):
    monkeypatch.setattr(models, "_PIXELS", block)
    flat = images.reshape(N + M, -1) / 127.5 - 1
    expected = ((flat[:, None] - flat[None, :N]) ** 2).sum(axis=2)
    got = squared_distances(images[:N], images)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert (np.diag(got) == 0).all()


def svm(images, labels, t, *, gamma=0.02, weight_decay=0.01):
    distance = squared_distances(images[:N], images)
    return kernel_svm(distance, *labels, gamma=gamma, t=t, weight_decay=weight_decay), distance


def test_the_linear_svms_inner_products_are_the_kernel(images, labels):
    model, _ = svm(images, labels, 0.1)
    flat = images.reshape(N + M, -1) / 127.5 - 1
    K = rbf_kernel(flat, flat[:N], gamma=0.02)
    phi = np.concatenate([model.train.x, model.test.x])
    np.testing.assert_allclose(phi @ model.train.x.T, K, atol=1e-12)
    np.testing.assert_array_equal(model.train.y, 2 * labels[0] - 1)
    np.testing.assert_array_equal(model.test.y, 2 * labels[1] - 1)


@pytest.mark.parametrize("t", [1e-3, 3.0])
def test_the_minimum_is_that_of_the_kernels_own_risk(images, labels, t):
    """Compare with BFGS on the risk as a function of c, where the outputs are z = K c.

    K (n, n) is the kernel matrix. The risk is the mean loss plus lambda/2 c' K c.
    """
    model, distance = svm(images, labels, t)
    assert model.gradient_norm < 1e-10
    K, s = np.exp(-0.02 * distance[:N]), 2 * labels[0] - 1

    def risk(c):
        z = K @ c
        u = (1 - s * z) / t
        slope = -s * scipy.special.expit(u) / N + 0.01 * c
        return (t * np.logaddexp(0, u)).mean() + 0.005 * c @ z, K @ slope

    # The model's features L satisfy K = L L', and its weights are w = L' c. Solve this for c.
    start = np.linalg.solve(model.train.x.T, model.net.theta)
    value, gradient = risk(start)
    assert np.abs(gradient).max() < 1e-9
    options = {"gtol": 1e-9, "maxiter": 5000}
    found = scipy.optimize.minimize(risk, np.zeros(N), jac=True, method="BFGS", options=options)
    assert value <= found.fun + 1e-9
    np.testing.assert_allclose(model.outputs, np.exp(-0.02 * distance[N:]) @ start, atol=1e-9)


def test_twins_have_no_kernel_features(images, labels):
    twins = images.copy()
    twins[7] = twins[3]
    with pytest.raises(ValueError, match=r"no two of which are equal, got .* \[\[7, 3\]\]"):
        svm(twins, labels, 0.1)


def test_a_head_at_its_minimum_and_its_scores():
    rng = np.random.default_rng(1)
    phi, y = rng.standard_normal((50, 4)), rng.integers(0, 2, 50)
    model = deep_head(phi, y[:40], y[40:], weight_decay=0.02)
    oracle = oracles.logistic_regression(phi[:40], y[:40], 0.02)
    theta = oracle.minimum(np.zeros(4))
    np.testing.assert_allclose(model.net.theta, theta, rtol=1e-8)
    assert model.gradient_norm < 1e-10
    points = np.array([3, 0])
    measured = oracle.on(phi[40:][points], y[40:][points])
    expected = oracle.predicted_changes(theta, measured, np.arange(40))
    np.testing.assert_allclose(model.scores(points), expected, rtol=1e-6, atol=1e-12)
    right = (phi @ theta > 0) == y
    assert model.accuracies == pytest.approx([right[:40].mean(), right[40:].mean()])
    np.testing.assert_allclose(model.outputs, phi[40:] @ theta, rtol=1e-7)


def test_scores_are_what_happens(images, labels):
    """Compare scores with the changes after a refit without image 4.

    With t = 1 the loss is so smooth that first order is accurate.
    """
    model, distance = svm(images, labels, 1.0, weight_decay=0.1)
    scores = model.scores(np.arange(M))
    keep = np.delete(np.arange(N), 4)
    again = kernel_svm(distance[np.append(keep, np.arange(N, N + M))][:, keep], labels[0][keep],
                       labels[1], gamma=0.02, t=1.0, weight_decay=0.1)  # fmt: skip
    loss = lambda z: np.logaddexp(0, 1 - model.test.y * z)  # noqa: E731
    actual = loss(again.outputs) - loss(model.outputs)
    np.testing.assert_allclose(scores[:, 4], actual, rtol=0.12, atol=1e-6)
