"""Tests of models loaded from files."""

import keras
import numpy as np
import pytest

from influence import GenericNeuralNet, Influence
from tests.influence.dense_scores import dense_scores
from tests.influence.net.test_precision import HOW, L2, M, X, Y, small, square

L = keras.layers


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("saved"), small("float32")
    for name in ("model.keras", "model.h5"):
        model.save(folder / name)
    model.save_weights(folder / "model.weights.h5")
    plain = small("float64", l2=0)
    plain.set_weights(model.get_weights())
    return folder, dense_scores(plain, square, (X, Y), (X[:M], Y[:M]), L2, damping=2.0)


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.weights.h5"])
def test_a_saved_model_has_the_scores_of_a_dense_matrix(saved, name):
    folder, want = saved
    model = None
    if "weights" in name:
        model = small("float32")
        model.set_weights([np.zeros_like(w) for w in model.get_weights()])
    net = GenericNeuralNet.load(folder / name, model=model, dtype="float64")
    scores = Influence(net, (X, Y), **HOW).scores((X[:M], Y[:M]))
    np.testing.assert_allclose(scores, want, rtol=1e-9, atol=1e-14)


def test_a_path_is_a_net(saved):
    folder, want = saved
    for path in (str(folder / "model.keras"), folder / "model.h5"):
        scores = Influence(path, (X, Y), **HOW).scores((X[:M], Y[:M]))
        np.testing.assert_allclose(scores, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [".keras", ".h5"])
def test_losses_keep_their_options_or_are_asked_for(tmp_path, kind):
    model = keras.Sequential([keras.Input((3,)), L.Dense(1)])
    smoothed = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.2)
    y = (Y > 0).astype(int)
    for loss in (smoothed, "mse", "huber"):
        model.compile("sgd", loss)
        model.save(tmp_path / f"a{kind}")
        reported = model.evaluate(X, y, verbose=0)
        assert GenericNeuralNet.load(tmp_path / f"a{kind}").risk((X, y)) == pytest.approx(reported)
    model.compile("sgd", keras.losses.Huber(0.3))
    model.save(tmp_path / f"b{kind}")
    with pytest.raises(ValueError, match="^path must .* Keras saves Huber without its delta"):
        GenericNeuralNet.load(tmp_path / f"b{kind}")
    net = GenericNeuralNet.load(tmp_path / f"b{kind}", keras.losses.Huber(0.3))
    assert net.risk((X, Y)) == pytest.approx(model.evaluate(X, Y, verbose=0))


def test_files_that_are_refused(tmp_path, saved):
    folder, _ = saved
    code = keras.Sequential([keras.Input((3,)), L.Lambda(lambda x: 2 * x), L.Dense(1)])
    code.compile("sgd", "mse")
    for name in ("code.keras", "code.h5"):
        code.save(tmp_path / name)
    bad = tmp_path / "bad.keras"
    bad.write_text("no model")
    (tmp_path / "exported").mkdir()
    text = tmp_path / "text.txt"
    text.write_text("no model")
    other = keras.Sequential([keras.Input((3,)), L.Dense(1)])
    for path, model, error, message in (
        (tmp_path / "none.keras", None, FileNotFoundError, "^path must be .*none.keras, which is"),
        (bad, None, ValueError, "^path must hold a model that Keras can load, got 'bad.keras'"),
        (tmp_path / "code.keras", None, ValueError, "contains a Lambda, whose Python code is not"),
        (tmp_path / "code.h5", None, ValueError, "contains a Lambda, whose Python code is not run"),
        (tmp_path / "exported", None, ValueError, "^path must be a file .*, got the folder"),
        (text, None, ValueError, "^path must end in .keras, .h5 or .weights.h5, got 'text.txt'"),
        (folder / "model.weights.h5", None, ValueError, "^model must be given for a file of weig"),
        (folder / "model.weights.h5", other, ValueError, "the model must have the layers of the f"),
        (3, None, TypeError, "^path must be the path of a saved model, got int"),
    ):
        with pytest.raises(error, match=message) as found:
            GenericNeuralNet.load(path, model=model)
        assert "\n" not in str(found.value)
