"""Losses that return one number per example, made from any form of a Keras loss.

The loss of row i is w_i loss_i, as in Keras' `fit` and `evaluate`. w_i is the row's sample weight
times the loss weight of `compile`. A weight that is not given is 1. Keras divides the sum over a
batch by the number of rows, and not by the sum of the weights. So the risk is
mean_i w_i loss_i + penalty.

If the model masks its output, or the loss has an `ignore_class`, only v_i positions of row i are
valid. Keras then divides the sum over a batch by the batch's number of valid positions. So the risk
is

    sum_i v_i w_i loss_i / sum_i v_i + penalty

loss_i is the mean over the valid positions of row i, or 0 if it has none. The sums are over the
whole set, as in `model.evaluate` with all rows in one batch. With smaller batches, Keras averages
one ratio per batch. Its result then depends on how the rows are divided into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import keras
import numpy as np
import tensorflow as tf

from influence.examples import labels as packing
from influence.net import measurements, tape
from influence.net.ctc import ctc_loss
from influence.net.heads import activated, peeled
from influence.net.rowwise import (
    as_keras_calls,
    labels_of,
    of_callable,
    of_rows,
    one_by_one,
    weight_of,
)

# These losses take class numbers. If a label is not the number of a class, Keras returns NaN or the
# loss of another class.
_CLASS_NUMBERS = (keras.losses.sparse_categorical_crossentropy,)
# These losses take labels in [0, 1].
_PROBABILITIES = (keras.losses.binary_crossentropy, keras.losses.binary_focal_crossentropy)
# These losses are convex in the model's output. For cross-entropies, the output must be logits.
_CONVEX = (
    *_CLASS_NUMBERS,
    keras.losses.binary_crossentropy,
    keras.losses.categorical_crossentropy,
    keras.losses.mean_squared_error,
    keras.losses.mean_absolute_error,
    keras.losses.huber,
    keras.losses.log_cosh,
    keras.losses.hinge,
    keras.losses.squared_hinge,
)
_CROSS_ENTROPIES = (
    *_CLASS_NUMBERS,
    keras.losses.binary_crossentropy,
    keras.losses.categorical_crossentropy,
)
_SOFTMAX = (*_CLASS_NUMBERS, keras.losses.categorical_crossentropy)
# A loss object with other options than these is not `plain`. Nor is one whose `axis` or
# `ignore_class` has not its default value.
_HARMLESS = {"from_logits", "label_smoothing", "axis", "ignore_class"}
_OTHERS = {"measurement": " or a function such as influence.measurements.margin or logit(label)"}
# These losses take probabilities unless they have from_logits=True.
_FROM_LOGITS = (
    *_CLASS_NUMBERS,
    *_PROBABILITIES,
    keras.losses.categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.kl_divergence,  # for one-hot labels, this is a cross-entropy
)


@dataclass(frozen=True)
class PerExampleLoss:
    """Differentiable loss function (y, z) -> (n,), and its known properties.

    y contains the labels of n rows. `seen` computes z from the model's output. If the loss takes
    probabilities, and the output ends in a softmax or sigmoid, z is the logits before this
    activation. Otherwise, z is the output itself.

    A cross-entropy is computed from the logits z without clipping, as Keras does. The other losses
    of probabilities are focal losses, Kullback-Leibler, and cross-entropies with `ignore_class`.
    They are computed from the softmax or sigmoid of z, which Keras' functions clip at 1e-7.

    For a float64 model, Keras' value of a cross-entropy may differ. Keras rounds the outputs to the
    dtype of its loss, which is float32 unless the loss has `dtype="float64"`. After the rounding,
    Keras does not recognise the activation, and clips the probabilities at 1e-7. For probabilities
    above 1e-7, Keras' value and the value of this class agree up to rounding.

    Attributes:
      name: the name of the loss in messages.
      function: the function (y, z) -> (n,) tensor. It multiplies by sample weights in y.
      keras_function: the underlying Keras loss function, or None for a user's callable.
      from_logits: False for a loss that takes z as probabilities, else True. The Gauss-Newton
        matrix is computed only if it is True.
      labels: the valid labels, from the loss's attribute `labels`. None means no restriction.
      role: the name of the argument in messages, "loss" or "measurement".
      says_convex: the value of the loss's attribute `convex`, or False without this attribute.
      plain: True for a Keras loss without options that weigh or ignore outputs.
      head: "softmax" or "sigmoid" if z is the logits before this activation, else None.
      scale: the loss weight of `compile`.
      output: the name of the output in the labels, or None for a model with one output.
      ignored: the class that the loss ignores, or None. It ignores all positions of this class.
      masked: True if the model masks its output.
      by_position: True if `function` can weigh the positions of a row, such as its time steps. A
        mask or an ignored class requires this.
      weighs_mean: True if Keras divides by the sum of the sample weights, not the number of rows.
      compiled: True if the model was compiled with this loss.
      whole: the Keras loss object if it overrides `__call__`, else None. Such a loss may combine
        the rows of a batch in any way.
    """

    name: str
    function: Callable[[Any, Any], Any]
    keras_function: Any = None
    from_logits: bool = True
    labels: tuple | None = None
    role: str = "loss"
    says_convex: bool = False
    plain: bool = False
    head: str | None = None
    scale: float = 1.0
    output: str | None = None
    ignored: Any = None
    masked: bool = False
    by_position: bool = False
    weighs_mean: bool = False
    compiled: bool = False
    whole: Any = None

    # False if z contains several outputs or added losses.
    takes_one_output: ClassVar[bool] = True

    def seen(self, raw: Any, added: Any = None) -> Any:
        """Return z from the model's output `raw`. Only SeveralLosses uses `added`."""
        return raw if self.head is None else peeled(raw)

    def shapes(self, raw: Any) -> Any:
        """Return the shape of the model's output, for the argument of `check_labels`."""
        return tuple(raw.shape) if hasattr(raw, "shape") else None

    def heads(self, z: Any, raw: Any) -> list[tuple[str, Any, Any]]:
        """Return (activation, logits, output) for each output that ends in an activation."""
        return [] if self.head is None else [(self.head, z, raw)]

    @property
    def has_masses(self) -> bool:
        """True if the risk weighs rows by their numbers of valid positions."""
        return self.by_position and (self.masked or self.ignored is not None)

    @property
    def convex(self) -> bool:
        """True if the loss of each row is known to be convex in the model's output."""
        clipped = self.head is not None and not self.plain
        known = self.keras_function in _CONVEX and self.from_logits and not clipped
        return self.scale >= 0 and (self.says_convex or known)

    def curved(self, y: Any, z: Any) -> Callable[[Any], Any]:
        """Return the map u -> H u.

        H is the Hessian of the sum of the losses with respect to z. For a cross-entropy of logits
        z, let p be the predicted probabilities. For the softmax,
        (H u)_a = sum_b p_a p_b (u_a - u_b). For the sigmoid, H u = p (1 - p) u. If Keras averages
        several values in a row, H u is divided by their number.

        A gradient tape subtracts p_a p_a from p_a for the softmax, and p from 1 for the sigmoid. If
        a probability is nearly 1, this difference loses all digits in float32. Two changes avoid
        it. For the softmax, u is replaced by u minus its entry at the most probable class. This
        does not change H u, because H times a constant vector is zero. For the sigmoid, 1 - p is
        computed as the sigmoid of -z.

        Args:
          y: labels.
          z: (n, ...) outputs, as `seen` returns them.
        """
        by_tape = tape.hessian_map(lambda z: tf.reduce_sum(self.function(y, z)), z)
        if not (self.from_logits and self.plain):
            return by_tape
        if self.keras_function is keras.losses.binary_crossentropy:
            # Keras averages over the outputs of a position, and then over a row's positions.
            positions = packing.positions(y)
            weights = tf.sigmoid(z) * tf.sigmoid(-z)
            if positions is None:
                weights /= tf.cast(tf.size(z) // tf.shape(z)[0], z.dtype)
            else:
                weights *= tf.expand_dims(positions, -1) / tf.cast(tf.shape(z)[-1], z.dtype)
            for factor in self._factors(y, z.dtype):
                weights *= tf.reshape(factor, [-1] + [1] * (len(z.shape) - 1))
            return lambda u: weights * u
        if self.keras_function in _SOFTMAX:
            likeliest = tf.one_hot(tf.argmax(z, axis=-1), tf.shape(z)[-1], dtype=z.dtype)
            return lambda u: by_tape(u - tf.reduce_sum(u * likeliest, axis=-1, keepdims=True))
        return by_tape

    def _factors(self, y: Any, dtype: Any) -> list[Any]:
        """Return the factors of the losses: the sample weights, and the loss weight if not 1."""
        weight = weight_of(y, self.output) if self.role != "measurement" else None
        found = [] if weight is None else [tf.cast(weight, dtype)]
        return found if self.scale == 1 else [*found, tf.constant(self.scale, dtype)]

    def scaled(self, weight: float, output: str | None = None) -> PerExampleLoss:
        """Return this loss times a loss weight, for the labels of the output named `output`."""
        function: Any = self.function
        function = replace(function, scale=weight, output=output)
        return replace(self, function=function, scale=weight, output=output)

    def check_labels(self, y: np.ndarray, output_shape: tuple, name: str) -> None:
        """Refuse labels and weights that are not valid for this loss.

        Args:
          y: the labels of all rows, plain or packed with weights.
          output_shape: the shape of the model's output, (n, ...).
          name: the name of the examples in the message.

        Raises: ValueError naming `name` and a wrong label.
        """
        if self.weighs_mean and weight_of(y, self.output) is not None:
            raise ValueError(
                f"{name}.sample_weight must not change what the risk is divided by, got "
                f"{self.name!r} with reduction='mean_with_sample_weight'; use "
                "reduction='sum_over_batch_size', by which Keras divides by the number of rows."
            )
        y, called = labels_of(y, self.output, several=self.role == "measurement"), f"{name}.y"
        if isinstance(y, Mapping):  # y is that of a measurement, which accepts any labels
            return
        called += "" if self.output is None else f"[{self.output!r}]"
        if self.labels is not None:
            wrong = ~np.isin(y, self.labels)
            if wrong.any():
                row = np.argwhere(wrong)[0][0]
                what = " or ".join(map(str, self.labels))
                raise ValueError(f"{called} must hold labels {what}, got {y[row]} in row {row}.")
        void = np.zeros(y.shape, bool) if self.ignored is None else y == self.ignored
        if void.any() and not self.by_position:
            raise ValueError(
                f"{called} must hold no class that the loss ignores, got {self.ignored} in row "
                f"{np.argwhere(void)[0][0]}: the library counts valid labels only for one output "
                "without add_loss, whose loss has reduction='sum_over_batch_size'; leave out such "
                "rows."
            )
        if self.keras_function in _CLASS_NUMBERS:
            num_classes = output_shape[-1]
            if y.dtype.kind not in "iub" and (y != np.round(y)).any():
                raise ValueError(f"{called} must hold class numbers, got {y[y != np.round(y)][0]}.")
            low, high, what = 0, num_classes - 1, f"class numbers 0 to {num_classes - 1}"
        elif self.keras_function in _PROBABILITIES:
            low, high, what = 0, 1, "labels in [0, 1]"
        else:
            return
        outside = ((y < low) | (y > high)) & ~void
        if outside.any():
            row = np.argwhere(outside)[0][0]
            raise ValueError(f"{called} must hold {what}, got {y[row]} in row {row}.")

    def check_one_each(self, shape: tuple, y_shape: tuple, output_shape: tuple, name: str) -> None:
        """Refuse a loss that does not give one number per example.

        Args:
          shape: the shape of the losses of n examples.
          y_shape: the shape of the labels of these examples.
          output_shape: the shape of the model's outputs for these examples.
          name: the name of the examples in the message.

        Raises: ValueError with a remedy if the losses do not have shape (n,).
        """
        n = y_shape[0]
        if shape == (n,):
            return
        remedy = "leave out the mean or sum over examples"
        if len(shape) > 1 and shape[0] == n:
            axis = -1 if len(shape) == 2 else list(range(1, len(shape)))
            remedy = f"take the mean for each example, tf.reduce_mean(..., axis={axis})"
            if len(y_shape) == 1 and tuple(output_shape[1:]) == (1,) and shape == (n, n):
                remedy = (
                    f"labels of shape {y_shape} broadcast against outputs of shape {output_shape}; "
                    f"use y[:, None], and {remedy}"
                )
        raise ValueError(
            f"{self.role} must give one number per example, got shape {shape} from {self.name!r} "
            f"for {n} examples of {name}; {remedy}."
        )

    def is_differentiable(self, y: Any, z: Any) -> bool:
        """Return True if TensorFlow can differentiate the loss with respect to z."""
        with tf.GradientTape() as tape:
            tape.watch(z)
            values = self.function(y, z)
        return tape.gradient(values, z) is not None

    def check_logits(self, what: str = "a Gauss-Newton matrix") -> None:
        """Refuse a cross-entropy of probabilities, because `what` needs logits.

        Raises: ValueError naming `what`.
        """
        if not self.from_logits:
            raise ValueError(
                f"loss must take logits for {what}, got {self.name!r} of "
                "probabilities; end the model in a softmax or sigmoid layer, whose logits are then "
                "known, or in the logits themselves, with from_logits=True in the loss."
            )


def per_example(
    loss: Any,
    model: Any,
    *,
    role: str = "loss",
    ends_in: str | None = None,
    as_compiled: bool = False,
) -> PerExampleLoss:
    """Convert a loss, or the model's compiled loss, to a PerExampleLoss.

    Args:
      loss: a Keras loss, its name, a callable (y, output) -> (n,), or None for the compiled loss.
      model: the model whose compiled loss is used if `loss` is None.
      role: the name of the argument in messages, "loss" or "measurement".
      ends_in: the name of the output's final activation, from `heads.ending`, or None.
      as_compiled: True to call a function in the way in which Keras calls a compiled function.
        Labels then get the dtype and the rank of the outputs.

    Raises: ValueError for a missing loss, an unknown name, or a loss that sums over examples.
      TypeError for an object that is not a loss.
    """
    if loss is None:
        loss, as_compiled = _compiled(model), True
        if loss is None:
            raise ValueError(
                "loss must be given for a model that is not compiled with one, got None; "
                "pass for example loss='sparse_categorical_crossentropy'."
            )
    if isinstance(loss, str):
        try:
            loss = keras.losses.get(loss)
        except ValueError as error:
            raise ValueError(
                f"{role} must be the name of a Keras loss{_OTHERS.get(role, '')}, got {loss!r}."
            ) from error
    if loss is measurements.logit:
        raise TypeError(f"{role} must be logit(label) of a class number, got logit itself.")
    if isinstance(loss, keras.losses.Loss):
        return _of_class(loss, role, ends_in)
    if not callable(loss) or isinstance(loss, type):
        got = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
        raise TypeError(
            f"{role} must be a Keras loss, its name or a callable (y, output) -> (n,), got {got}."
        )
    name = getattr(loss, "__name__", type(loss).__name__)
    if _is_keras_own(loss):
        head, logits = _head(loss, {}, ends_in)
        function = ctc_loss if loss is keras.losses.ctc else partial(of_rows, loss, True, True)
        # The loss is plain: unlike a loss object, a function is called with its default options.
        facts = {"role": role, "head": head, "plain": True}
        return _weighed(PerExampleLoss(name, function, loss, logits, **facts), True)
    takes_logits = getattr(loss, "takes_logits", False)
    function = partial(as_keras_calls if as_compiled else of_callable, loss)
    found = PerExampleLoss(name, function, role=role, head=ends_in if takes_logits else None)
    return _weighed(found, not takes_logits)


def _of_class(loss: keras.losses.Loss, role: str, ends_in: str | None) -> PerExampleLoss:
    if loss.reduction == "sum":
        raise ValueError(
            f"{role} must not be reduced by a sum, got {loss.name!r} with reduction='sum': the "
            "risk is a mean over examples; use reduction='none' or 'sum_over_batch_size'."
        )
    function = getattr(loss, "fn", None)
    kwargs = getattr(loss, "_fn_kwargs", {})
    own, keeps_labels = _is_keras_own(type(loss)), function in _CLASS_NUMBERS
    head, logits = _head(function, kwargs, ends_in)
    overrides = type(loss).__call__ is not keras.losses.Loss.__call__
    if function is keras.losses.ctc:
        call = ctc_loss
    elif overrides:
        call = partial(one_by_one, loss)
    else:
        call = partial(of_rows, loss.call, own, keeps_labels)
    found = PerExampleLoss(
        loss.name or type(loss).__name__,
        call,
        function,
        logits,
        getattr(loss, "labels", None),
        role,
        bool(getattr(loss, "convex", False)),
        own
        and kwargs.keys() <= _HARMLESS
        and kwargs.get("axis", -1) == -1
        and kwargs.get("ignore_class") is None,
        head,
        ignored=kwargs.get("ignore_class"),
        weighs_mean=loss.reduction == "mean_with_sample_weight",
        whole=loss if overrides else None,
    )
    found = _weighed(found, True)
    return replace(found, by_position=found.by_position and loss.reduction not in (None, "none"))


def _head(function: Any, kwargs: Mapping, ends_in: str | None) -> tuple[str | None, bool]:
    """Return the attributes (head, from_logits) that PerExampleLoss has for a Keras loss function.

    `kwargs` are the loss's options. `ends_in` is the final activation of the model's output, or
    None. There are four cases:

    - A loss that never takes probabilities: (None, True).
    - No final activation: (None, o), where o is the loss's option `from_logits`.
    - A final activation, and a cross-entropy without `ignore_class`: (ends_in, True). Keras uses
      the logits before the activation, and ignores o.
    - A final activation, and another loss: (ends_in, True) if o is False. If o is True, Keras
      takes the output itself as logits, so the result is (None, True).
    """
    says = function not in _FROM_LOGITS or bool(kwargs.get("from_logits", False))
    if ends_in is None or function not in _FROM_LOGITS:
        return None, says
    round_it = function in _CROSS_ENTROPIES and kwargs.get("ignore_class") is None
    return (ends_in, True) if round_it or not says else (None, True)


def _weighed(loss: PerExampleLoss, activate: bool) -> PerExampleLoss:
    """Return the same loss, but times the sample weights in y.

    If `activate` is True, the loss first applies its activation `head` to z.
    """
    head = loss.head if activate else None
    by_position = getattr(loss.function, "func", None) in (of_rows, as_keras_calls)
    weighs = loss.role != "measurement"
    function = _Weighed(loss.function, head, None, weighs, by_position=by_position)
    return replace(loss, function=function, by_position=by_position)


@dataclass(frozen=True)
class _Weighed:
    """Loss (y, z) -> (n,) that multiplies another loss by weights. y may contain sample weights.

    Attributes:
      call: the other loss (labels, output) -> (n,), without weights.
      head: the activation that is applied to z to get the output, or None.
      output: the name of the output in the labels, or None.
      weighs: True to multiply by the sample weights in y.
      scale: the loss weight.
      by_position: True if `call` also takes the weights of positions.
    """

    call: Callable[..., Any]
    head: str | None
    output: str | None
    weighs: bool
    scale: float = 1.0
    by_position: bool = False

    def __call__(self, y: Any, z: Any) -> Any:
        if self.head is not None and len(z.shape) == 1:
            # Outputs (n,) get a last axis here, before the activation. `of_rows` would add it after
            # the activation, and Keras would then not recognise the activation.
            z = tf.expand_dims(z, -1)
        labels = labels_of(y, self.output, several=not self.weighs)
        positions = packing.positions(y) if self.by_position else None
        more = () if positions is None else (positions,)
        values = self.call(labels, activated(self.head, z), *more)
        weight = weight_of(y, self.output) if self.weighs else None
        if weight is not None:
            values *= tf.cast(weight, values.dtype)
        return values if self.scale == 1 else values * tf.constant(self.scale, values.dtype)


def _compiled(model: Any) -> Any:
    """Return the compiled loss of a model. From a list or dict of one loss, return this loss.

    Raises: ValueError for a list or dict with another number of entries.
    """
    loss = getattr(model, "loss", None)
    if not isinstance(loss, list | tuple | Mapping):
        return loss
    entries = list(loss.values()) if isinstance(loss, Mapping) else list(loss)
    if len(entries) != 1:
        kind = "dict" if isinstance(loss, Mapping) else "list"
        raise ValueError(
            "loss must be given for a model that is not compiled with a single one, got a "
            f"{kind} of {len(entries)} compiled; pass loss=."
        )
    return entries[0]


def _is_keras_own(thing: Any) -> bool:
    return getattr(thing, "__module__", "").split(".")[0] == "keras"
