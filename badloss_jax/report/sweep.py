"""What a sweep leaves: runs.csv and results.csv for scripts, report.md, report.html and plots for people.

The rows are made in `sweep_rows`, the tables in `sweep_tables`, the plots in `sweep_plots`; here they become files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from badloss_jax.core.errors import DataError, UsageError
from badloss_jax.core.files import read_json, write_text
from badloss_jax.report.page import environment_of_templates
from badloss_jax.report.plots import save_png, svg_uri
from badloss_jax.report.sweep_plots import Panel, legend_of, panels_of
from badloss_jax.report.sweep_rows import (
    Row,
    add_epochs,
    csv_text,
    means_and_deviations,
    read_runs,
    rows_of,
    summarised,
)
from badloss_jax.report.sweep_tables import Table, tables
from badloss_jax.report.tables import as_markdown
from badloss_jax.sweep import Item, read_sweep, state_of

__all__ = ["Row", "Table", "read_runs", "rows_of", "summarised", "tables", "write_sweep_report"]


@dataclass(frozen=True)
class _Report:
    """What report.md and report.html show.

    Attributes:
      title: of the sweep, or "".
      progress: a sentence, how much of it is done.
      tables: all of them.
      pictures: name -> panels.
      failed: items that failed: name, and the last line of the error.
    """

    title: str
    progress: str
    tables: Sequence[Table]
    pictures: dict[str, list[Panel]]
    failed: Sequence[tuple[str, str]]


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

    # Everything is read before anything is written.
    rows = _rows(folder, done)
    failed = []
    for name, state in states.items():
        if state == "failed":
            failed.append((name, _last_line(folder / "items" / name / "error.txt")))
    report = _Report(
        title=sweep.title,
        progress=f"{len(done)} of {len(states)} runs are done, {len(failed)} failed.",
        tables=tables(rows, sweep.axis),
        pictures=panels_of(folder, done, rows, sweep.axis),
        failed=failed,
    )

    write_text(folder / "runs.csv", csv_text(rows))
    write_text(folder / "results.csv", csv_text(means_and_deviations(summarised(rows))))
    for name, panels in report.pictures.items():
        save_png(folder / f"{name}.png", [draw for _, draw in panels], legend_of(name))
    write_text(folder / "report.md", _markdown(report))
    write_text(folder / "report.html", _page(report))
    return tables(rows, sweep.axis, per_attack=False)


def _rows(folder: Path, done: Sequence[Item]) -> list[Row]:
    """Reads the results of the finished items."""
    rows = []
    for item in done:
        path = folder / "items" / item.name / "results.json"
        try:
            rows += rows_of(item, read_json(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged: {error}") from error

    # Of all rows at once: what an epoch takes one may know from another.
    add_epochs(rows)
    return rows


def _last_line(path: Path) -> str:
    """Returns the last line of a file, which of a traceback says what went wrong."""
    lines = path.read_text("utf-8", errors="replace").strip().splitlines()
    if not lines:
        return ""
    return lines[-1]


def _markdown(report: _Report) -> str:
    """Renders report.md."""
    parts = [
        f"# {report.title or 'Sweep'}",
        report.progress,
        "Mean and sample standard deviation over seeds; shares in percent.",
    ]
    for title, table in report.tables:
        parts.append(f"## {title}\n\n{as_markdown(table)}")
    for name in report.pictures:
        parts.append(f"![{name}]({name}.png)")
    if report.failed:
        parts.append("## Failed\n\n" + as_markdown([["item", "error"], *report.failed]))
    return "\n\n".join(parts) + "\n"


def _page(report: _Report) -> str:
    """Renders report.html, with the panels of all pictures one after another."""
    figures = []
    for name, panels in report.pictures.items():
        for alt, draw in panels:
            figures.append({"alt": alt, "uri": svg_uri(draw, legend_of(name))})

    template = environment_of_templates().get_template("sweep.html.jinja")
    return template.render(
        title=report.title or "sweep",
        told=report.progress,
        tables=report.tables,
        failed=report.failed,
        figures=figures,
    )
