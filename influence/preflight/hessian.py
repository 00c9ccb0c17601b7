"""Tests of derivatives and curvature: is H correct and invertible, and is theta a minimum?"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.curvature.operators import Curvature, GaussNewton, Hessian
from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet
from influence.net.questions import PerRow
from influence.net.tape import operations
from influence.preflight.report import Finding, Line
from influence.preflight.rows import plain_inputs, sample
from influence.solvers import CG, solve
from influence.solvers.plan import FLOAT64_WEIGHTS
from influence.solvers.spectrum import Spectrum, largest_eigenvalue

# Step sizes of the finite differences in `derivatives`. The unit is the cube root of the dtype's
# machine epsilon, times |theta| if |theta| > 1. For a smooth function, the best size is about 1.
_STEPS = (10.0, 1.0, 0.1, 0.01)
# This many sums of row gradients with random signs estimate the effect of removing one row.
_SIGNS = 2
# Each of these sums has at most this many rows. `stationary` computes the changes of the losses of
# at most this many rows.
_ROWS = 256
# CG stops at these limits, because `stationary` needs only the order of magnitude of its solution.
_ITERATIONS, _RTOL = 20, 0.3
# TensorFlow operations whose names begin with one of these words have a discontinuous slope.
_KINKS = ("Relu", "LeakyRelu", "MaxPool", "Maximum", "Minimum", "Max", "Abs")
# The line "precision" is ok if the relative rounding error of a score is below this number.
_ENOUGH_DIGITS = 1e-2


def derivatives(net: GenericNeuralNet, A: Hessian) -> tuple[Line, Line]:
    """Check that H v agrees with differences of the gradient, and that H is symmetric.

    H is the damped Hessian A. The vector v is H w, scaled to length 1, for a random w. Such a v has
    components in all directions of curvature. If the product H v is correct, it agrees with the
    central difference of the gradient for at least one step size.
    """
    d, dtype = net.num_parameters, net.dtype
    eps = float(np.finfo(dtype).eps)
    w, u = np.random.default_rng(0).standard_normal((2, d)).astype(dtype)
    u /= np.linalg.norm(u)
    v = A @ w
    v = (v if v.any() and np.isfinite(v).all() else w) / (np.linalg.norm(v) or 1.0)
    Hu, Hv = (A @ np.stack([u, v], axis=1)).T
    theta = net.theta
    steps = np.array(_STEPS) * np.cbrt(eps) * max(1.0, float(np.linalg.norm(theta)))
    ends = np.concatenate([steps, -steps]).astype(dtype)
    G = net.risk_gradient(A.examples, theta[:, None] + ends * v[:, None], A.batch_size)
    differences = (G[:, : len(steps)] - G[:, len(steps) :]) / (2 * steps) + A.damping * v[:, None]
    size = float(np.linalg.norm(Hv))
    gaps = np.linalg.norm(differences - Hv[:, None], axis=0)
    gap = float(gaps.min() / size) if size else float(gaps.min() > 0)
    asymmetry = abs(float(u @ Hv - v @ Hu)) / (max(size, float(np.linalg.norm(Hu))) or 1.0)
    return _differences(net, A.examples, gap), _symmetry(asymmetry, 1e4 * eps)


def _differences(net: GenericNeuralNet, train: Examples, gap: float) -> Line:
    title = "Hessian = differences"
    if gap <= 2 * np.cbrt(np.finfo(net.dtype).eps):
        return Finding(title, gap).ok(
            "Products with the Hessian agree with central differences of the gradient (relative "
            "difference in value).",
        )
    found = (
        f"A product with the Hessian differs by {gap:.1e} of its size from central differences of "
        "the gradient"
    )
    kinks = _kinks(net.flat.model, train) if net.dtype.itemsize < 8 else []
    if kinks:
        return Finding(title, gap).warn(
            f"{found}. The steps that {net.dtype} needs cross kinks ({', '.join(kinks)}), which "
            "have a curvature on average that no Hessian contains: scores leave it out.",
            "Check again in float64, whose steps are too small to cross many; use softplus, GELU "
            "or tanh where scores must match refits.",
        )
    return Finding(title, gap).fail(
        f"{found}: second derivatives are wrong.",
        "Look for tf.custom_gradient or tf.stop_gradient in the model or loss, and for losses with "
        "kinks.",
    )


def _kinks(model: keras.Model, train: Examples) -> list[str]:
    """Return the names of the model's operations whose slope is discontinuous."""
    x = plain_inputs(model, train.take([0]).x)
    function = tf.function(lambda x: model(x, training=False), autograph=False)
    with keras.StatelessScope():
        graph = function.get_concrete_function(tf.nest.map_structure(tf.constant, x)).graph
    return sorted({op.type for op in operations(graph) if op.type.startswith(_KINKS)})


def _symmetry(gap: float, tolerance: float) -> Line:
    title = "Hessian symmetric"
    if gap <= tolerance:
        return Finding(title, gap).ok("u'Hv = v'Hu (relative difference in value).")
    return Finding(title, gap).fail(
        f"u'Hv and v'Hu differ by {gap:.1e} of |Hv|: this is no second derivative of any function, "
        "and no solver's answer means anything.",
        "Look for tf.custom_gradient or tf.stop_gradient in the model or loss.",
    )


def bounded(A: GaussNewton, steps: int) -> tuple[Line, Line, Line]:
    """Report the extreme eigenvalues and the precision, given a lower bound on the eigenvalues.

    A is the damped Gauss-Newton matrix. `A.smallest_eigenvalue_bound` is a positive lower bound on
    its eigenvalues. The largest eigenvalue is computed by `steps` steps of Lanczos' iteration.
    """
    value, error = largest_eigenvalue(A, steps)
    bound = A.smallest_eigenvalue_bound
    condition = (value + error) / bound
    lost = condition * float(np.finfo(A.dtype).eps)
    end = Line(
        "largest eigenvalue",
        value,
        "ok",
        f"That of the Gauss-Newton matrix with damping, known to {error:.1g}; with the smallest it "
        "sets how hard the system is.",
    )
    title = "smallest eigenvalue"
    found = f"At least {bound:.3g}, of which {A.damping:.3g} is damping"
    if A.damping > bound / 2:
        least = Finding(title, bound).warn(
            f"{found}: scores are those of a risk that holds the weights where they are.",
            "Hold the scores against proximal refits with the same damping, not against plain "
            "ones.",
        )
    else:
        least = Finding(title, bound).ok(f"{found}. The penalty gives the rest.")
    says = f"{A.dtype} at condition number {condition:.1g} or less may lose {min(lost, 1):.1g}"
    digits = Finding("precision", lost)
    if lost < _ENOUGH_DIGITS:
        return end, least, digits.ok(f"{says} of a score to rounding: little enough.")
    return (
        end,
        least,
        digits.warn(
            f"{says} of a score to rounding.",
            "Influence without a solver solves nets of this size in float64 by itself."
            if A.shape[0] <= FLOAT64_WEIGHTS
            else "Use more damping, or a penalty.",
        ),
    )


def largest(found: Spectrum) -> Line:
    """Report the largest eigenvalue. The line fails only if no eigenvalue is positive."""
    value, error = found.largest[0], found.largest_residuals[0]
    return Line(
        "largest eigenvalue",
        float(value),
        "ok" if value > 0 else "fail",
        f"That of the Hessian with damping, known to {error:.1g}; with the smallest it sets how "
        "hard the system is.",
        "" if value > 0 else "Nothing curves upwards: theta is no minimum; train first.",
    )


def smallest(found: Spectrum, known: float, damping: float, noise: float) -> Line:
    """Check that the damped Hessian is positive definite.

    `known` is a lower bound on the eigenvalues, NaN if none is known. `noise` is a rounding error.
    An eigenvalue whose size is at most `noise` cannot be distinguished from zero.
    """
    title = "smallest eigenvalue"
    low, error = float(found.smallest[0]), float(found.smallest_residuals[0])
    enough = damping - low + error + max(0.1 * abs(low - damping), 1e-3 * float(found.largest[0]))
    advice = (
        f"Train on, or give damping={enough:.2g} or more, or use curvature=GaussNewton; a penalty "
        "on every weight helps at the next training."
    )
    value = f"{low:.3g}, known to {error:.1g}"
    if low < -noise:
        return Finding(title, low).fail(
            f"The smallest eigenvalue is {value}: theta is a saddle, not a minimum, and the "
            "inverse turns the sign of every score along that direction.",
            advice,
        )
    if low <= noise:
        return Finding(title, low).fail(
            f"The smallest eigenvalue is {value}, zero but for rounding ({noise:.1g}): directions "
            "that change no loss make the Hessian singular, and it has no inverse.",
            advice,
        )
    if damping and low - damping <= noise:
        return Finding(title, low).warn(
            f"The smallest eigenvalue is {value}, but {low - damping:.3g} without the damping: "
            "scores are those of a risk that holds the weights where they are.",
            "Hold the scores against proximal refits with the same damping, not against plain "
            "ones.",
        )
    # A small residual shows that an eigenvalue is near `low`. A smaller eigenvalue may exist.
    found_it = found.complete or (found.converged and error <= 0.1 * low)
    if not (known > 0 or (found_it and low - error > noise)):
        return Finding(title, low).warn(
            f"The smallest eigenvalue found is {value} only: a negative one may have been missed.",
            f"influence.spectrum with more max_products tells; damping={enough:.2g} is safe.",
        )
    return Finding(title, low).ok(
        f"Positive, {value}: the Hessian is invertible and theta, if stationary, a minimum.",
    )


def precision(found: Spectrum, known: float, dtype: np.dtype) -> Line:
    """Check that the dtype has enough digits for the condition number of the damped Hessian.

    `known` is a lower bound on the eigenvalues, NaN if none is known.
    """
    title = "precision"
    low, error = float(found.smallest[0]), float(found.smallest_residuals[0])
    floor = max(low - error, known) if not np.isnan(known) else low - error
    floor = floor if floor > 0 else low
    if floor <= 0:
        return Finding(title).warn(
            "No condition number: the Hessian is not positive definite.",
            "Mend that first, and check again with the damping that will be used.",
        )
    condition = float(found.largest[0]) / floor
    lost = condition * float(np.finfo(dtype).eps)
    says = f"{dtype} at condition number {condition:.1g} may lose {min(lost, 1):.1g} of a score"
    found_it = found.complete or (found.converged and error <= 0.1 * low)
    if lost < _ENOUGH_DIGITS and not (known > 0 or found_it):
        return Finding(title, lost).warn(
            f"{says} to rounding, or more: the smallest eigenvalue is known to {error:.1g} only.",
            "influence.spectrum with more max_products tells; more damping makes it certain.",
        )
    if lost < _ENOUGH_DIGITS:
        return Finding(title, lost).ok(f"{says} to rounding: little enough.")
    return Line(
        title,
        lost,
        "warn" if lost < 1 else "fail",
        f"{says} to rounding"
        + (", all of it along the flattest directions." if lost >= 1 else "."),
        ("" if dtype.itemsize == 8 else "Use float64 (Input and layers with dtype='float64'), ")
        + "more penalty or damping, or scaled inputs.",
    )


def stationary(net: GenericNeuralNet, A: Curvature, test: Examples | None, shift: float) -> Line:
    """Compare two changes of losses: by finishing the training, and by removing a row.

    A Newton step on the risk R approximates the end of the training. This step changes loss j by
    -grad loss_j . H^-1 grad R. With L = loss + penalty, leaving out row i changes loss j by grad
    loss_j . H^-1 grad L(z_i) / n. Sums of row gradients with random signs estimate the root mean
    square of these changes over all rows i. Half of the signs are positive, so that the penalty
    cancels in each sum.

    A is the damped matrix of the training set. `shift` is added to its damping. The shift is
    positive if A is not positive definite. The losses are those of rows of `test`, or of training
    rows if `test` is None.
    """
    title = "stationary point"
    train, n = A.examples, len(A.examples)
    g = net.risk_gradient(train, batch_size=A.batch_size)
    some, rng = train.take(sample(n, _ROWS)), np.random.default_rng(0)
    sums = [_signed_sum(net, some, rng.permutation(len(some))) for _ in range(_SIGNS)]
    damped = A.damped(A.damping + shift)
    solution = solve(damped, np.stack([g, *sums], 1), CG(_RTOL, max_iterations=_ITERATIONS))
    X = solution.x
    watched = some if test is None else test.take(sample(len(test), _ROWS))
    along = PerRow("directional", X)
    changes = watched.each_row(along, net, batch_size=A.batch_size)
    by_column = np.sqrt(np.mean(np.square(changes, dtype=np.float64), axis=0))
    drift, removal = float(by_column[0]), float(np.sqrt(np.mean(by_column[1:] ** 2)))
    removal /= net.mass(train)
    ratio = drift / removal if removal else (np.inf if drift else 0.0)
    found = (
        f"gradient norm {np.linalg.norm(g):.1e}. Finishing the training would change "
        f"{'test' if test is not None else 'training'} losses by {drift:.1e} (rms), leaving a "
        f"row out by {removal:.1e}"
    )
    if ratio < 0.1 and not solution.converged.all():
        return Finding(title, ratio).warn(
            f"Theta may be the minimum for this purpose: {found}. But CG left a relative residual "
            f"of {solution.residual.max():.1g} in {_ITERATIONS} iterations: either may be more.",
            "Train on by net.fit to a smaller gradient norm, or check with the damping that will "
            "be used.",
        )
    if ratio < 0.1:
        return Finding(title, ratio).ok(f"Theta is the minimum for this purpose: {found}.")
    return Line(
        title,
        ratio,
        "warn" if ratio < 1 else "fail",
        f"Theta is not the minimum of mean loss + penalty: {found}. Refits would show the drift, "
        "and the formula leaves it out.",
        "Train on, all rows at once, with a falling learning rate or net.fit. Dropout, batch "
        "statistics, augmentation or early stopping minimise another risk than the one asked "
        "about: then compare with proximal refits.",
    )


def _signed_sum(net: GenericNeuralNet, examples: Examples, order: NDArray) -> NDArray:
    """Compute sum_i s_i grad loss_i / sqrt(k) over k rows. s_i is 1 for half of them, else -1."""
    half = len(order) // 2
    parts = [examples.take(part) for part in (order[:half], order[half : 2 * half])]
    one, other = (net.gradient(part.x, part.y) for part in parts)
    return np.sqrt(half / 2) * (one - other)
