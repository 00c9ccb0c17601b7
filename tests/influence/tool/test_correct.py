import numpy as np
import pandas as pd
import pytest

from influence import Examples, QuestionOptions, audit, correct
from influence.tool.correct import _relabelled
from tests.influence.problems import ridge

NO_CHECK = QuestionOptions(check=False)


def test_the_gain_of_edits_is_that_of_an_exact_refit(problem):
    new = int(problem.true[7])
    found = correct(problem.model, problem.train, problem.test, edits={7: new, 12: "remove"})
    risk = problem.risk
    labels = risk.y.copy()
    labels[7] = new
    edited = risk.on(np.delete(risk.features, 12, 0), np.delete(labels, 12))
    before = problem.measured.losses(problem.theta).mean()
    after = problem.measured.losses(edited.minimum(problem.theta)).mean()
    assert found.actual_gain == pytest.approx(before - after, rel=1e-3)
    # The first-order prediction of an edit is the influence of removing the old row, minus that of
    # removing the row with the new label. For row 12 there is no new row.
    moves = risk.predicted_parameters(problem.theta, [7, 12])
    relabelled = risk.on(risk.features[[7]], np.array([new]))
    pull = np.linalg.solve(risk.hessian(problem.theta),
                           relabelled.gradient(problem.theta)) / 45  # fmt: skip
    moves[0] -= pull
    slope = problem.measured.gradients(problem.theta).mean(axis=0)
    np.testing.assert_allclose(found.predicted, moves @ slope, rtol=1e-4)
    assert found.predicted_gain == pytest.approx(-(moves @ slope).sum(), rel=1e-4)
    assert found.response.converged and found.at_minimum
    assert "retraining on the edited rows" in found.summary[-1]


def test_the_edited_file_of_an_audit_gives_the_same(problem, tmp_path):
    path = audit(problem.model, problem.train, options=NO_CHECK).to_csv(tmp_path / "a.csv")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[table["row"] == "7", "new_label"] = str(problem.true[7])
    table.loc[table["row"] == "12", "new_label"] = "remove"
    # Many spreadsheets save files like this.
    table.to_csv(path, index=False, sep=";", encoding="utf-8-sig")
    from_file = correct(problem.model, problem.train, problem.test, edits=path, options=NO_CHECK)
    edits = {7: int(problem.true[7]), 12: "remove"}
    direct = correct(problem.model, problem.train, problem.test, edits=edits, options=NO_CHECK)
    assert from_file.edits == direct.edits == {7: float(problem.true[7]), 12: None}
    assert from_file.actual_gain == pytest.approx(direct.actual_gain, rel=1e-9)
    assert [r["row"] for r in from_file.records()] == [7, 12]


def test_edited_numbers_of_a_regression_are_refitted():
    p = ridge()
    found = correct(p.net, p.train, p.test, edits={3: 0.5, 8: -1}, options=NO_CHECK)
    y = np.array(p.train.y)
    y[[3, 8]] = 0.5, -1
    edited = p.oracle.on(p.oracle.features, y)
    before = p.measured.losses(p.theta).mean()
    after = p.measured.losses(edited.minimum(p.theta)).mean()
    assert found.actual_gain == pytest.approx(before - after, rel=1e-5)
    assert found.accuracy is None


def test_weights_of_rows_stay_with_an_edit(problem):
    x, y = problem.train
    weights = np.linspace(0.5, 1.5, 45)
    found = correct(problem.model, (x, y, weights), problem.test, edits={7: 0}, options=NO_CHECK)
    new = found.subject.train_rows.examples
    assert isinstance(new, Examples)
    # The new row keeps the old row's weight. With almost no weight, the edit changes nothing.
    weights[7] = 1e-12
    none = correct(problem.model, (x, y, weights), problem.test, edits={7: 0}, options=NO_CHECK)
    assert abs(none.actual_gain) < 1e-6 < abs(found.actual_gain)


def test_new_labels_keep_the_form_of_the_old_ones():
    x = np.zeros((3, 2))
    one_hot = _relabelled(Examples(x, np.eye(3, dtype=np.float32)), [2.0, 0.0, 1.0])
    np.testing.assert_array_equal(one_hot.y, np.eye(3)[[2, 0, 1]])
    signs = _relabelled(Examples(x, np.array([-1, 1, 1])), [1.0, 0.0, 1.0])
    np.testing.assert_array_equal(signs.y, [1, -1, 1])
    column = _relabelled(Examples(x, np.zeros((3, 1))), [0.5, 1.0, 2.0])
    np.testing.assert_array_equal(column.y, [[0.5], [1.0], [2.0]])
    weighted = _relabelled(Examples(x, np.array([0, 1, 2]), np.arange(3.0)), [2.0, 2.0, 0.0])
    np.testing.assert_array_equal(weighted.y["y"], [2, 2, 0])
    np.testing.assert_array_equal(weighted.sample_weight, [0, 1, 2])


@pytest.mark.parametrize(
    ("edits", "error", "says"),
    [
        ({"a": 0}, ValueError, "row numbers, got 'a'"),
        ({99: 0}, IndexError, "rows from 0 to 44, got 99"),
        ({1: "cat"}, ValueError, "for row 1 'remove' or a label of 0, 1, 2, got 'cat'"),
        ({1: 3}, ValueError, "a label of 0, 1, 2, got '3'"),
        ({1: 0.5}, ValueError, "got '0.5'"),
        ({}, ValueError, "must change at least one row, got no change"),
        ({1: 1}, ValueError, "got no change"),
        (dict.fromkeys(range(45), "remove"), ValueError, "at least one row unchanged, got all 45"),
    ],
)
def test_wrong_edits_are_named(problem, edits, error, says):
    with pytest.raises(error, match=says):
        correct(problem.model, problem.train, problem.test, edits=edits, options=NO_CHECK)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "must have the columns row and new_label"),
        ("row,new_label\n1,0\n1,2\n", "must name each row once, got row 1 twice"),
        ("", "must be a CSV file"),
        (None, "which is not there"),
    ],
)
def test_wrong_files_are_named(problem, tmp_path, text, says):
    path = tmp_path / "edits.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"--csv must.*{says}|{says}"):
        correct(problem.model, problem.train, problem.test, edits=path, options=NO_CHECK)
