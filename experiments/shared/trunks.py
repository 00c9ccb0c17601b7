"""Networks trained on ImageNet up to a chosen layer, and the features of images at that layer.

A head is a logistic regression on the features of one layer. Its name consists of the network and
the layer, such as "inception/mixed8". The networks are:

    small            random weights, for the stand-in's 32 x 32 pictures; ends at relu2
    learnt           the layers of `small`, trained on other pictures of the stand-in's kind
    mobilenet        MobileNet of width .75, for 224 pixels; complete
    inception        Inception v3 of 2015, for 299 pixels; ends at mixed8
    inception-keras  Inception v3 with Keras' own weights; complete, ends at mixed10
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any

import joblib
import keras
import numpy as np
from numpy.typing import NDArray

import data
from data import fishlike, images
from data.files import cache_folder
from data.networks import WEIGHTS
from experiments.harness.running import Misuse
from influence import TopLayer
from influence.common.checkpoint import kept
from influence.common.progress import progress
from influence.models.top_layer import cut, scaled

# The features of this many images are stored in one file. An interruption loses at most one file.
_ROWS = 256
# The name of a file depends on this version. Increase it if new code changes the
# features.
_VERSION = 1
# A file stores under this key how many seconds its computation took.
_SECONDS = "seconds"
# The layers of the small network have these numbers of 5 x 5 filters.
_SMALL = (32, 64)
# The training of the learnt network: number of pictures, epochs, batch size, and Adam's learning
# rate. The training takes seconds. A head then classifies nine of ten pictures correctly.
_PICTURES, _PASSES, _BATCH, _RATE = 1000, 8, 32, 2e-3
# The features of the learnt network are scaled to this standard deviation, which suits the weight
# decay used for the other networks. With larger features, the head would be so confident that
# removals change nothing.
_DEVIATION = 0.3
# The scales of the random weights of `small`, and of `learnt` before its training. The first scale
# makes the features large enough for the weight decay that the other networks use.
_GAIN, _LEARNT_GAIN = 20, 2


@dataclass(frozen=True)
class Network:
    """A network and the layers at which it may be cut.

    Attributes:
      side: the side of the network's images in pixels.
      layers: names of the layers, from input to output. The network ends at the last layer. One
        pass over the images gives the features of all these layers.
    """

    side: int
    layers: tuple[str, ...]


NETWORKS = {
    "small": Network(32, tuple(f"relu{i}" for i in range(1, len(_SMALL) + 1))),
    "learnt": Network(32, tuple(f"relu{i}" for i in range(1, len(_SMALL) + 1))),
    "mobilenet": Network(224, tuple(f"conv_pw_{i}_relu" for i in range(9, 14))),
    "inception": Network(299, tuple(f"mixed{i}" for i in range(3, 9))),
    "inception-keras": Network(299, tuple(f"mixed{i}" for i in range(3, 11))),
}


def split(head: str) -> tuple[str, str]:
    """Split "network/layer" into the network and the layer.

    Raises: ValueError if there is no such network.
    """
    network, _, layer = head.partition("/")
    if network not in NETWORKS or not layer:
        raise ValueError(
            f"a head must be named network/layer with a network of {', '.join(NETWORKS)}, "
            f"got {head!r}."
        )
    return network, layer


def side(head: str) -> int:
    """Return the side in pixels of the images that a head's network takes."""
    return NETWORKS[split(head)[0]].side


def check(heads: Sequence[str], root: Path | None) -> None:
    """Check that the weights of all networks are present and that all layers exist.

    Args:
      heads: names of heads.
      root: data folder to search first.
    Raises: Misuse naming the missing file and its folder, or the existing layers.
    """
    by_network: dict[str, list[str]] = {}
    for head in heads:
        by_network.setdefault(split(head)[0], []).append(split(head)[1])
    try:
        for network in by_network:
            _weights(network, root)
        for network, layers in by_network.items():
            others = [layer for layer in layers if layer not in NETWORKS[network].layers]
            model = _built(network, root) if others else None
            for layer in others:
                cut(model, layer)
    except (OSError, ValueError) as error:
        raise Misuse(str(error)) from error


def trunk(head: str, root: Path | None) -> keras.Model:
    """Load the network under a head, with its weights, up to the head's layer.

    Args:
      head: name of the head.
      root: data folder to search first for the weights.
    Returns: a model from images in [-1, 1] to the output of the layer.
    Raises: ValueError if there is no such layer; the errors of `data.weights`.
    """
    network, layer = split(head)
    return cut(_built(network, root), layer)


def features(
    heads: Sequence[str],
    x: NDArray[np.uint8],
    *,
    root: Path | None,
    folder: Path | None,
) -> dict[str, NDArray]:
    """Compute the pooled features of images for each head, with one pass through each network.

    Args:
      heads: names of heads.
      x: (n, h, w, 3) uint8 images. They are resized if necessary.
      root: data folder to search first for the weights.
      folder: folder that stores the features as float32, or None.
    Returns: a dict from each head to its features (n, f) in float64, not standardised.
    Raises: the errors of `trunk`.
    """
    return timed_features(heads, x, root=root, folder=folder)[0]


def timed_features(
    heads: Sequence[str],
    x: NDArray[np.uint8],
    *,
    root: Path | None,
    folder: Path | None,
) -> tuple[dict[str, NDArray], float]:
    """Return the result of `features`, and the time of its computation.

    Args:
      heads: see `features`.
      x: see `features`.
      root: see `features`.
      folder: see `features`.
    Returns: the features, and the seconds that their computation took, without the resizing. The
      seconds are NaN if a stored file does not contain its time.
    Raises: the errors of `trunk`.
    """
    found: dict[str, dict[str, NDArray]] = {}
    for network in dict.fromkeys(split(head)[0] for head in heads):
        mine = {split(head)[1] for head in heads if split(head)[0] == network}
        layers = NETWORKS[network].layers
        if not mine <= set(layers):
            layers = tuple(sorted(mine))
        found[network] = _features_of(network, layers, x, root, folder)
    seconds = sum(float(of_network[_SECONDS]) for of_network in found.values())
    return {head: found[split(head)[0]][split(head)[1]] for head in heads}, seconds


def kept_in(stand_in: bool, checkpoints: Path | None) -> Path | None:
    """Return the folder for features: the user cache, which all runs share, or `checkpoints`.

    Args:
      stand_in: True if the data is a stand-in. Then the folder is `checkpoints`.
      checkpoints: the run's folder of checkpoints, or None. The features are also stored
        there if the user cache is not writable.
    """
    cache = cache_folder() / "features"
    if stand_in:
        return checkpoints
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return checkpoints
    return cache if os.access(cache, os.W_OK) else checkpoints


def _features_of(
    network: str,
    layers: tuple[str, ...],
    x: NDArray[np.uint8],
    root: Path | None,
    folder: Path | None,
) -> dict[str, NDArray]:
    """Return a dict from each layer to its features (n, f).

    The key `_SECONDS` holds the seconds that the computation of all features took.
    """
    x = images.resized(x, NETWORKS[network].side)
    net: TopLayer | None = None
    widths: list[int] = []

    def compute(rows: slice) -> dict[str, Any]:
        nonlocal net
        begun = perf_counter()
        if net is None:  # not needed if all files are stored
            model = _built(network, root)
            outputs = [cut(model, layer).output for layer in layers]
            widths.extend(output.shape[-1] for output in outputs)
            net = TopLayer(_side_by_side(outputs))
        pooled = net.features(x[rows]).astype(np.float32)  # the precision of their computation
        parts = np.split(pooled, np.cumsum(widths)[:-1], axis=1)
        found = dict(zip(layers, parts, strict=True))
        return found | {_SECONDS: perf_counter() - begun}

    name = folder and _name(network, layers, x, root)
    blocks = [
        kept(
            folder and folder / f"{network}-{name}-{start:05}.npz",
            partial(compute, slice(start, start + _ROWS)),
        )
        for start in progress(range(0, len(x), _ROWS), f"features of images by {network}")
    ]
    return {
        layer: np.concatenate([block[layer] for block in blocks]).astype(np.float64)
        for layer in layers
    } | {_SECONDS: np.array([float(block.get(_SECONDS, np.nan)) for block in blocks]).sum()}


def _name(network: str, layers: tuple[str, ...], x: NDArray[np.uint8], root: Path | None) -> str:
    """Return a hash, for file names, of everything on which the features depend."""
    path = _weights(network, root)
    weights = (
        WEIGHTS[network].digests[0] if path else joblib.hash(_built(network, root).get_weights())
    )
    versions = [metadata.version(package) for package in ("keras", "tensorflow")]
    digest = hashlib.sha256(repr((_VERSION, layers, weights, versions, x.shape)).encode())
    digest.update(np.ascontiguousarray(x).data)
    return digest.hexdigest()[:16]


def _side_by_side(outputs: list[Any]) -> keras.Model:
    """Build a model whose output is the concatenation of several layers' pooled outputs."""
    pooled = [keras.layers.GlobalAveragePooling2D()(output) for output in outputs]
    joined = pooled[0] if len(pooled) == 1 else keras.layers.Concatenate()(pooled)
    (first,) = keras.utils.get_source_inputs(joined)
    return keras.Model(first, joined)


def _weights(network: str, root: Path | None) -> Path | None:
    return data.weights(network, root) if network in WEIGHTS else None


def _built(network: str, root: Path | None) -> Any:
    """Build the network up to the last layer of its `layers`, with its weights."""
    path, side = _weights(network, root), NETWORKS[network].side
    options: dict[str, Any] = {"include_top": False, "input_shape": (side, side, 3)}
    if network == "small":
        return _small(options["input_shape"], _GAIN)
    if network == "learnt":
        return _learnt(options["input_shape"])
    if network == "mobilenet":
        return keras.applications.MobileNet(alpha=0.75, weights=str(path), **options)
    whole = keras.applications.InceptionV3(weights=None, **options)
    model = cut(whole, NETWORKS[network].layers[-1])
    model.load_weights(str(path))
    return model


def _small(shape: tuple[int, ...], gain: float) -> keras.Model:
    L = keras.layers
    layers: list[Any] = [keras.Input(shape)]
    for i, filters in enumerate(_SMALL, start=1):
        start = keras.initializers.VarianceScaling(gain, seed=i)
        bias = keras.initializers.RandomNormal(stddev=0.3, seed=len(_SMALL) + i)
        layers += [
            L.Conv2D(
                filters,
                5,
                strides=2,
                kernel_initializer=start,
                bias_initializer=bias,
                name=f"conv{i}",
            ),
            L.Activation("relu", name=f"relu{i}"),
        ]
    return keras.Sequential(layers, name="small")


@cache
def _learnt(shape: tuple[int, ...]) -> keras.Model:
    """Train the small network to classify pictures that are not in any data set."""
    x, y = fishlike.pictures(_PICTURES, seed=fishlike.SEED + 1)
    model = _small(shape, _LEARNT_GAIN)
    start = keras.initializers.RandomNormal(stddev=0.05, seed=0)
    head = keras.Sequential(
        [
            model,
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(1, kernel_initializer=start),
        ]
    )
    head.compile(keras.optimizers.Adam(_RATE), keras.losses.BinaryCrossentropy(from_logits=True))
    # The pictures are already in random order. Without a shuffle, the training does not depend on
    # the global seed.
    head.fit(scaled(x), y, batch_size=_BATCH, epochs=_PASSES, shuffle=False, verbose=0)  # pyright: ignore[reportArgumentType]
    # If the weights and biases before a ReLU are scaled, its output is scaled by the same factor.
    ratio = _DEVIATION / np.mean(model(scaled(x)), axis=(1, 2)).std()
    last = model.get_layer(f"conv{len(_SMALL)}")
    last.set_weights([ratio * weights for weights in last.get_weights()])
    return model
