"""Fixtures for the tests of several folders."""

import keras
import pytest


@pytest.fixture(scope="module")
def float64():
    """Make float64 the default of Keras' models and losses."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])
