"""Photographs as arrays of bytes: decoded, in three channels, squeezed to a square."""

import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

SUFFIXES = (".jpeg", ".jpg", ".png")
_FORMATS = ("JPEG", "PNG")  # whatever the name says: ImageNet has a PNG among its .JPEGs


def photographs(folder: Path) -> list[Path]:
    """The files of a folder that are photographs by name, sorted; hidden ones are left out."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def read(paths: Sequence[Path], side: int) -> NDArray[np.uint8]:
    """Photographs as squares, whatever their proportions; grey and CMYK ones become RGB.

    Args:
      paths: k JPEG or PNG files.
      side: pixels, of each to be had.
    Returns: (k, side, side, 3) uint8. A photograph of that size is taken as it is, another is
      resized bicubically, its proportions given up as in Koh & Liang's code.
    Raises: ValueError naming the file if one is no whole photograph.
    """
    images = np.empty((len(paths), side, side, 3), np.uint8)
    for image, path in _shown(images, paths, "reading photographs"):
        image[:] = np.asarray(_squeezed(_decoded(path), side))
    return images


def resized(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Squares of another size, bicubically.

    Args:
      images: (k, h, w, 3) uint8.
      side: pixels.
    Returns: (k, side, side, 3) uint8; `images` itself where that is its size.
    Raises: ValueError for another shape or dtype.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"images must be (k, h, w, 3) of uint8, got {images.dtype} {images.shape}."
        )
    if images.shape[1:3] == (side, side):
        return images
    found = np.empty((len(images), side, side, 3), np.uint8)
    for image, pixels in _shown(found, images, "resizing photographs"):
        image[:] = np.asarray(_squeezed(Image.fromarray(pixels), side))
    return found


def _shown(to: NDArray, what: Sequence | NDArray, name: str) -> Iterator[tuple[NDArray, Any]]:
    """Each place with what goes there; on the standard error how far it is, after five seconds.

    A terminal gets a moving bar, a log a line every half a minute.
    """
    # As influence.common.progress has it, which is above this package.
    every = 0.5 if sys.stderr.isatty() else 30
    pairs = zip(to, what, strict=True)
    yield from tqdm(
        pairs, name, len(to), leave=False, delay=5, mininterval=every, dynamic_ncols=True
    )


def _decoded(path: Path) -> Image.Image:
    try:
        with Image.open(io.BytesIO(path.read_bytes()), formats=_FORMATS) as image:
            return image.convert("RGB")
    # Pillow's errors for broken files; a bomb is a file that unpacks to gigabytes.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, not the photograph's
        raise ValueError(
            f"{path}: expected a whole JPEG or PNG photograph, found: {error}. It was left "
            "untouched: replace it, or move it away and the next one by name takes its place."
        ) from error


def _squeezed(image: Image.Image, side: int) -> Image.Image:
    if image.size == (side, side):
        return image
    return image.resize((side, side), Image.Resampling.BICUBIC)
