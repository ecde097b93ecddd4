"""Configs: every key with its default and its meaning, loading, overriding, checking, hashing.

A config file is Python with one function, `get_config(variant="")`, that starts from `default_config()` and sets what
its data set needs. Groups are flat; a group is hashed into the phases whose result it can change.
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

RECORDED_KINDS = ("step", "prob", "logits", "ranked", "features")  # beside the loss, which always is
KINDS = ("loss", *RECORDED_KINDS, "combined")
RULES = ("fraction", "alpha", "fdr")
WRITERS = ("tensorboard", "wandb")
CONTROLS = ("none", "random", "oracle")  # "none", the undefended network, is trained with every other
# Where files lie cannot change a result: the data's and the manifest's own fingerprints are hashed in their stead.
# Nor can the way that images take to the devices, what is shown of a run, or how often it is saved on its way.
_PLACES = ("data.dir", "data.cache_dir", "data.input", "data.workers", "data.threads", "attacks.manifest",
           "report.gallery", "report.writers", "checkpoint.every_steps", "checkpoint.every_minutes",
           "checkpoint.stall_minutes")  # fmt: skip
# Settings of defences that are shares, or end in such a word: above 0 and below 1.
_SHARES = ("fraction", "quantile", "eps", "share", "silhouette", "threshold")


def default_config() -> ConfigDict:
    """Returns every key at its default: the paper's settings where the paper has one."""
    config = ConfigDict()
    config.seed = 0  # poison, probes, initial weights, order of examples, augmentation
    config.controls = ("random", "oracle")  # models trained beside the undefended and the defended ones
    config.data = {
        "source": "digits",  # digits | idx | image_folder | gtsrb | arrays | tfds
        "dir": "",  # the folder where the source's files lie (arrays: the .npz file)
        "cache_dir": "~/.cache/badloss_jax",  # decoded images (tfds: labels), keyed by content; "" keeps no cache
        "train_examples": 0,  # draw so many training examples (seeded by `seed`); 0 = all
        "test_examples": 0,
        "pad": 0,  # zero pixels added on each side
        "image_size": 0,  # image_folder, gtsrb, tfds: resize to this many pixels a side; 0 = as they are
        "channels": 3,  # image_folder, gtsrb, tfds: 3 (RGB) or 1 (grey)
        "skip_corrupt": False,  # image_folder, gtsrb: leave unreadable files out, and count them
        "class_names": (),  # in the order of the labels; () takes the source's own
        # resident: all training images on every device | streamed: decoded by the hosts as they are needed | auto:
        # streamed if the images take more than 2 GiB
        "input": "auto",
        "workers": 0,  # streamed: processes a host that decode; 0 = threads of the run's own process
        "threads": 16,  # streamed: that decode, in each of these processes
    }
    config.attacks = {
        "names": ("patch", "single_pix", "blend_r", "blend_p", "sinusoid", "frequency"),
        "manifest": "",  # a manifest.json to take the poison from, instead of drawing it
        "overlap": 0.0,  # share of each attack's images that carry the trigger of another attack, too, below its own
        "scale": 1.0,  # multiplies the ratio of every attack; 0 poisons nothing
        # ratio: share of the training set (sinusoid: of its target class); target: a class, or -1 to draw it
        "patch": {"ratio": 0.01, "target": -1},
        "single_pix": {"ratio": 0.01, "target": -1},
        "blend_r": {"ratio": 0.01, "target": -1, "strength": 0.075},
        "blend_p": {"ratio": 0.01, "target": -1, "strength": 0.025},
        "sinusoid": {
            "ratio": 0.1,
            "target": -1,
            "strength": 0.075,
            "cycles": 6.0,
            "min_images": 0,  # poison at least so many images of the target class
            "min_class": 0,  # draw the target among the classes of at least so many images
        },
        "frequency": {"ratio": 0.01, "target": -1, "magnitude": 30.0},
        "narcissus": {  # its ratio is a share of its target class, too
            "ratio": 0.005,
            "target": 2,
            "strength": 1.0,  # multiple of the perturbation
            "epsilon": 16,  # largest change of a pixel, in 1/255
            "surrogate": "resnet_small",  # the network that the perturbation is optimised on
            "surrogate_epochs": 15,
            "steps": 300,  # of projected gradient descent
        },
    }
    config.probes = {
        "count": 250,  # P, known-clean training examples
        "contaminated": 0.0,  # share of them that are in truth poisoned, an ablation
    }
    config.model = {
        "name": "resnet18",  # resnet_small | resnet18 | resnet34 | resnet50 | vgg16_bn | mobilenet_v2
        "stages": (16, 32, 64),  # resnet_small: channels of each stage, one block a stage
        "stem_stride": 2,  # resnet_small
        "dtype": "float32",  # of the computation: float32 | bfloat16 | float64 (needs JAX_ENABLE_X64=1)
    }
    config.optimizer = {
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,  # decoupled, on every parameter
        "b1": 0.9,
        "b2": 0.999,
        "loss_clamp": 100.0,  # per-example loss at most this before the mean
    }
    config.recording = {
        "epochs": 30,  # T
        "schedule_epochs": 100,  # length of the cosine that the T epochs are the start of
        "batch_size": 128,
        "capture": "sweep",  # sweep: one evaluation pass after each epoch | step: the training step's own losses
        # beside the loss, which is always recorded; "step" is the training step's own loss in a recording that sweeps
        "kinds": ("prob", "logits", "ranked", "features"),
        "feature_dim": 64,  # d of the Gaussian projection of the penultimate features
        "ranked_others": 5,  # m, how many of the other classes' log-probabilities
    }
    config.scoring = {
        "kinds": ("loss", "logits", "ranked", "features", "combined"),
        "epochs": 0,  # score the first so many of the recorded epochs; 0 = all
        "loss": {"k": 50},  # probes in the mean distance
        "step": {"k": 50},
        "prob": {"k": 50},
        "logits": {"k": 5},
        "ranked": {"k": 5},
        "features": {"k": 5},
        "combined": {"k": 0},  # 0 = features and ranked each at its own k
        "transform": "log",  # of the score that is shown: log | linear; ranks are the same
    }
    config.rejection = {
        "rules": RULES,  # applied to every kind; RULE@LEVEL, such as "fraction@0.1", takes another level than below
        "fraction": 0.4,  # remove this share of all examples (the paper's rule)
        # remove p <= alpha: this share of the clean data is lost, give or take sqrt(alpha (1 - alpha) / P), and more
        # where probes and examples are not quite exchangeable
        "alpha": 0.1,
        "fdr": 0.1,  # Benjamini-Hochberg at this false discovery rate
    }
    config.defenses = {  # their papers' settings, as in the authors' program
        "names": (),  # beside what `scoring.kinds` says: of `badloss_jax.defenses.DEFENSES`
        "neural_cleanse": {
            "epochs": 15,  # of optimising each class's mask and pattern
            "steps": 50,  # of an epoch, each on `batch_size` probes; after it the mask's penalty is adapted
            "batch_size": 32,
            "learning_rate": 0.1,  # of Adam
            "penalty": 1e-3,  # weight of the mask's L1 norm, to begin with
            "flipped_share": 0.99,  # of the probes that a mask and its pattern must flip
            "anomaly": 2.0,  # classes of small masks are attacked from this index on
            "unit_share": 0.01,  # of the penultimate units, those that the pattern raises most, at least one
            "probe_share": 0.05,  # of the probes that the threshold would remove, shared by the attacked classes
        },
        "activation_clustering": {
            "components": 10,  # of the independent component analysis
            "silhouette": 0.15,  # a class above it is attacked
            "cluster_share": 0.5,  # if its smaller cluster is no larger than this share of it, too; 0.5 always is
            "sample_size": 2500,  # examples of each cluster, at most, that the silhouette is of
        },
        "spectral_signatures": {
            "eps": 0.1,  # the share of each class that is thought to be poisoned
        },
        "frequency_analysis": {
            "epochs": 10,  # of the detector's training
            "learning_rate": 0.05,  # of its Adadelta, constant
            "weight_decay": 1e-4,
            "batch_size": 32,
            "threshold": 0.5,  # remove what is altered with this probability
        },
        "abl": {
            "epochs": 10,  # of training with flooding
            "flooding": 0.5,  # the level that the loss is held at
            "fraction": 0.15,  # remove this share, of the lowest losses
        },
        "cognitive_distillation": {
            "steps": 100,  # of optimising each image's mask
            "learning_rate": 0.1,  # of its Adam
            "l1_weight": 0.01,  # of the sum of the mask
            "variation_weight": 1.0,  # of its total variation
            "fraction": 0.15,  # remove this share, of the smallest masks
        },
        "cbd": {
            "backdoor_epochs": 5,  # of the network that is to learn the triggers
            "penalty": 0.01,  # weight of what the features tell about that network's
        },
        "pss": {
            "early_epochs": 2,  # of the network whose features are compared
            "clean_quantile": 0.8,  # of the feature inconsistency: below it, examples are called clean
            "poisoned_quantile": 0.95,  # and above it poisoned
            "epochs": 20,  # of unlearning the ones and relearning the others, in turns
            "learning_rate": 1e-4,  # of both
        },
    }
    config.retraining = {
        "enabled": True,  # False: detect only, train nothing that shows what a removal does
        "epochs": 100,
        "batch_size": 128,
        # none | crop_flip (reflect-pad 4, random crop, random flip) | resized_crop_flip (of 8 to 100 % of the area)
        "augment": "none",
        # of each model to retrain: kind/rule, or defence/rule ("own" is the rule that a defence brings along)
        "variants": ("loss/fraction", "logits/fraction", "combined/fraction"),
    }
    config.evaluation = {
        "batch_size": 500,
        "max_triggered": 10_000,  # test images per attack
        "boost": 2.0,  # how much stronger the "boosted" trigger is
    }
    config.checkpoint = {  # of a training on its way, beside what is kept of finished ones
        "every_steps": 0,  # save after so many steps; 0 does not count steps
        "every_minutes": 10.0,  # or after so many minutes; 0 does not count minutes
        "stall_minutes": 30.0,  # end with every thread's stack if no step ends for so long; 0 waits for ever
    }
    config.report = {
        "gallery": 60,  # highest-ranked images to keep for report.html, of each kind
        "writers": (),  # of what metrics.jsonl gets, too: "tensorboard", "wandb"
    }
    return config.lock()


def parse_rule(text: str) -> tuple[str, float | None]:
    """Splits "RULE" or "RULE@LEVEL"; a rule without a level takes that of `config.rejection`.

    Raises:
      UsageError: an unknown rule, or a level that is not above 0 and below 1.
    """
    rule, at, level = text.partition("@")
    _one_of("rejection.rules", rule, RULES)
    if not at:
        return rule, None
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
    if not rules or len(set(rules)) != len(rules):
        raise UsageError(f"rejection.rules = {rules}: expected some of {_listed(RULES)}, each once")
    known = [f"{kind}/{rule}" for kind in config.scoring.kinds for rule in rules]
    for name in config.defenses.names:
        own = ("own",) if DEFENSES[name].own_rule else ()
        known += [f"{name}/{rule}" for rule in (*own, *rules) if not DEFENSES[name].cleanses]
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
