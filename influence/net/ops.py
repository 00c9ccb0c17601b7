"""Operations that TensorFlow differentiates wrongly or computes wrongly, and their replacements.

TensorFlow 2.21 has three kinds of faults that would reach an influence function.

1. A derivative is wrong without an error. The second derivatives of a bilinear resize and of
   `tf.nn.moments` are wrong, and the first derivative of `tf.image.hsv_to_rgb` is zero.
2. A derivative does not exist. The operations `SoftsignGrad` and `ResizeBicubicGrad` have no
   gradient, so softsign and the bicubic resize have no second derivative.
3. A product of matrices writes outside its memory. With oneDNN and more than one thread,
   `tf.matmul(tf.ones((2, 1, 12, 8)), tf.ones((8, 8)))` returns wrong numbers or NaN, or kills the
   process ("corrupted double-linked list"). This occurs for 16 and 32 bit floats if the left
   factor has the shape (p, 1, m, k), and all leading dimensions of the right factor are 1. If
   `tf.vectorized_map` applies a Dense layer to each single row, it computes such products.

`exact` replaces faulty functions by functions with the same values up to rounding.
`check_operations` refuses the operations that `exact` cannot replace. It also refuses faulty
operations in a `tf.function` that was traced outside an `exact` block.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.python.framework import ops
from tensorflow.python.ops import gen_image_ops, gen_math_ops, gen_nn_ops

# `_THREAD.blocks` is the number of `exact` blocks that surround the thread's current call.
_THREAD = threading.local()

# --- replacements ---------------------------------------------------------------------------------


def _moments(original: Callable) -> Callable:
    """Compute mean and variance without stopping a gradient.

    When TensorFlow computes the variance, it treats the mean as a constant in derivatives. First
    derivatives stay right, because the variance's derivative with respect to the mean is zero. Its
    second derivative is not zero. Hessians of layer or group normalisation would therefore be
    wrong, without an error.
    """

    def moments(x, axes, shift=None, keepdims=False, name=None):
        mean = tf.reduce_mean(x, axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(x - mean), axes, keepdims=keepdims)
        return (mean if keepdims else tf.squeeze(mean, axes)), variance

    return moments


def _softsign(original: Callable) -> Callable:
    def softsign(features, name=None):
        x = tf.convert_to_tensor(features)
        return x / (1 + tf.abs(x))

    return softsign


def _hsv_to_rgb(original: Callable) -> Callable:
    """Compute red, green and blue as v - v s max(0, min(k, 4 - k, 1)) with k = (m + 6 h) mod 6.

    h is the hue as a fraction of a full turn, s is the saturation and v is the value. m is 5 for
    red, 3 for green and 1 for blue.
    """

    def hsv_to_rgb(images, name=None):
        h, s, v = tf.split(tf.convert_to_tensor(images), 3, axis=-1)
        k = tf.math.floormod(6 * h + tf.constant([5, 3, 1], h.dtype), 6)
        return v - v * s * tf.maximum(tf.minimum(tf.minimum(k, 4 - k), 1), 0)

    return hsv_to_rgb


def _resize(original: Callable) -> Callable:
    def resize(images, size, *arguments, **options):
        x = tf.convert_to_tensor(images)
        if x.dtype not in _RESIZED:
            return original(x, size, *arguments, **options)
        return _separately(
            lambda basis, size, axis: original(basis, size, *arguments, **options), x, size
        )

    return resize


def _scale_and_translate(original: Callable) -> Callable:
    def resize(images, size, scale, translation, *arguments, **options):
        x = tf.convert_to_tensor(images)
        if x.dtype not in _RESIZED:
            return original(x, size, scale, translation, *arguments, **options)
        scale, translation = tf.cast(scale, tf.float32), tf.cast(translation, tf.float32)

        def resized(basis, size, axis):
            # The other axis has the length 1. It is neither scaled nor moved.
            here = tf.one_hot(axis - 1, 2)
            at = scale * here + 1 - here, translation * here
            return original(basis, size, *at, *arguments, **options)

        return _separately(resized, x, size)

    return resize


# Images of these dtypes are resized by matrices. Other images are resized by TensorFlow's own
# function, because it rounds integers after a resize.
_RESIZED = (tf.float32, tf.float64)


def _separately(resized: Callable, x: Any, size: Any) -> Any:
    """Resize images x (n, h, w, c) by one matrix for each axis.

    Every resize is linear in the image, and acts on each axis separately. Each channel X (h, w) of
    an image therefore becomes A X B'. A depends only on the old and the new height, and B on the
    widths. To get A or B, `resized(basis, size, axis)` applies TensorFlow's function to an identity
    matrix along one axis. Products of matrices have derivatives of every order. The result has the
    dtype of the images.
    """
    size = tf.convert_to_tensor(size)
    for axis in (1, 2):
        basis = tf.eye(x.shape[axis] or tf.shape(x)[axis], dtype=tf.float32)
        if axis == 1:
            matrix = resized(basis[None, :, None, :], tf.stack([size[0], 1]), axis)[0, :, 0, :]
        else:
            matrix = resized(basis[None, None, :, :], tf.stack([1, size[1]]), axis)[0, 0]
        x = _on_axis(tf.cast(matrix, x.dtype), x, axis)
    known = tf.get_static_value(size)
    if known is not None:
        x.set_shape([x.shape[0], *known.tolist(), x.shape[3]])
    return x


def _on_axis(matrix: Any, x: Any, axis: int) -> Any:
    """Multiply axis 1 or 2 of images x (n, h, w, c) by a matrix."""
    product = tf.tensordot(x, matrix, [[axis], [1]])
    return tf.transpose(product, [0, 3, 1, 2] if axis == 1 else [0, 1, 3, 2])


def _batch_matmul(original: Callable) -> Callable:
    """Avoid broadcasting in products that oneDNN computes wrongly: fault 3 of the file's list.

    The factors are first reshaped or copied, so the product has nothing to broadcast.
    """

    def batch_mat_mul(x, y, adj_x=False, adj_y=False, *arguments, **options):
        x, y = tf.convert_to_tensor(x), tf.convert_to_tensor(y)
        if x.dtype.is_complex or not _may_broadcast(x.shape, y.shape):
            return original(x, y, adj_x, adj_y, *arguments, **options)
        if all(size == 1 for size in y.shape[:-2]):
            # y is one matrix, which multiplies all rows of x. So x is reshaped to one matrix too.
            x = tf.linalg.matrix_transpose(x) if adj_x else x
            y = tf.reshape(y, tf.shape(y)[-2:])
            rows = tf.reshape(x, [-1, x.shape[-1] or tf.shape(x)[-1]])
            product = tf.matmul(rows, y, transpose_b=adj_y)
            found = tf.reshape(product, tf.concat([tf.shape(x)[:-1], tf.shape(product)[1:]], 0))
            found.set_shape([*x.shape[:-1], product.shape[1]])
            return found
        batch = tf.broadcast_dynamic_shape(tf.shape(x)[:-2], tf.shape(y)[:-2])
        static = tf.broadcast_static_shape(x.shape[:-2], y.shape[:-2])
        spread = []
        for part in (x, y):
            whole = tf.broadcast_to(part, tf.concat([batch, tf.shape(part)[-2:]], 0))
            whole.set_shape([*static, *part.shape[-2:]])
            spread.append(whole)
        return original(*spread, adj_x, adj_y, *arguments, **options)

    return batch_mat_mul


def _may_broadcast(x: Any, y: Any) -> bool:
    """Return True if oneDNN may be wrong for the product of tensors with the shapes x and y.

    oneDNN is wrong only if the left factor has the shape (p, 1, m, k), and the right factor one of
    the shapes (k, n), (1, k, n) and (1, 1, k, n). Among 500 random products of 3 to 6 dimensions,
    no other product was wrong. For an unknown size, the function assumes the worst. Shapes of
    unknown rank count as harmless.
    """
    if x.rank != 4 or y.rank is None or x[1] not in (None, 1) or x[0] == 1:
        return False
    return all(size in (None, 1) for size in y[:-2])


def _pow(original: Callable) -> Callable:
    """Compute small integer powers by products.

    TensorFlow's k-th derivative of x^y contains the factors y - k + 1 and x^(y - k). For y = k - 1
    and x = 0, their product is 0 times infinity. The third derivative of x^2 at 0, for example, is
    NaN.
    """

    def power(x, y, name=None):
        exponent = tf.get_static_value(y) if tf.is_tensor(y) else y
        if np.ndim(exponent) or exponent not in (1, 2, 3, 4):
            return original(x, y, name=name)
        x = tf.convert_to_tensor(x)
        powers = {1: tf.identity, 2: tf.square, 3: lambda x: x * tf.square(x)}
        powers[4] = lambda x: tf.square(tf.square(x))
        return powers[int(exponent)](x)

    return power


def _ctc_loss(original: Callable) -> Callable:
    def ctc_loss(*arguments: Any, **options: Any) -> Any:
        raise NotImplementedError(
            "loss must be twice differentiable, got ctc_loss, whose second derivative TensorFlow "
            "computes as NaN; use a loss that compares labels and outputs step by step."
        )

    return ctc_loss


_IMAGES = ("bilinear", "bicubic", "nearest_neighbor", "area")
_REPLACED: list[tuple[Any, str, Callable]] = [
    (tf.nn, "moments", _moments),
    *((owner, "softsign", _softsign) for owner in (tf.nn, tf.math, gen_nn_ops)),
    *((owner, "hsv_to_rgb", _hsv_to_rgb) for owner in (tf.image, gen_image_ops)),
    *((gen_image_ops, f"resize_{name}", _resize) for name in _IMAGES),
    (gen_image_ops, "scale_and_translate", _scale_and_translate),
    (gen_math_ops, "batch_mat_mul_v2", _batch_matmul),
    (gen_math_ops, "_pow", _pow),
    (tf.nn, "ctc_loss", _ctc_loss),
    # `tf.recompute_grad` saves memory and changes no value. It fails in a graph. Keras calls it for
    # `keras.RematScope`.
    (tf, "recompute_grad", lambda original: lambda f: f),
]


# --- use of the replacements ----------------------------------------------------------------------

_LOCK = threading.Lock()
_ORIGINALS: list[tuple[Any, str, Any]] = []
_users = 0


@contextmanager
def exact() -> Iterator[None]:
    """Use functions with correct values and derivatives inside the `with` block.

    Only calls by the thread that entered the block are replaced. Blocks may be nested, and several
    threads may be inside blocks at the same time. TensorFlow's functions are restored at the end of
    the last block.
    """
    global _users
    with _LOCK:
        if _users == 0:
            for owner, name, replacement in _REPLACED:
                original = getattr(owner, name)
                _ORIGINALS.append((owner, name, original))
                setattr(owner, name, _in_blocks(original, replacement(original)))
        _users += 1
    _THREAD.blocks = getattr(_THREAD, "blocks", 0) + 1
    try:
        yield
    finally:
        _THREAD.blocks -= 1
        with _LOCK:
            _users -= 1
            if _users == 0:
                while _ORIGINALS:
                    setattr(*_ORIGINALS.pop())


def _in_blocks(original: Callable, replacement: Callable) -> Callable:
    @wraps(original)
    def function(*arguments: Any, **options: Any) -> Any:
        inside = getattr(_THREAD, "blocks", 0) > 0
        return (replacement if inside else original)(*arguments, **options)

    return function


# --- refusals -------------------------------------------------------------------------------------

# A dict from types of operations to positions of inputs. TensorFlow 2.21 lacks or miscomputes the
# operation's derivative with respect to the inputs at these positions. None means all inputs.
# `_WRONG_FIRST` is for first derivatives.
_Inputs = dict[str, tuple[int, ...] | None]
_WRONG_FIRST: _Inputs = {
    "Betainc": (0, 1),
    "Zeta": (1,),
    **dict.fromkeys(
        """
        ExtractGlimpse ExtractGlimpseV2 FakeQuantWithMinMaxArgs FakeQuantWithMinMaxVars
        FakeQuantWithMinMaxVarsPerChannel HSVToRGB ImageProjectiveTransformV2
        ImageProjectiveTransformV3 LinSpace PyFunc PyFuncStateless RandomShuffle
        """.split()
    ),
}
# The first derivatives of these operations are correct. Their second derivatives, with respect to
# the inputs at these positions, are missing or wrong.
_WRONG_SECOND: _Inputs = {
    "Igamma": (0,),
    "Igammac": (0,),
    **dict.fromkeys(
        """
        CTCLoss CTCLossV2 CropAndResize Dilation2D FractionalAvgPool FractionalMaxPool LRN
        MaxPoolWithArgmax ResizeBicubic ResizeBilinear ResizeNearestNeighbor ScaleAndTranslate
        Softsign
        """.split()
    ),
}
_REMEDY = (
    "apply it to the inputs before training, freeze all layers before it, or write it with basic "
    "operations such as products and sums"
)


def check_operations(
    graph: Any, sources: list[Any], layers: Iterable[str] = (), twice: bool = True
) -> None:
    """Refuse a traced function if TensorFlow lacks or miscomputes one of its derivatives.

    An operation is checked only if one of its inputs depends on the sources, and the function's
    result depends on the operation.

    Args:
      graph: the traced function.
      sources: tensors of the graph. The derivatives are taken with respect to them.
      layers: the names of the model's layers, for the message.
      twice: False if only first derivatives are needed.

    Raises: NotImplementedError naming the operation and its layer.
    """
    wrong = _WRONG_FIRST | _WRONG_SECOND if twice else _WRONG_FIRST
    for op, path in _between(sources, graph, wrong, twice):
        name = _layer(path, layers)
        if op.type == "StopGradient":
            raise NotImplementedError(
                f"model and loss must not stop gradients, got stop_gradient{name}: derivatives "
                "would not be those of the loss; remove it, and set trainable = False on the "
                "layers before it."
            )
        raise NotImplementedError(
            f"model must be twice differentiable, got {op.type}{name}, whose derivatives "
            f"TensorFlow lacks or cuts; {_REMEDY}."
        )


def depends(graph: Any, source: Any) -> bool:
    """Return True if an output of a traced function may depend on the input tensor `source`."""
    seen, open_ = set(), [tensor.op for tensor in graph.outputs]
    while open_:
        op = open_.pop()
        if op is source.op:
            return True
        if op not in seen:
            seen.add(op)
            open_ += [tensor.op for tensor in op.inputs]
    return False


def no_derivative(error: LookupError) -> NotImplementedError:
    """Return the error to raise if TensorFlow's tape could not differentiate an operation."""
    return NotImplementedError(
        f"model must be twice differentiable, but TensorFlow says: {error.args[0]}; {_REMEDY}."
    )


def _between(
    sources: list[Any], graph: Any, wrong: _Inputs, twice: bool, path: str = ""
) -> Iterator[tuple[Any, str]]:
    """Yield (operation, path) of each faulty operation between the sources and the outputs."""
    reached = {t.ref() for t in sources}
    dependent = []
    for op in graph.get_operations():  # an operation comes after its inputs
        inputs = [i for i, t in enumerate(op.inputs) if t.ref() in reached]
        if inputs:
            dependent.append((op, inputs))
            # Gradients flow only through floating tensors, complex tensors, and lists of tensors.
            # TensorFlow stores such a list in a tensor of dtype variant.
            smooth = (t for t in op.outputs if t.dtype.is_floating or t.dtype.is_complex)
            reached.update(t.ref() for t in smooth)
            reached.update(t.ref() for t in op.outputs if t.dtype == tf.variant)
    needed, new = set(), [t.op for t in graph.outputs]
    while new:
        op = new.pop()
        if op.name not in needed:
            needed.add(op.name)
            new += [t.op for t in op.inputs]
    for op, inputs in dependent:
        if op.name in needed and any(t.ref() in reached for t in op.outputs):
            here, functions = f"{path}/{op.name}", list(_called(op, graph))
            for function in functions:
                yield from _between(function.inputs, function, wrong, twice, here)
            if not functions and _is_wrong(op, inputs, wrong, twice):
                yield op, here


def _called(op: Any, graph: Any) -> Iterator[Any]:
    """Yield the graphs of the functions that an operation calls, such as a loop's body."""
    for attribute in op.op_def.attr:
        if attribute.type in ("func", "list(func)"):
            value = op.get_attr(attribute.name)
            for function in value if isinstance(value, list) else [value]:
                known = graph._functions.get(function.name)
                if known is not None and hasattr(known, "graph"):
                    yield known.graph


def _is_wrong(op: Any, inputs: list[int], wrong: _Inputs, twice: bool) -> bool:
    if op.type == "StopGradient":
        return not _is_harmless(op)
    if op.type in wrong:
        positions = wrong[op.type]
        return positions is None or any(i in positions for i in inputs)
    if not twice:  # the graph may itself compute derivatives, by operations without a gradient
        return False
    try:
        ops.get_gradient_function(op)
    except LookupError:
        return True
    return False


def _is_harmless(stop: Any) -> bool:
    """Return True if TensorFlow or this library stopped the gradient, and not the user's code.

    They stop gradients only where this changes no derivative, such as at the maximum in
    `tf.reduce_logsumexp`.
    """
    for file, _, name, *_ in reversed(stop.traceback):
        # The functions `stop_gradient` of TensorFlow and of Keras only forward the user's call.
        if name != "stop_gradient" and not file.startswith(_PLUMBING):
            return file.startswith(_TRUSTED)
    return False


_TENSORFLOW = os.path.dirname(os.path.abspath(tf.__file__))
_PLUMBING = tuple(
    os.path.join(_TENSORFLOW, "python", name)
    for name in ("framework", "util", os.path.join("ops", "weak_tensor_ops.py"))
)
_TRUSTED = (_TENSORFLOW, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _layer(path: str, layers: Iterable[str]) -> str:
    """Return " in layer 'name'" for the innermost layer in an operation's path, or ""."""
    layers = set(layers)
    for part in reversed(path.split("/")):
        for name in (part, re.sub(r"_\d+$", "", part)):
            if name in layers:
                return f" in layer {name!r}"
    return ""
