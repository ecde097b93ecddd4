"""What a sweep found: every run as a row of runs.csv, and from these tables and plots, as Markdown, CSV and a page."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import read_json, write_text
from badloss_jax.evaluation.detection import recall_at_clean_loss
from badloss_jax.report.page import environment_of_templates
from badloss_jax.report.plots import CLEAN_LOSS, Draw, line_of, recall_curves, save_png, svg_uri
from badloss_jax.report.results import read_scores
from badloss_jax.report.tables import as_markdown, variant_title
from badloss_jax.settings import CONTROLS
from badloss_jax.sweep import Item, read_sweep, state_of

Row = dict[str, Any]
Table = tuple[str, list[list[str]]]
_WHO = ("attacks", "defense", "setting", "seed", "git_commit")
_PERCENT = ("removed", "clean_lost", "clean_accuracy", "mean_asr", "mean_ra", "mean_recall", "der")
_TITLES = {
    "removed": "removed", "clean_lost": "clean lost", "clean_accuracy": "CA", "mean_asr": "mean ASR",
    "mean_ra": "mean RA", "der": "DER", "auroc": "AUROC", "average_precision": "avg. precision",
    "tpr_at_1_fpr": "TPR at 1 % FPR", "mean_recall": "recall", "seconds": "seconds", "epochs": "epochs",
}  # fmt: skip


_COMPARED = ("removed", "clean_lost", "mean_recall", "auroc", "tpr_at_1_fpr", "clean_accuracy", "mean_asr", "mean_ra",
             "der", "seconds", "epochs")  # fmt: skip
_PER_ATTACK = (  # title, figures in the mean, prefix of those of each attack
    ("Attack success rate", ("clean_accuracy", "mean_asr"), "asr"),
    ("Robust accuracy", ("clean_accuracy", "mean_ra"), "ra"),
    ("Recall", ("clean_lost", "mean_recall"), "recall"),
    ("AUROC", ("auroc", "average_precision"), "auroc"),
)


def rows_of(item: Item, results: Mapping[str, Any]) -> list[Row]:
    """Returns one flat row for each rule of an item: who, and every figure that there is, as numbers."""
    commit = results["environment"]["git_commit"] or ""
    who = {"attacks": item.attacks, "setting": item.setting, "seed": item.seed, "git_commit": commit}
    found = []
    if item.defense == "none":
        found.append(("none", {"removed_share": 0.0, "clean_removed_share": 0.0, "retrained": results["undefended"]}))
    for name, variant in results["variants"].items():
        defense, _, rule = name.partition("/")
        wanted = item.rules or ("fraction",)
        if defense == item.defense and (not rule or rule in wanted):
            found.append((variant_title(name, results["config"]), variant))
    return [who | {"defense": title} | _figures(variant) for title, variant in found]


def _figures(variant: Mapping[str, Any]) -> Row:
    row: Row = {"removed": variant["removed_share"], "clean_lost": variant["clean_removed_share"]}
    if "retrained" in variant:
        model = variant["retrained"]
        row |= {"clean_accuracy": model["clean_accuracy"]}
        rates = {"asr": "attack_success_rate", "ra": "robust_accuracy", "der": "defense_effectiveness"}
        for short, key in rates.items():
            row |= {f"{short}:{attack}": value for attack, value in model.get(key, {}).items()}
        row |= {f"mean_{short}": _mean(model.get(rates[short], {})) for short in ("asr", "ra")}
        row["der"] = _mean(model.get("defense_effectiveness", {}))
    if "detection" in variant:
        for metric in ("auroc", "average_precision", "tpr_at_1_fpr"):
            row[metric] = variant["detection"][metric]["overall"]
            row |= {f"{metric}:{attack}": value for attack, value in variant["detection"][metric].items()
                    if attack != "overall"}  # fmt: skip
    row |= {f"recall:{attack}": value for attack, value in variant.get("recall", {}).items()}
    row["mean_recall"] = _mean(variant.get("recall", {}))
    if "cost" in variant:
        row |= {"seconds": variant["cost"]["seconds"], "epochs": variant["cost"]["epochs"]}
    return row


def _add_epochs(rows: Sequence[Row]) -> None:
    """Gives the cost in epochs of training also to runs that trained no undefended network, where another one did."""
    seconds = {_peers(row): row["seconds"] / row["epochs"] for row in rows if row.get("epochs")}
    for row in rows:
        if row.get("seconds") and not row.get("epochs") and _peers(row) in seconds:
            row["epochs"] = row["seconds"] / seconds[_peers(row)]


def _peers(row: Row) -> tuple[Any, ...]:
    return row["attacks"], row["setting"], row["seed"]


def _mean(values: Mapping[str, float]) -> float | None:
    return statistics.fmean(values.values()) if values else None


def read_runs(path: Path) -> list[Row]:
    """Reads runs.csv.

    Raises:
      DataError: it is missing or damaged.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return [
            {key: value if key in _WHO else float(value) if value else None for key, value in row.items()}
            | {"seed": int(row["seed"])}
            for row in rows
        ]  # fmt: skip
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f"{path} is missing or damaged: {error}") from error


def summarised(rows: Iterable[Row]) -> list[Row]:
    """Groups the rows that differ in their seed alone: figure -> the list of its values, "seeds" -> their number."""
    groups: dict[tuple[str, ...], Row] = {}
    for row in rows:
        group = groups.setdefault(tuple(row[key] for key in _WHO[:3]), {key: row[key] for key in _WHO[:3]})
        group.setdefault("seeds", []).append(row["seed"])
        for key, value in row.items():
            if key not in _WHO and value is not None:
                group.setdefault(key, []).append(value)
    return list(groups.values())


def tables(rows: Sequence[Row], axis: str = "", *, per_attack: bool = True) -> list[Table]:
    """Returns (title, header and rows) of every table, for each group of attacks; without `per_attack` the first.

    Mean and sample standard deviation over seeds; per attack the mean alone.
    """
    groups = summarised(rows)
    found: list[Table] = []
    labels = list(dict.fromkeys(group["attacks"] for group in groups))
    for label in labels:
        chosen = [group for group in groups if group["attacks"] == label]
        told = f"attacks: {label}" + (f", by {axis}" if axis else "")
        compared = _COMPARED[:-2] if axis else _COMPARED  # what a setting costs was mostly paid by another
        found.append((f"Comparison; {told}", _table(chosen, compared, "", axis)))
        for title, keys, short in _PER_ATTACK if per_attack else ():
            having = [group for group in chosen if any(key.startswith(f"{short}:") for key in group)]
            table = _table(having, keys, short, axis)
            found += [(f"{title}, per attack; {told}", table)] if len(table) > 1 else []
    if len(labels) > 1 and not axis:
        for key in ("mean_asr", "clean_accuracy", "auroc", "clean_lost"):
            table = _by_attacks(groups, labels, key)
            found += [(f"{_TITLES[key]}, by the attacks on the training set", table)] if len(table) > 1 else []
    return found


def _table(groups: Sequence[Row], keys: Sequence[str], short: str, axis: str) -> list[list[str]]:
    """Returns header and rows; columns without any figure are left out, and so are those of a single attack."""
    found = [key for group in groups for key in group if short and key.startswith(f"{short}:")]
    attacks = list(dict.fromkeys(found))
    columns = [key for key in keys if any(key in group for group in groups)]
    columns += attacks if len(attacks) > 1 else []
    titles = [_TITLES.get(key, key.partition(":")[2]) for key in columns]
    header = ["defence", *([axis] if axis else []), "seeds", *titles]
    body = [
        [group["defense"], *([group["setting"]] if axis else []), str(len(group["seeds"])),
         *(_cell(key, group.get(key), spread=":" not in key) for key in columns)]
        for group in groups
    ]  # fmt: skip
    return [header, *body]


def _by_attacks(groups: Sequence[Row], labels: Sequence[str], key: str) -> list[list[str]]:
    by_defense: dict[str, dict[str, Row]] = {}
    for group in groups:
        if key in group:
            by_defense.setdefault(group["defense"], {})[group["attacks"]] = group
    body = [
        [name, *(_cell(key, found.get(label, {}).get(key)) for label in labels)] for name, found in by_defense.items()
    ]
    return [["defence", *labels], *body] if body else [["defence"]]


def _cell(key: str, values: Sequence[float] | None, spread: bool = True) -> str:
    """Writes mean and sample standard deviation: shares in percent, seconds and epochs as they are."""
    if not values:
        return ""
    plain = key.partition(":")[0]
    percent = plain in (*_PERCENT, "asr", "ra", "recall")
    factor, digits = (100, 1) if percent else (1, 1 if plain in ("seconds", "epochs") else 3)
    mean = f"{factor * statistics.fmean(values):.{digits}f}"
    deviation = f"{factor * statistics.stdev(values):.{digits}f}" if spread and len(values) > 1 else ""
    return f"{mean} ± {deviation}" if deviation.strip("0.") else mean


def write_sweep_report(folder: Path) -> list[Table]:
    """Renders what is done of a sweep: runs.csv, results.csv, report.md, report.html, plots; returns the short tables.

    Raises:
      UsageError: no sweep is there, or nothing of it is done.
      DataError: a file of it is damaged; it is named.
    """
    sweep, names = read_sweep(folder)
    states = {name: state_of(folder, item) for name, item in zip(names, sweep.items, strict=True)}
    done = [item for item in sweep.items if states[item.name] == "done"]
    if not done:
        raise UsageError(f"{folder}: no item of this sweep is done yet")
    rows = []
    for item in done:
        path = folder / "items" / item.name / "results.json"
        try:
            rows += rows_of(item, read_json(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged: {error}") from error
    _add_epochs(rows)
    found = tables(rows, sweep.axis)
    plots = _plots(folder, done, rows, sweep.axis)
    failed = [(name, _last_line(folder / "items" / name / "error.txt")) for name, s in states.items() if s == "failed"]
    told = f"{len(done)} of {len(states)} runs are done, {len(failed)} failed."
    write_text(folder / "runs.csv", _csv(rows))
    write_text(folder / "results.csv", _csv(_flat(summarised(rows))))
    for name, draws in plots.items():
        save_png(folder / f"{name}.png", [draw for _, draw in draws], _legend(name))
    write_text(folder / "report.md", _markdown(sweep.title, told, found, list(plots), failed))
    figures = [(name, *panel) for name, draws in plots.items() for panel in draws]
    page = environment_of_templates().get_template("sweep.html.jinja").render(
        title=sweep.title or "sweep", told=told, tables=found, failed=failed,
        figures=[{"alt": alt, "uri": svg_uri(draw, _legend(name))} for name, alt, draw in figures],
    )  # fmt: skip
    write_text(folder / "report.html", page)
    return tables(rows, sweep.axis, per_attack=False)


def _legend(name: str) -> float:
    """Returns the inches beside a panel for the names of all detectors."""
    return 1.9 if name.startswith("recall-") else 0.0


def _last_line(path: Path) -> str:
    lines = path.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _flat(groups: Sequence[Row]) -> list[Row]:
    """Spreads each figure's values to its mean and its sample standard deviation (empty for one seed)."""
    flat = []
    for group in groups:
        row = {key: group[key] for key in _WHO[:3]} | {"seeds": len(group["seeds"])}
        for key, values in group.items():
            if key not in row:
                row[key] = statistics.fmean(values)
                row[f"{key} std"] = statistics.stdev(values) if len(values) > 1 else None
        flat.append(row)
    return flat


def _csv(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    first = [key for key in (*_WHO, "seeds") if key in columns]
    file = io.StringIO()
    writer = csv.DictWriter(file, [*first, *(key for key in columns if key not in first)], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _safe(value) for key, value in row.items()} for row in rows)
    return file.getvalue()


def _safe(value: Any) -> Any:
    """Keeps a text from being taken for a formula by a spreadsheet."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value


def _markdown(
    title: str, told: str, found: Sequence[Table], plots: Sequence[str], failed: Sequence[tuple[str, str]]
) -> str:
    parts = [f"# {title or 'Sweep'}", told, "Mean and sample standard deviation over seeds; shares in percent."]
    parts += [f"## {name}\n\n{as_markdown(table)}" for name, table in found]
    parts += [f"![{name}]({name}.png)" for name in plots]
    if failed:
        parts.append("## Failed\n\n" + as_markdown([["item", "error"], *([name, error] for name, error in failed)]))
    return "\n\n".join(parts) + "\n"


def _plots(folder: Path, done: Sequence[Item], rows: Sequence[Row], axis: str) -> dict[str, list[tuple[str, Draw]]]:
    """Returns the panels of each picture, each with what it shows in words."""
    groups = summarised(rows)
    plots: dict[str, list[tuple[str, Draw]]] = {}
    if axis:
        plots["axis"] = [
            (f"{_TITLES[key]} by {axis}, attacks: {label}", _against_setting(chosen, key, axis, label))
            for label, chosen in _by(groups, "attacks").items()
            for key in ("auroc", "mean_recall", "clean_lost", "mean_asr", "clean_accuracy")
            if sum(key in group for group in chosen) > 1
        ]
    else:
        for label, items in _by([{"attacks": item.attacks, "item": item} for item in done], "attacks").items():
            curves = _recall_curves(folder, [entry["item"] for entry in items])
            if curves:
                plots[f"recall-{_plain(label)}"] = [
                    (f"Poison found against clean images lost, attacks: {label}", recall_curves(curves, label))
                ]
    removed = [
        (f"{_TITLES[key]} against the share removed, attacks: {label}", _against_removed(chosen, key, label))
        for label, chosen in _by(rows, "attacks").items()
        for key in ("mean_recall", "clean_lost", "mean_asr", "clean_accuracy")
        if not axis and _several_shares(chosen, key)
    ]
    return {name: draws for name, draws in (plots | {"removed": removed}).items() if draws}


def _by(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _plain(label: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in label)


def _recall_curves(folder: Path, items: Sequence[Item]) -> dict[str, np.ndarray]:
    """Returns for each detector its recall at each share of clean loss, the mean over attacks and seeds."""
    found: dict[str, list[np.ndarray]] = {}
    for item in items:
        path = folder / "items" / item.name / "scores.parquet"
        if item.defense in CONTROLS or not path.is_file():
            continue
        scores = read_scores(path)
        for name, values in scores.distances.items():
            curves = recall_at_clean_loss(values, scores.attack_of, scores.is_probe, CLEAN_LOSS)
            if curves:
                found.setdefault(name, []).append(np.mean(list(curves.values()), axis=0))
    means = {name: np.mean(curves, axis=0) for name, curves in found.items()}
    return dict(sorted(means.items(), key=lambda entry: -entry[1].mean()))


def _against_setting(groups: Sequence[Row], key: str, axis: str, label: str) -> Draw:
    """Draws a figure against the settings of the sweep's axis: mean and deviation over seeds, a line a defence."""

    def draw(panel: Axes) -> None:
        settings = list(dict.fromkeys(group["setting"] for group in groups))
        numbers = _numbers(settings)
        places = numbers or list(range(len(settings)))
        for i, (name, chosen) in enumerate(_by(groups, "defense").items()):
            having = [group for group in chosen if key in group]
            x = [places[settings.index(group["setting"])] for group in having]
            means = [_scale(key) * statistics.fmean(group[key]) for group in having]
            spread = [_scale(key) * statistics.stdev(group[key]) if len(group[key]) > 1 else 0.0 for group in having]
            if having:
                panel.errorbar(x, means, spread, label=name, marker="o", markersize=3, capsize=2, **line_of(i))
        if numbers and min(numbers) > 0 and max(numbers) / min(numbers) > 10:
            panel.set_xscale("log")
            panel.minorticks_off()
        panel.set_xticks(places, settings, fontsize=7 if numbers else 6)
        panel.set(title=f"{_TITLES[key]}, attacks: {label}", xlabel=axis, ylabel=_unit(key))
        panel.legend(fontsize=6)

    return draw


def _against_removed(rows: Sequence[Row], key: str, label: str) -> Draw:
    """Draws a figure against the share of all images that was removed: a line a defence, mean over seeds."""

    def draw(panel: Axes) -> None:
        for i, (name, chosen) in enumerate(_by(_named_plainly(rows), "plain").items()):
            having = [row for row in summarised(chosen) if key in row]
            points = sorted((100 * statistics.fmean(row["removed"]), row[key]) for row in having)
            x, y = [x for x, _ in points], [_scale(key) * statistics.fmean(values) for _, values in points]
            spread = [_scale(key) * statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in points]
            style = line_of(i) if len(points) > 1 else line_of(i) | {"linestyle": "none"}
            panel.errorbar(x, y, spread, label=name, marker="o", markersize=3, capsize=2, **style)
        panel.set(title=f"{_TITLES[key]}, attacks: {label}", xlabel="removed, % of all images", ylabel=_unit(key))
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=6)

    return draw


def _named_plainly(rows: Sequence[Row]) -> list[Row]:
    """Adds each defence's name without its rule."""
    return [row | {"plain": row["defense"].partition(" (")[0]} for row in rows]


def _several_shares(rows: Sequence[Row], key: str) -> bool:
    """Whether a defence has the figure at three shares removed, or more."""
    titles: dict[str, set[str]] = {}
    for row in _named_plainly(rows):
        if row.get(key) is not None:
            titles.setdefault(row["plain"], set()).add(row["defense"])
    return any(len(found) > 2 for found in titles.values())


def _numbers(settings: Sequence[str]) -> list[float]:
    """Returns the labels as numbers, or nothing if some are none."""
    try:
        numbers = [float(setting.removesuffix("%")) for setting in settings]
    except ValueError:
        return []
    return numbers if all(map(math.isfinite, numbers)) else []


def _scale(key: str) -> int:
    return 100 if key in _PERCENT else 1


def _unit(key: str) -> str:
    return "%" if key in _PERCENT else ""
