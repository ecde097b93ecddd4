import gzip
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from badloss_jax.cli import main
from badloss_jax.config import load_config
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import locked
from badloss_jax.core.progress import Progress
from badloss_jax.data import load_dataset
from badloss_jax.data import prepare as prepare_module
from badloss_jax.data.archives import IMAGENETTE
from badloss_jax.data.prepare import prepare
from badloss_jax.runs.experiment import run_experiment
from tests.conftest import encoded, prepare_in_shards, unpack
from tests.data.test_data import settings

WNIDS = ("n01440764", "n01443537", "n02000000")


def write_tar(path, members, mode="w"):
    """Writes a tar archive of {name: bytes}, or of ready TarInfos."""
    with tarfile.open(path, mode) as tar:
        for member in members.items() if isinstance(members, dict) else members:
            if isinstance(member, tarfile.TarInfo):
                tar.fileobj.write(member.tobuf())  # alone, whatever its size, which Python 3.13's addfile refuses
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))


def tar_bytes(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def write_devkit(path, wnids, truth):
    """The official layout: numbers are not in the order of the wnids, and inner nodes follow the 1,000 classes."""
    synsets = np.zeros(len(wnids) + 1, [(key, object) for key in ("ILSVRC2012_ID", "WNID", "words", "num_children")])
    for i, wnid in enumerate([*reversed(wnids), "n00000001"]):
        synsets[i] = (i + 1, wnid, f"words of {wnid}", int(i == len(wnids)))
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets[:, None]}, do_compression=True)
    numbers = "".join(f"{len(wnids) - wnids.index(wnid)}\n" for wnid in truth)
    write_tar(path, {"ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
                     "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": numbers.encode(),
                     "ILSVRC2012_devkit_t12/readme.txt": b"hello"}, "w:gz")  # fmt: skip


@pytest.fixture
def imagenet(tmp_path, rng):
    """The official archives in `tars`, and the same images as a folder in `folder`."""
    train = {wnid: {f"{wnid}_{i}.JPEG": encoded(rng) for i in (10, 9, 100)} for wnid in WNIDS}
    truth = [WNIDS[i] for i in (2, 0, 1, 1)]
    val = {f"ILSVRC2012_val_{i + 1:08}.JPEG": encoded(rng) for i in range(4)}
    tars = tmp_path / "tars"
    tars.mkdir()
    write_tar(tars / "ILSVRC2012_img_train.tar", {f"{w}.tar": tar_bytes(train[w]) for w in reversed(WNIDS)})
    write_tar(tars / "ILSVRC2012_img_val.tar", val)
    write_devkit(tars / "ILSVRC2012_devkit_t12.tar.gz", WNIDS, truth)
    unpack(tmp_path / "folder", {f"train/{w}/{name}": content for w in WNIDS for name, content in train[w].items()}
           | {f"val/{wnid}/{name}": val[name] for name, wnid in zip(val, truth, strict=True)})  # fmt: skip
    return tmp_path


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def assert_same(ours, theirs, names=True):
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(ours, split).images, getattr(theirs, split).images)
        np.testing.assert_array_equal(getattr(ours, split).labels, getattr(theirs, split).labels)
    assert not names or ours.class_names == theirs.class_names


# --- official archives


@pytest.mark.filterwarnings("ignore:.*of ImageNet's")
@pytest.mark.parametrize("size", [0, 16])
def test_imagenet(imagenet, size):
    prepare("imagenet2012", imagenet / "tars", imagenet / "out", size, Progress(None))
    prepare("imagenet2012", imagenet / "folder", imagenet / "out2", size, Progress(None))
    for name, content in content_of(imagenet / "out").items():
        assert content_of(imagenet / "out2")[name] == content, name
    expected = load_dataset(settings("image_folder", imagenet / "folder", image_size=16), 0)
    assert_same(load_dataset(settings("tfds", imagenet / "out", image_size=16), 0), expected)
    assert not (imagenet / "out" / ".unpacked").exists()


@pytest.mark.usefixtures("unrendered")
def test_imagenet_on_the_command_line_then_a_run(imagenet, tiny, mesh):
    """As a person types it; TensorFlow is not installed, and nothing asks for it."""
    command = [sys.executable, "-m", "badloss_jax", "prepare", "imagenet2012", "--from", str(imagenet / "tars")]
    for said in ("13 images", "is whole: the checksums of its 6 files are right"):
        done = subprocess.run([*command, "--to", str(imagenet / "out")], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert said in done.stderr.replace("9 train, 4 validation", "13")
    assert "badloss: warning" not in done.stderr
    data = {"data__source": "tfds", "data__dir": imagenet / "out", "data__image_size": 12, "data__pad": 0,
            "data__train_examples": 8, "data__test_examples": 0, "probes__count": 4, "scoring__loss__k": 2,
            "scoring__prob__k": 2, "scoring__kinds": "('loss',)", "recording__kinds": "()",
            "attacks__names": "('patch',)", "attacks__patch__ratio": 0.2, "retraining__variants": "()",
            "controls": "()"}  # fmt: skip
    results = run_experiment(tiny(**data), imagenet / "run", mesh=mesh)
    assert results["num_examples"] == 8
    assert results["class_names"] == list(WNIDS)


def test_imagenette(tmp_path, rng):
    images = {f"{split}/{wnid}/{wnid}_{i}.JPEG": encoded(rng) for split in ("train", "val") for wnid in IMAGENETTE
              for i in (2, 1)}  # fmt: skip
    unpack(tmp_path / "folder", images)
    members = {f"imagenette2-160/{name}": content for name, content in images.items()}
    write_tar(tmp_path / "imagenette2-160.tgz", members | {"imagenette2-160/noisy_imagenette.csv": b"a,b"}, "w:gz")
    prepare("imagenette", tmp_path, tmp_path / "out", 0, Progress(None))
    ours = load_dataset(settings("tfds", tmp_path / "out", image_size=20), 0)
    assert_same(ours, load_dataset(settings("image_folder", tmp_path / "folder", image_size=20), 0), names=False)
    assert ours.class_names == load_config("configs/imagenette.py").data.class_names
    (tmp_path / "imagenette2.tgz").write_bytes(b"")
    with pytest.raises(UsageError, match=r"has imagenette2.tgz and imagenette2-160.tgz: leave one"):
        prepare("imagenette", tmp_path, tmp_path / "new", 0, Progress(None))
    shutil.rmtree(tmp_path / "folder" / "train" / "n01440764")
    shutil.rmtree(tmp_path / "folder" / "val" / "n01440764")
    with pytest.raises(DataError, match="not those of Imagenette"):
        prepare("imagenette", tmp_path / "folder", tmp_path / "new", 0, Progress(None))


def cifar(rng, classes=("airplane", "automobile", "bird")):
    """The binary version's files, and their images in order of class, batch and place."""
    files, placed = {"cifar-10-batches-bin/batches.meta.txt": "\n".join([*classes, "", ""]).encode()}, {}
    for split, names in (("train", [f"data_batch_{i}.bin" for i in range(1, 6)]), ("test", ["test_batch.bin"])):
        for name in names:
            planes, labels = rng.integers(0, 256, (4, 3072), dtype=np.uint8), rng.permutation(4) % len(classes)
            files[f"cifar-10-batches-bin/{name}"] = np.insert(planes, 0, labels, axis=1).tobytes()
            for i, label in enumerate(labels.tolist()):
                file = io.BytesIO()
                Image.fromarray(planes[i].reshape(3, 32, 32).transpose(1, 2, 0)).save(file, "PNG")
                placed[f"{split}/{classes[label]}/{name}-{i:04}.png"] = file.getvalue()
    return files, placed


@pytest.mark.parametrize("size", [0, 24])
def test_cifar10(tmp_path, rng, size):
    files, images = cifar(rng)
    write_tar(tmp_path / "cifar-10-binary.tar.gz", files, "w:gz")
    prepare("cifar10", tmp_path, tmp_path / "out", size, Progress(None))
    folder = unpack(tmp_path / "folder", images)
    assert_same(load_dataset(settings("tfds", tmp_path / "out"), 0),
                load_dataset(settings("image_folder", folder, image_size=size), 0))  # fmt: skip
    prepare("cifar10", folder, tmp_path / "files", 0, Progress(None))
    assert_same(load_dataset(settings("tfds", tmp_path / "files", channels=1, pad=2), 0),
                load_dataset(settings("image_folder", folder, channels=1, pad=2), 0))  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda files: files.pop("cifar-10-batches-bin/test_batch.bin"), r"lacks test_batch.bin"),
        (lambda files: files.update({"x/data_batch_3.bin": b"12"}), r"data_batch_3.bin has 2 bytes, not a multiple"),
        (lambda files: files.update({"x/data_batch_3.bin": b"\x09" * 3073}), "has the label 9, expected 0 to 2"),
    ],
)
def test_damaged_cifar10(tmp_path, rng, damage, message):
    files, _ = cifar(rng)
    damage(files)
    write_tar(tmp_path / "cifar-10-binary.tar.gz", files, "w:gz")
    with pytest.raises(DataError, match=message):
        prepare("cifar10", tmp_path, tmp_path / "out", 0, Progress(None))


def test_pickles_are_not_read(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    with pytest.raises(UsageError, match=r"pickles could run anything: .*cifar.html has cifar-10-binary.tar.gz"):
        prepare("cifar10", tmp_path, tmp_path / "out", 0, Progress(None))


# --- wrong and hostile archives


def special(name, kind, **attributes):
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([special("n01440764.tar", tarfile.SYMTYPE, linkname="/etc/passwd")], "a link, device or outside name"),
        ([special("n01440764.tar", tarfile.LNKTYPE, linkname="x")], "a link, device or outside name"),
        ([special("n01440764.tar", tarfile.CHRTYPE)], "a link, device or outside name"),
        ([special("../n01440764.tar", tarfile.REGTYPE)], "a link, device or outside name"),
        ([special("/n01440764.tar", tarfile.REGTYPE)], "a link, device or outside name"),
        ([special("n01440764.tar", tarfile.REGTYPE, size=2**41)], "of 2,199,023,255,552 bytes, expected up to"),
        ({"n01440764.zip": b""}, "holds 'n01440764.zip', which the official archive does not"),
        ({"n01440764.tar": b"no tar"}, "is damaged, or no tar archive"),
        ({"n01440764.tar": tar_bytes({"x.JPEG": b""})}, "holds 'x.JPEG', which the official archive does not"),
        ({"n01440764.tar": tar_bytes({"n01440764_1.JPEG": b"no image"})}, "n01440764_1.JPEG in .* does not decode"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*of ImageNet's")
def test_hostile_imagenet(imagenet, members, message):
    write_tar(imagenet / "tars" / "ILSVRC2012_img_train.tar", members)
    (imagenet / "tars" / "ILSVRC2012_img_val.tar").unlink()
    write_tar(imagenet / "tars" / "ILSVRC2012_img_val.tar", {"ILSVRC2012_val_00000002.JPEG": b""})
    with pytest.raises(DataError, match=message):
        prepare("imagenet2012", imagenet / "tars", imagenet / "out", 0, Progress(None))
    assert not (imagenet / "out" / "dataset_info.json").exists()


def devkit(**members):
    return lambda tars: write_tar(tars / "ILSVRC2012_devkit_t12.tar.gz", members, "w:gz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tars: os.truncate(tars / "ILSVRC2012_img_val.tar", 1000), r"val.tar is damaged"),
        (lambda tars: os.truncate(tars / "ILSVRC2012_img_train.tar", 5000), r"train.tar is damaged"),
        (lambda tars: os.truncate(tars / "ILSVRC2012_devkit_t12.tar.gz", 200), "is damaged, or not gzipped"),
        (lambda tars: (tars / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"x"), "is damaged, or not gzipped"),
        (
            lambda tars: (tars / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(bytes(2**27))),
            "a decompression",
        ),
        (devkit(**{"ILSVRC2012_validation_ground_truth.txt": b""}), r"lacks meta.mat"),
        (devkit(**{"meta.mat": b"x", "ILSVRC2012_validation_ground_truth.txt": b"1"}), "do not say the classes"),
        (devkit(**{"meta.mat": bytes(2**23), "ILSVRC2012_validation_ground_truth.txt": b"1"}), "a table of 8,388,608"),
        (
            lambda tars: write_devkit(tars / "ILSVRC2012_devkit_t12.tar.gz", WNIDS, WNIDS),
            r"ILSVRC2012_val_00000004.JPEG has no class",
        ),
    ],
)
def test_damaged_imagenet(imagenet, change, message):
    change(imagenet / "tars")
    with pytest.raises(DataError, match=message):
        prepare("imagenet2012", imagenet / "tars", imagenet / "out", 0, Progress(None))


@pytest.mark.parametrize(
    ("missing", "message"),
    [("img_val.tar", r"img_val.tar is missing"), ("img_train.tar", "has neither ILSVRC2012_img_train")],
)
def test_missing_imagenet(imagenet, missing, message):
    (imagenet / "tars" / f"ILSVRC2012_{missing}").unlink()
    with pytest.raises(UsageError, match=message):
        prepare("imagenet2012", imagenet / "tars", imagenet / "out", 0, Progress(None))


def test_a_part_of_imagenet_is_said(imagenet):
    with pytest.warns(UserWarning, match=r"has 9 of ImageNet's 1,281,167 train images"):
        prepare("imagenet2012", imagenet / "tars", imagenet / "out", 0, Progress(None))


# --- going on, checking, repairing


@pytest.mark.parametrize("killed_at", [1, 6, 13])
def test_killed_and_run_again_gives_the_same_bytes(prepared, killed_at):
    code = f"""
import os, signal
from pathlib import Path
from badloss_jax.data import prepare
from badloss_jax.core.progress import Progress
class Killing(Progress):
    def advance(self, count, where):
        super().advance(count, where)
        if self._done == {killed_at}:
            os.kill(os.getpid(), signal.SIGKILL)
prepare._SHARD = 500
prepare.prepare("image_folder", Path("folder"), Path("again"), 0, Killing(None))
"""
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", code], cwd=prepared, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    again, told = prepared / "again", io.StringIO()
    written = {path.name: path.stat().st_mtime_ns for path in again.glob("image_folder-*")}
    with pytest.raises(UsageError, match=r"half prepared|no dataset_info.json"):
        load_dataset(settings("tfds", again), 0)
    prepare_in_shards(prepared / "folder", again, told)
    assert content_of(again) == content_of(prepared / "out")
    noted = {name for name, time in written.items() if (again / name).stat().st_mtime_ns == time}
    assert bool(noted) == (f"{len(noted)} of" in told.getvalue()) == (killed_at > 1)


@pytest.mark.parametrize("after", [0, 1, 2, 9])
def test_stopped_between_two_files_goes_on(prepared, monkeypatch, after):
    left, write = [after], prepare_module.write_text

    def stopping(path, text):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_text", stopping)
        with pytest.raises(KeyboardInterrupt):
            prepare_in_shards(prepared / "folder", prepared / "again")
    prepare_in_shards(prepared / "folder", prepared / "again")
    assert content_of(prepared / "again") == content_of(prepared / "out")


@pytest.mark.parametrize(
    ("pattern", "damage", "at_loading", "at_reading"),
    [
        ("*train*00001-of*", lambda path: path.unlink(), "00001-of-.* is missing: run the same `badloss prepare`", ""),
        ("*train*00001-of*", lambda path: os.truncate(path, 100), "is damaged: it has 100 bytes, expected", ""),
        (
            "*train*00001-of*",
            lambda path: flip(path, 120),
            "",
            r"record 0 of .*00001-of-\d+ \(train \d\) cannot be read",
        ),
        ("labels-train.npy", lambda path: flip(path, 140), "labels-train.npy is damaged: its checksum is wrong", ""),
        ("labels-train.npy", lambda path: path.unlink(), "labels-train.npy is missing", ""),
        ("features.json", lambda path: path.unlink(), "features.json is missing", ""),
        ("features.json", lambda path: path.write_text("[]"), "features.json is damaged", ""),
        ("label.labels.txt", lambda path: path.unlink(), "", ""),
    ],
)
def test_damage_is_named_and_repaired(prepared, pattern, damage, at_loading, at_reading):
    before = content_of(prepared / "out")
    (path,) = (prepared / "out").glob(pattern)
    damage(path)
    if at_loading or at_reading:
        with pytest.raises(DataError, match=at_loading or at_reading):
            load_dataset(settings("tfds", prepared / "out"), 0)
    told = io.StringIO()
    prepare_in_shards(prepared / "folder", prepared / "out", told)
    assert f"missing or damaged, and written again: {path.name}" in told.getvalue()
    assert content_of(prepared / "out") == before


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_an_image_that_changed_since_is_said(prepared):
    (shard,) = (prepared / "out").glob("*train*00000-of*")
    shard.unlink()
    image = prepared / "folder" / "train" / "cat" / "0.png"
    flip(image, len(image.read_bytes()) - 1)
    with pytest.raises(DataError, match="comes out with other bytes than before"):
        prepare_in_shards(prepared / "folder", prepared / "out")


@pytest.mark.parametrize("note", ["", "[]", "{}", "1", '{"bytes": 1, "sha256": "", "records": 1}'])
def test_damaged_notes(prepared, note):
    content = f'{{"name": "image_folder", "size": 0, "plan": "", "files": {{"../a": {note}}}}}'
    (prepared / "a").write_text("kept")
    (prepared / "out" / "prepared.json").write_text(content)
    with pytest.raises(DataError, match=r"prepared.json is damaged"):
        prepare("image_folder", prepared / "folder", prepared / "out", 0, Progress(None))
    with pytest.raises(DataError, match=r"prepared.json is damaged"):
        load_dataset(settings("tfds", prepared / "out"), 0)
    assert (prepared / "a").read_text() == "kept"


def test_usage(prepared, tmp_path, capsys):
    def refused(*arguments):
        assert main(["prepare", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    folder, out = prepared / "folder", prepared / "out"
    assert "expected one of imagenet2012, imagenette" in refused("mnist", "--from", folder, "--to", tmp_path / "new")
    assert "expected 1 to 4096 pixels" in refused("cifar10", "--from", folder, "--to", tmp_path / "new", "--size", -1)
    assert "is not a folder" in refused("cifar10", "--from", tmp_path / "none", "--to", tmp_path / "new")
    assert "holds other files" in refused("cifar10", "--from", folder, "--to", folder)
    assert "was begun with NAME image_folder and --size 0" in refused("cifar10", "--from", folder, "--to", out)
    assert "and --size 0" in refused("image_folder", "--from", folder, "--to", out, "--size", 8)
    assert "is a file" in refused("image_folder", "--from", folder, "--to", folder / "train" / "cat" / "0.png")
    (out / "dataset_info.json").unlink()
    (folder / "train" / "cat" / "0.png").unlink()
    assert "was begun from other images" in refused("image_folder", "--from", folder, "--to", out)
    with locked(out):
        assert f"(process {os.getpid()}) is at work" in refused("image_folder", "--from", folder, "--to", out)
    shutil.rmtree(folder / "test" / "cat")
    (folder / "test" / "bird").mkdir()
    assert main(["prepare", "image_folder", "--from", str(folder), "--to", str(tmp_path / "new")]) == 1
    assert "class folder 'bird'" in capsys.readouterr().err


def test_a_full_disk_is_said_and_survived(prepared):
    """A limit on the size of files stops the writer as a full disk does."""
    arguments = [
        "-m",
        "badloss_jax",
        "prepare",
        "image_folder",
        "--from",
        prepared / "folder",
        "--to",
        prepared / "again",
    ]
    command = " ".join(shlex.quote(str(argument)) for argument in [sys.executable, *arguments])
    done = subprocess.run(f"ulimit -f 2; {command}", shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "array_record-00000-of-00001 cannot be written: " in done.stderr
    assert "File too large" in done.stderr
    assert subprocess.run(command, shell=True, check=False).returncode == 0
    assert not list((prepared / "again").glob(".*-*"))


def test_a_class_that_tfds_cannot_name(prepared):
    (prepared / "folder" / "train" / "cat").rename(prepared / "folder" / "train" / " cat")
    (prepared / "folder" / "test" / "cat").rename(prepared / "folder" / "test" / " cat")
    with pytest.raises(DataError, match="the class ' cat' cannot be kept"):
        prepare("image_folder", prepared / "folder", prepared / "new", 0, Progress(None))


# --- the configs that this is for


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize(
    "spec", ["imagenet", "imagenet:large_batch", "imagenette", "cifar10", "gtsrb", "fashion_mnist", "digits"]
)
def test_configs_run_shrunk_on_prepared_data(tmp_path, mesh, rng, spec):
    name, _, variant = spec.partition(":")
    classes = tuple(IMAGENETTE) if name == "imagenette" else ("n1", "n2", "n3")
    images = {f"train/{c}/{i}.jpg": encoded(rng) for c in classes for i in range(40 // len(classes))}
    unpack(tmp_path / "folder", images | {f"val/{c}/0.jpg": encoded(rng) for c in classes})
    prepare(
        "imagenette" if name == "imagenette" else "image_folder",
        tmp_path / "folder",
        tmp_path / "out",
        32,
        Progress(None),
    )
    changed = {
        "data.source": "tfds", "data.dir": tmp_path / "out", "data.cache_dir": "", "data.image_size": 32,
        "data.input": "streamed", "data.pad": 0, "data.class_names": "()",
        "model.name": "resnet_small", "model.stages": "(4,)", "probes.count": 8, "scoring.loss.k": 3,
        "attacks.names": "('patch',)", "attacks.patch.ratio": 0.1, "recording.epochs": 3, "retraining.epochs": 1,
        "recording.kinds": "()", "scoring.kinds": "('loss',)", "retraining.variants": "()", "controls": "()",
        "evaluation.batch_size": 8,
    } | ({} if variant else {"recording.batch_size": 8, "retraining.batch_size": 8})  # fmt: skip
    config = load_config(f"configs/{name}.py:{variant}", [f"--config.{key}={value}" for key, value in changed.items()])
    results = run_experiment(config, tmp_path / "run", mesh=mesh)
    assert results["num_examples"] == len(images)
    if variant:
        assert config.optimizer.learning_rate == pytest.approx(4e-3)
        assert config.recording.batch_size == config.retraining.batch_size == 4096
