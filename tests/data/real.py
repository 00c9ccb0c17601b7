"""Search for the real data sets, before fixtures hide them from the tests."""

import pytest

import data


def found(name):
    """Return (folder, mark). If the set is absent, the folder is None and the mark skips a test."""
    folder = data.find(name)
    reason = f"{name} not found; set INFLUENCE_DATA, or try `python -m data fetch {name}`"
    skip = pytest.mark.skipif(folder is None, reason=reason)
    return folder, lambda test: pytest.mark.real_data(skip(test))
