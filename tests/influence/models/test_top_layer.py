"""TopLayer: a head on a frozen trunk, asked of images what it is asked of their features."""

import inspect
import pickle

import numpy as np
import pytest
from joblib.externals.loky.backend import reduction

from influence import (
    CG,
    BinaryLogisticRegression,
    Direct,
    Examples,
    GenericNeuralNet,
    Influence,
    TopLayer,
)
from influence.models.top_layer import cut
from tests.influence.models.pictures import MEAN, SCALE, F, by_hand, problem, trunk
from tests.influence.problems import relative_error


def test_features_are_the_pooled_standardised_outputs():
    net, images, _ = problem()
    got = net.features(images)
    assert got.dtype == np.float64 and relative_error(got, by_hand(net, images)) < 1e-12
    assert net.features(got) is got
    plain = TopLayer(net.trunk)
    np.testing.assert_allclose(plain.features(images), by_hand(net, images) * SCALE + MEAN)
    vector, images, _ = problem(pooled=True, standardised=False)
    assert relative_error(vector.features(images), vector.trunk(images).numpy()) < 1e-12


def test_theta_is_the_head_alone_and_the_trunk_is_left_as_it_was():
    net, images, y = problem()
    before = net.trunk.get_weights()
    assert net.num_parameters == F and net.dtype == np.float64
    net.fit(Examples(images, y))
    for was, now in zip(before, net.trunk.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    assert net.trunk.trainable


def test_the_default_is_the_papers_model():
    net = TopLayer(trunk("float32"))
    assert net.weight_decay == 0.001 and not net.intercept
    assert isinstance(net, BinaryLogisticRegression)


QUESTIONS = sorted(
    name
    for name, method in inspect.getmembers(GenericNeuralNet, inspect.isfunction)
    if not name.startswith("_") and "x" in inspect.signature(method).parameters
)


@pytest.mark.parametrize("name", [q for q in QUESTIONS if q not in ("features", "affine_layers")])
def test_every_question_takes_images_or_their_features(name):
    net, images, y = problem(6)
    rng = np.random.default_rng(2)
    V, W = rng.standard_normal((F, 3)), rng.standard_normal((2, F, 2))
    each = np.array([[0, 3, 1], [4, 2, 5]])
    take = lambda x: (x, y)  # noqa: E731
    more = {
        "outputs": (),
        "hvp": (V,), "directional": (V,), "gauss_newton_product": (V,), "bregman_gradient": (V,),
        "curvatures": (V[:, 0],), "curvature_gradient": (V[:, 0],), "input_gradient": (V[:, 0],),
        "hvp_each": (W,), "gauss_newton_each": (W,), "gradient_each": (V[:, :2],),
    }.get(name, ())  # fmt: skip
    if name.endswith("_each"):
        take = lambda x: (x[each], y[each])  # noqa: E731
    if name == "outputs":
        take = lambda x: (x,)  # noqa: E731
    head = BinaryLogisticRegression(F, weight_decay=net.weight_decay)
    head.theta = net.theta
    features = by_hand(net, images)
    expected = getattr(head, name)(*take(features), *more)
    of_features = getattr(net, name)(*take(features), *more)
    np.testing.assert_array_equal(of_features[0], expected[0])
    if name == "input_gradient":  # of images it is another thing
        assert getattr(net, name)(*take(images), *more).shape == images.shape
        return
    of_images = getattr(net, name)(*take(images), *more)
    if not isinstance(expected, tuple):
        of_images, expected = (of_images,), (expected,)
    for got, wanted in zip(of_images, expected, strict=True):
        assert relative_error(got, wanted) < 1e-12


def test_affine_layers_are_the_heads():
    net, images, _ = problem(4)
    (layer,) = net.affine_layers(images).layers
    assert layer.entries.shape == (F, 1)


def test_examples_of_images_are_answered_as_those_of_features():
    net, images, y = problem(20)
    train = Examples(images, y)
    featured = net.featured(train)
    assert net.featured(featured) is featured and relative_error(
        featured.x, by_hand(net, images)
    ) < 1e-12  # fmt: skip
    net.fit(train)
    assert net.gradient_norm(train) < 1e-10 and net.gradient_norm(featured) < 1e-10
    np.testing.assert_allclose(net.hessian(train), net.hessian(featured), rtol=1e-12)
    few = train.take([1, 4, 6])
    for solver in (Direct(), CG(rtol=1e-12)):
        of_images = Influence(net, train, solver=solver, batch_size=7).scores(few)
        of_features = Influence(net, featured, solver=solver).scores(net.featured(few))
        np.testing.assert_allclose(
            of_images.change_if_removed, of_features.change_if_removed, rtol=1e-9, atol=1e-12
        )
    for question in (net.self_influence, net.one_step_leave_one_out):
        pair = [question(examples, np.array([2, 5])) for examples in (train, featured)]
        np.testing.assert_allclose(*pair, rtol=1e-9)


def test_cut_ends_at_a_layer_and_shares_its_weights():
    model = trunk()
    part = cut(model, "last")
    images = problem(2)[1]
    expected = model.get_layer("map")(part(images, training=False))
    np.testing.assert_allclose(model(images, training=False), expected, rtol=1e-12)
    assert part.get_layer("first") is model.get_layer("first")
    with pytest.raises(ValueError, match="layer_name must be a layer of 'trunk', .*'map', got 'm'"):
        cut(model, "m")


def test_pickled_with_its_trunk():
    net, images, _ = problem(3)
    expected = net.features(images)
    again = pickle.loads(reduction.dumps(net))  # as joblib sends it to its workers
    assert relative_error(again.features(images), expected) < 1e-12
    np.testing.assert_array_equal(again.theta, net.theta)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": np.zeros(4)}, r"mean must be 5 finite numbers, .* got shape \(4,\)"),
        ({"scale": np.array([1, 1, np.nan, 1, 1])}, "scale must be 5 finite .* with NaN"),
        ({"scale": np.array([1, 1, 0, 1, 1])}, "scale must be positive, got 0 at position 2"),
        ({"weight_decay": -1}, "weight_decay must be non-negative, got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TopLayer(trunk(), **options)


def test_bad_images():
    net, images, y = problem(4)
    v = np.ones(F)
    with pytest.raises(ValueError, match=r"train.x must be images of shape \(8, 8, 3\) .*'trunk'"):
        net.validate(Examples(images[:, :7], y), "train")
    with pytest.raises(ValueError, match=r"x must be images of shape .* got \(8, 7, 3\)"):
        net.features(images[:, :, :7])
    with pytest.raises(ValueError, match=r"images must be in \[-1, 1\] as floats, got .* to 3"):
        net.features(images + 3 - images.max())
    with pytest.raises(ValueError, match="bytes 0 to 255 as integers, got -1 to 300"):
        net.features(np.full(images.shape, 300) - 301 * (images > 0))
    with pytest.raises(TypeError, match="images must be integers or floats, got dtype bool"):
        net.features(images > 0)
    with pytest.raises(TypeError, match="x must be floating to be differentiated, got uint8"):
        net.input_gradient(np.zeros(images.shape, np.uint8), y, v)
    with pytest.raises(ValueError, match=r"v must have shape \(5,\), got \(4,\)"):
        net.input_gradient(images, y, v[:4])
    with pytest.raises(ValueError, match="x must be images of shape"):
        net.input_gradient(images[:, :7], y, v)
    with pytest.raises(ValueError, match=r"train.y must hold labels in \[0, 1\], got 2 in row 3"):
        net.validate(Examples(images, np.array([0, 1, 0, 2])), "train")
    with pytest.raises(ValueError, match=r"train.x must have rows of shape \(5,\) .* got \(6,\)"):
        net.validate(Examples(np.ones((4, 6)), y), "train")
    net.validate(Examples(images, y), "train")
    net.validate(Examples(net.features(images), y), "train")
