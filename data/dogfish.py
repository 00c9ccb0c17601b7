"""Dog or fish: 1,800 training and 600 test photographs, split as by Koh & Liang (2017).

The paper draws its photographs from ImageNet's synsets dog and fish. If these are not available,
two of Imagenette's ten classes replace them: English springer and tench. These two classes are
easier to separate than all dogs and all fish. ImageNet allows only research use. Results may
contain numbers computed from its photographs, but never the photographs.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import images
from data.files import DataFile
from data.splits import DataSet, Split
from influence_console import shown

# The authors' 2017 code uses these numbers of photographs of each class (8ca7b4f,
# scripts/load_animals.py).
NUM_TRAIN, NUM_TEST = 900, 300
# As in the authors' code, one generator shuffles the training rows first, then the test rows.
SHUFFLE_SEED = 0
# The squares have these sides in pixels. As in the authors' code, 299 is Inception's input size.
PAPERS_SIDE = 299
IMAGENETTES_SIDE = 224

PAPERS = ("n02084071", "n02512053")  # ImageNet's synsets: dog (label 0), fish (label 1)
IMAGENETTES = ("n02102040", "n01440764")  # English springer, tench
PUBLISHED = "dataset_dog-fish_train-900_test-300.npz"

_WHAT_TO_PUT = f"""\
one of these, by hand, under ImageNet's terms:
      train/{{{",".join(IMAGENETTES)}}}/*.JPEG and val/{{...}}/*.JPEG: English springer and tench,
        of Imagenette (github.com/fastai/imagenette, any size; {IMAGENETTES_SIDE} pixels if resized)
      {{{",".join(PAPERS)}}}/*.JPEG: the paper's own synsets, dog and fish (image-net.org)
      {PUBLISHED}: the photographs as the paper published them"""

_FILE = DataFile(
    path="dogfish",
    size=30_621_467,  # bytes of Imagenette's photographs at 224 pixels
    digests=(),  # any content is accepted
    contents=_WHAT_TO_PUT,
)


def read(folder: Path, dtype: np.dtype) -> tuple[Split, Split]:
    """Read the photographs and shuffle them as the authors' code does.

    Args:
      folder: the data folder. Its subfolder `dogfish` holds the photographs. The paper's own
        photographs are read if they are there, otherwise Imagenette's.
      dtype: ignored. Photographs stay bytes, because floats would take gigabytes.
    Returns: (train, test), each (x, y). x has shape (n, side, side, 3), uint8; side is 224 for
      Imagenette's photographs and 299 for the paper's. y has shape (n,), int64, dog 0, fish 1.
    Raises: ValueError naming the folder with too few photographs, or the broken file.
    """
    home = folder / "dogfish"
    if (home / PUBLISHED).is_file():
        return _published(home / PUBLISHED)
    if any((home / synset).is_dir() for synset in PAPERS):
        found = [_by_number(paths) for paths in _found(home, PAPERS, NUM_TRAIN + NUM_TEST)]
        train = [path for paths in found for path in paths[:NUM_TRAIN]]
        test = [path for paths in found for path in paths[NUM_TRAIN : NUM_TRAIN + NUM_TEST]]
        return _shuffled(train, test, PAPERS_SIDE)
    train, test = (
        [path for paths in _found(home / split, IMAGENETTES, count) for path in paths[:count]]
        for split, count in (("train", NUM_TRAIN), ("val", NUM_TEST))
    )
    return _shuffled(train, test, IMAGENETTES_SIDE)


def _found(home: Path, synsets: Sequence[str], count: int) -> list[list[Path]]:
    """List the photographs of each class; raise ValueError if there are too few."""
    found = [images.photographs(home / synset) for synset in synsets]
    for synset, paths in zip(synsets, found, strict=True):
        if len(paths) < count:
            raise ValueError(
                f"{home / synset}: expected at least {count} photographs, found {len(paths)}. "
                f"dogfish is {_WHAT_TO_PUT}"
            )
    return found


def _by_number(paths: Sequence[Path]) -> list[Path]:
    """Sort paths by the number at the end of each name, as the authors' code does."""
    return sorted(paths, key=lambda path: int((re.findall(r"\d+", path.stem) or ["0"])[-1]))


def _shuffled(train: list[Path], test: list[Path], side: int) -> tuple[Split, Split]:
    # RandomState gives the same numbers in every version of NumPy. The order of the calls must stay
    # that of the authors' code.
    rng = np.random.RandomState(SHUFFLE_SEED)
    parts = []
    for paths in (train, test):
        order = rng.permutation(len(paths))  # dogs are the first half
        x = images.read([paths[i] for i in order], side)
        parts.append((x, (order >= len(paths) // 2).astype(np.int64)))
    return parts[0], parts[1]


def _published(path: Path) -> tuple[Split, Split]:
    """Read the array file of the authors' code. Convert its floats in [-1, 1] to bytes.

    The rows of that file are already shuffled.
    """
    parts = []
    for split, count in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        try:
            with np.load(path, allow_pickle=False) as arrays:
                x, y = arrays[f"X_{split}"], arrays[f"Y_{split}"].astype(np.int64)
        except (KeyError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{shown(path)}: expected arrays X_{split} and Y_{split}, found: {error}."
            ) from error
        shape = (2 * count, PAPERS_SIDE, PAPERS_SIDE, 3)
        if x.shape != shape or sorted(y.tolist()) != [0] * count + [1] * count:
            raise ValueError(
                f"{shown(path)}: expected X_{split} {shape} with {count} labels of each class in "
                f"Y_{split}, found {x.shape} with labels {np.unique(y, return_counts=True)}."
            )
        pixels = np.empty(shape, np.uint8)
        for to, values in zip(pixels, x, strict=True):  # one by one, to save gigabytes
            levels = (values + 1) * 127.5
            nearest = np.rint(levels)
            if not (
                np.abs(levels - nearest).max() < 1e-3 and 0 <= nearest.min() <= nearest.max() < 256
            ):
                raise ValueError(
                    f"{shown(path)}: expected X_{split} to be bytes scaled to [-1, 1], found "
                    f"values from {values.min():.4g} to {values.max():.4g} that are none."
                )
            to[:] = nearest
        parts.append((pixels, y))
    return parts[0], parts[1]


DATASET = DataSet(
    name="dogfish",
    what="photographs of dogs and fish: 1,800 train, 600 test",
    terms="ImageNet's: research only, never to be passed on",
    read=read,
    files=(_FILE,),
)
