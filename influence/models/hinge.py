"""The linear SVM and its smooth approximations: hinge losses on labels -1 and 1 (figure 3).

Let z be the output, y the label, t the temperature, s = y z the margin and u = 1 - s. Then the loss
l of a row is (Koh & Liang 2017, section 4.2; sigma is the logistic function)

    l = t log(1 + exp(u / t))
    dl/dz = -y sigma(u / t)        d2l/dz2 = sigma(u / t) sigma(-u / t) / t

At t = 0 the loss is the hinge max(0, u), which has no curvature. Let lambda be the weight decay and
w* the minimum of the risk R. The dual D has variables 0 <= a_i <= 1. At its maximum, w(a) = w*. For
all a,

    w(a) = sum_i a_i y_i x_i / (n lambda)
    D(a) = mean a_i - lambda/2 |w(a)|^2
    R(w) - D(a) = mean (max(0, u_i) - a_i u_i) + lambda/2 |w - w(a)|^2  >=  R(w) - R(w*)

R(w) - D(a) is the duality gap. Strong convexity of R gives |w - w*|^2 <= 2 gap / lambda. All terms
of the gap are non-negative, so its computation has no cancellation.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import scipy.special
import tensorflow as tf
from numpy.typing import NDArray

from influence.common.convergence import warn_unconverged
from influence.examples.examples import Examples
from influence.examples.given import Data
from influence.minimisers.box_qp import boxed_minimum
from influence.models.design import Link
from influence.models.linear import LinearModel

# A positive temperature must be at least this. Much smaller temperatures are zero in float32.
_SMALLEST_T = 1e-30
# A row is near the kink if its margin differs from 1 by at most this. LinearSVC finds margins with
# about this accuracy.
_NEAR_KINK = 1e-4
# If a round of `fit` would solve for the dual variables of more rows than this number, or of more
# than d rows, `fit` calls LinearSVC, but only once.
_FEW = 500
# `fit` stops after this many rounds without a smaller gap, because only rounding errors are left.
_STALE = 10


@keras.saving.register_keras_serializable(package="influence")
class SmoothHingeLoss(keras.losses.Loss):
    """The loss t log(1 + exp((1 - y z) / t)) of each example; the hinge at t = 0.

    Args:
      t: temperature, 0 or at least 1e-30.
      reduction: Keras' argument of this name.
      name: name of the loss; None makes one from t.

    Raises: ValueError for another t.
    """

    labels = (-1, 1)
    convex = True

    def __init__(self, t: float = 0.0, reduction: str = "none", name: str | None = None):
        if not (t == 0 or _SMALLEST_T <= t < np.inf):
            raise ValueError(f"t must be 0 or at least {_SMALLEST_T}, got {t}.")
        super().__init__(name=name or f"smooth_hinge_{float(t)!r}", reduction=reduction)
        self.t = float(t)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the losses (n,) of labels (n,) or (n, 1) and outputs (n, 1) or (n,)."""
        z = tf.reshape(y_pred, [-1])
        u = 1 - tf.cast(tf.reshape(y_true, [-1]), z.dtype) * z
        if self.t > 0:
            return self.t * tf.math.softplus(u / self.t)
        # On the kink the gradient is the mean of the gradients of both sides, as in `HingeLink`.
        half = u / 2 + tf.stop_gradient(tf.nn.relu(u) - u / 2)
        return tf.where(tf.abs(u) <= _kink_width(z.dtype.as_numpy_dtype), half, tf.nn.relu(u))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments from which Keras can restore the loss."""
        return {**super().get_config(), "t": self.t}


@dataclass(frozen=True)
class HingeLink(Link):
    """The loss of `SmoothHingeLoss`, computed in NumPy for a model of one output.

    Args:
      t: temperature; 0 gives the hinge.
    """

    t: float

    def loss(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return the losses, (n, k); see Link.loss."""
        u = self.shortfall(Z, y)[:, 0]
        return self.t * np.logaddexp(0, u / self.t) if self.t > 0 else np.maximum(u, 0)

    def slope(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return dl/dz. At t = 0, rows on the kink (u = 0) get half the slope; see Link.slope."""
        u = self.shortfall(Z, y)
        if self.t > 0:
            inside = scipy.special.expit(u / self.t)
        else:
            inside = np.where(np.abs(u) <= _kink_width(u.dtype), 0.5, u > 0).astype(Z.dtype)
        return -_signs(Z, y) * inside

    def curvature(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return d2l/dz2, which is zero at t = 0; see Link.curvature."""
        if self.t == 0:
            return np.zeros_like(Z)
        v = self.shortfall(Z, y) / self.t
        return scipy.special.expit(v) * scipy.special.expit(-v) / self.t

    def shortfall(self, Z: NDArray, y: NDArray) -> NDArray:
        """Return u = 1 - y z, which is 1 minus the margin, in Z's shape."""
        return 1 - _signs(Z, y) * Z


class SmoothHinge(LinearModel):
    """A linear SVM whose hinge is smoothed with temperature t; t = 0 is the SVM itself.

    At t = 0 each loss has a kink at margin 1, and at the minimum some rows lie on this kink. A row
    gets half the slope if its margin differs from 1 by at most the square root of the dtype's
    machine epsilon. Half the slope is the limit t -> 0 at margin 1.

    Args:
      num_features: number f of features.
      t: temperature; 0 gives the hinge.
      weight_decay: lambda of the penalty lambda/2 |w|^2, where w includes the intercept. It must
        be positive if t = 0.
      intercept: True if the model has an intercept. The paper's model has none.
      dtype: "float64" or "float32".

    Attributes:
      convex: True if t > 0. At t = 0 the risk is convex, but Newton's method fails on its kinks.

    Raises: ValueError for a t that is neither 0 nor at least 1e-30, for fewer than one feature, and
      for a weight decay that is negative, or zero at t = 0.
    """

    def __init__(
        self,
        num_features: int,
        t: float = 0.0,
        *,
        weight_decay: float = 0.01,
        intercept: bool = False,
        dtype: str = "float64",
    ):
        if t == 0 and weight_decay == 0:
            raise ValueError("weight_decay must be positive at t = 0, got 0: no unique minimum.")
        link, loss = HingeLink(float(t)), SmoothHingeLoss(t)
        super().__init__(
            num_features, 1, link, loss, weight_decay=weight_decay, intercept=intercept, dtype=dtype
        )
        self.t = float(t)
        self.convex = self.t > 0

    # --- the minimum at t = 0, and its proof ----------------------------------------------------

    def fit(
        self, examples: Data, *, gradient_tolerance: float = 1e-8, max_iterations: int = 10_000
    ) -> SmoothHinge:
        """Minimise the risk from the present theta.

        At t > 0 this is LinearModel.fit. At t = 0, each round solves the dual exactly for the
        variables a_i of some rows, and holds the others fixed. In the first round these are the
        rows near margin 1. In each later round they are the rows with 0 < a_i < 1 or with a
        positive term in the gap. If there are too many such rows, scikit-learn's LinearSVC sets
        theta, at most once in a fit.

        Args:
          examples: labels -1 and 1.
          gradient_tolerance: the fit stops at a `gradient_norm` of this value or less.
          max_iterations: largest number of rounds of the dual, or of Newton steps.

        Returns: self. Warns with ConvergenceWarning if the final norm is above the tolerance.
        Raises: ValueError for labels other than -1 and 1. If LinearSVC is called: ValueError for
          labels that are all the same, TypeError for a Stream.
        """
        if self.t > 0:
            super().fit(
                examples, gradient_tolerance=gradient_tolerance, max_iterations=max_iterations
            )
            return self
        examples = self.given(examples, "examples")
        self.validate(examples, "examples")
        a, near = self._at_bounds(examples)
        best, theta, stale, is_near = np.inf, self.theta, 0, False
        for _ in range(max_iterations):
            a = self._solved_for(examples, near, a)
            self.theta = self._weights(examples, a)
            u = self._shortfalls(examples)
            slack = np.maximum(u, 0) - a * u  # all terms of the gap, because w = w(a)
            norm = self._norm_of(slack.mean())
            stale += 1
            if norm < best:
                best, theta, stale = norm, self.theta, 0
            if best <= gradient_tolerance or stale == _STALE:
                break
            near = (slack > 0) | ((a > 0) & (a < 1))
            if near.sum() > min(_FEW, self.num_parameters) and not is_near:
                self._liblinear(examples)
                a, near = self._at_bounds(examples)
                is_near = True
        self.theta = theta
        if best > gradient_tolerance:
            warn_unconverged(
                f"the SVM's dual stopped at a duality gap worth a gradient norm of {best:.1e}, "
                f"above {gradient_tolerance:.1e}: use float64, more iterations or a larger "
                "tolerance."
            )
        return self

    def gradient_norm(self, examples: Examples, batch_size: int | None = None) -> float:
        """Return the risk's gradient norm; at t = 0, return sqrt(2 lambda gap) in its place."""
        if self.t > 0:
            return super().gradient_norm(examples, batch_size)
        return self._norm_of(self.duality_gap(examples))

    def duality_gap(self, examples: Examples) -> float:
        """Compute the duality gap of the hinge, an upper bound on R(theta) - R(w*).

        The dual variables are 0 or 1 for rows away from the kink, and optimal for rows near the
        kink. The bound is valid for any dual variables and any theta.

        Args:
          examples: the training set.

        Returns: the gap, in the unit of the loss.
        Raises: ValueError at t > 0; `gradient_norm` then needs no dual.
        """
        if self.t > 0:
            raise ValueError(f"t must be 0 for a duality gap, got {self.t}; use gradient_norm.")
        a, near = self._at_bounds(examples)
        a = self._solved_for(examples, near, a)
        u = self._shortfalls(examples)
        apart = self.theta - self._weights(examples, a)
        gap = (np.maximum(u, 0) - a * u).mean() + self.weight_decay / 2 * (apart @ apart)
        return float(gap)

    def _norm_of(self, gap: float) -> float:
        """Return g = sqrt(2 lambda gap). As for a gradient norm, g / lambda bounds |w - w*|."""
        return float(np.sqrt(2 * self.weight_decay * gap))

    def _at_bounds(self, examples: Examples) -> tuple[NDArray, NDArray]:
        """Return (a, near). a is 1 if u > 0 at theta, else 0. near is True for rows at the kink."""
        u = self._shortfalls(examples)
        return (u > 0).astype(float), np.abs(u) <= _NEAR_KINK

    def _solved_for(self, examples: Examples, near: NDArray, a: NDArray) -> NDArray:
        """Maximise D over the a_i of the rows `near`. Return all dual variables.

        This minimises a'AA'a / 2 - b'a over 0 <= a_i <= 1. Row i of A is y_i x_i, and
        b = n lambda (1 - A w), where w is w(a) with a_i = 0 for the rows `near`.
        """
        rows = np.flatnonzero(near)
        if not len(rows):
            return a
        chosen = examples.take(rows)
        A = self.design.with_one(self.design.dense(chosen.x)) * chosen.y.reshape(-1, 1)
        others = np.where(near, 0, a)
        b = len(a) * self.weight_decay * (1 - A @ self._weights(examples, others))
        others[rows] = boxed_minimum(A @ A.T, b, a[rows])
        return others

    def _weights(self, examples: Examples, a: NDArray) -> NDArray:
        """Compute w(a), (d,): sum the rows with a = 1 in one pass, then the few with 0 < a < 1."""
        total = np.zeros((self.num_parameters, 1), self.dtype)
        ones = np.flatnonzero(a == 1)
        if len(ones):
            total = sum(examples.map_over(_signed_sum, self, rows=ones), total)
        inside = np.flatnonzero((a > 0) & (a < 1))
        if len(inside):
            chosen = examples.take(inside)
            E = (a[inside] * chosen.y.reshape(-1)).astype(self.dtype)[:, None, None]
            total = total + self.design.transposed_times(chosen.x, E)
        return total[:, 0] / (len(a) * self.weight_decay)

    def _shortfalls(self, examples: Examples) -> NDArray:
        """Compute u = 1 - y z of all rows, (n,)."""
        return examples.each_row(_shortfall, self)

    def _liblinear(self, examples: Examples) -> None:
        """Set theta by LinearSVC, which need not converge: `fit` then improves theta."""
        from sklearn.exceptions import ConvergenceWarning  # this import takes seconds
        from sklearn.svm import LinearSVC

        labels = examples.y.reshape(-1)
        if (labels == labels[0]).all():
            raise ValueError(f"examples.y must hold both -1 and 1, got only {labels[0]}.")
        svm = LinearSVC(
            loss="hinge",
            C=1 / (len(examples) * self.weight_decay),  # LinearSVC sums losses
            tol=1e-6,
            max_iter=10_000,
            fit_intercept=self.intercept,  # which LinearSVC penalises, as here
            random_state=0,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            svm.fit(examples.x, labels)
        self.theta = np.append(svm.coef_[0], svm.intercept_ if self.intercept else [])


def _signed_sum(net: Any, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
    """Sum y_i x_i over a batch, (d, 1)."""
    return net.design.transposed_times(x, y.reshape(-1, 1, 1).astype(net.dtype))


def _shortfall(net: Any, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
    """Compute u = 1 - y z of a batch, (b,)."""
    net = net.at(theta)
    return net.link.shortfall(net.design.times(x, net.theta), y)[:, 0, 0]


def _signs(Z: NDArray, y: NDArray) -> NDArray:
    return y.reshape(-1, *[1] * (Z.ndim - 1)).astype(Z.dtype)


def _kink_width(dtype: Any) -> float:
    return float(np.sqrt(np.finfo(dtype).eps))
