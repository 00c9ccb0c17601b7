"""Out-of-fold outputs: every row is judged by a network that was trained without its fold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from influence.common.progress import progress
from influence.examples.featured import inputs_of
from influence.tool import own_training
from influence.tool.last_layer import OutOfSample
from influence.tool.predictions import Predictions
from influence.tool.store import name_of
from influence.tool.subject import Subject

# A probability of zero counts as this one.
_LEAST = 1e-30


def folds_of(given: NDArray, num_folds: int, of_classes: bool) -> NDArray[np.int64]:
    """Return the fold of each row. Folds are drawn with a fixed seed, and classes are shared out.

    Args:
      given: (n,) the labels.
      num_folds: the number of folds.
      of_classes: True if each class is to be shared out evenly.
    """
    order = np.random.default_rng(0).permutation(len(given))
    if of_classes:
        order = order[np.argsort(given[order], kind="stable")]
    found = np.empty(len(given), np.int64)
    found[order] = np.arange(len(given)) % num_folds
    return found


def out_of_fold(subject: Subject, num_folds: int, fit: own_training.Fit) -> OutOfSample:
    """Train a network without each fold by a person's function, and ask it about the fold.

    Each training begins with the weights of `own_training.fresh`. One fold is one task: with a
    folder, finished folds are kept, and an interrupted run goes on after them. The user's model is
    left as it was.

    Args:
      subject: the model and its rows.
      num_folds: the number of folds, from 2 to n.
      fit: a function as in `own_training.train`.

    Raises: ValueError for labels that are neither classes nor numbers, for a model without
      probabilities of its classes, or if Keras cannot clone the model.
    """
    known, net = subject.of_train, subject.net
    if known.given is None or (known.of_classes and known.probabilities is None):
        raise ValueError(
            "folds must have a model that gives probabilities of classes, or one number, got "
            f"{net.loss.name!r}; leave folds out."
        )
    fold = folds_of(known.given, num_folds, known.of_classes)
    name = name_of("fold", subject.key, num_folds, own_training.source(fit))
    outputs = np.empty((len(fold), max(known.num_classes, 1)))
    for k in progress(range(num_folds), "training without a fold", num_folds):
        rows = np.flatnonzero(fold == k)
        found = subject.store.kept(
            f"{name}-{k}", lambda rows=rows: {"outputs": _without(subject, rows, fit)}
        )
        outputs[rows] = found["outputs"]
    given = known.given
    if known.of_classes:
        losses = -outputs[np.arange(len(given)), given]
    else:
        losses = (given - outputs[:, 0]) ** 2 / 2
    how = f"networks trained without the row's fold, of {num_folds} folds"
    return OutOfSample(outputs, losses, given, how)


def _without(subject: Subject, rows: NDArray[np.int64], fit: own_training.Fit) -> NDArray:
    """Return the log probabilities (k, c), or numbers (k, 1), of rows by training without them."""
    whole = inputs_of(subject.train)
    size = subject.options.batch_size
    with own_training.trained_anew(subject.net, whole.without(rows), fit) as net:
        # A small class may be absent from the fold.
        found = Predictions.of(net, whole.take(rows), size, like=whole)
    if found.probabilities is not None:
        return np.log(np.maximum(found.probabilities, _LEAST))
    assert found.predicted is not None
    return found.predicted[:, None].astype(float)
