"""`badloss bench train`: training throughput, and what recording costs."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

ABOUT = """\
Measure the training step with recording off, "sweep" and "step", in turns: seconds a step, examples a second, what
recording costs per step and per epoch. Images are synthetic noise, unless --config names a data set. --peer torch
measures the same training in PyTorch beside it, in the same turns.
"""

EXAMPLES = """\
examples:
  badloss bench train --out OUT.json
  badloss bench train --models resnet50 --image_size 224 --classes 1000 --config.model.dtype=bfloat16
  badloss bench train --config configs/cifar10.py --config.data.dir=DIR --models resnet18,resnet50 --scan
  badloss bench train --models resnet_small,resnet18 --peer torch
  taskset -c 0 badloss bench train --peer torch      measures one core

--config.GROUP.KEY=VALUE changes a setting, such as recording.batch_size (128), recording.kinds or model.dtype.
"step" stores the training step's own outputs; "sweep" passes over the training set after each epoch, and its steps
are those without recording: what they seem to cost is the error of the measurement.

--peer torch needs PyTorch, which is no dependency (pip install torch), one CPU device, float32, and resnet_small or
resnet18, 34 or 50. It begins with the same weights, takes the same batches in the same order, and has as many threads
as JAX: one for each core that the process may use.
"ours / torch" is how many times as long our step takes, recording off: below 1, ours is faster.
"""


def add_arguments(parser: ArgumentParser) -> None:
    """Adds the benchmark's own options."""
    parser.set_defaults(configurable=True)
    parser.add_argument(
        "--config",
        metavar="FILE[:VARIANT]",
        help="take its settings, and its images; without, the default settings, and synthetic images of 32 px",
    )
    parser.add_argument("--models", metavar="A,B", help="networks, in turn (default: the config's, or resnet_small)")
    parser.add_argument("--image_size", type=int, metavar="PX", help="synthetic images, also with --config")
    parser.add_argument("--examples", type=int, default=12_800, metavar="N", help="synthetic ones (default 12800)")
    parser.add_argument("--classes", type=int, default=10, metavar="K", help="of synthetic images (default 10)")
    parser.add_argument(
        "--seconds", type=float, default=30, metavar="S", help="of steps, for each network (default 30)"
    )
    parser.add_argument("--scan", action="store_true", help="measure whole epochs under lax.scan, too")
    parser.add_argument("--peer", metavar="NAME", help="train by this framework, too, beside ours: torch")


def before_jax_starts(arguments: Namespace) -> None:
    """Keeps memory, as the commands that train do."""
    from badloss_jax.core.memory import keep_memory

    keep_memory()


def measure(arguments: Namespace, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measures the training of one network after the other.

    Args:
      arguments: those of `add_arguments`.
      overrides: changed settings.

    Yields:
      What `measure_training` returns.

    Raises:
      UsageError: a wrong setting, an unknown network, images that are streamed, or a peer that is not installed or
        cannot do the same work.
      NonFiniteLossError: a training diverged.
    """
    from badloss_jax.benchmarks.peers import check_peer, check_workload
    from badloss_jax.benchmarks.throughput import measure_training
    from badloss_jax.benchmarks.workload import choose_config, choose_images, make_workload
    from badloss_jax.config import override
    from badloss_jax.core.mesh import check_batch_size, make_mesh

    if arguments.peer:
        check_peer(arguments.peer)

    config = choose_config(arguments.config, overrides)
    names = arguments.models.split(",") if arguments.models else [config.model.name]
    for name in names:
        # Refuses what is no network before anything starts.
        override(config, [f"--config.model.name={name}"])

    mesh = make_mesh()
    check_batch_size("recording.batch_size", config.recording.batch_size, mesh)
    images = choose_images(arguments, config, mesh)

    workloads = [make_workload(name, config, images, mesh) for name in names]
    if arguments.peer:
        # All of them before the first is measured.
        for workload in workloads:
            check_workload(arguments.peer, workload)

    if arguments.scan and mesh.devices.flat[0].platform == "cpu":
        print(
            "badloss: warning: on CPUs a scanned epoch can take far longer than a looped one: keep --examples small",
            file=sys.stderr,
        )
    for workload in workloads:
        yield measure_training(workload, arguments.seconds, arguments.scan, arguments.peer)


def table(figures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns header and rows: per network and mode milliseconds a step, of them those in which the host starts it,
    examples a second, and the costs of recording.

    The row of a peer has the ratio of our step to its own in their place.
    """
    rows = [
        [
            "network",
            "px",
            "dtype",
            "recording",
            "ms/step",
            "dispatch",
            "examples/s",
            "of a step",
            "95 % interval",
            "of an epoch",
        ]
    ]
    for figure in figures:
        rows += [_mode_row(figure, mode) for mode in figure["step_seconds"]]
        if figure["scan"]:
            rows.append(_scan_row(figure))
        if figure["peer"]:
            rows.append(_peer_row(figure))
    return rows


def _mode_row(figure: Mapping[str, Any], mode: str) -> list[str]:
    """Returns the row of one mode of recording."""
    # What the others are compared with costs nothing.
    costs = ["", "", ""]
    if mode != "off":
        of_epoch = f"{figure['epoch_overhead_percent'][mode]:+.1f} %"
        costs = [*_cost_cells(figure["step_overhead"][mode]), of_epoch]

    return [
        *_network_cells(figure),
        mode,
        f"{1000 * figure['step_seconds'][mode]['median']:.2f}",
        f"{1000 * figure['dispatch_seconds'][mode]['median']:.2f}",
        f"{figure['examples_per_second'][mode]:,.0f}",
        *costs,
    ]


def _scan_row(figure: Mapping[str, Any]) -> list[str]:
    """Returns the row of the epochs under `lax.scan`, beside those of a loop."""
    seconds = figure["scan"]["scan_seconds"]["median"]
    return [
        *_network_cells(figure),
        "off, scanned",
        f"{1000 * seconds / figure['steps_per_epoch']:.2f}",
        "",
        f"{figure['examples'] / seconds:,.0f}",
        *_cost_cells(figure["scan"]["overhead"]),
        "",
    ]


def _peer_row(figure: Mapping[str, Any]) -> list[str]:
    """Returns the row of another framework, with how many times as long ours takes."""
    peer = figure["peer"]
    low, high = peer["ratio"]["interval"]
    return [
        *_network_cells(figure),
        peer["name"],
        f"{1000 * peer['step_seconds']['median']:.2f}",
        "",
        f"{peer['examples_per_second']:,.0f}",
        f"ours / {peer['name']} {peer['ratio']['median']:.3f}",
        f"{low:.3f} to {high:.3f}",
        "",
    ]


def _network_cells(figure: Mapping[str, Any]) -> list[str]:
    model = figure["model"]
    return [model["name"], str(model["image_shape"][0]), model["dtype"]]


def _cost_cells(cost: Mapping[str, Any]) -> list[str]:
    low, high = cost["interval"]
    return [f"{cost['percent']:+.2f} %", f"{low:+.2f} to {high:+.2f}"]
