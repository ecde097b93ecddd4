"""What a scan writes for people: the suspects as Parquet and CSV, and one page to look through them."""

import base64
import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float, Int
from markupsafe import Markup
from matplotlib.axes import Axes

from badloss_jax.core.files import as_unicode, printable, write_atomically, write_text
from badloss_jax.data.training_set import TrainingSet
from badloss_jax.report.gallery import data_uri, sheet, thumbnails
from badloss_jax.report.page import COLUMNS, SPARK, environment_of_templates, spark_path, tile_place
from badloss_jax.report.plots import LOW_LOSS, Draw, svg_uri
from badloss_jax.scoring import Impressions, Verdict

REASONS = ("learned too early", "learned too late", "unlike its class")
_SHOWN = 300  # suspects with their images
_OF_EACH_CLASS = 12  # of these, at least
_OF_AN_ATTACK = 36  # images that are shown of it
_ABREAST = 12  # in a row
_NAMED = 6  # attacks that the verdict lists
_LISTED = 50_000  # suspects that the page knows, to filter and export
_FORMULA = ("=", "+", "-", "@", "\t")  # what a spreadsheet would compute


@dataclass(frozen=True)
class Suspects:
    """What lies further out than nearly all probes, the furthest first.

    Attributes:
      ids: int64 [M].
      names: M, as in `TrainingSet`.
      labels: int [M].
      scores: [M], higher is more suspicious: medians of its class's spread.
      p_values: [M].
      nearest: int64 [M, 3], ids of the nearest probes.
      reasons: M.
      removed: [M], whether it is in remove.txt.
      attacks: int [M], the number of its attack, from 1 on, or 0; see `Verdict.attack_of`.
      seen_as: int [M], the class that it looked most like after the first epoch, if features were recorded.
    """

    ids: Int[np.ndarray, "M"]
    names: list[str]
    labels: Int[np.ndarray, "M"]
    scores: Float[np.ndarray, "M"]
    p_values: Float[np.ndarray, "M"]
    nearest: Int[np.ndarray, "M 3"]
    reasons: list[str]
    removed: Bool[np.ndarray, "M"]
    attacks: Int[np.ndarray, "M"]
    seen_as: Int[np.ndarray, "M"] | None


def write_suspects(folder: Path, suspects: Suspects, examples: TrainingSet) -> None:
    """Writes suspects.parquet and suspects.csv, whose nearest probes have a column each.

    Names are valid Unicode in both. In the CSV file, one that a spreadsheet would take for a formula begins with "./".
    """
    classes = [as_unicode(name) for name in examples.class_names]
    nearest = [[as_unicode(examples.names[probe]) for probe in row] for row in suspects.nearest.tolist()]
    columns: dict[str, Any] = {
        "path": pa.array([as_unicode(name) for name in suspects.names], pa.string()),
        "label": pa.array([classes[label] for label in suspects.labels.tolist()], pa.string()),
        "score": suspects.scores.astype(np.float64),
        "p_value": suspects.p_values.astype(np.float64),
        "nearest_probes": pa.array(nearest, pa.list_(pa.string())),
        "reason": pa.array(suspects.reasons, pa.string()),
        "first_seen_as": pa.array(
            [None] * len(suspects.ids) if suspects.seen_as is None else [classes[c] for c in suspects.seen_as.tolist()],
            pa.string(),
        ),
        "removed": suspects.removed,
        "attack": suspects.attacks.astype(np.int32),
        "row": suspects.ids.astype(np.int64),
    }
    table = pa.table(columns)
    write_atomically(folder / "suspects.parquet", lambda aside: pq.write_table(table, aside))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    width = suspects.nearest.shape[1]
    titles = {"nearest_probes": [f"nearest_probe_{place + 1}" for place in range(width)]}
    writer.writerow([title for name in columns for title in titles.get(name, [name])])
    for row in table.to_pylist():
        cells = [cell for value in row.values() for cell in (value if isinstance(value, list) else [value])]
        writer.writerow(
            [f"./{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell for cell in cells]
        )
    write_text(folder / "suspects.csv", text.getvalue())


def render_scan(
    results: Mapping[str, Any], suspects: Suspects, examples: TrainingSet, losses: Float[np.ndarray, "N E"],
    scores: Float[np.ndarray, "N"], is_probe: Bool[np.ndarray, "N"],
) -> str:  # fmt: skip
    """Returns one self-contained HTML page: one script, which the page's own policy names by its hash; no request.

    Args:
      results: what scan.json holds.
      suspects: of the scan.
      examples: the training set.
      losses: [N, E], at the epochs that count.
      scores: [N].
      is_probe: [N].
    """
    templates = environment_of_templates()
    script = (Path(__file__).parent / "scan.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    reasons = sorted(set(suspects.reasons))
    known = [
        [as_unicode(name), label, round(score, 4), round(p_value, 6), reasons.index(reason), int(removed)]
        for name, label, score, p_value, reason, removed in zip(
            suspects.names[:_LISTED], suspects.labels.tolist(), suspects.scores.tolist(), suspects.p_values.tolist(),
            suspects.reasons, suspects.removed.tolist(), strict=False,
        )
    ]  # fmt: skip
    classes = [as_unicode(name) for name in examples.class_names]
    order = sorted(range(len(classes)), key=lambda c: (-results["classes"][c]["members"],
                                                       results["classes"][c]["judged"]))  # fmt: skip
    removed = np.bincount(suspects.labels[suspects.removed], minlength=len(classes))
    return templates.get_template("scan.html.jinja").render(
        results=results, script=Markup(script), script_hash=Markup(digest), reasons=reasons,
        data=Markup(_embedded({"rows": known, "classes": classes, "reasons": reasons})),
        classes=[results["classes"][c] | {"removed": int(removed[c])} for c in order],
        class_names=[printable(name) for name in examples.class_names], listed=len(known),
        with_suspects=sorted(set(suspects.labels.tolist())),
        figures=[{"alt": "Scores of the images and of the probes", "uri": svg_uri(_histogram(scores, is_probe))}],
        attacks=[entry | {"number": number, "members": _members(suspects, examples, number)}
                 for number, entry in enumerate(results["attacks"], start=1)],
        gallery=_gallery(suspects, examples, losses, is_probe) if len(suspects.ids) else None,
        settings=json.dumps(results["config"], indent=2), environment=results["environment"],
        left_out=[(printable(name), reason) for name, reason in list(examples.left_out.items())[:50]],
    )  # fmt: skip


def _embedded(value: Any) -> str:
    """Returns JSON that cannot end the element that it stands in."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _histogram(scores: Float[np.ndarray, "N"], is_probe: Bool[np.ndarray, "N"]) -> Draw:
    """Draws how the scores of the images and of the probes are spread."""

    def draw(axis: Axes) -> None:
        low, high = np.quantile(scores, [0.001, 0.999])
        bins = np.linspace(low, high, 61).tolist()
        for label, rows, colour in (("images", ~is_probe, "#0072B2"), ("probes", is_probe, "#000000")):
            weights = np.full(rows.sum(), 100 / max(rows.sum(), 1))
            axis.hist(
                np.clip(scores[rows], low, high), bins, weights=weights, color=colour, histtype="step", label=label
            )
        axis.set(xlabel="score", ylabel="% of the group", yscale="log")
        axis.legend(fontsize=8)

    return draw


def choose_shown(suspects: Suspects) -> Int[np.ndarray, "G"]:
    """Returns which of the suspects, at most 300, have their image shown: evenly of the classes from the 13th on."""
    place = np.zeros(len(suspects.ids), np.int64)  # among those of its class
    for label in np.unique(suspects.labels):
        rows = np.flatnonzero(suspects.labels == label)
        place[rows] = np.arange(len(rows))
    first = np.lexsort((np.arange(len(place)), np.maximum(place, _OF_EACH_CLASS - 1)))
    return np.sort(first[:_SHOWN])


def _gallery(
    suspects: Suspects, examples: TrainingSet, losses: Float[np.ndarray, "N E"], is_probe: Bool[np.ndarray, "N"]
) -> dict[str, Any]:  # fmt: skip
    """What the gallery shows: sheets of tiles, and the cards in the order of rank."""
    shown, labels, names = choose_shown(suspects), examples.split.labels, examples.class_names
    probes = np.unique(suspects.nearest[shown])
    place = {int(probe): number for number, probe in enumerate(probes)}
    top = math.log(max(float(losses[suspects.ids[shown]].max()), 1.0))
    medians = {label: spark_path(np.median(losses[labels == label], axis=0), top)
               for label in np.unique(suspects.labels[shown]).tolist()}  # fmt: skip
    cards = []
    for position, row in enumerate(shown.tolist()):
        label = int(suspects.labels[row])
        near = [{"tile": tile_place(place[probe]), "name": printable(names[labels[probe]]),
                 "path": printable(examples.names[probe])} for probe in suspects.nearest[row].tolist()]  # fmt: skip
        cards.append({"row": row, "name": printable(suspects.names[row]), "label": label, "tile": tile_place(position),
                      "score": float(suspects.scores[row]), "p_value": float(suspects.p_values[row]),
                      "reason": suspects.reasons[row], "removed": bool(suspects.removed[row]), "near": near,
                      "attack": int(suspects.attacks[row]),
                      "seen_as": label if suspects.seen_as is None else int(suspects.seen_as[row]),
                      "path": spark_path(losses[suspects.ids[row]], top)})  # fmt: skip
    pictures = thumbnails(examples.split.images[suspects.ids[shown]]), thumbnails(examples.split.images[probes])
    height, width = pictures[0].shape[1:3]
    tile = max(56, min(80, width))
    return {"cards": cards, "medians": medians, "tile": (tile, round(tile * height / width)), "columns": COLUMNS,
            "size": SPARK, "suspects": data_uri(sheet(pictures[0], COLUMNS)),
            "probes": data_uri(sheet(pictures[1], COLUMNS))}  # fmt: skip


def reasons(
    losses: Float[np.ndarray, "N E"], ids: Int[np.ndarray, "M"], probe_ids: Int[np.ndarray, "P"]
) -> list[str]:  # fmt: skip
    """Says of each suspect whether its mean log loss lies among the lowest or highest twentieth of the probes'."""
    means = np.log(np.maximum(losses, LOW_LOSS)).mean(axis=1)
    low, high = np.quantile(means[probe_ids], [0.05, 0.95])
    early, late, unlike = REASONS
    return [early if mean < low else late if mean > high else unlike for mean in means[ids]]


def _members(suspects: Suspects, examples: TrainingSet, number: int) -> dict[str, Any]:
    """What the gallery of an attack shows: the first of its images, in a sheet."""
    rows = np.flatnonzero(suspects.attacks == number)[:_OF_AN_ATTACK]
    pictures = thumbnails(examples.split.images[suspects.ids[rows]])
    columns = min(len(rows), _ABREAST)
    width = columns * max(56, min(80, pictures.shape[2]))
    return {"uri": data_uri(sheet(pictures, columns)), "shown": len(rows), "width": width}


def write_scores(
    folder: Path,
    examples: TrainingSet,
    scores: Float[np.ndarray, "N"],
    verdict: Verdict,
    is_probe: Bool[np.ndarray, "N"],
    looks: Impressions | None,
) -> None:
    """Writes scores.parquet, a row an image: path, label, whether it is a probe, score, p-value (none of a probe),
    rank, attack, whether it is removed, what it looks like and how surely (none if no features were recorded)."""
    classes = pa.array([as_unicode(name) for name in examples.class_names], pa.string())
    p_values = np.where(is_probe, np.nan, verdict.p_values)
    late, odds = pa.nulls(len(scores), pa.int32()), pa.nulls(len(scores), pa.float32())
    if looks is not None:
        late, odds = pa.array(looks.late, pa.int32()), pa.array(looks.odds, pa.float32())
    table = pa.table(
        {
            "path": pa.array([as_unicode(name) for name in examples.names], pa.string()),
            "label": pa.DictionaryArray.from_arrays(pa.array(examples.split.labels, pa.int32()), classes),
            "probe": is_probe,
            "score": scores.astype(np.float64),
            "p_value": pa.array(p_values, mask=is_probe),
            "rank": verdict.ranking(scores, None if looks is None else looks.odds),
            "attack": verdict.attack_of().astype(np.int32),
            "removed": verdict.removed,
            "looks_like": pa.DictionaryArray.from_arrays(late, classes),
            "odds": odds,
        }
    )
    write_atomically(folder / "scores.parquet", lambda aside: pq.write_table(table, aside))


def sentence(verdict: Verdict, class_names: Sequence[str], num_probes: int) -> str:
    """Returns the verdict in a few sentences."""
    parts = []
    if verdict.attacks:
        listed = [f"{len(one.ids):,} images of {printable(class_names[one.label])}" for one in verdict.attacks]
        if len(listed) > _NAMED:
            listed[_NAMED:] = [f"{len(listed) - _NAMED} more groups"]
        verb = "attack stands" if len(verdict.attacks) == 1 else "attacks stand"
        share = verdict.share
        parts.append(f"{len(verdict.attacks)} {verb} out: {', '.join(listed)}.")
        parts.append(
            f"About {_percent(share.estimate)} of the images look poisoned"
            f" ({_percent(share.low)} to {_percent(share.high)}); what leaves no trace is not counted."
        )
    elif verdict.stands_out:
        unlike = ", but no group of them is alike enough to be called an attack" if verdict.searched else ""
        parts.append(
            f"More images lie far from the {num_probes} probes than clean ones would{unlike}: look at the suspects."
        )
    elif not verdict.searched:
        parts.append(
            f"Nothing stands out: no more images lie far from the {num_probes} probes than clean ones would. Groups"
            " that are alike were not looked for, as that needs scoring.by_class, and features or ranked trajectories."
        )
    elif any(entry["judged"] for entry in verdict.classes):
        parts.append(
            "Nothing stands out: no group of images is alike, without a probe among them, and far from these or taken"
            " for other classes. That is no proof: poison that the network learnt as its class leaves no trace, and a"
            " small group can lack probes by chance."
        )

    if verdict.possible:
        count = len(verdict.possible)
        more = "1 group may be an attack" if count == 1 else f"{count} groups may be attacks"
        parts.append(f"{more}, which is not certain: look at what the report shows of it.")
    untold = sum(not entry["judged"] for entry in verdict.classes if entry["images"])
    if untold:
        named = "1 class" if untold == 1 else f"{untold} classes"
        parts.append(f"Of {named} this recording cannot tell: too few images, or too few probes.")
    return " ".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if 0.0005 < share < 0.02 else f"{100 * share:.0f} %"
