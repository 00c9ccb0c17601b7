"""Tests of downloads from a local server. The result is a complete, verified file or no file."""

import hashlib
import io
import os
import stat
import zipfile
from functools import partial

import pytest

import data
from data.download import fetch
from data.files import DataFile

CONTENT = bytes(range(256)) * 400  # a hundred times pooch's chunk size
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def expecting(*urls):
    return [DataFile("set/file.bin", len(CONTENT), (DIGEST,), urls)]


def everything_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def drop(handler, announced=True):
    """Send half of the content and close the connection, with or without announcing the length."""
    handler.send_response(200)
    if announced:
        handler.send_header("Content-Length", str(len(CONTENT)))
    handler.end_headers()
    handler.wfile.write(CONTENT[: len(CONTENT) // 2])


@pytest.fixture
def folder(tmp_path, online):
    return tmp_path / "folder"


def test_good_download_obeys_the_umask(folder, serve):
    url = serve({"/file.bin": CONTENT})
    before = os.umask(0o022)
    try:
        fetch(expecting(f"{url}/file.bin"), folder)
    finally:
        os.umask(before)
    assert (folder / "set/file.bin").read_bytes() == CONTENT
    assert everything_in(folder) == ["file.bin"]
    assert stat.S_IMODE((folder / "set/file.bin").stat().st_mode) == 0o644


@pytest.mark.parametrize(
    "answer, reason",
    [
        (None, "HTTPError: 404"),
        (drop, "IncompleteRead"),
        (partial(drop, announced=False), "does not match the known hash"),
        (b"<html>not what you asked for</html>", f"expected {DIGEST}"),
    ],
)
def test_failed_download_leaves_nothing_and_says_why(folder, serve, answer, reason):
    url = serve({"/file.bin": answer}) + "/file.bin"
    with pytest.raises(ConnectionError) as error:
        fetch(expecting(url), folder)
    assert "set/file.bin could not be had from" in str(error.value)
    assert f"{url}: " in str(error.value) and reason in str(error.value)
    assert everything_in(folder) == []


@pytest.mark.parametrize("answer", [None, drop, b"wrong"])
def test_second_mirror_is_used_when_the_first_fails(folder, serve, answer):
    url = serve({"/first": answer, "/second": CONTENT})
    fetch(expecting(f"{url}/first", f"{url}/second"), folder)
    assert serve.asked == ["/first", "/second"]
    assert (folder / "set/file.bin").read_bytes() == CONTENT


def test_every_mirror_that_failed_is_named(folder, serve):
    url = serve({"/second": b"wrong"})
    with pytest.raises(ConnectionError) as error:
        fetch(expecting("http://127.0.0.1:1/closed", f"{url}/second"), folder)
    assert "http://127.0.0.1:1/closed: ConnectionError: " in str(error.value)
    assert f"{url}/second: ValueError: " in str(error.value)


@pytest.mark.parametrize("content", [CONTENT, b"the user's own"])
def test_file_already_there_is_never_overwritten(folder, serve, content):
    url = serve({"/file.bin": CONTENT})
    (folder / "set").mkdir(parents=True)
    (folder / "set/file.bin").write_bytes(content)
    if content == CONTENT:
        fetch(expecting(f"{url}/file.bin"), folder)
    else:
        with pytest.raises(ValueError, match="file.bin is not the file it should be"):
            fetch(expecting(f"{url}/file.bin"), folder)
    assert serve.asked == []
    assert (folder / "set/file.bin").read_bytes() == content


def test_offline(folder, serve, monkeypatch):
    url = serve({"/file.bin": CONTENT})
    monkeypatch.setenv("INFLUENCE_OFFLINE", "1")
    with pytest.raises(ConnectionError, match="INFLUENCE_OFFLINE=1 is set; unset it to download"):
        fetch(expecting(f"{url}/file.bin"), folder)
    assert serve.asked == []
    monkeypatch.setenv("INFLUENCE_OFFLINE", "0")
    fetch(expecting(f"{url}/file.bin"), folder)


def test_file_without_an_address(folder):
    with pytest.raises(ConnectionError, match="set/file.bin has no address to download from"):
        fetch(expecting(), folder)


def test_folder_that_cannot_be_made(folder, serve):
    url = serve({"/file.bin": CONTENT})
    folder.write_bytes(b"a file where the folder should be")
    with pytest.raises(ConnectionError, match="NotADirectoryError.*set"):
        fetch(expecting(f"{url}/file.bin"), folder)


def zipped(name):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        writer.writestr(name, CONTENT)
    return archive.getvalue()


def test_member_of_a_zip_archive(folder, serve):
    url = serve({"/set.zip": zipped("a folder/file.bin")})
    fetch(expecting(f"{url}/set.zip#a%20folder/file.bin"), folder)
    assert (folder / "set/file.bin").read_bytes() == CONTENT
    assert everything_in(folder) == ["file.bin"]


@pytest.mark.parametrize(
    "archive, found", [(zipped("other.bin"), "no item named"), (b"PK", "not a zip file")]
)
def test_zip_archive_without_the_member(folder, serve, archive, found):
    url = serve({"/set.zip": archive})
    with pytest.raises(ConnectionError) as error:
        fetch(expecting(f"{url}/set.zip#file.bin"), folder)
    assert "expected a zip archive with file.bin in it, found: " in str(error.value)
    assert found in str(error.value)
    assert everything_in(folder) == []


def test_load_downloads_into_the_cache(made_up_mnist, accept, serve, cache, tmp_path, online):
    answers = {}
    for file in accept(made_up_mnist, serve(answers)):
        answers[f"/{file.path}"] = (made_up_mnist / file.path).read_bytes()
    splits = data.load("mnist", tmp_path / "elsewhere", dtype="float32")
    assert splits.train[0].shape == (55_000, 784)
    assert data.find("mnist") == cache
    # Loading never writes to the folder that the caller names.
    assert not (tmp_path / "elsewhere").exists()
    assert len(serve.asked) == 4

    data.load("mnist", dtype="float32")
    assert len(serve.asked) == 4
