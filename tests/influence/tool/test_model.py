import keras
import numpy as np
import pytest

from influence import QuestionOptions, explain
from influence.examples.arrays import parts_of
from influence.examples.featured import inputs_of
from influence.tool.model import function_of, is_function, read_model
from influence.tool.subject import Loaded, Subject
from tests.influence.tool.conftest import softmax_model


def frozen(trainable=False):
    """Return a CNN with BatchNormalization and Dropout, whose first layers are frozen."""
    keras.utils.set_random_seed(0)
    trunk = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.GlobalAveragePooling2D(),
        ]
    )
    trunk.trainable = trainable
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Dropout(0.5)(trunk(keras.layers.Rescaling(1 / 255)(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax")(x))
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def test_frozen_layers_run_once_and_the_scores_stay_the_same(tmp_path, monkeypatch):
    import influence.tool.subject as module

    model = frozen()
    rng = np.random.default_rng(0)
    x = (rng.random((30, 8, 8, 1)) * 255).astype(np.float32)
    y = rng.integers(0, 3, 30)
    options = QuestionOptions(check=False, checkpoints=tmp_path)
    monkeypatch.setattr(module, "_PART", 10)
    cut = explain(model, (x, y), (x[:4], y[:4]), rows=[1, 3], options=options)
    (features,) = cut.subject.train.x.values()
    means = model.layers[2](x / 255, training=False)
    np.testing.assert_allclose(features, means, rtol=1e-5)  # the output of the trunk, (30, 4)
    whole = Loaded.of(model)
    from influence import GenericNeuralNet

    net = GenericNeuralNet(model)
    plain = explain(net, (x, y), (x[:4], y[:4]), rows=[1, 3], options=QuestionOptions(check=False))
    # `cut` works on the trunk's features, and `plain` on the images. Each chooses its own damping.
    # The two dampings are almost equal, so the scores are, too.
    np.testing.assert_allclose(np.asarray(cut.scores), np.asarray(plain.scores), rtol=2e-3,
                               atol=1e-6)  # fmt: skip
    assert len(list(tmp_path.glob("features-*.npz"))) == 4

    def forbidden(*_):
        raise AssertionError("the features are kept")

    monkeypatch.setattr("influence.net.trunk.Trunk.__call__", forbidden)
    again = Subject.of(whole, (x, y), None, options)
    np.testing.assert_array_equal(
        *(next(iter(part.train.x.values())) for part in (again, cut.subject))
    )
    assert again.train.fingerprint == cut.subject.train.fingerprint
    (given,) = parts_of(inputs_of(again.train).x).values()
    np.testing.assert_array_equal(given, x)  # the images are still available, besides the features


def test_a_model_with_dropout_has_the_same_key_each_time_it_is_loaded(tmp_path):
    for trainable in (False, True):
        path = tmp_path / f"{trainable}.keras"
        frozen(trainable).save(path)
        rng = np.random.default_rng(0)
        rows = (rng.random((12, 8, 8, 1)).astype(np.float32), rng.integers(0, 3, 12))
        keys, names = set(), set()
        for _ in range(2):
            options = QuestionOptions(checkpoints=tmp_path / str(trainable))
            keys.add(Subject.of(str(path), rows, None, options).key)
            names |= {file.name for file in (tmp_path / str(trainable)).glob("*.npz")}
        assert len(keys) == 1 and len(names) == (not trainable)


def test_a_saved_model_and_a_function_are_read(tmp_path, monkeypatch):
    model = softmax_model(np.arange(15.0))
    model.save(tmp_path / "m.keras")
    read = read_model(str(tmp_path / "m.keras"))
    np.testing.assert_array_equal(read.get_weights()[0], model.get_weights()[0])
    monkeypatch.chdir(tmp_path)
    code = "import keras\ndef load():\n    return keras.saving.load_model('m.keras')\n"
    (tmp_path / "own_model.py").write_text(code)
    read = read_model("own_model.py:load")
    np.testing.assert_array_equal(read.get_weights()[0], model.get_weights()[0])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nothing.keras", "path must be a file of a saved model, got nothing.keras"),
        ("nothing", "MODEL must be a file .keras or .h5, or module:function, got 'nothing'"),
        ("no.py:f", "whose module cannot be imported"),
    ],
)
def test_wrong_models_are_named(tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        read_model(text)


def test_a_file_that_is_no_model_is_named(tmp_path):
    (tmp_path / "m.keras").write_text("no model")
    with pytest.raises(ValueError, match="path must hold a model that Keras can load"):
        read_model(str(tmp_path / "m.keras"))
    (tmp_path / "m.txt").write_text("no model")
    with pytest.raises(ValueError, match="it ends in '.txt'"):
        read_model(str(tmp_path / "m.txt"))


def test_a_path_with_a_colon_is_no_function(tmp_path):
    assert is_function("package.module:name") and is_function("file.py:name")
    assert not is_function("C:/x.keras") and not is_function("plain")
    (tmp_path / "a:b").write_text("")
    assert not is_function(str(tmp_path / "a:b"))


def test_a_module_that_fails_leaves_nothing_behind(tmp_path):
    import sys

    (tmp_path / "broken_module.py").write_text("raise ImportError('no')")
    with pytest.raises(ValueError, match="cannot be imported"):
        function_of(f"{tmp_path / 'broken_module.py'}:f", "MODEL")
    assert "broken_module" not in sys.modules
