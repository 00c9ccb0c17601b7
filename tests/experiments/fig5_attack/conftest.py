"""Fixtures of Figure 5: the stand-in for the photographs, and the head of the smoke preset."""

import pytest

import data
from experiments.fig5_attack import figure, heads


@pytest.fixture(scope="session")
def splits():
    return data.load("fishlike")


@pytest.fixture(scope="session")
def head(splits):
    return heads.fitted(figure.PRESETS["smoke"], 0, splits, None)[0]
