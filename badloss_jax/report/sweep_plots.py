"""The plots of a sweep: recall against clean loss, figures against the sweep's axis and against the share removed."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from badloss_jax.evaluation.detection import recall_at_clean_loss
from badloss_jax.report.plots import CLEAN_LOSS, Draw, line_of, recall_curves
from badloss_jax.report.results import read_scores
from badloss_jax.report.sweep_rows import Row, rows_by, summarised
from badloss_jax.report.sweep_tables import SHARES, TITLES
from badloss_jax.settings import CONTROLS
from badloss_jax.sweep import Item

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Panel = tuple[str, Draw]  # what it shows in words, and what draws it

_ON_AXIS = ("auroc", "mean_recall", "clean_lost", "mean_asr", "clean_accuracy")
_BY_REMOVED = ("mean_recall", "clean_lost", "mean_asr", "clean_accuracy")
_RECALL = "recall-"  # begins the names of pictures


def panels_of(folder: Path, done: Sequence[Item], rows: Sequence[Row], axis: str) -> dict[str, list[Panel]]:
    """Returns the panels of each picture; a picture without any is left out.

    Args:
      folder: of the sweep, with the items' scores.
      done: its finished items.
      rows: of these.
      axis: what the sweep's settings vary, or "".

    Returns:
      Name of the picture -> its panels.

    Raises:
      DataError: an item's scores.parquet is damaged.
    """
    pictures: dict[str, list[Panel]] = {}
    if axis:
        pictures["axis"] = _axis_panels(rows, axis)
    else:
        pictures |= _recall_panels(folder, done)
        pictures["removed"] = _removed_panels(rows)
    return {name: panels for name, panels in pictures.items() if panels}


def legend_of(name: str) -> float:
    """Returns the inches beside a panel of a picture for the names of all detectors."""
    if name.startswith(_RECALL):
        return 1.9
    return 0.0


def _recall_panels(folder: Path, done: Sequence[Item]) -> dict[str, list[Panel]]:
    """Returns a picture for each group of attacks against which something was scored."""
    items_by_attacks: dict[str, list[Item]] = {}
    for item in done:
        items_by_attacks.setdefault(item.attacks, []).append(item)

    pictures = {}
    for attacks, items in items_by_attacks.items():
        curves = _mean_recalls(folder, items)
        if curves:
            name = _RECALL + "".join(letter if letter.isalnum() else "_" for letter in attacks)
            description = f"Poison found against clean images lost, attacks: {attacks}"
            pictures[name] = [(description, recall_curves(curves, attacks))]
    return pictures


def _mean_recalls(folder: Path, items: Sequence[Item]) -> dict[str, Float[np.ndarray, "L"]]:
    """Returns for each detector its recall at each share of clean loss, the mean over attacks and seeds, best first."""
    recalls: dict[str, list[np.ndarray]] = {}
    for item in items:
        path = folder / "items" / item.name / "scores.parquet"
        if item.defense in CONTROLS or not path.is_file():
            continue

        scores = read_scores(path)
        for name, distances in scores.distances.items():
            per_attack = recall_at_clean_loss(distances, scores.attack_of, scores.is_probe, CLEAN_LOSS)
            if per_attack:
                recalls.setdefault(name, []).append(np.mean(list(per_attack.values()), axis=0))

    means = {name: np.mean(curves, axis=0) for name, curves in recalls.items()}
    return dict(sorted(means.items(), key=lambda entry: -entry[1].mean()))


def _axis_panels(rows: Sequence[Row], axis: str) -> list[Panel]:
    """Returns a panel for each group of attacks and each figure that two groups of runs have, or more."""
    panels = []
    for attacks, groups in rows_by(summarised(rows), "attacks").items():
        for key in _ON_AXIS:
            if sum(key in group for group in groups) > 1:
                description = f"{TITLES[key]} by {axis}, attacks: {attacks}"
                panels.append((description, _against_setting(groups, key, axis, attacks)))
    return panels


def _against_setting(groups: Sequence[Row], key: str, axis: str, attacks: str) -> Draw:
    """Draws a figure against the settings of the sweep's axis: mean and deviation over seeds, a line a defence."""
    settings = list(dict.fromkeys(group["setting"] for group in groups))
    # Settings that are no numbers stand at equal distances.
    numbers = _numbers(settings)
    positions = numbers or [float(i) for i in range(len(settings))]

    def draw(panel: "Axes") -> None:
        for i, (name, of_defense) in enumerate(rows_by(groups, "defense").items()):
            measured = [group for group in of_defense if key in group]
            if not measured:
                continue
            x = [positions[settings.index(group["setting"])] for group in measured]
            means = [_mean(group[key], key) for group in measured]
            deviations = [_deviation(group[key], key) for group in measured]
            panel.errorbar(x, means, deviations, label=name, marker="o", markersize=3, capsize=2, **line_of(i))

        # Only the settings themselves are ticks, also where they span more than a decade.
        if numbers and min(numbers) > 0 and max(numbers) / min(numbers) > 10:
            panel.set_xscale("log")
            panel.minorticks_off()
        panel.set_xticks(positions, settings, fontsize=7 if numbers else 6)
        panel.set(title=f"{TITLES[key]}, attacks: {attacks}", xlabel=axis, ylabel=_unit(key))
        panel.legend(fontsize=6)

    return draw


def _removed_panels(rows: Sequence[Row]) -> list[Panel]:
    """Returns a panel for each group of attacks and each figure that a defence has at several shares removed."""
    panels = []
    for attacks, of_attacks in rows_by(rows, "attacks").items():
        by_defense = _by_plain_name(of_attacks)
        for key in _BY_REMOVED:
            if any(_has_several_shares(of_defense, key) for of_defense in by_defense.values()):
                description = f"{TITLES[key]} against the share removed, attacks: {attacks}"
                panels.append((description, _against_removed(by_defense, key, attacks)))
    return panels


def _by_plain_name(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Groups rows by the name of their defence without its rule."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["defense"].partition(" (")[0], []).append(row)
    return groups


def _has_several_shares(rows: Sequence[Row], key: str) -> bool:
    """Whether the rows of a defence have the figure at three shares removed, or more."""
    return len({row["defense"] for row in rows if row.get(key) is not None}) > 2


def _against_removed(by_defense: dict[str, list[Row]], key: str, attacks: str) -> Draw:
    """Draws a figure against the share of all images that was removed: a line a defence, mean over seeds."""

    def draw(panel: "Axes") -> None:
        for i, (name, of_defense) in enumerate(by_defense.items()):
            measured = [group for group in summarised(of_defense) if key in group]
            # From left to right, as the line goes.
            points = sorted((100 * statistics.fmean(group["removed"]), group[key]) for group in measured)
            x = [share for share, _ in points]
            means = [_mean(values, key) for _, values in points]
            deviations = [_deviation(values, key) for _, values in points]

            # A single point has no line, in the legend neither.
            style = line_of(i)
            if len(points) <= 1:
                style["linestyle"] = "none"
            panel.errorbar(x, means, deviations, label=name, marker="o", markersize=3, capsize=2, **style)

        panel.set(title=f"{TITLES[key]}, attacks: {attacks}", xlabel="removed, % of all images", ylabel=_unit(key))
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=6)

    return draw


def _numbers(settings: Sequence[str]) -> list[float]:
    """Returns the labels as numbers, or nothing if some are none."""
    try:
        numbers = [float(setting.removesuffix("%")) for setting in settings]
    except ValueError:
        return []
    if not all(math.isfinite(number) for number in numbers):
        return []
    return numbers


def _mean(values: Sequence[float], key: str) -> float:
    return _scale(key) * statistics.fmean(values)


def _deviation(values: Sequence[float], key: str) -> float:
    """Returns the sample standard deviation; 0 for one seed, which draws no bar."""
    if len(values) == 1:
        return 0.0
    return _scale(key) * statistics.stdev(values)


def _scale(key: str) -> int:
    return 100 if key in SHARES else 1


def _unit(key: str) -> str:
    return "%" if key in SHARES else ""
