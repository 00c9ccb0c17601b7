"""The idx reader: valid files, and errors that name what is wrong with a file."""

import gzip

import numpy as np
import pytest

from data.idx import read_idx

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


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


def test_wrong_dimensions(path, write_idx):
    write_idx(path, PIXELS)
    with pytest.raises(ValueError, match=r"expected dimensions \(3, 2, 4\), found \(2, 3, 4\)"):
        read_idx(path, (3, 2, 4))


def test_header_cut_short(path):
    path.write_bytes(gzip.compress(b"\x00\x00\x08\x03\x00\x00"))
    with pytest.raises(ValueError, match="expected an idx header of 16 bytes, found 6 bytes"):
        read_idx(path, (2, 3, 4))


def test_too_few_values(path):
    header = b"\x00\x00\x08\x01\x00\x00\x00\x05"
    path.write_bytes(gzip.compress(header + b"abc"))
    with pytest.raises(ValueError, match="expected 5 bytes after the header, found 3"):
        read_idx(path, (5,))


def test_trailing_bytes(path, write_idx):
    write_idx(path, PIXELS, trailing=b"x")
    with pytest.raises(ValueError, match="expected 24 bytes after the header, found more"):
        read_idx(path, (2, 3, 4))


def cut(content):
    return content[:-12]


def corrupt_checksum(content):
    return content[:-8] + bytes(4) + content[-4:]


def corrupt_stream(content):
    return content[:10] + b"\xff" * 8 + content[18:]


def not_gzip(content):
    return gzip.decompress(content)


def garbage_after(content):
    return content + b"garbage"


@pytest.mark.parametrize("spoil", [cut, corrupt_checksum, corrupt_stream, not_gzip, garbage_after])
def test_broken_gzip(path, write_idx, spoil):
    write_idx(path, PIXELS)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        read_idx(path, (2, 3, 4))
    assert str(error.value).startswith(f"{path}: expected a complete gzip file, found: ")
