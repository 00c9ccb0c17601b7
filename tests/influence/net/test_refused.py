import keras
import numpy as np
import pytest

from influence import Examples, GenericNeuralNet, Influence
from influence.examples.stream import Stream
from tests.influence import problems
from tests.influence.examples.test_stream import Batches

# So many rows that the check needs more than one pass.
N = 9000
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
L = keras.layers
MESSAGE = r"^train\.x must hold ids 0 to 6 for layer 'words' \(input_dim=7\), got {} in row {}\.$"


def words(**options):
    return L.Embedding(7, 2, name="words", **options)


def sequential(dtype="int64"):
    return problems.sequential((3,), words(), L.Flatten(), L.Dense(2), dtype=dtype)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.words, self.head = words(), L.Dense(2)

    def call(self, x):
        return self.head(self.words(x)[:, 0])


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 3), int))
    return model


def nested():
    x = keras.Input((3,), dtype="int64")
    return keras.Model(x, sequential()(x))


def ids():
    return np.random.default_rng(0).integers(0, 7, (N, 3))


@pytest.mark.parametrize("make", [sequential, lambda: sequential("float32"), subclassed, nested])
@pytest.mark.parametrize(("row", "wrong"), [(0, 7), (5, -1), (8000, 7), (8999, -3)])
def test_an_id_out_of_range_is_named(make, row, wrong):
    net = GenericNeuralNet(make(), LOSS)
    x, y = ids(), np.arange(N) % 2
    net.validate(Examples(x, y), "train")
    x[row, 1] = wrong
    with pytest.raises(ValueError, match=MESSAGE.format(wrong, row)):
        net.validate(Examples(x, y), "train")
    with pytest.raises(ValueError, match=MESSAGE.format(wrong, row)):
        Influence(net, Examples(x, y))


def test_one_input_of_two_by_its_name_and_floats_that_are_cut_off():
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    shared = words()
    both = L.Concatenate(axis=1)([shared(a), shared(b)])
    net = GenericNeuralNet(keras.Model([a, b], L.Dense(2)(L.Flatten()(both))), LOSS)
    x = {"a": ids(), "b": ids()[:, :2] + 0.9}
    x["b"][0] = -0.9
    net.validate(Examples(x, np.arange(N) % 2), "test")
    x["b"][77, 1] = 7.0
    message = r"^test\.x\['b'\] must hold ids 0 to 6 for layer 'words' .*got 7\.0 in row 77\.$"
    with pytest.raises(ValueError, match=message):
        net.validate(Examples(x, np.arange(N) % 2), "test")


def test_ids_that_the_model_computes_are_its_own_affair():
    x = keras.Input((3,), dtype="int64")
    clipped = keras.ops.minimum(x, 6)
    net = GenericNeuralNet(keras.Model(x, L.Dense(2)(L.Flatten()(words()(clipped)))), LOSS)
    net.validate(Examples(ids() * 100, np.arange(N) % 2), "train")


def test_the_rows_of_a_set_are_read_once_and_the_layer_is_as_before():
    class Counted(Examples):
        def _read(self, size, rows):
            passes.append(size)
            return super()._read(size, rows)

    passes, call = [], L.Embedding.call
    net, train = GenericNeuralNet(sequential(), LOSS), Counted(ids(), np.arange(N) % 2)
    for _ in range(2):
        net.validate(train, "train")
        assert len(passes) == 1
    assert L.Embedding.call is call


def test_a_stream_of_ids():
    x, y = ids()[:50], np.arange(50) % 2
    x[41, 2] = 12
    net = GenericNeuralNet(sequential(), LOSS)
    with pytest.raises(ValueError, match=MESSAGE.format(12, 41)):
        net.validate(Stream(Batches(x, y)), "train")
