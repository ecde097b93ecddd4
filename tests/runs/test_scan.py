"""`badloss scan`, as its users run it: on folders, with probes of every form, stopped, resumed, and misused."""

import csv
import io
import json
import re
import shutil
import signal
import zipfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait
from sklearn.datasets import load_digits

from badloss_jax.cli import main
from badloss_jax.core.errors import BadlossError, DataError, UsageError
from badloss_jax.core.mesh import make_mesh
from badloss_jax.core.progress import Progress
from badloss_jax.data.cleaned import write_cleaned
from badloss_jax.report.scan import REASONS, sentence
from badloss_jax.runs.scan import scan
from badloss_jax.scoring import CERTAIN, Cluster, Signs, class_scales, judge
from badloss_jax.trajectories.store import TrajectoryStore
from tests.conftest import opened, prepare_in_shards

pytestmark = pytest.mark.usefixtures("one_device")

CLASSES = ("<img src=x onerror=alert(1)>", "=1+1", "c|d & 'e'", "\u202e f\u00fc", *"456789")
SMALL = ("--config.model.stages=(8,)", "--config.recording.epochs=4", "--config.recording.batch_size=32")


def write_digits(folder, count=500, noise=20):
    """A folder of digits as PNG files, with images of noise in class 4: what stands out."""
    draw, digits = np.random.default_rng(0), load_digits()
    images = np.uint8(np.minimum(16 * digits.images[:count], 255))
    labels = digits.target[:count].astype(int)
    strange = draw.choice(count, noise, replace=False)
    images[strange], labels[strange] = draw.integers(0, 256, (noise, 8, 8), dtype=np.uint8), 4
    names = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = f"{CLASSES[label]}/{number:03d}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
        names.append(name)
    clean = np.setdiff1d(np.arange(count), strange)
    return names, {names[i] for i in strange}, [names[i] for i in draw.permutation(clean)[:80]]


def command(folder, *more, data="data", probes="probes.txt", out="out"):
    probes = probes if probes.isdigit() else str(folder / probes)
    return ["scan", "--data", str(folder / data), "--probes", probes, "--workdir", str(folder / out),
            f"--config.data.cache_dir={folder / 'cache'}", *SMALL, *more]  # fmt: skip


def files(folder):
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip


def lines(path):
    return path.read_text("utf-8").splitlines()


@pytest.fixture(scope="module")
def scanned(tmp_path_factory, one_device):
    """One scan, from the command line; the tests only read it."""
    folder = tmp_path_factory.mktemp("scan")
    names, strange, trusted = write_digits(folder / "data")
    (folder / "data" / CLASSES[3] / "broken.png").write_bytes(b"\x89PNG")
    (folder / "probes.txt").write_text("\n".join(trusted) + "\n\n", "utf-8")
    before = files(folder / "data")
    assert main(command(folder)) == 0
    assert files(folder / "data") == before
    return folder, names, strange, trusted


@pytest.fixture
def copy(scanned, tmp_path):
    shutil.copytree(scanned[0], tmp_path / "scan", symlinks=True)
    return tmp_path / "scan"


def test_what_a_scan_writes(scanned):
    folder, names, strange, trusted = scanned
    out, results = folder / "out", json.loads((folder / "out" / "scan.json").read_text())
    removed, kept = lines(out / "remove.txt"), lines(out / "keep.txt")
    assert sorted(removed + kept) == sorted(names)
    assert not set(removed) & set(trusted)
    assert len(strange & set(removed)) > 0.9 * len(strange)
    assert len(set(removed) - strange) < 0.02 * len(names)  # one class alone stands out, and nothing is known of others
    assert results["stands_out"]
    assert [entry["name"] for entry in results["classes"] if entry["affected"]] == ["4"]
    (attack,) = (entry for entry in results["attacks"] if entry["certain"])
    assert (attack["class"], attack["images"]) == ("4", len(removed))
    told = (
        rf"1 attack stands out: {len(removed)} images of 4\. About \d+ % of the images look poisoned"
        r" \([\d.]+ % to \d+ %\); what leaves no trace is not counted\.( .+)?"
    )
    assert re.fullmatch(told, results["verdict"])
    assert attack["signs"]["gap"] > 7  # by which it is certain even where probes are few
    assert f"with a gap of {attack['signs']['gap']:.1f} standard deviations" in (out / "report.html").read_text("utf-8")
    everything = pq.read_table(out / "scores.parquet")
    assert everything["path"].to_pylist() == sorted(names)
    assert {row["path"] for row in everything.to_pylist() if row["removed"]} == set(removed)
    assert {row["path"] for row in everything.to_pylist() if row["attack"] == 1} == set(removed)
    assert {row["path"] for row in everything.to_pylist() if row["probe"]} == set(trusted)
    assert all((row["p_value"] is None) == row["probe"] for row in everything.to_pylist())
    assert {"looks_like", "odds"} < set(everything.column_names)
    assert all((row["looks_like"] != row["label"]) == (row["odds"] > 0) for row in everything.to_pylist())
    share = results["share"]
    assert share["low"] <= 0.04 <= share["high"]
    assert (results["removed_count"], results["probe_count"], results["num_examples"]) == (len(removed), 80, 500)
    assert lines(out / "left_out.txt")[0].startswith(f"{CLASSES[3]}/broken.png\t")
    table = pq.read_table(out / "suspects.parquet")
    assert {row["path"] for row in table.to_pylist() if row["removed"]} == set(removed)
    scores, p_values = table["score"].to_numpy(), table["p_value"].to_numpy()
    assert (np.diff(scores) <= 0).all()
    assert (np.diff(p_values) >= 0).all()
    assert p_values[table["attack"].to_numpy() == 0].max() <= 0.1
    assert set(table["reason"].to_pylist()) <= set(REASONS)
    assert all(len(near) == 3 for near in table["nearest_probes"].to_pylist())
    assert {name for near in table["nearest_probes"].to_pylist() for name in near} <= set(trusted)
    for name, row in zip(table["path"].to_pylist(), table["row"].to_pylist(), strict=True):
        assert name == sorted(names)[row]


def test_the_csv_file_says_the_same_and_holds_no_formula(scanned):
    out = scanned[0] / "out"
    with open(out / "suspects.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    table = pq.read_table(out / "suspects.parquet").to_pylist()
    assert len(rows) == len(table)
    for row, expected in zip(rows, table, strict=True):
        assert row["path"].removeprefix("./") == expected["path"]
        assert float(row["score"]) == expected["score"]
        assert not any(cell.startswith(("=", "+", "@")) for cell in row.values())


def nearest(rows, probes, k, leave_out=False):
    """Mean distances to the k nearest probes, in float64."""
    distances = np.sqrt(((rows[:, None] - probes[None]) ** 2).sum(-1))
    if leave_out:
        np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, :k].mean(1)


def test_scores_are_what_the_definition_says(scanned):
    """From the trajectories alone: combined, on the scale of each class, calibrated by leave-one-out distances."""
    results = json.loads((scanned[0] / "out" / "scan.json").read_text())
    store, probes = TrajectoryStore.open(scanned[0] / "out" / "trajectories"), np.array(results["probe_rows"])
    totals, of_probes = [], []
    for kind in ("features", "ranked"):
        rows = store.read(kind, np.array(results["epochs_kept"])).astype(np.float64).reshape(store.num_examples, -1)
        k = results["config"]["scoring"][kind]["k"]
        ours = np.log(nearest(rows, rows[probes], k))
        theirs = np.log(nearest(rows[probes], rows[probes], k, leave_out=True))
        low, middle, high = np.percentile(theirs, [16, 50, 84])
        totals.append((ours - middle) / ((high - low) / 2))
        of_probes.append((theirs - middle) / ((high - low) / 2))
    scores, own = np.mean(totals, axis=0), np.mean(of_probes, axis=0)
    scores[probes] = own
    scales = class_scales(own, store.labels()[probes])
    scores, own = scales(scores, store.labels()), scales.of_probes
    p_values = np.array([(1 + (own >= score).sum()) / (len(own) + 1) for score in scores])
    table = pq.read_table(scanned[0] / "out" / "suspects.parquet")
    rows = table["row"].to_numpy()
    np.testing.assert_allclose(table["score"].to_numpy(), scores[rows], rtol=1e-3, atol=1e-3)
    expected = set(np.flatnonzero(p_values <= 0.1)) - set(probes)
    assert len(expected ^ set(rows)) <= 2  # two probes that lie equally far, to float32


def test_the_same_command_again_only_scores(copy, capsys):
    before = {name: (copy / "out" / name).read_bytes() for name in ("remove.txt", "keep.txt", "suspects.csv")}
    recorded = files(copy / "out" / "trajectories")
    assert main(command(copy)) == 0
    assert "images of 4" in capsys.readouterr().out
    assert {name: (copy / "out" / name).read_bytes() for name in before} == before
    assert main(command(copy, "--config.rejection.alpha=0.02")) == 0
    assert files(copy / "out" / "trajectories") == recorded
    assert len(lines(copy / "out" / "suspects.csv")) < len(before["suspects.csv"].splitlines())


def test_another_training_or_other_images_need_another_folder(copy, capsys):
    assert main([*command(copy), "--config.recording.epochs=5"]) == 2
    assert "recording.epochs: 4 -> 5" in capsys.readouterr().err
    removed = (copy / "out" / "remove.txt").read_bytes()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(copy / "data" / "5" / "new.png")
    assert main(command(copy)) == 2
    assert "was recorded of other images" in capsys.readouterr().err
    assert (copy / "out" / "remove.txt").read_bytes() == removed


@pytest.mark.parametrize("links", [False, True])
def test_a_cleaned_copy(copy, capsys, links):
    extra = ["--apply", str(copy / "clean"), *["--links"] * links]
    for _ in range(2):  # again does no harm, and completes what is not complete
        assert main([*command(copy), *extra]) == 0
        kept = lines(copy / "out" / "keep.txt")
        found = {path.relative_to(copy / "clean").as_posix(): path for path in (copy / "clean").rglob("*.png")}
        assert found.keys() == set(kept)
        assert all(path.is_symlink() == links for path in found.values())
        assert all(path.read_bytes() == (copy / "data" / name).read_bytes() for name, path in found.items())
        found[kept[0]].unlink()
        (copy / "clean" / Path(kept[0]).parent / ".badloss-copy").write_bytes(b"half")
    assert main([*command(copy), "--apply", str(copy / "clean"), *["--links"] * (not links)]) == 0
    assert all((copy / "clean" / name).is_symlink() != links for name in kept)
    (copy / "clean" / "mine.txt").write_text("mine")
    assert main([*command(copy), *extra]) == 2
    assert "holds other files, such as" in capsys.readouterr().err
    for place in ("data/inside", "out/inside", "."):
        assert main([*command(copy), "--apply", str(copy / place)]) == 2
        assert "choose another folder" in capsys.readouterr().err
    assert main([*command(copy), "--apply", str(copy / "x.npz")]) == 2
    assert main([*command(copy), "--links"]) == 2


def test_lists_that_lead_out_of_the_folder_are_not_followed(copy):
    (copy / "out" / "keep.txt").write_text("../probes.txt\n")
    with pytest.raises(DataError, match="leads out of the folder"):
        write_cleaned(str(copy / "data"), copy / "out", copy / "clean")
    assert not list((copy / "clean").rglob("*.txt"))
    with pytest.raises(UsageError, match="finish the scan first"):
        write_cleaned(str(copy / "data"), copy / "nowhere", copy / "clean")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{0}\n{0}\n", r"line 2: .* stands in line 1 too"),
        ("{0}\nnone.png\n", r"line 2: 'none.png' is no image of the training set; expected a path relative"),
        ("../probes.txt\n", "is no image of the training set"),
        (CLASSES[3] + "/broken.png\n", r"which was left out: .+; expected"),
        ("{0}\n", "1 of 500 images are probes, expected 10 or more"),
    ],
)
def test_wrong_probes_are_named(copy, scanned, capsys, content, message):
    (copy / "probes.txt").write_text(content.format(scanned[3][0]), "utf-8")
    assert main(command(copy)) == 2
    assert re.search(message, capsys.readouterr().err)


def test_probes_that_are_no_file_or_too_many(copy, capsys):
    assert main(command(copy, probes="nowhere.txt")) == 2
    assert "give a text file of trusted paths, a folder, or how many images" in capsys.readouterr().err
    assert main(command(copy, probes="300")) == 2
    assert "expected half of them at most" in capsys.readouterr().err
    assert main(command(copy, probes="5")) == 2


def test_probes_at_random_come_with_a_warning(copy, capsys):
    assert main(command(copy, probes="80")) == 0
    assert "nobody looked at them" in capsys.readouterr().err
    assert json.loads((copy / "out" / "scan.json").read_text())["probe_count"] == 80


def test_trusted_images_in_a_folder_beside(scanned, tmp_path):
    folder, _, strange, trusted = scanned
    shutil.copytree(folder / "data", tmp_path / "data")
    for name in trusted:
        (tmp_path / "trusted" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(tmp_path / "data" / name, tmp_path / "trusted" / name)
    assert main(command(tmp_path, probes="trusted")) == 0
    removed, kept = (set(lines(tmp_path / "out" / f"{name}.txt")) for name in ("remove", "keep"))
    assert len(removed | kept) == 420
    assert not (removed | kept) & set(trusted)
    assert len(removed & strange) > 0.9 * len(strange)
    assert json.loads((tmp_path / "out" / "scan.json").read_text())["probe_count"] == 80


def test_trusted_images_in_a_folder_within(tmp_path):
    names, _, trusted = write_digits(tmp_path / "data")
    for name in trusted:
        place = tmp_path / "data" / Path(name).parent / "trusted" / Path(name).name
        place.parent.mkdir(exist_ok=True)
        shutil.move(tmp_path / "data" / name, place)
    inside = tmp_path / "data" / "5" / "trusted"
    count = len(list(inside.iterdir()))
    assert count >= 10
    with pytest.warns(UserWarning, match="9 of 10 classes have no probe"):
        results = scan(str(tmp_path / "data"), str(inside), tmp_path / "out",
                       [f"--config.data.cache_dir={tmp_path}", *SMALL])  # fmt: skip
    assert (results["probe_count"], results["num_examples"]) == (count, len(names))


def test_other_probes_need_no_other_training(copy, scanned):
    before = (copy / "out" / "trajectories" / "loss" / "epoch_0000-00000-of-00001.npy").stat().st_mtime_ns
    (copy / "probes.txt").write_text("\n".join(scanned[3][:70]), "utf-8")
    assert main(command(copy)) == 0
    results = json.loads((copy / "out" / "scan.json").read_text())
    assert results["probe_count"] == 70
    store = TrajectoryStore.open(copy / "out" / "trajectories")
    assert store.probe_ids().tolist() == results["probe_rows"]
    assert (store.folder / "loss" / "epoch_0000-00000-of-00001.npy").stat().st_mtime_ns == before


def test_a_class_of_one_image(copy):
    """All images of a class but one go to others: so many images and classes as before need no other programs."""
    (copy / "data" / "odd").mkdir()
    trusted = (copy / "probes.txt").read_text("utf-8")
    for number, path in enumerate(sorted((copy / "data" / "9").iterdir())):
        name = f"{CLASSES[5 + number % 4] if number else 'odd'}/{path.name}"
        path.rename(copy / "data" / name)
        trusted = trusted.replace(f"9/{path.name}\n", f"{name}\n")
    (copy / "data" / "9").rmdir()
    (copy / "probes.txt").write_text(trusted, "utf-8")
    assert main(command(copy, out="other")) == 0
    results = json.loads((copy / "other" / "scan.json").read_text())
    (entry,) = [entry for entry in results["classes"] if entry["name"] == "odd"]
    assert (entry["images"], entry["affected"], entry["judged"]) == (1, False, False)


def test_a_number_of_devices_that_divides_no_usual_batch(copy):
    results = scan(str(copy / "data"), str(copy / "probes.txt"), copy / "three",
                   [f"--config.data.cache_dir={copy / 'cache'}", "--config.model.stages=(8,)",
                    "--config.recording.epochs=3"], mesh=make_mesh(jax.devices()[:3]))  # fmt: skip
    assert results["config"]["recording"]["batch_size"] == 18


def test_the_page_says_what_it_does_not_hold(copy, monkeypatch):
    monkeypatch.setattr("badloss_jax.report.scan._LISTED", 5)
    assert main(command(copy)) == 0
    assert "This page knows the first 5 of" in (copy / "out" / "report.html").read_text("utf-8")


@pytest.mark.parametrize("out", ["data/out", "data", "."])
def test_the_data_are_never_written(copy, capsys, out):
    before = files(copy / "data")
    assert main(command(copy, out=out)) == 2
    assert "lie in one another" in capsys.readouterr().err
    assert files(copy / "data") == before


def test_trusted_images_are_never_written(copy, scanned, capsys):
    shutil.copytree(copy / "data" / "5", copy / "trusted" / "5")
    shutil.copytree(copy / "data" / "6", copy / "trusted" / "6")
    assert main(command(copy, probes="trusted", out="trusted/out")) == 2
    assert "--probes" in capsys.readouterr().err
    assert not (copy / "trusted" / "out").exists()


def test_a_folder_that_cannot_be_written(copy, capsys):
    arguments = command(copy)
    arguments[arguments.index("--workdir") + 1] = "/proc/badloss/out"
    assert main(arguments) == 1
    assert "/proc/badloss/out cannot be written" in capsys.readouterr().err
    (copy / "mine").mkdir()
    (copy / "mine" / "thesis.txt").write_text("words")
    assert main(command(copy, out="mine")) == 2
    assert "holds other files and no run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_keeps_the_network_that_it_was_begun_with(tmp_path, mesh):
    """Hardly any time: the smallest network, and as few epochs as there can be; then all the time in the world."""

    *_, trusted = write_digits(tmp_path / "data", count=200, noise=8)
    (tmp_path / "probes.txt").write_text("\n".join(trusted), "utf-8")

    def told(minutes, *overrides):
        stream = io.StringIO()
        scan(
            str(tmp_path / "data"),
            str(tmp_path / "probes.txt"),
            tmp_path / "timed",
            [f"--config.data.cache_dir={tmp_path / 'cache'}", *overrides],
            minutes=minutes,
            progress=Progress(stream),
            mesh=mesh,
        )
        return stream.getvalue()

    network = r"network  resnet_small \(16, 32, 64\), stem of stride 1, 8 epochs"  # which is that of images of 8 px
    assert re.search(rf"^{network}: [\d,]+ images/s here, so about \d+ seconds to record", told(1e-4), re.MULTILINE)
    begun = (tmp_path / "timed" / "config.json").read_text()
    again = told(60)
    assert re.search(rf"^{network}$", again, re.MULTILINE)
    assert "recording  done before" in again
    assert (tmp_path / "timed" / "config.json").read_text() == begun
    with pytest.raises(UsageError, match="--minutes 0: expected a number above 0"):
        told(0)
    with pytest.raises(UsageError, match=r"holds the run of another config \(model.stages"):
        told(60, "--config.model.stages=(8,)")


@pytest.mark.parametrize(
    "wrong",
    [["--config.recording.epoch=3"], ["--config.scoring.kinds=('loss','combined')"], ["--config.rejection.alpha=2"],
     ["--config.rejection.rules=('fdr','alpha')"], ["--fast"], ["--config.scoring.kinds=('logits',)"],
     ["--config.scoring.by_class=False"], ["--config.rejection.rules=('clusters','alpha')"],
     ["--config.data.train_examples=100"], ["--config.data.pad=2"], ["--config.attacks.names=('patch',)"]],
)  # fmt: skip
def test_wrong_settings_are_refused(copy, capsys, wrong):
    try:
        code = main([*command(copy), *wrong])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert "error" in capsys.readouterr().err


def test_arrays(tmp_path, capsys):
    digits = load_digits()
    images, labels = np.uint8(np.minimum(16 * digits.images[:500], 255)), digits.target[:500]
    labels[::15] = 4
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:5], "y_test": labels[:5]}
    np.savez(tmp_path / "a.npz", **arrays)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive, archive.open("file.npy", "w") as member:
        np.lib.format.write_array(member, np.arange(3))
    (tmp_path / "probes.txt").write_text("".join(f"{row}\n" for row in range(0, 500, 6)))
    assert main([*command(tmp_path, data="a.npz"), "--apply", str(tmp_path / "b.npz")]) == 0
    removed, kept = ([int(row) for row in lines(tmp_path / "out" / f"{name}.txt")] for name in ("remove", "keep"))
    assert sorted(removed + kept) == list(range(500))
    with np.load(tmp_path / "b.npz") as cleaned:
        np.testing.assert_array_equal(cleaned["x_train"], images[kept])
        np.testing.assert_array_equal(cleaned["y_train"], labels[kept])
        np.testing.assert_array_equal(cleaned["x_test"], images[:5])
        assert cleaned["file"].tolist() == [0, 1, 2]
    assert main([*command(tmp_path, data="a.npz"), "--apply", str(tmp_path / "a.npz")]) == 2
    assert "exists: choose another file" in capsys.readouterr().err
    (tmp_path / "trusted").mkdir()
    assert main(command(tmp_path, data="a.npz", probes="trusted")) == 2
    assert "give a text file of row numbers" in capsys.readouterr().err


@pytest.mark.parametrize("streamed", [False, True])
def test_a_folder_of_tfds(tmp_path, monkeypatch, streamed):
    """By its path, and by its name below TFDS_DATA_DIR; in memory, and streamed by the hosts."""
    names, _, _ = write_digits(tmp_path / "images" / "train")
    (tmp_path / "images" / "test").symlink_to(tmp_path / "images" / "train")
    prepare_in_shards(tmp_path / "images", tmp_path / "prepared")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    (tmp_path / "probes.txt").write_text("".join(f"{row}\n" for row in range(0, 500, 6)))
    how = ["--config.data.input=streamed"] * streamed
    for name in (str(tmp_path / "prepared"), "prepared"):
        arguments = command(tmp_path, *how)
        arguments[arguments.index("--data") + 1] = f"tfds:{name}"
        assert main(arguments) == 0
    removed, kept = ([int(row) for row in lines(tmp_path / "out" / f"{name}.txt")] for name in ("remove", "keep"))
    assert sorted(removed + kept) == list(range(len(names)))
    assert "data:image/png" in (tmp_path / "out" / "report.html").read_text()


def test_a_small_or_missing_folder_of_tfds(tmp_path, prepared, capsys):
    assert main(["scan", "--data", f"tfds:{prepared / 'out'}", "--probes", "6", "--workdir", str(tmp_path / "o")]) == 2
    assert "6 of 12 images are probes, expected 10 or more" in capsys.readouterr().err
    assert main(["scan", "--data", "tfds:nothing", "--probes", "6", "--workdir", str(tmp_path / "o")]) == 2


def test_tiny_classes_and_classes_without_probes(tmp_path, capsys):
    names, _, trusted = write_digits(tmp_path / "data", count=300, noise=0)
    for name in names:
        if name.startswith(("8/", "9/")) and not name.endswith(("8.png", "9.png")):
            (tmp_path / "data" / name).unlink()
    left = {name for name in names if (tmp_path / "data" / name).exists()}
    probes = [name for name in trusted if name in left and not name.startswith(("8/", "9/"))]
    (tmp_path / "probes.txt").write_text("\n".join(probes), "utf-8")
    assert main(command(tmp_path)) == 0
    assert (
        "2 of 10 classes have no probe (8, 9): their images are judged by the probes of others"
        in capsys.readouterr().err
    )
    results = json.loads((tmp_path / "out" / "scan.json").read_text())
    assert not any(entry["affected"] for entry in results["classes"])
    assert not any(entry["judged"] for entry in results["classes"] if entry["name"] in ("8", "9"))
    assert "cannot tell" in results["verdict"]


def test_interrupted_and_taken_up_again(scanned, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the middle of the recording: exit code 130, and the rerun ends with the same bytes."""
    arguments = command(scanned[0], out=str(tmp_path / "out"))
    metrics = tmp_path / "out" / "metrics.jsonl"
    advance = Progress.advance

    def press(*given):
        advance(*given)
        if metrics.is_file() and len(lines(metrics)) == 1:
            signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(Progress, "advance", advance)

    monkeypatch.setattr(Progress, "advance", press)
    assert main(arguments) == 130
    told = capsys.readouterr().err
    assert "stopping as soon as all is saved; Ctrl-C again stops at once" in told
    assert "the same command goes on from there" in told
    assert not (tmp_path / "out" / "scan.json").exists()

    assert main(arguments) == 0
    (resumed,) = json.loads((tmp_path / "out" / "scan.json").read_text())["resumes"]
    assert resumed == {"phase": "recording", "step": 17}  # the first of the second epoch
    for name in ("suspects.csv", "remove.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (scanned[0] / "out" / name).read_bytes()


def judged(clusters=(), far=0, rule="clusters", size=1_000, score=9.0):
    """A verdict on clean scores, of which so many lie far out, at this score."""
    draw = np.random.default_rng(1)
    scores, labels = draw.normal(size=size), np.repeat(np.arange(10), size // 10)
    is_probe = np.isin(np.arange(size), draw.choice(size, 250, replace=False))
    own = scores[is_probe]
    scores[np.flatnonzero(~is_probe)[:far]] = score
    return judge(scores, own, labels, is_probe, 10, rule, 0.02, clusters), is_probe


def cluster(label, ids, evidence):
    signs = Signs(3.0, probes_p=0.01, gap=5.0, agreement=0.5, sources=0.8, late_sources=0.0, odds=-5.0)
    ids = np.array(ids)
    return Cluster(label, ids, evidence, signs, np.zeros(len(ids)), ids, certain=evidence >= CERTAIN)


NAMES = list("abcdefghij")


def test_clean_data_are_called_clean_and_nothing_is_removed():
    verdict, _ = judged()
    assert not verdict.stands_out
    assert not verdict.removed.any()
    assert verdict.share.high == 1.0  # what leaves no trace has no bound
    text = sentence(verdict, NAMES, 250)
    assert text.startswith("Nothing stands out")
    assert "That is no proof" in text
    assert "%" not in text


def test_images_rank_by_the_better_of_two_places():
    less = replace(cluster(4, [410], 4.6), certain=True)  # beside an attack it may be one, where more is but possible
    verdict, _ = judged([cluster(5, [510], 5.0), cluster(3, [310, 311], 7.0), less])
    scores = np.zeros(1_000)
    scores[510] = -1  # what is but possible does not come before others beside an attack,
    ranks = verdict.ranking(scores)
    assert np.argsort(ranks)[:3].tolist() == [311, 310, 410]
    assert ranks[510] == 1_000
    verdict, _ = judged([cluster(5, [510], 5.0)])
    assert verdict.ranking(scores)[510] == 1  # but alone it does
    verdict, _ = judged([cluster(3, [310, 311], 7.0)])
    scores, odds = np.zeros(1_000), np.full(1_000, -9.0)
    scores[[5, 6]], odds[[700, 6]] = (3.0, 1.0), (4.0, -8.0)
    first = np.argsort(verdict.ranking(scores, odds))
    assert set(first[:2]) == {310, 311}
    assert first[2:4].tolist() == [5, 700]  # the first of each; where both are first, the score decides
    assert first[4] == 6
    assert np.argsort(verdict.ranking(scores))[2:4].tolist() == [5, 6]
    assert sorted(verdict.ranking(scores, odds)) == list(range(1, 1_001))


def test_images_rank_higher_where_they_are_like_an_attack_of_their_class():
    """The strangest of three is hardly more like it than the rest, the least strange nearly a member."""
    likeness, scores = np.full(100, -1.0), np.zeros(1_000)
    likeness[[20, 30, 40]], scores[[320, 330, 340]] = (-0.9, 0.0, 0.5), (3.0, 2.0, 1.0)
    found = replace(cluster(3, [310, 311], 7.0), scores=likeness, score_ids=np.arange(300, 400))
    assert np.argsort(judged([found])[0].ranking(scores))[2:5].tolist() == [340, 330, 320]
    possible = replace(found, certain=False)  # likeness to what may be none makes nobody suspect
    assert np.argsort(judged([possible])[0].ranking(scores))[2:5].tolist() == [320, 330, 340]


def test_certain_clusters_go_and_possible_ones_are_shown():
    free = np.flatnonzero(~judged()[1])
    here, there = free[free // 100 == 3][:30], free[free // 100 == 7][:20]
    verdict, _ = judged([cluster(7, there, 4.5), cluster(3, here, 7.0)])
    assert verdict.stands_out
    np.testing.assert_array_equal(np.flatnonzero(verdict.removed), here)
    assert [entry["members"] for entry in verdict.classes] == [0, 0, 0, 30, 0, 0, 0, 0, 0, 0]
    assert np.flatnonzero(verdict.attack_of() == 1).tolist() == here.tolist()
    assert np.flatnonzero(verdict.attack_of() == 2).tolist() == there.tolist()
    assert verdict.share.low < 30 / 750 <= verdict.share.estimate < verdict.share.high < 1
    text = sentence(verdict, NAMES, 250)
    assert text.startswith("1 attack stands out: 30 images of d. About 4 % of the images look poisoned")
    assert "1 group may be an attack" in text


def test_the_interval_holds_poison_that_is_no_crowd_if_it_is_learnt_late():
    """Beside 100 images of an attack lie 100 others that are only as far out as one clean image in five."""
    free = np.flatnonzero(~judged()[1])
    verdict, _ = judged([cluster(9, free[-100:], 7.0)], far=100, score=0.85)
    assert verdict.share.estimate < 200 / 750 < verdict.share.high < 1
    assert verdict.share.low <= 100 / 750


def test_a_rule_of_distances_casts_a_wider_net():
    free = np.flatnonzero(~judged()[1])
    members = free[free // 100 == 3][:30]
    narrow, _ = judged([cluster(3, members, 7.0)])
    wide, is_probe = judged([cluster(3, members, 7.0)], rule="alpha")
    assert (wide.removed >= narrow.removed).all()
    assert wide.removed.sum() > narrow.removed.sum()
    assert not (wide.removed & is_probe).any()
    assert not judged(rule="alpha")[0].removed.any()  # nothing stands out


def test_images_that_lie_far_out_alone_are_said_and_not_removed():
    verdict, _ = judged(far=60)
    assert verdict.stands_out
    assert not verdict.removed.any()
    assert "no group of them is alike" in sentence(verdict, NAMES, 250)


def test_a_search_that_was_not_made_is_not_claimed():
    assert "were not looked for" in sentence(judged(None, rule="alpha")[0], NAMES, 250)
    text = sentence(judged(None, far=60, rule="alpha")[0], NAMES, 250)
    assert text.startswith("More images lie far from")
    assert "alike" not in text


def test_what_cannot_be_told_is_said():
    draw = np.random.default_rng(3)
    scores, labels = draw.normal(size=100), np.repeat(np.arange(10), 10)
    is_probe = np.arange(100) % 4 == 0
    verdict = judge(scores, scores[is_probe], labels, is_probe, 10, "clusters", 0.0)
    assert sentence(verdict, NAMES, 25) == (
        "Of 10 classes this recording cannot tell: too few images, or too few probes."
    )


def test_no_images_but_errors_are_errors():
    with pytest.raises(BadlossError):
        scan("nowhere", "10", Path("out"))


def test_the_page_in_a_browser(scanned, browser, tmp_path):
    page = scanned[0] / "out" / "report.html"
    text = page.read_text("utf-8")
    assert "<img src=x" not in text
    assert "http" not in re.sub(r"http-equiv|data:[^)\"]*", "", text)
    console, asked = opened(browser, page, 1300)
    assert console == []
    assert {address for address in asked if not address.startswith("data:")} == {page.as_uri()}
    rows = pq.read_table(scanned[0] / "out" / "suspects.parquet").to_pylist()
    cards = browser.find_elements(By.CSS_SELECTOR, ".card")
    assert len(cards) == len(rows)
    count = browser.find_element(By.ID, "count")
    removed = [row for row in rows if row["removed"]]
    assert f"{len(rows)} suspects match" in count.text
    assert f"{len(removed)} are ticked" in count.text

    Select(browser.find_element(By.ID, "class")).select_by_visible_text("4")
    of_class = [row for row in rows if row["label"] == "4"]
    assert f"{len(of_class)} suspects match" in count.text
    assert sum(card.is_displayed() for card in cards) == len(of_class)
    next(card for card in cards if card.is_displayed()).find_element(By.TAG_NAME, "input").click()
    of_attack = [row for row in of_class if row["removed"]]
    assert of_class[0]["removed"]
    assert f"{len(of_attack) - 1} are ticked" in count.text

    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    browser.find_element(By.ID, "save-list").click()
    browser.find_element(By.ID, "save-csv").click()
    plain, table = tmp_path / "selection.txt", tmp_path / "selection.csv"
    # The browser makes an empty file before it writes there.
    WebDriverWait(browser, 20).until(lambda _: all(file.exists() and file.stat().st_size for file in (plain, table)))
    assert lines(plain) == [row["path"] for row in of_attack][1:]
    with open(table, newline="", encoding="utf-8") as file:
        saved = list(csv.DictReader(file))
    assert [row["path"] for row in saved] == [row["path"] for row in of_attack][1:]
    assert {row["label"] for row in saved} == {"4"}

    least = browser.find_element(By.ID, "score")
    least.send_keys(str(of_class[4]["score"] + 0.001))
    assert "4 suspects match" in count.text
    browser.find_element(By.ID, "none").click()
    assert "0 are ticked" in count.text
    browser.find_element(By.ID, "all").click()
    assert "4 are ticked" in count.text
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [1300, 390])
def test_the_page_fits(scanned, browser, width):
    opened(browser, scanned[0] / "out" / "report.html", width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
