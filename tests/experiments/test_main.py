import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments.__main__ import main
from experiments.harness import record, running
from experiments.harness.record import Record
from experiments.harness.running import Misuse

ROOT = Path(__file__).resolve().parents[2]
FILES = ["arrays.h5", "figure.pdf", "figure.png", "record.json"]


def _record(folder):
    return json.loads((Path(folder) / "record.json").read_text())


def test_a_run_leaves_a_whole_record_and_its_figures(fake, capsys):
    assert main(["fake", "--preset", "paper"]) == 0
    assert sorted(os.listdir("out/fake-paper")) == FILES  # a finished run leaves no checkpoints
    record = _record("out/fake-paper")
    assert record["experiment"] == "fake"
    assert record["preset"] == "paper"
    assert record["config"]["num"] == 9
    assert record["data"] == {"name": "mnist", "stand_in": False, "sha256": "5a" * 32}
    assert record["claims"] == [
        {
            "metric": "shift", "sentence": "The shift of the mean", "paper": 0.125, "words": "",
            "source": "figure 9", "kind": "paper", "low": -1.0, "high": 1.25, "value": 0.0,
            "interval": [], "holds": True, "verdict": "reproduced", "headline": "",
        }
    ]  # fmt: skip
    assert record["provenance"]["seed"] == 3
    assert record["provenance"]["resumed"] is False
    printed = capsys.readouterr().out
    assert "fake: running preset paper, seed 3" in printed
    assert "reproduced  0     0.125  -1 to 1.25  The shift of the mean\n" in printed
    assert "\n  1 check passed.\n" in printed
    assert f"out{os.sep}fake-paper: record.json" in printed


def test_the_run_is_seeded_from_its_config_alone(fake):
    np.random.seed(99)
    main(["fake", "--preset", "paper", "--out", "first"])
    np.random.seed(98)
    main(["fake", "--preset", "paper", "--out", "second"])
    first, second = Path("first/fake-paper"), Path("second/fake-paper")
    for name in ("arrays.h5", "figure.png", "figure.pdf"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    expected = np.random.RandomState(3).rand(9)  # keras.utils.set_random_seed also seeds NumPy
    np.testing.assert_array_equal(Record.load(first).arrays["values"], expected)


def test_exit_status_1_when_a_claim_falls_short(fake, capsys):
    assert main(["fake", "--preset", "paper", "--shift", "-1.5"]) == 1
    assert "not reproduced  -1.5" in capsys.readouterr().out


def test_exit_status_1_when_a_check_fails(fake, capsys):
    assert main(["fake", "--preset", "paper", "--shift", "1.125"]) == 1
    printed = capsys.readouterr().out
    assert "reproduced  1.12" in printed and "not reproduced" not in printed
    assert "0 checks passed, 1 FAILED: everywhere = 1.12, not within None to 1.0." in printed


def test_nan_falls_short(fake):
    assert main(["fake", "--preset", "paper", "--shift", "nan"]) == 1


def test_a_stand_in_is_checked_and_never_compared(fake, capsys):
    assert main(["fake", "--preset", "smoke", "--shift", "-5"]) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("fake: a mean")]
    mean = _record(next(Path("out").glob("*")))["metrics"]["mean"]
    assert line == f"fake: a mean of {mean:.3g} on digits, a stand-in for mnist; 1 check passed"
    # The line shows neither value nor band.
    assert "0.125" not in printed and "reproduced" not in printed
    assert main(["fake", "--preset", "smoke", "--shift", "5"]) == 1


def test_all_says_one_line_for_each_stand_in_and_what_was_not_done(fake, monkeypatch, capsys):
    names = {"first": "fake_figure", "second": "fake_figure"}
    monkeypatch.setattr(experiments, "MODULES", names)
    assert main(["all", "--preset", "smoke"]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("first: a mean of ") and second.startswith("second: a mean of ")
    assert last == (
        "2 ran, 2 checks passed, nothing compared with the paper; for that: "
        "python -m data fetch mnist, then python -m experiments fig2 --preset paper"
    )
    assert main(["all", "--preset", "paper"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 ran, 2 checks passed."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fig99"], "must be one of list, all, report, judge, fake, got 'fig99'"),
        (["absent"], "got 'absent'"),
        (["--preset", "smoke", "fake"], "the command comes first"),
        (["fake", "--preset", "smok"], "--preset must be one of smoke, standard, paper"),
        (["fake", "--preset"], "expected one argument"),
        (["fake", "--pre", "smoke"], "fake: unrecognised option --pre; did you mean --preset?"),
        (["fake", "--num-rows=3"], "unrecognised option --num-rows; did you mean --rows?"),
        (["fake", "--zz\n\x1b[31m"], "unrecognised option --zz \\x1b[31m (--help lists them)"),
        (["fake", "extra"], "unexpected: extra (--help lists the options)"),
        (["fake", "--num", "few"], "10: 'few'; it takes --num INT (--help lists the options)"),
        (["fake", "--num", "-1"], "fake: num must be positive, got -1. (--help"),
        (["fake", "--shift"], "Missing value for argument '--shift'"),
        (["fake", "--data-dir", ""], "--data-dir must be followed by a value, got ''"),
        (["fake", "--out="], "--out must be followed by a value, got ''"),
        (["report", "--out", ""], "--out must be followed by a value, got ''"),
        (["fake", "--data-dir", "modules/fake_figure.py"], "a folder, modules/fake_figure.py is a"),
        (["report", "--out", "modules/fake_figure.py"], "folder of records, modules/fake_figure"),
        (["fake", "--seed", "-1"], "seed must lie in [0, 4294967296), got -1"),
        (["fake", "--data-dir", "nowhere"], "--data-dir must be a folder, there is none"),
        (["all", "--num", "3"], "--num"),
        (["list", "fake"], "list takes no options"),
        (["report"], "out does not exist"),
        (["fake", "--redraw"], "--redraw needs a finished run"),
    ],
)
def test_exit_status_2_on_misuse(fake, capsys, arguments, message):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m experiments") and message in line
    assert not os.path.exists("out")


def test_a_module_says_in_which_dtype_it_wants_its_data(fake, monkeypatch):
    main(["fake", "--preset", "smoke"])
    monkeypatch.setattr(fake, "DTYPE", "float32", raising=False)
    main(["fake", "--preset", "smoke"])
    assert fake.data.dtypes == ["float64", "float32"]


def test_missing_data_is_misuse_and_never_replaced(fake, capsys):
    fake.data.found = False
    for preset in ("standard", "paper"):
        assert main(["fake", "--preset", preset]) == 2
        error = capsys.readouterr().err
        assert "put it somewhere" in error
        assert "--preset smoke" in error
    assert os.listdir("out") == []


def test_a_search_that_is_refused_is_misuse(fake, monkeypatch, capsys):
    def find(name, root=None):
        raise ValueError("INFLUENCE_DATA must be a folder")

    monkeypatch.setattr(fake.data, "find", find)
    assert main(["fake"]) == 2
    assert "INFLUENCE_DATA must be a folder" in capsys.readouterr().err


def test_a_stand_in_under_a_real_preset_is_refused(fake, monkeypatch, capsys):
    monkeypatch.setattr(fake, "DATA", "digits")
    assert main(["fake", "--preset", "paper"]) == 2
    assert "is a stand-in" in capsys.readouterr().err


@pytest.mark.parametrize(("found", "preset"), [(True, "standard"), (False, "smoke")])
def test_default_preset_follows_the_data(fake, capsys, found, preset):
    fake.data.found = found
    assert main(["fake"]) == 0
    assert _record(f"out/fake-{preset}")["data"]["stand_in"] is not found
    why = "found in some/folder" if found else "not found"
    assert f"fake: preset {preset}, as mnist is {why}\n" in capsys.readouterr().out


def test_stand_in_is_marked_in_figure_and_verdicts(fake, capsys, monkeypatch):
    drawn = []
    draw = fake.draw
    monkeypatch.setattr(fake, "draw", lambda record: drawn.append(draw(record)) or drawn[-1])
    main(["fake", "--preset", "smoke"])
    assert [text.get_text() for text in drawn[0].texts] == ["stand-in data: digits, not mnist"]
    assert "on digits, a stand-in for mnist" in capsys.readouterr().out
    main(["fake", "--preset", "paper"])
    assert drawn[1].texts == []
    assert "stand-in" not in capsys.readouterr().out


def test_changed_options_get_a_folder_of_their_own(fake):
    main(["fake", "--preset", "paper"])
    before = Path("out/fake-paper/record.json").read_bytes()
    main(["fake", "--preset", "paper", "--num", "4"])
    main(["fake", "--preset", "paper", "--rows", "1", "--num", "4"])
    main(["fake", "--preset", "paper", "--rows", "1", "--num", "4"])
    main(["fake", "--preset", "paper", "--num", "9"])  # 9 is the preset's own value
    names = sorted(os.listdir("out"))
    assert len(names) == 3
    assert names[0] == "fake-paper"
    assert all(len(name) == len("fake-paper-") + 8 for name in names[1:])
    assert json.loads(before)["config"] == _record("out/fake-paper")["config"]


def test_redraw_draws_the_record_without_running(fake, monkeypatch):
    main(["fake", "--preset", "smoke"])
    folder = Path("out/fake-smoke")
    before = {name: (folder / name).read_bytes() for name in FILES}
    for name in ("figure.png", "figure.pdf"):
        (folder / name).unlink()
    monkeypatch.setattr(fake, "run", None)
    assert main(["fake", "--preset", "smoke", "--redraw"]) == 0
    assert {name: (folder / name).read_bytes() for name in FILES} == before


def test_interrupted_run_finds_its_checkpoints_and_no_others(fake, capsys):
    command = ["fake", "--preset", "paper"]
    stopping = [*command, "--stops"]
    assert main(stopping) == 130
    assert "again continues" in capsys.readouterr().err
    assert main(stopping) == 130
    assert fake.SEEN == [["cost.json", "run.json"], ["cost.json", "half", "run.json"]]
    assert "continuing the run interrupted" in capsys.readouterr().out
    (label,) = Path("out").glob("*/checkpoints/run.json")
    label.write_text(label.read_text().replace('"seed": 3', '"seed": 4'))
    assert main(stopping) == 130
    assert fake.SEEN[2] == ["cost.json", "run.json"]
    assert "starting afresh" in capsys.readouterr().out
    main(command)
    assert not os.path.exists("out/fake-paper/checkpoints")


def test_resumed_is_recorded(fake, monkeypatch):
    run = fake.run

    def stop(config, data, *, checkpoints=None):
        (checkpoints / "half").write_text("done")
        raise KeyboardInterrupt

    monkeypatch.setattr(fake, "run", stop)
    assert main(["fake", "--preset", "paper"]) == 130
    monkeypatch.setattr(fake, "run", run)
    assert main(["fake", "--preset", "paper"]) == 0
    found = _record("out/fake-paper")["provenance"]
    assert found["resumed"] is True and found["stretches"] == 2


def test_all_goes_on_after_what_goes_wrong(fake, monkeypatch, capsys):
    names = {"first": "fake_figure", "second": "fake_figure", "third": "fake_figure"}
    monkeypatch.setattr(experiments, "MODULES", names)
    assert main(["all", "--preset", "smoke"]) == 0
    assert sorted(os.listdir("out")) == ["first-smoke", "second-smoke", "third-smoke"]

    run, calls = fake.run, []

    def break_first(config, data, *, checkpoints=None):
        calls.append(config)
        if len(calls) == 1:
            raise RuntimeError("broken on purpose")
        return run(config, data, checkpoints=checkpoints)

    monkeypatch.setattr(fake, "run", break_first)
    assert main(["all", "--preset", "smoke"]) == 1
    assert len(calls) == 3
    captured = capsys.readouterr()
    assert "broken on purpose" in captured.err
    assert "first fell short or broke, see above\n3 experiments, nothing" in captured.out
    fake.data.found = False
    assert main(["all", "--preset", "paper"]) == 2


def test_one_that_breaks_says_where(fake):
    with pytest.raises(RuntimeError, match="broken on purpose"):
        main(["fake", "--preset", "smoke", "--breaks"])


def test_out_defaults_to_the_environment(fake, monkeypatch):
    monkeypatch.setenv("INFLUENCE_OUT", "elsewhere")
    assert main(["fake", "--preset", "smoke"]) == 0
    assert main(["all", "--preset", "smoke"]) == 0
    assert main(["report"]) == 0
    assert sorted(os.listdir("elsewhere")) == ["fake-smoke", "index.html"]


def test_out_that_cannot_be_written_to_is_misuse(fake, capsys):
    Path("file").write_text("")
    assert main(["fake", "--preset", "smoke", "--out", "file"]) == 2
    error = capsys.readouterr().err
    assert "--out must be a folder that can be written to" in error
    assert "--user $(id -u)" in error
    assert fake.SEEN == []  # the run has not started


@pytest.mark.parametrize("failing", ["run.json", "arrays.h5", "record.json", "figure.pdf"])
def test_a_full_disk_is_one_line_and_74_and_the_same_command_continues(
    fake, monkeypatch, capsys, failing
):
    main(["fake", "--preset", "paper"])
    before = {name: Path("out/fake-paper", name).read_bytes() for name in FILES}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        for module in (running, record):
            patch.setattr(module, "replacing", _full(module.replacing, failing))
        assert main(["fake", "--preset", "paper"]) == main(["all", "--preset", "paper"]) == 74
    for line in capsys.readouterr().err.splitlines():
        assert f"{failing} could not be written (No space left on device); make room" in line
        assert "the same command again continues" in line
    # figure.pdf is written last, after the other files were replaced. If one of these cannot be
    # written, none is replaced, and the older record stays complete.
    if failing != "figure.pdf":
        assert {name: Path("out/fake-paper", name).read_bytes() for name in FILES} == before
    assert main(["fake", "--preset", "paper"]) == 0
    assert sorted(os.listdir("out/fake-paper")) == FILES


def _full(replacing, failing):
    @contextmanager
    def replaced(path):
        with replacing(path) as partial:
            if path.name == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield partial

    return replaced


@pytest.mark.parametrize("columns", ["1", "2", "5", "99999999"])
def test_help_ends_at_any_width(fake, monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert main(["fake", "--preset", "paper", "--help"]) == 0
    widths = [len(line) for line in capsys.readouterr().out.splitlines()]
    assert len(widths) < 100 and 40 <= max(widths) <= 200
    assert os.environ["COLUMNS"] == columns


def test_help_shows_every_option_and_the_presets_defaults(fake, capsys):
    assert main(["fake", "--preset", "paper", "--help"]) == 0
    printed = capsys.readouterr().out
    for part in ("--preset", "--data-dir", "--out", "--redraw", "--seed", "--num INT", "9",
                 "of smoke, standard, paper"):  # fmt: skip
        assert part in printed
    assert main(["all", "--help"]) == 0
    assert main(["report", "--help"]) == 0


def test_list_and_help_do_not_import_tensorflow():
    code = (
        "import sys; from experiments.__main__ import main; status = main(sys.argv[1:]); "
        "sys.exit(status or ('tensorflow' in sys.modules) * 9)"
    )
    for arguments in (["list"], ["--help"], []):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "usage: python -m experiments" in done.stdout


def test_summaries_are_first_lines_of_modules_that_exist(fake):
    assert experiments.summaries() == {"fake": "A fake figure: the mean of random numbers."}
    with pytest.raises(ValueError, match="command must be one of fake, got 'absent'"):
        experiments.load("absent")


def test_a_figure_may_be_a_folder(fake, monkeypatch):
    folder = Path("modules/folded")
    folder.mkdir()
    (folder / "__init__.py").write_text('"""Not the figure."""')
    shutil.copy("modules/fake_figure.py", folder / "figure.py")
    monkeypatch.setattr(experiments, "MODULES", {"folded": "folded.figure"})
    for name in ("experiments.folded", "experiments.folded.figure"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert experiments.summaries() == {"folded": "A fake figure: the mean of random numbers."}
    assert main(["folded", "--preset", "smoke"]) == 0
    assert sorted(os.listdir("out/folded-smoke")) == FILES


def test_every_experiment_is_found():
    assert list(experiments.summaries()) == list(experiments.MODULES)


def test_photographs_are_drawn_for_who_has_them_and_kept_from_git(fake, monkeypatch):
    from matplotlib.figure import Figure

    seen = []

    def photographs(record, data, *, checkpoints=None):
        seen.append((record.experiment, data.name, sorted(os.listdir(checkpoints))))
        return Figure()

    monkeypatch.setattr(fake, "photographs", photographs, raising=False)
    assert main(["fake", "--preset", "paper"]) == 0
    assert seen == [("fake", "mnist", ["cost.json", "half", "run.json"])]
    assert sorted(os.listdir("out/fake-paper")) == [*FILES[:3], "photographs.png", FILES[3]]
    assert main(["fake", "--preset", "paper", "--redraw"]) == 0
    assert len(seen) == 1
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert "photographs.png" in ignored


def test_what_a_run_finds_missing_is_misuse_and_leaves_nothing(fake, monkeypatch, capsys):
    def run(config, data, *, checkpoints=None):
        raise Misuse("the weights are missing")

    monkeypatch.setattr(fake, "run", run)
    assert main(["fake", "--preset", "paper"]) == 2
    assert "the weights are missing" in capsys.readouterr().err
    assert os.listdir("out") == []
