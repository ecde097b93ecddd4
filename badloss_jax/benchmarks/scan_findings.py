"""What a scan finds in a folder of images that was poisoned before: `badloss scan` as a user runs it, told nothing."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Bool, Int
from ml_collections import ConfigDict
from PIL import Image

from badloss_jax.benchmarks.gauntlet import REGIMES, PoisonedSet, draw_set
from badloss_jax.core.errors import DataError
from badloss_jax.core.seeding import generator

_LOST = (0.01, 0.02, 0.05)  # shares of the clean images at which what is found is read off the ranking


def measure_scan(
    config: ConfigDict,
    seeds: Sequence[int],
    regimes: Sequence[str],
    scan_arguments: Sequence[str],
    folder: Path,
    before: Sequence[dict[str, Any]] = (),
) -> Iterator[dict[str, Any]]:
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
        recording = _recorded_in(regime)
        is_last = recording not in map(_recorded_in, regimes[number + 1 :])
        for seed in seeds:
            if (regime, seed) in known:
                yield known[regime, seed]
                continue

            poisoned = draw_set(config, seed, REGIMES[regime] if regime else None)
            # One folder for all regimes of a recording, so that `badloss scan` finds it there.
            set_folder = folder / (recording or "config") / str(seed)
            names = image_names(poisoned, seed)
            seconds = _scan(set_folder, names, poisoned, scan_arguments)
            yield {"regime": regime, "seed": seed, "seconds": seconds} | compare(set_folder / "out", names, poisoned)

            # The disk need not hold all sets at a time.
            if is_last:
                shutil.rmtree(set_folder)


def _recorded_in(regime: str) -> str:
    """Returns the first regime with the same images, whose recording is scored again with other probes."""
    if not regime:
        return ""
    same = replace(REGIMES[regime], probes=0)
    return next(name for name, other in REGIMES.items() if replace(other, probes=0) == same)


def _scan(folder: Path, names: Sequence[str], poisoned: PoisonedSet, scan_arguments: Sequence[str]) -> float:
    """Writes the images, unless they lie there, and the probes, and scans them; returns the seconds of the scan."""
    if not (folder / "data").exists():
        write_images(folder / "data", names, poisoned)
    probes = folder / "probes.txt"
    probes.write_text("".join(f"{names[row]}\n" for row in poisoned.probe_ids), "utf-8")

    # In a process of its own, which knows of the set what a user would.
    command = [sys.executable, "-m", "badloss_jax", "scan", "--data", str(folder / "data")]
    command += ["--probes", str(probes), "--workdir", str(folder / "out"), *scan_arguments]
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise DataError(f"badloss scan failed with exit code {done.returncode}")
    return time.monotonic() - started


def image_names(poisoned: PoisonedSet, seed: int) -> list[str]:
    """Names the file of each example, by its class and a number that says nothing.

    Args:
      poisoned: the training set.
      seed: of the numbers.

    Returns:
      N names, <class>/<number>.png.
    """
    numbers = generator(seed, "names").permutation(len(poisoned.images))
    classes = poisoned.class_names
    return [f"{classes[label]}/{number:07d}.png" for label, number in zip(poisoned.labels, numbers, strict=True)]


def write_images(folder: Path, names: Sequence[str], poisoned: PoisonedSet) -> None:
    """Writes the training set as the victim sees it.

    Args:
      folder: to write to; it is made.
      names: of the files in it, as of `image_names`.
      poisoned: the training set.
    """
    for name in poisoned.class_names:
        (folder / name).mkdir(parents=True)

    for name, image in zip(names, poisoned.images, strict=True):
        # Pillow takes grey images without a channel.
        is_grey = image.shape[-1] == 1
        Image.fromarray(image[..., 0] if is_grey else image).save(folder / name)


@dataclass(frozen=True)
class _Listed:
    """What a scan says of each example.

    Attributes:
      rank: int [N], 1 of the most suspicious.
      is_probe: bool [N].
      is_removed: bool [N].
    """

    rank: Int[np.ndarray, "N"]
    is_probe: Bool[np.ndarray, "N"]
    is_removed: Bool[np.ndarray, "N"]


def compare(out: Path, names: Sequence[str], poisoned: PoisonedSet) -> dict[str, Any]:
    """Compares what a scan removed, and which classes it named, with the truth.

    Args:
      out: the folder of the scan.
      names: of the files, as of `image_names`.
      poisoned: the training set, with the truth.

    Returns:
      Numbers of images, probes and attacks; the poisoned share, and the scan's estimate of it; recall per attack, on
      average and of all poison; the share of the clean images that is removed; how much poison is among the first of
      the ranking, at several shares of clean images among them; how many attacks the scan counts; the classes that were
      attacked and not called affected, and the other way round; the network, and the verdict.
    """
    results = json.loads((out / "scan.json").read_text("utf-8"))
    listed = _read_lists(out, names)
    is_poison = poisoned.attack_of != ""
    recall = {name: float(listed.is_removed[poisoned.attack_of == name].mean()) for name in poisoned.targets}

    # Of a clean set there is nothing to be found.
    mean_recall = found_share = found_at = None
    if recall:
        mean_recall = float(np.mean(list(recall.values())))
        found_share = float(listed.is_removed[is_poison].mean())
        found_at = _found_at(listed.rank[is_poison], listed.rank[~is_poison & ~listed.is_probe])

    # By name, since a scan numbers classes by its folders.
    attacked = {poisoned.class_names[label] for targets in poisoned.targets.values() for label in targets}
    affected = {entry["name"] for entry in results["classes"] if entry["affected"]}
    network = {key: results["config"]["model"][key] for key in ("name", "stages", "stem_stride")}
    return {
        "images": len(names),
        "probes": int(listed.is_probe.sum()),
        "poisoned_share": float(is_poison.mean()),
        "stands_out": results["stands_out"],
        "estimate": results["share"],
        "recall": recall,
        "mean_recall": mean_recall,
        "found_share": found_share,
        "found_at": found_at,
        "clean_removed_share": float(listed.is_removed[~is_poison].mean()),
        "attacks": len(recall),
        "certain_attacks": sum(entry["certain"] for entry in results["attacks"]),
        "missed_classes": sorted(attacked - affected),
        "added_classes": sorted(affected - attacked),
        "network": network | {"epochs": results["config"]["recording"]["epochs"]},
        "verdict": results["verdict"],
    }


def _read_lists(out: Path, names: Sequence[str]) -> _Listed:
    """Reads the ranking and the removal list of a scan, in the order of the names."""
    table = pq.read_table(out / "scores.parquet", columns=["path", "rank", "probe"]).to_pydict()
    row_of = {path: row for row, path in enumerate(table["path"])}
    rows = np.array([row_of[name] for name in names])

    # The list is what people go by, not the table.
    removed = (out / "remove.txt").read_text("utf-8").splitlines()
    return _Listed(np.array(table["rank"])[rows], np.array(table["probe"])[rows], np.isin(names, removed))


def _found_at(poison: Int[np.ndarray, "M"], clean: Int[np.ndarray, "C"]) -> dict[str, float]:
    """Returns how much poison ranks before a few shares of the clean images."""
    ranks = np.sort(clean)
    return {str(share): float((poison < ranks[int(share * len(ranks))]).mean()) for share in _LOST}
