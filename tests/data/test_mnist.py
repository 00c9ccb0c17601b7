"""Tests of MNIST: the paper's split of generated files, and of the real files if they are found."""

import gzip
import shutil

import numpy as np
import pytest

import data
from tests.data.real import found

REAL, needs_mnist = found("mnist")


@pytest.fixture(scope="module")
def real():
    return data.load("mnist", REAL)


@needs_mnist
def test_real_split_sizes_and_label_counts(real):
    (x, y), (x_test, y_test) = real.train, real.test
    assert x.shape == (55_000, 784) and x_test.shape == (10_000, 784)
    # These are the counts in TensorFlow's 55,000 training rows, which the paper's code uses.
    assert np.bincount(y).tolist() == [5444, 6179, 5470, 5638, 5307, 4987, 5417, 5715, 5389, 5454]
    assert np.bincount(y_test).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@needs_mnist
def test_real_pixels_are_exactly_k_over_255(real):
    assert REAL is not None  # for the type checker
    num_pixels = 200 * 784
    with gzip.open(REAL / "mnist/train-images-idx3-ubyte.gz") as stream:
        stream.read(16 + 5_000 * 784)
        expected = [k / 255 for k in stream.read(num_pixels)]
    assert real.train[0].dtype == np.float64
    assert real.train[0][:200].ravel().tolist() == expected
    assert len(np.unique(real.test[0])) == 256


@needs_mnist
def test_real_digest_is_that_of_sha256sum(real):
    # To compute it in the data folder: sha256sum mnist/*.gz | sha256sum
    assert real.sha256 == "a543788378c65030524602bb5a889f62fb29b048b203e924277aaba1e80bf888"
    assert (real.name, real.stand_in) == ("mnist", False)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_split_pixels_and_dtypes(root, dtype):
    splits = data.load("mnist", root, dtype=dtype)
    train = splits.train, np.arange(5_000, 60_000)
    for (x, y), rows in (train, (splits.test, np.arange(10_000))):
        assert (x.shape, x.dtype) == ((len(rows), 784), np.dtype(dtype))
        # For every k, k/255 in float64, rounded to float32, equals k/255 computed in float32.
        expected = ((rows % 256) / 255).astype(dtype)
        np.testing.assert_array_equal(x[:, [0, -1]], np.stack([expected, expected], axis=1))
        assert y.dtype == np.int64
        np.testing.assert_array_equal(y, rows % 10)


def test_missing_file(root):
    (root / "mnist/t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError) as error:
        data.load("mnist", root)
    assert f"--data-dir {root}: lacks mnist/t10k-labels-idx1-ubyte.gz\n" in str(error.value)


def test_truncated_file_and_corrupted_byte(root):
    path = root / "mnist/train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    path.write_bytes(content[:1000])
    with pytest.raises(ValueError) as error:
        data.load("mnist", root)
    message = f"{path} is not the file it should be: expected {len(content):,} bytes"
    assert message in str(error.value)
    assert "found 1,000 bytes" in str(error.value) and "looks truncated" in str(error.value)
    assert len(path.read_bytes()) == 1000  # the file is left unchanged
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="train-images.* is not the file it should be") as error:
        data.load("mnist", root)
    assert "looks truncated" not in str(error.value)


@pytest.mark.parametrize(
    "spoilt, message",
    [
        ({"magic": 0x00000803}, "expected the idx magic number 0x00000801 .* found 0x00000803"),
        ({"trailing": b"\x00"}, "expected 60,000 bytes after the header, found more"),
        ({"num_rows": 59_999}, r"expected dimensions \(60000,\), found \(59999,\)"),
    ],
)
def test_wrong_content_though_its_checksum_is_the_expected_one(
    made_up_mnist, tmp_path, accept, write_idx, spoilt, message
):
    shutil.copytree(made_up_mnist, tmp_path / "root")
    labels = np.zeros(spoilt.pop("num_rows", 60_000), dtype=np.uint8)
    write_idx(tmp_path / "root/mnist/train-labels-idx1-ubyte.gz", labels, **spoilt)
    accept(tmp_path / "root")
    with pytest.raises(ValueError, match=f"train-labels-idx1-ubyte.gz: {message}"):
        data.load("mnist", tmp_path / "root")
