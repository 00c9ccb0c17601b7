"""Keras callback that records a training: margins and losses of all rows, weights, settings."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from influence.common import checkpoint
from influence.common.numbers import is_integer
from influence.examples import labels as packing
from influence.examples.examples import Examples
from influence.examples.featured import inputs_of
from influence.examples.given import Data
from influence.net import keras_state
from influence.net.history import (
    FORMAT,
    HEADER,
    History,
    epoch_file,
    epochs_in,
    labels_digest,
    read_header,
    weights_digest,
    weights_file,
)
from influence.net.margins import Margins, Recorded, seen_shapes
from influence.net.net import GenericNeuralNet
from influence.net.preprocessing import split
from influence.net.refused import check_inputs
from influence_console import shown

__all__ = ["History", "Recorder"]

# Recording takes at most this fraction of the training time, or FREE_SECONDS if that is longer.
MOST_SHARE = 0.25
# Recording may always take this many seconds. Tracing the model once takes about half a second.
FREE_SECONDS = 2.0
# With keep_weights=None, weights are saved if those of all epochs take at most this many bytes.
_MOST_BYTES = 1 << 30
# A batch of a recording pass has _TIMES times the rows of a training batch, but at least _ROWS and
# at most _MOST_ROWS. It needs less memory per row than training, because it computes no gradient.
_ROWS, _TIMES, _MOST_ROWS = 64, 4, 1024
# The header contains this text in place of the rows' order, which Keras does not tell callbacks.
ORDER = (
    "not known: Keras tells a callback neither whether the rows are shuffled nor their order. The "
    "seed is that of keras.utils.set_random_seed, if it was called. It fixes the order only "
    "together with everything else that drew random numbers before and during the training."
)


class Recorder(keras.callbacks.Callback):
    """Callback of `fit` that records a training in a folder.

        model.fit(x, y, epochs=10, callbacks=[influence.Recorder("run", (x, y))])
        history = influence.History.load("run")

    After each epoch, one pass in inference mode computes the loss and the margin of every row of
    `train`. `History` and `influence.net.margins` define both. Each file is written under a
    temporary name and then renamed. An interrupted training therefore leaves no incomplete file.

    With `keras.callbacks.BackupAndRestore`, an interrupted training continues in the same folder,
    and no epoch occurs twice. The order of the two callbacks does not matter. `fit` refuses a
    folder of other rows, another model or another optimiser before the training begins.

    Recording takes at most a quarter of the training time, or two seconds if that is longer. If a
    pass after each epoch would take longer, only the first, every j-th and the last epoch are
    recorded. j is 1, 2, 4 and so on. It is chosen after the second epoch from the measured times,
    and doubled later if recording still takes too long. `History.epochs` lists the recorded epochs.

    Keras does not give a callback the order of the rows, the arguments `class_weight` and
    `sample_weight` of `fit`, or the rows that `validation_split` removes. They are not recorded.
    Give weights with `train`, as for Examples. The number of rows of each epoch is recorded. If it
    differs from the number of rows of `train`, a warning says so.

    Args:
      folder: the folder to write to. It is created if it is missing.
      train: the training rows, in any form of `GenericNeuralNet.given`. Their order must not change
        between passes.
      every: record the first epoch, then every `every`-th epoch, and the last, however long this
        takes. None chooses by the measured times.
      keep_weights: True to save the weights after each recorded epoch, False to save only those at
        the start. None means True if the weights of all epochs together take at most 1 GiB.
      loss: the loss of a row, for a model that overrides `compute_loss`. None means the compiled
        loss.

    Raises: TypeError or ValueError for bad arguments. `fit` raises TypeError or ValueError before
      its first step for rows that do not fit the model, and for a folder of another training.
    """

    # Tests replace this clock.
    _clock = staticmethod(time.perf_counter)

    def __init__(
        self,
        folder: str | os.PathLike,
        train: Data,
        *,
        every: int | None = None,
        keep_weights: bool | None = None,
        loss: Any = None,
    ):
        super().__init__()
        if not isinstance(folder, str | os.PathLike):
            raise TypeError(f"folder must be a path, got {type(folder).__name__}.")
        if every is not None and not is_integer(every, 1):
            raise ValueError(f"every must be a positive integer or None, got {every!r}.")
        if keep_weights not in (None, True, False):
            raise ValueError(f"keep_weights must be True, False or None, got {keep_weights!r}.")
        if hasattr(train, "__next__"):
            raise TypeError(
                f"train must have rows in an order that stays, got a {type(train).__name__}, which "
                "gives its rows once; give arrays (x, y), Examples, or a dataset without shuffle."
            )
        self.folder, self._given = Path(folder), train
        self._every, self._keep, self._loss = every, keep_weights, loss

    # --- Keras' callback --------------------------------------------------------------------------

    def on_train_begin(self, logs: Any = None) -> None:
        """Check the rows and the folder. `on_epoch_begin` reads the weights at the start.

        They are not read here, because another callback may restore them after this call.
        """
        start = self._clock()
        checkpoint.check_writable(self.folder, "folder")
        self._net = GenericNeuralNet(self.model, self._loss)
        self._train = self._net.given(self._given, "train")
        self._weights: Any = self._net.flat.weights
        if not {id(w) for w in self._weights} <= {id(w) for w in self.model.weights}:
            self._weights = self.model.trainable_weights  # the net is a copy in another dtype
        self._margins = self._checked()
        self._about = self._described()
        if (self.folder / HEADER).exists():
            self._check_folder(read_header(self.folder))
        # `_own` counts the seconds of recording, `_charged` those of them that files already
        # contain, and `_trained` the seconds of training.
        self._own, self._charged, self._trained = self._clock() - start, 0.0, 0.0
        self._j, self._tracing = self._every or 1, 0.0
        self._cost: float | None = None
        self._batch, self._rows, self._steps, self._rate = -1, -1, 0, np.nan
        self._at, self._started = 0, np.nan
        self._last: tuple[int, bool, str] | None = None
        self._resumed, self._begun, self._traced = 0, False, True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Start the epoch's clock. Before the first epoch, begin or continue the record."""
        start = self._clock()
        if not self._begun:
            self._begin(epoch)
            self._begun = True
        self._rows, self._at, self._rate = -1, keras_state.iterations(self.model), np.nan
        self._batches = 0
        self._started = self._clock()
        self._own += self._started - start

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Read the learning rate before an epoch's first batch. Then measure the batch size once.

        The batch size is measured before the second batch, from Keras' number of trained rows.
        """
        if np.isnan(self._rate):
            self._rate = keras_state.learning_rate(self.model)
        elif self._batch < 0 and batch > 0:
            seen = keras_state.rows_seen(self.model)
            self._batch = -1 if seen < 0 else -(-seen // batch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count the batch. After the last batch of the epoch, read the number of trained rows.

        `on_epoch_end` would be too late, because another callback's `evaluate` may have reset
        Keras' counter. If the number of batches is unknown, the counter is read after every batch.
        """
        self._batches = batch + 1
        steps = (self.params or {}).get("steps") or self._steps
        if not steps or batch + 1 >= steps:
            self._rows = keras_state.rows_seen(self.model)

    def on_test_begin(self, logs: Any = None) -> None:
        """Read the number of trained rows, before a validation resets Keras' counter."""
        if getattr(self, "_begun", False) and self._rows < 0 and self._is_training():
            self._rows = keras_state.rows_seen(self.model)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Write the epoch's file. If the epoch is due, record its margins and losses too."""
        start = self._clock()
        seconds = start - self._started
        self._trained += seconds
        self._finish_counts()
        number = epoch + 1
        due = self._is_due(number, seconds)
        self._write(number, due, seconds, start)
        self._started = np.nan

    def on_train_end(self, logs: Any = None) -> None:
        """Record the last epoch if it was skipped and the weights have not changed since."""
        if self._last is None:
            return
        number, recorded, digest = self._last
        if not recorded and digest == self._weights_digest():
            start = self._clock()
            file = checkpoint.load(epoch_file(self.folder, number))
            self._write_file(number, file, start)
        self._last = None

    # --- the folder -------------------------------------------------------------------------------

    def _begin(self, done: int) -> None:
        """Begin a record before the first epoch of this `fit`, or continue the one in the folder.

        `done` is the number of epochs that were trained before. A new record gets a header, and a
        file of the current weights. A record of another training raises ValueError.
        """
        header, recorded = self.folder / HEADER, epochs_in(self.folder)
        about = read_header(self.folder) if header.exists() and recorded else None
        began = done if about is None else about["began"]
        self._about["began"] = began
        theta = self._theta()
        if about is None:
            self._forget(recorded)
            checkpoint.store(weights_file(self.folder, done), self._all_weights())
            given = packing.fields(self._train.y)
            weights = {name: part for name, part in given.items() if packing.is_weight(name)}
            about = {"about": np.array(json.dumps(self._about))}
            checkpoint.store(header, about | weights)
            return
        if done < began:
            raise ValueError(
                f"folder must be of this training, got {shown(self.folder)}, whose record begins "
                f"after {began} epochs, and the training begins after {done}; give another folder."
            )
        if done == began:
            known = checkpoint.load(weights_file(self.folder, began))["theta"]
            same = about["optimizer_config"] == self._about["optimizer_config"]
            if not same or not np.array_equal(known, theta):
                what = "weights" if same else "settings of the optimiser"
                raise ValueError(
                    f"folder must be of this training, got {shown(self.folder)} of one that began "
                    f"from other {what}; give another folder, or delete it."
                )
        self._forget([epoch for epoch in recorded if epoch > done])
        self._go_on(range(began + 1, done + 1), theta)

    def _forget(self, epochs: list[int]) -> None:
        """Delete the files of epochs that will be trained again."""
        for epoch in epochs:
            epoch_file(self.folder, epoch).unlink()
            weights_file(self.folder, epoch).unlink(missing_ok=True)

    def _go_on(self, epochs: range, theta: NDArray) -> None:
        """Restore the counts of time, rows and steps from the files of these epochs.

        If the last of the epochs has no whole file, it is recorded now. theta is the current one.
        """
        file: dict[str, NDArray] | None = None
        for epoch in epochs:
            try:
                file = checkpoint.load(epoch_file(self.folder, epoch))
            except ValueError as error:
                if epoch != epochs[-1]:
                    raise ValueError(
                        f"folder must have every epoch before {epochs[-1]}, at which the training "
                        f"goes on, got {shown(self.folder)} without a whole epoch {epoch} "
                        f"({error}); give another folder."
                    ) from error
                self._late(epoch, file)
                return
            self._trained += float(np.nan_to_num(file["seconds"][0]))
            self._own += float(file["seconds"][1])
            self._charged += float(file["seconds"][1])
            self._batch = int(file["batch_size"])
            self._j = self._every or int(file["every"])
        if file is not None:
            self._resumed = 1 if str(file["digest"]) == weights_digest(theta) else 2
            cost = float(file["cost"])
            self._cost = None if np.isnan(cost) else cost

    def _late(self, epoch: int, before: dict[str, NDArray] | None) -> None:
        """Record an epoch that ended before the interruption, with the model's current weights.

        `before` is the content of the file of the epoch before, or None.
        """
        if before is None:
            self._steps = int((self.params or {}).get("steps") or 0)
        else:
            self._steps, self._rows = int(before["steps"]), int(before["rows"])
        self._rate = keras_state.learning_rate(self.model)
        self._write(epoch, self._is_due(epoch, 0.0), np.nan, self._clock())
        self._resumed = 1

    def _check_folder(self, about: dict[str, Any]) -> None:
        """Refuse the folder of another training. The message says what differs."""
        names = {
            "data": "rows or labels",
            "model": "layers or weights' shapes",
            "loss": "loss",
            "optimizer": "optimiser",
        }
        for key, what in names.items():
            if about.get(key) != self._about[key]:
                shows = f" ({about.get(key)})" if key in ("loss", "optimizer") else ""
                raise ValueError(
                    f"folder must be of this training, got {shown(self.folder)} of one with other "
                    f"{what}{shows}; give another folder."
                )

    def _described(self) -> dict[str, Any]:
        """Return the header, a dict of the training's settings, versions and digests."""
        given = inputs_of(self._train)
        return {
            "format": FORMAT,
            "num_rows": len(self._train),
            "num_parameters": self._net.num_parameters,
            "kind": self._margins.kind,
            "margin": self._margins.meaning,
            "optimizer": type(keras_state.optimizer_of(self.model)).__name__,
            "optimizer_config": keras_state.optimizer_config(self.model),
            "optimizer_steps": keras_state.iterations(self.model),
            "planned_epochs": (self.params or {}).get("epochs"),
            "planned_steps": (self.params or {}).get("steps"),
            "loss": self._net.loss.name,
            "data": given.fingerprint,
            "labels": labels_digest(given),
            "model": keras_state.layers_digest(self.model),
            "seed": keras_state.seed(),
            "order": ORDER,
            "versions": {"keras": keras.__version__, "tensorflow": tf.__version__},
        }

    def _all_weights(self) -> dict[str, NDArray]:
        """Return theta and all other weights, such as running means, from which training began."""
        others = {id(weight) for weight in self._weights}
        found = [w for w in self.model.weights if id(w) not in others]
        return {"theta": self._theta()} | {
            f"other-{number}": weight.numpy() for number, weight in enumerate(found)
        }

    # --- one epoch --------------------------------------------------------------------------------

    def _write(self, number: int, due: bool, seconds: float, start: float) -> None:
        file = {
            "epoch": np.array(number),
            "rate": np.array(self._rate),
            "steps": np.array(self._steps),
            "rows": np.array(self._rows),
            "batch_size": np.array(self._batch),
            "training": np.array(seconds),
            "resumed": np.array(self._resumed),
        }
        self._resumed = 0
        if due:
            self._write_file(number, file, start)
            return
        self._store(number, file, start)

    def _write_file(self, number: int, file: dict[str, NDArray], start: float) -> None:
        """Compute the margins and losses after an epoch, and write the epoch's files.

        `file` contains the epoch's other entries. `start` is the clock's time when the recording of
        this epoch began.
        """
        margins, losses = self._passed()
        if self._keeps_weights():
            checkpoint.store(weights_file(self.folder, number), {"theta": self._theta()})
        # `_cost` estimates the seconds of a later pass. Later passes do not trace the model again.
        self._cost = self._clock() - start - self._tracing
        self._store(number, {**file, "margins": margins, "losses": losses}, start)

    def _store(self, number: int, file: dict[str, NDArray], start: float) -> None:
        digest = self._weights_digest()
        spent = self._clock() - start
        self._own += spent
        new, self._charged = self._own - self._charged, self._own
        before = float(file["seconds"][1]) if "seconds" in file else 0.0
        training = file.get("training", np.array(np.nan))
        file = {
            **file,
            "every": np.array(self._j),
            "digest": np.array(digest),
            "cost": np.array(np.nan if self._cost is None else self._cost),
            "seconds": np.array([float(training), before + new]),
        }
        checkpoint.store(epoch_file(self.folder, number), file)
        self._last = number, "margins" in file, digest

    def _passed(self) -> tuple[NDArray, NDArray]:
        """Return the margins and losses of all rows."""
        net, train = self._followed()
        size, question = self._rows_at_once(len(train)), Recorded(self._margins)
        begun = self._clock()
        if not self._traced:
            few = train.take([0])
            question.losses(net, few.x, few.y)
            self._traced = True
        self._tracing = self._clock() - begun
        answers = list(train.map_over(question, net, batch_size=size))
        margins, losses = (np.concatenate(parts) for parts in zip(*answers, strict=True))
        return margins, losses

    def _followed(self) -> tuple[GenericNeuralNet, Examples]:
        """Return a net with the current weights of the trained model, and the rows for this net."""
        net = self._net
        if net.flat.weights[0] is not self._weights[0]:  # the net is a copy in another dtype
            source = split(self.model)[1].weights
            for copy, weight in zip(net.flat.parts.whole.weights, source, strict=True):
                copy.assign(weight.numpy())
        if net.flat.trunk is not None:
            try:
                net.flat.trunk.check_weights()
            except RuntimeError:
                # The training changes running means in the trunk, so features are not cached.
                self._net, self._traced = net.uncut(), False
                self._train = inputs_of(self._train)
        return self._net, self._train

    def _rows_at_once(self, n: int) -> int:
        rows = _ROWS if self._batch < 0 else _TIMES * self._batch
        return min(max(rows, _ROWS), _MOST_ROWS, n)

    def _theta(self) -> NDArray:
        return np.concatenate([np.ravel(w.numpy()).astype(self._net.dtype) for w in self._weights])

    def _weights_digest(self) -> str:
        return weights_digest(self._theta())

    def _keeps_weights(self) -> bool:
        if self._keep is not None:
            return self._keep
        needed = self._net.num_parameters * self._net.dtype.itemsize * (self._planned() + 1)
        return needed <= _MOST_BYTES

    def _is_due(self, number: int, seconds: float) -> bool:
        """Return True if the epoch must be recorded. `_j` is j in the docstring of Recorder.

        From the second epoch on, first double `_j` until recording takes at most the allowed time.
        """
        planned, first = self._planned(), self._about["began"] + 1
        if self._every is None and self._cost is not None and number > first and seconds > 0:
            left = max(planned - number, 0)
            allowed = max(MOST_SHARE * (self._trained + left * seconds), FREE_SECONDS)
            while self._j < planned and self._own + self._cost * self._passes(number) > allowed:
                self._j *= 2
        return (number - first) % self._j == 0 or number >= planned or self.model.stop_training

    def _passes(self, number: int) -> int:
        """Return how many epochs from this one to the last planned one are due."""
        planned, first = self._planned(), self._about["began"] + 1
        return sum((e - first) % self._j == 0 or e == planned for e in range(number, planned + 1))

    # --- checks and counts ------------------------------------------------------------------------

    def _checked(self) -> Margins:
        """Return the rule for the margins. Refuse rows that do not fit the model or the loss.

        The check uses the inputs of one row and the labels of all rows. It also traces the function
        that the later passes use, so their measured time does not include tracing.
        """
        net, few = self._net, self._train.take([0])
        check_inputs(net.flat.model, few.x, "train")
        shapes: Any = [(1, *shape) for shape in seen_shapes(net, few)]
        shapes = shapes if hasattr(net.loss, "parts") else shapes[0]
        net.loss.check_labels(self._train.y, shapes, "train")
        margins = Margins.of(net, self._train)
        if Recorded(margins).losses(net, few.x, few.y).shape != (1,):
            net.validate(self._train, "train")  # raises: one row has not one loss
        return margins

    def _is_training(self) -> bool:
        return not np.isnan(self._started)

    def _planned(self) -> int:
        return int((self.params or {}).get("epochs") or 1)

    def _finish_counts(self) -> None:
        # If a dataset has unknown length, the optimiser's number of steps may include the call that
        # finds the end of the dataset. The number of batches does not.
        self._steps = min(keras_state.iterations(self.model) - self._at, self._batches)
        if self._rows < 0:
            self._rows = keras_state.rows_seen(self.model)
        if self._batch < 0 and self._steps == 1:
            self._batch = self._rows
        rate = keras_state.mean_rate(self.model, self._at, self._steps)
        self._rate = self._rate if rate is None else rate
        n = len(self._train)
        if self._rows not in (-1, 0, n) and self._last is None:
            warnings.warn(
                f"train has {n} rows, but the first epoch trained on {self._rows}: validation_split"
                ", steps_per_epoch or another set leave a difference. The record is of train.",
                stacklevel=2,
            )
