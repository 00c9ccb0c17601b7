"""Curvature matrices of the training risk over all rows, as symmetric SciPy LinearOperators."""

from __future__ import annotations

import os
import zlib
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from influence.common.checkpoint import check_folder, identity, kept
from influence.common.memory import VECTORS, fitting
from influence.common.numbers import is_integer
from influence.common.progress import progress
from influence.curvature.chain import chain_hessian, mean_matrix
from influence.curvature.layers import affine_layers
from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet, checked
from influence.net.questions import Total
from influence.net.refused import check_weights

# One pass over the data forms this many columns of the dense matrix.
_DENSE_BLOCK = 256
# This many arrays of the roots' size exist while the rows' roots are formed.
_ROOT_COPIES = 4


class Curvature(LinearOperator):
    """Symmetric (d, d) matrix, used only through its products: base of Hessian and GaussNewton.

    Args:
      net: the net, at the theta of the matrix.
      examples: the training set. Products with any number of vectors take one pass over it.
      damping: absolute value, added to the diagonal; every solver sees matrix + damping I.
      batch_size: rows per batch. It limits memory and changes no result. None: chosen by the net.
      checkpoints: a folder where `dense` stores the undamped matrix. The stored matrix serves all
        dampings and survives an interruption.

    Raises: ValueError or TypeError for examples that do not fit the net, negative damping, a bad
      batch size or a folder that is not writable.
    """

    # `_method` is the net's method for one batch; `_each` is the question for `each_batch`.
    _method: ClassVar[str]
    _each: ClassVar[Literal["hvp", "gauss_newton"]]
    _needs_logits: ClassVar[bool] = False

    def __init__(
        self,
        net: GenericNeuralNet,
        examples: Examples,
        damping: float = 0.0,
        *,
        batch_size: int | None = None,
        checkpoints: str | os.PathLike | None = None,
    ):
        checked(net)
        if not isinstance(damping, int | float | np.number) or not 0 <= float(damping) < np.inf:
            raise ValueError(f"damping must be a number >= 0, got {damping!r}.")
        check_batch_size(batch_size)
        net.validate(examples, "examples")
        if self._needs_logits:
            net.loss.check_logits()
        self.net, self.examples, self.damping = net, examples, float(damping)
        self.batch_size = batch_size
        self.checkpoints = check_folder(checkpoints)
        self._theta = net.theta
        super().__init__(net.dtype, (net.num_parameters, net.num_parameters))

    def __repr__(self) -> str:
        """Show kind, size, damping and a checksum of theta and labels, but no address."""
        held = zlib.crc32(self.examples.y.tobytes(), zlib.crc32(self._theta.tobytes()))
        return (
            f"{type(self).__name__}({len(self.examples)} rows, d={self.shape[0]}, "
            f"damping={self.damping}, theta and labels #{held:08x})"
        )

    @property
    @abstractmethod
    def smallest_eigenvalue_bound(self) -> float:
        """Lower bound on all eigenvalues (damping included), without products; NaN if unknown."""

    def sampled(self, rows: NDArray, V: NDArray) -> NDArray:
        """Multiply r estimates of the matrix, each from a few rows, by m vectors.

        Args:
          rows: (r, b) row numbers. Estimate j is the mean over rows[j] plus penalty and damping.
          V: (r, d, m) vectors.

        Returns: (r, d, m).
        """
        self.check_theta()
        products = self.net.each_batch(self._each, *self.examples.stacked(rows), V)
        num_batches, d, num_vectors = V.shape
        flat = np.moveaxis(V, 1, 0).reshape(d, -1)
        penalty = self.net.penalty_hvp(flat).reshape(d, num_batches, num_vectors)
        return products + np.moveaxis(penalty, 0, 1) + self.damping * V

    def dense(self) -> NDArray:
        """Return the matrix, damping included, as a new array (d, d)."""
        self.check_theta()
        path = None
        if self.checkpoints is not None:
            name = f"{type(self).__name__.lower()}-{identity(self.net, self.examples)}.npz"
            path = self.checkpoints / name
        matrix = kept(path, lambda: {"matrix": self._formed()})["matrix"]
        matrix[np.diag_indices_from(matrix)] += self.damping
        return matrix

    def _formed(self) -> NDArray:
        """Return the matrix without damping, (d, d), from products with unit vectors."""
        d = self.shape[0]
        matrix = np.empty((d, d), self.dtype)
        starts = range(0, d, _DENSE_BLOCK)
        for start in progress(starts, "forming the matrix"):
            size = min(_DENSE_BLOCK, d - start)
            units = np.eye(d, size, k=-start, dtype=self.dtype)
            matrix[:, start : start + size] = self._undamped(units)
        return symmetrised(matrix)

    def same_as(self, other: Any) -> bool:
        """Return True if `other` has the same kind, net, examples, damping and theta."""
        return (
            type(other) is type(self)
            and other.net is self.net
            and other.examples is self.examples
            and other.damping == self.damping
            and np.array_equal(other._theta, self._theta)
        )

    def _matmat(self, V: NDArray) -> NDArray:
        self.check_theta()
        V = np.asarray(V, self.dtype)
        return self._undamped(V) + self.damping * V

    def _undamped(self, V: NDArray) -> NDArray:
        total = self.examples.sum_over(Total(self._method, V), self.net, batch_size=self.batch_size)
        return total / len(self.examples) + self.net.penalty_hvp(V)

    def _adjoint(self) -> Curvature:
        return self

    @property
    def is_current(self) -> bool:
        """True if the net is still at the theta that this operator was made for."""
        return np.array_equal(self._theta, self.net.theta)

    def check_theta(self) -> None:
        """Raise if the net's theta has changed since this operator was made.

        Raises: RuntimeError; ValueError if the net's weights have become NaN or infinite.
        """
        if not self.is_current:
            check_weights(self.net.model)  # a NaN is not equal to itself
            raise RuntimeError(
                "theta has changed since this operator was made; make a new one for the new theta."
            )

    def _add_penalty(self, matrix: NDArray) -> None:
        """Add the penalty's Hessian to a matrix (d, d), in place."""
        d = len(matrix)
        for start in range(0, d, _DENSE_BLOCK):
            units = np.eye(d, min(_DENSE_BLOCK, d - start), k=-start, dtype=self.dtype)
            matrix[:, start : start + units.shape[1]] += self.net.penalty_hvp(units)


class Hessian(Curvature):
    """Hessian of the risk, H = d2 R / d theta2, plus damping I.

    R is the mean loss plus the penalty, so H includes L2 regularisation (Koh & Liang 2017, eq. 1).
    `Hessian(net, examples) @ V` takes one pass over the examples for all columns of V.
    """

    _method, _each = "hvp", "hvp"

    @property
    def smallest_eigenvalue_bound(self) -> float:
        """Lower bound on all eigenvalues: damping plus `strong_convexity`; NaN if unknown."""
        return self.net.strong_convexity + self.damping

    def _formed(self) -> NDArray:
        """Return the undamped matrix from the net's closed form, a chain of layers, or products."""
        closed_form = self.net.hessian(self.examples, self.batch_size)
        if closed_form is not None:
            return symmetrised(closed_form)
        matrix = chain_hessian(self.net, self.examples, self.batch_size)
        if matrix is None:
            return super()._formed()
        self._add_penalty(matrix)
        return symmetrised(matrix)


class GaussNewton(Curvature):
    """Generalised Gauss-Newton matrix of the mean loss, plus penalty's Hessian and damping I.

    G = (1/n) sum_i J_i' (d2 loss_i / d output2) J_i (Schraudolph 2002). Unlike the Hessian, G omits
    the model's own curvature, so it is positive semi-definite if the loss is convex in the output.
    G is not the empirical Fisher, which is the mean of grad loss_i grad loss_i'.

    Raises: as Curvature; ValueError also for a cross-entropy of probabilities instead of logits.
    """

    _method, _each, _needs_logits = "gauss_newton_product", "gauss_newton", True

    @property
    def smallest_eigenvalue_bound(self) -> float:
        """Lower bound on all eigenvalues: damping plus the penalty's bound; NaN if unknown."""
        return self.net.penalty_convexity + self.damping if self.net.loss.convex else np.nan

    def _formed(self) -> NDArray:
        """Return the undamped matrix from the rows' roots if layers are affine, else from products.

        A root is S_i' J_i, with S_i S_i' the loss's Hessian. It takes one backward pass per output
        of the model; products with unit vectors take at least one for each of d columns.
        """
        layers = None
        if self.net.loss.convex and not self.net.convex:
            try:
                layers = affine_layers(self.net, self.examples.take(slice(0, 2)).x)
            except ValueError:  # layers of other kinds
                pass
        if layers is None:
            return super()._formed()
        one = self.examples.take([0])
        per_row = _ROOT_COPIES * layers.roots(one.x, one.y).nbytes
        size = fitting(VECTORS, per_row, self.net.rows_per_batch(self.examples))
        matrix = mean_matrix(_root_square, self.net, self.examples, self.batch_size or size)
        self._add_penalty(matrix)
        return symmetrised(matrix)


def _root_square(net: GenericNeuralNet, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
    """Return the batch's sum of J_i' (d2 loss_i / d output2) J_i, (d, d), from the rows' roots."""
    roots = affine_layers(net, x).roots(x, y, net.at(theta).theta_tensor())
    roots = roots.reshape(-1, net.num_parameters)
    return roots.T @ roots


def symmetrised(matrix: NDArray) -> NDArray:
    """Replace a matrix (d, d) by the mean of itself and its transpose, in place.

    The matrix is symmetric up to rounding before, and exactly symmetric after.
    """
    starts = range(0, len(matrix), _DENSE_BLOCK)
    tiles = [slice(start, start + _DENSE_BLOCK) for start in starts]
    for i, rows in enumerate(tiles):
        for columns in tiles[i:]:
            mean = (matrix[rows, columns] + matrix[columns, rows].T) / 2
            matrix[rows, columns] = mean
            matrix[columns, rows] = mean.T
    return matrix


def check_batch_size(batch_size: Any) -> None:
    """Raise ValueError for a batch size that is not None or a positive integer."""
    if batch_size is not None and not is_integer(batch_size, 1):
        raise ValueError(f"batch_size must be a positive integer or None, got {batch_size!r}.")
