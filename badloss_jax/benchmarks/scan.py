"""`badloss bench scan`: what a scan finds in a poisoned folder of images."""

import shlex
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from badloss_jax.benchmarks.options import names_of
from badloss_jax.core.errors import UsageError

ABOUT = """\
Write the training set of a config as a folder of PNG files, poisoned by its attacks, give `badloss scan` the folder and
a list of clean probes, and compare what it lists with the truth. --config.attacks.scale=0 poisons nothing. The same
command goes on after the last scan that is in FILE.json.

--regimes changes who attacks, and what the scan has to go by. The attackers, and how much each poisons, are the
config's where nothing else is said, without those whose trigger has to be optimised first:

  distinct, drawn, shared      a target each; targets drawn with replacement; three of the attackers on one class
  held-out                     a warp, a ramp, a lattice and inverted pixels: nothing was settled on them
  few, one, many               one attacker: 0.3, 1 and 6 % of all images
  quarter                      one attacker: a quarter of its class, in a set of 2,000 to 5,000 images
  all-to-all                   one attacker moves label y to y + 1: 6 % of all images
  imbalanced                   the smallest class is a tenth of the largest
  probes-50, -100, -1000       so many clean images are known; after distinct, its recording is scored again
  clean                        nobody attacks 1,000 to all images
"""

EXAMPLES = """\
examples:
  badloss bench scan --config configs/fashion_mnist.py:quick --out OUT.json
  badloss bench scan --config configs/digits.py --seeds 0 --scan "--config.recording.epochs=15"
  badloss bench scan --config configs/cifar10.py:quick --config.data.dir=DIR --regimes drawn,held-out --out OUT.json
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the benchmark's own options."""
    parser.set_defaults(configurable=True)
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="of the data set and the attacks")
    parser.add_argument("--seeds", default="0,1,2", metavar="S,S", help="each in turn (default 0,1,2)")
    parser.add_argument(
        "--regimes", default="", metavar="A,B", help="each in turn, or all (default: the config as it is)"
    )
    parser.add_argument("--scan", default="", metavar="'ARGS'", help="more arguments of `badloss scan`")


def measure(arguments: Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures what is found in every regime, with every seed.

    Args:
      arguments: those of `add_arguments`.
      overrides: changed settings of the data set and the attacks.

    Yields:
      What `measure_scan` yields.

    Raises:
      UsageError: a wrong setting, an unknown regime, or an attack that has to be optimised first.
      DataError: a scan failed.
    """
    yield from resume(arguments, overrides, ())


def resume(
    arguments: Namespace,
    overrides: Sequence[str],
    kept: Sequence[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Goes on after the last scan that was kept.

    Args:
      arguments: those of `add_arguments`.
      overrides: changed settings of the data set and the attacks.
      kept: figures that the same command has left.

    Yields:
      What `measure_scan` yields.

    Raises:
      UsageError: a wrong setting, an unknown regime, or an attack that has to be optimised first.
      DataError: a scan failed.
    """
    from badloss_jax.benchmarks.gauntlet import REGIMES
    from badloss_jax.benchmarks.scan_findings import measure_scan
    from badloss_jax.config import load_config

    config = load_config(arguments.config, overrides)
    regimes = list(REGIMES)
    if arguments.regimes != "all":
        regimes = names_of("regimes", arguments.regimes, tuple(REGIMES))
    try:
        seeds = [int(seed) for seed in arguments.seeds.split(",")]
    except ValueError as error:
        raise UsageError(f"--seeds {arguments.seeds!r}: expected numbers, such as 0,1,2") from error

    with tempfile.TemporaryDirectory(prefix="badloss-bench-") as folder:
        yield from measure_scan(config, seeds, regimes, shlex.split(arguments.scan), Path(folder), kept)


def table(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows, one a regime: means over its seeds, and the range of what was found.

    "Found" is what the scan removes of the poison; the TPR are of its ranking. "Counted" are attacks, certain ones of
    all; "missed" and "added" classes that were attacked and not called so, and the other way round, of all seeds; "in
    interval" says of how many seeds the scan's interval holds the poisoned share.
    """
    # Shares of the clean images at which the ranking was read off; clean sets have none.
    lost = list(next((figure["found_at"] for figure in figures if figure["attacks"]), {}))
    rates = [f"TPR at {100 * float(share):g} %" for share in lost]
    head = ["regime", "seeds", "poisoned", "found", "clean removed", *rates]
    rows = [[*head, "counted", "missed", "added", "in interval", "minutes"]]

    for regime in dict.fromkeys(figure["regime"] for figure in figures):
        of_regime = [figure for figure in figures if figure["regime"] == regime]
        rows.append([regime or "config", *_regime_cells(of_regime, lost)])
    return rows


def _regime_cells(figures: Sequence[Mapping[str, Any]], lost: Sequence[str]) -> list[str]:
    """Returns the cells of one regime, whose figures are of one seed each."""
    poisoned = [figure for figure in figures if figure["attacks"]]

    certain = sum(figure["certain_attacks"] for figure in figures)
    attacks = sum(figure["attacks"] for figure in figures)
    missed = sum(len(figure["missed_classes"]) for figure in figures)
    added = sum(len(figure["added_classes"]) for figure in figures)
    in_interval = sum(
        figure["estimate"]["low"] <= figure["poisoned_share"] <= figure["estimate"]["high"] for figure in figures
    )
    seconds = statistics.fmean(figure["seconds"] for figure in figures)

    return [
        str(len(figures)),
        _mean(figure["poisoned_share"] for figure in figures),
        _mean_and_range([figure["found_share"] for figure in poisoned]),
        _mean((figure["clean_removed_share"] for figure in figures), digits=2),
        *(_mean(figure["found_at"][share] for figure in poisoned) for share in lost),
        f"{certain} of {attacks}",
        str(missed),
        str(added),
        f"{in_interval} of {len(figures)}",
        f"{seconds / 60:.0f}",
    ]


def _mean(shares: Iterable[float], digits: int = 1) -> str:
    values = list(shares)
    if not values:
        return ""
    return f"{100 * statistics.fmean(values):.{digits}f} %"


def _mean_and_range(shares: Sequence[float]) -> str:
    if len(shares) < 2:
        return _mean(shares)
    return f"{_mean(shares)} ({100 * min(shares):.0f} to {100 * max(shares):.0f})"
