import keras
import numpy as np
import pytest

from influence import GenericNeuralNet
from influence.preflight import risk
from tests.influence.problems import logistic, ridge, sequential

L = keras.layers


def model(optimizer=None, constraint=None, l2=0.0):
    regulariser = keras.regularizers.L2(l2) if l2 else None
    layers = [L.Dense(3), L.BatchNormalization()]
    last = L.Dense(1, kernel_constraint=constraint, bias_regularizer=regulariser, name="last")
    made = sequential((2,), *layers, last)
    if optimizer:
        made.compile(optimizer, "mse")
    return made


def test_weights_that_theta_leaves_out_are_counted():
    made = model()
    made.layers[0].trainable = False
    line = risk.frozen(GenericNeuralNet(made, "mse"))
    # Outside theta are nine weights of the frozen layer, three moving means and three moving
    # variances. The other 6 + 4 weights are in theta.
    assert line.verdict == "ok" and line.value == 15 and "15 of 25 weights" in line.meaning
    line = risk.frozen(ridge().net)
    assert line.verdict == "ok" and line.value == 0 and "all 5 weights" in line.meaning


def test_a_layer_frozen_after_the_net_was_made_is_found():
    made = model()
    net = GenericNeuralNet(made, "mse")
    made.get_layer("last").trainable = False
    line = risk.frozen(net)
    assert line.verdict == "fail"
    assert "theta has 19 weights, but 15 of the model's are trainable now" in line.meaning


def test_the_penalty_is_part_of_the_risk():
    p = logistic("softmax")
    line = risk.penalty(p.net, 0.7)
    expected = p.net.penalty() / (0.7 + p.net.penalty())
    assert line.verdict == "ok" and line.value == pytest.approx(expected, rel=1e-12)
    line = risk.penalty(GenericNeuralNet(model(), "mse"), 0.7)
    assert line.verdict == "ok" and line.value == 0 and "mean loss alone" in line.meaning


@pytest.mark.parametrize(
    ("made", "what"),
    [
        (lambda: model(keras.optimizers.AdamW(weight_decay=0.01)), "decays weights by 0.01"),
        (lambda: model(constraint=keras.constraints.NonNeg()), "last/kernel are constrained"),
    ],
)
def test_what_the_risk_does_not_contain_is_found(made, what):
    line = risk.penalty(GenericNeuralNet(made(), "mse"), 1.0)
    assert line.verdict == "warn" and what in line.meaning
    assert risk.penalty(GenericNeuralNet(model("adam"), "mse"), 1.0).verdict == "ok"


def test_a_regulariser_added_later_is_found():
    made = model(l2=0.1)
    net = GenericNeuralNet(made, "mse")
    net.theta = np.ones(net.num_parameters)
    assert risk.penalty(net, 1.0).value == pytest.approx(0.1 / 1.1, rel=1e-6)
    made.get_layer("last").kernel.regularizer = keras.regularizers.L2(0.2)
    line = risk.penalty(net, 1.0)
    assert line.verdict == "fail"
    assert "regularisers add up to 0.7, the net's penalty is 0.1" in line.meaning
