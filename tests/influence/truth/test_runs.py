import os
from contextlib import nullcontext

import keras
import numpy as np
import pytest

from influence import Examples, GenericNeuralNet, MulticlassLogisticRegression, leave_one_out
from influence.truth import runs
from influence.truth.leave_out import leave_group_out
from influence.truth.proximal import proximal_response
from tests.influence.truth.test_leave_out import draws, dropping, interrupted_problem


class Unregistered(keras.Model):
    """What the decorator register_keras_serializable would cure."""

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
    """One test, so that processes start once: TensorFlow takes them seconds."""
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "1")  # in both, or last bits may differ
    p, options = interrupted_problem("newton")
    net, train = dropping()
    for work in (
        lambda n: leave_one_out(p.net, p.train, p.test, range(9), num_processes=n, **options),
        lambda n: leave_one_out(
            net, train, train, [0, 1, 2], method="fit", fit=draws, num_processes=n
        ),
        # In closed form: by the tape it takes seconds to trace, in every process.
        lambda n: proximal_response(
            p.net, p.train, p.test, [3, 1, 4], damping=0.5, block=2, num_processes=n
        ),
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
    fit = lambda *_: None  # noqa: E731
    with pytest.raises(ValueError, match=message) as caught:
        leave_one_out(*given, [0], fit=fit, num_processes=2)
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
        lambda: leave_one_out(*given, [0], num_processes=2),
        lambda: leave_group_out(*given, [[0]], num_processes=2),
        lambda: proximal_response(*given, [0], damping=0.1, num_processes=2),
    ):
        with pytest.raises(RuntimeError, match="^2 for GenericNeuralNet"):
            work()


def test_no_more_processes_than_parts_share_the_cores(monkeypatch):
    p, options = interrupted_problem("newton")
    shared = []
    monkeypatch.setattr(runs, "check_processes", lambda *_: None)
    monkeypatch.setattr(runs, "_cores_shared", lambda n: shared.append(n) or nullcontext())
    leave_one_out(p.net, p.train, p.test, [0, 1], num_processes=2, **(options | {"block": 2}))
    assert shared == [1]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_nothing_is_sent_where_nothing_need_be(num_processes, monkeypatch):
    """One process here, and one that a backend says is enough."""
    monkeypatch.setattr(runs.joblib, "effective_n_jobs", lambda _: 1)
    monkeypatch.setattr(runs.joblib, "Parallel", lambda **_: pytest.fail("sent"))
    runs.check_processes(num_processes, *unregistered())


def test_the_reason_is_one_sentence():
    text = '\n"""\nTraceback (most recent call last):\n  File "a.py"\n'
    for body, expected in [
        ("TypeError: Could not locate class 'A'. Make sure ...\n\nconfig={}\n\"\"\"",
         "TypeError: Could not locate class 'A'"),
        ("NotImplementedError: \nObject A was created. By\n    return config\n",
         "NotImplementedError: Object A was created"),
        ("_pickle.PicklingError: no way\n", "PicklingError: no way"),
    ]:  # fmt: skip
        outer = RuntimeError("the pool broke")
        outer.__cause__ = ImportError(text + body)
        assert runs._reason(outer) == expected
    assert runs._reason(KeyError("a")) == "KeyError: 'a'"


def test_changes_and_losses_are_of_the_same_rounding():
    """In float32 a change of 1e-7 is seen only if both losses are computed alike."""
    rng = np.random.default_rng(0)
    net = MulticlassLogisticRegression(400, 3, dtype="float32")
    net.theta = rng.standard_normal(1200) / 20
    rows = Examples(rng.standard_normal((7, 400)).astype(np.float32), np.arange(7) % 3)
    task = runs.Task(net, rows, rows, None, 1, None)
    thetas = np.repeat(net.theta[:, None], 3, axis=1)
    np.testing.assert_array_equal(task.changes(thetas), 0)
    assert task.losses().shape == (7,) and task.losses(thetas).shape == (7, 3)
