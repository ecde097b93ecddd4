"""`badloss run`."""

import argparse
from pathlib import Path

from badloss_jax.cli.processes import add_arguments_of_processes, joined
from badloss_jax.cli.start import set_up_jax, settings_and

SUMMARY = "run a whole experiment"
ABOUT = """\
Run a whole experiment: poison a training set with several attacks at once, record how a network learns each example,
score the examples against a few known-clean probes, remove what stands out, retrain, and measure clean accuracy and
attack success before and after.

The same command in the same folder goes on from the last checkpoint. OUT then holds report.html (look at this),
report.md, results.json and scores.parquet (for scripts), trajectories.png, roc.png, metrics.jsonl, manifest.json (the
poison), trajectories/ (for `badloss score`) and models/ (orbax: undefended, loss-fraction, ...).
"""
EPILOG = settings_and(
    [
        "badloss run --config configs/digits.py --workdir /tmp/digits --config.seed=1",
        "badloss run --config configs/cifar10.py:quick --config.data.dir=DIR --workdir /tmp/cifar10",
        "badloss run --config configs/digits.py --workdir /tmp/patch \"--config.attacks.names=('patch',)\"",
        "srun badloss run --distributed --config configs/imagenet.py --workdir /shared/imagenet",
    ]
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.set_defaults(configurable=True, goes_on_from="checkpoint")
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="config file, and its variant if any")
    parser.add_argument("--workdir", required=True, type=Path, metavar="OUT", help="folder of this run, new or its own")
    add_arguments_of_processes(parser)


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs an experiment; of many processes, the first one prints its tables.

    Args:
      arguments: of the command line, parsed.
      overrides: `--config.KEY=VALUE`, as they were given.

    Returns:
      The exit code.
    """
    from badloss_jax.config import load_config
    from badloss_jax.core.processes import first
    from badloss_jax.core.progress import Progress
    from badloss_jax.report.tables import as_text, detection_table, short_table
    from badloss_jax.runs.experiment import run_experiment

    # Wrong settings are refused before JAX starts.
    config = load_config(arguments.config, overrides)
    set_up_jax(trains=True)
    with joined(arguments):
        results = run_experiment(config, arguments.workdir, Progress() if first() else None)
    # One process speaks for all.
    if not first():
        return 0

    print()
    if "undefended" in results:
        print(f"{as_text(short_table(results))}\n")
    if not any("retrained" in variant for variant in results["variants"].values()):
        print(f"{as_text(detection_table(results))}\n")
    print(f"Report: {arguments.workdir / 'report.html'}")
    return 0
