"""The cards of a gallery: an image as a tile of a sheet, a small trajectory, and of a run its highest-ranked images."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from badloss_jax.core.errors import DataError
from badloss_jax.report.gallery import Gallery, data_uri, difference, highest_ranked, sheet
from badloss_jax.report.plots import LOW_LOSS
from badloss_jax.report.results import ScoresTable
from badloss_jax.settings import KINDS

COLUMNS = 40  # tiles in a row of a sheet
SPARK = (100.0, 36.0)  # size of a small trajectory
_NARROWEST = 56  # px of a tile on the page
_WIDEST = 80


def tile_place(position: int) -> str:
    """Returns the CSS variables that place a sheet behind a tile."""
    row, column = divmod(position, COLUMNS)
    return f"--r:{row};--c:{column}"


def tile_width(width: int) -> int:
    """Returns the width of a tile on the page, in px, for images of a width."""
    return max(_NARROWEST, min(_WIDEST, width))


def tile_size(height: int, width: int) -> tuple[int, int]:
    """Returns width and height of a tile on the page, in the images' proportion.

    Args:
      height: of the images, px.
      width: likewise.

    Returns:
      (width, height), px.
    """
    tile = tile_width(width)
    return tile, round(tile * height / width)


def spark_path(losses: Float[np.ndarray, "T"], top: float) -> str:
    """Returns a trajectory as an SVG path: loss on a logarithmic axis, from 1e-4 to exp(top).

    Args:
      losses: [T], in nats.
      top: log of the loss at the axis' upper end, see `spark_top`; what lies above is drawn there.

    Returns:
      The path's "d", in a box of the size `SPARK`.
    """
    bottom = math.log(LOW_LOSS)
    heights = (np.log(np.maximum(losses, LOW_LOSS)) - bottom) / (top - bottom)
    x = np.linspace(0, SPARK[0], len(losses))
    y = SPARK[1] * (1 - np.minimum(heights, 1))

    # Whole numbers are fine enough, and keep a page of thousands of cards small.
    return "M" + "L".join(f"{a:.0f} {b:.0f}" for a, b in zip(x, y, strict=True))


def spark_top(losses: Float[np.ndarray, "G T"]) -> float:
    """Returns the upper end of the axis that trajectories share: the log of the largest loss, at least of 1."""
    return math.log(max(float(losses.max()), 1.0))


@dataclass(frozen=True)
class _Sparks:
    """Small trajectories on one axis; empty paths where nothing was recorded.

    Attributes:
      losses: [N, T], or None.
      top: see `spark_path`.
    """

    losses: Float[np.ndarray, "N T"] | None
    top: float

    def median(self, rows: Any) -> str:
        """Draws the median loss of some examples."""
        if self.losses is None:
            return ""
        return spark_path(np.median(self.losses[rows], axis=0), self.top)


@dataclass(frozen=True)
class _Cards:
    """Makes the cards of a run's gallery.

    Attributes:
      class_names: K.
      scores: of the run.
      true_labels: int [G], of the gallery's images.
      position_of: id -> its position in the gallery.
      changed_position: int [G], the image's position among the poisoned ones alone.
      sparks: the trajectories.
    """

    class_names: list[str]
    scores: ScoresTable
    true_labels: Int[np.ndarray, "G"]
    position_of: Mapping[int, int]
    changed_position: Int[np.ndarray, "G"]
    sparks: _Sparks

    def card(self, example: int, rank: int) -> dict[str, Any]:
        """Returns what the card of an example says, and where its tiles are.

        Args:
          example: its id.
          rank: by the kind that the card stands under, from 1 on.

        Returns:
          What the template shows.
        """
        position = self.position_of[example]
        label = int(self.scores.labels[example])
        true_label = int(self.true_labels[position])

        before = ""  # nothing is said of a label that was kept
        if label != true_label:
            before = _class_name(self.class_names, true_label)
        return {
            "id": example,
            "rank": rank,
            "label": _class_name(self.class_names, label),
            "attack": self.scores.attack_of[example],
            "before": before,
            "shown": tile_place(position),
            "changed": tile_place(int(self.changed_position[position])),
            "path": self.sparks.median([example]),
        }


def ranked_gallery(
    results: Mapping[str, Any], scores: ScoresTable, losses: Float[np.ndarray, "N T"] | None, gallery: Gallery
) -> dict[str, Any]:
    """Returns what a run's gallery shows: sheets of tiles, and for each kind its cards in the order of rank.

    Args:
      results: of the run.
      scores: of the run.
      losses: [N, T], in nats; None where nothing was recorded.
      gallery: the images, at least one.

    Returns:
      What the template shows.

    Raises:
      DataError: the gallery is of other examples than the scores.
    """
    class_names = results["class_names"]
    _check_range("ids", gallery.ids, len(scores.labels))
    _check_range("labels", gallery.true_labels, len(class_names))

    # Of clean images there is no before and after: the sheets of these hold the poisoned ones alone.
    poisoned = scores.attack_of[gallery.ids] != ""
    originals = gallery.originals[poisoned]
    changed = gallery.shown[poisoned]

    # All cards share an axis, so that their lines can be compared.
    sparks = _Sparks(None, 0.0)
    if losses is not None:
        sparks = _Sparks(losses, spark_top(losses[gallery.ids]))
    cards = _Cards(
        class_names=class_names,
        scores=scores,
        true_labels=gallery.true_labels,
        position_of={int(example): position for position, example in enumerate(gallery.ids)},
        changed_position=np.cumsum(poisoned) - 1,
        sparks=sparks,
    )

    # Drawn once, behind the line of every card.
    clean = (scores.attack_of == "") & ~scores.is_probe
    median_of_clean = ""
    if clean.any():
        median_of_clean = sparks.median(clean)

    height, width = gallery.shown.shape[1:3]
    return {
        "kinds": _by_kind(scores, cards, results["config"]["report"]["gallery"]),
        "clean": median_of_clean,
        "lines": losses is not None,
        "tile": tile_size(height, width),
        "columns": COLUMNS,
        "size": SPARK,
        "sheets": {
            "shown": data_uri(sheet(gallery.shown, COLUMNS)),
            "original": data_uri(sheet(originals, COLUMNS)),
            "difference": data_uri(sheet(difference(originals, changed), COLUMNS)),
        },
    }


def main_kind(kinds: list[str]) -> str:
    """Returns what a report shows first: "combined" if it was scored, else the last kind, else the last defence."""
    if "combined" in kinds:
        return "combined"
    of_trajectories = [kind for kind in kinds if kind in KINDS]
    return (of_trajectories or kinds)[-1]


def _by_kind(scores: ScoresTable, cards: _Cards, asked: int) -> list[dict[str, Any]]:
    """Returns the cards of each kind in the order of rank, the main kind first.

    `wanted` is how many there should be; a rescoring ranks others first, and not of all of these an image was kept.
    """
    main = main_kind(list(scores.distances))
    count = min(asked, len(scores.labels))
    kinds = []
    # Sorting is stable: behind the main kind the others stay in their order.
    for kind in sorted(scores.distances, key=lambda kind: kind != main):
        ranked = highest_ranked(scores.distances[kind], scores.is_probe, count).tolist()
        of_kind = [
            cards.card(example, rank) for rank, example in enumerate(ranked, start=1) if example in cards.position_of
        ]
        kinds.append({"name": kind, "cards": of_kind, "wanted": len(ranked)})
    return kinds


def _check_range(name: str, values: np.ndarray, end: int) -> None:
    """Refuses numbers in gallery.npz that are not in [0, end)."""
    if values.min() < 0 or values.max() >= end:
        raise DataError(f"gallery.npz has {name} from {values.min()} to {values.max()}, expected 0 to {end - 1}")


def _class_name(names: list[str], label: int) -> str:
    """Returns the name of a class, or its number if it has none."""
    if 0 <= label < len(names):
        return names[label]
    return str(label)
