"""Tests of the diabetes set: its 127 features, the authors' split, and generated files."""

import collections
import csv
import dataclasses
import hashlib

import numpy as np
import pandas as pd
import pytest

import data
from data import diabetes, registry
from data.files import DataFile
from tests.data.real import found

REAL, needs_diabetes = found("diabetes")


@pytest.fixture(scope="module")
def real():
    return data.load("diabetes", REAL)


@needs_diabetes
def test_real_sizes_and_label_counts(real):
    assert real.train[0].shape == (20_000, 127) and real.test[0].shape == (81_766, 127)
    assert np.bincount(real.train[1]).tolist() == [10_000, 10_000]
    assert np.bincount(real.test[1]).tolist() == [101_766 - 11_357 - 10_000, 11_357 - 10_000]
    assert real.train[0].dtype == np.float64 and real.train[1].dtype == np.int64
    assert len(set(real.feature_names)) == 127 and not real.stand_in


@needs_diabetes
def test_real_features_are_the_columns_of_the_file(real):
    assert REAL is not None  # for the type checker
    totals = collections.Counter()
    with open(REAL / "diabetes/diabetic_data.csv", newline="") as file:
        for row in csv.DictReader(file):
            for column in diabetes.NUMERIC:
                totals[column] += int(row[column])
            for column in diabetes.CATEGORICAL:
                totals[f"{column}_{row[column]}"] += 1
    sums = real.train[0].sum(axis=0) + real.test[0].sum(axis=0)
    sums = dict(zip(real.feature_names, sums, strict=True))
    assert {n: totals[n] for n in real.feature_names} == sums
    # A category of two levels gives one feature: that of its second level.
    left_out = set(totals) - set(real.feature_names)
    assert len(left_out) == 9 and {"change_Ch", "diabetesMed_No", "acetohexamide_No"} < left_out


@needs_diabetes
def test_real_categories_named_none_are_kept_and_two_columns_are_ones(real):
    assert {"max_glu_serum_None", "A1Cresult_None"} < set(real.feature_names)
    least = zip(real.feature_names, real.train[0].min(axis=0), strict=True)
    ones = [n for n, value in least if value == 1 and "_" in n and n.endswith("_No")]
    assert ones == ["examide_No", "citoglipton_No"]


@needs_diabetes
def test_real_split_is_the_release_s_own(real):
    # The notebook hospital_readmission.ipynb has 24 training children, of whom 3 are readmitted. It
    # has 137 test children, including row 1742. If one removes all training children that were not
    # readmitted, except the last, the rows 9366, 11116, 13685 and 19590 remain.
    age = real.feature_names.index("age_[0-10)")
    (x, y), (x_test, y_test) = real.train, real.test
    children = np.flatnonzero(x[:, age])
    stays = children[y[children] == 0]
    assert (len(children), len(stays)) == (24, 21)
    left = np.delete(np.arange(len(x)), stays[:-1])
    assert np.flatnonzero(x[left, age]).tolist() == [9366, 11116, 13685, 19590]
    assert y[left][[9366, 11116, 13685, 19590]].tolist() == [1, 1, 1, 0]
    assert x_test[:, age].sum() == 137 and x_test[1742, age] == 1
    assert y_test[x_test[:, age] == 1].sum() == 0


@needs_diabetes
def test_real_digest_is_that_of_sha256sum(real):
    # To compute it in the data folder: sha256sum diabetes/diabetic_data.csv | sha256sum
    assert real.sha256 == "4c800f6278553bc1e573a1a2c3ad2df112ea2fe62f782a58685bda2ae68af9ab"


# --- the generated file -----------------------------------------------------------------------


def test_features():
    table = pd.DataFrame(
        {
            "days": [3, 1, 2, 9],
            "two": ["Yes", "No", "No", "Yes"],
            "one": ["No"] * 4,
            "code": [11, 2, 2, 3],
            "three": ["None", ">7", "Norm", "None"],
        }
    )
    x, names = diabetes.features(table, ["days"], ["two", "one", "code", "three"], np.dtype("f4"))
    expected = "days two_Yes one_No code_2 code_3 code_11 three_>7 three_None three_Norm"
    assert names == tuple(expected.split())
    assert x.dtype == np.float32
    assert x.tolist() == [
        [3, 1, 1, 0, 0, 1, 0, 1, 0],
        [1, 0, 1, 1, 0, 0, 1, 0, 0],
        [2, 0, 1, 1, 0, 0, 0, 0, 1],
        [9, 1, 1, 0, 1, 0, 0, 1, 0],
    ]


def test_split_is_balanced_and_leaves_nothing_out():
    y = (np.arange(50) % 3 == 0).astype(np.int64)
    train, test = diabetes.split(y, 10)
    assert sorted([*train, *test]) == list(range(50))
    assert y[train].sum() == 10 and len(train) == 20
    again = diabetes.split(y, 10)
    np.testing.assert_array_equal(train, again[0])
    # Only the random stream of NumPy's legacy RandomState gives this split.
    assert train[:6].tolist() == [34, 12, 3, 9, 30, 13]
    assert test[:6].tolist() == [26, 31, 22, 25, 6, 41]


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Return a data folder with twelve generated hospital stays, accepted as the real file."""
    path = tmp_path / "made_up/diabetes/diabetic_data.csv"
    path.parent.mkdir(parents=True)
    rows = {column: [str(i) for i in range(12)] for column in diabetes.NUMERIC}
    rows |= {column: ["No", "Steady"] * 6 for column in diabetes.CATEGORICAL}
    rows |= {"A1Cresult": ["None", ">7", "?"] * 4, "weight": ["?"] * 12}
    rows["readmitted"] = ["<30", ">30", "NO"] * 4
    pd.DataFrame(rows).to_csv(path, index=False)
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    file = DataFile("diabetes/diabetic_data.csv", len(content), (digest,))
    dataset = dataclasses.replace(diabetes.DATASET, files=(file,))
    monkeypatch.setitem(registry.SETS, "diabetes", dataset)
    monkeypatch.setattr(diabetes, "NUM_PER_CLASS", 3)
    return tmp_path / "made_up"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_file_is_read(made_up, dtype):
    splits = data.load("diabetes", made_up, dtype=dtype)
    (x, y), (x_test, y_test) = splits.train, splits.test
    # The 41 features are 8 numbers, one column for each of 30 categories of two levels, and three
    # columns for A1Cresult. In A1Cresult, "None" and "?" count as levels.
    assert x.shape == (6, 8 + 30 + 3) and x_test.shape == (6, 41)
    assert {"A1Cresult_>7", "A1Cresult_?", "A1Cresult_None"} < set(splits.feature_names)
    assert x.dtype == np.dtype(dtype) and y.dtype == np.int64
    assert y.sum() == 3 and y_test.sum() == 1
    stays = np.concatenate([x[:, 0], x_test[:, 0]])  # the first feature identifies the stay
    assert sorted(stays) == list(range(12))
    # The stays 0, 3, 6 and 9 have label 1: the patient is readmitted within thirty days.
    np.testing.assert_array_equal(np.concatenate([y, y_test]), stays % 3 == 0)
    none = np.concatenate([x, x_test])[:, splits.feature_names.index("A1Cresult_None")]
    np.testing.assert_array_equal(none, stays % 3 == 0)
