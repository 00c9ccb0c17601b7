"""Tests of pretrained weights, which are found, verified and downloaded like data sets."""

import dataclasses
import hashlib

import pytest

import data
from data import files, networks
from data.networks import WEIGHTS

CONTENT = b"weights" * 100


@pytest.fixture
def weights(monkeypatch, tmp_path):
    """Give `weights(name, **changed)`, which registers CONTENT as weights and returns the path."""

    def expect(name, **changed):
        file = dataclasses.replace(
            WEIGHTS[name], size=len(CONTENT), digests=(hashlib.sha256(CONTENT).hexdigest(),)
        )
        monkeypatch.setitem(WEIGHTS, name, dataclasses.replace(file, **changed))
        return tmp_path / file.path

    return expect


def test_unknown_network():
    with pytest.raises(ValueError, match="name must be one of 'inception', .*, got 'vgg'"):
        data.weights("vgg")


def test_found_and_checked(weights, tmp_path):
    path = weights("mobilenet")
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert data.weights("mobilenet", tmp_path) == path
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(
        ValueError, match="is not the file it should be: expected 700 bytes with SHA"
    ):
        data.weights("mobilenet", tmp_path)


@pytest.mark.parametrize(
    ("name", "what", "known_by"),
    [
        ("mobilenet", "MobileNet v1 of width .75", "7,570,480 bytes  SHA-256 0a6d50d0"),
        ("inception", "Google's Inception v3 of 2015-12-05", "43,351,272 bytes  SHA-256 37855c12"),
    ],
)
def test_without_an_address_it_is_said_what_it_is(tmp_path, name, what, known_by):
    with pytest.raises(FileNotFoundError) as error:
        data.weights(name, tmp_path)
    message = str(error.value)
    assert message.startswith(f"{name}, the network's weights, was not found.")
    assert f"has no address to download from: get it by hand. It is {what}" in message
    assert known_by in message


@pytest.mark.usefixtures("online")
def test_kerass_own_are_known_by_the_digest_that_keras_gives(weights, serve, cache):
    url = serve({"/w.h5": CONTENT, "/other.h5": CONTENT[1:]})
    md5 = "md5:" + hashlib.md5(CONTENT).hexdigest()
    weights("inception-keras", digests=(md5,), urls=(f"{url}/other.h5", f"{url}/w.h5"))
    path = data.weights("inception-keras")
    assert path == cache / WEIGHTS["inception-keras"].path and path.read_bytes() == CONTENT
    assert serve.asked == ["/other.h5", "/w.h5"]
    path.write_bytes(CONTENT[1:])
    with pytest.raises(ValueError, match=f"expected 700 bytes with MD5 {md5[4:]}, found 699 bytes"):
        data.weights("inception-keras")


def test_kerass_address_and_digest_are_kerass():
    from keras.src.applications import inception_v3

    file = networks.WEIGHTS["inception-keras"]
    assert file.urls == (inception_v3.WEIGHTS_PATH_NO_TOP,)
    source = open(inception_v3.__file__, encoding="utf-8").read()
    assert file.digests[0].removeprefix("md5:") in source


REAL = {name: files.find((file,)) for name, file in WEIGHTS.items()}


@pytest.mark.real_data
@pytest.mark.parametrize("name", [name for name, folder in REAL.items() if folder is not None])
def test_real_weights(name):
    assert data.weights(name, REAL[name]).is_file()
