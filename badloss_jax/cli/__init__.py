"""The command `badloss`."""

import argparse
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from badloss_jax.cli.bench import add_bench
from badloss_jax.core import __version__
from badloss_jax.core.errors import BadlossError, PreemptedError, UsageError

_ABOUT = """\
Finds poisoned training examples by how a network learns them (BaDLoss, ICLR 2025), in JAX.

  badloss scan --data DIR --probes FILE --workdir OUT     look for poison in a training set of your own
  badloss run --config configs/digits.py --workdir OUT    poison, record, score, remove, retrain, report
  badloss score --workdir OUT --config.scoring.loss.k=5   score the same recording again, without training
  badloss score --trajectories FILE.npy ...               score any number of trajectories of your own
  badloss summary OUT0 OUT1 OUT2                          mean and spread over the runs of several seeds
  badloss sweep --config configs/sweeps/k.py --workdir D  compare defences, or settings, over attacks and seeds
  badloss report --workdir OUT                            render the report again, from the files of the run
  badloss attacks --config configs/digits.py --out A.png  show every attack's trigger as a picture
  badloss prepare imagenet2012 --from TARS --to DIR       write a large data set once, for data.source=tfds
  badloss bench train                                     measure speed, and what recording costs, on this machine
"""

_SCAN = """\
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

_RUN = """\
Run a whole experiment: poison a training set with several attacks at once, record how a network learns each example,
score the examples against a few known-clean probes, remove what stands out, retrain, and measure clean accuracy and
attack success before and after.

The same command in the same folder goes on from the last checkpoint. OUT then holds report.html (look at this),
report.md, results.json and scores.parquet (for scripts), trajectories.png, roc.png, metrics.jsonl, manifest.json (the
poison), trajectories/ (for `badloss score`) and models/ (orbax: undefended, loss-fraction, ...).
"""

_SCORE = """\
Score the recorded trajectories of a finished `badloss run` again with other settings, without training. Results go to
OUT/rescored/<hash>/; the run's own are never touched. Only scoring.* and rejection.* can change.

With --trajectories, score trajectories of any origin and number, in memory that does not grow with them: a trajectory
store (a run's OUT/trajectories), or a .npy file of floats [N, T], taken for losses, or [N, T, width], for features.
Scores go to OUT/scores/*.parquet, thresholds to OUT/scoring.json. The same command goes on where a killed one was.
"""

_SUMMARY = """\
Print a Markdown table over finished runs that differ in their seed alone: of each trained model the mean, and the
standard deviation of the sample, in percent (AUROC: 0 to 1).
"""

_REPORT = """\
Render report.html, report.md and the plots again from the files of a finished run, or of one of its rescorings
(OUT/rescored/HASH). Nothing is trained or scored, and the data set is not needed.

With --sweep, tabulate and plot what is done of a sweep: DIR/report.html (look at this), report.md, results.csv, *.png.
"""

_SWEEP = """\
Run a product of attacks, defences, settings and seeds, as a sweep file lists it, item by item. What items have in
common, such as the attacked network or the recorded trajectories, is made once, and kept in DIR/shared.

The same command goes on where it was stopped: what is done is skipped. An item that fails does not stop the others; it
is listed at the end, with exit code 1, and tried again the next time. Several processes can work on one DIR at a time
(start the command twice, or one item a task of a Slurm array: launch/slurm/sweep.sbatch); each item is taken by one.

At the end DIR holds report.html (look at this), report.md, results.csv; `badloss report --sweep DIR` makes them anew,
also of a sweep that is not done.
"""

_ATTACKS = """\
Draw a grid of every attack's trigger on images of the data set: image, triggered image, difference times ten. narcissus
trains its surrogate for it, unless --config.attacks.manifest names a manifest that has the perturbation.
"""

_PREPARE = """\
Write a data set once in the format of TensorFlow Datasets, from the official archives in the folder FILES or from a
folder of images {train,val}/<class>/* (or with test). `--config.data.source=tfds --config.data.dir=DIR` then reads it,
image by image and without TensorFlow.

  NAME           FILES
  imagenet2012   ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz
  imagenette     imagenette2.tgz, imagenette2-320.tgz or imagenette2-160.tgz
  cifar10        cifar-10-binary.tar.gz
  image_folder   any folder of images

The same command goes on with the first shard that a killed one had not finished. On a finished folder it checks every
checksum, and writes again what is missing or damaged.
"""

_OVERRIDES = """\
settings:
  --config.GROUP.KEY=VALUE changes one setting, repeatedly; `badloss_jax/settings.py` lists all with their meaning.
  An unknown key or an impossible value is refused, with the nearest valid one, before any work starts.

examples:
{examples}

exit codes: 0 done, 1 failed, 2 wrong usage, 75 stopped by SIGTERM with all saved (run it again), 130 interrupted
"""

_PREPARE_EXAMPLES = """\
examples:
  badloss prepare imagenet2012 --from TARS --to /data/imagenet
  badloss prepare imagenette --from . --to /data/imagenette-224 --size 224
  badloss run --config configs/imagenet.py --config.data.dir=/data/imagenet --workdir OUT

exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "badloss", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"badloss_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    scan = _command(commands, "scan", "look for poison in a training set of your own", _SCAN, [
        "badloss scan --data photos --probes trusted.txt --workdir OUT",
        "badloss scan --data photos --probes 250 --workdir OUT --config.rejection.alpha=0.05 --apply cleaned",
        "badloss scan --data photos --probes 250 --workdir OUT --minutes 60 --config.data.image_size=96",
    ])  # fmt: skip
    scan.add_argument("--data", required=True, metavar="DATA", help="the training set; see above")
    scan.add_argument("--probes", required=True, metavar="PROBES", help="what is known to be clean; see above")
    scan.add_argument("--workdir", required=True, type=Path, metavar="OUT", help="folder of this scan, new or its own")
    scan.add_argument("--minutes", type=float, default=10, metavar="M", help="that it may take: the network is the"
                      " largest that this machine has the time for (default 10)")  # fmt: skip
    scan.add_argument("--apply", type=Path, metavar="DIR2", help="also make a copy of the training set without what"
                      " remove.txt lists (of arrays: FILE2.npz)")  # fmt: skip
    scan.add_argument("--links", action="store_true", help="with --apply: links to the files in place of copies")
    scan.add_argument("--follow_links", action="store_true", help="read files that links lead to outside of DIR, too")
    run = _command(commands, "run", "run a whole experiment", _RUN, [
        "badloss run --config configs/digits.py --workdir /tmp/digits --config.seed=1",
        "badloss run --config configs/cifar10.py:quick --config.data.dir=DIR --workdir /tmp/cifar10",
        "badloss run --config configs/digits.py --workdir /tmp/patch \"--config.attacks.names=('patch',)\"",
        "srun badloss run --distributed --config configs/imagenet.py --workdir /shared/imagenet",
    ])  # fmt: skip
    run.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="config file, and its variant if any")
    run.add_argument("--workdir", required=True, type=Path, metavar="OUT", help="folder of this run, new or its own")
    run.add_argument("--distributed", action="store_true", help="as one of many processes that share the work and OUT;"
                     " Slurm, Open MPI, GKE and Cloud TPUs say the rest, elsewhere give the three below")  # fmt: skip
    run.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 runs, and a free port of it")
    run.add_argument("--num_processes", type=int, metavar="N", help="how many there are")
    run.add_argument("--process_id", type=int, metavar="I", help="which of them this is, from 0")
    run.add_argument("--timeout", type=int, default=300, metavar="SECONDS", help="to wait for the others (default 300)")
    score = _command(commands, "score", "score a recording again, without training", _SCORE, [
        "badloss score --workdir /tmp/digits --config.scoring.loss.k=5 --config.rejection.alpha=0.05",
        "badloss score --trajectories losses.npy --probes clean_ids.txt --workdir /tmp/scores",
        "badloss score --trajectories /tmp/digits/trajectories --workdir /tmp/s \"--config.scoring.kinds=('loss',)\"",
    ])  # fmt: skip
    score.add_argument("--workdir", required=True, type=Path, metavar="OUT",
                       help="folder of a finished run; with --trajectories, the folder to write to")  # fmt: skip
    score.add_argument("--trajectories", type=Path, metavar="STORE|FILE.npy", help="what to score")
    score.add_argument("--probes", type=Path, metavar="FILE", help="ids of the probes (.txt, .npy), or their own"
                       " trajectories (.npy); by default those that the store marks")  # fmt: skip
    score.add_argument("--exclude_non_finite", action="store_true", help="leave out and count trajectories with NaN or"
                       " infinity, in place of an error")  # fmt: skip

    report = commands.add_parser("report", help="render the report of a run again", description=_REPORT,
                                 formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)  # fmt: skip
    what = report.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", type=Path, metavar="OUT", help="folder of a finished run")
    what.add_argument("--sweep", type=Path, metavar="DIR", help="folder of a sweep, done or not")

    sweep = _command(commands, "sweep", "compare defences or settings over attacks and seeds", _SWEEP, [
        "badloss sweep --config configs/sweeps/paper_table.py:digits --attacks all --seeds 0,1 --workdir /tmp/table",
        "badloss sweep --config configs/sweeps/k.py --workdir /tmp/k --config.data.train_examples=5000",
        "badloss sweep --config configs/sweeps/k.py --workdir /tmp/k --list",
    ])  # fmt: skip
    sweep.add_argument("--config", required=True, metavar="FILE[:BASE]",
                       help="sweep file, and the config that it is about: digits, cifar10, gtsrb; by default"
                       " Fashion-MNIST")  # fmt: skip
    sweep.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="folder of the sweep, new or its own")
    sweep.add_argument("--seeds", type=_integers, default=(), metavar="S,S", help="in place of the file's")
    sweep.add_argument("--attacks", type=_words, default=(), metavar="A,A", help="only these of the file's attacks")
    sweep.add_argument("--defenses", type=_words, default=(), metavar="D,D", help="only these of the file's defences")
    sweep.add_argument("--shared", type=Path, metavar="DIR", help="folder of what items have in common, for several"
                       " sweeps (default: DIR/shared)")  # fmt: skip
    sweep.add_argument("--item", type=_integers, metavar="I,I", help="run these items alone, by their numbers")
    sweep.add_argument("--list", action="store_true", help="print number, state and title of each item, and run none")

    attacks = _command(commands, "attacks", "show every attack's trigger", _ATTACKS, [
        "badloss attacks --config configs/digits.py --out /tmp/attacks.png",
    ])  # fmt: skip
    attacks.add_argument(
        "--config", required=True, metavar="FILE[:VARIANT]", help="config file, and its variant if any"
    )
    attacks.add_argument("--out", required=True, type=Path, metavar="FILE.png", help="the picture")

    summary = commands.add_parser("summary", help="mean and spread over several seeds", description=_SUMMARY,
                                  formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)  # fmt: skip
    summary.add_argument(
        "runs", nargs="+", type=Path, metavar="OUT", help="folders of finished runs, or copies of their results.json"
    )

    prepare = commands.add_parser("prepare", help="write a large data set once, for data.source=tfds",
                                  description=_PREPARE, epilog=_PREPARE_EXAMPLES, allow_abbrev=False,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    prepare.add_argument("name", metavar="NAME", help="of the data set")
    prepare.add_argument("--from", required=True, type=Path, metavar="FILES", dest="source", help="folder to read")
    prepare.add_argument("--to", required=True, type=Path, metavar="DIR", help="folder to write, empty or new")
    prepare.add_argument("--size", type=int, default=0, metavar="PIXELS",
                         help="store pixels, resized to so many a side: larger, and far faster to read")  # fmt: skip

    add_bench(commands)

    arguments, overrides = parser.parse_known_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    configurable = arguments.command in ("run", "scan", "score", "attacks", "sweep") or "configurable" in arguments
    strangers = [text for text in overrides if not (configurable and text.startswith("--config."))]
    if strangers:
        commands.choices[arguments.command].error(
            f"unknown argument {strangers[0]!r}; settings are written --config.GROUP.KEY=VALUE"
        )
    return _guarded(arguments, overrides)


def _guarded(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Does the work; turns what went wrong into one screen and an exit code."""
    warnings.showwarning = lambda message, *_, **__: print(f"badloss: warning: {message}", file=sys.stderr)
    try:
        work = {"run": _run, "scan": _scan, "score": _score, "summary": _summary, "report": _report,
                "attacks": _attacks, "prepare": _prepare, "bench": _bench, "sweep": _sweep}  # fmt: skip
        return work[arguments.command](arguments, overrides)
    except BadlossError as error:
        return _explain(error)
    except OSError as error:
        print(f"badloss: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        places = {"run": "checkpoint", "scan": "checkpoint", "sweep": "checkpoint", "prepare": "shard"}
        if getattr(arguments, "trajectories", None):
            places["score"] = "part"
        place = places.get(arguments.command)
        told = f"; the same command goes on from the last {place}" if place else ""
        print(f"badloss: interrupted{told}", file=sys.stderr)
        return 130


def _explain(error: BadlossError) -> int:
    """Says what happened; returns the exit code."""
    kind = "" if isinstance(error, PreemptedError) else "error: "
    print(f"badloss: {kind}{error}", file=sys.stderr)
    return error.exit_code


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from badloss_jax.config import load_config
    from badloss_jax.core.processes import first
    from badloss_jax.core.progress import Progress
    from badloss_jax.report.tables import as_text, detection_table, short_table
    from badloss_jax.runs.experiment import run_experiment

    config = load_config(arguments.config, overrides)
    _set_up_jax()
    with _joined(arguments):
        results = run_experiment(config, arguments.workdir, Progress() if first() else None)
    if not first():
        return 0
    trained = "undefended" in results
    if trained:
        print(f"\n{as_text(short_table(results))}\n")
    if not any("retrained" in variant for variant in results["variants"].values()):
        print(("" if trained else "\n") + f"{as_text(detection_table(results))}\n")
    print(f"Report: {arguments.workdir / 'report.html'}")
    return 0


def _scan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from badloss_jax.core.progress import Progress
    from badloss_jax.data.cleaned import check_target, write_cleaned
    from badloss_jax.report.tables import as_text, cluster_table
    from badloss_jax.runs.scan import scan

    if arguments.links and not arguments.apply:
        raise UsageError("--links needs --apply DIR2")
    if arguments.apply:
        check_target(arguments.data, arguments.workdir, arguments.apply)
    _set_up_jax()
    results = scan(arguments.data, arguments.probes, arguments.workdir, overrides, minutes=arguments.minutes,
                   follow_links=arguments.follow_links, progress=Progress())  # fmt: skip
    print(f"\n{results['verdict']}\n")
    if results["attacks"]:
        print(f"{as_text(cluster_table(results))}\n")
    if arguments.apply:
        count = write_cleaned(arguments.data, arguments.workdir, arguments.apply, arguments.links, Progress())
        print(f"Cleaned: {arguments.apply} ({count:,} images)")
    print(f"Remove:  {arguments.workdir / 'remove.txt'} ({results['removed_count']:,} images)")
    print(f"Report:  {arguments.workdir / 'report.html'}")
    return 0


@contextmanager
def _joined(arguments: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes, if there are to be any, and leaves them to themselves if this one fails alone."""
    from badloss_jax.core.processes import connect, leave

    told = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if not arguments.distributed:
        if any(value is not None for value in told):
            raise UsageError("--coordinator, --num_processes and --process_id need --distributed")
        yield
        return
    connect(*told, arguments.timeout)
    try:
        yield
    except BadlossError as error:
        leave(error, _explain(error))
    except Exception:
        traceback.print_exc()
        leave(None, 1)


def _score(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.trajectories:
        return _score_stored(arguments, overrides)
    if arguments.probes or arguments.exclude_non_finite:
        raise UsageError("--probes and --exclude_non_finite need --trajectories")
    from badloss_jax.config import override
    from badloss_jax.report.tables import as_text, detection_table, removal_table
    from badloss_jax.runs.experiment import rescore

    folder, results = rescore(arguments.workdir, lambda config: override(config, overrides))
    for key, change in results["changed"].items():
        print(f"{key}: {change}")
    print(f"\n{as_text(detection_table(results))}\n\n{as_text(removal_table(results))}\n")
    print(f"Report: {folder / 'report.html'}")
    return 0


def _score_stored(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from badloss_jax.core.mesh import make_mesh
    from badloss_jax.core.progress import Progress
    from badloss_jax.report.tables import as_text, threshold_table
    from badloss_jax.runs.score_stored import score_stored

    _set_up_jax()
    results = score_stored(arguments.trajectories, arguments.probes, arguments.workdir, overrides, Progress(),
                           make_mesh(), exclude_non_finite=arguments.exclude_non_finite)  # fmt: skip
    print(f"\n{as_text(threshold_table(results))}\n")
    print(f"Scores: {arguments.workdir / 'scores'}")
    return 0


def _summary(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from badloss_jax.report.results import read_results
    from badloss_jax.report.tables import as_markdown, summary

    files = [run if run.suffix == ".json" else run / "results.json" for run in arguments.runs]
    print(as_markdown(summary([read_results(file) for file in files])))
    return 0


def _sweep(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from badloss_jax.core.progress import Progress
    from badloss_jax.runs.sweep import run_sweep
    from badloss_jax.sweep import load_sweep, state_of

    sweep = load_sweep(arguments.config, overrides, arguments.seeds, arguments.attacks, arguments.defenses)
    if arguments.list:
        for number, item in enumerate(sweep.items):
            print(f"{number:4}  {state_of(arguments.workdir, item):6}  {item.title}")
        return 0
    _set_up_jax()
    failed = run_sweep(sweep, arguments.workdir, arguments.item, Progress(), shared=arguments.shared)
    if arguments.item is None:
        _report_sweep(arguments.workdir)
    for name, error in failed.items():
        print(f"badloss: failed: items/{name}: {error}", file=sys.stderr)
    return 1 if failed else 0


def _report_sweep(folder: Path) -> None:
    from badloss_jax.report.sweep import write_sweep_report
    from badloss_jax.report.tables import as_text

    for title, table in write_sweep_report(folder):
        print(f"\n{title}\n\n{as_text(table)}")
    print(f"\nReport: {folder / 'report.html'}")


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _report(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.sweep:
        _report_sweep(arguments.sweep)
        return 0
    from badloss_jax.core.files import locked
    from badloss_jax.report.page import write_reports

    if not (arguments.workdir / "results.json").is_file():
        raise UsageError(f"--workdir {arguments.workdir} holds no finished run (no results.json in it)")
    with locked(arguments.workdir):
        print(f"Report: {write_reports(arguments.workdir)}")
    return 0


def _attacks(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from badloss_jax.config import load_config
    from badloss_jax.core.progress import Progress
    from badloss_jax.report.tables import as_text, attack_table
    from badloss_jax.runs.poison import picture_attacks

    if arguments.out.suffix.lower() != ".png":
        raise UsageError(f"--out {arguments.out}: expected a file name that ends in .png")
    config = load_config(arguments.config, overrides)
    _set_up_jax()
    about = picture_attacks(config, arguments.out, Progress())
    print(f"\n{as_text(attack_table(about))}\n\nPicture: {arguments.out}")
    return 0


def _prepare(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from badloss_jax.core.progress import Progress
    from badloss_jax.data.prepare import prepare

    prepare(arguments.name, arguments.source, arguments.to, arguments.size, Progress())
    return 0


def _bench(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from badloss_jax.cli.bench import measure

    _set_up_jax()
    return measure(arguments, overrides, arguments.argv)


def _set_up_jax() -> None:
    """Keeps compiled programs in the user's own cache folder, and off the screen what orbax logs before it raises."""
    import logging

    import absl.logging
    import jax

    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    cache = Path("~/.cache/badloss_jax/xla").expanduser()
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache))


def _command(commands: Any, name: str, summary: str, about: str, examples: list[str]) -> argparse.ArgumentParser:
    epilog = _OVERRIDES.format(examples="\n".join(f"  {example}" for example in examples))
    return commands.add_parser(
        name, help=summary, description=about, epilog=epilog, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
