"""Tests of out-of-fold outputs, by a training whose result is known exactly."""

import keras
import numpy as np
import pytest

from influence import QuestionOptions, audit
from influence.tool import own_training
from influence.tool.folds import folds_of
from tests import oracles
from tests.influence.tool.conftest import PENALTY, softmax_model

layers = keras.layers
CALLS = []


def refit(model, x, y):
    """Set the weights to the exact minimum on the given rows."""
    CALLS.append((len(y), [w.copy() for w in model.get_weights()]))
    risk = oracles.softmax_regression(oracles.with_ones(x.astype(float)), y, 3, PENALTY)
    theta = risk.minimum(np.zeros(15))
    model.set_weights([theta[:12].reshape(4, 3), theta[12:]])


def test_folds_share_out_the_classes():
    given = np.repeat([0, 1], [30, 12])
    fold = folds_of(given, 3, True)
    assert np.bincount(fold).tolist() == [14, 14, 14]
    assert np.bincount(fold[given == 1]).tolist() == [4, 4, 4]


def test_every_row_is_judged_by_an_exact_fit_without_its_fold(problem):
    CALLS.clear()
    model = softmax_model(problem.theta)
    options = QuestionOptions(check=False)
    found = audit(model, problem.train, folds=3, fit=refit, options=options)
    assert found.choice.ranking == "folds" and [n for n, _ in CALLS] == [30, 30, 30]
    x, y = problem.train
    fold = folds_of(y, 3, True)
    one = oracles.with_ones(x.astype(float))
    exact = np.empty(45)
    for k in range(3):
        inside = np.flatnonzero(fold == k)
        W = problem.risk.without(inside).minimum(np.zeros(15)).reshape(5, 3)
        for row in inside:
            z = one[row] @ W
            exact[row] = z[y[row]] - np.delete(z, y[row]).max()
    np.testing.assert_allclose(found.values["folds"], exact, rtol=1e-3, atol=1e-4)
    assert found.order[0] == 7 and found.suggested[7] == problem.true[7]
    # The training of a fold starts from new weights, w. It leaves the weights of the model
    # unchanged.
    assert all(np.abs(w[0] - model.get_weights()[0]).max() > 0.01 for _, w in CALLS)
    np.testing.assert_allclose(model.get_weights()[1], problem.theta[12:], rtol=1e-6)


def test_an_interrupted_run_goes_on_after_the_last_finished_fold(problem, tmp_path):
    def breaks(model, x, y):
        if len(CALLS) == 2:
            raise KeyboardInterrupt
        refit(model, x, y)

    CALLS.clear()
    options = QuestionOptions(check=False, checkpoints=tmp_path)
    how = {"folds": 3, "options": options}
    with pytest.raises(KeyboardInterrupt):
        audit(problem.model, problem.train, fit=breaks, **how)
    assert len(list(tmp_path.glob("fold-*.npz"))) == 2
    first = audit(problem.model, problem.train, fit=refit, **how)
    # Two folds were finished, so this run trained only the third. It uses the two although they
    # were trained by `breaks` and not by `refit`.
    assert len(CALLS) == 3
    whole = audit(problem.model, problem.train, folds=3, fit=refit)
    np.testing.assert_allclose(first.values["folds"], whole.values["folds"], rtol=1e-5)


def test_a_fresh_model_keeps_what_no_training_changes():
    norm = layers.Normalization()
    norm.adapt(np.array([[1.0, 5.0], [3.0, 9.0]]))
    stack = [norm, layers.Dense(3, name="frozen"), layers.Dense(3, name="free")]
    stack += [layers.BatchNormalization(name="batch"), layers.Dropout(0.5), layers.Dense(2)]
    model = keras.Sequential([keras.Input((2,)), *stack])
    model.get_layer("frozen").trainable = False
    model.compile(keras.optimizers.Adam(0.02), keras.losses.MeanSquaredError())
    model.get_layer("batch").moving_mean.assign([7.0, 7.0, 7.0])
    copy = own_training.fresh(model)
    np.testing.assert_array_equal(copy.layers[0].mean, model.layers[0].mean)
    for name, same in (("frozen", True), ("free", False)):
        old, new = (m.get_layer(name).kernel.numpy() for m in (model, copy))
        assert np.array_equal(old, new) == same
    assert not copy.get_layer("batch").moving_mean.numpy().any()
    assert float(copy.optimizer.learning_rate) == pytest.approx(0.02)
    assert copy.optimizer is not model.optimizer
    copy.fit(np.ones((4, 2)), np.ones((4, 2)), verbose=0)
    assert model.get_layer("batch").moving_mean.numpy()[0] == 7.0


def test_numbers_are_predicted_without_their_fold():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 2)).astype(np.float32)
    y = (x @ [2.0, -1.0] + 0.5).astype(np.float32)
    y[4] += 6
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile("sgd", "mse")

    def fit(model, x, y):
        w = np.linalg.lstsq(oracles.with_ones(x.astype(float)), y.ravel(), rcond=None)[0]
        model.set_weights([w[:2, None], w[2:]])

    found = audit(model, (x, y), folds=5, fit=fit, options=QuestionOptions(check=False))
    inside = folds_of(y, 5, False) == folds_of(y, 5, False)[4]
    one = oracles.with_ones(x.astype(float))
    w = np.linalg.lstsq(one[~inside], y[~inside], rcond=None)[0]
    assert found.values["folds"][4] == pytest.approx(-abs(y[4] - one[4] @ w), rel=1e-4)
    assert found.order[0] == 4


def test_frozen_layers_keep_their_weights_in_every_fold():
    keras.utils.set_random_seed(1)
    stack = [layers.Dense(8, "tanh", name="frozen"), layers.Dense(2, name="head")]
    model = keras.Sequential([keras.Input((4,)), *stack])
    model.get_layer("frozen").trainable = False
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    kernel = model.get_layer("frozen").kernel.numpy()
    seen = []

    def fit(model, x, y):
        seen.append((x, model.get_layer("frozen").kernel.numpy()))
        model.get_layer("head").set_weights([np.ones((8, 2)) * [0, 1], np.zeros(2)])

    x = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    y = np.arange(20) % 2
    found = audit(model, (x, y), folds=2, fit=fit, options=QuestionOptions(check=False))
    assert found.subject.net.flat.trunk is not None
    assert all(part.shape == (10, 4) and np.array_equal(w, kernel) for part, w in seen)
    z = np.tanh(x @ kernel + model.get_layer("frozen").bias.numpy()).sum(axis=1)
    np.testing.assert_allclose(found.values["folds"], np.where(y == 1, z, -z), rtol=1e-4, atol=1e-4)


def test_a_fold_without_a_class_is_judged_like_the_others():
    """Check five folds with a class of only three rows.

    Two folds have no row of this class. Their margins must be computed like those of the others.
    """
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, "sigmoid")])
    model.compile("sgd", "binary_crossentropy")
    x = np.random.default_rng(0).standard_normal((30, 2)).astype(np.float32)
    y = (np.arange(30) < 3).astype(np.float32)

    def fit(model, x, y):
        model.set_weights([np.array([[1.0], [-1.0]]), np.array([0.5])])

    options = QuestionOptions(check=False)
    found = audit(model, (x, y[:, None]), folds=5, fit=fit, options=options)
    assert len(set(folds_of(y, 5, True)[:3])) == 3
    z = x[:, 0] - x[:, 1] + 0.5
    np.testing.assert_allclose(found.values["folds"], np.where(y == 1, z, -z), rtol=1e-4, atol=1e-5)


def test_a_model_behind_lookup_layers_trains_with_its_own_optimiser():
    words = np.array(["good film", "bad film", "good plot", "bad plot"] * 5)
    lookup = layers.TextVectorization(output_mode="multi_hot")
    lookup.adapt(words)
    stack = [lookup, layers.Dense(1, "sigmoid")]
    model = keras.Sequential([keras.Input((), dtype="string"), *stack])
    model.compile(keras.optimizers.Adam(0.02, beta_1=0.7), "binary_crossentropy")
    seen = []

    def fit(model, x, y):
        seen.append(model.optimizer)
        model.fit(x, y, epochs=1, verbose=0)

    y = np.array([1, 0, 1, 0] * 5)
    audit(model, (words, y), folds=2, fit=fit, options=QuestionOptions(check=False))
    assert [type(optimizer).__name__ for optimizer in seen] == ["Adam"] * 2
    assert [float(optimizer.learning_rate) for optimizer in seen] == pytest.approx([0.02] * 2)
    assert seen[0].beta_1 == 0.7 and seen[0] is not seen[1]
