"""Retraining in blocks: options, results, distribution over processes and cached blocks."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from joblib.externals.loky.backend import resource_tracker as joblib_tracker
from numpy.typing import NDArray

from influence.common.checkpoint import check_folder, identity, kept
from influence.common.named_array import Estimand
from influence.common.progress import progress
from influence.curvature.operators import check_batch_size
from influence.examples.examples import Examples, check_rows
from influence.net.checked import checked
from influence.net.net import GenericNeuralNet
from influence.net.questions import PerRow

Groups = Sequence[NDArray[np.int64]]
# TensorFlow reads its number of threads from this variable when a process first uses TensorFlow.
_THREADS = "TF_NUM_INTRAOP_THREADS"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options that determine how the work is divided into blocks, distributed and cached.

    Attributes:
      block: number of rows or groups that are retrained together and share data passes. The names
        of the cached files depend on `block`.
      batch_size: number of training rows in memory at a time; None: chosen by the library.
      num_processes: number of joblib workers, which share the cores; -1 starts one for each core.
        The last bits of the results may depend on this number. With another joblib backend the
        workers may run on other machines.
      checkpoints: a folder that caches finished blocks. If a call is interrupted (even by kill -9),
        the next call continues after the last finished block and returns the same bits.
      key: any text. The names of the cached files depend on it.
    """

    block: int = 50
    batch_size: int | None = None
    num_processes: int = 1
    checkpoints: str | Path | None = None
    key: str = ""

    def __post_init__(self):
        """Check the options."""
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}.")
        check_batch_size(self.batch_size)
        if self.num_processes == 0:
            raise ValueError("num_processes must not be 0; 1 is this process, -1 is one a core.")


@dataclass(frozen=True, eq=False)
class Refits(Estimand):
    """Table (m, k) of the actual changes of test losses by retraining without each row or group.

    Attributes:
      change_if_removed: (m, k) test loss after retraining without the row or group, minus the test
        loss before.
      rows: (k,) the rows; for groups a tuple of k arrays.
      gradient_norm: (k,) Euclidean norm of each refit's risk gradient. A small norm certifies the
        refit.
      passes: (k,) number of data passes ("newton") or calls of `fit` that each refit took.
      converged: (k,) True if gradient_norm is within the tolerance.
      names: (k,) the groups' names if they were given as a dict, else empty.
    """

    rows: Any
    gradient_norm: NDArray
    passes: NDArray
    converged: NDArray
    names: tuple = field(default=(), kw_only=True)


@dataclass(frozen=True)
class Task:
    """The inputs that all blocks share.

    Attributes:
      net: a net. Changes are relative to the test losses at the net's own theta.
      train: the training set.
      test: m examples whose losses are measured.
      batch_size: number of rows in memory at a time; None: chosen by the library.
    """

    net: GenericNeuralNet
    train: Examples
    test: Examples
    batch_size: int | None = None

    def losses(self, thetas: NDArray | None = None) -> NDArray:
        """Return the (m,) test losses at the net's theta, or (m, k) at each of thetas (d, k)."""
        question = PerRow("losses", *(() if thetas is None else (thetas,)))
        return self.test.each_row(question, self.net, batch_size=self.batch_size)

    def changes(self, thetas: NDArray) -> NDArray:
        """Return the (m, k) test losses at thetas (d, k) minus those at the net's own theta."""
        # One call computes both losses, so that both have the same rounding.
        losses = self.losses(np.column_stack([self.net.theta, thetas]))
        return losses[:, 1:] - losses[:, :1]

    def identity(self, *more: Any) -> str:
        """Return a short hash of all inputs of the work, for the names of cached files."""
        return identity(self.net, self.train, self.test.fingerprint, self.batch_size, *more)


def run(
    task: Task,
    refit: Callable[[Task, Groups, Any], dict[str, NDArray]],
    groups: Groups,
    argument: Any,
    options: RunOptions,
    *,
    identity: Sequence,
    what: str,
) -> dict[str, NDArray]:
    """Call `refit(task, part, argument)` for parts of `options.block` groups, and join the results.

    Args:
      task: the inputs that all parts share.
      refit: a module-level function, so that other processes can import it.
      groups: the rows of each of the k groups.
      argument: the third argument of `refit`.
      options: options of the run.
      identity: everything else that the results depend on.
      what: the name of the work on the progress bar.

    Returns: the arrays by name, joined along their last axis.
    Raises: the errors of `check_folder`.
    """
    folder, block = check_folder(options.checkpoints), options.block
    parts = [groups[first : first + block] for first in range(0, len(groups), block)]
    paths: list[Path | None] = [None] * len(parts)
    if folder is not None:
        name = task.identity(options.key, *identity)
        paths = [folder / f"refits-{name}-{joblib.hash(part)}.npz" for part in parts]
    workers = min(joblib.effective_n_jobs(options.num_processes), len(parts))
    with _cores_shared(workers):
        with started_deaf():
            work = joblib.Parallel(n_jobs=workers, return_as="generator")(
                joblib.delayed(_kept)(path, refit, task, part, argument)
                for path, part in zip(paths, parts, strict=True)
            )
        done = list(progress(work, what, len(parts)))
    return {name: np.concatenate([d[name] for d in done], axis=-1) for name in done[0]}


def _kept(path: Path | None, refit: Callable, task: Task, part: Groups, argument: Any) -> Any:
    return kept(path, lambda: refit(task, part, argument))


def check(net: Any, train: Any, test: Any) -> tuple[GenericNeuralNet, Examples, Examples]:
    """Check net, train and test, and convert them to a GenericNeuralNet and two Examples.

    Raises: TypeError or ValueError, naming the argument, for inputs that cannot be retrained.
    """
    net, train, test = checked(net, train, test)
    if len(train) < 2:
        raise ValueError("train must have at least 2 rows to leave one out, got 1.")
    return net, train, test


def check_groups(groups: Any, num_rows: int) -> tuple[tuple, Groups]:
    """Return (names, groups). Each group is an int64 array of some, but not all, rows.

    Raises: TypeError, ValueError or IndexError naming the group.
    """
    if isinstance(groups, str) or not hasattr(groups, "__len__"):
        raise TypeError(
            "groups must be a list of arrays of row numbers or a dict of them, got "
            f"{type(groups).__name__}."
        )
    if not len(groups):
        raise ValueError("groups must hold at least one group of rows, got none.")
    named = isinstance(groups, Mapping)
    checked = []
    for name, group in groups.items() if named else enumerate(groups):
        rows = check_rows(group, num_rows, f"groups[{name!r}]")
        if len(rows) == num_rows:
            raise ValueError(f"groups[{name!r}] must leave a row to train on, got all {num_rows}.")
        checked.append(rows)
    return tuple(groups) if named else (), checked


def check_masses(groups: Groups, masses: NDArray) -> None:
    """Refuse a group that leaves no valid position. The loss masks all positions except valid ones.

    Raises: ValueError naming the group.
    """
    for number, group in enumerate(groups):
        if masses[group].sum() == masses.sum():
            raise ValueError(
                f"groups[{number}] must leave a valid position to train on, got all "
                f"{masses.sum():.0f} of them in its rows."
            )


def check_processes(num_processes: int, *sent: Any) -> None:
    """Check that a worker process can unpickle the inputs before starting any work.

    Keras rebuilds a model from the name of its class, which another process may not know. Without
    this check the user would see only the message that the process pool is broken.

    Raises: ValueError naming `num_processes`.
    """
    if joblib.effective_n_jobs(num_processes) == 1:
        return
    try:
        with _cores_shared(num_processes), started_deaf():
            joblib.Parallel(n_jobs=num_processes)([joblib.delayed(_arrived)(*sent)])
    except Exception as error:
        raise ValueError(
            f"num_processes must be 1 for a net that another process cannot rebuild, got "
            f"{num_processes} ({_reason(error)}); give a model class of your own the decorator "
            "keras.saving.register_keras_serializable and a get_config, and define it and the loss "
            "in a module that can be imported, not in the script or notebook itself."
        ) from error


@contextmanager
def _cores_shared(num_processes: int) -> Iterator[None]:
    """Divide the cores evenly among the TensorFlow threads of workers that start in this context.

    joblib does the same for BLAS. Without this limit each worker would use all cores and wait for
    the other workers.
    """
    workers = joblib.effective_n_jobs(num_processes)
    if workers == 1 or _THREADS in os.environ:
        yield
        return
    os.environ[_THREADS] = str(max(joblib.cpu_count() // workers, 1))
    try:
        yield
    finally:
        del os.environ[_THREADS]


def _arrived(*sent: Any) -> int:
    return len(sent)


def _reason(error: BaseException) -> str:
    """Return the original cause of an error in one sentence, also for errors in other processes."""
    while error.__cause__ is not None:
        error = error.__cause__
    # joblib gives the traceback of another process as a text. Its end is the exception's message.
    named = re.findall(r"^(?:\w+\.)*(\w+(?:Error|Exception):\s+\S.*)", str(error), re.MULTILINE)
    reason = named[-1] if named else f"{type(error).__name__}: {error}"
    return " ".join(reason.split()).split(". ")[0][:200]


@contextmanager
def started_deaf() -> Iterator[None]:
    """Block SIGINT for worker processes that the caller starts inside the `with` block.

    On Ctrl-C, a terminal sends SIGINT to every process of a command. Each worker would print a
    traceback. The caller still raises KeyboardInterrupt, and joblib then ends the workers.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    for tracker in (joblib_tracker, resource_tracker):
        tracker.ensure_running()  # started first, because a start of a tracker unblocks SIGINT
    # New processes and threads inherit the mask. A SIGINT sent now arrives after the `with` block.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
