"""Logistic regression on a frozen network's features: the paper's "Inception" (figures 4 and 5).

The network's trunk turns an image x into a feature map, whose mean over its places is phi(x), (f,).
theta = w is the head alone, and with a mean m and a scale s given beforehand

    z = w . (phi(x) - m) / s

m and s are folded into the head: of phi itself its weights are w / s and its intercept is
- w . m / s. It is w that lambda/2 |w|^2 penalises. Without m and s it is the paper's model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import keras
import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.examples.examples import Examples, check_differentiable
from influence.models.logistic import BinaryLogisticRegression as Head
from influence.models.trunk import Trunk, scaled

__all__ = ["TopLayer", "cut", "scaled"]

_PROBE_ROWS = 3
_IMAGE_RANK = 3  # (h, w, c) and, before it, rows; features are (f,)
_ROWS = 256  # of images read at a time
_F = TypeVar("_F", bound=Callable)


def cut(model: keras.Model, layer_name: str) -> keras.Model:
    """The part of a model from its input to the output of one layer, the weights shared.

    Args:
      model: functional or sequential.
      layer_name: where to end: `mixed10` of InceptionV3, `conv_pw_13_relu` of MobileNet.

    Returns: a model with that output.
    Raises: ValueError if there is no such layer.
    """
    names = [layer.name for layer in model.layers]
    if layer_name not in names:
        last = ", ".join(map(repr, names[-8:]))
        raise ValueError(
            f"layer_name must be a layer of {model.name!r}, whose last are {last}, got "
            f"{layer_name!r}."
        )
    inputs = model.inputs[0] if len(model.inputs) == 1 else model.inputs
    return keras.Model(inputs, model.get_layer(layer_name).output, name=layer_name)


def _of_features(question: _F) -> _F:
    """The same question of a batch, put to the features of images where it comes with images."""

    @wraps(question)
    def asked(self, x, *args, **kwargs):
        return question(self, self.features(x), *args, **kwargs)

    return asked  # pyright: ignore[reportReturnType]


def _of_all_features(question: _F) -> _F:
    """The same question of examples, whose images go through the trunk once."""

    @wraps(question)
    def asked(self, examples, *args, **kwargs):
        return question(self, self.featured(examples), *args, **kwargs)

    return asked  # pyright: ignore[reportReturnType]


class TopLayer(Head):
    """Binary logistic regression on the pooled features of a frozen trunk.

    The logit is z = theta . (phi(x) - mean) / scale, phi(x) the mean of the trunk's feature map
    over its places.

    Every question takes images (n, h, w, c) or, in their place, what `features` made of them,
    (n, f). Each asks the trunk anew, so whoever asks often computes the features once.

    Args:
      trunk: Keras model from an image in [-1, 1] to a feature map (h', w', f) or a vector (f,);
        `cut` makes one. It runs in inference mode and in its own precision, float32 as a rule; the
        head is float64. Networks that take other inputs need a layer for that in front.
      weight_decay: lambda of lambda/2 |w|^2.
      mean: (f,) m, such as the mean of the training set's pooled features; None for none.
      scale: (f,) s, such as their deviation, positive; None for none.

    Attributes:
      trunk: as given.

    Raises: TypeError or ValueError naming the argument that is wrong.
    """

    def __init__(
        self,
        trunk: keras.Model,
        *,
        weight_decay: float = 0.001,
        mean: ArrayLike | None = None,
        scale: ArrayLike | None = None,
    ):
        self.trunk = trunk
        self._trunk = Trunk(trunk, self._cotangent)
        super().__init__(self._trunk.num_features, weight_decay=weight_decay)
        self._mean = self._vector(mean, "mean", 0.0)
        self._scale = self._vector(scale, "scale", 1.0)
        if not (self._scale > 0).all():
            raise ValueError(
                f"scale must be positive, got {self._scale.min():.4g} at position "
                f"{self._scale.argmin()}; put 1 where a feature never varies."
            )

    def features(self, x: Any) -> Any:
        """What the head sees of images: (phi(x) - m) / s.

        Args:
          x: (n, h, w, c) images, integers 0 to 255 or floats in [-1, 1]; or features already,
            (n, f), which come back as they are.

        Returns: (n, f) float64. On a processor images go through the trunk one by one, so that an
          image has the same features, to the last bit, whichever others come with it.
        Raises: ValueError for images of another size or range.
        """
        if getattr(x, "ndim", 0) <= _IMAGE_RANK:
            return x
        lead = x.shape[:-_IMAGE_RANK]
        images = np.reshape(x, (-1, *x.shape[-_IMAGE_RANK:]))
        self._check_shape(images, "x")
        return self._standardised(self._trunk.pooled(images)).reshape(*lead, -1)

    def featured(self, examples: Examples) -> Examples:
        """The examples with features in the place of images; as they are if they have no images."""
        if not _has_images(examples):
            return examples
        parts = [self.features(x) for x, _ in examples.batches(_ROWS)]
        return Examples(np.concatenate(parts), examples.y)

    def input_gradient(self, x: Any, y: Any, v: NDArray) -> NDArray:
        """See GenericNeuralNet.input_gradient; by images it reaches the pixels.

        J(x)' d/dphi (grad loss . v) / s, J the derivative of the trunk's pooled output: its
        vector-Jacobian product with the cotangent of LinearModel's closed form.

        Args:
          x: (n, h, w, c) floats in [-1, 1], or (n, f) features.
          y: (n,) labels.
          v: (d,) direction in parameter space.

        Returns: x's shape; of images, in the trunk's precision.
        Raises: TypeError for images as integers: `scaled` makes floats of them.
        """
        if getattr(x, "ndim", 0) <= _IMAGE_RANK:
            return super().input_gradient(x, y, v)
        check_differentiable(x)
        if np.shape(v) != (self.num_parameters,):
            raise ValueError(f"v must have shape ({self.num_parameters},), got {np.shape(v)}.")
        self._check_shape(x, "x")
        return self._trunk.pullback(x, y, v)

    def validate(self, examples: Examples, name: str) -> None:
        """See GenericNeuralNet.validate; images must be of the trunk's size."""
        if not (isinstance(examples, Examples) and _has_images(examples)):
            super().validate(examples, name)
            return
        probe = examples.take(slice(0, _PROBE_ROWS))
        self._check_shape(probe.x, f"{name}.x")
        super().validate(Examples(self.features(probe.x), probe.y), name)
        self.loss.check_labels(examples.y, (len(probe), 1), name)

    # --- every other question, of features where it comes with images -----------------------------

    outputs = _of_features(Head.outputs)
    losses = _of_features(Head.losses)
    gradient = _of_features(Head.gradient)
    loss_and_gradient = _of_features(Head.loss_and_gradient)
    gradients = _of_features(Head.gradients)
    bregman_gradient = _of_features(Head.bregman_gradient)
    hvp = _of_features(Head.hvp)
    gauss_newton_product = _of_features(Head.gauss_newton_product)

    def each_batch(self, question: Any, x: Any, y: Any, V: NDArray) -> NDArray:
        """See GenericNeuralNet.each_batch."""
        return super().each_batch(question, self.features(x), y, V)

    directional = _of_features(Head.directional)
    curvatures = _of_features(Head.curvatures)
    curvature_gradient = _of_features(Head.curvature_gradient)

    fit = _of_all_features(Head.fit)
    hessian = _of_all_features(Head.hessian)
    self_influence = _of_all_features(Head.self_influence)
    one_step_leave_one_out = _of_all_features(Head.one_step_leave_one_out)

    # --- inside -----------------------------------------------------------------------------------

    def _standardised(self, pooled: NDArray) -> NDArray:
        return (pooled - self._mean) / self._scale

    def _cotangent(self, pooled: NDArray, y: NDArray, v: NDArray) -> NDArray:
        """d/dphi (grad loss . v), (k, f)."""
        features = self._standardised(pooled.astype(np.float64))
        return super().input_gradient(features, y, v) / self._scale

    def _check_shape(self, images: Any, name: str) -> None:
        want = self._trunk.image_shape
        got = tuple(images.shape[1:])
        if any(w not in (None, g) for w, g in zip(want, got, strict=True)):
            raise ValueError(
                f"{name} must be images of shape {want} for the trunk {self.trunk.name!r}, got "
                f"{got}; resize them first."
            )

    def _vector(self, value: ArrayLike | None, name: str, default: float) -> NDArray:
        if value is None:
            return np.full(self.num_features, default)
        vector = np.array(value, np.float64)
        if vector.shape != (self.num_features,) or not np.isfinite(vector).all():
            raise ValueError(
                f"{name} must be {self.num_features} finite numbers, one a feature, got shape "
                f"{vector.shape}{'' if np.isfinite(vector).all() else ' with NaN or infinity'}."
            )
        return vector


def _has_images(examples: Examples) -> bool:
    return getattr(examples.take([0]).x, "ndim", 0) == 1 + _IMAGE_RANK
