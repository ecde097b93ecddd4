"""What a scan leaves: its verdict in sentences, one page to look through the suspects, and scores.parquet.

The suspects, as Parquet and CSV, are those of `suspects`.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float
from markupsafe import Markup

from badloss_jax.core.files import as_unicode, printable, write_atomically
from badloss_jax.data.training_set import TrainingSet
from badloss_jax.report.page import environment_of_templates
from badloss_jax.report.plots import Draw, svg_uri
from badloss_jax.report.suspect_cards import attack_sheet, suspect_gallery
from badloss_jax.report.suspects import REASONS, Suspects, reasons, write_suspects
from badloss_jax.scoring import Impressions, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["REASONS", "Suspects", "reasons", "render_scan", "sentence", "write_scores", "write_suspects"]

_NAMED = 6  # attacks that the verdict lists
_LISTED = 50_000  # suspects that the page knows, to filter and export
_LEFT_OUT = 50  # files that are named


def render_scan(
    results: Mapping[str, Any],
    suspects: Suspects,
    examples: TrainingSet,
    losses: Float[np.ndarray, "N E"],
    scores: Float[np.ndarray, "N"],
    is_probe: Bool[np.ndarray, "N"],
) -> str:
    """Returns one self-contained HTML page: one script, which the page's own policy names by its hash; no request.

    Args:
      results: what scan.json holds.
      suspects: of the scan.
      examples: the training set.
      losses: [N, E], in nats, at the epochs that count.
      scores: [N].
      is_probe: [N].

    Returns:
      The page.
    """
    script = (Path(__file__).parent / "scan.js").read_text("utf-8")
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    # What the script filters and exports: reasons by their number, as the page knows tens of thousands of suspects.
    given_reasons = sorted(set(suspects.reasons))
    listed = _listed_rows(suspects, given_reasons)
    class_names = [as_unicode(name) for name in examples.class_names]
    embedded = _embedded({"rows": listed, "classes": class_names, "reasons": given_reasons})

    attacks = [
        entry | {"number": number, "members": attack_sheet(suspects, examples, number)}
        for number, entry in enumerate(results["attacks"], start=1)
    ]
    gallery = None
    if len(suspects.ids):  # without any there is no largest loss, to end the axis at
        gallery = suspect_gallery(suspects, examples, losses)
    histogram = {"alt": "Scores of the images and of the probes", "uri": svg_uri(_histogram(scores, is_probe))}
    left_out = list(examples.left_out.items())[:_LEFT_OUT]

    template = environment_of_templates().get_template("scan.html.jinja")
    return template.render(
        results=results,
        script=Markup(script),
        script_hash=Markup(script_hash),
        reasons=given_reasons,
        data=Markup(embedded),
        classes=_classes(results["classes"], suspects),
        class_names=[printable(name) for name in examples.class_names],
        listed=len(listed),
        with_suspects=sorted(set(suspects.labels.tolist())),
        figures=[histogram],
        attacks=attacks,
        gallery=gallery,
        settings=json.dumps(results["config"], indent=2),
        environment=results["environment"],
        left_out=[(printable(name), reason) for name, reason in left_out],
    )


def _listed_rows(suspects: Suspects, given_reasons: Sequence[str]) -> list[list[Any]]:
    """Returns the first suspects as short rows: name, label, score, p-value, number of the reason, removed."""
    # Not strict, as the names alone are cut short.
    columns = zip(
        suspects.names[:_LISTED],
        suspects.labels.tolist(),
        suspects.scores.tolist(),
        suspects.p_values.tolist(),
        suspects.reasons,
        suspects.removed.tolist(),
        strict=False,
    )
    return [
        [as_unicode(name), label, round(score, 4), round(p_value, 6), given_reasons.index(reason), int(removed)]
        for name, label, score, p_value, reason, removed in columns
    ]


def _classes(entries: Sequence[Mapping[str, Any]], suspects: Suspects) -> list[dict[str, Any]]:
    """Returns the classes with how many images of each are removed: most members of attacks first, then unjudged."""
    removed = np.bincount(suspects.labels[suspects.removed], minlength=len(entries))
    counted = [dict(entry) | {"removed": int(count)} for entry, count in zip(entries, removed, strict=True)]
    return sorted(counted, key=lambda entry: (-entry["members"], entry["judged"]))


def _embedded(value: Any) -> str:
    """Returns JSON that cannot end the element that it stands in."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _histogram(scores: Float[np.ndarray, "N"], is_probe: Bool[np.ndarray, "N"]) -> Draw:
    """Draws how the scores of the images and of the probes are spread."""

    def draw(axis: "Axes") -> None:
        # A few far out would leave the rest in a bin or two: they are drawn at the ends.
        low, high = np.quantile(scores, [0.001, 0.999])
        bins = np.linspace(low, high, 61).tolist()
        for label, rows, colour in (("images", ~is_probe, "#0072B2"), ("probes", is_probe, "#000000")):
            # In percent of each group, as there are far fewer probes.
            values = np.clip(scores[rows], low, high)
            weights = np.full(rows.sum(), 100 / max(rows.sum(), 1))
            axis.hist(values, bins, weights=weights, color=colour, histtype="step", label=label)

        axis.set(xlabel="score", ylabel="% of the group", yscale="log")
        axis.legend(fontsize=8)

    return draw


def write_scores(
    folder: Path,
    examples: TrainingSet,
    scores: Float[np.ndarray, "N"],
    verdict: Verdict,
    is_probe: Bool[np.ndarray, "N"],
    looks: Impressions | None,
) -> None:
    """Writes scores.parquet, a row an image.

    Its columns: path, label, whether it is a probe, score, p-value (none of a probe), rank, attack, whether it is
    removed, what it looks like and how surely (none if no features were recorded).

    Args:
      folder: that of the scan.
      examples: the training set.
      scores: [N], higher is more suspicious.
      verdict: on these.
      is_probe: [N].
      looks: what each image looks like; None if no features were recorded.

    Raises:
      DataError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    classes = pa.array([as_unicode(name) for name in examples.class_names], pa.string())
    # Those of probes mean nothing; masked, they are null in the file.
    p_values = np.where(is_probe, np.nan, verdict.p_values)
    if looks is None:
        ranks = verdict.ranking(scores)
        late = pa.nulls(len(scores), pa.int32())
        odds = pa.nulls(len(scores), pa.float32())
    else:
        ranks = verdict.ranking(scores, looks.odds)
        late = pa.array(looks.late, pa.int32())
        odds = pa.array(looks.odds, pa.float32())

    columns = {
        "path": pa.array([as_unicode(name) for name in examples.names], pa.string()),
        "label": pa.DictionaryArray.from_arrays(pa.array(examples.split.labels, pa.int32()), classes),
        "probe": is_probe,
        "score": scores.astype(np.float64),
        "p_value": pa.array(p_values, mask=is_probe),
        "rank": ranks,
        "attack": verdict.attack_of().astype(np.int32),
        "removed": verdict.removed,
        "looks_like": pa.DictionaryArray.from_arrays(late, classes),
        "odds": odds,
    }
    write_atomically(folder / "scores.parquet", lambda aside: pq.write_table(pa.table(columns), aside))


def sentence(verdict: Verdict, class_names: Sequence[str], num_probes: int) -> str:
    """Returns the verdict in a few sentences.

    Args:
      verdict: of the scan.
      class_names: K.
      num_probes: P.

    Returns:
      What stands out, or that nothing does and what that means; then what is uncertain.
    """
    sentences = _finding(verdict, class_names, num_probes)

    if verdict.possible:
        count = len(verdict.possible)
        groups = "1 group may be an attack" if count == 1 else f"{count} groups may be attacks"
        sentences.append(f"{groups}, which is not certain: look at what the report shows of it.")

    unjudged = sum(not entry["judged"] for entry in verdict.classes if entry["images"])
    if unjudged:
        classes = "1 class" if unjudged == 1 else f"{unjudged} classes"
        sentences.append(f"Of {classes} this recording cannot tell: too few images, or too few probes.")
    return " ".join(sentences)


def _finding(verdict: Verdict, class_names: Sequence[str], num_probes: int) -> list[str]:
    """Says whether anything stands out; nothing, if no class could be judged."""
    if verdict.attacks:
        return _attacks_found(verdict, class_names)

    if verdict.stands_out:
        unlike = ""
        if verdict.searched:
            unlike = ", but no group of them is alike enough to be called an attack"
        return [
            f"More images lie far from the {num_probes} probes than clean ones would{unlike}: look at the suspects."
        ]

    if not verdict.searched:
        return [
            f"Nothing stands out: no more images lie far from the {num_probes} probes than clean ones would. Groups"
            " that are alike were not looked for, as that needs scoring.by_class, and features or ranked trajectories."
        ]

    if any(entry["judged"] for entry in verdict.classes):
        return [
            "Nothing stands out: no group of images is alike, without a probe among them, and far from these or taken"
            " for other classes. That is no proof: poison that the network learnt as its class leaves no trace, and a"
            " small group can lack probes by chance."
        ]
    return []


def _attacks_found(verdict: Verdict, class_names: Sequence[str]) -> list[str]:
    """Says how many attacks stand out, of which classes, and how much they poison."""
    groups = [f"{len(one.ids):,} images of {printable(class_names[one.label])}" for one in verdict.attacks]
    if len(groups) > _NAMED:
        groups[_NAMED:] = [f"{len(groups) - _NAMED} more groups"]

    count = len(verdict.attacks)
    verb = "attack stands" if count == 1 else "attacks stand"
    share = verdict.share
    return [
        f"{count} {verb} out: {', '.join(groups)}.",
        f"About {_percent(share.estimate)} of the images look poisoned"
        f" ({_percent(share.low)} to {_percent(share.high)}); what leaves no trace is not counted.",
    ]


def _percent(share: float) -> str:
    """Writes a share in percent: a small one with a digit behind the point."""
    if 0.0005 < share < 0.02:
        return f"{100 * share:.1f} %"
    return f"{100 * share:.0f} %"
