"""Curvature matrices of the training risk, as symmetric SciPy LinearOperators."""

from __future__ import annotations

import copy
import os
import zlib
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from influence.common.checkpoint import check_folder, identity, kept
from influence.common.numbers import is_integer, numbers
from influence.common.progress import progress
from influence.curvature.chain import chain_hessian, mean_matrix
from influence.curvature.roots import rows_per_batch, sum_of_squares
from influence.examples.given import Data
from influence.net.checked import Net, checked
from influence.net.net import GenericNeuralNet
from influence.net.questions import Total
from influence.net.refused import check_weights

# One pass over the data forms this many columns of the dense matrix.
_DENSE_BLOCK = 256


class Curvature(LinearOperator):
    """Symmetric (d, d) matrix, used through its products. Base class of Hessian and GaussNewton.

    Args:
      net: the net. The matrix belongs to its current theta.
      examples: the training set. Products with any number of vectors take one pass over this set.
      damping: number >= 0 that is added to the diagonal. Solvers invert matrix + damping I.
      batch_size: the number of rows per batch, which limits memory. None means that the net chooses
        this number.
      checkpoints: a folder where `dense` stores the undamped matrix, or None. A later call of
        `dense` with any damping loads the stored matrix.

    Raises: ValueError or TypeError for examples that do not fit the net, negative damping, a bad
      batch size or a folder that is not writable.
    """

    # `_method` is the net's method that multiplies for one batch. `_each` is the argument that
    # selects the same product in `net.each_batch`.
    _method: ClassVar[str]
    _each: ClassVar[Literal["hvp", "gauss_newton"]]
    _needs_logits: ClassVar[bool] = False

    def __init__(
        self,
        net: Net,
        examples: Data,
        damping: float = 0.0,
        *,
        batch_size: int | None = None,
        checkpoints: str | os.PathLike | None = None,
    ):
        net, _, _ = checked(net)
        check_damping(damping)
        check_batch_size(batch_size)
        examples = net.given(examples, "examples")
        net.validate(examples, "examples")
        if self._needs_logits:
            net.loss.check_logits()
        self.net, self.examples, self.damping = net, examples, float(damping)
        self.batch_size = batch_size
        self.checkpoints = check_folder(checkpoints)
        self._theta = net.theta
        self._held: NDArray | None = None
        super().__init__(net.dtype, (net.num_parameters, net.num_parameters))

    def __repr__(self) -> str:
        """Describe the matrix by class, size, damping, and a checksum of theta and labels."""
        held = zlib.crc32(self.examples.y.tobytes(), zlib.crc32(self._theta.tobytes()))
        return (
            f"{type(self).__name__}({len(self.examples)} rows, d={self.shape[0]}, "
            f"damping={self.damping}, theta and labels #{held:08x})"
        )

    def damped(self, damping: float, formed: NDArray | None = None) -> Curvature:
        """Return the same matrix with another damping.

        Args:
          damping: a finite number >= 0.
          formed: the undamped matrix (d, d) if the caller has it, or None. The next call of `dense`
            uses this array and overwrites it.
        """
        other = copy.copy(self)
        other.damping, other._held = float(damping), formed
        return other

    @property
    @abstractmethod
    def smallest_eigenvalue_bound(self) -> float:
        """Lower bound on all eigenvalues, damping included. It is NaN if no bound is known."""

    def sampled(self, rows: NDArray, V: NDArray) -> NDArray:
        """Multiply r estimates of the matrix by m vectors each. Each estimate uses b rows.

        Args:
          rows: (r, b) row numbers. Estimate j is the damped matrix of the examples rows[j].
          V: (r, d, m) vectors. Estimate j multiplies V[j].

        Returns: the products, (r, d, m).
        """
        self.check_theta()
        V = numbers(V, "V")
        x, y = self.examples.stacked(rows)
        products = self.net.each_batch(self._each, x, y, V)
        if self.net.loss.has_masses:
            products *= len(self.examples) / self.net.mass(self.examples)
        num_batches, d, num_vectors = V.shape
        flat = np.moveaxis(V, 1, 0).reshape(d, -1)
        penalty = self.net.penalty_hvp(flat).reshape(d, num_batches, num_vectors)
        return products + np.moveaxis(penalty, 0, 1) + self.damping * V

    def dense(self) -> NDArray:
        """Return the damped matrix as a new array (d, d)."""
        self.check_theta()
        path = None
        if self.checkpoints is not None:
            name = f"{type(self).__name__.lower()}-{identity(self.net, self.examples)}.npz"
            path = self.checkpoints / name
        matrix, self._held = self._held, None
        if matrix is None:
            matrix = kept(path, lambda: {"matrix": self._formed()})["matrix"]
        matrix[np.diag_indices_from(matrix)] += self.damping
        return matrix

    def remaining(self, share: float, dense: NDArray | None = None) -> NDArray:
        """Return the dense matrix (d, d) minus `share` x (Hessian of the penalty + damping I).

        `dense` is the dense matrix if the caller has it, or None. The method copies this array.
        """
        matrix = self.dense() if dense is None else dense.copy()
        self._add_penalty(matrix, -share)
        matrix[np.diag_indices_from(matrix)] -= share * self.damping
        return matrix

    def _formed(self) -> NDArray:
        """Compute the undamped matrix (d, d) from its products with unit vectors."""
        d = self.shape[0]
        matrix = np.empty((d, d), self.dtype)
        starts = range(0, d, _DENSE_BLOCK)
        for start in progress(starts, "forming the matrix"):
            size = min(_DENSE_BLOCK, d - start)
            units = np.eye(d, size, k=-start, dtype=self.dtype)
            matrix[:, start : start + size] = self._undamped(units)
        return symmetrised(matrix)

    def same_as(self, other: Any) -> bool:
        """Return True if `other` has the same class, net, examples, damping and theta."""
        return (
            type(other) is type(self)
            and other.net is self.net
            and other.examples is self.examples
            and other.damping == self.damping
            and np.array_equal(other._theta, self._theta)
        )

    def dot(self, x: Any) -> Any:
        """Multiply the matrix by x. Unlike SciPy's method, refuse a masked array."""
        if not isinstance(x, LinearOperator):
            numbers(x, "V")
        return super().dot(x)

    def _matmat(self, V: NDArray) -> NDArray:
        self.check_theta()
        V = numbers(V, "V").astype(self.dtype, copy=False)
        return self._undamped(V) + self.damping * V

    def _undamped(self, V: NDArray) -> NDArray:
        total = self.examples.sum_over(Total(self._method, V), self.net, batch_size=self.batch_size)
        return total / (self.net.mass(self.examples) or 1) + self.net.penalty_hvp(V)

    def _adjoint(self) -> Curvature:
        return self

    @property
    def is_current(self) -> bool:
        """True if the net's theta is the same as when this operator was made."""
        return np.array_equal(self._theta, self.net.theta)

    def check_theta(self) -> None:
        """Raise if the net's theta has changed since this operator was made.

        Raises: RuntimeError, or ValueError if the net's weights are now NaN or infinite.
        """
        if not self.is_current:
            check_weights(self.net.model)  # a NaN also looks like a change
            raise RuntimeError(
                "theta has changed since this operator was made; make a new one for the new theta."
            )

    def _add_penalty(self, matrix: NDArray, factor: float = 1.0) -> None:
        """Add `factor` times the penalty's Hessian to a matrix (d, d), in place."""
        d = len(matrix)
        by_weights = type(self.net).penalty_hvp is GenericNeuralNet.penalty_hvp
        if by_weights and all(weight.regularizer is None for weight in self.net.flat.weights):
            return
        for start in range(0, d, _DENSE_BLOCK):
            units = np.eye(d, min(_DENSE_BLOCK, d - start), k=-start, dtype=self.dtype)
            matrix[:, start : start + units.shape[1]] += factor * self.net.penalty_hvp(units)


class Hessian(Curvature):
    """Hessian of the risk, H = d2 R / d theta2, plus damping I.

    R is the mean loss plus the penalty, so H includes L2 regularisation (Koh & Liang 2017, eq. 1).
    `Hessian(net, examples) @ V` takes one pass over the examples for all columns of V.
    """

    _method, _each = "hvp", "hvp"

    @property
    def smallest_eigenvalue_bound(self) -> float:
        """Lower bound on all eigenvalues: `net.strong_convexity` plus damping. NaN if unknown."""
        return self.net.strong_convexity + self.damping

    def _formed(self) -> NDArray:
        """Compute the undamped matrix by a closed form, a chain of layers, or products."""
        closed_form = self.net.hessian(self.examples, self.batch_size)
        if closed_form is not None:
            return symmetrised(closed_form)
        matrix = chain_hessian(self.net, self.examples, self.batch_size)
        if matrix is None:
            return super()._formed()
        self._add_penalty(matrix)
        return symmetrised(matrix)


class GaussNewton(Curvature):
    """Generalised Gauss-Newton matrix G, plus the penalty's Hessian and damping I.

    G = (1/n) sum_i J_i' (d2 loss_i / d output2) J_i (Schraudolph 2002). J_i is the Jacobian of row
    i's output with respect to theta. G omits the model's second derivatives, which the Hessian
    contains. If the loss is convex in the output, G is positive semi-definite. G is not the
    empirical Fisher matrix, which is the mean of grad loss_i grad loss_i'.

    Raises: the errors of Curvature. ValueError if the loss is a cross-entropy of probabilities.
    """

    _method, _each, _needs_logits = "gauss_newton_product", "gauss_newton", True

    @property
    def smallest_eigenvalue_bound(self) -> float:
        """Lower bound on all eigenvalues: `net.penalty_convexity` plus damping. NaN if unknown."""
        return self.net.penalty_convexity + self.damping if self.net.loss.convex else np.nan

    def _formed(self) -> NDArray:
        """Compute the undamped matrix from roots (influence.curvature.roots) or from products.

        Roots need a loss that is convex in the output. They take one backward pass per output of
        the model. Products with unit vectors take at least one backward pass for each of d columns.
        """
        net, one = self.net, self.examples.take([0])
        if not net.loss.convex or net.convex or net.output_size(one.x) > net.num_parameters:
            return super()._formed()
        size = self.batch_size or rows_per_batch(net, one, len(self.examples))
        matrix = mean_matrix(sum_of_squares, net, self.examples, size)
        self._add_penalty(matrix)
        return symmetrised(matrix)


def symmetrised(matrix: NDArray) -> NDArray:
    """Replace a matrix (d, d) by the mean of itself and its transpose, in place.

    The given matrix is symmetric up to rounding, and the result is exactly symmetric.
    """
    starts = range(0, len(matrix), _DENSE_BLOCK)
    tiles = [slice(start, start + _DENSE_BLOCK) for start in starts]
    for i, rows in enumerate(tiles):
        for columns in tiles[i:]:
            mean = (matrix[rows, columns] + matrix[columns, rows].T) / 2
            matrix[rows, columns] = mean
            matrix[columns, rows] = mean.T
    return matrix


def check_damping(damping: Any) -> None:
    """Raise ValueError if the damping is not a finite number >= 0."""
    if not isinstance(damping, int | float | np.number) or not 0 <= float(damping) < np.inf:
        raise ValueError(f"damping must be a number >= 0, got {damping!r}.")


def check_batch_size(batch_size: Any) -> None:
    """Raise ValueError if the batch size is neither None nor a positive integer."""
    if batch_size is not None and not is_integer(batch_size, 1):
        raise ValueError(f"batch_size must be a positive integer or None, got {batch_size!r}.")
