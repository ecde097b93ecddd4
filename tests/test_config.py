import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from badloss_jax.config import (
    check_config,
    config_hash,
    default_config,
    differences,
    from_json,
    load_config,
    override,
    to_dict,
    to_json,
)
from badloss_jax.core.errors import UsageError
from badloss_jax.settings import parse_rule

CONFIGS = sorted(str(path) for path in Path("configs").glob("*.py"))
DIGITS = "configs/digits.py"


@pytest.mark.parametrize(
    "spec",
    [
        *CONFIGS,
        "configs/digits.py:step",
        "configs/fashion_mnist.py:quick",
        "configs/cifar10.py:quick",
        "configs/gtsrb.py:third",
    ],
)
def test_every_config_loads_and_survives_json(spec):
    config = load_config(spec)
    again = from_json(to_json(config))
    assert config_hash(again) == config_hash(config)
    assert not differences(to_dict(again), to_dict(config))


def test_cifar10_has_the_papers_settings():
    config = load_config("configs/cifar10.py")
    assert (config.model.name, config.recording.epochs, config.recording.schedule_epochs) == ("resnet50", 30, 100)
    assert (config.recording.batch_size, config.probes.count, config.scoring.loss.k) == (128, 250, 50)
    assert (config.rejection.fraction, config.retraining.augment, config.retraining.epochs) == (0.4, "crop_flip", 100)


def test_narcissus_is_checked_where_it_attacks():
    with pytest.raises(UsageError, match=r"attacks.narcissus.epsilon = 0: expected .* at least 1 and at most 127"):
        load_config("configs/cifar10.py", ["--config.attacks.narcissus.epsilon=0"])
    with pytest.raises(UsageError, match=r"attacks.narcissus.surrogate has 'resnet'"):
        load_config("configs/cifar10.py", ["--config.attacks.narcissus.surrogate=resnet"])
    with pytest.raises(UsageError, match=r"attacks.narcissus.steps = 0: expected a finite number above 0"):
        load_config("configs/cifar10.py", ["--config.attacks.narcissus.steps=0"])


@pytest.mark.parametrize(
    ("spec", "batch", "schedule", "retrained", "augment", "names"),
    [
        ("gtsrb", 256, 100, 100, "none", 6),
        ("imagenette", 256, 250, 250, "resized_crop_flip", 5),
        ("imagenet", 256, 100, 50, "resized_crop_flip", 5),
    ],
)
def test_large_configs_have_the_papers_settings(spec, batch, schedule, retrained, augment, names):
    config = load_config(f"configs/{spec}.py")
    assert (config.data.image_size, config.model.name, len(config.attacks.names)) == (224, "resnet50", names)
    assert (config.recording.epochs, config.recording.schedule_epochs, config.recording.batch_size) == (
        30, schedule, batch)  # fmt: skip
    assert (config.retraining.epochs, config.retraining.batch_size, config.retraining.augment) == (
        retrained, batch, augment)  # fmt: skip
    assert {config.attacks[name].strength for name in ("blend_r", "blend_p", "sinusoid")} == {0.15}
    assert config.attacks.frequency.magnitude == 90


def test_rules_carry_levels():
    rejection = default_config().rejection
    assert parse_rule("alpha", rejection) == ("alpha", rejection.alpha)
    assert parse_rule("fraction@0.1", rejection) == ("fraction", 0.1)
    assert parse_rule("clusters", rejection) == ("clusters", 0.0)


def test_overrides_keep_types():
    assert load_config(DIGITS, ["--config.controls=oracle"]).controls == ("oracle",)
    config = load_config(DIGITS, ["--config.seed=3", "--config.controls=('oracle',)", "--config.rejection.alpha=0.2",
                                  "--config.attacks.manifest=/tmp/x=y.json", "--config.data.pad=1"])  # fmt: skip
    assert config.seed == 3
    assert config.controls == ("oracle",)
    assert config.rejection.alpha == 0.2
    assert config.attacks.manifest == "/tmp/x=y.json"
    assert config.data.pad == 1
    assert load_config(DIGITS, ["--config.data.skip_corrupt=True"]).data.skip_corrupt is True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--config.scoring.los.k=3", r"unknown config key 'scoring.los.k'; did you mean 'scoring.loss.k'\?"),
        ("--config.epochs=3", r"unknown config key 'epochs'; did you mean '.*epochs'\?"),
        ("--config.scoring.loss=3", r"'scoring.loss' is a group: set one of scoring.loss.k"),
        ("--config.seed.x=3", r"seed is a value, not a group"),
        ("--config.seed=three", r"seed = 'three': expected an integer"),
        ("--config.seed=1.5", r"seed = '1.5': expected an integer"),
        ("--config.controls=(1,)", r"controls = .1,.: expected a tuple of str"),
        ("--config.model.stages=('a',)", r"model.stages = .'a',.: expected a tuple of int"),
        ("--config.model.stages=x", r"model.stages"),
        ("--config.data.skip_corrupt=maybe", r"data.skip_corrupt = 'maybe': expected True or False"),
        ("--config.seed", r"overrides look like --config.group.key=value"),
        ("--config.seed=-1", r"seed = -1: expected a finite number of at least 0"),
        ("--config.model.name=resnet19", r"model.name has 'resnet19': expected one of .*did you mean 'resnet1?8?"),
        ("--config.data.source=digit", r"did you mean 'digits'"),
        ("--config.attacks.names=('patch','pach')", r"attacks.names has 'pach'.*did you mean 'patch'"),
        ("--config.attacks.names=('patch','patch')", r"names something twice"),
        (
            "--config.attacks.patch.ratio=1.5",
            r"attacks.patch.ratio = 1.5: expected .* above 0 and at most 1",
        ),
        ("--config.attacks.patch.ratio=nan", r"attacks.patch.ratio = nan"),
        ("--config.attacks.frequency.magnitude=0", r"attacks.frequency.magnitude = 0"),
        (
            "--config.recording.epochs=2",
            r"recording.epochs = 2: expected .* at least 3 \(the epoch filter",
        ),
        (
            "--config.recording.schedule_epochs=10",
            r"recording.schedule_epochs = 10: expected .* at least 30",
        ),
        (
            "--config.scoring.loss.k=100",
            r"scoring.loss.k = 100 with probes.count = 100: expected 1 <= k < probes.count",
        ),
        ("--config.probes.count=15", r"scoring.loss.k = 20 with probes.count = 15"),
        ("--config.scoring.logits.k=0", r"scoring.logits.k = 0"),
        (
            "--config.recording.kinds=('logits',)",
            r"scoring.kinds has 'ranked', which needs 'ranked' in recording.kinds",
        ),
        ("--config.retraining.variants=('loss/fractoin',)", r"KIND/RULE; did you mean 'loss/fraction'"),
        ("--config.retraining.variants=('prob/fraction',)", r"retraining.variants has 'prob/fraction'"),
        ("--config.retraining.variants=('loss/fraction@0.2',)", r"has 'loss/fraction@0.2': expected KIND/RULE"),
        ("--config.rejection.rules=('fraction','alfa')", r"rejection.rules has 'alfa'.*did you mean 'alpha'"),
        ("--config.rejection.rules=('fraction@1.5',)", r"'fraction@1.5': expected a level above 0 and below 1"),
        ("--config.rejection.rules=('fraction@x',)", r"'fraction@x': expected a level above 0 and below 1"),
        ("--config.rejection.rules=('clusters@0.5',)", r"'clusters@0.5': the rule clusters has no level"),
        ("--config.rejection.rules=('fdr','fdr')", r"rejection.rules = .* each once"),
        ("--config.report.writers=('tensorbord',)", r"report.writers has 'tensorbord'.*did you mean 'tensorboard'"),
        ("--config.data.class_names=(1,)", r"data.class_names = .1,.: expected a tuple of str"),
        ("--config.attacks.sinusoid.min_class=-1", r"attacks.sinusoid.min_class = -1"),
        (
            "--config.rejection.fraction=1.0",
            r"rejection.fraction = 1.0: expected .* at least 0 and below 1",
        ),
        ("--config.optimizer.loss_clamp=inf", r"optimizer.loss_clamp = inf: expected a finite number above 0"),
        (f"--config.seed={10**400}", r"seed = 10+: expected"),
        ("--config.scoring.kinds=()", r"scoring.kinds is empty|scoring.kinds"),
        ("--config.model.stages=()", r"model.stages = \(\)"),
        ("--config.optimizer.learning_rate=0", r"optimizer.learning_rate = 0.0: expected a finite number above 0"),
        ("--config.defenses.names=('badlos',)", r"defenses.names has 'badlos'.*did you mean 'badloss'"),
        ("--config.defenses.names=('badloss','badloss')", r"defenses.names names something twice"),
        ("--config.scoring.epochs=2", r"scoring.epochs = 2: expected 0, or 3 to recording.epochs = 30"),
        ("--config.scoring.epochs=31", r"scoring.epochs = 31: expected 0, or 3 to recording.epochs = 30"),
        ("--config.scoring.epochs=-1", r"scoring.epochs = -1: expected a finite number of at least 0"),
        ("--config.scoring.kinds=('step',)", r"scoring.kinds has 'step', which needs 'step' in recording.kinds"),
        ("--config.attacks.overlap=1", r"attacks.overlap = 1.0: expected .* at least 0 and below 1"),
        ("--config.probes.contaminated=-0.1", r"probes.contaminated = -0.1: expected .* at least 0 and below 1"),
        ("--config.defenses.abl.fraction=1", r"defenses.abl.fraction = 1.0: expected .* above 0 and below 1"),
        (
            "--config.defenses.spectral_signatures.eps=0",
            r"spectral_signatures.eps = 0.0: expected .* above 0 and below 1",
        ),
        ("--config.defenses.pss.clean_quantile=nan", r"defenses.pss.clean_quantile = nan"),
        ("--config.defenses.abl.epochs=0", r"defenses.abl.epochs = 0: expected a finite number above 0"),
        ("--config.retraining.variants=('loss/own',)", r"has 'loss/own': expected KIND/RULE"),
        ("--config.model.ghost_batch=-1", r"model.ghost_batch = -1: expected a finite number of at least 0"),
    ],
)
def test_impossible_settings_are_named(text, message):
    with pytest.raises(UsageError, match=message):
        load_config(DIGITS, [text])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scoring.kinds": "()", "retraining.variants": "()"}, r"scoring.kinds and defenses.names are empty"),
        ({"recording.capture": "step", "recording.kinds": "('step',)"}, r"which is what recording.capture = 'step'"),
        ({"defenses.names": "('badloss_step',)"}, r"defenses.names has 'badloss_step', which needs 'step' in"),
        ({"scoring.kinds": "()", "retraining.variants": "()", "defenses.names": "('badloss',)", "scoring.loss.k": 100},
         r"scoring.loss.k = 100 with probes.count = 100"),
        ({"recording.kinds": "()", "scoring.kinds": "('loss',)", "defenses.names": "('forgetting_events',)",
          "retraining.variants": "()"}, r"'forgetting_events', which needs 'ranked' or 'logits' in recording.kinds"),
        ({"defenses.names": "('badloss',)", "retraining.variants": "('badloss/fractoin',)"},
         r"has 'badloss/fractoin': expected KIND/RULE or DEFENCE/RULE; did you mean 'badloss/fraction'"),
        ({"defenses.names": "('badloss',)", "retraining.variants": "('badloss/own',)"}, r"has 'badloss/own': expected"),
        ({"retraining.variants": "('badloss/fraction',)"}, r"has 'badloss/fraction': expected KIND/RULE"),
        ({"model.ghost_batch": 24, "recording.batch_size": 48},
         r"model.ghost_batch = 24 does not divide retraining.batch_size = 32: .*; 16 would do, or 0"),
        ({"model.ghost_batch": 7, "recording.batch_size": 9},
         r"model.ghost_batch = 7 does not divide recording.batch_size = 9: .*; 1 would do, or 0"),
        ({"model.ghost_batch": 64}, r"does not divide recording.batch_size = 32: .*; 32 would do, or 0"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_named(changed, message):
    with pytest.raises(UsageError, match=message):
        load_config(DIGITS, [f"--config.{key}={value}" for key, value in changed.items()])


def test_variants_may_be_those_of_defences(monkeypatch):
    from badloss_jax.defenses import DEFENSES, Defense

    monkeypatch.setitem(DEFENSES, "one", Defense(None, own_rule=True))
    monkeypatch.setitem(DEFENSES, "alone", Defense(None, cleanses=True))
    names = "--config.defenses.names=('badloss','one','alone')"
    variants = ("loss/fdr", "badloss/alpha", "one/own", "one/fraction")
    assert load_config(DIGITS, [names, f"--config.retraining.variants={variants}"]).retraining.variants == variants
    for variant in ("alone/fraction", "alone/own", "alone"):
        with pytest.raises(UsageError, match=f"retraining.variants has '{variant}'"):
            load_config(DIGITS, [names, f"--config.retraining.variants=('{variant}',)"])


def test_shares_of_defences_are_told_from_counts(monkeypatch):
    """ "steps" ends as "eps" does."""
    from badloss_jax.defenses import DEFENSES, Defense

    monkeypatch.setitem(DEFENSES, "cognitive_distillation", Defense(None))
    assert load_config(DIGITS).defenses.cognitive_distillation.steps > 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("config = 3", "no attribute 'get_config'"),
        ("def get_config(v): return {}", "returned dict, expected a ConfigDict"),
        ("def get_config(v): return 1 +", "invalid syntax"),
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("def get_config(v): return 1 / 0", "cannot be used: division by zero"),
        (
            "from ml_collections import ConfigDict\ndef get_config(v): return ConfigDict({'seed': 1})",
            "config key 'attacks.blend_p.ratio' is missing",
        ),
        (
            "from badloss_jax.config import default_config\n"
            "def get_config(v):\n    c = default_config()\n    c.unlock()\n    c.scoring.kindz = ()\n    return c",
            "unknown config key 'scoring.kindz'; did you mean 'scoring.kinds'",
        ),
        (
            "from badloss_jax.config import default_config\n"
            "def get_config(v):\n    c = default_config()\n    c.data.sorce = 'idx'\n    return c",
            "sorce.*Did you mean",
        ),
        (
            "from badloss_jax.config import default_config\n"
            "def get_config(v):\n    c = default_config()\n    c.seed = 'x'\n    return c",
            "cannot be used: .*seed",
        ),
    ],
)
def test_bad_config_files(tmp_path, content, message):
    path = tmp_path / "bad.py"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_config(str(path))


def test_missing_file_and_variant():
    with pytest.raises(UsageError, match=r"configs/digit.py does not exist; did you mean 'configs/digits.py'"):
        load_config("configs/digit.py")
    with pytest.raises(UsageError, match="unknown variant 'quik': this config file has quick"):
        load_config("configs/cifar10.py:quik")


def test_where_files_lie_is_not_hashed():
    config = load_config(DIGITS)
    moved = override(config, ["--config.data.dir=/e", "--config.data.cache_dir=", "--config.attacks.manifest=m"])
    assert config_hash(moved) == config_hash(config)
    assert config_hash(override(config, ["--config.seed=1"])) != config_hash(config)
    assert config.data.dir == ""  # override copies


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"seed": "x"}', '{"sed": 1}', "null"])
def test_stored_configs_are_checked(text):
    with pytest.raises(UsageError, match=r"not a config of this version|unknown config key|a config is a|is missing"):
        from_json(text)


def test_defaults_are_valid():
    check_config(default_config())


values = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=8) | st.lists(
    st.integers(-1, 3) | st.text(max_size=5), max_size=3
)  # fmt: skip


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([*leaves(to_dict(default_config()))]), values | st.dictionaries(st.text(max_size=5), values))
def test_any_stored_config_is_read_or_refused(path, value):
    """Whatever stands at a key: a config that passes all checks, or an error."""
    stored = to_dict(default_config())
    group = stored
    for key in path[:-1]:
        group = group[key]
    group[path[-1]] = value
    try:
        config = from_json(json.dumps(stored))
    except UsageError:
        return
    check_config(config)
    assert from_json(to_json(config)) == config


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([".".join(path) for path in leaves(to_dict(default_config()))]), st.text(max_size=12))
def test_any_override_is_taken_or_refused(key, text):
    try:
        config = override(default_config(), [f"--config.{key}={text}"])
    except UsageError:
        return
    check_config(config)
