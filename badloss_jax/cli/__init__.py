"""The command `badloss`: one module a command, which `COMMANDS` lists.

A command is a module with SUMMARY and ABOUT (its help), EPILOG (the end of that), `add_arguments(parser)` and
`run(arguments, overrides) -> exit code`. Nothing heavy is imported before it runs, so that a help text waits for
nothing. May import everything. Begin with `run`.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

from badloss_jax.cli import attacks, bench, plan, prepare, report, run, scan, score, summary, sweep
from badloss_jax.cli.start import explain, out_of_memory
from badloss_jax.core import __version__
from badloss_jax.core.errors import BadlossError

COMMANDS: dict[str, ModuleType] = {
    "scan": scan,
    "run": run,
    "score": score,
    "report": report,
    "sweep": sweep,
    "attacks": attacks,
    "summary": summary,
    "plan": plan,
    "prepare": prepare,
    "bench": bench,
}
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
  badloss plan --config configs/imagenet.py --topology v5e:16x16   say what a run takes of a machine that is not there
  badloss prepare imagenet2012 --from TARS --to DIR       write a large data set once, for data.source=tfds
  badloss bench train                                     measure speed, and what recording costs, on this machine
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "badloss", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"badloss_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        of_command = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.ABOUT,
            epilog=command.EPILOG,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        of_command.set_defaults(configurable=False, goes_on_from="")
        command.add_arguments(of_command)

    # Settings are no options of argparse: there are a hundred, and configs check them.
    arguments, overrides = parser.parse_known_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)
    strangers = [text for text in overrides if not (arguments.configurable and text.startswith("--config."))]
    if strangers:
        commands.choices[arguments.command].error(
            f"unknown argument {strangers[0]!r}; settings are written --config.GROUP.KEY=VALUE"
        )
    return _guarded(COMMANDS[arguments.command], arguments, overrides)


def _guarded(command: ModuleType, arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Does the work; turns what went wrong into one screen and an exit code."""
    # A warning is a line for people, without the place in the code.
    warnings.showwarning = lambda message, *_, **__: print(f"badloss: warning: {message}", file=sys.stderr)
    try:
        return command.run(arguments, overrides)
    except BadlossError as error:
        return explain(error)
    except (MemoryError, RuntimeError) as error:  # JAX's errors are RuntimeErrors
        exhausted = out_of_memory(error)
        if exhausted is None:
            raise
        return explain(exhausted)
    except OSError as error:
        print(f"badloss: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = ""
        if arguments.goes_on_from:
            hint = f"; the same command goes on from the last {arguments.goes_on_from}"
        print(f"badloss: interrupted{hint}", file=sys.stderr)
        return 130
