import pytest

from benchmarks import problem


@pytest.fixture(scope="session")
def digits():
    return problem.load("digits")
