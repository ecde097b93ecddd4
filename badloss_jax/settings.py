"""Every setting in one table: its default, the values that it may have, and its meaning.

Defaults are the paper's where the paper has one. Groups are flat; a group is hashed into the phases whose result it can
change. What several settings together may be, and the names that the registries know, `badloss_jax.config` checks.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from badloss_jax.core.errors import UsageError, listed, one_of

RECORDED_KINDS = ("step", "prob", "logits", "ranked", "features")  # beside the loss, which always is
KINDS = ("loss", *RECORDED_KINDS, "combined")
RULES = ("fraction", "alpha", "fdr", "clusters")
WRITERS = ("tensorboard", "wandb")
CONTROLS = ("none", "random", "oracle")  # "none", the undefended network, is trained with every other


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`; "open" excludes that end. `why` says what the range comes from."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    why: str = ""

    def check(self, key: str, value: float) -> None:
        """Checks a value.

        Args:
          key: of the setting, for the message.
          value: to check.

        Raises:
          UsageError: it lies outside, or is not finite; the range is named.
        """
        below = value < self.low or (self.open_low and value == self.low)
        above = value > self.high or (self.open_high and value == self.high)
        infinite = isinstance(value, float) and not math.isfinite(value)
        if not (below or above or infinite):
            return

        lowest = "above" if self.open_low else "of at least"
        expected = f"a finite number {lowest} {self.low}"
        if self.high < math.inf:
            highest = "below" if self.open_high else "at most"
            expected += f" and {highest} {self.high}"
        if self.why:
            expected += f" ({self.why})"
        raise UsageError(f"{key} = {value}: expected {expected}")


class OneOf:
    """One of some values."""

    def __init__(self, *choices: Any):
        self.choices = choices

    def check(self, key: str, value: Any) -> None:
        """Checks a value.

        Args:
          key: of the setting, for the message.
          value: to check.

        Raises:
          UsageError: it is none of the choices; the nearest is named.
        """
        one_of(key, value, self.choices)


class SomeOf(OneOf):
    """A tuple of some of the values, each at most once."""

    def check(self, key: str, value: Sequence[Any]) -> None:
        """Checks a value.

        Args:
          key: of the setting, for the message.
          value: to check.

        Raises:
          UsageError: it has others than the choices, of which the nearest is named, or one twice.
        """
        for element in value:
            one_of(key, element, self.choices)
        if len(set(value)) != len(value):
            raise UsageError(f"{key} names something twice: {value}")


@dataclass(frozen=True)
class Registered:
    """A name, or a tuple of names, that a registry of the package knows, such as "attacks.ATTACKS"."""

    registry: str


FREE = None  # any value of the default's type
AT_LEAST_ONE = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, open_low=True)
SHARE = Range(0, 1, open_low=True)
PROPER_SHARE = Range(0, 1, open_low=True, open_high=True)
BELOW_ONE = Range(0, 1, open_high=True)
TARGET = Range(-1)

_SETTINGS: dict[str, Any] = {
    "seed": (0, Range(0, 2**63 - 1)),  # poison, probes, initial weights, order of examples, augmentation
    "controls": (("random", "oracle"), SomeOf(*CONTROLS)),  # models trained beside the undefended and the defended ones
    "data": {
        "source": ("digits", Registered("data.SOURCES")),  # digits | idx | image_folder | gtsrb | arrays | tfds
        "dir": ("", FREE),  # the folder where the source's files lie (arrays: the .npz file)
        # decoded images (tfds: labels), keyed by content; "" keeps no cache
        "cache_dir": ("~/.cache/badloss_jax", FREE),
        "train_examples": (0, NOT_NEGATIVE),  # draw so many training examples (seeded by `seed`); 0 = all
        "test_examples": (0, NOT_NEGATIVE),
        "pad": (0, NOT_NEGATIVE),  # zero pixels added on each side
        # image_folder, gtsrb, tfds: resize to this many pixels a side; 0 = as they are
        "image_size": (0, NOT_NEGATIVE),
        "channels": (3, OneOf(1, 3)),  # image_folder, gtsrb, tfds: 3 (RGB) or 1 (grey)
        "skip_corrupt": (False, FREE),  # image_folder, gtsrb: leave unreadable files out, and count them
        "class_names": ((), FREE),  # in the order of the labels; () takes the source's own
        # resident: all training images on every device | streamed: decoded by the hosts as they are needed | auto:
        # streamed if the images take more than 2 GiB
        "input": ("auto", OneOf("auto", "resident", "streamed")),
        "workers": (0, NOT_NEGATIVE),  # streamed: processes a host that decode; 0 = threads of the run's own process
        "threads": (16, AT_LEAST_ONE),  # streamed: that decode, in each of these processes
    },
    "attacks": {
        "names": (
            ("patch", "single_pix", "blend_r", "blend_p", "sinusoid", "frequency"),
            Registered("attacks.ATTACKS"),
        ),
        "manifest": ("", FREE),  # a manifest.json to take the poison from, instead of drawing it
        # share of each attack's images that carry the trigger of another attack, too, below its own
        "overlap": (0.0, BELOW_ONE),
        "scale": (1.0, NOT_NEGATIVE),  # multiplies the ratio of every attack; 0 poisons nothing
        # ratio: share of the training set (sinusoid: of its target class); target: a class, or -1 to draw it
        "patch": {"ratio": (0.01, SHARE), "target": (-1, TARGET)},
        "single_pix": {"ratio": (0.01, SHARE), "target": (-1, TARGET)},
        "blend_r": {"ratio": (0.01, SHARE), "target": (-1, TARGET), "strength": (0.075, SHARE)},
        "blend_p": {"ratio": (0.01, SHARE), "target": (-1, TARGET), "strength": (0.025, SHARE)},
        "sinusoid": {
            "ratio": (0.1, SHARE),
            "target": (-1, TARGET),
            "strength": (0.075, SHARE),
            "cycles": (6.0, POSITIVE),
            "min_images": (0, NOT_NEGATIVE),  # poison at least so many images of the target class
            "min_class": (0, NOT_NEGATIVE),  # draw the target among the classes of at least so many images
        },
        "frequency": {"ratio": (0.01, SHARE), "target": (-1, TARGET), "magnitude": (30.0, POSITIVE)},
        "narcissus": {  # its ratio is a share of its target class, too
            "ratio": (0.005, SHARE),
            "target": (2, TARGET),
            "strength": (1.0, SHARE),  # multiple of the perturbation
            "epsilon": (16, Range(1, 127)),  # largest change of a pixel, in 1/255
            # the network that the perturbation is optimised on
            "surrogate": ("resnet_small", Registered("models.MODELS")),
            "surrogate_epochs": (15, POSITIVE),
            "steps": (300, POSITIVE),  # of projected gradient descent
        },
    },
    "probes": {
        "count": (250, AT_LEAST_ONE),  # P, known-clean training examples
        "contaminated": (0.0, BELOW_ONE),  # share of them that are in truth poisoned, an ablation
    },
    "model": {
        # resnet_small | resnet18 | resnet34 | resnet50 | vgg16_bn | mobilenet_v2
        "name": ("resnet18", Registered("models.MODELS")),
        "stages": ((16, 32, 64), FREE),  # resnet_small: channels of each stage, one block a stage
        "stem_stride": (2, AT_LEAST_ONE),  # resnet_small
        # of convolutions, what is between them, and gradients while devices add them up: float32 | bfloat16 | float64
        # (needs JAX_ENABLE_X64=1). Weights, statistics, logits, losses and scores are never narrower than float32
        "dtype": ("float32", OneOf("float32", "bfloat16", "float64")),
        # batch norm in training by the statistics of so many images each; 0 = of the whole batch. Devices wait less for
        # each other if it divides the share of a batch that each has (configs/results/README.md has what it changes)
        "ghost_batch": (0, NOT_NEGATIVE),
    },
    "optimizer": {
        "learning_rate": (1e-3, POSITIVE),
        "weight_decay": (1e-4, NOT_NEGATIVE),  # decoupled, on every parameter
        "b1": (0.9, BELOW_ONE),
        "b2": (0.999, BELOW_ONE),
        "loss_clamp": (100.0, POSITIVE),  # per-example loss at most this before the mean
    },
    "recording": {
        "epochs": (30, Range(3, why="the epoch filter starts from three epochs")),  # T
        "schedule_epochs": (100, AT_LEAST_ONE),  # length of the cosine that the T epochs are the start of
        "batch_size": (128, AT_LEAST_ONE),
        # sweep: one evaluation pass after each epoch | step: the training step's own losses
        "capture": ("sweep", OneOf("sweep", "step")),
        # beside the loss, which is always recorded; "step" is the training step's own loss in a recording that sweeps
        "kinds": (("prob", "logits", "ranked", "features"), SomeOf(*RECORDED_KINDS)),
        "feature_dim": (64, AT_LEAST_ONE),  # d of the Gaussian projection of the penultimate features
        "ranked_others": (5, AT_LEAST_ONE),  # m, how many of the other classes' log-probabilities
    },
    "scoring": {
        "kinds": (("loss", "logits", "ranked", "features", "combined"), SomeOf(*KINDS)),
        "epochs": (0, NOT_NEGATIVE),  # score the first so many of the recorded epochs; 0 = all
        "loss": {"k": (50, NOT_NEGATIVE)},  # probes in the mean distance
        "step": {"k": (50, NOT_NEGATIVE)},
        "prob": {"k": (50, NOT_NEGATIVE)},
        "logits": {"k": (5, NOT_NEGATIVE)},
        "ranked": {"k": (5, NOT_NEGATIVE)},
        "features": {"k": (5, NOT_NEGATIVE)},
        "combined": {"k": (0, NOT_NEGATIVE)},  # 0 = features and ranked each at its own k
        # compare classes with their own: a hard or small one is not suspicious as a whole (scoring/README.md)
        "by_class": (False, FREE),
        "transform": ("log", OneOf("log", "linear")),  # of the score that is shown: log | linear; ranks are the same
    },
    "rejection": {
        # applied to every kind; RULE@LEVEL, such as "fraction@0.1", takes another level than below. "clusters", beside
        # these: what is in attacks (scoring/README.md), whatever the kind; for features and ranked
        "rules": (("fraction", "alpha", "fdr"), FREE),
        "fraction": (0.4, BELOW_ONE),  # remove this share of all examples (the paper's rule)
        # remove p <= alpha: this share of the clean data is lost, give or take sqrt(alpha (1 - alpha) / P), and more
        # where probes and examples are not quite exchangeable
        "alpha": (0.1, BELOW_ONE),
        "fdr": (0.1, BELOW_ONE),  # Benjamini-Hochberg at this false discovery rate
    },
    "defenses": {  # their papers' settings, as in the authors' program
        # beside what `scoring.kinds` says: of `badloss_jax.defenses.DEFENSES`
        "names": ((), Registered("defenses.DEFENSES")),
        "neural_cleanse": {
            "epochs": (15, POSITIVE),  # of optimising each class's mask and pattern
            "steps": (50, POSITIVE),  # of an epoch, each on `batch_size` probes; after it the mask's penalty is adapted
            "batch_size": (32, POSITIVE),
            "learning_rate": (0.1, POSITIVE),  # of Adam
            "penalty": (1e-3, POSITIVE),  # weight of the mask's L1 norm, to begin with
            "flipped_share": (0.99, PROPER_SHARE),  # of the probes that a mask and its pattern must flip
            "anomaly": (2.0, POSITIVE),  # classes of small masks are attacked from this index on
            # of the penultimate units, those that the pattern raises most, at least one
            "unit_share": (0.01, PROPER_SHARE),
            # of the probes that the threshold would remove, shared by the attacked classes
            "probe_share": (0.05, PROPER_SHARE),
        },
        "activation_clustering": {
            "components": (10, POSITIVE),  # of the independent component analysis
            "silhouette": (0.15, PROPER_SHARE),  # a class above it is attacked
            # if its smaller cluster is no larger than this share of it, too; 0.5 always is
            "cluster_share": (0.5, PROPER_SHARE),
            "sample_size": (2500, POSITIVE),  # examples of each cluster, at most, that the silhouette is of
        },
        "spectral_signatures": {
            "eps": (0.1, PROPER_SHARE),  # the share of each class that is thought to be poisoned
        },
        "frequency_analysis": {
            "epochs": (10, POSITIVE),  # of the detector's training
            "learning_rate": (0.05, POSITIVE),  # of its Adadelta, constant
            "weight_decay": (1e-4, POSITIVE),
            "batch_size": (32, POSITIVE),
            "threshold": (0.5, PROPER_SHARE),  # remove what is altered with this probability
        },
        "abl": {
            "epochs": (10, POSITIVE),  # of training with flooding
            "flooding": (0.5, POSITIVE),  # the level that the loss is held at
            "fraction": (0.15, PROPER_SHARE),  # remove this share, of the lowest losses
        },
        "cognitive_distillation": {
            "steps": (100, POSITIVE),  # of optimising each image's mask
            "learning_rate": (0.1, POSITIVE),  # of its Adam
            "l1_weight": (0.01, POSITIVE),  # of the sum of the mask
            "variation_weight": (1.0, POSITIVE),  # of its total variation
            "fraction": (0.15, PROPER_SHARE),  # remove this share, of the smallest masks
        },
        "cbd": {
            "backdoor_epochs": (5, POSITIVE),  # of the network that is to learn the triggers
            "penalty": (0.01, POSITIVE),  # weight of what the features tell about that network's
        },
        "pss": {
            "early_epochs": (2, POSITIVE),  # of the network whose features are compared
            "clean_quantile": (0.8, PROPER_SHARE),  # of the feature inconsistency: below it, examples are called clean
            "poisoned_quantile": (0.95, PROPER_SHARE),  # and above it poisoned
            "epochs": (20, POSITIVE),  # of unlearning the ones and relearning the others, in turns
            "learning_rate": (1e-4, POSITIVE),  # of both
        },
    },
    "retraining": {
        "enabled": (True, FREE),  # False: detect only, train nothing that shows what a removal does
        "epochs": (100, AT_LEAST_ONE),
        "batch_size": (128, AT_LEAST_ONE),
        # none | crop_flip (reflect-pad 4, random crop, random flip) | resized_crop_flip (of 8 to 100 % of the area)
        "augment": ("none", Registered("data.AUGMENTATIONS")),
        # of each model to retrain: kind/rule, or defence/rule ("own" is the rule that a defence brings along)
        "variants": (("loss/fraction", "logits/fraction", "combined/fraction"), FREE),
    },
    "evaluation": {
        # of all devices together, in sweeps, too; with many of them 64 for each, or this for each if it is less
        "batch_size": (500, AT_LEAST_ONE),
        "max_triggered": (10_000, AT_LEAST_ONE),  # test images per attack
        "boost": (2.0, POSITIVE),  # how much stronger the "boosted" trigger is
    },
    "checkpoint": {  # of a training on its way, beside what is kept of finished ones
        "every_steps": (0, NOT_NEGATIVE),  # save after so many steps; 0 does not count steps
        "every_minutes": (10.0, NOT_NEGATIVE),  # or after so many minutes; 0 does not count minutes
        # end with every thread's stack if no step ends for so long; 0 waits for ever
        "stall_minutes": (30.0, NOT_NEGATIVE),
    },
    "report": {
        "gallery": (60, NOT_NEGATIVE),  # highest-ranked images to keep for report.html, of each kind
        "writers": ((), SomeOf(*WRITERS)),  # of what metrics.jsonl gets, too: "tensorboard", "wandb"
    },
}


def default_config() -> ConfigDict:
    """Returns every key at its default: the paper's settings where the paper has one."""
    return _as_config(_SETTINGS).lock()


def _as_config(table: Mapping[str, Any]) -> ConfigDict:
    """Returns the defaults of a group of the table."""
    config = ConfigDict()
    for name, entry in table.items():
        if isinstance(entry, Mapping):
            config[name] = _as_config(entry)
        else:
            config[name], _ = entry
    return config


def constraints() -> dict[str, Range | OneOf | Registered]:
    """Returns key -> which values it may have, of every key that may not have any of its default's type."""
    return {key: constraint for key, (_, constraint) in _leaves(_SETTINGS) if constraint is not FREE}


def parse_rule(text: str, rejection: Mapping[str, Any]) -> tuple[str, float]:
    """Splits a rule of `rejection.rules`, "RULE" or "RULE@LEVEL".

    Args:
      text: the rule.
      rejection: `config.rejection`, which has the level of a rule that says none.

    Returns:
      The rule, one of `RULES`, and its level; "clusters" has none, which is 0 here.

    Raises:
      UsageError: an unknown rule, or a level that is not above 0 and below 1.
    """
    rule, at, level = text.partition("@")
    one_of("rejection.rules", rule, RULES)

    # Evidence has its own thresholds, so there is no level to choose.
    if rule == "clusters":
        if at:
            raise UsageError(f"rejection.rules has {text!r}: the rule clusters has no level")
        return rule, 0.0
    if not at:
        return rule, rejection[rule]

    try:
        value = float(level)
    except ValueError:
        value = math.nan  # lies in no range

    if not 0 < value < 1:
        raise UsageError(f"rejection.rules has {text!r}: expected a level above 0 and below 1 after the @")
    return rule, value


def check_variant(variant: str, known: Sequence[str]) -> None:
    """Checks the variant of a config file, for use in its `get_config`.

    Args:
      variant: that was asked for; "" is the file as it is.
      known: variants of the file.

    Raises:
      UsageError: there is no such variant.
    """
    if variant and variant not in known:
        raise UsageError(f"unknown variant {variant!r}: this config file has {listed(known) or 'none'}")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
