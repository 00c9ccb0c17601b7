"""Tests of reading tar archives into memory: size limits, and equal results for any packing."""

import dataclasses
import gzip
import io
import tarfile

import pytest

from data import download, files
from data.archive import read_folder, read_tar
from data.files import DataFile

CONTENTS = {"Summary.txt": b"two\n", "ham/a.txt": b"one\r\n", "spam/b.txt": b"\xe9" * 700}
SIZE = sum(map(len, CONTENTS.values()))


def pack(contents, *, top="set", mtime=0, extra=(), suffix=b"", reverse=False):
    """Return a gzipped tar archive of the files in `contents`, as bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in sorted(contents, reverse=reverse):
            member = tarfile.TarInfo(f"{top}/{name}")
            member.size, member.mtime = len(contents[name]), mtime
            archive.addfile(member, io.BytesIO(contents[name]))
        for member in extra:
            archive.addfile(member)
    return gzip.compress(buffer.getvalue() + suffix, mtime=mtime)


def member(name, kind, **attributes):
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


@pytest.fixture
def unpacked(tmp_path):
    """Return a data folder with the unpacked set, and the DataFile that describes the set."""
    for name, content in CONTENTS.items():
        path = tmp_path / "data/set/folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    digest = files.sha256_of(tmp_path / "data/set/folder")
    return tmp_path / "data", DataFile("set/set.tar.gz", SIZE, (digest,), (), "set/folder")


def write(folder, content):
    (folder / "set").mkdir(parents=True, exist_ok=True)
    (folder / "set/set.tar.gz").write_bytes(content)
    return folder


def test_files_by_path_below_the_top_folder(tmp_path):
    extra = [
        member("set/ham", tarfile.DIRTYPE),
        member("set/link.txt", tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("set/hard.txt", tarfile.LNKTYPE, linkname="set/ham/a.txt"),
        member("set/pipe", tarfile.FIFOTYPE),
        member("set/._ham", tarfile.REGTYPE),
    ]
    path = tmp_path / "any.tar.gz"
    path.write_bytes(pack(CONTENTS, extra=extra, reverse=True))
    found = read_tar(path, SIZE)
    assert found == CONTENTS and list(found) == sorted(CONTENTS)


def test_nothing_is_written_wherever_a_member_points(tmp_path):
    path = tmp_path / "in/any.tar.gz"
    path.parent.mkdir()
    path.write_bytes(pack({"../../out.txt": b"x"}))
    read_tar(path, SIZE)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["any.tar.gz"]


def test_a_folder_reads_as_its_archive(unpacked, tmp_path):
    folder, _ = unpacked
    (folder / "set/folder/.DS_Store").write_bytes(b"the file manager's")
    assert read_folder(folder / "set/folder") == CONTENTS


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<html>not found</html>", "expected a gzipped tar archive, found: Not a gzipped file"),
        (pack(CONTENTS)[:-200], "expected a gzipped tar archive, found: "),
        (gzip.compress(b"no tar" * 500), "expected a gzipped tar archive, found: "),
        (pack({"a\nb": b"x"}), "expected file names without control characters, found 'a\\nb'"),
        (pack(CONTENTS | {"c": b"x"}), f"expected {SIZE} bytes of files, found more"),
        (pack(CONTENTS, suffix=bytes(70 << 20)), f"expected {SIZE} bytes of files, found more"),
    ],
    ids=["html", "truncated", "no tar", "line break", "one byte too many", "bomb"],
)
def test_what_is_refused(tmp_path, content, message):
    path = tmp_path / "any.tar.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_tar(path, SIZE)
    assert f"{path}: {message}" in str(error.value)


def test_a_sparse_member_is_not_blown_up(tmp_path):
    """Check that a GNU sparse file is refused before it is read.

    A few bytes of the archive stand for a terabyte of zeros.
    """
    header = bytearray(tarfile.TarInfo("set/ham/a.txt").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = tarfile.itn(1 << 40, 12, tarfile.GNU_FORMAT)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / "any.tar.gz"
    path.write_bytes(gzip.compress(bytes(header) + bytes(1024)))
    with pytest.raises(ValueError, match="bytes of files, found more"):
        read_tar(path, SIZE)


# --- archives as files of a data set -----------------------------------------------------------


def test_the_digest_is_of_what_is_in_it(unpacked, tmp_path):
    folder, file = unpacked
    verdicts = {files.verify([file], folder)}
    for options in ({}, {"mtime": 10**9, "reverse": True}, {"top": "other"}):
        verdicts.add(files.verify([file], write(tmp_path / "packed", pack(CONTENTS, **options))))
    assert len(verdicts) == 1


@pytest.mark.parametrize(
    "changed", [{"ham/a.txt": b"oNe\r\n"}, {"ham/c.txt": b""}], ids=["a byte", "a name"]
)
def test_another_content_is_refused(unpacked, tmp_path, changed):
    _, file = unpacked
    packed = write(tmp_path / "packed", pack(CONTENTS | changed))
    with pytest.raises(ValueError, match="set.tar.gz is not the file it should be: expected files"):
        files.verify([file], packed)
    ((name, content),) = changed.items()
    (unpacked[0] / "set/folder" / name).write_bytes(content)
    with pytest.raises(ValueError, match="set/folder is not the file it should be"):
        files.verify([file], unpacked[0])


def test_either_is_found(unpacked, tmp_path):
    folder, file = unpacked
    packed, empty = write(tmp_path / "packed", pack(CONTENTS)), tmp_path / "empty"
    assert files.located(file, folder) == folder / "set/folder"
    assert files.located(file, packed) == packed / "set/set.tar.gz"
    assert files.located(file, empty) is None
    assert files.find([file], folder) == folder and files.find([file], packed) == packed
    assert files.missing([file], empty) == [file]
    with pytest.raises(FileNotFoundError, match="set.tar.gz is missing: expected 709 bytes"):
        files.verify([file], empty)
    assert "or the folder set/folder" in files.explain_missing("set", [file], empty, "not tried")


def test_download_of_any_packing_unless_the_folder_is_there(unpacked, tmp_path, online, serve):
    folder, file = unpacked
    content = pack(CONTENTS, mtime=12345)
    url = serve({"/good": content, "/wrong": pack({"ham/a.txt": b"!"}), "/html": b"<html>"})
    target = tmp_path / "target"

    def expecting(*names):
        return [dataclasses.replace(file, urls=tuple(f"{url}/{name}" for name in names))]

    download.fetch(expecting("good"), folder)
    assert serve.asked == []
    with pytest.raises(ConnectionError, match="is not the file it should be"):
        download.fetch(expecting("wrong"), target)
    assert [path for path in target.rglob("*") if path.is_file()] == []
    serve.asked.clear()
    download.fetch(expecting("html", "wrong", "good"), target)
    assert serve.asked == ["/html", "/wrong", "/good"]
    assert (target / "set/set.tar.gz").read_bytes() == content
