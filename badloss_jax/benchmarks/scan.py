"""What a scan finds in a folder of images that was poisoned before: `badloss scan` as a user runs it, told nothing."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from badloss_jax.attacks.manifest import choose_probes
from badloss_jax.attacks.poisoning import apply_manifest
from badloss_jax.config import changed
from badloss_jax.data import load_dataset
from badloss_jax.errors import DataError, UsageError
from badloss_jax.poison import plan_poison
from badloss_jax.seeding import generator


def measure_scan(
    config: ConfigDict, seeds: Sequence[int], scan_arguments: Sequence[str], folder: Path
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Writes a poisoned training set as PNG files, scans it in a process of its own, and compares with the truth.

    Args:
      config: of the data set, the attacks (scale 0 poisons nothing) and the number of probes.
      seeds: of images, poison and probes, each in turn.
      scan_arguments: more arguments of `badloss scan`, none of which are its defaults.
      folder: an empty one, to write to.

    Yields:
      Of each seed: images, poisoned share, seconds, recall per attack and on average, share of the clean images
      removed, how many attacks there are and how many it counts, the classes that were attacked and not called
      affected, and the other way round, and the verdict.

    Raises:
      UsageError: an attack that has to be optimised first.
      DataError: the scan failed.
    """
    for seed in seeds:
        settled = changed(config, {"seed": seed})
        dataset = load_dataset(settled.data, seed)
        manifest = plan_poison(settled, dataset)
        if manifest.unoptimised:
            raise UsageError(f"attack {manifest.unoptimised[0]} has to be optimised first: leave it out by"
                             " --config.attacks.names")  # fmt: skip
        names = write_poisoned(folder / str(seed) / "data", dataset, manifest, seed)
        probes = folder / str(seed) / "probes.txt"
        ids = choose_probes(manifest, settled.probes.count, seed)
        probes.write_text("".join(f"{names[number]}\n" for number in ids), "utf-8")
        out = folder / str(seed) / "out"
        command = [sys.executable, "-m", "badloss_jax", "scan", "--data", str(folder / str(seed) / "data"), "--probes",
                   str(probes), "--workdir", str(out), *scan_arguments]  # fmt: skip
        started = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise DataError(f"badloss scan failed with exit code {done.returncode}")
        yield {"seed": seed, "seconds": time.monotonic() - started} | compare(out, names, manifest, dataset.class_names)


def write_poisoned(folder: Path, dataset: Any, manifest: Any, seed: int) -> list[str]:
    """Writes the training set as FOLDER/<class>/<number>.png, as the victim sees it; the numbers say nothing.

    Returns:
      Of each example its path relative to the folder.
    """
    poisoning = apply_manifest(manifest, dataset.train.images, dataset.train.labels)
    images = np.array(dataset.train.images)
    images[poisoning.ids] = np.round(poisoning.triggered(poisoning.ids) * 255).astype(np.uint8)
    numbers = generator(seed, "names").permutation(len(images))
    classes = [name.replace("/", "-") for name in dataset.class_names]
    paths = [f"{classes[label]}/{number:07d}.png" for label, number in zip(poisoning.labels, numbers, strict=True)]
    for name in classes:
        (folder / name).mkdir(parents=True)
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(folder / path)
    return paths


def compare(out: Path, names: Sequence[str], manifest: Any, class_names: Sequence[str]) -> dict[str, Any]:
    """Compares what a scan removed, and which classes it named, with the truth."""
    results = json.loads((out / "scan.json").read_text("utf-8"))
    listed = set((out / "remove.txt").read_text("utf-8").splitlines())
    removed, attack_of = np.array([name in listed for name in names]), manifest.attack_of()
    recall = {name: float(removed[attack_of == name].mean()) for name in manifest.attacks}
    attacked = {class_names[plan.target].replace("/", "-") for plan in manifest.attacks.values()}
    affected = {entry["name"] for entry in results["classes"] if entry["affected"]}
    return {
        "images": len(names),
        "poisoned_share": len(manifest.poisoned_ids) / len(names),
        "stands_out": results["stands_out"],
        "estimate": results["share"],
        "recall": recall,
        "mean_recall": float(np.mean(list(recall.values()))) if recall else None,
        "found_share": float(removed[attack_of != ""].mean()) if recall else None,
        "clean_removed_share": float(removed[attack_of == ""].mean()),
        "attacks": len(manifest.attacks),
        "certain_attacks": sum(entry["certain"] for entry in results["attacks"]),
        "missed_classes": sorted(attacked - affected),
        "added_classes": sorted(affected - attacked),
        "verdict": results["verdict"],
    }
