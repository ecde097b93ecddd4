"""`badloss plan`."""

import argparse
from pathlib import Path

from badloss_jax.cli.start import cache_folder, set_up_jax, settings_and, without_paths
from badloss_jax.core import topology as topologies
from badloss_jax.core.errors import UsageError

SUMMARY = "what a run would take of a machine, there or not"
ABOUT = """\
Say what `badloss run` with a config would take: memory of each device against what it has, hours of every phase at the
least, images a second to be decoded, storage. Nothing runs, and neither the machine nor the data has to be there.

The programs of the run are compiled for the machine, where a compiler for it is installed: TPUs by the extra 'tpu',
GPUs by the extra 'cuda'. A ResNet-50 takes minutes, once: what is read of a compiled program is kept in ~/.cache. Else,
and with --quick, all is arithmetic. Each figure says which it is.

TOPOLOGY is v4, v5e, v5p or v6e with the chips along each axis (v5e:1x1, v5e:16x16, v5p:4x4x4), h100:NODESxGPUS, or
local. Exit code 2 means that the run does not fit; what would make it fit is said.
"""
EPILOG = settings_and(
    [
        "badloss plan --config configs/imagenet.py --topology v5e:2x4 --quick",
        "badloss plan --config configs/imagenet.py:large_batch --topology v5e:16x16 --out plan.json",
        "badloss plan --config configs/imagenet.py:large_batch --topology v5p:4x4x4 --examples 1000000000",
        "badloss plan --config configs/digits.py --steps 20",
    ]
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.set_defaults(configurable=True)
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="config file, and its variant if any")
    parser.add_argument("--topology", default=topologies.LOCAL, help="the machine (default: this one)")
    parser.add_argument("--quick", action="store_true", help="arithmetic alone, in seconds: compile nothing")
    parser.add_argument("--examples", type=int, metavar="N", help="training images, if not those of the data set")
    parser.add_argument("--classes", type=int, metavar="K", help="classes, likewise")
    parser.add_argument("--image_size", type=int, metavar="PX", help="pixels a side, likewise")
    parser.add_argument("--rate", type=float, metavar="R", help="say the hours at R images a second a device, too")
    parser.add_argument("--steps", type=int, default=0, metavar="S", help="time S calls of each program (this machine)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keeps all figures")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Plans a run, and prints what it takes.

    Args:
      arguments: of the command line, parsed.
      overrides: `--config.KEY=VALUE`, as they were given.

    Returns:
      The exit code: 2 if the run does not fit.

    Raises:
      UsageError: a wrong option or setting.
    """
    _check(arguments)
    topology = None
    if arguments.topology != topologies.LOCAL:
        topology = topologies.parse(arguments.topology)
    # JAX reads the environment when it is imported, as it is by what follows.
    topologies.prepare(topology)

    import json

    from badloss_jax.config import load_config
    from badloss_jax.core.files import check_writable, write_text
    from badloss_jax.core.progress import Progress
    from badloss_jax.report.plan import as_lines
    from badloss_jax.runs.images import Sizes, images_of
    from badloss_jax.runs.plan import make_plan
    from badloss_jax.runs.programs import Machine

    config = load_config(arguments.config, overrides)
    if arguments.out:
        check_writable(arguments.out, ".json")
    if topology is None:
        set_up_jax()
    name = Path(arguments.config.partition(":")[0]).stem
    images = images_of(config, name, Sizes(arguments.examples, arguments.classes, arguments.image_size))
    machine = Machine.of(topology, quick=arguments.quick)
    plan = make_plan(
        config,
        images,
        machine,
        Progress(),
        steps=arguments.steps,
        rate=arguments.rate,
        kept=cache_folder("plans"),
    )
    plan = {"command": ["badloss", *without_paths(arguments.argv)]} | plan

    if arguments.out:
        write_text(arguments.out, json.dumps(plan, indent=2, allow_nan=False) + "\n")
    print("\n".join(as_lines(plan)))
    if arguments.out:
        print(f"\nFigures: {arguments.out}")
    return 0 if plan["fits"] else UsageError.exit_code


def _check(arguments: argparse.Namespace) -> None:
    """Checks the options whose values have a range."""
    for name in ("examples", "classes", "image_size", "rate"):
        value = getattr(arguments, name)
        # Written so that "nan" is refused, too.
        if value is not None and not value > 0:
            raise UsageError(f"--{name} {value}: expected a positive number")
    if arguments.steps < 0:
        raise UsageError(f"--steps {arguments.steps}: expected a number of at least 0")
    if arguments.steps and (arguments.quick or arguments.topology != topologies.LOCAL):
        raise UsageError("--steps times what runs on this machine: it goes with --topology local, without --quick")
