"""Reader of the command line argument DATA: a file, a folder or a Python function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from influence.examples.given import class_weights
from influence.tool import tables
from influence.tool.model import function_of, is_function
from influence.tool.request import Reading
from influence.tool.rows import Rows, Wanted, digest_of

# `keras.utils.image_dataset_from_directory` reads these files.
_IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
# Keras' default image size. It is used if the model takes images of any size.
_IMAGE_SIZE = (256, 256)
_BATCH = 32
# Names of subfolders with training rows and with test rows, in lower case.
_TRAIN = ("train", "training")
_TEST = ("test", "testing", "val", "valid", "validation")
_FORMS = (
    "an .npz file, a folder of images or .txt files by class, a .csv or .parquet table, or "
    "module:function"
)


def read(
    text: str, wanted: Wanted, how: Reading = Reading(), *, like: Rows | None = None
) -> tuple[Rows, Rows | None]:
    """Read rows from a file or a folder, or get them from a function.

    Args:
      text: a path, or `module:function`. The function takes no arguments and returns data in any
        form that `fit` takes.
      wanted: the inputs and the label format that the model takes.
      how: options for reading.
      like: if `text` names test rows, the training rows. Both must have the same classes.

    Returns: the rows and the test rows. The test rows are None if the file or folder has none.
    Raises: ValueError, TypeError or OSError naming the data. The message describes valid data.
    """
    argument = "train" if like is None else "test"
    if is_function(text):
        made = Rows.of(function_of(text, argument.upper())(), wanted, argument)
        found, test = replace(made, source=text), None
    else:
        path = Path(text).expanduser()
        if not path.exists():
            raise ValueError(f"{_called(like)} must be {_FORMS}, got {text!r}, which is not there.")
        if path.is_dir():
            found, test = _folder(path, wanted, how, like)
        elif path.suffix == ".npz":
            found, test = _npz(path, wanted, argument)
        elif path.suffix in tables.ENDINGS:
            columns = tables.Columns(how.target, how.text, how.drop, how.weight)
            found, test = tables.read(path, wanted, columns, like), None
        else:
            raise ValueError(f"{_called(like)} must be {_FORMS}, got {text!r}.")
    if like is None and how.class_weight:
        found = _weighted(found, how.class_weight)
    if like is not None and not found.classes:
        found = replace(found, classes=like.classes)
    return found, test


def _called(like: Rows | None) -> str:
    return "DATA" if like is None else "--test"


def _weighted(rows: Rows, by_class: Mapping[str, float]) -> Rows:
    """Return the rows with the sample weights that `fit(..., class_weight=...)` would give them."""
    number = {str(name): k for k, name in enumerate(rows.classes)}
    weights = {}
    for name, weight in by_class.items():
        if name not in number and not str(name).lstrip("-").isdigit():
            raise ValueError(
                f"--class-weight must name classes, got {name!r}, which is none of "
                f"{', '.join(map(repr, number)) or 'the numbers from 0'}."
            )
        weights[number[name] if name in number else int(name)] = float(weight)
    weight = class_weights(rows.given, weights)

    def weighted() -> Any:
        data = rows.read()
        if not isinstance(data, tf.data.Dataset):
            return rows.examples.x, rows.given, weight
        of_batches = tf.data.Dataset.from_tensor_slices(weight).batch(_BATCH)
        return tf.data.Dataset.zip(data, of_batches).map(lambda batch, w: (*batch, w))

    note = "The rows are weighted by class, as fit(class_weight=...) does."
    digest = rows.digest and f"{rows.digest} {sorted(weights.items())}"
    return replace(rows, read=weighted, weights=weight, digest=digest, notes=(*rows.notes, note))


def _npz(path: Path, wanted: Wanted, argument: str) -> tuple[Rows, Rows | None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged file raises many types of errors
        raise ValueError(
            f"{path.name} must be an .npz file of plain arrays, got {' '.join(str(error).split())} "
            "(write it by np.savez(path, x=x, y=y), without object arrays)."
        ) from error
    classes = tuple(map(str, arrays.pop("classes", ())))
    names = tuple(map(str, arrays.pop("names", ())))
    columns = tuple(map(str, arrays.pop("columns", ())))
    split = {"x_train", "y_train"} <= set(arrays)
    parts: list[dict[str, Any]] = [
        {"x": arrays.get(f"x_{s}"), "y": arrays.get(f"y_{s}")} for s in ("train", "test")
    ]
    if not split:
        parts = [arrays]
    elif argument == "test":
        parts = parts[1:]
    found: list[Rows] = []
    for part in parts:
        if any(value is None for value in part.values()):
            continue
        if "y" not in part or len(part) < 2:
            raise ValueError(
                f"{path.name} must hold the arrays x and y, or x_train, y_train, x_test and "
                f"y_test, got {', '.join(sorted(arrays)) or 'none'}."
            )
        part = dict(part)
        y, weight = part.pop("y"), part.pop("sample_weight", None)
        x = part["x"] if set(part) == {"x"} else part
        value = (x, y) if weight is None else (x, y, weight)
        own = names if len(names) == len(y) else ()
        argument_ = argument if not found else "test"
        rows = Rows(lambda v=value: v, wanted, argument_, own, classes, columns, source=str(path))
        rows.examples  # noqa: B018 - raises an error for invalid arrays
        found.append(rows)
    if not found:
        raise ValueError(f"{path.name} must hold x_test and y_test for test rows, got none.")
    return found[0], found[1] if len(found) > 1 else None


def _folder(
    path: Path, wanted: Wanted, how: Reading, like: Rows | None
) -> tuple[Rows, Rows | None]:
    inside = {child.name.lower(): child for child in sorted(path.iterdir()) if child.is_dir()}
    train = next((inside[name] for name in _TRAIN if name in inside), None)
    if train is not None and len(inside) <= 4 and set(inside) <= {*_TRAIN, *_TEST}:
        test = next((inside[name] for name in _TEST if name in inside), None)
        rows = _by_class(train, wanted, how, like)
        return rows, None if test is None else _by_class(test, wanted, how, rows)
    return _by_class(path, wanted, how, like), None


def _by_class(path: Path, wanted: Wanted, how: Reading, like: Rows | None) -> Rows:
    """Read a folder of images or texts with one subfolder for each class."""
    images = sorted(p for p in path.glob("*/**/*") if p.suffix.lower() in _IMAGES)
    texts = sorted(path.glob("*/**/*.txt"))
    if not images and not texts:
        raise ValueError(
            f"{_called(like)} must hold a subfolder for each class, with images "
            f"({', '.join(_IMAGES)}) or .txt files, got {str(path)!r} without any."
        )
    if len(wanted.inputs) > 1:
        raise ValueError(
            f"{_called(like)} must hold the {len(wanted.inputs)} inputs of the model, got a folder "
            "with one file for each row; give module:function instead."
        )
    rows = _images(path, wanted, how, like) if images else _texts(path, texts, wanted, like)
    if like is not None and like.classes and tuple(rows.classes) != tuple(like.classes):
        raise ValueError(
            f"--test must have the classes of the training rows, {_list(like.classes)}, got "
            f"{_list(rows.classes)}."
        )
    return rows


def _images(path: Path, wanted: Wanted, how: Reading, like: Rows | None) -> Rows:
    shape = next(iter(wanted.inputs.values()), ((None, None, 3), ""))[0]
    if len(shape) != 3 or shape[2] not in (None, 1, 3, 4):
        raise ValueError(
            f"{_called(like)} must fit the model, which takes rows of shape {shape}, got a folder "
            "of images; a model for images takes (height, width, channels)."
        )
    size = how.image_size or tuple(
        int(own or usual) for own, usual in zip(shape[:2], _IMAGE_SIZE, strict=True)
    )
    mode = {1: "grayscale", 4: "rgba"}.get(shape[2] or 3, "rgb")
    options: dict[str, Any] = {"image_size": size, "color_mode": mode, "batch_size": _BATCH}
    dataset = keras.utils.image_dataset_from_directory(
        path, shuffle=False, verbose=False, **options
    )
    files = [Path(name) for name in dataset.file_paths]
    classes = tuple(dataset.class_names)
    number = {name: k for k, name in enumerate(classes)}
    y = np.array([number[file.relative_to(path).parts[0]] for file in files])
    labels = wanted.coded(y)
    factor, offset = how.scale or (1.0, 0.0)

    def prepared() -> Any:
        # If the loss takes one-hot labels, convert them as Keras does for label_mode="categorical".
        def pixels(x: Any, y: Any) -> Any:
            y = y if labels.ndim == 1 else keras.ops.one_hot(y, labels.shape[1])
            return (x * factor + offset if how.scale else x), y

        return dataset.map(pixels)

    digest = f"{digest_of(files, path)} {size} {mode} {factor} {offset}"
    return Rows(
        prepared,
        wanted,
        "train" if like is None else "test",
        names=tuple(str(file.relative_to(path)) for file in files),
        classes=classes,
        files=tuple(files),
        labels=labels,
        digest=digest,
        source=str(path),
        notes=(f"Images are read in the size {size[0]} x {size[1]}.",),
    )


def _texts(path: Path, files: Sequence[Path], wanted: Wanted, like: Rows | None) -> Rows:
    dataset = keras.utils.text_dataset_from_directory(
        path, shuffle=False, verbose=False, batch_size=_BATCH
    )
    batches = list(dataset.as_numpy_iterator())
    texts = np.concatenate([x for x, _ in batches])
    y = np.concatenate([y for _, y in batches])
    # Keras does not return the file names of texts. It reads the files sorted by class and name. If
    # the contents of the sorted files do not match the texts, the rows get no file names.
    classes = tuple(dataset.class_names)
    order = sorted(files, key=lambda p: (classes.index(p.relative_to(path).parts[0]), p))
    same = len(order) == len(texts) and all(
        file.read_bytes() == text for file, text in zip(order, texts, strict=True)
    )
    names = tuple(str(file.relative_to(path)) for file in order) if same else ()
    value = (texts.astype(object), y)
    return Rows(
        lambda: value,
        wanted,
        "train" if like is None else "test",
        names=names,
        classes=classes,
        digest=digest_of(order, path),
        source=str(path),
    )


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, list(names)[:10])) + (" ..." if len(names) > 10 else "")
