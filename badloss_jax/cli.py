"""The command `badloss`."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from badloss_jax import __version__
from badloss_jax.errors import BadlossError, UsageError

_ABOUT = """\
Finds poisoned training examples by how a network learns them (BaDLoss, ICLR 2025), in JAX.

  badloss run --config configs/digits.py --workdir OUT    poison, record, score, remove, retrain, report
  badloss score --workdir OUT --config.scoring.loss.k=5   score the same recording again, without training
  badloss summary OUT0 OUT1 OUT2                          mean and spread over the runs of several seeds
  badloss report --workdir OUT                            render the report again, from the files of the run
  badloss attacks --config configs/digits.py --out A.png  show every attack's trigger as a picture
"""

_RUN = """\
Run a whole experiment: poison a training set with several attacks at once, record how a network learns each example,
score the examples against a few known-clean probes, remove what stands out, retrain, and measure clean accuracy and
attack success before and after.

The same command in the same folder goes on after the last finished phase. OUT then holds report.html (look at this),
report.md, results.json and scores.parquet (for scripts), trajectories.png, roc.png, metrics.jsonl, manifest.json (the
poison), trajectories/ (for `badloss score`) and models/ (orbax: undefended, loss-fraction, ...).
"""

_SCORE = """\
Score the recorded trajectories of a finished `badloss run` again with other settings, without training. Results go to
OUT/rescored/<hash>/; the run's own are never touched. Only scoring.* and rejection.* can change.
"""

_SUMMARY = """\
Print a Markdown table over finished runs that differ in their seed alone: of each trained model the mean, and the
standard deviation of the sample, in percent (AUROC: 0 to 1).
"""

_REPORT = """\
Render report.html, report.md and the plots again from the files of a finished run, or of one of its rescorings
(OUT/rescored/HASH). Nothing is trained or scored, and the data set is not needed.
"""

_ATTACKS = """\
Draw a grid of every attack's trigger on images of the data set: image, triggered image, difference times ten. narcissus
trains its surrogate for it, unless --config.attacks.manifest names a manifest that has the perturbation.
"""

_OVERRIDES = """\
settings:
  --config.GROUP.KEY=VALUE changes one setting, repeatedly; `badloss_jax/config.py` lists all with their meaning.
  An unknown key or an impossible value is refused, with the nearest valid one, before any work starts.

examples:
{examples}

exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "badloss", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"badloss_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    run = _command(commands, "run", "run a whole experiment", _RUN, [
        "badloss run --config configs/digits.py --workdir /tmp/digits --config.seed=1",
        "badloss run --config configs/cifar10.py:quick --config.data.dir=DIR --workdir /tmp/cifar10",
        "badloss run --config configs/digits.py --workdir /tmp/patch \"--config.attacks.names=('patch',)\"",
    ])  # fmt: skip
    run.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="config file, and its variant if any")
    run.add_argument("--workdir", required=True, type=Path, metavar="OUT", help="folder of this run, new or its own")
    score = _command(commands, "score", "score a recording again, without training", _SCORE, [
        "badloss score --workdir /tmp/digits --config.scoring.loss.k=5 --config.rejection.alpha=0.05",
    ])  # fmt: skip
    score.add_argument("--workdir", required=True, type=Path, metavar="OUT", help="folder of a finished run")

    report = commands.add_parser("report", help="render the report of a run again", description=_REPORT,
                                 formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)  # fmt: skip
    report.add_argument("--workdir", required=True, type=Path, metavar="OUT", help="folder of a finished run")

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

    arguments, overrides = parser.parse_known_args(argv)
    configurable = arguments.command in ("run", "score", "attacks")
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
        work = {"run": _run, "score": _score, "summary": _summary, "report": _report, "attacks": _attacks}
        return work[arguments.command](arguments, overrides)
    except BadlossError as error:
        print(f"badloss: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"badloss: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("badloss: interrupted; the same command goes on after the last finished phase", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from badloss_jax.config import load_config
    from badloss_jax.experiment import run_experiment
    from badloss_jax.progress import Progress
    from badloss_jax.report.tables import as_text, detection_table, short_table

    config = load_config(arguments.config, overrides)
    _set_up_jax()
    results = run_experiment(config, arguments.workdir, Progress())
    print(f"\n{as_text(short_table(results))}\n")
    if not any("retrained" in variant for variant in results["variants"].values()):
        print(f"{as_text(detection_table(results))}\n")
    print(f"Report: {arguments.workdir / 'report.html'}")
    return 0


def _score(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from badloss_jax.config import override
    from badloss_jax.experiment import rescore
    from badloss_jax.report.tables import as_text, detection_table, removal_table

    folder, results = rescore(arguments.workdir, lambda config: override(config, overrides))
    for key, change in results["changed"].items():
        print(f"{key}: {change}")
    print(f"\n{as_text(detection_table(results))}\n\n{as_text(removal_table(results))}\n")
    print(f"Report: {folder / 'report.html'}")
    return 0


def _summary(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from badloss_jax.report.results import read_results
    from badloss_jax.report.tables import as_markdown, summary

    files = [run if run.suffix == ".json" else run / "results.json" for run in arguments.runs]
    print(as_markdown(summary([read_results(file) for file in files])))
    return 0


def _report(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from badloss_jax.report.page import write_reports
    from badloss_jax.workdir import locked

    if not (arguments.workdir / "results.json").is_file():
        raise UsageError(f"--workdir {arguments.workdir} holds no finished run (no results.json in it)")
    with locked(arguments.workdir):
        print(f"Report: {write_reports(arguments.workdir)}")
    return 0


def _attacks(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from badloss_jax.config import load_config
    from badloss_jax.experiment import picture_attacks
    from badloss_jax.progress import Progress
    from badloss_jax.report.tables import as_text, attack_table

    if arguments.out.suffix.lower() != ".png":
        raise UsageError(f"--out {arguments.out}: expected a file name that ends in .png")
    config = load_config(arguments.config, overrides)
    _set_up_jax()
    about = picture_attacks(config, arguments.out, Progress())
    print(f"\n{as_text(attack_table(about))}\n\nPicture: {arguments.out}")
    return 0


def _set_up_jax() -> None:
    """Keeps compiled programs in the user's own cache folder, and off the screen what orbax logs before it raises."""
    import jax
    from absl import logging

    logging.set_verbosity(logging.FATAL)
    cache = Path("~/.cache/badloss_jax/xla").expanduser()
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache))


def _command(commands: Any, name: str, summary: str, about: str, examples: list[str]) -> argparse.ArgumentParser:
    epilog = _OVERRIDES.format(examples="\n".join(f"  {example}" for example in examples))
    return commands.add_parser(
        name, help=summary, description=about, epilog=epilog, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
