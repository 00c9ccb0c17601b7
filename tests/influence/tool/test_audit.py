import numpy as np
import pandas as pd
import pytest

from influence import QuestionOptions, audit
from tests.influence.problems import ridge

NO_CHECK = QuestionOptions(check=False)


@pytest.fixture(scope="module")
def found(problem):
    return audit(problem.model, problem.train, top=20)


def test_self_influence_is_that_of_dense_algebra(problem, found):
    moves = problem.risk.predicted_parameters(problem.theta, np.arange(45))
    own = np.einsum("id,id->i", problem.risk.gradients(problem.theta), moves)
    np.testing.assert_allclose(found.self_influence, own, rtol=1e-4)
    np.testing.assert_array_equal(found.order, np.argsort(-own))


def test_the_wrong_label_comes_first_and_its_true_class_is_suggested(problem, found):
    assert found.order[0] == 7
    assert found.suggested[7] == problem.true[7]
    # Each suggestion is the class that a refit without the row predicts.
    for row in list(found.suggested)[:8]:
        theta = problem.risk.without([row]).minimum(problem.theta)
        z = problem.risk.features[row] @ theta.reshape(5, 3)
        # Near a tie first order may choose the other class.
        if np.diff(np.sort(z))[-1] > 0.2:
            assert found.suggested[row] == z.argmax()


def test_the_csv_has_all_rows_and_an_empty_column_to_fill_in(found, tmp_path):
    table = pd.read_csv(found.to_csv(tmp_path / "audit.csv"))
    assert table["row"].tolist() == found.order.tolist()
    assert table["rank"].tolist() == list(range(1, 46))
    assert table["new_label"].isna().all()
    np.testing.assert_allclose(table["self_influence"], found.self_influence[found.order])
    assert table["suggested"].notna().sum() == 20


def test_labels_that_are_numbers_get_no_suggestion():
    p = ridge()
    found = audit(p.net, p.train, options=NO_CHECK)
    moves = p.oracle.predicted_parameters(p.theta, np.arange(40))
    own = np.einsum("id,id->i", p.oracle.gradients(p.theta), moves)
    np.testing.assert_allclose(found.self_influence, own, rtol=1e-6)
    assert found.suggested == {}
    assert "no label is suggested" in found.alerts[0].headline


def test_parts_kept_on_disk_give_the_same_numbers(problem, found, tmp_path, monkeypatch):
    import influence.tool.audit as module

    monkeypatch.setattr(module, "_PART", 16)
    options = QuestionOptions(check=False, checkpoints=tmp_path)
    again = audit(problem.model, problem.train, top=20, options=options)
    np.testing.assert_allclose(again.self_influence, found.self_influence, rtol=1e-10)
    assert len(list(tmp_path.glob("self-*.npz"))) == 3


def test_top_must_be_positive(problem):
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        audit(problem.model, problem.train, top=0)
