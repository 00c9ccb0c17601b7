"""A frozen network before a trained head: its pooled output, and the way back to the pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.common.progress import progress

# Images at a time. On a processor photographs together are no faster than one by one, and only one
# by one are their last bits sure not to depend on which others they come with.
_ON_GPU, _ELSEWHERE = 16, 1
_SLACK = 1e-6  # rounding of [-1, 1] in float32


def scaled(images: Any, dtype: Any = "float32") -> NDArray:
    """Images as a trunk takes them: bytes k as k / 127.5 - 1, floats as they are.

    Args:
      images: (..., h, w, c), integers 0 to 255 or floats in [-1, 1].
      dtype: of the result.

    Returns: floats in [-1, 1], of the same shape.
    Raises: TypeError for other numbers, ValueError for those out of range.
    """
    images = np.asarray(images)
    _check_range(images)
    return _floats(images, dtype)


class Trunk:
    """Pooled features of images, and the derivative of a function of them by the images.

    Args:
      model: Keras model from one image input (h, w, c) to a feature map (h', w', f), of which the
        mean over its places is taken, or to a vector (f,). Run in inference mode, never changed;
        its weights must stay as they are.
      cotangent: (pooled (k, f), y, v) -> (k, f) float64, the derivative by the pooled features of
        what `pullback` is asked to differentiate by the images.

    Attributes:
      image_shape: (h, w, c), None where the model takes any.
      num_features: f.

    Raises: TypeError or ValueError for another model.
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
        """All but the traced functions, which are made again."""
        return {**self.__dict__, "_traced": None}

    def pooled(self, images: NDArray) -> NDArray:
        """(k, f) float64 features of k images; see `scaled`."""
        if not len(images):
            return np.empty((0, self.num_features))
        _check_range(images)
        forward, _ = self._functions()
        batches = progress(
            self._batches(images), "features of images", -(-len(images) // _together())
        )
        return np.concatenate([forward(x).numpy().astype(np.float64) for _, x in batches])

    def pullback(self, images: NDArray, y: Any, v: NDArray) -> NDArray:
        """(k, h, w, c): J_i' cotangent_i for each image, J_i the derivative of its features.

        One pass of the trunk forward and one backward.
        """
        _check_range(images)
        _, backward = self._functions()
        y = np.asarray(y, np.float64).reshape(-1)
        parts = [
            backward(x, tf.convert_to_tensor(y[rows]), tf.convert_to_tensor(v, tf.float64)).numpy()
            for rows, x in self._batches(images)
        ]
        return np.concatenate(parts)

    def _batches(self, images: NDArray) -> Iterator[tuple[slice, Any]]:
        size = _together()
        for start in range(0, len(images), size):
            rows = slice(start, start + size)
            yield rows, tf.convert_to_tensor(_floats(images[rows], self.dtype))

    def _functions(self) -> tuple[Any, Any]:
        """Forward and backward, traced once for batches of any size."""
        if self._traced is None:
            x = tf.TensorSpec((None, *self.image_shape), tf.as_dtype(self.dtype))
            y = v = tf.TensorSpec((None,), tf.float64)
            self._traced = (
                tf.function(self._forward, input_signature=[x], autograph=False),
                tf.function(self._backward, input_signature=[x, y, v], autograph=False),
            )
        return self._traced

    def _forward(self, x: Any) -> Any:
        output = self.model(x, training=False)
        return tf.reduce_mean(output, axis=(1, 2)) if len(output.shape) == 4 else output

    def _backward(self, x: Any, y: Any, v: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            pooled = self._forward(x)
        # In NumPy, between the two passes: the head's closed form is written down once, there.
        cotangent = tf.numpy_function(self._cotangent, [pooled, y, v], tf.float64)
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
