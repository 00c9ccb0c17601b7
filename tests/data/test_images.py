"""Tests of photographs: conversion to square RGB images, and errors that name broken files."""

import numpy as np
import pytest
from PIL import Image

from data import images

SIDE = 16


def smooth(height=SIDE, width=SIDE):
    """Return an image whose colours change slowly, so that JPEG preserves them."""
    v, u = np.mgrid[:height, :width]
    channels = 60 + 120 * u / width, 200 - 100 * v / height, 90 + 60 * (u + v) / (height + width)
    return np.stack(channels, axis=2).astype(np.uint8)


@pytest.fixture
def save(tmp_path):
    def saved(pixels, name="a.JPEG", mode="RGB", kind="JPEG"):
        path = tmp_path / name
        Image.fromarray(pixels).convert(mode).save(path, kind, quality=98)
        return path

    return saved


def test_a_photograph_of_the_right_size_is_taken_as_it_is(save):
    # The suffix does not fit the format, as in one of ImageNet's files.
    path = save(smooth(), kind="PNG")
    found = images.read([path, path], SIDE)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, [smooth(), smooth()])


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("RGBA", "PNG"), ("RGB", "JPEG")])
def test_other_modes_keep_their_colours(save, mode, kind):
    (found,) = images.read([save(smooth(), mode=mode, kind=kind)], SIDE)
    # JPEG compression changes values slightly.
    assert np.abs(found.astype(int) - smooth()).max() < 12


def test_grey_becomes_three_equal_channels(save):
    (found,) = images.read([save(smooth(), mode="L")], SIDE)
    assert found.shape == (SIDE, SIDE, 3)
    assert (found[..., 0] == found[..., 1]).all() and (found[..., 0] == found[..., 2]).all()
    luminance = smooth() @ [0.299, 0.587, 0.114]  # weights of the ITU-R 601 standard
    assert np.abs(found[..., 0] - luminance).max() < 8


def test_how_far_it_is_is_shown_if_it_takes_long(save, capfd, monkeypatch):
    paths = [save(smooth(40, 64))] * 2
    silent = images.read(paths, SIDE)
    assert capfd.readouterr() == ("", "")
    tqdm = images.tqdm
    monkeypatch.setattr(images, "tqdm", lambda *a, **k: tqdm(*a, **{**k, "delay": 0}))
    np.testing.assert_array_equal(images.read(paths, SIDE), silent)
    out, err = capfd.readouterr()
    assert "reading photographs" in err and "0/2" in err and out == ""
    images.resized(silent, 8)
    assert "resizing photographs" in capfd.readouterr().err


def test_other_sizes_are_squeezed(save):
    (found,) = images.read([save(smooth(40, 64))], SIDE)
    assert np.abs(found.astype(int) - smooth()).max() < 12
    again = images.resized(found[None], 8)
    assert again.shape == (1, 8, 8, 3) and again.dtype == np.uint8
    means = found.reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    assert np.abs(again[0].astype(float) - means).max() < 6
    assert images.resized(again, 8) is again


WHOLE = "a.JPEG: expected a whole JPEG or PNG photograph, found"


@pytest.mark.parametrize("size", [0, 1, 40, 300])
def test_a_truncated_photograph_is_named(save, size):
    path = save(smooth())
    content = path.read_bytes()
    assert len(content) > 300
    path.write_bytes(content[:size])
    with pytest.raises(ValueError, match=f"{WHOLE}.*move it away"):
        images.read([path], SIDE)


@pytest.mark.parametrize("content", [b"<html>not found</html>", b"GIF89a" + bytes(40)])
def test_something_else_and_a_bomb_are_refused(save, content, monkeypatch):
    path = save(smooth())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=f"{WHOLE}.* decompression bomb"):
        images.read([path], SIDE)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=WHOLE):
        images.read([path], SIDE)


def test_an_error_of_the_disk_is_not_the_photographs(tmp_path):
    with pytest.raises(FileNotFoundError):
        images.read([tmp_path / "none.JPEG"], SIDE)


def test_photographs_are_found_by_name(tmp_path):
    for name in ("b.JPEG", "a.jpg", "c.Png", ".hidden.JPEG", "d.txt", "e.JPEG.partial"):
        (tmp_path / name).touch()
    assert [path.name for path in images.photographs(tmp_path)] == ["a.jpg", "b.JPEG", "c.Png"]
    assert images.photographs(tmp_path / "none") == []


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), "u1"), np.zeros((2, 4, 4, 1), "u1")]
)
def test_what_cannot_be_resized(wrong):
    with pytest.raises(ValueError, match=r"images must be \(k, h, w, 3\) of uint8, got"):
        images.resized(wrong, 8)
