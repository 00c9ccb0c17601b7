"""A trained model with its rows, and the cached results that every question needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from influence.common import checkpoint
from influence.common.progress import progress
from influence.curvature.operators import Curvature, GaussNewton, Hessian
from influence.examples.examples import Examples
from influence.examples.featured import Kept
from influence.net.checked import Net
from influence.net.history import History
from influence.net.net import GenericNeuralNet
from influence.net.saved import is_saved, load_model
from influence.net.trunk import Trunk
from influence.preflight.check import check, check_rows
from influence.preflight.report import Line, Report
from influence.scores.influence import Influence
from influence.solvers import CG, EKFAC, Direct, Nystrom, Prepared, prepare
from influence.solvers.ekfac import factors_of, prepared_from
from influence.solvers.plan import Plan
from influence.tool.predictions import Predictions
from influence.tool.rows import Rows, Wanted
from influence.tool.store import Store, name_of, texts

# Format number of stored results. Raise it if a code change alters the results of the same inputs.
# Stored results with another number are not used.
_FORMAT = 2
# Features of frozen layers are computed and stored in blocks of this many rows.
_PART = 256
# A matrix with more bytes than this is not stored in the folder of an unfinished run. The function
# `index` stores a matrix of any size.
_MOST_BYTES = 1 << 30
_CURVATURES: dict[str, type[Curvature]] = {"Hessian": Hessian, "GaussNewton": GaussNewton}


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """Options that all questions about a model have in common.

    Attributes:
      loss: the loss, for a model that was not compiled, or None.
      damping: the factor of I in the damped curvature matrix. If None, the library chooses it.
      batch_size: number of rows in memory at a time. If None, the library chooses it.
      check: False to skip the check before the computation.
      index: a folder of stored results that the function `index` filled, or None.
      checkpoints: a folder for intermediate results, or None. An interrupted call continues from
        these results.
      history: the History of the training, or the folder that `Recorder` wrote, or None.
    """

    loss: Any = None
    damping: float | None = None
    batch_size: int | None = None
    check: bool = True
    index: Path | None = None
    checkpoints: Path | None = None
    history: History | str | os.PathLike | None = None


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model as a net, with a description of its inputs.

    Attributes:
      net: the net.
      wanted: the inputs and the label format that the model takes.
    """

    net: GenericNeuralNet
    wanted: Wanted

    @classmethod
    def of(cls, model: Net, loss: Any = None) -> Loaded:
        """Return a Loaded for a Keras model, a net, or the path of a saved model.

        Raises: TypeError for any other type. ValueError if the library does not support the model.
        """
        if is_saved(model):
            model = load_model(model, compiled=loss is None)  # type: ignore[arg-type]
        if isinstance(model, GenericNeuralNet):
            return cls(model, Wanted.by(model))
        if not isinstance(model, keras.Model):
            raise TypeError(
                "model must be a Keras model, a GenericNeuralNet or the path of a saved model, got "
                f"{type(model).__name__}."
            )
        net = GenericNeuralNet(model, loss)
        return cls(net, Wanted.by(net))


@dataclass(frozen=True, eq=False)
class Subject:
    """A net with its training rows and optional test rows.

    Attributes:
      loaded: the model.
      train_rows: the training rows, with their names.
      test_rows: the test rows with their names, or None.
      train: the training rows in the form that the net takes.
      test: the test rows in the form that the net takes. If there are none, the training rows.
      options: the options of the question.
    """

    loaded: Loaded
    train_rows: Rows
    test_rows: Rows | None
    train: Examples
    test: Examples
    options: QuestionOptions

    @classmethod
    def of(
        cls, model: Any, train: Any, test: Any = None, options: QuestionOptions = QuestionOptions()
    ) -> Subject:
        """Check a model and its data, and return them as a Subject.

        If the options give a folder, the features of frozen layers are read from it, or computed.

        Args:
          model: a Keras model, a net, the path of a saved model, or Loaded.
          train: the training rows, as Rows or in any form that `fit` takes.
          test: the test rows, or None.
          options: options of the question.

        Raises: TypeError or ValueError naming the invalid argument.
        """
        loaded = model if isinstance(model, Loaded) else Loaded.of(model, options.loss)
        rows = Rows.of(train, loaded.wanted, "train")
        of_test = None if test is None else Rows.of(test, loaded.wanted, "test")
        if of_test is not None and not of_test.classes:
            of_test = replace(of_test, classes=rows.classes)
        store = Store(options.index, options.checkpoints)
        examples = _examples(loaded, rows, store)
        tested = examples if of_test is None else _examples(loaded, of_test, store)
        for name, part in (("train", examples), ("test", tested)):
            loaded.net.validate(part, name)
        history = History.of(options.history)
        if history is not None:
            history.check_net(loaded.net)
            history.check_rows(examples)
            options = replace(options, history=history)
        return cls(loaded, rows, of_test, examples, tested, options)

    @property
    def net(self) -> GenericNeuralNet:
        """The net in the model's own dtype. The net of `influence` may have another dtype."""
        return self.loaded.net

    @property
    def shown_test(self) -> Rows:
        """The rows whose losses are studied: the test rows if given, else the training rows."""
        return self.train_rows if self.test_rows is None else self.test_rows

    @property
    def store(self) -> Store:
        """The folders of stored results, `options.index` and `options.checkpoints`."""
        return Store(self.options.index, self.options.checkpoints)

    @cached_property
    def history(self) -> History | None:
        """The history of the training, or None."""
        return History.of(self.options.history)

    @cached_property
    def key(self) -> str:
        """Hash of the net, training rows and options on which plan, matrix and check depend."""
        history = self.history
        more = () if history is None else (history.rates, history.steps, history.by_gradient_steps)
        return checkpoint.identity(self.net, self.train, self.options.damping, _FORMAT, *more)

    @cached_property
    def of_train(self) -> Predictions:
        """The net's predictions for all training rows."""
        return Predictions.of(self.net, self.train, self.options.batch_size)

    @cached_property
    def of_test(self) -> Predictions:
        """The net's predictions for all rows of `test`."""
        if self.test is self.train:
            return self.of_train
        return Predictions.of(self.net, self.test, self.options.batch_size, like=self.train)

    # --- the factored matrix ------------------------------------------------------------------

    @cached_property
    def influence(self) -> Influence:
        """The Influence object that computes scores. It reuses stored factors of the matrix."""
        return self._planned[0]

    @property
    def plan(self) -> Plan:
        """The chosen curvature, damping, solver and precision, each with the reason."""
        return self._planned[1]

    @cached_property
    def _planned(self) -> tuple[Influence, Plan]:
        size = self.options.batch_size
        name = f"plan-{self.key}"
        found = self.store.find(name)
        plan = None if found is None else _plan_of(found)
        if plan is not None:
            return self._from(plan), plan
        influence = Influence(
            self.net,
            self.train,
            damping=self.options.damping,
            batch_size=size,
            history=self.history,
        )
        plan = influence.plan
        if self.store.work is None or not _can_be_kept(plan.solver):
            return influence, plan
        self.store.kept(name, lambda: _arrays_of(plan))
        return self._from(plan, influence), plan

    def _from(self, plan: Plan, fresh: Influence | None = None) -> Influence:
        """Return the Influence of a plan. Its matrix or factors are read, or computed and stored.

        `fresh` is the Influence that made the plan, or None if the plan was read from disk.
        """
        if fresh is not None:
            A = fresh.operator
        else:
            net = self.net if plan.dtype == self.net.dtype.name else self.net.astype(plan.dtype)
            kind = _CURVATURES[plan.curvature]
            A = kind(net, self.train, plan.damping, batch_size=self.options.batch_size)
        solver: Any = plan.solver
        if isinstance(solver, Direct):
            solver = self._direct(A, solver)
        elif isinstance(solver, EKFAC):
            made = lambda: factors_of(prepare(A, solver))  # noqa: E731
            solver = prepared_from(A, solver, self.store.kept(f"factors-{self.key}", made))
        elif fresh is not None:
            return fresh
        return Influence(
            A.net,
            self.train,
            solver=solver,
            damping=plan.damping,
            curvature=type(A),
            batch_size=self.options.batch_size,
            approximation="one_step" if plan.approximation == "one_step" else "first_order",
        )

    def _direct(self, A: Curvature, solver: Direct) -> Prepared:
        store = self.store
        if store.work != store.index and A.shape[0] ** 2 * A.dtype.itemsize > _MOST_BYTES:
            store = Store(store.index)
        found = store.kept(f"matrix-{self.key}", lambda: {"damped": A.dense()})["damped"]
        found[np.diag_indices_from(found)] -= A.damping  # `damped` needs the undamped matrix
        return prepare(A.damped(A.damping, found), solver)

    # --- the check ----------------------------------------------------------------------------

    @cached_property
    def report(self) -> Report | None:
        """The result of the check before the computation, or None if the check is skipped."""
        if not self.options.check:
            return None
        found = self.store.kept(f"check-{self.key}", self._checked)
        return Report(
            tuple(
                Line(str(name), float(value), str(verdict), str(meaning), str(remedy))  # type: ignore
                for name, value, verdict, meaning, remedy in zip(
                    *(found[key] for key in ("name", "value", "verdict", "meaning", "remedy")),
                    strict=True,
                )
            )
        )

    def _checked(self) -> dict[str, NDArray]:
        how: dict[str, Any] = {"batch_size": self.options.batch_size}
        lines = check(self.net, self.train, damping=self.options.damping, **how).lines
        found = {
            key: texts([getattr(line, key) for line in lines])
            for key in ("name", "verdict", "meaning", "remedy")
        }
        return found | {"value": np.array([line.value for line in lines], float)}

    @cached_property
    def rows_report(self) -> Report | None:
        """The result of `check_rows`, a check without derivatives; None if checks are skipped."""
        if not self.options.check:
            return None
        return check_rows(self.net, self.train, batch_size=self.options.batch_size)

    @property
    def at_minimum(self) -> bool:
        """True if the check found that theta is a stationary point of the risk."""
        if self.report is None:
            return False
        return any(
            line.name == "stationary point" and line.verdict == "ok" for line in self.report.lines
        )


def _examples(loaded: Loaded, rows: Rows, store: Store) -> Examples:
    """Return rows in the form that the net takes. Stored features of frozen layers are reused."""
    net, trunk = loaded.net, loaded.net.flat.trunk
    if trunk is None or store == Store():
        return net.given(rows.examples, rows.argument)
    name = _features_name(trunk, rows)
    starts = range(0, len(rows), _PART)
    parts = [store.find(f"{name}-{start}") for start in starts]
    missing = [start for start, part in zip(starts, parts, strict=True) if part is None]
    read: Any = cache(lambda: net.given(rows.examples, rows.argument))
    for start in progress(missing, "features of the frozen layers", len(missing)):
        some = np.arange(start, min(start + _PART, len(rows)))
        made = lambda some=some: trunk(read().given.take(some).x)  # noqa: E731
        parts[start // _PART] = store.kept(f"{name}-{start}", made)
    known = [part for part in parts if part is not None]
    features = {key: np.concatenate([part[key] for part in known]) for key in trunk.names}
    if missing:
        read().hold(features)
        net.validate(read(), rows.argument)  # refuses features that depend on other rows
    if rows.labels is None:
        y = rows.examples.y
    else:  # the inputs need not be read
        y = Examples(features, rows.labels, rows.weights).y
    return Kept(lambda: read().given, trunk, features, y)


def features_are_kept(loaded: Loaded, rows: Rows, store: Store) -> bool:
    """Return True if there are no frozen layers, or if the first block of features is stored."""
    trunk = loaded.net.flat.trunk
    return trunk is None or store.find(f"{_features_name(trunk, rows)}-0") is not None


def _features_name(trunk: Trunk, rows: Rows) -> str:
    return name_of("features", trunk.digest, rows.content)


def _can_be_kept(solver: Any) -> bool:
    return isinstance(solver, Direct | EKFAC | CG)


def _arrays_of(plan: Plan) -> dict[str, NDArray]:
    return {
        "curvature": np.array(plan.curvature),
        "damping": np.array(plan.damping),
        "dtype": np.array(plan.dtype),
        "solver": np.array(repr(plan.solver)),
        "rank": np.array(getattr(getattr(plan.solver, "preconditioner", None), "rank", 0)),
        "reasons": texts(list(plan.reasons)),
        "approximation": np.array(plan.approximation),
    }


def _plan_of(found: dict[str, NDArray]) -> Plan | None:
    """Return the plan from its stored arrays, or None if its solver is not a known one."""
    rank = int(found["rank"])
    known = [Direct(), EKFAC(), CG(), *([CG(preconditioner=Nystrom(rank))] if rank else [])]
    solver = next((solver for solver in known if repr(solver) == str(found["solver"])), None)
    if solver is None:
        return None
    return Plan(
        str(found["curvature"]),
        float(found["damping"]),
        solver,
        str(found["dtype"]),
        tuple(map(str, found["reasons"])),
        str(found["approximation"]),
    )


@contextmanager
def on_disk(folder: Path | None) -> Iterator[Path | None]:
    """Create a folder for intermediate results. Empty it if the `with` block succeeds."""
    if folder is None:
        yield None
        return
    checkpoint.check_writable(folder, "out")
    yield folder
    for file in folder.glob("*.npz"):
        file.unlink(missing_ok=True)
    for left in sorted(folder.rglob("*"), reverse=True):
        if left.is_dir():
            left.rmdir()
    if not any(folder.iterdir()):
        folder.rmdir()
