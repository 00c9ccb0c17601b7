import numpy as np
import pytest

from tests.influence.problems import symmetric


@pytest.fixture(scope="module")
def matrix():
    """A positive definite matrix of order 40 with the condition number 100."""
    return symmetric(np.geomspace(0.01, 1, 40))


@pytest.fixture(scope="module")
def B():
    """Five right-hand sides for `matrix`: (40, 5)."""
    return np.random.default_rng(1).standard_normal((40, 5))
