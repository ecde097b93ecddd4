import gzip
import os
import signal
import struct
import time
import zipfile
from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image

from badloss_jax.config import default_config
from badloss_jax.core.errors import DataError, PreemptedError, UsageError
from badloss_jax.data import decoding, load_dataset
from badloss_jax.data.augment import crop_flip, resized_crop_flip


def settings(source, folder="", **changed):
    return default_config().data.to_dict() | {"source": source, "dir": str(folder), "cache_dir": ""} | changed


# --- digits


def test_digits():
    dataset = load_dataset(settings("digits"), 0)
    assert dataset.image_shape == (8, 8, 1)
    assert dataset.class_names == tuple("0123456789")
    assert (len(dataset.train.labels), len(dataset.test.labels)) == (1347, 450)
    assert dataset.train.images.max() == 255
    assert max(Counter(dataset.test.labels.tolist()).values()) <= 46  # stratified


def test_subsets_and_padding():
    dataset = load_dataset(settings("digits", train_examples=100, test_examples=7, pad=2), 0)
    assert dataset.train.images.shape == (100, 12, 12, 1)
    assert len(dataset.test.labels) == 7
    assert dataset.train.images[:, :2].max() == 0
    same, other = (load_dataset(settings("digits", train_examples=100, test_examples=7, pad=2), s) for s in (0, 1))
    assert dataset.train.fingerprint == same.train.fingerprint != other.train.fingerprint
    with pytest.raises(UsageError, match=r"data.train_examples = 1348, and the source has 1347"):
        load_dataset(settings("digits", train_examples=1348), 0)


# --- idx


def idx_bytes(array, magic=None):
    head = struct.pack(f">{1 + array.ndim}I", magic or 0x0800 + array.ndim, *array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_folder(tmp_path, rng):
    for prefix, count in (("train", 30), ("t10k", 10)):
        images, labels = rng.integers(0, 256, (count, 6, 5)), np.arange(count) % 10
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    return tmp_path


def test_idx(idx_folder):
    dataset = load_dataset(settings("idx", idx_folder), 0)
    written = gzip.decompress((idx_folder / "train-images-idx3-ubyte.gz").read_bytes())[16:]
    assert dataset.train.images.shape == (30, 6, 5, 1)
    assert dataset.train.images.tobytes() == written
    np.testing.assert_array_equal(dataset.test.labels, np.arange(10))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-20], "is damaged"),
        (lambda raw: b"not gzip at all", "is damaged"),
        (lambda raw: b"", "is damaged|is not an IDX"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-1]), "its header says 900"),
        (lambda raw: gzip.compress(gzip.decompress(raw) + b"x"), "its header says 900"),
        (lambda raw: gzip.compress(idx_bytes(np.zeros((30, 6, 5)), magic=0x0D03)), "not an IDX file"),
        (lambda raw: gzip.compress(struct.pack(">4I", 0x0803, *[2**31] * 3)), "."),
        (lambda raw: gzip.compress(idx_bytes(np.zeros((29, 6, 5)))), "29 images and 30 labels"),
        (lambda raw: gzip.compress(idx_bytes(np.zeros((0, 6, 5)))), "0 images and 30 labels"),
    ],
)
def test_damaged_idx(idx_folder, damage, message):
    path = idx_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        load_dataset(settings("idx", idx_folder), 0)


def test_missing_idx(tmp_path):
    with pytest.raises(UsageError, match=r"train-images-idx3-ubyte.gz does not exist; --config.data.dir"):
        load_dataset(settings("idx", tmp_path / "nowhere"), 0)


# --- GTSRB


@pytest.fixture
def signs(tmp_path, rng):
    """The official layout, three images a class of two classes, of different sizes."""
    head = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    for label in (0, 14):
        place = tmp_path / "Final_Training" / "Images" / f"{label:05}"
        place.mkdir(parents=True)
        lines = [head]
        for i in range(3):
            pixels = np.full((6 + i, 7, 3), 10 * label + i, np.uint8)
            Image.fromarray(pixels).save(place / f"00000_{i:05}.ppm")
            lines.append(f"00000_{i:05}.ppm;7;{6 + i};1;1;5;5;{label}")
        (place / f"GT-{label:05}.csv").write_text("\n".join(lines))
    place = tmp_path / "Final_Test" / "Images"
    place.mkdir(parents=True)
    lines = [head]
    for i, label in enumerate((14, 0, 14)):
        Image.fromarray(np.full((9, 9, 3), label, np.uint8)).save(place / f"{i:05}.ppm")
        lines.append(f"{i:05}.ppm;9;9;1;1;5;5;{label}")
    (tmp_path / "Final_Test" / "GT-final_test.csv").write_text("\r\n".join(lines))
    return tmp_path


def test_gtsrb(signs):
    dataset = load_dataset(settings("gtsrb", signs, image_size=8), 0)
    assert dataset.image_shape == (8, 8, 3)
    assert dataset.train.labels.tolist() == [0, 0, 0, 14, 14, 14]
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 140, 141, 142]
    assert dataset.test.labels.tolist() == [14, 0, 14]
    assert dataset.test.images[:, 0, 0, 0].tolist() == [14, 0, 14]
    assert (dataset.num_classes, dataset.class_names[14]) == (43, "stop")
    with pytest.raises(DataError, match=r"data.image_size=PIXELS resizes"):
        load_dataset(settings("gtsrb", signs), 0)
    (signs / "Final_Test" / "GT-final_test.csv").rename(signs / "GT-final_test.csv")  # as its own archive unpacks
    assert load_dataset(settings("gtsrb", signs, image_size=8), 0).test.labels.tolist() == [14, 0, 14]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("00000_00001.ppm", "../../x.ppm", r"GT-00014.csv, line 3: expected Filename"),
        ("00000_00001.ppm", "/etc/passwd", "line 3: expected Filename"),
        ("00000_00001.ppm", "..", "line 3: expected Filename"),
        ("00000_00001.ppm", "00000_00007.ppm", "line 3: .*00000_00007.ppm does not exist"),
        ("00000_00001.ppm", "00000_00000.ppm", "lists an image twice"),
        ("5;5;14", "5;5;43", "line 2: ClassId '43' is not 0 to 42"),
        ("5;5;14", "5;5;-1", "ClassId '-1'"),
        ("5;5;14", "5;5;" + "9" * 5000, "ClassId '9999"),
        ("5;5;14", "5;5;" + "0" * 9 + "9" * 5000, "ClassId '0000"),
        ("5;5;14", "5;5;" + "0" * 9 + "9" * 30, "ClassId '0000"),
        ("5;5;14", "5;5;", "line 2: expected Filename"),
        (";", ",", "line 2: expected Filename"),
    ],
)
def test_damaged_gtsrb(signs, old, new, message):
    table = signs / "Final_Training" / "Images" / "00014" / "GT-00014.csv"
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        load_dataset(settings("gtsrb", signs, image_size=8), 0)


def test_missing_and_foreign_gtsrb(signs, tmp_path):
    with pytest.raises(UsageError, match=r"has no Final_Training/Images; --config.data.dir=DIR names the folder GTSRB"):
        load_dataset(settings("gtsrb", tmp_path / "none"), 0)
    table = signs / "Final_Test" / "GT-final_test.csv"
    table.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset(settings("gtsrb", signs, image_size=8), 0)
    table.write_text("Filename;ClassId\n")
    with pytest.raises(DataError, match="lists no images"):
        load_dataset(settings("gtsrb", signs, image_size=8), 0)
    table.unlink()
    with pytest.raises(UsageError, match=r"GT-final_test.csv does not exist"):
        load_dataset(settings("gtsrb", signs, image_size=8), 0)


# --- arrays


def arrays(**changed):
    images = np.arange(6 * 4 * 5 * 3, dtype=np.uint8).reshape(6, 4, 5, 3)
    labels = np.array([0, 1, 2, 0, 1, 2])
    return {"x_train": images, "y_train": labels, "x_test": images[:3], "y_test": labels[:3, None]} | changed


def test_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    dataset = load_dataset(settings("arrays", tmp_path / "a.npz"), 0)
    np.testing.assert_array_equal(dataset.train.images, arrays()["x_train"])
    assert dataset.test.labels.tolist() == [0, 1, 2]
    assert dataset.class_names == ("0", "1", "2")
    named = settings("arrays", tmp_path / "b.npz")
    grey = arrays()["x_train"][..., 0]
    np.savez_compressed(
        tmp_path / "b.npz", **arrays(x_train=grey, x_test=grey[:3], class_names=np.array(["a", "<b>", "c"]))
    )
    dataset = load_dataset(named, 0)
    assert dataset.image_shape == (4, 5, 1)
    assert dataset.class_names == ("a", "<b>", "c")
    assert load_dataset(named | {"class_names": ("x", "y", "z")}, 0).class_names == ("x", "y", "z")
    with pytest.raises(UsageError, match=r"data.class_names has 2 names, and the source has 3 classes"):
        load_dataset(named | {"class_names": ("x", "y")}, 0)
    with pytest.raises(DataError, match="two classes have the same name"):
        load_dataset(named | {"class_names": ("x", "y", "x")}, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_train": np.zeros((6, 4, 5, 3))}, r"x_train is float64 .* expected uint8"),
        ({"x_train": np.zeros((0, 4, 5, 3), np.uint8), "y_train": np.zeros(0, int)}, "x_train is uint8"),
        ({"y_train": np.zeros(5, int)}, r"y_train is int64 \(5,\), expected integers \[6\]"),
        ({"y_train": np.zeros(6)}, "y_train is float64"),
        ({"y_train": np.full(6, -1)}, "y_train goes from -1"),
        ({"y_train": np.full(6, 2**40)}, "y_train goes from"),
        ({"x_test": np.zeros((3, 4, 4, 3), np.uint8)}, "they must agree"),
        ({"x_train": np.zeros((6, 0, 5, 3), np.uint8)}, "x_train is uint8"),
        ({"x_train": np.zeros((6, 4, 5, 4), np.uint8)}, r"x_train has 4 channels, expected 1 .grey. or 3"),
        ({"class_names": np.array(["a", "b"])}, "labels go from 0 to 2"),
        ({"class_names": np.arange(3)}, "class_names is int64"),
        ({"y_train": np.array([{}] * 6)}, "is damaged, or no .npz file of plain arrays"),
    ],
)
def test_unusable_arrays(tmp_path, changed, message):
    np.savez(tmp_path / "a.npz", **arrays(**changed))
    with pytest.raises(DataError, match=message):
        load_dataset(settings("arrays", tmp_path / "a.npz"), 0)


def test_missing_and_damaged_arrays(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(UsageError, match=r"--config.data.dir=FILE.npz names one with x_train"):
        load_dataset(settings("arrays", path), 0)
    np.savez(path, x_train=np.zeros(3))
    with pytest.raises(DataError, match="lacks y_train, x_test, y_test; it has x_train"):
        load_dataset(settings("arrays", path), 0)
    np.savez(path, **arrays())
    whole = path.read_bytes()
    for content in (b"", b"nothing", whole[:300], whole[:-200]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a.npz is damaged"):
            load_dataset(settings("arrays", path), 0)
    for member, content in (
        ("x_train", b"nothing"),
        ("y_train.npy", b"\x93NUMPY\x01\x00\x02\x00{'"),
        ("x_test.npy", b""),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            for key in ("x_train", "y_train", "x_test", "y_test"):
                archive.writestr(member if member.startswith(key) else f"{key}.npy", content)
        with pytest.raises(DataError, match=r"a.npz (is damaged|lacks)"):
            load_dataset(settings("arrays", path), 0)
    with zipfile.ZipFile(path, "w") as archive:  # a bomb: its directory claims more than any memory
        archive.writestr("x_train.npy", b"x")
        archive.filelist[0].file_size = 2**50
    with pytest.raises(DataError, match="take 1,125,899,906,842,624 bytes"):
        load_dataset(settings("arrays", path), 0)


# --- image folder


@pytest.fixture
def folder(tmp_path, rng):
    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog & <b>"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def test_image_folder(folder):
    dataset = load_dataset(settings("image_folder", folder), 0)
    assert dataset.class_names == ("cat", "dog & <b>")
    np.testing.assert_array_equal(dataset.train.labels, [0, 0, 0, 1, 1, 1])
    expected = np.asarray(Image.open(folder / "train" / "dog & <b>" / "2.png"))
    np.testing.assert_array_equal(dataset.train.images[5], expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK"])
def test_any_pillow_mode(folder, mode):
    image = Image.new(mode, (8, 8))
    suffix = "tiff" if mode == "CMYK" else "png"
    image.save(folder / "train" / "cat" / f"9.{suffix}")
    assert load_dataset(settings("image_folder", folder), 0).train.images.shape == (7, 8, 8, 3)
    assert load_dataset(settings("image_folder", folder, channels=1), 0).train.images.shape == (7, 8, 8, 1)


def test_16_bits_are_scaled_and_32_refused(folder):
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(folder / "train" / "cat" / "9.png")
    dataset = load_dataset(settings("image_folder", folder, channels=1), 0)
    np.testing.assert_array_equal(dataset.train.images[3, ..., 0], np.round(ramp / 257))
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "train" / "cat" / "8.tiff")
    with pytest.raises(DataError, match=r"8.tiff does not decode: pixels of mode 'F'"):
        load_dataset(settings("image_folder", folder), 0)


def test_mixed_sizes(folder):
    Image.new("RGB", (9, 20)).save(folder / "train" / "dog & <b>" / "big.jpg")
    with pytest.raises(DataError, match=r"big.jpg is \(20, 9\) \(height, width\).*data.image_size"):
        load_dataset(settings("image_folder", folder), 0)
    assert load_dataset(settings("image_folder", folder, image_size=6), 0).image_shape == (6, 6, 3)


def test_empty_class_folder(folder):
    (folder / "train" / "empty").mkdir()
    with pytest.raises(DataError, match=r"train/empty has no images"):
        load_dataset(settings("image_folder", folder), 0)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", None])
def test_a_file_that_does_not_decode_is_named_or_skipped(folder, content):
    whole = (folder / "train" / "cat" / "0.png").read_bytes()
    (folder / "train" / "cat" / "bad.png").write_bytes(whole[:-60] if content is None else content)
    with pytest.raises(DataError, match=r"cat/bad.png does not decode.*skip_corrupt=True"):
        load_dataset(settings("image_folder", folder), 0)
    with pytest.warns(UserWarning, match=r"left out 1 of 7 files that do not decode, first .*bad.png"):
        dataset = load_dataset(settings("image_folder", folder, skip_corrupt=True), 0)
    cached = settings("image_folder", folder, skip_corrupt=True, cache_dir=str(folder / "cache"))
    for _ in range(2):  # decoded, then from the cache
        with pytest.warns(UserWarning, match=r"left out 1 of 7 files"):
            load_dataset(cached, 0)
    np.testing.assert_array_equal(dataset.train.labels, [0, 0, 0, 1, 1, 1])


def test_decompression_bomb(folder):
    Image.new("1", (30_000, 30_000)).save(folder / "train" / "cat" / "bomb.png")
    with pytest.raises(DataError, match=r"bomb.png does not decode"):
        load_dataset(settings("image_folder", folder, image_size=8), 0)


@pytest.mark.parametrize(("missing", "message"), [("test", "no folder test or val"), ("train", "no folder train")])
def test_missing_split(folder, missing, message):
    (folder / missing).rename(folder / "elsewhere")
    with pytest.raises(UsageError, match=message):
        load_dataset(settings("image_folder", folder), 0)


def test_missing_folder_and_foreign_class(folder, tmp_path):
    with pytest.raises(UsageError, match=r"data.dir: '' is not a folder"):
        load_dataset(settings("image_folder"), 0)
    (folder / "test" / "bird").mkdir()
    with pytest.raises(DataError, match="class folder 'bird'"):
        load_dataset(settings("image_folder", folder), 0)


def test_cache_is_keyed_by_content(folder, tmp_path, monkeypatch):
    chosen = settings("image_folder", folder, cache_dir=str(tmp_path / "cache"))
    first = load_dataset(chosen, 0)
    decode = decoding._decode
    decoded = []
    monkeypatch.setattr(decoding, "_decode", lambda files, *rest: decoded.append(files) or decode(files, *rest))
    assert load_dataset(chosen, 0).train.fingerprint == first.train.fingerprint
    assert not decoded
    Image.new("RGB", (8, 8)).save(folder / "train" / "cat" / "0.png")
    assert load_dataset(chosen, 0).train.fingerprint != first.train.fingerprint
    assert len(decoded) == 1
    load_dataset(chosen | {"channels": 1}, 0)
    assert len(decoded) == 3


def test_cached_labels_follow_the_class_folders(folder, tmp_path):
    chosen = settings("image_folder", folder, cache_dir=str(tmp_path / "cache"))
    assert load_dataset(chosen, 0).test.labels.tolist() == [0, 0, 1, 1]
    (folder / "train" / "ant").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "train" / "ant" / "0.png")
    assert load_dataset(chosen, 0).test.labels.tolist() == [1, 1, 2, 2]


def test_a_damaged_cache_is_decoded_again(folder, tmp_path):
    chosen = settings("image_folder", folder, cache_dir=str(tmp_path / "cache"))
    first = load_dataset(chosen, 0)
    for path in (tmp_path / "cache").rglob("images.npy"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="damaged"):
        assert load_dataset(chosen, 0).train.fingerprint == first.train.fingerprint
    assert load_dataset(chosen, 0).train.fingerprint == first.train.fingerprint


def test_a_cache_that_cannot_be_written_is_said_and_survived(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not cached"):
        load_dataset(settings("image_folder", folder, cache_dir=str(tmp_path / "file")), 0)


def test_decoding_goes_on_after_ctrl_c(tmp_path, monkeypatch):
    """In the third part of five: it is decoded to its end and kept, and the images are the same."""
    files = [tmp_path / f"{number}.png" for number in range(13)]
    for number, path in enumerate(files):
        Image.new("L", (4, 4), number).save(path)
    for path in (files[3], *files[9:12]):  # the last part but one has no image that decodes
        path.write_bytes(b"no image")
    chosen = settings("image_folder", image_size=4, channels=1, skip_corrupt=True)
    images, kept = decoding.decode_files(tmp_path, files, chosen)
    assert images[:, 0, 0, 0].tolist() == kept.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 12]
    monkeypatch.setattr(decoding, "_PART", 3)
    decode, decoded = decoding.decode_pixels, []

    def interrupted(path, *rest):
        decoded.append(int(path.stem))
        if path == files[7] and len(decoded) < 10:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        return decode(path, *rest)

    monkeypatch.setattr(decoding, "decode_pixels", interrupted)
    cached = chosen | {"cache_dir": str(tmp_path / "cache")}
    with pytest.raises(PreemptedError, match="stopped by Ctrl-C; the images that were read are kept, and the same"):
        decoding.decode_files(tmp_path, files, cached)
    decoded.clear()
    decoded.extend([0] * 10)
    for _ in range(2):  # decoded, then from the cache
        again = decoding.decode_files(tmp_path, files, cached)
        np.testing.assert_array_equal(again[0], images)
        np.testing.assert_array_equal(again[1], kept)
    assert sorted(decoded[10:]) == [9, 10, 11, 12]
    assert not list((tmp_path / "cache" / "images").glob("*-parts"))


def test_parts_stay_where_the_whole_cannot_be_written(tmp_path, monkeypatch):
    """Also where another length of parts wrote them; a later reading, with room, tidies up."""
    files = [tmp_path / f"{number}.png" for number in range(7)]
    for number, path in enumerate(files):
        Image.new("L", (4, 4), number).save(path)
    monkeypatch.setattr(decoding, "_PART", 3)
    cached = settings("image_folder", channels=1, cache_dir=str(tmp_path / "cache"))
    save = np.save

    def full(path, array, **rest):
        if len(array) == 7:
            raise OSError("no space left")
        save(path, array, **rest)

    monkeypatch.setattr(np, "save", full)
    with pytest.warns(UserWarning, match="not cached: no space left"):
        decoding.decode_files(tmp_path, files, cached)
    assert len(list((tmp_path / "cache" / "images").glob("*-parts/*"))) == 3
    monkeypatch.setattr(np, "save", save)
    monkeypatch.setattr(decoding, "_PART", 2)
    assert decoding.decode_files(tmp_path, files, cached)[0][:, 0, 0, 0].tolist() == list(range(7))
    assert not list((tmp_path / "cache" / "images").glob("*-parts"))


def test_parts_of_images_of_several_sizes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "_PART", 2)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(files):
        Image.new("L", (4, 5 + number // 2)).save(path)
    with pytest.raises(DataError, match=r"0.png is \(5, 4\) and .*2.png is \(6, 4\) \(height, width\)"):
        decoding.decode_files(tmp_path, files, settings("image_folder", cache_dir=str(tmp_path / "cache")))


# --- augmentation


def test_resized_crop_flip_is_a_piece_of_the_image_enlarged(rng):
    """On an image of its own coordinates, every output is linear in them, within the image, of a plausible area."""
    rows, cols = np.mgrid[:32, :48].astype(np.float32)
    image = np.stack([rows, cols, np.ones_like(rows)], axis=-1)
    areas, flips = [], 0
    enlarged = jax.jit(jax.vmap(resized_crop_flip, (None, 0)))
    for out in np.asarray(enlarged(image, jax.random.split(jax.random.key(0), 400))):
        assert out.shape == image.shape
        assert out[..., 0].min() >= 0
        assert out[..., 0].max() <= 31
        assert out[..., 1].min() >= 0
        assert out[..., 1].max() <= 47
        np.testing.assert_allclose(out[..., 2], 1, atol=1e-5)
        inner = out[4:-4, 4:-4]
        down, right = np.diff(inner[..., 0], axis=0), np.diff(inner[..., 1], axis=1)
        np.testing.assert_allclose(down, down.mean(), atol=0.02)
        np.testing.assert_allclose(right, right.mean(), atol=0.02)
        flips += right.mean() < 0
        areas.append(abs(down.mean() * right.mean()))
    assert 0.05 < min(areas) < 0.15
    assert 0.9 < max(areas) <= 1.01
    assert 150 < flips < 250


def test_crop_flip_is_a_shift_or_flip_of_the_reflected_image(rng):
    image = rng.random((8, 24, 3)).astype(np.float32)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = {padded[r : r + 8, c : c + 24].tobytes(): (r, c) for r in range(9) for c in range(9)}
    seen, flips = set(), 0
    for out in np.asarray(jax.jit(jax.vmap(crop_flip, (None, 0)))(image, jax.random.split(jax.random.key(0), 600))):
        straight, flipped = crops.get(out.tobytes()), crops.get(out[:, ::-1].tobytes())
        assert (straight is None) != (flipped is None)
        flips += straight is None
        seen.add(straight or flipped)
    assert len(seen) >= 75
    assert 240 < flips < 360
