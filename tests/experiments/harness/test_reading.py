"""Tests of altered record files. The report shows them or refuses them with a one-line error."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.harness import web_page
from experiments.harness.record import Record

REAL = Path(__file__).resolve().parents[3] / "results" / "fig2-paper"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="no results/ yet")
ODD = (None, True, 0, -1, 0.5, 10**400, 1e308, "", "a\nb", "\udcff", "<script>", [], {}, [{}])
ODD += ({"": None}, [None, [1, {"holds": 3}]], {"holds": "yes"})


@pytest.fixture
def sealed(tmp_path):
    """Return the folder of a committed record, rewritten in today's format."""
    folder = tmp_path / "fig2-paper"
    Record.load(REAL).save(folder)
    shutil.copy(REAL / "figure.png", folder)
    return folder


@pytest.fixture
def real(sealed):
    """Return the file of the same record in format 0, which has no checksum."""
    content = json.loads((sealed / "record.json").read_text())
    del content["format"], content["sha256"]
    (sealed / "record.json").write_text(json.dumps(content, sort_keys=True, indent=2) + "\n")
    return sealed


def _places(value, found):
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        found.append((value, key))
        if isinstance(entry, dict | list):
            _places(entry, found)
    return found


def _mutated(content, seed):
    """Change a record at 1 to 3 random places: drop, swap or nest values, or insert odd ones."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 3)):
        parent, key = rng.choice(_places(content, []))
        kind = rng.randrange(5)
        if kind == 0:
            del parent[key]
        elif kind == 1:
            other, place = rng.choice(_places(content, []))
            parent[key] = json.loads(json.dumps(other[place]))
        elif kind == 2:
            for _ in range(rng.choice((1, 40, 200))):
                parent[key] = rng.choice(([parent[key]], {"a": parent[key]}))
        elif kind == 3 and isinstance(parent, dict):
            parent[rng.choice(("new", "format", "sha256", "a\nb", "versions"))] = rng.choice(ODD)
        else:
            parent[key] = rng.choice(ODD)
    return content


def _page_or_line(folder):
    """Return the page, or None if `write_page` refused the record with a one-line error."""
    try:
        return web_page.write_page(folder).read_text(encoding="utf-8")
    except ValueError as error:
        assert type(error) is ValueError and "\n" not in str(error) and len(str(error)) < 1000
        assert str(error).startswith("folder must hold a record") and "run the exp" in str(error)
        return None


def test_mutated_records_end_in_a_page_or_in_one_line(real):
    file = real / "record.json"
    whole = file.read_text()
    pages = 0
    for seed in range(int(os.environ.get("RECORD_FUZZ", "50"))):
        file.write_text(json.dumps(_mutated(json.loads(whole), seed)))
        pages += _page_or_line(real.parent) is not None
    assert 0 < pages < seed + 1  # some records gave a page, and some were refused


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"claims": [', '"claims": null, "was": ['),
        ('"claims": [', '"claims": ["a", '),
        ('"holds": true,', ""),
        ('"value": 1.0', '"value": 1' + 400 * "0"),
        ('"value": 1.0', '"value": NaN'),
        ('"provenance": {', '"provenance": null, "was": {'),
        ('"versions": {', '"versions": "3", "was": {'),
        ('"config": {', '"config": {"deep": ' + 100_000 * "[" + 100_000 * "]" + ","),
        ('"config": {', '"config": {"deep": ' + 500 * "[" + 500 * "]" + ","),
        ('"config": {', '"config": {"digits": ' + 5000 * "9" + ","),
        ('"preset"', '"\\u0000"'),
        ("{", "[{"),
    ],
)
def test_json_of_another_form(real, capsys, old, new):
    file = real / "record.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert main(["report", "--out", str(real.parent)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "fig2-paper" in line and "run the experiment again" in line


def _bomb(file):
    made = file.create_dataset("bomb", (1000,), "f8", chunks=(1000,), compression="gzip")
    made.id.write_direct_chunk((0,), zlib.compress(bytes(10**8)))


def _external(file):
    file.create_dataset("raw", (3,), "u1", external=[("/etc/passwd", 0, 3)])


def _virtual(file):
    layout = h5py.VirtualLayout((3,), "f8")
    layout[:] = h5py.VirtualSource("other.h5", "a", (3,))
    file.create_virtual_dataset("virtual", layout)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: file.update(loop=h5py.SoftLink("/loop")), "the link 'loop'"),
        (lambda file: file.update(out=h5py.ExternalLink("/x.h5", "/a")), "the link 'out'"),
        (lambda file: file.update(file=file["/"]), "no array 'file'"),
        (lambda file: file.update(none=h5py.Empty("f8")), "no array 'none'"),
        (_external, "'raw', which is stored in another file"),
        (_virtual, "'virtual', which is stored in another file"),
        (lambda file: file.create_dataset("big", (10**12,), "f8"), "more than 268,435,456 bytes"),
        (
            lambda file: file.create_dataset(
                "sparse", (1,), "f8", chunks=(1 << 26,), maxshape=(None,)
            ),
            "more than 268,435,456 bytes",
        ),
        (
            lambda file: file.create_dataset("tiny", (1 << 20,), "u1", chunks=(1,)),
            "more than 268,435,456 bytes",
        ),
        (_bomb, "a chunk of another size"),
        (lambda file: file.update(text=["a"]), "'text' of dtype object"),
        (lambda file: file.create_dataset("lzf", data=[1, 2], compression="lzf"), "other filters"),
    ],
)
def test_hdf5_that_would_lead_elsewhere_or_grow(real, spoil, reason):
    with h5py.File(real / "arrays.h5", "r+") as file:
        spoil(file)
    with pytest.raises(ValueError, match=f"arrays.h5 must hold arrays .*{reason}.*run the exp"):
        web_page.write_page(real.parent)


def test_mutated_hdf5_ends_in_a_page_or_in_one_line(real):
    whole = (real / "arrays.h5").read_bytes()
    for seed in range(50):
        rng, packed = random.Random(seed), bytearray(whole)
        for _ in range(rng.choice((1, 3, 20))):
            packed[rng.randrange(rng.choice((3000, len(packed))))] = rng.randrange(256)
        (real / "arrays.h5").write_bytes(packed[: rng.choice((len(packed), 5000, 0))])
        _page_or_line(real.parent)


def _pipe(path):
    os.mkfifo(path)


def _link(path):
    path.symlink_to(REAL / path.name)


def _sparse(path):
    path.touch()
    os.truncate(path, 1 << 43)  # a sparse file of 8 TB


@pytest.mark.parametrize("name", ["record.json", "arrays.h5"])
@pytest.mark.parametrize("put", [_pipe, _sparse, Path.mkdir, _link])
def test_what_is_no_regular_file_of_a_sane_size(real, name, put):
    (real / name).unlink()
    put(real / name)
    with pytest.raises(ValueError, match=f"{name} (must be a regular file|may have .* bytes)"):
        web_page.write_page(real.parent)


@pytest.mark.parametrize(
    ("put", "reason"),
    [
        (_link, "figure.png must be a regular file"),
        (_pipe, "figure.png must be a regular file"),
        (_sparse, "figure.png may have 33,554,432 bytes"),
        (lambda path: path.write_text("password"), "figure.png is no PNG"),
        (
            lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + 8 * b"\x7f"),
            "figure.png may have 100,000,000 pixels",
        ),
    ],
)
def test_only_a_png_is_put_into_the_page(real, put, reason):
    (real / "figure.png").unlink()
    put(real / "figure.png")
    page = web_page.write_page(real.parent).read_text()
    assert "<img" not in page and f"No figure ({reason}" in page


def test_the_checksum_is_that_of_both_files(sealed):
    content = json.loads((sealed / "record.json").read_text())
    assert content["format"] == 2
    claimed = content.pop("sha256")
    text = json.dumps(content, sort_keys=True, indent=2) + "\n"
    arrays = (sealed / "arrays.h5").read_bytes()
    assert claimed == hashlib.sha256(text.encode() + arrays).hexdigest()


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("record.json", b'"seed": 0', b'"seed": 1', "checksum is another"),
        ("record.json", b'"holds": true', b'"holds": null', "checksum is another"),
        ("record.json", b'"format": 2', b'"format": 3', "format must be 1 or 2, got 3"),
        ("record.json", b'"format": 2,', b"", "format must be 1 or 2, got None"),
        ("record.json", b'"sha256"', b'"sha255"', "checksum is another"),
        ("arrays.h5", b"\x00", b"\x01", "checksum is another"),
    ],
)
def test_an_altered_record_is_refused(sealed, name, old, new, reason):
    Record.load(sealed)
    whole = (sealed / name).read_bytes()
    assert old in whole
    (sealed / name).write_bytes(new.join(whole.rsplit(old, 1)))
    with pytest.raises(ValueError, match=reason):
        Record.load(sealed)


def test_arrays_of_another_run_are_refused(sealed):
    shutil.copy(REAL / "arrays.h5", sealed / "arrays.h5")
    with h5py.File(sealed / "arrays.h5", "r+") as file:
        file["actual"][0] += 1
    with pytest.raises(ValueError, match="record.json or arrays.h5 was altered"):
        Record.load(sealed)


def test_a_record_that_another_process_writes_is_refused(sealed):
    hold = (
        "import h5py, sys\nwith h5py.File(sys.argv[1], 'r+'):\n    print(flush=True)\n    input()"
    )
    command = [sys.executable, "-c", hold, str(sealed / "arrays.h5")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline()
        with pytest.raises(ValueError, match="arrays.h5 is held by another process, wait for it"):
            Record.load(sealed)
        other.communicate(b"\n")
    Record.load(sealed)


def test_arrays_too_large_to_be_read_again_are_not_recorded():
    with pytest.raises(ValueError, match="arrays may have 67,108,864 bytes, got 67,108,872"):
        Record.of(metrics={}, arrays={"a": np.broadcast_to(0.0, (1 << 23) + 1)})
