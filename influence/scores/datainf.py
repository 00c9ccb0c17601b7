"""DataInf: influence by a closed form, layer by layer, without any solve (Kwon et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common.named_array import Estimand
from influence.common.progress import progress
from influence.curvature.operators import check_batch_size
from influence.examples.examples import Examples, check_rows
from influence.net.net import GenericNeuralNet

_BYTES_TOGETHER = 1 << 28  # what one block of per-example gradients may take


@dataclass(frozen=True, eq=False)
class DataInfScores(Estimand):
    """DataInf's predicted changes, (m, k), of each test loss were each training row removed.

    Attributes:
      change_if_removed: (m, k) change of each test loss were each training row left out. Positive:
        the loss rises without the row, so the row helped.
      rows: (k,) the training rows.
      damping: one for each layer.
    """

    damping: tuple[float, ...]


def datainf(
    net: GenericNeuralNet,
    train: Examples,
    test: Examples,
    rows: ArrayLike | None = None,
    *,
    damping: ArrayLike,
    batch_size: int | None = None,
) -> DataInfScores:
    """Predicted change of each test loss were each training row left out, by DataInf.

    H^-1 is replaced by the mean over the training rows of the inverses of one row's matrix, layer
    by layer, g_i = grad loss_i in the layer's parameters (Kwon, Wu, Wu & Zou 2024, eq. 5):

        s = (1/n) sum_i (g_i g_i' + damping I)^-1 v
          = (v - (1/n) sum_i g_i (g_i . v) / (damping + |g_i|^2)) / damping,      v = grad test loss

    and the score is s . grad L(z_i) / n, -1/n times theirs. Positive: the test loss rises without
    the row, so the row helped. Exact for one training row. The mean of inverses is no inverse of
    the mean: as the damping falls below the |g_i|^2 the scores grow like 1 / damping, far beyond
    any actual change, and only their order may mean something. The penalty is in grad L, not in the
    matrices.

    Costs a pass with every row's gradient, block by block, and no solve.

    Args:
      net: the model, at its theta.
      train: the training set, n rows.
      test: m examples, each a measurement of its own.
      rows: (k,) training rows; all n if omitted.
      damping: positive, absolute: one for all layers, or one for each of them. The authors take a
        tenth of the mean of |g_i|^2 over rows and the layer's parameters.
      batch_size: rows at a time; bounds memory and never changes a result. None: chosen.

    Returns: DataInfScores (m, k), in the unit of the test loss.
    Raises: TypeError, ValueError or IndexError for bad input, before any long work.
    """
    if not isinstance(net, GenericNeuralNet):
        raise TypeError(f"net must be a GenericNeuralNet, got {type(net).__name__}.")
    net.validate(train, "train")
    net.validate(test, "test")
    n = len(train)
    rows = np.arange(n) if rows is None else check_rows(rows, n)
    check_batch_size(batch_size)
    layers = list(_layers(net))
    dampings = _dampings(damping, len(layers))
    size = int(np.clip(_BYTES_TOGETHER // (net.num_parameters * net.dtype.itemsize), 1, n))
    V = np.concatenate([net.gradients(*batch) for batch in test.batches(batch_size or size)])
    taken = np.zeros_like(V)  # sum_i g_i (g_i . v) / (damping + |g_i|^2)
    size = batch_size or size
    for x, y in progress(train.batches(size), "row gradients", -(-n // size)):
        G = net.gradients(x, y)
        for part, own in zip(layers, dampings, strict=True):
            g = G[:, part]
            weights = V[:, part] @ g.T / (own + np.einsum("id,id->i", g, g))
            taken[:, part] += weights @ g
    S = V - taken / n
    for part, own in zip(layers, dampings, strict=True):
        S[:, part] /= own
    order = np.argsort(rows)
    size = batch_size or net.rows_per_batch(train, len(S))
    along = np.empty((len(rows), len(S)), net.dtype)
    along[order] = np.concatenate(
        [net.directional(x, y, S.T) for x, y in train.batches(size, rows[order])]
    )
    changes = (along + net.penalty_gradient() @ S.T).T / n
    return DataInfScores(changes, rows, tuple(map(float, dampings)))


def _layers(net: GenericNeuralNet) -> Iterator[slice]:
    """The part of theta that each layer is: weights whose paths differ in the last name alone."""
    start = 0
    sizes = zip(net.flat.weights, net.flat.sizes, strict=True)
    for _, weights in groupby(sizes, key=lambda pair: pair[0].path.rpartition("/")[0]):
        stop = start + sum(size for _, size in weights)
        yield slice(start, stop)
        start = stop


def _dampings(damping: Any, num_layers: int) -> NDArray:
    given = np.asarray(damping)
    if given.shape not in ((), (num_layers,)) or given.dtype.kind not in "iuf":
        raise ValueError(
            f"damping must be a number or one for each of {num_layers} layers, got {damping!r}."
        )
    if not (np.isfinite(given).all() and (given > 0).all()):
        raise ValueError(f"damping must be positive, got {damping!r}.")
    return np.broadcast_to(given, num_layers)
