"""Tests of lookup layers before the trainable weights.

The lookup layers run once. The scores equal those of the model after the lookup layers.
"""

import pickle

import keras
import numpy as np
import pandas
import pytest
import tensorflow as tf

from influence import Direct, Examples, GenericNeuralNet, Hessian, Influence, Stream, check
from influence.net.preprocessing import split
from tests.influence.dense_scores import dense_scores

L = keras.layers
N, M, L2 = 40, 3, 0.1
RNG = np.random.default_rng(0)
JOBS = np.array(["nurse", "clerk", "pilot"], object)[RNG.integers(0, 3, N)]
AGES = RNG.normal(50, 10, N)
ZIPS = RNG.choice([10, 20, 77], N)
Y = (RNG.random(N) < 0.4).astype(int)
TABLE = pandas.DataFrame({"job": JOBS, "age": AGES, "zip": ZIPS})
WORDS = np.array("buy now cheap pills dear friend hello meeting".split())
MAILS = np.array([" ".join(RNG.choice(WORDS, 1 + i % 5)) for i in range(N)], object)
HOW = {"solver": Direct(), "damping": 0.1, "curvature": Hessian}


def from_logits():
    return keras.losses.BinaryCrossentropy(from_logits=True)


def cross_entropy(y, z):
    return tf.nn.sigmoid_cross_entropy_with_logits(y[:, None], z)[:, 0]


def head(units=1, **options):
    penalty = {f"{kind}_regularizer": keras.regularizers.L2(L2) for kind in ("kernel", "bias")}
    return L.Dense(units, **penalty, **options)


def expected(features, weights):
    """Return the scores of logistic regression on hand-made features, by dense matrices."""
    plain = keras.Sequential(
        [keras.Input((features.shape[1],), dtype="float64"), L.Dense(1, dtype="float64")]
    )
    plain.set_weights(weights)
    train, test = (features, Y.astype(float)), (features[:M], Y[:M].astype(float))
    return dense_scores(plain, cross_entropy, train, test, L2, damping=0.1)


def one_hot(values, vocabulary):
    return (np.asarray(values)[:, None] == np.asarray(vocabulary)).astype(float)


@pytest.fixture(scope="module")
def table():
    """Return a functional model of a table with strings, and the table's features made by hand."""
    inputs = {
        "job": keras.Input((1,), dtype="string", name="job"),
        "age": keras.Input((1,), name="age"),
        "zip": keras.Input((1,), dtype="int64", name="zip"),
    }
    jobs, years = L.StringLookup(vocabulary=["clerk", "nurse", "pilot"]), L.Normalization()
    years.adapt(AGES[:, None])
    encoded = L.CategoryEncoding(num_tokens=jobs.vocabulary_size(), output_mode="one_hot")
    zips = L.IntegerLookup(vocabulary=[10, 20, 77], output_mode="one_hot")
    parts = [encoded(jobs(inputs["job"])), years(inputs["age"]), zips(inputs["zip"])]
    ranges = L.Discretization([45.0, 55.0])(inputs["age"])
    parts.append(L.CategoryEncoding(3, output_mode="one_hot")(ranges))
    model = keras.Model(inputs, head()(L.Concatenate()(parts)))
    model.compile("adam", from_logits())
    keras.utils.set_random_seed(0)
    kinds = {"job": str, "age": np.float32, "zip": np.int64}
    x = {name: tf.constant(TABLE[name].to_numpy().astype(kind)) for name, kind in kinds.items()}
    model.fit(x, Y, epochs=2, verbose=0)
    standard = (AGES - AGES.mean()) / AGES.std()
    bins = np.digitize(AGES, [45.0, 55.0])
    features = np.column_stack(
        [
            one_hot(JOBS, ["[UNK]", "clerk", "nurse", "pilot"]),
            standard,
            one_hot(ZIPS, [-1, 10, 20, 77]),
            one_hot(bins, [0, 1, 2]),
        ]
    )
    return model, features, x


def test_a_table_with_strings_has_the_scores_of_its_hand_made_features(table):
    model, features, x = table
    want = expected(features, model.get_weights()[-2:])
    net = GenericNeuralNet(model)
    assert repr(net).startswith("GenericNeuralNet(")
    layers = "string_lookup, category_encoding, integer_lookup, discretization"
    note = "Applied once to each set, before the net: "
    assert note in repr(net) and set(layers.split(", ")) <= names_in(repr(net).split(note)[1])
    columns = dict(TABLE)
    for train in (
        (TABLE, Y),
        (columns, Y),
        ({k: v.to_numpy()[:, None] for k, v in columns.items()}, Y),
        Examples(TABLE, Y),
        Examples(columns, Y),
        tf.data.Dataset.from_tensor_slices((columns, Y)).batch(9),
        Stream(tf.data.Dataset.from_tensor_slices((x, Y)).batch(9)),
    ):
        scores = Influence(net, train, **HOW).scores((TABLE[:M], Y[:M]))
        np.testing.assert_allclose(scores, want, rtol=2e-4, atol=1e-7)
    assert net.risk((TABLE, Y)) == pytest.approx(model.evaluate(x, Y, verbose=0), rel=1e-5)
    np.testing.assert_allclose(net.outputs(columns), model(x), rtol=1e-5)


def names_in(text):
    return {name.rstrip("_0123456789") for name in text.rstrip(".").split(", ")}


def test_a_float64_copy_and_a_pickled_net_keep_the_lookups(table):
    model, features, _ = table
    want = expected(features, model.get_weights()[-2:])
    double = GenericNeuralNet(model, dtype="float64")
    scores = Influence(double, (TABLE, Y), **HOW).scores((TABLE[:M], Y[:M]))
    # The Normalization layer computes its mean and variance in float32, so the tolerance is 1e-5.
    np.testing.assert_allclose(scores, want, rtol=1e-5, atol=1e-9)
    single = GenericNeuralNet(model)
    losses = single.astype("float64").losses(dict(TABLE), Y)
    np.testing.assert_array_equal(losses, double.losses(dict(TABLE), Y))
    again = pickle.loads(pickle.dumps(single))
    np.testing.assert_array_equal(again.losses(dict(TABLE), Y), single.losses(dict(TABLE), Y))


def test_the_net_trains_the_users_own_weights(table):
    model, *_ = table
    kept = model.get_weights()
    net = GenericNeuralNet(model)
    net.theta = np.arange(net.num_parameters)
    assert np.array_equal(model.trainable_weights[-1].numpy(), net.theta[-1:])
    model.set_weights(kept)
    assert net.theta[-1] == kept[-1][0]


def test_a_set_is_prepared_once(table, monkeypatch):
    net, calls = GenericNeuralNet(table[0]), []
    call = type(net.preparation).__call__
    monkeypatch.setattr(
        type(net.preparation), "__call__", lambda self, x: calls.append(1) or call(self, x)
    )
    train = Examples(TABLE, Y)
    first = net.given(train, "train")
    assert len(calls) > 0
    before = len(calls)
    assert net.given(train, "train") is first
    assert net.given(first, "train") is first
    Influence(net, first, **HOW).scores(first.take([0, 1]))
    assert len(calls) == before


def mail_model(output_mode="multi_hot", lazy=False, **options):
    layer = L.TextVectorization(max_tokens=20, output_mode=output_mode, **options)
    layer.adapt(MAILS.astype(str))
    first = [] if lazy else [keras.Input((), dtype="string")]
    keras.utils.set_random_seed(0)
    model = keras.Sequential([*first, layer, head()])
    model.compile("adam", from_logits())
    if lazy:
        model(tf.constant(MAILS[:7].astype(str)))
    return model, layer


@pytest.mark.parametrize("lazy", [False, True])
def test_mails_have_the_scores_of_their_hand_made_features(lazy):
    model, layer = mail_model(lazy=lazy)
    words = layer.get_vocabulary()
    features = np.stack([[float(w in mail.split()) for w in words] for mail in MAILS])
    want = expected(features, model.get_weights()[-2:])
    train = (list(MAILS), Y) if lazy else Examples(pandas.Series(MAILS), Y)
    scores = Influence(model, train, **HOW).scores((MAILS[:M, None], Y[:M]))
    np.testing.assert_allclose(scores, want, rtol=2e-4, atol=1e-7)


def embedded(mask_zero, **options):
    layer = L.TextVectorization(max_tokens=20, **options)
    layer.adapt(MAILS.astype(str))
    body = [L.Embedding(20, 2, mask_zero=mask_zero), L.GlobalAveragePooling1D(), head()]
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((), dtype="string"), layer, *body])
    model.compile("adam", from_logits())
    return model, layer


def test_padding_that_no_output_depends_on_is_taken():
    model, layer = embedded(mask_zero=True)
    ids = layer(tf.constant(MAILS.astype(str))).numpy()
    plain = keras.Sequential(
        [
            keras.Input((ids.shape[1],), dtype="int64"),
            L.Embedding(20, 2, mask_zero=True, dtype="float64"),
            L.GlobalAveragePooling1D(dtype="float64"),
            L.Dense(1, dtype="float64"),
        ]
    )
    plain.set_weights(model.get_weights())
    y = Y.astype(float)
    net = GenericNeuralNet(model)
    # dense_scores puts the penalty L2 on every weight. In the model, only the embedding lacks it.
    net.flat.weights[0].regularizer = keras.regularizers.L2(L2)
    want = dense_scores(plain, cross_entropy, (ids, y), (ids[:M], y[:M]), L2, damping=1.0)
    how = {"solver": Direct(), "damping": 1.0, "curvature": Hessian}
    found = Influence(net, (MAILS, Y), **how).scores((MAILS[:M], Y[:M]))
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=1e-7)


def test_padding_that_outputs_depend_on_is_refused():
    with pytest.raises(ValueError, match="^model must give row .* of train the same output alone"):
        Influence(embedded(mask_zero=False)[0], (MAILS, Y))
    fixed = embedded(mask_zero=False, output_sequence_length=5)[0]
    assert GenericNeuralNet(fixed).risk((MAILS, Y)) == pytest.approx(
        fixed.evaluate(tf.constant(MAILS.astype(str)), Y, verbose=0), rel=1e-5
    )
    ragged = L.TextVectorization(ragged=True, vocabulary=list(WORDS))
    inputs = keras.Input((), dtype="string")
    pooled = L.Lambda(lambda t: tf.cast(t.to_tensor(), "float32")[:, :1], (1,))(ragged(inputs))
    model = keras.Model(inputs, head()(pooled))
    model.compile("sgd", "mse")
    # The lookup layer gives rows of different lengths, which the Lambda layer would cut to one.
    # The library applies only the lookup layer beforehand, and refuses its rows.
    net = GenericNeuralNet(model)
    with pytest.raises(ValueError, match="^model must prepare rows of one length, got a ragged"):
        Influence(net, (MAILS, Y))


def test_rescaling_stays_in_the_net():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), L.Rescaling(0.1, offset=-1.0), head()])
    model.compile("sgd", from_logits())
    assert GenericNeuralNet(model).preparation is None
    x = np.column_stack([AGES, ZIPS])
    scores = Influence(model, (x, Y), **HOW)
    want = expected(x * 0.1 - 1, model.get_weights())
    np.testing.assert_allclose(scores.scores((x[:M], Y[:M])), want, rtol=2e-4, atol=1e-7)
    # The derivatives are with respect to the given x, so they have its two columns.
    assert scores.perturbation((x[:M], Y[:M]), [0]).shape == (M, 1, 2)


def test_a_nested_front_and_an_integer_front():
    inputs = keras.Input((1,), dtype="string")
    front = keras.Model(
        inputs, L.StringLookup(vocabulary=list(WORDS), output_mode="one_hot")(inputs)
    )
    whole = keras.Sequential([keras.Input((1,), dtype="string"), front, head()])
    whole.compile("sgd", from_logits())
    words = WORDS[RNG.integers(0, 8, N)]
    want = expected(one_hot(words, ["[UNK]", *WORDS]), whole.get_weights())
    scores = Influence(whole, (words, Y), **HOW).scores((words[:M], Y[:M]))
    np.testing.assert_allclose(scores, want, rtol=2e-4, atol=1e-7)
    crossed = keras.Sequential(
        [keras.Input((1,), dtype="int64"), L.Hashing(4, output_mode="one_hot"), head()]
    )
    crossed.compile("sgd", from_logits())
    hashed = crossed.layers[0](ZIPS[:, None]).numpy().astype(float)
    want = expected(hashed, crossed.get_weights())
    scores = Influence(crossed, (ZIPS, Y), **HOW).scores((ZIPS[:M], Y[:M]))
    np.testing.assert_allclose(scores, want, rtol=2e-4, atol=1e-7)


class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.words, self.dense = mail_model()[1], head()

    def call(self, x):
        return self.dense(self.words(x))


def test_models_that_cannot_be_cut():
    own = Own()
    own(tf.constant(MAILS[:2].astype(str)))
    with pytest.raises(ValueError, match="^model must be Sequential or functional to be cut behi"):
        GenericNeuralNet(own, from_logits())
    inner = mail_model()[0]
    outer = keras.Sequential([keras.Input((), dtype="string"), inner])
    with pytest.raises(ValueError, match="^model must keep its lookup layers apart from its weigh"):
        GenericNeuralNet(outer, from_logits())
    plain = keras.Sequential([keras.Input((2,)), head()])
    assert split(plain) == (None, plain)


def test_rows_that_the_lookups_do_not_take(table):
    net = GenericNeuralNet(table[0])
    missing = TABLE.copy()
    missing.loc[4, "job"] = None
    for value, error, message in (
        (
            (TABLE[["job", "age"]], Y),
            ValueError,
            r"^train\.x must have the model's inputs",
        ),
        (
            (missing, Y),
            TypeError,
            r"^x\['job'\] must have a string in every row, got None in r",
        ),
        ((TABLE.assign(zip="a"), Y), TypeError, r"^train\.x\['zip'\] must hold int64 entries"),
        ((TABLE.assign(job=1), Y), TypeError, r"^train\.x\['job'\] must hold string entries, got"),
        (
            ({**dict(TABLE), "age": np.ones((N, 2))}, Y),
            ValueError,
            r"of shape \(1,\), got \(2,",
        ),
        ((TABLE, JOBS), TypeError, "^y must be an array of numbers, got dtype object of strings"),
    ):
        with pytest.raises(error, match=message):
            Influence(net, value)


def test_check_takes_a_table(table):
    report = check(table[0], (TABLE, Y))
    assert report["train fits the net"].verdict == "ok"
    assert report["Hessian = differences"].verdict == "ok"


def test_lookups_in_front_of_float64_weights_and_after_operations():
    inputs = keras.Input((1,), dtype="int64")
    shifted = keras.ops.add(inputs, 5)  # this operation is not a layer
    encoded = L.CategoryEncoding(90, output_mode="one_hot")(shifted)
    model = keras.Model(inputs, head(dtype="float64")(encoded))
    model.compile("sgd", from_logits())
    features = one_hot(ZIPS + 5, np.arange(90))
    scores = Influence(model, (ZIPS, Y), **HOW).scores((ZIPS[:M], Y[:M]))
    np.testing.assert_allclose(scores, expected(features, model.get_weights()), rtol=1e-8)
