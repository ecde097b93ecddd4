"""`badloss score`."""

import argparse
from pathlib import Path

from badloss_jax.cli.start import set_up_jax, settings_and
from badloss_jax.core.errors import UsageError

SUMMARY = "score a recording again, without training"
ABOUT = """\
Score the recorded trajectories of a `badloss run` again with other settings, without training. Results go to
OUT/rescored/<hash>/; the run's own are never touched. Only scoring.* and rejection.* can change. Of a run that was
stopped while it recorded, the epochs that are over are scored, if there are three.

With --trajectories, score trajectories of any origin and number, in memory that does not grow with them: a trajectory
store (a run's OUT/trajectories), or a .npy file of floats [N, T], taken for losses, or [N, T, width], for features.
Scores go to OUT/scores/*.parquet, thresholds to OUT/scoring.json. The same command goes on where a killed one was.
"""
EPILOG = settings_and(
    [
        "badloss score --workdir /tmp/digits --config.scoring.loss.k=5 --config.rejection.alpha=0.05",
        "badloss score --trajectories losses.npy --probes clean_ids.txt --workdir /tmp/scores",
        "badloss score --trajectories /tmp/digits/trajectories --workdir /tmp/s \"--config.scoring.kinds=('loss',)\"",
    ]
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.set_defaults(configurable=True)
    parser.add_argument(
        "--workdir",
        required=True,
        type=Path,
        metavar="OUT",
        help="folder of a run; with --trajectories, the folder to write to",
    )
    parser.add_argument("--trajectories", type=Path, metavar="STORE|FILE.npy", help="what to score")
    parser.add_argument(
        "--probes",
        type=Path,
        metavar="FILE",
        help="ids of the probes (.txt, .npy), or their own trajectories (.npy); by default those that the store marks",
    )
    parser.add_argument(
        "--exclude_non_finite",
        action="store_true",
        help="leave out and count trajectories with NaN or infinity, in place of an error",
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Scores the recording of a run, or trajectories of any origin.

    Args:
      arguments: of the command line, parsed.
      overrides: `--config.KEY=VALUE`, as they were given.

    Returns:
      The exit code.
    """
    # Two jobs behind one name: what is scored decides which.
    if arguments.trajectories:
        return _score_stored(arguments, overrides)
    if arguments.probes or arguments.exclude_non_finite:
        raise UsageError("--probes and --exclude_non_finite need --trajectories")

    from badloss_jax.config import override
    from badloss_jax.report.tables import as_text, detection_table, recorded_part, removal_table
    from badloss_jax.runs.rescore import rescore

    folder, results = rescore(arguments.workdir, lambda config: override(config, overrides))
    for key, change in results["changed"].items():
        print(f"{key}: {change}")
    if recorded_part(results):
        print(recorded_part(results))
    print(f"\n{as_text(detection_table(results))}\n\n{as_text(removal_table(results))}\n")
    print(f"Report: {folder / 'report.html'}")
    return 0


def _score_stored(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from badloss_jax.core.mesh import make_mesh
    from badloss_jax.core.progress import Progress
    from badloss_jax.report.tables import as_text, threshold_table
    from badloss_jax.runs.score_stored import score_stored

    arguments.goes_on_from = "part"  # for who interrupts it
    set_up_jax()
    results = score_stored(
        arguments.trajectories,
        arguments.probes,
        arguments.workdir,
        overrides,
        Progress(),
        make_mesh(),
        exclude_non_finite=arguments.exclude_non_finite,
    )
    print(f"\n{as_text(threshold_table(results))}\n")
    print(f"Scores: {arguments.workdir / 'scores'}")
    return 0
