"""What a scan finds in a folder of images that was poisoned before: `badloss scan` as a user runs it, told nothing."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from ml_collections import ConfigDict
from PIL import Image

from badloss_jax.benchmarks.gauntlet import REGIMES, PoisonedSet, draw_set
from badloss_jax.core.errors import DataError
from badloss_jax.core.seeding import generator

_LOST = (0.01, 0.02, 0.05)  # shares of the clean images at which what is found is read off the ranking


def measure_scan(
    config: ConfigDict, seeds: Sequence[int], regimes: Sequence[str], scan_arguments: Sequence[str], folder: Path,
    before: Sequence[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Writes a poisoned training set as PNG files, scans it in a process of its own, and compares with the truth.

    Regimes that differ in their probes alone share one recording: of all but the first, seconds are those of scoring.

    Args:
      config: of the data set, the attacks (scale 0 poisons nothing) and the number of probes.
      seeds: of images, poison and probes, each in turn.
      regimes: of `REGIMES`, each in turn; none takes the config as it is.
      scan_arguments: more arguments of `badloss scan`, none of which are its defaults.
      folder: an empty one, to write to.
      before: figures of an interrupted benchmark, which are not measured again.

    Yields:
      Of each regime and seed: what `compare` returns, and seconds.

    Raises:
      UsageError: an attack that has to be optimised first, unless there are regimes, which leave it out.
      DataError: the scan failed.
    """
    known = {(figure["regime"], figure["seed"]): figure for figure in before}
    regimes = tuple(regimes) or ("",)
    for number, regime in enumerate(regimes):
        for seed in seeds:
            if (regime, seed) in known:
                yield known[regime, seed]
                continue
            place = folder / (_recorded_in(regime) or "config") / str(seed)
            poisoned = draw_set(config, seed, REGIMES[regime] if regime else None)
            names = image_names(poisoned, seed)
            if not (place / "data").exists():
                write_images(place / "data", names, poisoned)
            (place / "probes.txt").write_text("".join(f"{names[row]}\n" for row in poisoned.probe_ids), "utf-8")
            command = [sys.executable, "-m", "badloss_jax", "scan", "--data", str(place / "data"), "--probes",
                       str(place / "probes.txt"), "--workdir", str(place / "out"), *scan_arguments]  # fmt: skip
            started = time.monotonic()
            done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
            if done.returncode:
                raise DataError(f"badloss scan failed with exit code {done.returncode}")
            seconds = time.monotonic() - started
            yield {"regime": regime, "seed": seed, "seconds": seconds} | compare(place / "out", names, poisoned)
            if _recorded_in(regime) not in map(_recorded_in, regimes[number + 1 :]):
                shutil.rmtree(place)


def _recorded_in(regime: str) -> str:
    """Returns the first regime with the same images, whose recording is scored again with other probes."""
    if not regime:
        return ""
    same = replace(REGIMES[regime], probes=0)
    return next(name for name, other in REGIMES.items() if replace(other, probes=0) == same)


def image_names(poisoned: PoisonedSet, seed: int) -> list[str]:
    """Returns of each example <class>/<number>.png; the numbers say nothing."""
    numbers, classes = generator(seed, "names").permutation(len(poisoned.images)), poisoned.class_names
    return [f"{classes[label]}/{number:07d}.png" for label, number in zip(poisoned.labels, numbers, strict=True)]


def write_images(folder: Path, names: Sequence[str], poisoned: PoisonedSet) -> None:
    """Writes the training set as FOLDER/<name>, as the victim sees it."""
    for name in poisoned.class_names:
        (folder / name).mkdir(parents=True)
    for name, image in zip(names, poisoned.images, strict=True):
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(folder / name)


def compare(out: Path, names: Sequence[str], poisoned: PoisonedSet) -> dict[str, Any]:
    """Compares what a scan removed, and which classes it named, with the truth.

    Returns:
      Numbers of images, probes and attacks; the poisoned share, and the scan's estimate of it; recall per attack, on
      average and of all poison; the share of the clean images that is removed; how much poison is among the first of
      the ranking, at several shares of clean images among them; how many attacks the scan counts; the classes that were
      attacked and not called affected, and the other way round; the network, and the verdict.
    """
    results = json.loads((out / "scan.json").read_text("utf-8"))
    table = pq.read_table(out / "scores.parquet", columns=["path", "rank", "probe"]).to_pydict()
    row_of = {path: row for row, path in enumerate(table["path"])}
    rows = np.array([row_of[name] for name in names])
    rank, probe = (np.array(table[key])[rows] for key in ("rank", "probe"))
    removed = np.isin(names, (out / "remove.txt").read_text("utf-8").splitlines())  # what people go by
    is_poison = poisoned.attack_of != ""
    recall = {name: float(removed[poisoned.attack_of == name].mean()) for name in poisoned.targets}
    attacked = {poisoned.class_names[label] for targets in poisoned.targets.values() for label in targets}
    affected = {entry["name"] for entry in results["classes"] if entry["affected"]}
    model = results["config"]["model"]
    return {
        "images": len(names),
        "probes": int(probe.sum()),
        "poisoned_share": float(is_poison.mean()),
        "stands_out": results["stands_out"],
        "estimate": results["share"],
        "recall": recall,
        "mean_recall": float(np.mean(list(recall.values()))) if recall else None,
        "found_share": float(removed[is_poison].mean()) if recall else None,
        "found_at": _found_at(rank[is_poison], rank[~is_poison & ~probe]) if recall else None,
        "clean_removed_share": float(removed[~is_poison].mean()),
        "attacks": len(recall),
        "certain_attacks": sum(entry["certain"] for entry in results["attacks"]),
        "missed_classes": sorted(attacked - affected),
        "added_classes": sorted(affected - attacked),
        "network": {key: model[key] for key in ("name", "stages", "stem_stride")}
        | {"epochs": results["config"]["recording"]["epochs"]},
        "verdict": results["verdict"],
    }


def _found_at(poison: np.ndarray, clean: np.ndarray) -> dict[str, float]:
    """Returns how much poison ranks before a few shares of the clean images."""
    ranks = np.sort(clean)
    return {str(share): float((poison < ranks[int(share * len(ranks))]).mean()) for share in _LOST}
