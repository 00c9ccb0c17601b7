"""Real data sets, searched before the fixtures hide them from the tests."""

import pytest

import data


def found(name):
    """Return (the set's folder or None, a mark for the tests that read it)."""
    folder = data.find(name)
    reason = f"{name} not found; set INFLUENCE_DATA, or try `python -m data fetch {name}`"
    skip = pytest.mark.skipif(folder is None, reason=reason)
    return folder, lambda test: pytest.mark.real_data(skip(test))
