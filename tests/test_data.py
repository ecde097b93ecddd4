import gzip
import struct
from collections import Counter

import jax
import numpy as np
import pytest
from PIL import Image

from badloss_jax.config import default_config
from badloss_jax.data import decoding, load_dataset
from badloss_jax.data.augment import crop_flip
from badloss_jax.errors import DataError, UsageError


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


# --- augmentation


def test_crop_flip_is_a_shift_or_flip_of_the_reflected_image(rng):
    image = rng.random((8, 24, 3)).astype(np.float32)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = {padded[r : r + 8, c : c + 24].tobytes(): (r, c) for r in range(9) for c in range(9)}
    seen, flips = set(), 0
    for out in np.asarray(jax.vmap(crop_flip, (None, 0))(image, jax.random.split(jax.random.key(0), 600))):
        straight, flipped = crops.get(out.tobytes()), crops.get(out[:, ::-1].tobytes())
        assert (straight is None) != (flipped is None)
        flips += straight is None
        seen.add(straight or flipped)
    assert len(seen) >= 75
    assert 240 < flips < 360
