"""The README's commands are the ones that CI runs, and its figures the ones that were measured."""

import json
import os
import pkgutil
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from badloss_jax.benchmarks.scan import table as scan_table
from badloss_jax.cli import main
from badloss_jax.config import default_config, differences, load_config
from badloss_jax.report.plan import as_lines, comparison_table, scoring_table
from badloss_jax.report.sweep import read_runs, tables
from badloss_jax.report.tables import as_markdown, summary
from badloss_jax.sweep import load_sweep

README = Path("README.md").read_text("utf-8")
RESULTS = Path("configs/results")
ROOMS = {path.stem for path in Path("badloss_jax").iterdir()} - {"__init__"}
OTHERS = ("benchmarks", "retrained", "sweeps")
MEASURED = sorted(path for path in RESULTS.iterdir() if path.is_dir() and path.name not in OTHERS)
SWEPT = sorted((RESULTS / "sweeps").iterdir())
PLANS = {
    "ImageNet-1k, v5e:2x4": "v5e-2x4",
    "ImageNet-1k, v5e:16x16": "v5e-16x16",
    "ImageNet-1k, h100:1x8": "h100-1x8",
    "ImageNet-1k, h100:8x8": "h100-8x8",
    "a billion images, v5p:4x4x4": "v5p-4x4x4",
}
LAUNCH = Path("launch/README.md")


def runs(folder):
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("seed*.json"))]


def test_ci_runs_the_readmes_test_command():
    (command,) = re.findall(r"^pip install '\.\[test\]'.*$", README, re.MULTILINE)
    assert command in Path(".ci/run").read_text("utf-8").splitlines()


@pytest.mark.parametrize("folder", MEASURED, ids=lambda folder: folder.name)
def test_every_table_is_what_was_measured(folder):
    measured = runs(folder)
    assert measured
    assert as_markdown(summary(measured)) in README + (RESULTS / "README.md").read_text("utf-8")
    assert len({json.dumps(run["config"] | {"seed": 0, "data": 0}) for run in measured}) == 1
    assert len({run["config"]["seed"] for run in measured}) == len(measured)
    for run in measured:
        assert "dirty" not in (run["environment"]["git_commit"] or "dirty")


@pytest.mark.parametrize("folder", SWEPT, ids=lambda folder: folder.name)
def test_every_table_of_a_sweep_is_what_was_measured(folder):
    rows = read_runs(folder / "runs.csv")
    assert len({(row["attacks"], row["defense"], row["setting"], row["seed"]) for row in rows}) == len(rows)
    assert all(row["git_commit"] and "dirty" not in row["git_commit"] for row in rows)
    if folder.name.startswith("paper_table"):
        for _, table in tables(rows, per_attack=False):
            assert as_markdown(table) in (RESULTS / "README.md").read_text("utf-8")


def test_the_table_of_defences_is_what_was_measured():
    wanted, found = ("removed", "CA", "mean ASR"), {}
    for name in ("fashion_mnist", "cifar10"):
        rows = read_runs(RESULTS / "sweeps" / f"paper_table-{name}" / "runs.csv")
        ((_, (head, *body)),) = tables(rows, per_attack=False)
        for cells in (dict(zip(head, row, strict=True)) for row in body):
            if cells["CA"]:
                found.setdefault(cells["defence"], []).extend(cells[key] for key in wanted)
    head = [f"{key}, {name}" for name in ("Fashion-MNIST", "CIFAR-10") for key in wanted]
    assert as_markdown([["defence", *head], *([name, *cells] for name, cells in found.items())]) in README


def test_the_scorers_are_as_fast_as_was_measured():
    figures = json.loads(Path("configs/results/benchmarks/scorer1.json").read_text("utf-8"))["figures"]
    taken = {(figure["method"], figure["examples"]): figure for figure in figures if figure["dtype"] == "float32"}
    ours = taken["numba", 1_281_167]["seconds"]["median"]
    for method in {method for method, _ in taken}:
        small, large = taken[method, 50_000], taken[method, 1_281_167]
        seconds = large["seconds"]["median"]
        told = [
            f"{1000 * small['seconds']['median']:.0f} ms",
            f"{seconds:.2f} s",
            f"{seconds / ours:.1f} x",
            f"{large['memory_bytes'] / 2**20:.0f} MiB",
            f"{large['error']:.0e}",
            f"{large['offset_error']:.0e}",
        ]
        assert f"| {' | '.join(told)} |" in README, method  # fmt: skip
    best = min(taken[f"sklearn {way}", 1_281_167]["seconds"]["median"] for way in ("brute", "kd_tree", "ball_tree"))
    assert best > 5 * ours
    assert taken["jax top_k", 1_281_167]["seconds"]["median"] > 5 * ours


@pytest.mark.parametrize("name", ["store2", "store3", "store4"])
def test_attacks_are_searched_as_fast_as_was_measured(name):
    (figure,) = json.loads((RESULTS / "benchmarks" / f"{name}.json").read_text("utf-8"))["figures"]
    seconds = [f"{figure['seconds'][part]:.1f} s" for part in ("distances", "clusters", "all")]
    told = [f"{figure['examples']:,}", f"{figure['classes']:,}", f"{figure['stored_bytes'] / 1e9:.2f} GB", *seconds,
            f"{figure['anonymous_bytes'] / 2**20:.0f} MiB"]  # fmt: skip
    assert f"| {' | '.join(told)} |" in (RESULTS / "README.md").read_text("utf-8")


def figures_of_scans(*names):
    files = [RESULTS / "benchmarks" / f"scan-{name}.json" for name in names]
    return [figure for file in files for figure in json.loads(file.read_text("utf-8"))["figures"]]


SCANS = [("fashion_mnist-3", "fashion_mnist-5"), ("cifar10-3", "cifar10-5"), ("gtsrb",), ("small",)]
OTHER_REGIMES = [("fashion_mnist-4",), ("cifar10-4",)]


@pytest.mark.parametrize("names", SCANS + OTHER_REGIMES, ids=lambda names: names[0])
def test_scans_found_what_the_guide_says(names):
    assert as_markdown(scan_table(figures_of_scans(*names))) in Path("badloss_jax/runs/README.md").read_text("utf-8")


def found_and_lost(figures, regime):
    """Percent of the poison, and of the clean images, on average over the seeds of a regime."""
    seeds = [figure for figure in figures if figure["regime"] == regime]
    return [100 * np.mean([figure[key] for figure in seeds]) for key in ("found_share", "clean_removed_share")]


def test_scans_are_summed_up_as_was_measured():
    guide = " ".join(Path("badloss_jax/runs/README.md").read_text("utf-8").split())
    (found, lost), (found_cifar, lost_cifar) = [
        found_and_lost(figures_of_scans(*names), "drawn") for names in SCANS[:2]
    ]
    said = f"{found:.1f} and {found_cifar:.1f} % of the poison is found, with {lost:.2f} and {lost_cifar:.2f} %"
    assert said in guide
    assert f"{found:.0f} % of the poison and lost {lost:.2f} % of the clean images" in README
    assert f"({found_cifar:.0f} and {lost_cifar:.2f} % on CIFAR-10, in seven," in README

    now = [figures_of_scans(*names) for names in SCANS[:2]]
    (found, lost), (found_cifar, lost_cifar) = [found_and_lost(figures, "held-out") for figures in now]
    ranked = [
        100 * np.mean([figure["found_at"]["0.02"] for figure in figures if figure["regime"] == "held-out"])
        for figures in now
    ]
    assert f"settled on {found:.1f} and {found_cifar:.1f} %, with {lost:.2f} and {lost_cifar:.2f} %; before" in guide
    assert f"rank {ranked[0]:.1f} and {ranked[1]:.1f} %" in guide

    before = [found_and_lost(figures_of_scans(f"{name}-1"), "held-out") for name in ("fashion_mnist", "cifar10")]
    (found, lost), (found_cifar, lost_cifar) = before
    said = f"{found:.1f} and {found_cifar:.1f} %, with {lost:.2f} and {lost_cifar:.2f} % of the clean images (seeds 81"
    assert said in guide


def test_attacks_were_counted_as_the_guide_says():
    guide = " ".join(Path("badloss_jax/runs/README.md").read_text("utf-8").split())
    drawn = [[figure for figure in figures_of_scans(*names) if figure["regime"] == "drawn"] for names in SCANS[:2]]
    counted = [sum(figure["certain_attacks"] for figure in figures) for figures in drawn]
    assert f"{counted[0]} and {counted[1]} attacks of 18 were counted" in guide
    figures = [figure for names in SCANS for figure in figures_of_scans(*names)]
    wrong_by = [abs(figure["certain_attacks"] - figure["attacks"]) for figure in figures if figure["probes"] > 50]
    assert max(wrong_by) == 1
    inside = sum(
        figure["estimate"]["low"] <= figure["poisoned_share"] <= figure["estimate"]["high"] for figure in figures
    )
    assert f"interval of {inside} of these {len(figures)} sets" in guide


@pytest.mark.parametrize(
    ("names", "regime"), [(names, regime) for names in SCANS[:2] for regime in ("drawn", "held-out")]
)
def test_recall_by_trigger_is_what_was_measured(names, regime):
    figures = [figure for figure in figures_of_scans(*names) if figure["regime"] == regime]
    mean = {name: 100 * np.mean([figure["recall"][name] for figure in figures]) for name in figures[0]["recall"]}
    guide = " ".join(Path("badloss_jax/runs/README.md").read_text("utf-8").split())
    for share in {f"{value:.0f}" for value in mean.values()}:
        assert ", ".join(name for name, value in mean.items() if f"{value:.0f}" == share) + f" {share} %" in guide


def test_clean_sets_were_called_what_the_guide_says():
    scanned = {}
    for path in (RESULTS / "benchmarks").glob("scan-clean-*.json"):
        measured = json.loads(path.read_text("utf-8"))
        config = re.search(r"configs/(\w+)\.py", measured["command"]).group(1)
        for figure in measured["figures"]:
            scanned.setdefault((config, figure["images"], figure["probes"]), []).append(figure)
    rows = [["data set", "images", "probes", "sets", "called poisoned", "clean removed"]]
    for (config, images, probes), figures in sorted(scanned.items()):
        assert len({figure["seed"] for figure in figures}) == len(figures)
        suspected = sum(figure["stands_out"] for figure in figures)
        lost = 100 * np.mean([figure["clean_removed_share"] for figure in figures])
        rows.append([config, f"{images:,}", str(probes), str(len(figures)), str(suspected), f"{lost:.2f} %"])
    guide = Path("badloss_jax/runs/README.md").read_text("utf-8")
    assert as_markdown(rows) in guide
    sets, poisoned = (sum(int(row[column]) for row in rows[1:]) for column in (3, 4))
    assert f"{sets} clean sets, of which {poisoned} were called poisoned" in guide


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_networks_trained_on_what_is_left_do_what_the_guide_says(name):
    measured = runs(RESULTS / "retrained" / name)
    assert as_markdown(summary(measured)) in (RESULTS / "README.md").read_text("utf-8")
    assert len({run["config"]["seed"] for run in measured}) == len(measured) >= 3


def test_narcissus_does_what_noise_of_its_size_does_not():
    measured = runs(Path("configs/results/cifar10-quick"))
    assert measured
    for run in measured:
        undefended = run["undefended"]
        assert undefended["attack_success_rate"]["narcissus"] > 0.3
        assert undefended["scrambled"]["narcissus"] < 0.1


@pytest.mark.parametrize("folder", MEASURED, ids=lambda folder: folder.name)
def test_every_measured_config_is_the_shipped_one(folder):
    spec = f"configs/{folder.name.replace('-', '.py:')}" if "-" in folder.name else f"configs/{folder.name}.py"
    shipped = json.loads(load_config(spec).to_json())
    for run in runs(folder):
        # A setting that is newer than the run had no other effect then than its default has.
        assert not differences(with_newer_defaults(shipped, run["config"] | {"seed": 0}), shipped)


def with_newer_defaults(shipped, ran, default=None):
    """The config of a run, with the settings that did not exist then, if they are shipped at their defaults."""
    default = json.loads(default_config().to_json()) if default is None else default
    merged = dict(ran)
    for key, value in shipped.items():
        if isinstance(value, dict):
            merged[key] = with_newer_defaults(value, ran.get(key, {}), default[key])
        elif key not in ran:
            merged[key] = default[key]
    return merged


def test_every_command_of_the_readme_parses(capsys):
    text = README + Path("configs/README.md").read_text("utf-8")
    commands = re.findall(r"(?:^|`)badloss (\w+)", text, re.MULTILINE)
    assert {"run", "scan", "score", "summary", "report", "attacks", "prepare", "bench", "sweep"} <= set(commands)
    for command in set(commands):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
    for spec in re.findall(r"--config (configs/[^\s`]+)", text):
        if spec.startswith("configs/sweeps/"):
            load_sweep(spec, seeds=(0,))
        else:
            load_config(spec)


def test_the_arithmetic_of_imagenet():
    """By formulas of its own, beside those of the plans."""
    config = load_config("configs/imagenet.py")
    recording, retraining = config.recording, config.retraining
    assert recording.kinds == ("ranked", "features")
    example = 4 + 2 * (1 + recording.ranked_others) + 2 * recording.feature_dim
    networks = 1 + len(retraining.variants) + len(config.controls)

    lines = LAUNCH.read_text("utf-8").splitlines()
    row = {name: cells for name, *cells in (line.strip("| ").split(" | ") for line in lines)}
    images, devices = (1_281_167, 1_281_167, 1_281_167, 1_281_167, 10**9), (8, 256, 8, 64, 64)
    for number, (count, size) in enumerate(zip(images, devices, strict=True)):
        assert row["images"][number] == f"{count:,}"
        trajectories = row["trajectories, in all"][number]
        assert in_bytes(trajectories) == pytest.approx(count * recording.epochs * example, rel=0.005)
        share = row["the column of an epoch, on each device"][number]
        assert in_bytes(share) == pytest.approx(count / size * example, rel=0.005)

        epoch = count / size / 1000 / 3600  # hours
        recorded = row["recording and sweeps, at 1,000 images/s a device"][number]
        assert in_hours(recorded) == pytest.approx(4 / 3 * recording.epochs * epoch, rel=0.05)
        retrained = row["retraining, at 1,000 images/s a device"][number]
        assert in_hours(retrained) == pytest.approx(networks * retraining.epochs * epoch, rel=0.05)


def in_bytes(text):
    number, unit = text.split()
    return float(number) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]


def in_hours(text):
    number, unit = text.split()
    return float(number) * {"s": 1 / 3600, "min": 1 / 60, "h": 1, "days": 24}[unit]


def test_the_map_names_what_there_is():
    """Every `room.module.name` of the package's map, and every link of it."""
    text = Path("badloss_jax/README.md").read_text("utf-8")
    names = [name for name in re.findall(r"`((?:[a-z_]+\.)+\w+)`", text) if name.split(".")[0] in ROOMS]
    assert len(names) > 25
    for name in names:
        assert pkgutil.resolve_name(f"badloss_jax.{name}"), name
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (Path("badloss_jax") / link).exists(), link


def plan_of(name):
    return json.loads((RESULTS / "benchmarks" / f"plan-{name}.json").read_text("utf-8"))


def arithmetic_of(plan):
    """What of a plan no compiler says."""
    programs = {
        program["name"]: {key: program[key] for key in ("phase", "rows", "calls", "flops")}
        for program in plan["programs"]
    }
    hours = {phase["name"]: phase["at_rate"] for phase in plan["phases"]}
    kept = (
        "topology",
        "images",
        "network",
        "recording",
        "trainings",
        "rate",
        "input",
        "storage",
        "fits",
    )
    return {key: plan[key] for key in kept} | {"programs": programs, "hours": hours}


def test_the_tables_of_plans_are_what_was_planned():
    text = LAUNCH.read_text("utf-8")
    plans = {title: plan_of(name) for title, name in PLANS.items()}
    assert as_markdown(comparison_table(plans)) in text
    for plan in plans.values():
        assert plan["source"] == "compiled"
        assert shlex.join(plan["command"]) in text
        assert "\n".join(line.rstrip() for line in as_lines(plan)) in text

    scoring = Path("badloss_jax/scoring/README.md").read_text("utf-8")
    assert as_markdown(scoring_table(plans["a billion images, v5p:4x4x4"])) in scoring


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS.values())
def test_the_arithmetic_of_plans_is_that_of_today(name, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    written = plan_of(name)
    assert main([*written["command"][1:], "--quick", "--out", str(tmp_path / "plan.json")]) == 0
    assert arithmetic_of(json.loads((tmp_path / "plan.json").read_text("utf-8"))) == arithmetic_of(written)
