import pytest

from tests.influence.problems import logistic


@pytest.fixture(scope="module")
def softmax():
    """A problem of 60 rows, with 18 parameters."""
    return logistic("softmax", 60, intercept=True)
