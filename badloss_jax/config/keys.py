"""The keys of a config, written as "group.key": looked up, set, listed."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from badloss_jax.core.errors import UsageError, nearest


def to_dict(config: ConfigDict) -> dict[str, Any]:
    """Returns plain dicts, lists, strings and numbers."""
    return json.loads(config.to_json())


def leaves_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Lists all values of a group.

    Args:
      tree: group or key -> group or value.
      prefix: of all keys, such as "scoring.".

    Yields:
      (key, value), such as ("scoring.loss.k", 50).
    """
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves_of(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_key(config: ConfigDict, key: str) -> None:
    """Checks that a key is that of a value.

    Args:
      config: any.
      key: such as "scoring.loss.k".

    Raises:
      UsageError: there is no such key (the nearest one is named), or it is a group.
    """
    node: Any = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, ConfigDict):
            raise UsageError(f"unknown config key {key!r}: {'.'.join(parts[:depth])} is a value, not a group")
        # All keys are listed only now: the nearest one may be in another group.
        if part not in node:
            known = [name for name, _ in leaves_of(to_dict(config))]
            raise UsageError(f"unknown config key {key!r}{nearest(key, known)}")
        node = node[part]

    if isinstance(node, ConfigDict):
        raise UsageError(f"config key {key!r} is a group: set one of {', '.join(f'{key}.{name}' for name in node)}")


def value_at(config: ConfigDict, key: str) -> Any:
    """Returns the value of a key.

    Args:
      config: any.
      key: one that it has, such as "scoring.loss.k".
    """
    node: Any = config
    for part in key.split("."):
        node = node[part]
    return node


def set_value(config: ConfigDict, key: str, value: Any) -> None:
    """Sets the value of a key.

    Args:
      config: is changed.
      key: one that it has, such as "scoring.loss.k".
      value: of the key's type.

    Raises:
      TypeError: it is of another type.
    """
    *groups, leaf = key.split(".")
    node: Any = config
    for group in groups:
        node = node[group]
    node[leaf] = value


def type_in_words(value: Any) -> str:
    """Says in words of what type a value is."""
    names = {
        bool: "True or False",
        int: "an integer",
        float: "a number",
        tuple: "a tuple, such as \"('a', 'b')\"",
    }
    return names.get(type(value), "a string")
