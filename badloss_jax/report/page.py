"""report.md and report.html, rendered from the files of a run alone."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from badloss_jax.core.errors import DataError
from badloss_jax.core.files import write_text
from badloss_jax.defenses.context import OWN
from badloss_jax.report.cards import main_kind, ranked_gallery
from badloss_jax.report.gallery import Gallery, data_uri, difference, read_gallery
from badloss_jax.report.markdown import report_markdown, verdict
from badloss_jax.report.plots import (
    Draw,
    histogram_of,
    recall_by_attack,
    recall_by_kind,
    roc_of,
    save_png,
    svg_uri,
    trajectories_of,
)
from badloss_jax.report.results import ScoresTable, read_results, read_scores
from badloss_jax.report.tables import (
    attack_table,
    detection_table,
    epochs_recorded,
    has_recording,
    headline,
    recorded_part,
    removal_table,
    trained_alone,
    trained_models,
    variant_title,
)
from badloss_jax.trajectories.store import TrajectoryStore

if TYPE_CHECKING:
    import jinja2


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
    run = folder
    if "rescored_from" in results:
        run = folder.resolve().parents[1]

    # Everything is read, and checked, before anything is written.
    scores = None
    if any("detection" in variant for variant in results["variants"].values()):
        scores = read_scores(folder / "scores.parquet")
    losses = None
    if scores and has_recording(results):
        # A recording that went on since it was scored has more epochs than the scores know of.
        epochs = np.arange(epochs_recorded(results))
        losses = TrajectoryStore.open(run / "trajectories").read("loss", epochs)
    gallery = _gallery_if_kept(run)
    if scores and losses is not None and len(losses) != len(scores.labels):
        raise DataError(f"{run} has the trajectories of {len(losses)} examples and the scores of {len(scores.labels)}")

    if results["attacks"] and scores:
        _save_plots(folder, results["attacks"], scores, losses)
    write_text(folder / "report.md", report_markdown(results))
    write_text(folder / "report.html", render_page(results, scores, losses, gallery))
    return folder / "report.html"


def _gallery_if_kept(run: Path) -> Gallery | None:
    """Reads gallery.npz; a run may have been copied without its images."""
    try:
        return read_gallery(run / "gallery.npz")
    except FileNotFoundError:
        return None


def _save_plots(folder: Path, attacks: Iterable[str], scores: ScoresTable, losses: np.ndarray | None) -> None:
    """Draws the PNG files that report.md shows."""
    who = (scores.attack_of, scores.is_probe)
    if losses is not None:
        save_png(folder / "trajectories.png", [trajectories_of(name, losses, *who) for name in attacks])
    save_png(folder / "roc.png", [roc_of(kind, values, *who) for kind, values in scores.distances.items()])


def render_page(
    results: Mapping[str, Any],
    scores: ScoresTable | None,
    losses: Float[np.ndarray, "N T"] | None,
    gallery: Gallery | None,
) -> str:
    """Returns one self-contained HTML page: no script, no request, every string from the data escaped.

    Args:
      results: what results.json holds.
      scores: what scores.parquet holds; None of a run that scored nothing.
      losses: [N, T], in nats; None of a run that recorded nothing.
      gallery: the images; None leaves the gallery and the triggers out.

    Returns:
      The page.

    Raises:
      DataError: the gallery is of other examples than the scores.
    """
    config = results["config"]
    figures = _figures(results, scores, losses)

    # A run that was copied without its images, or scored nothing, has a page without these.
    triggers: list[dict[str, str]] = []
    if gallery:
        triggers = _triggers(gallery)
    ranked = None
    if scores and gallery and len(gallery.ids):
        ranked = ranked_gallery(results, scores, losses, gallery)

    template = environment_of_templates().get_template("page.html.jinja")
    return template.render(
        results=results,
        title=_title(config),
        verdict=verdict(results),
        epochs_recorded=epochs_recorded(results),
        recorded_part=recorded_part(results),
        models=_models(results),
        attacks=results["attacks"],
        attack_table=attack_table(results),
        triggers=triggers,
        figures=figures,
        detection=detection_table(results),
        removal=[[variant_title(row[0], config), *row[1:]] for row in removal_table(results)],
        gallery=ranked,
        seconds=results["seconds"],
        settings=json.dumps(config, indent=2),
        environment=results["environment"],
    )


def environment_of_templates() -> "jinja2.Environment":
    """Returns what renders the pages: every string is escaped, and what is missing is an error."""
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Keeps a number and its % on one line.
    templates.filters["unbroken"] = lambda text: text.replace(" %", "\N{NO-BREAK SPACE}%")
    return templates


def _title(config: Mapping[str, Any]) -> str:
    """Names the data set: the source, the folder if that says more, and the seed."""
    source = config["data"]["source"]
    folder = Path(config["data"]["dir"]).name

    # The folder of a downloaded data set is mostly called as its source.
    title = source
    if folder.lower() != source:
        title = f"{source} {folder}".rstrip()
    return f"{title}, seed {config['seed']}"


def _models(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The headline table: rows of cells, each with its text, what stands small below it, and how dark it is."""
    trained = trained_models(results)
    if not trained:
        return None

    header, *body = headline(results)
    rows = []
    for name, *cells in body:
        variant = results["variants"].get(name, {})
        rates = _rates(trained[name])

        mean = 0.0
        if rates:
            mean = float(np.mean([rate["share"] for rate in rates]))
        rows.append(
            {
                "name": name,
                "title": variant_title(name, results["config"]),
                "cells": cells[:4],
                "mean": mean,
                # A defence has a detection, or, if it trained a network itself, no recall.
                "control": "recall" in variant and "detection" not in variant,
                "rates": rates,
            }
        )
    return {"header": header, "rows": rows, "alone": trained_alone(results)}


def _rates(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a cell for each attack: its success rate, and small below it that of the boosted trigger, in %."""
    cells = []
    for attack, rate in model["attack_success_rate"].items():
        boosted = model["boosted"].get(attack)
        small = ""
        if boosted is not None:
            small = f"{100 * boosted:.1f}"
        cells.append({"text": f"{100 * rate:.1f}", "small": small, "share": rate})
    return cells


def _figures(
    results: Mapping[str, Any], scores: ScoresTable | None, losses: np.ndarray | None
) -> dict[str, list[dict[str, str]]]:
    """Returns the panels of each section, each with its address and what it shows in words."""
    panels: dict[str, list[tuple[str, Draw]]] = {"histograms": [], "trajectories": [], "roc": [], "recall": []}

    if scores is not None:
        who = (scores.attack_of, scores.is_probe)
        panels["histograms"] = [
            (f"Scores of {kind}", histogram_of(kind, values, _above_threshold(scores, kind), *who))
            for kind, values in scores.scores.items()
        ]

        if results["attacks"] and losses is not None:
            panels["trajectories"] = [
                (f"Loss of {name} over the epochs", trajectories_of(name, losses, *who)) for name in results["attacks"]
            ]
        if results["attacks"]:
            main = main_kind(list(scores.distances))
            panels["roc"] = [
                (f"ROC of {kind}", roc_of(kind, values, *who)) for kind, values in scores.distances.items()
            ]
            panels["recall"] = [
                ("Recall of all kinds against clean loss", recall_by_kind(scores.distances, *who)),
                (f"Recall of {main} against clean loss", recall_by_attack(main, scores.distances[main], *who)),
            ]

    return {
        section: [{"alt": alt, "uri": svg_uri(draw)} for alt, draw in described]
        for section, described in panels.items()
    }


def _above_threshold(scores: ScoresTable, kind: str) -> np.ndarray:
    """Returns [N], what the first rule of a kind removes that is a threshold on its scores; nothing if none is."""
    for rule, removed in scores.removed[kind].items():
        # A defence's own rule, which stands first, need be no threshold on its scores.
        if rule != OWN:
            return removed
    return np.zeros(len(scores.labels), bool)


def _triggers(gallery: Gallery) -> list[dict[str, str]]:
    """Returns for each attack its name, and one image before, after, and what was changed."""
    return [
        {
            "name": str(name),
            "before": data_uri(before),
            "after": data_uri(after),
            "difference": data_uri(difference(before, after)),
        }
        for name, before, after in zip(gallery.attacks, gallery.before, gallery.after, strict=True)
    ]
