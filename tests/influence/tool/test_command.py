import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from influence import History
from influence.__main__ import main
from influence.common import progress
from influence.tool.request import Reading, Request, from_toml, to_toml
from tests.influence import recorded
from tests.influence.tool.conftest import softmax_model

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = "<script>alert(1)</script>\"'&\u202e\x07=1+1"


@pytest.fixture(scope="module")
def place(problem, tmp_path_factory):
    """Return a folder with saved models and their data."""
    folder = tmp_path_factory.mktemp("place")
    problem.model.save(folder / "m.keras")
    (x, y), (x_test, y_test) = problem.train, problem.test
    np.savez(folder / "d.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    softmax_model(2 * problem.theta).save(folder / "unfinished.keras")
    raw = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    raw.save(folder / "raw.keras")
    return folder


@pytest.fixture
def ask(place, tmp_path, monkeypatch, capsys):
    """Give `ask(*words)`. It runs a command and returns (status, standard output, error output)."""
    monkeypatch.chdir(place)
    # Otherwise a slow machine would show progress bars.
    monkeypatch.setattr(progress, "_DELAY", 1e6)

    def run(*words, out=tmp_path / "out"):
        words = [*map(str, words), *(["--out", str(out)] if out else [])]
        if words[0] != "replay":
            words += ["--index", str(tmp_path / "index")]
        status = main(words)
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def without_bars(text):
    """Return the text without progress bars, which a slow machine shows."""
    return re.sub(r"\r[^\r\n]*", "", text)


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_explain_writes_a_page_a_table_and_a_run(ask, problem, tmp_path):
    status, out, err = ask("explain", "m.keras", "d.npz", "--test-rows", 2, 5, "--top", 3)
    assert (status, err) == (0, "")
    assert "The page is" in out and "helped most" in out
    assert sorted(os.listdir(tmp_path / "out")) == ["explain.csv", "explain.html", "run.toml"]
    rows = rows_of(tmp_path / "out" / "explain.csv")
    expected = problem.risk.one_step_changes(problem.theta, problem.measured, np.arange(45))
    for row in rows:
        change = expected[int(row["test_row"]), int(row["train_row"])]
        assert float(row["change_if_removed"]) == pytest.approx(change, rel=1e-4)


def test_a_replay_gives_the_same_numbers(ask, tmp_path):
    ask("explain", "m.keras", "d.npz", "--wrong", 2, "--top", 3)
    status, _, err = ask("replay", tmp_path / "out" / "run.toml", out=tmp_path / "again")
    assert (status, err) == (0, "")
    assert rows_of(tmp_path / "again/explain.csv") == rows_of(tmp_path / "out/explain.csv")
    first, second = ((tmp_path / f / "run.toml").read_text() for f in ("out", "again"))
    assert first == second


def test_a_replay_refuses_other_files(ask, problem, place, tmp_path):
    np.savez(tmp_path / "e.npz", x=problem.train[0], y=problem.train[1])
    ask("audit", "m.keras", tmp_path / "e.npz")
    np.savez(tmp_path / "e.npz", x=problem.train[0] + 1, y=problem.train[1])
    status, _, err = ask("replay", tmp_path / "out" / "run.toml")
    assert status == 2 and "but data changed since" in err


def test_audit_and_the_edited_file_go_together(ask, problem, tmp_path):
    assert ask("audit", "m.keras", "d.npz")[0] == 0
    path = tmp_path / "out" / "audit.csv"
    rows = rows_of(path)
    assert rows[0]["row"] == "7"
    rows[0]["new_label"] = str(problem.true[7])
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    status, out, _ = ask("verify", "m.keras", "d.npz", "--csv", path, "--json",
                         out=tmp_path / "verified")  # fmt: skip
    found = json.loads(out)
    assert status == 0 and found["question"] == "correction"
    assert found["rows"][0]["row"] == 7
    labels = problem.risk.y.copy()
    labels[7] = problem.true[7]
    refitted = problem.risk.on(problem.risk.features, labels).minimum(problem.theta)
    before, after = (problem.measured.losses(t).mean() for t in (problem.theta, refitted))
    assert found["actual_gain"] == pytest.approx(before - after, rel=1e-3)
    assert set(found["files"]) == {"page", "csv", "run"}


@pytest.fixture(scope="module")
def recorded_place(place):
    """Return the folder with one more model and the record of its training."""
    recorded.train(place / "run", epochs=3, batch_size=16).save(place / "recorded.keras")
    x, y = recorded.rows()
    x_test, y_test = recorded.rows(9, seed=1)
    np.savez(place / "r.npz", x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    return place


def test_a_history_says_when_rows_were_learned(ask, recorded_place, tmp_path):
    asked = ("explain", "recorded.keras", "r.npz", "--test-rows", 2, "--history", "run")
    status, _, err = ask(*asked)
    assert (status, err) == (0, "")
    learned = History.load(recorded_place / "run").learned()
    found = rows_of(tmp_path / "out" / "explain.csv")
    assert found and all(int(r["learned_in_epoch"]) == learned[int(r["train_row"])] for r in found)
    page = (tmp_path / "out" / "explain.html").read_text()
    assert "learned in epoch" in page and "3 epochs by SGD" in page
    status, _, err = ask("replay", tmp_path / "out" / "run.toml", out=tmp_path / "again")
    assert (status, err) == (0, "")
    assert rows_of(tmp_path / "again" / "explain.csv") == found


def test_audit_takes_a_history(ask, recorded_place):
    assert ask("audit", "recorded.keras", "r.npz", "--history", "run")[0] == 0


def test_verify_trains_again_by_a_history(ask, recorded_place):
    words = ("verify", "recorded.keras", "r.npz", "--remove", 2, "--test-rows", 1, "--json")
    status, out, _ = ask(*words, "--history", "run")
    assert status == 0
    assert json.loads(out)["truth"].startswith("training again without the row")


def test_a_history_of_other_rows_is_refused(ask, recorded_place):
    status, _, err = ask("explain", "m.keras", "d.npz", "--history", "run")
    assert status == 2 and "train must have the 40 rows of the history" in err
    status, _, err = ask("explain", "m.keras", "d.npz", "--history", "d.npz")
    assert status == 2 and "--history must be a folder that influence.Recorder wrote" in err


def test_check_ends_with_1_if_numbers_should_not_be_trusted(ask):
    status, out, _ = ask("check", "m.keras", "d.npz")
    assert status == 0 and "stationary point" in out
    status, out, _ = ask("check", "unfinished.keras", "d.npz", "--json")
    assert status == 1
    found = json.loads(out)
    assert found["trusted"] is False
    assert found["alerts"][0]["headline"].startswith("Use the order of the rows, not the sizes.")


def test_index_is_used_by_the_next_question(ask, tmp_path, monkeypatch):
    plain = ask("explain", "m.keras", "d.npz", "--test-rows", 2, "--json")[1]
    assert not (tmp_path / "index").exists()
    status, out, _ = ask("index", "m.keras", "d.npz")
    assert status == 0 and "are kept in" in out
    names = {file.name.split("-")[0] for file in (tmp_path / "index").glob("*.npz")}
    assert names == {"plan", "matrix", "check"}
    from influence.curvature.operators import Curvature

    def forbidden(*_):
        raise AssertionError("the matrix is kept")

    monkeypatch.setattr(Curvature, "_formed", forbidden)
    again = ask("explain", "m.keras", "d.npz", "--test-rows", 2, "--json")[1]
    one, two = (json.loads(text)["rows"] for text in (plain, again))
    for a, b in zip(one, two, strict=True):
        assert a["train_row"] == b["train_row"]
        assert a["change_if_removed"] == pytest.approx(b["change_if_removed"], rel=1e-6)


def test_an_altered_index_is_refused(ask, tmp_path):
    ask("index", "m.keras", "d.npz")
    (file,) = (tmp_path / "index").glob("matrix-*.npz")
    file.write_bytes(file.read_bytes()[:-40])
    status, _, err = ask("explain", "m.keras", "d.npz", "--test-rows", 2)
    assert status == 2 and file.name in err and "delete it" in err


def test_a_loss_can_be_given_as_a_function(ask, place):
    (place / "losses.py").write_text(
        "import keras\nl = keras.losses.SparseCategoricalCrossentropy(from_logits=True)\n"
        "def loss(y, z):\n    return l.call(y, z)\n"
    )
    status, out, _ = ask("check", "raw.keras", "d.npz", "--loss", "losses.py:loss", "--json")
    # The model has random weights, so the check fails, and the status is 1.
    assert status == 1 and json.loads(out)["rows"]


def test_verify_says_how_far_the_scores_hold(ask, problem):
    status, out, _ = ask("verify", "m.keras", "d.npz", "--remove", 4, "--test-rows", 5, "--json")
    found = json.loads(out)
    rows = [row["train_row"] for row in found["rows"]]
    actual = problem.risk.actual_changes(problem.theta, problem.measured, rows)[5]
    np.testing.assert_allclose([row["actual"] for row in found["rows"]], actual, rtol=1e-3)
    assert status == 0 and found["agreement"]["all"]["pearson"] > 0.99


def test_an_unfinished_run_is_continued(ask, tmp_path, monkeypatch):
    import influence.tool.command as command

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(command.Answer, "to_html", stop)
        words = ("verify", "m.keras", "d.npz", "--remove", 4, "--test-rows", 5)
        status, _, err = ask(*words)
        assert status == 130 and "continues where this stopped" in err
    kept = {file.name.split("-")[0] for file in (tmp_path / "out/checkpoints").glob("*.npz")}
    assert {"refits", "plan", "matrix", "check"} <= kept
    import influence.truth.proximal as proximal

    with monkeypatch.context() as context:
        context.setattr(proximal, "_proximal_block", stop)
        assert ask(*words)[0] == 0  # computing a refit again would call `stop` and fail
    assert not (tmp_path / "out/checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], None),
        (["what"], "the command comes first and must be one of explain, audit, verify, check"),
        (["explain"], "the following arguments are required: MODEL, DATA"),
        (["explain", "m.keras", "gone.npz"], "DATA must be an .npz file"),
        (["explain", "gone.keras", "d.npz"], "MODEL must be a file of a saved model"),
        (["explain", "m.keras", ""], "DATA must be followed by a value, got ''"),
        (["explain", "m.keras", "d.npz", "--test-rows", "99"], "--test-rows must lie in [0, 12)"),
        (["explain", "m.keras", "d.npz", "--top", "0"], "--top must be at least 1, got 0"),
        (["explain", "m.keras", "d.npz", "--top", "x"], "argument --top: invalid int value"),
        (["explain", "m.keras", "d.npz", "--wrong", "1", "--test-rows", "2"], "not allowed with"),
        (["explain", "m.keras", "d.npz", "--damping", "-1"], "--damping must be a number >= 0"),
        (["explain", "m.keras", "d.npz", "--batch-size", "0"], "--batch-size must be a positive"),
        (["explain", "m.keras", "d.npz", "--scale", "1", "2", "3"], "--scale must be a factor"),
        (["explain", "m.keras", "d.npz", "--class-weight", "a"], "--class-weight must be like"),
        (["explain", "m.keras", "d.npz", "--tset", "x"], "unrecognized arguments: --tset"),
        (["audit", "m.keras", "d.npz", "--wrong", "3"], "unrecognized arguments: --wrong"),
        (["verify", "m.keras", "d.npz", "--remove", "1"], "--remove must be at least 2, got 1"),
        (["verify", "m.keras", "d.npz", "--csv", "gone.csv"], "--csv must be a file that audit"),
        (["verify", "m.keras", "d.npz", "--fit", "gone:f"], "--fit must be module:function"),
        (["check", "raw.keras", "d.npz"], "--loss must be"),
        (["check", "bad.py:fails", "d.npz"], "MODEL must be a function that returns, got"),
        (["replay", "gone.toml"], "replay must get a run.toml, got 'gone.toml' (No such file"),
        (["replay", "d.npz"], "replay must get a run.toml, got 'd.npz'"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(ask, place, words, says):
    (place / "bad.py").write_text("def fails():\n    return {}['key']\n")
    status, out, err = ask(*words) if words else (main([]), "", "")
    if says is None:
        assert status == 0
        return
    assert status == 2 and out == ""
    assert says in err and err.count("\n") == 1 and err.startswith("python -m influence")


def test_an_output_that_cannot_be_written_has_its_own_status(ask, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = ask("check", "m.keras", "d.npz", out=tmp_path / "file" / "out")
    assert status == 74 and "could not be written" in err and err.count("\n") == 1


def test_run_toml_keeps_every_option_and_hostile_text(tmp_path):
    reading = Reading(target=HOSTILE, drop=("a", HOSTILE), class_weight={HOSTILE: 2.5, "b": 1.0},
                      image_size=(3, 4), scale=(0.5, -1.0))  # fmt: skip
    request = Request(command="explain", model=HOSTILE, data="d", test="t\\n", reading=reading,
                      asked={"rows": [1, 2], "top": 3}, damping=1e-30, check=False)  # fmt: skip
    path = tmp_path / "run.toml"
    path.write_text(to_toml(request, {"model": "ab"}), encoding="utf-8")
    found = from_toml(path)
    assert found.reading == reading and found.model == HOSTILE and found.test == "t\\n"
    assert dict(found.asked) == {"rows": [1, 2], "top": 3}
    assert found.damping == 1e-30 and found.check is False and found.content == {"model": "ab"}
    path.write_text('command = "rm"\nmodel = "a"\ndata = "b"\n')
    with pytest.raises(ValueError, match="replay must get a command of .*, got 'rm'"):
        from_toml(path)
    path.write_text('command = "explain"\nmodel = "a"\ndata = "b"\nshell = "c"\n')
    with pytest.raises(ValueError, match="replay must get a run.toml that a run wrote"):
        from_toml(path)


def test_hostile_names_stay_text_in_page_and_csv(ask, problem, tmp_path):
    x, y = problem.train
    names = np.array([HOSTILE] * 45)
    np.savez(tmp_path / "h.npz", x=x, y=y, names=names, classes=["=cmd()", HOSTILE, "c" * 10**6])
    assert ask("audit", "m.keras", tmp_path / "h.npz")[0] == 0
    text = (tmp_path / "out" / "audit.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
    assert "\u202e" not in text and "\\u202e" in text and "\x07" not in text
    assert len(text) < 1_000_000
    rows = rows_of(tmp_path / "out" / "audit.csv")
    assert all(not row["label"].startswith("=") for row in rows)
    assert any(row["label"] == "'=cmd()" for row in rows)


def test_help_of_every_command_reads_in_a_terminal(capsys):
    for command in ("explain", "audit", "verify", "check", "index", "replay"):
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: python -m influence {command}")
        assert "Exit status" in text
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in ("explain", "audit", "verify", "check", "index", "replay"):
        assert f"  {command}" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("words", "status"),
    [(["--help"], 0), (["audit", "--help"], 0), (["audit", "--what"], 2), (["what"], 2)],
)
def test_help_and_wrong_usage_do_not_import_tensorflow(words, status):
    code = (
        "import sys; from influence.__main__ import main; status = main(sys.argv[1:]); "
        "print('tensorflow' in sys.modules); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == status, done.stderr
    assert done.stdout.endswith("False\n")


def test_the_public_names_import_tensorflow_only_when_they_are_used():
    code = (
        "import influence, sys\n"
        "assert 'tensorflow' not in sys.modules\n"
        "influence.measurements.margin\n"
        "for name in influence.__all__: getattr(influence, name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_command_is_a_process_with_clean_output(place, tmp_path):
    words = [sys.executable, "-m", "influence", "check", "m.keras", "d.npz", "--json"]
    words += ["--out", str(tmp_path / "o")]
    done = subprocess.run(words, cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0
    assert without_bars(done.stderr) == ""
    assert json.loads(done.stdout)["trusted"] is True


def test_the_installed_command_is_the_same(place):
    code = "import sys, influence_console as c; sys.argv = ['influence', '--help']; c.influence()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m influence COMMAND MODEL DATA")


@pytest.mark.slow
def test_ctrl_c_in_a_process_is_one_line_and_the_next_run_goes_on(place, tmp_path):
    words = [sys.executable, "-m", "influence", "verify", "m.keras", "d.npz", "--remove", "40"]
    words += ["--test-rows", "2", "--out", str(tmp_path / "o"), "--index", str(tmp_path / "i")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    how: dict = {"cwd": place, "env": environment, "stderr": subprocess.PIPE, "text": True}
    # Restore the default for SIGINT, because some shells let background processes ignore it.
    running = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **how,
    )
    checkpoints = tmp_path / "o" / "checkpoints"
    for _ in range(600):
        if list(checkpoints.glob("matrix-*.npz")) or running.poll() is not None:
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert without_bars(err) == "interrupted: the same command again continues where this stopped\n"
    kept = {file.name: file.stat().st_mtime_ns for file in checkpoints.glob("*.npz")}
    assert any(name.startswith("matrix-") for name in kept)
    done = subprocess.run(words, stdout=subprocess.PIPE, timeout=120, check=False, **how)
    assert (done.returncode, without_bars(done.stderr)) == (0, "")
    assert not checkpoints.exists() and (tmp_path / "o" / "verify.html").exists()


def test_audit_takes_test_rows_a_ranking_and_folds(ask, place, tmp_path):
    (place / "own.py").write_text(
        "import numpy as np\ndef fit(model, x, y):\n    model.fit(x, y, epochs=1, verbose=0)\n"
    )
    status, out, _ = ask("audit", "m.keras", "d.npz", "--test", "d.npz", "--json")
    found = json.loads(out)
    assert status == 0 and found["ranking"] == "margin"
    assert found["last_layer"]["held_out_loss"] > 0
    words = ("--folds", 3, "--fit", "own.py:fit", "--json")
    found = json.loads(ask("audit", "m.keras", "d.npz", *words)[1])
    assert found["ranking"] == "folds"
    assert all(row["folds"] is not None for row in found["rows"])
    assert (
        json.loads(ask("replay", tmp_path / "out" / "run.toml", "--json")[1])["ranking"] == "folds"
    )
    found = json.loads(ask("audit", "m.keras", "d.npz", "--ranking", "loss", "--json")[1])
    losses = [row["loss"] for row in found["rows"]]
    assert losses == sorted(losses, reverse=True)
    status, _, err = ask("audit", "m.keras", "d.npz", "--folds", 3)
    assert status == 2 and "--fit must be given with folds" in err


def test_verify_removes_groups(ask, place):
    (place / "own.py").write_text(
        "def fit(model, x, y):\n    model.fit(x, y, epochs=1, verbose=0)\n"
    )
    words = ("--groups", 4, "--group-size", 2, "--fit", "own.py:fit", "--test-rows", 1, "--json")
    status, out, _ = ask("verify", "m.keras", "d.npz", *words)
    found = json.loads(out)
    assert status == 0 and found["question"] == "groupverification"
    assert [row["drawn"] for row in found["rows"]] == ["chosen"] * 2 + ["random"] * 2
    assert ask("verify", "m.keras", "d.npz", "--group-size", 2)[0] == 2
