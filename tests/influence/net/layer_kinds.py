"""One small model for each layer of `keras.layers` that allows a loss for each single row.

A model has trainable weights before and after the layer, if the layer's input can depend on
weights. Derivatives then pass through the layer. Layers that differ only in name, such as
AvgPool1D and AveragePooling1D, occur once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

L = keras.layers
ROWS = 3


@dataclass(frozen=True)
class Kind:
    """Recipe for a model and its inputs.

    Attributes:
      make: returns the keras.Model.
      shape: the shape of a row, or None if a row holds five word numbers.
      twin: returns a float64 model that computes the same by other layers. It is needed if
        TensorFlow has no float64 operation for the layer.
      rounds: True if TensorFlow computes the layer in float32 even for float64 inputs. Finite
        differences then use a long step, because of rounding. They are still exact, because these
        models have linear layers and a loss that is a polynomial of degree 4 in the weights.
    """

    make: Callable[[], keras.Model]
    shape: tuple[int, ...] | None
    twin: Callable[[], keras.Model] | None = None
    rounds: bool = False

    def inputs(self, rng: Any) -> NDArray:
        if self.shape is None:
            return rng.integers(1, 7, (ROWS, 5))
        return rng.standard_normal((ROWS, *self.shape))


VECTOR, SEQUENCE, IMAGE, VOLUME = (6,), (12, 8), (6, 6, 3), (4, 4, 4, 2)


def first(shape: tuple[int, ...], linear: bool = False) -> Any:
    """Return a dense layer that keeps the shape of its input."""
    return L.Dense(shape[-1], activation=None if linear else "tanh")


def through(layer: Callable[[], Any], shape: tuple[int, ...], linear: bool = False) -> Callable:
    """Return a recipe for a model with trainable weights before and after the layer."""

    def make():
        x = keras.Input(shape)
        return _ended(x, layer()(first(shape, linear)(x)))

    return make


def at_first(layer: Callable[[], Any], shape: tuple[int, ...]) -> Callable:
    """Return a recipe for a model whose first layer is `layer`, with trainable weights after it."""

    def make():
        x = keras.Input(shape)
        return _ended(x, L.Dense(2, activation="tanh")(layer()(x)))

    return make


def merged(layer: Callable[[], Any], shape: tuple[int, ...], parts: int = 2) -> Callable:
    """Return a recipe for a model in which the layer takes several tensors."""

    def make():
        x = keras.Input(shape)
        return _ended(x, layer()([first(shape)(x) for _ in range(parts)]))

    return make


def attending(layer: Callable[[], Any]) -> Callable:
    def make():
        x = keras.Input(SEQUENCE)
        h = first(SEQUENCE)(x)
        return _ended(x, L.Add()([h, layer()(h, h)]))

    return make


def words(*layers: Callable[[], Any]) -> Callable:
    """Return a recipe for a model that applies layers to rows of five word numbers."""

    def make():
        x = h = keras.Input((5,), dtype="int32")
        for layer in layers:
            h = layer()(h)
        return _ended(x, h)

    return make


def masking() -> keras.Model:
    x = keras.Input((4, 3))
    return _ended(x, L.LSTM(2, unroll=True)(L.Masking()(x)))


def classified(layer: Callable[[], Any]) -> Callable:
    """Return a recipe for a model whose first layer maps numbers to class numbers or vectors."""

    def make():
        x = keras.Input(VECTOR)
        h = layer()(x)
        if "int" in str(h.dtype):
            h = L.Flatten()(L.Embedding(8, 2)(h))
        return _ended(x, L.Dense(3, activation="tanh")(h))

    return make


def reversible() -> keras.Model:
    x = keras.Input((5,), dtype="int32")
    layer = L.ReversibleEmbedding(7, 3)
    return _ended(x, layer(L.Dense(3, activation="tanh")(layer(x)), reverse=True))


def _ended(x: Any, h: Any) -> keras.Model:
    h = h if len(h.shape) == 2 else L.Flatten()(h)
    return keras.Model(x, L.Dense(2)(h))


def _pooled_3d(reduce: Any) -> Any:
    """Return a layer that reduces each 2 by 2 by 2 block of a volume of shape VOLUME."""

    def call(x):
        for axis in (1, 2, 3):
            sizes = [-1, *x.shape[1:]]
            sizes[axis : axis + 1] = [2, 2]
            x = reduce(keras.ops.reshape(x, sizes), axis=axis + 1)
        return x

    return L.Lambda(call, output_shape=(2, 2, 2, 2))


def _in_float32(layer: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that makes a resizing layer with casts to float32 and back.

    The casts are necessary, because TensorFlow resizes images only in float32.
    """

    def call(x):
        return keras.ops.cast(layer()(keras.ops.cast(x, "float32")), x.dtype)

    return lambda: L.Lambda(call)


def _mean_of_areas() -> Any:
    """Return a layer that resizes images of shape IMAGE to 4 x 9 pixels.

    Each new pixel is the mean of the old image over the area of the new pixel.
    """

    def matrix(old, new):
        low, high = np.arange(new)[:, None] * old / new, np.arange(1, new + 1)[:, None] * old / new
        at = np.arange(old)
        overlap = np.minimum(high, at + 1) - np.maximum(low, at)
        return np.maximum(overlap, 0) * new / old

    rows, columns = matrix(6, 4), matrix(6, 9)
    return L.Lambda(lambda x: keras.ops.einsum("ah,nhwc,bw->nabc", rows, x, columns))


KINDS: dict[str, Kind] = {}


def _add(name: str, layer: Callable[[], Any], shape: tuple[int, ...], **options: Any) -> None:
    KINDS[name] = Kind(through(layer, shape), shape, **options)


def _add_resize(name: str, layer: Callable[[], Any], plain: Any = None) -> None:
    twin = through(plain or _in_float32(layer), IMAGE, linear=True)
    KINDS[name] = Kind(through(layer, IMAGE, linear=True), IMAGE, twin, rounds=True)


# These layers once failed, so they come first.
for name in ("MultiHeadAttention", "GroupQueryAttention"):
    arguments = (2, 4) if name == "MultiHeadAttention" else (4, 4, 2)
    KINDS[name] = Kind(attending(lambda n=name, a=arguments: getattr(L, n)(*a)), SEQUENCE)
KINDS["Attention"] = Kind(merged(L.Attention, SEQUENCE), SEQUENCE)
KINDS["Attention, scaled"] = Kind(merged(lambda: L.Attention(True), SEQUENCE, 3), SEQUENCE)
KINDS["AdditiveAttention"] = Kind(merged(L.AdditiveAttention, SEQUENCE), SEQUENCE)
KINDS["Dense of rank 4"] = Kind(
    through(lambda: L.Dense(3, activation="tanh"), (1, 12, 8)), (1, 12, 8)
)
_add("Dense of rank 3", lambda: L.Dense(3, activation="tanh"), SEQUENCE)
for method in ("nearest", "bilinear", "bicubic", "lanczos3", "lanczos5"):
    up = lambda m=method: L.UpSampling2D(2, interpolation=m)  # noqa: E731
    _add_resize(f"UpSampling2D, {method}", up)
    _add_resize(f"Resizing, {method}", lambda m=method: L.Resizing(4, 9, m))
_add_resize("Resizing, area", lambda: L.Resizing(4, 9, "area"), _mean_of_areas)
_add_resize("Resizing, antialias", lambda: L.Resizing(3, 4, antialias=True))
_add_resize("Resizing, crop", lambda: L.Resizing(3, 4, crop_to_aspect_ratio=True))
_add_resize("Resizing, pad", lambda: L.Resizing(9, 4, pad_to_aspect_ratio=True))
_add("CenterCrop", lambda: L.CenterCrop(4, 4), IMAGE)
_add_resize("CenterCrop, larger", lambda: L.CenterCrop(8, 9))

ACTIVATIONS = """softsign celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh
leaky_relu linear log_sigmoid log_softmax mish relu relu6 selu sigmoid silu softmax soft_shrink
softplus sparse_plus sparse_sigmoid sparsemax squareplus tanh tanh_shrink""".split()
for name in ACTIVATIONS:
    _add(f"Activation, {name}", lambda a=name: L.Activation(a), VECTOR)

_add("Lambda, glu", lambda: L.Lambda(keras.activations.glu, output_shape=(3,)), VECTOR)

# Layers on vectors.
for name, arguments in {
    "Dense": (3, "gelu"),
    "EinsumDense": ("nf,fg->ng", 3),
    "BatchNormalization": (),
    "LayerNormalization": (),
    "GroupNormalization": (3,),
    "RMSNormalization": (),
    "UnitNormalization": (),
    "ELU": (),
    "LeakyReLU": (0.3,),
    "PReLU": (),
    "ReLU": (),
    "Softmax": (),
    "Identity": (),
    "Flatten": (),
    "Reshape": ((2, 3),),
    "RepeatVector": (2,),
    "Rescaling": (2.0, 0.5),
    "Dropout": (0.5,),
    "AlphaDropout": (0.5,),
    "GaussianDropout": (0.5,),
    "GaussianNoise": (0.5,),
}.items():
    _add(name, lambda n=name, a=arguments: getattr(L, n)(*a), VECTOR)
_add("Lambda", lambda: L.Lambda(lambda t: t**3), VECTOR)
_add("SpectralNormalization", lambda: L.SpectralNormalization(L.Dense(3)), VECTOR)
_add("Normalization", lambda: L.Normalization(mean=0.5, variance=2.0), VECTOR)
for name in ("Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply", "Subtract"):
    KINDS[name] = Kind(merged(getattr(L, name), VECTOR), VECTOR)
KINDS["Dot"] = Kind(merged(lambda: L.Dot(axes=(2, 2)), SEQUENCE), SEQUENCE)
KINDS["Discretization"] = Kind(classified(lambda: L.Discretization([-1.0, 0, 1])), VECTOR)

# Layers on sequences.
for name, arguments in {
    "Conv1D": (3, 3, 2),
    "Conv1DTranspose": (3, 3, 2),
    "SeparableConv1D": (3, 3),
    "DepthwiseConv1D": (3,),
    "AveragePooling1D": (2,),
    "MaxPooling1D": (),
    "GlobalAveragePooling1D": (),
    "GlobalMaxPooling1D": (),
    "Cropping1D": (),
    "ZeroPadding1D": (),
    "UpSampling1D": (),
    "SpatialDropout1D": (0.5,),
    "Permute": ((2, 1),),
}.items():
    _add(name, lambda n=name, a=arguments: getattr(L, n)(*a), SEQUENCE)
_add("LayerNormalization of rank 3", L.LayerNormalization, SEQUENCE)
_add("Softmax of rank 3", lambda: L.Softmax(axis=1), SEQUENCE)
_add("EinsumDense of rank 3", lambda: L.EinsumDense("ntf,fgh->ntgh", (12, 2, 3)), SEQUENCE)
_add("TimeDistributed", lambda: L.TimeDistributed(L.Dense(2, activation="tanh")), SEQUENCE)
KINDS["Masking"] = Kind(masking, (4, 3))
KINDS["Embedding"] = Kind(words(lambda: L.Embedding(7, 3)), None)
KINDS["ReversibleEmbedding"] = Kind(reversible, None)
KINDS["CategoryEncoding"] = Kind(words(lambda: L.CategoryEncoding(7, "multi_hot")), None)
KINDS["Hashing"] = Kind(words(lambda: L.Hashing(4), lambda: L.Embedding(4, 2)), None)
KINDS["IntegerLookup"] = Kind(
    words(lambda: L.IntegerLookup(vocabulary=[1, 2, 3]), lambda: L.Embedding(5, 2)),
    None,
)

# Layers on images.
for name, arguments in {
    "Conv2D": (3, 3),
    "Conv2DTranspose": (3, 3, 2),
    "SeparableConv2D": (3, 3),
    "DepthwiseConv2D": (3,),
    "AveragePooling2D": (2,),
    "MaxPooling2D": (),
    "GlobalAveragePooling2D": (),
    "GlobalMaxPooling2D": (),
    "Cropping2D": (),
    "ZeroPadding2D": (),
    "SpatialDropout2D": (0.5,),
}.items():
    _add(name, lambda n=name, a=arguments: getattr(L, n)(*a), IMAGE)
_add("Conv2D, grouped", lambda: L.Conv2D(3, 2, groups=3), IMAGE)
_add("Conv2D, dilated", lambda: L.Conv2D(2, 2, dilation_rate=2), IMAGE)
_add("BatchNormalization of rank 4", L.BatchNormalization, IMAGE)
_add("GroupNormalization of rank 4", lambda: L.GroupNormalization(3), IMAGE)
_add("PReLU of rank 4", lambda: L.PReLU(shared_axes=[1, 2]), IMAGE)

# Layers on volumes. TensorFlow cannot pool volumes in float64, so these layers need a twin.
for name, arguments in {
    "Conv3D": (2, 2),
    "Conv3DTranspose": (2, 2, 2),
    "GlobalAveragePooling3D": (),
    "GlobalMaxPooling3D": (),
    "Cropping3D": (),
    "ZeroPadding3D": (),
    "UpSampling3D": (),
    "SpatialDropout3D": (0.5,),
}.items():
    _add(name, lambda n=name, a=arguments: getattr(L, n)(*a), VOLUME)
_add(
    "MaxPooling3D", L.MaxPooling3D, VOLUME, twin=through(lambda: _pooled_3d(keras.ops.max), VOLUME)
)
_add(
    "AveragePooling3D",
    lambda: L.AveragePooling3D(2),
    VOLUME,
    twin=through(lambda: _pooled_3d(keras.ops.mean), VOLUME),
)

# These layers change images at random in training, but not in inference.
for name, arguments in {
    "AutoContrast": ((0, 1),),
    "RandomBrightness": (0.3,),
    "RandomColorDegeneration": (0.3,),
    "RandomColorJitter": (),
    "RandomContrast": (0.3,),
    "RandomCrop": (6, 6),
    "RandomElasticTransform": (),
    "RandomErasing": (),
    "RandomFlip": (),
    "RandomGaussianBlur": (),
    "RandomGrayscale": (),
    "RandomHue": (0.3,),
    "RandomInvert": (),
    "RandomPerspective": (),
    "RandomPosterization": (4,),
    "RandomRotation": (0.3,),
    "RandomSaturation": (0.3,),
    "RandomSharpness": (0.3,),
    "RandomShear": (0.3,),
    "RandomTranslation": (0.3, 0.3),
    "RandomZoom": (0.3,),
    "RandAugment": (),
    "AugMix": (),
    "Solarization": (),
    "CutMix": (),
    "MixUp": (),
    "Equalization": (),
}.items():
    layer = lambda n=name, a=arguments: getattr(L, n)(*a)  # noqa: E731
    KINDS[name] = Kind(at_first(layer, IMAGE), IMAGE)

# These are recurrent layers and layers that transform waves. TensorFlow traces their loops slowly.
_add("STFTSpectrogram", lambda: L.STFTSpectrogram("log", 8, 4, 8), (24, 1))
for name in ("SimpleRNN", "GRU", "LSTM"):
    _add(f"{name}, unrolled", lambda n=name: getattr(L, n)(2, unroll=True), (4, 3))
    _add(name, lambda n=name: getattr(L, n)(2), (4, 3))
    _add(f"RNN, {name}Cell", lambda n=name: L.RNN(getattr(L, f"{n}Cell")(2)), (4, 3))
_add("StackedRNNCells", lambda: L.RNN([L.GRUCell(2), L.LSTMCell(2)]), (4, 3))
_add("Bidirectional", lambda: L.Bidirectional(L.LSTM(2)), (4, 3))
_add("ConvLSTM1D", lambda: L.ConvLSTM1D(2, 2), (3, 4, 2))
_add("ConvLSTM2D", lambda: L.ConvLSTM2D(2, 2), (3, 3, 3, 2))
_add("ConvLSTM3D", lambda: L.ConvLSTM3D(2, 2), (2, 3, 3, 3, 1))
