"""One case: train a network on rows with some wrong labels, and compute every ranking."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from benchmarks.mislabelled.sets import Set, planted
from influence import GenericNeuralNet, History, Influence, QuestionOptions, Recorder, audit
from influence.net.margins import class_margins
from influence.tool.folds import folds_of

BATCH, FOLDS, SEED = 32, 5, 0


def run(name: str, chosen: Set, share: float, kind: str, root: Path | None) -> dict[str, NDArray]:
    """Plant wrong labels, train a network, and compute the values of every ranking.

    Returns: arrays by name. `wrong` (n,) bool marks the wrong labels, and `given` (n,) has all
      labels of the training. `margin`, `loss`, `history`, `folds` and `self_influence` (n,) are the
      values of the rankings, as in `audit`. `probabilities` (n, c) are out-of-fold probabilities
      for cleanlab. `seconds_...` are times. `alert` is the headline of an alert about memorised
      labels, or "". `ranking` and `ranking_with_history` name the rankings that `audit` chose,
      without and with a history. `accuracy` and `test_accuracy` are the accuracies on the training
      and the test rows. `weight_decay`, `leave_one_out_loss` and `held_out_loss` describe the last
      layer after the refit by `audit`. They are NaN if `audit` did not refit it.
    """
    x, y, x_test, y_test = chosen.read(root)
    classes = int(y.max()) + 1
    given, wrong = planted(y, x, share, kind)
    keras.utils.set_random_seed(SEED)
    model = chosen.build(x.shape[1:], classes)
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(folder, (x, given), every=1, keep_weights=False)
        model.fit(x, given, BATCH, chosen.epochs, verbose=0, callbacks=[recorder])
        history = History.load(folder)
    trained, recorded = history.seconds.sum(axis=0)
    begun = time.perf_counter()
    rows, held_out = (x, given), (x_test, y_test)
    found = audit(model, rows, held_out, options=QuestionOptions(check=False))
    seconds = time.perf_counter() - begun
    options = QuestionOptions(check=False, history=history)
    with_history = audit(model, rows, held_out, options=options)
    begun = time.perf_counter()
    own = _self_influence(model, rows)
    of_own = time.perf_counter() - begun
    begun = time.perf_counter()
    logits = _out_of_fold(chosen, x, given, classes)
    of_folds = time.perf_counter() - begun
    alert = [a.headline for a in found.alerts if "memorised" in a.headline]
    predicted = _logits(model, x_test).argmax(axis=1)
    return {
        "wrong": wrong,
        "given": given,
        "margin": found.values["margin"],
        "loss": found.values["loss"],
        "history": with_history.values["history"],
        "folds": class_margins(logits, given),
        "self_influence": own,
        "probabilities": _softmax(logits),
        "alert": np.array(alert[0] if alert else ""),
        "ranking": np.array(found.choice.ranking),
        "ranking_with_history": np.array(with_history.choice.ranking),
        "accuracy": np.array(found.subject.of_train.accuracy),
        "test_accuracy": np.mean(predicted == y_test),
        "weight_decay": np.array(found.last.weight_decay if found.last else np.nan),
        "leave_one_out_loss": np.array(found.last.least[0].mean() if found.last else np.nan),
        "held_out_loss": np.array(found.last.least[1].mean() if found.last else np.nan),  # type: ignore
        "seconds_training": np.array(trained),
        "seconds_audit": np.array(seconds),
        "seconds_history": np.array(recorded),
        "seconds_folds": np.array(of_folds),
        "seconds_self_influence": np.array(of_own),
    }


def _out_of_fold(chosen: Set, x: NDArray, given: NDArray, classes: int) -> NDArray:
    """Return logits (n, c). Those of each row come from a network trained without its fold."""
    fold = folds_of(given, FOLDS, True)
    found = np.empty((len(given), classes))
    for k in range(FOLDS):
        model = chosen.build(x.shape[1:], classes)
        inside = fold != k
        model.fit(x[inside], given[inside], BATCH, chosen.epochs, verbose=0)
        found[~inside] = _logits(model, x[~inside])
    return found


def _self_influence(model: keras.Model, rows: tuple[NDArray, NDArray]) -> NDArray:
    """Return the rows' self-influence (n,) for the weights of the last layer, which is cheap."""
    net = GenericNeuralNet(model, layers=[model.layers[-1].name])
    return np.asarray(Influence(net, rows).self_influence(), float)


def _logits(model: Any, x: NDArray) -> NDArray:
    z = model.predict(x, batch_size=256, verbose=0).astype(float)
    return np.column_stack([np.zeros(len(z)), z]) if z.shape[1] == 1 else z


def _softmax(z: NDArray) -> NDArray:
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)
