"""Tests of Enron1: from text to counts for generated mails, and the real split if it is found."""

import dataclasses
import io
import tarfile

import numpy as np
import pytest
import scipy.sparse

import data
from data import enron1, files, registry
from data.splits import sha256_of_arrays
from tests.data.real import found

REAL, needs_enron1 = found("enron1")
NUM_HAM, NUM_SPAM = 14, 6


@pytest.fixture(scope="module")
def real():
    return data.load("enron1", REAL)


@needs_enron1
def test_real_split_sizes(real):
    (x, y), (x_test, y_test) = real.train, real.test
    assert x.shape == (4_137, 5_350) and x_test.shape == (1_035, 5_350)
    assert (y.sum(), y_test.sum()) == (1_203, 297)  # 1,500 of all 5,172 mails are spam
    assert (x.nnz, x.dtype, x.format) == (185_435, np.dtype("float64"), "csr")
    assert real.sha256 == "6592b4b15717a221fcb4a4458b64111ea8560c9665fe2f3dbfa5d28280a1a087"


@needs_enron1
def test_real_counts_are_whole_and_every_word_is_in_five_mails(real):
    x = real.train[0]
    assert np.array_equal(x.data, np.round(x.data)) and x.data.min() == 1
    assert np.bincount(x.indices).min() == enron1.MIN_TRAINING_MAILS
    assert len(np.unique(x.indices)) == x.shape[1]
    with pytest.raises(ValueError, match="read-only"):
        x.data[0] = 0


# --- words -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Meetings were moved\r\n", ["meeting", "move"]),
        ("subject : re : running late", ["subject", "run", "late"]),
        ("the of and", []),  # all are stop words
        # Words with other characters than letters are dropped.
        ("a1 b2b 2004 $ 100 under_score", []),
        ("x y zebra", ["zebra"]),  # words of one letter are dropped
        ("offer offer offers", ["offer"] * 3),
        ("CAF\xc9 qqqzzz", ["caf\xe9", "qqqzzz"]),  # words without a known lemma are kept
        ("Sydney sydney", ["sydney", "sydney"]),  # lemmas are in lower case
        ("price's", ["price"]),  # the "s" has one letter, so it is dropped
    ],
)
def test_words(text, expected):
    assert enron1.words(text) == expected


def test_vocabulary_is_of_words_in_five_training_mails():
    train = ["zebra zebra"] * 4 + ["zebra lion"] + ["lion lions lion"] * 3
    x, x_test = enron1.counts(train, ["lion zebra", "zebra zebras"], np.dtype("float32"))
    # The word "lion" occurs in only four mails, so it is not in the vocabulary.
    np.testing.assert_array_equal(x.toarray()[:, 0], [2, 2, 2, 2, 1, 0, 0, 0])
    np.testing.assert_array_equal(x_test.toarray(), [[1], [2]])
    assert x.dtype == np.float32


# --- the loader --------------------------------------------------------------------------------


def mails():
    """Return generated mails by file name. Mail k contains "zebra" k times, which identifies it."""
    named = {"Summary.txt": b"not a mail"}
    for k in range(1, NUM_HAM + NUM_SPAM + 1):
        kind = "ham" if k <= NUM_HAM else "spam"
        named[f"{kind}/{k:04}.txt"] = (b"zebra \xe9\r\n" * k) + kind.encode() + b"\r\n"
    return named


@pytest.fixture(params=["archive", "folder"])
def root(request, tmp_path, monkeypatch):
    """Return a data folder of generated mails, which the registry accepts as the real ones."""
    contents = mails()
    for name, content in contents.items():
        path = tmp_path / "enron1/enron1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    size, digest = sum(map(len, contents.values())), files.sha256_of(tmp_path / "enron1/enron1")
    file = dataclasses.replace(enron1._FILE, size=size, digests=(digest,))
    monkeypatch.setattr(enron1, "_FILE", file)
    monkeypatch.setitem(registry.SETS, "enron1", dataclasses.replace(enron1.DATASET, files=(file,)))
    if request.param == "folder":
        return tmp_path
    packed = tmp_path / "packed"
    (packed / "enron1").mkdir(parents=True)
    with tarfile.open(packed / "enron1/enron1.tar.gz", "w:gz") as archive:
        for name, content in reversed(contents.items()):
            member = tarfile.TarInfo(f"enron1/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return packed


def test_split_order_and_labels(root):
    splits = data.load("enron1", root)
    (x, y), (x_test, y_test) = splits.train, splits.test
    # The split gives four fifths of the twenty mails to training.
    assert len(y) == 16 and len(y_test) == 4
    zebra = int(np.argmax(x.sum(axis=0)))
    number = np.concatenate([x[:, zebra].toarray(), x_test[:, zebra].toarray()]).ravel()
    # The seed permutes the sorted names, so the order on disk does not matter.
    order = np.random.RandomState(0).permutation(NUM_HAM + NUM_SPAM)
    np.testing.assert_array_equal(number, order + 1)
    np.testing.assert_array_equal(np.concatenate([y, y_test]), order >= NUM_HAM)
    assert y.dtype == np.int64 and not splits.stand_in


def test_a_changed_mail_is_refused(root):
    path = root / "enron1/enron1/spam/0020.txt"
    if not path.exists():
        path = root / "enron1/enron1.tar.gz"
        path.write_bytes(path.read_bytes()[:-30])
        message = "expected a gzipped tar archive"
    else:
        path.write_bytes(b"zebra")
        message = "enron1/enron1 is not the file it should be"
    with pytest.raises(ValueError, match=message):
        data.load("enron1", root)


# --- the stand-in ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spam():
    return data.load("spam")


def test_stand_in_is_wide_sparse_and_marked(spam):
    (x, y), (x_test, _) = spam.train, spam.test
    assert spam.stand_in and x.format == x_test.format == "csr"
    assert x.shape == (1_000, 1_415) and x_test.shape == (300, 1_415)
    assert y.mean() == pytest.approx(0.3, abs=0.03) and set(y) == {0, 1}
    assert np.bincount(x.indices).min() == 5
    lengths = np.asarray(x.sum(axis=1)).ravel()
    assert lengths.max() > 10 * np.median(lengths)  # a few long mails give rows of large leverage


def test_sparse_rows_cannot_be_changed_but_serve(spam):
    x = spam.train[0]
    for array in (x.data, x.indices, x.indptr):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    assert x[[3, 1]].shape == x[:2].shape == (2, x.shape[1])
    np.testing.assert_array_equal(x.T @ np.ones(len(spam.train[1])), np.ravel(x.sum(axis=0)))


def test_digest_of_sparse_sets_sees_every_entry(spam):
    x = spam.train[0]
    moved, added = x.copy(), x.copy()
    moved.indices[0] = (x.indices[0] + 1) % x.shape[1]
    added.data[-1] += 1
    wider = scipy.sparse.csr_matrix((x.data, x.indices, x.indptr), (x.shape[0], x.shape[1] + 1))
    digests = {sha256_of_arrays([m]) for m in (x, moved, added, wider)}
    assert len(digests) == 4
