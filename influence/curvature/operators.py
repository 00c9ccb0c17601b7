"""The training risk's curvature as symmetric SciPy LinearOperators over the whole training set."""

from __future__ import annotations

import os
import zlib
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import joblib
import numpy as np
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from influence.common.checkpoint import check_folder, kept
from influence.common.memory import VECTORS, fitting
from influence.common.progress import progress
from influence.curvature.chain import chain_hessian
from influence.curvature.layers import affine_layers
from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet, checked
from influence.net.questions import Total
from influence.net.refused import check_weights

# Columns of the dense matrix that are formed in one pass over the data.
_DENSE_BLOCK = 256
# Arrays of the size of the rows' roots that exist while the roots are formed.
_ROOT_COPIES = 4


class Curvature(LinearOperator):
    """A symmetric (d, d) matrix, seen only through its products: base of Hessian and GaussNewton.

    Args:
      net: the model, at the theta that the matrix belongs to.
      examples: the training set; one product is one pass over it, whatever the number of vectors.
      damping: absolute, added to the diagonal: every solver sees matrix + damping I.
      batch_size: rows at a time; bounds memory and never changes a result. None: chosen.
      checkpoints: a folder where `dense` keeps the matrix, undamped, so that it is formed once for
        all dampings and is there after an interruption.

    Raises: ValueError or TypeError for examples that do not fit the net, negative damping, a bad
      batch size or a folder that cannot be written to.
    """

    # The net's methods that multiply with one batch's matrix, and with each of many batches'.
    _method: ClassVar[str]
    _each: ClassVar[Literal["hvp", "gauss_newton"]]

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
        self.net, self.examples, self.damping = net, examples, float(damping)
        self.batch_size = batch_size
        self.checkpoints = check_folder(checkpoints)
        self._theta = net.theta
        super().__init__(net.dtype, (net.num_parameters, net.num_parameters))

    def __repr__(self) -> str:
        """Kind, size and damping, and a checksum of theta and labels: no address."""
        held = zlib.crc32(self.examples.y.tobytes(), zlib.crc32(self._theta.tobytes()))
        return (
            f"{type(self).__name__}({len(self.examples)} rows, d={self.shape[0]}, "
            f"damping={self.damping}, theta and labels #{held:08x})"
        )

    @property
    @abstractmethod
    def smallest_eigenvalue_bound(self) -> float:
        """Lower bound on all eigenvalues, damping included, without a product; NaN if unknown."""

    def sampled(self, rows: NDArray, V: NDArray) -> NDArray:
        """Products with r estimates of the matrix, each from a few of the rows.

        Args:
          rows: (r, b) row numbers: estimate j is the mean over rows[j], plus penalty and damping.
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
        """The matrix itself, (d, d), a fresh array."""
        self.check_theta()
        path = None
        if self.checkpoints is not None:
            path = self.checkpoints / f"{type(self).__name__.lower()}-{self._identity()}.npz"
        matrix = kept(path, lambda: {"matrix": self._formed()})["matrix"]
        matrix[np.diag_indices_from(matrix)] += self.damping
        return matrix

    def _formed(self) -> NDArray:
        """The matrix without damping, (d, d), from blocks of products with unit vectors."""
        d = self.shape[0]
        matrix = np.empty((d, d), self.dtype)
        starts = range(0, d, _DENSE_BLOCK)
        for start in progress(starts, "forming the matrix"):
            size = min(_DENSE_BLOCK, d - start)
            units = np.eye(d, size, k=-start, dtype=self.dtype)
            matrix[:, start : start + size] = self._undamped(units)
        return symmetrised(matrix)

    def _identity(self) -> str:
        """A short name for all that the undamped matrix depends on, the model by its answers."""
        net, few = self.net, self.examples.take(slice(0, 8))
        parts = (
            type(net).__name__, [variable.numpy() for variable in net.model.variables], net.theta,
            net.losses(few.x, few.y), net.penalty(), net.penalty_gradient(),
            self.examples.fingerprint,
        )  # fmt: skip
        return joblib.hash(parts)[:16]

    def same_as(self, other: Any) -> bool:
        """Whether `other` is this matrix: same kind, net, examples, damping and theta."""
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

    def _matvec(self, v: NDArray) -> NDArray:
        return self._matmat(np.reshape(v, (-1, 1)))[:, 0]

    def _adjoint(self) -> Curvature:
        return self

    @property
    def is_current(self) -> bool:
        """Whether the net is still at the theta that this operator was made for."""
        return np.array_equal(self._theta, self.net.theta)

    def check_theta(self) -> None:
        """Refuse to answer for a theta that is no longer the net's.

        Raises: RuntimeError; ValueError where the net's has become NaN or infinite.
        """
        if not self.is_current:
            check_weights(self.net.model)  # NaN would differ from itself
            raise RuntimeError(
                "theta has changed since this operator was made; make a new one for the new theta."
            )

    def _add_penalty(self, matrix: NDArray) -> None:
        """Add the penalty's Hessian to a matrix (d, d), in its own memory."""
        d = len(matrix)
        for start in range(0, d, _DENSE_BLOCK):
            units = np.eye(d, min(_DENSE_BLOCK, d - start), k=-start, dtype=self.dtype)
            matrix[:, start : start + units.shape[1]] += self.net.penalty_hvp(units)


class Hessian(Curvature):
    """The Hessian of the risk, H = d2 R / d theta2, plus damping I.

    R is the mean loss plus the penalty, so L2 regularisation is in it (Koh & Liang 2017, eq. 1).
    `Hessian(net, examples) @ V` costs one pass over the examples for all columns of V.
    """

    _method, _each = "hvp", "hvp"

    @property
    def smallest_eigenvalue_bound(self) -> float:
        """Lower bound on all eigenvalues: damping plus what a convex net knows; NaN for others."""
        return self.net.strong_convexity + self.damping

    def _formed(self) -> NDArray:
        """The matrix without damping: by the net's closed form, a chain of layers, or products."""
        closed_form = self.net.hessian(self.examples, self.batch_size)
        if closed_form is not None:
            return symmetrised(closed_form)
        matrix = chain_hessian(self.net, self.examples, self.batch_size)
        if matrix is None:
            return super()._formed()
        self._add_penalty(matrix)
        return symmetrised(matrix)


class GaussNewton(Curvature):
    """The generalised Gauss-Newton matrix of the mean loss, plus penalty's Hessian and damping I.

    G = (1/n) sum_i J_i' (d2 loss_i / d output2) J_i (Schraudolph 2002): the Hessian without the
    model's own curvature, so positive semi-definite for a loss that is convex in the output. Not
    the empirical Fisher, which is the mean of grad loss_i grad loss_i'.

    Raises: ValueError for a cross-entropy of probabilities instead of logits, besides Curvature's.
    """

    _method, _each = "gauss_newton_product", "gauss_newton"

    def __init__(
        self,
        net: GenericNeuralNet,
        examples: Examples,
        damping: float = 0.0,
        *,
        batch_size: int | None = None,
        checkpoints: str | os.PathLike | None = None,
    ):
        super().__init__(net, examples, damping, batch_size=batch_size, checkpoints=checkpoints)
        net.loss.check_logits()

    @property
    def smallest_eigenvalue_bound(self) -> float:
        """Lower bound on all eigenvalues: damping plus the penalty's; NaN if none is known."""
        return self.net.penalty_convexity + self.damping if self.net.loss.convex else np.nan

    def _formed(self) -> NDArray:
        """The matrix without damping: of affine layers from each row's root, else from blocks.

        A root, S_i' J_i with S_i S_i' the loss's Hessian, takes one backward pass for each of the
        model's outputs; products with unit vectors take one or more for each of d.
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
        size = self.batch_size or size
        matrix = np.zeros(self.shape)  # sums of float32 products in float64
        squares = self.examples.map_over(
            _root_square, self.net, batch_size=size, what="forming the matrix"
        )
        for square in squares:
            matrix += square
        matrix = (matrix / len(self.examples)).astype(self.dtype, copy=False)
        self._add_penalty(matrix)
        return symmetrised(matrix)


def _root_square(net: GenericNeuralNet, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
    """The sum over a batch of J_i' (d2 loss_i / d output2) J_i, (d, d), from each row's root."""
    roots = affine_layers(net, x).roots(x, y, net.at(theta).theta_tensor())
    roots = roots.reshape(-1, net.num_parameters)
    return roots.T @ roots


def symmetrised(matrix: NDArray) -> NDArray:
    """The mean of a matrix (d, d) and its mirror image, in its own memory.

    What is computed is symmetric up to rounding; what is returned, exactly.
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
    """Refuse what is not None or a positive integer.

    Raises: ValueError.
    """
    if batch_size is None:
        return
    if (
        isinstance(batch_size, bool)
        or not isinstance(batch_size, int | np.integer)
        or batch_size < 1
    ):
        raise ValueError(f"batch_size must be a positive integer or None, got {batch_size!r}.")
