"""Configs: loading, overriding, checking, hashing; `settings` has every key with its default.

A config file is Python with one function, `get_config(variant="")`, that starts from `default_config()` and sets what
its data set needs.
"""

import difflib
import hashlib
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from badloss_jax.errors import UsageError
from badloss_jax.settings import CONTROLS, KINDS, RECORDED_KINDS, RULES, WRITERS, default_config

# Where files lie cannot change a result: the data's and the manifest's own fingerprints are hashed in their stead.
# Nor can the way that images take to the devices, what is shown of a run, or how often it is saved on its way.
_PLACES = ("data.dir", "data.cache_dir", "data.input", "data.workers", "data.threads", "attacks.manifest",
           "report.gallery", "report.writers", "checkpoint.every_steps", "checkpoint.every_minutes",
           "checkpoint.stall_minutes")  # fmt: skip
# Settings of defences that are shares, or end in such a word: above 0 and below 1.
_SHARES = ("fraction", "quantile", "eps", "share", "silhouette", "threshold")


def parse_rule(text: str) -> tuple[str, float | None]:
    """Splits "RULE" or "RULE@LEVEL"; a rule without a level takes that of `config.rejection`.

    Raises:
      UsageError: an unknown rule, or a level that is not above 0 and below 1.
    """
    rule, at, level = text.partition("@")
    _one_of("rejection.rules", rule, RULES)
    if not at:
        return rule, None
    if rule == "clusters":
        raise UsageError(f"rejection.rules has {text!r}: the rule clusters has no level")
    try:
        value = float(level)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise UsageError(f"rejection.rules has {text!r}: expected a level above 0 and below 1 after the @")
    return rule, value


def check_variant(variant: str, known: Sequence[str]) -> None:
    """Raises UsageError unless `variant` is "" or one of `known`; for config files."""
    if variant and variant not in known:
        raise UsageError(f"unknown variant {variant!r}: this config file has {_listed(known) or 'none'}")


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


def digest(*parts: Any) -> str:
    """Hashes JSON-able parts to 16 hexadecimal digits; equal parts give equal digests on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
    # The registries know their names; they are imported here, as what they hold builds on this module.
    from badloss_jax.attacks import ATTACKS
    from badloss_jax.data import AUGMENTATIONS, SOURCES
    from badloss_jax.defenses import DEFENSES
    from badloss_jax.models import MODELS

    for key, value in _leaves(to_dict(default_config())):
        if isinstance(value, list):
            wanted = type(value[0]) if value else str
            if not all(type(element) is wanted for element in _at(config, key)):
                raise UsageError(f"{key} = {_at(config, key)}: expected a tuple of {wanted.__name__}")
    single: dict[str, Sequence[Any]] = {
        "data.source": tuple(SOURCES),
        "model.name": tuple(MODELS),
        "model.dtype": ("float32", "bfloat16", "float64"),
        "recording.capture": ("sweep", "step"),
        "retraining.augment": tuple(AUGMENTATIONS),
        "scoring.transform": ("log", "linear"),
        "data.channels": (1, 3),
        "data.input": ("auto", "resident", "streamed"),
    }
    for key, choices in single.items():
        _one_of(key, _at(config, key), choices)
    several: dict[str, Sequence[Any]] = {
        "attacks.names": tuple(ATTACKS),
        "controls": CONTROLS,
        "recording.kinds": RECORDED_KINDS,
        "scoring.kinds": KINDS,
        "defenses.names": tuple(DEFENSES),
        "report.writers": WRITERS,
    }
    for key, choices in several.items():
        values = _at(config, key)
        for value in values:
            _one_of(key, value, choices)
        if len(set(values)) != len(values):
            raise UsageError(f"{key} names something twice: {values}")

    for key in ("probes.count", "recording.batch_size", "recording.feature_dim", "recording.ranked_others",
                "retraining.epochs", "retraining.batch_size", "evaluation.batch_size", "evaluation.max_triggered",
                "model.stem_stride", "data.threads"):  # fmt: skip
        _in_range(config, key, 1)
    _in_range(config, "seed", 0, 2**63 - 1)
    for key in ("data.train_examples", "data.test_examples", "data.pad", "data.image_size",
                "scoring.combined.k", "scoring.epochs", "attacks.scale", "optimizer.weight_decay", "report.gallery",
                "data.workers", "checkpoint.every_steps", "checkpoint.every_minutes",
                "checkpoint.stall_minutes"):  # fmt: skip
        _in_range(config, key, 0)
    for key in ("optimizer.learning_rate", "optimizer.loss_clamp", "evaluation.boost"):
        _in_range(config, key, 0, open_low=True)
    for key in ("optimizer.b1", "optimizer.b2", "rejection.fraction", "rejection.alpha", "rejection.fdr",
                "probes.contaminated", "attacks.overlap"):  # fmt: skip
        _in_range(config, key, 0, 1, open_high=True)
    _in_range(config, "recording.epochs", 3, why="the epoch filter starts from three epochs")
    _in_range(config, "recording.schedule_epochs", config.recording.epochs, why="recording.epochs are its start")
    if not config.model.stages or min(config.model.stages) < 1:
        raise UsageError(f"model.stages = {config.model.stages}: expected one positive channel count a stage")
    for name in config.attacks.names:
        for key, value in config.attacks[name].items():
            path = f"attacks.{name}.{key}"
            if key == "target":
                _in_range(config, path, -1)
            elif key in ("ratio", "strength"):
                _in_range(config, path, 0, 1, open_low=True)
            elif key in ("min_images", "min_class"):
                _in_range(config, path, 0)
            elif key == "epsilon":
                _in_range(config, path, 1, 127)
            elif key == "surrogate":
                _one_of(path, value, tuple(MODELS))
            elif not (math.isfinite(value) and value > 0):
                raise UsageError(f"{path} = {value}: expected a positive number")
    for name in DEFENSES:
        for key in config.defenses.get(name, {}):
            share = key.rpartition("_")[2] in _SHARES
            _in_range(config, f"defenses.{name}.{key}", 0, 1 if share else math.inf, open_low=True, open_high=share)
    _check_kinds(config)


def _check_kinds(config: ConfigDict) -> None:
    from badloss_jax.defenses import DEFENSES

    if not config.scoring.kinds and not config.defenses.names and "none" not in config.controls:
        raise UsageError(f"scoring.kinds and defenses.names are empty: expected some of {_listed(KINDS)} or of"
                         f" {_listed(tuple(DEFENSES))}")  # fmt: skip
    recorded = {"loss", *config.recording.kinds}
    if config.recording.capture == "step" and "step" in recorded:
        raise UsageError("recording.kinds has 'step', which is what recording.capture = 'step' records as the loss")
    if 0 < config.scoring.epochs < 3 or config.scoring.epochs > config.recording.epochs:
        raise UsageError(f"scoring.epochs = {config.scoring.epochs}: expected 0, or 3 to recording.epochs ="
                         f" {config.recording.epochs}")  # fmt: skip
    asked = {("scoring.kinds", kind): kind for kind in config.scoring.kinds}
    for name in config.defenses.names:
        if name.startswith("badloss"):
            asked["defenses.names", name] = name.removeprefix("badloss_") if "_" in name else "loss"
        if DEFENSES[name].margins and not {"ranked", "logits"} & recorded:
            raise UsageError(f"defenses.names has {name!r}, which needs 'ranked' or 'logits' in recording.kinds ="
                             f" {config.recording.kinds}")  # fmt: skip
    for (key, name), kind in asked.items():
        for part in ("features", "ranked") if kind == "combined" else (kind,):
            if part not in recorded:
                raise UsageError(
                    f"{key} has {name!r}, which needs {part!r} in recording.kinds = {config.recording.kinds}"
                )
            k = config.scoring[kind].k or config.scoring[part].k
            if not 1 <= k < config.probes.count:
                raise UsageError(
                    f"scoring.{kind}.k = {k} with probes.count = {config.probes.count}: expected 1 <= k < probes.count"
                    " (a probe's own distance leaves itself out); ask for a smaller k or more probes"
                )
    rules = config.rejection.rules
    for rule in rules:
        parse_rule(rule)
        if rule == "clusters" and not {"features", "ranked"} & recorded:
            raise UsageError("rejection.rules has 'clusters', which needs 'features' or 'ranked' in recording.kinds ="
                             f" {config.recording.kinds}")  # fmt: skip
    if not rules or len(set(rules)) != len(rules):
        raise UsageError(f"rejection.rules = {rules}: expected some of {_listed(RULES)}, each once")
    known = [f"{kind}/{rule}" for kind in config.scoring.kinds for rule in rules]
    for name in config.defenses.names:
        own = ("own",) if DEFENSES[name].own_rule else ()
        ours = name.partition("_")[0] == "badloss"
        known += [f"{name}/{rule}" for rule in (*own, *rules)
                  if not DEFENSES[name].cleanses and (ours or rule != "clusters")]  # fmt: skip
    for variant in config.retraining.variants:
        if variant not in known:
            told = "KIND/RULE or DEFENCE/RULE" if config.defenses.names else "KIND/RULE"
            raise UsageError(f"retraining.variants has {variant!r}: expected {told}{_nearest(variant, known)}")


def load_file(path: Path, variant: str) -> ConfigDict:
    """Runs a config file, or a sweep file, and returns what its `get_config` does, unchecked.

    Raises:
      UsageError: no such file or variant, or it cannot be run.
    """
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UsageError(f"config file {path} does not exist{_nearest(str(path), siblings)}")
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
            raise UsageError(f"unknown config key {key!r}{_nearest(key, known)}")
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


def _one_of(key: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise UsageError(f"{key} has {value!r}: expected one of {_listed(choices)}{_nearest(value, choices)}")


def _in_range(config: ConfigDict, key: str, low: float, high: float = math.inf, *, open_low: bool = False,
              open_high: bool = False, why: str = "") -> None:  # fmt: skip
    value = _at(config, key)
    below = value <= low if open_low else value < low
    above = value >= high if open_high else value > high
    if below or above or (isinstance(value, float) and not math.isfinite(value)):
        bounds = f"a finite number {'above' if open_low else 'of at least'} {low}"
        if high < math.inf:
            bounds += f" and {'below' if open_high else 'at most'} {high}"
        raise UsageError(f"{key} = {value}: expected {bounds}" + (f" ({why})" if why else ""))


def _listed(names: Sequence[Any]) -> str:
    return ", ".join(str(name) for name in names)


def _nearest(value: Any, known: Sequence[Any]) -> str:
    names = [str(name) for name in known]
    close = difflib.get_close_matches(str(value), names, 1, cutoff=0.5)
    if not close:  # a right last part under a wrong group
        close = [name for name in names if name.rpartition(".")[2] == str(value).rpartition(".")[2]][:1]
    return f"; did you mean {close[0]!r}?" if close else ""
