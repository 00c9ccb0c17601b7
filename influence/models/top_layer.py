"""Logistic regression on a frozen network's features: the paper's "Inception" (figures 4 and 5).

The network's trunk turns an image x into a feature map. phi(x), (f,), is the mean of this map over
all positions. The head is the logistic regression on these features, and theta = w holds only its
weights. With a given mean m and scale s, the logit is

    z = w . (phi(x) - m) / s

As a function of phi, the head has the weights w / s and the intercept - w . m / s. The penalty is
lambda/2 |w|^2. With m = 0 and s = 1 this is the paper's model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import ArrayLike, NDArray

from influence.common.numbers import numbers
from influence.common.progress import progress
from influence.examples.examples import Examples, check_differentiable
from influence.models.logistic import BinaryLogisticRegression

# One call of the trunk gets _ON_GPU images on a GPU, and _ELSEWHERE images on a CPU. On a CPU, the
# trunk is not faster with more photographs per call. And with more than one, the last bits of an
# image's features may depend on the other images.
_ON_GPU, _ELSEWHERE = 16, 1
# Pixels as floats may lie outside [-1, 1] by this much, because of float32 rounding.
_SLACK = 1e-6
# An array of images (n, h, w, c) has this many axes. An array of features (n, f) has two.
_IMAGE_RANK = 4
# `featured` reads this many images at a time.
_ROWS = 256


def scaled(images: Any, dtype: Any = "float32") -> NDArray:
    """Scale images for a trunk: an integer k becomes k / 127.5 - 1; floats are not changed.

    Args:
      images: (..., h, w, c), integers 0 to 255 or floats in [-1, 1].
      dtype: dtype of the result.

    Returns: floats in [-1, 1], of the same shape.
    Raises: TypeError for another dtype, ValueError for numbers out of range.
    """
    images = numbers(images, "images")
    _check_range(images)
    return _floats(images, dtype)


def cut(model: keras.Model, layer_name: str) -> keras.Model:
    """Make a model that ends at a layer of another model. Both models share their weights.

    Args:
      model: a functional or sequential model.
      layer_name: the layer's name, such as `mixed10` in InceptionV3.

    Returns: a model with that layer's output.
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


class TopLayer(BinaryLogisticRegression):
    """Binary logistic regression on the pooled features of a frozen trunk.

    The logit is z = theta . (phi(x) - mean) / scale. phi(x) is the mean of the trunk's feature map
    over all positions.

    `features` and `featured` compute features (n, f) of images. The other methods take features,
    except `input_gradient`, which takes features or images.

    Args:
      trunk: Keras model from an image in [-1, 1] to a feature map (h', w', f) or a vector (f,). The
        function `cut` makes such a model. The trunk runs in inference mode and in its own
        precision, usually float32. The head is float64. If a network expects inputs of another
        range, it needs a rescaling layer first.
      weight_decay: lambda of the penalty lambda/2 |theta|^2.
      mean: (f,) m, such as the mean of the training set's pooled features; zero if None.
      scale: (f,) s > 0, such as the standard deviation of those features; one if None.

    Attributes:
      trunk: the argument.

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
        self._trunk = _Trunk(trunk, self._cotangent)
        super().__init__(self._trunk.num_features, weight_decay=weight_decay)
        self._mean = self._vector(mean, "mean", 0.0)
        self._scale = self._vector(scale, "scale", 1.0)
        if not (self._scale > 0).all():
            raise ValueError(
                f"scale must be positive, got {self._scale.min():.4g} at position "
                f"{self._scale.argmin()}; put 1 where a feature never varies."
            )

    def features(self, x: Any) -> Any:
        """Compute features of images: (phi(x) - m) / s.

        Args:
          x: (n, h, w, c) images, integers 0 to 255 or floats in [-1, 1]. Features (n, f) are
            returned unchanged.

        Returns: (n, f) float64. On a CPU the trunk takes one image at a time, so the features of an
          image do not depend on the other images, not even in their last bits.
        Raises: ValueError for images of another size or range.
        """
        if not _are_images(x):
            return x
        self._check_shape(x)
        return self._standardised(self._trunk.pooled(x))

    def featured(self, examples: Examples) -> Examples:
        """Replace images by features. Return `examples` unchanged if they already hold features."""
        if not _are_images(examples.take([0]).x):
            return examples
        return Examples(examples.each_row(_features, self, batch_size=_ROWS), examples.y)

    def input_gradient(self, x: Any, y: Any, v: NDArray) -> NDArray:
        """Differentiate grad loss_i . v with respect to the features or the pixels.

        The derivative with respect to the pixels is J(x)' c. J is the Jacobian of phi with respect
        to the pixels. c is the derivative of grad loss . v with respect to phi, which is the result
        of `LinearModel.input_gradient` divided by s.

        Args:
          x: (n, h, w, c) floats in [-1, 1], or (n, f) features.
          y: (n,) labels.
          v: (d,) direction in parameter space.

        Returns: an array of x's shape. For images its dtype is that of the trunk's input.
        Raises: TypeError for images as integers; `scaled` converts them to floats.
        """
        if not _are_images(x):
            return super().input_gradient(x, y, v)
        check_differentiable(x)
        v = numbers(v, "v")
        if np.shape(v) != (self.num_parameters,):
            raise ValueError(f"v must have shape ({self.num_parameters},), got {np.shape(v)}.")
        self._check_shape(x)
        return self._trunk.pullback(x, y, v, self.theta)

    def curvatures(self, x: Any, y: Any, v: NDArray) -> NDArray:
        """Return v' H_i v of each row i; see GenericNeuralNet.curvatures."""
        return super().curvatures(self.design.as_dtype(x), y, v)

    def curvature_gradient(self, x: Any, y: Any, v: NDArray) -> NDArray:
        """Return the gradient of v' H v in theta; see GenericNeuralNet.curvature_gradient."""
        return super().curvature_gradient(self.design.as_dtype(x), y, v)

    def validate(self, examples: Examples, name: str) -> None:
        """Refuse examples that do not fit, and images, which `featured` must convert first."""
        if isinstance(examples, Examples):
            self.design.check_features(examples.take([0]).x, f"{name}.x")
        super().validate(examples, name)

    # --- inside -----------------------------------------------------------------------------------

    def _standardised(self, pooled: NDArray) -> NDArray:
        return (pooled - self._mean) / self._scale

    def _cotangent(self, theta: NDArray, pooled: NDArray, y: NDArray, v: NDArray) -> NDArray:
        """Return the derivative of grad loss . v with respect to phi(x) for k images: (k, f)."""
        features = self._standardised(pooled.astype(np.float64))
        return self._input_gradient(theta, features, y, v) / self._scale

    def _check_shape(self, images: Any) -> None:
        want = self._trunk.image_shape
        got = tuple(images.shape[1:])
        if any(w not in (None, g) for w, g in zip(want, got, strict=True)):
            raise ValueError(
                f"x must be images of shape {want} for the trunk {self.trunk.name!r}, got "
                f"{got}; resize them first."
            )

    def _vector(self, value: ArrayLike | None, name: str, default: float) -> NDArray:
        if value is None:
            return np.full(self.num_features, default)
        vector = numbers(value, name).astype(np.float64)
        if vector.shape != (self.num_features,) or not np.isfinite(vector).all():
            raise ValueError(
                f"{name} must be {self.num_features} finite numbers, one a feature, got shape "
                f"{vector.shape}{'' if np.isfinite(vector).all() else ' with NaN or infinity'}."
            )
        return vector


def _are_images(x: Any) -> bool:
    return getattr(x, "ndim", 0) == _IMAGE_RANK


def _features(net: Any, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
    """Compute the features of a batch, (n, f)."""
    return net.features(x)


class _Trunk:
    """A trunk. It computes pooled features of images, and derivatives with respect to the pixels.

    Args:
      model: `TopLayer.trunk`. Its weights must never change.
      cotangent: function of (theta, pooled (k, f), y, v) that returns float64 (k, f). `pullback`
        multiplies this result by the Jacobian of the pooled features with respect to the pixels.

    Attributes: image_shape: (h, w, c), with None for any size; num_features: f.

    Raises: TypeError if `model` is not a Keras model. ValueError unless it has one input, an image,
      and one output, a feature map or a vector.
    """

    def __init__(self, model: keras.Model, cotangent: Callable[..., NDArray]):
        if not isinstance(model, keras.Model):
            raise TypeError(f"trunk must be a keras.Model, got {type(model).__name__}.")
        inputs, outputs = (getattr(model, name, None) or [] for name in ("inputs", "outputs"))
        if len(inputs) != 1 or len(outputs) != 1:
            raise ValueError(
                f"trunk must have one input and one output, got {len(inputs)} and {len(outputs)} "
                f"in {model.name!r}; keras.Model(inputs, outputs) makes one that has."
            )
        before, after = tuple(inputs[0].shape), tuple(outputs[0].shape)
        if len(before) != 4 or len(after) not in (2, 4) or after[-1] is None:
            raise ValueError(
                "trunk must lead from images (h, w, c) to a feature map (h, w, f) or a vector "
                f"(f,), got {before[1:]} to {after[1:]} in {model.name!r}."
            )
        self.model, self._cotangent = model, cotangent
        self.image_shape, self.num_features = before[1:], int(after[-1])
        self.dtype = np.dtype(inputs[0].dtype)
        self._traced: Any = None

    def __getstate__(self) -> dict:
        """Return the state without the traced functions. They are traced again after unpickling."""
        return {**self.__dict__, "_traced": None}

    def pooled(self, images: NDArray) -> NDArray:
        """Compute pooled features (k, f), in float64, of k images that `scaled` accepts."""
        if not len(images):
            return np.empty((0, self.num_features))
        _check_range(images)
        forward, _ = self._functions()
        batches = progress(
            self._batches(images), "features of images", -(-len(images) // _together())
        )
        return np.concatenate([forward(x).numpy().astype(np.float64) for _, x in batches])

    def pullback(self, images: NDArray, y: Any, v: NDArray, theta: NDArray) -> NDArray:
        """Compute J_i' c_i for each image i: (k, h, w, c).

        J_i is the Jacobian of image i's pooled features with respect to its pixels. c_i is the
        cotangent of these features, as `cotangent` returns it. The method takes one forward and one
        backward pass of the trunk.
        """
        _check_range(images)
        _, backward = self._functions()
        labels, *head = (
            tf.convert_to_tensor(np.asarray(a, np.float64).reshape(-1)) for a in (y, v, theta)
        )
        parts = [backward(x, labels[rows], *head).numpy() for rows, x in self._batches(images)]
        return np.concatenate(parts)

    def _batches(self, images: NDArray) -> Iterator[tuple[slice, Any]]:
        size = _together()
        for start in range(0, len(images), size):
            rows = slice(start, start + size)
            yield rows, tf.convert_to_tensor(_floats(images[rows], self.dtype))

    def _functions(self) -> tuple[Any, Any]:
        """Return the forward and the backward function. Each is traced once for all batch sizes."""
        if self._traced is None:
            x = tf.TensorSpec((None, *self.image_shape), tf.as_dtype(self.dtype))
            vector = tf.TensorSpec((None,), tf.float64)
            self._traced = (
                tf.function(self._forward, input_signature=[x], autograph=False),
                tf.function(self._backward, input_signature=[x, *[vector] * 3], autograph=False),
            )
        return self._traced

    def _forward(self, x: Any) -> Any:
        output = self.model(x, training=False)
        return tf.reduce_mean(output, axis=(1, 2)) if len(output.shape) == 4 else output

    def _backward(self, x: Any, y: Any, v: Any, theta: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            pooled = self._forward(x)
        # The head's closed form exists only in NumPy, so it is called between the two passes.
        cotangent = tf.numpy_function(self._cotangent, [theta, pooled, y, v], tf.float64)
        cotangent = tf.cast(tf.ensure_shape(cotangent, pooled.shape), pooled.dtype)
        gradient = tape.gradient(pooled, x, output_gradients=cotangent)
        if gradient is None:
            raise ValueError(
                f"trunk must be differentiable by the image, got no gradient from "
                f"{self.model.name!r}; rounding and comparisons have none."
            )
        return gradient


def _together() -> int:
    return _ON_GPU if tf.config.list_logical_devices("GPU") else _ELSEWHERE


def _check_range(images: NDArray) -> None:
    if images.dtype.kind not in "iuf":
        raise TypeError(f"images must be integers or floats, got dtype {images.dtype}.")
    integers = images.dtype.kind != "f"
    low, high, slack = (0, 255, 0) if integers else (-1, 1, _SLACK)
    if not (images.min() >= low - slack and images.max() <= high + slack):
        what = "bytes 0 to 255 as integers" if integers else "in [-1, 1] as floats"
        raise ValueError(
            f"images must be {what}, got {images.min():.4g} to {images.max():.4g}; "
            "x / 127.5 - 1 makes one of the other."
        )


def _floats(images: NDArray, dtype: Any) -> NDArray:
    if images.dtype.kind == "f":
        return images.astype(dtype, copy=False)
    return np.asarray(images.astype(dtype) / 127.5 - 1, dtype)
