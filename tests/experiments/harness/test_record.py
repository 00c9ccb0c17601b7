import dataclasses
import hashlib
import json
import math
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.harness.claims import Claim, Published
from experiments.harness.record import Record, commit, provenance, replacing, to_json

ARRAYS = {
    "actual": np.linspace(0, 1, 1000).reshape(50, 20),
    "rows": np.arange(5),
    "kept": np.array([True, False]),
    "none": np.zeros((0, 4), "float32"),
    "scalar": np.float64(2.5),
}


def _record(arrays=ARRAYS, **changes):
    metrics = {"pearson": 0.1 + 0.2, "absent": math.nan, "count": np.int64(3)}
    made = Record.of(metrics=metrics, arrays=arrays)
    return dataclasses.replace(
        made,
        experiment="fig2",
        preset="paper",
        config={"seed": 0, "damping": 0.01, "seeds": (0, 1), "rows": None},
        data={"name": "mnist", "stand_in": False, "sha256": "00"},
        claims=[Claim("pearson", "r", Published("2", 0.3)).judge(made.metrics)],
        provenance={"seed": 0, "commit": "abc"},
        **changes,
    )


def test_round_trip(tmp_path):
    saved = _record()
    saved.save(tmp_path / "new" / "fig2-paper")
    loaded = Record.load(tmp_path / "new" / "fig2-paper")
    assert loaded.metrics.pop("pearson") == 0.1 + 0.2  # equal to the last bit
    assert math.isnan(loaded.metrics.pop("absent"))
    assert loaded.metrics == {"count": 3.0}
    assert loaded.config == {"seed": 0, "damping": 0.01, "seeds": [0, 1], "rows": None}
    assert (loaded.experiment, loaded.preset) == ("fig2", "paper")
    assert (loaded.data, loaded.claims) == (saved.data, saved.claims)
    assert loaded.provenance == saved.provenance
    assert loaded.arrays.keys() == saved.arrays.keys()
    for name, array in saved.arrays.items():
        assert loaded.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded.arrays[name], array)


def test_json_is_strict_and_says_null_for_nan(tmp_path):
    _record().save(tmp_path)

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    content = json.loads((tmp_path / "record.json").read_text(), parse_constant=refuse)
    assert content["metrics"]["absent"] is None
    assert list(content) == sorted(content)
    assert "arrays" not in content
    assert '"pearson": 0.30000000000000004' in (tmp_path / "record.json").read_text()


def test_same_record_same_bytes(tmp_path):
    _record().save(tmp_path / "first")
    # HDF5 can store the time of writing, in whole seconds. Wait until such a time would differ.
    time.sleep(1.1)
    _record().save(tmp_path / "second")
    for name in ("record.json", "arrays.h5"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_arrays_are_compressed(tmp_path):
    _record({"zeros": np.zeros(100_000)}).save(tmp_path)
    # The array has 800,000 bytes before compression.
    assert (tmp_path / "arrays.h5").stat().st_size < 20_000


def test_nothing_is_left_half_written(tmp_path):
    _record().save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError, match=r"config.seed must be .* got object"):
        dataclasses.replace(_record(), config={"seed": object()}).save(tmp_path)
    with pytest.raises(OSError), replacing(tmp_path / "record.json") as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("value", ["0.5", None, [1.0], np.ones(2), 1j])
def test_metric_must_be_a_real_number(value):
    with pytest.raises(TypeError, match=r"metrics\['r'\] must be a real number"):
        Record.of(metrics={"r": value}, arrays={})


@pytest.mark.parametrize("value", [["a"], [None], 1j])
def test_array_must_be_numeric(value):
    with pytest.raises(TypeError, match=r"arrays\['a'\] must be numeric"):
        Record.of(metrics={}, arrays={"a": value})


def test_names_are_kept_as_bytes(tmp_path):
    names = np.array(["age_[0-10)", "change"], dtype="S")
    _record({"names": names}).save(tmp_path)
    again = Record.load(tmp_path).arrays["names"]
    assert again.dtype == names.dtype and again.astype(str).tolist() == ["age_[0-10)", "change"]


@pytest.mark.parametrize("name", ["", "a/b", ".a"])
def test_array_name_must_be_one_hdf5_keeps(name):
    with pytest.raises(ValueError, match="name must not"):
        Record.of(metrics={}, arrays={name: [1.0]})


def test_load_names_what_is_missing_or_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"record\.json and arrays\.h5"):
        Record.load(tmp_path)
    _record().save(tmp_path)
    whole = (tmp_path / "record.json").read_text()
    for broken in (whole[:-9], "[]", "{}", whole.replace('"preset"', '"pre"')):
        (tmp_path / "record.json").write_text(broken)
        with pytest.raises(ValueError, match="run the experiment again"):
            Record.load(tmp_path)
    (tmp_path / "record.json").write_text(whole)
    (tmp_path / "arrays.h5").write_bytes(b"not HDF5")
    with pytest.raises(ValueError, match="run the experiment again"):
        Record.load(tmp_path)


def _as_format_1(folder):
    """Rewrite a record in the older format 1, whose claims have no sentences."""
    content = json.loads((folder / "record.json").read_text())
    keys = ("metric", "paper", "low", "high", "value", "holds")
    content["claims"] = [{key: claim[key] for key in keys} for claim in content["claims"]]
    content["format"] = 1
    del content["sha256"]
    packed = to_json(content).encode() + (folder / "arrays.h5").read_bytes()
    text = to_json(content | {"sha256": hashlib.sha256(packed).hexdigest()})
    (folder / "record.json").write_text(text)


def test_records_of_format_1_are_read(tmp_path):
    _record().save(tmp_path)
    _as_format_1(tmp_path)
    loaded = Record.load(tmp_path)
    (claim,) = loaded.claims
    assert claim["sentence"] == claim["metric"] == "pearson" and claim["kind"] == "paper"
    assert (claim["holds"], claim["verdict"]) == (True, "not comparable")
    assert loaded.has_checksum and loaded.metrics["pearson"] == 0.1 + 0.2


def test_claims_are_saved_beside_the_same_metrics_and_arrays(tmp_path):
    _record().save(tmp_path)
    _as_format_1(tmp_path)
    before = json.loads((tmp_path / "record.json").read_text())
    packed = (tmp_path / "arrays.h5").read_bytes()
    loaded = Record.load(tmp_path)
    new = Claim("pearson", "r of two", Published("2", 0.5)).judge(loaded.metrics)
    dataclasses.replace(loaded, claims=[new]).save_claims(tmp_path)
    after = json.loads((tmp_path / "record.json").read_text())
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {"claims", "format", "sha256"} and after["claims"] == [new]
    assert (tmp_path / "arrays.h5").read_bytes() == packed
    assert Record.load(tmp_path).claims == [new]
    other = dataclasses.replace(loaded, metrics={"pearson": 1.0})
    with pytest.raises(ValueError, match="only claims may differ"):
        other.save_claims(tmp_path)
    assert json.loads((tmp_path / "record.json").read_text()) == after


def test_record_holds_unless_a_claim_falls_short():
    verdicts = [{"holds": True}, {"holds": None}]
    assert Record(claims=verdicts).holds
    assert not Record(claims=[*verdicts, {"holds": False}]).holds


def test_to_json_writes_paths_and_numpy_numbers():
    text = to_json({"a": Path("x/y"), "b": np.float32(0.5), "c": (np.int8(1), np.bool_(True))})
    assert json.loads(text) == {"a": "x/y", "b": 0.5, "c": [1, True]}
    with pytest.raises(TypeError, match=r"^a\[1\] must be .* got set"):
        to_json({"a": [1, {2}]})


def test_provenance_says_who_and_what():
    facts = provenance(7)
    assert facts["seed"] == 7
    assert set(facts["versions"]) == {
        "python", "tensorflow", "keras", "numpy", "scipy", "scikit-learn",
    }  # fmt: skip
    assert facts["cpu_count"] >= 1


def _git(root, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", "-C", str(root), *identity, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("GIT_")},
    )
    return done.stdout.strip()


def test_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("INFLUENCE_COMMIT", "")
    assert commit(tmp_path) == "unknown"
    monkeypatch.setenv("INFLUENCE_COMMIT", "built-from")
    assert commit(tmp_path) == "built-from"
    _git(tmp_path, "init", "-q")
    assert commit(tmp_path) == "built-from"  # the repository has no commit yet
    code = tmp_path / "influence"
    code.mkdir()
    (code / "net.py").write_text("a = 1\n")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-qm", "Begin")
    head = _git(tmp_path, "rev-parse", "HEAD")
    assert commit(tmp_path) == head
    (tmp_path / "notes.txt").write_text("no number depends on this")
    assert commit(tmp_path) == head
    assert commit(code) == "built-from"  # `code` is in a repository, but is not its top folder
    (code / "net.py").write_text("a = 2\n")
    assert commit(tmp_path) == f"{head}-dirty"
