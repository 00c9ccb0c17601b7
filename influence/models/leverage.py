"""What H^-1 says about single rows of a linear model, in closed form.

With w = d2l/dz2 and S = diag(sqrt(w)), one output has H = X' S S X / n + lambda I, (d, d). Where d
exceeds n, Woodbury's identity moves the inverse to K = X X', (n, n), so that d is never squared:

    H^-1 = (I - X' S B^-1 S X) / lambda        B = S K S + n lambda I
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg
import scipy.sparse
from numpy.typing import ArrayLike, NDArray

from influence.common.convergence import DivergenceError
from influence.examples.examples import Examples, check_rows

if TYPE_CHECKING:
    from influence.models.linear import LinearModel

_COLUMNS = 1024  # solved together: bounds memory at little cost in speed
_LARGEST_FACTOR = 1 << 14  # order of the matrix that `self_influence` will factor: 2 GiB


def gram(model: LinearModel, examples: Examples) -> NDArray:
    """X X', (n, n), with the intercept's feature if there is one."""
    x = model._as_dtype(examples.x)
    K = x @ x.T
    K = K.toarray() if scipy.sparse.issparse(K) else K
    return K + 1 if model.intercept else K


def leverages(
    model: LinearModel,
    examples: Examples,
    rows: ArrayLike | None = None,
    *,
    gram: NDArray | None = None,
) -> NDArray:
    """x_i' H^-1 x_i, with the Hessian of the risk at the model's theta.

    Multiplied by (dl/dz)^2 / n it is the part of the self-influence that the row's loss explains.

    Args:
      model: with one output.
      examples: the training set.
      rows: (k,) row numbers; all n if omitted.
      gram: (n, n) what `gram` returned for the same inputs, whatever the labels and theta. Used,
        and computed if omitted, where there are more parameters than examples.

    Returns: (k,).
    Raises: ValueError for several outputs or a wrong shape; DivergenceError for a singular Hessian.
    """
    if model.num_outputs != 1:
        raise ValueError(f"model must have one output, got {model.num_outputs}.")
    n = len(examples)
    if gram is not None and gram.shape != (n, n):
        raise ValueError(f"gram must have shape ({n}, {n}), got {gram.shape}.")
    rows = np.arange(n) if rows is None else check_rows(rows, n)
    return _quadratics(model, examples, rows, gram)[0]


def self_influence(model: LinearModel, examples: Examples, rows: NDArray) -> NDArray | None:
    """e_i (e_i x_i' H^-1 x_i + x_i' H^-1 lambda theta) / n with e = dl/dz: (k,).

    None for several outputs, in float32, without a penalty, where the matrix is too large or not
    positive definite, or (n, n) and the inputs are not in memory: then there is no faster or no
    safe closed form.
    """
    smaller = min(len(examples), model.num_parameters)
    if model.num_outputs != 1 or model.dtype != np.float64 or model.weight_decay == 0:
        return None
    by_rows = model.num_parameters > len(examples)
    if smaller > _LARGEST_FACTOR or (by_rows and not examples.in_memory):
        return None
    order = np.argsort(rows)
    batches = examples.batches(model.rows_per_batch(examples), rows[order])
    e = np.empty(len(rows), model.dtype)
    e[order] = np.concatenate(
        [model._slope(model._times(x, model.theta), y)[:, 0, 0] for x, y in batches]
    )
    try:
        h, q = _quadratics(model, examples, rows, None)
    except DivergenceError:
        return None
    return e * (e * h + q) / len(examples)


def one_step_leave_one_out(model: LinearModel, examples: Examples, rows: ArrayLike) -> NDArray:
    """See LinearModel.one_step_leave_one_out."""
    rows = check_rows(rows, len(examples))
    n, c, weight_decay = len(examples), model.num_outputs, model.weight_decay
    H = model.hessian(examples) * (n / (n - 1))
    H[np.diag_indices_from(H)] -= weight_decay / (n - 1)
    factor = scipy.linalg.cho_factor(H)
    gradient = model.risk_gradient(examples) - model.penalty_gradient()
    chosen = examples.take(rows)
    own = model.gradients(chosen.x, chosen.y)
    Z = model._times(chosen.x, model.theta)
    stepped = np.empty((len(rows), model.num_parameters))
    for j, x in enumerate(model._with_one(model._dense(chosen.x))):
        # A = x (x) I_c, so that the row's Hessian is A S A' with S (c, c).
        A = np.kron(x[:, None], np.eye(c))
        S = model._curved(Z[j : j + 1], chosen.y[j : j + 1], np.eye(c)[None])[0] / (n - 1)
        g = (n * gradient - own[j]) / (n - 1) + model.penalty_gradient()
        B = scipy.linalg.cho_solve(factor, np.column_stack([g, A]))
        inner = np.linalg.solve(np.eye(c) - S @ (A.T @ B[:, 1:]), S @ (A.T @ B[:, 0]))
        stepped[j] = model.theta - B[:, 0] - B[:, 1:] @ inner
    return stepped


def _quadratics(
    model: LinearModel, examples: Examples, rows: NDArray, K: NDArray | None
) -> tuple[NDArray, NDArray]:
    """x_i' H^-1 x_i and x_i' H^-1 lambda theta, (k,) each."""
    try:
        if model.num_parameters <= len(examples):
            return _by_parameters(model, examples, rows)
        return _by_rows(model, examples, rows, gram(model, examples) if K is None else K)
    except np.linalg.LinAlgError as error:
        raise DivergenceError(
            "the Hessian must be positive definite, got a singular one; use a weight_decay above "
            f"{model.weight_decay}."
        ) from error


def _by_parameters(model: LinearModel, examples: Examples, rows: NDArray) -> Any:
    """d^3/3 operations for the factor, then d^2 for each row."""
    H = model.hessian(examples)
    L = scipy.linalg.cholesky(H.T, lower=True, overwrite_a=True, check_finite=False)
    half = _solved(L, model.weight_decay * model.theta)
    h, q = np.empty((2, len(rows)), H.dtype)
    order = np.argsort(rows)
    batches = examples.batches(_COLUMNS, rows[order])
    for slots, (x, _) in zip(_parts(len(rows)), batches, strict=True):
        columns = _solved(L, model._with_one(model._dense(x)).T)
        part = order[slots]
        h[part], q[part] = np.einsum("ij,ij->j", columns, columns), half @ columns
    return h, q


def _by_rows(model: LinearModel, examples: Examples, rows: NDArray, K: NDArray) -> Any:
    """n^3/3 operations for the factor, then n^2 for each row."""
    Z = model._times(examples.x, model.theta)
    z = Z[:, 0, 0]
    s = np.sqrt(model._curved(Z, examples.y, np.ones_like(Z))[:, 0, 0])
    if model.weight_decay == 0:
        raise np.linalg.LinAlgError
    B = K * s
    B *= s[:, None]
    B[np.diag_indices_from(B)] += len(s) * model.weight_decay
    # B is its own transpose, which lies in memory as LAPACK wants it to overwrite it.
    L = scipy.linalg.cholesky(B.T, lower=True, overwrite_a=True, check_finite=False)
    half = _solved(L, s * z)
    h, q = np.empty((2, len(rows)), K.dtype)
    for part in _parts(len(rows)):
        chosen = rows[part]
        columns = _solved(L, (K[chosen] * s).T)
        h[part] = K[chosen, chosen] - np.einsum("ij,ij->j", columns, columns)
        q[part] = z[chosen] - half @ columns
    return h / model.weight_decay, q


def _solved(L: NDArray, B: NDArray) -> NDArray:
    return scipy.linalg.solve_triangular(L, B, lower=True, check_finite=False)


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, start + _COLUMNS) for start in range(0, count, _COLUMNS))
