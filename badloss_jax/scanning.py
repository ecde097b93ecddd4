"""Scan a training set of one's own: train a network on it, watch how each image is learnt, say what stands out.

Nothing is simulated and nothing retrained. In OUT lie:

    report.html                        look at this
    remove.txt, keep.txt               a path a line, relative to the data's folder (of arrays and TFDS: row numbers)
    suspects.parquet, suspects.csv     what lies further out than nearly all probes, the furthest first
    left_out.txt                       what could not be read, and why
    scan.json                          the verdict, every figure, settings, versions
    config.json, trajectories/, ...    as of a run (see `badloss_jax.workdir`)
"""

import json
import os
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int
from ml_collections import ConfigDict

from badloss_jax.artefacts import Artefacts
from badloss_jax.attacks.poisoning import unpoisoned
from badloss_jax.config import default_config, override, parse_rule, settled, to_dict
from badloss_jax.data.arrays import write_arrays_without
from badloss_jax.data.training_set import TrainingSet, list_folder, read_arrays, read_folder, read_tfds, suggested_size
from badloss_jax.defenses.badloss import suspicions
from badloss_jax.errors import DataError, UsageError
from badloss_jax.files import printable, write_lines, write_text
from badloss_jax.progress import Progress
from badloss_jax.report.plots import LOW_LOSS
from badloss_jax.report.results import environment
from badloss_jax.report.scan import Suspects, render_scan, write_suspects
from badloss_jax.report.writers import open_writers
from badloss_jax.scoring import (
    LEVELS,
    PoisonedShare,
    common_excess,
    conformal_p_values,
    detectable_share,
    first_seen_as,
    nearest_probes,
    no_poison_p_value,
    poisoned_share,
    reject,
    stranger_p_values,
    unsupported,
)
from badloss_jax.seeding import generator
from badloss_jax.trainer import Recording, Trainer, check_devices, place_examples, spec_of
from badloss_jax.training.mesh import make_mesh, round_up
from badloss_jax.training.preemption import Preemption
from badloss_jax.trajectories.store import TrajectoryStore
from badloss_jax.workdir import claim, read_resumes

SCHEMA_VERSION = 1
REASONS = ("learned too early", "learned too late", "unlike its class")
_CERTAIN = 0.005  # a verdict on clean data errs this often, overall, and as often by some class
_HEAVIER = 2  # times as many again of a clean class may lie far out as of all: some have heavier tails
_NAMED = 0.05  # where something stands out overall, a class is named wrongly so often
_NEAREST = 3  # probes that are shown beside a suspect
_FEWEST = 10  # probes
# Settings of a run that mean nothing here, at their only value.
_UNUSED = {"data.train_examples": 0, "data.test_examples": 0, "data.pad": 0, "data.class_names": [],
           "attacks.names": [], "defenses.names": [], "retraining.enabled": False}  # fmt: skip
_ASIDE = ".badloss-copy"  # a file on its way; hidden, so that nobody takes it for an image


@dataclass(frozen=True)
class Verdict:
    """What the distances say.

    Attributes:
      p_values: [N], of all examples; those of probes mean nothing.
      removed: [N]; nothing, where nothing stands out.
      stands_out: whether more lies far out than in clean data.
      share: of the examples that are no probes, how many look poisoned.
      no_poison: p-value of the hypothesis that nothing is poisoned.
      classes: of each class its share, that p-value (times K), and whether it is affected.
    """

    p_values: Float[np.ndarray, "N"]
    removed: Bool[np.ndarray, "N"]
    stands_out: bool
    share: PoisonedShare
    no_poison: float
    classes: list[dict[str, Any]]


def judge(
    scores: Float[np.ndarray, "N"], probe_scores: Float[np.ndarray, "P"], labels: Int[np.ndarray, "N"],
    is_probe: Bool[np.ndarray, "N"], num_classes: int, rule: str, level: float,
    seen_as: Int[np.ndarray, "N"] | None = None,
) -> Verdict:  # fmt: skip
    """Says whether anything stands out, in which classes, how much, and what to remove.

    On clean data whose classes are alike, something stands out in at most 1 % of all scans; a class alone makes it so
    only if three times as many of its images lie far out as should, and more than chance explains. Once it does for all
    images together, classes are named by the distances of their images, or by what these looked like at first; what
    they have in common with three quarters of the classes is put down to the calibration.

    Args:
      scores: [N], higher is more suspicious, on a scale that classes share.
      probe_scores: [P], of the probes, leave-one-out.
      labels: int [N].
      is_probe: [N].
      num_classes: K.
      rule, level: of `badloss_jax.scoring.reject`.
      seen_as: int [N], what each example looked like at first (`first_seen_as`), if it is known.
    """
    count, others = len(probe_scores), ~is_probe
    p_values = conformal_p_values(scores, probe_scores)
    no_poison = no_poison_p_value(p_values[others], count)
    excess = common_excess(p_values[others], labels[others], count)
    classes, level_of_class, strange = [], _CERTAIN, np.ones(num_classes)
    if no_poison >= _CERTAIN:  # a class alone has to convince
        excess += _HEAVIER * np.array(LEVELS)
    else:
        level_of_class = _NAMED
        if seen_as is not None:
            strange = stranger_p_values(labels, seen_as, is_probe, num_classes)
    for label in range(num_classes):
        chosen = p_values[others & (labels == label)]
        if len(chosen):
            certain = no_poison_p_value(chosen, count, excess)
            if seen_as is not None and no_poison < _CERTAIN:
                certain = 2 * min(certain, float(strange[label]))
            certain = min(1.0, num_classes * certain)
            share = poisoned_share(chosen, count)
        else:
            certain, share = 1.0, PoisonedShare(0.0, 0.0, 0.0)
        classes.append({"images": int((labels == label).sum()), "probes": int(is_probe[labels == label].sum()),
                        "share": asdict(share), "no_poison_p_value": certain,
                        "affected": certain < level_of_class})  # fmt: skip
    stands_out = no_poison < _CERTAIN or any(entry["affected"] for entry in classes)
    removed = np.zeros(len(scores), bool)
    if stands_out:
        removed = reject(rule, level, scores, p_values, is_probe)
    share = poisoned_share(p_values[others], count)
    return Verdict(p_values, removed, stands_out, share, no_poison, classes)


def suggest(
    config: ConfigDict, num_examples: int, image_shape: tuple[int, int, int], num_classes: int, num_probes: int
) -> None:  # fmt: skip
    """Sets what a scan needs by the size of the data: a small network, and smaller batches and more epochs of less.

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
    config.rejection.rules = ("alpha",)


def scan(
    data: str, probes: str, workdir: Path, overrides: Sequence[str] = (), *, follow_links: bool = False,
    progress: Progress | None = None, mesh: Mesh | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Scans a training set, or goes on with what an interrupted scan left in the folder.

    Args:
      data: a folder with <class>/* or train/<class>/*; an .npz file with x_train and y_train; or tfds:NAME, a folder
        of TensorFlow Datasets (or a name below $TFDS_DATA_DIR).
      probes: what is known to be clean: a text file of paths relative to `data` (of arrays: row numbers), one a line; a
        folder with <class>/* of trusted images; or how many to draw at random and to trust without looking.
      workdir: the folder to write to; the data's is never written.
      overrides: `--config.KEY=VALUE`, over `suggested_config`.
      follow_links: read files that links lead to outside of the data's folder, too.
      progress: tells how far it is; silent by default.
      mesh: of the devices, all by default.

    Returns:
      What scan.json holds.

    Raises:
      UsageError, DataError, NonFiniteLossError: see `badloss_jax.errors`; what was recorded is kept.
      PreemptedError: it was told to stop; the same call goes on.
    """
    started, progress, mesh = time.monotonic(), progress or Progress(None), mesh or make_mesh()
    guess = default_config()  # refuses wrong settings before anything is read
    suggest(guess, 1_000, (32, 32, 3), 10, 1_000_000)
    override(guess, overrides)
    examples, config = _read(data, probes, workdir, overrides, follow_links)
    split, count, shape = examples.split, len(examples.names), examples.image_shape
    probe_ids = choose_probes(probes, examples, config.seed)
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
    is_probe = np.isin(np.arange(count), probe_ids)
    _tell(examples, probes, is_probe, config, progress)
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
            placed = place_examples(config, split, unpoisoned(split.images, split.labels), mesh)
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


def choose_probes(probes: str, examples: TrainingSet, seed: int) -> Int[np.ndarray, "P"]:
    """Returns the ids of the probes, ascending; see `scan` for how they are given.

    Raises:
      UsageError: there is no such file, it names something twice or what the training set does not have, or the probes
        are fewer than 10 or more than half of all.
    """
    count, path = len(examples.names), Path(probes).expanduser()
    if examples.own < count:  # images of a folder beside the training set
        ids = np.arange(examples.own, count)
    elif path.is_dir() and not examples.root:
        raise UsageError(f"--probes {path} is a folder, and the training set has no paths: give a text file of row"
                         " numbers, or how many to draw and to trust")  # fmt: skip
    elif path.is_dir():
        inside = path.resolve().relative_to(examples.root.resolve()).as_posix() + "/"  # type: ignore[union-attr]
        ids = np.array([number for number, name in enumerate(examples.names) if name.startswith(inside)], np.int64)
    elif probes.isascii() and probes.isdigit():
        if not int(probes) <= count / 2:
            raise UsageError(f"--probes {probes} of {count:,} images: expected half of them at most")
        ids = np.sort(generator(seed, "probes").choice(count, int(probes), replace=False))
    else:
        ids = _named_probes(path, examples)
    if not _FEWEST <= len(ids) <= count / 2:
        raise UsageError(f"--probes {probes}: {len(ids)} of {count:,} images are probes, expected at least {_FEWEST},"
                         " and half of them at most; 250 are usual")  # fmt: skip
    return ids


def _named_probes(path: Path, examples: TrainingSet) -> Int[np.ndarray, "P"]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"--probes {path} cannot be read ({error}): give a text file of trusted paths, a folder, or"
                         " how many images to draw and to trust") from error  # fmt: skip
    place = {name: number for number, name in enumerate(examples.names)}
    ids: dict[int, int] = {}
    for number, line in enumerate(lines, start=1):
        name = os.fsdecode(line).strip("\r\n").removeprefix("./")
        if not name.strip():
            continue
        if name not in place:
            why = f", which was left out: {examples.left_out[name]}" if name in examples.left_out else ""
            what = "a path relative to the data's folder" if examples.root else "a row number"
            raise UsageError(f"--probes {path}, line {number}: {printable(name)!r} is no image of the training set"
                             f"{why}; expected {what}")  # fmt: skip
        if place[name] in ids:
            raise UsageError(
                f"--probes {path}, line {number}: {printable(name)!r} stands in line {ids[place[name]]} too"
            )
        ids[place[name]] = number
    return np.array(sorted(ids), np.int64)


def _tell(
    examples: TrainingSet, probes: str, is_probe: Bool[np.ndarray, "N"], config: ConfigDict, progress: Progress
) -> None:  # fmt: skip
    """Says in a few lines what is about to be done, and what about it calls for caution."""
    height, width, channels = examples.image_shape
    model, recording = config.model, config.recording
    progress.note(
        f"{len(examples.names):,} images of {height} x {width} x {channels} in {examples.num_classes} classes,"
        f" {is_probe.sum()} of them probes; {model.name} {tuple(model.stages)}, {recording.epochs} epochs in batches of"
        f" {recording.batch_size} (--config.KEY=VALUE changes it)"
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
    if told := unsupported(*_rule(config), int(is_probe.sum())):
        warnings.warn(f"--config.rejection.{told}", stacklevel=2)


def _rule(config: ConfigDict) -> tuple[str, float]:
    rule, level = parse_rule(config.rejection.rules[0])
    return rule, config.rejection[rule] if level is None else level


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
    found, epochs = suspicions(store, probe_ids, config.scoring, (kind,), mesh)
    scores, probe_scores = found[kind].scores, found[kind].probe_scores
    assert probe_scores is not None
    seen_as = None
    if "features" in store.layout:
        seen_as = first_seen_as(store.rows("features", epochs[:1]), labels)
    verdict = judge(scores, probe_scores, labels, is_probe, examples.num_classes, *_rule(config), seen_as)
    flagged = verdict.removed | (~is_probe & (verdict.p_values <= config.rejection.alpha))
    ids = np.flatnonzero(flagged)
    ids = ids[np.argsort(-scores[ids], kind="stable")]
    seen = store.rows("features" if "features" in store.layout else kind, epochs)
    losses = store.read("loss", epochs)
    suspects = Suspects(
        ids, [examples.names[number] for number in ids], labels[ids], scores[ids], verdict.p_values[ids],
        probe_ids[nearest_probes(seen[ids], seen[probe_ids], _NEAREST)], _reasons(losses, ids, probe_ids),
        verdict.removed[ids], None if seen_as is None else seen_as[ids],
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
        "share": asdict(verdict.share),
        "no_poison_p_value": verdict.no_poison,
        "detectable_share": detectable_share(len(probe_ids), _CERTAIN),
        "classes": [{"name": printable(name)} | entry
                    for name, entry in zip(examples.class_names, verdict.classes, strict=True)],
        "epochs_kept": epochs.tolist(),
        "config": to_dict(config),
        "environment": environment(),
    }  # fmt: skip
    write_suspects(workdir, suspects, examples)
    kept = ~verdict.removed
    kept[examples.own :] = False
    for name, rows in (("remove.txt", verdict.removed), ("keep.txt", kept)):
        write_lines(workdir / name, [examples.names[number] for number in np.flatnonzero(rows)])
    left_out = [f"{name}\t{reason}" for name, reason in examples.left_out.items()]
    write_lines(workdir / "left_out.txt", [line.replace("\n", "\\n").replace("\r", "\\r") for line in left_out])
    write_text(workdir / "report.html", render_scan(results, suspects, examples, losses, scores, is_probe))
    return results


def check_target(data: str, workdir: Path, target: Path) -> None:
    """Raises UsageError if a cleaned copy of the training set cannot lie there, before a scan takes its time."""
    source = Path(data).expanduser()
    if data.startswith("tfds:") or (source.suffix == ".npz") != (target.suffix == ".npz"):
        raise UsageError(f"--apply {target} for --data {data}: a folder of images becomes a folder, an .npz file"
                         " another .npz file; of TFDS, leave out the rows of remove.txt when reading it")  # fmt: skip
    if source.suffix == ".npz":
        if target.exists():
            raise UsageError(f"--apply {target} exists: choose another file")
        return
    root, end, out = source.resolve(), target.resolve(), workdir.resolve()
    if end.is_relative_to(root) or root.is_relative_to(end) or end.is_relative_to(out) or out.is_relative_to(end):
        raise UsageError(f"--apply {target} lies in --data {data} or --workdir {workdir}, or one of them in it: choose"
                         " another folder")  # fmt: skip


def write_cleaned(data: str, workdir: Path, target: Path, links: bool = False, progress: Progress | None = None) -> int:
    """Makes a copy of the training set without what a scan removed; a test set is not copied.

    Args:
      data: that was scanned: a folder of images, or an .npz file.
      workdir: of the scan.
      target: a new or empty folder, or what an interrupted call left there; of arrays, an .npz file.
      links: make links to the files of the training set, in place of copies.
      progress: tells how far it is; silent by default.

    Returns:
      How many examples it has.

    Raises:
      UsageError: the scan is not finished, or the target lies in the data's folder or holds something else.
      DataError: a file cannot be read or written.
    """
    check_target(data, workdir, target)
    progress, source, lists = progress or Progress(None), Path(data).expanduser(), {}
    for name in ("keep.txt", "remove.txt"):
        try:
            lists[name] = [os.fsdecode(line) for line in (workdir / name).read_bytes().splitlines()]
        except OSError as error:
            raise UsageError(f"{workdir / name} cannot be read ({error}): finish the scan first") from error
    keep = lists["keep.txt"]
    if source.suffix == ".npz":
        write_arrays_without(source, target, np.array([int(row) for row in lists["remove.txt"]], np.int64))
        return len(keep)
    root = source.resolve()
    wanted = {*keep, *(str(Path(name).with_name(_ASIDE)) for name in keep)}
    found = (path for path in target.rglob("*") if path.is_symlink() or not path.is_dir())
    strangers = [path for path in found if path.relative_to(target).as_posix() not in wanted]
    if strangers:
        raise UsageError(f"--apply {target} holds other files, such as {strangers[0]}: choose a new or empty folder")
    progress.phase("applying")
    progress.begin(len(keep))
    for name in keep:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{workdir / 'keep.txt'} has the path {printable(name)!r}, which leads out of the folder")
        old, new = root / name, target / name
        try:
            new.parent.mkdir(parents=True, exist_ok=True)
            if links and not new.is_symlink():
                new.unlink(missing_ok=True)
                new.symlink_to(old)
            elif not links and (new.is_symlink() or not new.is_file()):
                aside = new.with_name(_ASIDE)
                shutil.copyfile(old, aside)
                aside.replace(new)
        except OSError as error:
            raise DataError(f"{new} cannot be made of {old}: {error}") from error
        progress.advance(1, "files")
        progress.say(f"{target}")
    progress.end()
    return len(keep)


def _reasons(
    losses: Float[np.ndarray, "N E"], ids: Int[np.ndarray, "M"], probe_ids: Int[np.ndarray, "P"]
) -> list[str]:  # fmt: skip
    """Says of each suspect whether its mean log loss lies among the lowest or highest twentieth of the probes'."""
    means = np.log(np.maximum(losses, LOW_LOSS)).mean(axis=1)
    low, high = np.quantile(means[probe_ids], [0.05, 0.95])
    early, late, unlike = REASONS
    return [early if mean < low else late if mean > high else unlike for mean in means[ids]]


def sentence(verdict: Verdict, class_names: Sequence[str], num_probes: int) -> str:
    """Returns the verdict in a sentence or two."""
    if not verdict.stands_out:
        floor = detectable_share(num_probes, _CERTAIN)
        return (f"Nothing stands out: no more images lie far from the {num_probes} probes than clean ones would. Poison"
                f" of less than about {_percent(floor)} of the images could have gone unnoticed.")  # fmt: skip
    share, worst = verdict.share, [number for number, entry in enumerate(verdict.classes) if entry["affected"]]
    worst.sort(key=lambda number: -verdict.classes[number]["share"]["estimate"])
    text = (f"About {_percent(share.estimate)} of the images look poisoned ({_percent(share.low)} to"
            f" {_percent(share.high)})")  # fmt: skip
    if not worst:
        return f"{text}; no class in particular."
    names = [printable(class_names[number]) for number in worst]
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    if len(names) > 6:
        listed = f"{len(names)} of {len(class_names)} classes"
    return f"{text}; {listed} {'is' if len(names) == 1 else 'are'} most affected."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if 0.0005 < share < 0.02 else f"{100 * share:.0f} %"
