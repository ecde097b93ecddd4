import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from badloss_jax.cli import main
from badloss_jax.config import load_config, override
from badloss_jax.core.errors import DataError, NonFiniteLossError, PreemptedError, UsageError
from badloss_jax.core.files import locked
from badloss_jax.report.page import write_reports
from badloss_jax.runs.experiment import run_experiment
from badloss_jax.runs.rescore import rescore
from badloss_jax.runs.writers import open_writers
from badloss_jax.scoring import filter_epochs, knn_distances
from badloss_jax.settings import KINDS, RULES
from badloss_jax.training.saved_model import load_model
from badloss_jax.trajectories.store import TrajectoryStore
from tests.conftest import CLASS_NAMES, ENVIRONMENT, ONLY_READS, overrides, without_cost
from tests.training.test_resume import StopAfter


def command(workdir, *extra, **changed):
    return [sys.executable, "-m", "badloss_jax", "run", "--config", "configs/digits.py", "--workdir", str(workdir),
            *overrides(**changed), *extra]  # fmt: skip


def run(arguments):
    return subprocess.run(arguments, capture_output=True, text=True, check=False, env=ENVIRONMENT)


def run_on_a_full_disk(arguments, home):
    """No file can grow beyond 4 KiB; nothing but the run itself writes any."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    environment = ENVIRONMENT | ONLY_READS | {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment, preexec_fn=limit)


def tree(folder):
    """Every file's bytes, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_leaves_what_the_contract_says(finished):
    workdir, config, results = finished
    written = json.loads((workdir / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert {"schema_version", "config", "config_hash", "environment", "seconds", "undefended", "recording_model",
            "variants", "attacks", "class_names", "num_examples"} <= written.keys()  # fmt: skip
    assert written["class_names"] == list(CLASS_NAMES)
    assert written["attacks"].keys() == {"patch", "sinusoid"}
    patch, sinusoid = written["attacks"]["patch"], written["attacks"]["sinusoid"]
    assert (patch["examples"], patch["clean_label"], sinusoid["clean_label"]) == (6, False, True)
    assert patch["target_name"] == CLASS_NAMES[patch["target"]]
    assert written["config"]["seed"] == 0
    assert {"jax", "flax"} <= written["environment"]["packages"].keys()
    for model in ("undefended", "recording_model"):
        assert written[model].keys() == {"clean_accuracy", "attack_success_rate", "robust_accuracy", "boosted"}
        assert written[model]["attack_success_rate"].keys() == {"patch", "sinusoid"}
        assert written[model]["boosted"].keys() == {"sinusoid"}
    assert written["variants"].keys() == {f"{k}/{r}" for k in KINDS for r in RULES} | {"random/fraction", "oracle"}
    for name, variant in written["variants"].items():
        assert ("detection" in variant) == (name not in ("random/fraction", "oracle"))
        assert ("retrained" in variant) == (name in (*config.retraining.variants, "random/fraction", "oracle"))
        assert 0 <= variant["clean_removed_share"] <= 1
        assert variant["recall"].keys() == {"patch", "sinusoid"}
        for metric in variant.get("detection", {}).values():
            assert metric.keys() == {"overall", "patch", "sinusoid"}
    assert written["variants"]["oracle"]["clean_removed_share"] == 0
    assert set(written["variants"]["oracle"]["recall"].values()) == {1.0}
    assert {"recording", "scoring", "undefended", "oracle"} <= written["seconds"].keys()
    report = (workdir / "report.md").read_text()
    assert "| undefended |" in report
    assert "![ROC per attack](roc.png)" in report
    for picture in ("roc.png", "trajectories.png"):
        assert (workdir / picture).read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["model"] == "recording" for line in lines) == 3
    assert "<!doctype html>" in (workdir / "report.html").read_text()
    assert not list(workdir.rglob(".*-*"))  # nothing half-written


def test_scores_are_what_the_scorer_says(finished):
    workdir, _, results = finished
    table = pq.read_table(workdir / "scores.parquet").to_pydict()
    assert table["example_id"] == list(range(300))
    assert table["class_name"] == [CLASS_NAMES[label] for label in table["label"]]
    is_probe, attack = np.array(table["probe"]), np.array(table["attack"])
    assert is_probe.sum() == 30
    assert not (is_probe & (attack != "")).any()
    store = TrajectoryStore.open(workdir / "trajectories")
    kept = filter_epochs(store.read("loss"))
    assert kept.tolist() == results["epochs_kept"]
    losses = store.read("loss", kept)
    np.testing.assert_allclose(table["distance_loss"], knn_distances(losses, losses[is_probe], 5))
    for kind in KINDS:
        assert max(table[f"score_{kind}"]) == 1
        order = np.argsort(table[f"distance_{kind}"])
        assert (np.diff(np.array(table[f"score_{kind}"])[order]) >= 0).all()
        assert min(table[f"p_value_{kind}"]) >= 1 / 31
        for rule in RULES:
            removed = np.array(table[f"removed_{kind}_{rule}"])
            assert not (removed & is_probe).any()
            assert removed.mean() == pytest.approx(results["variants"][f"{kind}/{rule}"]["removed_share"])
    assert np.array(table["removed_loss_fraction"]).sum() == 120


def test_models_are_saved(finished, mesh):
    workdir, _, results = finished
    spec, _ = load_model(workdir / "models" / "loss-fraction", mesh)
    assert spec.num_classes == 10
    about = json.loads((workdir / "models" / "loss-fraction" / "about.json").read_text())
    retrained = results["variants"]["loss/fraction"]["retrained"]
    assert retrained == about["evaluation"] | {"defense_effectiveness": retrained["defense_effectiveness"]}


@pytest.mark.usefixtures("unrendered")
def test_finished_phases_are_not_run_again(finished, mesh, monkeypatch):
    workdir, config, results = finished
    before = tree(workdir / "models") | tree(workdir / "trajectories")
    monkeypatch.setattr("badloss_jax.runs.trainer.train", None)  # training again would fail
    again = run_experiment(config, workdir, mesh=mesh)
    assert tree(workdir / "models") | tree(workdir / "trajectories") == before
    assert without_cost(again["variants"]) == json.loads(json.dumps(without_cost(results["variants"])))


@pytest.mark.usefixtures("unrendered")
def test_shared_artefacts_are_made_once_and_say_the_same(finished, tmp_path, mesh, monkeypatch):
    """Two runs over one folder say together what a run of its own does."""
    _, config, results = finished
    shared, expected = tmp_path / "shared", json.loads(json.dumps(without_cost(results["variants"])))
    first = override(config, ["--config.retraining.variants=('loss/fraction',)", "--config.controls=('oracle',)"])
    ours = run_experiment(first, tmp_path / "a", mesh=mesh, shared=shared)
    both = {"detection", "removed_share", "clean_removed_share", "recall"}
    for name, entry in without_cost(json.loads(json.dumps(ours["variants"]))).items():
        trained = name in ("loss/fraction", "oracle")
        assert entry == {key: value for key, value in expected[name].items() if key in both or trained}, name
    assert ours["undefended"] == results["undefended"]
    left = {path.name for path in (tmp_path / "a").iterdir() if not path.name.startswith(".")}
    assert left == {"config.json", "manifest.json", "metrics.jsonl", "results.json", "scores.parquet"}
    assert (tmp_path / "a" / "scores.parquet").read_bytes() == (finished[0] / "scores.parquet").read_bytes()
    assert (tmp_path / "a" / "manifest.json").read_bytes() == (finished[0] / "manifest.json").read_bytes()
    assert not list((shared / "checkpoints").iterdir())
    assert len(list((shared / "models").iterdir())) == 4  # recording, undefended, loss/fraction, oracle
    before = tree(shared / "models") | tree(shared / "trajectories")
    monkeypatch.setattr("badloss_jax.runs.trainer.train", None)  # training again would fail
    settings = ["scoring.kinds=('logits',)", "defenses.names=('badloss',)", "retraining.variants=('badloss/fraction',)",
                "controls=()"]  # fmt: skip
    second = override(config, [f"--config.{text}" for text in settings])
    theirs = run_experiment(second, tmp_path / "b", mesh=mesh, shared=shared)
    assert tree(shared / "models") | tree(shared / "trajectories") == before
    found = without_cost(json.loads(json.dumps(theirs["variants"])))
    assert found["badloss/fraction"] == expected["loss/fraction"]
    assert found["logits/alpha"] == expected["logits/alpha"]
    assert theirs["variants"]["badloss/fraction"]["cost"]["seconds_of"]["recording"] == ours["seconds"]["recording"]


@pytest.mark.usefixtures("unrendered")
def test_surrogates_are_shared_only_if_they_are_trained_alike(tmp_path, tiny, mesh):
    changed = {"attacks__names": "('narcissus',)", "attacks__narcissus__ratio": 0.2, "controls": "('none',)",
               "attacks__narcissus__surrogate_epochs": 1, "attacks__narcissus__steps": 2, "scoring__kinds": "()",
               "retraining__enabled": False, "retraining__variants": "()"}  # fmt: skip
    for folder, more in (("a", {}), ("b", {"rejection__alpha": 0.2}), ("c", {"optimizer__learning_rate": 0.01})):
        run_experiment(tiny(**changed | more), tmp_path / folder, mesh=mesh, shared=tmp_path / "shared")
    one, same, other = ((tmp_path / folder / "manifest.json").read_bytes() for folder in "abc")
    assert one == same
    assert one != other
    assert len(list((tmp_path / "shared" / "poison").iterdir())) == 2


def test_defences_find_what_their_kinds_do(finished, defended):
    """On a recording of the same training, made for fewer kinds."""
    ours, theirs = (pq.read_table(folder / "scores.parquet") for folder in (defended[0], finished[0]))
    for name, kind in (("badloss", "loss"), ("badloss_step", "step"), ("badloss_logits", "logits")):
        for column in ("distance", "p_value", "score"):
            np.testing.assert_array_equal(ours[f"{column}_{name}"], theirs[f"{column}_{kind}"])
        for rule in RULES:
            np.testing.assert_array_equal(ours[f"removed_{name}_{rule}"], theirs[f"removed_{kind}_{rule}"])
            assert (defended[2]["variants"][f"{name}/{rule}"]["detection"]
                    == finished[2]["variants"][f"{kind}/{rule}"]["detection"])  # fmt: skip
    losses = TrajectoryStore.open(defended[0] / "trajectories").read("loss").astype(np.float64)
    np.testing.assert_allclose(ours["distance_mean_loss_low"], -losses.mean(1), rtol=1e-6)
    removed, is_probe = np.array(ours["removed_mean_loss_low_fraction"]), np.array(ours["probe"])
    assert losses.mean(1)[removed].max() <= losses.mean(1)[~removed & ~is_probe].min()


def test_detection_alone_trains_the_recording_alone(defended):
    workdir, config, results = defended
    assert "undefended" not in results
    assert not any("retrained" in variant for variant in results["variants"].values())
    assert [path.name for path in (workdir / "models").iterdir()] == ["recording"]
    assert results["variants"].keys() == {
        f"{name}/{rule}" for name in ("loss", *config.defenses.names) for rule in RULES
        if rule != "clusters" or (name.startswith(("loss", "badloss")) and name != "loss_variance")
    }  # fmt: skip
    for name, variant in results["variants"].items():
        assert variant["cost"]["epochs"] is None
        who = name.partition("/")[0]
        assert variant["cost"]["seconds_of"].keys() == {"recording", "scoring" if who == "loss" else who}


@pytest.mark.usefixtures("unrendered")
def test_detection_alone_can_be_scored_again(defended, tmp_path):
    shutil.copytree(defended[0], tmp_path / "run")
    folder, rescored = rescore(tmp_path / "run", lambda config: override(config, ["--config.scoring.loss.k=7"]))
    assert rescored["variants"].keys() == {f"loss/{rule}" for rule in RULES}
    assert "What the models do" not in (folder / "report.html").read_text()
    with pytest.raises(UsageError, match=r"scoring.kinds is empty: name the kinds"):
        rescore(tmp_path / "run", lambda config: override(config, ["--config.scoring.kinds=()"]))


@pytest.mark.usefixtures("unrendered")
def test_contaminated_probes_go_through(tmp_path, tiny, mesh):
    config = tiny(probes__contaminated=0.1, attacks__overlap=0.5, retraining__enabled=False, controls="()",
                  scoring__kinds="('loss',)", retraining__variants="()", scoring__epochs=3)  # fmt: skip
    results = run_experiment(config, tmp_path, mesh=mesh)
    table = pq.read_table(tmp_path / "scores.parquet").to_pydict()
    is_probe, poisoned = np.array(table["probe"]), np.array(table["attack"]) != ""
    assert (is_probe & poisoned).sum() == 3
    assert not (np.array(table["removed_loss_fraction"]) & is_probe).any()
    assert results["variants"]["loss/fraction"]["detection"]["auroc"]["overall"] is not None


@pytest.mark.usefixtures("unrendered")
def test_same_seed_gives_identical_scores(finished, tmp_path, mesh):
    workdir, config, _ = finished
    run_experiment(config, tmp_path / "b", mesh=mesh)
    assert (tmp_path / "b" / "scores.parquet").read_bytes() == (workdir / "scores.parquet").read_bytes()


@pytest.mark.usefixtures("unrendered")
def test_a_manifest_can_be_given(finished, tmp_path, tiny, mesh):
    workdir, _, results = finished
    config = tiny(attacks__manifest=workdir / "manifest.json", attacks__patch__ratio=0.3, controls="()",
                  retraining__variants="()")  # fmt: skip
    got = run_experiment(config, tmp_path / "m", mesh=mesh)
    assert (tmp_path / "m" / "manifest.json").read_bytes() == (workdir / "manifest.json").read_bytes()
    assert got["undefended"] == results["undefended"]


def test_a_clean_training_set_runs(tmp_path, tiny, mesh):
    config = tiny(attacks__names="()", controls="()", retraining__variants="('loss/fraction',)")
    results = run_experiment(config, tmp_path, mesh=mesh)
    assert results["variants"]["loss/fraction"]["recall"] == {}
    assert results["undefended"]["attack_success_rate"] == {}
    assert results["variants"]["loss/fraction"]["detection"]["auroc"] == {"overall": None}
    report = (tmp_path / "report.md").read_text()
    assert ".png" not in report
    assert "No attack was simulated" in report
    page = (tmp_path / "report.html").read_text()
    assert "No attack was simulated" in page
    assert page.count('<figure class="card"') == 5 * 60


@pytest.mark.usefixtures("unrendered")
def test_levels_can_be_named(tmp_path, tiny, mesh):
    config = tiny(rejection__rules="('fraction','fraction@0.1')", retraining__variants="('loss/fraction@0.1',)",
                  controls="()", scoring__kinds="('loss',)", report__gallery=0)  # fmt: skip
    results = run_experiment(config, tmp_path, mesh=mesh)
    assert results["variants"].keys() == {"loss/fraction", "loss/fraction@0.1"}
    assert results["variants"]["loss/fraction"]["removed_share"] == pytest.approx(0.4)
    assert results["variants"]["loss/fraction@0.1"]["removed_share"] == pytest.approx(0.1)
    assert "retrained" in results["variants"]["loss/fraction@0.1"]
    assert "retrained" not in results["variants"]["loss/fraction"]
    assert sum(pq.read_table(tmp_path / "scores.parquet")["removed_loss_fraction@0.1"].to_pylist()) == 30


@pytest.mark.usefixtures("unrendered")
def test_narcissus_trains_its_surrogate_once(tmp_path, tiny, mesh, monkeypatch):
    changed = {"attacks__names": "('patch','narcissus')", "attacks__narcissus__ratio": 0.2, "controls": "()",
               "attacks__narcissus__surrogate_epochs": 2, "attacks__narcissus__steps": 5,
               "retraining__variants": "()"}  # fmt: skip
    results = run_experiment(tiny(**changed), tmp_path / "a", mesh=mesh)
    assert results["seconds"]["surrogate"] > 0
    for figure in ("attack_success_rate", "boosted", "scrambled"):
        assert "narcissus" in results["undefended"][figure]
    stored = json.loads((tmp_path / "a" / "manifest.json").read_text())["attacks"]
    assert len(stored["narcissus"]["perturbation"]) == 12 * 12
    assert 0 < max(map(abs, stored["narcissus"]["perturbation"])) <= 16
    assert stored["patch"]["perturbation"] == []
    monkeypatch.setattr("badloss_jax.runs.poison.optimise_triggers", lambda manifest, *rest: manifest)
    again = run_experiment(tiny(**changed), tmp_path / "a", mesh=mesh)  # takes the one that is there
    assert again["undefended"] == results["undefended"]
    assert again["seconds"]["surrogate"] == results["seconds"]["surrogate"]
    assert list(again["attacks"]) == list(results["attacks"]) == ["patch", "narcissus"]
    changed["attacks__manifest"] = tmp_path / "a" / "manifest.json"
    given = run_experiment(tiny(**changed), tmp_path / "b", mesh=mesh)
    assert given["undefended"] == results["undefended"]


@pytest.mark.usefixtures("unrendered")
@pytest.mark.parametrize("name", ["imagenette", "imagenet", "gtsrb"])
def test_large_configs_run_shrunk(tmp_path, mesh, name, rng):
    """Images of mixed sizes and modes at 112 px, where patches are blocks and augmentation crops and resizes."""
    from PIL import Image

    classes = 10 if name == "imagenette" else 4
    for split, count in (("train", 8 * classes), ("val", classes)):
        for i in range(count):
            label, (height, width) = i % classes, rng.integers(40, 160, 2)
            folder = tmp_path / "data" / split / f"n{label:08}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            pixels.convert(("RGB", "L", "P", "RGBA")[i % 4]).save(folder / f"{i:04}.png")
    changed = {
        "data.dir": tmp_path / "data", "data.cache_dir": "", "data.source": "image_folder", "data.image_size": 112,
        "model.name": "resnet_small", "model.stages": "(8,)", "probes.count": 12, "scoring.loss.k": 5,
        "attacks.names": "('patch','blend_p','sinusoid')", "attacks.patch.ratio": 0.05, "attacks.blend_p.ratio": 0.05,
        "attacks.sinusoid.ratio": 0.5, "attacks.sinusoid.min_images": 0, "attacks.sinusoid.min_class": 0,
        "recording.epochs": 3, "recording.batch_size": 16, "retraining.batch_size": 16, "retraining.epochs": 1,
        "retraining.variants": "('combined/fraction@0.1',)", "controls": "()", "evaluation.batch_size": 16,
    }  # fmt: skip
    config = load_config(f"configs/{name}.py", [f"--config.{key}={value}" for key, value in changed.items()])
    results = run_experiment(config, tmp_path / "run", mesh=mesh)
    assert results["num_examples"] == 8 * classes
    assert results["class_names"][0] == ("tench" if name == "imagenette" else "n00000000")
    assert results["attacks"]["sinusoid"]["parameters"]["strength"] == pytest.approx(0.15)
    assert "retrained" in results["variants"]["combined/fraction@0.1"]


@pytest.mark.usefixtures("unrendered")
def test_tensorboard_reads_the_metrics(tmp_path, tiny, mesh):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny(report__writers="('tensorboard',)", controls="()", retraining__variants="()")
    results = run_experiment(config, tmp_path, mesh=mesh)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "recording"))
    events.Reload()
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in told if line["model"] == "recording"]
    assert [event.step for event in events.Scalars("loss")] == [0, 1, 2]
    np.testing.assert_allclose([event.value for event in events.Scalars("loss")], losses, rtol=1e-6)
    (accuracy,) = events.Scalars("clean_accuracy")
    assert accuracy.value == pytest.approx(results["recording_model"]["clean_accuracy"])
    assert "attack_success_rate/patch" in events.Tags()["scalars"]


def test_a_writer_that_is_not_installed_is_said(tmp_path, tiny, mesh, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UsageError, match=r"pip install 'badloss_jax\[tensorboard\]'"):
        run_experiment(tiny(report__writers="('tensorboard',)"), tmp_path, mesh=mesh)


def test_wandb_takes_the_metrics(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with open_writers(tmp_path, tiny(report__writers="('wandb',)")) as (writer,):
        writer.start("loss/fraction", 0)
        for epoch in range(3):
            writer.write("loss/fraction", {"loss": 1 / (1 + epoch)}, epoch)
        assert writer._run.summary["loss/fraction/loss"] == pytest.approx(1 / 3)
        assert writer._run.config["seed"] == 0
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.usefixtures("unrendered")
def test_rescoring_never_touches_the_run(finished):
    workdir, _, results = finished
    before = tree(workdir)
    change = ["--config.scoring.loss.k=7", "--config.rejection.fraction=0.1"]
    folder, rescored = rescore(workdir, lambda config: override(config, change))
    after = tree(workdir)
    assert {name: after[name] for name in before if name != ".lock"} == {
        name: content for name, content in before.items() if name != ".lock"
    }
    assert folder.parent == workdir / "rescored"
    assert rescored["variants"]["loss/fraction"]["removed_share"] == pytest.approx(0.1)
    assert rescored["variants"]["logits/alpha"]["detection"] == results["variants"]["logits/alpha"]["detection"]
    assert rescored["variants"]["loss/alpha"]["detection"] != results["variants"]["loss/alpha"]["detection"]
    assert (folder / "scores.parquet").is_file()
    same, _ = rescore(workdir, lambda config: override(config, change))
    assert same == folder


@pytest.mark.usefixtures("unrendered")
def test_rescoring_takes_fewer_kinds(finished):
    workdir, *_ = finished
    _, rescored = rescore(workdir, lambda config: override(config, ["--config.scoring.kinds=('loss',)"]))
    assert rescored["variants"].keys() == {f"loss/{rule}" for rule in RULES}


def test_rescoring_refuses_what_needs_training(finished, tmp_path):
    workdir, *_ = finished
    with pytest.raises(UsageError, match=r"scoring.\* and rejection.\* only; recording would need training"):
        rescore(workdir, lambda config: override(config, ["--config.recording.batch_size=64"]))
    with pytest.raises(UsageError, match="holds no run"):
        rescore(tmp_path, lambda config: config)


@pytest.mark.usefixtures("unrendered")
def test_what_a_stopped_run_recorded_can_be_scored(tmp_path, tiny, mesh, monkeypatch, capsys):
    """By the epochs that are over, as the whole recording is by as many."""
    config = tiny(recording__epochs=5, recording__batch_size=100, scoring__kinds="('loss',)",
                  retraining__enabled=False, retraining__variants="()", controls="()")  # fmt: skip

    def stop_after(steps):
        with monkeypatch.context() as patch:
            patch.setattr("badloss_jax.runs.experiment.Preemption", lambda: StopAfter(steps))
            with pytest.raises(PreemptedError):
                run_experiment(config, tmp_path, mesh=mesh)

    stop_after(5)
    with pytest.raises(DataError, match="is not complete, and its 1 of 5 epochs are too few to score"):
        rescore(tmp_path, lambda config: config)
    stop_after(7)
    score = ["score", "--workdir", str(tmp_path), "--config.scoring.loss.k=7"]
    assert main(score) == 0
    told = "The recording was not at its end: 3 of 5 epochs were recorded."
    assert told in capsys.readouterr().out.splitlines()
    (folder,) = (tmp_path / "rescored").iterdir()
    for report in ("report.md", "report.html"):
        assert told in (folder / report).read_text("utf-8")

    run_experiment(config, tmp_path, mesh=mesh)
    whole, results = rescore(tmp_path, lambda config: override(config, [*score[3:], "--config.scoring.epochs=3"]))
    assert (folder / "scores.parquet").read_bytes() == (whole / "scores.parquet").read_bytes()
    assert results["epochs_recorded"] == 5
    before = (folder / "report.md").read_text("utf-8")
    assert write_reports(folder).with_suffix(".md").read_text("utf-8") == before

    (tmp_path / "trajectories" / "loss" / "epoch_0001-00000-of-00001.npy").unlink()
    with pytest.raises(DataError, match="is damaged: it has epochs later than 1, but not this"):
        rescore(tmp_path, lambda config: config)


def test_another_config_is_refused_and_named(finished, tiny, mesh):
    workdir, config, _ = finished
    before = tree(workdir)
    with pytest.raises(UsageError, match=r"holds the run of another config \(seed: 0 -> 1\)"):
        run_experiment(override(config, ["--config.seed=1"]), workdir, mesh=mesh)
    assert tree(workdir) == before


def test_a_run_of_another_version_is_refused_with_what_to_do(finished, tiny, mesh, tmp_path):
    _, config, _ = finished
    stored = json.loads((finished[0] / "config.json").read_text())
    del stored["model"]["ghost_batch"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    with pytest.raises(
        UsageError,
        match=r"not a config of this version.*'model.ghost_batch' is missing\. Go on with the version that",
    ):
        run_experiment(config, tmp_path, mesh=mesh)
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["config.json"]


def test_foreign_and_busy_folders_are_refused(finished, tmp_path, tiny, mesh):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="holds other files and no run"):
        run_experiment(tiny(), tmp_path, mesh=mesh)
    with pytest.raises(UsageError, match="is a file, not a folder"):
        run_experiment(tiny(), tmp_path / "thesis.tex", mesh=mesh)
    workdir, config, _ = finished
    with locked(workdir), pytest.raises(UsageError, match=rf"another run \(process {os.getpid()}\) is at work"):
        run_experiment(config, workdir, mesh=mesh)


@pytest.mark.usefixtures("unrendered")
def test_other_data_under_the_same_config_is_refused(tmp_path, mesh):
    from PIL import Image

    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(60):
                pixels = generator.integers(0, 256, (12, 12), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i:02}.png")
    config = load_config("configs/digits.py", overrides(
        data__source="image_folder", data__dir=tmp_path / "data", data__channels=1, data__cache_dir="", data__pad=0,
        data__train_examples=0, attacks__names="('patch',)", probes__count=10, recording__batch_size=40,
        retraining__batch_size=40, retraining__variants="()", controls="()",
    ))  # fmt: skip
    results = run_experiment(config, tmp_path / "run", mesh=mesh)
    assert results["undefended"]["attack_success_rate"].keys() == {"patch"}
    Image.fromarray(np.zeros((12, 12), np.uint8)).save(tmp_path / "data" / "train" / "a" / "00.png")
    before = tree(tmp_path / "run")
    with pytest.raises(UsageError, match="was trained on other data"):
        run_experiment(config, tmp_path / "run", mesh=mesh)
    assert tree(tmp_path / "run") == before


@pytest.mark.usefixtures("unrendered")
def test_another_manifest_under_the_same_config_is_refused(finished, tmp_path, tiny, mesh):
    workdir, *_ = finished
    own = tmp_path / "own.json"
    own.write_bytes((workdir / "manifest.json").read_bytes())
    config = tiny(attacks__manifest=own, controls="()", retraining__variants="()")
    run_experiment(config, tmp_path / "run", mesh=mesh)
    changed = json.loads(own.read_text())
    changed["attacks"]["patch"]["example_ids"].pop()
    own.write_text(json.dumps(changed))
    before = tree(tmp_path / "run")
    with pytest.raises(UsageError, match=r"taken from another attacks.manifest"):
        run_experiment(config, tmp_path / "run", mesh=mesh)
    assert tree(tmp_path / "run") == before


@pytest.mark.usefixtures("unrendered")
def test_lost_trajectories_are_recorded_again(finished, tmp_path, mesh):
    workdir, config, results = finished
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "trajectories" / "logits")
    again = run_experiment(config, tmp_path / "run", mesh=mesh)
    assert without_cost(again["variants"]) == json.loads(json.dumps(without_cost(results["variants"])))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [(line["model"], line["epoch"]) for line in lines]
    assert len(told) == len(set(told)) == 3 + 2 * 5


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", b"\xff\xfe"), ("config.json", b"[" * 100_000), ("trajectories/about.json", b"[" * 100_000),
     ("manifest.json", b"{}"),
     ("trajectories/loss/epoch_0000-00000-of-00001.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', "
      b"'fortran_order': False, 'shape': (1000000000000000,), }" + b" " * 40 + b"\n")],
)  # fmt: skip
def test_a_damaged_workdir_is_said(finished, tmp_path, name, content):
    workdir, *_ = finished
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises((DataError, UsageError), match=r"damaged|not a usable manifest|not a config"):
        rescore(tmp_path / "run", lambda config: config)


@pytest.mark.parametrize("content", ["{}", "[", "[" * 100_000])
def test_a_damaged_model_is_said(finished, tmp_path, mesh, content):
    workdir, config, _ = finished
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "models" / "oracle" / "about.json").write_text(content)
    with pytest.raises(DataError, match=r"oracle/about.json (lacks|is damaged)"):
        run_experiment(config, tmp_path / "run", mesh=mesh)


@pytest.mark.parametrize("capture", ["step", "sweep"])
def test_a_loss_that_becomes_nan_stops_the_run(tmp_path, tiny, mesh, capture):
    config = tiny(optimizer__learning_rate=1e30, recording__capture=capture)
    with pytest.raises(NonFiniteLossError, match=r"in phase 'recording' at step \d+") as caught:
        run_experiment(config, tmp_path, mesh=mesh)
    # Before the first sweep nothing is recorded that could be kept.
    assert (tmp_path / "trajectories" / "loss" / "epoch_0000-00000-of-00001.npy").is_file() == (capture == "step")
    assert ("what was recorded up to then is kept in" in str(caught.value)) == (capture == "step")
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert "the loss became NaN or infinite in phase 'recording' at step" in last["error"]
    assert not (tmp_path / "results.json").exists()
    with pytest.raises(DataError, match="is not complete"):
        rescore(tmp_path, lambda c: c)


@pytest.mark.usefixtures("unrendered")
def test_step_capture_runs(tmp_path, tiny, mesh):
    results = run_experiment(
        tiny(recording__capture="step", retraining__variants="()", controls="()"), tmp_path, mesh=mesh
    )
    assert results["variants"]["combined/fraction"]["detection"]["auroc"]["overall"] > 0


@pytest.mark.filterwarnings("ignore:os.fork")
def test_a_full_disk_is_said(tmp_path):
    failed = run_on_a_full_disk(command(tmp_path / "full"), tmp_path)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "badloss: error:" in failed.stderr.splitlines()[-1]
    assert "cannot be written" in failed.stderr


@pytest.mark.filterwarnings("ignore:os.fork")
@pytest.mark.usefixtures("unrendered")
def test_a_full_disk_loses_nothing(tmp_path, tiny, mesh):
    """While a model is saved; orbax's own threads may have their say beside ours then."""
    changed = {"recording__kinds": "()", "scoring__kinds": "('loss',)", "controls": "()", "retraining__variants": "()"}
    run_experiment(tiny(**changed), tmp_path / "full", mesh=mesh)
    shutil.rmtree(tmp_path / "full" / "models" / "undefended")
    (tmp_path / "full" / "results.json").unlink()
    before = tree(tmp_path / "full")
    arguments = command(tmp_path / "full", **changed)
    failed = run_on_a_full_disk(arguments, tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.count("badloss: error:") == 1
    after = tree(tmp_path / "full")
    assert all(after[name] == content for name, content in before.items() if name not in (".lock", "metrics.jsonl"))
    assert not (tmp_path / "full" / "results.json").exists()
    assert "undefended" in run_experiment(tiny(**changed), tmp_path / "full", mesh=mesh)


def test_a_read_only_folder_is_said(tmp_path, tiny, mesh):
    with pytest.raises(DataError, match=r"cannot be written"):
        run_experiment(tiny(), Path("/proc/badloss"), mesh=mesh)


@pytest.mark.slow
def test_digits_find_and_remove_the_poison(tmp_path):
    """The claim of the README, for one seed: `combined` undoes the attacks."""
    arguments = ["run", "--config", "configs/digits.py", "--workdir", str(tmp_path / "d")]
    arguments += ["--config.retraining.variants=('combined/fraction',)", "--config.controls=()"]
    done = run([sys.executable, "-m", "badloss_jax", *arguments])
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "d" / "results.json").read_text())
    combined = results["variants"]["combined/fraction"]
    rates = list(combined["retrained"]["attack_success_rate"].values())
    assert np.mean(list(results["undefended"]["attack_success_rate"].values())) >= 0.75
    assert combined["detection"]["auroc"]["overall"] >= 0.94
    assert np.mean(rates) <= 0.08
    assert results["undefended"]["clean_accuracy"] - combined["retrained"]["clean_accuracy"] <= 0.06
