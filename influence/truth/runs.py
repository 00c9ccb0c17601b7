"""What every way of retraining shares: its result, its task, and how its parts are run and kept."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from numpy.typing import NDArray

from influence.common.checkpoint import check_folder, kept
from influence.common.named_array import Estimand
from influence.common.progress import progress
from influence.curvature.operators import check_batch_size
from influence.examples.examples import Examples, check_rows
from influence.net.net import GenericNeuralNet

Groups = Sequence[NDArray[np.int64]]
_THREADS = "TF_NUM_INTRAOP_THREADS"  # read by TensorFlow when a process begins to use it


@dataclass(frozen=True, eq=False)
class Refits(Estimand):
    """Actual changes, (m, k), of each test loss after retraining without each row or group.

    Attributes:
      change_if_removed: (m, k) test loss after retraining without the row or group, minus before.
      rows: (k,) the rows; for groups a tuple of k arrays.
      gradient_norm: (k,) Euclidean norm of each refit's own risk gradient: the certificate.
      passes: (k,) data passes (newton) or calls of `fit` that each refit took.
      converged: (k,) gradient_norm within the tolerance.
      names: (k,) the groups' names, where they were given as a dict.
    """

    rows: Any
    gradient_norm: NDArray
    passes: NDArray
    converged: NDArray
    names: tuple = field(default=(), kw_only=True)


@dataclass(frozen=True)
class Task:
    """What every part of the work shares.

    Attributes:
      net: at the theta that everything is compared with.
      train: the training set.
      test: examples whose losses are measured.
      tolerance: what a refit's certificate is to be at most; None: it is not judged.
      max_passes: data passes at most.
      batch_size: rows at a time, or None.
      start: (d,) where a fit begins, or None for theta.
      fit: what is called instead of the net's own fit, or None.
    """

    net: GenericNeuralNet
    train: Examples
    test: Examples
    tolerance: float | None
    max_passes: int
    batch_size: int | None
    start: NDArray | None = None
    fit: Callable | None = None

    def losses(self, thetas: NDArray | None = None) -> NDArray:
        """(m,) test losses at the net as it is now, or (m, k) at each of thetas (d, k)."""
        net, num_vectors = self.net, 1 if thetas is None else thetas.shape[1]
        size = self.batch_size or net.rows_per_batch(self.test, num_vectors)
        return np.concatenate([net.losses(x, y, thetas) for x, y in self.test.batches(size)])

    def changes(self, thetas: NDArray) -> NDArray:
        """(m, k): each test loss at each of thetas (d, k), minus that at the net's own theta."""
        # In one call, so that both round alike.
        losses = self.losses(np.column_stack([self.net.theta, thetas]))
        return losses[:, 1:] - losses[:, :1]

    def identity(self, *more: Any) -> str:
        """One short name for everything the work depends on, the model by what it answers."""
        net, few = self.net, self.train.take(slice(0, 8))
        parts = (
            type(net).__name__, [variable.numpy() for variable in net.model.variables], net.theta,
            net.losses(few.x, few.y),
            net.penalty(), self.tolerance, self.max_passes, self.batch_size, self.start,
            self.train.fingerprint, self.test.fingerprint, *more,
        )  # fmt: skip
        return joblib.hash(parts)[:16]


def run(
    task: Task,
    refit: Callable,
    groups: Groups,
    argument: Any,
    *,
    block: int,
    checkpoints: str | Path | None,
    identity: Sequence,
    num_processes: int,
    what: str,
) -> dict[str, NDArray]:
    """`refit(task, part, argument)` for parts of `block` groups: its arrays joined, last axis.

    Args:
      task: what every part shares.
      refit: a module's own function, so that other processes find it.
      groups: rows of each of the k things to do.
      argument: what else `refit` takes.
      block: groups in a part.
      checkpoints: a folder to keep finished parts in, or None.
      identity: what the numbers depend on besides the task and the groups.
      num_processes: joblib workers.
      what: the work's name, for the progress bar.

    Raises: as `check_folder`.
    """
    folder = check_folder(checkpoints)
    parts = [groups[first : first + block] for first in range(0, len(groups), block)]
    paths: list[Path | None] = [None] * len(parts)
    if folder is not None:
        name = task.identity(*identity)
        paths = [folder / f"refits-{name}-{joblib.hash(part)}.npz" for part in parts]
    workers = min(joblib.effective_n_jobs(num_processes), len(parts))
    with _cores_shared(workers):
        work = joblib.Parallel(n_jobs=workers, return_as="generator")(
            joblib.delayed(_kept)(path, refit, task, part, argument)
            for path, part in zip(paths, parts, strict=True)
        )
        done = list(progress(work, what, len(parts)))
    return {name: np.concatenate([d[name] for d in done], axis=-1) for name in done[0]}


def _kept(path: Path | None, refit: Callable, task: Task, part: Groups, argument: Any) -> Any:
    return kept(path, lambda: refit(task, part, argument))


def check(
    net: GenericNeuralNet,
    train: Examples,
    test: Examples,
    *,
    tolerance: float | None,
    block: int,
    batch_size: int | None,
) -> None:
    """Refuse what no way of retraining takes.

    Raises: TypeError or ValueError naming the argument.
    """
    if not isinstance(net, GenericNeuralNet):
        raise TypeError(f"net must be a GenericNeuralNet, got {type(net).__name__}.")
    net.validate(train, "train")
    net.validate(test, "test")
    if len(train) < 2:
        raise ValueError("train must have at least 2 rows to leave one out, got 1.")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}.")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}.")
    check_batch_size(batch_size)


def check_groups(groups: Any, num_rows: int) -> tuple[tuple, Groups]:
    """(names, groups), each group int64 rows that leave some behind.

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


def check_processes(num_processes: int, *sent: Any) -> None:
    """Send what the workers need to one of them, before any work for them is begun.

    Keras rebuilds a model from its class's name, which another process may not know: without this,
    all that would be heard is that the pool of processes broke.

    Raises: ValueError naming `num_processes`.
    """
    if num_processes == 0:
        raise ValueError("num_processes must not be 0; 1 is this process, -1 is one a core.")
    if joblib.effective_n_jobs(num_processes) == 1:
        return
    try:
        with _cores_shared(num_processes):
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
    """Workers that start in here have their share of the cores for TensorFlow's threads.

    As joblib sees to it for BLAS: else each would take them all, and wait for the others.
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
    """What went wrong first, in the other process if it was there, in one sentence."""
    while error.__cause__ is not None:
        error = error.__cause__
    # A traceback from another process is a text that ends with the exception.
    named = re.findall(r"^(?:\w+\.)*(\w+(?:Error|Exception):\s+\S.*)", str(error), re.MULTILINE)
    reason = named[-1] if named else f"{type(error).__name__}: {error}"
    return " ".join(reason.split()).split(". ")[0][:200]
