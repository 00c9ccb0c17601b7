"""Losses that return one number per example, made from any form of a Keras loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from influence.net import measurements, tape

# These losses take class numbers. For a wrong number, Keras returns NaN or another class's loss.
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
_SOFTMAX = (*_CLASS_NUMBERS, keras.losses.categorical_crossentropy)
# A loss with these options can be `plain`. Its axis and ignore_class must have default values.
_HARMLESS = {"from_logits", "label_smoothing", "axis", "ignore_class"}
_OTHERS = {"measurement": " or a function such as influence.measurements.margin or logit(label)"}
# These losses take probabilities unless they have from_logits=True.
_FROM_LOGITS = (
    *_CLASS_NUMBERS,
    *_PROBABILITIES,
    keras.losses.categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.kl_divergence,  # a cross-entropy for one-hot labels
)


@dataclass(frozen=True)
class PerExampleLoss:
    """Differentiable loss function (y, output) -> (n,), and its known properties.

    Attributes:
      name: the name of the loss in messages.
      function: the function (y, output) -> (n,) tensor.
      keras_function: the underlying Keras loss function, or None for a user's callable.
      from_logits: False for a cross-entropy of probabilities, True for all other losses. The
        Gauss-Newton matrix needs True.
      labels: the valid labels, from the loss's attribute `labels`. None means no restriction.
      role: the name of the argument in messages.
      says_convex: the value of the loss's attribute `convex`, or False without this attribute.
      plain: True for a Keras loss without options that weigh or ignore outputs.
    """

    name: str
    function: Callable[[Any, Any], Any]
    keras_function: Any = None
    from_logits: bool = True
    labels: tuple | None = None
    role: str = "loss"
    says_convex: bool = False
    plain: bool = False

    @property
    def convex(self) -> bool:
        """True if each loss is known to be convex in the model's output."""
        return self.says_convex or (self.keras_function in _CONVEX and self.from_logits)

    def curved(self, y: Any, z: Any) -> Callable[[Any], Any]:
        """Return the map u -> H u.

        H is the Hessian of the sum of the losses with respect to the outputs z. Let p be the
        predicted probabilities. For softmax, (H u)_a = sum_b p_a p_b (u_a - u_b). For the sigmoid,
        H u = p (1 - p) u. Both products are divided by the number of values that Keras averages in
        a row. If p is nearly 1, the tape's differences p_a - p_a p_a and 1 - p lose all digits in
        float32. Two measures keep the digits. For softmax, subtract from u its entry at the
        likeliest class. This does not change H u, because H times a constant vector is zero. For
        the sigmoid, compute 1 - p from the logits.

        Args:
          y: labels.
          z: (n, ...) outputs.
        """
        by_tape = tape.hessian_map(lambda z: tf.reduce_sum(self.function(y, z)), z)
        if not (self.from_logits and self.plain):
            return by_tape
        if self.keras_function is keras.losses.binary_crossentropy:
            outputs = tf.cast(tf.size(z) // tf.shape(z)[0], z.dtype)
            # The weights are divided by `outputs`, because Keras averages the loss over a row's
            # outputs.
            weights = tf.sigmoid(z) * tf.sigmoid(-z) / outputs
            return lambda u: weights * u
        if self.keras_function in _SOFTMAX:
            likeliest = tf.one_hot(tf.argmax(z, axis=-1), tf.shape(z)[-1], dtype=z.dtype)
            return lambda u: by_tape(u - tf.reduce_sum(u * likeliest, axis=-1, keepdims=True))
        return by_tape

    def check_labels(self, y: np.ndarray, output_shape: tuple, name: str) -> None:
        """Refuse labels that are not valid for this loss.

        Raises: ValueError naming `name` and a wrong label.
        """
        if self.labels is not None:
            wrong = ~np.isin(y, self.labels)
            if wrong.any():
                row = np.argwhere(wrong)[0][0]
                what = " or ".join(map(str, self.labels))
                raise ValueError(f"{name}.y must hold labels {what}, got {y[row]} in row {row}.")
        if self.keras_function in _CLASS_NUMBERS:
            num_classes = output_shape[-1]
            if y.dtype.kind not in "iub" and (y != np.round(y)).any():
                raise ValueError(f"{name}.y must hold class numbers, got {y[y != np.round(y)][0]}.")
            low, high, what = 0, num_classes - 1, f"class numbers 0 to {num_classes - 1}"
        elif self.keras_function in _PROBABILITIES:
            low, high, what = 0, 1, "labels in [0, 1]"
        else:
            return
        outside = (y < low) | (y > high)
        if outside.any():
            row = np.argwhere(outside)[0][0]
            raise ValueError(f"{name}.y must hold {what}, got {y[row]} in row {row}.")

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

    def is_differentiable(self, y: Any, output: Any) -> bool:
        """Return True if TensorFlow can differentiate the loss with respect to the output."""
        output = tf.identity(output)  # otherwise Keras uses the logits before a softmax
        with tf.GradientTape() as tape:
            tape.watch(output)
            values = self.function(y, output)
        return tape.gradient(values, output) is not None

    def check_logits(self, what: str = "a Gauss-Newton matrix") -> None:
        """Refuse a cross-entropy of probabilities, because `what` needs logits.

        Raises: ValueError naming `what`.
        """
        if not self.from_logits:
            raise ValueError(
                f"loss must take logits for {what}, got {self.name!r} of "
                "probabilities; drop the model's last softmax or sigmoid, as by model.layers[-1]."
                "activation = keras.activations.linear, and give the loss from_logits=True."
            )


def per_example(loss: Any, model: keras.Model, *, role: str = "loss") -> PerExampleLoss:
    """Return the given loss or the model's compiled loss, without a reduction over examples.

    Args:
      loss: a Keras loss, its name, a callable (y, output) -> (n,), or None for the compiled loss.
      model: the model whose compiled loss is used if `loss` is None.
      role: the name of the argument in messages.

    Raises: ValueError for a missing loss, an unknown name or a reduction by a sum. TypeError for an
      object that is not a loss.
    """
    if loss is None:
        loss = _compiled(model)
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
        if loss.reduction == "sum":
            raise ValueError(
                f"{role} must not be reduced by a sum, got {loss.name!r} with reduction='sum': the "
                "risk is a mean over examples; use reduction='none' or 'sum_over_batch_size'."
            )
        function = getattr(loss, "fn", None)
        kwargs = getattr(loss, "_fn_kwargs", {})
        own, keeps_labels = _is_keras_own(type(loss)), function in _CLASS_NUMBERS
        return PerExampleLoss(
            loss.name or type(loss).__name__,
            partial(_of_rows, loss.call, own, keeps_labels),
            function,
            function not in _FROM_LOGITS or bool(kwargs.get("from_logits", False)),
            getattr(loss, "labels", None),
            role,
            bool(getattr(loss, "convex", False)),
            own
            and kwargs.keys() <= _HARMLESS
            and kwargs.get("axis", -1) == -1
            and kwargs.get("ignore_class") is None,
        )
    if not callable(loss) or isinstance(loss, type):
        got = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
        raise TypeError(
            f"{role} must be a Keras loss, its name or a callable (y, output) -> (n,), got {got}."
        )
    name = getattr(loss, "__name__", type(loss).__name__)
    if _is_keras_own(loss):
        function = partial(_of_rows, loss, True, True)
        return PerExampleLoss(name, function, loss, loss not in _FROM_LOGITS, role=role)
    return PerExampleLoss(name, loss, role=role)


def _compiled(model: keras.Model) -> Any:
    """Return the compiled loss of a model. The loss may be in a list or dict with one entry.

    Raises: ValueError if the list or dict does not have one entry.
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


def _of_rows(call: Callable, own: bool, keeps_labels: bool, y: Any, output: Any) -> Any:
    """Return the value of a Keras loss for each row, (n,).

    Args:
      call: the loss as a function of labels and outputs.
      own: True for Keras' own losses. They average over the last axis, so they would average
        outputs (n,) over the examples. Some broadcast labels (n,) and outputs (n, 1) to (n, n).
        Outputs and labels (n,) therefore get a second axis.
      keeps_labels: True if labels stay unchanged. If it is False, labels are converted to the
        dtype of the outputs.
      y: the labels.
      output: the model's outputs.
    """
    if not keeps_labels:
        y = tf.cast(y, output.dtype)
    if own and len(output.shape) == 1:
        output = tf.expand_dims(output, -1)
    if own and len(output.shape) == len(y.shape) + 1 and output.shape[-1] == 1:
        y = tf.expand_dims(y, -1)
    return _mean_over_rest(call(y, output))


def _mean_over_rest(values: Any) -> Any:
    """Average the losses of each example over its time steps or pixels."""
    rank = len(values.shape)
    return values if rank <= 1 else tf.reduce_mean(values, axis=list(range(1, rank)))
