"""`badloss sweep`."""

import argparse
import sys
from pathlib import Path

from badloss_jax.cli.report import report_sweep
from badloss_jax.cli.start import integers, set_up_jax, settings_and, words

SUMMARY = "compare defences or settings over attacks and seeds"
ABOUT = """\
Run a product of attacks, defences, settings and seeds, as a sweep file lists it, item by item. What items have in
common, such as the attacked network or the recorded trajectories, is made once, and kept in DIR/shared.

The same command goes on where it was stopped: what is done is skipped. An item that fails does not stop the others; it
is listed at the end, with exit code 1, and tried again the next time. Several processes can work on one DIR at a time
(start the command twice, or one item a task of a Slurm array: launch/slurm/sweep.sbatch); each item is taken by one.

At the end DIR holds report.html (look at this), report.md, results.csv; `badloss report --sweep DIR` makes them anew,
also of a sweep that is not done.
"""
EPILOG = settings_and(
    [
        "badloss sweep --config configs/sweeps/paper_table.py:digits --attacks all --seeds 0,1 --workdir /tmp/table",
        "badloss sweep --config configs/sweeps/k.py --workdir /tmp/k --config.data.train_examples=5000",
        "badloss sweep --config configs/sweeps/k.py --workdir /tmp/k --list",
    ]
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.set_defaults(configurable=True, goes_on_from="checkpoint")
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:BASE]",
        help="sweep file, and the config that it is about: digits, cifar10, gtsrb; by default Fashion-MNIST",
    )
    parser.add_argument(
        "--workdir", required=True, type=Path, metavar="DIR", help="folder of the sweep, new or its own"
    )
    parser.add_argument("--seeds", type=integers, default=(), metavar="S,S", help="in place of the file's")
    parser.add_argument("--attacks", type=words, default=(), metavar="A,A", help="only these of the file's attacks")
    parser.add_argument("--defenses", type=words, default=(), metavar="D,D", help="only these of the file's defences")
    parser.add_argument(
        "--shared",
        type=Path,
        metavar="DIR",
        help="folder of what items have in common, for several sweeps (default: DIR/shared)",
    )
    parser.add_argument("--item", type=integers, metavar="I,I", help="run these items alone, by their numbers")
    parser.add_argument("--list", action="store_true", help="print number, state and title of each item, and run none")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs what is not done of a sweep, or lists its items.

    Args:
      arguments: of the command line, parsed.
      overrides: `--config.KEY=VALUE`, as they were given.

    Returns:
      The exit code.
    """
    from badloss_jax.sweep import load_sweep, state_of

    sweep = load_sweep(arguments.config, overrides, arguments.seeds, arguments.attacks, arguments.defenses)
    if arguments.list:
        for number, item in enumerate(sweep.items):
            print(f"{number:4}  {state_of(arguments.workdir, item):6}  {item.title}")
        return 0

    from badloss_jax.core.progress import Progress
    from badloss_jax.runs.sweep import run_sweep

    set_up_jax(trains=True)
    failed = run_sweep(sweep, arguments.workdir, arguments.item, Progress(), shared=arguments.shared)
    # Of an array of tasks, each with its items, none is the last.
    if arguments.item is None:
        report_sweep(arguments.workdir)
    for name, error in failed.items():
        print(f"badloss: failed: items/{name}: {error}", file=sys.stderr)
    return 1 if failed else 0
