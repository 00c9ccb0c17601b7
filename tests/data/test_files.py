"""Tests of searching and checking files: the order of folders, and the error if none has them."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from data import files
from data.files import DataFile

HELLO = hashlib.sha256(b"hello\n").hexdigest()
FILE = DataFile("set/hello.txt", 6, (HELLO,), ("https://example.org/hello.txt",))


def put(folder, content=b"hello\n", path=FILE.path):
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content)
    return folder


def test_search_order(monkeypatch, tmp_path, cache):
    root, shared = tmp_path / "root", tmp_path / "shared"
    assert files.find([FILE], root) is None
    put(cache)
    assert files.find([FILE], root) == cache
    shared.mkdir()
    monkeypatch.setenv("INFLUENCE_DATA", str(shared))
    assert files.find([FILE], root) == cache
    put(shared)
    assert files.find([FILE], root) == shared
    put(root)
    assert files.find([FILE], root) == root
    assert files.find([FILE], str(root)) == root
    assert files.find([FILE]) == shared


def test_a_folder_with_half_the_files_is_passed_over(tmp_path, cache):
    both = [FILE, DataFile("set/other.txt", 6, (HELLO,))]
    put(tmp_path / "root")
    assert files.find(both, tmp_path / "root") is None
    put(put(cache), path="set/other.txt")
    assert files.find(both, tmp_path / "root") == cache


def test_home_folder_is_expanded_and_an_empty_variable_counts_as_unset(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv("INFLUENCE_DATA", "~/shared")
    found = [place.folder for place in files.places("~/root")][:2]
    assert found == [tmp_path / "root", tmp_path / "shared"]
    monkeypatch.setenv("INFLUENCE_DATA", "")
    assert [place.setting for place in files.places()] == ["user cache"]


def test_root_that_is_no_path():
    with pytest.raises(TypeError, match=r"root \(--data-dir\) must be a folder .* got 3"):
        files.places(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"root \(--data-dir\) must name a folder, got ''"):
        files.places("")


def test_verify_gives_the_digest_of_sha256sum(tmp_path):
    other = DataFile("a.txt", 6, (HELLO,))
    put(put(tmp_path), path="a.txt")
    command = "sha256sum a.txt set/hello.txt | sha256sum"
    printed = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, check=True, text=True
    )
    assert files.verify([FILE, other], tmp_path) == printed.stdout.split()[0]


def test_verify_accepts_any_of_several_digests(tmp_path):
    repacked = DataFile(FILE.path, 6, ("0" * 64, HELLO))
    assert files.verify([repacked], put(tmp_path)) == files.verify([FILE], tmp_path)


def test_verify_names_a_missing_file_and_a_wrong_one_which_it_leaves(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        files.verify([FILE], tmp_path)
    assert f"{tmp_path / FILE.path} is missing" in str(error.value)
    assert f"expected 6 bytes with SHA-256 {HELLO}, found nothing" in str(error.value)
    put(tmp_path, b"hullo\n")
    with pytest.raises(ValueError) as error:
        files.verify([FILE], tmp_path)
    found = hashlib.sha256(b"hullo\n").hexdigest()
    assert f"{tmp_path / FILE.path} is not the file it should be" in str(error.value)
    assert f"expected 6 bytes with SHA-256 {HELLO}" in str(error.value)
    assert f"found 6 bytes with SHA-256 {found}" in str(error.value)
    assert (tmp_path / FILE.path).read_bytes() == b"hullo\n"


def test_a_folder_of_files_is_checked_as_one(tmp_path):
    for name in ("b.JPEG", "a/c.JPEG", ".DS_Store", ".hidden/d.JPEG"):
        put(tmp_path, path=f"images/{name}")
    listing = f"{HELLO}  a/c.JPEG\n{HELLO}  b.JPEG\n"
    digest = hashlib.sha256(listing.encode()).hexdigest()
    images = DataFile("images", 12, (digest,))
    assert files.find([images], tmp_path) == tmp_path
    files.verify([images], tmp_path)

    (tmp_path / "images/b.JPEG").unlink()
    with pytest.raises(ValueError, match="images is not the .* expected 12 bytes .* found 6 bytes"):
        files.verify([images], tmp_path)


def test_explanation_says_where_it_looked_and_what_to_put_where(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("INFLUENCE_DATA", str(tmp_path))
    message = files.explain_missing("hello", [FILE], Path("nowhere"), "first\nsecond")
    assert message.splitlines()[:8] == [
        "hello was not found.",
        "Looked in:",
        "  --data-dir nowhere: no such folder",
        f"  $INFLUENCE_DATA {tmp_path}: lacks set/hello.txt",
        f"  user cache {cache}: no such folder",
        "Download:",
        "  first",
        "  second",
    ]
    assert f"  set/hello.txt  6 bytes  SHA-256 {HELLO}" in message
    assert "    from https://example.org/hello.txt" in message


# --- paths that are not regular files -----------------------------------------------------------


@pytest.mark.parametrize("kind", ["a link", "a named pipe"])
@pytest.mark.parametrize("inside", [False, True], ids=["the file", "in a folder"])
def test_links_and_pipes_are_refused_before_they_are_read(tmp_path, kind, inside):
    path = tmp_path / ("images/a.JPEG" if inside else FILE.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "a link":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path)
    file = DataFile("images", 6, ()) if inside else FILE
    with pytest.raises(ValueError, match=f"{path.name}: expected a regular file, found {kind}"):
        files.verify([file], tmp_path)


def test_a_link_to_a_folder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images/more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="more: expected a regular file, found a link"):
        files.verify([DataFile("images", 6, ())], tmp_path)


def test_a_file_of_another_size_is_not_hashed(tmp_path, monkeypatch):
    path = tmp_path / FILE.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(1 << 43)  # the file is sparse, so its 8 TB of zeros occupy no disk space
    monkeypatch.setattr(files, "sha256_of", lambda path: pytest.fail("it was hashed"))
    with pytest.raises(ValueError, match="expected 6 bytes .* found 8,796,093,022,208 bytes"):
        files.verify([FILE], tmp_path)


def test_names_cannot_forge_a_folder_s_digest(tmp_path):
    """Check that a file name with a line break is refused.

    A folder's digest is that of its listing. With a line break in its name, one file can have the
    same listing as two files.
    """
    put(tmp_path, path="true/a")
    put(tmp_path, path="true/b")
    put(tmp_path, path=f"forged/a\n{HELLO}  b")
    listing = f"{HELLO}  a\n{HELLO}  b\n"
    digest = hashlib.sha256(listing.encode()).hexdigest()
    assert files.sha256_of(tmp_path / "true") == digest
    with pytest.raises(ValueError, match="expected file names without control characters"):
        files.verify([DataFile("forged", 6, (digest,))], tmp_path)


def test_what_changes_while_it_is_read_is_refused(tmp_path):
    put(tmp_path)
    check = files.unchanged([FILE], tmp_path)
    check()
    os.utime(tmp_path / FILE.path, ns=(1, 1))
    with pytest.raises(ValueError, match="changed while it was read"):
        check()
