from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd
import pytest

from influence import History, QuestionOptions, Recorder, audit, explain
from influence.tool.last_layer import last_layer
from tests import oracles
from tests.influence import recorded
from tests.influence.problems import ridge

NO_CHECK = QuestionOptions(check=False)


@pytest.fixture(scope="module")
def found(problem):
    return audit(problem.model, problem.train, top=20)


def test_self_influence_is_that_of_dense_algebra(problem):
    found = audit(problem.model, problem.train, ranking="self_influence")
    moves = problem.risk.predicted_parameters(problem.theta, np.arange(45))
    own = np.einsum("id,id->i", problem.risk.gradients(problem.theta), moves)
    np.testing.assert_allclose(found.self_influence, own, rtol=1e-4)
    np.testing.assert_array_equal(found.order, np.argsort(-own))


def test_the_order_is_that_of_margins_without_the_row(problem, found):
    x, y = problem.train
    x = (x - x.mean(axis=0, dtype=float)) / x.std(axis=0, dtype=float)
    risk = oracles.softmax_regression(oracles.with_ones(x), y, 3, found.last.weight_decay)
    start, exact = risk.minimum(np.zeros(15)), np.empty(45)
    for row in range(45):
        z = risk.features[row] @ risk.without([row]).minimum(start).reshape(5, 3)
        exact[row] = z[y[row]] - np.delete(z, y[row]).max()
    assert found.choice.ranking == "margin"
    # `exact` has margins after refits without the row. The audit takes one Newton step instead. For
    # row 7, which has the wrong label, this step is 8 % too short.
    np.testing.assert_allclose(found.values["margin"], exact, rtol=0.1, atol=0.05)
    np.testing.assert_array_equal(found.order, np.argsort(found.values["margin"], kind="stable"))
    # Self-influence was not asked for. The audit computes it anyway for such a small model.
    assert found.self_influence is not None


def test_the_wrong_label_comes_first_and_its_true_class_is_suggested(problem, found):
    assert found.order[0] == 7
    assert found.suggested[7] == problem.true[7]
    p = found.last.probabilities
    given = problem.train[1]
    t = [p[given == c, c].mean() for c in range(3)]
    np.testing.assert_allclose(found.thresholds, t)
    for row, label in found.suggested.items():
        assert label != given[row] and p[row, label] >= t[label]


def test_the_csv_has_all_rows_and_rankings_and_an_empty_column_to_fill_in(found, tmp_path):
    table = pd.read_csv(found.to_csv(tmp_path / "audit.csv"))
    assert table["row"].tolist() == found.order.tolist()
    assert table["rank"].tolist() == list(range(1, 46))
    assert table["new_label"].isna().all()
    for name in ("margin", "loss", "self_influence"):
        np.testing.assert_allclose(table[name], found.values[name][found.order])
    assert table["folds"].isna().all() and table["history"].isna().all()
    assert table["suggested"].notna().sum() == len(found.suggested)


def test_numbers_are_ranked_by_their_residual_without_the_row():
    p = ridge()
    found = audit(p.net, p.train, options=NO_CHECK)
    assert found.choice.ranking == "margin" and found.suggested == {}
    np.testing.assert_array_equal(found.order, np.argsort(-np.abs(found.last.residuals)))
    moves = p.oracle.predicted_parameters(p.theta, np.arange(40))
    own = np.einsum("id,id->i", p.oracle.gradients(p.theta), moves)
    np.testing.assert_allclose(found.self_influence, own, rtol=1e-6)
    assert "no label is suggested" in found.alerts[0].headline


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Return a network that has memorised the wrong labels of a fifth of its training rows."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 20)).astype(np.float32)
    y = (x[:, 0] + x[:, 1] > 0).astype(int)
    noisy, bad = y.copy(), rng.permutation(200)[:40]
    noisy[bad] = 1 - y[bad]
    model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(200, "relu"),
                              keras.layers.Dense(50, "relu"), keras.layers.Dense(1)])  # fmt: skip
    model.compile(keras.optimizers.Adam(0.01), keras.losses.BinaryCrossentropy(from_logits=True))
    train, test = (x[:200], noisy[:200]), (x[200:], y[200:])
    folder = tmp_path_factory.mktemp("memory")
    model.fit(*train, epochs=12, verbose=0, callbacks=[Recorder(folder, train, every=1)])
    model.fit(*train, epochs=28, verbose=0)
    return SimpleNamespace(model=model, train=train, test=test, bad=bad, history=folder)


def test_memorised_features_raise_the_alert(memory):
    found = audit(memory.model, memory.train, memory.test, options=NO_CHECK)
    (alert,) = [a for a in found.alerts if "has memorised" in a.headline]
    assert "--history" in alert.remedy and "--folds 5" in alert.remedy
    assert found.choice.ranking == "margin"
    # Without held-out rows, the audit can only suspect that the model has memorised its labels.
    alone = audit(memory.model, memory.train, options=NO_CHECK)
    assert any("may have memorised" in a.headline for a in alone.alerts)


def test_the_history_ranks_where_the_features_have_memorised(memory):
    options = QuestionOptions(check=False, history=memory.history)
    found = audit(memory.model, memory.train, memory.test, options=options)
    assert found.choice.ranking == "history"
    mean = History.load(memory.history).margins.mean(axis=0)
    np.testing.assert_array_equal(found.order, np.argsort(mean, kind="stable"))

    def recall(values):
        return np.isin(np.argsort(values)[:40], memory.bad).mean()

    assert recall(mean) > recall(found.values["margin"]) + 0.1
    assert set(found.suggested) == set(np.flatnonzero(mean < 0))
    assert all(label == 1 - memory.train[1][row] for row, label in found.suggested.items())


def test_the_folder_of_a_recorder_is_a_history(tmp_path):
    model = recorded.train(tmp_path / "run", epochs=3)
    x, y = recorded.rows()
    options = QuestionOptions(check=False, history=tmp_path / "run")
    how = {"ranking": "history", "options": options}
    found = audit(model, (x, y), **how)
    mean = History.load(tmp_path / "run").margins.mean(axis=0)
    np.testing.assert_allclose(found.values["history"], mean)
    np.testing.assert_array_equal(found.order, np.argsort(mean, kind="stable"))
    z = x @ model.layers[0].kernel.numpy() + model.layers[0].bias.numpy()
    best = np.where(np.eye(3)[y] == 1, -np.inf, z).max(axis=1)
    last = History.load(tmp_path / "run").margins[-1]
    np.testing.assert_allclose(last, z[np.arange(40), y] - best, rtol=1e-6)
    with pytest.raises(ValueError, match="must have the labels of the history"):
        audit(model, (x, y[::-1].copy()), **how)
    assert not any("another model" in alert.headline for alert in found.alerts)
    assert dict(found.facts())["Training"].startswith("3 epochs by SGD")


@pytest.mark.parametrize("question", [audit, explain])
def test_a_history_of_another_model_is_said(tmp_path, question):
    recorded.train(tmp_path, epochs=2)
    other = recorded.model()
    with recorded.double():
        other.fit(*recorded.rows(), epochs=5, verbose=0)
    options = QuestionOptions(check=False, history=tmp_path)
    found = question(other, recorded.rows(), options=options)
    (alert,) = [a for a in found.alerts if "may be that of another model" in a.headline]
    assert alert.level == "care" and "after any epoch" in alert.detail


def test_residuals_of_the_history_do_not_doubt_every_label(tmp_path):
    """Check a model of labels 0 and 1 with the squared error, whose history has residuals.

    The ranking's values are minus their sizes, so all are negative. The audit must not take this
    for wrong labels in every row.
    """
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 3)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.float32)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, "sigmoid")])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.fit(x, y, epochs=5, verbose=0, callbacks=[Recorder(tmp_path, (x, y), every=1)])
    options = QuestionOptions(check=False, history=tmp_path)
    found = audit(model, (x, y), ranking="history", options=options)
    assert History.load(tmp_path).kind == "residual" and (found.values["history"] < 0).all()
    p = found.last.probabilities
    reaches = p >= np.array([p[y == c, c].mean() for c in (0, 1)])
    best = np.where(reaches, p, -1).argmax(axis=1)
    doubted = reaches.any(axis=1) & (best != y)
    assert set(found.suggested) == set(np.flatnonzero(doubted)) and doubted.sum() < 10


def test_sample_weights_count_in_the_refit(problem):
    x, y = problem.train
    weights = np.where(y == 0, 5.0, 1.0)
    found = audit(problem.model, (x, y, weights), options=NO_CHECK)
    expected = last_layer(x, y, 3, weights=weights)
    np.testing.assert_allclose(found.values["margin"], expected.margins, rtol=1e-6)
    plain = last_layer(x, y, 3)
    assert np.abs(found.values["margin"] - plain.margins).max() > 0.1
    assert "rows count by their sample weights" in dict(found.facts())["Refitted last layer"]


def test_held_out_rows_of_one_class_are_coded_like_the_training_rows():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((80, 2)).astype(np.float32)
    y = np.where(x[:, 0] + 0.5 * rng.standard_normal(80) > 0, 1.0, -1.0).astype(np.float32)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "squared_hinge")
    rest = np.flatnonzero(y[50:] < 0) + 50
    found = audit(model, (x[:50], y[:50]), (x[rest], y[rest]), options=NO_CHECK)
    assert found.subject.of_test.given.tolist() == [0] * len(rest)
    expected = last_layer(x[:50], (y[:50] > 0).astype(int), 2, (x[rest], np.zeros(len(rest), int)))
    np.testing.assert_allclose(found.last.held_out, expected.held_out, rtol=1e-6)


def test_features_that_generalise_raise_no_alert(problem, found, tmp_path):
    assert not any("memorised" in a.headline for a in found.alerts)
    model = keras.models.clone_model(problem.model)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.set_weights(problem.model.get_weights())
    model.fit(*problem.train, verbose=0, callbacks=[Recorder(tmp_path, problem.train)])
    options = QuestionOptions(check=False, history=tmp_path)
    again = audit(model, problem.train, problem.test, options=options)
    assert again.choice.ranking == "margin" and "history" in again.values


def test_a_large_network_is_not_asked_for_self_influence(memory, monkeypatch):
    monkeypatch.setattr("influence.tool.audit._self_influence", None)
    found = audit(memory.model, memory.train)
    assert found.self_influence is None
    assert found.records()[0]["self_influence"] is None


def test_parts_kept_on_disk_give_the_same_numbers(problem, found, tmp_path, monkeypatch):
    import influence.tool.audit as module

    monkeypatch.setattr(module, "_PART", 16)
    options = QuestionOptions(check=False, checkpoints=tmp_path)
    monkeypatch.setattr(module, "_CHEAP", 15)
    again = audit(problem.model, problem.train, top=20, options=options)
    np.testing.assert_allclose(again.self_influence, found.self_influence, rtol=1e-10)
    assert len(list(tmp_path.glob("self-*.npz"))) == 3


def test_top_must_be_positive(problem):
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        audit(problem.model, problem.train, top=0)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"ranking": "best"}, "ranking must be one of 'auto', 'margin', .* got 'best'"),
        ({"ranking": "history"}, "options.history must be given for the ranking 'history'"),
        ({"ranking": "folds"}, "folds must be given for the ranking 'folds'"),
        ({"folds": 1, "fit": print}, "folds must be at least 2, got 1"),
        ({"folds": 46, "fit": print}, "folds must be at most the 45 training rows, got 46"),
        ({"folds": 5}, "fit must be given with folds"),
        ({"fit": print}, "folds must be given with fit"),
    ],
)
def test_wrong_arguments_are_named(problem, how, says):
    with pytest.raises(ValueError, match=says):
        audit(problem.model, problem.train, **how)
