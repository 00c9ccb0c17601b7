"""The idx format of the MNIST files, described at http://yann.lecun.com/exdb/mnist/.

A file begins with two zero bytes, a type code (8 means unsigned byte) and the number of dimensions.
Each dimension follows as a big-endian 32-bit integer, then the values in C order.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from influence_console import shown

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes with a known shape.

    Args:
      path: the .gz file.
      shape: the dimensions that the file must have.
    Returns: a read-only uint8 array of that shape.
    Raises: ValueError naming the file if it is not a complete gzip file, or if its magic number,
      dimensions or length are wrong.
    """
    header_size = 4 + 4 * len(shape)
    num_values = math.prod(shape)
    try:
        with gzip.open(path) as stream:
            header = stream.read(header_size)
            # We ask for one byte more, to detect trailing bytes and to make gzip verify its
            # checksum. We ask for no more, because a small file may unpack to terabytes.
            values = stream.read(num_values + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{shown(path)}: expected a complete gzip file, found: {error}") from error

    if len(header) < header_size:
        raise ValueError(
            f"{shown(path)}: expected an idx header of {header_size} bytes, "
            f"found {len(header)} bytes in all."
        )
    magic, *dimensions = struct.unpack(f">{1 + len(shape)}I", header)
    expected_magic = _UNSIGNED_BYTE << 8 | len(shape)
    if magic != expected_magic:
        raise ValueError(
            f"{shown(path)}: expected the idx magic number 0x{expected_magic:08x} (unsigned "
            f"bytes, {len(shape)} dimensions), found 0x{magic:08x}."
        )
    if tuple(dimensions) != tuple(shape):
        raise ValueError(
            f"{shown(path)}: expected dimensions {tuple(shape)}, found {tuple(dimensions)}."
        )
    if len(values) != num_values:
        found = "more" if len(values) > num_values else f"{len(values):,}"
        raise ValueError(
            f"{shown(path)}: expected {num_values:,} bytes after the header, found {found}."
        )
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)
