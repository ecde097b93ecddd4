"""What clusters and distances say: whether anything stands out, which attacks there are, how much, what to remove."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from badloss_jax.scoring.calibration import PoisonedShare, conformal_p_values, no_poison_p_value, poisoned_share
from badloss_jax.scoring.clusters import FEW_PROBES
from badloss_jax.scoring.evidence import Cluster, clean_class_p_value
from badloss_jax.scoring.rejection import reject
from badloss_jax.scoring.search import FEW

# p-value of the distances of all images below which more lie far out than chance explains. Probes and images are not
# quite exchangeable on the scale of their classes: of 45 clean sets of digits, ten probes a class, two had below 0.005.
UNLIKELY = 0.001
_PURE = 0.8  # of the members of certain clusters, at least this share is poison: the interval's lower end
_HIDDEN = 1.5  # as much again as half of what was found may hide beside it: the interval's upper end, at least
_LEARNT_LATE = 0.3  # p-value that poison which is no crowd is taken to have, at most: the upper end counts up to it


@dataclass(frozen=True)
class Verdict:
    """What clusters and distances say.

    Attributes:
      p_values: [N], of all examples; those of probes mean nothing.
      removed: [N], by the rule; never a probe.
      attacks: the certain clusters, that of the most evidence first.
      possible: other clusters that are worth a look, likewise.
      searched: whether clusters were looked for.
      share: of the examples that are no probes, how many look poisoned. Without a certain cluster the upper end is 1:
        what leaves no trace has no bound.
      no_poison: p-value of the hypothesis that all images lie as the probes do, by distance alone.
      classes: of each class its numbers of images and probes, how many of its images are in certain clusters
        ("members"), whether it is "affected" by one, and whether it can be "judged" at all.
    """

    p_values: Float[np.ndarray, "N"]
    removed: Bool[np.ndarray, "N"]
    attacks: list[Cluster]
    possible: list[Cluster]
    searched: bool
    share: PoisonedShare
    no_poison: float
    classes: list[dict[str, Any]]

    @property
    def stands_out(self) -> bool:
        """Whether anything does: an attack, or images that lie far out without being alike."""
        return bool(self.attacks) or self.no_poison < UNLIKELY

    def attack_of(self) -> Int[np.ndarray, "N"]:
        """Returns the number of each example's cluster, from 1 on, the certain ones first; 0 of an example in none."""
        numbers = np.zeros(len(self.p_values), np.int64)
        for number, cluster in enumerate([*self.attacks, *self.possible], start=1):
            numbers[cluster.ids] = number
        return numbers

    def ranking(
        self,
        scores: Float[np.ndarray, "N"],
        odds: Float[np.ndarray, "N"] | None = None,
    ) -> Int[np.ndarray, "N"]:
        """Ranks the examples, the most suspicious first.

        Members of attacks come first, of the most evidence at the beginning, or if there are none those of possible
        ones, which beside an attack are mostly natural. Then come all others, each at the better of its two places: by
        score, and by the odds that it is of another class (`impressions_of`). What was learnt as a trigger lies far
        out, what was not looks mislabelled, and hardly anything is both. In the class of an attack also counts how
        alike to it an image is: that and its place are added up, in standard deviations.

        Args:
          scores: [N], higher is more suspicious, as `judge` was given.
          odds: [N], log-odds of another class against its own; None if no features were recorded.

        Returns:
          int64 [N], the rank of each example, from 1, the most suspicious, on.
        """
        from scipy.stats import norm  # takes most of a second to import

        position = _positions(scores)
        if odds is not None:
            position = np.maximum(position, _positions(odds))
        strangeness = norm.ppf((position + 0.5) / len(scores)) + self._likeness(len(scores))

        # What is in no cluster comes last, and beside attacks so does what is in a possible one.
        last = (len(self.attacks) or len(self.possible)) + 1
        numbers = self.attack_of()
        group = np.where(numbers, np.minimum(numbers, last), last)

        ranks = np.empty(len(scores), np.int64)
        ranks[np.lexsort((-scores, -strangeness, group))] = np.arange(1, len(scores) + 1)
        return ranks

    def _likeness(self, count: int) -> Float[np.ndarray, "N"]:
        """Returns how alike each of so many examples is to an attack of its class, in standard deviations, or 0."""
        likeness = np.zeros(count)
        for cluster in self.attacks:
            # The others' scores have their mean at -1, and the members' at 1, a gap away.
            above = (cluster.scores + 1) / 2 * cluster.signs.gap
            likeness[cluster.score_ids] = np.maximum(likeness[cluster.score_ids], above)
        return likeness


def _positions(values: Float[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """Returns at which position each would be in ascending order, from 0 on."""
    positions = np.empty(len(values), np.int64)
    positions[np.argsort(values, kind="stable")] = np.arange(len(values))
    return positions


def judge(
    scores: Float[np.ndarray, "N"],
    probe_scores: Float[np.ndarray, "P"],
    labels: Int[np.ndarray, "N"],
    is_probe: Bool[np.ndarray, "N"],
    num_classes: int,
    rule: str,
    level: float,
    clusters: Sequence[Cluster] | None = (),
) -> Verdict:
    """Says which attacks there are, how much is poisoned, and what to remove.

    Args:
      scores: [N], higher is more suspicious, on a scale that classes share.
      probe_scores: [P], of the probes, leave-one-out, on the same scale.
      labels: int [N], in 0..K-1.
      is_probe: [N].
      num_classes: K.
      rule: "clusters" removes the members of certain clusters. The rules of `badloss_jax.scoring.reject` cast a wider
        net, once anything stands out: members, and what they remove by distance.
      level: of the rule, in [0, 1), as `reject` takes it; of "clusters", none.
      clusters: by `find_clusters`, from any evidence on; None if they were not looked for.

    Returns:
      The verdict.

    Raises:
      UsageError: an unknown rule, once anything stands out; no probes; scores that are NaN.
    """
    by_evidence = sorted(clusters or (), key=lambda cluster: -cluster.evidence)
    attacks = [cluster for cluster in by_evidence if cluster.certain]
    possible = [cluster for cluster in by_evidence if not cluster.certain]

    p_values = conformal_p_values(scores, probe_scores)
    no_poison = no_poison_p_value(p_values[~is_probe], len(probe_scores))

    # Where nothing stands out, what a rule of distance removes would be clean.
    members = in_attacks(attacks, len(scores))
    removed = members.copy()
    if rule != "clusters" and (attacks or no_poison < UNLIKELY):
        removed |= reject(rule, level, scores, p_values, is_probe)

    return Verdict(
        p_values=p_values,
        removed=removed,
        attacks=attacks,
        possible=possible,
        searched=clusters is not None,
        share=_poisoned(p_values, members, is_probe),
        no_poison=no_poison,
        classes=_classes(labels, is_probe, members, num_classes),
    )


def _classes(
    labels: Int[np.ndarray, "N"],
    is_probe: Bool[np.ndarray, "N"],
    members: Bool[np.ndarray, "N"],
    num_classes: int,
) -> list[dict[str, Any]]:
    """Counts images, probes and members of each class; see `Verdict.classes`."""
    num_images = np.bincount(labels, minlength=num_classes)
    num_probes = np.bincount(labels[is_probe], minlength=num_classes)
    num_members = np.bincount(labels[members], minlength=num_classes)
    return [
        {
            "images": int(num_images[label]),
            "probes": int(num_probes[label]),
            "members": int(num_members[label]),
            "affected": bool(num_members[label]),
            "judged": bool(num_images[label] >= FEW and num_probes[label] >= FEW_PROBES),
        }
        for label in range(num_classes)
    ]


def in_attacks(clusters: Sequence[Cluster], count: int) -> Bool[np.ndarray, "N"]:
    """Marks the examples that are in a certain cluster.

    Args:
      clusters: certain ones and others.
      count: N, of all examples.

    Returns:
      bool [N].
    """
    members = np.zeros(count, bool)
    for cluster in clusters:
        if cluster.certain:
            members[cluster.ids] = True
    return members


def _poisoned(
    p_values: Float[np.ndarray, "N"], members: Bool[np.ndarray, "N"], is_probe: Bool[np.ndarray, "N"]
) -> PoisonedShare:
    """Joins what clusters hold with what lies far out."""
    if is_probe.all():
        return PoisonedShare(0.0, 0.0, 1.0)

    num_probes = int(is_probe.sum())
    far_out = poisoned_share(p_values[~is_probe], num_probes)
    if not members.any():
        return PoisonedShare(far_out.estimate, far_out.low, 1.0)

    inside = float(members[~is_probe].mean())
    estimate = max(inside, far_out.estimate)

    # Beside the attacks there may be poison that is no crowd, and lies less far out.
    beside = 0.0
    others = p_values[~is_probe & ~members]
    if len(others):
        beside = poisoned_share(others, num_probes, levels=(_LEARNT_LATE,)).high
    high = max(_HIDDEN * estimate, far_out.high, inside + (1 - inside) * beside)
    return PoisonedShare(estimate, _PURE * inside, float(min(1.0, high)))


def attack_entry(cluster: Cluster, class_name: str) -> dict[str, Any]:
    """Makes what scan.json says of a cluster.

    Args:
      cluster: an attack, or what may be one.
      class_name: of the class that it is in.

    Returns:
      Plain values; signs that are not known are None.
    """
    signs = {name: value if np.isfinite(value) else None for name, value in asdict(cluster.signs).items()}
    return {
        "class": class_name,
        "images": len(cluster.ids),
        "certain": cluster.certain,
        "evidence": cluster.evidence,
        "p_value": clean_class_p_value(cluster.evidence),
        "signs": signs,
    }
