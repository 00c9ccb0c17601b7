import keras
import numpy as np
import pytest
import scipy.optimize

from influence import History, QuestionOptions, explain, verify
from influence.tool.verify import agreement, verdict
from tests import oracles
from tests.influence import recorded
from tests.influence.tool.conftest import PENALTY, softmax_model


@pytest.fixture(scope="module")
def found(problem):
    return verify(problem.model, problem.train, problem.test, remove=6, rows=[2, 5])


def test_at_a_minimum_the_actual_changes_are_those_of_exact_refits(problem, found):
    actual = problem.risk.actual_changes(problem.theta, problem.measured, found.rows)[[2, 5]]
    np.testing.assert_allclose(found.actual, actual, rtol=2e-4, atol=1e-6)
    predicted = problem.risk.one_step_changes(problem.theta, problem.measured, found.rows)
    np.testing.assert_allclose(found.predicted, predicted[[2, 5]], rtol=1e-4, atol=1e-7)
    assert found.converged.all()
    assert found.truth.startswith("retraining without the row")


def test_half_of_the_rows_have_large_scores_and_half_are_random(problem, found):
    assert found.chosen == 3 and len(set(found.rows)) == 6
    scores = np.abs(np.asarray(explain(problem.model, problem.train, problem.test,
                                       rows=[2, 5]).scores))  # fmt: skip
    share = (scores / scores.max(axis=1, keepdims=True)).max(axis=0)
    np.testing.assert_array_equal(found.rows[:3], np.argsort(-share)[:3])


def test_the_agreement_is_that_of_numpy(found):
    x, y = found.predicted.ravel(), found.actual.ravel()
    got = found.agreement()
    assert got["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert got["slope"] == pytest.approx(np.polyfit(x, y, 1)[0])
    assert got["sign"] == np.mean(np.sign(x) == np.sign(y))
    assert found.numbers()["agreement"]["all"]["slope"] == pytest.approx(got["slope"])


def test_away_from_a_minimum_the_actual_changes_are_proximal_responses(problem):
    # The proximal response minimises F_i = R - R'(theta_s) theta - L_i / n, where theta_s are the
    # present weights. SciPy minimises its closed form.
    start = (1.5 * problem.theta).astype(np.float32).astype(float)
    risk, n = problem.risk, 45
    found = verify(softmax_model(start), problem.train, problem.test, remove=4, rows=[2])
    slope = risk.gradient(start)
    for j, row in enumerate(found.rows):
        own = risk.on(risk.features[[row]], risk.y[[row]])

        def value(t, own=own):
            return risk.value(t) - slope @ t - own.value(t) / n

        def gradient(t, own=own):
            return risk.gradient(t) - slope - own.gradient(t) / n

        theta = scipy.optimize.minimize(value, start, jac=gradient, options={"gtol": 1e-9}).x
        change = problem.measured.losses(theta)[2] - problem.measured.losses(start)[2]
        assert found.actual[0, j] == pytest.approx(change, rel=2e-3, abs=1e-6)
    assert found.truth.startswith("the proximal response")
    assert any("proximal responses and not those of retraining" in a.headline for a in found.alerts)


def test_the_users_own_training_gives_the_actual_changes(problem):
    def refit(model, x, y):
        """Set the weights to the exact minimum on the given rows."""
        risk = oracles.softmax_regression(oracles.with_ones(x.astype(float)), y, 3, PENALTY)
        theta = risk.minimum(problem.theta)
        model.set_weights([theta[:12].reshape(4, 3), theta[12:]])

    model = softmax_model(problem.theta)
    found = verify(model, problem.train, problem.test, remove=4, rows=[5], fit=refit)
    actual = problem.risk.actual_changes(problem.theta, problem.measured, found.rows)[[5]]
    np.testing.assert_allclose(found.actual, actual, rtol=1e-3, atol=1e-6)
    assert "your own function" in found.truth
    np.testing.assert_allclose(model.get_weights()[1], problem.theta[12:], rtol=1e-6)


@pytest.mark.parametrize("kept", [False, True])
def test_the_users_own_training_gets_inputs_in_front_of_frozen_layers(tmp_path, kept):
    keras.utils.set_random_seed(1)
    frozen = keras.layers.Dense(5, "tanh", name="frozen")
    model = keras.Sequential([keras.Input((4,)), frozen, keras.layers.Dense(2, name="head")])
    frozen.trainable = False
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    y, seen = np.arange(30) % 2, []

    def fit(model, x, y):
        seen.append(x)
        model.predict(x, verbose=0)
        model.get_layer("head").set_weights([np.full((5, 2), [0, x.sum()]), np.zeros(2)])

    options = QuestionOptions(check=False, checkpoints=tmp_path if kept else None)
    found = verify(model, (x[:20], y[:20]), (x[20:], y[20:]), remove=4, rows=[1, 6], fit=fit,
                   options=options)  # fmt: skip
    assert found.subject.net.flat.trunk is not None and len(seen) == 4
    kernel, bias = frozen.get_weights()
    before = oracle_losses(model.predict(x[[21, 26]], verbose=0), y[[21, 26]])
    for j, row in enumerate(found.rows):
        rest = np.delete(x[:20], row, axis=0)
        np.testing.assert_array_equal(seen[j], rest)
        z = np.tanh(x[[21, 26]] @ kernel + bias).sum(axis=1) * rest.sum()
        after = oracle_losses(np.column_stack([np.zeros(2), z]), y[[21, 26]])
        np.testing.assert_allclose(found.actual[:, j], after - before, rtol=1e-4, atol=1e-5)


def oracle_losses(z, y):
    z = np.asarray(z, float)
    return np.logaddexp(z[:, 0], z[:, 1]) - z[np.arange(len(y)), y]


def test_a_network_is_answered_too():
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 3)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="tanh"),
                              keras.layers.Dense(1, activation="sigmoid")])  # fmt: skip
    model.compile("adam", "binary_crossentropy")
    model.fit(x, y, epochs=3, verbose=0)
    found = verify(model, (x[:250], y[:250]), (x[250:], y[250:]), remove=4, wrong=2)
    assert found.subject.plan.curvature == "GaussNewton"
    assert found.truth.startswith("the proximal response")
    # Damped influence is the first order of the proximal response, so the two agree closely.
    got = found.agreement()
    assert got["pearson"] > 0.95 and 0.7 < got["slope"] < 1.6


def test_an_interrupted_run_goes_on_with_its_refits(problem, found, tmp_path):
    options = QuestionOptions(checkpoints=tmp_path)
    how = {"remove": 6, "rows": [2, 5], "options": options}
    first = verify(problem.model, problem.train, problem.test, **how)
    kept = sorted(tmp_path.glob("refits-*.npz"))
    assert kept
    times = [file.stat().st_mtime_ns for file in kept]
    second = verify(problem.model, problem.train, problem.test, **how)
    np.testing.assert_array_equal(first.actual, second.actual)
    assert [file.stat().st_mtime_ns for file in kept] == times
    np.testing.assert_allclose(first.actual, found.actual, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("pearson", "order", "slope", "says"),
    [
        (0.99, 0.98, 1.0, "The scores hold: the order and the sizes"),
        (0.95, 0.9, 6.5, "Use the order, not the size. The actual changes are about 6.5 times as"),
        (0.65, 0.99, 4.6, "Use the order, not the size. The actual changes are about 4.6 times as"),
        (0.65, 0.99, 1.0, "Use the order, not the size. The actual changes scatter"),
        (0.9, 0.9, 0.2, "Use the order, not the size"),
        (0.9, 0.7, 1.0, "hold roughly"),
        (0.9, 0.1, 1.0, "do not predict"),
        (-0.9, -0.9, -1.0, "do not predict"),
        (float("nan"), 1.0, 1.0, "Nothing can be said"),
    ],
)
def test_the_verdict_is_in_plain_words(pearson, order, slope, says):
    assert says in verdict({"pearson": pearson, "spearman": order, "slope": slope, "sign": 1})


def test_changes_that_are_all_equal_have_no_agreement():
    assert np.isnan(agreement(np.zeros(4), np.arange(4.0))["pearson"])
    assert np.isnan(agreement(np.array([np.nan, 1.0]), np.ones(2))["slope"])


def test_wrong_arguments_are_named(problem):
    with pytest.raises(ValueError, match="remove must be at least 2, got 1"):
        verify(problem.model, problem.train, remove=1)
    with pytest.raises(ValueError, match="wrong must be left out"):
        verify(problem.model, problem.train, rows=[1], wrong=2)


def test_with_a_history_the_actual_changes_are_those_of_its_training(tmp_path):
    # Each batch of the recorded training has all rows, so their order has no effect on it.
    model = recorded.train(tmp_path, epochs=3)
    x, y = recorded.rows()
    test = recorded.rows(9, seed=1)
    options = QuestionOptions(history=tmp_path)
    found = verify(model, (x, y), test, remove=4, rows=[2, 5], options=options)
    start, every = History.load(tmp_path).theta(0), np.arange(recorded.N)
    whole = recorded.losses(recorded.descend(start, x, y, [every] * 3), *test)
    for k, row in enumerate(found.rows):
        less = recorded.descend(start, x, y, [np.delete(every, row)] * 3)
        expected = (recorded.losses(less, *test) - whole)[[2, 5]]
        np.testing.assert_allclose(found.actual[:, k], expected, rtol=1e-5, atol=1e-9)
    assert found.reliability == pytest.approx(1)
    assert found.truth.startswith("training again without the row")


def test_a_history_that_cannot_be_repeated_is_said(tmp_path):
    model = recorded.train(tmp_path, epochs=1)
    model.set_weights([w + 0.1 for w in model.get_weights()])
    options = QuestionOptions(history=tmp_path)
    found = verify(model, recorded.rows(), remove=2, rows=[2], options=options)
    said = [a for a in found.alerts if a.headline.startswith("The training cannot be repeated")]
    assert len(said) == 1 and "weights are not those after any epoch" in said[0].detail
    assert not found.truth.startswith("training again")
