"""EK-FAC on a network of 1.8 million weights: times in epochs of `fit`, and an audit of labels."""

import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import keras
import numpy as np

from benchmarks.problem import Problem
from influence import EKFAC, Examples, GaussNewton, GenericNeuralNet, Influence

# The audit counts the wrong labels found after each of these shares of the rows is checked.
CHECKED = (0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Perceptron:
    """The network and its sizes.

    Attributes:
      widths: widths of the hidden layers.
      num_rows: number of training rows of the timed computations.
      num_tests: number of test rows that are scored together.
      epochs, batch_size: the settings of the training by Adam.
      damping: damping of the Gauss-Newton matrix.
      rounds: number of times that each computation is timed.
      audited: number of rows of the audit, or None for all.
      flipped: share of the audit's labels that is made wrong.
      seed: seed of the weights, the order of the rows and the wrong labels.
    """

    widths: tuple[int, ...] = (1000, 1000)
    num_rows: int = 10_000
    num_tests: int = 100
    epochs: int = 3
    batch_size: int = 100
    damping: float = 1e-3
    rounds: int = 3
    audited: int | None = None
    flipped: float = 0.05
    seed: int = 0


def run(problem: Problem, shape: Perceptron) -> dict[str, Any]:
    """Time EK-FAC's computations on a trained network, and audit labels of which some are wrong.

    Returns: `network`; `d`; `pass_seconds`, the median time of one epoch of `fit`; `passes`, the
      median time of each computation divided by `pass_seconds`; `memory_gb`, the growth of the peak
      memory of the process; and `audit`. `audit` has `num_rows`, `num_wrong`, the `seconds` of each
      stage, and `recall`. For each ranking, `recall` lists the share of the wrong labels that are
      found when each share of CHECKED is checked.
    """
    train, test = problem.train["float32"], problem.test["float32"]
    rows = np.random.default_rng(shape.seed).permutation(len(train))[: shape.num_rows]
    part = Examples(train.x[rows], train.y[rows])
    model = _fitted(shape, part)
    seconds: dict[str, list[float]] = {}

    def timed(name: str, task: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        found = task()
        seconds.setdefault(name, []).append(time.perf_counter() - begun)
        return found

    one, many = test.take(slice(0, 1)), test.take(slice(0, shape.num_tests))
    size, net = shape.batch_size, GenericNeuralNet(model)
    how: dict[str, Any] = {"damping": shape.damping, "curvature": GaussNewton}
    before = _peak_gb()
    for number in range(shape.rounds + 1):  # the first round includes tracing and is dropped
        if number == 1:
            seconds.clear()
        timed("fit", lambda: model.fit(part.x, part.y, size, 1, verbose=0))
        first = Influence(net, part, solver=EKFAC(), approximation="first_order", **how)
        prepared = timed("prepare", lambda first=first: first.prepared)
        timed("self_influence", first.self_influence)
        timed("scores_of_1", lambda first=first: first.scores(one))
        timed(f"scores_of_{shape.num_tests}", lambda first=first: first.scores(many))
        step = Influence(net, part, solver=prepared, approximation="one_step", **how)
        timed("one_step_of_1", lambda step=step: step.scores(one))
    passes = {name: median(found) for name, found in seconds.items()}
    unit = passes.pop("fit")
    return {
        "network": asdict(shape),
        "d": model.count_params(),
        "pass_seconds": unit,
        "passes": {name: value / unit for name, value in passes.items()},
        "memory_gb": _peak_gb() - before,
        "audit": _audit(train, shape),
    }


def _audit(train: Examples, shape: Perceptron) -> dict[str, Any]:
    """Make labels wrong, train, and rank the rows by self-influence and by loss."""
    rng = np.random.default_rng(shape.seed + 1)
    rows = rng.permutation(len(train))[: shape.audited]
    x, given = train.x[rows], train.y[rows].copy()
    wrong = rng.permutation(len(rows))[: round(shape.flipped * len(rows))]
    classes = int(given.max()) + 1
    given[wrong] = (given[wrong] + rng.integers(1, classes, len(wrong))) % classes
    noisy = Examples(x, given)
    clock = [time.perf_counter()]
    model = _fitted(shape, noisy)
    clock.append(time.perf_counter())
    net = GenericNeuralNet(model)
    influence = Influence(net, noisy, solver=EKFAC(), damping=shape.damping, curvature=GaussNewton)
    assert influence.prepared is not None
    clock.append(time.perf_counter())
    scores = {"self_influence": influence.self_influence()}
    clock.append(time.perf_counter())
    scores["loss"] = net.losses(x, given)
    flipped = np.isin(np.arange(len(rows)), wrong)
    recall = {
        name: [
            float(flipped[np.argsort(-values, kind="stable")[: round(share * len(rows))]].sum())
            / max(len(wrong), 1)
            for share in CHECKED
        ]
        for name, values in scores.items()
    }
    stages = dict(zip(("fit", "prepare", "self_influence"), np.diff(clock).tolist(), strict=True))
    return {"num_rows": len(rows), "num_wrong": len(wrong), "seconds": stages, "recall": recall}


def _fitted(shape: Perceptron, train: Examples) -> keras.Model:
    keras.utils.set_random_seed(shape.seed)
    hidden = [keras.layers.Dense(width, activation="relu") for width in shape.widths]
    last = keras.layers.Dense(int(train.y.max()) + 1)
    model = keras.Sequential([keras.Input(train.x.shape[1:]), *hidden, last])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    model.fit(train.x, train.y, shape.batch_size, shape.epochs, verbose=0)
    return model


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
