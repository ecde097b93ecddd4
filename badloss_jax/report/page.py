"""report.md and report.html, rendered from the files of a run alone."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float

from badloss_jax.core.errors import DataError
from badloss_jax.core.files import write_text
from badloss_jax.defenses.context import OWN
from badloss_jax.report.gallery import Gallery, data_uri, difference, highest_ranked, read_gallery, sheet
from badloss_jax.report.plots import (
    LOW_LOSS,
    histogram_of,
    recall_by_attack,
    recall_by_kind,
    roc_of,
    save_png,
    svg_uri,
    trajectories_of,
)
from badloss_jax.report.results import Scores, read_results, read_scores
from badloss_jax.report.tables import (
    attack_table,
    detection_table,
    headline,
    removal_table,
    report_markdown,
    trained_alone,
    trained_models,
    variant_title,
    verdict,
)
from badloss_jax.settings import KINDS
from badloss_jax.trajectories.store import TrajectoryStore

COLUMNS = 40  # tiles in a row of a sheet
SPARK = (100.0, 36.0)  # size of a small trajectory


def write_reports(folder: Path) -> Path:
    """Renders the reports of a run, or of a rescoring of it, and their plots; returns the path of report.html.

    Args:
      folder: with results.json, scores.parquet, trajectories/ and gallery.npz; of a rescoring, OUT/rescored/HASH, the
        last two are those of OUT. A run without a score has no scores.parquet, one without a recording no trajectories.

    Raises:
      UsageError: there is no results.json.
      DataError: a file is missing or damaged; it is named.
    """
    results = read_results(folder / "results.json", to_render=True)
    scored = any("detection" in variant for variant in results["variants"].values())
    scores = read_scores(folder / "scores.parquet") if scored else None
    run = folder.resolve().parents[1] if "rescored_from" in results else folder
    recorded = "recording" in results["seconds"] or "rescored_from" in results
    losses = TrajectoryStore.open(run / "trajectories").read("loss") if recorded and scores else None
    try:
        gallery = read_gallery(run / "gallery.npz")
    except FileNotFoundError:
        gallery = None
    if scores and losses is not None and len(losses) != len(scores.labels):
        raise DataError(f"{run} has the trajectories of {len(losses)} examples and the scores of {len(scores.labels)}")
    if results["attacks"] and scores:
        who = scores.attack_of, scores.is_probe
        if losses is not None:
            save_png(folder / "trajectories.png", [trajectories_of(name, losses, *who) for name in results["attacks"]])
        save_png(folder / "roc.png", [roc_of(kind, values, *who) for kind, values in scores.distances.items()])
    write_text(folder / "report.md", report_markdown(results))
    write_text(folder / "report.html", render_page(results, scores, losses, gallery))
    return folder / "report.html"


def render_page(
    results: Mapping[str, Any], scores: Scores | None, losses: Float[np.ndarray, "N T"] | None, gallery: Gallery | None
) -> str:
    """Returns one self-contained HTML page: no script, no request, every string from the data escaped."""
    config = results["config"]
    figures = _figures(results, scores, losses)
    shown = _gallery_of(results, scores, losses, gallery) if scores and gallery and len(gallery.ids) else None
    return (
        environment_of_templates()
        .get_template("page.html.jinja")
        .render(
            results=results,
            title=_title(config),
            verdict=verdict(results),
            models=_models(results),
            attacks=results["attacks"],
            attack_table=attack_table(results),
            triggers=_triggers(gallery) if gallery else [],
            figures=figures,
            detection=detection_table(results),
            removal=[[variant_title(row[0], config), *row[1:]] for row in removal_table(results)],
            gallery=shown,
            seconds=results["seconds"],
            settings=json.dumps(config, indent=2),
            environment=results["environment"],
        )
    )


def environment_of_templates() -> jinja2.Environment:
    """Returns what renders the pages: every string is escaped, and what is missing is an error."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters["unbroken"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    return templates


def main_kind(kinds: list[str]) -> str:
    """Returns what a report shows first: "combined" if it was scored, else the last kind, else the last defence."""
    of_trajectories = [kind for kind in kinds if kind in KINDS]
    return "combined" if "combined" in kinds else (of_trajectories or kinds)[-1]


def _title(config: Mapping[str, Any]) -> str:
    """Names the data set: the source, the folder if that says more, and the seed."""
    source, folder = config["data"]["source"], Path(config["data"]["dir"]).name
    return f"{source} {folder if folder.lower() != source else ''}".rstrip() + f", seed {config['seed']}"


def _models(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The headline table: rows of cells, each with its text, what stands small below it, and how dark it is."""
    trained = trained_models(results)
    if not trained:
        return None
    header, *body = headline(results)
    rows = []
    for name, *cells in body:
        variant, model = results["variants"].get(name, {}), trained[name]
        rates = []
        for attack, rate in model["attack_success_rate"].items():
            boosted = model["boosted"].get(attack)
            rates.append({"text": f"{100 * rate:.1f}", "small": "" if boosted is None else f"{100 * boosted:.1f}",
                          "share": rate})  # fmt: skip
        mean = float(np.mean([rate["share"] for rate in rates])) if rates else 0.0
        rows.append({"name": name, "title": variant_title(name, results["config"]), "cells": cells[:4], "mean": mean,
                     "control": "recall" in variant and "detection" not in variant, "rates": rates})  # fmt: skip
    return {"header": header, "rows": rows, "alone": trained_alone(results)}


def _figures(
    results: Mapping[str, Any], scores: Scores | None, losses: np.ndarray | None
) -> dict[str, list[dict[str, str]]]:  # fmt: skip
    """Returns the panels of each section, each with its address and what it shows in words."""
    if scores is None:
        return {"histograms": [], "trajectories": [], "roc": [], "recall": []}
    who, main = (scores.attack_of, scores.is_probe), main_kind(list(scores.distances))
    # A defence's own rule, which stands first, need be no threshold on its scores.
    rules = {kind: next((rows for rule, rows in removed.items() if rule != OWN), np.zeros(len(scores.labels), bool))
             for kind, removed in scores.removed.items()}  # fmt: skip
    histograms = [
        (f"Scores of {kind}", histogram_of(kind, values, rules[kind], *who)) for kind, values in scores.scores.items()
    ]
    groups: dict[str, list] = {"histograms": histograms, "trajectories": [], "roc": [], "recall": []}
    if results["attacks"]:
        groups["trajectories"] = [
            (f"Loss of {name} over the epochs", trajectories_of(name, losses, *who))
            for name in results["attacks"] if losses is not None
        ]  # fmt: skip
        groups["roc"] = [(f"ROC of {kind}", roc_of(kind, values, *who)) for kind, values in scores.distances.items()]
        groups["recall"] = [
            ("Recall of all kinds against clean loss", recall_by_kind(scores.distances, *who)),
            (f"Recall of {main} against clean loss", recall_by_attack(main, scores.distances[main], *who)),
        ]
    return {name: [{"alt": alt, "uri": svg_uri(draw)} for alt, draw in panels] for name, panels in groups.items()}


def _triggers(gallery: Gallery) -> list[dict[str, str]]:
    return [
        {"name": str(name), "before": data_uri(before), "after": data_uri(after),
         "difference": data_uri(difference(before, after))}
        for name, before, after in zip(gallery.attacks, gallery.before, gallery.after, strict=True)
    ]  # fmt: skip


def _gallery_of(
    results: Mapping[str, Any], scores: Scores, losses: np.ndarray | None, gallery: Gallery
) -> dict[str, Any]:
    """What the gallery shows: sheets of tiles, and for each kind its cards in the order of rank."""
    names, size, main = results["class_names"], len(scores.labels), main_kind(list(scores.distances))
    place = {int(example): position for position, example in enumerate(gallery.ids)}
    for what, values, end in (("ids", gallery.ids, size), ("labels", gallery.true_labels, len(names))):
        if values.min() < 0 or values.max() >= end:
            raise DataError(f"gallery.npz has {what} from {values.min()} to {values.max()}, expected 0 to {end - 1}")
    clean = (scores.attack_of == "") & ~scores.is_probe
    poisoned = scores.attack_of[gallery.ids] != ""
    order = np.cumsum(poisoned) - 1  # of the poisoned among themselves
    originals, shown = gallery.originals[poisoned], gallery.shown[poisoned]
    top = 0.0 if losses is None else math.log(max(float(losses[gallery.ids].max()), 1.0))

    def spark(rows: Any) -> str:
        """Draws the median loss of some examples."""
        return "" if losses is None else spark_path(np.median(losses[rows], axis=0), top)

    def card(example: int, rank: int) -> dict[str, Any]:
        position = place[example]
        label, before = int(scores.labels[example]), int(gallery.true_labels[position])
        return {"id": example, "rank": rank, "label": _class(names, label), "attack": scores.attack_of[example],
                "before": "" if label == before else _class(names, before), "shown": tile_place(position),
                "changed": tile_place(int(order[position])), "path": spark([example])}  # fmt: skip

    wanted = min(results["config"]["report"]["gallery"], size)
    kinds = []
    for kind in sorted(scores.distances, key=lambda kind: kind != main):
        ranked = highest_ranked(scores.distances[kind], scores.is_probe, wanted).tolist()
        cards = [card(example, rank) for rank, example in enumerate(ranked, 1) if example in place]
        kinds.append({"name": kind, "cards": cards, "wanted": len(ranked)})
    height, width = gallery.shown.shape[1:3]
    tile = max(56, min(80, width))
    return {
        "kinds": kinds,
        "clean": spark(clean) if clean.any() else "",
        "lines": losses is not None,
        "tile": (tile, round(tile * height / width)),
        "columns": COLUMNS,
        "size": SPARK,
        "sheets": {"shown": data_uri(sheet(gallery.shown, COLUMNS)),
                   "original": data_uri(sheet(originals, COLUMNS)),
                   "difference": data_uri(sheet(difference(originals, shown), COLUMNS))},
    }  # fmt: skip


def tile_place(position: int) -> str:
    """Returns the CSS variables that place a sheet behind a tile."""
    row, column = divmod(position, COLUMNS)
    return f"--r:{row};--c:{column}"


def spark_path(losses: Float[np.ndarray, "T"], top: float) -> str:
    """Returns a trajectory as an SVG path: loss on a logarithmic axis, from 1e-4 to exp(top)."""
    bottom = math.log(LOW_LOSS)
    heights = (np.log(np.maximum(losses, LOW_LOSS)) - bottom) / (top - bottom)
    x = np.linspace(0, SPARK[0], len(losses))
    y = SPARK[1] * (1 - np.minimum(heights, 1))
    return "M" + "L".join(f"{a:.0f} {b:.0f}" for a, b in zip(x, y, strict=True))


def _class(names: list[str], label: int) -> str:
    return names[label] if 0 <= label < len(names) else str(label)
