"""Sweeps: a product of attacks, defences, settings and seeds, as a sweep file lists it; `runs.sweep` runs it.

A sweep file is Python with one function, `get_config(variant="")`, that starts from `default_sweep(variant)`. In the
folder of a sweep lie:

    sweep.json       the items: what each is, and its whole config
    shared/          trajectories, networks and what defences found, named by content (see `artefacts`); or elsewhere
    items/NAME/      a run of one defence: config.json, results.json, scores.parquet, metrics.jsonl, or error.txt
    report.html, report.md, results.csv, *.png, by `badloss report --sweep`

Any number of processes can work on one sweep at a time: each item is taken by one of them.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from badloss_jax.config import changed, check_variant, config_hash, from_json, load_config, load_file, to_dict
from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import read_json, write_text
from badloss_jax.defenses import DEFENSES
from badloss_jax.settings import CONTROLS, RECORDED_KINDS

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
        return "-".join(_file_name(part) for part in parts if part)

    @property
    def key(self) -> tuple[str, str, str, int]:
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


def _file_name(text: str) -> str:
    """Returns a text with an underscore for every character that a name of a file had better not have."""
    return "".join(c if c.isalnum() or c in "_." else "_" for c in text)


@dataclass(frozen=True)
class Sweep:
    """A sweep.

    Attributes:
      title: a sentence for the report.
      axis: what the items' settings vary, or "".
      items: in the order in which they are run.
    """

    title: str
    axis: str
    items: tuple[Item, ...]


def load_sweep(
    spec: str,
    overrides: Sequence[str] = (),
    seeds: Sequence[int] = (),
    attacks: Sequence[str] = (),
    defenses: Sequence[str] = (),
) -> Sweep:
    """Loads `FILE[:variant]` and makes its items.

    Args:
      spec: the sweep file; its variant names the config that it is about.
      overrides: `--config.group.key=value`, for every item.
      seeds: in place of the file's.
      attacks, defenses: take only items with these labels or names.

    Returns:
      The sweep, with at least one item.

    Raises:
      UsageError: no such file, unknown labels or names, or an item whose config is impossible.
    """
    path, _, variant = spec.partition(":")
    sweep = load_file(Path(path), variant)
    if set(sweep) != set(default_sweep()):
        raise UsageError(f"{path} is not a sweep file: start from badloss_jax.sweep.default_sweep()")

    # A sweep file lies in a folder beside the configs that it names.
    base = load_config(str(Path(path).resolve().parents[1] / sweep.base), overrides)
    attacks_of = _only(attacks, sweep.attacks or {"all": base.attacks.names})
    rules_of = _only(defenses, _rules_of(sweep))

    items = tuple(_items(sweep, base, attacks_of, rules_of, seeds or sweep.seeds))
    if not items:
        raise UsageError(f"{path}: the sweep has no items")
    return Sweep(sweep.title, sweep.axis, items)


def _rules_of(sweep: ConfigDict) -> dict[str, list[str]]:
    """Returns defence or control -> the rules that it is compared by, in the order of the file."""
    rules: dict[str, list[str]] = {}
    for variant in sweep.defenses:
        name, _, rule = variant.partition("/")
        of_defense = rules.setdefault(name, [])
        if rule and name not in CONTROLS:
            of_defense.append(rule)

    if sweep.all_detectors:
        for name, defense in DEFENSES.items():
            if defense.recorded:
                rules.setdefault(name, [])
    return rules


def _only(wanted: Sequence[str], known: dict[str, Any]) -> dict[str, Any]:
    """Keeps what is wanted; without a wish, all."""
    strangers = set(wanted) - set(known)
    if strangers:
        raise UsageError(f"the sweep has no {min(strangers)!r}: expected some of {', '.join(known)}")
    return {name: value for name, value in known.items() if name in wanted or not wanted}


def _items(
    sweep: ConfigDict,
    base: ConfigDict,
    attacks_of: dict[str, Sequence[str]],
    rules_of: dict[str, list[str]],
    seeds: Sequence[int],
) -> Iterator[Item]:
    """Yields the items, seeds innermost: processes that work side by side then seldom wait for the same artefact."""
    settings_of = sweep.settings or {"": {}}
    product = itertools.product(rules_of.items(), attacks_of.items(), settings_of.items(), seeds)
    for (defense, rules), (attacks, names), (setting, settings), seed in product:
        changes = sweep.shared_settings | {"attacks.names": tuple(names), "seed": seed} | settings
        config = _item_config(base, defense, rules, changes, sweep.retrain)
        yield Item(attacks, defense, tuple(rules), setting, seed, to_dict(config))


def _item_config(
    base: ConfigDict, defense: str, rules: Sequence[str], changes: dict[str, Any], retrain: bool
) -> ConfigDict:
    """Returns the base with one defence, or control, in place of all that it compares, and with the changes."""
    # A defence's own rule is no rule of the config; the others come before the base's, each once.
    known = [rule for rule in rules if rule != "own"]
    settings: dict[str, Any] = {
        "scoring.kinds": (),
        "rejection.rules": tuple(dict.fromkeys([*known, *base.rejection.rules])),
    }
    if defense in CONTROLS:
        settings |= {
            "defenses.names": (),
            "controls": tuple(dict.fromkeys(("none", defense))),
            "retraining.variants": (),
            "retraining.enabled": bool(retrain),
        }
    else:
        variants = [f"{defense}/{rule}" for rule in rules] if retrain else []
        settings |= {
            "defenses.names": (defense,),
            "controls": (),
            "retraining.variants": tuple(variants),
            "retraining.enabled": bool(retrain and (rules or _cleanses(defense))),
        }
    return changed(base, settings | changes)


def _cleanses(defense: str) -> bool:
    return defense in DEFENSES and DEFENSES[defense].cleanses


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Writes sweep.json, what the report is made from; items of an earlier call that are not in this one are kept.

    Args:
      folder: of the sweep.
      sweep: of which an item replaces the earlier one that stands where it does.

    Raises:
      DataError: an earlier sweep.json is damaged, or the file cannot be written.
    """
    items = {item.key: item for item in sweep.items}
    if (folder / "sweep.json").is_file():
        earlier, _ = read_sweep(folder)
        for item in earlier.items:
            items.setdefault(item.key, item)

    entries = [asdict(item) | {"name": item.name} for item in items.values()]
    content = {"format": _FORMAT, "title": sweep.title, "axis": sweep.axis, "items": entries}
    write_text(folder / "sweep.json", json.dumps(content, indent=1))


def read_sweep(folder: Path) -> tuple[Sweep, list[str]]:
    """Reads sweep.json: the sweep, and the names of its items' folders.

    Raises:
      UsageError: there is none.
      DataError: it is damaged.
    """
    path = folder / "sweep.json"
    try:
        content = read_json(path)
        if content["format"] != _FORMAT:
            raise DataError(f"{path} is damaged: its format is {content['format']!r}, expected {_FORMAT!r}")
        names = [str(entry.pop("name")) for entry in content["items"]]
        items = [Item(**(entry | {"rules": tuple(entry["rules"])})) for entry in content["items"]]
    except FileNotFoundError as error:
        raise UsageError(f"{folder} holds no sweep (no sweep.json in it)") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged: {error}") from error

    # The file may come from anybody, and these names become paths.
    if any(Path(name).name != name or name in ("", ".", "..") for name in names):
        raise DataError(f"{path} is damaged: an item's name leads out of the folder")
    return Sweep(str(content["title"]), str(content["axis"]), tuple(items)), names


def state_of(folder: Path, item: Item) -> str:
    """Says how an item stands.

    Args:
      folder: of the sweep.
      item: of it.

    Returns:
      "done", "failed" or "open".
    """
    workdir = folder / "items" / item.name
    try:
        results = read_json(workdir / "results.json")
        if results.get("config_hash") == config_hash(item.config):
            return "done"
    except (FileNotFoundError, DataError):
        pass  # what cannot be read is not done

    if (workdir / "error.txt").is_file():
        return "failed"
    return "open"
