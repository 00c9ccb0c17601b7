import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
import warnings
from dataclasses import dataclass
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import scipy.sparse

from influence import (
    CG,
    ConvergenceWarning,
    Direct,
    DivergenceError,
    Examples,
    GenericNeuralNet,
    Hessian,
    Influence,
    LiSSA,
    MulticlassLogisticRegression,
)
from influence.examples.stream import Stream
from influence.scores import file as score_file
from influence.solvers.base import Raw
from tests.influence.examples.test_stream import Batches
from tests.influence.problems import logistic, relative_error, ridge, tanh_net, through_keras

ROOT = Path(__file__).resolve().parents[3]


def problem():
    return logistic("softmax", num_rows=60, num_inputs=4, intercept=True)


@pytest.fixture
def small_blocks(monkeypatch):
    """Set blocks of 3 test examples and 16 training rows. Solve for 2 test examples at once."""
    monkeypatch.setattr(score_file, "_TESTS", 3)
    monkeypatch.setattr(score_file, "_ROWS", 16)
    monkeypatch.setattr(score_file, "_CHUNK", (1, 16))
    monkeypatch.setattr("influence.scores.inverse._MOST_TOGETHER", 2)


def contents(path):
    with h5py.File(path, "r") as file:
        return {name: part[()] for name, part in file.items()}


def same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


# --- the content of the file ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "ridge", "tape"])
def test_the_file_holds_the_scores(kind, tmp_path, small_blocks):
    p = {
        "softmax": problem,
        "sigmoid": lambda: logistic("sigmoid"),
        "ridge": ridge,
        "tape": lambda: through_keras(problem()),
    }[kind]()
    influence = Influence(p.net, p.train, solver=Direct())
    scores = influence.scores(p.test)
    expected = p.oracle.predicted_changes(p.theta, p.measured, np.arange(len(p.train)))
    path = influence.write_scores(tmp_path / "a" / "exact.h5", p.test, dtype="float64")
    assert path == tmp_path / "a" / "exact.h5" and [f.name for f in path.parent.iterdir()] == [
        "exact.h5"
    ]
    exact = contents(path)
    assert exact["change_if_removed"].dtype == np.float64
    assert relative_error(exact["change_if_removed"], expected) < 1e-9
    assert exact["rounding_error"] < 1e-14
    np.testing.assert_array_equal(exact["rows"], np.arange(len(p.train)))
    assert relative_error(exact["s_test"], scores.solution.x.T) < 1e-12
    for name in ("iterations", "converged", "min_curvature"):
        np.testing.assert_allclose(exact[name], getattr(scores.solution, name), rtol=1e-12)
    assert exact["residual"].shape == (7,) and (exact["residual"] < 1e-12).all()
    rounded = contents(influence.write_scores(str(tmp_path / "rounded.h5"), p.test))
    table = rounded["change_if_removed"]
    assert table.dtype == np.float32 and rounded["s_test"].dtype == np.float64
    error = np.abs(table - expected).max() / np.abs(expected).max()
    assert 1e-9 < error < 1e-6
    # The file's rounding error is the largest one in a sample of the table. Here the sample is the
    # whole table.
    assert rounded["rounding_error"] == pytest.approx(error, rel=0.01)


def test_chosen_rows_and_measurements(tmp_path, small_blocks):
    p = problem()
    influence = Influence(p.net, p.train, solver=Direct(), approximation="first_order")
    rows = [*range(1, 40, 2), 59]

    def top(_, output):
        return output[:, 0]

    path = influence.write_scores(tmp_path / "top.h5", p.test, rows, measurement=top)
    got = contents(path)
    expected = influence.scores(p.test, rows, measurement=top)
    assert got["rows"].tolist() == rows
    assert relative_error(got["change_if_removed"], expected[:]) < 1e-6
    with h5py.File(path) as file:
        assert file.attrs["measurement"] == "top"


def test_attributes_say_what_it_is(tmp_path):
    p = problem()
    influence = Influence(p.net, p.train, solver=CG(rtol=1e-9), damping=0.5)
    with h5py.File(influence.write_scores(tmp_path / "s.h5", p.test)) as file:
        about = file["change_if_removed"].attrs
        assert about["n"] == 60 and about["sign"].startswith("positive: the loss rises without")
        assert "nats" in about["unit"] and "s_test . grad L(z_i) / n" in about["estimand"]
        assert json.loads(file.attrs["versions"])["numpy"] == np.__version__
        assert file.attrs["solver"] == repr(CG(rtol=1e-9)) and file.attrs["damping"] == 0.5
        assert file.attrs["train"] == p.train.fingerprint
        assert (file.attrs["net"], file.attrs["curvature"]) == (type(p.net).__name__, "Hessian")
        assert file.attrs["plan"].startswith("Plan: Hessian (")
        assert file["change_if_removed"].chunks == (7, 60)


def test_streams_sparse_rows_and_float32_nets(tmp_path, small_blocks):
    p = problem()
    path = Influence(p.net, p.train, solver=Direct()).write_scores(tmp_path / "a.h5", p.test)
    expected = contents(path)
    stream = Stream(Batches(p.train.x, p.train.y, 7)), Stream(Batches(p.test.x, p.test.y, 3))
    streamed = Influence(p.net, stream[0], solver=Direct())
    same(contents(streamed.write_scores(tmp_path / "stream.h5", stream[1])), expected)
    # A stream counts as the same input as arrays with the same rows. The file is already complete
    # for this input, so this call only returns its path.
    assert streamed.write_scores(path, p.test)
    sparse = Examples(scipy.sparse.csr_matrix(p.train.x), p.train.y)
    got = contents(
        Influence(p.net, sparse, solver=Direct()).write_scores(tmp_path / "s.h5", p.test)
    )
    table = expected["change_if_removed"]
    assert relative_error(got["change_if_removed"], table) < 1e-6
    low = logistic("softmax", num_rows=60, num_inputs=4, intercept=True, dtype="float32")
    influence = Influence(low.net, low.train, solver=Direct(rtol=1e-4))
    got = contents(influence.write_scores(tmp_path / "low.h5", low.test))
    assert got["s_test"].dtype == np.float32
    assert relative_error(got["change_if_removed"], table) < 1e-4


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_directional_in_float32(kind, intercept, monkeypatch):
    p = logistic(kind, 300, 50, intercept=intercept)
    V = np.random.default_rng(0).standard_normal((p.net.num_parameters, 6))
    exact = p.oracle.gradients(p.theta) @ V
    x = scipy.sparse.csr_matrix(p.train.x)
    for held in (p.train.x, x):
        got = p.net.directional(held, p.train.y, V, dtype="float32")
        assert got.dtype == np.float32
        assert 1e-9 < np.abs(got - exact).max() / np.abs(exact).max() < 1e-6
        one = p.net.directional(held, p.train.y, V[:, 0], dtype="float32")
        np.testing.assert_allclose(one, got[:, 0], rtol=1e-5, atol=1e-5)
    assert p.net.rows_per_batch(p.train, 6, dtype="float32") == 300
    monkeypatch.setattr("influence.models.linear.VECTORS", 4 * len(V) * 7)
    assert p.net.rows_per_batch(p.train, 6, dtype="float32") == 7
    assert p.net.rows_per_batch(p.train, 6, dtype="float64") == 300


def test_memory_is_bounded_by_blocks_not_by_the_table(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    n, m, f = 20_000, 1_500, 20
    x = rng.standard_normal((n, f))
    y = np.argmax(x[:, :3] + rng.gumbel(size=(n, 3)), axis=1)
    net = MulticlassLogisticRegression(f, 3)
    net.theta = rng.standard_normal(60)
    train = Examples(x, y)
    test = Examples(rng.standard_normal((m, f)), np.arange(m) % 3)
    influence = Influence(net, train, solver=Direct())
    influence.prepared(np.ones(60))  # the solver allocates its memory now, before the measurement
    monkeypatch.setattr(score_file, "_TESTS", 512)
    tracemalloc.start()
    path = influence.write_scores(tmp_path / "large.h5", test)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = path.stat().st_size
    assert size > n * m * 4  # the table has 120 MB
    assert peak < 30e6
    with h5py.File(path) as file:
        part = file["change_if_removed"][1000:1010, -2000:]
        assert file["rounding_error"][()] < 1e-6
    expected = influence.scores(test.take(slice(1000, 1010)), np.arange(n - 2000, n))
    assert relative_error(part, expected[:]) < 1e-6


@dataclass(frozen=True)
class Halving:
    """A solver that needs no memory except for its answer."""

    rtol = None

    def prepare(self, A):
        return lambda B: Raw(B / 2, residual=lambda: np.zeros(B.shape[1]))


def test_memory_is_bounded_where_theta_is_long_too(tmp_path, monkeypatch):
    f, m, most = 20_000, 24, 1 << 23
    rng = np.random.default_rng(0)
    net = MulticlassLogisticRegression(f, 3)
    x, y = rng.standard_normal((m, f)), np.arange(m) % 3
    influence = Influence(net, Examples(x[:2], y[:2]), solver=Halving())
    # The operator holds a copy of theta. Make it before memory is measured.
    assert influence.operator.shape == (net.num_parameters,) * 2
    # All 24 vectors s_test do not fit into this memory at once, but 17 would.
    monkeypatch.setattr("influence.scores.inverse.VECTORS", most)
    monkeypatch.setattr(score_file, "_S_BYTES", most // 2)
    tracemalloc.start()
    influence.write_scores(tmp_path / "long.h5", Examples(x, y))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most / 3 < peak < most


# --- interruption and continuation ------------------------------------------------------------

KILLED = """
import os, signal, sys
from influence import Direct, Influence
from influence.scores import file as score_file
from tests.influence.scores.test_file import problem

score_file._TESTS, score_file._ROWS, score_file._CHUNK = 3, 16, (1, 16)
import influence.scores.inverse
influence.scores.inverse._MOST_TOGETHER = 2
mark, left = score_file._mark, [int(sys.argv[2])]

def dying(*arguments):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)  # the block is written, its mark is not
    left[0] -= 1
    mark(*arguments)

score_file._mark = dying
p = problem()
Influence(p.net, p.train, solver=Direct()).write_scores(sys.argv[1], p.test)
"""


def test_a_killed_run_continues_to_the_same_file(tmp_path, small_blocks, monkeypatch):
    # A whole run marks 16 steps as finished: four solves and 3 x 4 blocks of the table.
    num_marks = 9
    path = tmp_path / "scores.h5"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(path), str(num_marks)]
    killed = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [f.name for f in tmp_path.iterdir()] == ["scores.h5.partial"]
    p, marks, mark = problem(), [], score_file._mark
    monkeypatch.setattr(score_file, "_mark", lambda *given: marks.append(given[1]) or mark(*given))
    influence = Influence(p.net, p.train, solver=Direct())
    influence.write_scores(path, p.test)
    assert len(marks) == 16 - num_marks
    assert [f.name for f in tmp_path.iterdir()] == ["scores.h5"]
    whole = contents(influence.write_scores(tmp_path / "whole.h5", p.test))
    same(contents(path), whole)
    marks.clear()
    influence.write_scores(path, p.test)  # the file is complete, so nothing is computed
    assert marks == []


@pytest.mark.parametrize("num_marks", range(0, 16, 3))
def test_an_interruption_anywhere_costs_one_block(num_marks, tmp_path, small_blocks, monkeypatch):
    p = problem()
    # A block of 16 rows must consist of whole batches. The batch size 7 therefore becomes 4.
    influence = Influence(p.net, p.train, solver=Direct(), batch_size=7)
    whole = contents(influence.write_scores(tmp_path / "whole.h5", p.test))
    marks, mark = [], score_file._mark

    def interrupted(*given):
        if len(marks) == num_marks:
            raise KeyboardInterrupt
        marks.append(given)
        mark(*given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(score_file, "_mark", interrupted)
        influence.write_scores(tmp_path / "s.h5", p.test)
    assert not (tmp_path / "s.h5").exists()
    again = Influence(p.net, p.train, solver=Direct(), batch_size=7)
    same(contents(again.write_scores(tmp_path / "s.h5", p.test)), whole)


def test_a_block_is_counted_once_it_is_on_the_disk(tmp_path, monkeypatch):
    counts = []
    monkeypatch.setattr(score_file, "_to_disk", lambda file: counts.append(file["count"][()]))
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["count"] = 3
        score_file._mark(file, "count", 4)
        assert counts == [3] and file["count"][()] == 4


def test_what_a_kill_leaves_while_the_file_is_made_is_overwritten(tmp_path, monkeypatch):
    p = problem()
    with monkeypatch.context() as patch:
        patch.setattr(score_file, "_describe", lambda *_: 1 / 0)
        # Imitate a kill -9: the partial file is not removed.
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(ZeroDivisionError):
            Influence(p.net, p.train, solver=Direct()).write_scores(tmp_path / "s.h5", p.test)
    assert len(list(tmp_path.iterdir())) == 1
    Influence(p.net, p.train, solver=Direct()).write_scores(tmp_path / "s.h5", p.test)
    assert [f.name for f in tmp_path.iterdir()] == ["s.h5"]


def test_what_goes_wrong_while_the_file_is_made_leaves_nothing(tmp_path, monkeypatch):
    p = problem()
    influence = Influence(p.net, p.train, solver=Direct())
    monkeypatch.setattr(score_file, "_describe", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        influence.write_scores(tmp_path / "s.h5", p.test)
    assert list(tmp_path.iterdir()) == []


# --- warnings for inaccurate scores -------------------------------------------------------------


def test_an_unconverged_solve_warns_also_when_it_was_done_before(
    tmp_path, small_blocks, monkeypatch
):
    p = problem()
    influence = Influence(p.net, p.train, solver=CG(rtol=1e-9, max_iterations=2))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(score_file, "_multiply", interrupted)
        with pytest.warns(ConvergenceWarning, match="in 2 of 2 systems for the test gradients"):
            with pytest.raises(KeyboardInterrupt):
                influence.write_scores(tmp_path / "s.h5", p.test)
    with pytest.warns(
        ConvergenceWarning, match="^7 of the first 7 systems, solved by an earlier call, missed"
    ):
        path = influence.write_scores(tmp_path / "s.h5", p.test)
    assert not contents(path)["converged"].any()
    with pytest.warns(ConvergenceWarning, match="^7 of the first 7 systems") as caught:
        influence.write_scores(path, p.test)  # the finished file has unconverged systems
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rough = Influence(p.net, p.train, solver=LiSSA(depth=2, repeats=1, rtol=None))
        for _ in range(2):
            rough.write_scores(tmp_path / "rough.h5", p.test)


def test_a_diverging_solve_leaves_no_file(tmp_path):
    net, train = tanh_net()
    with pytest.raises(DivergenceError, match="negative curvature"):
        influence = Influence(net, train, solver=CG(), curvature=Hessian)
        influence.write_scores(tmp_path / "s.h5", train)
    assert not (tmp_path / "s.h5").exists()


# --- arguments that are refused ---------------------------------------------------------------


def test_a_path_below_a_file_is_refused_before_solving(tmp_path, monkeypatch):
    p = problem()
    (tmp_path / "file").touch()
    monkeypatch.setattr(score_file, "_solve", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="^path's parent must be a folder that can be written to"):
        Influence(p.net, p.train, solver=Direct()).write_scores(tmp_path / "file" / "s.h5", p.test)


@pytest.mark.parametrize("finished", [True, False])
def test_a_file_of_other_inputs_is_refused_by_name(finished, tmp_path, small_blocks, monkeypatch):
    p, path = problem(), tmp_path / "s.h5"
    net, train, test = p.net, p.train, p.test
    with monkeypatch.context() as patch:
        if finished:
            Influence(net, train, solver=Direct()).write_scores(path, test)
        else:
            patch.setattr(score_file, "_multiply", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                Influence(net, train, solver=Direct()).write_scores(path, test)
    x = test.x.copy()
    x[3, 1] += 1e-9
    measured = {"measurement": lambda _, output: output[:, 1]}
    for names, train_, test_, options, asked in (
        ("damping", train, test, {"damping": 0.1}, {}),
        ("damping", train, test, {"damping": 1e-9}, {}),  # damping is compared to the last bit
        ("solver", train, test, {"solver": CG()}, {}),
        ("train", train.without([5]), test, {}, {"rows": range(59)}),
        ("test", train, Examples(x, test.y), {}, {}),
        ("rows", train, test, {}, {"rows": range(59)}),
        ("dtype", train, test, {}, {"dtype": "float64"}),
        ("losses of the first test examples, another measurement", train, test, {}, measured),
    ):
        influence = Influence(net, train_, **{"solver": Direct(), **options})
        with pytest.raises(ValueError, match="^path must be free or hold scores of the same input"):
            influence.write_scores(path, test_, **asked)
        message = rf"with another (.*, another )?{names}(, another .*)?; give another path"
        with pytest.raises(ValueError, match=message):
            influence.write_scores(path, test_, **asked)
    net.theta = p.theta + 1e-9
    with pytest.raises(ValueError, match="with another weights; give another path, or delete it"):
        Influence(net, train, solver=Direct()).write_scores(path, test)
    other = through_keras(problem())
    with pytest.raises(ValueError, match="with another net"):
        Influence(other.net, train, solver=Direct()).write_scores(path, test)


def test_a_path_where_something_else_is(tmp_path):
    p = problem()
    influence = Influence(p.net, p.train, solver=Direct())
    with pytest.raises(ValueError, match=f"^path must be a file, got the folder {tmp_path}\\.$"):
        influence.write_scores(tmp_path, p.test)
    for name in ("s.h5", "t.h5.partial"):
        (tmp_path / name).write_bytes(b"no scores")
        with pytest.raises(
            ValueError, match="^path must be free or hold scores.* got .*cannot be read"
        ):
            influence.write_scores(tmp_path / name.removesuffix(".partial"), p.test)
        assert (tmp_path / name).read_bytes() == b"no scores"


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    p = problem()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    said = r"^path must be where [\d,]{6} bytes can be written, got .*s.h5.partial where 1,000 are"
    with pytest.raises(ValueError, match=said):
        Influence(p.net, p.train).write_scores(tmp_path / "s.h5", p.test)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float16"}, ValueError, "^dtype must be 'float32' or 'float64', got 'float16'"),
        ({"rows": [3, 1]}, ValueError, "^rows must increase, got 3 before 1; use np.sort"),
        ({"rows": [60]}, IndexError, r"^rows must lie in \[0, 60\), got 60"),
        ({"rows": []}, ValueError, "^rows must be a one-dimensional, non-empty list"),
        ({"test": (1, 2)}, TypeError, r"^test must be Examples\(x, y\), got tuple"),
        ({"measurement": 3}, TypeError, "^measurement must be"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(options, error, message, tmp_path, monkeypatch):
    p = problem()
    influence = Influence(p.net, p.train)
    monkeypatch.setattr(
        "influence.scores.inverse.Inverse.solve", lambda *_: pytest.fail("the work had begun")
    )
    with pytest.raises(error, match=message):
        influence.write_scores(tmp_path / "s.h5", **{"test": p.test, **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("factor", "same"), [(1 + 1e-4, True), (1 + 1e-2, False)])
def test_the_probe_may_round_otherwise(factor, same, tmp_path, monkeypatch):
    p = problem()
    influence = Influence(p.net, p.train, solver=Direct())
    path = influence.write_scores(tmp_path / "s.h5", p.test)
    losses = type(p.net).losses
    monkeypatch.setattr(type(p.net), "losses", lambda *given: losses(*given) * factor)
    if same:
        assert influence.write_scores(path, p.test) == path
        return
    with pytest.raises(ValueError, match="with another losses of the first test examples"):
        influence.write_scores(path, p.test)


def test_another_training_loss_is_another_file(tmp_path):
    p = ridge()
    other = GenericNeuralNet(p.net.model, keras.losses.Huber(0.5))
    asked = {"measurement": lambda _, output: output[:, 0]}
    options = {"solver": Direct(), "damping": 1.0}
    path = Influence(p.net, p.train, **options).write_scores(tmp_path / "s.h5", p.test, **asked)
    with pytest.raises(ValueError, match="with another losses of the first training rows"):
        Influence(other, p.train, **options).write_scores(path, p.test, **asked)
