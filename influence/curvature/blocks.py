"""Output blocks K_i = J_i M^-1 J_i' of single rows, for a matrix M whose inverse is known.

J_i (c, d) is the Jacobian of row i's c outputs with respect to theta. S_i is the Hessian of the
row's loss with respect to these outputs. The leverage of row i is tr(S_i K_i) / n. For one output
and squared error, this is the leverage of linear regression.

In a layer with one position per row, the part of J_i for output s is a_i' g_is
(influence.curvature.roots). Let two such layers have the factors a, g and b, h. They add

    sum_kl g_isk h_itl (a_i' B_kl b_i)

to entry (s, t) of K_i. B_kl (f, f') is the block of M^-1 for the weights of output k of the first
layer and of output l of the second layer. So each row takes one product with M^-1, not one for each
output. For a last layer with c outputs, this product consists of c (c + 1) / 2 products of the
layer's inputs with blocks of M^-1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from influence.common.convergence import DivergenceError
from influence.common.memory import ACTIVATIONS, fitting
from influence.curvature.operators import Curvature
from influence.curvature.roots import jacobian_parts, joined

# Memory holds this many arrays (rows, d) while blocks are computed.
_COPIES = 3
# A batch has at most this many rows, so that their products fit into the processor's cache.
_ROWS = 1024


class DenseBlocks:
    """Question that returns K_i (n, c, c) of a batch, from a dense positive definite matrix M.

    Let k = share x n rows be removed from the risk R of n rows. The risk is then (n R - sum L_i) /
    (n - k), with a sum over the removed rows. It has the same penalty and damping as R. So M is A -
    share x (Hessian of the penalty + damping I). A is the damped curvature matrix of all rows.

    Args:
      A: the curvature matrix. M is formed from it and inverted.
      share: the removed fraction of the rows, 1 / n for single rows.
      dense: the dense matrix of A if it is known, or None.

    Attributes:
      inverse: M^-1, (d, d).

    Raises: DivergenceError if M is not positive definite.
    """

    def __init__(self, A: Curvature, share: float, dense: NDArray | None = None):
        matrix = A.remaining(share, dense).astype(np.float64, copy=False)
        potrf, potri = scipy.linalg.get_lapack_funcs(("potrf", "potri"), (matrix,))
        # The transpose is in Fortran order, so LAPACK overwrites it and makes no copy.
        factor, info = potrf(matrix.T, lower=1, overwrite_a=1, clean=0)
        if info != 0:
            raise DivergenceError(
                "A must be positive definite to take out a row's own curvature, got one that is "
                "singular or indefinite; use more damping, or approximation='first_order'."
            )
        lower, _ = potri(factor, lower=1, overwrite_c=1)
        self.inverse = _mirrored(lower)
        self.rows = fitting(ACTIVATIONS, _COPIES * len(matrix) * matrix.itemsize, _ROWS)
        self._ordered: _Ordered | None = None

    def __call__(self, net: Any, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
        """Return the blocks of one batch."""
        parts, rest = jacobian_parts(net.at(theta), x, y)
        if self._ordered is None:
            self._ordered = _Ordered(self.inverse, [entries for entries, _, _ in parts])
        B, e = self._ordered.inverse, rest.shape[2]
        half = (rest @ B[:e, :e]) @ rest.transpose(0, 2, 1) / 2
        start = e
        for number, (entries, a, g) in enumerate(parts):
            f, width = entries.shape
            later = e + sum(some.size for some, _, _ in parts[: number + 1])
            for k in range(width):
                rows = B[start : start + f]
                own = np.einsum("nce,ne->nc", rest, a @ rows[:, :e])
                within = [_quadratic(T, a) for T in self._ordered.triangles[number][k]]
                within[0] /= 2  # the block (k, k) is added twice below
                own += np.einsum("ncl,ln->nc", g[:, :, k:], np.stack(within))
                at = later
                for _, b, h in parts[number + 1 :]:
                    size = b.shape[1] * h.shape[2]
                    Q = (a @ rows[:, at : at + size]).reshape(len(a), -1, b.shape[1])
                    own += np.einsum("ncl,nl->nc", h, np.einsum("nlf,nf->nl", Q, b))
                    at += size
                half += g[:, :, k, None] * own[:, None, :]
                start += f
        return half + half.transpose(0, 2, 1)

    def solve(self, B: NDArray) -> NDArray:
        """Return M^-1 B, (d, m)."""
        return self.inverse @ B


class _Ordered:
    """An inverse (d, d), in the order of the weights that `DenseBlocks` needs.

    Weights of the given layers come last. Weights of the same output of a layer are adjacent.

    Args:
      inverse: the inverse, in the order of theta.
      layers: the positions (f, k) in theta of each layer's weights.

    Attributes:
      inverse: the inverse in the new order.
      triangles: triangles[layer][k][l - k] is a lower triangular matrix T (f, f), for outputs k and
        l >= k of the layer. a' T a equals a' B_kl a for all a. Products with T take half the
        operations of products with B_kl.
    """

    def __init__(self, inverse: NDArray, layers: list[NDArray]):
        last = [entries.T.ravel() for entries in layers]
        others = np.setdiff1d(np.arange(len(inverse)), np.concatenate([*last, []]))
        order = np.concatenate([others, *last]).astype(np.int64)
        in_order = np.array_equal(order, np.arange(len(inverse)))
        self.inverse = inverse if in_order else inverse[np.ix_(order, order)]
        self.triangles: list[list[list[NDArray]]] = []
        start = len(others)
        for entries in layers:
            f, width = entries.shape
            at = [slice(start + k * f, start + (k + 1) * f) for k in range(width)]
            self.triangles.append(
                [[_triangle(self.inverse[at[k], at[j]]) for j in range(k, width)]
                 for k in range(width)]
            )  # fmt: skip
            start += entries.size


def _triangle(B: NDArray) -> NDArray:
    """Return the lower triangular T with a' T a = a' B a for all a."""
    T = np.tril(B + B.T, -1)
    T[np.diag_indices_from(T)] = np.diag(B)
    return np.asfortranarray(T)


def _quadratic(T: NDArray, a: NDArray) -> NDArray:
    """Return a_i' T a_i for each row of a (n, f)."""
    product = scipy.linalg.blas.dtrmm(1.0, T, a.T, lower=1)
    return np.einsum("nf,nf->n", product.T, a)


class GramBlocks:
    """Blocks K_i of all rows of a training set, for fewer rows than weights.

    The Hessian of the penalty must be diagonal. Let D be (1 - share) x (Hessian of the penalty +
    damping I). J (n c, d) stacks the J_i, S is block diagonal with blocks S_i, and Q = J D^-1 J'.
    Then M = J' S J / n + D. With C = S^(1/2) Q S^(1/2) + n I, Woodbury's identity gives

        J M^-1 J' = Q - Q S^(1/2) C^-1 S^(1/2) Q.

    All J_i are held in memory.

    Args:
      A: the curvature matrix. All entries of D must be positive.
      share: as in DenseBlocks.
      roots: (n, c, c) the square roots of the S_i.

    Attributes:
      blocks: (n, c, c) the K_i.
    """

    def __init__(self, A: Curvature, share: float, roots: NDArray):
        n, c, _ = roots.shape
        diagonal = (1 - share) * (A.net.penalty_hvp(np.ones(A.shape[0], A.dtype)) + A.damping)
        if not diagonal.min() > 0:
            raise DivergenceError(
                "A must have a penalty on all weights, or damping, to take out a row's own "
                "curvature with fewer rows than weights, got a weight with neither; add damping, "
                "or use approximation='first_order'."
            )
        self._scaled = A.examples.each_row(jacobians, A.net).reshape(n * c, -1)
        self._scaled /= np.sqrt(diagonal)
        self._diagonal = diagonal[:, None]
        Q = self._scaled @ self._scaled.T
        left = np.einsum("iab,ibr->iar", roots, Q.reshape(n, c, n * c)).reshape(n * c, n * c)
        C = np.einsum("rib,iba->ria", left.reshape(n * c, n, c), roots).reshape(n * c, n * c)
        C[np.diag_indices_from(C)] += n
        self._roots, self._factor = roots, scipy.linalg.cho_factor(C, lower=True)
        half = scipy.linalg.solve_triangular(self._factor[0], left, lower=True)  # (n c, n c)
        half = half.reshape(n * c, n, c)
        own = Q.reshape(n, c, n, c)[np.arange(n), :, np.arange(n)]
        self.blocks = own - np.einsum("ria,rib->iab", half, half)

    def solve(self, B: NDArray) -> NDArray:
        """Return M^-1 B, (d, m), which is D^-1 (B - J' S^(1/2) C^-1 S^(1/2) J D^-1 B)."""
        n, c, _ = self._roots.shape
        root = np.sqrt(self._diagonal)
        along = (self._scaled @ (B / root)).reshape(n, c, -1)
        inner = scipy.linalg.cho_solve(self._factor, (self._roots @ along).reshape(n * c, -1))
        back = (self._roots @ inner.reshape(n, c, -1)).reshape(n * c, -1)
        return (B / root - self._scaled.T @ back) / root


def jacobians(net: Any, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
    """Return the Jacobians (n, c, d) of a batch. This is a question (influence.net.questions)."""
    return joined(*jacobian_parts(net.at(theta), x, y))


def _mirrored(lower: NDArray) -> NDArray:
    """Copy the lower triangle of a matrix (d, d) to the upper triangle, in place, and return it."""
    step = 1024
    for start in range(0, len(lower), step):
        rows = slice(start, start + step)
        tile = np.tril(lower[rows, rows])
        lower[rows, rows] = tile + np.tril(tile, -1).T
        lower[:start, rows] = lower[rows, :start].T
    return lower
