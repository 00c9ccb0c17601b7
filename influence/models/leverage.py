"""Closed forms with H^-1 for single rows of a linear model: leverages and self-influence.

In these formulas the model has one output z. Let X (n, d) hold the inputs, and w (n,) the second
derivative d2l/dz2 of each row's loss l. With S = diag(sqrt(w)), the risk's Hessian (d, d) is

    H = X' S S X / n + lambda I

If d > n, Woodbury's identity gives H^-1 from (n, n) matrices:

    H^-1 = (I - X' S B^-1 S X) / lambda        B = S K S + n lambda I        K = X X'

Every function takes a LinearModel `net`. `net.design` computes the outputs and `net.link` their
loss. The penalty is lambda/2 |theta|^2 with lambda = `net.strong_convexity`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

from influence.common.convergence import DivergenceError
from influence.common.numbers import numbers
from influence.examples.examples import Examples, check_rows

# At most this many right-hand sides are solved together. This bounds memory.
_COLUMNS = 1024
# `self_influence` factors matrices of at most this order. The largest takes 2 GiB.
_LARGEST_FACTOR = 1 << 14


def leverages(
    net: Any, examples: Examples, rows: ArrayLike | None, gram: NDArray | None
) -> NDArray:
    """Compute the leverages (k,) of the rows; see LinearModel.leverages."""
    if net.num_outputs != 1:
        raise ValueError(f"model must have one output, got {net.num_outputs}.")
    n = len(examples)
    if gram is not None and numbers(gram, "gram").shape != (n, n):
        raise ValueError(f"gram must have shape ({n}, {n}), got {gram.shape}.")
    rows = np.arange(n) if rows is None else check_rows(rows, n)
    return _quadratics(net, examples, rows, gram)[0]


def self_influence(net: Any, examples: Examples, rows: NDArray) -> NDArray | None:
    """Compute e_i (e_i x_i' H^-1 x_i + x_i' H^-1 lambda theta) / n for rows i, with e = dl/dz.

    Returns: (k,), or None if the closed form is not safe or not faster than a solver. The result is
      None for several outputs, in float32, without a penalty, and for a matrix that is too large or
      not positive definite. If d > n, the result is also None for inputs that are not in memory.
    """
    smaller = min(len(examples), net.num_parameters)
    if net.num_outputs != 1 or net.dtype != np.float64 or net.strong_convexity == 0:
        return None
    by_rows = net.num_parameters > len(examples)
    if smaller > _LARGEST_FACTOR or (by_rows and not examples.in_memory):
        return None
    e = examples.each_row(_slopes, net, rows=rows)
    try:
        h, q = _quadratics(net, examples, rows, None)
    except DivergenceError:
        return None
    return e * (e * h + q) / len(examples)


def one_step_leave_one_out(net: Any, examples: Examples, rows: ArrayLike) -> NDArray:
    """Compute theta (k, d) after one Newton step on the risk without each of k rows.

    See LinearModel.one_step_leave_one_out.
    """
    rows, design = check_rows(rows, len(examples)), net.design
    n, c, theta, weight_decay = len(examples), net.num_outputs, net.theta, net.strong_convexity
    H = net.hessian(examples) * (n / (n - 1))
    H[np.diag_indices_from(H)] -= weight_decay / (n - 1)
    try:
        factor = scipy.linalg.cho_factor(H)
    except np.linalg.LinAlgError as error:
        raise _not_definite(net) from error
    gradient = net.risk_gradient(examples) - net.penalty_gradient()
    chosen = examples.take(rows)
    own = net.gradients(chosen.x, chosen.y)
    Z = design.times(chosen.x, theta)
    stepped = np.empty((len(rows), net.num_parameters))
    for j, x in enumerate(design.with_one(design.dense(chosen.x))):
        # A (d, c) is kron(x, I_c), with x as a column. S, a (c, c) matrix, is the row's d2l/dz2
        # divided by n - 1. With H as rescaled above, the risk without the row has the Hessian
        # H - A S A'.
        A = np.kron(x[:, None], np.eye(c))
        S = net.link.curved(Z[j : j + 1], chosen.y[j : j + 1], np.eye(c)[None])[0] / (n - 1)
        g = (n * gradient - own[j]) / (n - 1) + net.penalty_gradient()
        B = scipy.linalg.cho_solve(factor, np.column_stack([g, A]))
        inner = np.linalg.solve(np.eye(c) - S @ (A.T @ B[:, 1:]), S @ (A.T @ B[:, 0]))
        stepped[j] = theta - B[:, 0] - B[:, 1:] @ inner
    return stepped


def _quadratics(
    net: Any, examples: Examples, rows: NDArray, gram: NDArray | None
) -> tuple[NDArray, NDArray]:
    """Compute two (k,) arrays: x_i' H^-1 x_i and x_i' H^-1 lambda theta for the rows i."""
    try:
        if net.num_parameters <= len(examples):
            return _by_parameters(net, examples, rows)
        return _by_rows(net, examples, rows, gram)
    except np.linalg.LinAlgError as error:
        raise _not_definite(net) from error


def _not_definite(net: Any) -> DivergenceError:
    return DivergenceError(
        "the Hessian must be positive definite, got a singular one; use a weight_decay above "
        f"{net.strong_convexity}."
    )


def _by_parameters(net: Any, examples: Examples, rows: NDArray) -> tuple[NDArray, NDArray]:
    """Compute `_quadratics` by a Cholesky factor of H: d^3/3 operations, and d^2 for each row."""
    H = net.hessian(examples)
    L = scipy.linalg.cholesky(H.T, lower=True, overwrite_a=True, check_finite=False)
    half = _solved(L, net.penalty_gradient())
    h, q = np.empty((2, len(rows)), H.dtype)
    order, start = np.argsort(rows), 0
    for x in examples.map_over(_dense_rows, net, rows=rows[order], batch_size=_COLUMNS):
        part = order[start : start + len(x)]
        start += len(x)
        columns = _solved(L, x.T)
        h[part], q[part] = np.einsum("ij,ij->j", columns, columns), half @ columns
    return h, q


def _slopes(net: Any, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
    """Return dl/dz of a batch, (b,), for one output."""
    return net.link.slope(net.design.times(x, net.at(theta).theta), y)[:, 0, 0]


def _dense_rows(net: Any, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
    """Return a batch's features, including the intercept's feature, as a dense array (b, d)."""
    return net.design.with_one(net.design.dense(x))


def _by_rows(
    net: Any, examples: Examples, rows: NDArray, gram: NDArray | None
) -> tuple[NDArray, NDArray]:
    """Compute `_quadratics` by a Cholesky factor of B: n^3/3 operations, and n^2 for each row."""
    K: NDArray = net.design.gram(examples.x) if gram is None else gram
    Z = net.design.times(examples.x, net.theta)
    z, weight_decay = Z[:, 0, 0], net.strong_convexity
    s = np.sqrt(net.link.weights(Z, examples.y)[:, 0])
    if weight_decay == 0:
        raise np.linalg.LinAlgError
    B = K * s
    B *= s[:, None]
    B[np.diag_indices_from(B)] += len(s) * weight_decay
    # B is symmetric. Its transpose is in Fortran order, so LAPACK can overwrite it.
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
