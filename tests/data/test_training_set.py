"""Folders of images as people have them, and as an attacker may leave them."""

import os
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from badloss_jax.config import default_config
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.data import tfds
from badloss_jax.data.pixels import decode_pixels
from badloss_jax.data.training_set import list_folder, read_arrays, read_folder, read_tfds, suggested_size
from tests.conftest import encoded, unpack

PNG = {"kind": "PNG", "size": (8, 8)}


@pytest.fixture
def picture(rng):
    return lambda **changed: encoded(rng, **PNG | changed)


def data_settings(tmp_path, **changed):
    config = default_config()
    config.data.update(cache_dir=str(tmp_path / "cache"), image_size=8, **changed)
    return config.data


def small(picture, prefix=""):
    return {f"{prefix}{c}/{i}.png": picture() for c in ("ant", "bee") for i in range(3)}


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_classes_lie_in_the_folder_or_in_train(tmp_path, picture, prefix):
    unpack(tmp_path / "data", small(picture, prefix) | ({"test/wasp/0.png": picture()} if prefix else {}))
    listing = list_folder(tmp_path / "data")
    assert listing.class_names == ("ant", "bee")
    assert listing.names == tuple(f"{prefix}{c}/{i}.png" for c in ("ant", "bee") for i in range(3))
    examples = read_folder(listing, data_settings(tmp_path))
    assert (examples.own, examples.image_shape, examples.num_classes) == (6, (8, 8, 3), 2)
    for name, image in zip(examples.names, examples.split.images, strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(tmp_path / "data" / name)))
    assert not examples.left_out


def test_train_can_be_a_class(tmp_path, picture):
    unpack(tmp_path, {f"{c}/{i}.png": picture() for c in ("train", "plane") for i in range(2)})
    assert list_folder(tmp_path).class_names == ("plane", "train")


def test_what_cannot_be_read_is_left_out_and_named(tmp_path, picture):
    data = unpack(tmp_path / "data", small(picture) | {
        "ant/broken.png": picture()[:60], "ant/notes.txt": b"hello", "ant/.hidden.png": picture(),
        "bee/empty.png": b"", "bee/deep/er/1.png": picture(), "bee/page.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
        "bee/two\nlines.png": picture(), ".git/x.png": picture(), "readme.md": b"hello",
        "bee/\u202e gnp.\u00fc\U0001f41d.png": picture(), f"bee/{'n' * 250}.png": picture(),
    })  # fmt: skip
    (data / "empty class").mkdir()
    os.mkfifo(data / "bee" / "pipe.png")
    with open(os.fsencode(data / "bee") + b"/\xff\xfe.png", "wb") as file:
        file.write(picture())
    listing = list_folder(data)
    assert listing.class_names == ("ant", "bee")
    examples = read_folder(listing, data_settings(tmp_path))
    assert examples.left_out.keys() == {"ant/broken.png", "ant/notes.txt", "bee/empty.png", "bee/page.eps",
                                        "bee/two\nlines.png", "bee/pipe.png", "empty class"}  # fmt: skip
    assert all(examples.left_out.values())
    assert examples.left_out["empty class"] == "a class folder without images"
    assert len(examples.names) == 6 + 4
    assert os.fsencode(examples.names[-1]).endswith((b"\xff\xfe.png", b".png"))
    again = read_folder(listing, data_settings(tmp_path))  # from the cache
    assert again.left_out == examples.left_out
    assert again.split.fingerprint == examples.split.fingerprint


def test_links_do_not_lead_out_of_the_folder(tmp_path, picture):
    secret = unpack(tmp_path / "elsewhere", {"secret.png": picture(), "more/1.png": picture()})
    data = unpack(tmp_path / "data", small(picture))
    (data / "ant" / "out.png").symlink_to(secret / "secret.png")
    (data / "ant" / "in.png").symlink_to(data / "bee" / "0.png")
    (data / "ant" / "nothing.png").symlink_to(data / "nowhere.png")
    (data / "ant" / "folder").symlink_to(secret / "more")
    (data / "cat").symlink_to(secret)
    listing = list_folder(data)
    assert "ant/in.png" in listing.names
    assert len(listing.names) == 7
    assert listing.left_out == {
        "ant/out.png": "a link that leads out of the folder",
        "ant/nothing.png": "not a file, or a link to nothing",
        "ant/folder": "a link to a folder",
        "cat": "a link that leads out of the folder",
    }
    followed = list_folder(data, follow_links=True)
    assert {"ant/out.png", "ant/folder/1.png", "cat/secret.png"} <= set(followed.names)


def test_train_is_no_way_out_of_the_folder(tmp_path, picture):
    unpack(tmp_path / "secret", small(picture))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match="train is a link that leads out of the folder: --follow_links"):
        list_folder(tmp_path / "data")
    assert len(list_folder(tmp_path / "data", follow_links=True).names) == 6


def test_links_in_a_circle_end(tmp_path, picture):
    data = unpack(tmp_path / "data", small(picture))
    (data / "ant" / "again").symlink_to(data)
    (data / "bee" / "self").symlink_to(data / "bee")
    listing = list_folder(data, follow_links=True)
    assert len(listing.names) < 20
    assert "a link to a folder that was read already" in listing.left_out.values()
    assert list_folder(data).left_out == {"ant/again": "a link to a folder", "bee/self": "a link to a folder"}


def test_sixteen_bits_become_eight(tmp_path, rng):
    wide = rng.integers(0, 2**16, (200, 9)).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "x.png")
    np.testing.assert_array_equal(decode_pixels(tmp_path / "x.png", 0, 1)[..., 0], np.round(wide / 257))


def test_bombs_are_not_decoded(tmp_path, picture):
    """A PNG of 30,000 x 30,000 pixels in a few bytes: its header says so, and no pixel is read."""
    bomb = bytearray(picture())
    bomb[16:24] = (30_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    wide = bytearray(picture())
    wide[16:24] = (9_000).to_bytes(4, "big") * 2
    wide[29:33] = zlib.crc32(bytes(wide[12:29])).to_bytes(4, "big")
    unpack(tmp_path / "data", small(picture) | {"ant/bomb.png": bytes(bomb), "ant/wide.png": bytes(wide)})
    with open(tmp_path / "data" / "ant" / "sparse.png", "wb") as file:
        file.truncate(2**28 + 1)
    examples = read_folder(list_folder(tmp_path / "data"), data_settings(tmp_path))
    assert examples.left_out.keys() == {"ant/bomb.png", "ant/wide.png", "ant/sparse.png"}
    assert "900000000 pixels" in examples.left_out["ant/bomb.png"]
    assert "9000x9000 pixels are more than" in examples.left_out["ant/wide.png"]
    assert "bytes are more than" in examples.left_out["ant/sparse.png"]


def test_only_the_first_frame_counts(tmp_path, rng):
    frames = [Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(40)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for folder in ("a", "b"):
        frames[0].save(tmp_path / folder / "x.gif", save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path / folder / "x.png", save_all=True, append_images=frames[1:])
    examples = read_folder(list_folder(tmp_path), data_settings(tmp_path, channels=1))
    assert len(examples.names) == 4
    np.testing.assert_array_equal(examples.split.images[1, ..., 0], np.asarray(frames[0]))


def test_the_size_is_that_of_the_images(tmp_path, picture, rng):
    unpack(tmp_path / "a", small(picture) | {"ant/x.png": picture(size=(20, 30)), "bee/y.txt": b"?"})
    assert suggested_size(list_folder(tmp_path / "a")) == (8, 3)
    for folder in ("b/x", "b/y"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (300, 200), dtype=np.uint8)).save(tmp_path / folder / "1.jpg")
    assert suggested_size(list_folder(tmp_path / "b")) == (64, 1)
    unpack(tmp_path / "c", {"x/1.png": b"", "y/1.png": b"no"})
    with pytest.raises(DataError, match="none is an image"):
        suggested_size(list_folder(tmp_path / "c"))


def test_trusted_images_follow(tmp_path, picture):
    unpack(tmp_path / "data", small(picture))
    unpack(tmp_path / "trusted", {"bee/t.png": picture(), "ant/bad.png": b"?"})
    listing = list_folder(tmp_path / "data")
    beside = list_folder(tmp_path / "trusted", class_names=("ant", "bee"))
    examples = read_folder(listing, data_settings(tmp_path), beside)
    assert examples.own == 6
    assert examples.names[6:] == (f"{tmp_path}/trusted/bee/t.png",)
    assert examples.split.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert list(examples.left_out) == [f"{tmp_path}/trusted/ant/bad.png"]
    unpack(tmp_path / "trusted", {"cow/t.png": picture()})
    with pytest.raises(UsageError, match="cow is a class folder that the training set does not have; it has ant, bee"):
        list_folder(tmp_path / "trusted", class_names=("ant", "bee"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a folder"),
        ({"x.png": b""}, "0 class folders, expected two or more"),
        ({"a/x.png": b""}, "1 class folders"),
        ({"a/.x": b"", "b/.x": b""}, "no file in any"),
    ],
)
def test_what_is_no_training_set_is_refused(tmp_path, files, message):
    unpack(tmp_path / "data", files)
    with pytest.raises((UsageError, DataError), match=message):
        list_folder(tmp_path / "data")


def test_arrays_need_no_test_set(tmp_path, rng):
    images, labels = rng.integers(0, 256, (9, 8, 8), dtype=np.uint8), np.arange(9) % 3
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels)
    examples = read_arrays(data_settings(tmp_path, dir=str(tmp_path / "a.npz")))
    assert (examples.class_names, examples.names[-1], examples.root) == (("0", "1", "2"), "8", None)
    np.testing.assert_array_equal(examples.split.images[..., 0], images)
    np.savez(tmp_path / "b.npz", x_train=images, y_train=labels, class_names=np.array(["a", "b"]))
    with pytest.raises(DataError, match="3 labels are no classes, the first in row 2: 2; expected 0 to 1"):
        read_arrays(data_settings(tmp_path, dir=str(tmp_path / "b.npz")))
    np.savez(tmp_path / "c.npz", x_train=images)
    with pytest.raises(DataError, match="lacks y_train"):
        read_arrays(data_settings(tmp_path, dir=str(tmp_path / "c.npz")))


@pytest.mark.parametrize("wrong", [-1, 2])
def test_labels_that_are_no_classes_are_named(tmp_path, prepared, monkeypatch, wrong):
    real = tfds.load_training

    def load(settings):
        split, names = real(settings)
        return replace(split, labels=np.where(np.arange(12) == 7, wrong, split.labels).astype(np.int32)), names

    monkeypatch.setattr(tfds, "load_training", load)
    with pytest.raises(DataError, match=rf"1 labels are no classes, the first in row 7: {wrong}; expected 0 to 1"):
        read_tfds(data_settings(tmp_path, dir=str(prepared / "out")))


def test_tfds_needs_no_test_set(tmp_path, prepared):
    examples = read_tfds(data_settings(tmp_path, dir=str(prepared / "out")))
    assert len(examples.names) == 12
    assert examples.class_names == ("cat", "dog & <b>")
    assert examples.image_shape == (8, 8, 3)
