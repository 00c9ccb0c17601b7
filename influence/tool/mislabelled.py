"""Which ranking finds wrong labels best, and which label would be right.

Five quantities rank the rows. A wrong label has a small margin or a large residual, loss or
self-influence:

- `margin`: the row's margin out of sample, by the last layer refitted without the row
  (`influence.tool.last_layer`). A margin is the logit of the given label minus the largest other
  logit. For numbers it is minus the size of the residual.
- `folds`: the same margin, by a network that was trained without the row's fold.
- `history`: the margin while the network was trained, as a mean over the epochs (the area under the
  margin: Pleiss et al. 2020).
- `self_influence`: the predicted rise of the row's own loss if it is left out.
- `loss`: the loss of the trained network.

The rule of `ranking="auto"` is fixed beforehand:

1. `folds`, if folds were asked for.
2. Else `margin`, unless the features have memorised the labels and a history is given. Then it is
   `history`.
3. Without a refitted last layer, `history` if it is given, else `loss`.

The features have memorised the labels if the rows' mean leave-one-out loss is below half of the
refit's mean loss on held-out rows, and by more than two standard errors of the latter. Leaving a
row out of the refit then does not take out what the features know of its label. Without held-out
rows there is no such comparison. Memorisation is then possible, and treated as such, if the network
reproduces at least 99 % of all training labels (for numbers, 99 % of their variance): then either
no label is wrong or the network has memorised the wrong ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from influence.tool.alerts import Alert
from influence.tool.answer import short
from influence.tool.last_layer import LastLayer

# Small values of these come first, and large values of the others.
_SMALL_FIRST = ("margin", "folds", "history")
WORDS = {
    "margin": "margin of the given label by the last layer, refitted without the row",
    "folds": "margin of the given label by networks trained without the row's fold",
    "history": "mean margin of the given label over the epochs of the training",
    "self_influence": "predicted rise of the row's own loss if the row is left out",
    "loss": "loss of the row",
}
# The features have memorised if the leave-one-out loss is below this share of the held-out loss ...
_SHARE = 0.5
# ... and by more than this many of its standard errors. Without held-out rows, this share of labels
# that the network reproduces makes it possible.
_ERRORS, _REPRODUCED = 2.0, 0.99
_HELP = (
    "Record the training (influence.Recorder) and give its folder by --history, or retrain by "
    "--folds 5 --fit."
)


def order_of(values: NDArray, ranking: str) -> NDArray[np.int64]:
    """Return all rows, the most suspect first, by the values of a ranking. Equal rows keep order.

    Rows whose value is not known come last.
    """
    doubt = -values if ranking in _SMALL_FIRST else values
    return np.argsort(-np.where(np.isfinite(doubt), doubt, -np.inf), kind="stable")


@dataclass(frozen=True)
class Choice:
    """The ranking that is used.

    Attributes:
      ranking: one of `RANKINGS`.
      why: the reason, in a sentence.
      alerts: what a reader should know.
    """

    ranking: str
    why: str
    alerts: tuple[Alert, ...] = ()


def choose(
    asked: str, known: Mapping[str, NDArray], memorised: Alert | None, missing: str = ""
) -> Choice:
    """Choose the ranking by the rule of this module.

    Args:
      asked: one of `RANKINGS`, or "auto".
      known: the values of the rankings that were computed.
      memorised: the alert of `of_memory`, or None.
      missing: the reason why there is no refitted last layer, if there is none.
    """
    found = () if memorised is None else (memorised,)
    if asked != "auto":
        return Choice(asked, f"You asked for {asked!r}.", found if asked == "margin" else ())
    if "folds" in known:
        return Choice("folds", "Every row is judged by networks that were not trained on it.")
    if "margin" not in known:
        none = f"The last layer cannot be refitted: {missing}."
        if "history" in known:
            return Choice("history", none)
        head = "The order is that of the losses, which may miss labels that were memorised."
        return Choice("loss", none, (Alert("care", head, none, _HELP),))
    if memorised is None:
        return Choice("margin", "The refitted last layer judges every row without the row itself.")
    if "history" in known:
        why = "The features may have memorised labels, so the history of the training ranks."
        return Choice("history", why, (Alert("note", why, memorised.detail),))
    why = "The refitted last layer judges every row without the row itself. See the alert."
    return Choice("margin", why, found)


def of_memory(last: LastLayer, reproduced: float | None) -> Alert | None:
    """Return an alert if the features have memorised the labels, or may have, by the module's rule.

    Args:
      last: the refitted last layer.
      reproduced: the share of the training labels that the network predicts, or None.
    """
    own = float(last.losses.mean())
    if last.held_out is not None and len(last.held_out) > 1:
        there = float(last.held_out.mean())
        error = float(last.held_out.std() / np.sqrt(len(last.held_out)))
        if own >= _SHARE * there or there - own <= _ERRORS * error:
            return None
        return Alert(
            "care",
            "The network has memorised training labels, so wrong ones may look right.",
            f"The mean loss of training rows, each left out of the refit of the last layer, is "
            f"{short(own)}. On held-out rows it is {short(there)}. The layers before have seen the "
            "labels.",
            _HELP,
        )
    if reproduced is None or reproduced < _REPRODUCED:
        return None
    return Alert(
        "care",
        "The network may have memorised training labels, so wrong ones may look right.",
        f"It reproduces {reproduced:.1%} of them. Either hardly any label is wrong, or wrong ones "
        "were memorised. Held-out rows would show which.",
        "Give held-out rows by --test. " + _HELP,
    )


@dataclass(frozen=True, eq=False)
class Suggestions:
    """Labels that confident learning doubts (Northcutt, Jiang & Chuang 2021).

    The threshold t_j of class j is the mean probability of class j among the rows with this label,
    out of sample. A row belongs to the most probable of the classes that reach their thresholds. If
    this is not its given label, the label is doubted.

    Attributes:
      thresholds: (c,) the t_j; NaN for a class that no row has.
      suggested: (n,) the class that each row belongs to, or its given label.
    """

    thresholds: NDArray
    suggested: NDArray[np.int64]


def confident(probabilities: NDArray, given: NDArray) -> Suggestions:
    """Return the thresholds and suggested labels of out-of-sample probabilities (n, c)."""
    n, c = probabilities.shape
    counts = np.bincount(given, minlength=c)
    own = np.bincount(given, probabilities[np.arange(n), given], minlength=c)
    thresholds = np.where(counts > 0, own / np.maximum(counts, 1), np.nan)
    reaches = probabilities >= np.where(counts > 0, thresholds, np.inf)
    best = np.where(reaches, probabilities, -1).argmax(axis=1)
    return Suggestions(thresholds, np.where(reaches.any(axis=1), best, given))
