"""The choice of curvature, damping, solver and precision for one net and one training set.

The choice depends on the net, the training set and the curvature matrix only. It is made before any
score is computed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import keras
import numpy as np
import scipy.linalg
import tensorflow as tf
from numpy.typing import NDArray

from influence.common.memory import ACTIVATIONS, fitting, of_machine
from influence.curvature.layers import affine_layers
from influence.curvature.operators import Curvature, GaussNewton, Hessian
from influence.curvature.roots import sum_of_lengths
from influence.examples.examples import Examples
from influence.net.history import History
from influence.net.net import GenericNeuralNet
from influence.net.refused import check_weights
from influence.solvers.base import Prepared, Solver
from influence.solvers.cg import CG
from influence.solvers.direct import Direct
from influence.solvers.ekfac import EKFAC
from influence.solvers.nystrom import Nystrom
from influence.solvers.spectrum import suggest_damping

# The damping is this share of the mean eigenvalue (Grosse et al. 2023, appendix on damping).
_SHARE = 0.1
# This many random vectors estimate the mean eigenvalue of a net without affine layers.
_PROBES = 8
# Memory holds this many arrays of the size of the layers' factors while a trace is computed.
_COPIES = 4
# The systems of nets with at most this many weights are solved in float64.
FLOAT64_WEIGHTS = 100_000
# `Direct` holds three d x d matrices. These may take this share of the machine's memory.
_MEMORY_SHARE = 0.25
# If a machine does not report its memory, this many bytes are assumed.
_USUAL_MEMORY = 8e9
# `Direct` is chosen if the matrix takes at most this many multiplications to form and factor.
_DIRECT_WORK = 2e12
# A matrix that is formed from one product for each column may have at most this order.
_FEW_PRODUCTS = 1024
_SKETCH_RANK = 50
# A singular matrix gets the damping _REDUNDANT sqrt(eps) times its largest diagonal entry. eps is
# the machine epsilon.
_REDUNDANT = 1e-2
# A net's outputs count as affine in theta up to this relative difference.
_AFFINE_RTOL = {"float32": 1e-3, "float64": 1e-8}
_AFFINE_ROWS = 16
# The sum of a learning-rate schedule is estimated from at most this many of its steps.
_SCHEDULE_STEPS = 1000


@dataclass(frozen=True)
class Plan:
    """The matrix and the solver that scores use, and the reason for each choice.

    Attributes:
      curvature: "Hessian" or "GaussNewton".
      damping: the number that multiplies I in the matrix.
      solver: the hyperparameters of the solver of (curvature + damping I) x = b.
      dtype: the precision of the systems, "float32" or "float64".
      reasons: one reason each for curvature, damping, solver, dtype and approximation.
      approximation: "first_order" or "one_step", the method that predicts the effect of a removal
        (influence.scores.one_step).
    """

    curvature: str
    damping: float
    solver: Any
    dtype: str
    reasons: tuple[str, ...]
    approximation: str = "first_order"

    def __repr__(self) -> str:
        """Show each choice with its reason in brackets."""
        choices = (self.curvature, f"damping {self.damping:.3g}", repr(self.solver), self.dtype)
        choices += (self.approximation.replace("_", " "),)
        parts = [f"{choice} ({why})" for choice, why in zip(choices, self.reasons, strict=False)]
        return f"Plan: {', '.join(parts)}"


_GIVEN = "given"


class Planner:
    """Choice of the options that the caller left out. The damping is chosen on first use.

    Args: the arguments of `Influence`. None for solver, damping or curvature leaves the choice to
      this class. Other values are used as they are.

    Attributes:
      net: the net whose matrix the solver inverts. It is the given net or a float64 copy of it.
      affine: True if the outputs are affine in theta and the loss is convex in the outputs.
      curvature: the class of the matrix.
      solver: the solver, which may be prepared.
      solver_given: True if the caller chose the solver.
    """

    def __init__(
        self,
        net: GenericNeuralNet,
        train: Examples,
        *,
        solver: Solver | Prepared | None = None,
        damping: float | None = None,
        curvature: type[Curvature] | None = None,
        batch_size: int | None = None,
        history: History | None = None,
    ):
        self._history = history
        if isinstance(solver, Prepared) and isinstance(solver.A, Curvature):
            curvature = type(solver.A) if curvature is None else curvature
            damping = solver.A.damping if damping is None else damping
        self._given, self._train, self._batch_size = net, train, batch_size
        self._digest = _digest(net)
        self._damping = damping
        self._curvature_given, self.solver_given = curvature is not None, solver is not None
        open_question = not is_convex(net) and (curvature is None or damping is None)
        can_be = open_question and net.loss.convex and net.loss.from_logits
        self.affine = can_be and affine_in_theta(net, train)
        self.curvature, self._why_curvature = _curvature(net, curvature, self.affine)
        self._by_roots = by_roots = self.affine or self.curvature is GaussNewton
        self.solver, self._why_solver = _solver(net, train, by_roots, solver)
        self.net, self._why_dtype = _in_precision(net, solver)

    @cached_property
    def fits(self) -> bool:
        """True if the matrix fits into memory and is quick to form and factor."""
        return _fits(self.net, self._train, self._by_roots)

    @cached_property
    def operator(self) -> Curvature:
        """The damped curvature matrix. First use may take some passes over the data."""
        return self._chosen[0]

    @cached_property
    def plan(self) -> Plan:
        """The Plan: all choices and their reasons."""
        A, why = self._chosen
        solver = self.solver.solver if isinstance(self.solver, Prepared) else self.solver
        reasons = (self._why_curvature, why, self._why_solver, self._why_dtype)
        return Plan(type(A).__name__, A.damping, solver, self.net.dtype.name, reasons)

    @cached_property
    def _chosen(self) -> tuple[Curvature, str]:
        net, train, size = self.net, self._train, self._batch_size
        if self._damping is not None:
            A = self.curvature(net, train, self._damping, batch_size=size)
            return A.damped(A.damping, self._formed_by_roots()), _GIVEN
        A = self.curvature(net, train, batch_size=size)
        if self._curvature_given and self.curvature is Hessian:
            why = "none, because the Hessian was asked for"
            return A.damped(0.0, self._formed_by_roots()), why
        if is_convex(self._given):
            return A, "none, because the risk is convex"
        if self.affine:
            return self._for_convex(A)
        if self.curvature is Hessian:
            return A.damped(suggest_damping(A)), "the least that makes the matrix definite"
        held = A.dense() if isinstance(self.solver, Direct) else None
        mean = mean_eigenvalue(A) if held is None else float(np.trace(held)) / len(held)
        if not mean > 0:
            raise ValueError(
                f"loss must have curvature in the outputs, got {net.loss.name!r}, whose "
                f"Gauss-Newton matrix has the trace {mean * A.shape[0]:.1e} at theta; use a smooth "
                "loss, such as Huber, or damping= and a curvature of your own choice."
            )
        damping, why = _SHARE * mean, f"{_SHARE} of the mean eigenvalue (Grosse et al. 2023)"
        known = training_damping(self._given.model, self._history)
        if known is not None:
            damping, why = known, "1 / (learning rate x steps) of the training (Bae et al. 2022)"
        if not net.loss.convex:
            enough = suggest_damping(A if held is None else held)
            if enough > damping:
                damping, why = enough, "the least that makes the matrix definite"
        return A.damped(damping, held), why

    def _for_convex(self, A: Curvature) -> tuple[Curvature, str]:
        """Choose the damping of a Hessian that is positive semi-definite.

        If theta has redundant directions, the matrix is singular. A very small damping then gives
        the scores of the pseudo-inverse, because gradients of training rows have no component in
        these directions.

        Returns: the damped matrix, and the reason for its damping.
        """
        held = self._formed_by_roots()
        if held is None:
            return A, "none, because the risk is convex"
        largest = float(np.abs(np.diag(held)).max())
        smallest = float(scipy.linalg.eigvalsh(held, subset_by_index=[0, 0])[0])
        eps = float(np.finfo(held.dtype).eps)
        if smallest > len(held) * eps * largest:
            return A.damped(0.0, held), "none, because the risk is convex"
        return A.damped(np.sqrt(eps) * _REDUNDANT * largest, held), (
            "very small, because theta has redundant directions"
        )

    def _formed_by_roots(self) -> NDArray | None:
        """Form the undamped matrix if the solver needs it and the outputs are affine.

        The Hessian then equals the Gauss-Newton matrix, which is formed faster.
        """
        if not (self.affine and isinstance(self.solver, Direct)):
            return None
        return GaussNewton(self.net, self._train, batch_size=self._batch_size).dense()

    def check_theta(self) -> None:
        """Raise RuntimeError if the given net's theta has changed."""
        if self._digest != _digest(self._given):
            check_weights(self._given.model)  # raises ValueError if a weight is NaN or infinite
            raise RuntimeError(
                "theta has changed since this Influence was made; make a new one for the new theta."
            )


def _digest(net: GenericNeuralNet) -> bytes:
    """Return a digest of theta. It takes less memory than a copy of theta."""
    return hashlib.blake2b(net.theta.tobytes()).digest()


def _curvature(
    net: GenericNeuralNet, given: type[Curvature] | None, affine: bool
) -> tuple[type[Curvature], str]:
    if given is not None:
        if issubclass(given, GaussNewton):
            net.loss.check_logits()
        return given, _GIVEN
    if is_convex(net):
        return Hessian, "the risk is convex"
    if affine:
        return Hessian, "the outputs are affine in theta and the loss is convex"
    if not net.loss.from_logits:
        return Hessian, "a Gauss-Newton matrix needs logits, and the loss takes probabilities"
    return GaussNewton, "the risk is not known to be convex, so its Hessian may be indefinite"


def is_convex(net: GenericNeuralNet) -> bool:
    """Return True for the library's convex models. Only these have a closed form of the Hessian."""
    return net.convex or type(net).hessian is not GenericNeuralNet.hessian


def affine_in_theta(net: GenericNeuralNet, examples: Examples) -> bool:
    """Return True if the outputs of some rows are affine in theta along a random direction."""
    theta = net.theta.astype(np.float64)
    spread = np.unique(np.linspace(0, len(examples) - 1, _AFFINE_ROWS).astype(int))
    x = examples.take(spread).x
    v = np.random.default_rng(0).standard_normal(theta.shape)
    v *= max(float(np.sqrt(np.mean(theta**2))), 0.1)
    at = np.stack([theta + k * v for k in (0, 1, -1, 3)], 1)
    z, up, down, far = _outputs_at(net, x, at)
    largest = max(float(np.abs(far).max()), float(np.abs(up).max()))
    if not np.isfinite(largest):
        return False
    bends = np.abs(up + down - 2 * z).max(), np.abs(far - z - 3 * (up - z)).max()
    return bool(max(bends) <= _AFFINE_RTOL[net.dtype.name] * largest)


def _outputs_at(net: GenericNeuralNet, x: Any, thetas: NDArray) -> list[NDArray]:
    """Return the net's outputs, before a last softmax or sigmoid, at each column of `thetas`."""
    t = net.flat

    def joined(theta, x):
        parts = tf.nest.flatten(t.output(theta, x))
        return tf.concat([tf.reshape(part, [tf.shape(part)[0], -1]) for part in parts], 1)

    inputs = t.inputs(x)
    columns = thetas.T.astype(net.dtype)
    found = [t.run("outputs at", joined, tf.constant(column), inputs) for column in columns]
    return [part.astype(np.float64) for part in found]


def _solver(
    net: GenericNeuralNet, train: Examples, by_roots: bool, given: Solver | Prepared | None
) -> tuple[Solver | Prepared, str]:
    if given is not None:
        return given, _GIVEN
    d = net.num_parameters
    if is_convex(net):
        return CG(), "the net has fast products in closed form"
    if _fits(net, train, by_roots):
        return Direct(), f"the {d:,} x {d:,} matrix fits into memory and is quick to form"
    if d > FLOAT64_WEIGHTS and net.loss.from_logits and _has_factors(net, train):
        return EKFAC(), f"an approximation by layers, because {d:,} weights are too many for CG"
    if by_roots:
        sketched = CG(preconditioner=Nystrom(min(_SKETCH_RANK, d)))
        return sketched, "products with a sketch of the matrix as preconditioner"
    return CG(), "the matrix is too large to form"


def fits_in_memory(d: int, dtype: np.dtype) -> bool:
    """Return True if three d x d matrices take at most a quarter of the machine's memory."""
    return 3 * d**2 * dtype.itemsize <= _MEMORY_SHARE * (of_machine() or _USUAL_MEMORY)


def _fits(net: GenericNeuralNet, train: Examples, by_roots: bool) -> bool:
    n, d = len(train), net.num_parameters
    if not fits_in_memory(d, np.dtype(np.float64) if _is_small(net) else net.dtype):
        return False
    s = net.output_size(train.take([0]).x)
    if not (by_roots and net.loss.convex) or s > d:
        return d <= _FEW_PRODUCTS
    single = 0
    if _has_factors(net, train):
        layers = affine_layers(net, train.take(slice(0, 2)).x)
        single = sum(layer.entries.size for layer in layers.single)
    forming = n * d * single + n * s * (d - single) ** 2
    return forming + d**3 / 3 <= _DIRECT_WORK


def _is_small(net: GenericNeuralNet) -> bool:
    """Return True if the net's systems are solved in float64."""
    return net.num_parameters <= FLOAT64_WEIGHTS


def _has_factors(net: GenericNeuralNet, train: Examples) -> bool:
    try:
        affine_layers(net, train.take(slice(0, 2)).x)
    except ValueError:
        return False
    return True


def _in_precision(net: GenericNeuralNet, solver: Any) -> tuple[GenericNeuralNet, str]:
    if solver is not None:
        return net, "the net's own, because the solver was given"
    if net.dtype == np.float64 or not _is_small(net):
        return net, "the net's own"
    if type(net) is not GenericNeuralNet:
        return net, "the net's own, because its closed forms have one dtype"
    try:
        return net.astype("float64"), f"a net of at most {FLOAT64_WEIGHTS:,} weights"
    except (TypeError, ValueError) as error:  # Keras cannot rebuild the model
        return net, f"the net's own, because a float64 copy failed: {error}"


def mean_eigenvalue(A: Curvature) -> float:
    """Return trace(A) / d of an undamped Gauss-Newton matrix.

    The result is exact if theta is in affine layers and the penalty's curvature is diagonal.
    Otherwise products with random signs estimate the trace (Hutchinson 1990).
    """
    net, d = A.net, A.shape[0]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (d, min(_PROBES, d))).astype(A.dtype)
    if not (net.loss.convex and _has_factors(net, A.examples)):
        return float(np.einsum("dk,dk->k", signs, A @ signs).mean()) / d
    layers = affine_layers(net, A.examples.take(slice(0, 2)).x)
    at_most = net.rows_per_batch(A.examples)
    rows = fitting(ACTIVATIONS, _COPIES * layers.numbers * net.dtype.itemsize, at_most)
    total = A.examples.sum_over(sum_of_lengths, net, batch_size=A.batch_size or rows)
    penalty = float(signs[:, 0] @ net.penalty_hvp(signs[:, 0]))
    return (total / net.mass(A.examples) + penalty) / d


def training_damping(model: keras.Model, history: History | None = None) -> float | None:
    """Return the damping that describes a training by SGD that ended before it converged.

    T steps of gradient descent with learning rates eta_t and momentum mu reach the minimum along an
    eigenvector only if its eigenvalue is well above (1 - mu) / sum_t eta_t. Influence functions
    with this damping describe such a training (Bae et al. 2022, section 5).

    Args:
      model: the model, whose optimiser knows the number of steps and the present learning rate.
      history: the record of the training, with the learning rate of every epoch, or None. A record
        that begins after the first step of the training is not used.

    Returns: the damping, or None if the optimiser is not SGD or took no step.
    """
    if history is not None and not history.by_gradient_steps:
        return None
    if history is not None and history.is_whole:
        return history.damping()
    optimizer: Any = getattr(model, "optimizer", None)
    if not isinstance(optimizer, keras.optimizers.SGD):
        return None
    steps = int(np.asarray(optimizer.iterations))
    if steps < 1:
        return None
    rate: Any = getattr(optimizer, "_learning_rate", None)
    if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        some = np.linspace(0, steps - 1, min(steps, _SCHEDULE_STEPS)).astype(int)
        total = steps * float(np.mean([float(np.asarray(rate(int(t)))) for t in some]))
    else:
        total = steps * float(np.asarray(optimizer.learning_rate))
    momentum = float(getattr(optimizer, "momentum", 0.0) or 0.0)
    return (1 - momentum) / total if total > 0 else None
