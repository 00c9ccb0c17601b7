"""Reader of tables from CSV and Parquet files, as inputs and labels of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from influence.tool.rows import Rows, Wanted, digest_of

ENDINGS = (".csv", ".tsv", ".parquet")
# If --target is not given, the column of labels must have one of these names. If several columns
# have such a name, --target is required.
_LABELS = ("target", "label", "labels", "class", "y")
# Error messages list at most this many names.
_SHOWN = 12


@dataclass(frozen=True)
class Columns:
    """The columns of a table that hold labels, texts or weights, or that are left out.

    Attributes:
      target: the name of the column of labels. If None, a column with a usual
        name such as "target" is used.
      text: the name of the column of texts, or None.
      drop: the names of columns that are no inputs of the model.
      weight: the name of the column of sample weights, or None.
    """

    target: str | None = None
    text: str | None = None
    drop: tuple[str, ...] = ()
    weight: str | None = None


def read(path: Path, wanted: Wanted, columns: Columns, like: Rows | None) -> Rows:
    """Read the rows of a table from a file.

    Strings are not changed, so "NA" and "None" stay strings. An empty entry in a column of strings
    is read as the empty string. Labels that are strings become class numbers, in alphabetical
    order.

    Args:
      path: a file .csv, .tsv or .parquet.
      wanted: the inputs and the label format that the model takes.
      columns: the columns of labels, texts and weights, and the columns to leave out.
      like: if the file contains test rows, the training rows; else None.

    Raises: ValueError naming the invalid column or the missing entry.
    """
    frame, notes = _frame(path)
    there = list(frame.columns)
    target = columns.target or _usual_target(there)
    if target is None:
        raise ValueError(f"--target must name the column of labels, one of {_list(there)}.")
    named = [("--target", target), ("--text", columns.text), ("--weight", columns.weight)]
    for option, column in [*named, *(("--drop", column) for column in columns.drop)]:
        if column is not None and column not in there:
            raise ValueError(f"{option} must be one of {_list(there)}, got {column!r}.")
    classes = () if like is None else like.classes
    y, classes = coded(frame[target].to_numpy(), classes, f"column {target!r}")
    chosen = [] if columns.text is None else [columns.text]
    without = {target, columns.weight, *columns.drop}
    rest = chosen or [column for column in there if column not in without]
    x, used = _inputs(frame, rest, wanted)
    weight = None if columns.weight is None else frame[columns.weight].to_numpy()
    value = (x, y) if weight is None else (x, y, weight)
    options = (target, columns.text, columns.drop, columns.weight, wanted.one_hot)
    rows = Rows(
        lambda: value,
        wanted,
        "train" if like is None else "test",
        classes=classes,
        columns=tuple(used),
        digest=f"{digest_of([path], path)} {options}",
        source=str(path),
        notes=notes,
    )
    rows.examples  # noqa: B018 - raises an error for a missing number
    return rows


def coded(
    values: NDArray, classes: Sequence[str], what: str
) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Convert labels to numbers, and return them with the names of the classes.

    Args:
      values: (n,) numbers or strings.
      classes: the known class names. If (), the classes are the strings in `values`, in
        alphabetical order.
      what: the name of the values in error messages.

    Returns: (n,) numbers, and the class names. The names are () for labels that are numbers.
    Raises: ValueError if a label is missing or is no known class.
    """
    values = np.asarray(values)
    if values.dtype.kind == "b":
        return values.astype(np.int64), tuple(classes)
    if values.dtype.kind in "iuf" and not len(classes):
        gaps = np.flatnonzero(np.isnan(values)) if values.dtype.kind == "f" else []
        if len(gaps):
            raise ValueError(f"{what} must have a label in every row, got none in row {gaps[0]}.")
        whole = values.dtype.kind == "f" and (values == np.round(values)).all()
        few = whole and len(np.unique(values)) <= 2
        return (values.astype(np.int64) if few else values), ()
    texts = ["" if v is None or v != v else str(v) for v in values.tolist()]
    if "" in texts:
        row = texts.index("")
        raise ValueError(f"{what} must have a label in every row, got none in row {row}.")
    names = tuple(classes) or tuple(sorted(set(texts)))
    number = {name: k for k, name in enumerate(names)}
    unknown = next((text for text in texts if text not in number), None)
    if unknown is not None:
        raise ValueError(f"{what} must hold the classes {_list(names)}, got {unknown!r}.")
    return np.array([number[text] for text in texts]), names


def _frame(path: Path) -> tuple[Any, tuple[str, ...]]:
    import pandas as pd

    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
            separator = "\t" if path.suffix == ".tsv" else ","
            frame = pd.read_csv(path, sep=separator, low_memory=False)
    except ImportError as error:
        raise ValueError(
            f"{path.name} is a Parquet file, and pandas needs pyarrow to read it: pip install "
            "pyarrow, or give a .csv file."
        ) from error
    except Exception as error:  # pandas and pyarrow raise many types of errors
        raise ValueError(
            f"{path.name} must be a table with a line of column names, got "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    frame.columns = [str(column) for column in frame.columns]
    if not len(frame):
        raise ValueError(f"{path.name} must have at least one row, got none.")
    strings = [c for c in frame.columns if frame[c].dtype.kind == "O" and frame[c].isna().any()]
    if not strings:
        return frame, ()
    if path.suffix != ".parquet":
        # pandas reads "None" and "NA" as missing entries. A second reading of the columns of
        # strings keeps these words as strings.
        how: dict[str, Any] = {"dtype": str, "keep_default_na": False, "usecols": strings}
        again = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", **how)
        for column in strings:
            frame[column] = again[column].to_numpy(object)
    frame[strings] = frame[strings].fillna("")
    empty = [c for c in strings if (frame[c] == "").any()]
    note = f"Empty entries of {_list(empty)} were read as empty strings."
    return frame, ((note,) if empty else ())


def _inputs(frame: Any, columns: list[str], wanted: Wanted) -> tuple[Any, list[str]]:
    """Return the model's inputs in a form that `fit` takes, and the names of their columns."""
    names = [str(name) for name in wanted.inputs]
    if len(names) > 1:
        missing = [name for name in names if name not in columns]
        if missing:
            raise ValueError(
                f"DATA must have a column for each input of the model, got none for "
                f"{_list(missing)}; its columns are {_list(columns)}."
            )
        return {name: frame[str(name)].to_numpy() for name in wanted.inputs}, names
    shape, dtype = next(iter(wanted.inputs.values()), ((None,), "float32"))
    strings = [c for c in columns if frame[c].dtype.kind not in "biuf"]
    if dtype == "string" and len(columns) > 1 and shape in ((), (1,)):
        texts = [c for c in strings if c in (*names, "text")] or strings
        if len(texts) != 1:
            raise ValueError(f"--text must name the column of texts, one of {_list(columns)}.")
        columns = texts
    elif dtype != "string" and strings:
        raise ValueError(
            f"DATA must have numbers in every column that the model takes, got strings in "
            f"{_list(strings)}; leave such columns out by --drop, or give a model that looks them "
            "up."
        )
    width = shape[-1] if shape else 1
    if len(shape) <= 1 and width not in (None, len(columns)):
        raise ValueError(
            f"DATA must have {width} columns for the model besides --target, got {len(columns)}: "
            f"{_list(columns)}; leave columns out by --drop."
        )
    if len(columns) == 1:
        return frame[columns[0]].to_numpy()[:, None], columns
    return frame[columns].to_numpy(), columns


def _usual_target(columns: Sequence[str]) -> str | None:
    found = [column for column in columns if column.lower() in _LABELS]
    return found[0] if len(found) == 1 else None


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(repr(str(name))[:60] for name in list(names)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
