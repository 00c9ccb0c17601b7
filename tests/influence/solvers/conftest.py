import numpy as np
import pytest

from tests.influence.problems import symmetric


@pytest.fixture(scope="module")
def matrix():
    """Return a positive definite matrix of order 40 with the condition number 100."""
    return symmetric(np.geomspace(0.01, 1, 40))


@pytest.fixture(scope="module")
def B():
    """Return five right-hand sides for `matrix`: (40, 5)."""
    return np.random.default_rng(1).standard_normal((40, 5))
