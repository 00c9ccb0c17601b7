"""Tests of scores and refits for rows with masked positions.

The expected values come from dense matrices of derivatives of Keras' own loss.
"""

import h5py
import keras
import numpy as np
import pytest

from influence import Influence
from influence.curvature.operators import GaussNewton, Hessian
from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet
from influence.preflight.check import check
from influence.scores.datainf import datainf
from influence.scores.tracin import tracin
from influence.solvers import CG, EKFAC, Direct
from influence.truth.continued import continued_training
from influence.truth.leave_out import RefitOptions, leave_group_out, leave_one_out
from influence.truth.proximal import ProximalOptions, proximal_response
from tests.influence import masked
from tests.influence.masked import F8, SIDE, STEPS, K, classes, voided
from tests.influence.problems import relative_error

N, TESTS, PENALTY = 250, 4, 0.03
# The largest relative error. Keras divides by the number of valid positions plus 1e-7, and the
# library by this number.
EPSILON = 1e-6


def sparse(**options):
    return K.SparseCategoricalCrossentropy(from_logits=True, **F8, **options)


def tagging(n, seed):
    return masked.words(n, seed), classes(n, STEPS, seed=seed)


def segmentation(label):
    def rows(n, seed):
        return masked.images(n, seed), voided(classes(n, SIDE, SIDE, seed=seed), label, seed)

    return rows


KINDS = {
    "tagging": (lambda: masked.tagger(sparse(), PENALTY), tagging, lambda x, y: x != 0),
    "ignored_0": (
        lambda: masked.segmenter(sparse(ignore_class=0), PENALTY),
        segmentation(0),
        lambda x, y: y != 0,
    ),
    "void_255": (
        lambda: masked.segmenter(sparse(ignore_class=255), PENALTY),
        segmentation(255),
        lambda x, y: y != 255,
    ),
}


# The kinds of the long tests. Both void labels take the same way through the library.
LONG = ("tagging", "void_255")


def fitted(kind, n):
    """Return (model, net, train, test), with the model at its minimum."""
    make, rows, _ = KINDS[kind]
    model = make()
    net = GenericNeuralNet(model)
    train, test = Examples(*rows(n, 11)), Examples(*rows(TESTS, 12))
    net.fit(train, gradient_tolerance=1e-11)
    return model, net, train, test


class Problem:
    """A fitted model, with the Hessian and gradients of Keras' own loss by a plain tape."""

    def __init__(self, kind):
        self.kind, valid = kind, KINDS[kind][2]
        self.model, self.net, self.train, self.test = fitted(kind, N)
        model = self.model
        x, y = self.train.x, self.train.y
        self.v = valid(x, y).reshape(N, -1).sum(1)
        self.H = masked.dense_hessian(model, lambda: masked.keras_risk(model, x, y))
        self.losses = np.stack([self.gradient(self.train, i) for i in range(N)])
        self.tests = np.stack([self.gradient(self.test, i) for i in range(TESTS)])
        self.penalty = 2 * PENALTY * self.net.theta
        moves = np.linalg.solve(self.H, ((self.losses + self.penalty) * self.v[:, None]).T)
        # (n, d): row i is v_i H^-1 (grad loss_i + grad P) / sum v. P is the penalty, and v_i is the
        # number of valid positions of row i.
        self.moves = moves.T / self.v.sum()
        self.scores = self.tests @ moves / self.v.sum()

    def gradient(self, examples, i):
        """Return the gradient of Keras' loss for one row by itself."""
        x, y = examples.x[i : i + 1], examples.y[i : i + 1]
        return masked.slope(self.model, lambda: masked.keras_loss(self.model, x, y))[1]


@pytest.fixture(scope="module", params=KINDS)
def problem(request):
    return Problem(request.param)


@pytest.fixture(scope="module")
def tags():
    return Problem("tagging")


@pytest.mark.parametrize("problem", LONG, indirect=True)
def test_scores_of_every_kind(problem, tmp_path):
    p = problem
    influence = Influence(p.net, p.train)
    scores = influence.scores(p.test)
    assert relative_error(scores.change_if_removed, p.scores) < EPSILON
    # Row 1 has no valid position, so its scores are 0.
    assert not scores.change_if_removed[:, 1].any()
    some = np.array([7, 1, 3])
    assert relative_error(influence.scores(p.test, some).change_if_removed, p.scores[:, some]) < (
        EPSILON
    )
    assert relative_error(influence.parameters(some), p.moves[some]) < EPSILON
    own = np.einsum("nd,nd->n", p.losses, p.moves)
    assert relative_error(influence.self_influence(), own) < EPSILON
    path = influence.write_scores(tmp_path / "scores.h5", p.test, dtype="float64")
    with h5py.File(path) as file:
        assert relative_error(file["change_if_removed"][:], p.scores) < EPSILON
        assert file["rounding_error"][()] < EPSILON
    relative = influence.relative(p.test, some)
    sizes = np.linalg.norm(p.moves[some], axis=1)
    assert relative_error(relative.size, sizes) < EPSILON
    ratio = relative.relative_change_if_removed
    assert np.isnan(ratio[:, 1]).all()
    expected = p.scores[:, some] / np.where(sizes, sizes, 1)
    assert relative_error(ratio[:, [0, 2]], expected[:, [0, 2]]) < EPSILON
    mean = influence.scores(p.test, reduce="mean").change_if_removed
    assert relative_error(mean, p.scores.mean(axis=0, keepdims=True)) < EPSILON
    added = influence.adding(p.test, p.train.take([5])).change_if_added[:, 0]
    assert relative_error(added, -p.scores[:, 5]) < EPSILON
    group = influence.group(p.test, np.arange(6)).change_if_removed_together
    assert relative_error(group, p.scores[:, :6].sum(axis=1)) < EPSILON
    bounds = influence.error_bound(scores)
    assert bounds.shape == scores.shape and not bounds[:, 1].any()


@pytest.mark.parametrize("solver", [Direct(), CG(rtol=1e-10)])
@pytest.mark.parametrize("curvature", [Hessian, GaussNewton])
def test_both_matrices_and_solvers(tags, solver, curvature):
    influence = Influence(tags.net, tags.train, solver=solver, curvature=curvature, batch_size=64)
    scores = influence.scores(tags.test).change_if_removed
    assert relative_error(scores, tags.scores) < EPSILON


def test_ekfac_as_a_preconditioner_and_for_self_influence(problem):
    p = problem
    influence = Influence(p.net, p.train, solver=CG(rtol=1e-9, preconditioner=EKFAC()))
    assert relative_error(influence.scores(p.test).change_if_removed, p.scores) < EPSILON
    influence = Influence(p.net, p.train, solver=EKFAC(), curvature=GaussNewton)
    rows = np.arange(9)
    X = influence.parameters(rows)
    expected = np.einsum("nd,nd->n", p.losses[rows], X)
    assert relative_error(influence.self_influence(rows), expected) < EPSILON
    # EK-FAC is approximate, so only the size of X is checked. It would be wrong by a large factor
    # if a row's part were divided by the number of rows and not by that of valid positions.
    size = np.linalg.norm(X) / np.linalg.norm(p.moves[rows])
    assert 0.6 < size < 1.6


@pytest.mark.parametrize("kind", LONG)
def test_scores_agree_with_refits(kind):
    """Compare with refits. A refit's risk divides by the number of valid positions that remain."""
    (_, net, train, test), rows = fitted(kind, 2000), np.arange(20)
    scores = Influence(net, train).scores(test, rows).change_if_removed.ravel()
    refits = leave_one_out(net, train, test, rows)
    assert refits.converged.all()
    truth = refits.change_if_removed.ravel()
    assert not refits.change_if_removed[:, 1].any()
    assert 0.98 < scores @ truth / (scores @ scores) < 1.02
    assert np.corrcoef(scores, truth)[0, 1] > 0.99
    large = abs(truth) > 0.05 * abs(truth).max()
    assert (np.sign(scores) == np.sign(truth))[large].all()


def test_a_refit_is_the_minimum_of_keras_risk_of_the_remaining_rows(tags):
    p = tags
    without = np.delete(np.arange(N), 3)
    before = p.net.theta
    losses = p.net.losses(p.test.x, p.test.y)
    p.net.fit(p.train.without([3]), gradient_tolerance=1e-11)
    x, y = p.train.x[without], p.train.y[without]
    _, gradient = masked.slope(p.model, lambda: masked.keras_risk(p.model, x, y))
    assert np.linalg.norm(gradient) < 1e-8
    change = p.net.losses(p.test.x, p.test.y) - losses
    p.net.theta = before
    fitted = leave_one_out(p.net, p.train, p.test, [3]).change_if_removed[:, 0]
    assert relative_error(fitted, change) < 1e-5


@pytest.mark.parametrize("problem", LONG, indirect=True)
def test_newton_refits_and_proximal_responses_are_the_same_refits(problem):
    p = problem
    rows, groups = [0, 1, 2], [np.arange(12), np.array([1]), np.array([1, 40, 41])]
    fits = leave_one_out(p.net, p.train, p.test, rows).change_if_removed
    options = ProximalOptions(tolerance=1e-9)
    near = proximal_response(
        p.net, p.train, p.test, [0, 2], options, damping=0.0, objective="leave_one_out"
    )
    assert relative_error(near.change_if_removed, fits[:, [0, 2]]) < 1e-5
    bregman = proximal_response(p.net, p.train, p.test, [0, 2], options, damping=0.0)
    assert relative_error(bregman.change_if_removed, fits[:, [0, 2]]) < 1e-5
    grouped = leave_group_out(p.net, p.train, p.test, groups).change_if_removed
    p.net.convex = True
    try:
        newton = RefitOptions(method="newton", tolerance=1e-10)
        assert (
            relative_error(
                leave_one_out(p.net, p.train, p.test, rows, newton).change_if_removed, fits
            )
            < 1e-5
        )
        both = leave_group_out(p.net, p.train, p.test, groups, newton).change_if_removed
        assert relative_error(both, grouped) < 1e-5
        influence = Influence(p.net, p.train, curvature=Hessian)
        first, second = (
            influence.group(p.test, groups[0], order).change_if_removed_together for order in (1, 2)
        )
    finally:
        del p.net.convex
    assert relative_error(second, grouped[:, 0]) < 0.5 * relative_error(first, grouped[:, 0])


def test_a_group_of_all_valid_positions_is_refused():
    x, y = masked.words(8), classes(8, STEPS)
    x[3:] = 0
    net, train = masked.net_of(masked.tagger(sparse(), PENALTY), x, y)
    net.fit(train, gradient_tolerance=1e-10)
    with pytest.raises(ValueError, match=r"groups\[0\] must leave a valid position"):
        leave_group_out(net, train, train, [[0, 1, 2]])
    with pytest.raises(ValueError, match="^rows must leave some valid positions for order 1"):
        Influence(net, train).group(train, [0, 1, 2])


def test_datainf_weighs_rows_by_their_positions(tags):
    p, damping, k = tags, 0.1, 5
    found = datainf(p.net, p.train, p.test, damping=damping).change_if_removed[:, :k]
    inverse = sum(
        v * np.linalg.inv(np.outer(g, g) + damping * np.eye(len(g)))
        for v, g in zip(p.v, p.losses, strict=True)
    )
    S = p.tests @ inverse / p.v.sum()
    expected = S @ (p.losses[:k] + p.penalty).T * p.v[:k] / p.v.sum()
    assert relative_error(found, expected) < EPSILON


def test_tracin_takes_the_rows_own_losses(tags):
    p = tags
    found = tracin(p.net, p.train, p.test, thetas=p.net.theta[None], learning_rates=[0.5])
    assert relative_error(found.reduction_by_training, 0.5 * p.tests @ p.losses.T) < EPSILON


def test_perturbation_of_a_masked_row():
    """Compare the derivative by one pixel with the difference of two refits that move the pixel."""
    model = masked.segmenter(sparse(ignore_class=255), 0.1)
    x, y = masked.images(40), voided(classes(40, SIDE, SIDE), 255)
    net, train = masked.net_of(model, x, y)
    test = train.take([5])
    net.fit(train, gradient_tolerance=1e-11)
    slope = Influence(net, train).perturbation(test, [3])[0, 0, 1, 1, 0]
    ends = []
    for step in (1e-3, -1e-3):
        moved = x.copy()
        moved[3, 1, 1, 0] += step
        net.fit(Examples(moved, y), gradient_tolerance=1e-11)
        ends.append(net.losses(test.x, test.y)[0])
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-3)


def test_check_and_methods_that_refuse_masks(problem):
    p = problem
    report = check(p.net, p.train, test=p.test)
    failed = {line.name for line in report.lines if line.verdict == "fail"}
    assert not failed - {"labels"}  # the labels are random, so this check may fail
    with pytest.raises(ValueError, match="^net must not mask positions .* continued_training"):
        continued_training(p.net, p.train, p.test, [0], steps=1, rate=0.1)


def test_a_keras_model_answers_without_options():
    x, y = tagging(40, 1)
    model = masked.tagger(sparse(), PENALTY)
    model.compile(keras.optimizers.Adam(), sparse())
    assert np.isfinite(Influence(model, (x, y)).scores((x[:2], y[:2])).change_if_removed).all()
