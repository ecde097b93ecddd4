import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from badloss_jax import defenses
from badloss_jax.cli import main
from badloss_jax.config import config_hash, load_config
from badloss_jax.core.errors import BusyError, DataError, UsageError
from badloss_jax.core.files import locked
from badloss_jax.core.progress import Progress
from badloss_jax.defenses import Defense
from badloss_jax.defenses.context import Suspicion
from badloss_jax.report.sweep import read_runs, rows_of, summarised, tables, write_sweep_report
from badloss_jax.runs.sweep import Clock, ItemRunner, run_sweep
from badloss_jax.sweep import BASES, load_sweep, read_sweep, state_of
from tests.conftest import ENVIRONMENT, ONLY_READS, overrides

SWEEPS = sorted(Path("configs/sweeps").glob("*.py"))
TABLE = "configs/sweeps/paper_table.py:digits"
SMALL = ("none", "oracle", "random", "badloss", "mean_loss_low")


def small(seeds=(0,), names=SMALL, **changed):
    return load_sweep(TABLE, overrides(**changed), seeds, ("all",), names)


def command(workdir, *arguments, seeds="0", **changed):
    return [sys.executable, "-m", "badloss_jax", "sweep", "--config", TABLE, "--workdir", str(workdir), "--attacks",
            "all", "--seeds", seeds, "--defenses", ",".join(SMALL), *overrides(**changed), *arguments]  # fmt: skip


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_is_possible_with_every_base(path):
    for base in BASES:
        sweep = load_sweep(f"{path}:{base}" if base else str(path), seeds=(0,))
        assert len({item.name for item in sweep.items}) == len(sweep.items)
        assert len({item.key for item in sweep.items}) == len(sweep.items)
        assert sweep.title


def test_items_are_the_product():
    sweep = load_sweep("configs/sweeps/k.py:digits", seeds=(3, 4))
    assert len(sweep.items) == 5 * 7 * 2
    assert [item.seed for item in sweep.items[:4]] == [3, 4, 3, 4]
    item = next(item for item in sweep.items if (item.defense, item.setting) == ("badloss_combined", "20"))
    config = item.as_config()
    assert (config.scoring.features.k, config.scoring.kinds, config.defenses.names) == (20, (), ("badloss_combined",))
    assert not config.retraining.enabled
    base = load_config("configs/digits.py", ["--config.seed=3"])
    assert config.model == base.model
    assert config.attacks == base.attacks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--defenses", "badlos"], "has no 'badlos': expected some of none, oracle"),
        (["--attacks", "patch,sinus"], "has no 'sinus': expected some of all, patch"),
        (["--config.data.pads=2"], "unknown config key 'data.pads'"),
        (["--item", "1000"], "there is no item 1000"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, tmp_path, capsys):
    told = ["sweep", "--config", TABLE, "--workdir", str(tmp_path / "new"), *arguments]
    assert main(told) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_sweeps_are_refused(tmp_path):
    with pytest.raises(UsageError, match="not a sweep file"):
        load_sweep("configs/digits.py")
    with pytest.raises(UsageError, match=r"does not exist; did you mean 'configs/sweeps/k.py'"):
        load_sweep("configs/sweeps/kk.py")
    with pytest.raises(UsageError, match="unknown variant 'mnist'"):
        load_sweep("configs/sweeps/k.py:mnist")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="holds other files and no sweep"):
        run_sweep(small(), tmp_path)


def test_what_another_process_has_begun_is_no_other_file(tmp_path):
    """Items of an array that start at one moment: the lock is there, and the list of items not yet."""
    (tmp_path / ".lock").touch()
    (tmp_path / ".sweep-abc.json").touch()
    assert run_sweep(small(), tmp_path, chosen=[]) == {}
    assert (tmp_path / "sweep.json").is_file()


@pytest.fixture(scope="module")
def swept(tmp_path_factory, mesh):
    """A finished sweep of two seeds; the tests only read it."""
    folder = tmp_path_factory.mktemp("sweep") / "sweep"
    sweep = small(seeds=(0, 1))
    assert run_sweep(sweep, folder, mesh=mesh) == {}
    return folder, sweep, write_sweep_report(folder)


def test_what_items_share_is_made_once(swept, monkeypatch, mesh):
    folder, sweep, _ = swept
    assert {state_of(folder, item) for item in sweep.items} == {"done"}
    # per seed: recording, undefended, oracle, random, badloss
    assert len(list((folder / "shared" / "models").iterdir())) == 2 * 5
    assert len(list((folder / "shared" / "trajectories").iterdir())) == 2
    lines = [line for file in folder.glob("items/*/metrics.jsonl") for line in file.read_text().splitlines()]
    assert sum(json.loads(line)["model"] == "recording" for line in lines) == 2 * 3
    assert sum(json.loads(line)["model"] == "undefended" for line in lines) == 2 * 2
    monkeypatch.setattr("badloss_jax.runs.sweep.run_experiment", None)  # to run an item again would fail
    assert run_sweep(sweep, folder, mesh=mesh) == {}


def test_an_item_says_what_a_run_of_its_own_says(swept):
    folder, sweep, _ = swept
    item = next(item for item in sweep.items if item.defense == "badloss" and item.seed == 0)
    results = json.loads((folder / "items" / item.name / "results.json").read_text())
    assert results["config_hash"] == config_hash(item.as_config())
    variant = results["variants"]["badloss/fraction"]
    assert variant["cost"]["seconds_of"].keys() == {"recording", "badloss"}
    assert variant["cost"]["seconds"] == pytest.approx(sum(variant["cost"]["seconds_of"].values()))
    assert variant["retrained"]["defense_effectiveness"].keys() == results["attacks"].keys()


def test_the_report_has_every_figure(swept):
    folder, sweep, short = swept
    assert [title for title, _ in short] == ["Comparison; attacks: all"]
    rows = read_runs(folder / "runs.csv")
    # the free detectors of the sweep file were not asked for
    assert {(row["defense"], row["seed"]) for row in rows} == {
        (name, seed) for seed in (0, 1) for name in ("none", "oracle (exactly the poison)", "random (40 %)",
                                                     "badloss (40 %)", "mean_loss_low (40 %)")
    }  # fmt: skip
    badloss = [row for row in rows if row["defense"] == "badloss (40 %)"]
    results = [json.loads((folder / "items" / i.name / "results.json").read_text()) for i in sweep.items
               if i.defense == "badloss"]  # fmt: skip
    models = [run["variants"]["badloss/fraction"]["retrained"] for run in results]
    assert [row["clean_accuracy"] for row in badloss] == [model["clean_accuracy"] for model in models]
    assert [row["asr:patch"] for row in badloss] == [model["attack_success_rate"]["patch"] for model in models]
    table = dict(short)["Comparison; attacks: all"]
    row = next(row for row in table if row[0] == "badloss (40 %)")
    mean = statistics.fmean(model["clean_accuracy"] for model in models)
    spread = statistics.stdev(model["clean_accuracy"] for model in models)
    assert row[table[0].index("CA")] == f"{100 * mean:.1f} ± {100 * spread:.1f}"
    assert row[table[0].index("seeds")] == "2"
    page, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for text in (page, markdown):
        assert "10 of 10 runs are done, 0 failed." in text
        for title in ("Attack success rate", "Robust accuracy", "Recall", "AUROC"):
            assert f"{title}, per attack; attacks: all" in text
    assert "<script" not in page
    assert (folder / "recall-all.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/svg+xml" in page
    header = (folder / "results.csv").read_text().splitlines()[0]
    assert "clean_accuracy,clean_accuracy std" in header


def test_an_item_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, mesh):
    def broken(context, settings):
        raise RuntimeError("it broke <b>")

    def endless(context, settings):
        return Suspicion(np.full(len(context.labels), np.nan))

    sweep = small(names=("mean_loss_low", "loss_variance", "mean_loss_high"))
    with monkeypatch.context() as patch:
        patch.setitem(defenses.DEFENSES, "mean_loss_low", Defense(broken, recorded=True))
        patch.setitem(defenses.DEFENSES, "loss_variance", Defense(endless, recorded=True))
        failed = run_sweep(sweep, tmp_path, mesh=mesh)
    assert len(failed) == 2
    assert {state_of(tmp_path, item) for item in sweep.items if item.defense == "mean_loss_high"} == {"done"}
    (named,) = (name for name in failed if "mean_loss_low" in name)
    assert "Traceback" in (tmp_path / "items" / named / "error.txt").read_text()
    write_sweep_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "1 of 3 runs are done, 2 failed." in page
    assert "it broke &lt;b&gt;" in page
    assert "not 300 finite numbers" in (tmp_path / "report.md").read_text()
    assert run_sweep(sweep, tmp_path, mesh=mesh) == {}
    assert not list(tmp_path.glob("items/*/error.txt"))


def test_another_process_is_let_alone(tmp_path, mesh):
    sweep = small(names=("mean_loss_low",), data__train_examples=200)
    (item,) = sweep.items
    silent = Progress(None)
    runner = ItemRunner(tmp_path / "a", tmp_path / "s", mesh, silent, Clock(1, silent))
    with locked(tmp_path / "a" / "taken" / item.name), pytest.raises(BusyError, match="is at work"):
        runner.run(item, wait=False)


def test_later_calls_add_items(tmp_path):
    from badloss_jax.sweep import write_sweep

    write_sweep(tmp_path, small(names=("none",)))
    write_sweep(tmp_path, small(names=("oracle",), seeds=(0, 1)))
    write_sweep(tmp_path, small(names=("none",), retraining__epochs=3))  # in place of the first
    sweep, names = read_sweep(tmp_path)
    assert [(item.defense, item.seed) for item in sweep.items] == [("none", 0), ("oracle", 0), ("oracle", 1)]
    assert sweep.items[0].config["retraining"]["epochs"] == 3
    assert names == [item.name for item in sweep.items]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda about: about["items"][0].update(name="../../etc"), "leads out of the folder"),
        (lambda about: about["items"][0].pop("seed"), "is damaged"),
        (lambda about: about.update(format="2"), "its format is '2'"),
        (lambda about: about.update(items=3), "is damaged"),
    ],
)
def test_damaged_sweeps_are_refused(damage, message, tmp_path):
    from badloss_jax.sweep import write_sweep

    write_sweep(tmp_path, small(names=("none",)))
    about = json.loads((tmp_path / "sweep.json").read_text())
    damage(about)
    (tmp_path / "sweep.json").write_text(json.dumps(about))
    with pytest.raises(DataError, match=message):
        read_sweep(tmp_path)


def test_nothing_to_report(tmp_path):
    from badloss_jax.sweep import write_sweep

    with pytest.raises(UsageError, match=r"holds no sweep"):
        write_sweep_report(tmp_path)
    write_sweep(tmp_path, small(names=("none",)))
    with pytest.raises(UsageError, match="no item of this sweep is done yet"):
        write_sweep_report(tmp_path)
    (tmp_path / "runs.csv").write_text("attacks,defense,setting,seed,removed\nall,none,,x,0\n")
    with pytest.raises(DataError, match=r"runs.csv is missing or damaged"):
        read_runs(tmp_path / "runs.csv")


def model(accuracy, rate, robust, effectiveness):
    return {"clean_accuracy": accuracy, "attack_success_rate": {"a": rate, "b": 0.0}, "robust_accuracy":
            {"a": robust, "b": 1.0}, "defense_effectiveness": {"a": effectiveness, "b": 0.5}}  # fmt: skip


def test_rows_and_tables_by_hand():
    def run(seed, accuracy):
        item = small(seeds=(seed,), names=("badloss",)).items[0]
        variant = {
            "removed_share": 0.4, "clean_removed_share": 0.25, "recall": {"a": 1.0, "b": 0.5},
            "detection": {metric: {"overall": 0.75, "a": 1.0, "b": 0.5}
                          for metric in ("auroc", "average_precision", "tpr_at_1_fpr")},
            "retrained": model(accuracy, 0.5, 0.25, 0.75), "cost": {"seconds": 10.0, "epochs": 2.5},
        }  # fmt: skip
        results = {"variants": {"badloss/fraction": variant, "badloss/alpha": variant}, "config": item.config,
                   "environment": {"git_commit": "0123abc"}}  # fmt: skip
        (row,) = rows_of(item, results)  # the other rule is not one that the sweep reports
        return row

    rows = [run(0, 0.9), run(1, 0.8)]
    assert (rows[0]["git_commit"], rows[0]["mean_asr"]) == ("0123abc", 0.25)
    assert rows[0]["mean_ra"] == 0.625
    assert rows[0]["der"] == 0.625
    assert rows[0]["mean_recall"] == 0.75
    (group,) = summarised(rows)
    assert group["clean_accuracy"] == [0.9, 0.8]
    found = dict(tables(rows))
    header, row = found["Comparison; attacks: all"]
    assert dict(zip(header, row, strict=True)) == {
        "defence": "badloss (40 %)", "seeds": "2", "removed": "40.0", "clean lost": "25.0", "recall": "75.0",
        "AUROC": "0.750", "TPR at 1 % FPR": "0.750", "CA": "85.0 ± 7.1", "mean ASR": "25.0", "mean RA": "62.5",
        "DER": "62.5", "seconds": "10.0", "epochs": "2.5",
    }  # fmt: skip
    header, row = found["Attack success rate, per attack; attacks: all"]
    assert dict(zip(header, row, strict=True)) == {
        "defence": "badloss (40 %)", "seeds": "2", "CA": "85.0 ± 7.1", "mean ASR": "25.0", "a": "50.0", "b": "0.0",
    }  # fmt: skip
    assert dict(zip(*found["AUROC, per attack; attacks: all"], strict=True))["a"] == "1.000"
    assert dict(zip(*found["Recall, per attack; attacks: all"], strict=True))["b"] == "50.0"


def test_texts_are_no_formulas(tmp_path):
    from badloss_jax.report.sweep_rows import csv_text

    assert "'=1+1" in csv_text([{"attacks": "=1+1", "defense": "none", "setting": "", "seed": 0}])


def test_the_list_of_items(tmp_path, capsys):
    arguments = command(tmp_path / "new")[3:]
    assert main([*arguments, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(SMALL)
    assert all(" open " in line for line in lines)
    assert not (tmp_path / "new").exists()


def without_seconds(path):
    return [{k: v for k, v in row.items() if k not in ("seconds", "epochs")} for row in read_runs(path)]


@pytest.mark.slow
def test_two_killed_processes_end_with_the_same_tables(tmp_path, swept):
    """Both killed soon after a network was saved; then one to the end."""
    folder = tmp_path / "killed"
    arguments = command(folder)

    def networks():
        return {path.parent.name for path in folder.glob("shared/models/*/about.json")}

    both = [subprocess.Popen(arguments, env=ENVIRONMENT | ONLY_READS, stderr=subprocess.DEVNULL) for _ in range(2)]
    while len(networks()) < 2:
        assert all(process.poll() is None for process in both)
        time.sleep(0.01)
    time.sleep(random.Random(0).uniform(0, 0.5))
    for process in both:
        process.send_signal(signal.SIGKILL)
        process.communicate()

    done = sum((item / "results.json").is_file() for item in (folder / "items").glob("*"))
    assert done < len(SMALL)
    ended = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("== item") == len(SMALL) - done
    assert "Comparison; attacks: all" in ended.stdout
    whole = [row for row in without_seconds(swept[0] / "runs.csv") if row["seed"] == 0]
    assert without_seconds(folder / "runs.csv") == whole
