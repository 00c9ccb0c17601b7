"""The list of data sets. Each line names a module of this folder."""

from data import diabetes, digits, dogfish, enron1, fishlike, hospital, mnist, spam
from data.splits import DataSet

SETS: dict[str, DataSet] = {
    dataset.name: dataset
    for dataset in (
        mnist.DATASET,
        digits.DATASET,
        diabetes.DATASET,
        hospital.DATASET,
        enron1.DATASET,
        spam.DATASET,
        dogfish.DATASET,
        fishlike.DATASET,
    )
}


def named(name: str) -> DataSet:
    """Return the data set of a name.

    Raises: ValueError listing the existing names if none of them is `name`.
    """
    if name not in SETS:
        raise ValueError(f"name must be one of {', '.join(map(repr, SETS))}, got {name!r}.")
    return SETS[name]
