"""Out-of-fold outputs: each row's output comes from a network trained without the row's fold."""

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

# Smaller probabilities are replaced by this number before the logarithm.
_LEAST = 1e-30


def folds_of(given: NDArray, num_folds: int, of_classes: bool) -> NDArray[np.int64]:
    """Assign each row to a random fold, with a fixed seed.

    Args:
      given: (n,) the labels.
      num_folds: the number of folds.
      of_classes: True if the labels are classes. The rows of each class are then distributed evenly
        over the folds.

    Returns: (n,) fold numbers from 0 to num_folds - 1.
    """
    order = np.random.default_rng(0).permutation(len(given))
    if of_classes:
        order = order[np.argsort(given[order], kind="stable")]
    found = np.empty(len(given), np.int64)
    found[order] = np.arange(len(given)) % num_folds
    return found


def out_of_fold(subject: Subject, num_folds: int, fit: own_training.Fit) -> OutOfSample:
    """Train a network without each fold, and compute its outputs on the rows of the fold.

    The user's function `fit` trains the network. Each training begins with the weights of
    `own_training.fresh`. If there is a work folder, it stores the outputs of each finished fold. An
    interrupted run then continues after the last finished fold. The user's model stays unchanged.

    Args:
      subject: the model and its rows.
      num_folds: the number of folds, from 2 to n.
      fit: a function as in `own_training.train`.

    Returns: the outputs of the n rows: log probabilities for classes, or predicted numbers.
    Raises: ValueError if the labels are neither classes nor numbers, if the model gives no class
      probabilities, or if Keras cannot clone the model.
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
    """Train without k rows, and return their log probabilities (k, c) or numbers (k, 1)."""
    whole = inputs_of(subject.train)
    size = subject.options.batch_size
    with own_training.trained_anew(subject.net, whole.without(rows), fit) as net:
        # The fold may lack a small class. `whole` has the rows of all classes.
        found = Predictions.of(net, whole.take(rows), size, like=whole)
    if found.probabilities is not None:
        return np.log(np.maximum(found.probabilities, _LEAST))
    assert found.predicted is not None
    return found.predicted[:, None].astype(float)
