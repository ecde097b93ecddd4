import io
import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.progress import Progress
from badloss_jax.data import load_dataset, tfds
from badloss_jax.data.prepare import prepare
from tests.data.test_data import settings


def test_tfds_reads_the_folder_itself(prepared):
    import tensorflow_datasets

    source = tensorflow_datasets.builder_from_directory(prepared / "out").as_data_source("train")
    images = load_dataset(settings("image_folder", prepared / "folder"), 0).train
    assert len(source) == 12
    for element, pixels, label in zip(source, images.images, images.labels, strict=True):
        np.testing.assert_array_equal(element["image"], pixels)
        assert element["label"] == label
    assert source[7]["file_name"] == b"dog & <b>/1.png"
    files = [record.features.feature["image"].bytes_list.value[0] for record in raw_records(prepared / "out")]
    assert files[0] == (prepared / "folder" / "train" / "cat" / "0.png").read_bytes()


def raw_records(folder):
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from tensorflow_datasets.proto import tf_example_pb2

    paths = sorted(map(str, folder.glob("*-train.array_record-*")))
    return [tf_example_pb2.Example.FromString(record) for record in ArrayRecordDataSource(paths)]


def lazily(folder, **changed):
    return tfds.load(settings("tfds", folder, **changed)).train


index = st.one_of(
    st.integers(-12, 11), st.slices(12), st.lists(st.integers(-12, 11)).map(lambda rows: np.array(rows, int)),
    st.lists(st.booleans(), min_size=12, max_size=12).map(np.array),
)  # fmt: skip


def test_images_are_indexed_like_an_array(prepared):
    array = load_dataset(settings("image_folder", prepared / "folder"), 0).train.images
    images = lazily(prepared / "out").images
    assert (images.shape, images.dtype, images.ndim, len(images)) == (array.shape, array.dtype, array.ndim, 12)

    @hypothesis_settings(max_examples=40, deadline=None)
    @given(index)
    def check(key):
        np.testing.assert_array_equal(images[key], array[key])

    check()
    for key in (12, -13, [0, 12], (0, 1), [[0, 1]]):
        with pytest.raises(IndexError):
            images[key]


def test_views_do_not_decode(prepared, monkeypatch):
    expected = load_dataset(settings("image_folder", prepared / "folder", train_examples=5, pad=2), 3).train
    split = lazily(prepared / "out", image_size=8)
    rows = np.flatnonzero(np.isin(np.arange(12), [1, 4, 9]))
    with monkeypatch.context() as patch:
        patch.setattr("badloss_jax.data.records.decode_pixels", None)
        view = split.view(rows, 2)
        assert view.images.shape == (3, 12, 12, 3)
        assert view.fingerprint
    np.testing.assert_array_equal(view.images[:], np.pad(split.images[rows], ((0, 0), (2, 2), (2, 2), (0, 0))))
    loaded = load_dataset(settings("tfds", prepared / "out", train_examples=5, pad=2), 3).train
    np.testing.assert_array_equal(loaded.images, expected.images)
    np.testing.assert_array_equal(loaded.labels, expected.labels)


def test_the_fingerprint_follows_all_that_changes_the_pixels(prepared):
    split = lazily(prepared / "out", image_size=8)
    prints = {split.fingerprint, split.view(np.arange(11), 0).fingerprint, split.view(slice(None), 1).fingerprint,
              lazily(prepared / "out", image_size=9).fingerprint, lazily(prepared / "out", channels=1).fingerprint,
              split.view(np.arange(12)[::-1], 0).fingerprint}  # fmt: skip
    assert len(prints) == 6
    assert split.materialised().fingerprint == split.fingerprint == lazily(prepared / "out", image_size=8).fingerprint
    image = prepared / "folder" / "train" / "cat" / "0.png"
    Image.new("RGB", (8, 8)).save(image)
    prepare("image_folder", prepared / "folder", prepared / "other", 0, Progress(None))
    assert lazily(prepared / "other", image_size=8).fingerprint not in prints


def read_in_child(images):
    return images[3]


def test_threads_processes_and_grain_read_at_once(prepared):
    import multiprocessing

    import grain

    images = lazily(prepared / "out").images
    array = images[:]
    with ThreadPoolExecutor(8) as pool:
        for row, pixels in enumerate(pool.map(images.__getitem__, list(range(12)) * 8)):
            np.testing.assert_array_equal(pixels, array[row % 12])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(images))[5], array[5])  # noqa: S301
    with multiprocessing.get_context("forkserver").Pool(2) as processes:
        np.testing.assert_array_equal(processes.apply(read_in_child, (images,)), array[3])
    batches = grain.MapDataset.source(images).batch(4).to_iter_dataset(grain.ReadOptions(num_threads=4))
    np.testing.assert_array_equal(np.concatenate(list(batches)), array)


def test_mixed_sizes_and_skip_corrupt(prepared):
    Image.new("RGB", (9, 20)).save(prepared / "folder" / "train" / "dog & <b>" / "big.jpg")
    prepare("image_folder", prepared / "folder", prepared / "mixed", 0, Progress(None))
    with pytest.raises(DataError, match=r"record 12 of .* \(train 12\) is \(20, 9\), and others are \(8, 8\)"):
        load_dataset(settings("tfds", prepared / "mixed"), 0)
    assert load_dataset(settings("tfds", prepared / "mixed", image_size=8), 0).image_shape == (8, 8, 3)
    with pytest.raises(UsageError, match=r"data.skip_corrupt = True is not possible with data.source = 'tfds'"):
        load_dataset(settings("tfds", prepared / "mixed", skip_corrupt=True), 0)


def test_a_record_that_does_not_decode_is_named(prepared):
    path = prepared / "folder" / "train" / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:-60])
    prepare("image_folder", prepared / "folder", prepared / "cut", 0, Progress(None))
    with pytest.raises(DataError, match=r"record 3 of .*image_folder-train.* \(train 3\) does not decode"):
        load_dataset(settings("tfds", prepared / "cut"), 0)
    with pytest.raises(DataError, match=r"cat/3.png in .* does not decode"):
        prepare("image_folder", prepared / "folder", prepared / "cut8", 8, Progress(None))


def test_more_than_the_memory_is_streamed_or_refused(prepared):
    streamed = load_dataset(settings("tfds", prepared / "out", image_size=2**20), 0).train.images
    assert streamed.shape == (12, 2**20, 2**20, 3)
    assert not isinstance(streamed, np.ndarray)
    with pytest.raises(DataError, match=r"the 12 images of train take .* bytes, and the machine has"):
        load_dataset(settings("tfds", prepared / "out", image_size=2**20, input="resident"), 0)


def test_neither_tensorflow_nor_grain_is_imported(prepared):
    code = f"""
import sys
from tests.conftest import encoded, prepare_in_shards, unpack
from tests.data.test_data import settings
from badloss_jax.data import load_dataset
load_dataset(settings("digits"), 0)
assert not {{"tensorflow_datasets", "array_record", "grain", "tensorflow"}} & set(sys.modules)
load_dataset(settings("tfds", {str(prepared / "out")!r}), 0)
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_folders(prepared, tmp_path):
    assert len(lazily(prepared / "out").labels) == 12
    (tmp_path / "data").mkdir()
    (prepared / "out").rename(tmp_path / "data" / "1.0.0")
    assert len(lazily(tmp_path / "data").labels) == 12
    shutil.copytree(tmp_path / "data" / "1.0.0", tmp_path / "data" / "2.0.0")
    for folder, message in (("data", "has several datasets"), ("folder", "has no dataset_info.json; `badloss prepare"),
                            ("none", "is not a folder")):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            lazily(tmp_path / folder)


# --- datasets that TFDS itself wrote


def write_by_tfds(folder, splits):
    """TFDS's own writer, in shards of four; each image shows its number."""
    import tensorflow_datasets
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    features = tensorflow_datasets.features.FeaturesDict(
        {"image": tensorflow_datasets.features.Image(shape=(5, 6, 3)),
         "label": tensorflow_datasets.features.ClassLabel(names=["a", "b"])}
    )  # fmt: skip
    folder = folder / "toy" / "1.0.0"
    folder.mkdir(parents=True)
    identity = DatasetIdentity("toy", tensorflow_datasets.core.Version("1.0.0"), str(folder), "")
    info = tensorflow_datasets.core.DatasetInfo(builder=identity, features=features)
    writer = tensorflow_datasets.core.SequentialWriter(info, 4, file_format="array_record")
    writer.initialize_splits(list(splits))
    for name, labels in splits.items():
        writer.add_examples({name: [{"image": png(i), "label": label} for i, label in enumerate(labels)]})
    writer.close_all()
    return folder


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((5, 6, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:.*test has no labels")
def test_a_dataset_of_tfds(tmp_path, monkeypatch):
    labels = [0, 1, 1, 0, 1, 0, 0, 1, 1]
    folder = write_by_tfds(tmp_path / "tfds", {"train": labels, "test": [-1] * 3, "validation": [1, 0]})
    chosen = settings("tfds", tmp_path / "tfds", cache_dir=str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="test has no labels, validation is taken instead"):
        dataset = load_dataset(chosen, 0)
    np.testing.assert_array_equal(dataset.train.images[:, 0, 0, 0], np.arange(9))
    np.testing.assert_array_equal(dataset.train.labels, labels)
    assert (dataset.class_names, dataset.image_shape, len(dataset.test.labels)) == (("a", "b"), (5, 6, 3), 2)
    with monkeypatch.context() as patch:
        patch.setattr(tfds, "read_labels", None)
        assert tfds.load(chosen).train.fingerprint == dataset.train.fingerprint
    for path in (tmp_path / "cache" / "labels").iterdir():
        path.write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"cached labels in .* are damaged"):
        assert tfds.load(chosen).train.fingerprint == dataset.train.fingerprint
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="labels are not cached"):
        tfds.load(chosen | {"cache_dir": str(tmp_path / "file")})
    next(folder.glob("*train*00001*")).unlink()
    with pytest.raises(DataError, match=r"toy-train.array_record-00001.* is missing"):
        tfds.load(chosen)


@pytest.mark.parametrize(
    ("name", "old", "new", "error", "message"),
    [
        ("dataset_info.json", '"array_record"', '"tfrecord"', UsageError, "format tfrecord, which need TensorFlow"),
        (
            "dataset_info.json",
            '"validation"',
            '"other"',
            UsageError,
            "has the splits train, other; expected train, and",
        ),
        ("dataset_info.json", "{DATASET}-", "../{DATASET}-", DataError, "which is not in its folder"),
        ("dataset_info.json", "{", "", DataError, "cannot be read as a TFDS dataset"),
        ("features.json", "tensorflow_datasets.core.features.image_feature.Image", "os.path", DataError, "'os.path'"),
        ("features.json", '"image":', '"picture":', UsageError, "features .*picture.*; expected image, and label"),
        ("features.json", '"uint8"', '"uint16"', UsageError, "stores images as"),
    ],
)
def test_other_datasets_of_tfds(tmp_path, name, old, new, error, message):
    folder = write_by_tfds(tmp_path, {"train": [0, 1], "validation": [0, 1]})
    if name == "features.json" and old == '"image":':
        described = json.loads((folder / name).read_text())
        features = described["featuresDict"]["features"]
        features["picture"] = features.pop("image")
        (folder / name).write_text(json.dumps(described))
    else:
        (folder / name).write_text((folder / name).read_text().replace(old, new, 1 if old == "{" else -1))
    with pytest.raises(error, match=message):
        tfds.load(settings("tfds", folder))
