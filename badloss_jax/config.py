"""Configs: loading, overriding, checking, hashing; `settings` has every key with its default and its range.

A config file is Python with one function, `get_config(variant="")`, that starts from `default_config()` and sets what
its data set needs. Imports the registries whose names a config may have, and what comes before these.
"""

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from badloss_jax.attacks import ATTACKS
from badloss_jax.core.errors import UsageError, listed, nearest
from badloss_jax.core.hashing import digest
from badloss_jax.data import AUGMENTATIONS, SOURCES
from badloss_jax.defenses import DEFENSES
from badloss_jax.models import MODELS
from badloss_jax.scoring import COMBINED, parts_of
from badloss_jax.settings import (
    CONTROLS,
    KINDS,
    RECORDED_KINDS,
    RULES,
    OneOf,
    Registered,
    SomeOf,
    check_variant,
    constraints,
    default_config,
    parse_rule,
)

__all__ = [  # the first three for config files
    "CONTROLS",
    "RECORDED_KINDS",
    "changed",
    "check_config",
    "check_variant",
    "config_hash",
    "default_config",
    "differences",
    "from_json",
    "load_config",
    "load_file",
    "override",
    "settled",
    "to_dict",
    "to_json",
]

# Where files lie cannot change a result: the data's and the manifest's own fingerprints are hashed in their stead.
# Nor can the way that images take to the devices, what is shown of a run, or how often it is saved on its way.
_PLACES = (
    "data.dir",
    "data.cache_dir",
    "data.input",
    "data.workers",
    "data.threads",
    "attacks.manifest",
    "report.gallery",
    "report.writers",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.stall_minutes",
)
_REGISTRIES: dict[str, Mapping[str, Any]] = {
    "attacks.ATTACKS": ATTACKS,
    "data.AUGMENTATIONS": AUGMENTATIONS,
    "data.SOURCES": SOURCES,
    "defenses.DEFENSES": DEFENSES,
    "models.MODELS": MODELS,
}


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads `FILE[:variant]`, applies `--config.group.key=value` overrides, and checks the result.

    Raises:
      UsageError: no such file or variant, an unknown key (the nearest one is named), a wrong type, an impossible value.
    """
    path, _, variant = spec.partition(":")
    config = load_file(Path(path), variant)
    try:
        config = _rebuild(config.to_dict())
    except (UsageError, TypeError) as error:
        raise UsageError(f"config file {path}: {error}") from error
    return override(config, overrides)


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Returns a checked copy of `config` with `--config.group.key=value` strings applied."""
    config = ConfigDict(config).copy_and_resolve_references()
    config.lock()
    for text in overrides:
        name, equals, _ = text.removeprefix("--").partition("=")
        if not text.startswith("--config.") or not equals:
            raise UsageError(f"{text!r} is not understood: overrides look like --config.group.key=value")
        _check_key(config, name.removeprefix("config."))
    values = flags.FlagValues()
    argv = ["badloss", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, TypeError, ValueError, AttributeError) as error:
        if len(overrides) > 1:  # find out which
            for text in overrides:
                override(config, [text])
        key, _, value = overrides[-1].removeprefix("--config.").partition("=")
        raise UsageError(f"{key} = {value!r}: expected {_kind_of(_at(config, key))}") from error
    check_config(config)
    return config


def changed(config: ConfigDict, settings: Mapping[str, Any]) -> ConfigDict:
    """Returns a checked copy of `config` with settings changed: key, such as "scoring.loss.k" -> value."""
    config = ConfigDict(config).copy_and_resolve_references()
    for key, value in settings.items():
        _check_key(config, key)
        group, _, leaf = key.rpartition(".")
        try:
            (_at(config, group) if group else config)[leaf] = value
        except TypeError as error:
            raise UsageError(f"{key} = {value!r}: expected {_kind_of(_at(config, key))}") from error
    check_config(config)
    return config.lock()


def from_json(text: str) -> ConfigDict:
    """Rebuilds a config that `to_json` wrote, against today's keys and types."""
    try:
        config = _rebuild(json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"this is not a config of this version of badloss_jax: {error}") from error
    check_config(config)
    return config


def _rebuild(stored: Any) -> ConfigDict:
    """Sets the default config's leaves one by one: unknown, missing and wrongly typed ones are errors."""
    if not isinstance(stored, Mapping):
        raise UsageError(f"a config is a group of keys, not {type(stored).__name__}")
    config, leaves = default_config(), dict(_leaves(stored))
    missing = dict(_leaves(to_dict(config))).keys() - leaves.keys()
    for key, value in leaves.items():
        _check_key(config, key)
        group, _, leaf = key.rpartition(".")
        target = _at(config, group) if group else config
        if value is None:  # which a ConfigDict takes for any type
            raise UsageError(f"{key} = None: expected {_kind_of(_at(config, key))}")
        target[leaf] = tuple(value) if isinstance(value, list) else value
    if missing:
        raise UsageError(f"config key {min(missing)!r} is missing: start from badloss_jax.config.default_config()")
    return config


def to_json(config: ConfigDict) -> str:
    """Returns what `from_json` reads."""
    return json.dumps(to_dict(config), indent=2, sort_keys=True)


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Returns plain dicts, lists, strings and numbers."""
    return json.loads(config.to_json())


def config_hash(config: ConfigDict | Mapping[str, Any]) -> str:
    """Hashes everything that can change a result, so not where the files lie; also of what `to_dict` returned."""
    return digest(settled(config))


def settled(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Returns key -> value of everything that can change a result."""
    tree = to_dict(config) if isinstance(config, ConfigDict) else config
    return {key: value for key, value in _leaves(tree) if key not in _PLACES}


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, str]:
    """Returns what differs between two configs, each as `to_dict` gives it: key -> "theirs -> ours"."""
    new, old = dict(_leaves(ours)), dict(_leaves(theirs))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key) and key not in _PLACES]
    return {key: f"{old.get(key)} -> {new.get(key)}" for key in keys}


def check_config(config: ConfigDict) -> None:
    """Raises UsageError naming the first key whose value is impossible, with what was expected."""
    _check_types(config)
    for key, constraint in constraints().items():
        group, _, rest = key.partition(".")
        if group == "attacks" and "." in rest and rest.partition(".")[0] not in config.attacks.names:
            continue  # what does not attack may be anything
        value = _at(config, key)
        if isinstance(constraint, Registered):
            several = isinstance(value, tuple)
            constraint = (SomeOf if several else OneOf)(*_REGISTRIES[constraint.registry])
        constraint.check(key, value)

    recording = config.recording
    if recording.schedule_epochs < recording.epochs:
        raise UsageError(
            f"recording.schedule_epochs = {recording.schedule_epochs}: expected a finite number of at least"
            f" {recording.epochs} (recording.epochs are its start)"
        )
    if not config.model.stages or min(config.model.stages) < 1:
        raise UsageError(f"model.stages = {config.model.stages}: expected one positive channel count a stage")

    recorded = {"loss", *recording.kinds}
    if recording.capture == "step" and "step" in recorded:
        raise UsageError("recording.kinds has 'step', which is what recording.capture = 'step' records as the loss")
    _check_kinds(config, recorded)
    _check_rules(config, recorded)
    _check_variants(config)


def _check_types(config: ConfigDict) -> None:
    """Checks what a ConfigDict does not: the elements of tuples."""
    for key, default in _leaves(to_dict(default_config())):
        if not isinstance(default, list):
            continue
        wanted = type(default[0]) if default else str
        value = _at(config, key)
        if not all(type(element) is wanted for element in value):
            raise UsageError(f"{key} = {value}: expected a tuple of {wanted.__name__}")


def _check_kinds(config: ConfigDict, recorded: set[str]) -> None:
    """Checks that whatever scores has the kinds of trajectory that it needs, and the probes."""
    if not config.scoring.kinds and not config.defenses.names and "none" not in config.controls:
        raise UsageError(
            f"scoring.kinds and defenses.names are empty: expected some of {listed(KINDS)} or of"
            f" {listed(tuple(DEFENSES))}"
        )
    epochs = config.recording.epochs
    if 0 < config.scoring.epochs < 3 or config.scoring.epochs > epochs:
        raise UsageError(f"scoring.epochs = {config.scoring.epochs}: expected 0, or 3 to recording.epochs = {epochs}")

    for kind in config.scoring.kinds:
        _check_kind(config, recorded, "scoring.kinds", kind, kind)
    for name in config.defenses.names:
        defense = DEFENSES[name]
        if defense.kind:
            _check_kind(config, recorded, "defenses.names", name, defense.kind)
        if defense.margins and not {"ranked", "logits"} & recorded:
            raise UsageError(
                f"defenses.names has {name!r}, which needs 'ranked' or 'logits' in recording.kinds ="
                f" {config.recording.kinds}"
            )


def _check_kind(config: ConfigDict, recorded: set[str], key: str, name: str, kind: str) -> None:
    """Checks that a kind of trajectory, which `key` asks for by `name`, was recorded, and that k fits the probes."""
    for part, k in parts_of(kind, config.scoring).items():
        if part not in recorded:
            raise UsageError(f"{key} has {name!r}, which needs {part!r} in recording.kinds = {config.recording.kinds}")
        if not 1 <= k < config.probes.count:
            raise UsageError(
                f"scoring.{kind}.k = {k} with probes.count = {config.probes.count}: expected 1 <= k < probes.count"
                " (a probe's own distance leaves itself out); ask for a smaller k or more probes"
            )


def _check_rules(config: ConfigDict, recorded: set[str]) -> None:
    rules = config.rejection.rules
    for text in rules:
        rule, _ = parse_rule(text, config.rejection)
        if rule == "clusters" and not recorded.intersection(COMBINED):
            raise UsageError(
                "rejection.rules has 'clusters', which needs 'features' or 'ranked' in recording.kinds ="
                f" {config.recording.kinds}"
            )
    if not rules or len(set(rules)) != len(rules):
        raise UsageError(f"rejection.rules = {rules}: expected some of {listed(RULES)}, each once")


def _check_variants(config: ConfigDict) -> None:
    """Checks that what is to be retrained without is removed by somebody."""
    rules = config.rejection.rules
    known = [f"{kind}/{rule}" for kind in config.scoring.kinds for rule in rules]
    for name in config.defenses.names:
        known += [f"{name}/{rule}" for rule in DEFENSES[name].rules(rules)]
    for variant in config.retraining.variants:
        if variant not in known:
            form = "KIND/RULE or DEFENCE/RULE" if config.defenses.names else "KIND/RULE"
            raise UsageError(f"retraining.variants has {variant!r}: expected {form}{nearest(variant, known)}")


def load_file(path: Path, variant: str) -> ConfigDict:
    """Runs a config file, or a sweep file, and returns what its `get_config` does, unchecked.

    Raises:
      UsageError: no such file or variant, or it cannot be run.
    """
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UsageError(f"config file {path} does not exist{nearest(str(path), siblings)}")
    spec = importlib.util.spec_from_file_location(f"badloss_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"config file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(variant)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
    except Exception as error:  # whatever a user's Python file can raise
        raise UsageError(f"config file {path} cannot be used: {' '.join(str(error).split())}") from error
    if not isinstance(config, ConfigDict):
        raise UsageError(f"config file {path}: get_config() returned {type(config).__name__}, expected a ConfigDict")
    return config


def _check_key(config: ConfigDict, key: str) -> None:
    node: Any = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, ConfigDict):
            raise UsageError(f"unknown config key {key!r}: {'.'.join(parts[:depth])} is a value, not a group")
        if part not in node:
            known = [name for name, _ in _leaves(to_dict(config))]
            raise UsageError(f"unknown config key {key!r}{nearest(key, known)}")
        node = node[part]
    if isinstance(node, ConfigDict):
        raise UsageError(f"config key {key!r} is a group: set one of {', '.join(f'{key}.{name}' for name in node)}")


def _at(config: ConfigDict, key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node[part]
    return node


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _kind_of(value: Any) -> str:
    names = {bool: "True or False", int: "an integer", float: "a number", tuple: "a tuple, such as \"('a', 'b')\""}
    return names.get(type(value), "a string")
