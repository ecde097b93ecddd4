"""`badloss bench numerics`: how far float32 is from float64, with the JAX, the flags and the machine that are there."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from badloss_jax.benchmarks.options import add_integer, names_of

ABOUT = """\
Take one training step and one look in float32 and in float64, from the same weights and images, and print how far
they are apart: the L2 norm of the difference, relative to that of the float64 result. Rounding leaves some 1e-7 of
losses and features; gradients of deep networks have more of it, where ReLUs switch. A version of JAX, or a flag of
XLA, that computes wrongly shows here.
"""

EXAMPLES = """\
examples:
  badloss bench numerics --out OUT.json
  badloss bench numerics --models resnet50 --image_size 64 --batch_size 8
"""

_MODELS = ("resnet_small", "resnet18", "mobilenet_v2", "vgg16_bn")


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the benchmark's own options."""
    parser.add_argument(
        "--models", default=",".join(_MODELS), metavar="A,B", help=f"networks, in turn (default {','.join(_MODELS)})"
    )
    add_integer(parser, "image_size", 32, "pixels a side")
    add_integer(parser, "batch_size", 32, "images")


def measure(arguments: Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures one network after the other.

    Args:
      arguments: those of `add_arguments`.
      overrides: none, there are no settings.

    Yields:
      What `measure_rounding` returns.

    Raises:
      UsageError: an unknown network, or a batch that the devices cannot share.
    """
    from badloss_jax.benchmarks.rounding import measure_rounding
    from badloss_jax.core.mesh import check_batch_size, make_mesh
    from badloss_jax.models import MODELS, ModelSpec

    names = names_of("models", arguments.models, tuple(MODELS))
    mesh = make_mesh()
    check_batch_size("--batch_size", arguments.batch_size, mesh)
    for name in names:
        spec = ModelSpec(name, (arguments.image_size, arguments.image_size, 3), num_classes=10)
        yield measure_rounding(spec, arguments.batch_size, mesh)


def table(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows: per network the relative errors of what training and looking give."""
    rows = [["network", "px", "batch", "losses", "gradients", "weights", "logits", "features"]]
    for figure in figures:
        model = figure["model"]
        cells = [model["name"], str(model["image_shape"][0]), str(figure["batch_size"])]
        rows.append(cells + [f"{figure['errors'][name]:.1e}" for name in rows[0][3:]])
    return rows
