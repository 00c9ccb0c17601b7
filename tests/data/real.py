"""Search for the real data sets, before fixtures hide them from the tests."""

import pytest

import data


def found(name):
    """Return the folder of a set, or None, and a mark that skips a test if the set is absent."""
    folder = data.find(name)
    reason = f"{name} not found; set INFLUENCE_DATA, or try `python -m data fetch {name}`"
    skip = pytest.mark.skipif(folder is None, reason=reason)
    return folder, lambda test: pytest.mark.real_data(skip(test))
