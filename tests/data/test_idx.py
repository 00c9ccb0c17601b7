"""Tests of the idx reader: valid files, and errors that name the fault of a file."""

import gzip

import numpy as np
import pytest

from data.idx import read_idx

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
HEADER = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "images.gz"


def test_reads_back_what_was_written(path, write_idx):
    write_idx(path, PIXELS)
    found = read_idx(path, (2, 3, 4))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, PIXELS)


@pytest.mark.parametrize("magic", [0x00000801, 0x00000D03, 0x03080000])
def test_wrong_magic_number(path, write_idx, magic):
    write_idx(path, PIXELS, magic=magic)
    with pytest.raises(ValueError) as error:
        read_idx(path, (2, 3, 4))
    assert str(path) in str(error.value)
    assert "expected the idx magic number 0x00000803" in str(error.value)
    assert f"found 0x{magic:08x}" in str(error.value)


@pytest.mark.parametrize(
    ("content", "shape", "message"),
    [
        (HEADER + bytes(24), (3, 2, 4), r"dimensions \(3, 2, 4\), found \(2, 3, 4\)"),
        (HEADER[:6], (2, 3, 4), "an idx header of 16 bytes, found 6 bytes"),
        (HEADER + b"abc", (2, 3, 4), "24 bytes after the header, found 3"),
        (HEADER + bytes(25), (2, 3, 4), "24 bytes after the header, found more"),
    ],
    ids=["dimensions", "header cut short", "too few values", "trailing bytes"],
)
def test_wrong_content(path, content, shape, message):
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=f"expected {message}"):
        read_idx(path, shape)


SPOILT = {
    "cut": lambda content: content[:-12],
    "checksum": lambda content: content[:-8] + bytes(4) + content[-4:],
    "stream": lambda content: content[:10] + b"\xff" * 8 + content[18:],
    "no gzip": gzip.decompress,
    "garbage after": lambda content: content + b"garbage",
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_broken_gzip(path, write_idx, spoil):
    write_idx(path, PIXELS)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        read_idx(path, (2, 3, 4))
    assert str(error.value).startswith(f"{path}: expected a complete gzip file, found: ")
