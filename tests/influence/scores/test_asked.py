"""Tests of scores for one number of a whole test set, such as its mean loss.

Scores for one such number need only one linear system. Further tests in this module check the
warning that is given if a predicted change would make a loss negative.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from influence import Direct, GenericNeuralNet, Influence, Stream
from influence.net.measurements import margin
from tests.influence.problems import logistic, relative_error, ridge, sequential


def influence(p):
    return Influence(p.net, p.train, solver=Direct(), approximation="first_order")


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_mean_and_the_sum_need_one_system(kind):
    p = logistic(kind)
    own, each = influence(p), influence(p).scores(p.test)
    for reduce, wanted in (("mean", each[:].mean(axis=0)), ("sum", each[:].sum(axis=0))):
        found = own.scores(p.test, reduce=reduce)
        assert found.shape == (1, len(p.train)) and found.solution.x.shape[1] == 1
        assert relative_error(found[0], wanted) < 1e-10
        assert found.measurement == f"{reduce} loss"
    found = own.scores(p.test, [3, 1], measurement=margin, reduce="mean")
    wanted = own.scores(p.test, [3, 1], measurement=margin)[:].mean(axis=0)
    assert relative_error(found[0], wanted) < 1e-10


def gap(y, outputs):
    """Return the mean squared output of the first half of the rows minus that of the second."""
    half = tf.shape(outputs)[0] // 2
    return tf.reduce_mean(outputs[:half] ** 2) - tf.reduce_mean(outputs[half:] ** 2)


def test_a_function_of_all_outputs():
    p = ridge()
    found = influence(p).scores(p.test, reduce=gap)
    # The outputs are z = A theta, where A (m, d) are the test features. The derivative of `gap` by
    # theta is therefore A' (2 signs z). The oracle predicts the moves of theta.
    A = p.measured.features
    z, half = A @ p.net.theta, len(A) // 2
    signs = np.where(np.arange(len(A)) < half, 1 / half, -1 / (len(A) - half))
    moves = p.oracle.predicted_parameters(p.net.theta, np.arange(len(p.train)))
    assert relative_error(found[0], moves @ (A.T @ (2 * signs * z))) < 1e-9
    assert found.measurement == "gap"


def test_a_reduction_that_has_no_meaning_is_refused():
    p = ridge()
    own = influence(p)
    with pytest.raises(ValueError, match="^reduce must be 'mean', 'sum', a function .* got 'max'"):
        own.scores(p.test, reduce="max")
    with pytest.raises(ValueError, match="^measurement must be None if reduce is a function"):
        own.scores(p.test, measurement="mse", reduce=gap)
    with pytest.raises(ValueError, match="^reduce must return one number of all outputs, got sha"):
        own.scores(p.test, reduce=lambda y, z: z[:, 0])
    with pytest.raises(ValueError, match="^reduce must be differentiable by the outputs"):
        own.scores(p.test, reduce=lambda y, z: tf.reduce_mean(tf.round(z)) * 0 + 1.0)
    stream = Stream(tf.data.Dataset.from_tensor_slices((p.test.x, p.test.y)).batch(4))
    with pytest.raises(TypeError, match="^test must be held in memory if reduce is a function"):
        own.scores(stream, reduce=gap)
    assert relative_error(own.scores(stream, reduce="mean")[0], own.scores(p.test).mean(0)) < 1e-9


def test_a_loss_that_is_predicted_to_fall_below_zero_is_named():
    p = ridge()
    # The loss of this row, a squared error, is 1e-6. Many predicted changes would make it negative.
    x = p.test.x[:1]
    near = (x, p.net.outputs(x)[:, 0] + 1e-3)
    with pytest.warns(UserWarning, match=r"predicted changes cannot be: test loss 0 is 1e-06, it"):
        scores = influence(p).scores(near)
    worst = np.argsort(scores[0])[:12]
    with pytest.warns(UserWarning, match="without the group of 12 rows"):
        influence(p).group(near, worst)


def test_a_measurement_may_be_negative(recwarn):
    p = logistic("sigmoid")
    influence(p).scores(p.test, measurement=margin)
    model = sequential((4,), keras.layers.Dense(1, dtype="float64"), dtype="float64")
    net = GenericNeuralNet(model, lambda y, z: z[:, 0] ** 2 - 5)
    x = np.random.default_rng(0).standard_normal((30, 4))
    net.theta = np.zeros(5)
    Influence(net, (x, np.zeros(30)), solver=Direct(), damping=1.0).scores((x[:2], np.zeros(2)))
    assert not [w for w in recwarn if "cannot be" in str(w.message)]
