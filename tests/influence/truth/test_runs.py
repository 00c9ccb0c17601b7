import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from influence import (
    ContinuedOptions,
    Examples,
    GenericNeuralNet,
    MulticlassLogisticRegression,
    ProximalOptions,
    RefitOptions,
    RunOptions,
    continued_training,
    leave_group_out,
    leave_one_out,
    proximal_response,
)
from influence.truth import leave_out, runs
from tests.influence.problems import logistic, through_keras

ROOT = Path(__file__).resolve().parents[3]


def interrupted_problem():
    p = logistic("softmax", num_rows=30, num_inputs=3)
    # This unused layer changes the numbers in Keras' names of later layers. The names of cached
    # files must not depend on these numbers.
    keras.layers.Dense(1)
    return p


def refits(p, rows=range(9), **options):
    return leave_one_out(p.net, p.train, p.test, rows, RefitOptions(**{"block": 2, **options}))


def counting(monkeypatch, name):
    calls, refit = [], getattr(leave_out, name)
    monkeypatch.setattr(leave_out, name, lambda *given: calls.append(given[1]) or refit(*given))
    return calls


def same(got, expected):
    for name in ("change_if_removed", "rows", "gradient_norm", "passes", "converged"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 0}, "^block must be at least 1, got 0"),
        ({"batch_size": 0}, "^batch_size must be a positive integer or None, got 0"),
        ({"num_processes": 0}, "^num_processes must not be 0"),
    ],
)
@pytest.mark.parametrize("kind", [RunOptions, RefitOptions, ProximalOptions, ContinuedOptions])
def test_bad_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


# --- the cache -------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from influence.truth import leave_out
from tests.influence.truth.test_runs import interrupted_problem, refits

refit, done = leave_out._newton_block, []

def dying(*arguments):
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(1)
    return refit(*arguments)

leave_out._newton_block = dying
refits(interrupted_problem(), checkpoints=sys.argv[1])
"""


def test_a_killed_run_continues_and_ends_bit_for_bit(tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(folder)]
    killed = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(list(folder.iterdir())) == 3
    continues_bit_for_bit("newton", folder, 5 - 3, monkeypatch)


def test_an_interrupted_run_of_fits_continues_and_ends_bit_for_bit(tmp_path, monkeypatch):
    refit, done = leave_out._fit_block, []

    def interrupted(*arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return refit(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(leave_out, "_fit_block", interrupted)
        refits(interrupted_problem(), method="fit", checkpoints=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    continues_bit_for_bit("fit", tmp_path, 9 - 3, monkeypatch)


def continues_bit_for_bit(method, folder, num_left, monkeypatch):
    p = interrupted_problem()
    calls = counting(monkeypatch, f"_{method}_block")
    uninterrupted = refits(p, method=method)
    for expected in (num_left, 0):  # the second run finds all blocks in the cache
        calls.clear()
        continued = refits(p, method=method, checkpoints=folder)
        assert len(calls) == expected
        same(continued, uninterrupted)


def test_only_blocks_with_other_groups_are_computed_again(tmp_path, monkeypatch):
    p, groups = interrupted_problem(), [[1, 2], [3], [5, 4], [7], [0]]
    calls, options = (
        counting(monkeypatch, "_newton_block"),
        RefitOptions(block=2, checkpoints=tmp_path),
    )
    leave_group_out(p.net, p.train, p.test, groups, options)
    assert len(calls) == 3
    groups[3] = [7, 8]
    leave_group_out(p.net, p.train, p.test, groups, options)
    assert len(calls) == 4


def test_results_cached_for_other_inputs_are_not_used(tmp_path, monkeypatch):
    calls = counting(monkeypatch, "_fit_block")
    p = interrupted_problem()
    x, y = p.train.x, p.train.y

    def fit(net, examples):
        net.theta = net.theta + 1

    def run(net=p.net, train=p.train, test=p.test, key="plus one", **options):
        calls.clear()
        options = RefitOptions(method="fit", fit=fit, key=key, checkpoints=tmp_path, **options)
        leave_one_out(net, train, test, [0], options)
        return len(calls)

    assert run() == 1
    assert run() == 0
    moved = x.copy()
    moved[25, 0] += 1e-9
    relabelled = y.copy()
    relabelled[25] = (relabelled[25] + 1) % 3
    assert run(train=Examples(moved, y)) == 1
    assert run(train=Examples(x, relabelled)) == 1
    assert run(test=p.test.take([0, 1])) == 1
    assert run(start=np.zeros(9)) == 1
    assert run(key="plus two") == 1
    assert run(batch_size=7) == 1
    assert run(tolerance=1.0) == 1
    weaker = logistic("softmax", num_rows=30, num_inputs=3, weight_decay=0.02)
    weaker.net.theta = p.theta
    assert run(net=weaker.net) == 1
    assert run(net=through_keras(p).net) == 1
    theta = p.theta
    p.net.theta = theta + 1e-12
    assert run() == 1
    p.net.theta = theta
    assert run() == 0


def test_frozen_weights_and_losses_are_part_of_the_name(tmp_path, monkeypatch):
    calls = counting(monkeypatch, "_fit_block")
    dense = (keras.layers.Dense(units, dtype="float64") for units in (2, 1))
    model = keras.Sequential([keras.Input((2,), dtype="float64"), *dense])
    model.layers[0].trainable = False
    examples = Examples(np.random.default_rng(0).standard_normal((5, 2)), np.arange(5.0))
    options = RefitOptions(fit=lambda *_: None, key="none", checkpoints=tmp_path)

    def run(loss):
        calls.clear()
        leave_one_out(GenericNeuralNet(model, loss), examples, examples, [0], options)
        return len(calls)

    assert run(keras.losses.Huber(delta=0.5)) == 1
    assert run(keras.losses.Huber(delta=0.5)) == 0
    assert run(keras.losses.Huber(delta=0.7)) == 1  # the loss has the same name but another delta
    model.layers[0].bias.assign([0.5, 0.5])
    assert run(keras.losses.Huber(delta=0.5)) == 1


def dropping():
    """Return (net, examples). The model draws random numbers in training."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dropout(0.5), keras.layers.Dense(1)]
    rng = np.random.default_rng(0)
    net = GenericNeuralNet(keras.Sequential([keras.Input((6,)), *layers]), "mse")
    examples = Examples(rng.standard_normal((5, 6)), rng.standard_normal(5))
    return net, examples


def draws(net, examples):
    """Stand for a fit: move theta by a random number."""
    net.theta = net.theta + float(tf.reduce_sum(net.model(np.ones((4, 6)), training=True)))


def test_what_a_fit_draws_depends_on_no_other_refit(tmp_path):
    net, train = dropping()
    state = [variable.numpy() for variable in net.model.variables]

    def run(rows, checkpoints=None):
        options = RefitOptions(method="fit", fit=draws, key="draws", checkpoints=checkpoints)
        return leave_one_out(net, train, train, rows, options)

    expected = run([0, 1, 2])
    for after, before in zip(net.model.variables, state, strict=True):
        np.testing.assert_array_equal(after.numpy(), before)
    backwards = run([2, 1, 0])
    np.testing.assert_array_equal(backwards[:], expected[:, ::-1])
    run([1], tmp_path)  # store the refit of row 1, as an interrupted run would
    same(run([0, 1, 2], tmp_path), expected)
    # This call draws random numbers, so the model's next ones differ, and stored refits do not fit.
    net.model(np.ones((4, 6)), training=True)
    assert np.abs(run([0, 1, 2], tmp_path)[:] - expected[:]).min() > 1e-3


# --- worker processes ------------------------------------------------------------------------


class Unregistered(keras.Model):
    """A model class without the decorator register_keras_serializable."""

    def __init__(self, width):
        super().__init__(dtype="float64")
        self.last = keras.layers.Dense(width, dtype="float64")

    def call(self, x):
        return self.last(x)


def unregistered():
    model = Unregistered(1)
    rng = np.random.default_rng(0)
    examples = Examples(rng.standard_normal((6, 3)), rng.standard_normal(6))
    model(examples.x)
    return GenericNeuralNet(model, "mse"), examples


@pytest.mark.slow
def test_other_processes_give_the_same_bits_or_say_why_they_cannot(monkeypatch):
    """Compare results of one and two processes, and check the error for a net that cannot be sent.

    All is in one test, because TensorFlow takes seconds to start in each process.
    """
    # Use one thread in every process. Otherwise the last bits may differ.
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "1")
    p, (net, train) = interrupted_problem(), dropping()
    given = p.net, p.train, p.test, [3, 1, 4]
    for work in (
        lambda n: refits(p, num_processes=n),
        lambda n: leave_one_out(
            net, train, train, [0, 1, 2], RefitOptions(method="fit", fit=draws, num_processes=n)
        ),
        # The net of this call has closed forms. With a net without them, every process would need
        # seconds to trace TensorFlow functions.
        lambda n: proximal_response(*given, ProximalOptions(block=2, num_processes=n), damping=0.5),
    ):
        one, two = work(1), work(2)
        np.testing.assert_array_equal(two[:], one[:])
        np.testing.assert_array_equal(two.gradient_norm, one.gradient_norm)
    net, examples = unregistered()
    given = net, examples, examples
    monkeypatch.setattr(runs, "run", lambda *_: pytest.fail("the work had begun"))
    message = (
        "^num_processes must be 1 for a net that another process cannot rebuild, got 2 "
        r"\(.*\); give a model class of your own the decorator "
        "keras.saving.register_keras_serializable and a get_config"
    )
    with pytest.raises(ValueError, match=message) as caught:
        leave_one_out(*given, [0], RefitOptions(fit=lambda *_: None, num_processes=2))
    assert "Error: " in str(caught.value) and "Traceback" not in str(caught.value)


def test_processes_share_the_cores_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(runs.joblib, "cpu_count", lambda: 6)
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    for num_processes, threads in ((1, None), (2, "3"), (9, "1")):
        with runs._cores_shared(num_processes):
            assert os.environ.get("TF_NUM_INTRAOP_THREADS") == threads
        assert "TF_NUM_INTRAOP_THREADS" not in os.environ
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "5")
    with runs._cores_shared(2):
        assert os.environ["TF_NUM_INTRAOP_THREADS"] == "5"
    assert os.environ["TF_NUM_INTRAOP_THREADS"] == "5"


def test_every_way_of_retraining_tries_its_processes_before_any_work(monkeypatch):
    def tried(num_processes, net, *_):
        raise RuntimeError(f"{num_processes} for {type(net).__name__}")

    monkeypatch.setattr(runs, "check_processes", tried)
    monkeypatch.setattr(runs, "run", lambda *_: pytest.fail("the work had begun"))
    net, examples = unregistered()
    given = net, examples, examples
    for work in (
        lambda: leave_one_out(*given, [0], RefitOptions(num_processes=2)),
        lambda: leave_group_out(*given, [[0]], RefitOptions(num_processes=2)),
        lambda: proximal_response(*given, [0], ProximalOptions(num_processes=2), damping=0.1),
        lambda: continued_training(
            *given, [0], ContinuedOptions(num_processes=2), steps=1, rate=0.1
        ),
    ):
        with pytest.raises(RuntimeError, match="^2 for GenericNeuralNet"):
            work()


def test_no_more_processes_than_parts_share_the_cores(monkeypatch):
    shared = []
    monkeypatch.setattr(runs, "check_processes", lambda *_: None)
    monkeypatch.setattr(runs, "_cores_shared", lambda n: shared.append(n) or nullcontext())
    refits(interrupted_problem(), [0, 1], num_processes=2)
    assert shared == [1]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_nothing_is_sent_where_nothing_need_be(num_processes, monkeypatch):
    """Check that a net that cannot be pickled is accepted if there is only one process.

    Either one process is asked for, or joblib gives only one of two.
    """
    monkeypatch.setattr(runs.joblib, "effective_n_jobs", lambda _: 1)
    monkeypatch.setattr(runs.joblib, "Parallel", lambda **_: pytest.fail("sent"))
    runs.check_processes(num_processes, *unregistered())


def test_the_reason_is_one_sentence():
    text = '\n"""\nTraceback (most recent call last):\n  File "a.py"\n'
    for body, expected in [
        ('TypeError: No class \'A\'. Make sure\n\nconfig={}\n"""', "TypeError: No class 'A'"),
        ("ValueError: \nA was created. By\n    return config\n", "ValueError: A was created"),
        ("_pickle.PicklingError: no way\n", "PicklingError: no way"),
    ]:
        outer = RuntimeError("the pool broke")
        outer.__cause__ = ImportError(text + body)
        assert runs._reason(outer) == expected
    assert runs._reason(KeyError("a")) == "KeyError: 'a'"


def test_changes_and_losses_are_of_the_same_rounding():
    """Check that changes are differences of losses that are computed in the same way, in float32.

    At the net's own theta, all changes must be exactly 0. Losses with different rounding would
    differ by about 1e-7, and hide changes of this size.
    """
    rng = np.random.default_rng(0)
    net = MulticlassLogisticRegression(400, 3, dtype="float32")
    net.theta = rng.standard_normal(1200) / 20
    rows = Examples(rng.standard_normal((7, 400)).astype(np.float32), np.arange(7) % 3)
    task = runs.Task(net, rows, rows)
    thetas = np.repeat(net.theta[:, None], 3, axis=1)
    np.testing.assert_array_equal(task.changes(thetas), 0)
    assert task.losses().shape == (7,) and task.losses(thetas).shape == (7, 3)
