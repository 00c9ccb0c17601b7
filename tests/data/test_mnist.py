"""MNIST: the paper's split of the real files, if found, and of generated files."""

import gzip
import shutil

import numpy as np
import pytest

import data

REAL = data.find("mnist")  # before the fixtures hide the data


def needs_mnist(test):
    """Mark a test that reads the real files; without them it is skipped with a message."""
    reason = "MNIST not found; set INFLUENCE_DATA or run `python -m data fetch mnist`"
    return pytest.mark.real_data(pytest.mark.skipif(REAL is None, reason=reason)(test))


@pytest.fixture(scope="module")
def real():
    return data.load("mnist", REAL)


@needs_mnist
def test_real_split_sizes_and_label_counts(real):
    (x, y), (x_test, y_test) = real.train, real.test
    assert x.shape == (55_000, 784) and x_test.shape == (10_000, 784)
    # Counts of the 55,000 rows of TensorFlow's loader, which the paper's code uses.
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
    # Command in the data folder: sha256sum mnist/*.gz | sha256sum
    assert real.sha256 == "a543788378c65030524602bb5a889f62fb29b048b203e924277aaba1e80bf888"
    assert (real.name, real.stand_in) == ("mnist", False)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_split_pixels_and_dtypes(root, dtype):
    splits = data.load("mnist", root, dtype=dtype)
    for (x, y), rows in (
        (splits.train, np.arange(5_000, 60_000)),
        (splits.test, np.arange(10_000)),
    ):
        assert (x.shape, x.dtype) == ((len(rows), 784), np.dtype(dtype))
        # Two corners of each image. For every k, float64 k/255 rounds to float32 k/255.
        expected = ((rows % 256) / 255).astype(dtype)
        np.testing.assert_array_equal(x[:, [0, -1]], np.stack([expected, expected], axis=1))
        assert y.dtype == np.int64
        np.testing.assert_array_equal(y, rows % 10)


def test_missing_file(root):
    (root / "mnist/t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError) as error:
        data.load("mnist", root)
    assert f"--data-dir {root}: lacks mnist/t10k-labels-idx1-ubyte.gz\n" in str(error.value)


def test_truncated_file(root):
    path = root / "mnist/train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    with pytest.raises(ValueError) as error:
        data.load("mnist", root)
    assert f"{path} is not the file it should be: expected {len(content):,} bytes" in str(
        error.value
    )
    assert "found 1,000 bytes" in str(error.value) and "looks truncated" in str(error.value)
    assert len(path.read_bytes()) == 1000  # unchanged


def test_corrupted_byte(root):
    path = root / "mnist/t10k-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[500] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="t10k-images.* is not the file it should be") as error:
        data.load("mnist", root)
    assert "truncated" not in str(error.value)


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
