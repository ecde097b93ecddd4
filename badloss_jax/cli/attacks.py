"""`badloss attacks`."""

import argparse
from pathlib import Path

from badloss_jax.cli.start import set_up_jax, settings_and

SUMMARY = "show every attack's trigger"
ABOUT = """\
Draw a grid of every attack's trigger on images of the data set: image, triggered image, difference times ten. narcissus
trains its surrogate for it, unless --config.attacks.manifest names a manifest that has the perturbation.
"""
EPILOG = settings_and(["badloss attacks --config configs/digits.py --out /tmp/attacks.png"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.set_defaults(configurable=True)
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="config file, and its variant if any")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.png", help="the picture")


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Draws the picture, and prints who attacks what.

    Args:
      arguments: of the command line, parsed.
      overrides: `--config.KEY=VALUE`, as they were given.

    Returns:
      The exit code.
    """
    from badloss_jax.config import load_config
    from badloss_jax.core.files import check_writable
    from badloss_jax.core.progress import Progress
    from badloss_jax.report.tables import as_text, attack_table
    from badloss_jax.runs.poison import picture_attacks

    config = load_config(arguments.config, overrides)
    check_writable(arguments.out, ".png")
    set_up_jax()
    results = picture_attacks(config, arguments.out, Progress())
    print(f"\n{as_text(attack_table(results))}\n\nPicture: {arguments.out}")
    return 0
