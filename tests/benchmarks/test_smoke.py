import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks import solves, table, targets

RESULTS = Path(__file__).resolve().parents[2] / bench.RESULTS


def test_smoke_writes_numbers_and_their_table(part, tmp_path, monkeypatch, capsys):
    # This run omits the other libraries. test_peers.py tests them.
    monkeypatch.setattr(solves, "python_of_peers", lambda: None)
    monkeypatch.setattr(bench.machine, "_SAMPLE_SECONDS", 0.1)
    # test_solves.py tests our own solves in child processes, so this run omits them.
    few = replace(bench.SMOKE, settings=bench.SMOKE.settings[1:])
    monkeypatch.setattr(bench, "SMOKE", few)
    monkeypatch.setattr(bench.cnn, "run", lambda *_, **__: part)
    assert bench.main(["--smoke", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / bench.RECORD).read_text())
    assert result["data"]["stand_in"] is True
    assert {target["holds"] for target in result["targets"]} == {None}
    for way in ("closed_form", "tape"):
        products = result["products"][way]
        # The products are in float32. Their rounding errors add up over 1,297 rows.
        assert 0 < products["largest_error"] < 1e-4
        best = products["seconds"]["product"]["best"], products["seconds"]["gradient"]["best"]
        assert products["product_per_gradient"] == pytest.approx(best[0] / best[1])
        machine = max(v for k, v in result["products"]["machine_gflops"].items() if "square" in k)
        assert products["fraction_of_machine"] == pytest.approx(products["block_gflops"] / machine)
        assert result["scores"][f"{way} float64"]["largest_error"] < 1e-12
        assert 0 < result["scores"][f"{way} float32"]["largest_error"] < 1e-4
    page = (tmp_path / bench.TABLE).read_text(encoding="utf-8")
    assert page == table.page(result)
    assert "digits (a stand-in)" in page
    assert "not installed" in page
    assert "not judged" in capsys.readouterr().out


def test_targets_are_judged_on_real_data():
    result = {
        "data": {"stand_in": False},
        "products": {
            way: {"fraction_of_machine": 0.4, "product_per_gradient": 1.6}
            for way in ("closed_form", "tape")
        },
        "scores": {f"{way} float32": {"one_per_gradient": 1.0} for way in ("closed_form", "tape")},
        "refits": {"seconds": 80.0, "worst_gradient_norm": 1e-7},
        "solves": {"speedup_over_default": {"1": None, "100": None}},
    }
    holds = {target["metric"]: target["holds"] for target in targets.judged(result)}
    assert holds["block_fraction_tape"] is True
    assert holds["product_per_gradient_closed_form"] is False
    # If nothing was measured for a target, it counts as missed.
    assert holds["speedup_over_default_100_points"] is False
    assert holds["refits_seconds"] is True
    assert holds["refits_gradient_norm"] is False
    for metric in holds:
        assert targets.meaning(metric) != metric


def test_without_mnist_it_says_so_and_takes_the_digits(tmp_path, monkeypatch, capsys):
    import data

    monkeypatch.setattr(data, "find", lambda name, root: None)
    assert bench._data_name(False, None) == "digits"
    assert "mnist is not found" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--data-dir", str(tmp_path / "none")])
    assert "--data-dir must be a folder" in capsys.readouterr().err


@pytest.mark.skipif(not (RESULTS / bench.RECORD).is_file(), reason="no results/benchmarks yet")
def test_committed_page_says_what_the_numbers_say():
    result = json.loads((RESULTS / bench.RECORD).read_text())
    assert not result["data"]["stand_in"]
    assert (RESULTS / bench.TABLE).read_text(encoding="utf-8") == table.page(result)


def smoke(tmp_path, monkeypatch, *words):
    monkeypatch.setattr(bench.machine, "_SAMPLE_SECONDS", 0.01)
    status = bench.main([*words, "--smoke", "--out", str(tmp_path)])
    return status, json.loads((tmp_path / bench.RECORD).read_text())


def test_one_part_takes_its_place_among_the_others(tmp_path, monkeypatch, capsys):
    _, first = smoke(tmp_path, monkeypatch, "scores", "refits")
    assert set(bench.PARTS) & set(first) == {"scores", "refits"}
    page = (tmp_path / bench.TABLE).read_text(encoding="utf-8")
    assert "Exact leave-one-out refits" in page and "## LiSSA" not in page
    monkeypatch.setattr(bench.machine, "commit", lambda: "f" * 40)
    status, second = smoke(tmp_path, monkeypatch, "lissa")
    assert status == 0 and "lissa ...\n" in capsys.readouterr().out
    assert second["scores"] == first["scores"] and second["refits"] == first["refits"]
    assert second["lissa"]["run"]["commit"] == "f" * 40 != second["scores"]["run"]["commit"]
    assert {t["metric"]: t["value"] for t in second["targets"]} == {
        t["metric"]: targets.metrics(second).get(t["metric"]) for t in first["targets"]
    }
    page = (tmp_path / bench.TABLE).read_text(encoding="utf-8")
    assert page == table.page(second)
    assert f"{'f' * 12} (lissa)" in page and "(scores, refits)" in page
    assert "Exact leave-one-out refits" in page and "## LiSSA" in page


def test_parts_of_another_machine_are_not_mixed(tmp_path, monkeypatch, capsys):
    _, there = smoke(tmp_path, monkeypatch, "lissa")
    there["machine"]["cores"] += 1
    (tmp_path / bench.RECORD).write_text(json.dumps(there))
    with pytest.raises(SystemExit, match="2"):
        smoke(tmp_path, monkeypatch, "lissa")
    assert "of the same machine and data" in (said := capsys.readouterr().err)
    assert "has another machine;" in said
    assert json.loads((tmp_path / bench.RECORD).read_text()) == there


def test_a_part_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["lisa", "cnn"])
    assert "PART must be one of products, scores, all-scores" in (said := capsys.readouterr().err)
    assert said.rstrip().endswith("got lisa. (--help says more)") and said.count("\n") == 1
