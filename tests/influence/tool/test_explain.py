import html
import json
import re
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
import scipy.special

from influence import QuestionOptions, explain
from tests.influence.problems import ridge
from tests.influence.tool.conftest import softmax_model

NO_CHECK = QuestionOptions(check=False)


@pytest.fixture(scope="module")
def explanation(problem):
    return explain(problem.model, problem.train, problem.test, rows=[2, 5, 9], top=4)


def test_scores_and_shown_rows_are_those_of_dense_algebra(problem, explanation):
    every = np.arange(45)
    expected = problem.risk.one_step_changes(problem.theta, problem.measured, every)[[2, 5, 9]]
    np.testing.assert_allclose(explanation.scores, expected, rtol=1e-4, atol=1e-7)
    for k in range(3):
        order = np.argsort(-expected[k])
        np.testing.assert_array_equal(explanation.helpful[k], order[:4])
        np.testing.assert_array_equal(explanation.harmful[k], order[::-1][:4])


def test_the_table_has_a_row_for_each_shown_pair(explanation):
    table = explanation.table()
    assert len(table) == 3 * 8
    first = table.iloc[0]
    assert first.test_row == 2 and first.effect == "helped" and first["rank"] == 1
    assert first.train_row == explanation.helpful[0][0]
    assert first.change_if_removed == explanation.scores[0, first.train_row] > 0
    assert (table[table.effect == "hurt"].change_if_removed < 0).all()
    # The scores come from one Newton step. No residual of a solver bounds their error.
    assert table.error_bound.isna().all() and (table.leverage > 0).all()


def test_at_a_minimum_no_alert_is_raised(explanation):
    assert explanation.alerts == ()


def test_each_test_row_has_its_prediction_and_loss(problem, explanation):
    about = explanation.numbers()["test"][1]
    losses = problem.measured.losses(problem.theta)
    assert about["row"] == 5
    assert about["loss"] == pytest.approx(losses[5], rel=1e-5)
    z = problem.measured.features[5] @ problem.theta.reshape(5, 3)
    assert about["predicted"] == str(z.argmax())
    assert about["confidence"] == pytest.approx(scipy.special.softmax(z).max(), rel=1e-5)
    assert 0 <= about["residual"] < 1e-9


def test_without_rows_the_most_confident_mistakes_come_first(problem):
    # All given test labels are wrong, so that the model makes many confident mistakes.
    x, y = problem.test
    wrong = (y + 1) % 3
    found = explain(problem.model, problem.train, (x, wrong), wrong=4, options=NO_CHECK)
    z = problem.measured.features @ problem.theta.reshape(5, 3)
    p = scipy.special.softmax(z, axis=1)
    mistakes = np.flatnonzero(z.argmax(axis=1) != wrong)
    expected = mistakes[np.argsort(-p.max(axis=1)[mistakes])][:4]
    np.testing.assert_array_equal(found.rows, expected)
    assert f"4 most confident of {len(mistakes)} mistakes" in found.summary[0]


def test_a_regression_explains_the_largest_losses():
    p = ridge()
    found = explain(p.net, p.train, p.test, wrong=2, top=3)
    losses = p.measured.losses(p.theta)
    np.testing.assert_array_equal(found.rows, np.argsort(-losses)[:2])
    expected = p.oracle.one_step_changes(p.theta, p.measured, np.arange(40))[found.rows]
    np.testing.assert_allclose(found.scores, expected, rtol=1e-6, atol=1e-9)
    assert "2 with the largest losses" in found.summary[0]
    assert found.numbers()["test"][0]["confidence"] is None


def test_without_test_rows_training_rows_are_explained(problem):
    found = explain(problem.model, problem.train, rows=[7], options=NO_CHECK)
    assert found.subject.test_rows is None
    assert [alert.level for alert in found.alerts] == ["note"]
    # The label of row 7 is wrong, and no other row supports it. So it is row 7 itself that most
    # lowers the loss of row 7.
    assert found.helpful[0][0] == 7


def test_away_from_a_minimum_the_first_alert_says_order_not_size(problem):
    model = softmax_model(2 * problem.theta)
    found = explain(model, problem.train, problem.test, rows=[0])
    assert found.alerts[0].headline.startswith("Use the order of the rows, not the sizes.")
    assert "not at a minimum" in found.alerts[0].headline


def test_the_page_shows_the_rows_and_a_notebook_frames_it(explanation, tmp_path):
    path = explanation.to_html(tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert f"row {explanation.helpful[0][0]}" in text
    frame = explanation._repr_html_()
    assert frame.startswith("<iframe srcdoc=") and 'sandbox="allow-scripts"' in frame
    assert html.unescape(frame.split('srcdoc="')[1].split('" sandbox')[0]) == text


def test_the_plot_has_a_bar_for_each_shown_row(explanation):
    figure = explanation.plot()
    assert isinstance(figure, matplotlib.figure.Figure)
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    shown = [*explanation.helpful[0], *explanation.harmful[0][::-1]]
    np.testing.assert_allclose(widths, explanation.scores[0, shown])


def test_the_answer_is_valid_json(explanation):
    found = json.loads(json.dumps(explanation.as_dict(), allow_nan=False))
    assert found["question"] == "explanation"
    assert len(found["rows"]) == 24 and len(found["test"]) == 3


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"rows": [0], "wrong": 2}, ValueError, "wrong must be left out"),
        ({"wrong": 0}, ValueError, "wrong must be at least 1, got 0"),
        ({"top": 0}, ValueError, "top must be at least 1, got 0"),
        ({"rows": [99]}, IndexError, r"rows must lie in \[0, 12\), got 99"),
        ({"rows": [1, 1]}, ValueError, "rows must name each row once"),
    ],
)
def test_wrong_arguments_are_named(problem, how, error, says):
    with pytest.raises(error, match=says):
        explain(problem.model, problem.train, problem.test, options=NO_CHECK, **how)


def test_a_model_of_another_kind_is_named(problem):
    with pytest.raises(TypeError, match="model must be a Keras model, a GenericNeuralNet or the"):
        explain("no model", problem.train)
    with pytest.raises(TypeError, match=r"train must be Examples\(x, y\), got int"):
        explain(problem.model, 3)


def test_the_lines_of_the_readme_run(problem, tmp_path, monkeypatch):
    readme = Path(__file__).parents[3] / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "explain(model" in block]
    monkeypatch.chdir(tmp_path)
    (x, y), (x_test, y_test) = problem.train, problem.test
    names = {"model": problem.model, "x_train": x, "y_train": y}
    exec(block, names | {"x_test": x_test, "y_test": y_test})
    assert "These training rows helped most" in (tmp_path / "explain.html").read_text()


def test_changes_that_cannot_be_are_marked(tmp_path):
    # Far from a minimum, first order predicts that some tiny losses fall below 0.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 4)).astype(np.float32)
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 1)
    theta = np.zeros(15)
    theta[:12] = rng.standard_normal(12) * 3
    model = softmax_model(theta, penalty=1e-4)
    found = explain(model, (x[:50], y[:50]), (x[50:], y[50:]), rows=range(10), options=NO_CHECK)
    losses = np.array([about["loss"] for about in found.numbers()["test"]])
    cannot = losses[:, None] + np.asarray(found.scores) < -1e-3 * losses[:, None]
    np.testing.assert_array_equal(found.impossible, cannot)
    marked = {(r["test_row"], r["train_row"]) for r in found.records() if r["impossible"]}
    shown = {(r["test_row"], r["train_row"]) for r in found.records()}
    assert marked == {(i, j) for i, j in np.argwhere(cannot)} & shown
    text = found.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert ("this loss cannot fall below 0" in text) == bool(marked)
