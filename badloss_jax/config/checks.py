"""What a config may be: each value alone, the names that registries know, what several settings together may be."""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from badloss_jax.attacks import ATTACKS
from badloss_jax.config.keys import leaves_of, to_dict, value_at
from badloss_jax.core.errors import UsageError, listed, nearest
from badloss_jax.data import AUGMENTATIONS, SOURCES
from badloss_jax.defenses import DEFENSES
from badloss_jax.models import MODELS
from badloss_jax.scoring import COMBINED, parts_of
from badloss_jax.settings import KINDS, RULES, OneOf, Registered, SomeOf, constraints, default_config, parse_rule

_REGISTRIES: dict[str, Mapping[str, Any]] = {
    "attacks.ATTACKS": ATTACKS,
    "data.AUGMENTATIONS": AUGMENTATIONS,
    "data.SOURCES": SOURCES,
    "defenses.DEFENSES": DEFENSES,
    "models.MODELS": MODELS,
}


def check_config(config: ConfigDict) -> None:
    """Checks every value alone, then what several of them together may be.

    Raises:
      UsageError: a value is impossible; the first such key is named, and what was expected.
    """
    _check_types(config)
    # Each value alone first, so that what follows compares values that make sense.
    for key, constraint in constraints().items():
        if _attacks_nothing(config, key):
            continue
        value = value_at(config, key)
        if isinstance(constraint, Registered):
            names = _REGISTRIES[constraint.registry]
            constraint = SomeOf(*names) if isinstance(value, tuple) else OneOf(*names)
        constraint.check(key, value)

    recording = config.recording
    if recording.schedule_epochs < recording.epochs:
        raise UsageError(
            f"recording.schedule_epochs = {recording.schedule_epochs}: expected a finite number of at least"
            f" {recording.epochs} (recording.epochs are its start)"
        )
    if not config.model.stages or min(config.model.stages) < 1:
        raise UsageError(f"model.stages = {config.model.stages}: expected one positive channel count a stage")
    _check_ghost_batch(config)

    recorded = {"loss", *recording.kinds}
    if recording.capture == "step" and "step" in recorded:
        raise UsageError("recording.kinds has 'step', which is what recording.capture = 'step' records as the loss")

    # What is recorded decides what can be scored by, and that what can be removed and retrained without.
    _check_kinds(config, recorded)
    _check_rules(config, recorded)
    _check_variants(config)


def _attacks_nothing(config: ConfigDict, key: str) -> bool:
    """Whether a key is a setting of an attack that is not asked for, which may be anything."""
    group, _, rest = key.partition(".")
    attack, dot, _ = rest.partition(".")
    return group == "attacks" and dot == "." and attack not in config.attacks.names


def _check_types(config: ConfigDict) -> None:
    """Checks what a ConfigDict does not: the elements of tuples."""
    for key, default in leaves_of(to_dict(default_config())):
        if not isinstance(default, list):
            continue

        # An empty default says nothing of its elements; all of those are names.
        wanted = type(default[0]) if default else str
        value = value_at(config, key)
        if not all(type(element) is wanted for element in value):
            raise UsageError(f"{key} = {value}: expected a tuple of {wanted.__name__}")


def _check_ghost_batch(config: ConfigDict) -> None:
    """Checks that the batches that networks are trained with are whole ghost batches."""
    ghost_batch = config.model.ghost_batch
    if not ghost_batch:
        return

    sizes = {f"{phase}.batch_size": config[phase].batch_size for phase in ("recording", "retraining")}
    common = math.gcd(*sizes.values())
    would_do = max(size for size in range(1, ghost_batch + 1) if common % size == 0)
    for key, size in sizes.items():
        if size % ghost_batch:
            raise UsageError(
                f"model.ghost_batch = {ghost_batch} does not divide {key} = {size}: a batch is cut into whole ghost"
                f" batches; {would_do} would do, or 0 for the whole batch"
            )


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

    # A defence that is BaDLoss by another kind needs what `scoring.kinds` with that kind needs.
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
    """Checks that there are rules, each once, and what they need."""
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
    # The kinds of the config are BaDLoss without a name; defences bring theirs along.
    known = [f"{kind}/{rule}" for kind in config.scoring.kinds for rule in rules]
    for name in config.defenses.names:
        known += [f"{name}/{rule}" for rule in DEFENSES[name].rules(rules)]

    for variant in config.retraining.variants:
        if variant not in known:
            form = "KIND/RULE or DEFENCE/RULE" if config.defenses.names else "KIND/RULE"
            raise UsageError(f"retraining.variants has {variant!r}: expected {form}{nearest(variant, known)}")
