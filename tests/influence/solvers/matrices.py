"""Matrices for the tests of several solvers, and formulas for their low-rank approximations."""

import numpy as np
from scipy.sparse.linalg import LinearOperator

from influence import prepare
from influence.solvers import Lanczos


class Damped(LinearOperator):
    """A matrix that includes damping. The attribute `damping` holds its value."""

    def __init__(self, matrix, damping):
        self.matrix, self.damping = matrix + damping * np.eye(len(matrix)), damping
        super().__init__(matrix.dtype, matrix.shape)

    def _matmat(self, V):
        return self.matrix @ V

    def _matvec(self, v):
        return self.matrix @ v


def counting(matrix):
    """Return (operator, widths). Each product appends its number of columns to `widths`."""
    widths = []

    def product(V):
        widths.append(V.shape[1])
        return matrix @ V

    return LinearOperator(
        matrix.shape, matvec=lambda v: product(v.reshape(-1, 1)), matmat=product, dtype=matrix.dtype
    ), widths


def inverse(A, solver):
    """Return the solver's approximate inverse as a dense matrix."""
    return prepare(A, solver).apply(np.eye(A.shape[0], dtype=A.dtype)).x


def approximation(A, matrix, solver):
    """Return the matrix U diag(values) U' + floor (I - U U') that Lanczos or Nystrom inverts.

    `matrix` is A as a dense array. U has `rank` columns.
    """
    rng, d, rank = np.random.default_rng(solver.seed), len(matrix), solver.rank
    # For ranks up to 21, Lanczos multiplies one vector in each pass, as these lines do.
    if isinstance(solver, Lanczos):
        w, Q = rng.standard_normal(d), np.zeros((d, 0))
        for _ in range(rank + 10):
            for _ in range(2):
                w = w - Q @ (Q.T @ w)
            w = w / np.linalg.norm(w)
            Q, w = np.column_stack([Q, w]), matrix @ w
        values, S = np.linalg.eigh(Q.T @ matrix @ Q)
        # The floor is the smallest eigenvalue kept, or the middle one of all rank + 10 eigenvalues
        # of the Krylov space if this is larger.
        floor = max(values[-rank], values[-((rank + 11) // 2)])
        U, values = Q @ S[:, -rank:], values[-rank:]
    else:
        Omega = np.linalg.qr(rng.standard_normal((d, rank)))[0]
        known = np.nanmax(
            [getattr(A, a, np.nan) for a in ("damping", "smallest_eigenvalue_bound")] + [0.0]
        )
        # `known` is a lower bound on the eigenvalues: the damping or more. Nystrom subtracts it
        # before the sketch, unless the sketch of A minus `known` would be indefinite.
        known = known if np.linalg.eigvalsh(Omega.T @ matrix @ Omega)[0] >= known else 0.0
        M = matrix - known * np.eye(d)
        low = M @ Omega @ np.linalg.solve(Omega.T @ M @ Omega, Omega.T @ M)
        values, U = np.linalg.eigh((low + low.T) / 2)
        U, values = U[:, -rank:], values[-rank:] + known
        floor = values[0]
    return (U * values) @ U.T + floor * (np.eye(d) - U @ U.T)
