"""A spam filter for mails, with TextVectorization, Embedding and LSTM layers."""

from __future__ import annotations

import tarfile
from pathlib import Path

import keras
import numpy as np

from examples import Trial

_WORDS = 2000
# The number of words that the model reads, and its width, for the real and for the made-up mails.
_REAL_SIZE, _SMALL_SIZE = (80, 16), (26, 8)
# The numbers of epochs, for the real mails and for the made-up mails.
_REAL_EPOCHS, _SMALL_EPOCHS = 6, 30
# The numbers of training and test mails, for Enron's mails and for the made-up mails.
_REAL, _SMALL = (800, 200), (160, 40)
_SPAM = "free money offer click winner price viagra cheap online deal".split()
_HAM = "meeting report gas contract attached schedule deal friday team forecast".split()
_BOTH = "the a to and of please we you is for this with your our on in".split()


def make(out: Path, folder: Path | None) -> Trial:
    """Write the mails as .txt files into one folder per class, and train the model on them.

    Args:
      out: the folder to write to. If `folder` is given, `out` gets mails of real people: do not
        publish it.
      folder: the folder with `enron1/enron1.tar.gz`, or None for short made-up mails.
    """
    texts, labels = _made_up(sum(_SMALL)) if folder is None else _enron(folder, sum(_REAL))
    num_train = (_SMALL if folder is None else _REAL)[0]
    for number, (text, label) in enumerate(zip(texts, labels, strict=True)):
        part = "train" if number < num_train else "test"
        place = out / "mails" / part / ("ham", "spam")[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05d}.txt").write_text(text, encoding="utf-8")
    length, units = _SMALL_SIZE if folder is None else _REAL_SIZE
    keras.utils.set_random_seed(0)
    rows = keras.utils.text_dataset_from_directory(out / "mails" / "train", seed=0, verbose=False)
    words = keras.layers.TextVectorization(_WORDS, output_sequence_length=length)
    words.adapt(rows.map(lambda x, y: x))
    model = keras.Sequential(
        [
            keras.Input((1,), dtype="string"),
            words,
            keras.layers.Embedding(words.vocabulary_size(), units, mask_zero=True),
            keras.layers.LSTM(units),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )
    model.compile("adam", "binary_crossentropy")
    model.fit(rows, epochs=_SMALL_EPOCHS if folder is None else _REAL_EPOCHS, verbose=0)
    model.save(out / "model.keras")
    return Trial(out / "model.keras", out / "mails")


def _enron(folder: Path, count: int) -> tuple[list[str], list[int]]:
    texts, labels = [], []
    with tarfile.open(folder / "enron1" / "enron1.tar.gz") as archive:
        members = sorted(
            (member for member in archive if member.isfile() and member.name.endswith(".txt")),
            key=lambda member: member.name,
        )
        for k in np.random.default_rng(0).permutation(len(members))[:count]:
            file = archive.extractfile(members[k])
            assert file is not None  # it is a regular file
            texts.append(file.read().decode("latin-1"))
            labels.append(int("/spam/" in members[k].name))
    return texts, labels


def _made_up(count: int) -> tuple[list[str], list[int]]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, count)
    texts = []
    for label in labels:
        own = (_HAM, _SPAM)[int(label)]
        words = [*rng.choice(own, 6), *rng.choice(_BOTH, 20)]
        texts.append(" ".join(rng.permutation(words)))
    return texts, [int(label) for label in labels]
