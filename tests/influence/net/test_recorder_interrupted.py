"""Tests of the record of a training that was interrupted, or of another training."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from influence import History, Recorder
from influence.net import history as module
from influence.solvers.plan import training_damping
from tests.influence.net.trainings import BATCH, Stop, built, fit, rows, trained


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the history of a training without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, lambda recorder: [recorder])
    return History.load(folder)


@pytest.mark.parametrize(
    ("before", "stop"),
    [
        ("recorder", (2, 3)),  # stopped in the middle of an epoch
        ("recorder", (1, None)),  # the epoch is recorded, but Keras has no backup of it
        ("backup", (1, None)),  # Keras has a backup of the epoch, but the epoch is not recorded
        ("backup", (0, 2)),  # stopped before anything is stored
    ],
)
def test_goes_on_with_backup_and_restore_to_the_same_arrays(tmp_path, whole, before, stop):
    def callbacks(recorder, *more):
        backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
        pair = [recorder, backup] if before == "recorder" else [backup, recorder]
        return [pair[0], *more, pair[1]]

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", lambda recorder: callbacks(recorder, Stop(*stop)))
    fit(tmp_path / "run", callbacks)
    found = History.load(tmp_path / "run")
    np.testing.assert_array_equal(found.epochs, [1, 2, 3, 4])
    for name in ("margins", "losses", "thetas", "steps", "checkpoints", "trained"):
        np.testing.assert_array_equal(getattr(found, name), getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(found.rates, whole.rates)
    assert found.batch_size == BATCH and found.notes == ()


def test_a_damaged_last_file_is_left_out_and_recorded_again(tmp_path):
    model = fit(tmp_path, lambda recorder: [recorder], epochs=3)
    before = History.load(tmp_path)
    last = module.epoch_file(tmp_path, 3)
    last.write_bytes(last.read_bytes()[:100])
    (tmp_path / "epoch-00004.npzabc.partial").write_bytes(b"x")
    found = History.load(tmp_path)
    np.testing.assert_array_equal(found.epochs, [1, 2])
    np.testing.assert_array_equal(found.margins, before.margins[:2])
    assert found.notes[0].startswith("The file of the last epoch, 3, was damaged")
    fit(tmp_path, lambda recorder: [recorder], model=model, initial_epoch=3)
    again = History.load(tmp_path)
    np.testing.assert_array_equal(again.epochs, [1, 2, 3, 4])
    np.testing.assert_array_equal(again.margins[:3], before.margins)


def test_a_damaged_file_before_the_last_is_refused(tmp_path):
    model = fit(tmp_path, lambda recorder: [recorder], epochs=3)
    module.epoch_file(tmp_path, 2).write_bytes(b"no")
    with pytest.raises(ValueError, match="^history must have undamaged files before the last"):
        History.load(tmp_path)
    with pytest.raises(ValueError, match="^folder must have every epoch before 3"):
        fit(tmp_path, lambda recorder: [recorder], model=model, initial_epoch=3)
    module.epoch_file(tmp_path, 2).unlink()
    with pytest.raises(ValueError, match="^history must have every epoch, got .* without epoch 2"):
        History.load(tmp_path)


def other_rows():
    x, y = rows()
    return x, np.roll(y, 1)


@pytest.mark.parametrize(
    ("train", "model", "message"),
    [
        (other_rows(), {}, "of one with other rows or labels"),
        (rows(1), {}, "of one with other rows or labels"),
        (rows(), {"units": 4}, "of one with other layers or weights' shapes"),
        (rows(), {"activation": "sigmoid"}, "of one with other layers or weights' shapes"),
        (rows(), {"optimizer": "adam"}, r"of one with other optimiser \(SGD\)"),
        (rows(), {"loss": "mse", "activation": "tanh"}, "of one with other"),
    ],
)
def test_a_folder_of_another_training_is_refused_before_it_begins(first, train, model, message):
    x, y = train
    other, watch = built(**model), Stop(0, 0)
    y = np.eye(3)[y] if model.get("loss") == "mse" else y
    with pytest.raises(ValueError, match=f"^folder must be of this training, got .* {message}"):
        other.fit(x, y, verbose=0, callbacks=[Recorder(first[0].folder, (x, y)), watch])


def test_the_same_training_from_other_weights_or_rates_is_refused(first):
    folder, model = first[0].folder, built()
    model.set_weights([w + 0.1 for w in model.get_weights()])
    with pytest.raises(ValueError, match="^folder must be .* began from other weights"):
        trained(folder, model, rows())
    slower = built(optimizer=keras.optimizers.SGD(0.01, momentum=0.5))
    with pytest.raises(ValueError, match="^folder must be .* other settings of the optimiser"):
        trained(folder, slower, rows())


def test_the_same_training_once_more_replaces_the_record(tmp_path):
    fit(tmp_path, lambda recorder: [recorder], epochs=3)
    fit(tmp_path, lambda recorder: [recorder], epochs=2)
    np.testing.assert_array_equal(History.load(tmp_path).epochs, [1, 2])


def test_going_on_from_other_weights_is_said(tmp_path):
    model = fit(tmp_path, lambda recorder: [recorder], epochs=2)
    model.set_weights([w + 0.1 for w in model.get_weights()])
    fit(tmp_path, lambda recorder: [recorder], model=model, initial_epoch=2, epochs=3)
    (note,) = History.load(tmp_path).notes
    assert "epoch 3 began from other weights" in note


def test_a_record_that_begins_later_says_so(tmp_path):
    model = fit(tmp_path / "first", lambda recorder: [], epochs=2)
    fit(tmp_path / "later", lambda recorder: [recorder], model=model, initial_epoch=2)
    found = History.load(tmp_path / "later")
    np.testing.assert_array_equal(found.epochs, [3, 4])
    np.testing.assert_array_equal(found.checkpoints, [2, 3, 4])
    assert found.notes == ("The record begins after 2 epochs of the training.",)


def test_a_record_after_other_steps_gives_no_damping(tmp_path):
    """Check a second record of the same model, which begins when the optimiser has made 12 steps.

    `training_damping` must then take T = 18 from the optimiser's own count of steps.
    """
    x, y = rows()
    model = built()
    whole, _ = trained(tmp_path / "whole", model, (x, y), epochs=2)
    assert whole.is_whole and training_damping(model, whole) == whole.damping()
    later, _ = trained(tmp_path / "later", model, (x, y), epochs=1)
    assert not later.is_whole
    assert later.notes == ("The record begins after 12 steps of the optimiser.",)
    assert training_damping(model, later) == pytest.approx(0.5 / (0.1 * 18), rel=1e-6)
