"""The runs of a sweep as rows of figures: a row for each rule of an item, runs.csv, and groups over seeds."""

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from badloss_jax.core.errors import DataError
from badloss_jax.report.tables import variant_title
from badloss_jax.sweep import Item

Row = dict[str, Any]

_GROUP = ("attacks", "defense", "setting")  # runs that have these in common differ in their seed alone
_RUN = (*_GROUP, "seed", "git_commit")  # what is no figure


def rows_of(item: Item, results: Mapping[str, Any]) -> list[Row]:
    """Returns one flat row for each rule of an item: who, and every figure that there is, as numbers.

    Args:
      item: of the sweep.
      results: what its results.json holds.

    Returns:
      Rows with the columns "attacks", "setting", "seed", "git_commit", "defense", and the figures; None is one that
      was to be measured and could not be.
    """
    variants: list[tuple[str, Mapping[str, Any]]] = []
    if item.defense == "none":
        undefended = {"removed_share": 0.0, "clean_removed_share": 0.0, "retrained": results["undefended"]}
        variants.append(("none", undefended))

    # Of a defence with its own rule, results.json has rules that the sweep does not ask for, too.
    reported = item.rules or ("fraction",)
    for name, variant in results["variants"].items():
        defense, _, rule = name.partition("/")
        if defense == item.defense and (not rule or rule in reported):
            variants.append((variant_title(name, results["config"]), variant))

    run = {
        "attacks": item.attacks,
        "setting": item.setting,
        "seed": item.seed,
        "git_commit": results["environment"]["git_commit"] or "",
    }
    return [run | {"defense": title} | _figures(variant) for title, variant in variants]


def _figures(variant: Mapping[str, Any]) -> Row:
    """Flattens a variant's entry: "asr:patch" is the attack success rate of "patch", "mean_asr" that of all.

    The order of the keys is that of the columns in runs.csv.
    """
    row: Row = {"removed": variant["removed_share"], "clean_lost": variant["clean_removed_share"]}
    if "retrained" in variant:
        row |= _rates(variant["retrained"])
    if "detection" in variant:
        for metric in ("auroc", "average_precision", "tpr_at_1_fpr"):
            values = variant["detection"][metric]
            row[metric] = values["overall"]
            row |= {f"{metric}:{attack}": value for attack, value in values.items() if attack != "overall"}

    recall = variant.get("recall", {})
    row |= {f"recall:{attack}": value for attack, value in recall.items()}
    row["mean_recall"] = _mean(recall)

    if "cost" in variant:
        row["seconds"] = variant["cost"]["seconds"]
        row["epochs"] = variant["cost"]["epochs"]
    return row


def _rates(model: Mapping[str, Any]) -> Row:
    """Returns what a trained network does: clean accuracy, and the rates of each attack and in the mean."""
    success = model.get("attack_success_rate", {})
    robust = model.get("robust_accuracy", {})
    effectiveness = model.get("defense_effectiveness", {})

    row: Row = {"clean_accuracy": model["clean_accuracy"]}
    for short, rates in (("asr", success), ("ra", robust), ("der", effectiveness)):
        row |= {f"{short}:{attack}": rate for attack, rate in rates.items()}
    row["mean_asr"] = _mean(success)
    row["mean_ra"] = _mean(robust)
    row["der"] = _mean(effectiveness)
    return row


def _mean(values: Mapping[str, float]) -> float | None:
    if not values:
        return None
    return statistics.fmean(values.values())


def add_epochs(rows: Sequence[Row]) -> None:
    """Gives the cost in epochs of training also to runs that trained no undefended network, where another one did."""
    seconds_per_epoch = {_peers(row): row["seconds"] / row["epochs"] for row in rows if row.get("epochs")}
    for row in rows:
        if row.get("seconds") and not row.get("epochs") and _peers(row) in seconds_per_epoch:
            row["epochs"] = row["seconds"] / seconds_per_epoch[_peers(row)]


def _peers(row: Row) -> tuple[Any, ...]:
    """Returns what runs have in common whose undefended networks are the same."""
    return row["attacks"], row["setting"], row["seed"]


def rows_by(rows: Iterable[Row], key: str) -> dict[str, list[Row]]:
    """Groups rows by one of their columns.

    Args:
      rows: each has the column.
      key: the column.

    Returns:
      Value -> its rows, both in the order of the rows.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def summarised(rows: Iterable[Row]) -> list[Row]:
    """Groups the rows that differ in their seed alone: figure -> the list of its values, "seeds" -> their number."""
    groups: dict[tuple[str, ...], Row] = {}
    for row in rows:
        names = {key: row[key] for key in _GROUP}
        group = groups.setdefault(tuple(names.values()), names)
        group.setdefault("seeds", []).append(row["seed"])
        # What a seed could not measure leaves a figure with fewer values than there are seeds.
        for key, value in row.items():
            if key not in _RUN and value is not None:
                group.setdefault(key, []).append(value)
    return list(groups.values())


def means_and_deviations(groups: Sequence[Row]) -> list[Row]:
    """Spreads each figure's values to its mean and its sample standard deviation (None for one seed)."""
    rows = []
    for group in groups:
        row: Row = {key: group[key] for key in _GROUP}
        row["seeds"] = len(group["seeds"])
        for key, values in group.items():
            if key in row:
                continue
            deviation = None
            if len(values) > 1:
                deviation = statistics.stdev(values)
            row[key] = statistics.fmean(values)
            row[f"{key} std"] = deviation
        rows.append(row)
    return rows


def csv_text(rows: Sequence[Row]) -> str:
    """Writes rows as CSV, what they are before their figures; a row may lack columns of another."""
    # In the order of first appearance, so that the same rows give the same file.
    columns = list(dict.fromkeys(key for row in rows for key in row))
    first = [key for key in (*_RUN, "seeds") if key in columns]
    figures = [key for key in columns if key not in first]

    file = io.StringIO()
    writer = csv.DictWriter(file, [*first, *figures], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _no_formula(value) for key, value in row.items()} for row in rows)
    return file.getvalue()


def _no_formula(value: Any) -> Any:
    """Keeps a text from being taken for a formula by a spreadsheet."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@")):
        return f"'{value}"
    return value


def read_runs(path: Path) -> list[Row]:
    """Reads runs.csv.

    Raises:
      DataError: it is missing or damaged.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [_parsed(texts) for texts in csv.DictReader(file)]
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f"{path} is missing or damaged: {error}") from error


def _parsed(texts: Mapping[str, str]) -> Row:
    """Turns the figures of a row into numbers; an empty cell is None."""
    row: Row = {}
    for key, text in texts.items():
        if key in _RUN:
            row[key] = text
        elif text:
            row[key] = float(text)
        else:
            row[key] = None
    row["seed"] = int(texts["seed"])
    return row
