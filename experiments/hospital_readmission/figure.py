"""Section 5.3: the training rows and the feature behind wrong predictions for children.

Koh & Liang 2017, section 5.3, domain mismatch: a model predicts whether a patient is readmitted.
Its training set contains 24 children, and three of them were readmitted. If twenty of the other 21
children are removed, the model fails on children. Take one child with a wrong prediction. Of 19,980
training rows, the four remaining children have the largest influence on this prediction. The
derivative of influence with respect to the input finds the feature that marks children. The model's
coefficients do not find it.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from experiments.harness import options
from experiments.harness.record import Record
from experiments.hospital_readmission import claims
from experiments.shared.compare import agreement, largest_bars, letter
from influence import BinaryLogisticRegression as _Net
from influence import Direct, Examples, Influence, RefitOptions, leave_one_out

DATA = "diabetes"
STAND_IN = "hospital"

CHILD = "age_[0-10)"
# Patients who died have this feature: disposition 11 is "expired".
DIED = "discharge_disposition_id_11"
# The step by which a feature is changed for finite differences between refits.
_STEP = 1e-3
# The red and the blue are from Okabe and Ito's palette.
_RED, _BLUE, _GREY = "#D55E00", "#0072B2", "#999999"


@dataclass(frozen=True)
class Config:
    """The settings of the authors' 2017 code (hospital_readmission.ipynb).

    Below, (authors' code) marks a value from that code.
    """

    weight_decay: float = 1e-4
    """lambda of the penalty lambda/2 |w|^2 (authors' code)"""
    test_child: int = 1742
    """test row of the child whose loss is explained (authors' code)"""
    num_removals: int = 50
    """number of rows that are removed one at a time with a refit: those of largest |influence|, the
    children among them"""
    num_moved_features: int = 10
    """number of features that are changed a little in both directions with a refit: those of
    largest |derivative|"""
    gradient_tolerance: float = 1e-10
    """every fit and refit stops at this Euclidean norm of the risk's gradient"""
    release_iterations: int = 1000
    """number of L-BFGS iterations after which the authors' code stops its models (its max_iter)"""
    seed: int = 0
    """not used, because nothing is drawn at random here; the data's split has its own seed, 2"""

    def __post_init__(self):
        options.at_least(self, 4, "num_removals")
        options.at_least(self, 1, "num_moved_features", "release_iterations")
        options.positive(self, "weight_decay", "gradient_tolerance")


PRESETS = {"smoke": Config(test_child=13), "standard": Config(), "paper": Config()}
CLAIMS, CHECKS = claims.CLAIMS, claims.CHECKS
FINDING, DEVIATIONS, CAPTION = claims.FINDING, claims.DEVIATIONS, claims.CAPTION


class _Hospital:
    """The patients before and after the removal of children, with the rows of the children."""

    def __init__(self, config: Config, data: Any):
        self.names = data.feature_names
        self.age = self.names.index(CHILD)
        self.everyone, self.test = Examples(*data.train), Examples(*data.test)
        self.test_children = np.flatnonzero(self.test.x[:, self.age])
        options.one_of(config, self.test_children, "the test row of a child", "test_child")
        options.at_most(config, len(self.names), "features", "num_moved_features")
        self.child = self.test.take([config.test_child])  # the run explains this child's loss
        is_child = self.everyone.x[:, self.age] == 1
        self.num_before = np.count_nonzero(is_child)
        self.train = self.everyone.without(np.flatnonzero(is_child & (self.everyone.y == 0))[:-1])
        options.at_most(config, len(self.train), "training rows", "num_removals")
        self.children = np.flatnonzero(self.train.x[:, self.age])
        self.readmitted = self.train.y[self.children] == 1


def run(config: Config, data: Any, *, checkpoints: Path | None = None) -> Record:
    """Remove children, fit the model, explain one child's loss, and compare with refits.

    Args:
      config: the settings of the experiment.
      data: Splits of the diabetes set or of its stand-in, with feature names.
      checkpoints: folder that stores finished refits, or None. An interrupted run continues from
        its files.

    Returns: Record with the metrics of CLAIMS and the arrays that `draw` needs.
    Raises: Misuse if test_child is not the test row of a child, or if an option does not fit the
      size of the data.
    """
    at, tolerance = _Hospital(config, data), config.gradient_tolerance
    net = _fitted(config, at.train)
    metrics, arrays = _study(at, _fitted(config, at.everyone), net)
    stopped = _study(at, _as_released(config, at.everyone), _as_released(config, at.train))
    metrics |= {f"stopped_{name}": value for name, value in stopped[0].items()}
    arrays |= {f"stopped_{name}": array for name, array in stopped[1].items()}

    influence, derivative = arrays["influence"], arrays["derivative"][~at.readmitted][0]
    largest = np.argsort(-np.abs(influence), kind="stable")[: config.num_removals]
    refitting = RefitOptions(tolerance=tolerance, checkpoints=checkpoints)
    refits = leave_one_out(net, at.train, at.child, largest, refitting)
    as_predicted = (refits[0] * influence[largest] > 0)[np.isin(largest, at.children)]
    all_four = _loss(at, _fitted(config, at.train.without(at.children), net)) - _loss(at, net)
    moved = np.argsort(-np.abs(derivative), kind="stable")[: config.num_moved_features]
    actual = np.array([_refitted_derivative(config, at, net, column) for column in moved])

    metrics |= {f"removals_{k}": v for k, v in agreement(influence[largest], refits[0]).items()}
    metrics |= {
        "num_features": len(at.names),
        "num_train": len(at.train),
        "train_children_before": at.num_before,
        "train_children": len(at.children),
        "train_children_readmitted": at.readmitted.sum(),
        "test_children": len(at.test_children),
        "children_sign_agreement": as_predicted.mean(),
        "all_children_predicted": influence[at.children].sum(),
        "all_children_actual": all_four,
        "all_children_predicted_share": influence[at.children].sum() / all_four,
        "worst_derivative_error": np.max(np.abs(derivative[moved] / actual - 1)),
        "worst_refit_gradient_norm": refits.gradient_norm.max(),
    }
    arrays |= {
        "children": at.children,
        "readmitted": at.readmitted,
        "test_children": at.test_children,
        "removed": largest,
        "removed_actual": refits[0],
        "moved": moved,
        "moved_actual": actual,
        "feature_names": np.array(at.names, dtype="S"),
    }
    return Record.of(metrics=metrics, arrays=arrays)


def draw(record: Record) -> Any:
    """Draw the most influential rows, the children's predictions, derivatives and coefficients.

    For real data, the values that the authors' notebook prints are drawn too.
    """
    import matplotlib.pyplot as plt

    arrays, real = record.arrays, not record.data.get("stand_in", True)
    stays = arrays["children"][~arrays["readmitted"]][0]
    names = np.char.replace(arrays["feature_names"].astype(str), "_disposition_id", "")
    with plt.rc_context({"font.size": 7.5, "axes.titlesize": 8, "legend.frameon": False}):
        figure, axes = plt.subplots(
            2, 2, figsize=(6.75, 6.2), layout="constrained", height_ratios=(1, 1.1)
        )
        rows, children, features, coefficients = axes.ravel()
        _draw_rows(rows, arrays, published=real)
        _draw_children(children, arrays, published=real)
        # As in the authors' code, we show -n times the derivative of the loss.
        derivative = -len(arrays["influence"]) * arrays["derivative"][~arrays["readmitted"]][0]
        order = largest_bars(features, names, derivative, marked=CHILD)
        k, places = np.nonzero(arrays["moved"][:, None] == order)
        refitted = -len(arrays["influence"]) * arrays["moved_actual"][k]
        features.plot(refitted, places, "k|", markersize=7, label="refitted")
        features.set(
            title=f"Row {stays}, at the optimum",
            xlabel="$-n$ times the change of the child's loss\nfor each unit added (nats)",
        )
        features.legend(loc="lower right", handletextpad=0.2)
        largest_bars(coefficients, names, arrays["coefficients"], marked=CHILD)
        coefficients.set(
            title="Coefficients at the optimum",
            xlabel="Change of the log-odds of\nbeing readmitted for each unit",
        )
        for name, axis in zip("abcd", axes.ravel(), strict=True):
            letter(axis, name)
    return figure


def _draw_rows(axis: Any, arrays: dict[str, NDArray], *, published: bool) -> None:
    """Draw the ten most harmful and ten most helpful rows, for the model that is stopped early."""
    influence, children = arrays["stopped_influence"], arrays["children"]
    order = np.argsort(influence, kind="stable")
    rows = np.concatenate([order[:10], order[:-11:-1]])
    places = np.arange(len(rows))
    colours = [_RED if row in children else _BLUE for row in rows]
    axis.barh(places, influence[rows], color=colours, height=0.7)
    if published:
        listed = dict(zip(claims.HARMFUL + claims.HELPFUL, claims.INFLUENCES, strict=True))
        known = [
            (listed[row], place) for row, place in zip(rows, places, strict=True) if row in listed
        ]
        axis.plot(*zip(*known, strict=True), "|", color="black", markersize=8)
    axis.set_yticks(places, rows)
    axis.tick_params(axis="y", labelsize=6)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.axvline(0, color="0.6", linewidth=0.6)
    axis.set(
        title="Largest influences",
        xlabel="Predicted change of the loss if\nremoved (nats), stopped as released",
        ylabel="Training row",
    )
    # The handles are not added to the axes, so they do not change the limits.
    handles = [_patch(_RED, "a child"), _patch(_BLUE, "anyone else")]
    if published:
        handles.append(_mark("|", "black", "published"))
    axis.legend(handles=handles, loc="lower left", handlelength=1)


def _draw_children(axis: Any, arrays: dict[str, NDArray], *, published: bool) -> None:
    """Draw our P(correct) of every test child against the published value.

    On stand-in data, draw P(correct) after the removal against P(correct) before it.
    """
    before, after = arrays["probability_correct_before"], arrays["probability_correct"]
    axis.axhline(0.5, color="0.7", linewidth=0.8, linestyle="--", zorder=0)
    if published:
        rows, printed, printed_after = claims.published_children().T
        if not np.array_equal(rows, arrays["test_children"]):
            raise ValueError("test_children must be the published ones, in their order.")
        for key, colour, marker, label in (
            ("stopped_probability_correct_before", _GREY, ".", "before the removal"),
            ("stopped_probability_correct", _RED, "o", "after it, stopped as released"),
            ("probability_correct", _BLUE, "x", "after it, at the optimum"),
        ):
            given = printed if key.endswith("before") else printed_after
            axis.plot(given, arrays[key], marker, color=colour, label=label, markersize=3,
                      markeredgewidth=0.7, fillstyle="none")  # fmt: skip
        axis.plot([0.2, 1], [0.2, 1], color="0.6", linewidth=0.8, zorder=0)
        axis.axvline(0.5, color="0.7", linewidth=0.8, linestyle="--", zorder=0)
        axis.set_xlabel("P(correct) as published")
    else:
        axis.plot(before, after, "o", color=_RED, markersize=3, fillstyle="none")
        axis.set_xlabel("P(correct) before the removal")
    axis.set(title=f"The {len(before)} test children", ylabel="P(correct), ours")
    if published:
        axis.legend(loc="upper left", handletextpad=0.1, fontsize=6.5)


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _mark(marker: str, colour: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="", marker=marker, color=colour, markersize=8, label=label)


def _fitted(config: Config, examples: Examples, start: _Net | None = None) -> _Net:
    """Fit the model to the minimum of its risk, starting at the theta of `start` if given."""
    net = _Net(examples.x.shape[1], weight_decay=config.weight_decay)
    if start is not None:
        net.theta = start.theta
    net.fit(examples, gradient_tolerance=config.gradient_tolerance)
    return net


def _as_released(config: Config, examples: Examples) -> _Net:
    """Fit the model as in the authors' code, with scikit-learn's L-BFGS stopped early."""
    fit = LogisticRegression(
        C=1 / (len(examples) * config.weight_decay),
        fit_intercept=False,
        tol=1e-8,
        max_iter=config.release_iterations,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # expected: the fit stops early
        # x is sparse, because the rounding of sparse products does not depend on the core count.
        fit.fit(scipy.sparse.csr_array(examples.x), examples.y)
    net = _Net(examples.x.shape[1], weight_decay=config.weight_decay)
    net.theta = fit.coef_[0]
    return net


def _study(at: _Hospital, before: _Net, net: _Net) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Compare two models, and explain the child's loss under the second model by influence.

    Args:
      at: the patients.
      before: the first model, fitted to all patients.
      net: the second model, fitted after the removal of children.
    Returns: metrics and arrays.
    """
    metrics, arrays = {}, {}
    for suffix, model, examples in (("_before", before, at.everyone), ("", net, at.train)):
        losses = model.losses(at.test.x, at.test.y)
        probability = np.exp(-losses[at.test_children])  # probability of the true label
        arrays[f"probability_correct{suffix}"] = probability
        for name, rows in (("train", examples), ("test", at.test)):
            right = (model.outputs(rows.x)[:, 0] > 0) == rows.y
            metrics[f"{name}_accuracy{suffix}"] = right.mean()
        metrics |= {
            f"test_loss{suffix}": losses.mean(),
            f"gradient_norm{suffix}": model.gradient_norm(examples),
            f"test_children_wrong{suffix}": np.sum(probability < 0.5),
            f"mean_probability_correct{suffix}": probability.mean(),
            f"probability_correct{suffix}": np.exp(-_loss(at, model)),
        }
    flipped = (arrays["probability_correct_before"] >= 0.5) & (arrays["probability_correct"] < 0.5)
    influence = Influence(net, at.train, solver=Direct(), approximation="first_order")
    scores = influence.scores(at.child)[0]
    derivative = influence.perturbation(at.child, at.children)[0]  # (children, features)
    explained, size = derivative[~at.readmitted][0], np.abs(derivative)
    of_children, next_largest = scores[at.children], np.abs(np.delete(scores, at.children)).max()
    metrics |= {
        "test_children_flipped": flipped.sum(),
        "children_among_largest": np.sum(np.abs(of_children) > next_largest),
        "children_of_expected_sign": np.sum(np.sign(of_children) == np.where(at.readmitted, -1, 1)),
        "ratio_to_next": np.abs(of_children).min() / next_largest,
        "child_feature_rank": 1 + np.sum(explained < explained[at.age]),
        "child_feature_worst_rank_in_size": 1 + (size > size[:, [at.age]]).sum(axis=1).max(),
        "child_feature_as_released": -len(at.train) * explained[at.age],
        "coefficients_larger": np.sum(np.abs(net.theta) > np.abs(net.theta[at.age])),
    }
    if DIED in at.names:
        metrics["died_feature_as_released"] = -len(at.train) * explained[at.names.index(DIED)]
    for what, which in (("readmitted", at.readmitted), ("not_readmitted", ~at.readmitted)):
        numbered = enumerate(of_children[which], start=1)
        metrics |= {f"influence_{what}_{number}": score for number, score in numbered}
    metrics |= _beside_the_notebook(at, arrays, scores)
    arrays |= {
        "flipped": at.test_children[flipped],
        "influence": scores,
        "derivative": derivative,
        "coefficients": net.theta,
    }
    return metrics, arrays


def _beside_the_notebook(
    at: _Hospital, arrays: dict[str, NDArray], scores: NDArray
) -> dict[str, float]:
    """Compare our probabilities and influences with those in the authors' notebook, row by row.

    The stand-in has other rows, so its metrics have no meaning. They are never judged.
    """
    rows, before, after = claims.published_children().T
    known = np.flatnonzero(np.isin(at.test_children, rows))
    there = np.searchsorted(rows, at.test_children[known])
    metrics: dict[str, float] = {}
    for suffix, printed in (("_before", before), ("", after)):
        apart = arrays[f"probability_correct{suffix}"][known] / printed[there] - 1
        metrics[f"worst_probability{suffix}"] = np.abs(apart).max(initial=0.0)
    wrong = at.test_children[arrays["probability_correct"] < 0.5]
    metrics["published_flips_among_ours"] = np.isin(rows[after < 0.5], wrong).sum()
    order = np.argsort(scores, kind="stable")
    places = {"harmful": (order, claims.HARMFUL), "helpful": (order[::-1], claims.HELPFUL)}
    for which, (found, printed) in places.items():
        metrics[f"published_{which}_in_place"] = np.sum(found[: len(printed)] == printed)
    listed = np.array(claims.HARMFUL + claims.HELPFUL)
    if listed.max() < len(scores):
        apart = scores[listed] / claims.INFLUENCES - 1
        metrics["worst_printed_influence"] = np.abs(apart).max()
    else:
        metrics["worst_printed_influence"] = np.nan
    return metrics


def _refitted_derivative(config: Config, at: _Hospital, net: _Net, column: int) -> float:
    """Compute the derivative of the child's loss with respect to a feature of a training row.

    The result is a central difference of two refits. The training row is that of the remaining
    child who was not readmitted.
    """
    losses = []
    for step in (_STEP, -_STEP):
        x = np.array(at.train.x)
        x[at.children[~at.readmitted][0], column] += step
        losses.append(_loss(at, _fitted(config, Examples(x, at.train.y), net)))
    return (losses[0] - losses[1]) / (2 * _STEP)


def _loss(at: _Hospital, net: _Net) -> float:
    return float(net.losses(at.child.x, at.child.y)[0])
