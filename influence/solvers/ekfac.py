"""EKFAC: Kronecker factors of the Gauss-Newton matrix, layer by layer, eigenvalues corrected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from influence.common.convergence import DivergenceError
from influence.common.progress import progress
from influence.curvature.layers import AffineLayers, affine_layers
from influence.curvature.operators import Curvature
from influence.net.net import GenericNeuralNet
from influence.solvers.base import Raw

_BYTES_AT_ONCE = 1 << 28  # of one batch's inputs and pseudo-gradients
_PROBE_ROWS = 2
_MIXING = 1e-3  # far above rounding: a penalty whose curvature is no diagonal


@dataclass(frozen=True)
class EKFAC:
    """Eigenvalue-corrected Kronecker factors (George et al. 2018), as an approximate inverse.

    For each Dense or Conv2D layer with inputs a_t, the bias as one more input that is always one,
    and pseudo-gradients g_st at its output (positions t, columns s of the loss's Hessian's root),

        G ~ (U (x) V) diag(L) (U (x) V)',   U diag(.) U' = mean_i sum_t a_t a_t'
                                            V diag(.) V' = mean_i sum_st g_st g_st' / T
        L_jk = mean_i sum_s (U' (sum_t a_t g_st') V)_jk^2 + penalty_jk + damping

    and zero between layers: Kronecker factors of Martens & Grosse (2015), of Grosse & Martens
    (2016) for convolutions, of the true Gauss-Newton matrix: exact expectations over the model's
    own predictions, nothing is sampled and no label enters but through the loss's curvature. Exact
    for one linear layer with squared error. L is the best diagonal in that basis; the penalty, a
    diagonal in theta's own, enters by its diagonal in that basis, and what is the same for all of
    an input's weights is put into U's matrix first, so that a penalty on the kernel alone is exact
    wherever one on both would be.

    For a `Hessian` too this is the Gauss-Newton part (Grosse et al. 2023 use it for influence). It
    is fixed, linear and positive definite, so `CG(preconditioner=EKFAC())` gives the exact answer;
    for a single layer in somewhat fewer iterations. For several layers it may take more than none
    at all, because their coupling is left out: with the Gauss-Newton matrix of 1,000 MNIST images
    at the paper's network, damped by 0.01, CG takes 87 iterations, with this 373, with the exact
    inverse of each layer's own block 255; more damping of this alone brings it down towards 87, not
    below. There precondition with the whole matrix,
    `prepare(GaussNewton(net, train, damping), Direct())`: the Hessian then takes 20, alone 668.

    Preparing takes two passes with as many backward passes each as the model has outputs, and the
    eigenvectors of matrices as large as a layer's inputs and outputs; solving takes none. Of a
    layer with f inputs and c outputs f^2 + c^2 + f c numbers are kept.

    Args:
      rtol: true relative residual up to which a column counts as converged. None: no such aim; the
        residual is reported, nothing counts as converged, nobody is warned.

    Raises: ValueError for a negative rtol. When preparing: TypeError for a matrix that is no
      Hessian or GaussNewton operator; ValueError naming the layer for a model whose weights are not
      all in plain Dense and Conv2D layers (see `affine_layers`), for a penalty
      that mixes weights and for a cross-entropy of probabilities; DivergenceError, with a damping
      that would work, for a singular matrix.
    """

    rtol: float | None = None

    def __post_init__(self):
        """Check the hyperparameters."""
        if self.rtol is not None and not self.rtol >= 0:
            raise ValueError(f"rtol must be non-negative or None, got {self.rtol}.")

    def prepare(self, A: LinearOperator) -> Callable[[NDArray], Raw]:
        """Find the bases and the eigenvalues."""
        if not isinstance(A, Curvature):
            raise TypeError(
                f"A must be a Hessian or GaussNewton operator for EKFAC, got {type(A).__name__}; "
                "use CG or Direct for other matrices."
            )
        A.check_theta()
        A.net.loss.check_logits()
        blocks = _blocks(A)
        return lambda B: Raw(_inverse_times(blocks, B), 1, np.nan, _REMEDY)


_REMEDY = "EK-FAC is an approximation, layer by layer: use CG or Direct, or more damping."


@dataclass(frozen=True, eq=False)
class _Block:
    """One layer of f inputs, the bias's among them, and c outputs."""

    name: str
    entries: NDArray  # (f, c) positions in theta
    U: NDArray  # (f, f) eigenvectors on the side of the inputs
    V: NDArray  # (c, c) and of the outputs
    eigenvalues: NDArray  # (f, c)


def _inverse_times(blocks: list[_Block], B: NDArray) -> NDArray:
    """The block-diagonal inverse times B (d, m)."""
    X = np.empty_like(B)
    m = B.shape[1]
    for block in blocks:
        f, c = block.entries.shape
        W = (block.U.T @ B[block.entries].reshape(f, c * m)).reshape(f, c, m)
        W = block.V.T @ W
        W /= block.eigenvalues[:, :, None]
        X[block.entries] = (block.U @ (block.V @ W).reshape(f, c * m)).reshape(f, c, m)
    return X


def _blocks(A: Curvature) -> list[_Block]:
    net, n = A.net, len(A.examples)
    layers = affine_layers(net, A.examples.take(slice(0, _PROBE_ROWS)).x)
    names = [affine.layer.name for affine in layers.layers]
    entries = [affine.entries for affine in layers.layers]
    penalties = [_penalty(net, names)[e] for e in entries]
    batch_size = A.batch_size or _rows_at_once(A, layers)
    bases = [
        _bases(inputs / n, outputs / n, penalty)
        for (inputs, outputs), penalty in zip(
            _factors(A, layers, batch_size), penalties, strict=True
        )
    ]
    squares = [np.zeros(e.shape) for e in entries]
    for parts in _passes(A, layers, batch_size, "eigenvalues of Kronecker factors"):
        for square, (U, V), (a, g) in zip(squares, bases, parts, strict=True):
            square += _squares(_times(a, U), _times(g, V))
    blocks = []
    for name, where, (U, V), square, penalty in zip(
        names, entries, bases, squares, penalties, strict=True
    ):
        values = square / n + (U**2).T @ penalty @ V**2 + A.damping
        blocks.append(_Block(name, where, *(part.astype(A.dtype) for part in (U, V, values))))
    _check_definite(blocks, float(np.finfo(A.dtype).eps))
    return blocks


def _factors(A: Curvature, layers: AffineLayers, batch_size: int) -> list[tuple[NDArray, NDArray]]:
    """For each layer, sums over rows of sum_t a_t a_t' (f, f) and sum_st g_st g_st' / T (c, c)."""
    sums = [tuple(np.zeros((size, size)) for size in e.entries.shape) for e in layers.layers]
    for parts in _passes(A, layers, batch_size, "Kronecker factors"):
        for (inputs, outputs), (a, g) in zip(sums, parts, strict=True):
            flat_a, flat_g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
            inputs += flat_a.T @ flat_a
            outputs += flat_g.T @ flat_g / a.shape[1]
    for affine, pair in zip(layers.layers, sums, strict=True):
        if not all(np.isfinite(factor).all() for factor in pair):
            raise DivergenceError(
                f"A must have finite products, got NaN or infinity in layer {affine.layer.name!r} "
                "in EKFAC; look for infinite losses at theta, or use float64."
            )
    return sums  # pyright: ignore[reportReturnType]


def _passes(
    A: Curvature, layers: AffineLayers, batch_size: int, what: str
) -> Iterator[list[tuple[NDArray, NDArray]]]:
    batches = A.examples.batches(batch_size)
    for x, y in progress(batches, what, -(-len(A.examples) // batch_size)):
        yield layers.pseudo_gradients(x, y)


def _bases(inputs: NDArray, outputs: NDArray, penalty: NDArray) -> tuple[NDArray, NDArray]:
    """Eigenvectors of both factors, the penalty (f, c) of each input among those of the inputs."""
    scale = np.trace(outputs) / len(outputs)  # the factors' product is inputs (x) scale I, about
    by_input = penalty.mean(axis=1) / scale if scale > 0 else 0.0
    return scipy.linalg.eigh(inputs + np.diag(by_input * np.ones(len(inputs))))[1], (
        scipy.linalg.eigh(outputs)[1]
    )


def _times(a: NDArray, basis: NDArray) -> NDArray:
    """The last axis in another basis: one large product instead of many small ones."""
    return (a.reshape(-1, a.shape[-1]) @ basis.astype(a.dtype)).reshape(a.shape)


def _squares(a: NDArray, g: NDArray) -> NDArray:
    """sum_is (sum_t a_itj g_itsk)^2, (f, c), of a (n, t, f) and g (n, t, s, c) in their bases."""
    n, t, f = a.shape
    if t == 1:  # the square of a product is the product of squares: nothing of size n f c
        return np.square(a[:, 0]).T @ np.square(g[:, 0]).sum(axis=1)
    P = a.transpose(0, 2, 1) @ g.reshape(n, t, -1)  # (n, f, s c)
    return np.square(P, out=P).sum(axis=0).reshape(f, *g.shape[2:]).sum(axis=1)


def _rows_at_once(A: Curvature, layers: AffineLayers) -> int:
    """How many rows fit into memory, from what one takes."""
    one = A.examples.take([0])
    per_row = 0
    for a, g in layers.pseudo_gradients(one.x, one.y):
        products = a.shape[2] * g[0, 0].size if a.shape[1] > 1 else 0
        # Inputs and pseudo-gradients, once more in their bases, and the tape's own of the latter.
        per_row += 2 * a.size + 4 * g.size + products
    size = _BYTES_AT_ONCE // (per_row * A.dtype.itemsize)
    return int(np.clip(min(size, A.net.rows_per_batch(A.examples)), 1, len(A.examples)))


def _penalty(net: GenericNeuralNet, names: list[str]) -> NDArray:
    """(d,) the diagonal of the penalty's Hessian, which must be all of it."""
    d = net.num_parameters
    signs = np.random.default_rng(0).choice([-1.0, 1.0], d)
    products = net.penalty_hvp(np.column_stack([np.ones(d), signs]).astype(net.dtype))
    diagonal = products[:, 0].astype(np.float64)
    gap = float(np.abs(products[:, 1] * signs - diagonal).max())
    if not gap <= _MIXING * np.abs(diagonal).max():
        raise ValueError(
            f"model must have regularisers of each weight by itself for EK-FAC, such as L2, got "
            f"one whose curvature mixes weights (by {gap:.1e}) among the layers "
            f"{', '.join(names)}; use CG without EKFAC."
        )
    return diagonal


def _check_definite(blocks: list[_Block], eps: float) -> None:
    largest = max(float(block.eigenvalues.max()) for block in blocks)
    worst: Any = min(blocks, key=lambda block: block.eigenvalues.min())
    smallest = float(worst.eigenvalues.min())
    if smallest > eps * largest:
        return
    raise DivergenceError(
        f"A must be positive definite for EKFAC, got an eigenvalue of {smallest:.1e} in layer "
        f"{worst.name!r}, where the largest is {largest:.1e}; add damping of at least "
        f"{2 * eps * largest - min(smallest, 0.0):.1e}, or a penalty."
    )
