"""The tables of a sweep: its defences compared, the figures of each attack, and one defence against several attacks."""

import statistics
from collections.abc import Sequence

from badloss_jax.report.sweep_rows import Row, rows_by, summarised
from badloss_jax.report.tables import mean_and_deviation

Table = tuple[str, list[list[str]]]  # title; header and rows

TITLES = {
    "removed": "removed",
    "clean_lost": "clean lost",
    "clean_accuracy": "CA",
    "mean_asr": "mean ASR",
    "mean_ra": "mean RA",
    "der": "DER",
    "auroc": "AUROC",
    "average_precision": "avg. precision",
    "tpr_at_1_fpr": "TPR at 1 % FPR",
    "mean_recall": "recall",
    "seconds": "seconds",
    "epochs": "epochs",
}
SHARES = ("removed", "clean_lost", "clean_accuracy", "mean_asr", "mean_ra", "mean_recall", "der")  # in percent
_SHARES_OF_ATTACKS = ("asr", "ra", "recall")
_COSTS = ("seconds", "epochs")
_QUALITIES = (
    "removed",
    "clean_lost",
    "mean_recall",
    "auroc",
    "tpr_at_1_fpr",
    "clean_accuracy",
    "mean_asr",
    "mean_ra",
    "der",
)
_PER_ATTACK = (  # title, figures in the mean, prefix of those of each attack
    ("Attack success rate", ("clean_accuracy", "mean_asr"), "asr"),
    ("Robust accuracy", ("clean_accuracy", "mean_ra"), "ra"),
    ("Recall", ("clean_lost", "mean_recall"), "recall"),
    ("AUROC", ("auroc", "average_precision"), "auroc"),
)
_ACROSS_ATTACKS = ("mean_asr", "clean_accuracy", "auroc", "clean_lost")


def tables(rows: Sequence[Row], axis: str = "", *, per_attack: bool = True) -> list[Table]:
    """Returns every table, for each group of attacks, as title, and header and rows.

    Mean and sample standard deviation over seeds; per attack the mean alone.

    Args:
      rows: of `rows_of`, or of runs.csv.
      axis: what the sweep's settings vary, or "".
      per_attack: whether the tables with a column an attack are there, too.

    Returns:
      The tables: of each group of attacks the comparison, then those per attack; at last those across attacks.
    """
    groups = summarised(rows)
    by_attacks = rows_by(groups, "attacks")

    titled: list[Table] = []
    for attacks, chosen in by_attacks.items():
        titled += _tables_of(attacks, chosen, axis, per_attack)

    # On an axis a defence has several figures against the same attacks, and no one cell for them.
    if len(by_attacks) > 1 and not axis:
        for key in _ACROSS_ATTACKS:
            table = _across_attacks(groups, list(by_attacks), key)
            if len(table) > 1:
                titled.append((f"{TITLES[key]}, by the attacks on the training set", table))
    return titled


def _tables_of(attacks: str, groups: Sequence[Row], axis: str, per_attack: bool) -> list[Table]:
    """Returns the tables of one group of attacks."""
    subject = f"attacks: {attacks}"
    compared = [*_QUALITIES, *_COSTS]
    if axis:
        subject = f"{subject}, by {axis}"
        compared = [*_QUALITIES]  # what a setting costs was mostly paid by another

    titled: list[Table] = [(f"Comparison; {subject}", _table(groups, compared, "", axis))]
    if not per_attack:
        return titled

    for title, keys, prefix in _PER_ATTACK:
        # A defence without any of these figures has no row here.
        measured = [group for group in groups if any(key.startswith(f"{prefix}:") for key in group)]
        table = _table(measured, keys, prefix, axis)
        if len(table) > 1:
            titled.append((f"{title}, per attack; {subject}", table))
    return titled


def _table(groups: Sequence[Row], keys: Sequence[str], prefix: str, axis: str) -> list[list[str]]:
    """Returns header and rows; columns without any figure are left out, and so are those of a single attack."""
    columns = [key for key in keys if any(key in group for group in groups)]
    if prefix:
        attacks = dict.fromkeys(key for group in groups for key in group if key.startswith(f"{prefix}:"))
        # Of a single attack the mean says the same.
        if len(attacks) > 1:
            columns += attacks

    header = ["defence"]
    if axis:
        header.append(axis)
    header.append("seeds")
    header += [TITLES.get(key, key.partition(":")[2]) for key in columns]

    table = [header]
    for group in groups:
        row = [group["defense"]]
        if axis:
            row.append(group["setting"])
        row.append(str(len(group["seeds"])))
        row += [_cell(key, group.get(key), spread=":" not in key) for key in columns]
        table.append(row)
    return table


def _across_attacks(groups: Sequence[Row], attacks: Sequence[str], key: str) -> list[list[str]]:
    """Returns header and rows of one figure: a row a defence, a column a group of attacks."""
    by_defense: dict[str, dict[str, Row]] = {}
    for group in groups:
        if key in group:
            by_defense.setdefault(group["defense"], {})[group["attacks"]] = group

    table = [["defence", *attacks]]
    for name, group_against in by_defense.items():
        figures = [group_against.get(label, {}).get(key) for label in attacks]
        table.append([name, *(_cell(key, values) for values in figures)])
    return table


def _cell(key: str, values: Sequence[float] | None, spread: bool = True) -> str:
    """Writes mean and sample standard deviation: shares in percent, seconds and epochs as they are."""
    if not values:
        return ""

    figure = key.partition(":")[0]
    factor = 1
    digits = 3
    if figure in (*SHARES, *_SHARES_OF_ATTACKS):
        factor = 100
        digits = 1
    elif figure in _COSTS:
        digits = 1

    if spread:
        return mean_and_deviation(values, digits, factor)
    return f"{factor * statistics.fmean(values):.{digits}f}"
