"""Photographs as arrays of bytes: decoded, with three channels, resized to a square."""

import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from influence_console import shown

SUFFIXES = (".jpeg", ".jpg", ".png")
# A file may have either format, whatever its suffix. One of ImageNet's .JPEG files is a PNG.
_FORMATS = ("JPEG", "PNG")


def photographs(folder: Path) -> list[Path]:
    """List, in sorted order, the files in a folder that have a suffix of SUFFIXES.

    Hidden files are left out.
    """
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def read(paths: Sequence[Path], side: int) -> NDArray[np.uint8]:
    """Read photographs, convert them to RGB, and resize them to squares.

    Args:
      paths: k JPEG or PNG files.
      side: pixels of each side.
    Returns: (k, side, side, 3) uint8. Photographs of another size are resized bicubically without
      keeping their proportions, as in Koh & Liang's code.
    Raises: ValueError naming a file that is not a complete photograph.
    """
    images = np.empty((len(paths), side, side, 3), np.uint8)
    for image, path in _shown(images, paths, "reading photographs"):
        image[:] = np.asarray(_squeezed(_decoded(path), side))
    return images


def resized(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Resize images to squares, bicubically.

    Args:
      images: (k, h, w, 3) uint8.
      side: pixels of each side.
    Returns: (k, side, side, 3) uint8; `images` itself if it has that size.
    Raises: ValueError if images has another number of axes or channels, or another dtype.
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
    """Yield pairs from `to` and `what`; show progress on stderr after five seconds.

    A terminal shows a moving bar. A log file gets one line every half a minute.
    """
    # The settings equal those of influence.common.progress. This package may not import it.
    every = 0.5 if sys.stderr.isatty() else 30
    pairs = zip(to, what, strict=True)
    yield from tqdm(
        pairs, name, len(to), leave=False, delay=5, mininterval=every, dynamic_ncols=True
    )


def _decoded(path: Path) -> Image.Image:
    try:
        with Image.open(io.BytesIO(path.read_bytes()), formats=_FORMATS) as image:
            return image.convert("RGB")
    # Pillow raises these errors for broken files. A decompression bomb unpacks to gigabytes.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file could not be read, so the photograph may be good
        raise ValueError(
            f"{shown(path)}: expected a whole JPEG or PNG photograph, found: {error}. It was left "
            "untouched: replace it, or move it away and the next one by name takes its place."
        ) from error


def _squeezed(image: Image.Image, side: int) -> Image.Image:
    if image.size == (side, side):
        return image
    return image.resize((side, side), Image.Resampling.BICUBIC)
