"""Weights of networks trained on ImageNet. They are found and checked like data sets."""

from pathlib import Path

from data import download, files
from data.files import DataFile

_KERAS = "https://storage.googleapis.com/tensorflow/keras-applications/inception_v3/"
_NOTOP = "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5"

WEIGHTS = {
    # Google's Inception v3 of 2015 in the weight layout of Keras. The layers up to mixed8 equal the
    # original; the file holds no later layers.
    "inception": DataFile(
        "inception/inception_v3_2015_to_mixed8.weights.h5",
        43_351_272,
        ("37855c123fc26ccb3b0df85a9c3b976deffe904127fa8424e5ed522e8eab17c1",),
        contents=(
            "Google's Inception v3 of 2015-12-05, trained on ImageNet (Apache-2.0), its batch "
            "normalisation folded, up to layer mixed8: what save_weights writes of "
            "keras.Model(base.input, base.get_layer('mixed8').output) with base = "
            "keras.applications.InceptionV3(include_top=False, input_shape=(299, 299, 3)). "
            "Another training of that network, Keras' own, is inception-keras, which is downloaded."
        ),
    ),
    # The whole Inception v3 without its top layer, as Keras trained it. Keras publishes the digest.
    "inception-keras": DataFile(
        f"inception/{_NOTOP}",
        87_910_968,
        ("md5:bcbd6486424b2319ff4ef7d526e38f63",),
        (_KERAS + _NOTOP,),
    ),
    "mobilenet": DataFile(
        "mobilenet/mobilenet_v1_0.75_224_notop.weights.h5",
        7_570_480,
        ("0a6d50d0e079cbf32309bbff2b4457075cc6c5c79a8bb1efe1f12e7ae0f89589",),
        contents=(
            "MobileNet v1 of width .75 for 224 pixels, trained on ImageNet (Apache-2.0): what "
            "save_weights writes of keras.applications.MobileNet(alpha=0.75, include_top=False, "
            "input_shape=(224, 224, 3)) with it."
        ),
    ),
}


def weights(name: str, root: files.Root = None) -> Path:
    """Find and check the file of a trained network's weights. Download it if it is missing.

    The file is an HDF5 file of arrays and contains no code.

    Args:
      name: a key of WEIGHTS.
      root: a folder to look in before $INFLUENCE_DATA and the user cache, or None.
    Returns: the path of the file.
    Raises: ValueError if there is no such network or the file is not the expected one;
      FileNotFoundError, describing the file to provide, if it could not be found or downloaded.
    """
    if name not in WEIGHTS:
        raise ValueError(f"name must be one of {', '.join(map(repr, WEIGHTS))}, got {name!r}.")
    file = WEIGHTS[name]
    folder = download.obtain(f"{name}, the network's weights,", (file,), root)
    files.verify((file,), folder)
    return folder / file.path
