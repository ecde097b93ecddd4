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
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from badloss_jax.config import default_config, override, settled
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import write_text
from badloss_jax.core.hashing import digest
from badloss_jax.core.mesh import make_mesh, round_up
from badloss_jax.core.preemption import Preemption
from badloss_jax.core.processes import agree, first, on_first
from badloss_jax.core.progress import Progress
from badloss_jax.data.training_set import TrainingSet, trusted_ids
from badloss_jax.runs.agreement import claimed, facts_of
from badloss_jax.runs.artefacts import Artefacts
from badloss_jax.runs.recording import Recording
from badloss_jax.runs.scan_input import ScanRequest, describe, read_training_set
from badloss_jax.runs.scan_verdict import write_verdict
from badloss_jax.runs.sizing import Network, Sizing, choose_network
from badloss_jax.runs.trainer import Trainer, check_devices, place_clean, spec_of
from badloss_jax.runs.workdir import read_config, read_resumes
from badloss_jax.scoring import COMBINED
from badloss_jax.training.batch import Examples
from badloss_jax.trajectories.store import TrajectoryStore

MINUTES = 10.0  # that a scan may take, if nothing else is said
_OF_THE_NETWORK = ("model.name", "model.stages", "model.stem_stride", "recording.epochs")  # what fixes it
_CHANGEABLE = ("probes", "scoring", "rejection", "report")  # groups that a begun scan may be given anew
# Settings of a run that mean nothing here, at their only value.
_UNUSED = {
    "data.train_examples": 0,
    "data.test_examples": 0,
    "data.pad": 0,
    "data.class_names": [],
    "attacks.names": [],
    "defenses.names": [],
    "retraining.enabled": False,
}


def suggest(
    config: ConfigDict,
    num_examples: int,
    image_shape: tuple[int, int, int],
    num_classes: int,
    num_probes: int,
) -> None:
    """Sets what a scan needs by the size of the data: a small network, and smaller batches and more epochs of less.

    The network is the smallest that a scan takes: `badloss_jax.runs.sizing` chooses a larger one if there is time.

    The kind of trajectory is "combined", which found most on all data sets that were tried (README); it has enough with
    15 epochs, and loses where the network memorises what is left (configs/results).

    Args:
      config: is changed.
      num_examples: N.
      image_shape: (H, W, C).
      num_classes: K.
      num_probes: P.
    """
    config.attacks.names = ()
    config.controls = ()
    config.retraining.variants = ()
    config.retraining.enabled = False
    config.probes.count = num_probes

    config.model.update(name="resnet_small", stages=(16, 32, 64), stem_stride=_stem_stride(min(image_shape[:2])))
    epochs = 15
    if num_examples < 5_000:
        epochs = 30
    config.recording.update(epochs=epochs, batch_size=_batch_size(num_examples), kinds=("ranked", "features"))

    config.scoring.update(kinds=("combined",), by_class=True)
    for kind in COMBINED:
        config.scoring[kind].k = min(5, max(1, num_probes // (5 * num_classes)))  # well below the probes of a class
    config.rejection.rules = ("clusters",)


def _stem_stride(side: int) -> int:
    """Returns how far the stem strides over images of so many pixels a side."""
    if side < 24:
        return 1
    if side <= 40:
        return 2
    return 4


def _batch_size(num_examples: int) -> int:
    """Returns the batch size for so many examples: smaller ones for fewer."""
    for size, below in ((16, 1_000), (32, 5_000), (64, 40_000)):
        if num_examples < below:
            return size
    return 128


def scan(
    data: str,
    probes: str,
    workdir: Path,
    overrides: Sequence[str] = (),
    *,
    minutes: float = MINUTES,
    follow_links: bool = False,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
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

    Example:
      >>> import numpy as np, tempfile
      >>> from pathlib import Path
      >>> from badloss_jax import scan
      >>> draw = np.random.default_rng(0)
      >>> labels = np.arange(400) % 2
      >>> images = draw.integers(0, 128, (400, 8, 8, 1)) + 100 * labels[:, None, None, None]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.savez(f"{folder}/data.npz", x_train=images.astype(np.uint8), y_train=labels)
      ...     small = ["--config.recording.epochs=3", "--config.model.stages=(8,)"]
      ...     results = scan(f"{folder}/data.npz", "40", Path(folder) / "scan", small)
      >>> results["num_examples"], results["probe_count"], results["removed_count"]
      (400, 40, 0)
    """
    started = time.monotonic()
    if not minutes > 0:
        raise UsageError(f"--minutes {minutes}: expected a number above 0")
    request = ScanRequest(
        data,
        probes,
        workdir,
        overrides,
        minutes,
        follow_links,
        progress or Progress(None),
        mesh or make_mesh(),
    )
    _check_overrides(overrides)

    examples, config = read_training_set(request)
    probe_ids = trusted_ids(probes, examples, config.seed)
    config = _settings(request, config, examples, len(probe_ids))
    agree(
        facts_of(config)
        | {
            "the images and labels (a hash)": examples.split.fingerprint,
            "the probes (a hash)": digest(probe_ids.tolist()),
        }
    )
    if first():
        describe(request, config, examples, probe_ids)
    images = _choose_network(request, config, examples)
    # A folder that was begun would be refused with what the user then changes.
    if not on_first((workdir / "config.json").is_file):
        _recording_of(config, examples).check_fits(config, request.mesh)

    with Preemption() as preemption, claimed(workdir, config, _CHANGEABLE) as writers:
        seconds = {"data": time.monotonic() - started}
        artefacts = Artefacts(workdir)
        trainer = Trainer(config, workdir, artefacts, request.mesh, request.progress, writers, preemption)
        store = _record(trainer, examples, probe_ids, images, seconds)
        preemption.stop_if_reached()

        begun = time.monotonic()
        results = write_verdict(store, examples, probe_ids, config, workdir, request.mesh)
        seconds["scoring"] = time.monotonic() - begun
        results |= {"seconds": seconds, "resumes": read_resumes(workdir)}
        on_first(lambda: write_text(workdir / "scan.json", json.dumps(results, indent=2, allow_nan=False) + "\n"))
        preemption.stop_if_reached()
    return results


def _check_overrides(overrides: Sequence[str]) -> None:
    """Refuses wrong settings before anything is read."""
    guess = default_config()
    suggest(guess, 1_000, (32, 32, 3), 10, 1_000_000)
    override(guess, overrides)


def _settings(request: ScanRequest, config: ConfigDict, examples: TrainingSet, num_probes: int) -> ConfigDict:
    """Returns what fits the data, with the overrides; refuses what a scan has no use for."""
    suggest(config, len(examples.names), examples.image_shape, examples.num_classes, num_probes)
    # Devices share a batch in equal parts.
    for group in (config.recording, config.retraining):
        group.batch_size = round_up(group.batch_size, request.mesh)
    config = override(config, request.overrides)
    check_devices(config, request.mesh)

    values = settled(config)
    unused = [key for key, value in _UNUSED.items() if values[key] != value]
    if unused:
        raise UsageError(
            f"a scan has no use for {unused[0]}: it takes the training set as it is, and neither attacks nor retrains;"
            " `badloss run` does"
        )

    if len(config.scoring.kinds) != 1 or len(config.rejection.rules) != 1:
        raise UsageError(
            f"scoring.kinds = {config.scoring.kinds} and rejection.rules = {config.rejection.rules}: a scan has one"
            " kind and one rule"
        )
    searchable = config.scoring.by_class and set(COMBINED) & set(config.recording.kinds)
    if config.rejection.rules[0] == "clusters" and not searchable:
        raise UsageError(
            "the rule clusters needs scoring.by_class, and features or ranked in recording.kinds ="
            f" {config.recording.kinds}; --config.rejection.rules=alpha needs neither"
        )
    return config


def _choose_network(request: ScanRequest, config: ConfigDict, examples: TrainingSet) -> Examples | None:
    """Sets the network: the one that was asked for, the folder's, or the largest that there is time for.

    Returns:
      The images on the devices, if they had to be put there to try networks out.
    """
    if _network_is_known(request, config):
        model = config.model
        network = Network(model.name, tuple(model.stages), model.stem_stride)
        request.progress.note(f"network  {network}, {config.recording.epochs} epochs")
        return None

    # Returned, so that they are not put there twice.
    images = place_clean(config, examples.split, request.mesh)
    sizing = Sizing(config, images, examples.image_shape, examples.num_classes, request.mesh)
    choose_network(sizing, request.minutes, request.progress)
    return images


def _network_is_known(request: ScanRequest, config: ConfigDict) -> bool:
    """Whether the network need not be chosen: it was asked for, or the folder has one, which the config is given."""
    if any(text.startswith(f"--config.{key}=") for text in request.overrides for key in _OF_THE_NETWORK):
        return True
    if not on_first((request.workdir / "config.json").is_file):
        return False

    # Another network would be another recording: a scan that goes on keeps its own, whatever the time is now.
    stored = read_config(request.workdir)
    config.model.update(name=stored.model.name, stages=stored.model.stages, stem_stride=stored.model.stem_stride)
    config.recording.epochs = stored.recording.epochs
    return True


def _record(
    trainer: Trainer,
    examples: TrainingSet,
    probe_ids: np.ndarray,
    images: Examples | None,
    seconds: dict[str, float],
) -> TrajectoryStore:
    """Records the trajectories, unless that was done before, and marks the probes, which may be others by now."""
    config = trainer.config
    split = examples.split
    recording = _recording_of(config, examples)
    folder = trainer.workdir / "trajectories"

    if on_first(lambda: recording.is_in(folder)):
        trainer.progress.note("recording  done before")
    else:
        on_first(lambda: _check_same(folder, recording.identity))
        begun = time.monotonic()
        trainer.progress.phase("recording")
        images = images or place_clean(config, split, trainer.mesh)
        is_probe = np.isin(np.arange(len(examples.names)), probe_ids)
        recording.train(trainer, images, split.labels, is_probe, folder)
        seconds["recording"] = trainer.seconds_before + time.monotonic() - begun
    trainer.finish("recording", recording.identity)

    # Probes do not change what is recorded, so that other ones need no new recording.
    store = TrajectoryStore.open(folder)

    def mark_probes() -> None:
        if not np.array_equal(store.probe_ids(), probe_ids):
            store.mark_probes(probe_ids)

    on_first(mark_probes)
    return store


def _recording_of(config: ConfigDict, examples: TrainingSet) -> Recording:
    """Returns the recording of a scan."""
    spec = spec_of(config, examples.image_shape, examples.num_classes, config.model.name)
    return Recording.of(config, spec, (config.seed, examples.split.fingerprint, "scan", asdict(spec)))


def _check_same(folder: Path, identity: str) -> None:
    """Refuses to write over the recording of other images, or of another version."""
    try:
        store = TrajectoryStore.open(folder)
    except DataError:
        return
    if store.recording_hash != identity:
        raise UsageError(f"{folder} was recorded of other images, or by another version: choose another --workdir")
