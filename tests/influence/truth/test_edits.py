import numpy as np
import pytest

from influence import (
    ConvergenceWarning,
    Direct,
    Examples,
    GaussNewton,
    Hessian,
    ProximalOptions,
    prepare,
    proximal_response,
)
from influence.truth.edits import Edits, edit_response
from tests.influence.problems import logistic, tanh_net, through_keras


def edits(rows, new=None, removed=None):
    rows = np.array(rows)
    return Edits(rows, new, np.zeros(len(rows), bool) if removed is None else np.array(removed))


@pytest.mark.parametrize("closed_form", [True, False])
def test_at_a_minimum_the_response_is_the_exact_refit(closed_form):
    p = logistic("softmax")
    q = p if closed_form else through_keras(p)
    labels = np.array(p.train.y)
    new = (labels[[4]] + 1) % 3
    found = edit_response(
        q.net,
        q.train,
        q.test,
        edits([4, 9], Examples(q.train.x[[4]], new), [False, True]),
        prepare(Hessian(q.net, q.train), Direct()),
        tolerance=1e-8,
    )
    labels[4] = new[0]
    refit = p.oracle.on(p.oracle.features, labels).without([9]).minimum(p.theta)
    np.testing.assert_allclose(found.theta, refit, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(found.losses, p.measured.losses(refit), rtol=1e-6)
    np.testing.assert_allclose(found.losses_before, p.measured.losses(p.theta), rtol=1e-10)
    assert found.converged and found.gradient_norm <= 1e-8
    np.testing.assert_array_equal(q.net.theta, p.theta)  # the net is unchanged


def test_one_removed_row_is_its_proximal_response():
    net, train = tanh_net(l2=0.1)
    test = train.take(slice(0, 5))
    inverse = prepare(GaussNewton(net, train, 0.3), Direct())
    found = edit_response(net, train, test, edits([3], None, [True]), inverse, tolerance=1e-8)
    options = ProximalOptions(solver=inverse, tolerance=1e-8)
    expected = proximal_response(net, train, test, [3], options, damping=0.3)
    np.testing.assert_allclose(found.losses - found.losses_before, expected[:, 0], rtol=1e-6)


def test_an_edit_back_to_the_same_labels_changes_nothing():
    p = logistic("sigmoid")
    same = Examples(p.train.x[[2]], np.array(p.train.y)[[2]])
    inverse = prepare(Hessian(p.net, p.train), Direct())
    found = edit_response(p.net, p.train, p.test, edits([2], same), inverse)
    np.testing.assert_array_equal(found.theta, p.theta)
    assert found.converged and found.passes == 0


def test_no_edit_and_a_missed_tolerance_are_named():
    p = logistic("softmax")
    inverse = prepare(Hessian(p.net, p.train), Direct())
    with pytest.raises(ValueError, match="edits must change at least one row, got none"):
        edit_response(p.net, p.train, p.test, edits([], None, []), inverse)
    with pytest.warns(ConvergenceWarning, match="the response to the edits ended at a gradient"):
        how = {"tolerance": 1e-40}
        found = edit_response(p.net, p.train, p.test, edits([1], None, [True]), inverse, **how)
    assert not found.converged
