"""Refit of a network's last layer to the minimum of its risk, and its leave-one-out outputs.

The training of a network usually stops before a minimum. But its last layer can be refitted to a
minimum, with the penultimate features phi as fixed inputs. Let x (n, f) be the standardised
features, W the weights and b an intercept. The risk

    R(W, b) = mean_i w_i l(x_i W + b, y_i) + lambda/2 (|W|^2 + |b|^2)

is convex. If the labels are classes, l is the cross-entropy. If the labels are numbers, l is half
the squared error. The w_i are the sample weights, scaled to a mean of 1.

The leave-one-out output of a row is the output of a refit without this row. At the minimum of R, it
has a closed form. For classes the form is approximate (`leave_one_out_outputs`: Rad & Maleki 2020).
For numbers it is exact: y - (y - z) / (1 - h), with the row's fitted value z and leverage h.

lambda is chosen from a fixed grid by the mean loss on held-out rows. Without held-out rows, it is
chosen by the mean leave-one-out loss, weighted by w. The choice is the largest lambda whose mean
loss is within one standard error of the least mean loss (Breiman, Friedman, Olshen & Stone 1984,
section 3.4.3). A smaller lambda fits the labels more closely, and some labels may be wrong. So a
smaller lambda is taken only if it clearly improves the predictions. The choice needs no information
about which labels are wrong.

The refit has a limit: the features come from a training that used every label. If the network
memorised a wrong label, the features of this row may already resemble the wrong class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.linalg
import scipy.special
from numpy.typing import NDArray
from sklearn.utils.extmath import randomized_svd

from influence.curvature.operators import Hessian
from influence.examples.examples import Examples
from influence.models.logistic import BinaryLogisticRegression, MulticlassLogisticRegression
from influence.net.margins import class_margins
from influence.net.penultimate import Penultimate
from influence.scores.out_of_sample import leave_one_out_outputs
from influence.solvers import Direct

# The grid of lambda. The search begins with the largest value.
WEIGHT_DECAYS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
# The search stops after this many consecutive values without a smaller loss.
_WORSE = 2
# The refit has at most this many weights. If there are too many features for this limit, the refit
# uses their first principal components.
MOST_WEIGHTS = 4096
# The features of all rows may have at most this many entries.
_MOST_ENTRIES = 1 << 28
# MOST_WEIGHTS must allow at least this many principal components. Otherwise the refit is refused,
# because fewer components would not represent the network's features.
_FEWEST = 8
# Gradient tolerance of the logistic fits.
_GRADIENT = 1e-7


@dataclass(frozen=True, eq=False)
class OutOfSample:
    """Outputs of rows, each from a model that was trained without the row.

    Attributes:
      outputs: (n, c) logits of c classes, or (n, 1) predicted numbers.
      losses: (n,) the loss of each row at these outputs, without sample weights: the cross-entropy
        in nats for classes, half the squared error for numbers.
      given: (n,) the labels: class numbers, or the numbers of a regression.
      how: description of the models that computed the outputs.
    """

    outputs: NDArray
    losses: NDArray
    given: NDArray
    how: str

    @property
    def of_classes(self) -> bool:
        """True if the labels are classes."""
        return self.outputs.shape[1] > 1

    @property
    def probabilities(self) -> NDArray:
        """(n, c) probabilities of the classes."""
        return scipy.special.softmax(self.outputs, axis=1)

    @property
    def margins(self) -> NDArray:
        """(n,) logit of the label minus the largest other logit. Negative: label is doubtful."""
        return class_margins(self.outputs, self.given)

    @property
    def residuals(self) -> NDArray:
        """(n,) given number minus predicted number, for labels that are numbers."""
        return self.given - self.outputs[:, 0]


@dataclass(frozen=True, eq=False)
class LastLayer(OutOfSample):
    """Leave-one-out outputs of n rows by the refitted last layer.

    Attributes:
      weight_decay: the chosen lambda.
      searched: dict from each lambda of the search to the mean loss by which lambda is chosen.
      num_features: the number of features, or of principal components, in the refit.
      dropped: share of the features' variance that the principal components leave out, or 0.
      held_out: (m,) losses of held-out rows by the refit on all n rows, or None.
      least: the arrays `losses` and `held_out` for the lambda with the least mean leave-one-out
        loss. They show best whether the features have memorised labels.
      weighted: True if the sample weights of the refit differ between rows.
    """

    weight_decay: float
    searched: dict[float, float]
    num_features: int
    dropped: float
    held_out: NDArray | None
    least: tuple[NDArray, NDArray | None]
    weighted: bool = False


def last_layer(
    features: NDArray,
    given: NDArray,
    num_classes: int,
    held_out: tuple[NDArray, NDArray] | None = None,
    weights: NDArray | None = None,
) -> LastLayer:
    """Refit the last layer on features, and compute its leave-one-out outputs.

    Args:
      features: (n, f) the penultimate features phi.
      given: (n,) the labels: class numbers, or the numbers of a regression.
      num_classes: the number of classes c, or 0 if the labels are numbers. For two classes, the
        refitted layer has one logit.
      held_out: features (m, f) and labels (m,) of rows that were not used for training, or None.
      weights: (n,) sample weights >= 0, or None for equal weights. Their scale does not matter.

    Returns: a LastLayer.
    Raises: ValueError if all rows have the same features, or if there are too many classes for
      `MOST_WEIGHTS`.
    """
    width = 1 if num_classes <= 2 else num_classes
    w = np.ones(len(given)) if weights is None else weights / weights.mean(dtype=np.float64)
    x, transform, dropped = _standardised(features, width, w)
    mean, scale = 0.0, 1.0
    y: NDArray = np.asarray(given)
    if not num_classes:
        mean = np.average(y, weights=w)
        scale = float(np.sqrt(np.average((y - mean) ** 2, weights=w))) or 1.0
        y = (y - mean) / scale
    fit = _classes(x, y, num_classes, w) if num_classes else _numbers(x, y, w)
    tried: list[_Fit] = []
    seen, known = (
        (None, y) if held_out is None else (transform(held_out[0]), np.asarray(held_out[1]))
    )
    for decay in sorted(WEIGHT_DECAYS, reverse=True):
        found = fit(decay)
        if seen is not None:
            z = found.outputs_of(seen)
            left = known - (z[:, 0] * scale + mean)
            lost = _cross_entropy(_two(z), known) if num_classes else left**2 / 2
            found = replace(found, held_out=lost)
        tried.append(replace(found, losses=found.losses * scale**2))
        if all(_passed(means) for means in _means(tried, w) if means):
            break
    own, others = _means(tried, w)
    least, chosen = tried[int(np.argmin(own))], _chosen(tried, own, others, w)
    return LastLayer(
        _two(chosen.outputs) if num_classes else chosen.outputs * scale + mean,
        chosen.losses,
        np.asarray(given),
        "the last layer, refitted without the row on the network's features (closed form)",
        weight_decay=chosen.weight_decay,
        searched={one.weight_decay: m for one, m in zip(tried, others or own, strict=True)},
        num_features=x.shape[1],
        dropped=dropped,
        held_out=chosen.held_out,
        least=(least.losses, least.held_out),
        weighted=bool(np.ptp(w) > 0),
    )


def features_of(net: Any, examples: Examples, batch_size: int | None = None) -> NDArray | str:
    """Return the penultimate features (n, f) of all rows. If impossible, return the reason."""
    question = Penultimate.of(net)
    if question is None:
        return "the model's last layer of weights is not a dense layer or convolution of one output"
    first = question(net, None, examples.take([0]).x, examples.take([0]).y)
    if first.ndim != 2:
        return f"the input of the model's last layer has the shape {first.shape[1:]}"
    if first.size * len(examples) > _MOST_ENTRIES:
        return f"the features have {first.size * len(examples):,} entries, which are too many"
    how: dict[str, Any] = {"batch_size": batch_size, "what": "features of the last layer"}
    return examples.each_row(question, net, **how)


@dataclass(frozen=True, eq=False)
class _Fit:
    """Result of a fit with one lambda.

    Attributes:
      weight_decay: lambda.
      outputs: (n, width) leave-one-out outputs.
      losses: (n,) leave-one-out losses.
      outputs_of: function from features (m, f) to the outputs (m, width) of the fit on all rows.
      held_out: (m,) losses of held-out rows by the fit on all rows, or None.
    """

    weight_decay: float
    outputs: NDArray
    losses: NDArray
    outputs_of: Callable[[NDArray], NDArray]
    held_out: NDArray | None = None


def _means(tried: list[_Fit], w: NDArray) -> tuple[list[float], list[float]]:
    """Return the mean leave-one-out losses, and the mean held-out losses if there are any."""
    own = [float(np.average(fit.losses, weights=w)) for fit in tried]
    return own, [float(fit.held_out.mean()) for fit in tried if fit.held_out is not None]


def _passed(means: list[float]) -> bool:
    """Return True if the last `_WORSE` means are no smaller than an earlier one."""
    return len(means) - 1 - int(np.argmin(means)) >= _WORSE


def _chosen(tried: list[_Fit], own: list[float], others: list[float], w: NDArray) -> _Fit:
    """Return the fit with the largest lambda within one standard error of the least mean loss."""
    means = others or own
    best = int(np.argmin(means))
    lost = tried[best].held_out
    values, weights = (tried[best].losses, w) if lost is None else (lost, np.ones(len(lost)))
    variance = np.average((values - means[best]) ** 2, weights=weights)
    error = float(np.sqrt(variance * (weights**2).sum())) / weights.sum()
    return next(fit for fit, mean in zip(tried, means, strict=True) if mean <= means[best] + error)


def _classes(x: NDArray, y: NDArray, num_classes: int, w: NDArray) -> Callable[[float], _Fit]:
    rows, theta = Examples(x, y.astype(np.int64), None if (w == 1).all() else w), None

    def fit(decay: float) -> _Fit:
        nonlocal theta
        how: dict[str, Any] = {"weight_decay": decay, "intercept": True}
        if num_classes == 2:
            net: Any = BinaryLogisticRegression(x.shape[1], **how)
        else:
            net = MulticlassLogisticRegression(x.shape[1], num_classes, **how)
        if theta is not None:
            net.theta = theta
        net.fit(rows, gradient_tolerance=_GRADIENT)
        theta = net.theta  # the next fit starts at this theta
        found = leave_one_out_outputs(net, rows, solver=Direct(), damping=0.0, curvature=Hessian)
        return _Fit(decay, found.logits, _cross_entropy(_two(found.logits), y), net.outputs)

    return fit


def _numbers(x: NDArray, y: NDArray, w: NDArray) -> Callable[[float], _Fit]:
    """Return a function that fits ridge regression for a lambda. x is decomposed only once."""
    one = _with_one(x)
    values, vectors = scipy.linalg.eigh(one.T @ (w[:, None] * one) / len(x))
    along = one @ vectors
    pulled = along.T @ (w * y) / len(x)

    def fit(decay: float) -> _Fit:
        inverse = 1 / (np.maximum(values, 0) + decay)
        weights = vectors @ (inverse * pulled)
        # The risk without row i is the mean loss of n - 1 rows plus the same penalty. Multiply it
        # by (n - 1) / n: the losses are then divided by n, as in R, and the weight decay is
        # decay (n - 1) / n. The matrix is that of R with this decay, minus the term of row i.
        less = 1 / (np.maximum(values, 0) + decay * (len(x) - 1) / len(x))
        fitted = along @ (less * pulled)
        h = w * np.einsum("nf,f,nf->n", along, less, along) / len(x)
        left = (y - fitted) / np.maximum(1 - h, 1e-12)
        outputs_of = lambda z: _with_one(z) @ weights[:, None]  # noqa: E731
        return _Fit(decay, (y - left)[:, None], left**2 / 2, outputs_of)

    return fit


def _with_one(x: NDArray) -> NDArray:
    return np.column_stack([x, np.ones(len(x))])


def _standardised(
    features: NDArray, width: int, w: NDArray
) -> tuple[NDArray, Callable[[NDArray], NDArray], float]:
    """Standardise features with means and variances weighted by w (n,).

    If there are too many features, they are replaced by their first principal components. The
    penalty does not change if the features are rotated. So if the dropped components have no
    variance, the refit is the same as with all features.

    Returns: (x, transform, dropped). x holds the standardised features or their components.
      `transform` maps other features in the same way. `dropped` is the lost share of the variance.
    """
    mean = np.average(features, axis=0, weights=w)
    scale = np.sqrt(np.average((features - mean) ** 2, axis=0, weights=w))
    varies = scale > 1e-6 * max(float(scale.max()), np.finfo(np.float32).tiny)
    if not varies.any():
        raise ValueError("features must vary between rows, got the same features in all rows.")
    mean, scale = mean[varies], scale[varies]

    def standard(other: NDArray) -> NDArray:
        return (other[:, varies].astype(np.float64) - mean) / scale

    x = standard(features)
    most = MOST_WEIGHTS // width - 1
    if x.shape[1] <= most:
        return x, standard, 0.0
    if most < _FEWEST:
        raise ValueError(
            f"the refit must have at most {MOST_WEIGHTS // (_FEWEST + 1)} classes, got {width}."
        )
    most = min(most, len(x))
    rotation = randomized_svd(x, most, random_state=0)[2].T
    kept = x @ rotation
    dropped = max(1 - float((kept**2).sum() / (x**2).sum()), 0.0)
    return kept, lambda other: standard(other) @ rotation, dropped


def _two(z: NDArray) -> NDArray:
    """Add a zero logit of class 0 to logits (n, 1) of class 1. Return logits (n, c) unchanged."""
    return np.column_stack([np.zeros(len(z)), z]) if z.shape[1] == 1 else z


def _cross_entropy(z: NDArray, y: NDArray) -> NDArray:
    return scipy.special.logsumexp(z, axis=1) - z[np.arange(len(z)), y.astype(int)]
