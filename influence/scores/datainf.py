"""DataInf: a closed-form approximation of influence for each layer (Kwon et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common.memory import VECTORS, fitting
from influence.common.named_array import Estimand
from influence.common.numbers import numbers
from influence.curvature.operators import check_batch_size
from influence.examples.examples import check_rows
from influence.examples.given import Data
from influence.net.checked import Net, checked
from influence.net.net import GenericNeuralNet
from influence.net.questions import PerRow


@dataclass(frozen=True, eq=False)
class DataInfScores(Estimand):
    """Changes of test losses (m, k) that DataInf predicts if single training rows are removed.

    Attributes:
      change_if_removed: (m, k) change of test loss i if training row j is removed. Positive: the
        loss rises without the row, so the row helped.
      rows: (k,) the training rows.
      damping: the damping of each layer, in the order of theta.
    """

    damping: tuple[float, ...]


def datainf(
    net: Net,
    train: Data,
    test: Data,
    rows: ArrayLike | None = None,
    *,
    damping: ArrayLike,
    batch_size: int | None = None,
) -> DataInfScores:
    """Predict by DataInf how each test loss changes if a training row is left out.

    DataInf approximates the inverse Hessian H^-1 of each layer by a mean over the n training rows.
    Let g_i = grad loss_i and v = grad test loss, both with respect to the layer's parameters. The
    term of row i is the inverse of g_i g_i' + damping I (Kwon, Wu, Wu & Zou 2024, eq. 5). So
    DataInf replaces H^-1 v by

        s = (1/n) sum_i (g_i g_i' + damping I)^-1 v
          = (v - (1/n) sum_i g_i (g_i . v) / (damping + |g_i|^2)) / damping

    With L = loss + penalty, the score of row i is s . grad L(z_i) / n. This is -1/n times the
    authors' score. Positive: the test loss rises without the row, so the row helped. The matrices
    g_i g_i' + damping I do not contain the penalty.

    For n > 1, the mean of inverses is not the inverse of the mean. If the damping is below most
    |g_i|^2, the scores grow like 1 / damping and exceed any actual change. Then the ranking of the
    scores may still be meaningful, but their size is not.

    The cost is two passes over the training set. The first pass forms every row's gradient.

    Args:
      net: the model. Its current theta is treated as the minimum of the training risk.
      train: the training set, n rows.
      test: m examples. Each has its own scores.
      rows: (k,) training rows; all n if omitted.
      damping: a positive number for all layers, or one for each layer. It is absolute, not relative
        to the gradients. The authors use a tenth of the mean squared entry of the g_i, over all
        rows and all parameters of the layer.
      batch_size: number of rows in a batch. It limits memory and does not change the result.

    Returns: DataInfScores (m, k), in the unit of the test loss.
    Raises: TypeError, ValueError or IndexError for bad input, before any long work.
    """
    net, train, test = checked(net, train, test)
    n = len(train)
    asked = None if rows is None else check_rows(rows, n)
    rows = np.arange(n) if asked is None else asked
    check_batch_size(batch_size)
    layers = list(_layers(net))
    dampings = _dampings(damping, len(layers))
    size = batch_size or fitting(VECTORS, net.num_parameters * net.dtype.itemsize, n)
    V = test.each_row(PerRow("gradients"), net, batch_size=size)
    question = partial(_shrunk, V=V, layers=layers, dampings=dampings)
    mass = net.mass(train)
    S = V - train.sum_over(question, net, batch_size=size, what="row gradients") / mass
    for part, own in zip(layers, dampings, strict=True):
        S[:, part] /= own
    along = train.each_row(PerRow("directional", S.T), net, rows=asked, batch_size=batch_size)
    changes = (along + net.penalty_gradient() @ S.T).T / mass
    if net.loss.has_masses:
        changes *= net.row_masses(train)[rows]
    return DataInfScores(changes, rows, tuple(map(float, dampings)))


def _shrunk(
    net: GenericNeuralNet,
    theta: NDArray | None,
    x: Any,
    y: NDArray,
    V: NDArray,
    layers: list[slice],
    dampings: NDArray,
) -> NDArray:
    """Return the sum over a batch of g_i (g_i . v) / (damping + |g_i|^2) for each v in V: (m, d).

    The formula is applied to each layer separately. The sum weights each row by its mass.
    """
    G, total = net.at(theta).gradients(x, y), np.empty_like(V)
    masses = net.masses(x, y) if net.loss.has_masses else None
    for part, own in zip(layers, dampings, strict=True):
        g = G[:, part]
        weights = V[:, part] @ g.T / (own + np.einsum("id,id->i", g, g))
        if masses is not None:
            weights *= masses
        total[:, part] = weights @ g
    return total


def _layers(net: GenericNeuralNet) -> Iterator[slice]:
    """Yield the slice of theta of each layer. All weights of a layer have the same parent path."""
    start = 0
    sizes = zip(net.flat.weights, net.flat.sizes, strict=True)
    for _, weights in groupby(sizes, key=lambda pair: pair[0].path.rpartition("/")[0]):
        stop = start + sum(size for _, size in weights)
        yield slice(start, stop)
        start = stop


def _dampings(damping: Any, num_layers: int) -> NDArray:
    given = numbers(damping, "damping")
    if given.shape not in ((), (num_layers,)) or given.dtype.kind not in "iuf":
        raise ValueError(
            f"damping must be a number or one for each of {num_layers} layers, got {damping!r}."
        )
    if not (np.isfinite(given).all() and (given > 0).all()):
        raise ValueError(f"damping must be positive, got {damping!r}.")
    return np.broadcast_to(given, num_layers)
