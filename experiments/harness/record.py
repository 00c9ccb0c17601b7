"""The record of a run: numbers, arrays, verdicts and provenance, in record.json and arrays.h5."""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from experiments.harness import reading
from influence_console import shown

RECORD, ARRAYS = "record.json", "arrays.h5"
# The present format of both files, and the format before it. Format 1 has claims without sentences.
# Format 0 also has no checksum, and its files do not name the format.
_FORMAT, _OLD_FORMAT = 2, 1
# The arrays of a record may have this many bytes. The reader allows more, because HDF5 pads chunks.
_MOST_BYTES = reading.MOST_ARRAYS // 4
_ROOT = Path(__file__).resolve().parents[2]
# The results depend on the code in these folders and on this file.
_CODE = ("influence", "experiments", "data", "requirements.txt")
_PACKAGES = ("tensorflow", "keras", "numpy", "scipy", "scikit-learn")


@dataclass(frozen=True, eq=False)
class Record:
    """One run of one experiment.

    Args:
      experiment, preset: the command and the preset that ran.
      config: the fields of the Config.
      data: the fields name, stand_in and sha256 of the Splits.
      metrics: dict of numbers. The claims judge some of them.
      arrays: dict of arrays, from which the figure is drawn. Texts are stored as bytes.
      claims: one verdict per claim, from `Claim.judge` of `harness.claims`.
      provenance: seed, commit, versions and cpu_count, and the cost that `cost.metered` measures.
      has_checksum: False if the record was read from files of format 0. Alterations of these files
        cannot be detected. `save` always writes a checksum.
    """

    experiment: str = ""
    preset: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    claims: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    has_checksum: bool = True

    @classmethod
    def of(cls, *, metrics: Mapping[str, float], arrays: Mapping[str, Any]) -> "Record":
        """Make the Record that an experiment's `run` returns. The harness adds the other fields.

        Args:
          metrics: dict of real numbers. NaN means that a metric has no value.
          arrays: dict of numeric, boolean or byte-string (dtype "S") arrays.
        Returns: a Record with these metrics and arrays.
        Raises: TypeError if a metric is not a real number or an array has another dtype; ValueError
          if the name of an array is not a valid HDF5 name, or if the arrays are too large.
        """
        for name, value in metrics.items():
            if np.ndim(value) or not isinstance(_scalar(value), bool | int | float):
                raise TypeError(f"metrics[{name!r}] must be a real number, got {value!r:.80}.")
        held = {name: np.asarray(array) for name, array in arrays.items()}
        for name, array in held.items():
            if array.dtype.kind not in "biufS":
                raise TypeError(
                    f"arrays[{name!r}] must be numeric, boolean or bytes, got dtype {array.dtype}."
                )
            if not name or name.startswith(".") or "/" in name:  # HDF5 would read a path
                raise ValueError(f"arrays: a name must not hold '/' or begin with '.': {name!r}.")
        size = sum(array.nbytes for array in held.values())
        if size > _MOST_BYTES:
            raise ValueError(f"arrays may have {_MOST_BYTES:,} bytes, got {size:,}; keep fewer.")
        return cls(metrics={name: float(value) for name, value in metrics.items()}, arrays=held)

    @property
    def holds(self) -> bool:
        """True if every judged claim holds."""
        return all(claim["holds"] is not False for claim in self.claims)

    def save(self, folder: Path) -> None:
        """Write record.json and arrays.h5. Equal records give equal bytes.

        record.json names the format and holds a checksum of everything in both files.

        Args:
          folder: the folder to write to. It is created if it is missing. An older record in it is
            replaced. A failed write leaves no partial file.
        Raises: TypeError if a value cannot be written as JSON; ValueError if `load` would refuse
          the record; OSError if the folder cannot be written to.
        """
        content = self._content()
        folder.mkdir(parents=True, exist_ok=True)
        # The file is made in memory, because HDF5 ends the process if it cannot write a file.
        with h5py.File(ARRAYS, "w", driver="core", backing_store=False) as file:
            for name, array in sorted(self.arrays.items()):
                packing = {"compression": "gzip", "shuffle": True} if array.size > 1 else {}
                file.create_dataset(name, data=array, track_times=False, **packing)
            file.flush()
            image = file.id.get_file_image()
        # Both files are written before either replaces an older one.
        with replacing(folder / ARRAYS) as arrays, replacing(folder / RECORD) as record:
            arrays.write_bytes(image)
            record.write_text(_sealed(content, image), encoding="utf-8")

    def save_claims(self, folder: Path) -> None:
        """Write record.json again with the claims of this record. arrays.h5 does not change.

        Args:
          folder: the folder from which `load` read this record.
        Raises: the errors of `load` and `save`; ValueError if this record and the record in the
          folder differ in more than their claims.
        """
        there = Record.load(folder)
        image = reading.contents(folder / ARRAYS, reading.MOST_ARRAYS)
        claims = dataclasses.replace(self, claims=there.claims)._content()
        if claims != there._content():
            raise ValueError(f"only claims may differ from the record in {shown(folder)}.")
        with replacing(folder / RECORD) as record:
            record.write_text(_sealed(self._content(), image), encoding="utf-8")

    def _content(self) -> dict[str, Any]:
        names = [f.name for f in dataclasses.fields(self)]
        text = to_json(
            {name: getattr(self, name) for name in names if name not in ("arrays", "has_checksum")}
        )
        content = json.loads(text)
        reading.check(content)
        return content

    @classmethod
    def load(cls, folder: Path) -> "Record":
        """Read a record that `save` wrote. A null metric becomes NaN.

        Args:
          folder: a folder with record.json and arrays.h5.
        Returns: the Record.
        Raises: FileNotFoundError if a file is missing; ValueError if a file was altered or is not
          in the form that `save` writes. Format 0 has no checksum to detect alterations.
        """
        for name in (RECORD, ARRAYS):
            if not os.path.lexists(folder / name):
                raise FileNotFoundError(
                    f"folder must hold {RECORD} and {ARRAYS}, got {shown(folder)}."
                )
        try:
            content = reading.text(folder / RECORD)
            packed = reading.contents(folder / ARRAYS, reading.MOST_ARRAYS)
            sealed = {"format", "sha256"} & content.keys()
            sha256, version = content.pop("sha256", None), content.get("format")
            if sealed and (type(version) is not int or version not in (_OLD_FORMAT, _FORMAT)):
                raise ValueError(
                    f"its format must be {_OLD_FORMAT} or {_FORMAT}, got {version!r:.20}"
                )
            if sealed and sha256 != _checksum(content, packed):
                raise ValueError(f"its checksum is another: {RECORD} or {ARRAYS} was altered")
            if content.pop("format", 0) != _FORMAT:
                reading.with_sentences(content)
            reading.check(content)
            content["metrics"] = {k: _or(v, math.nan) for k, v in content["metrics"].items()}
            return cls(**content, arrays=reading.arrays(packed), has_checksum=bool(sealed))
        except (ValueError, OSError, RecursionError) as error:
            raise ValueError(
                f"folder must hold a record as this program writes it, {shown(folder)} does not "
                f"({error!s:.400}); run the experiment again."
            ) from error


def to_json(value: Any) -> str:
    """Format a value as strict JSON with sorted keys. NaN and infinities become null.

    Args:
      value: dicts, sequences, numbers, strings, paths and None, nested to any depth.
    Returns: the text, which ends in a newline.
    Raises: TypeError naming the first entry of another type.
    """
    return json.dumps(_plain(value, ""), sort_keys=True, indent=2, allow_nan=False) + "\n"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces `path` if the block raises no error.

    If an OSError names no file, as for a full disk, its file name is set to `path`.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def provenance(seed: int) -> dict[str, Any]:
    """Return a dict of the seed, the code's commit, the packages' versions and the core count."""
    return {
        "seed": seed,
        "commit": commit(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "cpu_count": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
    }


def commit(root: Path = _ROOT) -> str:
    """Return the commit of the code in `root`.

    Returns: the hash of the commit, followed by "-dirty" if the code has changed since. Without
      git, for example in a container, the value of $INFLUENCE_COMMIT; "unknown" if it is not set.
    """
    if (root / ".git").exists():  # else git would search parent folders
        with suppress(OSError, subprocess.CalledProcessError):
            head = _git(root, "rev-parse", "HEAD").strip()
            changed = _git(root, "status", "--porcelain", "--", *_CODE)
            return f"{head}-dirty" if changed else head
    return os.environ.get("INFLUENCE_COMMIT") or "unknown"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "--no-optional-locks", *arguments]
    # A git hook sets GIT_DIR, which would select another repository.
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout


def _checksum(content: dict[str, Any], arrays: bytes) -> str:
    """Compute the SHA-256 of record.json (without the checksum) followed by arrays.h5."""
    return hashlib.sha256(to_json(content).encode() + arrays).hexdigest()


def _sealed(content: dict[str, Any], arrays: bytes) -> str:
    """Return the text of record.json with its format and checksum."""
    content = content | {"format": _FORMAT}
    return to_json(content | {"sha256": _checksum(content, arrays)})


def _plain(value: Any, name: str) -> Any:
    value = _scalar(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, f"{name}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{name}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(
        f"{name.lstrip('.')} must be a number, string, path, sequence, mapping or None to be "
        f"written as JSON, got {type(value).__name__}."
    )


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
