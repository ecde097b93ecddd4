"""What every rejection rule removes, by scores that are read part by part and need not fit into memory.

A first walk over the parts counts them (`survey`), from which each rule's threshold follows (`find_thresholds`); a
second one applies these (`ScoredKind.columns`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from badloss_jax.core.errors import DataError
from badloss_jax.scoring import (
    KindScores,
    anomaly_scores,
    benjamini_hochberg_threshold,
    conformal_p_values,
    largest_threshold,
)
from badloss_jax.settings import parse_rule


@dataclass(frozen=True)
class PartedScores:
    """Scores of one kind of trajectory, and the parts in which they are read.

    Attributes:
      scores: of N examples; not finite of those that are left out.
      parts: (start, stop) of each, in order.
    """

    scores: KindScores
    parts: Sequence[tuple[int, int]]

    def is_probe(self, start: int, stop: int) -> Bool[np.ndarray, "M"]:
        """Says which examples of a range are probes.

        Args:
          start: the first example.
          stop: one more than the last.
        """
        return np.isin(np.arange(start, stop), self.scores.probes.ids)

    def eligible(self) -> Iterator[Float[np.ndarray, "M"]]:
        """Yields part by part the scores of what can be removed: of no probe, and of nothing that is left out."""
        for start, stop in self.parts:
            values = self.scores.values(start, stop)
            yield values[np.isfinite(values) & ~self.is_probe(start, stop)]


@dataclass(frozen=True)
class Survey:
    """What a walk over the scores of a kind counts.

    Attributes:
      count: examples with a score, the probes among them.
      excluded: examples that are left out.
      between: the smallest and the largest score.
      p_values: int64 [P + 1], how many examples that are no probes have the p-values 1 / (P + 1), 2 / (P + 1), ..., 1.
    """

    count: int
    excluded: int
    between: tuple[float, float]
    p_values: Int[np.ndarray, "P+1"]


def survey(parted: PartedScores) -> Survey:
    """Walks over the scores of a kind.

    Raises:
      DataError: none is finite.
    """
    scores = parted.scores
    p_value_counts = np.zeros(len(scores.probes) + 1, np.int64)
    count = 0
    excluded = 0

    low = np.inf
    high = -np.inf
    for start, stop in parted.parts:
        values = scores.values(start, stop)
        finite = np.isfinite(values)
        count += int(finite.sum())
        excluded += int((~finite).sum())
        if finite.any():
            low = min(low, float(values[finite].min()))
            high = max(high, float(values[finite].max()))

        p_values = conformal_p_values(values[finite & ~parted.is_probe(start, stop)], scores.probe_scores)
        # A p-value is a multiple of 1 / (P + 1), so that counts of each say all.
        numbers = np.rint(p_values * len(p_value_counts)).astype(int) - 1
        p_value_counts += np.bincount(numbers, minlength=len(p_value_counts))

    if not count:
        raise DataError(f"no trajectory of kind {scores.kind} is finite")
    return Survey(count, excluded, (low, high), p_value_counts)


@dataclass
class Threshold:
    """Which examples a rule removes: those above a distance and the first `ties` at it, up to a p-value, or members.

    Attributes:
      distance: above which all go.
      ties: how many go of those that are exactly there, in the order of their ids.
      p_value: up to which all go.
      members: bool [N], what is in attacks, for the rule "clusters".
      removed: how many went so far.
      ties_taken: how many of these were ties.
    """

    distance: float | None = None
    ties: int = 0
    p_value: float | None = None
    members: Bool[np.ndarray, "N"] | None = None
    removed: int = 0
    ties_taken: int = 0

    def apply(
        self,
        start: int,
        values: Float[np.ndarray, "M"],
        p_values: Float[np.ndarray, "M"],
        eligible: Bool[np.ndarray, "M"],
    ) -> Bool[np.ndarray, "M"]:
        """Decides what is removed of a part, and counts it; parts come in order.

        Args:
          start: the part's first example.
          values: [M], its scores.
          p_values: [M], likewise.
          eligible: [M], what can be removed.

        Returns:
          [M], what is.
        """
        if self.members is not None:
            removed = eligible & self.members[start : start + len(values)]
        elif self.distance is None:
            removed = eligible & (p_values <= self.p_value)
        else:
            tied = np.flatnonzero(eligible & (values == self.distance))[: self.ties - self.ties_taken]
            self.ties_taken += len(tied)
            removed = eligible & (values > self.distance)
            removed[tied] = True

        self.removed += int(removed.sum())
        return removed


def find_thresholds(
    parted: PartedScores,
    counted: Survey,
    rejection: Mapping[str, Any],
    members: Bool[np.ndarray, "N"] | None,
) -> dict[str, Threshold]:
    """Finds every rule's threshold.

    Args:
      parted: the scores.
      counted: of these.
      rejection: `config.rejection`.
      members: [N], what is in attacks, if the rule "clusters" is asked for.

    Returns:
      Rule, as `rejection.rules` has it -> its threshold.
    """
    thresholds = {}
    for text in rejection["rules"]:
        rule, level = parse_rule(text, rejection)
        if rule == "clusters":
            thresholds[text] = Threshold(members=members)
        elif rule == "fraction":
            wanted = min(math.floor(level * counted.count), int(counted.p_values.sum()))
            distance, ties = largest_threshold(parted.eligible, wanted)
            if not wanted:
                # Nothing is removed: the threshold is the largest distance, and none that equals it goes.
                distance = counted.between[1]
            thresholds[text] = Threshold(distance, ties)
        elif rule == "fdr":
            number = benjamini_hochberg_threshold(counted.p_values, level)
            thresholds[text] = Threshold(p_value=number / len(counted.p_values))
        else:
            thresholds[text] = Threshold(p_value=level)
    return thresholds


@dataclass(frozen=True)
class ScoredKind:
    """What is known of one kind of trajectory before the parts are written.

    Attributes:
      parted: the scores.
      counted: of these.
      thresholds: of each rule.
    """

    parted: PartedScores
    counted: Survey
    thresholds: dict[str, Threshold]

    def summary(self) -> dict[str, Any]:
        """Returns what scoring.json says of this kind."""
        rules = {}
        for rule, threshold in self.thresholds.items():
            rules[rule] = {
                "removed": threshold.removed,
                "distance": threshold.distance,
                "p_value": threshold.p_value,
            }

        return {
            "k": list(self.parted.scores.k),
            "excluded": self.counted.excluded,
            "between": self.counted.between,
            "rules": rules,
        }

    def columns(self, start: int, stop: int, is_probe: Bool[np.ndarray, "M"], transform: str) -> dict[str, Any]:
        """Computes the columns of a part's file, and applies the thresholds; parts come in order.

        Args:
          start: the first example.
          stop: one more than the last.
          is_probe: [M], which are probes.
          transform: of `config.scoring`, of the score that is shown.

        Returns:
          Name -> values [M]; missing of what is left out.
        """
        scores = self.parted.scores
        kind = scores.kind
        values = scores.values(start, stop)
        finite = np.isfinite(values)

        if scores.is_logarithm:
            transform = "linear"
        shown = anomaly_scores(values, transform=transform, between=self.counted.between)
        p_values = np.ones(len(values))
        p_values[finite] = conformal_p_values(values[finite], scores.probe_scores)
        columns: dict[str, Any] = {
            f"distance_{kind}": pa.array(values, mask=~finite),
            f"score_{kind}": pa.array(shown, mask=~finite),
            f"p_value_{kind}": pa.array(p_values, mask=~finite),
        }

        eligible = finite & ~is_probe
        for rule, threshold in self.thresholds.items():
            columns[f"removed_{kind}_{rule}"] = threshold.apply(start, values, p_values, eligible)
        return columns
