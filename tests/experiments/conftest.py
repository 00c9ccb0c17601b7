"""Fixtures that give the harness a small experiment, `fake`, and small data."""

import gc
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import data
import experiments

SOURCE = '''
    """A fake figure: the mean of random numbers.

    More words.
    """
    from dataclasses import dataclass

    import numpy as np
    from matplotlib.figure import Figure

    from experiments.harness.claims import Check, Claim, Published
    from experiments.harness.record import Record

    @dataclass(frozen=True)
    class Config:
        seed: int = 3
        num: int = 5
        shift: float = 0.0
        rows: tuple[int, ...] = (1, 2)
        breaks: bool = False
        stops: bool = False

        def __post_init__(self):
            if self.num < 1:
                raise ValueError(f"num must be positive, got {self.num}.")

    PRESETS = {"smoke": Config(num=2), "standard": Config(), "paper": Config(num=9)}
    DATA, STAND_IN = "mnist", "digits"
    CLAIMS = (
        Claim("shift", "The shift of the mean", Published("figure 9", 0.125, 1.125)),
    )
    CHECKS = (Check("everywhere", None, 1.0),)
    FINDING = "a mean of {mean}"
    DEVIATIONS = ("Fakes: we <fake> it; the paper did not",)
    CAPTION = "A line of random numbers. a: higher is larger."
    SEEN = []

    def run(config, data, *, checkpoints=None):
        if config.breaks:
            raise RuntimeError("broken on purpose")
        SEEN.append(sorted(path.name for path in checkpoints.iterdir()))
        (checkpoints / "half").write_text("done")
        if config.stops:
            raise KeyboardInterrupt
        values = np.random.rand(config.num)
        metrics = {"shift": config.shift, "everywhere": config.shift, "mean": values.mean()}
        return Record.of(metrics=metrics, arrays={"values": values})

    def draw(record):
        figure = Figure(figsize=(2, 1))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()  # text takes most of the time to draw a figure
        axes.plot(record.arrays["values"], label=f"rows {record.config['rows']}")
        return figure
'''


class FakeData(ModuleType):
    """A fake of the package `data`. If `found` is True, the real data counts as found."""

    found = True

    def __init__(self, name):
        super().__init__(name)
        self.dtypes = []  # dtypes of all calls of `load`

    def find(self, name, root=None):
        return self.found and "some/folder"

    def load(self, name, root=None, *, dtype="float64"):
        self.dtypes.append(dtype)
        if name != "digits" and not self.found:
            raise FileNotFoundError(f"{name} was found nowhere: put it somewhere.")
        pair = (np.zeros((2, 3)), np.zeros(2))
        return SimpleNamespace(
            name=name, train=pair, test=pair, stand_in=name == "digits", sha256="5a" * 32
        )


# The figures use scores of first order, as the paper does. The library warns that these scores are
# inaccurate for rows of large leverage. The figures show this error, so tests ignore the warning.
FIRST_ORDER = pytest.mark.filterwarnings("ignore:.* have a leverage above 0.1:UserWarning")


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(FIRST_ORDER)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Install `fake` as the only experiment. Yield its module, whose data is `fake.data`."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "fake_figure.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.setattr(experiments, "MODULES", {"fake": "fake_figure", "absent": "no_such"})
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, "experiments.fake_figure", raising=False)
    package = FakeData("data")
    monkeypatch.setitem(sys.modules, "data", package)
    monkeypatch.delenv("INFLUENCE_OUT", raising=False)
    # Each run calls Keras' clear_session, which would collect the garbage of all earlier tests.
    monkeypatch.setattr(gc, "collect", lambda *_: 0)
    monkeypatch.chdir(tmp_path)
    module = experiments.load("fake")
    module.data = package
    yield module
    sys.modules.pop("experiments.fake_figure", None)


@pytest.fixture(scope="session")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def networks_traced_once():
    """Share traced functions among equal networks. TensorFlow would trace each network again."""
    from experiments.shared import mnist_cnn
    from influence import AllCNN
    from tests.influence.problems import traced_once

    make = mnist_cnn.network
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist_cnn, "network", lambda *given: traced_once(make(*given), AllCNN))
        yield
