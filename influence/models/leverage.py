"""Closed forms with H^-1 for single rows of a linear model: leverages and self-influence.

With w = d2l/dz2 and S = diag(sqrt(w)), one output has H = X' S S X / n + lambda I, (d, d). If
d > n, Woodbury's identity needs only matrices of the size of K = X X', (n, n):

    H^-1 = (I - X' S B^-1 S X) / lambda        B = S K S + n lambda I

Every function takes a net with outputs by `design`, a loss of them by `link`, and the penalty
lambda/2 |theta|^2, where lambda is `net.strong_convexity`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

from influence.common.convergence import DivergenceError
from influence.examples.examples import Examples, check_rows
from influence.models.design import Design, Link
from influence.net.net import GenericNeuralNet

# Number of right-hand sides that are solved together. It bounds memory.
_COLUMNS = 1024
# Largest order of a matrix that `self_influence` factors: 2 GiB.
_LARGEST_FACTOR = 1 << 14


def leverages(
    net: GenericNeuralNet,
    design: Design,
    link: Link,
    examples: Examples,
    rows: ArrayLike | None = None,
    *,
    gram: NDArray | None = None,
) -> NDArray:
    """See LinearModel.leverages."""
    if design.num_outputs != 1:
        raise ValueError(f"model must have one output, got {design.num_outputs}.")
    n = len(examples)
    if gram is not None and gram.shape != (n, n):
        raise ValueError(f"gram must have shape ({n}, {n}), got {gram.shape}.")
    rows = np.arange(n) if rows is None else check_rows(rows, n)
    return _quadratics(net, design, link, examples, rows, gram)[0]


def self_influence(
    net: GenericNeuralNet, design: Design, link: Link, examples: Examples, rows: NDArray
) -> NDArray | None:
    """Compute e_i (e_i x_i' H^-1 x_i + x_i' H^-1 lambda theta) / n with e = dl/dz: (k,).

    None if this is not safe or not faster: for several outputs, in float32, without a penalty, for
    a matrix that is too large or not positive definite, and for one of order n if the inputs are
    not in memory.
    """
    smaller = min(len(examples), design.num_parameters)
    if design.num_outputs != 1 or design.dtype != np.float64 or net.strong_convexity == 0:
        return None
    by_rows = design.num_parameters > len(examples)
    if smaller > _LARGEST_FACTOR or (by_rows and not examples.in_memory):
        return None
    e = examples.each_row(partial(_slopes, design=design, link=link), net, rows=rows)
    try:
        h, q = _quadratics(net, design, link, examples, rows, None)
    except DivergenceError:
        return None
    return e * (e * h + q) / len(examples)


def one_step_leave_one_out(
    net: GenericNeuralNet, design: Design, link: Link, examples: Examples, rows: ArrayLike
) -> NDArray:
    """See LinearModel.one_step_leave_one_out."""
    rows = check_rows(rows, len(examples))
    n, c, theta, weight_decay = len(examples), design.num_outputs, net.theta, net.strong_convexity
    H: Any = net.hessian(examples)
    H = H * (n / (n - 1))
    H[np.diag_indices_from(H)] -= weight_decay / (n - 1)
    factor = scipy.linalg.cho_factor(H)
    gradient = net.risk_gradient(examples) - net.penalty_gradient()
    chosen = examples.take(rows)
    own = net.gradients(chosen.x, chosen.y)
    Z = design.times(chosen.x, theta)
    stepped = np.empty((len(rows), design.num_parameters))
    for j, x in enumerate(design.with_one(design.dense(chosen.x))):
        # With A = x (x) I_c the row's Hessian is A S A', S (c, c).
        A = np.kron(x[:, None], np.eye(c))
        S = link.curved(Z[j : j + 1], chosen.y[j : j + 1], np.eye(c)[None])[0] / (n - 1)
        g = (n * gradient - own[j]) / (n - 1) + net.penalty_gradient()
        B = scipy.linalg.cho_solve(factor, np.column_stack([g, A]))
        inner = np.linalg.solve(np.eye(c) - S @ (A.T @ B[:, 1:]), S @ (A.T @ B[:, 0]))
        stepped[j] = theta - B[:, 0] - B[:, 1:] @ inner
    return stepped


def _quadratics(
    net: GenericNeuralNet,
    design: Design,
    link: Link,
    examples: Examples,
    rows: NDArray,
    K: NDArray | None,
) -> tuple[NDArray, NDArray]:
    """Compute x_i' H^-1 x_i and x_i' H^-1 lambda theta, (k,) each."""
    try:
        if design.num_parameters <= len(examples):
            return _by_parameters(net, design, examples, rows)
        return _by_rows(net, design, link, examples, rows, K)
    except np.linalg.LinAlgError as error:
        raise DivergenceError(
            "the Hessian must be positive definite, got a singular one; use a weight_decay above "
            f"{net.strong_convexity}."
        ) from error


def _by_parameters(
    net: GenericNeuralNet, design: Design, examples: Examples, rows: NDArray
) -> tuple[NDArray, NDArray]:
    """Compute `_quadratics` in d^3/3 operations for the factor and d^2 for each row."""
    H: Any = net.hessian(examples)
    L = scipy.linalg.cholesky(H.T, lower=True, overwrite_a=True, check_finite=False)
    half = _solved(L, net.penalty_gradient())
    h, q = np.empty((2, len(rows)), H.dtype)
    order, start = np.argsort(rows), 0
    question = partial(_dense_rows, design=design)
    for x in examples.map_over(question, net, rows=rows[order], batch_size=_COLUMNS):
        part = order[start : start + len(x)]
        start += len(x)
        columns = _solved(L, x.T)
        h[part], q[part] = np.einsum("ij,ij->j", columns, columns), half @ columns
    return h, q


def _slopes(
    net: Any, theta: NDArray | None, x: Any, y: NDArray, *, design: Design, link: Link
) -> NDArray:
    """Return dl/dz of a batch, (b,), for one output."""
    return link.slope(design.times(x, net.at(theta).theta), y)[:, 0, 0]


def _dense_rows(net: Any, theta: NDArray | None, x: Any, y: NDArray, *, design: Design) -> NDArray:
    """Return a batch's features as a dense array (b, f), which includes the intercept's."""
    return design.with_one(design.dense(x))


def _by_rows(
    net: GenericNeuralNet,
    design: Design,
    link: Link,
    examples: Examples,
    rows: NDArray,
    K: NDArray | None,
) -> tuple[NDArray, NDArray]:
    """Compute `_quadratics` in n^3/3 operations for the factor and n^2 for each row."""
    K = design.gram(examples.x) if K is None else K
    Z = design.times(examples.x, net.theta)
    z, weight_decay = Z[:, 0, 0], net.strong_convexity
    s = np.sqrt(link.weights(Z, examples.y)[:, 0])
    if weight_decay == 0:
        raise np.linalg.LinAlgError
    B = K * s
    B *= s[:, None]
    B[np.diag_indices_from(B)] += len(s) * weight_decay
    # B is symmetric; its transpose is in Fortran order, which LAPACK can overwrite.
    L = scipy.linalg.cholesky(B.T, lower=True, overwrite_a=True, check_finite=False)
    half = _solved(L, s * z)
    h, q = np.empty((2, len(rows)), K.dtype)
    for start in range(0, len(rows), _COLUMNS):
        part = slice(start, start + _COLUMNS)
        chosen = rows[part]
        columns = _solved(L, (K[chosen] * s).T)
        h[part] = K[chosen, chosen] - np.einsum("ij,ij->j", columns, columns)
        q[part] = z[chosen] - half @ columns
    return h / weight_decay, q


def _solved(L: NDArray, B: NDArray) -> NDArray:
    return scipy.linalg.solve_triangular(L, B, lower=True, check_finite=False)
