"""Tests of Dogfish: the authors' order of photographs, in each folder layout, and the stand-in."""

import numpy as np
import pytest
from PIL import Image

import data
from data import dogfish, images
from data import fishlike as generated
from tests.data.real import found

REAL, needs_dogfish = found("dogfish")
TRAIN, TEST = 6, 4  # rows per class in the generated sets
SIDE = 8


@pytest.fixture(scope="module")
def real():
    return data.load("dogfish", REAL)


@needs_dogfish
def test_real_split(real):
    (x, y), (x_test, y_test) = real.train, real.test
    assert x.shape == (1_800, 224, 224, 3) and x_test.shape == (600, 224, 224, 3)
    assert x.dtype == np.uint8 and y.dtype == np.int64
    assert (y.sum(), y_test.sum()) == (900, 300)
    assert not real.stand_in and real.folder == REAL
    with pytest.raises(ValueError, match="read-only"):
        x[0, 0, 0, 0] = 1


@needs_dogfish
def test_classes_are_where_the_releases_notebooks_have_them(real):
    # The notebooks show that test point 462 and training images 1380, 203, 1723, 550, 1250 and 1141
    # are fish. They also show that training images 526, 664, 607, 786 and 1623 are dogs. In a wrong
    # order, all 12 labels would agree with a probability of only 2^-12.
    assert real.test[1][462] == 1
    assert real.train[1][[1380, 203, 1723, 550, 1250, 1141]].tolist() == [1] * 6
    assert real.train[1][[526, 664, 607, 786, 1623]].tolist() == [0] * 5


# --- generated photographs ------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Make the data set expect few and small photographs."""
    sizes = {"NUM_TRAIN": TRAIN, "NUM_TEST": TEST, "PAPERS_SIDE": SIDE, "IMAGENETTES_SIDE": SIDE}
    for name, value in sizes.items():
        monkeypatch.setattr(dogfish, name, value)


def plain(path, level):
    """Write a photograph of one grey level. The level identifies the photograph."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (SIDE, SIDE), (level,) * 3).save(path, "PNG")


@pytest.fixture
def imagenettes(tmp_path, small):
    """Return a folder of photographs. Number k of class c in split s has grey 100 c + 10 s + k.

    Each split has two photographs per class more than the data set uses.
    """
    for c, synset in enumerate(dogfish.IMAGENETTES):
        for s, (split, count) in enumerate((("train", TRAIN), ("val", TEST))):
            for k in range(count + 2):
                plain(tmp_path / "dogfish" / split / synset / f"p_{k}.JPEG", 100 * c + 10 * s + k)
    return tmp_path


def check(splits, level):
    """Check that the rows have the order that seed 0 gives.

    `level(c, s, k)` must return the grey level of photograph k of class c in split s.
    """
    rng = np.random.RandomState(0)  # one random stream orders the training rows, then the test rows
    for s, (count, (x, y)) in enumerate(((TRAIN, splits.train), (TEST, splits.test))):
        levels = np.array([level(c, s, k) for c in (0, 1) for k in range(count)])
        order = rng.permutation(2 * count)
        assert x.shape == (2 * count, SIDE, SIDE, 3)
        np.testing.assert_array_equal(x[:, 3, 4, 1], levels[order])
        np.testing.assert_array_equal(y, np.repeat([0, 1], count)[order])


def test_imagenettes_folders(imagenettes):
    splits = data.load("dogfish", imagenettes)
    check(splits, lambda c, s, k: 100 * c + 10 * s + k)
    assert splits.folder == imagenettes
    assert data.load("dogfish", imagenettes, dtype="float32").train[0].dtype == np.uint8


def test_the_synsets_folders_in_the_order_of_their_numbers(tmp_path, small):
    numbers = [3, 20, 100, 7, 1000, 33, 4, 51, 602, 8, 77]  # eleven images, of which ten are used
    for c, synset in enumerate(dogfish.PAPERS):
        for number in numbers:
            rank = sorted(numbers).index(number)
            plain(tmp_path / "dogfish" / synset / f"{synset}_{number}.JPEG", 100 * c + rank)
    check(data.load("dogfish", tmp_path), lambda c, s, k: 100 * c + TRAIN * s + k)


def published(folder, **changed):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", TRAIN), ("test", TEST)):
        pixels = rng.integers(0, 256, (2 * count, SIDE, SIDE, 3))
        arrays[f"X_{split}"] = pixels / 127.5 - 1
        arrays[f"Y_{split}"] = rng.permutation(2 * count) % 2.0
    path = folder / "dogfish" / dogfish.PUBLISHED
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{k: v for k, v in (arrays | changed).items() if v is not None})
    return arrays


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_published_arrays_become_bytes_again(tmp_path, small, dtype):
    arrays = published(tmp_path)
    published(tmp_path, X_train=arrays["X_train"].astype(dtype))
    splits = data.load("dogfish", tmp_path)
    for split, (x, y) in (("train", splits.train), ("test", splits.test)):
        np.testing.assert_allclose(x / 127.5 - 1, arrays[f"X_{split}"], atol=1e-12)
        np.testing.assert_array_equal(y, arrays[f"Y_{split}"])
        assert x.dtype == np.uint8 and y.dtype == np.int64


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"X_test": None}, "expected arrays X_test and Y_test, found: .*X_test"),
        ({"Y_train": np.array(["dog"] * 12)}, "expected arrays X_train and Y_train, found"),
        ({"X_train": np.zeros((3, SIDE, SIDE, 3))}, r"expected X_train \(12, 8, 8, 3\) with 6"),
        ({"Y_test": np.zeros(8)}, r"expected X_test \(8, 8, 8, 3\) with 4 labels of each class"),
        ({"X_train": np.full((12, SIDE, SIDE, 3), 0.5)}, "scaled to .* found values from 0.5 to"),
        ({"X_train": np.full((12, SIDE, SIDE, 3), np.nan)}, "scaled to .* found values from nan"),
        ({"X_train": np.full((12, SIDE, SIDE, 3), None)}, "expected arrays X_train"),
    ],
)
def test_published_arrays_that_are_not(tmp_path, small, changed, message):
    published(tmp_path, **changed)
    with pytest.raises(ValueError, match=message):
        data.load("dogfish", tmp_path)


def test_published_arrays_that_are_no_archive(tmp_path, small):
    published(tmp_path)
    path = tmp_path / "dogfish" / dogfish.PUBLISHED
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="npz: expected arrays X_train and Y_train, found"):
        data.load("dogfish", tmp_path)


def test_too_few_photographs(imagenettes):
    folder = imagenettes / "dogfish/val" / dogfish.IMAGENETTES[1]
    for path in images.photographs(folder)[:3]:
        path.unlink()
    with pytest.raises(ValueError) as error:
        data.load("dogfish", imagenettes)
    message = str(error.value)
    assert message.startswith(f"{folder}: expected at least 4 photographs, found 3. dogfish is")
    for what in ("train/{n02102040,n01440764}/*.JPEG", "{n02084071,n02512053}/*.JPEG", ".npz"):
        assert what in message


def test_a_broken_photograph_is_named_and_the_next_takes_its_place(imagenettes):
    path = imagenettes / "dogfish/train" / dogfish.IMAGENETTES[0] / "p_2.JPEG"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"p_2.JPEG: expected a whole JPEG"):
        data.load("dogfish", imagenettes)
    path.unlink()
    levels = data.load("dogfish", imagenettes).train[0][:, 0, 0, 0]
    assert sorted(levels)[:TRAIN] == [0, 1, 3, 4, 5, 6]


def test_the_digest_says_which_photographs_they_are(imagenettes):
    before = data.load("dogfish", imagenettes).sha256
    assert data.load("dogfish", imagenettes).sha256 == before
    plain(imagenettes / "dogfish/train" / dogfish.IMAGENETTES[0] / "p_2.JPEG", 77)
    assert data.load("dogfish", imagenettes).sha256 != before


def test_nowhere_to_be_found(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        data.load("dogfish", tmp_path)
    message = str(error.value)
    assert "dogfish was not found." in message
    assert f"--data-dir {tmp_path}: lacks dogfish" in message
    assert "no address to download from: get it by hand. It is one of these" in message
    assert "val/{...}/*.JPEG: English springer and tench" in message
    assert data.find("dogfish", tmp_path) is None


# --- the stand-in ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fishlike():
    return data.load("fishlike")


def test_stand_in_is_pictures_of_two_kinds(fishlike):
    (x, y), (x_test, y_test) = fishlike.train, fishlike.test
    assert fishlike.stand_in and fishlike.folder is None
    assert x.shape == (200, 32, 32, 3) and x_test.shape == (80, 32, 32, 3)
    assert x.dtype == x_test.dtype == np.uint8 and y.dtype == np.int64
    assert np.bincount(y).tolist() == [100, 100] and np.bincount(y_test).tolist() == [40, 40]
    assert x.std(axis=(1, 2, 3)).min() > 5  # no image is blank
    assert len(np.unique(x.reshape(200, -1), axis=0)) == 200


def test_further_pictures_are_drawn_like_those_of_the_stand_in(fishlike):
    x, y = generated.pictures(200, generated.SEED)
    np.testing.assert_array_equal(x, fishlike.train[0])
    np.testing.assert_array_equal(y, fishlike.train[1])
    other, labels = generated.pictures(60, generated.SEED + 1)
    assert np.bincount(labels).tolist() == [30, 30]
    seen = {picture.tobytes() for picture in (*x, *fishlike.test[0])}
    assert not any(picture.tobytes() in seen for picture in other)
