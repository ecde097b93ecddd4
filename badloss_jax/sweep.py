"""Sweeps: a product of attacks, defences, settings and seeds, run item by item over artefacts that all share.

A sweep file is Python with one function, `get_config(variant="")`, that starts from `default_sweep(variant)`. In the
folder of a sweep lie:

    sweep.json       the items: what each is, and its whole config
    shared/          trajectories, networks and what defences found, named by content (see `artefacts`); or elsewhere
    items/NAME/      a run of one defence: config.json, results.json, scores.parquet, metrics.jsonl, or error.txt
    report.html, report.md, results.csv, *.png, by `badloss report --sweep`

Any number of processes can work on one sweep at a time: each item is taken by one of them.
"""

import json
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from badloss_jax.config import (
    CONTROLS,
    RECORDED_KINDS,
    changed,
    check_variant,
    config_hash,
    from_json,
    load_config,
    load_file,
    to_dict,
)
from badloss_jax.errors import BadlossError, BusyError, DataError, PreemptedError, UsageError
from badloss_jax.experiment import run_experiment
from badloss_jax.files import locked, read_json, write_text
from badloss_jax.progress import Progress
from badloss_jax.training.mesh import make_mesh

_FORMAT = "badloss_jax.sweep/1"
BASES = {
    "": "fashion_mnist.py:quick",
    "digits": "digits.py",
    "cifar10": "cifar10.py:quick",
    "gtsrb": "gtsrb.py:third",
}


def default_sweep(variant: str = "") -> ConfigDict:
    """Returns every key of a sweep at its default; the variant names the config that it is about, one of `BASES`."""
    check_variant(variant, tuple(BASES))
    sweep = ConfigDict(convert_dict=False)  # what has labels as keys stays a dict
    sweep.base = BASES[variant]  # a config file, beside the folder of the sweep file, and its variant
    sweep.title = ""  # a sentence for the report
    sweep.seeds = (0, 1, 2)
    sweep.defenses = ("none",)  # NAME/RULE, the name of a defence that trains a network itself, or a control
    sweep.retrain = True  # False: detect only
    sweep.all_detectors = False  # score by every defence that needs the recorded trajectories alone, too
    # Of all items: key of a config -> value. One recording with every kind of trajectory serves all sweeps.
    sweep.shared_settings = {"recording.kinds": RECORDED_KINDS}
    sweep.attacks = {}  # label -> the attacks' names; none: those of the config, called "all"
    sweep.axis = ""  # what the settings below vary
    sweep.settings = {}  # label on the axis -> {key of a config: value}
    return sweep.lock()


@dataclass(frozen=True)
class Item:
    """One run of a sweep: a defence, with one or several rules, against some attacks, with one seed and one setting.

    Attributes:
      attacks: label of the attacks.
      defense: its name, or a control's.
      rules: those that are reported; none of a control, or of a defence that trains a network itself.
      setting: label on the sweep's axis, or "".
      seed: of the run.
      config: of the run.
    """

    attacks: str
    defense: str
    rules: tuple[str, ...]
    setting: str
    seed: int
    config: dict[str, Any]

    @cached_property
    def name(self) -> str:
        """Names its folder, uniquely."""
        parts = [self.attacks, self.defense, self.setting, f"seed{self.seed}", config_hash(self.config)[:8]]
        return "-".join("".join(c if c.isalnum() or c in "_." else "_" for c in part) for part in parts if part)

    @property
    def place(self) -> tuple[str, str, str, int]:
        """Says where in the product it stands: two with the same cannot be in one sweep."""
        return self.attacks, self.defense, self.setting, self.seed

    @property
    def title(self) -> str:
        """Says what it is, for people."""
        setting = f" {self.setting}" if self.setting else ""
        return f"{self.defense} against {self.attacks}{setting}, seed {self.seed}"

    def as_config(self) -> ConfigDict:
        """Returns its config."""
        return from_json(json.dumps(self.config))


@dataclass(frozen=True)
class Sweep:
    """A sweep with its items, in the order in which they are run."""

    title: str
    axis: str
    items: tuple[Item, ...]


def load_sweep(
    spec: str, overrides: Sequence[str] = (), seeds: Sequence[int] = (), attacks: Sequence[str] = (),
    defenses: Sequence[str] = (),
) -> Sweep:  # fmt: skip
    """Loads `FILE[:variant]` and makes its items.

    Args:
      spec: the sweep file; its variant names the config that it is about.
      overrides: `--config.group.key=value`, for every item.
      seeds: in place of the file's.
      attacks, defenses: take only items with these labels or names.

    Raises:
      UsageError: no such file, unknown labels or names, or an item whose config is impossible.
    """
    path, _, variant = spec.partition(":")
    given = load_file(Path(path), variant)
    if set(given) != set(default_sweep()):
        raise UsageError(f"{path} is not a sweep file: start from badloss_jax.sweep.default_sweep()")
    base = load_config(str(Path(path).resolve().parents[1] / given.base), overrides)
    items = tuple(_items(given, base, seeds or given.seeds, attacks, defenses))
    if not items:
        raise UsageError(f"{path}: the sweep has no items")
    return Sweep(given.title, given.axis, items)


def _items(
    sweep: ConfigDict, base: ConfigDict, seeds: Sequence[int], only_attacks: Sequence[str], only_defenses: Sequence[str]
) -> Iterator[Item]:
    """Yields the items, seeds innermost: processes that work side by side then seldom wait for the same artefact."""
    settings = sweep.settings or {"": {}}
    attacks = _only(only_attacks, sweep.attacks or {"all": base.attacks.names})
    rules: dict[str, list[str]] = {}
    for variant in sweep.defenses:
        name, _, rule = variant.partition("/")
        rules.setdefault(name, []).extend([rule] if rule and name not in CONTROLS else [])
    if sweep.all_detectors:
        from badloss_jax.defenses import DEFENSES

        free = (name for name, defense in DEFENSES.items() if defense.recorded)
        rules |= {name: [] for name in free if name not in rules}
    rules = _only(only_defenses, rules)
    for name, of_defense in rules.items():
        for attack_label, names in attacks.items():
            for label, chosen in settings.items():
                for seed in seeds:
                    changes = sweep.shared_settings | {"attacks.names": tuple(names), "seed": seed} | chosen
                    config = _item_config(base, name, of_defense, changes, sweep.retrain)
                    yield Item(attack_label, name, tuple(of_defense), label, seed, to_dict(config))


def _only(wanted: Sequence[str], known: dict[str, Any]) -> dict[str, Any]:
    """Keeps what is wanted; without a wish, all."""
    if strangers := set(wanted) - set(known):
        raise UsageError(f"the sweep has no {min(strangers)!r}: expected some of {', '.join(known)}")
    return {name: value for name, value in known.items() if name in wanted or not wanted}


def _item_config(
    base: ConfigDict, defense: str, rules: Sequence[str], changes: dict[str, Any], retrain: bool
) -> ConfigDict:
    """Returns the base with one defence, or control, in place of all that it compares, and with the changes."""
    control = defense in CONTROLS
    known = [rule for rule in rules if rule != "own"]
    settings = {
        "scoring.kinds": (),
        "defenses.names": () if control else (defense,),
        "controls": tuple(dict.fromkeys(("none", defense))) if control else (),
        "rejection.rules": tuple(dict.fromkeys([*known, *base.rejection.rules])),
        "retraining.variants": tuple(f"{defense}/{rule}" for rule in rules) if retrain and not control else (),
        "retraining.enabled": bool(retrain and (control or rules or _cleanses(defense))),
    }
    return changed(base, settings | changes)


def _cleanses(defense: str) -> bool:
    from badloss_jax.defenses import DEFENSES

    return defense in DEFENSES and DEFENSES[defense].cleanses


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Writes sweep.json, what the report is made from; items of an earlier call that are not in this one are kept."""
    known = read_sweep(folder)[0].items if (folder / "sweep.json").is_file() else ()
    by_place = {item.place: item for item in sweep.items}
    by_place |= {item.place: item for item in known if item.place not in by_place}
    items = [asdict(item) | {"name": item.name} for item in by_place.values()]
    about = {"format": _FORMAT, "title": sweep.title, "axis": sweep.axis, "items": items}
    write_text(folder / "sweep.json", json.dumps(about, indent=1))


def read_sweep(folder: Path) -> tuple[Sweep, list[str]]:
    """Reads sweep.json: the sweep, and the names of its items' folders.

    Raises:
      UsageError: there is none.
      DataError: it is damaged.
    """
    path = folder / "sweep.json"
    try:
        about = read_json(path)
        if about["format"] != _FORMAT:
            raise DataError(f"{path} is damaged: its format is {about['format']!r}, expected {_FORMAT!r}")
        names = [str(item.pop("name")) for item in about["items"]]
        items = [Item(**(item | {"rules": tuple(item["rules"])})) for item in about["items"]]
    except FileNotFoundError as error:
        raise UsageError(f"{folder} holds no sweep (no sweep.json in it)") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    if any(Path(name).name != name or name in ("", ".", "..") for name in names):
        raise DataError(f"{path} is damaged: an item's name leads out of the folder")
    return Sweep(str(about["title"]), str(about["axis"]), tuple(items)), names


def state_of(folder: Path, item: Item) -> str:
    """Says how an item stands: "done", "failed" or "open"."""
    try:
        results = read_json(folder / "items" / item.name / "results.json")
        if results.get("config_hash") == config_hash(item.config):
            return "done"
    except (FileNotFoundError, DataError):
        pass
    return "failed" if (folder / "items" / item.name / "error.txt").is_file() else "open"


def run_sweep(
    sweep: Sweep, folder: Path, chosen: Sequence[int] | None = None, progress: Progress | None = None,
    mesh: Mesh | None = None, shared: Path | None = None,
) -> dict[str, str]:  # fmt: skip
    """Runs the items that are not done; one that fails does not stop the others.

    Args:
      sweep: see `load_sweep`.
      folder: of the sweep, new or its own.
      chosen: numbers of the items to run, by default all.
      progress: is told how far it is.
      mesh: of the devices, all by default.
      shared: folder of the artefacts, `folder / "shared"` by default; several sweeps can have the same.

    Returns:
      What failed: name of the item -> the error, in a line.

    Raises:
      PreemptedError: the sweep is to stop; the same command goes on.
      UsageError: there is no such item, or the folder holds something else.
    """
    progress, mesh = progress or Progress(None), mesh or make_mesh()
    numbers = list(range(len(sweep.items))) if chosen is None else list(chosen)
    for number in numbers:
        if not 0 <= number < len(sweep.items):
            raise UsageError(f"there is no item {number}: the sweep has {len(sweep.items)}, from 0")
    # Hidden files are what another process begins with that starts the same sweep at this moment.
    others = folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir())
    if others and not (folder / "sweep.json").is_file():
        raise UsageError(f"--workdir {folder} holds other files and no sweep: choose an empty or a new folder")
    with locked(folder, lambda holder: None):
        write_sweep(folder, sweep)
    left, failed = [sweep.items[number] for number in numbers], dict[str, str]()
    clock, wait = _Clock(len(left), progress), False
    while left:
        busy = []
        for item in left:
            try:
                error = _run_item(item, folder, shared or folder / "shared", progress, mesh, clock, wait)
                failed |= {item.name: error} if error else {}
            except BusyError:
                busy.append(item)
        wait = len(busy) == len(left)  # other items first, while another process makes what these need
        left = busy
    return failed


class _Clock:
    """Counts items, and tells how long the rest will take at the pace of those that were run so far."""

    def __init__(self, total: int, progress: Progress):
        self._total, self._progress = total, progress
        self._seen = self._run = 0
        self._started = time.monotonic()

    def begin(self, title: str) -> None:
        left = ""
        if self._run:
            seconds = (time.monotonic() - self._started) / self._run * (self._total - self._seen)
            left = f"  ETA {seconds // 3600:.0f}:{seconds // 60 % 60:02.0f}:{seconds % 60:02.0f}"
        self._progress.note(f"== item {self._seen + 1} of {self._total}: {title}{left}")

    def end(self, ran: bool) -> None:
        self._seen += 1
        self._run += ran


def _run_item(
    item: Item, folder: Path, shared: Path, progress: Progress, mesh: Mesh, clock: _Clock, wait: bool
) -> str | None:
    """Runs an item unless it is done; returns what went wrong.

    Raises:
      BusyError: another process is at work on it, or on what it needs, and is not to be waited for.
    """

    def told(holder: str) -> None:
        progress.note(f"waiting for process {holder}, which is at work on: {item.title}")

    if state_of(folder, item) == "done":
        clock.end(ran=False)
        return None
    with locked(folder / "taken" / item.name, told if wait else None):
        if state_of(folder, item) == "done":  # by the process that was waited for
            clock.end(ran=False)
            return None
        clock.begin(item.title)
        error = _attempt(item, folder, shared, progress, mesh, wait)
        clock.end(ran=True)
        return error


def _attempt(item: Item, folder: Path, shared: Path, progress: Progress, mesh: Mesh, wait: bool) -> str | None:
    place = folder / "items" / item.name
    (place / "error.txt").unlink(missing_ok=True)
    try:
        run_experiment(item.as_config(), place, progress, mesh, shared=shared, wait=wait)
        return None
    except (PreemptedError, BusyError):
        raise
    except Exception as error:  # whatever it is, the other items do not depend on it
        known = isinstance(error, (BadlossError, OSError))
        told = f"{error}" if known else f"{type(error).__name__}: {error}"
        write_text(place / "error.txt", told + "\n" if known else traceback.format_exc())
        progress.note(f"   failed: {told}")
        return told
