"""Tests of trunks: names of heads, one pass for all layers, stored features, missing weights."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import data
from data import files, fishlike, images
from experiments.harness.running import Misuse
from experiments.shared import trunks
from influence import TopLayer
from influence.common.checkpoint import load, store

REAL = data.find("dogfish")


@pytest.fixture
def x():
    return data.load("fishlike").train[0][:5]


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """Hide the stored weights and forbid downloads."""
    monkeypatch.setenv("INFLUENCE_OFFLINE", "1")
    monkeypatch.delenv("INFLUENCE_DATA", raising=False)
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "cache")


def test_features_are_those_of_each_head_alone(x):
    found = trunks.features(["small/relu2", "small/relu1"], x, root=None, folder=None)
    assert list(found) == ["small/relu2", "small/relu1"]
    for head, width in (("small/relu2", 64), ("small/relu1", 32)):
        net = TopLayer(trunks.trunk(head, None))
        assert found[head].shape == (5, width) and found[head].dtype == np.float64
        np.testing.assert_allclose(found[head], net.features(x), rtol=1e-5, atol=1e-6)
        assert found[head].std(axis=0).max() > 0.01


def test_images_are_resized_to_the_networks_side(x):
    larger = images.resized(x, 48)
    found = trunks.features(["small/relu1"], larger, root=None, folder=None)["small/relu1"]
    again = images.resized(larger, trunks.side("small/relu1"))
    expected = TopLayer(trunks.trunk("small/relu1", None)).features(again)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_kept_features_are_found_again_by_content(x, tmp_path, monkeypatch):
    monkeypatch.setattr(trunks, "_ROWS", 2)
    ask = lambda images: trunks.features(["small/relu1"], images, root=None, folder=tmp_path)  # noqa: E731
    first = ask(x)["small/relu1"]
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert [name[-9:] for name in kept] == ["00000.npz", "00002.npz", "00004.npz"]
    # Remove one of the three stored blocks, as if the run had been interrupted before it. Then only
    # this block, of one image, is computed again. The features stay equal.
    (tmp_path / kept[2]).unlink()
    asked = []
    features = TopLayer.features
    monkeypatch.setattr(
        TopLayer, "features", lambda net, x: asked.append(len(x)) or features(net, x)
    )
    np.testing.assert_array_equal(ask(x)["small/relu1"], first)
    assert asked == [1]
    # The files hold the features of several layers of a network, so another layer of it needs no
    # new files. Other images do.
    trunks.features(["small/relu2"], x, root=None, folder=tmp_path)
    assert asked == [1] and len(list(tmp_path.iterdir())) == 3
    other = x.copy()
    other[4, 0, 0, 0] ^= 1
    assert not np.array_equal(ask(other)["small/relu1"], first)
    assert asked == [1, 2, 2, 1] and len(list(tmp_path.iterdir())) == 6


def test_a_layer_that_is_not_asked_about_as_a_rule(x):
    found = trunks.features(["small/conv1", "small/relu1"], x, root=None, folder=None)
    assert found["small/conv1"].min() < 0
    # A feature is a mean over pixels. Since ReLU only raises values, the mean after it is at least
    # the mean before it.
    assert (found["small/relu1"] >= found["small/conv1"] - 1e-6).all()


def test_seconds_are_those_of_whenever_it_was(x, tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(trunks, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(trunks, "_ROWS", 2)
    ask = lambda: trunks.timed_features(["small/relu1"], x, root=None, folder=tmp_path)  # noqa: E731
    features, seconds = ask()
    assert seconds == 3 * 5
    again, seconds = ask()
    assert seconds == 3 * 5  # these are the seconds of the first call, stored with the features
    np.testing.assert_array_equal(again["small/relu1"], features["small/relu1"])
    path = min(tmp_path.iterdir())
    store(path, {key: value for key, value in load(path).items() if key != "seconds"})
    again, seconds = ask()
    assert np.isnan(seconds)
    np.testing.assert_array_equal(again["small/relu1"], features["small/relu1"])


def test_where_features_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(trunks, "cache_folder", lambda: tmp_path / "cache")
    assert trunks.kept_in(True, tmp_path) == tmp_path
    assert trunks.kept_in(False, tmp_path) == tmp_path / "cache" / "features"
    assert (tmp_path / "cache" / "features").is_dir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(trunks, "cache_folder", lambda: tmp_path / "file")
    assert trunks.kept_in(False, tmp_path) == tmp_path
    monkeypatch.setattr(trunks, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(trunks.os, "access", lambda *_: False)
    assert trunks.kept_in(False, None) is None


@pytest.mark.parametrize("head", ["vgg/block5", "small", "small/", "/relu1"])
def test_heads_that_are_none(head):
    with pytest.raises(
        ValueError, match=r"named network/layer .* of small, learnt, mobilenet, .*got '"
    ):
        trunks.split(head)


def test_a_layer_that_is_none():
    with pytest.raises(ValueError, match="layer_name must be a layer of 'small', .* got 'relu9'"):
        trunks.trunk("small/relu9", None)


@pytest.mark.usefixtures("nowhere")
def test_missing_weights_are_misuse(tmp_path):
    trunks.check(["small/relu1"], None)
    with pytest.raises(Misuse, match="(?s)inception-keras, .* was not found.*notop.h5.*from https"):
        trunks.check(["small/relu1", "inception-keras/mixed10"], tmp_path)


def test_layers_that_are_none_are_misuse(monkeypatch):
    built = trunks._built
    asked = []
    monkeypatch.setattr(trunks, "_built", lambda *a: asked.append(a) or built(*a))
    trunks.check(["small/relu1", "small/relu2"], None)
    assert not asked  # the names of these layers are known without building the network
    trunks.check(["small/conv1"], None)
    with pytest.raises(Misuse, match="layer_name must be a layer of 'small', .* got 'relu9'"):
        trunks.check(["small/relu1", "small/relu9"], None)
    assert len(asked) == 2


@pytest.mark.real_data
@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="dogfish not found: set INFLUENCE_DATA")
@pytest.mark.parametrize(
    ("head", "width"), [("mobilenet/conv_pw_13_relu", 768), ("inception/mixed8", 1280)]
)
def test_trained_networks_tell_dogs_from_fish(head, width):
    """Classify images by the nearer class mean. Wrong weights or a wrong scale would fail this."""
    (x, y), _ = data.load("dogfish", REAL).train, None
    rows = np.concatenate([np.flatnonzero(y == c)[:12] for c in (0, 1)])
    phi = trunks.features([head], x[rows], root=REAL, folder=None)[head]
    assert phi.shape == (24, width)
    means = [phi[y[rows] == c].mean(axis=0) for c in (0, 1)]
    nearer = np.argmin([np.linalg.norm(phi - mean, axis=1) for mean in means], axis=0)
    assert np.mean(nearer == y[rows]) > 0.95


def test_the_learnt_network_tells_pictures_apart_that_it_never_saw():
    x, y = fishlike.pictures(300, seed=9)
    heads = ["learnt/relu2", "small/relu2"]
    found = trunks.features(heads, x, root=None, folder=None)
    right = {}
    for head, phi in found.items():
        model = LogisticRegression(max_iter=1000).fit(phi[:200], y[:200])
        right[head] = model.score(phi[200:], y[200:])
    assert right["learnt/relu2"] > max(0.8, right["small/relu2"] + 0.05)
    assert found["learnt/relu2"].std() == pytest.approx(0.3, rel=0.2)
    again = trunks.features(heads[:1], x, root=None, folder=None)["learnt/relu2"]
    np.testing.assert_array_equal(again, found["learnt/relu2"])
