"""Configs: loading, overriding, changing, hashing; `settings` has every key with its default and its range.

A config file is Python with one function, `get_config(variant="")`, that starts from `default_config()` and sets what
its data set needs. Begin with `load_config`; `checks` has what a config may be, and stands above the registries whose
names it may have: this package imports these, and what comes before them.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from badloss_jax.config.checks import check_config
from badloss_jax.config.keys import check_key, leaves_of, set_value, to_dict, type_in_words, value_at
from badloss_jax.core.errors import UsageError, nearest
from badloss_jax.core.hashing import digest
from badloss_jax.settings import CONTROLS, RECORDED_KINDS, check_variant, default_config

# CONTROLS, RECORDED_KINDS, check_variant and default_config are for config files, which import from here alone.
__all__ = [
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


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads `FILE[:variant]`, applies `--config.group.key=value` overrides, and checks the result.

    Args:
      spec: path of a config file, and after a colon the variant, if any.
      overrides: as on the command line.

    Returns:
      The config, locked: an unknown key is an error.

    Raises:
      UsageError: no such file or variant, an unknown key (the nearest one is named), a wrong type, an impossible value.

    Example:
      >>> from badloss_jax.config import load_config
      >>> config = load_config("configs/digits.py:step", ["--config.seed=1", "--config.scoring.loss.k=5"])
      >>> config.recording.capture, config.seed, config.scoring.loss.k
      ('step', 1, 5)
      >>> load_config("configs/digits.py", ["--config.scoring.loss.kk=5"])
      Traceback (most recent call last):
      badloss_jax.core.errors.UsageError: unknown config key 'scoring.loss.kk'; did you mean 'scoring.loss.k'?
    """
    path, _, variant = spec.partition(":")
    # Rebuilt from the defaults, a file can neither add keys nor change types.
    config = load_file(Path(path), variant)
    try:
        config = _rebuild(config.to_dict())
    except (UsageError, TypeError) as error:
        raise UsageError(f"config file {path}: {error}. Start from badloss_jax.config.default_config()") from error
    return override(config, overrides)


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Returns a checked copy of a config with strings of the command line applied.

    Args:
      config: stays as it is.
      overrides: `--config.group.key=value`.

    Returns:
      The copy, locked.

    Raises:
      UsageError: an unknown key (the nearest one is named), a wrong type, an impossible value.
    """
    config = ConfigDict(config).copy_and_resolve_references()
    config.lock()
    for text in overrides:
        name, equals, _ = text.removeprefix("--").partition("=")
        if not text.startswith("--config.") or not equals:
            raise UsageError(f"{text!r} is not understood: overrides look like --config.group.key=value")
        check_key(config, name.removeprefix("config."))

    # absl parses, so that values are written as in every other program with ml_collections.
    values = flags.FlagValues()
    argv = ["badloss", *overrides]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, TypeError, ValueError, AttributeError) as error:
        # absl does not say which: each alone, the wrong one raises here.
        if len(overrides) > 1:
            for text in overrides:
                override(config, [text])
        key, _, value = overrides[-1].removeprefix("--config.").partition("=")
        raise UsageError(f"{key} = {value!r}: expected {type_in_words(value_at(config, key))}") from error

    check_config(config)
    return config


def changed(config: ConfigDict, settings: Mapping[str, Any]) -> ConfigDict:
    """Returns a checked copy of a config with settings changed.

    Args:
      config: stays as it is.
      settings: key, such as "scoring.loss.k" -> value.

    Returns:
      The copy, locked.

    Raises:
      UsageError: an unknown key (the nearest one is named), a wrong type, an impossible value.
    """
    config = ConfigDict(config).copy_and_resolve_references()
    for key, value in settings.items():
        check_key(config, key)
        try:
            set_value(config, key, value)
        except TypeError as error:
            raise UsageError(f"{key} = {value!r}: expected {type_in_words(value_at(config, key))}") from error
    check_config(config)
    return config.lock()


def from_json(text: str) -> ConfigDict:
    """Rebuilds a config that `to_json` wrote, against today's keys and types.

    Raises:
      UsageError: it has other keys or types, or an impossible value.
    """
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

    config = default_config()
    leaves = dict(leaves_of(stored))
    missing = dict(leaves_of(to_dict(config))).keys() - leaves.keys()
    for key, value in leaves.items():
        check_key(config, key)
        if value is None:  # which a ConfigDict takes for any type
            raise UsageError(f"{key} = None: expected {type_in_words(value_at(config, key))}")
        if isinstance(value, list):
            value = tuple(value)
        set_value(config, key, value)

    if missing:
        raise UsageError(f"config key {min(missing)!r} is missing")
    return config


def to_json(config: ConfigDict) -> str:
    """Returns what `from_json` reads."""
    return json.dumps(to_dict(config), indent=2, sort_keys=True)


def config_hash(config: ConfigDict | Mapping[str, Any]) -> str:
    """Hashes everything that can change a result, so not where the files lie; also of what `to_dict` returned."""
    return digest(settled(config))


def settled(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Returns key -> value of everything that can change a result."""
    tree = to_dict(config) if isinstance(config, ConfigDict) else config
    return {key: value for key, value in leaves_of(tree) if key not in _PLACES}


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, str]:
    """Returns what differs between two configs, of what can change a result.

    Args:
      ours: a config, as `to_dict` gives it.
      theirs: another.

    Returns:
      key -> "theirs -> ours".
    """
    new = dict(leaves_of(ours))
    old = dict(leaves_of(theirs))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key) and key not in _PLACES]
    return {key: f"{old.get(key)} -> {new.get(key)}" for key in keys}


def load_file(path: Path, variant: str) -> ConfigDict:
    """Runs a config file, or a sweep file, and returns what its `get_config` does, unchecked.

    Args:
      path: of the file.
      variant: is handed to `get_config`.

    Returns:
      A ConfigDict, of whatever keys.

    Raises:
      UsageError: no such file or variant, or it cannot be run.
    """
    if not path.is_file():
        siblings = []
        if path.parent.is_dir():
            siblings = [str(file) for file in path.parent.glob("*.py")]
        raise UsageError(f"config file {path} does not exist{nearest(str(path), siblings)}")

    # It is the user's own program, and run as such; what others sent is read by `from_json`.
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
