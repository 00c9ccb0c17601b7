import json
import os
import signal
import subprocess
import sys
import time

import numpy as np

from experiments.harness import cost

_WORKER = (
    "import numpy, sys, time; a = numpy.ones(40_000_000); print(a[0], flush=True); time.sleep(9)"
)


def test_seconds_of_all_stretches_add_up(tmp_path):
    path = tmp_path / "cost.json"
    with cost.metered(path) as first:
        time.sleep(0.2)
    assert first["stretches"] == 1 and first["resumed"] is False and 0.2 <= first["seconds"] < 5
    with cost.metered(path) as second:
        time.sleep(0.1)
    assert second["stretches"] == 2 and second["resumed"] is True
    assert second["seconds"] >= first["seconds"] + 0.1
    assert second["peak_rss_mb"] >= first["peak_rss_mb"] > 20


def test_an_interrupted_stretch_counts(tmp_path):
    path = tmp_path / "cost.json"
    try:
        with cost.metered(path):
            time.sleep(0.2)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    with cost.metered(path) as facts:
        pass
    assert facts["stretches"] == 2 and facts["seconds"] >= 0.2


def test_a_killed_stretch_counts(tmp_path):
    path = tmp_path / "cost.json"
    code = (
        "import pathlib, sys, time\nfrom experiments.harness import cost\n"
        "cost._SAMPLE = cost._WRITE = 0.1\n"
        "with cost.metered(pathlib.Path(sys.argv[1])):\n    time.sleep(60)"
    )
    killed = subprocess.Popen([sys.executable, "-c", code, str(path)])
    for _ in range(600):
        time.sleep(0.1)
        if path.exists() and json.loads(path.read_text())["seconds"] > 0.3:
            break
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    with cost.metered(path) as facts:
        pass
    assert facts["stretches"] == 2 and facts["seconds"] > 0.3


def test_memory_is_that_of_the_process_and_its_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "_SAMPLE", 0.05)
    with cost.metered(tmp_path / "alone.json") as alone:
        time.sleep(0.2)
    with cost.metered(tmp_path / "with.json") as both:
        worker = subprocess.Popen([sys.executable, "-c", _WORKER], stdout=subprocess.PIPE)
        assert worker.stdout is not None and worker.stdout.readline().startswith(b"1.0")
        # This array takes 153 MiB, and the worker's array takes 305 MiB, so the peak must rise by
        # more than 400 MiB.
        block = np.ones(20_000_000)
        time.sleep(0.3)
        worker.kill()
        worker.communicate()
    assert block[0] == 1
    assert both["peak_rss_mb"] > alone["peak_rss_mb"] + 400
