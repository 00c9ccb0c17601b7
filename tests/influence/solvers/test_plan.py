"""Tests of the plan, which chooses the options that the caller leaves out."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from influence import (
    CG,
    EKFAC,
    Direct,
    Examples,
    GaussNewton,
    GenericNeuralNet,
    Hessian,
    Influence,
    Nystrom,
    prepare,
)
from influence.solvers import plan
from tests import oracles
from tests.influence.problems import logistic, relative_error, sequential, tanh_net

L = keras.layers
F64 = {"dtype": "float64"}
N = 40


def logits():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def log_loss(y, output):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(y, output)


def small(dtype="float32", **kernel):
    keras.utils.set_random_seed(0)
    layers = L.Dense(6, activation="relu", dtype=dtype), L.Dense(3, dtype=dtype, **kernel)
    model = sequential((4,), *layers, dtype=dtype)
    model.compile("adam", logits())
    return model


def rows(n=N, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 4)).astype(dtype), rng.integers(0, 3, n)


def double(model):
    """Return a float64 copy of a model that `small` made, with the same weights."""
    copy = small("float64")
    copy.set_weights([w.astype(float) for w in model.get_weights()])
    return copy


def expected(model, damping, x, y, x_test, y_test):
    """Return s_test . grad loss_i / n, (m, n), from dense derivatives of a plain float64 model."""
    at = oracles.dense_derivatives(model, log_loss, x, y)
    test = oracles.dense_derivatives(model, log_loss, x_test, y_test)
    G = at.gauss_newton
    damping = 0.1 * np.trace(G) / len(G) if damping is None else damping
    return test.gradients @ np.linalg.solve(G + damping * np.eye(len(G)), at.gradients.T) / len(x)


def test_a_net_that_is_not_convex_gets_damped_gauss_newton_in_float64():
    model, (x, y), (x_test, y_test) = small(), rows(), rows(5, 1)
    scores = Influence(model, (x, y), approximation="first_order").scores((x_test, y_test))
    found = scores.plan
    wanted = expected(double(model), None, x.astype(float), y, x_test.astype(float), y_test)
    assert relative_error(scores[:], wanted) < 1e-9
    assert (found.curvature, found.dtype, found.solver) == ("GaussNewton", "float64", Direct())
    assert scores.solution.converged.all()
    text = repr(found)
    for part in ("GaussNewton", "mean eigenvalue", "Grosse et al. 2023", "Direct", "float64"):
        assert part in text


def test_what_is_given_goes_first():
    model, (x, y) = small(), rows()
    given = Influence(model, (x, y), damping=0.3).plan
    assert given.damping == 0.3 and given.curvature == "GaussNewton"
    solver = CG(rtol=1e-3)
    given = Influence(model, (x, y), solver=solver).plan
    assert given.solver == solver and given.dtype == "float32" and given.damping > 0
    by_name = Influence(model, (x, y), curvature=Hessian)
    assert by_name.plan.curvature == "Hessian" and by_name.plan.damping == 0
    net = GenericNeuralNet(model)
    prepared = prepare(GaussNewton(net, Examples(x, y), 0.7), Direct())
    plan_of = Influence(net, prepared.A.examples, solver=prepared).plan
    assert (plan_of.curvature, plan_of.damping, plan_of.solver) == ("GaussNewton", 0.7, Direct())


def test_a_convex_risk_gets_its_hessian_without_damping():
    p = logistic("sigmoid")
    closed = Influence(p.net, p.train)
    assert (closed.plan.curvature, closed.plan.damping) == ("Hessian", 0)
    assert type(closed.plan.solver) is CG
    # A net without closed forms of the same Keras model. Its outputs are affine in theta, too.
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    net = GenericNeuralNet(p.net.model, loss)
    ours = Influence(net, p.train, approximation="first_order")
    wanted = p.oracle.predicted_changes(p.net.theta, p.measured, np.arange(len(p.train)))
    assert (ours.plan.curvature, ours.plan.damping) == ("Hessian", 0)
    assert relative_error(ours.scores(p.test)[:], wanted) < 1e-9


def test_redundant_directions_of_a_convex_risk_do_not_matter():
    """Check softmax regression without a penalty, whose Hessian H is singular.

    The risk does not change if the same vector is added to the weights of all classes. With the
    tiny damping that the plan chooses, the scores must be those of the pseudo-inverse of H.
    """
    x, y = rows(60, dtype="float64")
    model = sequential((4,), L.Dense(3, **F64), **F64)
    model.compile("adam", logits())
    net = GenericNeuralNet(model)
    net.fit(Examples(x, y), gradient_tolerance=1e-9)
    scores = Influence(net, (x, y), approximation="first_order").scores((x[:3], y[:3]))
    at = oracles.dense_derivatives(model, log_loss, x, y)
    H = oracles.dense_hessian(model, log_loss, x, y)
    wanted = at.gradients[:3] @ np.linalg.pinv(H, 1e-10, hermitian=True) @ at.gradients.T / len(x)
    assert np.linalg.eigvalsh(H)[0] < 1e-12
    assert relative_error(scores[:], wanted) < 1e-5
    assert 0 < scores.plan.damping < 1e-8 and "redundant" in repr(scores.plan)


@pytest.mark.parametrize(
    ("rate", "momentum", "total"),
    [
        (0.05, 0.9, 0.05 * 12 / 0.1),
        (keras.optimizers.schedules.PolynomialDecay(0.2, 12, 0.0), 0.0, 0.2 * (12 + 1) / 2),
    ],
)
def test_the_training_sets_the_damping_where_it_is_known(rate, momentum, total):
    model, (x, y) = small(), rows()
    model.compile(keras.optimizers.SGD(rate, momentum=momentum), logits())
    model.fit(x, y, batch_size=10, epochs=3, verbose=0)  # the training takes 12 steps
    found = Influence(model, (x, y)).plan
    assert found.damping == pytest.approx(1 / total, rel=1e-6)
    assert "learning rate x steps" in repr(found)


def test_the_net_may_not_change_after_the_plan_copied_it():
    net = GenericNeuralNet(small())
    influence = Influence(net, rows())
    influence.scores(rows(2, 1))
    net.theta = 2 * net.theta
    with pytest.raises(RuntimeError, match="^theta has changed since this Influence was made"):
        influence.scores(rows(2, 1))


def test_a_loss_without_curvature_is_refused():
    net, examples = tanh_net()
    net = GenericNeuralNet(net.model, "mae")
    with pytest.raises(ValueError, match="^loss must have curvature in the outputs, got 'mean_abs"):
        Influence(net, examples).scores(examples)


def cosine(y, output):
    return 1 - tf.cos(output[:, 0] - tf.cast(y, output.dtype))


def test_a_loss_that_is_not_convex_gets_enough_damping():
    net, examples = tanh_net()
    net = GenericNeuralNet(net.model, cosine)
    influence = Influence(net, examples)
    smallest = np.linalg.eigvalsh(GaussNewton(net, examples).dense())[0]
    assert smallest < 0 and influence.plan.damping > -smallest
    assert np.isfinite(influence.scores(examples)[:]).all()


def test_larger_nets_get_other_solvers(monkeypatch):
    model, data = small(), rows()
    monkeypatch.setattr(plan, "_DIRECT_WORK", 0)
    found = Influence(model, data)
    assert found.plan.solver == CG(preconditioner=Nystrom(50))
    wanted = expected(
        double(model), found.plan.damping, data[0].astype(float), data[1], *rows(3, 1, "float64")
    )
    assert relative_error(found.scores(rows(3, 1))[:], wanted) < 1e-4
    monkeypatch.setattr(plan, "FLOAT64_WEIGHTS", 0)
    found = Influence(model, data).plan
    assert found.solver == EKFAC() and found.dtype == "float32"


@pytest.mark.parametrize(
    ("layers", "affine"),
    [
        ([lambda: L.Dense(3)], True),
        ([lambda: L.Dense(4, activation="relu", trainable=False), lambda: L.Dense(3)], True),
        ([lambda: L.Dense(4), lambda: L.Dense(3)], False),
        ([lambda: L.Dense(4, activation="relu"), lambda: L.Dense(3)], False),
        ([lambda: L.Dense(3), lambda: L.LeakyReLU(0.9)], False),
    ],
)
def test_affine_in_theta(layers, affine):
    keras.utils.set_random_seed(1)
    model = sequential((4,), *(make() for make in layers))
    net = GenericNeuralNet(model, logits())
    assert plan.affine_in_theta(net, Examples(*rows())) is affine
