"""An HDF5 file of scores that are too many for memory. Scores are computed and written in blocks.

The file gets its full size when it is created. Later writes change only numbers, not HDF5's
internal tables. The counter of finished blocks is increased only after the block has reached the
disk. So every counted block is complete, even after a kill -9. Each block and each test example's
s_test has a checksum. An altered file is never continued or returned.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

from influence.common.checkpoint import check_writable, reserve, sha256
from influence.common.convergence import warn_unconverged
from influence.common.memory import VECTORS, fitting
from influence.common.progress import progress
from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet
from influence.net.questions import PerRow
from influence.scores.inverse import Inverse
from influence_console import shown

# Names of data sets and attributes in the file. _PER_TEST maps such names to dtypes.
_TABLE, _S_TEST = "change_if_removed", "s_test"
_PER_TEST = {"residual": float, "iterations": int, "converged": bool, "min_curvature": float}
_TEST_SHA, _BLOCK_SHA, _SHA = "test_sha256", "block_sha256", "sha256"
_FORMAT = 1
_LOSSES, _PENALTY = "losses of the first test examples", "penalty"
_TRAINING = "losses of the first training rows"
# The model computes these inputs. They differ slightly between machines and numbers of threads, so
# they are compared up to a tolerance. All other inputs must be equal.
_COMPUTED = (_LOSSES, _TRAINING, _PENALTY)
_PROBE_ROWS, _PROBE_RTOL = 8, 1e-3
# An HDF5 chunk covers this many tests and training rows. In float32 a chunk takes 512 KiB, so the
# scores of one test or of one training row are quick to read.
_CHUNK = (128, 1024)
# A block of scores covers at most this many tests and training rows. It consists of whole chunks.
# The file counts the blocks that are written.
_TESTS, _ROWS = 2048, 1024
# The s_test vectors of a block's tests may take this many bytes in the net's dtype.
_S_BYTES = VECTORS // 2
# HDF5's internal tables take fewer bytes than this in a small file.
_TABLES_BYTES = 1 << 15
# The rounding error is measured on a sample of at most this many tests and training rows.
_SAMPLE = 64


@dataclass(frozen=True)
class Job:
    """The inputs that determine the table of scores in the file.

    Args:
      inverse: the `Inverse` that solves systems with the risk's Hessian H.
      view: the net whose losses are measured, as `Inverse.measured` returns it.
      measurement: name of the measured quantity.
      test: m examples.
      rows: (k,) increasing training rows.
      dtype: "float32" or "float64", the dtype of the table and of its computation from s_test.
    """

    inverse: Inverse
    view: GenericNeuralNet
    measurement: str
    test: Examples
    rows: NDArray[np.int64]
    dtype: str

    @property
    def net(self) -> GenericNeuralNet:
        """The net that defines the training risk and H. `view` defines the measured losses."""
        return self.inverse.net

    @property
    def train(self) -> Examples:
        """The training set."""
        return self.inverse.train

    def tests_in(self, budget: int, at_most: int) -> int:
        """Return how many s_test vectors in the net's dtype fit into `budget` bytes."""
        return fitting(budget, self.net.num_parameters * self.net.dtype.itemsize, at_most)

    def identity(self) -> dict[str, Any]:
        """Return a dict of all inputs that the scores depend on. Errors use its keys."""
        net, operator = self.net, self.inverse.operator
        few, first = (part.take(slice(0, _PROBE_ROWS)) for part in (self.test, self.train))
        weights = hashlib.sha256()
        for array in [net.theta, *net.model.get_weights()]:
            weights.update(np.ascontiguousarray(array).tobytes())
        return {
            "net": type(net).__name__,
            "weights": weights.hexdigest(),
            _LOSSES: self.view.losses(few.x, few.y).astype(float),
            _TRAINING: net.losses(first.x, first.y).astype(float),
            _PENALTY: net.penalty(),
            "train": self.train.fingerprint,
            "test": self.test.fingerprint,
            "rows": hashlib.sha256(self.rows.tobytes()).hexdigest(),
            "dtype": self.dtype,
            "solver": repr(self.inverse.solver),
            "curvature": type(operator).__name__,
            "damping": operator.damping,
            "measurement": self.measurement,
        }


def write(job: Job, path: Path) -> Path:
    """Write the scores to the file `path` and return the path. Continue an unfinished file."""
    identity = job.identity()
    if path.exists():
        with _opened(job, path, "r", identity) as file:
            _warn_of_earlier(job, file, len(job.test))
        return path
    partial = path.with_name(path.name + ".partial")
    if not partial.exists():
        _create(job, partial, identity)
    with _opened(job, partial, "r+", identity) as file:
        reserve(partial, partial.stat().st_size, path)
        _solve(job, file)
        _multiply(job, file)
        file["rounding_error"][()] = _rounding_error(job, file)
        file[_SHA][()] = _sha_of_all(file)
        _to_disk(file)
    os.replace(partial, path)
    return path


# --- the numbers ----------------------------------------------------------------------------------


def _solve(job: Job, file: h5py.File) -> None:
    done = int(file["tests_solved"][()])
    _warn_of_earlier(job, file, done)
    left, ask = np.arange(done, len(job.test)), PerRow("gradients")
    if not len(left):
        return
    size, what = job.inverse.block_size, "solving for test examples"
    for G in job.test.map_over(ask, job.view, None, left, batch_size=size, what=what):
        solution = job.inverse.solve(G.T, "the test gradients")
        part = slice(done, done + len(G))
        file[_S_TEST][part] = solution.x.T
        for name in _PER_TEST:
            file[name][part] = getattr(solution, name)
        rows = (x.astype(job.net.dtype, copy=False) for x in solution.x.T)
        about = zip(*(file[name][part] for name in _PER_TEST), strict=True)
        file[_TEST_SHA][part] = np.stack([_sha(x, *a) for x, a in zip(rows, about, strict=True)])
        done += len(G)
        _mark(file, "tests_solved", done)


def _warn_of_earlier(job: Job, file: h5py.File, done: int) -> None:
    """Repeat the warning for systems that an earlier, interrupted call solved."""
    converged = file["converged"][:done]
    if job.inverse.solver.rtol is not None and not converged.all():
        warn_unconverged(
            f"{np.count_nonzero(~converged)} of the first {done} systems, solved by an earlier "
            "call, missed the solver's tolerance; the data set residual says by how much."
        )


def _multiply(job: Job, file: h5py.File) -> None:
    columns = int(file.attrs["together"][1])
    blocks = range(int(file["blocks_done"][()]), len(file[_BLOCK_SHA]))
    tables = iter(())
    for block in progress(blocks, "scores"):
        part, of_rows = _place(file, block)
        # A new block of tests starts a new pass over the training rows.
        if block == blocks[0] or of_rows.start == 0:
            tables = _tables(job, _Scores.of(job, file, part), job.rows[of_rows.start :], columns)
        table = np.ascontiguousarray(next(tables), job.dtype)
        file[_TABLE][part, of_rows] = table
        file[_BLOCK_SHA][block] = _sha(table)
        _mark(file, "blocks_done", block + 1)


def _place(file: h5py.File, block: int) -> tuple[slice, slice]:
    """Return the slice of tests and the slice of training rows of one block of the table."""
    m, k = file[_TABLE].shape
    tests, columns = map(int, file.attrs["together"])
    i, j = divmod(block, -(-k // columns))
    part = slice(i * tests, min((i + 1) * tests, m))
    return part, slice(j * columns, min((j + 1) * columns, k))


def _tables(job: Job, question: _Scores, rows: NDArray, columns: int) -> Iterator[NDArray]:
    """Yield the scores (b, columns) of b tests, for one block of training rows after another."""
    chosen = job.net.rows_per_batch(job.train, len(question.S), dtype=job.dtype)
    size = columns  # a power of 2, so a block consists of whole batches
    while size > (job.inverse.batch_size or chosen):
        size //= 2
    asked = None if len(rows) == len(job.train) else rows
    parts = job.train.map_over(question, job.net, rows=asked, batch_size=size)
    while block := list(islice(parts, columns // size)):
        yield np.concatenate(block).T


@dataclass(frozen=True, eq=False)
class _Scores:
    """Question that returns the scores of a batch of training rows for b tests.

    Attributes:
      S: (b, d) s_test / n in the dtype of the table. If the loss has masks, n is the sum of the
        training rows' masses.
      constant: (b,) s_test . grad penalty / n, the part of a score that comes from the penalty.
    """

    S: NDArray
    constant: NDArray

    @staticmethod
    def of(job: Job, file: h5py.File, part: slice) -> _Scores:
        n, penalty = job.inverse.mass, job.net.penalty_gradient()
        S = np.empty((part.stop - part.start, len(penalty)), job.dtype)
        constant = np.empty(len(S), job.dtype)
        for start in range(0, len(S), _CHUNK[0]):  # the loop avoids a second copy of all of S
            rows = slice(start, min(start + _CHUNK[0], len(S)))
            exact = file[_S_TEST][part.start + rows.start : part.start + rows.stop] / n
            S[rows], constant[rows] = exact, exact @ penalty
        return _Scores(S, constant)

    def __call__(self, net: Any, theta: NDArray | None, x: Any, y: NDArray) -> NDArray:
        """Return the scores of one batch of training rows: (rows, b)."""
        along = net.at(theta).directional(x, y, self.S.T, dtype=self.S.dtype)
        return net.times_masses(along + self.constant, x, y)


def _rounding_error(job: Job, file: h5py.File) -> float:
    """Compute the largest error in a sample of the table, relative to the sample's largest score.

    The scores of the sample are recomputed in the net's dtype for this comparison.
    """

    def spread(size: int, most: int) -> NDArray:
        return np.unique(np.linspace(0, size - 1, most).astype(int))

    m, k = file[_TABLE].shape
    # Here s_test has the net's dtype, which may take more memory than the table's dtype. So the
    # sample gets only half of a block's memory budget for s_test.
    tests, columns = spread(m, job.tests_in(_S_BYTES // 2, _SAMPLE)), spread(k, _SAMPLE)
    some = job.train.take(job.rows[columns])
    S = file[_S_TEST][tests].T
    exact = job.net.directional(some.x, some.y, S) + job.net.penalty_gradient() @ S
    exact = job.net.times_masses(exact, some.x, some.y).T / job.inverse.mass
    got = np.stack([file[_TABLE][test][columns] for test in tests])
    scale = np.abs(exact).max()
    return float(np.abs(got - exact).max() / scale) if scale else 0.0


# --- the file -------------------------------------------------------------------------------------


def _create(job: Job, path: Path, identity: dict[str, Any]) -> None:
    """Make the file and allocate all data sets. Rename the file to `path` at the end.

    Raises: ValueError if the disk is too small or not writable, or if another process holds the
      file.
    """
    check_writable(path.parent, "path's parent")
    # The temporary name is always the same, so a call after a kill -9 overwrites the old file.
    unfinished = path.with_name(path.name + ".new")
    if unfinished.is_file():
        try:
            h5py.File(unfinished, "r+").close()
        except BlockingIOError as error:
            raise _held(unfinished) from error
        except OSError:  # HDF5 cannot read an unfinished file
            pass
    unfinished.unlink(missing_ok=True)
    tests = job.tests_in(_S_BYTES, _TESTS)
    tests = tests // _CHUNK[0] * _CHUNK[0] or tests  # whole chunks, if at least one fits
    layout = _layout(job, tests, _ROWS)
    try:
        unfinished.touch()
        reserve(unfinished, _bytes(layout), path)
        with h5py.File(unfinished, "w") as file:
            for name, (shape, kind) in layout.items():
                if name in (_TABLE, _S_TEST):
                    _allocate(file, name, shape, kind)
                else:
                    file[name] = np.zeros(shape, kind)
            file["rows"][:] = job.rows
            _describe(file, len(job.train))
            file.attrs.update(identity, plan=repr(job.inverse.first_order_plan))
            file.attrs["together"] = tests, _ROWS
            file.attrs["format"] = _FORMAT
            file.attrs[_SHA] = _sha_of_description(file)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _bytes(layout: dict[str, tuple[tuple[int, ...], np.dtype]]) -> int:
    """Estimate the size of the file in bytes: whole chunks and HDF5's internal tables."""
    total = _TABLES_BYTES
    for shape, kind in layout.values():
        whole = [-(-n // c) * c for n, c in zip(shape, map(min, _CHUNK, shape), strict=False)]
        total += kind.itemsize * math.prod([*whole, *shape[2:]])
    return total + total // 100


def _layout(job: Job, tests: int, columns: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return the shape and dtype of each data set, if a block has `tests` x `columns` scores."""
    m, k, s_dtype = len(job.test), len(job.rows), job.net.dtype
    return {
        _TABLE: ((m, k), np.dtype(job.dtype)),
        _S_TEST: ((m, job.net.num_parameters), s_dtype),
        "rows": ((k,), job.rows.dtype),
        **{name: ((m,), np.dtype(kind)) for name, kind in _PER_TEST.items()},
        "tests_solved": ((), np.dtype(int)),
        "blocks_done": ((), np.dtype(int)),
        "rounding_error": ((), np.dtype(float)),
        _TEST_SHA: ((m, 32), np.dtype(np.uint8)),
        _BLOCK_SHA: ((-(-m // tests) * -(-k // columns), 32), np.dtype(np.uint8)),
        _SHA: ((32,), np.dtype(np.uint8)),
    }


def _describe(file: h5py.File, n: int) -> None:
    file[_TABLE].attrs.update(
        estimand="predicted change of each test loss were each training row removed, "
        "s_test . grad L(z_i) / n",
        sign="positive: the loss rises without the row, so the row helped",
        unit="that of the test loss, nats for log losses",
        axes="test example, training row (its number is in rows)",
        n=n,
    )
    file[_S_TEST].attrs["meaning"] = "H^-1 grad loss of each test example"
    file["rounding_error"][()] = np.nan
    file["rounding_error"].attrs["meaning"] = (
        f"largest error of {_SAMPLE} x {_SAMPLE} scores at most, against the net's own dtype, over "
        "the largest score among them"
    )
    meanings = {
        _TEST_SHA: "of each test example's s_test, residual, iterations, converged, min_curvature",
        _BLOCK_SHA: "of each block of change_if_removed; attribute together is the size of a block",
        _SHA: "of the attributes, rows, rounding_error and the other checksums; 0 until finished",
    }
    for name, meaning in meanings.items():
        file[name].attrs["meaning"] = f"SHA-256 {meaning}"
    packages = ("numpy", "scipy", "h5py", "keras", "tensorflow")
    file.attrs["versions"] = json.dumps({p: importlib.metadata.version(p) for p in packages})


def _allocate(file: h5py.File, name: str, shape: tuple, dtype: Any) -> None:
    """Make a data set and allocate all its chunks in the file at once."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(tuple(map(min, _CHUNK, shape)))
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    kind = h5py.h5t.py_create(np.dtype(dtype))
    h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple(shape), properties)


def _mark(file: h5py.File, counter: str, value: int) -> None:
    """Write the data to the disk, and then set the counter of the finished tests or blocks."""
    _to_disk(file)
    file[counter][()] = value
    file.flush()


def _to_disk(file: h5py.File) -> None:
    """Write the file to the disk, and wait until this is done."""
    file.flush()
    os.fsync(file.id.get_vfd_handle())


# --- the checks of an existing file ---------------------------------------------------------------


@contextmanager
def _opened(
    job: Job, path: Path, mode: Literal["r", "r+"], identity: dict[str, Any]
) -> Iterator[h5py.File]:
    """Open an existing file of scores, and verify all tests and blocks that it counts as finished.

    Raises: ValueError if the file does not hold these scores. The message names the file and a
      remedy.
    """
    if not path.is_file():  # reading a pipe or a device may never end
        kind = "folder" if path.is_dir() else "pipe or device"
        raise ValueError(f"path must be a file, got the {kind} {shown(path)}.")
    cause: Exception | None = None
    with ExitStack() as stack:
        try:
            file = stack.enter_context(h5py.File(path, mode))
            wrong = _another(file, identity) or _altered(job, file, finished=mode == "r")
        except BlockingIOError as error:
            raise _held(path) from error
        except Exception as error:  # h5py raises many kinds of errors for altered bytes
            wrong, cause = f"HDF5 that cannot be read ({error!r:.200})", error
        if wrong:
            raise ValueError(
                f"path must be free or hold scores of the same inputs as they were written, got "
                f"{shown(path)} with {wrong}; give another path, or delete it."
            ) from cause
        yield file


def _another(file: h5py.File, identity: dict[str, Any]) -> str:
    """Name the inputs or the format that differ from the file's. Return "" if none differs."""
    stored = dict(file.attrs)
    if not _equal("format", stored.get("format"), _FORMAT):
        return f"another format ({stored.get('format')!s:.20}; this program's is {_FORMAT})"
    other = [name for name, value in identity.items() if not _equal(name, stored.get(name), value)]
    return ", ".join(f"another {name}" for name in other)


def _altered(job: Job, file: h5py.File, *, finished: bool) -> str:
    """Describe the first altered part of the file. Return "" if no part was altered.

    The file counts its finished tests and blocks. Only their s_test and scores are checked.
    """
    layout = _layout(job, *map(int, file.attrs["together"]))
    for name, (shape, kind) in layout.items():
        if name not in file or (file[name].shape, file[name].dtype) != (shape, kind):
            return f"altered {name}: it must be {shape} of {kind}"
    if set(file) != set(layout):
        return f"foreign data sets: {', '.join(sorted(set(file) - set(layout)))}"
    if not _equal(_SHA, file.attrs.get(_SHA), _sha_of_description(file)):
        return "altered attributes or rows"
    m, blocks = len(job.test), len(file[_BLOCK_SHA])
    solved, done = int(file["tests_solved"][()]), int(file["blocks_done"][()])
    least = (m, blocks) if finished else (m if done else 0, 0)
    if not (least[0] <= solved <= m and least[1] <= done <= blocks):
        return f"altered counters: {solved} of {m} tests and {done} of {blocks} blocks"
    for start in progress(range(0, solved, _CHUNK[0]), "verifying s_test"):
        part = slice(start, min(start + _CHUNK[0], solved))
        if (_sha_of_tests(file, part) != file[_TEST_SHA][part]).any():
            return f"an altered s_test, or what is said of it, in {start} to {part.stop - 1}"
    for block in progress(range(done), "verifying scores"):
        place = _place(file, block)
        if (_sha(file[_TABLE][place]) != file[_BLOCK_SHA][block]).any():
            tests, rows = ((p.start, p.stop - 1) for p in place)
            return f"altered scores in rows {tests} and columns {rows} of {_TABLE}"
    if finished and (_sha_of_all(file) != file[_SHA][()]).any():
        return "an altered rounding_error or checksum"
    return ""


def _sha(*arrays: NDArray) -> NDArray[np.uint8]:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return np.frombuffer(digest.digest(), np.uint8)


def _sha_of_tests(file: h5py.File, part: slice) -> NDArray[np.uint8]:
    """Compute the checksums (b, 32) of b tests. Read the file chunk by chunk."""
    digests = [hashlib.sha256() for _ in range(part.stop - part.start)]
    for column in range(0, file[_S_TEST].shape[1], _CHUNK[1]):
        rows = file[_S_TEST][part, column : column + _CHUNK[1]]
        for digest, row in zip(digests, rows, strict=True):
            digest.update(row.data)
    for values in (file[name][part] for name in _PER_TEST):
        for i, digest in enumerate(digests):
            digest.update(values[i : i + 1].data)
    return np.array([list(digest.digest()) for digest in digests], np.uint8)


def _sha_of_description(file: h5py.File) -> str:
    """Compute one checksum of the data set `rows` and all attributes."""
    found = {"": file["rows"][()]}
    for name, part in {"": file, **file}.items():
        found |= {f"{name}@{key}": np.asarray(value) for key, value in part.attrs.items()}
    found.pop(f"@{_SHA}", None)
    return sha256(found)


def _sha_of_all(file: h5py.File) -> NDArray[np.uint8]:
    parts = (file[name][()] for name in (_TEST_SHA, _BLOCK_SHA, "rounding_error"))
    return _sha(np.frombuffer(file.attrs[_SHA].encode(), np.uint8), *map(np.asarray, parts))


def _held(path: Path) -> ValueError:
    return ValueError(
        f"path must be free, got {shown(path)}, which another process holds; wait for that "
        "process, or give another path."
    )


def _equal(name: str, stored: Any, value: Any) -> bool:
    if stored is None or np.shape(stored) != np.shape(value):
        return False
    if name in _COMPUTED:
        return np.allclose(stored, value, rtol=_PROBE_RTOL, atol=1e-6)
    return bool(np.all(stored == value))
