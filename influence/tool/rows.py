"""Rows of a data set, with file names, class names and column names for display."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
from numpy.typing import NDArray

from influence.examples import labels as packing
from influence.examples.examples import Examples
from influence.examples.given import as_examples
from influence.examples.tables import is_frame, is_text
from influence.net.inputs import declared

Kind = Literal["image", "table", "text", "other"]
# Image shapes of MNIST and CIFAR, by the number of values in a flattened image.
_FLATTENED = {784: (28, 28, 1), 3072: (32, 32, 3)}
# An array whose height or width is smaller than this is not shown as an image.
_LEAST_SIDE = 8
# The black and white levels of images are estimated from at most this many rows.
_SAMPLE = 64
# An array of numbers without column names is shown as a table if it has at most this many columns.
_MOST_COLUMNS = 200
# Files are read in blocks of this many bytes, to compute their digests.
_BLOCK = 1 << 20
# The standard deviation of a column is estimated from at most this many rows.
_SPREAD_ROWS = 1024
# A word is common if at least the share _COMMON of the sampled texts contains it. The sample has at
# most _TEXTS texts. Only the first _CHARACTERS characters of each text are searched.
_COMMON, _TEXTS, _CHARACTERS = 0.3, 200, 20_000
# These losses take one-hot labels. For them, class numbers are converted to one-hot labels.
_ONE_HOT = (
    keras.losses.categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.categorical_hinge,
    keras.losses.kl_divergence,
)


@dataclass(frozen=True)
class Wanted:
    """The inputs and the label format that a model takes.

    Attributes:
      inputs: dict from the name of each input to (shape of one row, dtype). It is empty if the
        model declares no inputs.
      outputs: the names of the outputs if the model has several outputs, else ().
      one_hot: the number of classes if the loss takes one-hot labels, else None.
    """

    inputs: dict[Any, tuple[tuple, str]]
    outputs: tuple[str, ...] = ()
    one_hot: int | None = None

    @classmethod
    def by(cls, net: Any) -> Wanted:
        """Return the inputs and the label format that a net takes."""
        front = getattr(net, "preparation", None)
        if front is not None:
            inputs = front.given.declared
        else:
            found = declared(net.model)
            inputs = {key: (tuple(t.shape[1:]), t.dtype) for key, t in found.items()}
        outputs = getattr(getattr(net, "ending", None), "names", None) or ()
        one_hot = None
        if getattr(net.loss, "keras_function", None) in _ONE_HOT and not outputs:
            shape = getattr(net.model, "output_shape", None)
            one_hot = int(shape[-1]) if shape and len(shape) == 2 and shape[-1] else None
        return cls(inputs, tuple(outputs), one_hot)

    def coded(self, y: NDArray) -> NDArray:
        """Convert class numbers (n,) to one-hot labels if the loss takes those, else return y."""
        y = np.asarray(y)
        if self.one_hot is None or y.ndim > 1 or y.dtype.kind not in "iub":
            return y
        if y.min() < 0 or y.max() >= self.one_hot:
            return y  # a later check raises an error naming the invalid label
        return np.eye(self.one_hot, dtype=np.float32)[y]


@dataclass(frozen=True, eq=False)
class Rows:
    """A data set, with the names by which a user recognises its rows.

    Args:
      read: a function that returns the data in any form that `fit` takes. It is called when the
        data are first needed.
      wanted: the inputs and the label format that the model takes.
      argument: the argument's name in error messages, "train" or "test".
      names: a name for each row, such as a file name. If (), the rows are named by their numbers.
      classes: the names of the classes 0, 1, ..., or () if they are unknown.
      columns: the names of the table's columns, or () if the data are no table.
      files: the image file of each row, or () if the rows are not from image files.
      labels: the labels (n, ...) if they are known without reading the rows, else None.
      weights: the sample weights (n,) if they are known without reading the rows, else None.
      digest: a text that identifies the files and the reading options. It contains the SHA-256 of
        the files. "" if the rows do not come from files.
      source: the path or the function that the rows come from, or "".
      notes: one sentence for each change that the reading made to the rows.
    """

    read: Callable[[], Any]
    wanted: Wanted
    argument: str = "train"
    names: Sequence[str] = ()
    classes: Sequence[str] = ()
    columns: Sequence[str] = ()
    files: Sequence[Path] = ()
    labels: NDArray | None = None
    weights: NDArray | None = None
    digest: str = ""
    source: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: Any, wanted: Wanted, argument: str) -> Rows:
        """Return Rows for data in any form that `fit` takes. If the data are Rows, return them."""
        if isinstance(value, Rows):
            return value
        columns: tuple[str, ...] = ()
        if isinstance(value, tuple | list) and len(value) in (2, 3) and is_frame(value[0]):
            columns = tuple(map(str, value[0].columns))
        rows = cls(lambda: value, wanted, argument, columns=columns)
        rows.examples  # noqa: B018 - raises an error for invalid data, before long work
        return rows

    @cached_property
    def examples(self) -> Examples:
        """The rows as Examples. Lookup layers have not been applied to the inputs.

        Raises: the errors of `as_examples`.
        """
        value = self.read()
        inputs, outputs = tuple(self.wanted.inputs), self.wanted.outputs
        if isinstance(value, tuple | list) and len(value) in (2, 3) and len(outputs) < 2:
            x, y, *weight = value
            y = self.wanted.coded(y) if isinstance(y, np.ndarray) else y
            value = (x, y, *weight)
        return as_examples(value, self.argument, inputs, outputs)

    def __len__(self) -> int:
        """Return the number of rows, n."""
        return len(self.examples if self.labels is None else self.labels)

    @cached_property
    def content(self) -> str:
        """Text that identifies the data: `digest` if it is known, else the SHA-256 of the rows."""
        return self.digest or self.examples.fingerprint

    def name(self, row: int) -> str:
        """Return the name of a row, such as a file name or "row 17"."""
        return str(self.names[row]) if len(self.names) else f"row {row}"

    def class_name(self, label: Any) -> str:
        """Return the class name of a label, or the number as text. None and NaN give ""."""
        if label is None:
            return ""
        number = float(label)
        if np.isnan(number):
            return ""
        if number == int(number) and 0 <= int(number) < len(self.classes):
            return str(self.classes[int(number)])
        return f"{int(number)}" if number == int(number) else f"{number:.4g}"

    def inputs(self, row: int) -> Any:
        """Return the inputs of one row, an array or a dict of arrays, without the row axis."""
        x = self.examples.take([int(row)]).x
        if isinstance(x, dict):
            return {key: _dense(part)[0] for key, part in x.items()}
        return _dense(x)[0]

    @cached_property
    def kind(self) -> Kind:
        """The display format of the rows: "image", "table", "text", or "other" for other arrays."""
        if len(self.files):
            return "image"
        x = self.examples.take(slice(0, 1)).x
        if isinstance(x, dict):
            texts = [key for key, part in x.items() if is_text(part)]
            flat = all(np.prod(part.shape[1:]) == 1 for part in x.values())
            if len(x) == 1 and texts:
                return "text"
            return "table" if flat else "other"
        if is_text(x):
            return "text" if np.prod(x.shape[1:], dtype=int) == 1 else "table"
        if self.image_shape is not None:
            return "image"
        if x.ndim == 2 and (len(self.columns) == x.shape[1] or x.shape[1] <= _MOST_COLUMNS):
            return "table"
        return "other"

    @cached_property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(height, width, channels) of each row if the rows are images, else None."""
        x = self.examples.take(slice(0, 1)).x
        if isinstance(x, dict) or is_text(x) or len(self.columns):
            return None
        shape = tuple(x.shape[1:])
        if len(shape) == 1:
            shape = _FLATTENED.get(shape[0], ())
        if len(shape) == 2:
            shape = (*shape, 1)
        if len(shape) != 3 or shape[2] not in (1, 3, 4) or min(shape[:2]) < _LEAST_SIDE:
            return None
        return shape[0], shape[1], shape[2]

    @cached_property
    def spread(self) -> dict[str, float]:
        """Standard deviation of each numeric column of a table, from a sample of the rows."""
        found = {}
        some = np.unique(np.linspace(0, len(self) - 1, _SPREAD_ROWS).astype(int))
        for name, column in self.cells(some).items():
            if column.dtype.kind in "biuf":
                found[name] = float(np.std(column.astype(float)))
        return found

    def cells(self, rows: Sequence[int] | NDArray) -> dict[str, NDArray]:
        """Return the values (k,) of k given rows in each column of a table, by column name."""
        x = self.examples.take(np.asarray(rows)).x
        if isinstance(x, dict):
            return {str(key): _dense(part).reshape(len(rows)) for key, part in x.items()}
        x = _dense(x).reshape(len(rows), -1)
        known = self.columns if len(self.columns) == x.shape[1] else ()
        names = known or [f"x[{j}]" for j in range(x.shape[1])]
        return {str(name): x[:, j] for j, name in enumerate(names)}

    @cached_property
    def levels(self) -> tuple[float, float] | None:
        """Pixel values (black, white): (0, 1), (-1, 1) or (0, 255); None if no range fits."""
        some = np.unique(np.linspace(0, len(self) - 1, _SAMPLE).astype(int))
        x = _dense(self.examples.take(some).x)
        low, high = float(np.min(x)), float(np.max(x))
        for black, white in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
            if black <= low and high <= white:
                return black, white
        return None

    def text(self, row: int) -> str:
        """Return the text of one row, if the rows are texts."""
        x = self.inputs(row)
        x = next(iter(x.values())) if isinstance(x, dict) else x
        value = np.ravel(np.asarray(x, object))[0]
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)

    @cached_property
    def common_words(self) -> set[str]:
        """Words that occur in many of the sampled texts, in lower case."""
        some = np.unique(np.linspace(0, len(self) - 1, _TEXTS).astype(int))
        counts: dict[str, int] = {}
        for row in some:
            for word in set(re.findall(r"\w+", self.text(int(row))[:_CHARACTERS].lower())):
                counts[word] = counts.get(word, 0) + 1
        return {word for word, count in counts.items() if count >= max(_COMMON * len(some), 2)}

    @property
    def given(self) -> Any:
        """The labels without sample weights: an array, or a dict of arrays by output name."""
        return packing.labels(self.examples.y if self.labels is None else self.labels)


def digest_of(files: Sequence[Path], root: Path) -> str:
    """Compute one SHA-256 of the contents of files and their paths relative to `root`."""
    whole = hashlib.sha256()
    for path in files:
        own = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                own.update(block)
        relative = path.relative_to(root) if path != root else path.name
        whole.update(repr((str(relative), own.hexdigest())).encode())
    return whole.hexdigest()


def _dense(part: Any) -> NDArray:
    return part.toarray() if hasattr(part, "toarray") else np.asarray(part)
