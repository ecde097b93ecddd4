"""What a scan's page shows of images: the cards of its suspects, and the first images of each attack."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from badloss_jax.core.files import printable
from badloss_jax.data.training_set import TrainingSet
from badloss_jax.report.cards import COLUMNS, SPARK, spark_path, spark_top, tile_place, tile_size, tile_width
from badloss_jax.report.gallery import data_uri, sheet, thumbnails
from badloss_jax.report.suspects import Suspects

_SHOWN = 300  # suspects with their images
_OF_EACH_CLASS = 12  # of these, at least
_OF_AN_ATTACK = 36  # images that are shown of it
_ABREAST = 12  # in a row


def choose_shown(suspects: Suspects) -> Int[np.ndarray, "G"]:
    """Returns which of the suspects, at most 300, have their image shown: evenly of the classes from the 13th on."""
    rank_in_class = np.zeros(len(suspects.ids), np.int64)
    for label in np.unique(suspects.labels):
        rows = np.flatnonzero(suspects.labels == label)
        rank_in_class[rows] = np.arange(len(rows))

    # The first dozen of every class come before all others, whatever their score.
    turn = np.maximum(rank_in_class, _OF_EACH_CLASS - 1)
    order = np.lexsort((np.arange(len(turn)), turn))

    # Shown in the order of rank all the same.
    return np.sort(order[:_SHOWN])


def suspect_gallery(suspects: Suspects, examples: TrainingSet, losses: Float[np.ndarray, "N E"]) -> dict[str, Any]:
    """Returns what the gallery of the suspects shows: sheets of tiles, and the cards in the order of rank.

    Args:
      suspects: at least one.
      examples: the training set.
      losses: [N, E], in nats, at the epochs that count.

    Returns:
      What the template shows.
    """
    shown = choose_shown(suspects)
    ids = suspects.ids[shown]
    probes = np.unique(suspects.nearest[shown])  # one can be near to many suspects, and has one tile

    # Each line is compared with the median of its class, drawn once on the same axis.
    top = spark_top(losses[ids])
    medians = {}
    for label in np.unique(suspects.labels[shown]).tolist():
        of_class = losses[examples.split.labels == label]
        medians[label] = spark_path(np.median(of_class, axis=0), top)

    cards = []
    probe_position = {int(probe): position for position, probe in enumerate(probes)}
    for position, row in enumerate(shown.tolist()):
        card = _card(suspects, row)
        card["tile"] = tile_place(position)
        card["near"] = [_near(examples, probe, probe_position[probe]) for probe in suspects.nearest[row].tolist()]
        card["path"] = spark_path(losses[suspects.ids[row]], top)
        cards.append(card)

    suspect_tiles = thumbnails(examples.split.images[ids])
    probe_tiles = thumbnails(examples.split.images[probes])
    height, width = suspect_tiles.shape[1:3]
    return {
        "cards": cards,
        "medians": medians,
        "tile": tile_size(height, width),
        "columns": COLUMNS,
        "size": SPARK,
        "suspects": data_uri(sheet(suspect_tiles, COLUMNS)),
        "probes": data_uri(sheet(probe_tiles, COLUMNS)),
    }


def _card(suspects: Suspects, row: int) -> dict[str, Any]:
    """Returns what the card of a suspect says."""
    label = int(suspects.labels[row])
    seen_as = label  # the page says nothing of what looked like its own class
    if suspects.seen_as is not None:
        seen_as = int(suspects.seen_as[row])
    return {
        "row": row,
        "name": printable(suspects.names[row]),
        "label": label,
        "score": float(suspects.scores[row]),
        "p_value": float(suspects.p_values[row]),
        "reason": suspects.reasons[row],
        "removed": bool(suspects.removed[row]),
        "attack": int(suspects.attacks[row]),
        "seen_as": seen_as,
    }


def _near(examples: TrainingSet, probe: int, position: int) -> dict[str, str]:
    """Returns the tile, the class and the path of a probe."""
    label = examples.split.labels[probe]
    return {
        "tile": tile_place(position),
        "name": printable(examples.class_names[label]),
        "path": printable(examples.names[probe]),
    }


def attack_sheet(suspects: Suspects, examples: TrainingSet, number: int) -> dict[str, Any]:
    """Returns what the page shows of an attack: the first of its images, in a sheet.

    Args:
      suspects: of the scan.
      examples: the training set.
      number: of the attack, from 1 on.

    Returns:
      The sheet's address, how many images it shows, and its width on the page, px.
    """
    rows = np.flatnonzero(suspects.attacks == number)[:_OF_AN_ATTACK]
    pictures = thumbnails(examples.split.images[suspects.ids[rows]])
    columns = min(len(rows), _ABREAST)
    return {
        "uri": data_uri(sheet(pictures, columns)),
        "shown": len(rows),
        "width": columns * tile_width(pictures.shape[2]),
    }
