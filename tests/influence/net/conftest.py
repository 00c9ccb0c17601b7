"""Fixtures: a small network with derivatives by a plain tape, and a recorded training."""

import numpy as np
import pytest
import tensorflow as tf

from tests.influence.net import trainings
from tests.influence.problems import tanh_net


def squares(y, output):
    return tf.reduce_sum((tf.reshape(y, [-1, 1]) - output) ** 2, axis=1)


@pytest.fixture(scope="module")
def tanh():
    """Return (network, examples, losses, gradients, V).

    `losses` and `gradients` are functions of theta that use a plain tape. V (d, 2) is random.
    """
    net, examples = tanh_net()
    twin, _ = tanh_net()  # the functions below change theta of this twin, not of the net

    def losses(theta, x=examples.x):
        twin.theta = theta
        return squares(examples.y, twin.model(x)).numpy()

    def gradients(theta, x=examples.x):
        """Return the gradient of the mean loss by theta, and of each row's loss by its inputs."""
        twin.theta = theta
        x = tf.constant(x)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            values = squares(examples.y, twin.model(x))
            mean, total = tf.reduce_mean(values), tf.reduce_sum(values)
        by_theta = [np.ravel(g) for g in tape.gradient(mean, twin.model.trainable_weights)]
        return np.concatenate(by_theta), tape.gradient(total, x).numpy()

    V = np.random.default_rng(1).standard_normal((net.num_parameters, 2))
    return net, examples, losses, gradients, V


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Return a history and the `Watch` of the same training."""
    folder = tmp_path_factory.mktemp("first")
    return trainings.trained(folder, trainings.built(), trainings.rows())
