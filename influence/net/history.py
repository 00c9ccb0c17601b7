"""Record of a training: the margins and losses of all rows, the weights, and the settings."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from influence.common import checkpoint
from influence.examples.arrays import label_parts
from influence.examples.examples import Examples
from influence.examples.labels import is_weight, sample_weights
from influence.net.margins import BINARY, CLASSES, MEANING
from influence_console import shown

HEADER, FORMAT = "history.npz", 1
_EPOCH = re.compile(r"epoch-(\d{5})\.npz")
# The step of these optimisers is minus the learning rate times the gradient, perhaps with momentum.
_PLAIN_STEPS = ("SGD",)


def epoch_file(folder: Path, epoch: int) -> Path:
    """Return the path of the file of one epoch. Epochs are counted from 1."""
    return folder / f"epoch-{epoch:05d}.npz"


def weights_file(folder: Path, epoch: int) -> Path:
    """Return the path of the file with the weights after an epoch. Epoch 0 is before training."""
    return folder / f"weights-{epoch:05d}.npz"


def epochs_in(folder: Path) -> list[int]:
    """Return the epochs whose files are in the folder, in ascending order."""
    found = (_EPOCH.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def labels_digest(examples: Examples) -> str:
    """Return a hash of the labels of all rows.

    It depends on the order of the rows, but not on the dtype of the labels. The inputs are not
    hashed, because the same rows may have words, word ids or features of a frozen network as
    inputs. Their labels are the same in each case.
    """
    dense = lambda part: part.toarray() if hasattr(part, "toarray") else part  # noqa: E731
    parts = {
        name: np.asarray(dense(part))
        for name, part in label_parts(examples.y).items()
        if not is_weight(name)
    }
    plain = {
        str(number): part.astype(np.float64).reshape(len(part), -1)
        for number, (_, part) in enumerate(sorted(parts.items()))
    }
    return checkpoint.sha256(plain)


def weights_digest(theta: NDArray) -> str:
    """Return a hash of the bytes of theta (d,), the vector of all weights that are trained."""
    return hashlib.sha256(np.ascontiguousarray(theta).view(np.uint8).data).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class History:
    """Record of one training, which `Recorder` wrote.

    Epochs are counted from 1. The entries of epoch e describe the model after e passes over the
    data. The set has n rows, and the model was trained for E epochs. An epoch is called recorded if
    the margins and losses after it were computed. t of the E epochs are recorded.

    Attributes:
      folder: the folder that contains the record.
      epochs: (t,) the recorded epochs. `Recorder` skips some epochs if recording takes too long.
      margins: (t, n) the margin of each row. `kind` says how it is defined. For classes, a positive
        margin means that the model predicts the given label. Sample weights do not multiply it.
      losses: (t, n) the loss of each row in inference mode, as `GenericNeuralNet.losses` computes
        it. The loss includes the sample weight, but not the penalty.
      trained: (E,) the numbers of all trained epochs, also of those that are not recorded.
      rates: (E,) the mean learning rate of the steps of each epoch.
      steps: (E,) the number of steps of each epoch.
      rows_seen: (E,) the number of rows on which each epoch trained. It is -1 if Keras does not
        report it.
      seconds: (E, 2) the seconds of training and the seconds of recording, for each epoch.
      digests: (E,) a hash of the weights after each epoch.
      checkpoints: (c,) the epochs after which the weights were saved, in ascending order. Epoch 0
        means before the training.
      batch_size: the number of rows of a full batch. It is -1 if Keras does not report it.
      kind: "classes", "binary", "residual" or "loss". `influence.net.margins` defines them.
      about: a dict of the training's settings: the optimiser and its configuration, the seed, the
        versions, and digests of the data and the model.
      notes: sentences about the record, such as about epochs that are not recorded.
    """

    folder: Path
    epochs: NDArray[np.int64]
    margins: NDArray
    losses: NDArray
    trained: NDArray[np.int64]
    rates: NDArray[np.float64]
    steps: NDArray[np.int64]
    rows_seen: NDArray[np.int64]
    seconds: NDArray[np.float64]
    digests: NDArray[np.str_]
    checkpoints: NDArray[np.int64]
    batch_size: int
    kind: str
    about: dict[str, Any]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, history: History | str | os.PathLike | None) -> History | None:
        """Return a History unchanged, load the history of a folder, or return None for None."""
        return history if history is None or isinstance(history, History) else cls.load(history)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> History:
        """Load the history in a folder. The training may be unfinished.

        If the file of the last epoch is incomplete or damaged, this epoch is left out. `notes` then
        says so.

        Raises: TypeError if `folder` is not a path. ValueError for a folder without a history, or
          with a damaged history.
        """
        if not isinstance(folder, str | os.PathLike):
            raise TypeError(f"folder must be a path, got {type(folder).__name__}.")
        path = Path(folder)
        about, files, notes = read_folder(path)
        if not files:
            raise ValueError(
                f"history must have a finished epoch, got {shown(path)} without one; train with "
                "callbacks=[influence.Recorder(folder, train)]."
            )
        column = lambda name: np.array([file[name] for file in files.values()])  # noqa: E731
        recorded = {epoch: file for epoch, file in files.items() if "margins" in file}
        found = cls(
            folder=path,
            epochs=np.array(list(recorded), np.int64),
            margins=np.array([file["margins"] for file in recorded.values()]),
            losses=np.array([file["losses"] for file in recorded.values()]),
            trained=np.array(list(files), np.int64),
            rates=column("rate").astype(np.float64),
            steps=column("steps").astype(np.int64),
            rows_seen=column("rows").astype(np.int64),
            seconds=column("seconds").astype(np.float64),
            digests=column("digest"),
            checkpoints=np.array(
                [e for e in (about["began"], *files) if weights_file(path, e).exists()], np.int64
            ),
            batch_size=int(column("batch_size").max()),
            kind=about["kind"],
            about=about,
            notes=tuple(notes),
        )
        return found

    def __len__(self) -> int:
        """Return the number of rows, n."""
        return int(self.about["num_rows"])

    def __repr__(self) -> str:
        """Return a text with the folder, the sizes and the meaning of the margins."""
        return (
            f"History({str(self.folder)!r}, {len(self.trained)} epochs, {len(self.epochs)} "
            f"recorded, {len(self)} rows, margin: {MEANING[self.kind]})"
        )

    @property
    def of_classes(self) -> bool:
        """True if the labels are classes. A margin is then positive for a right prediction."""
        return self.kind in (CLASSES, BINARY)

    @property
    def share(self) -> float:
        """Seconds of recording per second of training."""
        return float(self.seconds[:, 1].sum() / max(self.seconds[:, 0].sum(), 1e-9))

    def theta(self, epoch: int) -> NDArray:
        """Return the weights (d,) after an epoch. Epoch 0 is the start of the training.

        Raises: ValueError if the weights after this epoch were not saved.
        """
        path = weights_file(self.folder, int(epoch))
        if not path.exists():
            raise ValueError(
                f"epoch must be one of {self.checkpoints.tolist()}, whose weights were kept, got "
                f"{epoch}; record with keep_weights=True."
            )
        return checkpoint.load(path)["theta"]

    @property
    def thetas(self) -> NDArray:
        """The saved weights (c, d), in the order of `checkpoints`."""
        return np.array([self.theta(epoch) for epoch in self.checkpoints])

    @property
    def start_file(self) -> Path:
        """Path of the file with the weights at the start of the record.

        Its entry `theta` is the vector of the trained weights. Its entries `other-0`, `other-1` ...
        are the model's other weights, such as running means.
        """
        return weights_file(self.folder, self.about["began"])

    def epoch_of(self, theta: NDArray) -> int | None:
        """Return the last epoch after which the weights were exactly theta, or None if none was."""
        same = np.flatnonzero(self.digests == weights_digest(theta))
        return int(self.trained[same[-1]]) if len(same) else None

    @property
    def digest(self) -> str:
        """SHA-256 checksum of the training's settings, and of the weights after each epoch."""
        parts = [self.rates.tolist(), self.digests.tolist(), self.batch_size, self.epochs.tolist()]
        about = {key: self.about[key] for key in ("optimizer", "optimizer_config", "data", "model")}
        return hashlib.sha256(json.dumps([parts, about], sort_keys=True).encode()).hexdigest()

    def area(self) -> NDArray[np.float64]:
        """Return each row's mean margin over the recorded epochs, (n,).

        Pleiss et al. (2020) call this number AUM.
        """
        return self.margins.mean(axis=0, dtype=np.float64)

    def learned(self) -> NDArray[np.int64]:
        """Return the epoch at which each row was learned, (n,).

        This is the first recorded epoch with the following property: the row's margin is positive
        after it and after all later recorded epochs. If the row's last margin is not positive, the
        result is 0.

        Raises: ValueError if the labels are not classes.
        """
        if not self.of_classes:
            raise ValueError(
                f"history must be one of classes to say when a row was learned, got margins that "
                f"are {MEANING[self.kind]}."
            )
        right = self.margins > 0
        stays = np.logical_and.accumulate(right[::-1], axis=0)[::-1]
        return np.where(stays[-1], self.epochs[stays.argmax(axis=0)], 0)

    def path(
        self, checkpoints: ArrayLike | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return checkpoints and their learning rates for TracIn.

        TracIn sums over all training steps in which a row occurs. A checkpoint represents the steps
        from it to the next checkpoint. Its rate is the sum of the mean rates of the epochs between
        both, because each row occurs once in an epoch. The last epoch of the training is left out
        as a checkpoint, because no steps follow it.

        Args:
          checkpoints: epochs after which the weights were saved. Epoch 0 means before the training.
            None means all epochs with saved weights.

        Returns: the epochs (c,), and their rates (c,).
        Raises: ValueError for epochs whose weights were not saved, or if no steps follow any of
          them.
        """
        chosen = self.checkpoints if checkpoints is None else np.unique(np.asarray(checkpoints))
        missing = np.setdiff1d(chosen, self.checkpoints)
        if len(missing) or not len(chosen):
            raise ValueError(
                f"checkpoints must be epochs whose weights were kept, {self.checkpoints.tolist()}, "
                f"got {np.asarray(checkpoints).tolist()}."
            )
        last = int(self.trained[-1])
        chosen = chosen[chosen < last]
        if not len(chosen):
            raise ValueError(
                f"checkpoints must have one before the last epoch, {last}, got "
                f"{np.asarray(checkpoints).tolist()}: the score is a sum over the steps after them."
            )
        ends = np.append(chosen[1:], last)
        rates = [
            self.rates[(self.trained > start) & (self.trained <= end)].sum()
            for start, end in zip(chosen, ends, strict=True)
        ]
        return chosen, np.array(rates)

    @property
    def is_whole(self) -> bool:
        """True if the record begins at the start of the training, before the first step."""
        return not (self.about["began"] or self.about["optimizer_steps"])

    @property
    def by_gradient_steps(self) -> bool:
        """True if a step is minus the learning rate times the gradient, perhaps with momentum."""
        return self.about["optimizer"] in _PLAIN_STEPS

    def damping(self) -> float:
        """Return the damping of the Hessian whose effect is similar to stopping the training early.

        For T gradient steps with learning rate eta and without momentum, it is 1 / (eta T). In
        general, it is (1 - m) / S. S is the sum of the learning rates of all steps in the record,
        and m is the momentum, which multiplies the length of the steps by 1 / (1 - m).

        Let h be an eigenvalue of the Hessian. T steps move the weights along its eigenvector by the
        fraction 1 - (1 - eta h)^T of the distance to the minimum. A step with the inverse of the
        damped Hessian moves them by the fraction h / (h + damping). Both fractions are small for h
        far below 1 / (eta T), and near 1 for h far above it.

        Raises: ValueError for an optimiser other than SGD, because its steps are not proportional
          to the gradient. ValueError if the learning rates are zero.
        """
        name = self.about["optimizer"]
        if not self.by_gradient_steps:
            raise ValueError(
                f"history must be that of SGD for the damping 1/(eta T), got {name}, whose steps "
                "are not learning rate times gradient; leave history out, or give a damping."
            )
        momentum = float(self.about["optimizer_config"].get("momentum") or 0.0)
        total = float((self.rates * self.steps).sum())
        if not total > 0:
            raise ValueError(f"history must have learning rates above 0, got a sum of {total}.")
        return (1 - momentum) / total

    @property
    def sample_weight(self) -> Any:
        """The sample weights (n,) of the rows, a dict of such arrays by output name, or None."""
        found = checkpoint.load(self.folder / HEADER)
        del found["about"]
        return sample_weights(found)

    def check_rows(self, examples: Examples, name: str = "train") -> None:
        """Refuse a set whose rows are not those that were recorded.

        Only the number of rows and the labels are compared.

        Raises: ValueError naming the set `name`.
        """
        if len(examples) != len(self):
            raise ValueError(
                f"{name} must have the {len(self)} rows of the history {shown(self.folder)}, got "
                f"{len(examples)}."
            )
        if labels_digest(examples) != self.about["labels"]:
            raise ValueError(
                f"{name} must have the labels of the history {shown(self.folder)} in their order, "
                "got others; give the rows that Recorder got."
            )

    def check_net(self, net: Any) -> None:
        """Refuse a net whose number of weights differs from that of the trained model.

        Raises: ValueError with both numbers.
        """
        if net.num_parameters != self.about["num_parameters"]:
            raise ValueError(
                f"net must have the {self.about['num_parameters']} weights of the history "
                f"{shown(self.folder)}, got {net.num_parameters}."
            )


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[int, dict[str, NDArray]], list[str]]:
    """Read the header and the files of all epochs in a folder.

    Returns: (header, files, notes). `files` is a dict from each epoch to the arrays in its file.
      Each note is a sentence about the record.
    Raises: ValueError for a folder without a history. ValueError if the file of an epoch before the
      last one is damaged or missing.
    """
    about = read_header(folder)
    files: dict[int, dict[str, NDArray]] = {}
    notes: list[str] = []
    epochs = epochs_in(folder)
    for epoch in epochs:
        if epoch != about["began"] + len(files) + 1:
            raise ValueError(
                f"history must have every epoch, got {shown(folder)} without epoch "
                f"{about['began'] + len(files) + 1}."
            )
        try:
            files[epoch] = checkpoint.load(epoch_file(folder, epoch))
        except ValueError as error:
            if epoch != epochs[-1]:
                raise ValueError(
                    f"history must have undamaged files before the last one, got {error}"
                ) from error
            notes.append(f"The file of the last epoch, {epoch}, was damaged and is left out.")
    return about, files, notes + _notes(about, list(files.values()))


def read_header(folder: Path) -> dict[str, Any]:
    """Read the header of the history in a folder, a dict of the training's settings.

    Raises: ValueError if the folder has no history, or a history in another format.
    """
    path = folder / HEADER
    if not path.is_file():
        raise ValueError(
            f"history must be a folder that influence.Recorder wrote, got {shown(folder)}."
        )
    about = json.loads(str(checkpoint.load(path)["about"]))
    if about.get("format") != FORMAT:
        raise ValueError(
            f"history must have format {FORMAT}, got {about.get('format')} in {shown(folder)}; "
            "train again with this version's Recorder."
        )
    return about


def _notes(about: dict[str, Any], files: Sequence[dict[str, NDArray]]) -> list[str]:
    found = []
    n = about["num_rows"]
    seen = {int(file["rows"]) for file in files} - {-1, n}
    if seen:
        found.append(
            f"An epoch of the training had {', '.join(map(str, sorted(seen)))} rows, and the "
            f"recorded set has {n}: the training used other rows (validation_split, "
            "steps_per_epoch or another set)."
        )
    skipped = len(files) - sum("margins" in file for file in files)
    if skipped:
        found.append(
            f"{skipped} of {len(files)} epochs were not recorded (every {int(files[-1]['every'])} "
            "of them was, with the first and the last)."
        )
    moved = [about["began"] + k + 1 for k, file in enumerate(files) if file["resumed"] == 2]
    if moved:
        found.append(
            f"The training was interrupted, and epoch {', '.join(map(str, moved))} began from "
            "other weights than those after the epoch before."
        )
    if about["began"]:
        found.append(f"The record begins after {about['began']} epochs of the training.")
    elif about["optimizer_steps"]:
        found.append(f"The record begins after {about['optimizer_steps']} steps of the optimiser.")
    return found
