import pytest

from benchmarks import cnn, problem
from benchmarks.__main__ import SMOKE


@pytest.fixture(scope="session")
def digits():
    return problem.load("digits")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def part(digits, folder):
    """Return the results of the CNN benchmark, run on a small network."""
    return cnn.run(digits, SMOKE.network, checkpoints=folder)
