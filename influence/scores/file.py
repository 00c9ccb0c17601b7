"""Scores too many for memory: solved, multiplied and written block by block."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from influence.common.convergence import warn_unconverged
from influence.common.progress import progress
from influence.examples.examples import Examples
from influence.net.net import GenericNeuralNet
from influence.scores.score_table import (
    CHUNK,
    LOSSES,
    PENALTY,
    PER_TEST,
    S_TEST,
    SAMPLE,
    TABLE,
    TRAINING,
    check_same,
    create,
    mark,
    to_disk,
)
from influence.solvers import Solution

_TESTS, _ROWS = 2048, 1024  # of the table, between two marks; multiples of a chunk's
_S_BYTES = 1 << 27  # what s_test of so many tests may take, in the net's dtype
_PROBE_ROWS = 8


@dataclass(frozen=True)
class Job:
    """What is to be written.

    Args:
      net: at its theta.
      measured: the net whose losses are measured: `net`, or a view of it.
      train: the training set.
      test: m examples.
      rows: (k,) increasing training rows.
      dtype: "float32" or "float64", of the multiplication and the table.
      solve: gradients (d, b) -> Solution.
      together: right-hand sides that `solve` takes at once.
      batch_size: rows at a time, or None.
      inputs: what else the numbers depend on, by name.
      judged: whether the solver has a tolerance to miss.
    """

    net: GenericNeuralNet
    measured: GenericNeuralNet
    train: Examples
    test: Examples
    rows: NDArray[np.int64]
    dtype: str
    solve: Callable[[NDArray], Solution]
    together: int
    batch_size: int | None
    inputs: dict[str, Any]
    judged: bool

    @property
    def tests_together(self) -> int:
        """How many tests are multiplied at once: a multiple of a chunk's, if there are as many."""
        fits = _S_BYTES // (self.net.num_parameters * self.net.dtype.itemsize)
        size = int(np.clip(fits, 1, _TESTS))
        return size // CHUNK[0] * CHUNK[0] or size


def write(job: Job, path: Path) -> Path:
    """Write the file, or what is missing of it; see `Influence.write_scores`."""
    identity = _identity(job)
    if path.exists():
        check_same(path, identity)
        with h5py.File(path, "r") as file:
            _warn_of_earlier(job, file, len(job.test))
        return path
    partial = path.with_name(path.name + ".partial")
    if partial.exists():
        check_same(partial, identity)
    else:
        create(
            partial,
            identity,
            shape=(len(job.test), len(job.rows)),
            dtype=job.dtype,
            s_test=(job.net.num_parameters, job.net.dtype),
            rows=job.rows,
            n=len(job.train),
            together=(job.tests_together, _ROWS),
        )
    with h5py.File(partial, "r+") as file:
        _solve(job, file)
        _multiply(job, file)
        file["rounding_error"][()] = _rounding_error(job, file)
        to_disk(file)
    os.replace(partial, path)
    return path


def _solve(job: Job, file: h5py.File) -> None:
    m, size = len(job.test), job.together
    done = int(file["tests_solved"][()])
    _warn_of_earlier(job, file, done)
    if done == m:
        return
    batches = job.test.batches(size, np.arange(done, m))
    for x, y in progress(batches, "solving for test examples", -(-(m - done) // size)):
        solution = job.solve(job.measured.gradients(x, y).T)
        part = slice(done, done + len(y))
        file[S_TEST][part] = solution.x.T
        for name in PER_TEST:
            file[name][part] = getattr(solution, name)
        done += len(y)
        mark(file, "tests_solved", done)


def _warn_of_earlier(job: Job, file: h5py.File, done: int) -> None:
    """Say of systems that an earlier call solved what was said then."""
    converged = file["converged"][:done]
    if job.judged and not converged.all():
        warn_unconverged(
            f"{np.count_nonzero(~converged)} of the first {done} systems, solved by an earlier "
            "call, missed the solver's tolerance; the data set residual says by how much."
        )


def _multiply(job: Job, file: h5py.File) -> None:
    m, k = file[TABLE].shape
    tests, columns = map(int, file.attrs["together"])
    across = -(-k // columns)
    blocks = range(int(file["blocks_done"][()]), -(-m // tests) * across)
    # An iterator of its own for every block of tests: one pass over the training rows serves it.
    source, S = iter(()), _Factors.of(job, file, slice(0, 0))
    for block in progress(blocks, "scores"):
        i, j = divmod(block, across)
        part = slice(i * tests, min((i + 1) * tests, m))
        if block == blocks[0] or j == 0:
            S = _Factors.of(job, file, part)
            rows = job.rows[j * columns :]
            whole = len(rows) == len(job.train)
            source = job.train.batches(columns, None if whole else rows)
        x, y = next(source)
        begin = j * columns
        file[TABLE][part, begin : begin + len(y)] = S.scores(job, Examples._trusted(x, y))
        mark(file, "blocks_done", block + 1)


@dataclass(frozen=True)
class _Factors:
    """s_test of some tests as the multiplication takes it.

    Attributes:
      S: (b, d) s_test / n in the dtype of the table.
      constant: (b,) s_test . grad penalty / n.
    """

    S: NDArray
    constant: NDArray

    @staticmethod
    def of(job: Job, file: h5py.File, part: slice) -> _Factors:
        n, penalty = len(job.train), job.net.penalty_gradient()
        S = np.empty((part.stop - part.start, len(penalty)), job.dtype)
        constant = np.empty(len(S), job.dtype)
        for start in range(0, len(S), CHUNK[0]):  # never both dtypes whole
            rows = slice(start, min(start + CHUNK[0], len(S)))
            exact = file[S_TEST][part.start + rows.start : part.start + rows.stop]
            exact /= n
            S[rows], constant[rows] = exact, exact @ penalty
        return _Factors(S, constant)

    def scores(self, job: Job, examples: Examples) -> NDArray:
        """(b, rows) of the table."""
        size = job.batch_size or job.net.rows_per_batch(examples, len(self.S), dtype=job.dtype)
        table = np.empty((len(self.S), len(examples)), job.dtype)
        start = 0
        for x, y in examples.batches(size):
            out = table[:, start : start + len(y)]
            out[:] = job.net.directional(x, y, self.S.T, dtype=job.dtype).T
            out += self.constant[:, None]
            start += len(y)
        return table


def _rounding_error(job: Job, file: h5py.File) -> float:
    """What float32 costs, on scores spread over the table."""

    def spread(size: int, most: int) -> NDArray:
        return np.unique(np.linspace(0, size - 1, most).astype(int))

    m, k = file[TABLE].shape
    # Where theta is long, half as many of s_test as are multiplied at once: it is not rounded here.
    fit = _S_BYTES // (2 * job.net.num_parameters * job.net.dtype.itemsize)
    tests, columns = spread(m, int(np.clip(fit, 1, SAMPLE))), spread(k, SAMPLE)
    some = job.train.take(job.rows[columns])
    S = file[S_TEST][tests].T
    exact = job.net.directional(some.x, some.y, S) + job.net.penalty_gradient() @ S
    exact = exact.T / len(job.train)
    got = np.stack([file[TABLE][test][columns] for test in tests])
    scale = np.abs(exact).max()
    return float(np.abs(got - exact).max() / scale) if scale else 0.0


def _identity(job: Job) -> dict[str, Any]:
    """What the numbers depend on, by names that a refusal can give."""
    net, few = job.net, job.test.take(slice(0, _PROBE_ROWS))
    first = job.train.take(slice(0, _PROBE_ROWS))
    weights = hashlib.sha256()
    for array in [net.theta, *net.model.get_weights()]:
        weights.update(np.ascontiguousarray(array).tobytes())
    return {
        "net": type(net).__name__,
        "weights": weights.hexdigest(),
        LOSSES: job.measured.losses(few.x, few.y).astype(float),
        TRAINING: net.losses(first.x, first.y).astype(float),
        PENALTY: net.penalty(),
        "train": job.train.fingerprint,
        "test": job.test.fingerprint,
        "rows": hashlib.sha256(job.rows.tobytes()).hexdigest(),
        "dtype": job.dtype,
        **job.inputs,
    }
