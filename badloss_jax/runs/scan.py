"""Scan a training set of one's own: train a network on it, watch how each image is learnt, say what stands out.

Nothing is simulated and nothing retrained. In OUT lie:

    report.html                        look at this
    remove.txt, keep.txt               a path a line, relative to the data's folder (of arrays and TFDS: row numbers)
    scores.parquet                     every image: its score, p-value, attack, and whether it is in remove.txt
    suspects.parquet, suspects.csv     what lies further out than nearly all probes, the furthest first
    left_out.txt                       what could not be read, and why
    scan.json                          the verdict, every figure, settings, versions
    config.json, trajectories/, ...    as of a run (see `badloss_jax.runs.workdir`)
"""

import json
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int
from ml_collections import ConfigDict

from badloss_jax.attacks.poisoning import unpoisoned
from badloss_jax.config import default_config, override, settled, to_dict
from badloss_jax.core.environment import environment
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import printable, write_lines, write_text
from badloss_jax.core.mesh import make_mesh, round_up
from badloss_jax.core.preemption import Preemption
from badloss_jax.core.progress import Progress
from badloss_jax.data.training_set import (
    TrainingSet,
    list_folder,
    read_arrays,
    read_folder,
    read_tfds,
    suggested_size,
    trusted_ids,
)
from badloss_jax.report.scan import Suspects, reasons, render_scan, sentence, write_scores, write_suspects
from badloss_jax.runs.artefacts import Artefacts
from badloss_jax.runs.sizing import Network, choose_network
from badloss_jax.runs.trainer import Recording, Trainer, check_devices, place_examples, spec_of
from badloss_jax.runs.workdir import claim, read_config, read_resumes
from badloss_jax.runs.writers import open_writers
from badloss_jax.scoring import (
    COMBINED,
    Probes,
    Trajectories,
    attack_entry,
    find_attacks,
    judge,
    nearest_probes,
    score_trajectories,
    unsupported,
)
from badloss_jax.settings import parse_rule
from badloss_jax.trajectories.store import TrajectoryStore

SCHEMA_VERSION = 3
MINUTES = 10.0  # that a scan may take, if nothing else is said
_OF_THE_NETWORK = ("model.name", "model.stages", "model.stem_stride", "recording.epochs")  # what fixes it
_NEAREST = 3  # probes that are shown beside a suspect
# Settings of a run that mean nothing here, at their only value.
_UNUSED = {"data.train_examples": 0, "data.test_examples": 0, "data.pad": 0, "data.class_names": [],
           "attacks.names": [], "defenses.names": [], "retraining.enabled": False}  # fmt: skip


def suggest(
    config: ConfigDict, num_examples: int, image_shape: tuple[int, int, int], num_classes: int, num_probes: int
) -> None:  # fmt: skip
    """Sets what a scan needs by the size of the data: a small network, and smaller batches and more epochs of less.

    The network is the smallest that a scan takes: `badloss_jax.runs.sizing` chooses a larger one if there is time.

    The kind of trajectory is "combined", which found most on all data sets that were tried (README); it has enough with
    15 epochs, and loses where the network memorises what is left (configs/results).
    """
    side = min(image_shape[:2])
    stride = 1 if side < 24 else 2 if side <= 40 else 4
    batch = next((size for size, below in ((16, 1_000), (32, 5_000), (64, 40_000)) if num_examples < below), 128)
    config.attacks.names = config.controls = config.retraining.variants = ()
    config.retraining.enabled = False
    config.probes.count = num_probes
    config.model.update(name="resnet_small", stages=(16, 32, 64), stem_stride=stride)
    epochs = 30 if num_examples < 5_000 else 15
    config.recording.update(epochs=epochs, batch_size=batch, kinds=("ranked", "features"))
    config.scoring.update(kinds=("combined",), by_class=True)
    for kind in ("ranked", "features"):
        config.scoring[kind].k = min(5, max(1, num_probes // (5 * num_classes)))  # well below the probes of a class
    config.rejection.rules = ("clusters",)


def scan(
    data: str, probes: str, workdir: Path, overrides: Sequence[str] = (), *, minutes: float = MINUTES,
    follow_links: bool = False, progress: Progress | None = None, mesh: Mesh | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Scans a training set, or goes on with what an interrupted scan left in the folder.

    Args:
      data: a folder with <class>/* or train/<class>/*; an .npz file with x_train and y_train; or tfds:NAME, a folder
        of TensorFlow Datasets (or a name below $TFDS_DATA_DIR).
      probes: what is known to be clean: a text file of paths relative to `data` (of arrays: row numbers), one a line; a
        folder with <class>/* of trusted images; or how many to draw at random and to trust without looking.
      workdir: the folder to write to; the data's is never written.
      overrides: `--config.KEY=VALUE`, over what `suggest` sets.
      minutes: that it may take: the network is the largest that this machine records with in that time, unless the
        overrides say which one, or how many epochs; a folder keeps the network that it was begun with.
      follow_links: read files that links lead to outside of the data's folder, too.
      progress: tells how far it is; silent by default.
      mesh: of the devices, all by default.

    Returns:
      What scan.json holds.

    Raises:
      UsageError, DataError, NonFiniteLossError: see `badloss_jax.core.errors`; what was recorded is kept.
      PreemptedError: it was told to stop; the same call goes on.
    """
    started, progress, mesh = time.monotonic(), progress or Progress(None), mesh or make_mesh()
    if not minutes > 0:
        raise UsageError(f"--minutes {minutes}: expected a number above 0")
    guess = default_config()  # refuses wrong settings before anything is read
    suggest(guess, 1_000, (32, 32, 3), 10, 1_000_000)
    override(guess, overrides)
    examples, config = _read(data, probes, workdir, overrides, follow_links)
    split, count, shape = examples.split, len(examples.names), examples.image_shape
    probe_ids = trusted_ids(probes, examples, config.seed)
    suggest(config, count, shape, examples.num_classes, len(probe_ids))
    for group in (config.recording, config.retraining):
        group.batch_size = round_up(group.batch_size, mesh)
    config = override(config, overrides)
    check_devices(config, mesh)
    told = settled(config)
    unused = [key for key, value in _UNUSED.items() if told[key] != value]
    if unused:
        raise UsageError(f"a scan has no use for {unused[0]}: it takes the training set as it is, and neither attacks"
                         " nor retrains; `badloss run` does")  # fmt: skip
    if len(config.scoring.kinds) != 1 or len(config.rejection.rules) != 1:
        raise UsageError(f"scoring.kinds = {config.scoring.kinds} and rejection.rules = {config.rejection.rules}:"
                         " a scan has one kind and one rule")  # fmt: skip
    recorded = set(COMBINED) & set(config.recording.kinds)
    if config.rejection.rules[0] == "clusters" and not (recorded and config.scoring.by_class):
        raise UsageError("the rule clusters needs scoring.by_class, and features or ranked in recording.kinds ="
                         f" {config.recording.kinds}; --config.rejection.rules=alpha needs neither")  # fmt: skip
    is_probe = np.isin(np.arange(count), probe_ids)
    _tell(examples, probes, is_probe, config, progress)
    placed = None
    if _network_is_known(config, workdir, overrides):
        model = config.model
        network = Network(model.name, tuple(model.stages), model.stem_stride)
        progress.note(f"network  {network}, {config.recording.epochs} epochs")
    else:
        placed = place_examples(config, split, unpoisoned(split.images, split.labels), mesh)
        choose_network(config, placed, shape, examples.num_classes, minutes, mesh, progress)
    with (
        Preemption() as preemption,
        claim(workdir, config, free=("probes", "scoring", "rejection", "report")),
        open_writers(workdir, config) as writers,
    ):
        trainer = Trainer(config, workdir, Artefacts(workdir), mesh, progress, writers, preemption)
        spec = spec_of(config, shape, examples.num_classes, config.model.name)
        recording = Recording.of(config, spec, (config.seed, split.fingerprint, "scan", asdict(spec)))
        folder = workdir / "trajectories"
        seconds = {"data": time.monotonic() - started}
        if recording.is_in(folder):
            progress.note("recording  done before")
        else:
            _check_same(folder, recording.identity)
            begun = time.monotonic()
            progress.phase("recording")
            placed = placed or place_examples(config, split, unpoisoned(split.images, split.labels), mesh)
            recording.train(trainer, placed, split.labels, is_probe, folder)
            seconds["recording"] = trainer.seconds_before + time.monotonic() - begun
        trainer.finish("recording", recording.identity)
        preemption.stop_if_reached()
        begun, store = time.monotonic(), TrajectoryStore.open(folder)
        if not np.array_equal(store.probe_ids(), probe_ids):
            store.mark_probes(probe_ids)
        results = _report(store, examples, probe_ids, config, workdir, mesh)
        seconds["scoring"] = time.monotonic() - begun
        results |= {"seconds": seconds, "resumes": read_resumes(workdir)}
        write_text(workdir / "scan.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
        preemption.stop_if_reached()
    return results


def _network_is_known(config: ConfigDict, workdir: Path, overrides: Sequence[str]) -> bool:
    """Whether the network need not be chosen: it was asked for, or the folder has one, which the config is given."""
    if any(text.startswith(f"--config.{key}=") for text in overrides for key in _OF_THE_NETWORK):
        return True
    if not (workdir / "config.json").is_file():
        return False
    kept = read_config(workdir)
    config.model.update(name=kept.model.name, stages=kept.model.stages, stem_stride=kept.model.stem_stride)
    config.recording.epochs = kept.recording.epochs
    return True


def _read(
    data: str, probes: str, workdir: Path, overrides: Sequence[str], follow_links: bool
) -> tuple[TrainingSet, ConfigDict]:
    """Reads the training set; returns it, and the default config with how it was read."""
    config = default_config()
    of_data = [text for text in overrides if text.startswith("--config.data.")]
    trusted = Path(probes).expanduser()
    if data.startswith("tfds:"):
        name = Path(data.removeprefix("tfds:")).expanduser()
        home = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
        config.data.update(source="tfds", dir=str(name if name.is_dir() else home / name))
        read: Any = read_tfds
    elif Path(data).suffix == ".npz":
        config.data.update(source="arrays", dir=data)
        read = read_arrays
    else:
        listing = list_folder(Path(data).expanduser(), follow_links)
        size, channels = suggested_size(listing)
        config.data.update(source="image_folder", dir=str(listing.root), image_size=size, channels=channels)
        beside = None
        if trusted.is_dir() and not trusted.resolve().is_relative_to(listing.root):
            beside = list_folder(trusted, follow_links, listing.class_names)
        read = partial(read_folder, listing, trusted=beside)
    out, own = workdir.resolve(), {"--data": Path(config.data.dir).expanduser()}
    if trusted.is_dir():
        own["--probes"] = trusted
    for option, folder in own.items():
        if out.is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(out):
            raise UsageError(f"--workdir {workdir} and {option} {folder} lie in one another: your images' folders are"
                             " never written, choose another for the scan")  # fmt: skip
    return read(override(config, of_data).data), config


def _tell(
    examples: TrainingSet, probes: str, is_probe: Bool[np.ndarray, "N"], config: ConfigDict, progress: Progress
) -> None:  # fmt: skip
    """Says in a few lines what is about to be done, and what about it calls for caution."""
    height, width, channels = examples.image_shape
    progress.note(
        f"{len(examples.names):,} images of {height} x {width} x {channels} in {examples.num_classes} classes,"
        f" {is_probe.sum()} of them probes; batches of {config.recording.batch_size} (--config.KEY=VALUE changes it)"
    )
    if examples.left_out:
        name, reason = next(iter(examples.left_out.items()))
        warnings.warn(f"left out {len(examples.left_out):,} files, such as {printable(name)}: {reason}; all are in"
                      " left_out.txt", stacklevel=2)  # fmt: skip
    if probes.isdigit():
        warnings.warn("the probes were drawn at random and nobody looked at them: where a share of the images is"
                      " poisoned, about that share of the probes is, too, and less is found", stacklevel=2)  # fmt: skip
    without = np.setdiff1d(examples.split.labels, examples.split.labels[is_probe])
    if len(without):
        named = ", ".join(printable(examples.class_names[label]) for label in without[:5])
        named += ", ..." * (len(without) > 5)
        warnings.warn(f"{len(without)} of {examples.num_classes} classes have no probe ({named}): their images are"
                      " judged by the probes of others", stacklevel=2)  # fmt: skip
    rule, level = parse_rule(config.rejection.rules[0], config.rejection)
    if told := unsupported(rule, level, int(is_probe.sum())):
        warnings.warn(f"--config.rejection.{told}", stacklevel=2)


def _check_same(folder: Path, identity: str) -> None:
    """Refuses to write over the recording of other images, or of another version."""
    try:
        store = TrajectoryStore.open(folder)
    except DataError:
        return
    if store.recording_hash != identity:
        raise UsageError(f"{folder} was recorded of other images, or by another version: choose another --workdir")


def _report(
    store: TrajectoryStore, examples: TrainingSet, probe_ids: Int[np.ndarray, "P"], config: ConfigDict, workdir: Path,
    mesh: Mesh,
) -> dict[str, Any]:  # fmt: skip
    """Scores, judges, and writes everything but scan.json, whose content it returns."""
    labels, count = examples.split.labels, len(examples.names)
    is_probe = np.isin(np.arange(count), probe_ids)
    (kind,) = config.scoring.kinds
    trajectories = Trajectories.of_store(store)
    found, epochs = score_trajectories(trajectories, Probes(probe_ids), config.scoring, (kind,), mesh)
    scores, probe_scores = found[kind].values(), found[kind].probe_scores
    looks, clusters = None, None
    if config.scoring.by_class and store.layout.keys() & set(COMBINED):
        clusters, looks = find_attacks(trajectories, probe_ids, config.scoring, config.seed, mesh, far=scores)
    rule, level = parse_rule(config.rejection.rules[0], config.rejection)
    verdict = judge(scores, probe_scores, labels, is_probe, examples.num_classes, rule, level, clusters)
    attack_of = verdict.attack_of()
    flagged = verdict.removed | (attack_of > 0) | (~is_probe & (verdict.p_values <= config.rejection.alpha))
    ids = np.flatnonzero(flagged)
    ids = ids[np.argsort(-scores[ids], kind="stable")]
    seen = store.rows("features" if "features" in store.layout else kind, epochs)
    losses = store.read("loss", epochs)
    suspects = Suspects(
        ids, [examples.names[number] for number in ids], labels[ids], scores[ids], verdict.p_values[ids],
        probe_ids[nearest_probes(seen[ids], seen[probe_ids], _NEAREST)], reasons(losses, ids, probe_ids),
        verdict.removed[ids], attack_of[ids], None if looks is None else looks.first[ids],
    )  # fmt: skip
    results = {
        "schema_version": SCHEMA_VERSION,
        "verdict": sentence(verdict, examples.class_names, len(probe_ids)),
        "stands_out": verdict.stands_out,
        "num_examples": count,
        "probe_count": len(probe_ids),
        "probe_rows": probe_ids.tolist(),
        "trusted_count": count - examples.own,
        "removed_count": int(verdict.removed.sum()),
        "suspect_count": len(ids),
        "left_out_count": len(examples.left_out),
        "attacks": [attack_entry(cluster, printable(examples.class_names[cluster.label]))
                    for cluster in [*verdict.attacks, *verdict.possible]],
        "share": asdict(verdict.share),
        "no_poison_p_value": verdict.no_poison,
        "classes": [{"name": printable(name)} | entry
                    for name, entry in zip(examples.class_names, verdict.classes, strict=True)],
        "epochs_kept": epochs.tolist(),
        "config": to_dict(config),
        "environment": environment(),
    }  # fmt: skip
    write_suspects(workdir, suspects, examples)
    write_scores(workdir, examples, scores, verdict, is_probe, looks)
    kept = ~verdict.removed
    kept[examples.own :] = False
    for name, rows in (("remove.txt", verdict.removed), ("keep.txt", kept)):
        write_lines(workdir / name, [examples.names[number] for number in np.flatnonzero(rows)])
    left_out = [f"{name}\t{reason}" for name, reason in examples.left_out.items()]
    write_lines(workdir / "left_out.txt", [line.replace("\n", "\\n").replace("\r", "\\r") for line in left_out])
    write_text(workdir / "report.html", render_scan(results, suspects, examples, losses, scores, is_probe))
    return results
