"""Functions that read the files of a record and check them, because the files may be altered.

A file must be regular and not too large. An array must be stored in the file itself. The text must
have the form of a record.
"""

import fcntl
import json
import math
import reprlib
import stat
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from experiments.harness.claims import NOT_COMPARABLE, NOT_REPRODUCED, OURS, PAPER

# The largest sizes in bytes of a record.json, an arrays.h5 (packed or unpacked) and a figure.
_MOST_TEXT, MOST_ARRAYS, _MOST_FIGURE = 1 << 24, 1 << 28, 1 << 25
# In the size of an array, a chunk counts as at least this many bytes. This limits the number of
# chunks.
_LEAST_CHUNK = 1 << 12
_MOST_PIXELS = 10**8
_MOST_DEPTH = 32
_PNG = b"\x89PNG\r\n\x1a\n"
_FILTERS = ([], [h5py.h5z.FILTER_DEFLATE], [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_shallow(value: Any, depth: int = _MOST_DEPTH) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(entry, depth - 1) for entry in inner)


# Each kind of value is a pair: a description and a function that tests a value.
_TEXT = ("printable text", lambda value: isinstance(value, str) and value.isprintable())
_FLAG = ("true or false", lambda value: isinstance(value, bool))
_VERDICT = ("true, false or null", lambda value: value is None or isinstance(value, bool))
_NUMBER = ("a finite number or null", lambda value: value is None or _is_number(value))
_PLAIN = (f"nested at most {_MOST_DEPTH} deep", _is_shallow)
# The keys of a claim whose values are texts, and those whose values are numbers.
_TEXTS = ("metric", "sentence", "words", "source", "kind", "verdict", "headline")
_NUMBERS = ("paper", "low", "high", "value")
# The keys of a claim in formats 0 and 1.
_OLD_CLAIM = {"metric", "holds", *_NUMBERS}
# The required form of a record. A dict must have exactly the keys of its form. If the form has the
# key `...`, no key is required and other keys are allowed. The values of these other keys must have
# the form under `...`. A list may have any number of entries. Each must
# have the form of the list's only element.
_RECORD = {
    "experiment": _TEXT,
    "preset": _TEXT,
    "config": {...: _PLAIN},
    "data": {"name": _TEXT, "stand_in": _FLAG, "sha256": _TEXT},
    "metrics": {...: _NUMBER},
    "claims": [
        {"holds": _VERDICT, "interval": [_NUMBER]}
        | dict.fromkeys(_TEXTS, _TEXT)
        | dict.fromkeys(_NUMBERS, _NUMBER)
    ],
    "provenance": {"versions": {...: _TEXT}, ...: _PLAIN},
}


def check(value: Any, kind: Any = _RECORD, name: str = "record") -> None:
    """Check that a value read from JSON has the form of a record.

    Args:
      value: the value.
      kind: the required form, written like `_RECORD`.
      name: name of the value in the message.
    Raises: ValueError that names the first entry with another form.
    """
    if isinstance(kind, tuple):
        words, test = kind
        fits = test(value)
    elif isinstance(kind, list):
        words, fits = "a list", isinstance(value, list)
    else:
        keys = sorted(key for key in kind if key is not ...)
        words = "an object" if ... in kind else f"an object with exactly {', '.join(keys)}"
        fits = isinstance(value, dict) and (... in kind or sorted(value) == keys)
    if not fits:
        raise ValueError(f"{name} must be {words}, got {reprlib.repr(value)}")
    if isinstance(kind, list):
        for i, entry in enumerate(value):
            check(entry, kind[0], f"{name}[{i}]")
    elif isinstance(kind, dict):
        for key, entry in value.items():
            check(entry, kind.get(key, kind.get(...)), f"{name}[{reprlib.repr(key)}]")


def with_sentences(content: dict[str, Any]) -> None:
    """Complete the claims of a record in format 0 or 1, where claims have no sentences.

    The metric's name becomes the sentence. The verdict is NOT_REPRODUCED if the metric misses a
    published value, otherwise NOT_COMPARABLE.

    Args:
      content: the record, as read from record.json. It is changed in place. A claim with other keys
        is not changed. `check` then refuses this claim.
    """
    claims = content.get("claims")
    for claim in claims if isinstance(claims, list) else ():
        if isinstance(claim, dict) and claim.keys() == _OLD_CLAIM:
            known = claim["paper"] is not None
            missed = known and claim["holds"] is False
            claim.update(
                sentence=claim["metric"],
                words="",
                source="",
                kind=PAPER if known else OURS,
                interval=[],
                verdict=NOT_REPRODUCED if missed else NOT_COMPARABLE,
                headline="",
            )


def contents(path: Path, most: int) -> bytes:
    """Read a regular file. Refuse links, pipes and devices, because reading them may never end.

    Args:
      path: the file.
      most: the largest allowed size in bytes.
    Returns: the bytes of the file.
    Raises: OSError if the file cannot be read; ValueError if it is not regular, is larger than
      `most`, or is locked by another process.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} must be a regular file: no link, folder, pipe or device")
    if status.st_size > most:
        raise ValueError(f"{path.name} may have {most:,} bytes, got {status.st_size:,}")
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path.name} is held by another process, wait for it") from error
        except OSError:  # the file system has no locks
            pass
        return file.read(status.st_size)


def text(path: Path) -> dict[str, Any]:
    """Read a record.json.

    Returns: the JSON object as a dict. Its form is not yet checked.
    Raises: OSError, ValueError or RecursionError if the file does not contain an object in strict
      JSON.
    """

    def refuse(token: str) -> None:
        raise ValueError(f"{path.name} must be strict JSON, got {token}")

    content = json.loads(contents(path, _MOST_TEXT), parse_constant=refuse)
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must hold an object, got {reprlib.repr(content)}")
    return content


def arrays(packed: bytes) -> dict[str, np.ndarray]:
    """Read the arrays of an arrays.h5 without opening any other file.

    Args:
      packed: the bytes of the file.
    Returns: a dict from names to arrays.
    Raises: ValueError if the file has more than MOST_ARRAYS bytes, or entries that `Record.save`
      does not write: links, groups, virtual or external data, other dtypes or other filters.
    """
    try:
        with h5py.File(h5py.h5f.open_file_image(packed)) as file:
            wrong = "a user block" if file.userblock_size else ""
            size = 0
            for name in file:
                wrong = wrong or _unlike_ours(file, name)
                size += 0 if wrong else _unpacked_size(file[name])
                if wrong or size > MOST_ARRAYS:
                    wrong = wrong or f"more than {MOST_ARRAYS:,} bytes unpacked"
                    break
                wrong = _overlong_chunk(file[name], packed)
            if not wrong:
                return {name: np.asarray(file[name]) for name in file}
    except Exception as error:  # altered bytes cause many types of error
        raise ValueError(f"arrays.h5 cannot be read ({error!r:.200})") from error
    raise ValueError(f"arrays.h5 must hold arrays as this program writes them, got {wrong}")


def png(path: Path) -> bytes:
    """Read a figure.

    Returns: the bytes of the PNG file.
    Raises: OSError if the file cannot be read; ValueError if it is not a regular PNG file, or is
      too large.
    """
    found = contents(path, _MOST_FIGURE)
    if not found.startswith(_PNG) or len(found) < 24:
        raise ValueError(f"{path.name} is no PNG")
    width, height = struct.unpack(">II", found[16:24])
    if not 0 < width * height <= _MOST_PIXELS:
        raise ValueError(f"{path.name} may have {_MOST_PIXELS:,} pixels, got {width} x {height}")
    return found


def _unlike_ours(file: h5py.File, name: str) -> str:
    """Describe why `Record.save` cannot have written an entry, or return "" if it can have."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        return f"the link {name!r:.60}"
    part = file[name]
    if not isinstance(part, h5py.Dataset) or part.shape is None:
        return f"no array {name!r:.60}"
    if part.is_virtual or part.external:
        return f"{name!r:.60}, which is stored in another file"
    if part.dtype.kind not in "biufS":
        return f"{name!r:.60} of dtype {part.dtype!s:.60}"
    plan = part.id.get_create_plist()
    if [plan.get_filter(i)[0] for i in range(plan.get_nfilters())] not in _FILTERS:
        return f"{name!r:.60} with other filters than shuffle and gzip"
    return ""


def _unpacked_size(part: h5py.Dataset) -> int:
    if part.chunks is None:
        return math.prod(part.shape) * part.dtype.itemsize
    count = math.prod(
        -(-size // chunk) for size, chunk in zip(part.shape, part.chunks, strict=True)
    )
    return count * max(_chunk_size(part), _LEAST_CHUNK)


def _chunk_size(part: h5py.Dataset) -> int:
    return math.prod(part.chunks) * part.dtype.itemsize


def _overlong_chunk(part: h5py.Dataset, packed: bytes) -> str:
    """Describe the array if one of its chunks unpacks to too many bytes, else return "".

    HDF5 itself does not check the unpacked size.
    """
    chunks = []
    if part.compression == "gzip":
        part.id.chunk_iter(chunks.append)
    for chunk in chunks:
        stored = packed[chunk.byte_offset : chunk.byte_offset + chunk.size]
        size = _chunk_size(part)
        if chunk.filter_mask or len(zlib.decompressobj().decompress(stored, size + 1)) > size:
            return f"{part.name!r:.60} with a chunk of another size"
    return ""
