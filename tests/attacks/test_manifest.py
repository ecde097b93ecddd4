import json

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from badloss_jax.attacks import ATTACKS, make_trigger
from badloss_jax.attacks.manifest import choose_probes, draw_manifest, load_manifest, read_manifest
from badloss_jax.attacks.poisoning import apply_manifest, evaluation_triggers
from badloss_jax.config import default_config
from badloss_jax.core.errors import DataError, UsageError

LABELS = np.repeat(np.arange(10), 100)
SHAPE = (16, 16, 3)


def settings(**changed):
    config = default_config().attacks
    for key, value in changed.items():
        name, _, leaf = key.partition("__")
        if leaf:
            config[name][leaf] = value
        else:
            config[name] = value
    return config


def draw(seed=0, **changed):
    return draw_manifest(settings(**changed), LABELS, 10, SHAPE, seed)


PERTURBATION = np.random.default_rng(0).integers(-16, 17, SHAPE)


def with_narcissus():
    """A manifest of all attacks."""
    return draw(names=tuple(ATTACKS), narcissus__ratio=0.05).with_perturbation("narcissus", PERTURBATION)


def test_no_image_twice_and_the_right_ones():
    manifest = draw()
    assert len(set(manifest.poisoned_ids)) == len(manifest.poisoned_ids) == 5 * 10 + 10
    assert len({plan.target for plan in manifest.attacks.values()}) == 6
    for name, plan in manifest.attacks.items():
        victims = LABELS[list(plan.example_ids)]
        assert (victims == plan.target).all() if ATTACKS[name].clean_label else (victims != plan.target).all()


def test_a_manifest_is_a_function_of_the_seed():
    assert draw(3) == draw(3)
    assert draw(3).digest != draw(4).digest


def test_an_attack_is_drawn_alike_with_or_without_the_others():
    for name in ("patch", "frequency"):
        alone, together = draw(names=(name,)).attacks[name], draw().attacks[name]
        assert (alone.seed, alone.target) == (together.seed, together.target)


def test_drawn_targets_avoid_chosen_ones():
    for target in range(10):
        plans = draw(patch__target=target).attacks.values()
        assert len({plan.target for plan in plans}) == 6
    few = draw_manifest(settings(patch__target=1), LABELS % 2, 2, SHAPE, 0)
    assert {plan.target for name, plan in few.attacks.items() if name != "patch"} == {0}


def test_targets_can_be_chosen():
    assert draw(sinusoid__target=7).attacks["sinusoid"].target == 7
    with pytest.raises(UsageError, match=r"attacks.patch.target = 10: expected a class from 0 to 9"):
        draw(patch__target=10)


def test_more_poison_than_images_names_both_numbers():
    with pytest.raises(UsageError, match=r"attacks.blend_r.ratio = 0.9 asks for 900 images, and [0-9]+ unpoisoned"):
        draw(patch__ratio=0.5, blend_r__ratio=0.9)
    with pytest.raises(UsageError, match="asks for 0 images"):
        draw(patch__ratio=1e-6)


def test_probes_are_clean_and_nested():
    manifest = draw()
    few = choose_probes(manifest, 50, 0)
    with pytest.warns(UserWarning, match=r"probes.count = 250 of 940 clean examples"):
        many = choose_probes(manifest, 250, 0)
    assert not set(many) & set(manifest.poisoned_ids)
    assert set(few) < set(many)
    assert len(many) == 250
    with pytest.raises(UsageError, match=r"probes.count = 940, and 940 examples are clean"):
        choose_probes(manifest, 940, 0)


def test_contaminated_probes_are_in_truth_poisoned():
    manifest = draw()
    clean, poison = choose_probes(manifest, 40, 0), set(manifest.poisoned_ids.tolist())
    for share, wrong in ((0.0, 0), (0.25, 10), (0.9, 36)):
        probes = choose_probes(manifest, 40, 0, share)
        assert (np.diff(probes) > 0).all()
        assert len(probes) == 40
        assert len(poison & set(probes.tolist())) == wrong
        assert set(probes.tolist()) - poison <= set(clean.tolist())
    few = choose_probes(manifest, 20, 0, 0.25)
    assert set(few.tolist()) < set(choose_probes(manifest, 40, 0, 0.25).tolist())
    with pytest.raises(UsageError, match=r"contaminated = 0.9 asks for 90 poisoned probes, and 60 examples are"):
        choose_probes(manifest, 100, 0, 0.9)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_triggers_overlap(share):
    plain, manifest = draw(), draw(overlap=share)
    assert (manifest == plain) == (share == 0)
    assert draw(overlap=share) == manifest
    below = {i: name for name, plan in manifest.attacks.items() for i in plan.below_ids}
    attack_of = manifest.attack_of()
    for name, plan in manifest.attacks.items():
        assert plan.example_ids == plain.attacks[name].example_ids
        assert sum(i in below for i in plan.example_ids) == round(share * len(plan.example_ids))
    assert all(attack_of[i] not in ("", name) for i, name in below.items())
    images = np.random.default_rng(0).integers(0, 256, (1000, *SHAPE), dtype=np.uint8)
    ours, theirs = apply_manifest(manifest, images, LABELS), apply_manifest(plain, images, LABELS)
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    assert sum(ours.below >= 0) == len(below)
    for i in manifest.poisoned_ids.tolist():
        (shown,), x = ours.triggered([i]), images[[i]].astype(np.float32) / 255
        for name in (below.get(i), attack_of[i]):  # its own trigger on top
            plan = manifest.attacks.get(name)
            x = make_trigger(name, SHAPE, plan.seed, **plan.parameters)(x) if plan else x
        np.testing.assert_array_equal(shown, x[0])


def test_overlap_needs_a_second_attack():
    with pytest.raises(UsageError, match=r"attacks.overlap = 0.5 needs a second attack: attacks.names has patch alone"):
        draw(names=("patch",), overlap=0.5)


def test_overlaps_go_with_the_manifest(tmp_path):
    manifest, path = draw(overlap=0.5), tmp_path / "manifest.json"
    path.write_text(manifest.to_json())
    assert read_manifest(path) == manifest
    raw = json.loads(manifest.to_json())
    for plan in raw["attacks"].values():
        del plan["below_ids"]  # as in those of older versions
    path.write_text(json.dumps(raw))
    assert read_manifest(path) == draw()


def test_round_trip(tmp_path):
    manifest, path = draw(), tmp_path / "manifest.json"
    path.write_text(manifest.to_json())
    assert load_manifest(path, 1000, 10, SHAPE) == manifest
    with pytest.raises(UsageError, match=r"\(1000, 10, \(16, 16, 3\)\), and this training set has \(999, 10"):
        load_manifest(path, 999, 10, SHAPE)


def test_only_the_poisoned_change():
    images = np.random.default_rng(0).integers(0, 256, (1000, *SHAPE), dtype=np.uint8)
    kept, manifest = images.copy(), draw()
    poisoning = apply_manifest(manifest, images, LABELS)
    np.testing.assert_array_equal(images, kept)
    attack_of = manifest.attack_of()
    assert (poisoning.labels == LABELS)[attack_of == ""].all()
    assert sum(attack_of != "") == len(poisoning.ids)
    for name, plan in manifest.attacks.items():
        ids = list(plan.example_ids)
        assert (poisoning.labels[ids] == plan.target).all()
        assert (attack_of[ids] == name).all()
        expected = make_trigger(name, SHAPE, plan.seed, **plan.parameters)(images[ids].astype(np.float32) / 255)
        np.testing.assert_array_equal(poisoning.triggered(ids), expected)


def test_boosted_triggers_are_twice_as_strong():
    grey = np.full((1, *SHAPE), 0.5, np.float32)
    manifest = with_narcissus()
    shown = {
        (name, version): trigger(grey)[0] - 0.5 for name, _, version, trigger in evaluation_triggers(manifest, 2.0)
    }
    additive = {"blend_r", "blend_p", "sinusoid", "narcissus"}
    assert {name for name, version in shown if version == "boosted"} == additive | {"frequency"}
    assert {name for name, version in shown if version == "plain"} == set(ATTACKS)
    for name in additive:
        np.testing.assert_allclose(shown[name, "boosted"], 2 * shown[name, "plain"], atol=1e-6)
    assert {name for name, version in shown if version == "scrambled"} == {"narcissus"}
    plain, scrambled = shown["narcissus", "plain"], shown["narcissus", "scrambled"]
    assert (plain != scrambled).any()
    np.testing.assert_array_equal(np.sort(plain.ravel()), np.sort(scrambled.ravel()))


def test_an_optimised_trigger_goes_with_the_manifest(tmp_path):
    manifest = with_narcissus()
    assert manifest.unoptimised == ()
    assert draw(names=("patch", "narcissus"), narcissus__ratio=0.05).unoptimised == ("narcissus",)
    path = tmp_path / "manifest.json"
    path.write_text(manifest.to_json())
    assert read_manifest(path) == manifest
    (victim, *_), x = manifest.attacks["narcissus"].example_ids, np.full((1000, *SHAPE), 128, np.uint8)
    poisoning = apply_manifest(manifest, x, LABELS)
    added = (poisoning.triggered([victim])[0] * 255).round() - 128
    np.testing.assert_array_equal(added.ravel(), PERTURBATION.ravel())


def test_a_small_class_is_no_target_of_the_sinusoid():
    labels = np.repeat(np.arange(10), [40, 30, 200, 30, 30, 30, 200, 30, 30, 30])
    for seed in range(20):
        manifest = draw_manifest(settings(sinusoid__min_class=100, sinusoid__min_images=60), labels, 10, SHAPE, seed)
        plan = manifest.attacks["sinusoid"]
        assert plan.target in (2, 6)
        assert len(plan.example_ids) == 60
        others = {name: plan.target for name, plan in manifest.attacks.items() if name != "sinusoid"}
        free = draw_manifest(settings(), labels, 10, SHAPE, seed)
        assert others == {name: plan.target for name, plan in free.attacks.items() if name != "sinusoid"}
        alone = settings(names=("sinusoid",), sinusoid__min_class=100)
        assert draw_manifest(alone, labels, 10, SHAPE, seed).attacks["sinusoid"].target == plan.target
    with pytest.raises(UsageError, match="min_class = 201: the largest class has 200 images"):
        draw_manifest(settings(sinusoid__min_class=201), labels, 10, SHAPE, 0)
    with pytest.raises(
        UsageError, match=r"attacks.sinusoid.target = 0 has 40 images, and attacks.sinusoid.min_class = 50"
    ):
        draw_manifest(settings(sinusoid__min_class=50, sinusoid__target=0), labels, 10, SHAPE, 0)


def broken(**changed):
    manifest = json.loads(draw().to_json())
    for key, value in changed.items():
        node = manifest
        *path, last = key.split("__")
        for part in path:
            node = node[part]
        node[last] = value
    return json.dumps(manifest)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a usable manifest"),
        ("[1]", "no JSON object"),
        ("[" * 100_000, "not a usable manifest"),
        (broken(format="other"), "format"),
        (broken(attacks={"rm": {"target": 0, "seed": 0, "example_ids": [1], "parameters": {}}}), "unknown attack 'rm'"),
        (broken(attacks__patch__target=10), "has target 10 of 10"),
        (broken(attacks__patch__target=-1), "-1 is not a non-negative integer"),
        (broken(attacks__patch__target=1.5), "1.5 is not"),
        (broken(attacks__patch__target=True), "True is not"),
        (broken(attacks__patch__example_ids=[]), "poisons nothing"),
        (broken(attacks__patch__example_ids=[1000]), "example id 1000 is outside 0 to 999"),
        (broken(attacks__patch__example_ids=[5, 5]), "example id 5 is poisoned twice"),
        (broken(attacks__patch__example_ids="12"), "'1' is not"),
        (broken(attacks__blend_r__parameters={"strength": "nan"}), "strength nan"),
        (broken(attacks__blend_r__parameters={"strength": 10**400}), "not a usable manifest"),
        (broken(attacks__blend_r__parameters={"strength": -50}), "strength -50"),
        (broken(attacks__blend_r__parameters={}), r"has the parameters \[\], expected \['strength'\]"),
        (broken(attacks__blend_r__parameters={"__class__": 1}), r"has the parameters \['__class__'\]"),
        (broken(attacks__patch__below_ids=[draw().attacks["patch"].example_ids[0]]), "no other attack poisons"),
        (broken(attacks__patch__below_ids=[10**6]), "below_ids name 1000000 that no other attack poisons"),
        (broken(attacks__patch__below_ids=[-1]), "-1 is not a non-negative integer"),
        (broken(attacks__patch__below_ids=2 * [draw().attacks["blend_r"].example_ids[0]]), "or twice"),
        (
            broken(
                **{
                    f"attacks__{name}__below_ids": [draw().attacks["blend_r"].example_ids[0]]
                    for name in ("patch", "sinusoid")
                }
            ),
            "or twice",
        ),
        (broken(attacks__patch=None), "not a usable manifest"),
        (broken(image_shape=[16]), "not a usable manifest"),
    ],
)
def test_hostile_manifests_are_refused(tmp_path, text, message):
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_manifest(path)


def test_missing_manifest(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_manifest(tmp_path / "none.json")


# What a hostile manifest may hold where something else is expected.
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(tree, path=()):
    """Every place in a tree of JSON."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def replaced(tree, path, value):
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = replaced(tree[path[0]], path[1:], value)
    return copy


@hypothesis.settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_manifest_is_read_or_refused(tmp_path, data):
    """Whatever stands anywhere in it: a manifest that can be used, or an error."""
    whole = json.loads(draw().to_json())
    where = data.draw(st.sampled_from([*places(whole)]))
    text = json.dumps(replaced(whole, where, data.draw(anything)))
    if data.draw(st.booleans()):
        text = text[: data.draw(st.integers(0, len(text)))]
    path = tmp_path / "m.json"
    path.write_text(text)
    try:
        manifest = read_manifest(path)
    except DataError:
        return
    ids = manifest.poisoned_ids
    assert len(set(ids.tolist())) == len(ids)
    assert ((ids >= 0) & (ids < manifest.num_examples)).all()
    for name, plan in manifest.attacks.items():
        assert name in ATTACKS
        assert 0 <= plan.target < manifest.num_classes


@hypothesis.settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_bytes_are_no_manifest(tmp_path, content):
    path = tmp_path / "m.json"
    path.write_bytes(content)
    with pytest.raises(DataError):
        read_manifest(path)
