"""Tests of the risk: the weights on which it depends, and its penalty."""

from __future__ import annotations

import numpy as np

from influence.net.net import GenericNeuralNet
from influence.preflight.report import Finding, Line
from influence.preflight.rows import rounding


def frozen(net: GenericNeuralNet) -> Line:
    """Count the weights of the model that are not in theta."""
    model = net.model
    title = "frozen weights"
    total = sum(int(np.prod(w.shape)) for w in model.weights)
    trainable = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    if net.flat.parts.chosen:
        trainable = net.num_parameters
    if trainable != net.num_parameters:
        return Finding(title, total - net.num_parameters).fail(
            f"The net's theta has {net.num_parameters} weights, but {trainable} of the model's are "
            "trainable now: a layer was frozen or freed after the net was made.",
            "Make the net anew: GenericNeuralNet(model, loss).",
        )
    left_out = total - trainable
    if not left_out:
        return Finding(title, 0).ok(f"Theta holds all {total} weights of the model.")
    return Finding(title, left_out).ok(
        f"{left_out} of {total} weights (frozen layers, moving statistics) are held fixed: "
        "influence is that on the other weights alone, and refits must hold the same ones fixed.",
    )


def penalty(net: GenericNeuralNet, mean_loss: float) -> Line:
    """Check that the net's penalty is everything that training minimised besides the losses."""
    model, value = net.model, net.penalty()
    title = "penalty"
    # `model.losses` would also contain losses that the model's last call added by `add_loss`.
    by_keras = float(
        sum(np.asarray(w.regularizer(w)) for w in model.trainable_weights if w.regularizer)
    )
    share = value / (abs(mean_loss) + abs(value)) if value else 0.0
    if abs(by_keras - value) > rounding(net.dtype) * (abs(by_keras) + abs(value)):
        return Finding(title, share).fail(
            f"The model's regularisers add up to {by_keras:.4g}, the net's penalty is {value:.4g}.",
            "Make the net anew after any change to the model, and put penalties into the weights' "
            "Keras regularisers.",
        )
    decay = getattr(getattr(model, "optimizer", None), "weight_decay", None)
    if decay:
        return Finding(title, share).warn(
            f"The model's optimiser decays weights by {decay}, which is no part of the risk: the "
            "weights that it ends at are no minimum of mean loss + penalty.",
            "Express it by kernel_regularizer=keras.regularizers.L2(...) on the layers instead, "
            "and train again.",
        )
    bound = [w.path for w in net.flat.weights if getattr(w, "constraint", None) is not None]
    if bound:
        return Finding(title, share).warn(
            f"The weights {', '.join(bound[:3])} are constrained: at a constrained minimum the "
            "gradient is not zero, and influence functions do not know the constraint.",
            "Replace the constraint by a penalty, or freeze those layers.",
        )
    if not value:
        return Finding(title, 0.0).ok(
            "The weights in theta have no regulariser: the risk is the mean loss alone. Weight "
            "decay by an optimiser would not be in it.",
        )
    return Finding(title, share).ok(
        f"The regularisers, {value:.3g} in sum, are {share:.1%} of the risk and part of its "
        "gradient and Hessian.",
    )
