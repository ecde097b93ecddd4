"""`badloss scan`."""

import argparse
from pathlib import Path

from badloss_jax.cli.processes import add_arguments_of_processes, joined
from badloss_jax.cli.start import set_up_jax, settings_and
from badloss_jax.core.errors import UsageError

SUMMARY = "look for poison in a training set of your own"
ABOUT = """\
Look for poison in a training set of your own. A network is trained on it, as large as --minutes allow; how each image
is learnt is compared with images that are known to be clean (the probes), and what stands out is listed. Nothing in the
data's folder is written.

  DATA    DIR with <class>/<image> or train/<class>/<image>; FILE.npz with x_train and y_train, uint8 images and integer
          labels; tfds:NAME, a folder of TensorFlow Datasets, by its path or below $TFDS_DATA_DIR
  PROBES  a text file of trusted paths, relative to DIR, one a line (of arrays: row numbers); a folder of trusted images
          <class>/<image>; or a number: so many are drawn at random, and trusted unseen. 250 are usual; fewer find less

OUT then holds report.html (look at this: the verdict, each attack, the suspects), remove.txt and keep.txt (a path a
line), scores.parquet (every image's score and attack), suspects.csv and suspects.parquet (the furthest, with their
nearest probes and a reason), left_out.txt (what could not be read) and scan.json. The same command goes on where it was
stopped; with other --config.rejection.* or --config.scoring.* it scores the same recording again.
"""
EPILOG = settings_and(
    [
        "badloss scan --data photos --probes trusted.txt --workdir OUT",
        "badloss scan --data photos --probes 250 --workdir OUT --config.rejection.alpha=0.05 --apply cleaned",
        "badloss scan --data photos --probes 250 --workdir OUT --minutes 60 --config.data.image_size=96",
        "srun badloss scan --distributed --data tfds:/shared/imagenet --probes 5000 --workdir /shared/OUT"
        " --config.data.image_size=64",
    ]
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.set_defaults(configurable=True, goes_on_from="checkpoint")
    parser.add_argument("--data", required=True, metavar="DATA", help="the training set; see above")
    parser.add_argument("--probes", required=True, metavar="PROBES", help="what is known to be clean; see above")
    parser.add_argument(
        "--workdir", required=True, type=Path, metavar="OUT", help="folder of this scan, new or its own"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=10,
        metavar="M",
        help="that it may take: the network is the largest that this machine has the time for (default 10)",
    )
    parser.add_argument(
        "--apply",
        type=Path,
        metavar="DIR2",
        help="also make a copy of the training set without what remove.txt lists (of arrays: FILE2.npz)",
    )
    add_arguments_of_processes(parser)
    parser.add_argument("--links", action="store_true", help="with --apply: links to the files in place of copies")
    parser.add_argument("--follow_links", action="store_true", help="read files that links lead to outside of DIR, too")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Scans, and applies what was found if asked to; of many processes, the first one speaks and applies.

    Args:
      arguments: of the command line, parsed.
      overrides: `--config.KEY=VALUE`, as they were given.

    Returns:
      The exit code.
    """
    from badloss_jax.core.processes import first
    from badloss_jax.core.progress import Progress
    from badloss_jax.data.cleaned import check_target, write_cleaned
    from badloss_jax.report.tables import as_text, cluster_table
    from badloss_jax.runs.scan import scan

    # What cannot be applied is refused before the scan, which takes minutes.
    if arguments.links and not arguments.apply:
        raise UsageError("--links needs --apply DIR2")
    if arguments.apply:
        check_target(arguments.data, arguments.workdir, arguments.apply)

    set_up_jax(trains=True)
    with joined(arguments):
        results = scan(
            arguments.data,
            arguments.probes,
            arguments.workdir,
            overrides,
            minutes=arguments.minutes,
            follow_links=arguments.follow_links,
            progress=Progress() if first() else None,
        )
    if not first():
        return 0

    print(f"\n{results['verdict']}\n")
    if results["attacks"]:
        print(f"{as_text(cluster_table(results))}\n")
    # After the verdict, which is there even if the copy fails.
    if arguments.apply:
        count = write_cleaned(arguments.data, arguments.workdir, arguments.apply, arguments.links, Progress())
        print(f"Cleaned: {arguments.apply} ({count:,} images)")
    print(f"Remove:  {arguments.workdir / 'remove.txt'} ({results['removed_count']:,} images)")
    print(f"Report:  {arguments.workdir / 'report.html'}")
    return 0
