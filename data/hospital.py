"""Generated hospital stays, which can replace the diabetes data and have the same domain mismatch.

Children are rare: 24 of the 4,000 training rows and 40 of the 1,000 test rows. Three of the
training children were readmitted, but no test child was. If 20 of the 21 other training children
are removed, most of the remaining ones were readmitted. This creates the domain mismatch.
"""

from pathlib import Path

import numpy as np

from data.diabetes import features
from data.splits import DataSet, Split

SEED = 0
NUM_TRAIN, NUM_TEST = 4_000, 1_000
NUM_CHILDREN, NUM_READMITTED, NUM_TEST_CHILDREN = 24, 3, 40
# We draw this many adults, so that enough are readmitted for half of the training set.
_NUM_DRAWN = 20_000

_AGES = tuple(f"[{age}-{age + 10})" for age in range(0, 100, 10))
_NUMERIC = ("time_in_hospital", "num_medications", "number_inpatient", "number_diagnoses")
_LEVELS = {
    "gender": (("Female", "Male"), (0.53, 0.47)),
    "discharge_disposition_id": ((1, 3, 6, 11, 22), (0.6, 0.15, 0.15, 0.05, 0.05)),
    "A1Cresult": (("None", ">7", ">8", "Norm"), (0.8, 0.05, 0.1, 0.05)),
    "insulin": (("No", "Steady", "Up", "Down"), (0.45, 0.3, 0.12, 0.13)),
    "change": (("No", "Ch"), (0.55, 0.45)),
}


def read(folder: Path, dtype: np.dtype) -> tuple[Split, Split, tuple[str, ...]]:
    """Draw the rows. Every call draws the same rows.

    Args:
      folder: ignored; every reader has this argument.
      dtype: dtype of x, float32 or float64. All values are small integers, exact in both.
    Returns: (train, test, feature_names). Each split is (x, y): x of shape (n, f), unscaled, and y
      of shape (n,) int64, 1 for readmitted. Half of the training rows are readmitted.
    """
    import pandas as pd

    rng = np.random.RandomState(SEED)  # same numbers in every version of NumPy
    adults, risk = _stays(rng, _NUM_DRAWN, rng.choice(_AGES[1:], _NUM_DRAWN))
    children, _ = _stays(rng, NUM_CHILDREN + NUM_TEST_CHILDREN, _AGES[0])
    readmitted = rng.uniform(size=_NUM_DRAWN) < 1 / (1 + np.exp(-risk))

    x, names = features(pd.concat([adults, children]), _NUMERIC, ("age", *_LEVELS), dtype)
    y = np.append(readmitted, np.arange(len(children)) < NUM_READMITTED).astype(np.int64)

    # The last adults are test rows. The first adults of each label are training rows.
    num_test_adults = NUM_TEST - NUM_TEST_CHILDREN
    pool = y[: _NUM_DRAWN - num_test_adults]
    yes = np.flatnonzero(pool == 1)[: NUM_TRAIN // 2 - NUM_READMITTED]
    no = np.flatnonzero(pool == 0)[: NUM_TRAIN // 2 - (NUM_CHILDREN - NUM_READMITTED)]
    train = np.concatenate([yes, no, np.arange(_NUM_DRAWN, _NUM_DRAWN + NUM_CHILDREN)])
    test = np.concatenate(
        [np.arange(len(pool), _NUM_DRAWN), np.arange(_NUM_DRAWN + NUM_CHILDREN, len(y))]
    )
    rng.shuffle(train)
    rng.shuffle(test)
    return (x[train], y[train]), (x[test], y[test]), names


def _stays(rng: np.random.RandomState, num: int, age):
    """Draw `num` stays. Return their table and the log-odds of readmission, valid for adults."""
    import pandas as pd

    table = pd.DataFrame(
        {
            "time_in_hospital": rng.randint(1, 15, num),
            "num_medications": rng.poisson(15, num),
            "number_inpatient": rng.poisson(0.7, num),
            "number_diagnoses": rng.randint(1, 10, num),
            "age": age,
        }
    )
    for column, (levels, shares) in _LEVELS.items():
        table[column] = np.array(levels)[rng.choice(len(levels), num, p=shares)]
    risk = (
        -1.6
        + 0.4 * table["number_inpatient"]
        + 0.05 * table["number_diagnoses"]
        + 0.5 * table["discharge_disposition_id"].isin([3, 22])
        - 3.0 * (table["discharge_disposition_id"] == 11)
    )
    return table, risk.to_numpy()


DATASET = DataSet(
    name="hospital",
    what="stand-in for diabetes: 4,000 train, 1,000 test",
    terms="made up here",
    read=read,
    stand_in=True,
)
