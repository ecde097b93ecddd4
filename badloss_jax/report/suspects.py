"""The suspects of a scan: which images lie further out than nearly all probes, and why; as Parquet and CSV."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from badloss_jax.core.files import as_unicode, write_atomically, write_text
from badloss_jax.data.training_set import TrainingSet
from badloss_jax.report.plots import LOW_LOSS

if TYPE_CHECKING:
    import pyarrow as pa

_EARLY = "learned too early"
_LATE = "learned too late"
_UNLIKE = "unlike its class"
REASONS = (_EARLY, _LATE, _UNLIKE)
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


def reasons(losses: Float[np.ndarray, "N E"], ids: Int[np.ndarray, "M"], probe_ids: Int[np.ndarray, "P"]) -> list[str]:
    """Says of each suspect whether its mean log loss lies among the lowest or highest twentieth of the probes'.

    Args:
      losses: [N, E], in nats, at the epochs that count.
      ids: [M], of the suspects.
      probe_ids: [P].

    Returns:
      M of `REASONS`.
    """
    # Below the floor of the page's axis losses say no more.
    means = np.log(np.maximum(losses, LOW_LOSS)).mean(axis=1)
    low, high = np.quantile(means[probe_ids], [0.05, 0.95])

    reason_of = []
    for mean in means[ids]:
        if mean < low:
            reason_of.append(_EARLY)
        elif mean > high:
            reason_of.append(_LATE)
        else:
            reason_of.append(_UNLIKE)
    return reason_of


def write_suspects(folder: Path, suspects: Suspects, examples: TrainingSet) -> None:
    """Writes suspects.parquet and suspects.csv, whose nearest probes have a column each.

    Names are valid Unicode in both. In the CSV file, one that a spreadsheet would take for a formula begins with "./".

    Args:
      folder: that of the scan.
      suspects: M.
      examples: the training set, for the names of classes and probes.

    Raises:
      DataError: a file cannot be written.
    """
    import pyarrow.parquet as pq

    table = _table(suspects, examples)
    write_atomically(folder / "suspects.parquet", lambda aside: pq.write_table(table, aside))
    write_text(folder / "suspects.csv", _csv_text(table, num_nearest=suspects.nearest.shape[1]))


def _table(suspects: Suspects, examples: TrainingSet) -> "pa.Table":
    """Returns the suspects in columns, a row each."""
    import pyarrow as pa

    classes = [as_unicode(name) for name in examples.class_names]
    nearest = [[as_unicode(examples.names[probe]) for probe in row] for row in suspects.nearest.tolist()]
    seen_as: list[str | None] = [None] * len(suspects.ids)
    if suspects.seen_as is not None:
        seen_as = [classes[label] for label in suspects.seen_as.tolist()]

    columns: dict[str, Any] = {
        "path": pa.array([as_unicode(name) for name in suspects.names], pa.string()),
        "label": pa.array([classes[label] for label in suspects.labels.tolist()], pa.string()),
        "score": suspects.scores.astype(np.float64),
        "p_value": suspects.p_values.astype(np.float64),
        "nearest_probes": pa.array(nearest, pa.list_(pa.string())),
        "reason": pa.array(suspects.reasons, pa.string()),
        "first_seen_as": pa.array(seen_as, pa.string()),
        "removed": suspects.removed,
        "attack": suspects.attacks.astype(np.int32),
        "row": suspects.ids.astype(np.int64),
    }
    return pa.table(columns)


def _csv_text(table: "pa.Table", num_nearest: int) -> str:
    """Writes the table as CSV, lists spread over columns."""
    # Spreadsheets know no lists.
    titles: list[str] = []
    for name in table.column_names:
        if name == "nearest_probes":
            titles += [f"nearest_probe_{rank}" for rank in range(1, num_nearest + 1)]
        else:
            titles.append(name)

    # Names of files may hold line breaks, which are kept.
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(titles)
    for row in table.to_pylist():
        cells: list[Any] = []
        for value in row.values():
            if isinstance(value, list):
                cells += value
            else:
                cells.append(value)
        writer.writerow([_no_formula(cell) for cell in cells])
    return text.getvalue()


def _no_formula(cell: Any) -> Any:
    """Keeps a name from being taken for a formula by a spreadsheet: as a path, it stays the same file's."""
    if isinstance(cell, str) and cell.startswith(_FORMULA):
        return f"./{cell}"
    return cell
