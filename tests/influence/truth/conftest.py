import pytest

from tests.influence.problems import logistic


@pytest.fixture(scope="module")
def softmax():
    """Return a problem of 60 rows with 18 parameters."""
    return logistic("softmax", 60, intercept=True)
