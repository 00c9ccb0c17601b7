"""Domain mismatch: the training rows and the feature behind wrong predictions for children.

Koh & Liang 2017, section 5.3: a model predicts whether a patient is readmitted. Its training set
contains 24 children, and three of them were readmitted. If twenty of the other 21 children are
removed, the model fails on children. Take one child with a wrong prediction. Of 19,980 training
rows, the four remaining children have the largest influence on this prediction. The derivative of
influence with respect to the input finds the feature that marks children. The model's coefficients
do not find it.
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
from experiments.shared.compare import agreement, largest_bars
from influence import BinaryLogisticRegression as _Net
from influence import Direct, Examples, Influence, RefitOptions, leave_one_out

DATA = "diabetes"
STAND_IN = "hospital"

CHILD = "age_[0-10)"
# Patients who died have this feature: disposition 11 is "expired".
DIED = "discharge_disposition_id_11"
# Finite differences between refits change a feature by this much.
_STEP = 1e-3
# The two colours are Okabe and Ito's.
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
FINDING, DEVIATIONS = claims.FINDING, claims.DEVIATIONS


class _Hospital:
    """The patients before and after the removal of children, and the rows of the children."""

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
    """Remove the children, fit, explain one child's loss, and compare with refits.

    Args:
      config: the protocol.
      data: Splits of the diabetes set or of its stand-in, with feature names.
      checkpoints: folder of finished refits, or None. An interrupted run continues from there.

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
    """Draw the influences on the child, the derivatives by feature, and the coefficients."""
    import matplotlib.pyplot as plt

    arrays, influence = record.arrays, record.arrays["influence"]
    children, readmitted = arrays["children"], arrays["readmitted"]
    names = np.char.replace(arrays["feature_names"].astype(str), "_disposition_id", "")
    with plt.rc_context({"font.size": 7.5, "axes.titlesize": 8, "legend.frameon": False}):
        figure = plt.figure(figsize=(6.75, 5.6), layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(2, 3))
        axis = figure.add_subplot(grid[0, :])
        others = np.setdiff1d(np.arange(len(influence)), children)
        axis.plot(others, influence[others], ".", color=_GREY, markersize=1.5, rasterized=True)
        for rows, marker, colour, label in (
            (children[readmitted], "v", _RED, "a child, readmitted"),
            (children[~readmitted], "^", _BLUE, "a child, not readmitted"),
        ):
            axis.plot(rows, influence[rows], marker, color=colour, markersize=6, label=label)
        axis.plot([], [], ".", color=_GREY, markersize=4, label="anyone else")
        axis.plot(
            arrays["removed"],
            arrays["removed_actual"],
            "k_",
            markersize=6,
            label=f"removed and refitted ({len(arrays['removed'])} rows)",
        )
        axis.set(xlabel="Training row", ylabel="Change of the child's\nloss if removed (nats)")
        axis.margins(x=0.01, y=0.1)
        axis.legend(loc="upper left", ncols=2, handletextpad=0.2, columnspacing=1.2)

        axis, stays = figure.add_subplot(grid[1, 0]), children[~readmitted][0]
        order = largest_bars(axis, names, arrays["derivative"][~readmitted][0], marked=CHILD)
        k, places = np.nonzero(arrays["moved"][:, None] == order)
        axis.plot(arrays["moved_actual"][k], places, "k|", markersize=7, label="refitted")
        axis.set(
            title=f"Features of row {stays} (20 largest)",
            xlabel="Change of the child's loss\nfor each unit added (nats)",
        )
        axis.legend(loc="lower right", handletextpad=0.2)
        axis = figure.add_subplot(grid[1, 1])
        largest_bars(axis, names, arrays["coefficients"], marked=CHILD)
        axis.set(
            title="Coefficients (20 largest)",
            xlabel="Change of the log-odds of\nbeing readmitted for each unit",
        )
    return figure


def _fitted(config: Config, examples: Examples, start: _Net | None = None) -> _Net:
    """Fit the model to the minimum of its risk, starting at the theta of `start` if given."""
    net = _Net(examples.x.shape[1], weight_decay=config.weight_decay)
    if start is not None:
        net.theta = start.theta
    net.fit(examples, gradient_tolerance=config.gradient_tolerance)
    return net


def _as_released(config: Config, examples: Examples) -> _Net:
    """Fit the model as the authors' code does: scikit-learn's L-BFGS stops early."""
    fit = LogisticRegression(
        C=1 / (len(examples) * config.weight_decay),
        fit_intercept=False,
        tol=1e-8,
        max_iter=config.release_iterations,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the fit must stop early
        # The rounding of sparse products does not depend on the number of cores.
        fit.fit(scipy.sparse.csr_array(examples.x), examples.y)
    net = _Net(examples.x.shape[1], weight_decay=config.weight_decay)
    net.theta = fit.coef_[0]
    return net


def _study(at: _Hospital, before: _Net, net: _Net) -> tuple[dict[str, Any], dict[str, NDArray]]:
    """Compare two models. Explain the child's loss under the second one by influence.

    Args:
      at: the patients.
      before: the model of all patients.
      net: the model after the removal of children.
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
    influence = Influence(net, at.train, solver=Direct())
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
    """Compare with the notebook of the authors' code row by row: children, then training rows.

    The stand-in has other rows, so there the metrics have no meaning. They are never judged.
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
    """Compute the derivative of the child's loss by a feature of a training row from two refits.

    The row is that of the remaining child who was not readmitted.
    """
    losses = []
    for step in (_STEP, -_STEP):
        x = np.array(at.train.x)
        x[at.children[~at.readmitted][0], column] += step
        losses.append(_loss(at, _fitted(config, Examples(x, at.train.y), net)))
    return (losses[0] - losses[1]) / (2 * _STEP)


def _loss(at: _Hospital, net: _Net) -> float:
    return float(net.losses(at.child.x, at.child.y)[0])
