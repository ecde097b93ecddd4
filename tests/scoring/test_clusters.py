"""Clusters of a class without a clean probe: planted ones are found whole, and clean classes have none."""

from functools import partial

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from badloss_jax import TrajectoryRecorder
from badloss_jax.cli import main
from badloss_jax.core.errors import UsageError
from badloss_jax.core.mesh import make_mesh
from badloss_jax.scoring import CERTAIN, POSSIBLE, Cluster, Impressions, Signs, find_clusters, growth, signs
from badloss_jax.scoring.evidence import NATURAL, clean_class_p_value, evidence_of, judged, natural_gap
from badloss_jax.scoring.signs import ClassExamples

CLASSES = 6


def planted(seed, attacks=((1, 60), (4, 60)), per_class=400, probes=120):
    """Gaussian trajectories of two kinds; each attack shifts its poison in a direction of its own, from all classes.

    In the end a network takes all for their own class, as one that has learnt the triggers does.
    """
    draw = np.random.default_rng(seed)
    labels = np.repeat(np.arange(CLASSES), per_class)
    centres = draw.normal(size=(CLASSES, 8, 8))
    features = centres[labels] + draw.normal(size=(len(labels), 8, 8))
    ranked = draw.normal(size=(len(labels), 8, 3))
    seen_as = np.where(draw.random(len(labels)) < 0.8, labels, (labels + 1) % CLASSES)
    poison = np.zeros(len(labels), int)
    for number, (label, count) in enumerate(attacks, start=1):
        free = np.flatnonzero((labels == label) & (poison == 0))
        ids = draw.choice(free, count, replace=False)
        poison[ids] = number
        features[ids] += 1.5 * draw.normal(size=(8, 8))
        seen_as[ids] = draw.integers(0, CLASSES, count)
    is_probe = np.zeros(len(labels), bool)
    is_probe[draw.choice(np.flatnonzero(poison == 0), probes, replace=False)] = True
    # As far as a distance would be: poison lies further out, and some clean examples as well.
    far = draw.normal(size=len(labels)) + 2.5 * (poison > 0)
    kinds = [features.astype(np.float16), ranked.astype(np.float16)]
    return kinds, labels, is_probe, far, Impressions(seen_as, labels, np.full(len(labels), -5.0, np.float32)), poison


def unlearnt(seed, attacks=((1, 80), (4, 80))):
    """The same, of triggers that are not learnt: poison lies no further out, and is taken for other classes."""
    kinds, labels, is_probe, _, looks, poison = planted(seed, attacks)
    draw = np.random.default_rng(seed + 100)
    late, odds = labels.copy(), draw.normal(-3.0, 2.0, len(labels)).astype(np.float32)
    # A twentieth of each class is hard, and taken for its neighbour: with probes among them, and no crowd.
    hard = draw.random(len(labels)) < 0.05
    late[hard], odds[hard] = (labels[hard] + 1) % CLASSES, 2.0
    late[poison > 0], odds[poison > 0] = looks.first[poison > 0], 4.0
    far = draw.normal(size=len(labels)) - 0.5 * (poison > 0)
    return kinds, labels, is_probe, far, Impressions(looks.first, late, odds), poison


find = partial(find_clusters, threshold=POSSIBLE)


@pytest.mark.parametrize("attacks", [((1, 60), (4, 60)), ((2, 50), (2, 70)), ((0, 160),)])
def test_planted_attacks_are_found_and_hardly_anything_else(attacks):
    """Also two that share a class, which may be one cluster, and one of two fifths of a class."""
    *given, poison = planted(3, attacks)
    found = find(*given)
    members = np.concatenate([one.ids for one in found])
    assert {one.label for one in found} == {label for label, _ in attacks}
    assert len(found) <= len(attacks)
    assert len(np.unique(members)) == len(members)
    assert (poison[members] > 0).mean() > 0.95
    assert np.isin(np.flatnonzero(poison), members).mean() > 0.9
    assert not given[2][members].any()
    for one in found:
        assert one.evidence >= CERTAIN
        assert one.signs.far > 1.5
        assert one.signs.probes_p < 0.1


def test_what_was_not_learnt_is_found_by_what_it_is_taken_for():
    *given, poison = unlearnt(3)
    kinds, labels, is_probe, far, looks = given
    found = find(*given)
    members = np.concatenate([one.ids for one in found])
    assert {one.label for one in found if one.certain} == {1, 4}
    assert (poison[members] > 0).mean() > 0.95
    assert np.isin(np.flatnonzero(poison), members).mean() > 0.9
    assert all(one.signs.odds > 3 and one.signs.late_sources > 0.5 for one in found)

    learnt = Impressions(looks.first, labels, np.full(len(labels), -5.0, np.float32))
    assert not find(kinds, labels, is_probe, far, learnt)


def test_what_is_left_of_a_class_that_is_nearly_all_poison_is_no_attack():
    """Seven in ten are poison, which lies far out, so that what is left looks like another class."""
    kinds, labels, is_probe, far, looks, poison = planted(3, attacks=((2, 280),))
    clean = (labels == 2) & (poison == 0)
    odds = np.where(clean, 4.0, looks.odds).astype(np.float32)
    late = np.where(clean, np.arange(len(labels)) % CLASSES, looks.late)
    far = far + 4.0 * (poison > 0)
    found = find(kinds, labels, is_probe, far, Impressions(looks.first, late, odds))
    assert not any(clean[one.ids].mean() > 0.5 and one.certain for one in found)


def test_clean_classes_have_no_certain_cluster():
    sets = [make(seed, attacks=())[:5] for make in (planted, unlearnt) for seed in range(8)]
    evidence = [one.evidence for given in sets for one in find(*given)]
    assert sum(value >= CERTAIN for value in evidence) == 0
    assert len(evidence) <= 8


def weighed(natural=NATURAL[-1], **signs):
    """Evidence for a crowd that is far out and of few classes, in a class with so few probes that none was expected."""
    usual = {"share": 0.08, "far": 5.6, "probes_p": 0.75, "gap": 9.5, "agreement": 0.0, "sources": 0.1,
             "late_sources": 0.0, "odds": -6.0}  # fmt: skip
    signs = usual | signs
    return float(evidence_of(natural, **{name: np.float32(value) for name, value in signs.items()}))


def test_a_crowd_further_apart_than_natural_ones_are_is_an_attack_whatever_the_probes():
    assert weighed() >= CERTAIN > POSSIBLE > weighed(gap=7.0)
    # Odd images, what lies near the probes, and what has as many probes as it should.
    assert max(weighed(share=0.02), weighed(far=1.5), weighed(probes_p=1.0)) < POSSIBLE
    assert weighed(share=0.02, sources=0.9) >= CERTAIN


def test_half_of_a_class_needs_a_wider_gap():
    half = partial(weighed, share=0.47, far=4.9, probes_p=0.008, sources=0.02)  # of seven probes all are in the other
    assert half(gap=6.3) < CERTAIN <= half(gap=7.7)
    assert weighed(share=0.2, far=4.9, probes_p=0.008, sources=0.02, gap=6.3) >= CERTAIN


def test_natural_groups_say_how_far_apart_an_attack_is():
    kept_labels = partial(weighed, share=0.22, far=4.6, probes_p=0.043, gap=5.4, agreement=0.9, sources=0.05)
    assert kept_labels() < CERTAIN <= kept_labels(natural=5.0)

    assert natural_gap([4.0, 4.6, 0.0, 3.0]) == 5.0  # at least
    assert natural_gap([5.5, 0.0]) == pytest.approx(5.8)
    assert natural_gap([5.5, 0.0, 0.0]) == natural_gap([7.5]) == NATURAL[-1]


def test_a_group_that_holds_its_probes_is_natural():
    """A quarter of each class lies far apart, with the probes that its size lets expect in it, or with none."""
    points = np.random.default_rng(0).normal(size=(64, 20)).astype(np.float32)
    points[:16, 0] += 30.0
    search = jax.jit(partial(growth.best_of_class, num_classes=3))
    place, nothing, own = np.arange(64), np.zeros(64, np.float32), np.full(64, 3, np.int32)

    def widest(probe):
        seed = np.zeros(1, np.uint32)
        examples = ClassExamples(points, place >= 0, probe, nothing, own, own, nothing)
        return search(examples, seed)[2]

    assert widest(place % 4 == 0) > 8.0 > widest((place % 4 == 0) & (place >= 16))


def test_the_same_seed_finds_the_same():
    *given, _ = planted(5)
    one, other = find(*given, seed=2), find(*given, seed=2)
    assert len(one) == len(other) > 0
    for ours, theirs in zip(one, other, strict=True):
        assert ours.evidence == theirs.evidence
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.scores, theirs.scores)


def test_devices_share_the_classes():
    """Four devices, six classes: two slots of eight are empty."""
    *given, _ = planted(6)
    alone, together = find(*given), find(*given, mesh=make_mesh(jax.devices()[:4]))
    assert [one.label for one in alone] == [one.label for one in together]
    for ours, theirs in zip(alone, together, strict=True):
        assert len(np.setxor1d(ours.ids, theirs.ids)) <= 0.02 * len(ours.ids)
        assert ours.evidence == pytest.approx(theirs.evidence, abs=0.2)


def test_leave_one_out_scores_are_what_leaving_one_out_gives(rng, monkeypatch):
    """The closed form against forty regressions, each without the example that it judges."""
    monkeypatch.setattr(growth, "_ROUNDS", 0)
    points, real = rng.normal(size=(40, 5)).astype(np.float32), np.ones(40, bool)
    members = (points[:, :1] + 0.5 * rng.normal(size=(40, 1)) > 0.4).astype(np.float32)
    classifier, _ = growth._axes(points, real)

    # Ridge regression in these axes has the identity for its normal equations, with a column for the mean.
    design = np.c_[np.asarray(classifier, np.float64), np.full(40, 1 / 40**0.5)]
    targets, expected = members[:, 0] - members.mean(), np.empty(40)
    for number in range(40):
        left = np.arange(40) != number
        normal = np.eye(6) - np.outer(design[number], design[number])
        expected[number] = design[number] @ np.linalg.solve(normal, design[left].T @ targets[left])
    high, low = expected[members[:, 0] > 0].mean(), expected[members[:, 0] == 0].mean()

    scores, grown = growth._grown(classifier, real, members)
    np.testing.assert_array_equal(grown, members)
    np.testing.assert_allclose(scores[:, 0], (expected - (high + low) / 2) / ((high - low) / 2), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("evidence", "gap", "expected"),
    [
        ((7.0, 6.6, 6.7, 6.9), (5.0, 6.0, 5.4, 9.0), 1),  # the third is hardly better apart, the fourth lies elsewhere
        ((7.0, 6.5, 6.5, 6.9), (5.0, 6.0, 8.0, 9.0), 0),  # of too little evidence
        ((5.5, 5.2, 5.2, 5.0), (5.0, 6.0, 8.0, 9.0), 0),  # which alone would be no attack
        ((4.9, 4.5, 4.7, 4.8), (5.0, 6.0, 5.2, 9.0), 1),  # as the best one is not, either
        ((7.0, 6.6, 6.7, 6.9), (5.0, 6.0, 5.6, 9.0), 2),  # of two, that of more evidence
    ],
)
def test_of_a_cluster_the_part_that_is_better_apart_is_taken(evidence, gap, expected):
    members = np.zeros((100, 4), np.float32)
    for column, rows in enumerate((slice(0, 40), slice(0, 20), slice(18, 38), slice(50, 70))):
        members[rows, column] = 1
    assert growth._tighter(np.argmax(evidence), members, np.array(evidence), np.array(gap)) == expected


def test_so_few_probes_are_as_likely_as_the_binomial_says():
    held, draws, share = np.array([0, 1, 5, 20, 30, 31, 40.0]), 40, np.array([0.1, 0.3, 0.2, 0.5, 0.9, 0.9, 0.3])
    odds = share / (1 - share) / (signs._ASTRAY / (1 - signs._ASTRAY))
    expected = np.minimum(np.maximum(stats.binom.cdf(held, draws, share), (1 - share) ** draws * odds**held), 1)
    assert expected[0] == pytest.approx(stats.binom.pmf(0, draws, share[0]))
    expected[held > signs._PROBES_HELD] = 1  # more than these are not counted
    few = signs._so_few(held.astype(np.float32), np.int32(draws), share.astype(np.float32))
    np.testing.assert_allclose(few, expected, rtol=1e-4)
    none = signs._so_few(np.zeros(1, np.float32), np.int32(0), np.array([0.2], np.float32))
    assert none.tolist() == [1.0]  # nothing is lacking where there are no probes


def test_more_evidence_is_rarer_in_clean_classes():
    chances = [clean_class_p_value(evidence) for evidence in (-5, 2.5, 4, CERTAIN, 9)]
    assert chances[:2] == [0.2, 0.2]
    assert sorted(chances, reverse=True) == chances
    assert 0.001 < chances[3] < 0.01  # of ten classes, a few false alarms in a hundred scans
    assert 0 < chances[4] < 1e-4


@pytest.mark.parametrize(
    ("evidence", "classes", "certain"),
    [
        ((5.2, 5.2, 5.2), 10, 0),  # nobody is known to attack
        ((5.3, 4.5), 10, 1),
        ((8.0, 4.9), 10, 2),  # of ten clean classes 0.06 would have as much: at most a twentieth of two clusters
        ((8.0, 4.5), 10, 1),
        ((8.0, 7.0, 6.0, 4.5), 10, 4),
        ((8.0, 7.0, 6.0, 4.5), 100, 3),
    ],
)
def test_beside_an_attack_less_evidence_is_enough(evidence, classes, certain):
    ids = np.arange(3)

    def told(gap=6.6, far=3.4, odds=2.9, sources=0.6, probes_p=0.3):
        signs = Signs(far, probes_p, gap, agreement=0.0, sources=sources, late_sources=0.0, odds=odds)
        found = [Cluster(0, ids, value, signs, np.zeros(3), ids) for value in evidence]
        return [one.certain for one in judged(found, classes)]

    assert told(gap=6.7) == [True] * certain + [False] * (len(evidence) - certain)
    assert told(far=3.5) == told(odds=3.0) == told(far=2.0, sources=0.7, probes_p=0.5) == told(gap=6.7)
    alone = [value >= CERTAIN for value in evidence]
    assert told() == told(far=1.9, sources=0.9) == alone  # a natural group, or half of a class
    assert told(gap=6.7, probes_p=0.31) == alone  # too small for probes to notice
    assert told(gap=6.7, odds=3.0, probes_p=0.6) == told(gap=6.7, far=3.5, probes_p=0.6) == told(gap=6.7)


@pytest.mark.parametrize(
    "spoil", ["constant", "duplicates", "one class of one", "no probes in a class", "three epochs"]
)
def test_odd_inputs_give_numbers(spoil):
    kinds, labels, is_probe, far, looks, _ = planted(3)
    kinds = [kind.copy() for kind in kinds]
    if spoil == "constant":
        kinds = [np.zeros_like(kind) for kind in kinds]
        far = np.zeros_like(far)
    if spoil == "duplicates":
        kinds[0][labels == 2], kinds[1][labels == 2] = kinds[0][0], kinds[1][0]
    if spoil == "one class of one":
        kept = (labels < 5) | (np.arange(len(labels)) == 2_001)
        kinds, labels, is_probe, far = [kind[kept] for kind in kinds], labels[kept], is_probe[kept], far[kept]
        looks = Impressions(looks.first[kept], looks.late[kept], looks.odds[kept])
    if spoil == "no probes in a class":
        is_probe = is_probe & (labels != 1)
    if spoil == "three epochs":
        kinds = [kind[:, :3] for kind in kinds]
    found = find(kinds, labels, is_probe, far, looks)
    assert {4} - {one.label for one in found} == ({4} if spoil == "constant" else set())
    for one in found:
        assert np.isfinite(one.evidence)
        assert np.isfinite(one.scores).all()
        assert len(one.ids)


def test_without_impressions_the_other_signs_count():
    kinds, labels, is_probe, far, _, poison = planted(3)
    found = find(kinds, labels, is_probe, far)
    assert {one.label for one in found} == {1, 4}
    assert all(np.isnan([one.signs.sources, one.signs.late_sources, one.signs.odds]).all() for one in found)
    assert all((poison[one.ids] > 0).mean() > 0.9 for one in found)


@pytest.fixture(scope="module")
def own_loop(tmp_path_factory):
    """A recorder of somebody's own loop, and where its recording was saved."""
    (features, _), labels, is_probe, *_, poison = planted(3)
    recorder = TrajectoryRecorder(len(labels), 8, num_features=8)
    losses = 1.0 + 0.5 * (poison > 0)
    for epoch in range(8):
        recorder.update(losses, np.arange(len(labels)), epoch, features=features[:, epoch].astype(np.float32))
    folder = tmp_path_factory.mktemp("own") / "store"
    recorder.save(folder, labels=labels)
    return recorder, labels, np.flatnonzero(is_probe), poison, folder


def test_a_recorder_finds_attacks_if_it_is_told_the_labels(own_loop):
    recorder, labels, probe_ids, poison, _ = own_loop
    scores = recorder.score(probe_ids, labels=labels)
    assert scores.kind == "features"
    assert {one.label for one in scores.clusters} == {1, 4}
    assert (poison[scores.removed] > 0).mean() > 0.95
    assert scores.removed[poison > 0].mean() > 0.9
    assert not recorder.score(probe_ids).removed.any()
    with pytest.raises(UsageError, match="3 labels for 2400 examples"):
        recorder.score(probe_ids, labels=[0, 1, 2])
    with pytest.raises(UsageError, match="kind = 'loss' does not show"):
        recorder.score(probe_ids, kind="loss", labels=labels)


def test_stored_trajectories_are_removed_by_the_same_clusters(own_loop, tmp_path):
    recorder, labels, probe_ids, _, folder = own_loop
    (tmp_path / "probes.txt").write_text(" ".join(map(str, probe_ids)))
    command = ["score", "--trajectories", str(folder), "--probes", str(tmp_path / "probes.txt"), "--workdir"]
    rules = "--config.rejection.rules=('clusters','alpha')"
    assert main([*command, str(tmp_path / "out"), rules]) == 0
    (part,) = (tmp_path / "out" / "scores").iterdir()
    removed = pq.read_table(part)["removed_features_clusters"].to_numpy()
    np.testing.assert_array_equal(removed, recorder.score(probe_ids, labels=labels).removed)


def test_nothing_can_be_left_out_of_a_search(own_loop, tmp_path, capsys):
    _, _, probe_ids, _, folder = own_loop
    (tmp_path / "probes.txt").write_text("\n".join(map(str, probe_ids)), "utf-8")
    command = ["score", "--trajectories", str(folder), "--probes", str(tmp_path / "probes.txt"), "--exclude_non_finite"]
    assert main([*command, "--workdir", str(tmp_path / "out"), "--config.rejection.rules=('clusters',)"]) == 2
    assert "without --exclude_non_finite" in capsys.readouterr().err


def test_trajectories_without_labels_have_no_clusters(own_loop, tmp_path, capsys):
    recorder, _, probe_ids, *_ = own_loop
    recorder.save(tmp_path / "plain")
    (tmp_path / "probes.txt").write_text(" ".join(map(str, probe_ids)))
    command = ["score", "--trajectories", str(tmp_path / "plain"), "--probes", str(tmp_path / "probes.txt")]
    assert main([*command, "--workdir", str(tmp_path / "out"), "--config.rejection.rules=('clusters',)"]) == 2
    assert "have no labels: save a store with them" in capsys.readouterr().err


def test_shapes_that_do_not_fit_are_refused():
    kinds, labels, is_probe, far, looks, _ = planted(3)
    with pytest.raises(UsageError, match="expected"):
        find([kinds[0][:-1]], labels, is_probe, far, looks)
    with pytest.raises(UsageError, match="expected"):
        find(kinds, labels, is_probe, far[:-1], looks)


def test_in_a_class_without_probes_nothing_is_certain():
    kinds, labels, is_probe, far, looks, _ = planted(3)
    assert {one.label for one in find(kinds, labels, is_probe, far, looks) if one.certain} == {1, 4}
    unknown = is_probe & ((labels != 1) | (np.cumsum(is_probe & (labels == 1)) <= 2))
    assert {one.label for one in find(kinds, labels, unknown, far, looks) if one.certain} == {4}


def test_of_more_classes_more_evidence_is_asked():
    signs = Signs(9.0, 0.1, 9.0, agreement=0.0, sources=0.0, late_sources=0.0, odds=9.0)
    one = Cluster(0, np.arange(3), 6.0, signs, np.zeros(3), np.arange(3))
    assert [judged([one], classes)[0].certain for classes in (10, 37, 38, 1000)] == [True, True, False, False]


@pytest.mark.parametrize("spoilt", ["far", "features", "ranked"])
def test_values_that_are_not_finite_are_refused(spoilt):
    kinds, labels, is_probe, far, looks, _ = planted(7)
    kinds, far = [kind.astype(np.float32) for kind in kinds], far.copy()
    {"far": far, "features": kinds[0], "ranked": kinds[1]}[spoilt].flat[0] = np.nan
    with pytest.raises(UsageError, match="NaN"):
        find(kinds, labels, is_probe, far, looks)


def test_features_may_have_any_scale():
    """Log-probabilities below -15 say no more; features do."""
    kinds, labels, is_probe, far, looks, _ = planted(3)
    larger = [100 * kinds[0].astype(np.float32), *kinds[1:]]
    ours, theirs = find(kinds, labels, is_probe, far, looks), find(larger, labels, is_probe, far, looks)
    assert [one.label for one in ours] == [one.label for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert len(np.setxor1d(one.ids, other.ids)) <= 0.05 * len(one.ids)
