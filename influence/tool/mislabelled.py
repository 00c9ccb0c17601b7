"""Choice of a ranking of rows by how suspect their labels are, and suggestion of labels.

Each of five quantities can rank the rows. A wrong label typically has a small margin, a large loss
or a large self-influence. The margin of a class label is the logit of this label minus the largest
other logit. The margin of a numeric label is minus the absolute residual.

- `margin`: the margin by the last layer, refitted without the row (`influence.tool.last_layer`).
- `folds`: the margin by a network that was trained without the row's fold.
- `history`: the mean of the margins after the recorded epochs of the training (area under the
  margin: Pleiss et al. 2020).
- `self_influence`: the predicted rise of the row's own loss if the row is left out.
- `loss`: the loss of the row in the trained network.

`ranking="auto"` follows a fixed rule:

1. If folds were requested, use `folds`.
2. Otherwise, if the last layer could be refitted, use `margin`. There is one exception: if the
   features have memorised the labels and a history is given, use `history`.
3. If the last layer could not be refitted, use `history` if it is given, else `loss`.

The test for memorisation compares two mean losses: the leave-one-out loss of the training rows, and
the refit's loss on held-out rows. Both are those of the weight decay with the least leave-one-out
loss. The features have memorised the labels if the first loss is below
half of the second one and the difference exceeds two standard errors of the second one. In this
case, leaving a row out of the refit does not remove the information that the features contain about
its label.

If there are no held-out rows, the test uses the training labels. If the network reproduces at least
99 % of them (for numbers, 99 % of their variance), rule 2 treats them as memorised. In this case,
either no label is wrong, or the network has memorised the wrong labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from influence.tool.alerts import Alert
from influence.tool.answer import short
from influence.tool.last_layer import LastLayer

# In these rankings, the smallest value is the most suspect. In the others, it is the largest value.
_SMALL_FIRST = ("margin", "folds", "history")
# The description of each ranking on the page.
WORDS = {
    "margin": "margin of the given label by the last layer, refitted without the row",
    "folds": "margin of the given label by networks trained without the row's fold",
    "history": "mean margin of the given label over the epochs of the training",
    "self_influence": "predicted rise of the row's own loss if the row is left out",
    "loss": "loss of the row",
}
# The features have memorised the labels if two conditions hold. The leave-one-out loss is below
# _SHARE times the held-out loss. The difference exceeds _ERRORS standard errors of the held-out
# loss. Without held-out rows, the condition is that the network reproduces the share _REPRODUCED of
# the labels.
_SHARE = 0.5
_ERRORS, _REPRODUCED = 2.0, 0.99
_HELP = (
    "Record the training (influence.Recorder) and give its folder by --history, or retrain by "
    "--folds 5 --fit."
)


def order_of(values: NDArray, ranking: str) -> NDArray[np.int64]:
    """Sort all rows by the values of a ranking, and return the row numbers, most suspect first.

    Rows with equal values stay in their original order. Rows with NaN or infinite values come last.
    """
    doubt = -values if ranking in _SMALL_FIRST else values
    return np.argsort(-np.where(np.isfinite(doubt), doubt, -np.inf), kind="stable")


@dataclass(frozen=True)
class Choice:
    """The chosen ranking, with the reason.

    Attributes:
      ranking: one of `RANKINGS`.
      why: the reason for the choice, in a sentence.
      alerts: warnings about the chosen ranking.
    """

    ranking: str
    why: str
    alerts: tuple[Alert, ...] = ()


def choose(
    asked: str, known: Mapping[str, NDArray], memorised: Alert | None, missing: str = ""
) -> Choice:
    """Choose the ranking by the rule in the docstring of this module.

    Args:
      asked: one of `RANKINGS`, or "auto".
      known: dict from the name of each computed ranking to its values.
      memorised: the alert that `of_memory` returned, or None.
      missing: the reason why the last layer could not be refitted, or "" if it was refitted.
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
    """Return an alert if the labels are, or may be, memorised, else None.

    The module docstring describes the test for memorisation.

    Args:
      last: the refitted last layer.
      reproduced: the share of the training labels, or of their variance, that the network
        reproduces; None if it is unknown.
    """
    losses, held_out = last.least
    own = float(losses.mean())
    if held_out is not None and len(held_out) > 1:
        there = float(held_out.mean())
        error = float(held_out.std() / np.sqrt(len(held_out)))
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
    """Labels that confident learning suggests (Northcutt, Jiang & Chuang 2021).

    The threshold t_j of class j is the mean out-of-sample probability of class j over the rows with
    the label j. For each row, consider the classes whose probability is at least their threshold.
    The most probable of these classes is the suggested label. If it differs from the given label,
    the given label is doubted.

    Attributes:
      thresholds: (c,) the thresholds t_j. NaN for a class that is the label of no row.
      suggested: (n,) the suggested class of each row. If no class reaches its threshold, it is the
        given label.
    """

    thresholds: NDArray
    suggested: NDArray[np.int64]


def confident(probabilities: NDArray, given: NDArray) -> Suggestions:
    """Apply confident learning to out-of-sample probabilities (n, c) and given labels (n,)."""
    n, c = probabilities.shape
    counts = np.bincount(given, minlength=c)
    own = np.bincount(given, probabilities[np.arange(n), given], minlength=c)
    thresholds = np.where(counts > 0, own / np.maximum(counts, 1), np.nan)
    reaches = probabilities >= np.where(counts > 0, thresholds, np.inf)
    best = np.where(reaches, probabilities, -1).argmax(axis=1)
    return Suggestions(thresholds, np.where(reaches.any(axis=1), best, given))
