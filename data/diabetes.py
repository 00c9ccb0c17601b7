"""Diabetes 130-US hospitals (Strack et al. 2014) as features, split as by Koh & Liang (2017).

The split equals that of the authors' 2017 code row for row. The notebook hospital_readmission.ipynb
of that code names test row 1742. After twenty children are removed, the notebook names training
rows 9366, 11116, 13685 and 19590 as the remaining children. We get the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.files import DataFile
from data.splits import DataSet, Split

if TYPE_CHECKING:
    import pandas as pd

SPLIT_SEED = 2
NUM_PER_CLASS = 10_000  # training rows of each label; all other rows are test rows

NUMERIC = tuple(
    """
    time_in_hospital num_lab_procedures num_procedures num_medications number_outpatient
    number_emergency number_inpatient number_diagnoses
    """.split()
)
# These 31 columns and NUMERIC give the 127 features of the authors' 2017 code. That code leaves out
# the two identifiers, three mostly missing columns, the three diagnoses, and the type and source of
# the admission. Two of the drugs were given to nobody. The column of such a drug has one level, so
# its feature is 1 in every row. These two features act as the intercept: the model has no other.
CATEGORICAL = tuple(
    """
    race gender age discharge_disposition_id max_glu_serum A1Cresult metformin repaglinide
    nateglinide chlorpropamide glimepiride acetohexamide glipizide glyburide tolbutamide
    pioglitazone rosiglitazone acarbose miglitol troglitazone tolazamide examide citoglipton
    insulin glyburide-metformin glipizide-metformin glimepiride-pioglitazone
    metformin-rosiglitazone metformin-pioglitazone change diabetesMed
    """.split()
)


def read(folder: Path, dtype: np.dtype) -> tuple[Split, Split, tuple[str, ...]]:
    """Read the table, convert it to features and split it.

    Args:
      folder: the data folder, with `diabetes/diabetic_data.csv` in it.
      dtype: dtype of x, float32 or float64.
    Returns: (train, test, feature_names). Half of the 20,000 training rows have label 1. There are
      81,766 test rows. Each split is (x, y): x of shape (n, 127), and y of shape (n,) int64, 1
      for patients readmitted within thirty days.
    """
    import pandas as pd  # this import is slow, and the other data sets do not need it

    # "None" is a category: the test was not made. By default pandas reads it as a missing value.
    table = pd.read_csv(
        folder / "diabetes/diabetic_data.csv",
        usecols=[*NUMERIC, *CATEGORICAL, "readmitted"],
        keep_default_na=False,
    )
    y = (table["readmitted"] == "<30").to_numpy(np.int64)
    x, names = features(table, NUMERIC, CATEGORICAL, dtype)
    train, test = split(y, NUM_PER_CLASS)
    return (x[train], y[train]), (x[test], y[test]), names


def features(
    table: pd.DataFrame, numeric: Sequence[str], categorical: Sequence[str], dtype: np.dtype
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Convert a table to features: unscaled numbers and indicator columns of the categories.

    Every level of a category gets a column of zeros and ones. If a category has two levels, only
    the second level in sorted order gets a column.

    Args:
      table: the n rows.
      numeric: names of the columns to copy.
      categorical: names of the columns to expand. Their values are integers or strings.
      dtype: dtype of the features.
    Returns: the features (n, f) and their f names, such as "number_inpatient" and "age_[0-10)".
    """
    import pandas as pd

    parts, names = [table[list(numeric)].to_numpy(dtype)], list(numeric)
    for column in categorical:
        codes, levels = pd.factorize(table[column], sort=True)
        first = 1 if len(levels) == 2 else 0
        parts.append((codes[:, None] == np.arange(first, len(levels))).astype(dtype))
        names += [f"{column}_{level}" for level in levels[first:]]
    return np.concatenate(parts, axis=1), tuple(names)


def split(y: np.ndarray, num_per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Split as in the authors' code: the training set has equally many rows of both labels.

    Args:
      y: (n,) labels 0 and 1.
      num_per_class: the number of training rows of each label. All other rows are test rows.
    Returns: the row numbers of the training set, (2 num_per_class,), and of the test set, shuffled.
    """
    # RandomState gives the same numbers in every version of NumPy. The order of the calls must stay
    # that of the authors' code.
    rng = np.random.RandomState(SPLIT_SEED)
    by_label = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    for rows in by_label:
        rng.shuffle(rows)
    train = np.concatenate([rows[:num_per_class] for rows in by_label])
    test = np.concatenate([rows[num_per_class:] for rows in by_label])
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


DATASET = DataSet(
    name="diabetes",
    what="hospital stays, 127 features: 20,000 train, 81,766 test",
    terms="CC BY 4.0 (Strack et al.)",
    read=read,
    files=(
        DataFile(
            "diabetes/diabetic_data.csv",
            19_159_383,
            ("0689e7ec031237dc63031b938805c48377748761a3b26acab621567afa24df97",),
            (
                "https://archive.ics.uci.edu/static/public/296/"
                "diabetes+130-us+hospitals+for+years+1999-2008.zip#diabetic_data.csv",
                "https://archive.ics.uci.edu/ml/machine-learning-databases/00296/"
                "dataset_diabetes.zip#dataset_diabetes/diabetic_data.csv",
            ),
        ),
    ),
)
