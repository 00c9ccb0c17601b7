import keras
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from influence import GenericNeuralNet
from influence.tool.read import Reading, read
from influence.tool.rows import Rows, Wanted

NUMBERS = Wanted({"x": ((2,), "float32")})
IMAGES = Wanted({"x": ((12, 10, 3), "float32")})
TEXTS = Wanted({"x": ((1,), "string")})


@pytest.fixture
def npz(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        return str(tmp_path / "a.npz")

    return write


@pytest.fixture
def images(tmp_path):
    """Return a folder of images of two sizes and two classes, and a file that is no image."""
    rng = np.random.default_rng(0)
    for name, count in (("cat", 3), ("a dog", 2)):
        (tmp_path / "i" / name).mkdir(parents=True)
        for k in range(count):
            shape = (12, 10, 3) if k else (24, 20, 3)
            picture = Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8))
            picture.save(tmp_path / "i" / name / f"{k}.png")
    (tmp_path / "i" / "cat" / "notes.md").write_text("no image")
    return tmp_path / "i"


def csv(tmp_path, text, name="t.csv"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def test_npz_of_plain_arrays(npz):
    x, y = np.arange(8.0).reshape(4, 2), np.arange(4)
    rows, test = read(npz(x=x, y=y, names=list("abcd"), classes=list("wxyz")), NUMBERS)
    np.testing.assert_array_equal(rows.examples.x, x)
    np.testing.assert_array_equal(rows.examples.y, y)
    assert test is None and len(rows) == 4
    assert rows.name(2) == "c" and rows.class_name(3) == "z"
    assert rows.kind == "table"


def test_npz_of_keras_own_names_has_test_rows_too(npz):
    x, y = np.arange(8.0).reshape(4, 2), np.arange(4)
    path = npz(x_train=x, y_train=y, x_test=x[:3] + 1, y_test=y[:3])
    rows, test = read(path, NUMBERS)
    assert len(rows) == 4 and len(test) == 3 and test.argument == "test"
    np.testing.assert_array_equal(test.examples.x, x[:3] + 1)
    again, _ = read(path, NUMBERS, like=rows)
    assert again.content == test.content != rows.content


def test_npz_of_several_inputs_and_weights(npz):
    wanted = Wanted({"a": ((2,), "float32"), "b": ((1,), "float32")})
    path = npz(a=np.ones((3, 2)), b=np.zeros((3, 1)), y=np.arange(3), sample_weight=np.ones(3))
    rows, _ = read(path, wanted)
    assert set(rows.examples.x) == {"a", "b"}
    np.testing.assert_array_equal(rows.examples.sample_weight, np.ones(3))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.ones((3, 2))}, "must hold the arrays x and y"),
        ({"x": np.ones((3, 2)), "y": np.ones(2)}, "x and y must have as many rows"),
        ({"x": np.array([[None, 1]], object), "y": np.ones(1)}, "plain arrays"),
        ({"x": np.array([[np.nan, 1]]), "y": np.ones(1)}, "x must be finite"),
    ],
)
def test_wrong_npz_files_are_named(npz, arrays, says):
    with pytest.raises(ValueError, match=says):
        read(npz(**arrays), NUMBERS)[0].examples  # noqa: B018


def test_images_are_those_of_keras(images):
    rows, _ = read(str(images), IMAGES)
    dataset = keras.utils.image_dataset_from_directory(
        images, image_size=(12, 10), shuffle=False, verbose=False
    )
    x = np.concatenate([x for x, _ in dataset.as_numpy_iterator()])
    y = np.concatenate([y for _, y in dataset.as_numpy_iterator()])
    np.testing.assert_array_equal(rows.examples.x, x)
    np.testing.assert_array_equal(rows.examples.y, y)
    np.testing.assert_array_equal(rows.labels, y)
    assert rows.classes == ("a dog", "cat") and rows.name(0) == "a dog/0.png"
    assert rows.kind == "image" and len(rows) == 5


def test_images_can_be_grey_scaled_weighted_and_one_hot(images):
    wanted = Wanted({"x": ((None, None, 1), "float32")}, (), 2)
    how = Reading(image_size=(6, 6), scale=(1 / 255, -0.5))
    rows, _ = read(str(images), wanted, how)
    assert rows.examples.x.shape == (5, 6, 6, 1)
    assert -0.5 <= rows.examples.x.min() < rows.examples.x.max() <= 0.5
    np.testing.assert_array_equal(rows.examples.y, np.eye(2)[[0, 0, 1, 1, 1]])
    weighted, _ = read(str(images), IMAGES, Reading(class_weight={"cat": 3.0}))
    np.testing.assert_array_equal(weighted.examples.sample_weight, [1, 1, 3, 3, 3])
    assert weighted.content != read(str(images), IMAGES)[0].content


def test_a_folder_may_hold_train_and_validation(images, tmp_path):
    (tmp_path / "both").mkdir()
    for name in ("train", "val"):
        (tmp_path / "both" / name).symlink_to(images, target_is_directory=True)
    rows, test = read(str(tmp_path / "both"), IMAGES)
    assert len(rows) == len(test) == 5
    assert rows.argument == "train" and test.argument == "test"


def test_content_changes_with_a_file(images):
    before = read(str(images), IMAGES)[0].content
    assert read(str(images), IMAGES)[0].content == before
    Image.new("RGB", (10, 12)).save(images / "cat" / "1.png")
    assert read(str(images), IMAGES)[0].content != before


def test_texts_are_those_of_keras_with_their_file_names(tmp_path):
    for name, texts in (("ham", ["one two", "three"]), ("spam", ["\xe9 four"])):
        (tmp_path / "t" / name).mkdir(parents=True)
        for k, text in enumerate(texts):
            (tmp_path / "t" / name / f"{k}.txt").write_bytes(text.encode("latin-1"))
    rows, _ = read(str(tmp_path / "t"), TEXTS)
    dataset = keras.utils.text_dataset_from_directory(tmp_path / "t", shuffle=False, verbose=False)
    ((x, y),) = dataset.as_numpy_iterator()
    np.testing.assert_array_equal(np.ravel(rows.examples.x), x)
    np.testing.assert_array_equal(rows.examples.y, y)
    assert rows.name(1) == "ham/1.txt" and rows.kind == "text"
    assert rows.text(0) == "one two" and rows.text(2) == "� four"


def test_a_table_gives_the_columns_that_the_model_takes(tmp_path):
    path = csv(tmp_path, "a,b,label,c\n1,2,yes,x\n3,4,no,y\n5,6,yes,z\n")
    rows, _ = read(path, NUMBERS, Reading(drop=("c",)))
    np.testing.assert_array_equal(rows.examples.x, [[1, 2], [3, 4], [5, 6]])
    np.testing.assert_array_equal(rows.examples.y, [1, 0, 1])
    assert rows.classes == ("no", "yes") and rows.columns == ("a", "b")
    test, _ = read(path, NUMBERS, Reading(drop=("c",)), like=rows)
    assert test.classes == rows.classes
    wrong = csv(tmp_path, "a,b,label,c\n1,2,maybe,x\n", "w.csv")
    with pytest.raises(ValueError, match="must hold the classes 'no', 'yes', got 'maybe'"):
        read(wrong, NUMBERS, Reading(drop=("c",)), like=rows)


def test_strings_of_a_table_stay_as_they_are(tmp_path):
    wanted = Wanted({"n": ((1,), "float32"), "s": ((1,), "string")})
    path = csv(tmp_path, "n,s,y\n1,None,0\n2,NA,1\n3,,0\n4,x,1\n")
    rows, _ = read(path, wanted)
    assert list(np.ravel(rows.examples.x["s"])) == ["None", "NA", "", "x"]
    np.testing.assert_array_equal(np.ravel(rows.examples.x["n"]), [1, 2, 3, 4])
    assert "'s' were read as empty strings" in rows.notes[0]
    assert rows.kind == "table"


def test_a_column_of_texts(tmp_path):
    path = csv(tmp_path, 'id,text,y\n1,"a, b",0\n2,c d,1\n')
    for how in (Reading(text="text"), Reading(text="text", target="y")):
        rows, _ = read(path, TEXTS, how)
        assert [rows.text(k) for k in range(2)] == ["a, b", "c d"]


def test_parquet_is_read_like_csv(tmp_path):
    pytest.importorskip("pyarrow")
    frame = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0], "y": [0, 1]})
    frame.to_parquet(tmp_path / "t.parquet")
    rows, _ = read(str(tmp_path / "t.parquet"), NUMBERS)
    np.testing.assert_array_equal(rows.examples.x, [[1, 3], [2, 4]])


@pytest.mark.parametrize(
    ("text", "how", "says"),
    [
        ("a,b,c\n1,2,3\n", {}, "--target must name the column of labels, one of 'a', 'b', 'c'"),
        ("a,b,y\n1,2,3\n", {"target": "z"}, "--target must be one of 'a', 'b', 'y', got 'z'"),
        ("a,b,y\n1,2,3\n", {"drop": ("z",)}, "--drop must be one of"),
        ("a,b,y\n1,2,3\n", {"weight": "w"}, "--weight must be one of"),
        ("a,b,c,y\n1,2,3,4\n", {}, "must have 2 columns for the model besides --target, got 3"),
        ("a,b,y\n1,x,3\n", {}, "got strings in 'b'; leave such columns out by --drop"),
        ("a,b,y\n1,,3\n", {}, "x must be finite, got NaN or infinity in row 0"),
        ("a,b,y\n1,2,\n3,4,1\n", {}, "must have a label in every row, got none in row 0"),
        ("a,b,y\n", {}, "must have at least one row"),
        ("", {}, "must be a table with a line of column names"),
    ],
)
def test_wrong_tables_are_named(tmp_path, text, how, says):
    with pytest.raises(ValueError, match=says):
        read(csv(tmp_path, text), NUMBERS, Reading(**how))


def test_a_missing_input_column_is_named(tmp_path):
    wanted = Wanted({"n": ((1,), "float32"), "s": ((1,), "string")})
    with pytest.raises(ValueError, match="a column for each input of the model, got none for 's'"):
        read(csv(tmp_path, "n,y\n1,0\n"), wanted)


def test_wrong_folders_and_paths_are_named(tmp_path, images):
    (tmp_path / "empty" / "class").mkdir(parents=True)
    for path, wanted, says in (
        ("nowhere", NUMBERS, "DATA must be an .npz file, .* got 'nowhere', which is not there"),
        (str(tmp_path / "empty"), IMAGES, "must hold a subfolder for each class, with images"),
        (str(images), NUMBERS, r"takes rows of shape \(2,\), got a folder of images"),
        (str(images / "cat" / "notes.md"), NUMBERS, "DATA must be an .npz file"),
    ):
        with pytest.raises(ValueError, match=says):
            read(path, wanted)
    rows, _ = read(str(images), IMAGES)
    (images / "cat").rename(images / "lion")
    with pytest.raises(ValueError, match="--test must have the classes .* 'cat', got .* 'lion'"):
        read(str(images), IMAGES, like=rows)
    with pytest.raises(ValueError, match="--class-weight must name classes, got 'cow'"):
        read(str(images), IMAGES, Reading(class_weight={"cow": 2.0}))


def test_a_function_gives_the_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "import numpy as np\ndef rows():\n    return np.ones((3, 2)), np.arange(3)\n"
    (tmp_path / "own_rows.py").write_text(code)
    for text in ("own_rows.py:rows", "own_rows:rows"):
        rows, test = read(text, NUMBERS)
        assert len(rows) == 3 and test is None and rows.content
    with pytest.raises(ValueError, match="'own_rows' has no function 'nothing'"):
        read("own_rows:nothing", NUMBERS)
    with pytest.raises(ValueError, match="whose module cannot be imported"):
        read("no_such_module_here:rows", NUMBERS)


def test_arrays_are_recognised_as_what_they_are():
    for shape, kind in (
        ((3, 16, 16, 1), "image"),
        ((3, 28, 28), "image"),
        ((3, 784), "image"),
        ((3, 5), "table"),
        ((3, 500), "other"),
        ((3, 4, 2), "other"),
    ):
        x = np.random.default_rng(0).random(shape)
        rows = Rows.of((x, np.zeros(3)), Wanted({"x": (shape[1:], "float32")}), "train")
        assert rows.kind == kind, shape


def test_a_model_says_what_it_takes():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", "categorical_crossentropy")
    wanted = Wanted.by(GenericNeuralNet(model))
    assert [shape for shape, _ in wanted.inputs.values()] == [(4,)]
    assert wanted.one_hot == 3
    np.testing.assert_array_equal(wanted.coded(np.array([2, 0])), [[0, 0, 1], [1, 0, 0]])
    model.compile("sgd", "sparse_categorical_crossentropy")
    assert Wanted.by(GenericNeuralNet(model)).one_hot is None
